"""Other text is read from every format, with the columns that the options name."""

import gzip
import json
import re
import subprocess
import sys

import pytest
from corpus_builds import WORDS, build, words
from paths import REPOSITORY
from row_files import write_lines, write_rows

from healthslm.documents import text_hash
from healthslm.errors import UserError

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
