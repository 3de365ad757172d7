"""Checkpoints: ordinary `from_pretrained` folders that also hold the state of training.

    step-N/config.json, model.safetensors, tokenizer.json, …    the model, as save_pretrained writes it
    step-N/optimizer.safetensors                                 the optimizers' tensors: NAME_OF_WEIGHT.NAME_OF_STATE,
                                                                 and the optimizer class of each weight
    step-N/training_state.json                                   the progress of training, and its fingerprint
    step-N/manifest.json                                         SHA-256 of each of these files

A checkpoint is written under another name, synced and renamed, and nothing in it is pickled. It needs no random state,
which follows from the seed and the step.
"""

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoTokenizer, PreTrainedModel

from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json, replacing, write_json

logger = logging.getLogger(__name__)

_FOLDER_NAME = re.compile(r"step-(\d+)")
_OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "training_state.json"
_MANIFEST_FILE = "manifest.json"
_OPTIMIZERS_KEY = "optimizers"


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer_folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model and its tokenizer into an existing folder, ready for `from_pretrained`.

    Args:
        weights: From `gather_weights`; None saves the model's own.
    """
    if isinstance(model, FSDPModule):  # a class that FSDP made, which from_pretrained could not find
        model = _plain(model)
    model.save_pretrained(folder, state_dict=weights)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def save_checkpoint(
    checkpoints: Path,
    step: int,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    tokenizer_folder: Path,
    state: dict[str, Any],
    *,
    keep: int,
    writes: bool,
) -> None:
    """Write the checkpoint step-`step`. Then remove all but the newest `keep`, and any with a higher step, which are
    damaged or from another recipe.

    All processes must call this, because each may hold a part of every tensor. Only the one with `writes` writes.

    Raises:
        UserError: The disk is full. Existing checkpoints are unchanged.
    """
    weights, moments = gather_weights(model), _gather_moments(model, optimizers)
    if not writes:
        return
    with replacing(checkpoints / f"step-{step}") as folder:
        folder.mkdir()
        save_model(folder, model, tokenizer_folder, weights)
        save_file(
            moments, folder / _OPTIMIZER_FILE, {_OPTIMIZERS_KEY: json.dumps(_optimizer_classes(model, optimizers))}
        )
        write_json(folder / _STATE_FILE, state)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        write_json(folder / _MANIFEST_FILE, {str(path.relative_to(folder)): file_sha256(path) for path in files})
    found = list_checkpoints(checkpoints)
    this = found.index(checkpoints / f"step-{step}")
    for other in [*found[: this + 1][:-keep], *found[this + 1 :]]:
        shutil.rmtree(other, ignore_errors=True)  # the next save tries again


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = {int(match[1]): path for path in checkpoints.glob("step-*") if (match := _FOLDER_NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def newest_checkpoint(checkpoints: Path) -> Path:
    """The newest valid checkpoint. Damaged ones are skipped with a warning.

    Raises:
        UserError: There is none.
    """
    for folder in reversed(list_checkpoints(checkpoints)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("%s: damaged, skipped: %s", folder, damage)
    raise UserError(f"{checkpoints}: no valid checkpoint to resume from; remove {checkpoints.parent} to start again")


def find_damage(folder: Path) -> str | None:
    """What is missing, unreadable or changed in a checkpoint, or None if it is valid."""
    try:
        manifest = read_json(folder / _MANIFEST_FILE)
        if not isinstance(manifest, dict) or not manifest.keys() >= {_OPTIMIZER_FILE, _STATE_FILE}:
            return f"{_MANIFEST_FILE} does not list the files of a checkpoint"
        for name, checksum in manifest.items():
            if file_sha256(folder / name) != checksum:
                return f"{name} does not match its checksum in {_MANIFEST_FILE}"
    except OSError as error:  # without a file name if the disk fails in the middle of a file
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except UserError as error:
        return str(error)
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """The `state` that `save_checkpoint` saved."""
    return read_json(folder / _STATE_FILE)


def load_optimizers(folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load the state of the model's optimizers from a checkpoint.

    Raises:
        UserError: It is the state of other optimizers or of another model.
    """
    path = folder / _OPTIMIZER_FILE
    states: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    try:
        with safe_open(path, "pt") as file:
            saved_classes = json.loads(file.metadata()[_OPTIMIZERS_KEY])
            for key in sorted(file.keys()):
                name, _, state_name = key.rpartition(".")
                # A copy, because the tensor would keep the file open, and its disk space in use after it is removed.
                states[name][state_name] = file.get_tensor(key).clone()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't resume: {error}") from error

    classes = _optimizer_classes(model, optimizers)
    for name in classes | saved_classes:
        if classes.get(name) != saved_classes.get(name):
            before, now = saved_classes.get(name, "no optimizer"), classes.get(name, "no optimizer")
            raise UserError(f"{path}: can't resume: {name} was trained by {before}, now by {now}")
    for name, parameter in model.named_parameters():
        for key, value in states[name].items():
            if value.dim() > 0 and value.shape != parameter.shape:
                shapes = f"has the shape {list(value.shape)}, the weight {list(parameter.shape)}"
                raise UserError(f"{path}: can't resume: {name}.{key} {shapes}")
            states[name][key] = _placed_as(parameter, value)
    names = _names(model)
    for optimizer in optimizers:
        by_index = {index: states[names[parameter]] for index, parameter in enumerate(_parameters(optimizer))}
        updated = {index: state for index, state in by_index.items() if state}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": updated})


def gather_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The whole weights by their names in `state_dict`, tied ones only once. All processes must call this."""
    tensors = model.state_dict()  # first, because FSDP then frees what it gathered for the last forward pass
    once = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: _gathered(tensor.detach()) for name, tensor in tensors.items() if name not in again}


def _gather_moments(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    names = _names(model)
    return {
        f"{names[parameter]}.{key}": _gathered(value).contiguous()
        for optimizer in optimizers
        for parameter in _parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _optimizer_classes(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> dict[str, str]:
    """The optimizer class of each weight."""
    names = _names(model)
    return {
        names[parameter]: type(optimizer).__name__ for optimizer in optimizers for parameter in _parameters(optimizer)
    }


def _names(model: PreTrainedModel) -> dict[torch.nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model of the class that it had before FSDP sharded it, without weights."""
    plain_class: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        plain = plain_class(model.config)
    plain.generation_config = model.generation_config
    return plain


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor. If it is sharded over processes, it is gathered on the CPU, because it may not fit on the GPU."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _placed_as(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Shard a whole tensor like a parameter of the same shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
