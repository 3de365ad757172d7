"""Check that an exported form computes what the original model computes, in the form's own runtime.

- The **tokens** of the prompts must be the same.
- The **divergence** is the mean Kullback-Leibler divergence of the next-token probabilities from those of the original
  model, in bits per token: about the number of bits that the form loses. Each form has a limit.
- The **greedy tokens** that the form generates, with its own cache, must be the most likely ones of the original model
  up to twice the largest difference between their logits, and the program's rounding. A form with exact weights may
  only differ at a tie.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from healthslm.errors import UserError
from healthslm.generation import complete_prompts
from healthslm.tokenization.encoding import separator_id

PROMPTS = (
    "Vitamin D and the risk of",
    "Effect of metformin on HbA1c in type 2 diabetes: a randomized controlled trial\nBACKGROUND: ",
    "The 95% CI was 0.83-1.12 (p = 0.0472; n=12,345), i.e.  we couldn't reject\n\n\tH0. ",
    "Interleukin-6 (IL-6), TNF-α and β₂-microglobulin, 25 µg/mL, in Sjögren’s syndrome 🧬",
    "<|user|>What is asthma?<|end|><|assistant|>",
)
"""Prompts with digits, symbols, white space, contractions, special tokens, and characters of one to four bytes."""
NEW_TOKENS = 24


class Runtime(nn.Module):
    """A model in some program. It is called like a causal language model of Transformers, on the CPU."""

    device = torch.device("cpu")
    rounding = 1e-3
    """Logits that differ by less are a tie: programs round differently."""

    def __init__(self, config: Any, separator: int):
        super().__init__()
        self.config, self.separator = config, separator

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which special tokens are recognized, with the tokens that the program puts first."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits of a sequence: (length, vocab_size), fp32."""

    @abstractmethod
    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Continue a prompt by greedy decoding, up to the separator."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        """The logits of a batch (batch, length), for `healthslm.bits_per_byte`."""
        return CausalLMOutput(logits=torch.stack([self.logits(ids) for ids in input_ids.tolist()]))


class TransformersRuntime(Runtime):
    """A model of Transformers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model.config, separator_id(tokenizer))
        self.model, self.tokenizer = model.eval(), tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].float()

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        return complete_prompts(self.model, [list(ids)], self.separator, new_tokens)[0]


@dataclass(frozen=True)
class Form:
    """One precision of an export."""

    name: str
    """Such as "fp32" or "Q8_0"."""
    file: Path
    """Its weights."""
    open: Callable[[], Runtime]
    largest_divergence: float
    """The limit, in bits per token."""


def compare(original: Runtime, form: Runtime, name: str, largest_divergence: float) -> dict[str, float]:
    """Compare a form with the original model on the prompts, as defined above.

    Returns:
        `divergence`, `logit_difference`, the largest one, and `same_greedy_tokens`, the share of the generated tokens
        that the original model would generate.

    Raises:
        UserError: They differ.
    """
    context = original.config.max_position_embeddings
    divergences: list[torch.Tensor] = []
    gaps: list[torch.Tensor] = []
    difference = 0.0
    for prompt in PROMPTS:
        ids = original.encode(prompt)
        if (found := form.encode(prompt)) != ids:
            raise UserError(f"{name}: not exported: it turns {prompt!r} into other tokens: {found} instead of {ids}")
        ids = ids[: context // 2]
        new_tokens = min(NEW_TOKENS, context // 2)
        written = form.greedy(ids, new_tokens)
        if len(written) < new_tokens:
            written.append(form.separator)
        expected, got = original.logits(ids + written), form.logits(ids + written)
        divergences.append(_divergence(expected, got))
        difference = max(difference, (expected - got).abs().max().item())
        before = expected[-len(written) - 1 : -1]  # the logits at a position are those of the next token
        gaps.append(before.amax(-1) - before.gather(-1, torch.tensor(written)[:, None])[:, 0])
    divergence, gap = torch.cat(divergences).mean().item(), torch.cat(gaps).max().item()
    if not divergence <= largest_divergence:  # also if it is not a number
        raise UserError(
            f"{name}: not exported: its probabilities differ from those of the original model by {divergence:.2g} bits "
            f"per token, more than the limit of {largest_divergence:.2g}"
        )
    if gap > 2 * difference + form.rounding:
        raise UserError(
            f"{name}: not exported: it generates other tokens than the original model, whose logits for them are "
            f"{gap:.2g} below the largest ones, while the logits of both differ by {difference:.2g}"
        )
    return {
        "divergence": divergence,
        "logit_difference": difference,
        "same_greedy_tokens": (torch.cat(gaps) == 0).double().mean().item(),
    }


def _divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """(length,), in bits."""
    expected, got = (logits.double().log_softmax(-1) for logits in (expected, got))
    return (expected.exp() * (expected - got)).sum(-1) / math.log(2)
