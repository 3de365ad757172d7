"""Bits per byte of held-out documents: definitions, what they don't depend on, and xz as a baseline."""

import json
import lzma
import math
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pipeline_folders import TINY_MODEL
from tiny_models import byte_model, byte_tokenizer
from transformers import AutoTokenizer

from healthslm.bits_per_byte import token_bits
from healthslm.errors import UserError
from healthslm.evaluation.held_out import (
    FEWEST_DOCUMENTS,
    SECTIONS,
    measure_held_out,
    measure_model,
    section_costs,
    token_ends,
    untrained_model,
    xz_bits_per_byte,
)
from healthslm.models import make_model
from healthslm.training.checkpoint import save_model

# Characters of one to four bytes, in both halves of the document.
STRUCTURED = {
    "id": "pmid:1",
    "title": "Naïve β-cells 😀",
    "text": "BACKGROUND: Größe ≥5 µm. RESULTS: 10^5 cells (p≤0.05). Then 中文. It ends.",
    "year": 1999,
    "sections": [
        {"label": "BACKGROUND", "category": "BACKGROUND", "start": 12, "end": 24},
        {"label": "RESULTS", "category": "RESULTS", "start": 34, "end": 63},
        {"label": "", "category": "UNASSIGNED", "start": 64, "end": 72},
    ],
}
PIECES = [
    ("title", "Naïve β-cells 😀\n"),
    ("labels", "BACKGROUND: "),
    ("BACKGROUND", "Größe ≥5 µm."),
    ("labels", " RESULTS: "),
    ("RESULTS", "10^5 cells (p≤0.05). Then 中文."),
    ("labels", " "),
    ("UNASSIGNED", "It ends."),
]
FEW = {"resamples": 200}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model(TINY_MODEL | {"initializer_range": 0.3}).eval()


@pytest.fixture(scope="module")
def tokenizer(sample_folders):
    return AutoTokenizer.from_pretrained(sample_folders.tokenizer)


