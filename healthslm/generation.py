"""Writing text with a model."""

import logging
import sys
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer, set_seed

from healthslm.errors import UserError
from healthslm.generation_options import GenerationOptions
from healthslm.models import open_model
from healthslm.tokenization.encoding import encode_texts, load_tokenizer, separator_id

logger = logging.getLogger(__name__)

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
"""Arguments of `generate` that always take the likeliest token, without a warning about the others."""

NOTICE = "Machine-written text, for research only: it is not medical advice, and its statements are often false."


def generate(options: GenerationOptions) -> None:
    """Continue prompts, streaming to standard output.

    Raises:
        UserError: There is no such model, device or prompt file, both kinds of prompt are given, or a prompt is longer
            than the model's context.
    """
    if options.prompt is not None and options.prompts is not None:
        raise UserError("give --prompt or --prompts, not both")
    prompts = [options.prompt or ""]
    if options.prompts is not None:
        prompts = options.prompts.read_text(encoding="utf-8").splitlines()
    if not prompts:
        raise UserError(f"{options.prompts}: no prompts in this file")
    tokenizer = load_tokenizer(options.model)
    model = open_model(options.model, options.device)
    # A document begins behind the separator: so the model has learnt it.
    inputs = [[separator_id(tokenizer), *ids] for ids in encode_texts(tokenizer, prompts)]
    context = model.config.max_position_embeddings
    check_prompts(inputs, context)
    if max(map(len, inputs)) + options.max_new_tokens > context:
        logger.info("text ends at the model's context, %d tokens with the prompt", context)
    set_seed(options.seed)
    sampling = GREEDY
    if options.temperature > 0:
        sampling = {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "do_sample": True,
        }

    print(NOTICE, file=sys.stderr)
    for number, ids in enumerate(inputs):
        if number:
            print()
        input_ids = torch.tensor([ids], device=model.device)
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            max_new_tokens=min(options.max_new_tokens, context - len(ids)),
            eos_token_id=separator_id(tokenizer),
            pad_token_id=separator_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **sampling,
        )


def check_prompts(prompts: list[list[int]], context: int) -> None:
    """Refuse prompts, as tokens behind the separator, that leave no room in the context for a new token.

    Raises:
        UserError: One is too long; says which, and by how much.
    """
    for number, ids in enumerate(prompts, start=1):
        if len(ids) >= context:
            raise UserError(
                f"prompt {number} has {len(ids) - 1} tokens, but at most {context - 2} fit: the model's context of "
                f"{context} also holds the separator in front and a new token"
            )


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    separator: int,
    max_new_tokens: int,
    mask: torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """What a model writes behind prompts (batch, length), ended and filled up by the separator.

    Args:
        mask: (batch, length), 0 for padding; None where there is none.
        settings: Further arguments of `generate`, such as `GREEDY`.

    Returns:
        (batch, new tokens), on the CPU.
    """
    return model.generate(
        prompts.to(model.device),
        attention_mask=(torch.ones_like(prompts) if mask is None else mask).to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=separator,
        pad_token_id=separator,
        **settings,
    )[:, prompts.shape[1] :].cpu()
