"""The pipeline from NCBI's server to tokens loses nothing, adds nothing and leaves no half-written files, even if
downloads fail or a run is killed."""

import filecmp
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ncbi_server import serving, write_pubmed_file
from tokenizers import Tokenizer

from healthslm.corpus.build import CorpusOptions, build_corpus

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "sample" / "pubmed"
SPLITS = ("train", "validation", "test")
OUTPUTS = ("records", "signatures", "corpus", "tokens")
MAY_BE_SCRUBBED = re.compile(r"@|©|\(c\)|\b(copyright|published|email|rights)\b", re.IGNORECASE)

# The server has a file of that name, so following any of these links would download a valid file.
ODD_LINKS = [
    "../updatefiles/pubmed26n0004.xml.gz",
    "../../pubmed26n0001.xml.gz",
    "/etc/pubmed26n0001.xml.gz",
    "http://127.0.0.1:9/pubmed26n0001.xml.gz",
    "%2e%2e%2fpubmed26n0001.xml.gz",
    "..\\pubmed26n0001.xml.gz",
    "pubmed26n0001.xml.gz;rm -rf .xml.gz",
    "pubmed26n00001.xml.gz",
    "-pubmed26n0001.xml.gz",
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@cache
def english_words() -> list[str]:
    document = ElementTree.parse(SAMPLE / "pubmedsample26n0001.xml")
    texts = (" ".join(section.itertext()) for section in document.iter("AbstractText"))
    return sorted({word for text in texts for word in re.findall(r"\b[a-z]{2,}\b", text)})


def random_text(seed: object) -> str:
    """Random English words, different for every seed."""
    return f"{' '.join(random.Random(str(seed)).choices(english_words(), k=150)).capitalize()}."


def random_rows(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}:{number}", "kind": "text", "title": f"Text {number}", "text": random_text((name, number))}
        for number in range(count)
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:  # the rows may hold other line breaks than those between them
        return [json.loads(line) for line in file]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# From the server to tokens


@dataclass(frozen=True)
class Input:
    """What a run starts from."""

    served: Path
    """A folder in NCBI's layout."""
    other_text: Path
    held_out: list[Path]
    vocab_size: int


def sample_input(root: Path) -> Input:
    """The embedded sample under NCBI's names, and random text."""
    for number, folder in enumerate(("baseline", "updatefiles", "updatefiles"), start=1):
        content = (SAMPLE / f"pubmedsample26n000{number}.xml").read_bytes()
        write_pubmed_file(root / "ncbi" / folder / f"pubmed26n000{number}.xml.gz", content)
    held_out = root / "questions.jsonl"
    held_out.parent.mkdir(exist_ok=True)
    questions = [{"pmid": str(99_000_001 + number), "CONTEXTS": [random_text(f"q{number}")]} for number in range(5)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in questions))
    rows = random_rows("other", 100) + leaks(held_out)
    return Input(root / "ncbi", write_rows(root / "other.parquet", rows), [held_out], 600)


def real_input(root: Path, test_data: Path, numbers: range) -> Input:
    """NCBI's files and a sample of other real text, with PubMedQA's questions held out."""
    for path in test_data.glob("pubmed/*/pubmed26n*"):
        if int(path.name[9:13]) in numbers:
            target = root / "ncbi" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    held_out = sorted((test_data / "pubmedqa").glob("*.jsonl"))
    rows = pq.read_table(test_data / "corpus" / "validation.parquet").to_pylist()[:1000]
    return Input(root / "ncbi", write_rows(root / "other.parquet", rows + leaks(held_out[0])), held_out, 2000)


def leaks(held_out: Path) -> list[dict[str, Any]]:
    """Documents that must not reach training: with a held-out PMID, with a held-out text, and with one inside."""
    first, second, third = read_lines(held_out)[:3]
    return [
        {"id": first["pmid"], "kind": "abstract", "text": random_text("leak by PMID")},
        {"id": "leak:2", "kind": "text", "text": "\n".join(second["CONTEXTS"])},
        {
            "id": "leak:3",
            "kind": "text",
            "text": f"{random_text('before')} {third['CONTEXTS'][0]} {random_text('after')}",
        },
    ]


