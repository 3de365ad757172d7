"""The data card's numbers are those counted in the corpus's files, and the same corpus gives the same card."""

import json
import math
import re
import shutil
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from paths import SAMPLE

from healthslm.corpus.build import CorpusOptions, build_corpus
from healthslm.data_card.describe import REASONS, DataCardOptions, describe_corpus, size_category
from healthslm.data_card.figures import draw_figures
from healthslm.data_card.options import BINS_PER_CONTEXT
from healthslm.data_card.statistics import corpus_statistics, shorten, token_statistics
from healthslm.documents import SPLITS
from healthslm.errors import UserError
from healthslm.files import file_sha256
from healthslm.plots import BLUE, VERMILION
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus
from healthslm.tokenization.tokens import TokenizedSplit

ODD_SOURCE = "a|b_*c*<i>[x](y) $1$"
GERMAN = """Die Behandlung mit dem neuen Wirkstoff wurde von allen Patienten gut vertragen, und die Beschwerden gingen
innerhalb weniger Wochen deutlich zurück. Schwere Nebenwirkungen traten während der gesamten Beobachtungszeit nicht auf,
sodass die Ärzte eine längere Anwendung für vertretbar hielten."""


def english(seed: str, count: int) -> str:
    return " ".join(f"the {seed}{number} of" for number in range(count))


def row(identifier: str, text: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"id": identifier, "title": "", "text": text, "source": kind, "kind": kind, "license": "CC0-1.0"} | more


