"""Memorization: a model that has memorized its training text, and matches counted by hand."""

import math

import numpy as np
import pytest
import torch
from tiny_models import byte_model, random_ids

from healthslm.evaluation.memorization import choose_openings, continue_greedily, measure_bits, measure_matches
from healthslm.statistics import mean, share

SEPARATOR = 0


def documents(count: int, seed: int) -> np.ndarray:
    return np.concatenate([np.full((count, 1), SEPARATOR), random_ids(count, 100, seed=seed).numpy()], axis=1)


def test_a_model_that_has_memorized_its_text_repeats_it_and_needs_fewer_bits():
    training, held_out = documents(4, seed=1), documents(4, seed=2)
    model = byte_model(max_position_embeddings=128).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = torch.from_numpy(training)
    for _ in range(150):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    of_training, of_held_out = (
        measure_matches(continue_greedily(model, openings, SEPARATOR, batch_size=3), openings)
        for openings in (training, held_out)
    )
    assert of_training["exact"]["share"] == 1 and of_training["leading_tokens"]["mean"] == 50
    assert of_training["matching_by_position"] == [1.0] * 50
    assert of_held_out["exact"]["share"] == 0 and of_held_out["matching_tokens"]["mean"] < 0.2
    bits = [
        measure_bits(model, found.__getitem__, np.full(4, 100), np.arange(4), count=4)["bits_per_byte"]
        for found in (training, held_out)
    ]
    assert bits[0] < 0.5 < 5 < bits[1]


def test_bits_per_byte_are_those_of_documents_chosen_by_the_seed():
    model, texts = byte_model(max_position_embeddings=128), list(documents(30, seed=5))
    sizes = np.arange(100, 130)
    with torch.no_grad():
        logits = model(torch.tensor(np.array(texts))).logits[:, :-1].double().log_softmax(-1)
    nats = -logits.gather(-1, torch.tensor(np.array(texts))[:, 1:, None]).sum(dim=(1, 2)).numpy()
    found = measure_bits(model, texts.__getitem__, sizes, np.arange(30), count=40)
    assert (found["documents"], found["chosen_from"], found["bytes"]) == (30, 30, sizes.sum())
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / sizes.sum(), rel=1e-5)
    ratios = nats / math.log(2) / sizes
    assert ratios.min() < found["interval"][0] < found["bits_per_byte"] < found["interval"][1] < ratios.max()
    some = [measure_bits(model, texts.__getitem__, sizes, np.arange(30), count=20, seed=seed) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert some[0]["documents"] == 20 and some[0]["chosen_from"] == 30


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_continuations_are_greedy_for_any_batch_size(batch_size):
    model = byte_model(max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight[SEPARATOR] *= 1.5  # so that a document ends early
    openings = documents(5, seed=3)
    expected = np.full((5, 50), SEPARATOR)
    for row, opening in enumerate(openings):
        ids = opening[:51].tolist()
        for place in range(50):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] == SEPARATOR:
                break
            expected[row, place] = ids[-1]
    np.testing.assert_array_equal(continue_greedily(model, openings, SEPARATOR, batch_size), expected)


def test_matches_are_counted_token_by_token():
    openings = documents(4, seed=4)
    written = openings[:, 51:].copy()
    written[1, 10:] = SEPARATOR  # the first ten tokens match
    written[2, 0] = SEPARATOR  # all tokens but the first match
    written[3, [20, 49]] = SEPARATOR
    result = measure_matches(written, openings)
    assert result["documents"] == 4
    assert result["exact"] == share(1, 4)
    assert result["leading_tokens"] == mean(np.array([50, 10, 0, 20]))
    assert result["matching_tokens"] == mean(np.array([1, 10 / 50, 49 / 50, 48 / 50]))
    by_position = result["matching_by_position"]
    assert len(by_position) == 50
    assert [by_position[place] for place in (0, 1, 10, 20, 49)] == [3 / 4, 1, 3 / 4, 2 / 4, 2 / 4]


def test_openings_come_from_documents_that_are_long_enough():
    long_enough = [1, 3, 4, 7]
    texts = [np.full(101 + number if number in long_enough else 100, number, dtype=np.uint16) for number in range(8)]
    openings = choose_openings(texts.__getitem__, range(len(texts)), count=10)
    assert openings.shape == (4, 101) and openings.dtype == np.int64
    assert sorted(openings[:, 0]) == long_enough and (openings == openings[:, :1]).all()


def test_openings_are_chosen_by_the_seed():
    texts = [np.full(101, number) for number in range(200)]
    chosen = [choose_openings(texts.__getitem__, range(200), count=20, seed=seed)[:, 0].tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 20
