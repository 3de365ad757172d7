"""What runs of fine-tuning share: their folder, what a resumed run must match, the room they need, and one GPU."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from healthslm.errors import UserError
from healthslm.files import check_output_folder, check_space, read_json
from healthslm.options import OptionError, plain

METRICS_FILE, RUN_FILE = "metrics.json", "run.json"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"

_OWN_FILES = (METRICS_FILE, RUN_FILE)


def check_output(output: Path, resume: bool) -> None:
    """Check that a run can start in a folder, or that the run in it can be resumed.

    Raises:
        UserError: The folder holds something else, a finished run, an unfinished one without `--resume`, or none with
            it.
    """
    check_output_folder(output, "a fine-tuned model", lambda folder: any((folder / f).exists() for f in _OWN_FILES))
    if (output / METRICS_FILE).exists():
        raise UserError(f"{output}: already holds a finished run: choose another folder, or remove it")
    unfinished = (output / RUN_FILE).exists()
    if unfinished and not resume:
        raise UserError(f"{output}: holds an unfinished run: continue it with --resume, or remove the folder")
    if resume and not unfinished:
        raise UserError(f"{output}: no run to resume: start it without --resume")


def absolute_name(model: str) -> str:
    """The name of a model that is valid in any folder."""
    folder = Path(model)
    return str(folder.resolve()) if folder.is_dir() else model


def run_facts(options: Any, base: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, Any]:
    """What the result of a run depends on.

    Args:
        options: A dataclass with the field `model`.
        base: `model`, its absolute name, and `sha256`, the checksum of its weights.
        data: The checksums of each split.
    """
    affecting = {field.name for field in fields(options) if field.metadata.get("affects_result", True)}
    chosen = {name: value for name, value in plain(asdict(options)).items() if name in affecting}
    return {
        "options": chosen | {"model": base["model"]},
        "base weights": base["sha256"],
        **{f"{split} data": checksums for split, checksums in data.items()},
    }


def check_resumed(output: Path, run: Mapping[str, Any]) -> None:
    """Compare a resumed run with the facts of its start.

    Raises:
        OptionError: An option that affects the result differs from the one of the run.
        UserError: The base model or the data do.
    """
    before = read_json(output / RUN_FILE)
    for name, value in before["options"].items():
        now = run["options"].get(name)
        if now != value:
            raise OptionError(name, f"the run was started with {value!r}, not {now!r}: resume it with the same")
    for name, value in run.items():
        if value != before[name]:
            raise UserError(f"{output}: the {name} changed since the run was started: start a new run")


def newest_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint, or None to start from the beginning."""
    folder = output / CHECKPOINTS
    for path in folder.glob("checkpoint-*"):
        if not (path / "trainer_state.json").exists():  # written last
            shutil.rmtree(path)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def check_disk(model: PreTrainedModel | PeftModel, output: Path, saves_whole: bool) -> None:
    """Check that the disk has room for a run.

    Args:
        saves_whole: Whether the result is a whole model, not only what is trained.

    Raises:
        UserError: The disk has no room for the checkpoints and the result.
    """
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    # Up to three checkpoints of weights and two moments exist at a time, and the result; all in fp32.
    check_space(output, 4 * (3 * 3 * trained + trained + (model.num_parameters() if saves_whole else 0)))


def on_one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """Keep Trainer from dividing each micro-batch among all GPUs of the machine, which multiplies the batch size."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