# With the sample: documents of every kind, and some that are dropped for every reason.
ROWS = [
    row("a1", "\n".join(english(f"long{number}", 40) for number in range(30)), "fulltext", title="Größe"),
    row("a2", english("question", 20), ODD_SOURCE, license="a\nlicense | of two lines"),
    row("a3", english("answer", 25), ODD_SOURCE, license="MIT", year=1801),
    *(
        row(f"s{number}", english(f"s{number}n", 10), "many", source=f"source {number:02}")
        for number in reversed(range(20))
    ),
    row("99000001", english("copied id", 20), "abstract"),
    row("n1", english("near", 100), "consumer"),
    row("n2", english("near", 100) + " and more", "consumer"),
    row("h1", english("held", 30), "consumer"),
    row("h2", english("other", 10) + " " + english("held", 30)[60:160] + " " + english("another", 30), "consumer"),
    row("g1", GERMAN, "consumer"),
    row("e1", "", "consumer"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, sample_folders) -> DataCardOptions:
    """A tokenized corpus of many sources, and its card."""
    folder = tmp_path_factory.mktemp("mixed")
    pq.write_table(pa.Table.from_pylist([{"year": None} | row for row in ROWS]), folder / "texts.parquet")
    (folder / "held.jsonl").write_text(json.dumps({"text": english("held", 30)}), encoding="utf-8")
    build_corpus(
        CorpusOptions(
            output=folder / "corpus",
            pubmed=SAMPLE,
            sources=[str(folder / "texts.parquet")],
            held_out=[folder / "held.jsonl"],
            validation_fraction=0.1,
            test_fraction=0.1,
            max_bytes=1024,
            workers=1,
        )
    )
    tokenize_corpus(
        TokenizeOptions(
            corpus=folder / "corpus", tokenizer=str(sample_folders.tokenizer), output=folder / "tokens", workers=1
        )
    )
    names = {"texts": "texts as published | 2026", "held": "questions.jsonl"}
    options = DataCardOptions(
        folder / "corpus", folder / "card", folder / "tokens", context=256, title="A *small* corpus", names=names
    )
    describe_corpus(options)
    return options


def read_rows(corpus: Path) -> list[dict[str, Any]]:
    """All rows of a corpus, read with pyarrow."""
    return [
        row | {"split": split}
        for split in SPLITS
        for path in sorted((corpus / split).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def read_report(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "report.json").read_text(encoding="utf-8"))


def num_bytes(row: dict[str, Any]) -> int:
    return len((f"{row['title']}\n" if row["title"] else "").encode() + row["text"].encode())


def document_lengths(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Bytes of text of whole documents, by kind."""
    lengths, kinds = Counter(), {}
    for row in rows:
        lengths[row["id"]] += len(row["text"].encode())
        kinds[row["id"]] = row["kind"]
    return {kind: [lengths[one] for one in kinds if kinds[one] == kind] for kind in set(kinds.values())}


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, without escapes; the second row is the rule below the header."""
    blocks = [block for block in page.split("\n\n") if block.startswith("|")]
    return [
        [[unescape(cell) for cell in re.split(r" ?(?<!\\)\| ?", line)[1:-1]] for line in block.splitlines()]
        for block in blocks
    ]


def unescape(cell: str) -> str:
    return re.sub(r"\\(.)", r"\1", cell)


def table(card: Path, first: str, second: str) -> list[list[str]]:
    """The rows of the table whose header begins with these two cells."""
    found = [rows for rows in tables(read_page(card)) if rows[0][:2] == [first, second]]
    assert len(found) == 1
    return found[0][2:]


def read_page(card: Path) -> str:
    return (card / "README.md").read_text(encoding="utf-8")


def figure_of(count: int) -> str:
    return f"{count:,}"


def test_splits_have_the_documents_chunks_bytes_and_tokens_of_the_files(mixed):
    rows = read_rows(mixed.corpus)
    info = json.loads((mixed.tokens / "tokens.json").read_text())["splits"]
    groups = {split: [row for row in rows if row["split"] == split] for split in SPLITS} | {"all": rows}
    expected = []
    for name, group in groups.items():
        tokens = sum(info[split]["tokens"] for split in SPLITS if name in (split, "all"))
        size = sum(map(num_bytes, group))
        counts = len({row["id"] for row in group}), len(group), size, tokens
        expected.append([name, *map(figure_of, counts), f"{size / (tokens - len(group)):.3f}"])
    assert table(mixed.output, "split", "documents") == expected
    assert len(rows) > len({row["id"] for row in rows})


def test_sources_and_licenses_are_those_of_the_documents_with_most_documents_first(mixed):
    rows = read_rows(mixed.corpus)
    names = {(row["source"], " ".join(row["license"].split())) for row in rows}
    documents = Counter((row["source"], " ".join(row["license"].split())) for row in rows if row["part"] == 1)
    sizes = Counter()
    for row in rows:
        sizes[row["source"], " ".join(row["license"].split())] += num_bytes(row)
    listed = table(mixed.output, "source", "license as stated")
    assert {tuple(cells[:2]): cells[3:] for cells in listed} == {
        name: [figure_of(documents[name]), figure_of(sizes[name])] for name in names
    }
    assert [tuple(cells[:2]) for cells in listed] == sorted(names, key=lambda name: (-documents[name], name))

    by_license = Counter(" ".join(row["license"].split()) for row in rows if row["part"] == 1)
    assert {cells[0]: cells[1] for cells in table(mixed.output, "license as stated", "documents")} == {
        name: figure_of(count) for name, count in by_license.items()
    }


def test_kinds_of_text_have_the_lengths_of_whole_documents(mixed):
    rows = read_rows(mixed.corpus)
    lengths = document_lengths(rows)
    listed = {cells[0]: cells[1:] for cells in table(mixed.output, "kind of text", "documents")}
    assert listed.keys() == lengths.keys()
    for kind, of_kind in lengths.items():
        chunks = [row for row in rows if row["kind"] == kind]
        # The smallest length that is not exceeded by that share of the documents.
        percentiles = np.quantile(of_kind, [0.05, 0.5, 0.95, 1], method="inverted_cdf").astype(int).tolist()
        counts = [len(of_kind), len(chunks), sum(map(num_bytes, chunks)), *percentiles]
        assert listed[kind] == list(map(figure_of, counts))


def test_every_reason_to_drop_is_explained_and_counted(mixed):
    report = read_report(mixed.corpus)
    listed = table(mixed.output, "reason", "documents")
    assert {cells[0].strip("`"): cells[1] for cells in listed} == {
        reason: figure_of(count) for reason, count in report["dropped"].items()
    }
    assert set(report["dropped"]) == set(REASONS)
    assert all(cells[2].endswith(".") and "{" not in cells[2] for cells in listed)


def test_input_and_held_out_files_are_listed_with_their_checksums_under_the_names_given(mixed):
    folder = mixed.corpus.parent
    listed = table(mixed.output, "file", "read")
    assert [cells[0] for cells in listed] == [
        *(path.stem for path in sorted(SAMPLE.glob("*.xml"))),
        "texts as published | 2026",
        "all",
    ]
    inputs = [*sorted(SAMPLE.glob("*.xml")), folder / "texts.parquet"]
    assert [cells[4].strip("`") for cells in listed[:-1]] == [file_sha256(path) for path in inputs]
    kept = len({row["id"] for row in read_rows(mixed.corpus)})
    read, of_which_kept, dropped = (int(cell.replace(",", "")) for cell in listed[-1][1:4])
    assert (of_which_kept, read - kept) == (kept, dropped)
    assert table(mixed.output, "file", "SHA-256") == [
        ["questions.jsonl", f"`{file_sha256(folder / 'held.jsonl')}`"],
    ]


def test_a_source_named_after_its_file_gets_the_given_name(sample_folders, tmp_path):
    (tmp_path / "renamed.txt").write_text(english("plain", 30), encoding="utf-8")
    train_alone = {"validation_fraction": 0, "test_fraction": 0, "workers": 1}
    build_corpus(CorpusOptions(output=tmp_path / "corpus", sources=[str(tmp_path / "renamed.txt")], **train_alone))
    options = DataCardOptions(tmp_path / "corpus", tmp_path / "card", names={"renamed": "original.txt"})
    describe_corpus(options)
    page = read_page(options.output)
    assert "renamed" not in page
    assert [cells[0] for cells in table(options.output, "source", "license as stated")] == ["original.txt"]
    assert "U.S. National" not in page and "No document states its year" in page
    assert {path.name for path in options.output.iterdir()} == {
        "README.md",
        "sources.png",
        "licenses.png",
        "lengths.png",
    }


def test_settings_versions_and_seeds_are_those_that_made_the_corpus(mixed):
    report, page = read_report(mixed.corpus), read_page(mixed.output)
    settings = {cells[0].strip("`"): cells[1] for cells in table(mixed.output, "setting", "value")}
    assert settings == {name: str(value) for name, value in report["settings"].items()}
    versions = {cells[0]: cells[1] for cells in table(mixed.output, "software", "version")}
    assert report["versions"].items() <= versions.items()
    assert file_sha256(mixed.tokens / "tokenizer" / "tokenizer.json") in page
    assert "\n# A \\*small\\* corpus\n" in page


def test_the_settings_of_the_selection_are_read_from_the_report(mixed, tmp_path):
    shutil.copytree(mixed.corpus, tmp_path / "corpus")
    selection = dict(overlap_words=21, common_ngram=22, shingle_words=23, bands=2, rows=1, seed=24)
    replace_report(tmp_path / "corpus", read_report(mixed.corpus) | {"selection": selection})
    describe_corpus(DataCardOptions(tmp_path / "corpus", tmp_path / "card"))
    page = " ".join(read_page(tmp_path / "card").split())
    assert "shares 21 consecutive words with a held-out document, and at most 22 documents contain them." in page
    assert "any of 2 bands of 1 MinHash values" in page and "fixed seed 24." in page
    # At a similarity of 0.5 each of two bands is equal with probability 0.5, so any is with 0.75.
    assert "word 23-grams, the probability is 0.75 at 0.5" in page


def test_remaining_addresses_are_counted(tmp_path, mixed):
    shutil.copytree(mixed.corpus, tmp_path / "corpus")
    path = next((tmp_path / "corpus" / "train").glob("texts.parquet"))
    rows = pq.read_table(path)
    texts = rows["text"].to_pylist()
    # The same length, so that the report is still right.
    texts[0] = "a@b.org" + texts[0][7:]
    texts[1] = "a @ b o" + texts[1][7:]
    assert len(texts[0]) == len(texts[0].encode())
    pq.write_table(rows.set_column(rows.schema.get_field_index("text"), "text", pa.array(texts)), path)
    describe_corpus(DataCardOptions(tmp_path / "corpus", tmp_path / "card"))
    one_line = " ".join(read_page(tmp_path / "card").split())
    chunks = len(read_rows(mixed.corpus))
    assert f"matches 1 of {chunks} chunks" in one_line
    assert f"matches 0 of {chunks} chunks" in " ".join(read_page(mixed.output).split())


def test_figures_count_every_document_once(mixed, tmp_path):
    rows, report = read_rows(mixed.corpus), read_report(mixed.corpus)
    statistics = corpus_statistics(mixed.corpus, report, tmp_path / "database")
    tokens = token_statistics(mixed.tokens, report, mixed.context)
    figures = draw_figures(statistics, tokens)
    documents = [row for row in rows if row["part"] == 1]

    years = {round(bar.get_center()[0]): bar.get_height() for bar in figures["years.png"].axes[0].patches}
    assert years == Counter(row["year"] for row in documents if row["year"] is not None)

    for name in ("sources.png", "licenses.png"):
        by_documents, by_bytes = figures[name].axes
        assert sum(bar.get_width() for bar in by_documents.patches) == len(documents)
        assert sum(bar.get_width() for bar in by_bytes.patches) == sum(map(num_bytes, rows))
    labels = [label.get_text() for label in figures["sources.png"].axes[0].get_yticklabels()]
    assert re.fullmatch(r"\d+ others", labels[-1]) and len(labels) == 16

    lengths = document_lengths(rows)
    steps = {line.get_label().partition(":")[0]: line.get_data() for line in figures["lengths.png"].axes[0].patches}
    assert steps.keys() == lengths.keys()
    for kind, of_kind in lengths.items():
        shares, edges, _ = steps[kind]
        assert np.allclose(shares * len(of_kind), np.histogram(of_kind, edges)[0]) and math.isclose(sum(shares), 1)


def test_long_tables_sum_up_the_other_rows_unless_there_is_only_one():
    rows = [("a", "x", 4, 40), ("b", "y", 3, 30), ("c", "z", 2, 20)]
    assert shorten(rows, 1) == [("a", "x", 4, 40), ("2 others", "", 5, 50)]
    assert shorten(rows, 2) == shorten(rows, 3) == rows


def test_token_bars_count_the_chunks_of_every_length(mixed):
    splits = [TokenizedSplit(mixed.tokens, split) for split in SPLITS]
    lengths = [len(split.document(index)) for split in splits for index in range(len(split))]
    width = mixed.context // BINS_PER_CONTEXT
    expected = Counter(min((length - 1) // width, 2 * BINS_PER_CONTEXT - 1) for length in lengths)
    tokens = token_statistics(mixed.tokens, read_report(mixed.corpus), mixed.context)
    assert {place: count for place, count in enumerate(tokens.histogram.tolist()) if count} == expected
    longer = sum(length > mixed.context for length in lengths)
    assert 0 < longer == tokens.too_long < len(lengths)
    fitting = f"{len(lengths) - longer:,} of {len(lengths):,} chunks ({1 - longer / len(lengths):.2%}) fit"
    assert fitting in " ".join(read_page(mixed.output).split())


def test_the_same_corpus_gives_the_same_bytes_in_any_environment(mixed, run_script, tmp_path):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"names": mixed.names, "title": mixed.title}), encoding="utf-8")
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\nsavefig.pad_inches: 1\n")
    environment = {"MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    arguments = ["--corpus", mixed.corpus, "--tokens", mixed.tokens, "--context", 256, "--output", tmp_path / "card"]
    describe_corpus(replace(mixed, output=tmp_path / "card", title="Of yesterday"))
    done = run_script("describe_corpus", "--recipe", tmp_path / "card.yaml", *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "card").iterdir()}
    assert files == {path.name: path.read_bytes() for path in mixed.output.iterdir()}
    assert len(files) == 6


@pytest.mark.parametrize(
    ("name", "size", "colour"),
    [
        ("years.png", (1350, 600), BLUE),
        ("lengths.png", (1350, 600), VERMILION),
        ("tokens.png", (1350, 600), VERMILION),
        ("sources.png", (1350, 900), BLUE),
        ("licenses.png", (1350, 150 * (1.2 + 0.3 * 4)), VERMILION),
    ],
)
def test_figures_have_the_right_size_and_are_not_blank(mixed, name, size, colour):
    path = mixed.output / name
    image = imread(path)[..., :3]
    assert image.shape[:2] == (size[1], size[0])
    painted = np.isclose(image, to_rgb(colour), atol=1 / 255).all(axis=2).mean()
    assert 0.0005 < painted < 0.5
    assert set(png_chunks(path.read_bytes())) == {"IHDR", "pHYs", "IDAT", "IEND"}  # no text, no time
    assert f"]({name})" in read_page(mixed.output)


def png_chunks(data: bytes) -> list[str]:
    names, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        names.append(data[place + 4 : place + 8].decode())
        place += 12 + length
    return names


def test_the_hub_reads_the_metadata_and_datasets_finds_the_splits_by_it(mixed, tmp_path):
    metadata = DatasetCard.load(mixed.output / "README.md").data
    assert (metadata.license, metadata.language, metadata.pretty_name) == ("other", ["en"], mixed.title)
    assert metadata.size_categories == ["n<1K"]
    shutil.copytree(mixed.corpus, tmp_path / "data", ignore=shutil.ignore_patterns("report.json"))
    shutil.copy(mixed.output / "README.md", tmp_path / "data")
    loaded = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == Counter(
        row["split"] for row in read_rows(mixed.corpus)
    )


@pytest.mark.parametrize(
    ("rows", "category"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (29_000_000, "10M<n<100M"), (10**12, "n>1T")],
)
def test_size_categories_are_the_hubs(rows, category):
    assert size_category(rows) == category


def test_without_tokens_the_card_leaves_them_out(sample_folders, tmp_path):
    describe_corpus(DataCardOptions(sample_folders.corpus, tmp_path / "card"))
    page = read_page(tmp_path / "card")
    assert "token" not in page.lower()
    assert not (tmp_path / "card" / "tokens.png").exists()
    rows = read_rows(sample_folders.corpus)
    assert f"{len(rows)} documents, {sum(map(num_bytes, rows)):,} bytes" in " ".join(page.split())
    assert "No evaluation data was held out." in page
    assert "courtesy of the U.S. National" in " ".join(page.split())


def test_a_missing_corpus_is_reported_in_one_line(run_script_here, tmp_path):
    done = run_script_here("describe_corpus", "--corpus", tmp_path / "none", "--output", tmp_path / "card")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path / 'none'}: not a corpus: it has no report.json; build one with scripts/build_corpus.py\n"
    )
    assert not (tmp_path / "card").exists()


