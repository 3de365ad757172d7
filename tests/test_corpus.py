"""The corpus has each document once, in its current version and in one split, and its report accounts for all input."""

import hashlib
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_builds import WORDS, assert_report_adds_up, build, read, words
from folders import contents
from paths import SAMPLE
from rensa import RMinHash
from row_files import write_rows
from xxhash import xxh3_64_intdigest

from healthslm.corpus.pubmed import read_records
from healthslm.corpus.records import RECORD_SCHEMA
from healthslm.corpus.signatures import ngram_hashes
from healthslm.documents import DOCUMENT_SCHEMA, SPLITS

# The citations of the sample that are not in the corpus (PMID minus 99,000,000), and why.
NOT_KEPT = {
    9: "no_title",
    10: "no_title",
    12: "truncated",
    13: "truncated",
    14: "truncated",
    15: "retracted",
    16: "retracted",
    17: "retraction_notice",
    18: "retraction_notice",
    19: "no_abstract",
    20: "too_short",
    27: "duplicate_text",  # of 26
    47: "deleted",
}
KEPT = set(range(1, 63)) - set(NOT_KEPT) - {25}  # 25 is the second version of 24


def test_the_files_have_the_expected_columns(sample):
    for path in sample.glob("corpus/*/*.parquet"):
        assert pq.read_schema(path).equals(DOCUMENT_SCHEMA)
    for path in sample.glob("records/*.parquet"):
        assert pq.read_schema(path).equals(RECORD_SCHEMA)  # the metadata, with the fingerprint, is not compared


def test_the_corpus_of_the_sample_has_the_expected_citations(sample):
    assert set(read(sample / "corpus")) == {f"pmid:{99_000_000 + number}" for number in KEPT}


