"""Training rows: what they hold, and their order."""

import numpy as np
import pytest

from healthslm.errors import UserError
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.packing import PackedRows, prepared_ahead


@pytest.fixture(scope="module")
def train(sample_folders) -> TokenizedSplit:
    return TokenizedSplit(sample_folders.tokens, "train")


def epoch_of(rows: PackedRows, epoch: int = 0) -> dict[str, np.ndarray]:
    return rows.batch(range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch))


def documents_in(tokens: np.ndarray, separator: int) -> list[tuple[int, ...]]:
    return [tuple(document) for document in np.split(tokens, np.flatnonzero(tokens == separator)) if len(document)]


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_holds_every_document_once_whole_and_in_another_order(train, epoch):
    rows = PackedRows(train, context=64, seed=0)
    *whole, cut = documents_in(epoch_of(rows, epoch)["input_ids"].ravel(), train.separator_id)
    of_split = [tuple(train.document(number)) for number in range(len(train))]
    numbers = [of_split.index(document) for document in whole]
    assert len(set(numbers)) == len(numbers) and numbers != sorted(numbers)
    left = [
        document for number, document in enumerate(of_split) if number not in numbers
    ]  # of the last, less than a row
    assert any(document[: len(cut)] == cut for document in left)
    assert 0 < sum(map(len, left)) - len(cut) <= 64


def test_labels_are_the_next_tokens_in_the_row_and_beyond_it(train):
    batch = epoch_of(PackedRows(train, context=64, seed=0))
    inputs, labels = batch["input_ids"].ravel(), batch["labels"].ravel()
    assert (labels[:-1] == inputs[1:]).all()


def test_neighbours_in_the_corpus_are_no_neighbours_in_the_rows(train):
    """In a random order, two pairs are expected to have been neighbours, however many documents there are."""
    rows = PackedRows(train, context=64, seed=0)
    order = [number for numbers in rows.place(range(rows.rows_per_epoch))["documents"] for number in numbers]
    assert len(set(order)) == len(train) > 30
    assert (np.abs(np.diff(order)) == 1).sum() < 10


def test_positions_count_from_each_separator(train):
    batch = PackedRows(train, context=64, seed=0).batch(range(40))
    for inputs, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        expected, position = [], -1
        for token in inputs:
            position = 0 if token == train.separator_id else position + 1
            expected.append(position)
        assert positions.tolist() == expected


def test_the_order_follows_from_seed_and_position_alone(train):
    one = PackedRows(train, context=64, seed=3)
    far = range(5 * one.rows_per_epoch - 2, 5 * one.rows_per_epoch + 2)
    late = one.batch(far)["input_ids"]
    one.batch(range(7))
    assert (PackedRows(train, context=64, seed=3).batch(far)["input_ids"] == late).all()
    assert (PackedRows(train, context=64, seed=4).batch(far)["input_ids"] != late).any()


def test_epochs_differ_in_their_order(train):
    rows = PackedRows(train, context=64, seed=0)
    first, second = epoch_of(rows, 0), epoch_of(rows, 1)
    assert (first["input_ids"] != second["input_ids"]).any()


def test_the_place_of_rows_names_the_documents_whose_tokens_they_hold(train):
    rows = PackedRows(train, context=64, seed=0)
    positions = range(rows.rows_per_epoch - 20, rows.rows_per_epoch + 20)  # two epochs
    place = rows.place(positions)
    assert place["positions"] == [positions.start, positions.stop]
    batch = rows.batch(positions)
    for numbers, inputs, labels in zip(place["documents"], batch["input_ids"], batch["labels"], strict=True):
        row = [*inputs, labels[-1]]
        joined = [token for number in numbers for token in train.document(number)]
        assert any(joined[skipped : skipped + 65] == row for skipped in range(len(train.document(numbers[0]))))
        assert len(numbers) - 1 == row[1:].count(train.separator_id)


def test_the_documents_that_rows_open_are_those_of_which_one_row_holds_the_first_tokens(train):
    rows = PackedRows(train, context=64, seed=0)
    positions = range(rows.rows_per_epoch - 15, rows.rows_per_epoch + 15)
    batch = rows.batch(positions)
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
    assert rows.documents_opened(positions, tokens=20).tolist() == expected


def test_less_than_a_row_is_refused(train):
    with pytest.raises(UserError, match="less than one row"):
        PackedRows(train, context=train.num_tokens, seed=0)


def test_results_prepared_ahead_come_in_order_and_errors_come_through():
    assert list(prepared_ahead(lambda number: number**2, range(5))) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        list(prepared_ahead(lambda number: 1 / number, [1, 0, 2]))
