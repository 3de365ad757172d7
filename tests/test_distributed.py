"""Training with two processes over gloo gives the run of one process, also when one of them fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from paths import REPOSITORY
from pipeline_folders import TINY_MODEL
from safetensors.torch import load_file
from slurm import bash_syntax_errors
from transformers import AutoModelForCausalLM

from healthslm.training.run_folder import read_metrics

WATCHED = REPOSITORY / "tests" / "watched_pretrain.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ON_THE_CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
STEPS = 8
PARAMETERS = 34_976

TINY_GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
MUON = {"muon_learning_rate": 3e-3}
# Of the weights, which change by up to 0.015 in a run. Two processes round sums differently from one. AdamW doesn't
# amplify the difference. Muon makes all singular values equal in bf16, and the smallest ones are rounding errors.
TOLERANCE = {
    "AdamW": {"rtol": 0.0, "atol": 1e-6},
    "Muon": {"rtol": 0.0, "atol": 1e-3},
}


@dataclass(frozen=True)
class Run:
    """A run, and what its processes recorded."""

    folder: Path
    record: Path
    done: list[subprocess.CompletedProcess[str]]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def checkpoint(self, step: int = STEPS) -> Path:
        return self.folder / "checkpoints" / f"step-{step}"

    def bytes(self, step: int = STEPS) -> list[bytes]:
        return [(self.checkpoint(step) / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]

    def weights(self, step: int = STEPS) -> dict[str, torch.Tensor]:
        return load_file(self.checkpoint(step) / "model.safetensors")

    def metrics(self, name: str) -> list[float]:
        return [record[name] for record in read_metrics(self.folder) if name in record]

    def recorded(self, rank: int) -> dict:
        return json.loads((self.record / f"{rank}.json").read_text())


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def train(sample_folders, tmp_path_factory) -> Train:
    """Train in processes that a launcher starts: `train(TORCHRUN, muon_learning_rate=1e-3, watch={…})`.

    Args of the returned function:
        launcher: Arguments of Python before the program; None for `processes` that are started one by one.
        folder: Run folder, a new one by default.
        watch: See watched_pretrain.py.
        options: Of pretrain.py.
    """

    def start(
        launcher: list[str] | None = None,
        processes: int = 1,
        folder: Path | None = None,
        watch: dict | None = None,
        **options,
    ) -> Run:
        record = tmp_path_factory.mktemp("record")
        folder = folder or record / "run"
        recipe = {
            "model": TINY_MODEL, "tokens": str(sample_folders.tokens), "output": str(folder),
            "max_tokens": STEPS * 512, "batch_tokens": 512, "micro_batch_size": 2, "learning_rate": 3e-3,
            "warmup_tokens": 1024, "evaluate_every": 4, "evaluation_documents": 3, "save_every": 4,
            "keep_checkpoints": STEPS,
        } | options  # fmt: skip
        (record / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        watched = json.dumps({"record": str(record)} | (watch or {}))
        arguments = [WATCHED, watched, "--recipe", record / "recipe.yaml"]
        variables: list[dict[str, str]] = [{}]
        if launcher is None and processes > 1:
            variables = environments(processes)
        started = [
            subprocess.Popen(
                [sys.executable, *(launcher or []), *arguments],
                env=os.environ | ON_THE_CPU | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for own in variables
        ]
        outputs = [process.communicate(timeout=300) for process in started]
        return Run(
            folder,
            record,
            [
                subprocess.CompletedProcess(process.args, process.returncode, *output)
                for process, output in zip(started, outputs, strict=True)
            ],
        )

    return start


def environments(processes: int) -> list[dict[str, str]]:
    """Environment variables, as torchrun sets them, with which the processes find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    return [
        common | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    ]


@pytest.fixture(scope="module")
def one(train) -> Run:
    return succeeded(train())


@pytest.fixture(scope="module")
def two(train, tmp_path_factory) -> Run:
    """With torchrun. The second process gets another run folder, which shows whatever it writes."""
    return succeeded(train(TORCHRUN, watch={"output": str(tmp_path_factory.mktemp("of rank 1") / "run")}))


def succeeded(run: Run) -> Run:
    for done in run.done:
        assert done.returncode == 0, done.stderr
    return run


def assert_same_run(run: Run, expected: Run, tolerance: dict[str, float]) -> None:
    for name in ("loss", "grad_norm", "validation_bits_per_byte"):
        assert run.metrics(name) == pytest.approx(expected.metrics(name), rel=1e-3), name
    torch.testing.assert_close(run.weights(), expected.weights(), **tolerance)


