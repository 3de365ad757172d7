"""One step of training: gradients, clipping and optimizers, on any device and any number of processes."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from healthslm.training.attention import fit_attention
from healthslm.training.gradients import MicroBatch, accumulate_gradients, has_failed, reduce_outcome
from healthslm.training.optimization import make_optimizers, set_learning_rates, skip_failed


class Outcome:
    """The outcome of a step, on its way from the device while the host queues the next step.

    Args:
        on_device: (3,), from `reduce_outcome`.
    """

    def __init__(self, on_device: torch.Tensor):
        self._values = on_device.to("cpu", non_blocking=True)
        self._has_arrived = None
        if on_device.device.type == "cuda":  # without an event, reading would wait for all that is queued later
            self._has_arrived = torch.cuda.Event()
            self._has_arrived.record()

    def wait(self) -> tuple[float, float, bool, bool]:
        """Wait for the step. Returns its loss, its gradient norm, whether it failed, and whether to stop."""
        if self._has_arrived is not None:
            self._has_arrived.synchronize()
        loss, grad_norm, stop = self._values.tolist()
        return loss, grad_norm, bool(has_failed(self._values)), stop > 0


class Learner:
    """A model with its optimizers, and the step that they take.

    Attributes:
        unwrapped_model: The model as it was given, to evaluate and to save.
        model: The same model as Accelerate prepared it, compiled or not, to train.
        optimizers: Its optimizers, as `make_optimizers` returns them.

    Args:
        compiled: Compile the model.
        max_grad_norm: Norm that gradients are clipped to.
        settings: Arguments of `make_optimizers`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        unwrapped_model: PreTrainedModel,
        *,
        compiled: bool,
        max_grad_norm: float,
        settings: dict[str, Any],
    ):
        self.unwrapped_model = unwrapped_model
        self.optimizers = make_optimizers(unwrapped_model, **settings)
        self.model, *self._prepared_optimizers = accelerator.prepare(unwrapped_model, *self.optimizers)
        self._accelerator, self._max_grad_norm = accelerator, max_grad_norm
        fit_attention(unwrapped_model, accelerator.device, compiled)
        # CUDA graphs save the host a thousand kernel launches a step. DDP and FSDP hook into the model in ways that
        # break them.
        uses_graphs = compiled and accelerator.device.type == "cuda" and accelerator.num_processes == 1
        if compiled:
            self.model = torch.compile(self.model, dynamic=False, mode="reduce-overhead" if uses_graphs else None)
        # Each replay of a graph overwrites the memory of the one before, so gradients need memory of their own.
        self._keeps_gradients = uses_graphs
        if uses_graphs:
            for parameter in unwrapped_model.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def step(
        self,
        batches: list[MicroBatch],
        learning_rate_factor: float,
        should_stop: Callable[[], bool] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Outcome:
        """Take a step, or leave the weights as they are if it fails (see `has_failed`), without waiting for the device.

        Args:
            batches: The micro-batches of this process, from `micro_batches`.
            learning_rate_factor: The learning rates, as a fraction of their peaks.
            should_stop: Whether this process was asked to stop, called after its last micro-batch.
            progress: Called after each micro-batch with its number of tokens over all processes.
        """
        set_learning_rates(self.optimizers, learning_rate_factor)
        loss = accumulate_gradients(self._accelerator, self.model, batches, progress)
        grad_norm = self._accelerator.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        stop = should_stop is not None and should_stop()
        outcome = reduce_outcome(self._accelerator, loss, grad_norm, stop)
        skip_failed(self.optimizers, has_failed(outcome))
        for optimizer in self._prepared_optimizers:
            optimizer.step()
        for optimizer in self._prepared_optimizers:
            optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        return Outcome(outcome)
