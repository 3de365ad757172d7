"""The optimizers, and the group of weights that each learning rate is for."""

import torch
from transformers import PreTrainedModel


def make_optimizers(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    embedding_learning_rate: float | None,
    muon_learning_rate: float | None,
    weight_decay: float,
    betas: tuple[float, float],
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter, 2019) for all weights, or Muon (Jordan et al., 2024) for the hidden matrices.

    Matrices decay, vectors such as norms and biases do not. Muon moves a matrix along its momentum with all singular
    values made equal; its steps are scaled to the size of AdamW's (Liu et al., 2025), so that learning rates compare.

    Args:
        learning_rate: Peak learning rate of AdamW.
        embedding_learning_rate: That of the embeddings and the output projection; None for the same.
        muon_learning_rate: Peak learning rate of Muon; None leaves the hidden matrices to AdamW.

    Returns:
        AdamW, then Muon if it is wanted. Each group holds its peak as `peak_learning_rate`; `set_learning_rates` sets
        the learning rate itself.
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
        group("embeddings", learning_rate if embedding_learning_rate is None else embedding_learning_rate),
        group("vectors", learning_rate),
    ]
    if muon_learning_rate is None:
        adamw_groups.append(group("matrices", learning_rate))
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw_groups, lr=0.0, betas=betas, fused=True)]
    if muon_learning_rate is not None:
        muon_groups = [group("matrices", muon_learning_rate)]
        optimizers.append(torch.optim.Muon(muon_groups, lr=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def find_embeddings(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that hold one row of weights a token, or a position."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    output = model.get_output_embeddings()
    return modules if output is None else [*modules, output]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to this part of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_learning_rate"]
