"""Reading examples to fine-tune on: prompts with completions, chats, or plain text, as token ids with labels.

An example begins with the token that the tokenizer puts before a text, if it does, and ends with its end-of-text token,
so that a fine-tuned model stops. Plain text always begins with a token that separates documents, so that its first
token is learned too. Prompt and completion are encoded separately: at inference the prompt has the same tokens. Labels
are -100 where no loss is computed.
"""

import hashlib
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from healthslm.corpus.sources import find_sources, read_rows
from healthslm.errors import UserError
from healthslm.finetuning.options import FinetuneOptions
from healthslm.tokenization.encoding import encode_texts, separator_id

IGNORED = -100

Row = Mapping[str, Any]
Chat = list[dict[str, Any]]
Content = tuple[str, str] | Chat
"""What a row has to learn: prompt and completion, or a chat."""
Kind = Literal["completions", "chats", "text"]
Extract = Callable[[str, Row], Content | None]
"""Finds it in a row, whose place is named in errors."""


@dataclass(frozen=True)
class Example:
    """A text to fine-tune on."""

    input_ids: list[int]
    labels: list[int]
    """(tokens,), the token to learn, or -100."""
    prompt: str
    """Empty if there is nothing to answer. Of a chat, its last question."""
    completion: str
    """What is learned. Of a chat, all of the assistant's messages."""
    answer: str
    """The answer to the prompt. Of a chat, its last message."""
    prompt_tokens: int
    """Number of tokens before the answer."""


@dataclass(frozen=True)
class Examples:
    """The examples of a split."""

    examples: list[Example]
    kind: Kind
    sources: list[str]
    skipped: int
    """Rows without a prompt or completion."""
    truncated: int
    """Examples that were cut to the context."""
    dropped: int
    """Examples that would lose their whole completion by that."""

    def __len__(self) -> int:
        return len(self.examples)

    def describe(self) -> dict[str, Any]:
        """Kind, sources, sizes and the SHA-256 of the token ids and labels."""
        checksum = hashlib.sha256()
        for example in self.examples:
            checksum.update(np.array([example.input_ids, example.labels], dtype="<i8").tobytes())
        return {
            "kind": self.kind,
            "sources": self.sources,
            "examples": len(self.examples),
            "tokens": sum(len(example.input_ids) for example in self.examples),
            "completion_tokens": sum(label != IGNORED for example in self.examples for label in example.labels),
            "skipped": self.skipped,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "sha256": checksum.hexdigest(),
        }


def read_examples(
    patterns: Sequence[str],
    options: FinetuneOptions,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    count: int | None,
) -> Examples:
    """Read and encode examples.

    Args:
        patterns: Files, folders, glob patterns or Hub datasets.
        context: Maximum length in tokens.
        count: Number of examples to choose at random; None for all.

    Raises:
        UserError: A file can't be read, a field is missing or has another type, there are no examples, or some are
            longer than the context and must not be cut.
    """
    name = " ".join(patterns)
    sources = [source.location for source in find_sources(list(patterns))]
    extract: Extract | None = None
    contents: list[tuple[str, Content]] = []
    skipped = 0
    for source in sources:
        for number, row in enumerate(read_rows(source), start=1):
            place = f"{source}: row {number:,}"
            extract = extract or _extractor(options, place, row)
            content = extract(place, row)
            if content is None:
                skipped += 1
            else:
                contents.append((place, content))
    if not contents:
        reason = f"in all {skipped:,} rows, prompt or completion is empty" if skipped else "there are no rows"
        raise UserError(f"{name}: no examples: {reason}")
    random.Random(options.seed).shuffle(contents)
    examples: list[Example] = []
    lengths: list[int] = []
    dropped = 0
    for place, content in contents:
        if len(examples) == count:
            break
        example = (
            _encode_pair(tokenizer, *content) if isinstance(content, tuple) else _encode_chat(tokenizer, place, content)
        )
        lengths.append(len(example.input_ids))
        if any(label != IGNORED for label in example.labels[:context]):
            examples.append(_cut(example, tokenizer, context) if lengths[-1] > context else example)
        else:
            dropped += 1
    too_long = sum(length > context for length in lengths)
    if too_long and not options.truncate:
        raise UserError(
            f"{name}: {too_long:,} of {len(lengths):,} examples are longer than the context of {context:,} tokens (the "
            f"longest has {max(lengths):,}): shorten them, or cut them at their end with --truncate"
        )
    if not examples:
        raise UserError(f"{name}: no examples: cut to the context of {context:,} tokens, none has a completion")
    return Examples(examples, _kind(contents[0][1]), sources, skipped, too_long - dropped, dropped)


def _kind(content: Content) -> Kind:
    if isinstance(content, list):
        return "chats"
    return "completions" if content[0] else "text"


def _cut(example: Example, tokenizer: PreTrainedTokenizerBase, context: int) -> Example:
    labels = example.labels[:context]
    completion = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=True)
    return replace(example, input_ids=example.input_ids[:context], labels=labels, completion=completion)


