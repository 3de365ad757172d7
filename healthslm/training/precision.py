"""The types in which training computes."""

import torch


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bf16 where the machine computes in it, and not where it would only imitate it."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
