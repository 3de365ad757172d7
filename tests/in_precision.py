"""Train on the CPU in fp32 or bf16, whether or not this processor supports bf16.

    python tests/in_precision.py bf16 scripts/pretrain.py --recipe recipe.yaml

Every CPU computes in both; without instructions for bf16 it only takes longer.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def set_precision(precision: str, setattr: Callable = setattr) -> None:
    """Make PyTorch report that this CPU supports bf16, or that it doesn't, which training checks."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        setattr(torch.cpu, name, lambda: precision == "bf16")


if __name__ == "__main__":
    set_precision(sys.argv[1])
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
