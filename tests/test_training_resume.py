"""A resumed run equals one that never stopped, and is not resumed with other options or on another corpus."""

import json
import shutil
from pathlib import Path

import pytest
from pipeline_folders import TINY_GPT2
from safetensors.torch import load_file
from training_fixtures import STEPS, weights

from healthslm.errors import UserError
from healthslm.training.loop import pretrain
from healthslm.training.run_folder import read_metrics

pytest_plugins = "training_fixtures"
pytestmark = pytest.mark.usefixtures("short_runs_are_quick")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": TINY_GPT2},
        {"muon_learning_rate": 5e-3},
    ],
    ids=["healthslm", "gpt2 with dropout", "muon"],
)
def test_a_resumed_run_ends_with_the_bytes_of_one_that_never_stopped(pretrain_options, precision, tmp_path, changes):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pretrain(pretrain_options(whole, **changes))
    shutil.copytree(whole, stopped)
    last = max((whole / "checkpoints").iterdir(), key=lambda path: int(path.name[5:])).name
    shutil.rmtree(stopped / "checkpoints" / last)
    pretrain(pretrain_options(stopped, resume=True, **changes))
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        folder = Path("checkpoints") / last
        assert (stopped / folder / name).read_bytes() == (whole / folder / name).read_bytes()
    without_speed = [
        [
            {k: v for k, v in record.items() if k != "tokens_per_second"}
            for record in read_metrics(run)
            if "hardware" not in record
        ]
        for run in (whole, stopped)
    ]
    assert without_speed[0] == without_speed[1]


def test_resuming_a_finished_run_changes_nothing(finished_run, pretrain_options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    pretrain(pretrain_options(run, resume=True))
    assert weights(run / "checkpoints/step-8") == weights(finished_run / "checkpoints/step-8")
    steps = [record["step"] for record in read_metrics(run) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_a_run_without_a_checkpoint_starts_again(finished_run, pretrain_options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints")
    pretrain(pretrain_options(run, resume=True))
    assert weights(run / "checkpoints/step-8") == weights(finished_run / "checkpoints/step-8")
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, STEPS + 1))


def test_a_run_resumes_from_the_newest_valid_checkpoint(finished_run, pretrain_options, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    damaged = run / "checkpoints/step-8/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    pretrain(pretrain_options(run, resume=True))
    assert f"{damaged.parent}: damaged" in caplog.text
    assert weights(damaged.parent) == weights(finished_run / "checkpoints/step-8")


CHANGES = {
    "a recipe": (
        {"learning_rate": 1e-3, "betas": (0.9, 0.99)},
        r"learning_rate was 0.003, is 0.001; betas was \[0.9, 0.95\]",
    ),
    "a longer run": ({"max_tokens": 10 * 512}, "max_tokens was 4096, is 5120"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_a_run_is_not_resumed_with_other_options_unless_accepted(
    finished_run, pretrain_options, tmp_path, changes, message
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints/step-8")
    with pytest.raises(UserError, match=message):
        pretrain(pretrain_options(run, resume=True, **changes))
    pretrain(pretrain_options(run, resume=True, accept_changes=True, **changes))
    assert read_metrics(run)[-1]["tokens"] == changes.get("max_tokens", STEPS * 512)


def test_a_run_is_not_resumed_on_another_corpus(finished_run, pretrain_options, sample_folders, tmp_path):
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    shutil.copytree(finished_run, run)
    shutil.copytree(sample_folders.tokens, tokens)
    pretrain(pretrain_options(run, resume=True, tokens=tokens))  # the same corpus, elsewhere
    info = json.loads((tokens / "tokens.json").read_text())
    info["splits"].pop("test")
    (tokens / "tokens.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="tokens.json was "):
        pretrain(pretrain_options(run, resume=True, tokens=tokens))


def test_options_that_do_not_affect_the_result_may_change_when_a_run_is_resumed(
    finished_run, pretrain_options, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints/step-8")
    pretrain(pretrain_options(run, resume=True, micro_batch_size=2, save_every=1, evaluate_every=8, keep_checkpoints=1))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-8"]
    # Smaller micro-batches add the same gradients in another order: compared with the four steps, a rounding error.
    start, whole = (load_file(finished_run / f"checkpoints/step-{step}/model.safetensors") for step in (4, 8))
    resumed = load_file(run / "checkpoints/step-8/model.safetensors")
    for name in whole:
        assert (resumed[name] - whole[name]).norm() < 0.02 * (whole[name] - start[name]).norm(), name


def test_a_full_disk_leaves_no_incomplete_checkpoint(pretrain_options, sample_folders, small_disk):
    with pytest.raises(UserError, match="no space left"):
        pretrain(pretrain_options(small_disk / "run"))
    assert not list(small_disk.rglob("step-*")) and not (small_disk / "run" / "best").exists()
