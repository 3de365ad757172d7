"""What the libraries write to the console during fine-tuning: a progress bar and metrics in short lines."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from datasets.utils.logging import disable_progress_bar
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

_NOISY = ("transformers", "trl", "peft", "accelerate", "datasets")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' remarks on settings that are not the user's, and on weights that are new on purpose."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [found.level for found in loggers]
    disable_progress_bar()
    for found in loggers:
        found.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that the libraries themselves pass on
            yield
    finally:
        for found, level in zip(loggers, levels, strict=True):
            found.setLevel(level)


def show_metrics(trainer: Trainer, names: Mapping[str, str]) -> None:
    """Let a trainer show its progress, and these metrics of its log under these names."""
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_ShortLines(names))


class _ShortLines(ProgressCallback):
    def __init__(self, names: Mapping[str, str]):
        super().__init__()
        self.names = names

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **settings: object,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        for key, name in self.names.items():
            if key in logs:
                self.training_bar.write(f"step {state.global_step:,}: {name} {float(logs[key]):.4f}")
