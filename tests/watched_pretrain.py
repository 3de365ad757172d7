"""Pretrain in fp32, record what each process does, and make one process fail if a test asks for it.

    python tests/watched_pretrain.py '{"record": "record"}' --recipe recipe.yaml

The processes are started by torchrun, `accelerate launch` or a scheduler, as those of `scripts/pretrain.py` are.
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

from healthslm.training import learner, loop, setup
from healthslm.training.packing import PackedSequences

RANK = int(os.environ.get("RANK", "0"))


@dataclass
class Watch:
    """What a test asks for. Only the process of rank 1 fails, in a step counted from 1."""

    record: str
    """Folder for RANK.json and RANK.wrapped. The first has `sequences`, the indices and tokens that the process read,
    `parameters`, the number that it holds, and `weights`, their checksum at each checkpoint. The second has the number
    of wrapped models that still exist when the process group ends."""
    signal: str | None = None
    """Signal sent to the process during `step`."""
    nan: bool = False
    """Whether its loss is not a number in `step`."""
    step: int = 0
    fitting: int | None = None
    """Sequences of a micro-batch that fit into its memory."""
    output: str | None = None
    """Another run folder, for this process only."""
    sharded: bool = False
    """Make Accelerate treat the CPU as several GPUs, the only devices over which it shards weights."""


def watch_over(watch: Watch) -> None:
    sequences, weights, steps = [], [], 0
    batch_of = PackedSequences.batch
    accumulate_gradients, save_checkpoint = learner.accumulate_gradients, loop.save_checkpoint

    def batch(self: PackedSequences, indices: range) -> dict:
        found = batch_of(self, indices)
        sequences.append({"indices": list(indices), "tokens": found["input_ids"].tolist()})
        return found

    def accumulate(accelerator, model, *arguments, **settings):
        nonlocal steps
        steps += 1
        fails = RANK == 1 and steps == watch.step
        if fails and watch.signal:
            os.kill(os.getpid(), signal.Signals[watch.signal])
        unwrapped_model = accelerator.unwrap_model(model)
        hook = unwrapped_model.register_forward_hook(lose_loss) if fails and watch.nan else None
        loss = accumulate_gradients(accelerator, model, *arguments, **settings)
        if hook is not None:
            hook.remove()
        return loss

    def save(checkpoints: Path, step: int, model: torch.nn.Module, *arguments, **settings):
        save_checkpoint(checkpoints, step, model, *arguments, **settings)
        held = [local(parameter.detach()) for parameter in model.parameters()]
        weights.append(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in held)).hexdigest())
        record = {"sequences": sequences, "parameters": sum(tensor.numel() for tensor in held), "weights": weights}
        Path(watch.record, f"{RANK}.json").write_text(json.dumps(record))

    def end_training(self: Accelerator) -> None:
        # isinstance would read the class of lazy modules, which imports them.
        wrapped = sum(type(held) is DistributedDataParallel for held in gc.get_objects())
        Path(watch.record, f"{RANK}.wrapped").write_text(str(wrapped))
        end_of_accelerate(self)

    end_of_accelerate, Accelerator.end_training = Accelerator.end_training, end_training
    if watch.fitting and RANK == 1:
        setup.fit_micro_batch = lambda *_: watch.fitting
    PackedSequences.batch = batch
    learner.accumulate_gradients = accumulate
    loop.save_checkpoint = save


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lose_loss(model: torch.nn.Module, inputs: tuple, output):
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
    from healthslm.training.options import PretrainOptions

    run(loop.pretrain, PretrainOptions)
