"""Copies, held-out documents and other languages are left out of the corpus, and the report says why."""

import json
import re
from pathlib import Path

import pytest
from corpus_builds import WORDS, build, read, words
from paths import SAMPLE
from row_files import write_lines, write_rows

from healthslm.corpus.pubmed import read_records
from healthslm.corpus.records import record_document
from healthslm.documents import split_of


def sample_abstract(sample: Path, number: int) -> str:
    return read(sample / "corpus")[f"pmid:{99_000_000 + number}"]["text"]


def test_of_copies_in_several_sources_pubmeds_is_kept(sample, tmp_path):
    text = sample_abstract(sample, 2)
    copies = [
        {"id": "99000001", "text": f"Another text for the same PMID. {words('same')}", "kind": "abstract"},
        {"id": "", "text": text.upper().replace(" ", "  "), "kind": "abstract"},
        {"id": "x:1", "text": f"New. {WORDS}", "kind": "abstract"},
        {"id": "x:2", "text": f"new {WORDS}", "kind": "abstract"},
    ]
    source = write_rows(tmp_path / "copies.parquet", copies)
    train_alone = {"validation_fraction": 0.0, "test_fraction": 0.0}
    documents, report = build(tmp_path / "corpus", pubmed=SAMPLE, sources=[str(source)], **train_alone)
    assert report["files"][-1]["dropped"] == {"duplicate_id": 1, "duplicate_text": 2}
    assert set(documents) == set(read(sample / "corpus")) | {"x:1"}
    assert documents["pmid:99000002"]["text"] == text


def test_a_retracted_article_is_dropped_with_its_copies(tmp_path):
    (retracted,) = (record for record in read_records(SAMPLE / "pubmedsample26n0001.xml") if record["pmid"] == 99000015)
    copies = [
        {"id": "99000015", "text": f"By its PMID. {WORDS}", "kind": "abstract"},
        {"id": "", "text": record_document(retracted).text, "kind": "abstract"},
    ]
    source = write_rows(tmp_path / "copies.parquet", copies)
    _, report = build(tmp_path / "corpus", pubmed=SAMPLE, sources=[str(source)])
    assert report["files"][-1] | {"sha256": None} == {
        "name": "copies",
        "sha256": None,
        "read": 2,
        "kept": 0,
        "dropped": {"duplicate_id": 1, "duplicate_text": 1},
    }


