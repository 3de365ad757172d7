"""Checkpoints: ordinary `from_pretrained` folders, with the state that training needs beside the weights.

    step-N/config.json, model.safetensors, tokenizer.json, …    the model, as save_pretrained writes it
    step-N/optimizer.safetensors                                 the optimizer's tensors: NAME_OF_WEIGHT.NAME_OF_STATE
    step-N/training_state.json                                   how far training has come

A checkpoint is written aside and renamed, and nothing in it is pickled. Random numbers need no saving: they follow from
the seed and the number of the update.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from healthslm.errors import UserError
from healthslm.files import read_json, replacing, write_json

_FOLDER_NAME = re.compile(r"step-(\d+)")
_OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "training_state.json"


def save_model(folder: Path, model: PreTrainedModel, tokenizer_folder: Path) -> None:
    """Write a model and its tokenizer into an existing folder, ready for `from_pretrained`."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def save_checkpoint(
    checkpoints: Path,
    model: PreTrainedModel,
    tokenizer_folder: Path,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of `state["update"]`, and only then remove all but the newest `keep`."""
    with replacing(checkpoints / f"step-{state['update']}") as folder:
        folder.mkdir()
        save_model(folder, model, tokenizer_folder)
        save_file(_optimizer_tensors(model, optimizer), folder / _OPTIMIZER_FILE)
        write_json(folder / _STATE_FILE, state)
    for old in list_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = {int(match[1]): path for path in checkpoints.glob("step-*") if (match := _FOLDER_NAME.fullmatch(path.name))}
    return [found[update] for update in sorted(found)]


def newest_checkpoint(checkpoints: Path) -> Path:
    """The checkpoint to resume from.

    Raises:
        UserError: There is none.
    """
    found = list_checkpoints(checkpoints)
    if not found:
        raise UserError(
            f"{checkpoints}: no checkpoint step-N to resume from; remove {checkpoints.parent} to start anew"
        )
    return found[-1]


def load_training_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Give the optimizer of `model` the state that a checkpoint holds, and return its training state.

    Raises:
        UserError: A file is missing, or is not of this model.
    """
    try:
        tensors = load_file(folder / _OPTIMIZER_FILE, device=str(model.device))
        for name, parameter in model.named_parameters():
            prefix = f"{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if {"exp_avg", "exp_avg_sq", "step"} != set(state):
                raise ValueError(f"no state of {name}")
            state["step"] = state["step"].cpu()
            optimizer.state[parameter] = state
        return read_json(folder / _STATE_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder / _OPTIMIZER_FILE}: cannot be resumed from: {error}; remove {folder}") from error


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
