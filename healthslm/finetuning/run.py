"""The folder of a run: what it may hold, what a resumed run must match, and the room that it needs."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from healthslm.errors import UserError
from healthslm.files import check_output_folder, check_space, read_json
from healthslm.finetuning.options import FinetuneOptions
from healthslm.options import OptionError, plain

METRICS_FILE, RUN_FILE = "metrics.json", "run.json"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"

_OWN_FILES = (METRICS_FILE, RUN_FILE)


def check_output(options: FinetuneOptions) -> None:
    """Create the folder of a run, or check that the run in it can be resumed.

    Raises:
        UserError: The output folder holds something else, a finished run, or an unfinished one without `--resume`.
    """
    output = options.output
    check_output_folder(output, "a fine-tuned model", lambda folder: any((folder / f).exists() for f in _OWN_FILES))
    if (output / METRICS_FILE).exists():
        raise UserError(f"{output}: already holds a finished run: choose another folder, or remove it")
    unfinished = (output / RUN_FILE).exists()
    if unfinished and not options.resume:
        raise UserError(f"{output}: holds an unfinished run: continue it with --resume, or remove the folder")
    if options.resume and not unfinished:
        raise UserError(f"{output}: no run to resume: start it without --resume")
    output.mkdir(parents=True, exist_ok=True)


def run_facts(options: FinetuneOptions, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the result of a run depends on."""
    affecting = {field.name for field in fields(options) if field.metadata.get("affects_result", True)}
    chosen = {name: value for name, value in plain(asdict(options)).items() if name in affecting}
    return {
        "options": chosen | {"model": facts["base"]["model"]},
        "base weights": facts["base"]["sha256"],
        "training data": facts["data"]["training"]["sha256"],
        "validation data": (facts["data"]["validation"] or {}).get("sha256"),
    }


def check_resumed(options: FinetuneOptions, run: Mapping[str, Any]) -> None:
    """Compare a resumed run with the facts of its start.

    Raises:
        OptionError: An option that affects the result differs from the one of the run.
        UserError: The base model or the data do.
    """
    before = read_json(options.output / RUN_FILE)
    for name, value in before["options"].items():
        now = run["options"].get(name)
        if now != value:
            raise OptionError(name, f"the run was started with {value!r}, not {now!r}: resume it with the same")
    for name in ("base weights", "training data", "validation data"):
        if run[name] != before[name]:
            raise UserError(f"{options.output}: the {name} changed since the run was started: start a new run")


def newest_checkpoint(options: FinetuneOptions) -> str | None:
    """The newest complete checkpoint, or None to start from the beginning."""
    folder = options.output / CHECKPOINTS
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