def test_held_out_documents_are_dropped_by_id_and_by_text(sample, tmp_path):
    ids = [{"id": "99000001", "text": "a"}, {"id": "pmid:99000004", "text": ""}]
    by_id = write_rows(tmp_path / "ids.parquet", ids)
    by_text = write_lines(tmp_path / "texts.jsonl", [{"id": "", "text": sample_abstract(sample, 3).lower()}])
    question = {"pmid": "99000005", "QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "final_decision": "yes"}
    pubmedqa = write_lines(tmp_path / "pubmedqa.jsonl", [question])
    documents, report = build(tmp_path / "corpus", pubmed=SAMPLE, held_out=[by_id, by_text, pubmedqa])
    assert set(read(sample / "corpus")) - set(documents) == {f"pmid:9900000{number}" for number in (1, 3, 4, 5)}
    assert report["dropped"]["held_out"] == 4
    assert [file["name"] for file in report["held_out"]] == ["ids", "texts", "pubmedqa"]


def test_real_questions_are_held_out_by_their_pmid(test_data, tmp_path):
    held_out = test_data / "pubmedqa" / "test.jsonl"
    pmids = [json.loads(line)["pmid"] for line in held_out.open()]
    rows = [{"id": pmid, "text": words(f"p{pmid}n"), "kind": "abstract"} for pmid in (*pmids[:3], "1")]
    source = write_rows(tmp_path / "texts.parquet", rows)
    options = {"validation_fraction": 0.0, "test_fraction": 0.0, "held_out": [held_out]}
    documents, report = build(tmp_path / "corpus", sources=[str(source)], **options)
    assert (set(documents), report["dropped"]) == ({"pmid:1"}, {"held_out": 3})


def edited(text: str, positions: list[int]) -> str:
    """The text with the words at these positions replaced."""
    replaced = text.split()
    for position in positions:
        replaced[position] = f"changed{position}"
    return " ".join(replaced)


def id_in(split: str, prefix: str = "y") -> str:
    return next(f"{prefix}:{n}" for n in range(10**4) if split_of(f"{prefix}:{n}", 0.1, 0.1) == split)


def test_a_text_with_a_few_words_changed_is_a_copy(sample, tmp_path):
    text = sample_abstract(sample, 29)  # so long that two other words leave more than nine tenths of its 5-grams
    rows = [{"id": "y:1", "text": edited(text, [40, 41])}, {"id": "y:2", "text": edited(text, list(range(0, 200, 3)))}]
    source = write_rows(tmp_path / "copies.parquet", rows)
    train_alone = {"validation_fraction": 0.0, "test_fraction": 0.0}
    documents, report = build(tmp_path / "corpus", pubmed=SAMPLE, sources=[str(source)], **train_alone)
    assert report["files"][-1]["dropped"] == {"near_duplicate": 1}
    assert "y:2" in documents and "y:1" not in documents and "pmid:99000029" in documents


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_copy_of_a_validation_or_test_document_is_dropped_from_training(sample, tmp_path, split):
    """Even if it is of an earlier source, so that new PubMed files cannot add copies of test documents to training."""
    text = edited(sample_abstract(sample, 29), [40])
    assert read(sample / "corpus")["pmid:99000029"]["split"] == "train"
    source = write_rows(tmp_path / "texts.parquet", [{"id": id_in(split), "text": text}])
    others = [{"id": id_in(name, "z"), "text": words(name)} for name in ("train", "validation")]
    other = write_rows(tmp_path / "other.parquet", others)
    alone, _ = build(tmp_path / "alone" / "corpus", sources=[str(source), str(other)])
    documents, report = build(tmp_path / "corpus", pubmed=SAMPLE, sources=[str(source)])
    assert alone[id_in(split)]["split"] == documents[id_in(split)]["split"] == split
    assert "pmid:99000029" not in documents
    assert report["files"][0]["dropped"]["near_duplicate"] == 1


def test_documents_that_share_text_with_a_held_out_one_are_dropped(sample, tmp_path):
    phrases = [
        re.findall(r"\w+", sample_abstract(sample, number))[5 : 5 + length] for number, length in ((2, 13), (3, 12))
    ]
    rows = [{"id": "e:1", "text": edited(sample_abstract(sample, 29), [40])}]
    rows += [{"id": f"e:{phrase}", "text": f"{words('a')} {' '.join(phrase)}"} for phrase in phrases]
    held_out = write_rows(tmp_path / "questions.parquet", rows)
    documents, report = build(tmp_path / "corpus", pubmed=SAMPLE, held_out=[held_out])
    assert set(read(sample / "corpus")) - set(documents) == {"pmid:99000029", "pmid:99000002"}  # but not 99000003
    assert (report["dropped"]["held_out"], report["dropped"]["held_out_overlap"]) == (1, 1)
    assert report["selection"]["overlap_words"] == 13


def test_a_phrase_in_many_documents_is_not_an_overlap(tmp_path):
    phrase = "written informed consent was obtained from all of the patients before they entered this study"
    rows = [{"id": f"d:{n}", "text": f"{words(f'd{n}n')} {phrase}"} for n in range(11)]
    held_out = write_rows(tmp_path / "held.parquet", [{"id": "h:1", "text": f"{words('h')} {phrase}"}])
    for count, dropped in ((10, {"held_out_overlap": 10}), (11, {})):
        source = write_rows(tmp_path / str(count) / "texts.parquet", rows[:count] + [{"id": "z:1", "text": words("z")}])
        options = {"validation_fraction": 0.0, "test_fraction": 0.0, "held_out": [held_out]}
        _, report = build(tmp_path / str(count) / "corpus", sources=[str(source)], **options)
        assert (report["dropped"], report["selection"]["common_ngram"]) == (dropped, 10)


def test_texts_in_another_language_are_dropped_by_default(tmp_path):
    german = (
        "Die Patienten wurden über einen Zeitraum von zwölf Monaten beobachtet, wobei die Häufigkeit der Anfälle unter "
        "der Behandlung deutlich zurückging und keine schweren Nebenwirkungen auftraten. Die Ergebnisse zeigen, dass "
        "die frühzeitige Behandlung der Erkrankung für die meisten Betroffenen von Vorteil ist."
    )
    source = write_rows(tmp_path / "texts.parquet", [{"id": "g:1", "text": german}, {"id": "w:1", "text": WORDS}])
    options = {"sources": [str(source)], "validation_fraction": 0.0, "test_fraction": 0.0}
    _, report = build(tmp_path / "english" / "corpus", **options)
    assert report["dropped"] == {"not_english": 1}
    documents, _ = build(tmp_path / "any" / "corpus", any_language=True, **options)
    assert set(documents) == {"g:1", "w:1"}