def test_the_report_counts_dropped_documents_by_reason(sample):
    report = json.loads((sample / "corpus" / "report.json").read_text())
    reasons = [*NOT_KEPT.values(), *["deletion"] * 3, *["superseded"] * 3]
    assert report["dropped"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert (report["read"], report["kept"]) == (67, len(KEPT))


def test_the_report_has_all_that_is_needed_to_compute_the_signatures(sample):
    selection = json.loads((sample / "corpus" / "report.json").read_text())["selection"]
    bands, rows = selection["bands"], selection["rows"]
    (path,) = (sample / "signatures").glob("*0001.parquet")
    document = read(sample / "corpus")["pmid:99000001"]
    shingles = ngram_hashes(document["text"], selection["shingle_words"]).view(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, [0, len(shingles)], bands * rows, selection["seed"]
    )
    values = np.array(matrix.to_rows()[0], dtype="<u4").reshape(bands, rows)
    expected = [xxh3_64_intdigest(band.tobytes()) for band in values]
    assert [number % 2**64 for number in pq.read_table(path)["bands"][0].as_py()] == expected


def test_the_report_adds_up_and_names_its_inputs(sample):
    report = assert_report_adds_up(sample / "corpus")
    for file in report["files"]:
        content = (SAMPLE / f"{file['name']}.xml").read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()


def test_record_files_have_every_record_of_the_xml(sample):
    for path in sorted(SAMPLE.glob("*.xml")):
        records = pq.read_table(sample / "records" / f"{path.stem}.parquet").to_pylist()
        assert records == list(read_records(path))


def test_the_newest_record_is_kept(sample):
    documents = read(sample / "corpus")
    assert "four faulty sensors were removed" in documents["pmid:99000030"]["text"]  # revised by an update
    assert documents["pmid:99000024"]["title"].endswith("second version.")
    assert "came back" in documents["pmid:99000046"]["text"]  # deleted by one update, back with the next


def test_sections_have_their_positions_in_the_text(sample):
    records = {
        f"pmid:{record['pmid']}": record
        for path in sorted(SAMPLE.glob("*.xml"))
        for record in read_records(path)
        if not record["deleted"]
    }
    for identifier, document in read(sample / "corpus").items():
        sections = records[identifier]["sections"]
        expected = [(section["label"], section["category"], section["text"]) for section in sections]
        text = document["text"]
        assert [
            (section["label"], section["category"], text[section["start"] : section["end"]])
            for section in document["sections"]
        ] == expected


def test_the_labels_that_pubmed_shows_are_in_the_text(sample):
    documents = read(sample / "corpus")
    assert re.findall(r"\b[A-Z]{7,}: ", documents["pmid:99000001"]["text"]) == [
        "BACKGROUND: ",
        "METHODS: ",
        "RESULTS: ",
        "CONCLUSIONS: ",
    ]
    assert documents["pmid:99000005"]["text"].startswith("We tested whether")  # its labels are empty
    assert documents["pmid:99000021"]["text"].startswith("Noise disturbs")  # its first label is UNASSIGNED


def test_one_process_and_two_write_the_same_bytes(sample, tmp_path):
    build(tmp_path / "corpus", pubmed=SAMPLE, workers=2)
    for folder in ("records", "signatures", "corpus"):
        assert contents(tmp_path / folder) == contents(sample / folder)


def test_documents_keep_their_split_when_data_is_added(sample, tmp_path):
    more = write_rows(tmp_path / "more.parquet", [{"id": f"m:{n}", "text": words(f"m{n}n")} for n in range(200)])
    documents, _ = build(tmp_path / "corpus", pubmed=SAMPLE, sources=[str(more)])
    for identifier, document in read(sample / "corpus").items():
        assert documents[identifier]["split"] == document["split"]


def test_dropped_documents_can_be_written_with_their_reason(sample, tmp_path):
    build(tmp_path / "corpus", pubmed=SAMPLE, write_dropped=True)
    rows = [row for path in (tmp_path / "corpus/dropped").iterdir() for row in pq.read_table(path).to_pylist()]
    expected = {(f"pmid:{99_000_000 + number}", reason) for number, reason in NOT_KEPT.items()}
    assert expected <= {(row["id"], row["reason"]) for row in rows}
    report = json.loads((tmp_path / "corpus/report.json").read_text())
    assert {reason: [row["reason"] for row in rows].count(reason) for reason in report["dropped"]} == report["dropped"]
    assert next(row["text"] for row in rows if row["id"] == "pmid:99000012").endswith(
        "ABSTRACT TRUNCATED AT 250 WORDS)"
    )
    assert contents(tmp_path / "corpus/train") == contents(sample / "corpus/train")


def test_a_text_longer_than_a_context_is_split_at_paragraphs_into_chunks_of_one_split(tmp_path):
    paragraphs = [f"{words(f'p{n}n')}." for n in range(20)]
    row = {"id": "f:1", "title": "A long one", "text": "\n".join(paragraphs), "kind": "fulltext"}
    source = write_rows(tmp_path / "texts.parquet", [row, {"id": "z:1", "text": WORDS}])
    options = {"validation_fraction": 0.0, "test_fraction": 0.0, "max_bytes": 1000}
    _, report = build(tmp_path / "corpus", sources=[str(source)], **options)
    rows = [row for row in pq.read_table(tmp_path / "corpus/train/texts.parquet").to_pylist() if row["id"] == "f:1"]
    assert [row["part"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > 3
    assert all(len(row["text"].encode()) <= 1000 and row["title"] == "A long one" for row in rows)
    assert "\n".join(row["text"] for row in rows) == row["text"]
    assert report["splits"]["train"] | {"kinds": {}, "bytes": 0} == {
        "documents": 2, "parts": len(rows) + 1, "kinds": {}, "bytes": 0,
    }  # fmt: skip


def test_sections_of_a_chunk_have_their_positions_in_the_chunk(sample, tmp_path):
    build(tmp_path / "corpus", pubmed=SAMPLE, max_bytes=500)
    whole = read(sample / "corpus")
    seen = 0
    for split in SPLITS:
        for path in (tmp_path / "corpus" / split).glob("*.parquet"):
            for row in pq.read_table(path).to_pylist():
                document = whole[row["id"]]
                for section in row["sections"]:
                    of_chunk = row["text"][section["start"] : section["end"]]
                    of_document = [
                        document["text"][whole_section["start"] : whole_section["end"]]
                        for whole_section in document["sections"]
                        if whole_section["label"] == section["label"]
                    ]
                    assert of_chunk and any(of_chunk in text for text in of_document)
                    seen += row["part"] > 1
    assert seen > 5


def test_addresses_and_copyright_notices_are_removed(tmp_path):
    text = f"{WORDS}. Electronic address: a.person@example.org. © 2019 Elsevier B.V. All rights reserved."
    source = write_rows(tmp_path / "texts.parquet", [{"id": "c:1", "text": text}])
    documents, _ = build(tmp_path / "corpus", sources=[str(source)], validation_fraction=0, test_fraction=0)
    assert documents["c:1"]["text"] == f"{WORDS}."


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_data_give_a_corpus_that_adds_up(test_data, tmp_path):
    """All of PubMed's files, consumer health and clinical text."""
    options = {"sources": [str(test_data / "corpus" / "train-c*.parquet")], "workers": 2}
    options |= {"held_out": [test_data / "corpus" / "validation.parquet", test_data / "pubmedqa"]}
    documents, _ = build(tmp_path / "corpus", pubmed=test_data / "pubmed", **options)
    report = assert_report_adds_up(tmp_path / "corpus")
    assert report["read"] == 29466 + 20087 + 30 + 36 + 288 + 10745 + 1438
    held_out = {f"pmid:{json.loads(line)['pmid']}" for line in (test_data / "pubmedqa" / "test.jsonl").open()}
    assert not held_out & set(documents)