def _extractor(options: FinetuneOptions, place: str, row: Row) -> Extract:
    """The function that finds what to learn in a row, which the options or else the fields of the first row choose.

    Raises:
        UserError: The options name several kinds of data, or the row has none of the default fields.
    """
    given = [name for name in ("prompt", "messages", "text") if getattr(options, name) is not None]
    if (options.prompt is None) != (options.completion is None):
        raise UserError("--prompt and --completion belong together: give both, or --text for plain text")
    if options.completion_after is not None and options.text is None:
        raise UserError("--completion-after splits plain text: name its field with --text")
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other: give one of them")
    prompt, completion, messages, text = options.prompt, options.completion, options.messages, options.text
    if not given:
        if "prompt" in row and "completion" in row:
            prompt, completion = "prompt", "completion"
        elif "messages" in row:
            messages = "messages"
        elif "text" in row:
            text = "text"
        else:
            raise UserError(
                f"{place}: no fields prompt and completion, messages, or text; the fields are {', '.join(row)}: name "
                "them with --prompt and --completion, --messages, or --text"
            )
    if messages is not None:
        return partial(_extract_chat, messages)
    if text is not None:
        return partial(_extract_text, text, options.completion_after)
    return partial(_extract_pair, prompt or "", completion or "")


def _extract_pair(prompt: str, completion: str, place: str, row: Row) -> tuple[str, str] | None:
    """Prompt and completion; None if one is empty."""
    found = _fill(prompt, place, row), _fill(completion, place, row)
    return found if all(text.strip() for text in found) else None


def _extract_text(text: str, completion_after: str | None, place: str, row: Row) -> tuple[str, str] | None:
    """Prompt and completion, or an empty prompt and the whole text; None if there is nothing to learn."""
    value = _fill(text, place, row)
    if completion_after is None:
        return ("", value) if value.strip() else None
    before, mark, after = value.partition(completion_after)
    return (before + mark, after) if before.strip() and after.strip() else None


def _extract_chat(field: str, place: str, row: Row) -> Chat | None:
    """The messages; None if the assistant says nothing."""
    messages = _field(field, place, row)
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role")
        for message in messages
    ):
        raise UserError(f"{place}: {field} is not a list of messages with role and content")
    return messages if any(_answers(messages)) else None


def _answers(messages: Chat) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def _encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Example:
    prompt_ids, completion_ids = encode_texts(tokenizer, [prompt, completion])
    prompt_ids = [*_start(tokenizer), *prompt_ids] or [separator_id(tokenizer)]
    completion_ids = [*completion_ids, separator_id(tokenizer)]
    labels = [IGNORED] * len(prompt_ids) + completion_ids
    return Example(prompt_ids + completion_ids, labels, prompt, completion, completion, len(prompt_ids))


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: a token that begins texts, or nothing."""
    first = tokenizer("a")["input_ids"][0]
    return [first] if first == tokenizer.bos_token_id else []


def _encode_chat(tokenizer: PreTrainedTokenizerBase, place: str, messages: Chat) -> Example:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; give the data as prompts and completions"
        )
    special = next((t for m in messages for t in tokenizer.all_special_tokens if t in m["content"]), None)
    if special:
        raise UserError(f"{place}: a message contains the special token {special}: remove it")
    if len(messages) == 1:
        raise UserError(f"{place}: the assistant's message answers nothing: put the user's message before it")
    settings: dict[str, Any] = {"tokenize": True, "return_dict": True}
    try:
        found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **settings)
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **settings)["input_ids"]
    except TemplateError as error:
        raise UserError(f"{place}: the chat template refuses these messages: {error}") from error
    input_ids, mask = found["input_ids"], found["assistant_masks"]
    if not any(mask):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template does not mark the assistant's text with {{% generation %}}; "
            "give the data as prompts and completions"
        )
    labels = [token if learned else IGNORED for token, learned in zip(input_ids, mask, strict=True)]
    answers = _answers(messages)
    is_answered = messages[-1]["role"] == "assistant"
    questions = [message["content"] for message in messages if message["role"] == "user" and is_answered]
    return Example(input_ids, labels, "".join(questions[-1:]), "".join(answers), answers[-1], len(before))


def _fill(template: str, place: str, row: Row) -> str:
    """The text of a field, or of a template with fields in braces."""
    if "{" not in template:
        return _as_text(_field(template, place, row))
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{template!r}: not a template: {error}") from error
    return "".join(
        literal + (_as_text(_field(name, place, row)) if name is not None else "") for literal, name, *_ in parts
    )


def _field(name: str, place: str, row: Row) -> Any:
    if name not in row:
        raise UserError(f"{place}: no field {name!r}; the fields are {', '.join(row)}")
    return row[name]


def _as_text(value: Any) -> str:
    """A value as text; the items of a list are joined with newlines."""
    if value is None:
        return ""
    return "\n".join(map(_as_text, value)) if isinstance(value, list) else str(value)
