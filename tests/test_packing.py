"""Training rows: what they hold, and their order."""

import numpy as np
import pytest
import torch

from healthslm.errors import UserError
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.packing import PackedRows, document_bounds, prepared_ahead


@pytest.fixture(scope="module")
def train(sample_folders) -> TokenizedSplit:
    return TokenizedSplit(sample_folders.tokens, "train")


def stream(split: TokenizedSplit) -> np.ndarray:
    return np.concatenate([split.document(i) for i in range(len(split))])


def test_an_epoch_holds_every_token_of_the_stream_once(train):
    rows = PackedRows(train, context=64, seed=0)
    epoch = rows.batch(range(rows.rows_per_epoch))["input_ids"]
    starts = {tuple(row): start for start, row in enumerate(stream(train)[: epoch.size].reshape(-1, 64))}
    assert sorted(starts[tuple(row)] for row in epoch) == list(range(rows.rows_per_epoch))
    assert train.num_tokens - epoch.size <= 64


def test_labels_are_the_next_tokens_of_the_stream(train):
    rows = PackedRows(train, context=64, seed=0)
    batch = rows.batch(range(rows.rows_per_epoch))
    whole = stream(train)
    following = {tuple(whole[i * 64 : i * 64 + 64]): whole[i * 64 + 64] for i in range(rows.rows_per_epoch)}
    assert (batch["labels"][:, :-1] == batch["input_ids"][:, 1:]).all()
    for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert labels[-1] == following[tuple(inputs)]


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
    first, second = (rows.batch(range(e * rows.rows_per_epoch, (e + 1) * rows.rows_per_epoch)) for e in (0, 1))
    assert (first["input_ids"] != second["input_ids"]).any()


@pytest.mark.parametrize("at_document_starts", [False, True])
def test_the_documents_that_rows_open_are_those_of_which_one_row_holds_the_first_tokens(train, at_document_starts):
    rows = PackedRows(train, context=64, seed=0, at_document_starts=at_document_starts)
    starts = rows.place(range(30))["stream"]
    begins = np.cumsum([0, *(len(train.document(i)) for i in range(len(train)))])
    expected = [
        number
        for number in range(len(train))
        if any(start <= begins[number] and begins[number] + 20 <= start + 65 for start in starts)
    ]
    assert 0 < len(expected) < len(train)
    assert rows.documents_opened(range(30), tokens=20).tolist() == expected


def test_less_than_a_row_is_refused(train):
    with pytest.raises(UserError, match="less than one row"):
        PackedRows(train, context=train.num_tokens, seed=0)


def test_with_a_longest_stretch_positions_restart_within_documents(train):
    plain, cut = (PackedRows(train, context=12, seed=0).batch(range(3), longest) for longest in (None, 4))
    for name in ("input_ids", "labels"):
        assert np.array_equal(plain[name], cut[name])
    expected = [
        [0 if place % 4 == 0 or token == train.separator_id else None for place, token in enumerate(row)]
        for row in plain["input_ids"]
    ]
    for row in expected:
        for place, value in enumerate(row):
            row[place] = row[place - 1] + 1 if value is None else 0
    assert cut["position_ids"].tolist() == expected


def test_rows_at_document_starts_begin_with_a_separator_where_a_document_starts(train):
    plain, aligned = (PackedRows(train, 12, 0, at_document_starts=aligned) for aligned in (False, True))
    moved = 0
    for start, found in zip(plain.place(range(50))["stream"], aligned.place(range(50))["stream"], strict=True):
        later = [s for s in train.document_starts if start <= s < start + 12 and s + 12 < train.num_tokens]
        assert found == (later[0] if later else start)
        moved += found != start
    assert moved > 0


def test_results_prepared_ahead_come_in_order_and_errors_come_through():
    assert list(prepared_ahead(lambda number: number**2, range(5))) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        list(prepared_ahead(lambda number: 1 / number, [1, 0, 2]))


def test_bounds_of_documents_are_where_positions_are_zero():
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    assert document_bounds(positions).tolist() == [0, 3, 4, 5, 8]
