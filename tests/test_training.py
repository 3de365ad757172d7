"""What a run writes, records and reports, and what it needs."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from paths import REPOSITORY
from pipeline_folders import TINY_MODEL
from safetensors.torch import load_file
from training_fixtures import STEPS, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.arguments import parse
from healthslm.bits_per_byte import score_documents
from healthslm.errors import UserError
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training import log, loop, recipe
from healthslm.training.loop import pretrain
from healthslm.training.options import PretrainOptions
from healthslm.training.precision import bf16_autocast
from healthslm.training.run_folder import read_metrics

pytest_plugins = "training_fixtures"
pytestmark = pytest.mark.usefixtures("short_runs_are_quick")


def test_a_run_leaves_what_its_documentation_says(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "best", "curve.png"}
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == ["step-4", "step-8"]


def test_config_yaml_is_a_recipe_that_repeats_the_run(finished_run, tmp_path):
    repeated = tmp_path / "repeated"
    recipe = str(finished_run / "config.yaml")
    pretrain(parse(PretrainOptions, ["--recipe", recipe, "--output", str(repeated)]))
    assert weights(repeated / "checkpoints/step-8") == weights(finished_run / "checkpoints/step-8")


def test_checkpoints_are_models_that_open_with_their_tokenizer(finished_run):
    for folder in (finished_run / "best", finished_run / "checkpoints/step-8"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer) == 512
        assert model(**tokenizer("The patients", return_tensors="pt")).logits.shape[-1] == 512


def test_training_learns(finished_run):
    losses = [record["loss"] for record in read_metrics(finished_run) if "loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1


def test_best_is_the_model_with_the_fewest_validation_bits(finished_run, sample_folders):
    recorded = [r["validation_bits_per_byte"] for r in read_metrics(finished_run) if "validation_bits_per_byte" in r]
    assert len(recorded) == 3  # at the start, at step 4 and at the end
    split = TokenizedSplit(sample_folders.tokens, "validation")
    best = AutoModelForCausalLM.from_pretrained(finished_run / "best", trust_remote_code=True)
    with bf16_autocast(torch.device("cpu")):  # as training computes it
        score = score_documents(best, [split.document(i) for i in range(3)], split.document_bytes[:3])
    assert score.bits_per_byte == pytest.approx(min(recorded), rel=1e-6)


def test_a_device_with_a_queue_ends_with_the_same_bytes(pretrain_options, tmp_path, monkeypatch):
    """A GPU computes a step while the host records the one before."""
    waiting, ahead = tmp_path / "waiting", tmp_path / "ahead"
    changes = {"muon_learning_rate": 5e-3, "save_every": 3, "evaluate_every": 5, "keep_checkpoints": 9}
    pretrain(pretrain_options(waiting, **changes))
    monkeypatch.setattr(loop, "steps_ahead", lambda device: 1)
    pretrain(pretrain_options(ahead, **changes))
    for step in (3, 6, 8):
        for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
            file = f"checkpoints/step-{step}/{name}"
            assert (ahead / file).read_bytes() == (waiting / file).read_bytes()
    losses = [[(r["step"], r.get("loss")) for r in read_metrics(run)] for run in (waiting, ahead)]
    assert losses[0] == losses[1]


def test_a_tracker_gets_the_numbers_of_the_metrics(pretrain_options, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    pretrain(pretrain_options(run, report_to="tensorboard"))
    shutil.rmtree(run / "checkpoints/step-8")
    pretrain(pretrain_options(run, report_to="tensorboard", resume=True))
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(record["step"], record["loss"]) for record in read_metrics(run) if "loss" in record]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    assert [event.step for event in board.Scalars("validation_bits_per_byte")] == [0, 4, 8]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(pretrain_options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--report-to wandb: wandb is not installed: pip install wandb"):
        pretrain(pretrain_options(tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_training_needs_no_optional_package(sample_folders, repository, tmp_path):
    absent = (
        "datasets",
        "datatrove",
        "duckdb",
        "lxml",
        "matplotlib",
        "pandas",
        "peft",
        "pyarrow",
        "tensorboard",
        "trl",
    )
    arguments = [
        "pretrain", "--model", json.dumps(TINY_MODEL), "--tokens", sample_folders.tokens, "--output", tmp_path / "run",
        "--max-tokens", 256, "--batch-tokens", 256, "--micro-batch-size", 4, "--evaluation-documents", 1,
    ]  # fmt: skip
    program = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"  # importing one of them fails now
        f"sys.argv = {[str(argument) for argument in arguments]}\n"
        f"sys.path.insert(0, {str(repository / 'scripts')!r})\n"
        f"runpy.run_path({str(repository / 'scripts/pretrain.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/best/model.safetensors").exists()


def test_the_progress_bar_moves_within_a_step_and_ends_at_the_tokens_of_the_run(
    pretrain_options, tmp_path, monkeypatch
):
    seen: list[int] = []

    class Bar(log.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append(self.n)

    monkeypatch.setattr(log, "tqdm", Bar)
    pretrain(pretrain_options(tmp_path / "run", max_tokens=3 * 512, micro_batch_size=2))
    assert seen == list(range(128, 3 * 512 + 1, 128))


def test_the_remaining_time_does_not_include_evaluations(pretrain_options, tmp_path, monkeypatch):
    """By the clock of the progress bar, on which each of three evaluations takes 100 seconds and a micro-batch one."""
    real, seconds, spent = loop.score_documents, [0.0], []

    def slowly(*arguments, **settings):
        seconds[0] += 100
        return real(*arguments, **settings)

    class Bar(log.tqdm):
        def update(self, n=1):
            seconds[0] += 1
            super().update(n)

        def close(self):
            spent.append(self.format_dict["elapsed"])
            super().close()

    monkeypatch.setattr(loop, "score_documents", slowly)
    monkeypatch.setattr(log, "tqdm", Bar)
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    pretrain(pretrain_options(tmp_path / "run", max_tokens=2 * 512, evaluate_every=1))
    assert (seconds[0], spent[0]) == (304, 4)


def test_a_run_warns_of_many_epochs_of_a_small_corpus(pretrain_options, sample_folders, tmp_path, caplog, monkeypatch):
    tokens = TokenizedSplit(sample_folders.tokens, "train").num_tokens
    pretrain(pretrain_options(tmp_path / "run", max_tokens=20 * tokens - 512, dry_run=True))
    assert not [record for record in caplog.records if "epochs" in record.message]
    pretrain(pretrain_options(tmp_path / "run", max_tokens=174 * tokens, dry_run=True))
    (warning,) = (record for record in caplog.records if "epochs" in record.message)
    assert warning.levelname == "WARNING"
    assert f"174 epochs of a corpus of {tokens:,} tokens" in warning.message
    assert f"lower max_tokens (20 epochs are {20 * tokens:,})" in warning.message

    caplog.clear()
    monkeypatch.setattr(recipe, "MANY_EPOCHS", 0)  # so that a short run has many
    pretrain(pretrain_options(tmp_path / "run", max_tokens=512))
    assert [record for record in caplog.records if "epochs of a corpus" in record.message]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"], indirect=True)  # tests/test_distributed.py does so in fp32
def test_two_processes_train_like_one(finished_run, precision, tmp_path):
    recipe = yaml.safe_load((finished_run / "config.yaml").read_text()) | {"output": str(tmp_path / "two")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "tests/in_precision.py", precision, "scripts/pretrain.py"]
    command += ["--recipe", tmp_path / "recipe.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(run / "checkpoints/step-8/model.safetensors") for run in (finished_run, tmp_path / "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
