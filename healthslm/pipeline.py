"""Running a stage as steps of tasks, one task an input file, on one machine or a cluster, by datatrove.

A step is a datatrove pipeline: a list of blocks through which the documents of a task pass. Its tasks share nothing and
run in any order and number at once, so every executor gives the same bytes. A step of a single task (a query over the
output of the step before, say) runs in the process that started the stage, or as a job of its own on Slurm.
"""

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
import loguru
from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from tqdm import tqdm

from healthslm.errors import UserError
from healthslm.files import publish, remove_partials
from healthslm.options import ExecutorOptions

# datatrove logs to the terminal from its import on; the log of a run lies in its folder of logs.
loguru.logger.remove()

SHOWN_FAILURES = 10


class Call(PipelineStep):
    """A block that calls a function: a step of a single task that is no stream of documents."""

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
    """What a stage does next: `tasks` runs of the pipeline `blocks`, each with a rank of its own."""

    name: str
    blocks: list[PipelineStep]
    tasks: int
    finished: frozenset[int] = frozenset()
    """Ranks of the tasks whose output stands already, from an earlier run."""


def run_steps(steps: Sequence[Step], options: ExecutorOptions, logs: Path) -> bool:
    """Run the steps one after the other; where a task fails, the other tasks of its step are still done.

    Log, statistics and completion marker of each task go to `logs/STEP`; the terminal shows one progress bar.

    Returns:
        False where the steps have only been handed to Slurm, which runs them after this function returns.

    Raises:
        UserError: tasks have failed for a reason that the user can mend; names each.
    """
    steps = [step for step in steps if step.tasks]
    for step in steps:
        shutil.rmtree(logs / step.name, ignore_errors=True)
        for folder in ("completions", "failures"):
            (logs / step.name / folder).mkdir(parents=True)
        for rank in step.finished:
            (logs / step.name / "completions" / f"{rank:05d}").touch()
    if options.executor == "slurm":
        _submit(steps, options, logs)
        return False
    with _progress(steps, logs) as bar:
        for step in steps:
            bar.set_description(step.name)
            _run_step(step, options, logs)
    return True


@dataclass(frozen=True)
class Workplace:
    """A folder beside a stage's output where a run makes it, and goes on with it when it was killed."""

    target: Path
    """The output's name, under which it appears when it is whole."""

    @property
    def folder(self) -> Path:
        return self.target.with_name(f"{self.target.name}.work")

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def open(self, key: str) -> None:
        """Make the folder; what a run has left there that made something else, of another `key`, goes."""
        key_file = self.folder / "key"
        if not (key_file.exists() and key_file.read_text() == key and self.output.is_dir()):
            key_file.unlink(missing_ok=True)  # first, so that nobody goes on with what is half removed
            shutil.rmtree(self.folder, ignore_errors=True)
            self.output.mkdir(parents=True)
            key_file.write_text(key)
        remove_partials(self.output)

    def finished(self, step: str) -> frozenset[int]:
        """Ranks of the tasks of a step that an earlier run with the same key has finished."""
        return frozenset(int(path.name) for path in (self.logs / step / "completions").glob("*"))

    def close(self) -> None:
        """Put the output under its name; of the rest, the logs stay."""
        publish(self.output, self.target)
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()


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
        shown = "; ".join(failures[:SHOWN_FAILURES])
        more = f"; and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
        raise UserError(f"{len(failures)} of {tasks} inputs failed: {shown}{more}")
    completed = len(list((logs / "completions").iterdir()))
    if completed < tasks:  # a worker of a cluster has died; datatrove only writes so into the log
        raise UserError(f"{logs}: {tasks - completed} of {tasks} tasks did not end; run the command again to do them")


class _NotesFailures(PipelineExecutor):
    """Keeps datatrove's log off the terminal, and notes why a task failed, so that the tasks beside it go on."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        try:
            with redirect_stderr(io.StringIO()):
                return super()._run_for_rank(rank, local_rank, node_rank)
        except UserError as error:
            with self.logging_dir.open(f"failures/{rank:05d}", "w") as file:
                file.write(str(error))
            with self.logging_dir.open(f"stats/{rank:05d}.json", "w") as file:
                file.write("[]")  # Ray's executor adds up those of all tasks
            return PipelineStats()


class _Local(_NotesFailures, LocalPipelineExecutor):
    """Runs tasks in a pool that notices when one of its processes is killed; datatrove's own waits for it for ever."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                deepcopy(self)._run_for_rank(rank)
            return
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(self.workers, context, initializer=_become_worker) as pool:
            executor = dill.dumps(self)  # the standard pickle does not know datatrove's writers
            tasks = [pool.submit(_run_task, executor, rank) for rank in ranks]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BrokenProcessPool as error:
                reason = "a process was killed, perhaps for want of memory"
                raise UserError(f"{reason}: run the command again, with fewer --workers") from error
            finally:
                pool.shutdown(cancel_futures=True)


def _run_task(executor: bytes, rank: int) -> None:
    dill.loads(executor)._run_for_rank(rank, local_rank=1)


def _become_worker() -> None:
    """Keep a process of the pool off the terminal, and have it end when the one that started it is killed.

    What it went on writing, and its mark that the task is done, would get in the way of the next run.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class _Ray(_NotesFailures, RayPipelineExecutor):
    pass


class _Slurm(_NotesFailures, SlurmPipelineExecutor):
    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        stats = super()._run_for_rank(rank, local_rank, node_rank)
        if self.logging_dir.exists(f"failures/{rank:05d}"):
            sys.exit(1)  # jobs that depend on this one are not to start
        return stats


def _make_executor(kind: str, step: Step, options: ExecutorOptions, logs: Path, **more: Any) -> PipelineExecutor:
    """datatrove's executor for a step, with the user's settings."""
    classes = {"local": _Local, "ray": _Ray, "slurm": _Slurm}
    settings = {"workers": options.workers or -1, "skip_completed": True} | more | options.executor_settings
    try:
        return classes[kind](step.blocks, tasks=step.tasks, logging_dir=str(logs / step.name), **settings)
    except TypeError as error:  # names the setting that is missing, or that there is none of
        raise UserError(f"executor_settings do not fit the executor {kind}: {error}") from error


def _submit(steps: Sequence[Step], options: ExecutorOptions, logs: Path) -> None:
    """Hand the steps to Slurm as a chain of jobs, each of which begins when the one before has ended well."""
    executor = None
    environment = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    for step in steps:
        more = {"job_name": step.name, "env_command": environment, "depends": executor}
        executor = _make_executor("slurm", step, options, logs, **more)
    executor.run()


@contextmanager
def _progress(steps: Sequence[Step], logs: Path) -> Iterator[tqdm]:
    """Show how many tasks of all steps have ended by the marks that they leave, which works for every executor."""
    stopped = threading.Event()
    marks = [logs / step.name / folder for step in steps for folder in ("completions", "failures")]

    def watch(bar: tqdm) -> None:
        while not stopped.wait(0.5):
            show(bar)
        show(bar)

    def show(bar: tqdm) -> None:
        bar.update(sum(len(os.listdir(folder)) for folder in marks) - bar.n)

    initial = sum(len(step.finished) for step in steps)
    with tqdm(total=sum(step.tasks for step in steps), initial=initial, unit="task", file=sys.stderr) as bar:
        watcher = threading.Thread(target=watch, args=(bar,))
        watcher.start()
        try:
            yield bar
        finally:
            stopped.set()
            watcher.join()
