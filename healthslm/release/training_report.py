"""What the folder of a run tells of a model that was trained in it: how long, on what, and by which recipe."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from healthslm.errors import UserError
from healthslm.files import file_sha256
from healthslm.tokenization.tokens import INFO_FILE, TokenizedSplit
from healthslm.training.checkpoint import list_checkpoints, load_state
from healthslm.training.metrics import read_metrics
from healthslm.training.packing import PackedRows
from healthslm.training.recipe import CONFIG_FILE, FREE_OPTIONS, PretrainOptions


@dataclass(frozen=True)
class TrainingReport:
    """How a model came to be, up to the update after which it was saved."""

    records: list[dict[str, Any]]
    """The run's metrics up to that update."""
    config: dict[str, Any]
    """All options, as config.yaml has them."""
    hardware: list[str]
    """What it was trained on, one after another."""

    @property
    def update(self) -> int:
        return self.records[-1]["update"]

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.records[-1]["tokens"]

    @property
    def skipped(self) -> int:
        """Updates without a finite loss and gradient, which changed nothing."""
        return sum("skipped" in record for record in self.records)

    @property
    def hours(self) -> float:
        """What the updates took; evaluations, checkpoints and updates that a kill lost are not in it."""
        seconds, tokens_before = 0.0, 0
        for record in self.records:
            if "tokens_per_second" in record:
                seconds += (record["tokens"] - tokens_before) / record["tokens_per_second"]
            tokens_before = record["tokens"]
        return seconds / 3600

    @property
    def options(self) -> dict[str, Any]:
        """The options that say what was computed."""
        return {name: _without_folder(value) for name, value in self.config.items() if name not in FREE_OPTIONS}

    @property
    def recipe(self) -> dict[str, Any]:
        """These options where they are not the defaults."""
        defaults = {field.name: _as_in_yaml(field.default) for field in dataclasses.fields(PretrainOptions)}
        return {name: value for name, value in self.options.items() if value != defaults.get(name, dataclasses.MISSING)}

    def rows(self, train: TokenizedSplit, context: int) -> tuple[PackedRows, range]:
        """The rows of the training text, and the positions of those that the model has read.

        Args:
            context: The model's longest, which is that of the rows where the run names no other.
        """
        rows = PackedRows(train, self.config["context"] or context, self.config["seed"])
        return rows, range(self.tokens // rows.context)


def report_training(run: Path, model: Path, hardware: str | None = None) -> TrainingReport:
    """Read of a run what there is to tell of a model: of best/, of a checkpoint, or of another folder, which counts as
    made at the run's end.

    Args:
        hardware: What it was trained on, where the run's metrics do not tell.

    Raises:
        UserError: Its recipe or metrics are missing or do not reach the model, or nothing tells of the hardware.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run}: no run of scripts/pretrain.py, for there is no {path.name} in it")
    records = read_metrics(run)
    if not any("tokens_per_second" in record for record in records):
        raise UserError(f"{run}: no update stands in its metrics.jsonl")
    update = _update_of(run, model, records)
    records = [record for record in records if record["update"] <= update]
    machines = list(dict.fromkeys(record["hardware"] for record in records if "hardware" in record))
    if not machines and hardware is None:
        raise UserError(f"{run}: its metrics.jsonl does not tell what it was trained on: tell by --hardware")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return TrainingReport(records, config, machines or [hardware])


def tokens_seen(model: Path) -> int | None:
    """The tokens after which a model of a run's folder was saved; None of one that lies in no run."""
    records = read_metrics(model.parent)
    update = _update_of(model.parent, model, records) if records else None
    return next((record["tokens"] for record in records if record["update"] == update), None)


def check_tokens(run: Path, tokens: Path) -> None:
    """Hold the corpus that a run's newest checkpoint was trained on against one in tokens.

    Raises:
        UserError: It is another one, or there is no checkpoint to tell.
    """
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{run}: no checkpoint tells which tokens it was trained on")
    if load_state(checkpoints[-1])["run"]["tokens.json"] != file_sha256(tokens / INFO_FILE):
        raise UserError(f"{tokens}: not the tokens that {run} was trained on, by the checksum of {INFO_FILE}")


def _update_of(run: Path, model: Path, records: list[dict[str, Any]]) -> int:
    """The update after which a model was saved."""
    if match := re.fullmatch(r"step-(\d+)", model.name):
        return int(match[1])
    if model.resolve() == (run / "best").resolve():
        evaluations = [record for record in records if "validation_bits_per_byte" in record]
        return min(evaluations, key=lambda record: record["validation_bits_per_byte"])["update"]  # the first of equals
    return records[-1]["update"]


def _without_folder(value: Any) -> Any:
    """A model that a run began with, by its name alone where it lay on the machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _as_in_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
