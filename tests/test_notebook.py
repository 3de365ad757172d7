"""The notebook runs from top to bottom on the released model, and its stored outputs are those of that model."""

import copy
import json
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.evaluation.held_out import measure_held_out

FIGURES = 4

pytestmark = pytest.mark.slow  # running it takes a minute and a half


def text_of(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def outputs(notebook: nbformat.NotebookNode) -> tuple[str, list[str]]:
    """All that the cells print, and their images."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    images = [
        output.data["image/png"] for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    return "".join(map(text_of, cells)), images


def bits_per_byte(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"(\d\.\d{3}) (?:bits per byte|after)", text)]


@pytest.fixture(scope="module")
def stored(repository) -> nbformat.NotebookNode:
    return nbformat.read(repository / "notebooks" / "healthslm.ipynb", as_version=4)


@pytest.fixture(scope="module")
def executed(repository, stored, tmp_path_factory) -> nbformat.NotebookNode:
    """A cell that fails fails the test."""
    notebook = copy.deepcopy(stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        where = {"metadata": {"path": str(repository / "notebooks")}}
        return NotebookClient(notebook, timeout=300, resources=where, record_timing=False).execute()


def test_every_cell_runs_and_prints_and_draws_what_is_stored(stored, executed):
    for notebook in (stored, executed):
        text, images = outputs(notebook)
        assert len(images) == FIGURES
        assert text.startswith("15,276,288 parameters, 32,000 tokens")
        assert "trainable params: 786,432" in text
    assert len(bits_per_byte(outputs(stored)[0])) == 4
    assert bits_per_byte(outputs(stored)[0]) == pytest.approx(bits_per_byte(outputs(executed)[0]), abs=0.01)


def test_bits_per_byte_of_its_sentence_are_those_of_evaluation(repository, executed):
    cell = next(cell for cell in executed.cells if "def token_bits" in cell.source)
    sentence = re.search(r'^text = "(.*)"$', cell.source, re.MULTILINE)[1]
    model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
    measured = measure_held_out(model, tokenizer, [{"title": "", "text": sentence}])
    assert float(text_of(cell).split()[0]) == pytest.approx(measured["bits_per_byte"], abs=0.002)


def test_lora_helps_on_text_of_its_kind_and_takes_ten_lines(executed):
    cell = next(cell for cell in executed.cells if "get_peft_model(" in cell.source)
    assert len(cell.source.splitlines()) == 10
    before, after = bits_per_byte(outputs(executed)[0])[1:3]
    assert after < before - 0.02


def test_the_training_curve_ends_where_the_run_did(repository, executed):
    end = json.loads((repository / "results/training/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert f"{end['tokens']:,} tokens in {end['step']:,} steps" in text_of(executed.cells[-1])
