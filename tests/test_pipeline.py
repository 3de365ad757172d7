"""A stage writes the same bytes on one machine, on Slurm and on Ray, and does not repeat finished work."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import slurm
from folders import contents
from loguru import logger
from paths import REPOSITORY, SAMPLE
from row_files import write_lines

from healthslm.corpus import build as build_module
from healthslm.corpus.build import CorpusOptions, build_corpus
from healthslm.errors import UserError

FOLDERS = ("corpus/", "records/", "signatures/")


def made(root: Path) -> dict[str, bytes]:
    """All files that a build writes, except its logs."""
    return {name: content for name, content in contents(root).items() if name.startswith(FOLDERS)}


def build(root: Path, pubmed: Path = SAMPLE, **options) -> None:
    build_corpus(
        CorpusOptions(output=root / "corpus", pubmed=pubmed, **{"workers": 1, "validation_fraction": 0.1} | options)
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("local")
    build(root)
    return root


@pytest.mark.slow
def test_slurm_writes_the_same_bytes_as_one_machine(local, tmp_path, run_script):
    environment = slurm.install(tmp_path / "slurm")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"pubmed: {SAMPLE}\noutput: corpus\nvalidation_fraction: 0.1\nexecutor: slurm\n"
        "executor_settings: {partition: cpu, time: '01:00:00', mem_per_cpu_gb: 1, cpus_per_task: 1}\n"
    )
    done = run_script("build_corpus", "--recipe", recipe, env=environment)
    assert done.returncode == 0, done.stderr
    assert "submitted to Slurm" in done.stderr
    assert made(tmp_path) == made(local)

    scripts = sorted((tmp_path / "slurm" / "jobs").glob("*.sh"), key=lambda path: int(path.stem))
    jobs = [script for script in scripts if "launch_pickled_pipeline" in script.read_text()]
    names = ["parse", "screen", "select", "write", "finish"]
    for script, name, tasks in zip(jobs, names, [3, 3, 1, 3, 1], strict=True):
        directives = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if "#SBATCH" in line]
        assert {f"job-name={name}", "partition=cpu", "time=01:00:00", "mem-per-cpu=1G", "cpus-per-task=1"} <= set(
            directives
        )
        assert f"array=0-{tasks - 1}" in directives
        assert slurm.bash_syntax_errors(script) == ""
    for earlier, later in zip(jobs, jobs[1:], strict=False):
        assert f"--dependency=afterok:{earlier.stem}" in later.with_suffix(".options").read_text()


def test_a_failed_slurm_job_stops_the_next_jobs_and_records_the_reason(tmp_path, run_script):
    environment = slurm.install(tmp_path / "slurm")
    shutil.copytree(SAMPLE, tmp_path / "pubmed")
    (tmp_path / "pubmed" / "pubmedsample26n0002.xml").write_text("<PubmedArticleSet><Pubmed")
    arguments = ["--pubmed", tmp_path / "pubmed", "--output", tmp_path / "corpus", "--executor", "slurm"]
    arguments += ["--executor-settings", '{"partition": "cpu", "time": "01:00:00"}']
    assert run_script("build_corpus", *arguments, env=environment).returncode == 0
    assert not (tmp_path / "corpus").exists()
    assert "pubmedsample26n0002.xml: damaged XML" in (tmp_path / "corpus.work/logs/parse/failures/00001").read_text()
    assert len(list((tmp_path / "records").glob("*.parquet"))) == 2


def test_slurm_needs_a_partition_and_a_time(tmp_path):
    with pytest.raises(UserError, match="executor_settings: wrong for the executor slurm: .*'time' and 'partition'"):
        build(tmp_path, executor="slurm")


@pytest.mark.slow
def test_ray_writes_the_same_bytes_as_one_machine(local, tmp_path, run_script):
    arguments = ["--pubmed", SAMPLE, "--output", tmp_path / "corpus", "--validation-fraction", 0.1]
    done = run_script("build_corpus", *arguments, "--executor", "ray", "--executor-settings", '{"mem_per_cpu_gb": 0.5}')
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == made(local)


def test_a_damaged_file_does_not_undo_the_work_on_the_others(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "pubmed")
    damaged = [tmp_path / "pubmed" / f"pubmedsample26n000{number}.xml" for number in (2, 3)]
    whole = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"2 of 3 inputs failed: .*0002.xml: damaged XML.*; .*0003.xml: damaged XML"):
        build(tmp_path, tmp_path / "pubmed", workers=2)
    (record_file,) = (tmp_path / "records").iterdir()
    before = record_file.stat()
    for path, content in zip(damaged, whole, strict=True):
        path.write_bytes(content)
    build(tmp_path, tmp_path / "pubmed")
    assert record_file.stat().st_mtime_ns == before.st_mtime_ns  # not parsed again
    assert (tmp_path / "corpus" / "report.json").exists()


def test_an_update_is_added_without_reading_the_other_files_again(local, tmp_path):
    """Their records and signatures are not touched, and the result is that of a build from all three files."""
    pubmed = tmp_path / "pubmed"
    pubmed.mkdir()
    first, second, third = sorted(SAMPLE.glob("*.xml"))
    for path in (first, second):
        shutil.copy(path, pubmed)
    build(tmp_path, pubmed)
    kept = {
        path: path.stat().st_mtime_ns for folder in ("records", "signatures") for path in (tmp_path / folder).iterdir()
    }
    shutil.copy(third, pubmed)
    build(tmp_path, pubmed)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert made(tmp_path) == made(local)


def test_changed_options_rebuild_the_corpus(local, tmp_path):
    shutil.copytree(local, tmp_path / "root")
    root = tmp_path / "root"
    build(root, min_words=60)
    changed = made(root)
    build(root)
    assert made(root) == made(local) != changed


@pytest.mark.parametrize(
    ("version", "rebuilt"),
    [
        ("RECORDS_VERSION", {"records", "signatures", "corpus"}),
        ("SIGNATURES_VERSION", {"signatures", "corpus"}),
        ("CORPUS_VERSION", {"corpus"}),
    ],
)
def test_a_new_format_version_makes_its_files_again_and_those_that_depend_on_them(
    local, tmp_path, monkeypatch, version, rebuilt
):
    root = Path(shutil.copytree(local, tmp_path / "root"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet") if ".work" not in str(path)}
    monkeypatch.setattr(build_module, version, getattr(build_module, version) + 1)
    build(root)
    changed = {path.relative_to(root).parts[0] for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == rebuilt


def test_the_loguru_handlers_of_the_calling_program_are_kept_and_get_no_messages_of_ours(tmp_path):
    messages = []
    handler = logger.add(messages.append, format="{message}")
    try:
        build(tmp_path)
        logger.info("after the build")
    finally:
        logger.remove(handler)
    assert messages == ["after the build\n"]


def test_statistics_and_logs_of_each_task_are_kept(local):
    logs = local / "corpus.work" / "logs"
    for step in ("parse", "screen", "write"):
        assert len(list((logs / step / "stats").glob("*.json"))) == 3
        assert len(list((logs / step / "logs").glob("*.log"))) == 3


def test_one_progress_bar_shows_the_tasks_of_all_steps(tmp_path, run_script):
    arguments = ["--pubmed", SAMPLE, "--output", tmp_path / "corpus", "--validation-fraction", 0.1]
    done = run_script("build_corpus", *arguments, "--workers", 1)
    assert done.returncode == 0, done.stderr
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if "task" in line]
    assert "11/11" in bars[-1]
    assert {line.split("/")[1].split(" ")[0] for line in bars} == {"11"}


def test_a_killed_worker_ends_the_run_with_one_line(tmp_path):
    rows = [{"text": f"{' '.join(f'word{n}x{m}' for m in range(60))}"} for n in range(20_000)]
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    command = [
        sys.executable,
        REPOSITORY / "scripts/build_corpus.py",
        "--sources",
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
    ]
    command += ["--output", tmp_path / "corpus", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = [tmp_path / "signatures" / f".{name}.parquet.partial-*" for name in ("a", "b")]
    while not all(list(pattern.parent.glob(pattern.name)) for pattern in begun):
        assert process.poll() is None
        time.sleep(0.05)
    busiest = max(psutil.Process(process.pid).children(recursive=True), key=lambda child: sum(child.cpu_times()[:2]))
    busiest.kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: a process was killed, probably because memory ran out" in stderr.splitlines()[-1]
    assert not (tmp_path / "corpus").exists()
