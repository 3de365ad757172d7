"""Checkpoints: ordinary `from_pretrained` folders, with the state that training needs beside the weights.

    step-N/config.json, model.safetensors, tokenizer.json, …    the model, as save_pretrained writes it
    step-N/optimizer.safetensors                                 the optimizers' tensors: NAME_OF_WEIGHT.NAME_OF_STATE
    step-N/training_state.json                                   how far training has come, and by which recipe
    step-N/manifest.json                                         SHA-256 of each of these files

A checkpoint is written aside, synced and renamed, and nothing in it is pickled. Random numbers need no saving: they
follow from the seed and the number of the update.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoTokenizer, PreTrainedModel

from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json, replacing, write_json

logger = logging.getLogger(__name__)

_FOLDER_NAME = re.compile(r"step-(\d+)")
_OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "training_state.json"
_MANIFEST_FILE = "manifest.json"


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer_folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model and its tokenizer into an existing folder, ready for `from_pretrained`.

    Args:
        weights: What `gather_weights` returned; None for those that the model holds.
    """
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
    """Write the checkpoint step-`update`, and only then remove all but the newest `keep`.

    All processes call this together, since each may hold a part of every tensor; the one that `writes` writes.
    """
    weights, moments = gather_weights(model), _gather_moments(model, optimizers)
    if not writes:
        return
    with replacing(checkpoints / f"step-{update}") as folder:
        folder.mkdir()
        save_model(folder, model, tokenizer_folder, weights)
        save_file(moments, folder / _OPTIMIZER_FILE)
        write_json(folder / _STATE_FILE, state)
        write_json(folder / _MANIFEST_FILE, {path.name: file_sha256(path) for path in sorted(folder.iterdir())})
    for old in list_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(old)


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
        logger.warning("%s: damaged, an older one is taken: %s", folder, damage)
    raise UserError(f"{checkpoints}: no checkpoint step-N to resume from; remove {checkpoints.parent} to start anew")


def find_damage(folder: Path) -> str | None:
    """What of a checkpoint is missing or not as it was written, or None."""
    try:
        for name, checksum in read_json(folder / _MANIFEST_FILE).items():
            if file_sha256(folder / name) != checksum:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
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
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        tensors = load_file(folder / _OPTIMIZER_FILE)
        for optimizer in optimizers:
            states = {}
            for index, parameter in enumerate(_parameters(optimizer)):
                prefix = f"{names[id(parameter)]}."
                keys = [key for key in tensors if key.startswith(prefix) and "." not in key.removeprefix(prefix)]
                if not keys:
                    raise ValueError(f"it has nothing of {prefix[:-1]}")
                states[index] = {key.removeprefix(prefix): _placed_as(parameter, tensors.pop(key)) for key in keys}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
        if tensors:
            raise ValueError(f"nobody asks for its {', '.join(sorted(tensors)[:3])}")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder / _OPTIMIZER_FILE}: cannot be resumed from: {error}") from error


def gather_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as `state_dict` names them, each whole and once, whoever holds its parts. All processes call this."""
    parameters = dict(model.named_parameters())
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in all_names}
    return {name: _gathered(tensor.detach()) for name, tensor in (parameters | buffers).items()}


def _gather_moments(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": _gathered(value).contiguous()
        for optimizer in optimizers
        for parameter in _parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _placed_as(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Spread a whole tensor of a parameter's shape over the processes as the parameter is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
