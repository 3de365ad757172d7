"""Labeled examples as the sequences of tokens that a classifier is trained on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from healthslm.classification.labeled_data import Example, check_labels, read_examples
from healthslm.classification.options import ClassifierOptions
from healthslm.classification.tagging import label_tokens, running_text
from healthslm.errors import UserError
from healthslm.files import file_sha256
from healthslm.options import OptionError
from healthslm.tokenization.encoding import encode

logger = logging.getLogger(__name__)

Labels = Sequence[Sequence[str]]
"""For each example the labels of its units."""


@dataclass
class Split:
    """The data of a split, as read and as the model sees it."""

    paths: list[Path]
    examples: list[Example]
    sequences: list[dict[str, Any]]
    """`input_ids`, `attention_mask` and `labels` of each sequence."""
    places: list[list[int]]
    """For each sequence of words or sentences the tokens at which the labels of its units are read."""
    groups: list[range]
    """The examples in each sequence."""

    @property
    def expected(self) -> Labels:
        return [example.labels for example in self.examples]

    @property
    def tokens(self) -> int:
        return sum(len(sequence["input_ids"]) for sequence in self.sequences)

    def describe(self) -> dict[str, Any]:
        return {
            "files": [{"name": path.name, "sha256": file_sha256(path)} for path in self.paths],
            "examples": len(self.examples),
            "units": sum(len(example.units) for example in self.examples),
            "sequences": len(self.sequences),
            "tokens": self.tokens,
        }


def label_names(examples: Sequence[Example], options: ClassifierOptions) -> list[str]:
    """The labels of the training data; for mentions O and both tags of every type.

    Raises:
        UserError: There is nothing to tell apart.
    """
    names = {label for example in examples for label in example.labels}
    if options.task != "mentions":
        if len(names) < 2:
            raise UserError(f"{options.train[0]}: all examples have the same label, {min(names)!r}")
        return sorted(names)
    types = sorted({name[2:] for name in names if name != "O"})
    if not types:
        raise UserError(f"{options.train[0]}: all tags are O, so there is no mention to learn from")
    return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]


def read_splits(
    options: ClassifierOptions, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[str], dict[str, Split]]:
    """The labels, and the splits that the options name: train, validation and test.

    Args:
        longest: The model's context, in tokens.

    Raises:
        UserError: A file, a label or a length is not right.
        OptionError: `context` is longer than the model's.
    """
    if options.context and options.context > longest:
        raise OptionError("context", f"must be at most {longest}, the model's context, not {options.context}")
    paths = {"train": options.train}
    for name, path in (("validation", options.validation), ("test", options.test)):
        if path:
            paths[name] = [path]
    read = {name: read_examples(files, options) for name, files in paths.items()}
    names = label_names(read["train"], options)
    for examples in read.values():
        check_labels(examples, names)
    return names, {
        name: _encode(paths[name], examples, names, tokenizer, options, options.context or longest)
        for name, examples in read.items()
    }


def _encode(
    paths: list[Path],
    examples: list[Example],
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: ClassifierOptions,
    context: int,
) -> Split:
    label_ids = {name: index for index, name in enumerate(names)}
    groups = _groups(examples, tokenizer, options.join)
    units = [[unit for number in group for unit in examples[number].units] for group in groups]
    labels = [[label_ids[label] for number in group for label in examples[number].labels] for group in groups]
    how: dict[str, Any] = {"is_split_into_words": options.task != "text", "split_special_tokens": True}
    texts: list[Any]
    if options.task == "mentions":
        texts = [running_text(words) for words in units]
    elif options.task == "sentences":
        texts = [[first, *(f" {sentence}" for sentence in rest)] for first, *rest in units]
    else:
        texts = [text for (text,) in units]
    encoded = tokenizer(texts, verbose=False, **how)
    overlong = [number for number, ids in enumerate(encoded["input_ids"]) if len(ids) > context]
    if overlong:
        place = examples[groups[overlong[0]][0]].place
        found = (
            f"{len(overlong):,} of {len(texts):,} sequences are longer than {context:,} tokens, the first at {place}"
        )
        if not options.truncate:
            raise UserError(f"{paths[0]}: {found}: use --truncate to cut them")
        logger.warning("warning: %s: %s; they are cut", paths[0], found)
        encoded = tokenizer(texts, truncation=True, max_length=context, **how)
    sequences, places = [], []
    inside = [label_ids.get(f"I-{name[2:]}", index) if name[:2] == "B-" else index for index, name in enumerate(names)]
    for number, ids in enumerate(encoded["input_ids"]):
        if options.task == "text":
            token_labels: Any = labels[number][0]
        else:
            token_labels, read_at = label_tokens(
                encoded.word_ids(number), labels[number], inside, options.tokens_with_labels
            )
            places.append(read_at)
        sequences.append(
            {"input_ids": ids, "attention_mask": encoded["attention_mask"][number], "labels": token_labels}
        )
    return Split(paths, examples, sequences, places, groups)


def _groups(examples: list[Example], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[range]:
    """Consecutive examples that fit together into a sequence of `limit` tokens; at least one in each."""
    if not limit:
        return [range(number, number + 1) for number in range(len(examples))]
    texts = [" " + "".join(running_text(example.units)) for example in examples]
    sizes = [len(ids) for ids in encode(tokenizer, texts)["input_ids"]]
    starts = []
    used = limit
    for number, size in enumerate(sizes):
        if used + size > limit:
            starts.append(number)
            used = 1  # the separator in front
        used += size
    return [range(start, end) for start, end in pairwise([*starts, len(examples)])]


def labels_of_examples(split: Split, found: Sequence[Sequence[str]], missing: str) -> list[list[str]]:
    """Part the labels of the units of sequences into those of the examples; cut units have the label `missing`."""
    parted: list[list[str]] = []
    for group, labels in zip(split.groups, found, strict=True):
        sizes = [len(split.examples[number].units) for number in group]
        labels = [*labels, *[missing] * (sum(sizes) - len(labels))]
        parted += [list(labels[start:end]) for start, end in pairwise(accumulate(sizes, initial=0))]
    return parted
