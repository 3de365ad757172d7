"""The corpus holds each document once, in its newest state and in one split, and accounts for all that was read."""

import gzip
import hashlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from healthslm.corpus import CorpusOptions, build_corpus, find_pubmed_files
from healthslm.documents import DOCUMENT_SCHEMA, SPLITS, document_id, document_text, split_of, text_hash
from healthslm.errors import UserError
from healthslm.pubmed import read_records
from healthslm.records import RECORD_SCHEMA, list_outdated, record_document

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "sample" / "pubmed"

# Why each citation of the sample that is missing from the corpus is missing (numbers from 99,000,000).
NOT_KEPT = {
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
WORDS = " ".join(f"word{number}" for number in range(30))


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
    documents = {row["id"]: row for row in rows}
    assert len(documents) == len(rows), "an id stands in the corpus twice"
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


def test_the_corpus_has_the_columns_that_all_stages_rely_on(sample):
    for path in sample.glob("corpus/*/*.parquet"):
        assert pq.read_schema(path).equals(DOCUMENT_SCHEMA)
    for path in sample.glob("records/*.parquet"):
        assert pq.read_schema(path).equals(RECORD_SCHEMA)


def test_the_corpus_of_the_sample_holds_what_it_should(sample):
    assert set(read(sample / "corpus")) == {f"pmid:{99_000_000 + number}" for number in KEPT}


def test_the_report_gives_the_reason_of_everything_that_was_dropped(sample):
    report = json.loads((sample / "corpus" / "report.json").read_text())
    reasons = [*NOT_KEPT.values(), *["deletion"] * 3, *["superseded"] * 3]
    assert report["dropped"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert (report["read"], report["kept"]) == (67, len(KEPT))


def assert_that_the_report_adds_up(corpus: Path) -> dict[str, Any]:
    report = json.loads((corpus / "report.json").read_text())
    for part in (report, *report["files"]):
        assert part["read"] == part["kept"] + sum(part["dropped"].values())
    for key in ("read", "kept"):
        assert report[key] == sum(file[key] for file in report["files"])
    for split in SPLITS:
        rows = [row for path in (corpus / split).glob("*.parquet") for row in pq.read_table(path).to_pylist()]
        assert report["splits"][split]["documents"] == len(rows)
        size = sum(len(document_text(row["title"], row["text"]).encode()) for row in rows)
        assert report["splits"][split]["bytes"] == size
    assert report["kept"] == sum(split["documents"] for split in report["splits"].values())
    return report


def test_the_report_adds_up_and_names_its_inputs(sample):
    report = assert_that_the_report_adds_up(sample / "corpus")
    for file in report["files"]:
        content = (SAMPLE / f"{file['name']}.xml").read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()


def test_records_hold_every_record_of_the_xml(sample):
    for path in sorted(SAMPLE.glob("*.xml")):
        records = pq.read_table(sample / "records" / f"{path.stem}.parquet").to_pylist()
        assert records == list(read_records(path))


def test_the_newest_record_stays(sample):
    documents = read(sample / "corpus")
    assert "four faulty sensors were removed" in documents["pmid:99000030"]["text"]  # revised by an update
    assert documents["pmid:99000024"]["title"].endswith("second version.")
    assert "came back" in documents["pmid:99000046"]["text"]  # deleted by one update, back with the next


def test_sections_say_where_they_stand_in_the_text(sample):
    records = {
        f"pmid:{record['pmid']}": record
        for path in sorted(SAMPLE.glob("*.xml"))
        for record in read_records(path)
        if not record["deleted"]
    }
    for identifier, document in read(sample / "corpus").items():
        expected = [(part["label"], part["category"], part["text"]) for part in records[identifier]["sections"]]
        text = document["text"]
        assert [
            (section["label"], section["category"], text[section["start"] : section["end"]])
            for section in document["sections"]
        ] == expected


def test_labels_are_shown_where_pubmed_shows_them(sample):
    documents = read(sample / "corpus")
    assert re.findall(r"\b[A-Z]{7,}: ", documents["pmid:99000001"]["text"]) == [
        "BACKGROUND: ",
        "METHODS: ",
        "RESULTS: ",
        "CONCLUSIONS: ",
    ]
    assert documents["pmid:99000005"]["text"].startswith("We tested whether")  # its labels are empty
    assert documents["pmid:99000021"]["text"].startswith("Noise disturbs")  # its first label is UNASSIGNED


def test_one_process_and_several_write_the_same_bytes(sample, tmp_path):
    build(tmp_path / "corpus", pubmed=SAMPLE, workers=2)
    files = [path.relative_to(sample) for path in sorted(sample.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    for file in files:
        assert (sample / file).read_bytes() == (tmp_path / file).read_bytes()


def test_no_document_changes_sides_when_data_is_added(sample, tmp_path):
    more = write_rows(tmp_path / "more.parquet", [{"id": f"m:{n}", "text": f"{WORDS} {n}"} for n in range(200)])
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
    """Apply records (pmid, version, deleted) one after the other; return file and position of what is there at the end.

    The highest version of a PMID counts; a later record or deletion of the same version replaces it.
    """
    state: dict[int, tuple[int, int, int, bool]] = {}
    for file, records in enumerate(files):
        for position, (pmid, version, deleted) in enumerate(records):
            if pmid not in state or version >= state[pmid][0]:
                state[pmid] = (version, file, position, deleted)
    return {pmid: (file, position) for pmid, (_, file, position, deleted) in state.items() if not deleted}


@pytest.mark.parametrize("seed", range(5))
def test_outdated_records_are_those_of_a_simulation(tmp_path, seed):
    chance = random.Random(seed)
    files = [
        [(chance.randrange(40), chance.choice([1, 1, 1, 2]), chance.random() < 0.2) for _ in range(30)]
        for _ in range(5)
    ]
    for number, records in enumerate(files):
        rows = [{"pmid": pmid, "version": version, "deleted": deleted} for pmid, version, deleted in records]
        pq.write_table(pa.Table.from_pylist(rows, RECORD_SCHEMA), tmp_path / f"pubmed26n{number:04}.parquet")
    output = tmp_path / "listed" / "outdated.parquet"
    output.parent.mkdir()
    list_outdated(tmp_path, output)

    listed = {(row["file"], row["position"]): row["reason"] for row in pq.read_table(output).to_pylist()}
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
    report = assert_that_the_report_adds_up(tmp_path / "corpus")
    assert [file["read"] for file in report["files"]] == [30, 30 + 6, 26 + 262]
    assert report["dropped"]["deletion"] == 6 + 262


def test_pubmed_files_are_of_one_year_and_have_names_of_their_own(tmp_path):
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
    with pytest.raises(UserError, match="has the name of"):
        find_pubmed_files(tmp_path)
    (tmp_path / "updatefiles" / "pubmed26n0002.xml").rename(tmp_path / "updatefiles" / "pubmed25n0900.xml.gz")
    with pytest.raises(UserError, match="of another year than"):
        find_pubmed_files(tmp_path)


# Other text


ROWS = [
    {"id": "a:1", "title": "First", "text": f"Of {WORDS}", "source": "s", "kind": "k", "license": "l", "year": 1999},
    {"id": "", "title": "", "text": f"Ünïcode – {WORDS}", "source": "", "kind": "", "license": "", "year": None},
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
        "hub": f"hub:{parquet.parent}",  # has the form of a data set of the Hub
    }
    documents, report = build(tmp_path / "corpus", sources=[sources[form]])

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
    documents, _ = build(tmp_path / "corpus", sources=[str(tmp_path / "*.txt")])
    (document,) = documents.values()
    assert (document["text"], document["source"], document["title"]) == (f"Line one\n{WORDS}", "note", "")


def test_files_of_one_name_stay_apart(tmp_path):
    for number in (1, 2):
        write_rows(tmp_path / str(number) / "train.parquet", [{"text": f"{WORDS} {number}"}])
    _, report = build(tmp_path / "corpus", sources=[str(tmp_path / "*" / "train.parquet")], test_fraction=0.0)
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


def test_copies_in_another_form_have_the_same_hash():
    text = "Heat – of 10 µg/mL “cold”… was ﬁne (p<0.05)."
    assert text_hash(text) == text_hash("HEAT - OF 10 μg/ml\n'cold' was fine; p < 0.05")
    assert text_hash(text) != text_hash(text.replace("10", "11"))
    assert text_hash("热") != text_hash("冷")


def sample_abstract(sample: Path, number: int) -> str:
    return read(sample / "corpus")[f"pmid:{99_000_000 + number}"]["text"]


def test_of_copies_in_several_sources_that_of_pubmed_stays(sample, tmp_path):
    text = sample_abstract(sample, 2)
    copies = [
        {"id": "99000001", "text": f"Another text for the same PMID. {WORDS}", "kind": "abstract"},
        {"id": "", "text": text.upper().replace(" ", "  "), "kind": "abstract"},
        {"id": "x:1", "text": f"New. {WORDS}", "kind": "abstract"},
        {"id": "x:2", "text": f"new {WORDS}", "kind": "abstract"},
    ]
    source = write_rows(tmp_path / "copies.parquet", copies)
    documents, report = build(tmp_path / "corpus", pubmed=SAMPLE, sources=[str(source)])
    assert report["files"][-1]["dropped"] == {"duplicate_id": 1, "duplicate_text": 2}
    assert set(documents) == set(read(sample / "corpus")) | {"x:1"}
    assert documents["pmid:99000002"]["text"] == text


def test_a_retracted_article_leaves_with_its_copies(tmp_path):
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


def test_held_out_documents_stay_out_by_id_and_by_text(sample, tmp_path):
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
    rows = [{"id": pmid, "text": f"{WORDS} {pmid}", "kind": "abstract"} for pmid in (*pmids[:3], "1")]
    source = write_rows(tmp_path / "texts.parquet", rows)
    options = {"validation_fraction": 0.0, "test_fraction": 0.0, "held_out": [held_out]}
    documents, report = build(tmp_path / "corpus", sources=[str(source)], **options)
    assert (set(documents), report["dropped"]) == ({"pmid:1"}, {"held_out": 3})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_real_data_give_a_corpus_that_adds_up(test_data, tmp_path):
    options = {"sources": [str(test_data / "corpus" / "train-*.parquet")], "workers": 2}
    options |= {"held_out": [test_data / "corpus" / "validation.parquet", test_data / "pubmedqa"]}
    documents, _ = build(tmp_path / "corpus", pubmed=test_data / "pubmed", **options)
    report = assert_that_the_report_adds_up(tmp_path / "corpus")
    assert report["read"] == 29466 + 20087 + 30 + 36 + 288 + 60710 + 5391 + 10745 + 1438
    held_out = {f"pmid:{json.loads(line)['pmid']}" for line in (test_data / "pubmedqa" / "test.jsonl").open()}
    assert not held_out & set(documents)


# Mistakes and accidents


@pytest.fixture
def older(sample, tmp_path) -> Path:
    """A folder with an older corpus, which a run that fails must leave as it is."""
    shutil.copytree(sample, tmp_path / "older")
    return tmp_path / "older"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(name: str, folder: Path) -> dict[str, Any]:
    """Make a folder with a file that is damaged as `name` says; return the options that read it."""
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
    "cut gzip": "a.xml.gz: the gzip file is cut short, after record",
    "damaged gzip": "a.xml.gz: damaged",
    "cut XML": "a.xml: damaged XML, after record",
    "Parquet": "a.parquet: damaged",
    "JSON": "a.jsonl: line 2: not valid JSON",
    "text": "a.txt: damaged",
    "no text column": "a.jsonl: row 1: no column text",
    "empty": "empty: no PubMed files",
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_leaves_the_older_corpus(older, tmp_path, name):
    before = contents(older)
    with pytest.raises(UserError, match=BAD_INPUT[name]):
        build(older / "corpus", **damaged(name, tmp_path / name))
    assert contents(older) == before and sorted(path.name for path in older.iterdir()) == ["corpus", "records"]


@pytest.mark.parametrize(("name", "workers"), [("cut gzip", 2), ("JSON", 1), ("empty", 1)])
def test_bad_input_is_one_line_on_the_terminal(run_script, tmp_path, name, workers):
    ((option, value),) = damaged(name, tmp_path / name).items()
    arguments = [f"--{option}", *([value] if option == "pubmed" else value)]
    result = run_script("build_corpus", *arguments, "--output", tmp_path / "out" / "corpus", "--workers", workers)
    assert result.returncode == 1
    assert_one_line(result.stderr, BAD_INPUT[name])
    assert not (tmp_path / "out" / "corpus").exists()


def assert_one_line(stderr: str, message: str) -> None:
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line and not re.match(r"(parse|collect|write):", line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ") and message in lines[0]


def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path):
    """Files may grow to 20,000 bytes here, which stops the writing as a full disk does."""
    command = [sys.executable, REPOSITORY / "scripts" / "build_corpus.py", "--pubmed", SAMPLE, "--workers", "1"]
    result = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out" / "corpus")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert_one_line(result.stderr, "File too large")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to read"),
        ({"sources": ["missing.parquet"]}, "missing.parquet: no such file"),
        ({"sources": [str(SAMPLE.parent / "README.md")]}, "of no format that is read"),
        ({"sources": ["hub:/no/such/data"]}, "hub:/no/such/data: cannot be read"),
        ({"pubmed": SAMPLE, "validation_fraction": 0.5, "test_fraction": 0.5}, "something to train on"),
        ({"pubmed": SAMPLE, "test_fraction": -0.1}, "must not be negative"),
        ({"pubmed": SAMPLE, "min_words": 10_000}, "no usable document"),
        ({"pubmed": SAMPLE, "held_out": [Path("missing.jsonl")]}, "missing.jsonl: no such file"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "corpus", **options)
    assert not (tmp_path / "corpus").exists()


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text(WORDS)
    with pytest.raises(UserError, match="thesis: holds other things"):
        build(other, pubmed=SAMPLE)
    with pytest.raises(UserError, match="thesis: holds other things"):
        build(tmp_path / "corpus", pubmed=SAMPLE, records=other)
    with pytest.raises(UserError, match="each needs a folder of its own"):
        build(tmp_path / "corpus", pubmed=SAMPLE, records=tmp_path / "corpus" / "records")
    assert contents(tmp_path) == {"thesis/chapter.txt": WORDS.encode()}
