"""What a run tells: metrics.jsonl, its curve as a picture and TensorBoard where these are installed."""

import importlib.util
import json
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from healthslm.files import replacing

METRICS_FILE = "metrics.jsonl"
SPIKE_WINDOW = 100
"""Updates that a loss is held against."""


class RunMetrics:
    """The measurements of a run, one JSON object a line, each with the `update` after which it was taken.

    Those after `resumed_update` are dropped: a resumed run takes them again.
    """

    def __init__(self, run: Path, resumed_update: int = 0):
        self.run = run
        self.path = run / METRICS_FILE
        self.records = [record for record in read_metrics(run) if record["update"] <= resumed_update]
        write_metrics(self.path, self.records)
        losses = [record["loss"] for record in self.records if "loss" in record]
        self.recent_losses = deque(losses, maxlen=SPIKE_WINDOW)
        self._board = _tensorboard(run, resumed_update)

    def write(self, record: dict[str, Any]) -> None:
        """Add a record, which must have an `update`."""
        self.records.append(record)
        if "loss" in record:
            self.recent_losses.append(record["loss"])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, record["update"])

    def draw(self) -> None:
        """Draw the curve of training loss and validation bits per byte as curve.png, where matplotlib is installed."""
        if importlib.util.find_spec("matplotlib"):
            draw_curve(self.records, self.run / "curve.png")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def is_spike(recent_losses: Sequence[float], loss: float) -> bool:
    """Whether a loss lies six standard deviations above the mean of those before it, once there are enough of them."""
    if len(recent_losses) < SPIKE_WINDOW:
        return False
    return loss > statistics.fmean(recent_losses) + 6 * statistics.stdev(recent_losses)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line that was cut short by a crash is left out."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_metrics(path: Path, records: list[dict[str, Any]]) -> None:
    with replacing(path) as new:
        new.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Draw training loss (left axis) and validation bits per byte (right axis) over the tokens seen."""
    from matplotlib.figure import Figure

    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "validation_bits_per_byte" in record]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.add_subplot(xlabel="tokens seen", ylabel="training loss, nats per token")
    losses.plot(
        [r["tokens"] for r in training], [r["loss"] for r in training], color="tab:blue", lw=1, label="training"
    )
    bits = losses.twinx()
    bits.set_ylabel("validation, bits per byte")
    bits.plot(
        [r["tokens"] for r in validation],
        [r["validation_bits_per_byte"] for r in validation],
        color="tab:red",
        marker="o",
        markersize=3,
        label="validation",
    )
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    with replacing(path) as new:
        figure.savefig(new, dpi=120, metadata={"Software": None})


def _tensorboard(run: Path, resumed_update: int):
    if not importlib.util.find_spec("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run / "tensorboard", purge_step=resumed_update + 1)