# Two processes train like one


def test_two_processes_train_like_one(one, two):
    assert_same_run(two, one, TOLERANCE["AdamW"])


def test_processes_share_the_sequences_and_read_none_twice(one, two):
    alone = one.recorded(0)["sequences"]
    shared = [two.recorded(rank)["sequences"] for rank in (0, 1)]
    assert [batch for pair in zip(*shared, strict=True) for batch in pair] == alone
    first, second = ({place for batch in sequences for place in batch["indices"]} for sequences in shared)
    assert first.isdisjoint(second)
    assert first | second == set(range(STEPS * 8))


def test_only_the_main_process_writes(two):
    watch = json.loads(next(argument for argument in two.done[0].args if str(argument).startswith("{")))
    assert not Path(watch["output"]).exists()
    assert two.checkpoints == ["step-4", "step-8"]


def test_both_processes_end_with_the_weights_of_the_checkpoint(two):
    assert two.recorded(0)["weights"] == two.recorded(1)["weights"]


def test_no_wrapped_model_outlives_the_process_group(two):
    """If one does, a run in a hundred hangs."""
    assert [(two.record / f"{rank}.wrapped").read_text() for rank in (0, 1)] == ["0", "0"]


@pytest.mark.slow
def test_two_processes_train_a_gpt2_with_muon_like_one(train):
    alone = succeeded(train(model=TINY_GPT2, **MUON))
    together = succeeded(train(TORCHRUN, model=TINY_GPT2, **MUON))
    assert_same_run(together, alone, TOLERANCE["Muon"])


# Signals, kills and losses that are not finite


@pytest.fixture(scope="module")
def stopped(train) -> Run:
    """A run of two processes of which the second was sent SIGTERM in its third step."""
    return train(processes=2, watch={"signal": "SIGTERM", "step": 3})


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_one_checkpoint(stopped):
    assert [done.returncode for done in stopped.done] == [75, 75]
    assert stopped.checkpoints == ["step-3"]
    first, second = (done.stderr for done in stopped.done)
    assert "stopped after step 3; resume with: healthslm pretrain " in first
    assert "Traceback" not in first + second
    assert [(stopped.record / f"{rank}.wrapped").read_text() for rank in (0, 1)] == ["0", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_of_two_processes_resumes(train, one, two, stopped, tmp_path, processes):
    shutil.copytree(stopped.folder, tmp_path / "run")
    resumed = succeeded(train(processes=processes, folder=tmp_path / "run", resume=True))
    assert_same_run(resumed, one, TOLERANCE["AdamW"])
    if processes == 2:
        assert resumed.bytes() == two.bytes()
    else:
        assert resumed.recorded(0)["sequences"] == one.recorded(0)["sequences"][3 * 4 :]  # four micro-batches a step


@pytest.mark.slow
def test_a_killed_run_of_two_processes_ends_with_the_bytes_of_one_never_stopped(train, two):
    killed = train(TORCHRUN, watch={"signal": "SIGKILL", "step": 6})
    assert killed.done[0].returncode != 0
    assert killed.checkpoints == ["step-4"]
    resumed = succeeded(train(TORCHRUN, folder=killed.folder, resume=True))
    assert resumed.bytes() == two.bytes()


@pytest.fixture(scope="module")
def uneven(train) -> Run:
    """A run of two processes of which the second has less memory, and a loss that is not a number in its third step."""
    return succeeded(train(processes=2, watch={"nan": True, "step": 3, "fitting": 1}, save_every=1))


@pytest.mark.slow
def test_processes_with_different_free_memory_agree_on_the_micro_batch_that_fits_all(uneven):
    read = [[batch["indices"] for batch in uneven.recorded(rank)["sequences"]] for rank in (0, 1)]
    assert [len(indices) for of_rank in read for indices in of_rank] == [1] * STEPS * 8
    assert sorted(index for of_rank in read for indices in of_rank for index in indices) == list(range(STEPS * 8))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_both(uneven):
    run = uneven
    skipped = [record for record in read_metrics(run.folder) if "skipped" in record]
    assert [record["step"] for record in skipped] == [3]
    assert skipped[0]["skipped"]["sequences"] == [16, 24]
    assert len(run.metrics("loss")) == STEPS - 1
    assert run.recorded(0)["weights"] == run.recorded(1)["weights"]
    assert run.bytes(3) == run.bytes(2)  # neither the weights nor the moments have moved
    assert run.bytes(4) != run.bytes(3)
    assert all(weight.isfinite().all() for weight in run.weights().values())


# Accelerate's launcher and its configurations


CONFIGURATIONS = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))