@pytest.mark.parametrize(
    "name",
    [
        "sample",
        "small real files",
        pytest.param("a file of the baseline", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_the_pipeline_from_ncbis_server_to_tokens_loses_and_adds_nothing(name, tmp_path, request, run_script):
    if name == "sample":
        given = sample_input(tmp_path)
    else:
        numbers = range(3, 6) if name == "small real files" else range(2, 6)
        given = real_input(tmp_path, request.getfixturevalue("test_data"), numbers)
    root = tmp_path / "home"
    run_all_stages(given, root, run_script, workers=2 if name == "a file of the baseline" else 1)

    assert_that_the_files_arrived(given.served, root / "pubmed")
    files = {path.name.removesuffix(".xml.gz"): read_xml(path) for path in sorted(root.glob("pubmed/*/*.xml.gz"))}
    assert_that_updates_were_applied(files, root)
    assert_that_texts_are_of_the_newest_records(files, root)
    assert_that_held_out_text_is_not_in_training(given.held_out, root)
    assert_that_tokens_spell_the_corpus(root)


def run_all_stages(
    given: Input, root: Path, run_script: Callable[..., subprocess.CompletedProcess[str]], workers: int
) -> None:
    def run(script: str, *arguments: object) -> str:
        done = run_script(script, *arguments, env={"NO_PROXY": "127.0.0.1"})
        assert done.returncode == 0, done.stderr
        return done.stderr

    paths = sorted(str(path.relative_to(given.served)) for path in given.served.glob("*/*.xml.gz"))
    with serving(given.served) as server:
        server.odd_links = ODD_LINKS
        server.faults[paths[0]] = ["cut"]
        server.faults[paths[-1]] = ["wrong bytes"]
        log = run("download_pubmed", "--files", "all", "--output", root / "pubmed", "--base-url", server.base_url)
        tries = Counter(path for path in server.requests if path.endswith(".xml.gz"))
    assert tries == Counter(paths) + Counter([paths[0], paths[-1]])
    for link in ODD_LINKS:
        assert f"ignored {link!r}" in log

    corpus, tokenizer, tokens = root / "corpus", root / "tokenizer", root / "tokens"
    arguments = ["--pubmed", root / "pubmed", "--sources", given.other_text, "--held-out", *given.held_out]
    arguments += ["--validation-fraction", 0.05, "--test-fraction", 0.05, "--write-dropped"]
    run("build_corpus", *arguments, "--output", corpus, "--workers", workers)
    run("train_tokenizer", "--corpus", corpus, "--output", tokenizer, "--vocab-size", given.vocab_size)
    arguments = ["--corpus", corpus, "--tokenizer", tokenizer, "--workers", workers]
    run("tokenize_corpus", *arguments, "--output", tokens)


def assert_that_the_files_arrived(served: Path, pubmed: Path) -> None:
    names = sorted(path.relative_to(served) for path in served.rglob("pubmed26n*"))
    assert sorted(path.relative_to(pubmed) for path in pubmed.rglob("*") if path.is_file()) == names
    for name in names:
        assert filecmp.cmp(served / name, pubmed / name, shallow=False)


@dataclass(frozen=True)
class XmlRecord:
    pmid: int
    version: int
    deleted: bool
    title: ElementTree.Element | None
    sections: list[ElementTree.Element]


def read_xml(path: Path) -> list[XmlRecord]:
    """The records of a file, in order, parsed as one document."""
    records = []
    for child in ElementTree.fromstring(gzip.decompress(path.read_bytes())):
        if child.tag == "DeleteCitation":
            records += [XmlRecord(*number_and_version(pmid), True, None, []) for pmid in child]
            continue
        assert child.tag in ("PubmedArticle", "PubmedBookArticle"), child.tag
        citation = child[0]
        article = citation if citation.tag == "BookDocument" else citation.find("Article")
        title, sections = article.find("ArticleTitle"), article.findall("Abstract/AbstractText")
        records.append(XmlRecord(*number_and_version(citation.find("PMID")), False, title, sections))
    return records


def number_and_version(pmid: ElementTree.Element) -> tuple[int, int]:
    return int(pmid.text), int(pmid.get("Version", "1"))


def newest_records(files: dict[str, list[XmlRecord]]) -> dict[int, tuple[str, XmlRecord]]:
    """PubMed's state after all files: for each PMID, the last record of the highest version, even if a deletion."""
    state: dict[int, tuple[str, XmlRecord]] = {}
    for file, records in files.items():
        for record in records:
            if record.pmid not in state or record.version >= state[record.pmid][1].version:
                state[record.pmid] = (file, record)
    return state


def assert_that_updates_were_applied(files: dict[str, list[XmlRecord]], root: Path) -> None:
    state = newest_records(files)
    expected = {file: Counter() for file in files}
    for file, records in files.items():
        for record in records:
            _, newest = state[record.pmid]
            if record.deleted:
                expected[file]["deletion"] += 1
            elif newest.deleted:
                expected[file]["deleted"] += 1
            elif record is not newest:
                expected[file]["superseded"] += 1

    report = json.loads((root / "corpus" / "report.json").read_text())
    outdated = ("deletion", "deleted", "superseded")
    for part in report["files"]:
        if part["name"] in files:
            assert part["read"] == len(files[part["name"]])
            dropped = Counter({reason: part["dropped"].get(reason, 0) for reason in outdated})
            assert dropped == expected[part["name"]], part["name"]
    assert {part["name"] for part in report["files"]} == {*files, "other"}
    for part in (report, *report["files"]):
        assert part["read"] == part["kept"] + sum(part["dropped"].values())

    current = {
        (pmid, file)
        for file in files
        for pmid in (record_pmids(root / "records" / f"{file}.parquet") - dropped_pmids(root, file, outdated))
    }
    assert current == {(pmid, file) for pmid, (file, record) in state.items() if not record.deleted}
    kept = {(row["id"], row["file"]) for row in corpus_rows(root) if row["file"] in files}
    assert kept <= {(f"pmid:{pmid}", file) for pmid, file in current}
    assert len(kept) == sum(part["kept"] for part in report["files"] if part["name"] in files) > 0


def record_pmids(path: Path) -> Counter[int]:
    return Counter(pq.read_table(path, columns=["pmid"])["pmid"].to_pylist())


def dropped_pmids(root: Path, file: str, reasons: tuple[str, ...]) -> Counter[int]:
    path = root / "corpus" / "dropped" / f"{file}.parquet"
    rows = pq.read_table(path, columns=["id", "reason"]).to_pylist() if path.exists() else []
    return Counter(int(row["id"].removeprefix("pmid:")) for row in rows if row["reason"] in reasons)


def corpus_rows(root: Path) -> Iterator[dict[str, Any]]:
    """All rows of the corpus, in the order of the files' names in each split, with their split and file."""
    for split in SPLITS:
        for path in sorted((root / "corpus" / split).glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                yield row | {"split": split, "file": path.stem}


def assert_that_texts_are_of_the_newest_records(files: dict[str, list[XmlRecord]], root: Path) -> None:
    """Compare titles without markup, and abstracts of a single section without markup or text that is scrubbed."""
    state = newest_records(files)
    titles = texts = 0
    for row in corpus_rows(root):
        if row["file"] not in files or row["part"] > 1:
            continue
        newest = state[int(row["id"].removeprefix("pmid:"))][1]
        title, sections = newest.title, newest.sections
        if len(title) == 0:
            titles += 1
            assert without_brackets(row["title"]) == without_brackets(title.text), row["id"]
        if len(sections) != 1 or len(sections[0]) > 0 or sections[0].get("Label"):
            continue
        if not MAY_BE_SCRUBBED.search(sections[0].text) and len(sections[0].text.encode()) <= 4096:
            texts += 1
            assert row["text"].split() == sections[0].text.split(), row["id"]
    assert titles > 0 and texts > 0


def without_brackets(title: str) -> str:
    """The title without white space, full stops and the brackets of a translation."""
    return re.sub(r"[][.\s]", "", title)


def assert_that_held_out_text_is_not_in_training(held_out: list[Path], root: Path) -> None:
    questions = [question for path in held_out for question in read_lines(path)]
    pmids = {f"pmid:{question['pmid']}" for question in questions}
    contexts = [context.split() for question in questions for context in question["CONTEXTS"]]
    # Contexts are found by their first eight words, then compared word by word. Those of fewer than 13 words may occur
    # in any text.
    by_start = {tuple(words[:8]): words for words in contexts if len(words) >= 13}
    for row in corpus_rows(root):
        assert row["id"] not in pmids
        words = row["text"].split()
        for start in range(len(words) - 7):
            context = by_start.get(tuple(words[start : start + 8]))
            assert context is None or words[start : start + len(context)] != context, row["id"]
    removed = pq.read_table(root / "corpus" / "dropped" / "other.parquet", columns=["id", "reason"]).to_pylist()
    reasons = {row["id"]: row["reason"] for row in removed}
    assert [reason for identifier, reason in reasons.items() if identifier in pmids] == ["held_out"]
    assert (reasons["leak:2"], reasons["leak:3"]) == ("held_out", "held_out_overlap")


def assert_that_tokens_spell_the_corpus(root: Path) -> None:
    """Read the tokens with NumPy and the tokenizers library only."""
    tokenizer = Tokenizer.from_file(str(root / "tokens" / "tokenizer" / "tokenizer.json"))
    info = json.loads((root / "tokens" / "tokens.json").read_text())
    rows = list(corpus_rows(root))
    for split in SPLITS:
        decoded = []
        for path in sorted((root / "tokens" / split).glob("*.tokens.npy")):
            tokens, ends = np.load(path), np.load(str(path).replace(".tokens.", ".ends."))
            documents = [tokens[start:end].tolist() for start, end in pairwise([0, *ends])]
            assert all(document[0] == info["separator_id"] for document in documents)
            assert not any(info["separator_id"] in document[1:] for document in documents)
            decoded += tokenizer.decode_batch([document[1:] for document in documents], skip_special_tokens=False)
        expected = [
            f"{row['title']}\n{row['text']}" if row["title"] else row["text"] for row in rows if row["split"] == split
        ]
        assert decoded == expected
        assert len(expected) > 0
        assert info["splits"][split]["documents"] == len(expected)


# Runs that are killed


TASKS = {"parse": 3, "screen": 7, "select": 1, "write": 7, "finish": 1}
"""The steps that build the corpus of `killable`, in order, with their numbers of tasks."""
STAGES = [*TASKS, "tokenize"]
_KILLED = ["parse", "screen", "select", "write", "finish", "tokenize"]
MOMENTS = list(zip(_KILLED, random.Random(26).sample(range(1, 100), len(_KILLED)), strict=True))
"""When to kill: in each stage, after a random percentage of its duration."""


@dataclass(frozen=True)
class Killable:
    """A run of several seconds that can be started in any folder, and its result if nothing kills it."""

    inputs: Path
    whole: Path
    seconds: dict[str, float]
    """How long each stage takes."""

    def start(self, script: str, root: Path) -> subprocess.Popen:
        """Start a stage in `root`, in its own process group."""
        inputs = {
            "build_corpus": ["--pubmed", SAMPLE, "--sources", self.inputs / "texts"],
            "tokenize_corpus": ["--corpus", root / "corpus", "--tokenizer", self.inputs / "tokenizer"],
        }[script]
        output = root / {"build_corpus": "corpus", "tokenize_corpus": "tokens"}[script]
        command = [sys.executable, REPOSITORY / "scripts" / f"{script}.py", *inputs, "--output", output, "--workers", 2]
        root.mkdir(exist_ok=True)
        with (root / f"{script}.log").open("ab") as log:
            return subprocess.Popen(list(map(str, command)), start_new_session=True, stderr=log)

    def run_to_end(self, script: str, root: Path) -> None:
        assert self.start(script, root).wait() == 0, (root / f"{script}.log").read_text()

    def run(self, root: Path) -> None:
        """Run all stages to their end."""
        for script in ("build_corpus", "tokenize_corpus"):
            self.run_to_end(script, root)

    def kill(self, root: Path, stage: str, seconds: float) -> None:
        """Run until `seconds` after the stage has begun, then kill all processes."""
        if stage == "tokenize":
            self.run_to_end("build_corpus", root)
        process = self.start("tokenize_corpus" if stage == "tokenize" else "build_corpus", root)
        wait_until(lambda: has_begun(root, stage))
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("timed out")


def marks(root: Path, stage: str, kind: str = "completions") -> int:
    """Number of tasks of a stage that have finished, or with `kind="logs"`, that have started."""
    folder = root / ("tokens.work" if stage == "tokenize" else "corpus.work") / "logs" / stage / kind
    return len(list(folder.glob("*")))


def has_begun(root: Path, stage: str) -> bool:
    if stage in ("select", "finish"):
        before = STAGES[STAGES.index(stage) - 1]
        return marks(root, before) == TASKS[before]
    return marks(root, stage, "logs") > 0


def is_under_way(root: Path, stage: str) -> bool:
    if stage == "tokenize":
        return has_begun(root, stage) and not (root / "tokens").exists()
    return has_begun(root, stage) and marks(root, stage) < TASKS[stage]


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory, run_script) -> Killable:
    root = tmp_path_factory.mktemp("killable")
    for number in range(4):
        write_rows(root / "inputs" / "texts" / f"made-{number}.parquet", random_rows(f"made-{number}", 600))
    run = Killable(root / "inputs", root / "whole", seconds={})
    measure(run, "build_corpus", TASKS)
    arguments = ["--corpus", run.whole / "corpus", "--output", run.inputs / "tokenizer", "--vocab-size", 1000]
    assert run_script("train_tokenizer", *arguments).returncode == 0
    measure(run, "tokenize_corpus", ["tokenize"])
    return run


def measure(run: Killable, script: str, stages: Iterable[str]) -> None:
    process = run.start(script, run.whole)
    for stage in stages:
        wait_until(lambda stage=stage: has_begun(run.whole, stage) or process.poll() is not None)
        begun = time.monotonic()
        wait_until(lambda stage=stage: not is_under_way(run.whole, stage) or process.poll() is not None)
        run.seconds[stage] = time.monotonic() - begun
    assert process.wait() == 0, (run.whole / f"{script}.log").read_text()


def outputs(root: Path) -> dict[str, bytes]:
    """All files that the stages write, except their logs."""
    names = tuple(f"{folder}/" for folder in OUTPUTS)
    return {name: content for name, content in contents(root).items() if name.startswith(names)}


def assert_that_nothing_is_half_written(root: Path, whole: dict[str, bytes]) -> None:
    """Every file is complete or missing, and so are the corpus and the tokens as a whole."""
    final = {name: content for name, content in outputs(root).items() if ".partial-" not in name}
    assert final.items() <= whole.items()
    for folder in ("corpus/", "tokens/"):
        names = {name for name in final if name.startswith(folder)}
        assert names in (set(), {name for name in whole if name.startswith(folder)})


def assert_that_the_run_ended_well(root: Path, whole: dict[str, bytes]) -> None:
    assert outputs(root) == whole
    assert not list(root.rglob("*.partial-*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stage", "percent"), MOMENTS)
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(killable, tmp_path, stage, percent):
    whole = outputs(killable.whole)
    for attempt in range(8):
        root = tmp_path / str(attempt)
        killable.kill(root, stage, killable.seconds[stage] * percent / 100 / 2**attempt)
        assert_that_nothing_is_half_written(root, whole)
        if is_under_way(root, stage):
            break
    else:
        raise AssertionError(f"{stage} always ended before the kill")
    killable.run(root)
    assert_that_the_run_ended_well(root, whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["screen", "write", "tokenize"])
def test_workers_end_when_their_parent_is_killed_and_do_not_disturb_the_next_run(killable, tmp_path, stage):
    """Otherwise they could overwrite files of the next run, which may have other options."""
    if stage == "tokenize":
        killable.run_to_end("build_corpus", tmp_path)
    process = killable.start("tokenize_corpus" if stage == "tokenize" else "build_corpus", tmp_path)
    wait_until(lambda: marks(tmp_path, stage, "logs") >= 2)
    workers = [worker for child in psutil.Process(process.pid).children() for worker in child.children()]
    done = marks(tmp_path, stage)
    process.kill()  # not its workers
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    still_done = marks(tmp_path, stage)
    killable.run(tmp_path)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert len(workers) == 2 and not alive
    assert still_done == done
    assert_that_the_run_ended_well(tmp_path, outputs(killable.whole))


KILLED_BUILD = """
import os, re, signal, sys
from pathlib import Path
from healthslm.corpus.build import CorpusOptions, build_corpus

output, pubmed, min_words, operation, path = sys.argv[1:]

def watch(event, arguments):
    if event == operation and re.search(path, str(arguments[0])):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
sizes = {"min_words": int(min_words), "validation_fraction": 0.1}
build_corpus(CorpusOptions(output=Path(output), pubmed=Path(pubmed), workers=1, **sizes))
"""


def build_until(root: Path, operation: str, path: str, min_words: int = 20) -> None:
    """Build the sample's corpus, and kill the process just before it renames or removes a path that matches."""
    arguments = [str(root / "corpus"), str(SAMPLE), str(min_words), operation, path]
    done = subprocess.run([sys.executable, "-c", KILLED_BUILD, *arguments], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == -signal.SIGKILL


def build_sample(root: Path, min_words: int = 20) -> dict[str, bytes]:
    sizes = {"min_words": min_words, "validation_fraction": 0.1}
    build_corpus(CorpusOptions(output=root / "corpus", pubmed=SAMPLE, workers=1, **sizes))
    return outputs(root)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("older")
    build_sample(root, min_words=60)
    return root


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return build_sample(tmp_path_factory.mktemp("newer"))


@pytest.mark.parametrize(
    ("operation", "path", "remaining"),
    [
        ("os.rename", r"\.partial-\w+/report\.json$", "older"),
        ("os.rmdir", r"/\.report\.json\.partial-\w+$", "older"),
        ("os.rename", r"/corpus\.work/output$", None),  # the older is moved away, the newer not yet in place
        ("os.rmdir", r"/corpus\.work/output\.old$", "newer"),  # where the older is
    ],
)
def test_a_run_killed_while_it_replaces_a_corpus_resumes_to_the_same_bytes(
    older, newer, tmp_path, operation, path, remaining
):
    root = tmp_path / "root"
    shutil.copytree(older, root)
    build_until(root, operation, path)
    found = {name: content for name, content in outputs(root).items() if name.startswith("corpus/")}
    everything = {"older": outputs(older), "newer": newer, None: {}}[remaining]
    assert found == {name: content for name, content in everything.items() if name.startswith("corpus/")}
    assert build_sample(root) == newer
    assert not list(root.rglob("*.partial-*"))


def test_a_run_killed_while_it_removes_another_runs_work_leaves_nothing_to_resume_from(newer, tmp_path):
    build_until(tmp_path, "os.rename", r"\.partial-\w+/report\.json$")
    build_until(tmp_path, "shutil.rmtree", r"/corpus\.work$", min_words=60)
    assert not (tmp_path / "corpus.work" / "key").exists()  # removed first, because the order of the rest is undefined
    assert build_sample(tmp_path) == newer
