"""Kill training runs at random moments, and compare their results with those of runs that never stopped.

    python tests/soak.py --kills 20

A small run on the sample is killed by SIGKILL and resumed again and again, in fp32 and bf16, with one process and two.
It must end with the same bytes in its checkpoints and in `best`, and with the same metrics except for the speed. The
moments are spread over the whole run: at any time, while a checkpoint or the best model is written, and during the
start. A seed determines the moments, up to the speed of the machine. The exit status is 1 if there is a difference.

A run is forked from this program, which saves the seconds of imports, and then does what `scripts/pretrain.py` does.
Two processes connect as they do under torchrun.
"""

import argparse
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import conftest  # noqa: F401  the environment that all tests share, before Transformers reads it
import yaml
from in_precision import set_precision
from pipeline_folders import TINY_MODEL, make_folders

from healthslm.cli import run
from healthslm.training.checkpoint import find_damage, list_checkpoints
from healthslm.training.loop import pretrain
from healthslm.training.options import PretrainOptions
from healthslm.training.run_folder import read_metrics

BATCH_TOKENS = 512
RECIPE = {
    "model": TINY_MODEL, "batch_tokens": BATCH_TOKENS, "micro_batch_size": 4, "learning_rate": 3e-3,
    "muon_learning_rate": 3e-3, "warmup_tokens": 1024, "evaluate_every": 3, "evaluation_documents": 3, "save_every": 2,
}  # fmt: skip
MAX_SECONDS = 600
MOMENTS = {"start": (1, 0.6), "a step": (4, 0.1), "opening a checkpoint": (3, 0.05), "opening best": (2, 0.05)}
"""The events that a kill can follow, with their weight and the maximum delay in seconds."""
OPENED = {"opening a checkpoint": ".step-", "opening best": ".best."}

fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Setting:
    precision: str
    processes: int
    steps: int

    def __str__(self) -> str:
        return f"{self.precision}, {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass(frozen=True)
class Moment:
    """When to kill: a number of seconds after an event, once the run has taken a step."""

    after: str
    step: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s after {self.after}"


def choose_moments(rng: random.Random, kills: int, steps: int) -> Iterator[Moment]:
    """Random moments, spread evenly over the run."""
    for kill in range(kills):
        (after,) = rng.choices(list(MOMENTS), [weight for weight, _ in MOMENTS.values()])
        step = int((kill + rng.random()) / kills * steps)
        yield Moment(after, step, rng.uniform(0, MOMENTS[after][1]))


# One run


class Run:
    """A run folder, and the processes that train in it."""

    def __init__(self, setting: Setting, tokens: Path, folder: Path):
        self.setting, self.folder = setting, folder
        self.checkpoints = folder / "checkpoints"
        self.log, self.recipe = folder.with_suffix(".log"), folder.with_suffix(".yaml")
        options = {"max_tokens": setting.steps * BATCH_TOKENS, "tokens": str(tokens), "output": str(folder)}
        self.recipe.write_text(yaml.safe_dump(RECIPE | options))
        self.processes: list[multiprocessing.Process] = []

    def start(self) -> None:
        """Start the run, or resume it."""
        self.started_with = self._metrics_number()
        arguments = ["--recipe", str(self.recipe), "--resume", str(self.folder.exists()).lower()]
        port = free_port()
        self.processes = [
            fork.Process(target=train, args=(arguments, self.setting, rank, port, self.log), daemon=True)
            for rank in range(self.setting.processes)
        ]
        for process in self.processes:
            process.start()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds or the run has ended successfully."""
        end = time.monotonic() + MAX_SECONDS
        while self.is_alive and not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"no progress in {MAX_SECONDS} s, see {self.log}")
            time.sleep(0.001)
        if self.processes[0].exitcode:
            sys.exit(f"{self.setting}: exit code {self.processes[0].exitcode}\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def finish(self) -> None:
        self.start()
        self.wait(lambda: False)
        self.kill()

    def is_at(self, moment: Moment) -> bool:
        if moment.after == "start":
            return True
        if self._metrics_number() == self.started_with or self.step < moment.step:
            return False
        return moment.after not in OPENED or any(n.startswith(OPENED[moment.after]) for n in self.half_written)

    @property
    def is_alive(self) -> bool:
        return self.processes[0].is_alive()

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        return max((record["step"] for record in read_metrics(self.folder)), default=0)

    @property
    def half_written(self) -> list[str]:
        return [path.name for folder in (self.folder, self.checkpoints) for path in folder.glob(".*.partial-*")]

    def _metrics_number(self) -> int | None:
        """The inode of the metrics, which changes when a resumed run rewrites them up to its checkpoint."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None


