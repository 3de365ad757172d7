"""The tokenizer restores every text, keeps special tokens apart from text, and needs no custom code once saved."""

import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from healthslm.errors import UserError
from healthslm.tokenization.tokenizer import TokenizerOptions, train_tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SENTENCES = [
    "Metformin lowered HbA1c by 1.12% (95% CI 0.92 to 1.32; p<0.001).",
    "Patients who didn't respond received 10 mg/kg of the β-blocker.",
    "Aspirin inhibits cyclooxygenase-1 and the synthesis of thromboxane A₂.",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of random made-up words and the sentences above."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(500)]
    for split, documents in (("train", 300), ("validation", 20)):
        texts = [" ".join([*chance.choices(words, k=30), *SENTENCES]) for _ in range(documents)]
        (folder / split).mkdir()
        titles = [" ".join(chance.choices(words, k=5)) for _ in texts]
        pq.write_table(pa.table({"title": titles, "text": texts}), folder / split / "00000.parquet")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, run_script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    done = run_script("train_tokenizer", "--corpus", corpus, "--output", folder, "--vocab-size", 1000)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)


def hard_texts() -> list[str]:
    """Random text from all Unicode planes, white space, control characters, and spelled-out special tokens."""
    chance = random.Random(1)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    spaces = [character for character in characters if character.isspace()]
    texts = ["".join(chance.choices(characters, k=chance.randint(0, 40))) for _ in range(300)]
    texts += ["".join(chance.choices([*spaces, "a", "1", "."], k=20)) for _ in range(300)]
    texts += ["".join(chance.choices([*SPECIAL_TOKENS, " ", "|", "<", "end"], k=8)) for _ in range(300)]
    texts += ["".join(map(chr, range(0x300))), "e\u0301 \u00e9 \u212b \ufb01", "\ufeff\x00\x1c", "\r\n\r \n\t", ""]
    return texts + SENTENCES


def test_every_unicode_character_survives(tokenizer):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(characters[start : start + 1000]) for start in range(0, len(characters), 1000)]
    ids = tokenizer(texts, verbose=False).input_ids
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


@pytest.mark.parametrize("split_special_tokens", [True, False])
def test_any_text_is_restored_exactly(tokenizer, split_special_tokens):
    texts = hard_texts()
    encoding = tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special_tokens)
    assert tokenizer.batch_decode(encoding.input_ids) == texts


def test_a_spelled_out_special_token_can_be_encoded_as_text(tokenizer):
    text = " and ".join(SPECIAL_TOKENS)
    as_text = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    as_markers = tokenizer(text, add_special_tokens=False).input_ids
    assert not set(as_text) & set(tokenizer.all_special_ids)
    assert [token for token in as_markers if token in tokenizer.all_special_ids] == list(range(len(SPECIAL_TOKENS)))


def test_special_tokens_have_the_first_ids(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(len(SPECIAL_TOKENS))) == SPECIAL_TOKENS
    assert sorted(tokenizer.all_special_ids) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_the_models_configuration_names_the_same_special_tokens(repository, tokenizer):
    for file in ("config.json", "generation_config.json"):
        config = json.loads((repository / file).read_text(encoding="utf-8"))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert config[name] == getattr(tokenizer, name)


def test_the_vocabulary_has_the_requested_size(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 1000
    assert sorted(tokenizer.get_vocab().values()) == list(range(1000))


def test_a_text_begins_with_the_separator_by_default(tokenizer):
    bare = tokenizer("Aspirin", add_special_tokens=False).input_ids
    assert tokenizer("Aspirin").input_ids == [tokenizer.eos_token_id, *bare]
    assert tokenizer.eos_token_id not in bare


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["Aspirin", "Aspirin inhibits cyclooxygenase-1."], padding=True)
    padding = len(batch.input_ids[1]) - len(tokenizer("Aspirin").input_ids)
    assert padding > 0
    assert batch.input_ids[0] == [1] * padding + tokenizer("Aspirin").input_ids
    assert batch.attention_mask[0] == [0] * padding + [1] * (len(batch.input_ids[1]) - padding)


def test_the_defaults_are_those_of_a_base_model(tokenizer):
    assert tokenizer.model_max_length == 1024
    assert tokenizer.chat_template is None
    assert not tokenizer.split_special_tokens


def test_a_chat_template_can_use_the_reserved_markers(tokenizer):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    chat = [{"role": "user", "content": "Aspirin?"}, {"role": "assistant", "content": "Yes."}]
    ids = tokenizer.apply_chat_template(chat, chat_template=template, return_dict=False)
    assert [token for token in ids if token < len(SPECIAL_TOKENS)] == [3, 5, 4, 5]


def test_the_split_is_gpt2s(tokenizer):
    # The regular expression published with GPT-2; llama.cpp knows it as "gpt-2".
    gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    for text in hard_texts():
        # Unassigned characters are left out: their class depends on the version of Unicode.
        text = "".join(character for character in text if unicodedata.category(character) != "Cn")
        pieces = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        assert pieces == gpt2.findall(text)


def test_saved_files_refer_to_no_code(tokenizer_folder):
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "TokenizersBackend"
    assert "auto_map" not in config
    assert not config.get("split_special_tokens", False)
    assert not list(tokenizer_folder.glob("*.py"))


LOAD_AND_SAVE = """
import sys
from transformers import AutoTokenizer
for trust in (None, False, True):
    folder = sys.argv[1]
    for target in (f"{trust}/once", f"{trust}/twice"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        tokenizer.save_pretrained(target)
        print("\\nANSWER", tokenizer("Aspirin inhibits").input_ids, tokenizer.padding_side, tokenizer.pad_token_id)
        folder = target
"""


