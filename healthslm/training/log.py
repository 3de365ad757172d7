"""What a run reports while it trains: metrics.jsonl, a tracker, its curve, progress and messages."""

import importlib.util
import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from healthslm.errors import UserError
from healthslm.training.options import PretrainOptions, Tracker
from healthslm.training.run_folder import CURVE_FILE, METRICS_FILE, read_metrics, write_metrics

SPIKE_WINDOW = 100
"""Number of recent losses that a loss is compared with."""


class RunLog:
    """The log of a run. It does nothing on any process but the main one.

    Args:
        step: The step that a run resumes from, -1 if it starts: later records are dropped, because the run writes them
            again.
        tokens: Tokens seen so far.
        total_tokens: Tokens of the whole run.
    """

    def __init__(self, accelerator: Accelerator, options: PretrainOptions, step: int, tokens: int, total_tokens: int):
        self.is_active = accelerator.is_main_process
        self._accelerator, self._run, self._step_started = accelerator, options.output, time.perf_counter()
        self._bar = tqdm(
            total=total_tokens,
            initial=tokens,
            unit="token",
            unit_scale=True,
            smoothing=0.05,
            disable=not self.is_active,
        )
        start_tracker(accelerator, options, step)
        if not self.is_active:
            return
        self.records = [record for record in read_metrics(self._run) if record["step"] <= step]
        write_metrics(self._run, self.records)
        losses = (record["loss"] for record in self.records if "loss" in record)
        self.recent_losses = deque(losses, maxlen=SPIKE_WINDOW)
        self._file = (self._run / METRICS_FILE).open("a", encoding="utf-8", buffering=1)  # a line at a time

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl, and its numbers to the tracker. It needs a `step`."""
        if self.is_active:
            self.records.append(record)
            if "loss" in record:
                self.recent_losses.append(record["loss"])
            self._file.write(json.dumps(record) + "\n")
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            self._accelerator.log(numbers, step=numbers.pop("step"))

    def print(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.is_active:
            self._bar.write(message)

    def advance(self, tokens: int) -> None:
        """Move the progress bar by the tokens of a micro-batch."""
        self._bar.update(tokens)

    def show(self, **values: str) -> None:
        """Show values next to the progress bar."""
        self._bar.set_postfix(values, refresh=False)

    def restart_clock(self) -> None:
        """Start the time of a step now, because evaluating or saving is not a part of it."""
        self._step_started = time.perf_counter()
        self._bar.unpause()

    def seconds_of_step(self) -> float:
        """Seconds since the last call, or since the clock was restarted."""
        started, self._step_started = self._step_started, time.perf_counter()
        return self._step_started - started

    def draw_curve(self) -> None:
        """Draw training loss and validation bits per byte as curve.png, if matplotlib is installed."""
        if self.is_active and importlib.util.find_spec("matplotlib"):
            from healthslm.plots import draw_training, write_figures

            write_figures(self._run, lambda: {CURVE_FILE: draw_training(self.records)})

    def close(self) -> None:
        self._bar.close()
        if self.is_active:
            self._file.close()


def check_tracker(tracker: Tracker) -> None:
    """Check that the package of the tracker is installed.

    Raises:
        UserError: It is not.
    """
    if tracker != "none" and not importlib.util.find_spec(tracker):
        raise UserError(f"--report-to {tracker}: {tracker} is not installed: pip install {tracker}")


def start_tracker(accelerator: Accelerator, options: PretrainOptions, step: int) -> None:
    """Start the tracker that the options ask for, which Accelerate runs on the main process."""
    tracker, name = options.report_to, options.output.name
    if tracker == "none":
        return
    settings = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": name, "id": name, "resume": "allow"},
        "trackio": {"name": name, "resume": "allow"},
    }
    # TensorBoard takes the name as that of its folder in the run folder, the others as that of a project of many runs.
    accelerator.init_trackers("tensorboard" if tracker == "tensorboard" else "healthslm", init_kwargs=settings)


def is_spike(recent_losses: Sequence[float], loss: float) -> bool:
    """Whether a loss is more than six standard deviations above the mean of `SPIKE_WINDOW` losses before it."""
    if len(recent_losses) < SPIKE_WINDOW:
        return False
    return loss > statistics.fmean(recent_losses) + 6 * statistics.stdev(recent_losses)
