"""Packed sequences: their content and their order."""

import numpy as np
import pytest

from healthslm.errors import UserError
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.packing import PackedSequences, prefetch


@pytest.fixture(scope="module")
def train(sample_folders) -> TokenizedSplit:
    return TokenizedSplit(sample_folders.tokens, "train")


def epoch_of(sequences: PackedSequences, epoch: int = 0) -> dict[str, np.ndarray]:
    return sequences.batch(range(epoch * sequences.sequences_per_epoch, (epoch + 1) * sequences.sequences_per_epoch))


def documents_in(tokens: np.ndarray, separator: int) -> list[tuple[int, ...]]:
    return [tuple(document) for document in np.split(tokens, np.flatnonzero(tokens == separator)) if len(document)]


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_document_once_in_another_order(train, epoch):
    sequences = PackedSequences(train, context=64, seed=0)
    *whole, cut = documents_in(epoch_of(sequences, epoch)["input_ids"].ravel(), train.separator_id)
    of_split = [tuple(train.document(number)) for number in range(len(train))]
    numbers = [of_split.index(document) for document in whole]
    assert len(set(numbers)) == len(numbers) and numbers != sorted(numbers)
    left = [
        document for number, document in enumerate(of_split) if number not in numbers
    ]  # of the last, less than a sequence
    assert any(document[: len(cut)] == cut for document in left)
    assert 0 < sum(map(len, left)) - len(cut) <= 64


def test_labels_are_the_next_tokens_also_across_sequences(train):
    batch = epoch_of(PackedSequences(train, context=64, seed=0))
    inputs, labels = batch["input_ids"].ravel(), batch["labels"].ravel()
    assert (labels[:-1] == inputs[1:]).all()


def test_neighbors_in_the_corpus_are_not_neighbors_in_a_sequence(train):
    """A random order keeps two pairs of neighbors on average, for any number of documents."""
    sequences = PackedSequences(train, context=64, seed=0)
    order = [
        number for numbers in sequences.locate(range(sequences.sequences_per_epoch))["documents"] for number in numbers
    ]
    assert len(set(order)) == len(train) > 30
    assert (np.abs(np.diff(order)) == 1).sum() < 10


def test_positions_count_from_each_separator(train):
    batch = PackedSequences(train, context=64, seed=0).batch(range(40))
    for inputs, indices in zip(batch["input_ids"], batch["position_ids"], strict=True):
        expected, index = [], -1
        for token in inputs:
            index = 0 if token == train.separator_id else index + 1
            expected.append(index)
        assert indices.tolist() == expected


def test_the_seed_and_the_index_determine_a_sequence(train):
    one = PackedSequences(train, context=64, seed=3)
    far = range(5 * one.sequences_per_epoch - 2, 5 * one.sequences_per_epoch + 2)
    late = one.batch(far)["input_ids"]
    one.batch(range(7))
    assert (PackedSequences(train, context=64, seed=3).batch(far)["input_ids"] == late).all()
    assert (PackedSequences(train, context=64, seed=4).batch(far)["input_ids"] != late).any()


def test_epochs_have_different_orders(train):
    sequences = PackedSequences(train, context=64, seed=0)
    first, second = epoch_of(sequences, 0), epoch_of(sequences, 1)
    assert (first["input_ids"] != second["input_ids"]).any()


def test_locating_sequences_names_their_documents(train):
    sequences = PackedSequences(train, context=64, seed=0)
    indices = range(sequences.sequences_per_epoch - 20, sequences.sequences_per_epoch + 20)  # two epochs
    place = sequences.locate(indices)
    assert place["sequences"] == [indices.start, indices.stop]
    batch = sequences.batch(indices)
    for numbers, inputs, labels in zip(place["documents"], batch["input_ids"], batch["labels"], strict=True):
        sequence = [*inputs, labels[-1]]
        joined = [token for number in numbers for token in train.document(number)]
        assert any(joined[skipped : skipped + 65] == sequence for skipped in range(len(train.document(numbers[0]))))
        assert len(numbers) - 1 == sequence[1:].count(train.separator_id)


def test_documents_opened_have_their_first_tokens_in_one_sequence(train):
    sequences = PackedSequences(train, context=64, seed=0)
    indices = range(sequences.sequences_per_epoch - 15, sequences.sequences_per_epoch + 15)
    batch = sequences.batch(indices)
    held = {
        document
        for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        for document in documents_in(np.r_[inputs, labels[-1]], train.separator_id)
        if document[0] == train.separator_id
    }
    expected = [
        number
        for number in range(len(train))
        if any(document[:20] == tuple(train.document(number)[:20]) and len(document) >= 20 for document in held)
    ]
    assert 0 < len(expected) < len(train)
    assert sequences.documents_opened(indices, tokens=20).tolist() == expected


def test_less_than_a_sequence_is_refused(train):
    with pytest.raises(UserError, match="less than one sequence"):
        PackedSequences(train, context=train.num_tokens, seed=0)


def test_prefetched_results_are_in_order_and_errors_are_raised():
    assert list(prefetch(lambda number: number**2, range(5))) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda number: 1 / number, [1, 0, 2]))
