"""How well a model writes completions: the bits that they take, and the overlap of those that it writes.

- The **bits per byte** of completions are the bits of their tokens, with the one that ends them, divided by their UTF-8
  bytes. The prompt is only read.
- **ROUGE** and **token F1** compare completions that the model writes by greedy decoding with those of the data, see
  `healthslm.text_overlap`. If all of those have one line, only the first line that the model writes counts: a base
  model does not stop by itself. The baseline `first_sentence` is the first sentence of the prompt.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from healthslm.bits_per_byte import token_bits
from healthslm.finetuning.examples import IGNORED, Example
from healthslm.generation import complete_prompts
from healthslm.sentences import sentence_end
from healthslm.statistics import bootstrap_interval
from healthslm.text_overlap import score_rouge, score_token_f1
from healthslm.tokenization.encoding import separator_id


def measure_completions(model: PreTrainedModel, examples: Sequence[Example], progress: bool = False) -> dict[str, Any]:
    """Measure how well a model predicts completions.

    Returns:
        `loss` in nats per token, `perplexity`, `bits_per_byte` and its 95% interval over examples.
    """
    learned = [np.array(example.labels)[1:] != IGNORED for example in examples]
    bits = token_bits(
        model,
        [np.array(example.input_ids) for example in examples],
        first_tokens=[int(mask.argmax()) + 1 for mask in learned],
        progress=progress,
    )
    of_examples = np.array([of_tokens[mask].sum() for of_tokens, mask in zip(bits, learned, strict=True)])
    sizes = np.array([len(example.completion.encode()) for example in examples])
    loss = float(of_examples.sum() * math.log(2) / sum(mask.sum() for mask in learned))
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": float(of_examples.sum() / sizes.sum()),
        "interval": list(bootstrap_interval(of_examples, sizes)),
    }


def write_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    progress: bool = False,
) -> list[str]:
    """Write the completion of each example's prompt by greedy decoding.

    Examples whose prompt leaves no room in the context for `max_new_tokens` must be left out, see `can_complete`.
    """
    prompts = [example.input_ids[: example.prompt_tokens] for example in examples]
    written = complete_prompts(model, prompts, separator_id(tokenizer), max_new_tokens, progress=progress)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def can_complete(example: Example, context: int, max_new_tokens: int) -> bool:
    """Whether the example has a prompt and the context has room for a completion."""
    return bool(example.prompt) and example.prompt_tokens + max_new_tokens <= context


def score_completions(examples: Sequence[Example], written: dict[str, list[str]]) -> dict[str, Any]:
    """ROUGE and token F1 of completions against those of the data, see above.

    Args:
        written: Completions of the examples by the name of their model.

    Returns:
        `examples`, and by model and for `first_sentence` the scores of `score_rouge` and `token_f1`.
    """
    references = [example.answer.strip() for example in examples]
    written = written | {"first_sentence": [example.prompt[: sentence_end(example.prompt)] for example in examples]}
    if not any("\n" in reference for reference in references):
        written = {name: [text.strip().partition("\n")[0] for text in texts] for name, texts in written.items()}
    scores = {
        name: {**score_rouge(texts, references), "token_f1": score_token_f1(texts, references)}
        for name, texts in written.items()
    }
    return {"examples": len(examples), **scores}
