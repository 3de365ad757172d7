"""The optimizer and its learning rate."""

import torch
from torch import nn


def make_optimizer(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) that decays matrices and leaves vectors, such as norms and biases, alone.

    The learning rate is set at every update: see `learning_rate_at`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def learning_rate_at(update: int, updates: int, warmup_updates: int, peak: float) -> float:
    """Learning rate of an update, counted from 0: up linearly to the peak, then down linearly to zero.

    Linear decay to zero beats a cosine that stops above it (Bergsma et al., 2025).
    """
    if update < warmup_updates:
        return peak * (update + 1) / warmup_updates
    return peak * (updates - update) / (updates - warmup_updates)
