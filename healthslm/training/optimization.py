"""The optimizers, and which weights each learning rate applies to."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from transformers import PreTrainedModel

from healthslm.training.precision import computes_in_bf16


class Muon(torch.optim.Muon):
    """PyTorch's Muon, except that it orthogonalizes all matrices of one shape together, with a tenth of the kernels.

    Options, state and results are the same, up to the rounding of batched products. Matrices sharded by FSDP2 are
    gathered, and each process keeps its shard of the result. As with PyTorch's fused AdamW, a step does nothing if
    `found_inf`, a tensor on the device, is 1.
    """

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights from their gradients. There is no closure that computes them again."""
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_of_one_shape(parameters, group)
        return None

    def _step_of_one_shape(self, parameters: list[torch.nn.Parameter], group: dict) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights = [_local(parameter) for parameter in parameters]
        buffers = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = torch.stack([_local(parameter.grad) for parameter in parameters if parameter.grad is not None])
        momentum = torch.stack(buffers)
        learning_rate = group["lr"]
        if self.found_inf is not None:
            gradients = torch.where(self.found_inf > 0, momentum, gradients)
            learning_rate = learning_rate * (1 - self.found_inf)

        momentum.lerp_(gradients, 1 - group["momentum"])
        updates = gradients.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        updates = _gathered(updates, parameters[0])
        updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        updates = _local_shard(updates, parameters[0]).to(momentum.dtype)
        scale = 0.2 * max(parameters[0].shape) ** 0.5  # adjust_lr_fn="match_rms_adamw"

        torch._foreach_copy_(buffers, momentum.unbind())
        torch._foreach_mul_(weights, 1 - learning_rate * group["weight_decay"])
        torch._foreach_sub_(weights, (updates * (learning_rate * scale)).unbind())


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Bring all singular values of each matrix close to 1, by Newton-Schulz iterations (Jordan et al., 2024).

    Args:
        matrices: (count, rows, columns).
        coefficients: Of x, x^3 and x^5 in the polynomial that each of the `steps` applies to the singular values.
        eps: Minimum of the norm that a matrix is divided by.

    Returns:
        (count, rows, columns) in bf16, or in fp32 if the hardware only emulates bf16, which is forty times slower.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16 if computes_in_bf16(matrices.device) else torch.float32)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def skip_failed(optimizers: list[torch.optim.Optimizer], failed: torch.Tensor) -> None:
    """Make the next step of these optimizers do nothing if `failed`, a tensor on the device, is 1."""
    for optimizer in optimizers:
        optimizer.found_inf = failed  # type: ignore[attr-defined]  # PyTorch's fused optimizers read it


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(stack: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Whole matrices (count, rows, columns) from the local shards of matrices that are sharded like `like`."""
    if not isinstance(like, DTensor):
        return stack
    shape = torch.Size([len(stack), *like.shape])
    strides = torch.empty(shape, device="meta").stride()
    placements = _stacked_placements(like)
    return DTensor.from_local(stack, like.device_mesh, placements, shape=shape, stride=strides).full_tensor()


def _local_shard(stack: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The local shard of whole matrices (count, rows, columns), sharded like `like`."""
    if not isinstance(like, DTensor):
        return stack
    return distribute_tensor(stack, like.device_mesh, _stacked_placements(like), src_data_rank=None).to_local()


def _stacked_placements(like: DTensor) -> list[Placement]:
    return [Shard(placement.dim + 1) if isinstance(placement, Shard) else placement for placement in like.placements]


def make_optimizers(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    muon_learning_rate: float | None,
    weight_decay: float,
    betas: tuple[float, float],
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter, 2019) for all weights, or Muon (Jordan et al., 2024) for the hidden matrices.

    Weight decay applies to matrices, not to vectors such as norms and biases. Muon's update of a matrix is its momentum
    with all singular values made equal, scaled to the size of AdamW's updates (Liu et al., 2025), so that their
    learning rates are comparable.

    Args:
        learning_rate: Peak learning rate of AdamW.
        muon_learning_rate: Peak learning rate of Muon. None trains the hidden matrices with AdamW.

    Returns:
        AdamW, and Muon if it is used. Each group holds its `peak_learning_rate`; `set_learning_rates` sets `lr`.
    """
    embeddings = {id(embedding.weight) for embedding in find_embeddings(model)}
    groups: dict[str, list[torch.nn.Parameter]] = {"embeddings": [], "matrices": [], "vectors": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "embeddings" if id(parameter) in embeddings else "matrices" if parameter.dim() == 2 else "vectors"
            groups[kind].append(parameter)

    def group(kind: str, peak: float) -> dict:
        decay = 0.0 if kind == "vectors" else weight_decay
        return {"params": groups[kind], "weight_decay": decay, "peak_learning_rate": peak}

    adamw_groups = [
        group("embeddings", learning_rate),
        group("vectors", learning_rate),
    ]
    if muon_learning_rate is None:
        adamw_groups.append(group("matrices", learning_rate))
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw_groups, lr=0.0, betas=betas, fused=True)]
    if muon_learning_rate is not None:
        muon_groups = [group("matrices", muon_learning_rate)]
        optimizers.append(Muon(muon_groups, lr=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def find_embeddings(model: PreTrainedModel) -> list[Any]:
    """The modules that hold a vector of weights for each token or position."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    output = model.get_output_embeddings()
    return modules if output is None else [*modules, output]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to this fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_learning_rate"]
