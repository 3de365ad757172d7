"""The dataset of sentence roles: what it holds of the sample's structured abstracts."""

import json

import pyarrow.parquet as pq
import pytest

from healthslm.classification.labeled_data import read_examples
from healthslm.classification.options import ClassifierOptions, SentenceRolesOptions
from healthslm.classification.sentence_roles import ROLES, build_sentence_roles, label_sentences
from healthslm.corpus.reader import split_files
from healthslm.documents import SPLITS
from healthslm.errors import UserError

TEXT = "BACKGROUND: Is it 0.5 mg? It is. METHODS: We asked E. coli (n=3). They said no."


@pytest.fixture(scope="module")
def rows(sample_folders, tmp_path_factory) -> dict[str, list[dict]]:
    output = tmp_path_factory.mktemp("roles") / "roles"
    options = SentenceRolesOptions(
        corpus=sample_folders.corpus, output=output, validation_fraction=0.3, test_fraction=0.3
    )
    build_sentence_roles(options)
    for split in SPLITS:
        path = output / f"{split}.jsonl"
        assert read_examples([path], ClassifierOptions(train=[path], output=output, task="sentences"))
    return {split: [json.loads(line) for line in (output / f"{split}.jsonl").open()] for split in SPLITS}


def test_every_sentence_is_part_of_a_section_of_its_category(rows, sample_folders):
    files = [path for split in SPLITS for path in split_files(sample_folders.corpus, split)]
    documents = {row["id"]: row for path in files for row in pq.read_table(path).to_pylist()}
    found = [row for split in rows.values() for row in split]
    assert len(found) > 5 and len({row["id"] for row in found}) == len(found)
    for row in found:
        document = documents[row["id"]]
        sections = [
            (part["category"], " ".join(document["text"][part["start"] : part["end"]].split()))
            for part in document["sections"]
        ]
        assert {category for category, _ in sections} <= set(ROLES)
        for category in ROLES:
            told = [text for text, label in zip(row["sentences"], row["labels"], strict=True) if label == category]
            expected = [text for name, text in sections if name == category]
            assert " ".join(" ".join(told).split()) == " ".join(expected)


def test_section_labels_are_not_part_of_the_sentences():
    sections = [("BACKGROUND", 12, 32), ("METHODS", 42, len(TEXT))]
    document = {"text": TEXT, "sections": [{"category": c, "start": s, "end": e} for c, s, e in sections]}
    assert label_sentences(document) == {
        "sentences": ["Is it 0.5 mg?", "It is.", "We asked E. coli (n=3).", "They said no."],
        "labels": ["BACKGROUND", "BACKGROUND", "METHODS", "METHODS"],
    }


def test_a_corpus_without_sections_is_an_error(tmp_path):
    (tmp_path / "corpus/train").mkdir(parents=True)
    with pytest.raises(UserError, match="corpus: no abstracts with sections"):
        build_sentence_roles(SentenceRolesOptions(corpus=tmp_path / "corpus", output=tmp_path / "roles"))