def train(arguments: list[str], setting: Setting, rank: int, port: int, log: Path) -> None:
    """Run a process of a run, with arguments of scripts/pretrain.py."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    set_precision(setting.precision)
    if setting.processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setting.processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    sys.modules["matplotlib"] = None  # as if not installed, because curves take half of a run's time
    sys.argv[1:] = arguments
    run(pretrain, PretrainOptions)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# Results of runs


def differences(whole: Run, killed: Run) -> list[str]:
    found = []
    for folder in ("best", *(f"checkpoints/{path.name}" for path in list_checkpoints(whole.checkpoints))):
        contents = [
            {path.name: path.read_bytes() for path in (run.folder / folder).glob("*")} for run in (whole, killed)
        ]
        names = contents[0].keys() | contents[1].keys()
        found += [f"{folder}/{name}" for name in sorted(names) if contents[0].get(name) != contents[1].get(name)]
    if metrics(whole) != metrics(killed):
        found.append("metrics.jsonl")
    return found + killed.half_written


def metrics(run: Run) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(run.folder)
        if "hardware" not in record  # written at each start
    ]


def soak(setting: Setting, tokens: Path, folder: Path, kills: int, seed: int) -> bool:
    """Whether a run that is killed `kills` times ends with the same files as one that is never killed."""
    whole, killed = (
        Run(setting, tokens, folder / f"{setting} {name}".replace(", ", " ")) for name in ("whole", "killed")
    )
    whole.finish()
    hits: Counter[str] = Counter()
    moments = choose_moments(random.Random(f"{seed} {setting}"), kills, setting.steps)
    for number, moment in enumerate(moments, start=1):
        before = killed.half_written
        killed.start()
        killed.wait(lambda moment=moment: killed.is_at(moment))
        time.sleep(moment.seconds)
        was_alive = killed.is_alive
        killed.kill()
        half_written = [name for name in killed.half_written if name not in before]
        hits["in total"] += was_alive
        hits.update(f"while {name.split('.')[1].split('-')[0]} was written" for name in half_written)
        saved = list_checkpoints(killed.checkpoints)
        newest = saved[-1].name if saved else "no checkpoint"
        place = f"step {killed.step}, {newest}, {', '.join(half_written) or 'nothing half-written'}"
        print(f"{setting}: kill {number}, {moment}{'' if was_alive else ' (it had ended)'}: {place}", flush=True)
        if saved and (damage := find_damage(saved[-1])):
            print(f"{setting}: DIFFERENCE: {saved[-1].name} is damaged: {damage}")
            return False
    killed.finish()
    found = differences(whole, killed)
    kill_counts = ", ".join(f"{count} {name}" for name, count in hits.items())
    print(
        f"{setting}: kills: {kill_counts}; {'DIFFERENCE: ' + ', '.join(found) if found else 'the same bytes'}",
        flush=True,
    )
    return not found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills per run")
    parser.add_argument("--steps", type=int, default=96, help="steps per run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=Path, help="a tokenized corpus; by default made from the embedded sample")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="healthslm-soak-") as folder:
        tokens = options.tokens
        if tokens is None:
            maker = fork.Process(target=make_folders, args=(Path(folder) / "sample",))
            maker.start()
            maker.join()
            tokens = Path(folder) / "sample" / "tokens"
        settings = [
            Setting(precision, count, options.steps) for count in options.processes for precision in options.precisions
        ]
        same = [soak(setting, tokens, Path(folder), options.kills, options.seed) for setting in settings]
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
