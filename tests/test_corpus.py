"""The corpus has each document once, in its current version and in one split, and its report accounts for all input."""

import gzip
import hashlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rensa import RMinHash
from xxhash import xxh3_64_intdigest

from healthslm.corpus.build import CorpusOptions, build_corpus
from healthslm.corpus.pubmed import read_records
from healthslm.corpus.pubmed_files import find_pubmed_files
from healthslm.corpus.records import RECORD_SCHEMA, record_document
from healthslm.corpus.screening import HELD_OUT_SCHEMA, SIGNATURE_SCHEMA
from healthslm.corpus.selection import write_drop_list
from healthslm.corpus.signatures import ngram_hashes
from healthslm.documents import DOCUMENT_SCHEMA, SPLITS, document_id, document_text, split_of, text_hash
from healthslm.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "sample" / "pubmed"

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


def words(seed: object) -> str:
    """Thirty words that differ for every seed, so that no text is a near-duplicate of another."""
    return " ".join(f"word{seed}{number}" for number in range(30))


WORDS = words("")


def build(output: Path, **options: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Build a corpus; return its documents by id, with their split, and its report."""
    options = {"workers": 1, "validation_fraction": 0.1, "test_fraction": 0.1} | options
    build_corpus(CorpusOptions(output=output, **options))
    return read(output), json.loads((output / "report.json").read_text())


def read(corpus: Path) -> dict[str, dict[str, Any]]:
    rows = [
        row | {"split": split}
        for split in SPLITS
        for path in sorted((corpus / split).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    documents = {row["id"]: row for row in rows if row["part"] == 1}
    assert len({(row["id"], row["part"]) for row in rows}) == len(rows), "a chunk is in the corpus twice"
    return documents


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """A folder with the corpus and the records of the sample."""
    folder = tmp_path_factory.mktemp("sample")
    build(folder / "corpus", pubmed=SAMPLE)
    return folder


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


def assert_report_adds_up(corpus: Path) -> dict[str, Any]:
    report = json.loads((corpus / "report.json").read_text())
    for counts in (report, *report["files"]):
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    for key in ("read", "kept"):
        assert report[key] == sum(file[key] for file in report["files"])
    for split in SPLITS:
        rows = [row for path in (corpus / split).glob("*.parquet") for row in pq.read_table(path).to_pylist()]
        assert report["splits"][split]["parts"] == len(rows)
        assert report["splits"][split]["documents"] == len({row["id"] for row in rows})
        size = sum(len(document_text(row["title"], row["text"]).encode()) for row in rows)
        assert report["splits"][split]["bytes"] == size
    assert report["kept"] == sum(split["documents"] for split in report["splits"].values())
    return report


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


def test_splits_have_their_share_of_the_documents():
    splits = [split_of(f"pmid:{number}", 0.1, 0.3) for number in range(20_000)]
    for split, share in zip(SPLITS, (0.6, 0.1, 0.3), strict=True):
        deviation = (20_000 * share * (1 - share)) ** 0.5
        assert abs(splits.count(split) - 20_000 * share) < 4 * deviation
    assert {split_of("pmid:1", 0, 0), split_of("a", 0, 0)} == {"train"}


# Update semantics


def newest_by_hand(files: list[list[tuple[int, int, bool]]]) -> dict[int, tuple[int, int]]:
    """Apply records (pmid, version, deleted) in order; return the file and position of each PMID's current record.

    The highest version of a PMID counts; a later record or deletion of the same version replaces it.
    """
    state: dict[int, tuple[int, int, int, bool]] = {}
    for file, records in enumerate(files):
        for position, (pmid, version, deleted) in enumerate(records):
            if pmid not in state or version >= state[pmid][0]:
                state[pmid] = (version, file, position, deleted)
    return {pmid: (file, position) for pmid, (_, file, position, deleted) in state.items() if not deleted}


@pytest.mark.parametrize("seed", range(5))
def test_outdated_records_agree_with_a_simulation(tmp_path, seed):
    chance = random.Random(seed)
    files = [
        [(chance.randrange(40), chance.choice([1, 1, 1, 2]), chance.random() < 0.2) for _ in range(30)]
        for _ in range(5)
    ]
    keys = iter(range(10**6))
    for number, records in enumerate(files):
        rows = [{"pmid": pmid, "version": version, "deleted": deleted} for pmid, version, deleted in records]
        signatures = [
            {"position": position, "split": "train", "id_key": next(keys), "text_key": next(keys), "bands": []}
            for position in range(len(rows))
        ]
        for folder, content, schema in (("records", rows, RECORD_SCHEMA), ("signatures", signatures, SIGNATURE_SCHEMA)):
            (tmp_path / folder).mkdir(exist_ok=True)
            name = f"pubmed26n{number:04}.parquet"
            pq.write_table(pa.Table.from_pylist(content, schema), tmp_path / folder / name)
    held_out, dropped = tmp_path / "held_out.parquet", tmp_path / "dropped.parquet"
    pq.write_table(HELD_OUT_SCHEMA.empty_table(), held_out)
    record_files, signature_files = (sorted((tmp_path / folder).iterdir()) for folder in ("records", "signatures"))
    write_drop_list(signature_files, record_files, held_out, dropped)

    listed = {(row["file"], row["position"]): row["reason"] for row in pq.read_table(dropped).to_pylist()}
    newest = newest_by_hand(files)
    for number, records in enumerate(files):
        for position, (pmid, _, deleted) in enumerate(records):
            is_current = newest.get(pmid) == (number, position)
            reason = "deletion" if deleted else "superseded" if pmid in newest else "deleted"
            assert listed.get((f"pubmed26n{number:04}", position)) == (None if is_current else reason)


def test_real_updates_apply_in_the_order_of_the_files(test_data, tmp_path):
    folder = tmp_path / "pubmed"
    for file in ("baseline/pubmed26n0003", "updatefiles/pubmed26n0004", "updatefiles/pubmed26n0005"):
        name = f"{file}.xml.gz"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(test_data / "pubmed" / name)
    build(tmp_path / "corpus", pubmed=folder)
    report = assert_report_adds_up(tmp_path / "corpus")
    assert [file["read"] for file in report["files"]] == [30, 30 + 6, 26 + 262]
    assert report["dropped"]["deletion"] == 6 + 262


def test_pubmed_files_are_from_one_year_and_have_different_names(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_pubmed_files(tmp_path / "missing")
    with pytest.raises(UserError, match="no PubMed files"):
        find_pubmed_files(tmp_path)
    for name in ("baseline/pubmed26n0010.xml.gz", "baseline/pubmed26n0002.xml.gz", "updatefiles/pubmed26n0011.xml.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "baseline" / "pubmed26n0002.xml.gz.md5").touch()
    assert [path.name[9:13] for path in find_pubmed_files(tmp_path)] == ["0002", "0010", "0011"]
    (tmp_path / "updatefiles" / "pubmed26n0002.xml").touch()
    with pytest.raises(UserError, match="has the same name as"):
        find_pubmed_files(tmp_path)
    (tmp_path / "updatefiles" / "pubmed26n0002.xml").rename(tmp_path / "updatefiles" / "pubmed25n0900.xml.gz")
    with pytest.raises(UserError, match="from another year than"):
        find_pubmed_files(tmp_path)


# Other text


ROWS = [
    {"id": "a:1", "title": "First", "text": f"Of {words(1)}", "source": "s", "kind": "k", "license": "l", "year": 1999},
    {"id": "", "title": "", "text": f"Ünïcode – {words(2)}", "source": "", "kind": "", "license": "", "year": None},
    {"id": "b:2", "title": "Nothing", "text": "", "source": "s", "kind": "k", "license": "l", "year": 2001},
]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "folder", "hub"])
def test_every_format_gives_the_same_documents(tmp_path, form):
    parquet = write_rows(tmp_path / "data" / "texts.parquet", ROWS)
    lines = write_lines(tmp_path / "texts.jsonl", ROWS)
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    sources = {
        "parquet": str(parquet),
        "jsonl": str(lines),
        "jsonl.gz": f"{lines}.gz",
        "folder": str(parquet.parent),
        "hub": f"hub:{parquet.parent}",  # looks like a dataset of the Hub
    }
    documents, report = build(tmp_path / "corpus", sources=[sources[form]], validation_fraction=0)

    first, second = documents.values() if next(iter(documents)) == "a:1" else reversed(documents.values())
    assert {key: first[key] for key in ("title", "text", "source", "kind", "license", "year", "sections")} == {
        **{key: ROWS[0][key] for key in ("title", "text", "source", "kind", "license", "year")},
        "sections": [],
    }
    assert second["id"] == f"sha:{text_hash(ROWS[1]['text'])}"
    assert (second["text"], second["license"]) == (ROWS[1]["text"], "unstated")
    assert report["dropped"] == {"no_text": 1}


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "note.txt").write_text(f"Line one\n{WORDS}\n", encoding="utf-8")
    documents, _ = build(tmp_path / "corpus", sources=[str(tmp_path / "*.txt")], validation_fraction=0)
    (document,) = documents.values()
    assert (document["text"], document["source"], document["title"]) == (f"Line one\n{WORDS}", "note", "")


@pytest.mark.parametrize("name", ["endless.txt.gz", "endless.jsonl.gz"])
def test_an_endless_document_is_rejected_before_memory_is_full(tmp_path, name):
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        if "jsonl" in name:
            file.write(json.dumps({"id": "1", "text": WORDS}).encode() + b'\n{"text": "')
        for _ in range(600):
            file.write(b"word " * 2**18)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({2**30}, {2**30}))"
    program = f"{limit}\nfrom healthslm.corpus.sources import read_rows\nlist(read_rows({str(tmp_path / name)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    message = done.stderr.splitlines()[-1]
    assert f"{name}: {'line 2: ' if 'jsonl' in name else ''}longer than" in message, done.stderr[-2000:]


def test_files_with_the_same_name_are_kept_apart(tmp_path):
    for number in (1, 2):
        write_rows(tmp_path / str(number) / "train.parquet", [{"text": words(number)}])
    train_alone = {"validation_fraction": 0.0, "test_fraction": 0.0}
    _, report = build(tmp_path / "corpus", sources=[str(tmp_path / "*" / "train.parquet")], **train_alone)
    assert [(file["name"], file["kept"]) for file in report["files"]] == [("train", 1), ("train-2", 1)]


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


def test_pubmedqa_is_read_as_the_hub_and_its_authors_publish_it(tmp_path):
    """The Hub has its contexts in a field of a column, and its parts as configurations."""
    questions = {
        number: {"question": f"Is it {words(number)}?", "answer": f"Yes, {words(number)}"} for number in (1, 2)
    }
    for part, (number, row) in zip(("pqa_labeled", "pqa_artificial"), questions.items(), strict=True):
        contexts = {"contexts": [f"Of {words(f'{number}a')}", f"On {words(f'{number}b')}"], "labels": ["A", "B"]}
        hub = {"pubid": number, "question": row["question"], "context": contexts, "long_answer": row["answer"]}
        write_rows(tmp_path / "hub" / f"{part}.parquet", [hub])
    configurations = "".join(
        f"- config_name: {part}\n  data_files: {part}.parquet\n" for part in ("pqa_labeled", "pqa_artificial")
    )
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n", encoding="utf-8")
    # The authors' form, of the last row.
    local = {"pmid": 2, "QUESTION": row["question"], "CONTEXTS": contexts["contexts"], "LONG_ANSWER": row["answer"]}
    write_lines(tmp_path / "local.jsonl", [local])

    forms = {
        f"hub:{tmp_path / 'hub'}:pqa_artificial:train": {
            "id_columns": ["pubid"],
            "title_columns": ["question"],
            "text_columns": ["context.contexts+long_answer"],
        },
        str(tmp_path / "local.jsonl"): {"text_columns": ["CONTEXTS+LONG_ANSWER"]},
    }
    for number, (source, columns) in enumerate(forms.items()):
        documents, _ = build(
            tmp_path / f"{number}" / "corpus", sources=[source], validation_fraction=0, test_fraction=0, **columns
        )
        (document,) = documents.values()
        assert document["title"] == questions[2]["question"]
        assert document["text"] == "\n".join([*contexts["contexts"], questions[2]["answer"]])
        assert document["id"].endswith(":2")


@pytest.mark.parametrize("name", ["text.body", "text+no_such_column", "no_such_column.body"])
def test_a_part_of_a_column_that_a_row_does_not_have_is_reported(tmp_path, name):
    source = write_lines(tmp_path / "texts.jsonl", [{"text": WORDS}])
    with pytest.raises(UserError, match=re.escape(f"row 1: no column {name}; the columns are text")):
        build(tmp_path / "corpus", sources=[str(source)], text_columns=[name])


def test_columns_may_have_other_names(tmp_path):
    source = write_lines(tmp_path / "notes.jsonl", [{"key": "n:1", "heading": "One", "body": WORDS}])
    columns = {"id_columns": ["key"], "title_columns": ["heading"], "text_columns": ["body"]}
    documents, _ = build(tmp_path / "corpus", sources=[str(source)], validation_fraction=0, test_fraction=0, **columns)
    assert (documents["n:1"]["title"], documents["n:1"]["text"]) == ("One", WORDS)


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


# Errors


@pytest.fixture
def older(sample, tmp_path) -> Path:
    """A folder with an older corpus, which a failed run must not change."""
    shutil.copytree(sample, tmp_path / "older")
    return tmp_path / "older"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(name: str, folder: Path) -> dict[str, Any]:
    """Make a folder with a damaged file; return the options that read it."""
    whole = gzip.compress((SAMPLE / "pubmedsample26n0001.xml").read_bytes())
    folder.mkdir()
    match name:
        case "cut gzip":
            (folder / "a.xml.gz").write_bytes(whole[: len(whole) // 2])
        case "damaged gzip":
            (folder / "a.xml.gz").write_bytes(whole[:9000] + bytes(500) + whole[9500:])
        case "cut XML":
            (folder / "a.xml").write_bytes(gzip.decompress(whole)[:50_000])
        case "Parquet":
            (folder / "a.parquet").write_bytes(b"PAR1 and no more")
        case "JSON":
            (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
        case "text":
            (folder / "a.txt").write_bytes(b"\xff\xfe")
        case "no text column":
            write_lines(folder / "a.jsonl", [{"id": "1", "body": "x"}])
    is_xml = name in ("cut gzip", "damaged gzip", "cut XML", "empty")
    return {"pubmed": folder} if is_xml else {"sources": [str(folder)]}


BAD_INPUT = {
    "cut gzip": "a.xml.gz: the gzip file is truncated after record",
    "damaged gzip": "a.xml.gz: damaged",
    "cut XML": "a.xml: damaged XML after record",
    "Parquet": "a.parquet: damaged",
    "JSON": "a.jsonl: line 2: not valid JSON",
    "text": "a.txt: damaged",
    "no text column": "a.jsonl: row 1: no column text",
    "empty": "empty: no PubMed files",
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_does_not_change_the_older_corpus(older, tmp_path, name):
    before = contents(older / "corpus") | contents(older / "records")
    with pytest.raises(UserError, match=BAD_INPUT[name]):
        build(older / "corpus", **damaged(name, tmp_path / name))
    assert contents(older / "corpus") | contents(older / "records") == before
    assert not list(older.rglob(".*.partial-*"))


@pytest.mark.parametrize(("name", "workers"), [("cut gzip", 2), ("JSON", 1), ("empty", 1)])
def test_bad_input_is_one_line_on_the_terminal(run_script, tmp_path, name, workers):
    ((option, value),) = damaged(name, tmp_path / name).items()
    arguments = [f"--{option}", *([value] if option == "pubmed" else value)]
    result = run_script("build_corpus", *arguments, "--output", tmp_path / "out" / "corpus", "--workers", workers)
    assert result.returncode == 1
    assert_one_line(result.stderr, BAD_INPUT[name])
    assert not (tmp_path / "out" / "corpus").exists()


def assert_one_line(stderr: str, message: str) -> None:
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line and not re.search(r"\d+/\d+ \[", line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ") and message in lines[0]


def test_a_failed_write_is_one_line_and_leaves_nothing(tmp_path):
    """Files are limited to 20,000 bytes here, which has the same effect as a full disk."""
    command = [sys.executable, REPOSITORY / "scripts" / "build_corpus.py", "--pubmed", SAMPLE, "--workers", "1"]
    result = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out" / "corpus")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert_one_line(result.stderr, "File too large")
    assert not (tmp_path / "out" / "corpus").exists()
    assert not list((tmp_path / "out").rglob(".*.partial-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no input"),
        ({"sources": ["missing.parquet"]}, "missing.parquet: no such file"),
        ({"sources": [str(SAMPLE.parent / "README.md")]}, "unknown format"),
        ({"sources": ["hub:/no/such/data"]}, "hub:/no/such/data: cannot be read"),
        (
            {"pubmed": SAMPLE, "validation_fraction": 0.5, "test_fraction": 0.5},
            "validation_fraction: 0.5 and test_fraction 0.5 leave no training documents",
        ),
        ({"pubmed": SAMPLE, "test_fraction": -0.1}, "test_fraction: must be at least 0 and at most 1, not -0.1"),
        ({"pubmed": SAMPLE, "min_words": 10_000}, "no training documents are left"),
        ({"pubmed": SAMPLE, "max_bytes": 10}, "max_bytes: must be at least 256, not 10"),
        ({"pubmed": SAMPLE, "held_out": [Path("missing.jsonl")]}, "missing.jsonl: no such file"),
    ],
)
def test_wrong_options_are_rejected(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "corpus", **options)
    assert not (tmp_path / "corpus").exists()


def test_a_small_corpus_without_a_validation_document_is_rejected_with_a_fraction_that_gives_one(tmp_path, run_script):
    """Sixty text files, of which the usual share is a third of a document."""
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(words(f"note{number}"))
    command = ["build_corpus", "--sources", tmp_path / "texts", "--workers", 1, "--output", tmp_path / "corpus"]
    rejected = run_script(*command)
    assert rejected.returncode == 2 and "Traceback" not in rejected.stderr
    last = rejected.stderr.splitlines()[-1]
    message = r"error: --validation-fraction: 0.005 of 60 documents gives no validation document; use (0\.\d+) or more"
    least = float(re.match(message, last)[1])
    assert not (tmp_path / "corpus").exists()

    less = run_script(*command, "--validation-fraction", least - 1e-4)
    assert f"use {least} or more" in less.stderr
    built = run_script(*command, "--validation-fraction", least)
    assert built.returncode == 0, built.stderr
    splits = Counter(document["split"] for document in read(tmp_path / "corpus").values())
    assert splits["validation"] >= 1 and splits["train"] >= 50


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text(WORDS)
    with pytest.raises(UserError, match="thesis: holds other files than a corpus"):
        build(other, pubmed=SAMPLE)
    assert contents(tmp_path) == {"thesis/chapter.txt": WORDS.encode()}


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "corpus").write_text("mine")
    with pytest.raises(UserError, match="corpus: is a file, but a corpus is a folder"):
        build(tmp_path / "corpus", pubmed=SAMPLE)
    assert contents(tmp_path) == {"corpus": b"mine"}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (17, "numbers, such as 17"),
        (0.5, "numbers, such as 0.5"),
        ([1, 2], "numbers, such as 1"),
        ({"en": "text"}, "values of type dict, such as {'en': 'text'}"),
    ],
)
def test_a_text_column_without_text_is_rejected_with_its_name(tmp_path, value, problem):
    rows = [{"id": "n:1", "text": WORDS}, {"id": "n:2", "text": value}]
    source = write_lines(tmp_path / "notes.jsonl", rows)
    message = f"notes.jsonl: row 2: column text holds {problem}, where text is expected"
    with pytest.raises(UserError, match=re.escape(message)):
        build(tmp_path / "corpus", sources=[str(source)])


def test_a_text_column_of_integers_in_parquet_is_rejected(tmp_path):
    source = write_rows(tmp_path / "numbers.parquet", [{"id": "n:1", "text": 42}])
    with pytest.raises(UserError, match="row 1: column text holds numbers, such as 42, where text is expected"):
        build(tmp_path / "corpus", sources=[str(source)])
