"""The model that a release is evaluated on, and the data."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from healthslm.corpus.reader import read_kinds, read_texts, split_files
from healthslm.corpus.sources import Row, read_rows
from healthslm.documents import document_text
from healthslm.errors import UserError
from healthslm.evaluation.memorization import OPENING_TOKENS
from healthslm.evaluation.options import ReleaseEvaluationOptions
from healthslm.models import open_model
from healthslm.tokenization.encoding import load_tokenizer
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.run_folder import TrainingReport, report_training


class Tokenized(NamedTuple):
    """Tokenized documents of the corpus."""

    splits: list[TokenizedSplit]
    bytes: np.ndarray
    """(documents,), size of each text in UTF-8 bytes."""
    kinds: np.ndarray
    """(documents,), such as "abstract"."""

    def document(self, index: int) -> np.ndarray:
        """Token ids of a document, starting with the separator."""
        for split in self.splits:
            if index < len(split):
                return split.document(index)
            index -= len(split)
        raise IndexError(index)


class Subject:
    """The model under evaluation and its data, loaded when first used."""

    def __init__(self, options: ReleaseEvaluationOptions):
        self.options = options

    @cached_property
    def model(self) -> PreTrainedModel:
        return open_model(self.options.model, self.options.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.options.model)

    @cached_property
    def held_out(self) -> list[Row]:
        file = self.options.held_out
        rows = [row for row in read_rows(str(file)) if row.get("text")]
        if not rows:
            raise UserError(f"{file}: no document has any text")
        for row in rows:
            if not isinstance(row["text"], str):
                raise UserError(f"{file}: column text holds {str(row['text'])[:40]}, where text is expected")
        return rows

    @cached_property
    def held_out_texts(self) -> list[str]:
        return [document_text(row.get("title") or "", row["text"]) for row in self.held_out]

    @cached_property
    def training(self) -> TrainingReport | None:
        if self.options.training is None:
            return None
        return report_training(self.options.training, Path(self.options.model), hardware="unknown")

    def training_texts(self) -> Iterator[str]:
        files = split_files(self.options.corpus, "train")
        return (text for path in tqdm(files, desc="training text") for texts in read_texts(path) for text in texts)

    def tokenized(self, splits: Sequence[str]) -> Tokenized:
        """The documents of one or several splits, in order.

        Raises:
            UserError: The tokens belong to another corpus, judging by the number of documents.
        """
        corpus, tokens = self.options.corpus, self.options.tokens
        found = [TokenizedSplit(tokens, split) for split in splits]
        kinds = [kind for split in splits for path in split_files(corpus, split) for kind in read_kinds(path)]
        if len(kinds) != sum(map(len, found)):
            raise UserError(
                f"{tokens}: not the tokens of {corpus}: {sum(map(len, found)):,} documents instead of {len(kinds):,} "
                f"in {' and '.join(splits)}; tokenize the corpus again"
            )
        return Tokenized(found, np.concatenate([split.document_bytes for split in found]), np.array(kinds))

    def documents_read(self) -> np.ndarray:
        """Indices of the training documents whose opening the model has read: all of them if the run is unknown."""
        train = TokenizedSplit(self.options.tokens, "train")
        if self.training is None:
            return np.arange(len(train))
        sequences, indices = self.training.sequences(train, self.model.config.max_position_embeddings)
        return sequences.documents_opened(indices, OPENING_TOKENS)
