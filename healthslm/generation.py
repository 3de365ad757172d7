"""Generate text with a causal language model."""

import logging
import sys
import time
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from healthslm.errors import UserError
from healthslm.generation_options import GenerationOptions
from healthslm.models import by_device, open_model
from healthslm.tokenization.encoding import encode_documents, load_tokenizer, separator_id

logger = logging.getLogger(__name__)

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
"""Arguments of Transformers' `generate` for greedy decoding, without warnings about unused sampling options."""

NOTICE = "Generated text, for research only. It is not medical advice, and its statements are often false."


def generate(options: GenerationOptions) -> None:
    """Continue prompts and stream the text to standard output.

    Raises:
        UserError: There is no such model, device or prompt file, the file isn't UTF-8, both kinds of prompts are given,
            or a prompt exceeds the model's context.
    """
    if options.prompt is not None and options.prompts is not None:
        raise UserError("--prompt and --prompts exclude each other: give one of them")
    prompts = [options.prompt or ""]
    if options.prompts is not None:
        try:
            prompts = options.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{options.prompts}: not UTF-8 text: {error}") from error
    if not prompts:
        raise UserError(f"{options.prompts}: this file contains no prompts")
    tokenizer = load_tokenizer(options.model)
    model = open_model(options.model, options.device)
    # In training, each document follows the separator.
    inputs = [ids.tolist() for ids in encode_documents(tokenizer, prompts)]
    context = model.config.max_position_embeddings
    check_prompts(inputs, context)
    if max(map(len, inputs)) + options.max_new_tokens > context:
        logger.info(
            "the model sees %d tokens: where they are full, a text continues from the last half of them", context
        )
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
    started, written = time.perf_counter(), 0
    for number, ids in enumerate(inputs):
        if number:
            print()
        written += write_text(model, tokenizer, ids, options.max_new_tokens, sampling)
    seconds = time.perf_counter() - started
    logger.info("%d tokens in %.1f seconds: %.0f tokens/s", written, seconds, written / seconds)


def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int,
    settings: dict[str, Any],
) -> int:
    """Stream a prompt and its continuation to standard output.

    A text that fills the model's context continues from the last half of the context.

    Args:
        ids: Token ids of the prompt, fewer than the context has.
        settings: Further arguments of Transformers' `generate`.

    Returns:
        The number of new tokens.
    """
    context, separator = model.config.max_position_embeddings, separator_id(tokenizer)
    streamer = _LongTextStreamer(tokenizer, skip_special_tokens=True)
    written = 0
    while written < max_new_tokens and not (written and ids[-1] == separator):
        seen = ids if len(ids) < context else ids[-(context // 2) :]
        input_ids = torch.tensor([seen], device=model.device)
        ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=streamer,
            max_new_tokens=min(max_new_tokens - written, context - len(seen)),
            eos_token_id=separator,
            pad_token_id=separator if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **settings,
        )[0].tolist()
        written += len(ids) - len(seen)
    streamer.finish()
    return written


class _LongTextStreamer(TextStreamer):
    """Streams one text that is written by several calls of `generate`: the later prompts have been printed already."""

    def end(self) -> None:
        """Called at the end of each call."""
        self.skip_prompt = self.next_tokens_are_prompt = True

    def finish(self) -> None:
        super().end()


def check_prompts(prompts: list[list[int]], context: int) -> None:
    """Check that the context has room for each prompt and at least one new token.

    Args:
        prompts: Token ids of each prompt, starting with the separator.

    Raises:
        UserError: A prompt is too long.
    """
    for number, ids in enumerate(prompts, start=1):
        if len(ids) >= context:
            raise UserError(
                f"prompt {number} has {len(ids) - 1} tokens, but the limit is {context - 2}: the model's context of "
                f"{context} also holds the separator and a new token"
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
    """Generate the continuations of a batch of prompts.

    Args:
        prompts: (batch, length), token ids.
        separator: Token id that ends a document and pads the result.
        mask: (batch, length), 0 for padding; None if there is no padding.
        settings: Further arguments of Transformers' `generate`, such as `GREEDY`.

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


def up_to_separator(written: torch.Tensor, separator: int) -> list[list[int]]:
    """The tokens of each continuation before the separator: (batch, new tokens) as lists."""
    return [ids[: ids.index(separator)] if separator in ids else ids for ids in written.tolist()]


def complete_prompts(
    model: PreTrainedModel,
    prompts: list[list[int]],
    separator: int,
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[list[int]]:
    """Continue prompts of any lengths by greedy decoding, up to the separator.

    Args:
        prompts: Token ids of each prompt.
        separator: Token id that ends a continuation.
        batch_size: Defaults to 16 on a CPU and 64 on a GPU. It changes memory and speed but not the result: prompts are
            padded on the left, and padding is masked.

    Returns:
        The token ids of each continuation, without the separator.
    """
    batch_size = batch_size or by_device(model, cpu=16, gpu=64)
    written: list[list[int]] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="generating", unit="batch", disable=not progress):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        padded = torch.tensor([[separator] * (width - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        new = continue_prompts(model, padded, separator, max_new_tokens, mask, **GREEDY)
        written += up_to_separator(new, separator)
    return written
