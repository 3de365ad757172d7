"""Run a stage with datatrove, on one machine or a cluster: as steps, each with one task per input file.

A step is a datatrove pipeline: a list of blocks that the documents of a task pass through. Tasks share nothing and may
run in any order and in parallel, so every executor writes the same bytes. A `Call` step has a single task, such as a
query over the previous step's output; it runs in the process that started the stage, or as its own job on Slurm.
"""

import importlib.util
import io
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dill
from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger as loguru_logger
from loguru._logger import Core as LoguruCore
from tqdm import tqdm

from healthslm.errors import UserError
from healthslm.files import publish, remove_partials
from healthslm.options import ExecutorOptions

MAX_SHOWN_FAILURES = 10


class Call(PipelineStep):
    """A block that calls a function, for a step with a single task and no stream of documents."""

    name = "call"
    type = "🔗 - QUERY"

    def __init__(self, function: Callable[..., None], *arguments: Any):
        super().__init__()
        self.function = function
        self.arguments = arguments

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        self.function(*self.arguments)


@dataclass(frozen=True)
class Step:
    """One step of a stage: a pipeline of `blocks`, run once per task with the task's number as rank."""

    name: str
    blocks: list[PipelineStep]
    tasks: int
    finished: frozenset[int] = frozenset()
    """Ranks of tasks that an earlier run has finished."""


def run_steps(steps: Sequence[Step], options: ExecutorOptions, logs: Path) -> bool:
    """Run the steps in order. If a task fails, the other tasks of its step still run, and the next steps do not.

    Each task writes its log, statistics and completion marker to `logs/STEP`. The terminal shows one progress bar.

    Returns:
        False if the steps were submitted to Slurm, which runs them after this function has returned.

    Raises:
        UserError: Tasks have failed, for reasons that the user can fix; the message names them.
    """
    steps = [step for step in steps if step.tasks]
    for step in steps:
        shutil.rmtree(logs / step.name, ignore_errors=True)
        for folder in ("completions", "failures"):
            (logs / step.name / folder).mkdir(parents=True)
        for rank in step.finished:
            (logs / step.name / "completions" / f"{rank:05d}").touch()
    with _separate_loguru():
        if options.executor == "slurm":
            _submit(steps, options, logs)
            return False
        _run_with_progress(steps, options, logs)
    return True


@dataclass(frozen=True)
class WorkFolder:
    """A folder next to a stage's output in which a run writes it, and from which an interrupted run resumes."""

    target: Path
    """Where the output is moved once it is complete."""

    @property
    def folder(self) -> Path:
        return self.target.with_name(f"{self.target.name}.work")

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def open(self, fingerprint: str) -> None:
        """Create the folder. An earlier run's files are kept only if that run had the same fingerprint."""
        file = self.folder / "fingerprint"
        if not (file.exists() and file.read_text() == fingerprint and self.output.is_dir()):
            file.unlink(missing_ok=True)  # first, so that no run resumes from a half-removed folder
            shutil.rmtree(self.folder, ignore_errors=True)
            self.output.mkdir(parents=True)
            file.write_text(fingerprint)
        remove_partials(self.output)

    def finished(self, step: str) -> frozenset[int]:
        """Ranks of a step's tasks that an earlier run with the same fingerprint has finished."""
        return frozenset(int(path.name) for path in (self.logs / step / "completions").glob("*"))

    def publish(self) -> None:
        """Move the output to its target and remove everything else but the logs."""
        publish(self.output, self.target)
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()


@contextmanager
def _separate_loguru() -> Iterator[None]:
    """Let datatrove, which replaces all handlers of loguru's global logger, do so without touching the caller's.

    While the block runs, the logger writes to handlers of its own: the log files of datatrove's tasks.
    """
    logger: Any = loguru_logger  # its handlers are in a private attribute
    core = logger._core
    logger._core = LoguruCore()
    try:
        yield
    finally:
        logger._core = core


def _run_with_progress(steps: Sequence[Step], options: ExecutorOptions, logs: Path) -> None:
    with _progress(steps, logs) as bar:
        for step in steps:
            bar.set_description(step.name)
            _run_step(step, options, logs)


def _run_step(step: Step, options: ExecutorOptions, logs: Path) -> None:
    if isinstance(step.blocks[0], Call):
        step.blocks[0]()
        (logs / step.name / "completions" / "00000").touch()
    elif len(step.finished) < step.tasks:
        processes = min(step.tasks, options.workers or os.cpu_count() or 1)
        more = {"workers": processes} if options.executor == "local" else {}
        executor = _make_executor(options.executor, step, options, logs, **more)
        with redirect_stderr(io.StringIO()):
            executor.run()
    _raise_failures(logs / step.name, step.tasks)


