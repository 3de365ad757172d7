"""A run killed while it builds or tokenizes a corpus leaves no half-written files, and resumes to the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from paths import REPOSITORY, SAMPLE
from random_documents import random_rows
from row_files import write_rows
from waiting import wait_until

from healthslm.corpus.build import CorpusOptions, build_corpus

OUTPUTS = {"build_corpus": ("records", "signatures", "corpus"), "tokenize_corpus": ("tokens",)}
"""The folders that each script writes."""

TASKS = {"parse": 3, "screen": 7, "select": 1, "write": 7, "finish": 1}
"""The steps that build the corpus of `killable`, in order, with their numbers of tasks."""
STAGES = [*TASKS, "tokenize"]
MOMENTS = list(zip(STAGES, random.Random(26).sample(range(1, 100), len(STAGES)), strict=True))
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

    def start_stage(self, root: Path, stage: str) -> subprocess.Popen:
        """Start the script that has this stage, with the corpus that tokenization reads."""
        if stage == "tokenize":
            shutil.copytree(self.whole / "corpus", root / "corpus")
        return self.start(script_of(stage), root)

    def run_to_end(self, root: Path, stage: str) -> None:
        """Run the script that has this stage once more."""
        assert self.start(script_of(stage), root).wait() == 0, (root / f"{script_of(stage)}.log").read_text()

    def kill(self, root: Path, stage: str, seconds: float) -> None:
        """Run until `seconds` after the stage has begun, then kill all processes."""
        process = self.start_stage(root, stage)
        wait_until(lambda: has_begun(root, stage))
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def script_of(stage: str) -> str:
    return "tokenize_corpus" if stage == "tokenize" else "build_corpus"


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outputs(root: Path, script: str = "build_corpus") -> dict[str, bytes]:
    """All files that a script writes, except its logs."""
    names = tuple(f"{folder}/" for folder in OUTPUTS[script])
    return {name: content for name, content in contents(root).items() if name.startswith(names)}


def assert_that_nothing_is_half_written(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Every file is complete or missing, and so are the corpus and the tokens as a whole."""
    final = {name: content for name, content in found.items() if ".partial-" not in name}
    assert final.items() <= whole.items()
    for folder in ("corpus/", "tokens/"):
        names = {name for name in final if name.startswith(folder)}
        assert names in (set(), {name for name in whole if name.startswith(folder)})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stage", "percent"), MOMENTS)
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(killable, tmp_path, stage, percent):
    script = script_of(stage)
    whole = outputs(killable.whole, script)
    for attempt in range(8):
        root = tmp_path / str(attempt)
        killable.kill(root, stage, killable.seconds[stage] * percent / 100 / 2**attempt)
        assert_that_nothing_is_half_written(outputs(root, script), whole)
        if is_under_way(root, stage):
            break
    else:
        raise AssertionError(f"{stage} always ended before the kill")
    killable.run_to_end(root, stage)
    assert outputs(root, script) == whole
    assert not list(root.rglob("*.partial-*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["screen", "write", "tokenize"])
def test_workers_end_when_their_parent_is_killed_and_do_not_disturb_the_next_run(killable, tmp_path, stage):
    """Otherwise they could overwrite files of the next run, which may have other options."""
    process = killable.start_stage(tmp_path, stage)
    wait_until(lambda: marks(tmp_path, stage, "logs") >= 2)
    workers = [worker for child in psutil.Process(process.pid).children() for worker in child.children()]
    done = marks(tmp_path, stage)
    process.kill()  # not its workers
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    still_done = marks(tmp_path, stage)
    killable.run_to_end(tmp_path, stage)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert len(workers) == 2 and not alive
    assert still_done == done
    assert outputs(tmp_path, script_of(stage)) == outputs(killable.whole, script_of(stage))
    assert not list(tmp_path.rglob("*.partial-*"))


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
