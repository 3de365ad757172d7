"""Fixtures of the tests of training: short runs of a tiny model, and steps that fail."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import pytest
import torch
from in_precision import set_precision
from pipeline_folders import TINY_MODEL

from healthslm.training import learner
from healthslm.training.loop import pretrain
from healthslm.training.options import PretrainOptions

STEPS = 8


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def pretrain_options(sample_folders) -> Callable[..., PretrainOptions]:
    def make(output: Path, **changes) -> PretrainOptions:
        values = {
            "model": TINY_MODEL, "tokens": sample_folders.tokens, "max_tokens": STEPS * 512, "batch_tokens": 512,
            "micro_batch_size": 4, "learning_rate": 3e-3, "warmup_tokens": 1024, "evaluate_every": 4,
            "evaluation_documents": 3, "save_every": 4,
        }  # fmt: skip
        return PretrainOptions(output=output, **(values | changes))

    return make


@pytest.fixture
def short_runs_are_quick(monkeypatch) -> Iterator[None]:
    """Draw no curves and keep what is in memory out of `gc.collect`, which take most of the time of a short run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def finished_runs() -> dict[str, Path]:
    """By precision, the runs that `finished_run` has made for all files."""
    return {}


@pytest.fixture(scope="module")
def finished_run(pretrain_options, precision, finished_runs, tmp_path_factory) -> Path:
    """A run with all that users get, its curve too. Not to be changed."""
    if precision not in finished_runs:
        run = tmp_path_factory.mktemp("runs") / "finished"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "matplotlib", matplotlib)  # whatever `short_runs_are_quick` did
            pretrain(pretrain_options(run))
        finished_runs[precision] = run
    return finished_runs[precision]


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 on every machine, where equal sums differ by rounding alone."""
    set_precision("fp32", monkeypatch.setattr)


@pytest.fixture
def failing_steps(monkeypatch) -> Callable[..., None]:
    """Make the loss or the gradients of some steps, counted from 0, infinite, or all their gradients zero."""
    real = learner.accumulate_gradients

    def fail(steps: range, what: str) -> None:
        calls = iter(range(1000))

        def accumulate(accelerator, model, *arguments):
            loss = real(accelerator, model, *arguments)
            if next(calls) in steps:
                if what == "loss":
                    return loss * torch.inf
                if what == "no gradient":
                    for parameter in model.parameters():
                        parameter.grad.zero_()
                else:
                    next(model.parameters()).grad[0] = torch.nan
            return loss

        monkeypatch.setattr(learner, "accumulate_gradients", accumulate)

    return fail
