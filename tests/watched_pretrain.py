"""`scripts/pretrain.py` as a test starts it: in fp32, with what befalls a process and a record of its work.

    python tests/watched_pretrain.py '{"record": "record"}' --recipe recipe.yaml

Processes that torchrun, `accelerate launch` or a scheduler started find one another by their environment, as always.
"""

import gc
import hashlib
import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from in_precision import set_precision
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from healthslm.training import loop
from healthslm.training.packing import PackedRows

RANK = int(os.environ.get("RANK", "0"))


@dataclass
class Watch:
    """What a test asks for. Updates count from 1, and happen to the process of rank 1 alone."""

    record: str
    """Folder for RANK.json: `rows`, the positions and tokens that the process read, `parameters`, how many it holds,
    and `weights`, their checksum at each checkpoint; and for RANK.wrapped: how many wrapped models there still are when
    the group of the processes ends."""
    signal: str | None = None
    """Signal that it is sent in the midst of `update`."""
    nan: bool = False
    """Whether its loss is not a number in `update`."""
    update: int = 0
    output: str | None = None
    """Another run folder, for it alone."""
    sharded: bool = False
    """Have Accelerate take the CPU for several GPUs, the only devices over which it shards weights."""


def watch_over(watch: Watch) -> None:
    rows, weights, updates = [], [], 0
    batch_of = PackedRows.batch
    accumulate_gradients, save_checkpoint = loop.accumulate_gradients, loop.save_checkpoint

    def batch(self: PackedRows, positions: range) -> dict:
        found = batch_of(self, positions)
        rows.append({"positions": list(positions), "tokens": found["input_ids"].tolist()})
        return found

    def accumulate(accelerator, model, *arguments, **settings):
        nonlocal updates
        updates += 1
        befallen = RANK == 1 and updates == watch.update
        if befallen and watch.signal:
            os.kill(os.getpid(), signal.Signals[watch.signal])
        bare_model = accelerator.unwrap_model(model)
        hook = bare_model.register_forward_hook(spoil_loss) if befallen and watch.nan else None
        loss = accumulate_gradients(accelerator, model, *arguments, **settings)
        if hook is not None:
            hook.remove()
        return loss

    def save(checkpoints: Path, update: int, model: torch.nn.Module, *arguments, **settings):
        save_checkpoint(checkpoints, update, model, *arguments, **settings)
        held = [local(parameter.detach()) for parameter in model.parameters()]
        weights.append(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in held)).hexdigest())
        told = {"rows": rows, "parameters": sum(tensor.numel() for tensor in held), "weights": weights}
        Path(watch.record, f"{RANK}.json").write_text(json.dumps(told))

    def end_training(self: Accelerator) -> None:
        # Not by isinstance, which asks lazy modules for their class and so imports them.
        wrapped = sum(type(held) is DistributedDataParallel for held in gc.get_objects())
        Path(watch.record, f"{RANK}.wrapped").write_text(str(wrapped))
        end_of_accelerate(self)

    end_of_accelerate, Accelerator.end_training = Accelerator.end_training, end_training
    PackedRows.batch = batch
    loop.accumulate_gradients = accumulate
    loop.save_checkpoint = save


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spoil_loss(model: torch.nn.Module, inputs: tuple, output):
    output.loss = output.loss * math.nan
    return output


if __name__ == "__main__":
    watch, arguments = Watch(**json.loads(sys.argv[1])), sys.argv[2:]
    if watch.output and RANK == 1:
        arguments += ["--output", watch.output]
    set_precision("fp32")
    if watch.sharded:
        torch.distributed.init_process_group("gloo")
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    watch_over(watch)
    sys.argv = ["pretrain.py", *arguments]
    from healthslm.cli import run
    from healthslm.training.recipe import PretrainOptions

    run(loop.pretrain, PretrainOptions)