@pytest.mark.parametrize("in_model_folder", [False, True])
def test_it_loads_in_a_new_process_with_and_without_trust_and_again_after_saving(
    repository, tokenizer, tokenizer_folder, tmp_path, in_model_folder
):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "folder")
    if in_model_folder:
        for file in ("config.json", *(path.name for path in repository.glob("*_healthslm.py"))):
            shutil.copy(repository / file, folder)
    command = [sys.executable, "-c", LOAD_AND_SAVE, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    # In a model's folder, Transformers may also print a question about the model's code.
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers == [f"ANSWER {tokenizer('Aspirin inhibits').input_ids} left 1"] * 6
    for saved in tmp_path.glob("*/*/tokenizer.json"):
        assert saved.read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
        assert "auto_map" not in (saved.parent / "tokenizer_config.json").read_text(encoding="utf-8")


def test_the_class_loads_what_it_saved_and_saves_the_same_bytes(repository, tokenizer, tokenizer_folder, tmp_path):
    architecture = get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(repository))
    own = architecture.from_pretrained(tokenizer_folder)
    assert own(SENTENCES).input_ids == tokenizer(SENTENCES).input_ids
    own.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()


def test_an_untrained_tokenizer_is_lossless_too(repository):
    untrained = get_class_from_dynamic_module("tokenization_healthslm.HealthSLMTokenizer", str(repository))()
    assert len(untrained) == len(SPECIAL_TOKENS) + 256
    texts = hard_texts()
    ids = untrained(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    assert untrained.batch_decode(ids) == texts
    assert [len(tokens) for tokens in ids] == [len(text.encode()) for text in texts]


def test_training_again_with_more_threads_gives_the_same_bytes(corpus, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    train_tokenizer(TokenizerOptions(corpus, tmp_path / "again", 1000))
    for file in tokenizer_folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_report_counts_the_validation_split(corpus, tokenizer_folder):
    report = json.loads((tokenizer_folder / "training_report.json").read_text(encoding="utf-8"))
    rows = pq.read_table(corpus / "validation").to_pylist()
    texts = [f"{row['title']}\n{row['text']}" for row in rows]
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokens = sum(len(plain.encode(text, add_special_tokens=False)) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert report["validation"] == {
        "documents": 20,
        "tokens": tokens,
        "bytes": num_bytes,
        "bytes_per_token": pytest.approx(num_bytes / tokens, abs=1e-4),
    }


def test_a_corpus_with_too_many_documents_is_sampled_evenly(corpus, tmp_path):
    tables = [pq.read_table(path) for path in sorted((corpus / "train").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    (tmp_path / "part/train").mkdir(parents=True)
    taken = pa.Table.from_pylist(rows[::3], tables[0].schema)
    pq.write_table(taken, tmp_path / "part/train/all.parquet")
    some = TokenizerOptions(corpus, tmp_path / "some", 500, max_documents=math.ceil(len(rows) / 3))
    train_tokenizer(some)
    train_tokenizer(TokenizerOptions(tmp_path / "part", tmp_path / "whole", 500))
    train_tokenizer(TokenizerOptions(corpus, tmp_path / "other", 500))
    files = [tmp_path / name / "tokenizer.json" for name in ("some", "whole", "other")]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "complaint"),
    [
        (30_000, "too little text for vocab_size 30000, only for"),
        (100, r"vocab_size: must be at least [0-9]+ \(the special tokens and bytes\), not 100"),
    ],
)
def test_an_impossible_vocabulary_size_is_rejected(corpus, tmp_path, vocab_size, complaint):
    with pytest.raises(UserError, match=complaint):
        train_tokenizer(TokenizerOptions(corpus, tmp_path / "tokenizer", vocab_size))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mine", ["tokenizer", "tokenizer/thesis.txt"])
def test_an_output_that_would_replace_something_else_is_rejected(corpus, tmp_path, mine):
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(
        UserError, match=f"^{tmp_path / 'tokenizer'}: (is a file, but|holds other files than) a tokenizer"
    ):
        train_tokenizer(TokenizerOptions(corpus, tmp_path / "tokenizer", 500))
    assert (tmp_path / mine).read_text() == "mine"


def test_a_corpus_without_a_training_split_is_rejected_in_one_line(run_script, tmp_path):
    done = run_script("train_tokenizer", "--corpus", tmp_path, "--output", tmp_path / "tokenizer")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'train'}: no Parquet files")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_documents_give_the_checksum_of_the_released_tokenizer(repository):
    checksum = hashlib.sha256((repository / "tokenizer.json").read_bytes()).hexdigest()
    for document in ("docs/tokenizer.md", "docs/corpus-card/README.md"):
        assert checksum in (repository / document).read_text(encoding="utf-8"), document


@pytest.mark.parametrize("trust_remote_code", [True, False])
def test_the_released_tokenizer_fits_the_model_and_restores_any_text(repository, tmp_path, trust_remote_code):
    tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=trust_remote_code)
    config = json.loads((repository / "config.json").read_text(encoding="utf-8"))
    assert len(tokenizer) == config["vocab_size"] == 32_000
    texts = hard_texts()
    assert tokenizer.batch_decode(tokenizer(texts, add_special_tokens=False).input_ids) == texts
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (repository / "tokenizer.json").read_bytes()