@pytest.fixture(scope="module")
def documents(sample_folders) -> list[dict]:
    """All documents of the sample's corpus."""
    return [
        row for path in sorted(sample_folders.corpus.glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


@pytest.fixture(scope="module")
def measured(model, tokenizer, documents) -> dict:
    return measure_held_out(model, tokenizer, documents, **FEW)


def numbers(result: dict, prefix: str = "") -> dict[str, float]:
    """All numbers of a result by dotted names, to compare them within a tolerance."""
    flat = {}
    for name, value in result.items():
        if isinstance(value, dict):
            flat |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat |= {f"{prefix}{name}.{place}": number for place, number in enumerate(value)}
        elif value is not None:
            flat[prefix + name] = value
    return flat


def of_decade(documents: list[dict], decade: int) -> list[dict]:
    return [document for document in documents if (document["year"] or 0) // 10 == decade]


def test_bits_per_byte_of_one_document_follow_from_the_logits():
    model, tokenizer = byte_model(max_position_embeddings=512), byte_tokenizer()
    text = f"{STRUCTURED['title']}\n{STRUCTURED['text']}"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(ids).logits[0].double(), -1)
    nats = -sum(log_probabilities[place, token].item() for place, token in enumerate(ids[0, 1:].tolist()))

    result = measure_held_out(model, tokenizer, [STRUCTURED], **FEW)
    assert result["bytes"] == len(text.encode()) == result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)
    assert result["nats_per_token"] == pytest.approx(nats / len(text.encode()), rel=1e-6)
    assert (result["documents"], result["restored_documents"]) == (1, 1)
    assert result["context"] == 512
    assert result["parameters"] == sum({id(part): part.numel() for part in model.parameters()}.values())


def test_the_bits_of_a_section_are_those_of_its_bytes_if_tokens_are_bytes():
    model, tokenizer = byte_model(max_position_embeddings=512), byte_tokenizer()
    text = "".join(piece for _, piece in PIECES)
    assert text == f"{STRUCTURED['title']}\n{STRUCTURED['text']}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    (bits,) = token_bits(model, [np.array([tokenizer.eos_token_id, *ids])])

    place, expected = 0, {}
    for name, piece in PIECES:
        end = place + len(piece.encode())
        so_far = expected.get(name, (0.0, 0))
        expected[name] = (so_far[0] + bits[place:end].sum(), so_far[1] + end - place)
        place = end
    found = measure_held_out(model, tokenizer, [STRUCTURED], **FEW)["by_section"]
    assert list(found) == [name for name in SECTIONS if name in expected]
    for name, (section_bits, size) in expected.items():
        assert found[name]["bytes"] == size
        assert found[name]["bits_per_byte"] == pytest.approx(section_bits / size, rel=1e-6)


def test_the_bits_of_a_token_in_two_sections_are_divided_by_its_bytes():
    document = {
        "title": "",
        "text": "A: bcd",
        "sections": [{"label": "A", "category": "METHODS", "start": 3, "end": 6}],
    }
    costs = section_costs(document, ends=np.array([2, 6]), bits=np.array([3.0, 8.0]))  # "A:" and " bcd"
    assert [(name, *cost) for name, cost in costs] == [("labels", 5.0, 3.0), ("METHODS", 6.0, 3.0)]


def test_the_bits_of_the_sections_add_up_to_those_of_the_documents(model, tokenizer, documents, measured):
    assert all(document["sections"] for document in documents)
    sections = measured["by_section"].values()
    assert len(sections) > 4
    assert sum(section["bytes"] for section in sections) == measured["bytes"]
    bits = sum(section["bits_per_byte"] * section["bytes"] for section in sections)
    assert bits == pytest.approx(measured["bits_per_byte"] * measured["bytes"], rel=1e-9)


def test_some_tokens_of_the_sample_are_in_two_sections(tokenizer, documents):
    """Otherwise, tests on the sample would not cover such tokens."""
    crossing = 0
    for document in documents:
        text = f"{document['title']}\n{document['text']}"
        ends = token_ends(tokenizer, tokenizer.encode(text, add_special_tokens=False), text)
        starts = [len(text) - len(document["text"]) + section["start"] for section in document["sections"]]
        crossing += sum(len(text[:start].encode()) not in ends for start in starts)
    assert crossing > 0


@pytest.mark.parametrize("name", ["sample", "gpt2"])
def test_token_ends_are_the_lengths_of_the_decoded_text(name, sample_folders, request):
    folder = sample_folders.tokenizer if name == "sample" else request.getfixturevalue("test_data") / "tokenizers/gpt2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(piece for _, piece in PIECES) + " é\u0301 <|endoftext|> \u200b𝛼  x"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ends = token_ends(tokenizer, ids, text)
    assert len(ends) == len(ids) and ends[-1] == len(text.encode())
    inside = 0
    for count, end in enumerate(ends, start=1):
        decoded = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        whole = decoded.rstrip("\N{REPLACEMENT CHARACTER}")
        assert text.startswith(whole)
        if whole == decoded:
            assert end == len(whole.encode())
        else:  # the token ends inside the next character
            inside += 1
            size = len(text[len(whole)].encode())
            assert len(whole.encode()) < end < len(whole.encode()) + size
    assert inside > 0


def test_tokens_that_do_not_spell_out_the_text_have_no_ends():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("asthma", add_special_tokens=False)
    assert token_ends(tokenizer, ids, "Asthma") is None
    assert list(token_ends(tokenizer, ids, "asthma")) == [1, 2, 3, 4, 5, 6]


def test_a_decade_has_the_result_of_its_documents_alone(model, tokenizer, documents, measured):
    decades = {document["year"] // 10 for document in documents if document["year"]}
    assert list(measured["by_decade"]) == [f"{decade}0s" for decade in sorted(decades)]
    assert len(decades) > 1
    for decade in decades:
        alone = measure_held_out(model, tokenizer, of_decade(documents, decade), **FEW)
        found = measured["by_decade"][f"{decade}0s"]
        assert numbers(found) == pytest.approx({name: numbers(alone)[name] for name in numbers(found)}, rel=1e-6)


def test_documents_without_year_or_sections_count_in_the_total_only(model, tokenizer, documents):
    bare = [{"title": document["title"], "text": document["text"]} for document in documents]
    some = measure_held_out(model, tokenizer, [*documents[:3], *bare[3:6]], **FEW)
    assert some["documents"] == 6
    assert sum(decade["documents"] for decade in some["by_decade"].values()) == 3
    assert some["by_section"]["title"]["documents"] == 3
    none = measure_held_out(model, tokenizer, bare[:6], **FEW)
    assert none["by_decade"] == none["by_section"] == {}
    assert none["bits_per_byte"] == pytest.approx(some["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_order_batch_size_and_padding_do_not_change_the_result(model, tokenizer, documents, measured, batch_tokens):
    shuffled = random.Random(batch_tokens).sample(documents, len(documents))
    again = measure_held_out(model, tokenizer, shuffled, batch_tokens=batch_tokens, **FEW)
    assert measured["interval"] is not None
    assert numbers(again) == pytest.approx(numbers(measured), rel=1e-5)


def test_the_chunks_of_a_document_count_as_one_document(model, tokenizer, documents):
    whole = documents[0]
    middle = whole["text"].index(" ", len(whole["text"]) // 2)
    parts = [whole | {"text": text, "sections": []} for text in (whole["text"][:middle], whole["text"][middle + 1 :])]
    result = measure_held_out(model, tokenizer, parts, **FEW)
    assert result["documents"] == result["by_decade"][f"{whole['year'] // 10}0s"]["documents"] == 1
    assert result["bytes"] == sum(len(f"{part['title']}\n{part['text']}".encode()) for part in parts)


def test_the_result_is_json_and_small_groups_have_no_interval(measured):
    assert json.loads(json.dumps(measured)) == measured
    groups = [measured, *measured["by_decade"].values(), *measured["by_section"].values()]
    assert {group["documents"] >= FEWEST_DOCUMENTS for group in groups} == {True, False}
    for group in groups:
        if group["documents"] < FEWEST_DOCUMENTS:
            assert group["interval"] is None
        else:
            low, high = group["interval"]
            assert low < group["bits_per_byte"] < high


def test_no_documents_is_an_error(model, tokenizer):
    with pytest.raises(UserError, match="no held-out documents to evaluate on"):
        measure_held_out(model, tokenizer, [])


def test_a_model_is_measured_with_its_own_tokenizer(model, tokenizer, documents, measured, sample_folders, tmp_path):
    save_model(tmp_path / "model", model, sample_folders.tokenizer)
    found = measure_model(str(tmp_path / "model"), documents, **FEW)
    assert numbers(found) == pytest.approx(numbers(measured), rel=1e-5)


def test_a_model_that_cannot_be_opened_is_reported_without_an_error(documents):
    found = measure_model("nobody/no-such-model", documents)
    assert list(found) == ["not_measured"]
    assert "nobody/no-such-model" in found["not_measured"]


def test_the_untrained_model_has_new_weights_and_uniform_predictions(tokenizer, documents, measured):
    torch.manual_seed(0)
    fresh = make_model(TINY_MODEL)
    trained = make_model(TINY_MODEL)
    state = torch.random.get_rng_state()
    untrained = untrained_model(trained)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weights in untrained.state_dict().items():
        assert torch.equal(weights, fresh.state_dict()[name]), name
    assert not torch.equal(untrained.get_input_embeddings().weight, trained.get_input_embeddings().weight)
    result = measure_held_out(untrained, tokenizer, documents, **FEW)
    assert result["nats_per_token"] == pytest.approx(math.log(len(tokenizer)), rel=0.02)
    assert result["bits_per_byte"] * result["bytes"] / result["tokens"] == pytest.approx(
        math.log2(len(tokenizer)), rel=0.02
    )
    assert [result[name] for name in ("tokens", "bytes")] == [measured[name] for name in ("tokens", "bytes")]


def random_digits(count: int, seed: int) -> str:
    """Random hexadecimal digits: four bits each, and not predictable."""
    return random.Random(seed).randbytes(count // 2).hex()


def test_xz_cannot_beat_the_entropy_of_random_digits():
    result = xz_bits_per_byte([random_digits(4_000, seed) for seed in range(5)])
    assert 4 < result["alone"] < 4.4
    assert 4 < result["together"] < 4.4


def test_xz_finds_copies_in_other_documents_only_in_one_stream():
    copies = xz_bits_per_byte([random_digits(4_000, 0)] * 4)
    assert 4 < copies["alone"] < 4.4
    assert copies["together"] == pytest.approx(copies["alone"] / 4, rel=0.05)


def test_xz_equals_the_size_of_a_file_without_its_headers(documents):
    """In the xz format: stream header 12 bytes, block header 12, padding up to 3, check 4, index 8 to 12, footer 12."""
    texts = [document["text"] for document in documents[:10]]
    sizes = [len(text.encode()) for text in texts]
    files = [
        len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_CRC32)) for text in texts
    ]
    alone = xz_bits_per_byte(texts)["alone"] * sum(sizes) / 8
    assert 48 * len(texts) <= sum(files) - alone <= 56 * len(texts)
    one = "".join(texts)
    file = len(lzma.compress(one.encode(), preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_CRC32))
    assert 48 <= file - xz_bits_per_byte([one])["together"] * sum(sizes) / 8 <= 60
    assert xz_bits_per_byte(texts) == xz_bits_per_byte(texts[::-1])
