"""Reading run folders: how a model was trained, and on which hardware."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from row_files import write_lines

from healthslm.training.hardware import describe_hardware
from healthslm.training.run_folder import TrainingReport, read_metrics, report_training


def write_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    write_lines(folder / "metrics.jsonl", records)
    (folder / "config.yaml").write_text("max_tokens: 400\nseed: 0\nmuon_learning_rate: 0.01\n", encoding="utf-8")
    return folder


RECORDS = [
    {"step": 0, "tokens": 0, "hardware": "a laptop"},
    {"step": 0, "tokens": 0, "validation_bits_per_byte": 3.0},
    {"step": 1, "tokens": 100, "loss": 2.0, "tokens_per_second": 10.0},
    {"step": 2, "tokens": 300, "loss": 2.0, "tokens_per_second": 50.0},
    {"step": 2, "tokens": 300, "validation_bits_per_byte": 1.5},
    {"step": 2, "tokens": 300, "hardware": "a server"},
    {"step": 3, "tokens": 400, "skipped": {}},
    {"step": 4, "tokens": 500, "loss": 2.0, "tokens_per_second": 100.0},
    {"step": 4, "tokens": 500, "validation_bits_per_byte": 1.6},
]


@pytest.mark.parametrize(
    ("model", "step", "tokens", "seconds", "skipped", "hardware"),
    [
        ("best", 2, 300, 10 + 4, 0, ["a laptop", "a server"]),
        ("checkpoints/step-1", 1, 100, 10, 0, ["a laptop"]),
        ("elsewhere", 4, 500, 10 + 4 + 1, 1, ["a laptop", "a server"]),
    ],
)
def test_a_model_is_reported_as_of_the_step_after_which_it_was_saved(
    tmp_path, model, step, tokens, seconds, skipped, hardware
):
    run = write_run(tmp_path / "run", RECORDS)
    report = report_training(run, run / model)
    assert (report.step, report.tokens, report.skipped) == (step, tokens, skipped)
    assert report.hours * 3600 == pytest.approx(seconds)
    assert report.hardware == hardware
    assert report.recipe == {"max_tokens": 400, "muon_learning_rate": 0.01}


def test_a_recipe_names_the_folder_of_a_starting_model_without_its_path(tmp_path):
    report = TrainingReport(RECORDS, {"model": str(tmp_path / "first"), "seed": 0}, [])
    assert report.recipe == {"model": "first"}
    assert replace(report, config={"model": "openai-community/gpt2"}).recipe == {"model": "openai-community/gpt2"}


def test_a_line_that_a_crash_has_cut_is_skipped(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    whole = (run / "metrics.jsonl").read_bytes()
    last = whole.rindex(b"{")
    for end in (len(whole) - 1, len(whole) - 9, last + 1, last):
        (run / "metrics.jsonl").write_bytes(whole[:end])
        assert read_metrics(run) == RECORDS[:-1]
    (run / "metrics.jsonl").unlink()
    assert read_metrics(run) == []


def test_hardware_is_described_in_words():
    assert re.fullmatch(r"\d+ cores of \S.*", describe_hardware(torch.device("cpu")))
    assert describe_hardware(torch.device("mps"), processes=2) == "2 x mps"
