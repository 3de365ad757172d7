"""What identifies a document: its id, the hash of its text, and the split that follows from its id."""

import pytest

from healthslm.documents import SPLITS, document_id, split_of, text_hash


def test_splits_have_their_share_of_the_documents():
    splits = [split_of(f"pmid:{number}", 0.1, 0.3) for number in range(20_000)]
    for split, share in zip(SPLITS, (0.6, 0.1, 0.3), strict=True):
        deviation = (20_000 * share * (1 - share)) ** 0.5
        assert abs(splits.count(split) - 20_000 * share) < 4 * deviation
    assert {split_of("pmid:1", 0, 0), split_of("a", 0, 0)} == {"train"}


@pytest.mark.parametrize(
    ("given", "kind", "identifier"),
    [
        ("123", "abstract", "pmid:123"),
        ("00123", "abstract", "pmid:123"),
        ("123", "fulltext", "here:123"),
        ("PMC55", "abstract", "pmc:PMC55"),
        ("PMC55", "fulltext", "pmc:PMC55"),
        ("doi:10.1/x", "fulltext", "doi:10.1/x"),
        ("row-7", "abstract", "here:row-7"),
    ],
)
def test_ids_mean_the_same_in_every_source(given, kind, identifier):
    assert document_id(given, kind, source="here") == identifier


def test_copies_in_another_format_have_the_same_hash():
    text = "Heat – of 10 µg/mL “cold”… was ﬁne (p<0.05)."
    assert text_hash(text) == text_hash("HEAT - OF 10 μg/ml\n'cold' was fine; p < 0.05")
    assert text_hash(text) != text_hash(text.replace("10", "11"))
    assert text_hash("热") != text_hash("冷")
