"""Stopped and killed runs: what they leave, and that they resume to the same bytes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from paths import REPOSITORY
from pipeline_folders import TINY_MODEL

from healthslm.training.checkpoint import find_damage, list_checkpoints
from healthslm.training.interruption import StopSignals
from healthslm.training.loop import pretrain
from healthslm.training.options import PretrainOptions
from healthslm.training.run_folder import read_metrics

SOAK = REPOSITORY / "tests" / "soak.py"
STEPS = 100


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_first_signal_is_recorded_and_work_continues(number, capfd):
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number
    assert f"{number.name}: finishing this step" in capfd.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_sigint_interrupts(first):
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_sigterm_changes_nothing(first, capfd):
    """A scheduler sends SIGTERM to all processes, and torchrun sends another one to the processes that it started."""
    with StopSignals() as stop:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is first
    assert capfd.readouterr().err.count("finishing this step") == 1


def test_signal_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# Runs that are asked to stop


@pytest.fixture(scope="module")
def recipe(sample_folders) -> dict:
    return {
        "model": TINY_MODEL, "tokens": sample_folders.tokens, "max_tokens": STEPS * 256, "batch_tokens": 256,
        "micro_batch_size": 4, "warmup_tokens": 1024, "evaluate_every": 1000, "evaluation_documents": 3,
        "save_every": 1000,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe, precision, tmp_path_factory) -> Path:
    """A run that never stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(PretrainOptions(output=run, **recipe))
    return run


class Training:
    """scripts/pretrain.py in its own process, or started by a launcher."""

    def __init__(self, output: Path, recipe: dict, launcher: tuple[str, ...] = (), **changes: object):
        self.output = output
        options = recipe | changes | {"model": json.dumps(TINY_MODEL), "output": output}
        arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.stderr_file = output.with_suffix(".stderr")
        with self.stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "scripts/pretrain.py", *arguments],
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(60_000):
            if condition():
                return
            assert self.process.poll() is None, self.stderr
            time.sleep(0.002)
        self.process.kill()
        raise AssertionError(f"timed out: {self.stderr}")

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(record["step"] >= step for record in read_metrics(self.output)))

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()


def assert_that_it_stopped_with_a_checkpoint(training: Training) -> int:
    """Return the step after which it stopped."""
    (folder,) = list_checkpoints(training.output / "checkpoints")
    assert find_damage(folder) is None
    step = read_metrics(training.output)[-1]["step"]
    assert folder.name == f"step-{step}"
    assert 1 <= step < STEPS
    assert f"stopped after step {step}; resume with: " in training.stderr
    assert not list(training.output.rglob("*.partial-*"))
    return step


def assert_same_end(run: Path, whole: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        path = Path("checkpoints") / f"step-{STEPS}" / name
        assert (run / path).read_bytes() == (whole / path).read_bytes(), name
    assert (run / "best/model.safetensors").read_bytes() == (whole / "best/model.safetensors").read_bytes()
    assert measured(run) == measured(whole)


def measured(run: Path) -> list[dict]:
    return [
        {name: value for name, value in r.items() if name != "tokens_per_second"}
        for r in read_metrics(run)
        if "hardware" not in r
    ]


@pytest.mark.parametrize(
    ("number", "precision"),
    [(signal.SIGTERM, "fp32"), pytest.param(signal.SIGINT, "bf16", marks=pytest.mark.slow)],
    indirect=["precision"],
)
def test_a_signal_stops_a_run_after_its_step_and_the_printed_command_resumes_it_to_the_same_bytes(
    recipe, whole, tmp_path, number, precision
):
    launcher = ("tests/in_precision.py", precision)
    training = Training(tmp_path / "run", recipe, launcher)
    training.wait_for_step(3)
    training.process.send_signal(number)
    assert training.process.wait() == 75
    assert_that_it_stopped_with_a_checkpoint(training)
    message = training.stderr.splitlines()[-1]
    assert "Traceback" not in training.stderr

    command = re.fullmatch(r"stopped after step \d+; resume with: healthslm (.*)", message)[1]
    console_script = str(Path(sys.executable).with_name("healthslm"))
    done = subprocess.run(
        shlex.join([sys.executable, *launcher, console_script]) + f" {command}",
        shell=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same_end(training.output, whole)


def test_a_second_sigint_stops_at_once(recipe, tmp_path):
    """The first step has 40,000 micro-batches, which take minutes."""
    tokens = 40_000 * 64
    training = Training(tmp_path / "run", recipe, micro_batch_size=1, batch_tokens=tokens, max_tokens=tokens)
    training.wait_until(lambda: "k/2.56M" in training.stderr)  # the bar, after some of the micro-batches
    training.process.send_signal(signal.SIGINT)
    training.wait_until(lambda: "SIGINT: finishing this step; press Ctrl-C to stop at once" in training.stderr)
    training.process.send_signal(signal.SIGINT)
    assert training.process.wait() == 130
    assert "interrupted" in training.stderr.splitlines()
    assert "Traceback" not in training.stderr
    assert read_metrics(training.output)[-1]["step"] == 0
    assert not list_checkpoints(training.output / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "all processes"])  # tests/test_distributed.py sends it to one process
def test_a_signal_stops_two_processes_after_the_same_step(recipe, tmp_path, to):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    training = Training(tmp_path / "run", recipe | {"micro_batch_size": 2}, launcher)
    training.wait_for_step(3)
    agent = psutil.Process(training.process.pid)
    workers = [child for child in agent.children() if "pretrain.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    for process in {"torchrun": [agent], "all processes": [*workers, agent]}[to]:
        process.send_signal(signal.SIGTERM)
    assert training.process.wait() != 0
    assert_that_it_stopped_with_a_checkpoint(training)


# Runs that are killed


def soak(sample_folders, kills: int, precision: str, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SOAK, "--tokens", sample_folders.tokens, "--kills", kills, "--steps", 24]
    command += ["--precisions", precision, "--processes", processes]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_bytes_of_one_that_never_stopped(sample_folders):
    done = soak(sample_folders, 3, "fp32", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": kill ") == 3 and done.stdout.endswith("the same bytes\n")


@pytest.mark.slow
def test_a_killed_run_in_bf16_or_of_two_processes_ends_with_the_same_bytes(sample_folders):
    for precision, processes in (("bf16", 1), ("fp32", 2)):
        done = soak(sample_folders, 2, precision, processes)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "DIFFERENCE" not in done.stdout