def launch_by(configuration: str) -> list[str]:
    path = str(REPOSITORY / "configs" / "accelerate" / f"{configuration}.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", path]
    return [*launch, "--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))  # which knows every key, or raises
    expected = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert config.distributed_type == expected[path.stem]
    assert config.mixed_precision == "no"


@pytest.mark.slow
def test_accelerate_launch_trains_like_torchrun(train, two):
    assert succeeded(train(launch_by("ddp"))).bytes() == two.bytes()


@pytest.fixture(scope="module")
def sharded(train) -> Run:
    return succeeded(train(launch_by("fsdp2"), watch={"sharded": True}))


@pytest.mark.slow
def test_a_model_sharded_by_fsdp2_trains_like_in_one_process(one, sharded):
    assert [sharded.recorded(rank)["parameters"] for rank in (0, 1)] == [PARAMETERS // 2] * 2
    assert_same_run(sharded, one, TOLERANCE["AdamW"])


@pytest.mark.slow
def test_a_checkpoint_of_fsdp2_is_a_whole_model_with_a_tied_head(sharded):
    for folder in (sharded.folder / "best", sharded.checkpoint()):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert model.num_parameters() == PARAMETERS
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in sharded.weights()


@pytest.mark.slow
def test_muon_with_fsdp2_trains_like_in_one_process(train):
    alone = succeeded(train(**MUON))
    spread = succeeded(train(launch_by("fsdp2"), watch={"sharded": True}, **MUON))
    assert_same_run(spread, alone, TOLERANCE["Muon"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp2", "one process"])
def test_a_run_of_fsdp2_resumes_with(train, sharded, tmp_path, way):
    shutil.copytree(sharded.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-8")
    launcher, watch = (launch_by("fsdp2"), {"sharded": True}) if way == "fsdp2" else (None, {})
    resumed = succeeded(train(launcher, folder=tmp_path / "run", watch=watch, resume=True))
    if way == "fsdp2":
        assert resumed.bytes() == sharded.bytes()
    assert_same_run(resumed, sharded, TOLERANCE["AdamW"])


# Slurm


SRUN = """
import os, signal, subprocess, sys, time
from pathlib import Path

command = sys.argv[1:]
while command[0].startswith("-"):
    command = command[1:]
tasks = [
    subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
    for task in range(int(os.environ["SLURM_NTASKS"]))
]
awaited = os.environ.get("STOP_WHEN_EXISTS")
while awaited and not Path(awaited).exists() and tasks[0].poll() is None:
    time.sleep(0.05)
for task in tasks if awaited else []:
    task.send_signal(signal.SIGTERM)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, sys
from pathlib import Path

if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost")
else:
    Path(os.environ["ASKED_OF_SLURM"]).write_text(" ".join(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_slurm_job_whose_time_is_up_is_requeued_and_resumes(sample_folders, tmp_path):
    script = REPOSITORY / "scripts" / "pretrain.sbatch"
    assert bash_syntax_errors(script) == ""
    for name, program in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(f"#!{sys.executable}\n{program}")
        (tmp_path / name).chmod(0o755)
    asked, run = tmp_path / "asked", tmp_path / "run"
    arguments = [
        "--model", json.dumps(TINY_MODEL), "--tokens", sample_folders.tokens, "--output", run, "--max-tokens", 40 * 512,
        "--batch-tokens", 512, "--micro-batch-size", 4, "--warmup-tokens", 1024, "--evaluation-documents", 1,
        "--save-every", 4,
    ]  # fmt: skip
    environment = os.environ | ON_THE_CPU | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "ASKED_OF_SLURM": str(asked),
        "SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": str(environments(1)[0]["MASTER_PORT"]),
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2",
    }  # fmt: skip

    def job(**more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", script, *map(str, arguments)]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    stopped = job(STOP_WHEN_EXISTS=str(run / "checkpoints/step-4"))
    assert stopped.returncode == 75, stopped.stderr
    assert asked.read_text() == f"requeue {environment['SLURM_JOB_ID']}"
    assert not (run / "checkpoints/step-40").exists()

    asked.unlink()
    finished = job(SLURM_RESTART_COUNT="1")
    assert finished.returncode == 0, finished.stderr
    assert not asked.exists()
    assert (run / "checkpoints/step-40").exists()
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == list(range(1, 41))
