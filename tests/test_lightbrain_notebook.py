"""The notebook that writes LightBrain-Tiny in plain PyTorch runs from top to bottom, and its model is the library's."""

import copy
import math
import re
import xml.etree.ElementTree as ElementTree

import nbformat
import pytest
from nbclient import NotebookClient
from row_files import write_lines
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from healthslm.documents import document_text

NOTEBOOK = "lightbrain_tiny_from_scratch.ipynb"
WIDTH, LAYERS, CONTEXT = 384, 6, 128


@pytest.fixture(scope="module")
def stored(repository) -> nbformat.NotebookNode:
    return nbformat.read(repository / "notebooks" / NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook: nbformat.NotebookNode) -> str:
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def number(pattern: str, notebook: nbformat.NotebookNode) -> float:
    return float(re.search(pattern, text_of(notebook))[1].replace(",", ""))


def num_parameters(vocab_size: int) -> int:
    """Counted from the shapes: embeddings, and twelve squares, thirteen vectors of each block, and the last norm."""
    return (vocab_size + CONTEXT) * WIDTH + LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH


def assert_it_learned_and_equals_the_library(notebook: nbformat.NotebookNode, vocab_size: int, gain: float) -> None:
    assert number(r"([\d,]+) parameters", notebook) == num_parameters(vocab_size)
    untrained = number(r"before training: ([\d.]+) nats", notebook)
    assert untrained == pytest.approx(math.log(vocab_size), abs=0.3)  # all tokens alike
    loss = number(r"([\d.]+) nats per token, perplexity", notebook)
    assert loss < untrained - gain
    assert number(r"perplexity ([\d.]+)", notebook) == pytest.approx(math.exp(loss), rel=1e-3, abs=0.1)
    bytes_per_token = number(r"([\d.]+) bytes per token", notebook)
    bits_per_byte = loss / math.log(2) / bytes_per_token
    assert number(r"([\d.]+) bits per byte", notebook) == pytest.approx(bits_per_byte, rel=5e-3)
    assert number(r"largest difference ([\d.e+-]+)", notebook) < 1e-4
    assert len(re.findall("The patient presented with symptoms of fever", text_of(notebook))) == 2


def test_the_stored_outputs_are_those_of_a_run_of_the_whole_model(stored):
    assert [cell.execution_count for cell in code_cells(stored)] == list(range(1, len(code_cells(stored)) + 1))
    assert_it_learned_and_equals_the_library(stored, vocab_size=50_257, gain=2)
    assert num_parameters(50_257) == 29_995_392
    assert number(r"([\d,]+) tokens in [\d.]+ minutes", stored) > 20_000
    assert sum("image/png" in output.get("data", {}) for cell in code_cells(stored) for output in cell.outputs) == 1
    assert not re.search(r"/(tmp|home|root|work|usr)\b", nbformat.writes(stored))


@pytest.mark.slow
def test_it_runs_on_other_text_with_another_tokenizer(repository, stored, tmp_path, monkeypatch):
    """In a few steps, on the sample. A cell that fails fails the test."""
    articles = [
        article
        for path in sorted((repository / "sample/pubmed").glob("*.xml"))
        for article in ElementTree.parse(path).iter("PubmedArticle")
    ]
    rows = [
        {
            "QUESTION": article.findtext(".//ArticleTitle") or "",
            "CONTEXTS": [part.text for part in article.iter("AbstractText") if part.text],
            "LONG_ANSWER": "",
        }
        for article in articles
    ]
    write_lines(tmp_path / "questions.jsonl", rows)
    tokenizer = train_tokenizer([document_text(row["QUESTION"], "\n".join(row["CONTEXTS"])) for row in rows])
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    monkeypatch.setenv("PUBMEDQA", str(tmp_path / "questions.jsonl"))
    monkeypatch.setenv("GPT2_TOKENIZER", str(tmp_path / "tokenizer"))
    monkeypatch.setenv("STEPS", "8")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    where = {"metadata": {"path": str(repository / "notebooks")}}
    executed = NotebookClient(copy.deepcopy(stored), timeout=None, resources=where, record_timing=False).execute()
    assert_it_learned_and_equals_the_library(executed, len(tokenizer), gain=0.5)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
