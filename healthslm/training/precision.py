"""The types in which training computes."""

import torch


def computes_in_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 here: a machine may also only imitate them."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bf16 where the machine computes in it, in fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device))
