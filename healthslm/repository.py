"""The Hub model repository: HealthSLM's configuration, its code, its tokenizer and, in a clone, its weights."""

from pathlib import Path

_INSTALLED = Path(__file__).with_name("model_repository")
_CLONE = Path(__file__).resolve().parents[1]


def model_repository() -> Path:
    """The folder that the Auto classes open: the root of a clone, or its copy inside an installed package."""
    return _INSTALLED if _INSTALLED.is_dir() else _CLONE