def replace_report(corpus: Path, value: Any) -> None:
    (corpus / "report.json").write_text(json.dumps(value), encoding="utf-8")


def test_files_that_do_not_match_the_report_are_rejected_and_nothing_is_written(mixed, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(mixed.corpus, corpus)
    options = DataCardOptions(corpus, tmp_path / "card")
    report = read_report(corpus)

    def assert_rejected(complaint: str) -> None:
        with pytest.raises(UserError, match=complaint) as error:
            describe_corpus(options)
        assert "\n" not in str(error.value)
        assert {path.name for path in tmp_path.iterdir()} == {"corpus"}

    replace_report(corpus, {"documents": 1})
    assert_rejected("report.json: not the report of a corpus")
    replace_report(corpus, report | {"dropped": {"whim": 1}})
    assert_rejected("unknown reasons whim")
    replace_report(corpus, report)
    file = next((corpus / "train").glob("texts.parquet"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_rejected("texts.parquet: not a Parquet file of a corpus")
    pq.write_table(pa.table({"text": ["a"]}), file)
    assert_rejected("texts.parquet: not a Parquet file of a corpus")
    file.unlink()
    assert_rejected(r"has \d+ documents in \d+ chunks, but report.json counts \d+ in \d+")
    shutil.rmtree(corpus / "train")
    shutil.rmtree(corpus / "validation")
    shutil.rmtree(corpus / "test")
    assert_rejected("has 0 documents")


def test_tokens_of_another_corpus_are_rejected(mixed, sample_folders, tmp_path):
    options = DataCardOptions(mixed.corpus, tmp_path / "card", sample_folders.tokens)
    with pytest.raises(UserError, match="not the tokens of this corpus: its train split has"):
        describe_corpus(options)
    assert not options.output.exists()


def test_missing_tokens_are_an_error_that_names_their_folder(mixed, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path / 'none'}: not a tokenized corpus"):
        describe_corpus(replace(mixed, output=tmp_path / "card", tokens=tmp_path / "none"))
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"names": {"text": "x"}}, "names: text: not an input of .*, which has held, pubmedsample26n0001, .*, texts"),
        ({"context": 8}, "context: must be at least 32, not 8"),
    ],
)
def test_wrong_options_are_rejected(mixed, tmp_path, more, complaint):
    with pytest.raises(UserError, match=complaint):
        describe_corpus(DataCardOptions(mixed.corpus, tmp_path / "card", **more))


@pytest.mark.parametrize("names", [["README.md"], ["README.md", "sources.png", "notes.txt"], ["report.json"]])
def test_a_folder_with_other_files_is_not_replaced(mixed, tmp_path, names):
    output = tmp_path / "card"
    output.mkdir()
    for name in names:
        (output / name).write_text("mine")
    with pytest.raises(UserError, match="holds other files than a data card"):
        describe_corpus(DataCardOptions(mixed.corpus, output))
    assert {path.name: path.read_text() for path in output.iterdir()} == dict.fromkeys(names, "mine")


def test_an_output_that_is_a_file_is_not_replaced(mixed, tmp_path):
    (tmp_path / "card").write_text("mine")
    with pytest.raises(UserError, match="card: is a file, but a data card is a folder"):
        describe_corpus(DataCardOptions(mixed.corpus, tmp_path / "card"))
    assert (tmp_path / "card").read_text() == "mine"
