"""Options of generation, which import nothing heavy, so that `--help` is quick."""

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
    """Text to continue; none, or empty, begins a document."""
    prompts: Path | None = None
    """File of prompts, one a line, in the place of a single prompt."""
    max_new_tokens: PositiveInt = 200
    """Tokens to write at most; a document may end before."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits: below 1 is bolder in what is likely, 0 always takes the likeliest token."""
    top_k: NonNegativeInt = 50
    """Choose among so many of the likeliest tokens; 0 among all."""
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Choose among the likeliest tokens that have so much probability together."""
    seed: Seed = 0
    """Of the random choice."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""
