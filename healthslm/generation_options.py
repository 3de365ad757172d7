"""Options of generation. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from healthslm.options import CheckedOptions, Device, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed


@dataclass
class GenerationOptions(CheckedOptions):
    """Options of `generate`."""

    model: str
    """Folder or Hub name of a causal language model, with its tokenizer."""
    prompt: str | None = None
    """Text to continue. By default, the model begins a new document."""
    prompts: Path | None = None
    """Text file with one prompt per line. Use it instead of `prompt`."""
    max_new_tokens: PositiveInt = 200
    """Maximum number of tokens to generate. A document may end earlier."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature. Lower values make likely tokens more likely; 0 is greedy decoding."""
    top_k: NonNegativeInt = 50
    """Sample from the `top_k` most likely tokens; 0 for all tokens."""
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Sample from the most likely tokens whose probabilities add up to `top_p`."""
    seed: Seed = 0
    """Random seed for sampling."""
    device: Device = "auto"
    """Device to run on. `auto` uses a GPU if there is one."""
