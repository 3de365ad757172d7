"""Running datatrove pipelines: lists of blocks, one task for each input file."""

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import loguru
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from tqdm import tqdm

# datatrove logs to the terminal from its import on; the log of a run lies in its folder of logs.
loguru.logger.remove()


def run_tasks(step: str, blocks: list[PipelineStep], tasks: int, workers: int, logs: Path) -> None:
    """Run the pipeline `blocks` as so many tasks, each of which has one input, on `workers` processes (0: one a core).

    Log, completion marker and statistics of each task go to the folder of the step in `logs`; the terminal shows a
    progress bar alone.
    """
    workers = min(tasks, workers or os.cpu_count() or 1)
    executor = _QuietExecutor(blocks, tasks=tasks, workers=workers, logging_dir=str(logs / step))
    with _progress(step, tasks, logs / step / "completions"), redirect_stderr(io.StringIO()):
        executor.run()


class _QuietExecutor(LocalPipelineExecutor):
    """Keeps datatrove's log off the terminal, in the worker processes too."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        with redirect_stderr(io.StringIO()):
            return super()._run_for_rank(rank, local_rank, node_rank)


@contextmanager
def _progress(step: str, tasks: int, completions: Path) -> Iterator[None]:
    """Show how many tasks have left their completion marker, which works for every executor."""
    done = threading.Event()

    def watch(bar: tqdm) -> None:
        while not done.wait(0.5):
            bar.update(completed() - bar.n)
        bar.update(completed() - bar.n)

    def completed() -> int:
        return sum(1 for _ in completions.iterdir()) if completions.is_dir() else 0

    with tqdm(total=tasks, desc=step, unit="file", file=sys.stderr) as bar:
        watcher = threading.Thread(target=watch, args=(bar,))
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def filter_counts(logs: Path, step: str, task: int) -> tuple[int, dict[str, int]]:
    """How many documents came to the first filter of a task, and how many each reason dropped, from its statistics."""
    blocks = json.loads((logs / step / "stats" / f"{task:05d}.json").read_text())
    filters = [block["stats"] for block in blocks if "forwarded" in block["stats"] or "dropped" in block["stats"]]
    dropped = {
        name.removeprefix("dropped_"): _total(value)
        for stats in filters
        for name, value in stats.items()
        if name.startswith("dropped_")
    }
    return (_total(filters[0]["total"]) if filters else 0), dropped


def _total(statistic: int | dict[str, int]) -> int:
    """datatrove writes a count as a number alone where all its parts are 1."""
    return statistic["total"] if isinstance(statistic, dict) else statistic


class DropFilter(BaseFilter):
    """Drops the documents for which `reason` gives a reason."""

    name = "drop by reason"

    def __init__(self, reason: Callable[[Document], str | None]):
        super().__init__()
        self.reason = reason

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        reason = self.reason(doc)
        return True if reason is None else (False, reason)


class ListedFilter(BaseFilter):
    """Drops the documents that a Parquet file lists: columns file, position in that file, reason."""

    name = "drop as listed"

    def __init__(self, listed: Path):
        super().__init__()
        self.listed = listed
        self.file: str | None = None
        self.reasons: dict[int, str] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["file"] != self.file:
            self.file = doc.metadata["file"]
            rows = pq.read_table(self.listed, filters=[("file", "=", self.file)])
            self.reasons = dict(zip(rows["position"].to_pylist(), rows["reason"].to_pylist(), strict=True))
        reason = self.reasons.get(doc.metadata["position"])
        return True if reason is None else (False, reason)
