"""Checkpoints: ordinary `from_pretrained` folders, with the state that training needs beside the weights.

    step-N/config.json, model.safetensors, tokenizer.json, …    the model, as save_pretrained writes it
    step-N/optimizer.safetensors                                 the optimizers' tensors: NAME_OF_WEIGHT.NAME_OF_STATE,
                                                                 and the class of the optimizer of each weight
    step-N/training_state.json                                   how far training has come, and by which recipe
    step-N/manifest.json                                         SHA-256 of each of these files

A checkpoint is written aside, synced and renamed, and nothing in it is pickled. Random numbers need no saving: they
follow from the seed and the number of the update.
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
        weights: What `gather_weights` returned; None for those that the model holds.
    """
    if isinstance(model, FSDPModule):  # of a class made by FSDP, whose name and code no folder could be opened by
        model = _plain(model)
    model.save_pretrained(folder, state_dict=weights)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def save_checkpoint(
    checkpoints: Path,
    update: int,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    tokenizer_folder: Path,
    state: dict[str, Any],
    *,
    keep: int,
    writes: bool,
) -> None:
    """Write the checkpoint step-`update`, and only then remove others: all but the newest `keep` up to it, and all
    beyond it, which were passed over as damaged or numbered by another recipe.

    All processes call this together, since each may hold a part of every tensor; the one that `writes` writes.

    Raises:
        UserError: The disk is full; the checkpoints that were there are as they were.
    """
    weights, moments = gather_weights(model), _gather_moments(model, optimizers)
    if not writes:
        return
    with replacing(checkpoints / f"step-{update}") as folder:
        folder.mkdir()
        save_model(folder, model, tokenizer_folder, weights)
        save_file(
            moments, folder / _OPTIMIZER_FILE, {_OPTIMIZERS_KEY: json.dumps(_optimizer_classes(model, optimizers))}
        )
        write_json(folder / _STATE_FILE, state)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        write_json(folder / _MANIFEST_FILE, {str(path.relative_to(folder)): file_sha256(path) for path in files})
    found = list_checkpoints(checkpoints)
    this = found.index(checkpoints / f"step-{update}")
    for other in [*found[: this + 1][:-keep], *found[this + 1 :]]:
        shutil.rmtree(other, ignore_errors=True)  # what stays is no reason to end a run: the next save tries again


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = {int(match[1]): path for path in checkpoints.glob("step-*") if (match := _FOLDER_NAME.fullmatch(path.name))}
    return [found[update] for update in sorted(found)]


def newest_checkpoint(checkpoints: Path) -> Path:
    """The newest checkpoint whose files are those that were written; damaged ones are reported and passed over.

    Raises:
        UserError: There is none.
    """
    for folder in reversed(list_checkpoints(checkpoints)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("%s: damaged, passed over: %s", folder, damage)
    raise UserError(f"{checkpoints}: no checkpoint step-N to resume from; remove {checkpoints.parent} to start anew")


def find_damage(folder: Path) -> str | None:
    """What of a checkpoint is missing, cannot be read or is not as it was written, or None."""
    try:
        manifest = read_json(folder / _MANIFEST_FILE)
        if not isinstance(manifest, dict) or not manifest.keys() >= {_OPTIMIZER_FILE, _STATE_FILE}:
            return f"{_MANIFEST_FILE} lists no checkpoint's files"
        for name, checksum in manifest.items():
            if file_sha256(folder / name) != checksum:
                return f"{name} is not what {_MANIFEST_FILE} says was written"
    except OSError as error:  # which names no file where a disk fails in the midst of one
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except UserError as error:
        return str(error)
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """The training state that `save_checkpoint` was given."""
    return read_json(folder / _STATE_FILE)


def load_optimizers(folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Give the optimizers of `model` the tensors that a checkpoint holds.

    Raises:
        UserError: They are not of these optimizers or this model.
    """
    path = folder / _OPTIMIZER_FILE
    states: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    try:
        with safe_open(path, "pt") as file:
            saved_classes = json.loads(file.metadata()[_OPTIMIZERS_KEY])
            for key in sorted(file.keys()):
                name, _, state_name = key.rpartition(".")
                # A copy, since the tensor itself would hold on to the file, and to its disk space when it is removed.
                states[name][state_name] = file.get_tensor(key).clone()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be resumed from: {error}") from error

    classes = _optimizer_classes(model, optimizers)
    for name in classes | saved_classes:
        if classes.get(name) != saved_classes.get(name):
            then, now = saved_classes.get(name, "no optimizer"), classes.get(name, "no optimizer")
            raise UserError(f"{path}: cannot be resumed from: {name} was trained by {then}, and is now by {now}")
    for name, parameter in model.named_parameters():
        for key, value in states[name].items():
            if value.dim() > 0 and value.shape != parameter.shape:
                then, now = list(value.shape), list(parameter.shape)
                raise UserError(f"{path}: cannot be resumed from: {name}.{key} has the shape {then}, the weight {now}")
            states[name][key] = _placed_as(parameter, value)
    names = _names(model)
    for optimizer in optimizers:
        by_index = {index: states[names[parameter]] for index, parameter in enumerate(_parameters(optimizer))}
        updated = {index: state for index, state in by_index.items() if state}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": updated})


def gather_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as `state_dict` names them, each whole and once, whoever holds its parts. All processes call this."""
    tensors = model.state_dict()  # first, because it has FSDP drop what it gathered for the last forward pass
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
    """The class of the optimizer that trains each weight."""
    names = _names(model)
    return {
        names[parameter]: type(optimizer).__name__ for optimizer in optimizers for parameter in _parameters(optimizer)
    }


def _names(model: PreTrainedModel) -> dict[torch.nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was before FSDP sharded it, without weights."""
    plain_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        plain = plain_class(model.config)
    plain.generation_config = model.generation_config
    return plain


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes, in which case it need not fit beside the model."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _placed_as(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Spread a whole tensor of a parameter's shape over the processes as the parameter is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
