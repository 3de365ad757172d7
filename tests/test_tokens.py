"""A tokenized corpus has the tokens of its documents encoded one by one, and is rejected if it is incomplete."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import write_rows
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, ByT5Tokenizer, TokenizersBackend
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from healthslm.errors import UserError
from healthslm.tokenization.encoding import encode_documents, encode_texts, open_tokenizer, separator_id
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus
from healthslm.tokenization.tokens import TokenizedSplit

DOCUMENTS = {
    "train/a": [("Title", "Text of the β-blocker.\nSecond line."), ("", "Untitled"), ("Only a title", "")],
    "train/b": [],
    "train/c": [
        ("Spelt <|endoftext|> out", "<|pad|> and <|user|>"),
        *[(f"Title {n}", "word " * n) for n in range(1500)],
    ],
    "validation/a": [("日本語", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u0000\t  end ")],
}


def tokenize(corpus: Path, tokenizer: Path, folder: Path, workers: int = 1) -> Path:
    tokenize_corpus(TokenizeOptions(corpus=corpus, tokenizer=str(tokenizer), output=folder / "tokens", workers=workers))
    return folder / "tokens"


def text_of(title: str, text: str) -> str:
    return f"{title}\n{text}" if title else text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    schema = pa.schema({"id": pa.string(), "title": pa.string(), "text": pa.string()})
    for name, documents in DOCUMENTS.items():
        rows = [{"id": str(n), "title": title, "text": text} for n, (title, text) in enumerate(documents)]
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    architecture = get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(repository))()
    architecture.train_new_from_iterator([["word Title Text line"] * 9], 280, show_progress=False).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def tokens(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenize(corpus, tokenizer_folder, tmp_path_factory.mktemp("tokenized"))


@pytest.fixture
def copy(tokens: Path, tmp_path: Path) -> Path:
    """A copy of the tokenized corpus, to damage."""
    return Path(shutil.copytree(tokens, tmp_path / "tokens"))


def expected(tokenizer_file: Path, separator: int, split: str) -> list[list[int]]:
    """Every document of a split, encoded by itself with only the tokenizers library."""
    plain = Tokenizer.from_file(str(tokenizer_file))
    plain.encode_special_tokens = True
    documents = itertools.chain.from_iterable(DOCUMENTS[name] for name in sorted(DOCUMENTS) if name.startswith(split))
    return [[separator, *plain.encode(text_of(*row), add_special_tokens=False).ids] for row in documents]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_document_is_the_separator_and_its_tokens(tokens, tokenizer_folder, split):
    opened = TokenizedSplit(tokens, split)
    documents = expected(tokenizer_folder / "tokenizer.json", 0, split)
    assert [opened.document(index).tolist() for index in range(len(opened))] == documents
    assert opened.num_tokens == sum(map(len, documents))


def test_lengths_are_those_of_the_documents(tokens, tokenizer_folder):
    documents = expected(tokenizer_folder / "tokenizer.json", 0, "train")
    assert TokenizedSplit(tokens, "train").document_lengths.tolist() == [*map(len, documents)]


def test_a_missing_document_is_an_error(tokens):
    opened = TokenizedSplit(tokens, "train")
    for index in (-1, len(opened)):
        with pytest.raises(IndexError):
            opened.document(index)


def test_byte_counts_are_those_of_the_text_in_utf8(tokens):
    opened = TokenizedSplit(tokens, "train")
    texts = [text_of(*row) for name in sorted(DOCUMENTS) if name.startswith("train") for row in DOCUMENTS[name]]
    assert opened.document_bytes.tolist() == [len(text.encode("utf-8")) for text in texts]


def test_arrays_are_plain_numpy_files_with_small_integers(tokens):
    array = np.load(tokens / "train" / "a.tokens.npy", mmap_mode="r")
    assert isinstance(array, np.memmap)
    assert array.dtype == np.uint16
    assert np.load(tokens / "train" / "a.ends.npy").dtype == np.int64
    assert np.load(tokens / "train" / "a.ends.npy")[-1] == len(array)


def test_the_script_with_two_processes_writes_the_same_bytes(corpus, tokenizer_folder, tokens, run_script, tmp_path):
    arguments = ("--corpus", corpus, "--tokenizer", tokenizer_folder, "--output", tmp_path / "tokens", "--workers", 2)
    done = run_script("tokenize_corpus", *arguments)
    assert done.returncode == 0, done.stderr
    written = [path.relative_to(tokens) for path in tokens.rglob("*") if path.is_file() and "logs" not in path.parts]
    assert len(written) == 3 * len(DOCUMENTS) + 3
    for path in written:
        assert (tmp_path / "tokens" / path).read_bytes() == (tokens / path).read_bytes()


@pytest.mark.parametrize("change", ["vocabulary", "separator"])
def test_another_tokenizer_replaces_the_tokens_of_an_earlier_run(tokenizer_folder, repository, tmp_path, change):
    other = AutoTokenizer.from_pretrained(tokenizer_folder)
    if change == "vocabulary":
        other = get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(repository))()
    else:
        other.eos_token = "<|end|>"
    other.save_pretrained(tmp_path / "other")
    write_rows(tmp_path / "corpus" / "train" / "a.parquet", [{"title": "Title", "text": "word line"}])
    tokenize(tmp_path / "corpus", tokenizer_folder, tmp_path)
    tokens = TokenizedSplit(tokenize(tmp_path / "corpus", tmp_path / "other", tmp_path), "train")
    plain = Tokenizer.from_file(str(tmp_path / "other" / "tokenizer.json"))
    ids = plain.encode("Title\nword line", add_special_tokens=False).ids
    assert tokens.document(0).tolist() == [other.eos_token_id, *ids]


def test_gpt2s_tokenizer_works_too(corpus, test_data, tmp_path):
    gpt2 = test_data / "tokenizers" / "gpt2"
    opened = TokenizedSplit(tokenize(corpus, gpt2, tmp_path), "train")
    assert (opened.vocab_size, opened.separator_id) == (50_257, 50_256)
    documents = expected(gpt2 / "tokenizer.json", 50_256, "train")
    assert [opened.document(index).tolist() for index in range(len(opened))] == documents


def test_token_ids_beyond_16_bits_take_32_bits(corpus, repository, tmp_path):
    architecture = get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(repository))
    vocab = architecture().get_vocab()
    vocab |= {f"unused {n}": len(vocab) + n for n in range(2**16)}
    architecture(vocab).save_pretrained(tmp_path / "large")
    opened = TokenizedSplit(tokenize(corpus, tmp_path / "large", tmp_path), "validation")
    assert opened.document(0).dtype == np.uint32
    assert opened.document(0).tolist() == expected(tmp_path / "large" / "tokenizer.json", 0, "validation")[0]


def test_the_reader_needs_only_numpy(tokens):
    code = "import sys; from healthslm.tokenization.tokens import TokenizedSplit; from pathlib import Path; " + (
        "TokenizedSplit(Path(sys.argv[1]), 'train').document(0); "
        "assert not {'torch', 'transformers', 'tokenizers', 'pyarrow', 'datatrove'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tokens)], check=True)


def cut_tokens(folder: Path) -> None:
    path = folder / "train" / "c.tokens.npy"
    path.write_bytes(path.read_bytes()[:-10])


def drop_bytes(folder: Path) -> None:
    (folder / "train" / "a.bytes.npy").unlink()


def widen_ends(folder: Path) -> None:
    np.save(folder / "train" / "a.ends.npy", np.load(folder / "train" / "a.ends.npy").astype(np.float64))


def shorten_ends(folder: Path) -> None:
    np.save(folder / "train" / "a.ends.npy", np.load(folder / "train" / "a.ends.npy") - 1)


def swap_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"version": "2.0"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (cut_tokens, "train/c.tokens.npy"),
        (drop_bytes, "train/a.bytes.npy"),
        (widen_ends, "train/a.ends.npy"),
        (shorten_ends, "train/a"),
        (swap_tokenizer, "tokenizer"),
    ],
)
def test_a_damaged_folder_is_rejected_in_one_line_that_names_the_file(copy, damage, place):
    damage(copy)
    with pytest.raises(UserError, match=f"^{re.escape(str(copy / place))}") as caught:
        TokenizedSplit(copy, "train")
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_rejected_with_advice(tokens):
    with pytest.raises(UserError, match="no test documents; build the corpus with a larger --test-fraction"):
        TokenizedSplit(tokens, "test")


@pytest.fixture
def bad_inputs(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    """Pairs of corpus and tokenizer of which one is bad, by the beginning of the error message."""
    cut, empty, mute, broken = (tmp_path / name for name in ("cut", "empty", "mute", "broken"))
    shutil.copytree(corpus, cut)
    whole = (cut / "train" / "c.parquet").read_bytes()
    (cut / "train" / "c.parquet").write_bytes(whole[: len(whole) // 2])
    empty.mkdir()
    TokenizersBackend(tokenizer_object=Tokenizer(BPE())).save_pretrained(mute)
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    return {
        f"{cut / 'train' / 'c.parquet'}: not a Parquet file": (cut, tokenizer_folder),
        f"{empty}: no Parquet files": (empty, tokenizer_folder),
        f"{tmp_path / 'absent'}: no such folder": (tmp_path / "absent", tokenizer_folder),
        f"{empty}: no tokenizer in this folder; scripts/train_tokenizer.py trains one": (corpus, empty),
        f"{broken}: cannot open the tokenizer": (corpus, broken),
        f"{mute}: the tokenizer has no token to separate documents; set its eos_token": (corpus, mute),
    }


def test_without_an_end_of_text_the_beginning_of_text_separates(corpus, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="<|user|>", eos_token=None)
    assert separator_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>") != 0
    (document,) = encode_documents(tokenizer, ["word <|user|>"])
    assert document.tolist() == [tokenizer.bos_token_id, *encode_texts(tokenizer, ["word <|user|>"])[0]]


def test_a_slow_tokenizer_is_rejected(tmp_path):
    """This one has no fast form: it has a token for each byte."""
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: not a fast tokenizer"):
        open_tokenizer(str(tmp_path))


def test_bad_input_is_rejected_in_one_line_and_leaves_no_tokens(bad_inputs, tmp_path):
    for message, (corpus, tokenizer) in bad_inputs.items():
        with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
            tokenize(corpus, tokenizer, tmp_path)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "tokens").exists()


def test_a_damaged_corpus_file_ends_the_script_with_one_line(bad_inputs, run_script, tmp_path):
    message, (corpus, tokenizer) = next(iter(bad_inputs.items()))
    arguments = ("--corpus", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "tokens", "--workers", 2)
    done = run_script("tokenize_corpus", *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tokens").exists()


def test_a_corpus_given_as_tokens_is_rejected_with_the_command_that_tokenizes_it(corpus):
    command = f"scripts/tokenize_corpus.py --corpus {corpus} --tokenizer TOKENIZER --output tokens"
    message = f"{corpus}: this is a corpus, not a tokenized corpus; tokenize it first: {command}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        TokenizedSplit(corpus, "train")


def test_a_folder_without_tokens_is_rejected(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: not a tokenized corpus (no tokens.json)")):
        TokenizedSplit(tmp_path, "train")


@pytest.mark.parametrize("kind", ["file", "folder with other files"])
def test_an_output_that_would_replace_something_else_is_rejected(corpus, tokenizer_folder, tmp_path, kind):
    output = tmp_path / "tokens"
    mine = output if kind == "file" else output / "thesis.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    problem = "is a file, but" if kind == "file" else "holds other files than"
    with pytest.raises(UserError, match=f"^{output}: {problem} a tokenized corpus"):
        tokenize(corpus, tokenizer_folder, tmp_path)
    assert mine.read_text() == "mine"
