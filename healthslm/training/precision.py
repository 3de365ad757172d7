"""The precision of training: bf16 where the hardware computes in it, fp32 elsewhere."""

import torch


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bf16. If it only emulates bf16, fp32 is faster."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Autocast to bf16 where the hardware computes in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device))