def _raise_failures(logs: Path, tasks: int) -> None:
    failures = [path.read_text() for path in sorted((logs / "failures").iterdir())]
    if len(failures) == 1:
        raise UserError(failures[0])
    if failures:
        shown = "; ".join(failures[:MAX_SHOWN_FAILURES])
        more = f"; and {len(failures) - MAX_SHOWN_FAILURES} more" if len(failures) > MAX_SHOWN_FAILURES else ""
        raise UserError(f"{len(failures)} of {tasks} inputs failed: {shown}{more}")
    completed = len(list((logs / "completions").iterdir()))
    if completed < tasks:  # a worker of a cluster has died, which datatrove only logs
        raise UserError(f"{logs}: {tasks - completed} of {tasks} tasks did not finish; run the command again")


class _RecordsFailures(PipelineExecutor):
    """Keeps datatrove's log off the terminal, and records why a task failed so that the other tasks can go on."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        try:
            with redirect_stderr(io.StringIO()):
                return super()._run_for_rank(rank, local_rank, node_rank)
        except UserError as error:
            with self.logging_dir.open(f"failures/{rank:05d}", "w") as file:
                file.write(str(error))
            with self.logging_dir.open(f"stats/{rank:05d}.json", "w") as file:
                file.write("[]")  # Ray's executor sums up the statistics of all tasks
            return PipelineStats()


class _Local(_RecordsFailures, LocalPipelineExecutor):
    """Runs tasks in a pool that notices when a process is killed. datatrove's own pool would wait forever."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                deepcopy(self)._run_for_rank(rank)
            return
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(self.workers, context, initializer=_become_worker) as pool:
            executor = dill.dumps(self)  # pickle cannot serialize datatrove's writers
            tasks = [pool.submit(_run_task, executor, rank) for rank in ranks]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BrokenProcessPool as error:
                reason = "a process was killed, probably because memory ran out"
                raise UserError(f"{reason}; run the command again with fewer --workers") from error
            finally:
                pool.shutdown(cancel_futures=True)


def _run_task(executor: bytes, rank: int) -> None:
    dill.loads(executor)._run_for_rank(rank, local_rank=1)


def _become_worker() -> None:
    """Keep a process of the pool off the terminal, and end it when its parent is killed.

    Otherwise it would keep writing files and completion markers while the next run is at work.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class _Ray(_RecordsFailures, RayPipelineExecutor):
    pass


class _Slurm(_RecordsFailures, SlurmPipelineExecutor):
    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        stats = super()._run_for_rank(rank, local_rank, node_rank)
        if self.logging_dir.exists(f"failures/{rank:05d}"):
            sys.exit(1)  # so that the jobs that depend on this one do not start
        return stats


def _make_executor(kind: str, step: Step, options: ExecutorOptions, logs: Path, **more: Any) -> PipelineExecutor:
    """Build datatrove's executor for a step, with the user's settings."""
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("executor ray needs the package ray: pip install -e '.[ray]'")
    classes = {"local": _Local, "ray": _Ray, "slurm": _Slurm}
    settings = {"workers": options.workers or -1, "skip_completed": True} | more | options.executor_settings
    try:
        return classes[kind](step.blocks, tasks=step.tasks, logging_dir=str(logs / step.name), **settings)
    except TypeError as error:  # its message names the missing or unknown setting
        raise UserError(f"executor_settings: wrong for the executor {kind}: {error}") from error


def _submit(steps: Sequence[Step], options: ExecutorOptions, logs: Path) -> None:
    """Submit the steps to Slurm as a chain of jobs; each starts when the previous one has succeeded."""
    executor: PipelineExecutor | None = None
    environment = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    for step in steps:
        more = {"job_name": step.name, "env_command": environment, "depends": executor}
        executor = _make_executor("slurm", step, options, logs, **more)
    if executor is not None:
        executor.run()


@contextmanager
def _progress(steps: Sequence[Step], logs: Path) -> Iterator[tqdm]:
    """Show a progress bar over the tasks of all steps, which counts their marker files: any executor writes these."""
    stopped = threading.Event()
    markers = [logs / step.name / folder for step in steps for folder in ("completions", "failures")]

    def watch(bar: tqdm) -> None:
        while not stopped.wait(0.5):
            show(bar)
        show(bar)

    def show(bar: tqdm) -> None:
        bar.update(sum(len(os.listdir(folder)) for folder in markers) - bar.n)

    initial = sum(len(step.finished) for step in steps)
    with tqdm(total=sum(step.tasks for step in steps), initial=initial, unit="task", file=sys.stderr) as bar:
        watcher = threading.Thread(target=watch, args=(bar,))
        watcher.start()
        try:
            yield bar
        finally:
            stopped.set()
            watcher.join()
