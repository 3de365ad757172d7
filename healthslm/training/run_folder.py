"""Reading the folder of a training run: its recipe, its metrics, and how a model in it was trained.

runs/NAME/config.yaml             the options that it was started with
runs/NAME/metrics.jsonl           loss, learning rate, speed and evaluations, one JSON object a line
runs/NAME/curve.png               training loss and validation bits per byte
runs/NAME/checkpoints/step-N/     models with the state to resume from
runs/NAME/best/                   the model with the fewest validation bits per byte
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from healthslm.errors import UserError
from healthslm.files import file_sha256, replacing
from healthslm.tokenization.tokens import INFO_FILE, TokenizedSplit
from healthslm.training.checkpoint import list_checkpoints, load_state
from healthslm.training.options import PretrainOptions, options_with
from healthslm.training.packing import PackedSequences

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "curve.png"
CHECKPOINTS_FOLDER = "checkpoints"
BEST_FOLDER = "best"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run so far, each with the `step` after which it was taken. Skips a last line cut by a crash."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_metrics(run: Path, records: list[dict[str, Any]]) -> None:
    """Write the records of a run."""
    with replacing(run / METRICS_FILE) as new:
        new.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@dataclass(frozen=True)
class TrainingReport:
    """How a model was trained, up to the step after which it was saved."""

    records: list[dict[str, Any]]
    """The run's metrics up to that step."""
    config: dict[str, Any]
    """All options, as in config.yaml."""
    hardware: list[str]
    """The machines it was trained on, in order."""

    @property
    def step(self) -> int:
        return self.records[-1]["step"]

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.records[-1]["tokens"]

    @property
    def skipped(self) -> int:
        """Skipped steps: their loss or gradient was not finite, so they did not change the weights."""
        return sum("skipped" in record for record in self.records)

    @property
    def hours(self) -> float:
        """Duration of the steps, without evaluations, checkpoints and steps lost when the run was killed."""
        seconds, tokens_before = 0.0, 0
        for record in self.records:
            if "tokens_per_second" in record:
                seconds += (record["tokens"] - tokens_before) / record["tokens_per_second"]
            tokens_before = record["tokens"]
        return seconds / 3600

    @property
    def options(self) -> dict[str, Any]:
        """The options that affect the result."""
        names = options_with("affects_result")
        return {name: _without_folder(value) for name, value in self.config.items() if name in names}

    @property
    def recipe(self) -> dict[str, Any]:
        """These options where they are not the defaults."""
        defaults = {field.name: _as_in_yaml(field.default) for field in dataclasses.fields(PretrainOptions)}
        return {name: value for name, value in self.options.items() if value != defaults.get(name, dataclasses.MISSING)}

    def sequences(self, train: TokenizedSplit, context: int) -> tuple[PackedSequences, range]:
        """The sequences of the training text, and the indices of those that the model has seen.

        Args:
            context: The model's maximum, which is the length of the sequences unless the run set another.
        """
        sequences = PackedSequences(train, self.config["context"] or context, self.config["seed"])
        return sequences, range(self.tokens // sequences.context)


def report_training(run: Path, model: Path, hardware: str | None = None) -> TrainingReport:
    """Read how a model was trained: the one in best/ or in a checkpoint, or any other, as of the end of the run.

    Args:
        hardware: What it was trained on, if the run's metrics don't say.

    Raises:
        UserError: The recipe or the metrics are missing, or nothing says what the model was trained on.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run}: not a run folder, it has no {path.name}")
    records = read_metrics(run)
    if not any("tokens_per_second" in record for record in records):
        raise UserError(f"{run}: its {METRICS_FILE} has no training step")
    step = _step_of(run, model, records)
    records = [record for record in records if record["step"] <= step]
    machines = list(dict.fromkeys(record["hardware"] for record in records if "hardware" in record))
    if not machines and hardware is None:
        raise UserError(f"{run}: its {METRICS_FILE} doesn't name the hardware; give it with --hardware")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return TrainingReport(records, config, machines or [hardware])


def tokens_seen(model: Path) -> int | None:
    """The tokens after which a model in a run folder was saved, or None for a model outside of one."""
    records = read_metrics(model.parent)
    step = _step_of(model.parent, model, records) if records else None
    return next((record["tokens"] for record in records if record["step"] == step), None)


def check_tokens(run: Path, tokens: Path) -> None:
    """Check that a run's newest checkpoint was trained on this tokenized corpus.

    Raises:
        UserError: It was trained on another one, or there is no checkpoint.
    """
    checkpoints = list_checkpoints(run / CHECKPOINTS_FOLDER)
    if not checkpoints:
        raise UserError(f"{run}: no checkpoint, so the tokens that it was trained on are unknown")
    if load_state(checkpoints[-1])["fingerprint"]["tokens.json"] != file_sha256(tokens / INFO_FILE):
        raise UserError(f"{tokens}: not the tokens that {run} was trained on, by the checksum of {INFO_FILE}")


def _step_of(run: Path, model: Path, records: list[dict[str, Any]]) -> int:
    """The step after which a model was saved."""
    if match := re.fullmatch(r"step-(\d+)", model.name):
        return int(match[1])
    if model.resolve() == (run / BEST_FOLDER).resolve():
        evaluations = [record for record in records if "validation_bits_per_byte" in record]
        return min(evaluations, key=lambda record: record["validation_bits_per_byte"])["step"]  # the first if equal
    return records[-1]["step"]


def _without_folder(value: Any) -> Any:
    """A model that a run started from by its name, without the folder it was in on that machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _as_in_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
