"""Pretraining: what an update computes, what a run leaves behind, and that a resumed run is the run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from pipeline_folders import TINY_MODEL
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.bits_per_byte import score_documents
from healthslm.errors import UserError
from healthslm.metrics import read_metrics
from healthslm.models import make_model
from healthslm.optimization import learning_rate_at, make_optimizer
from healthslm.packing import PackedRows
from healthslm.tokens import TokenizedSplit
from healthslm.training import PretrainOptions, accumulate_gradients, pretrain

TINY_GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
}  # fmt: skip
UPDATES = 8


@pytest.fixture(scope="module")
def options(sample_folders) -> Callable[..., PretrainOptions]:
    def make(output: Path, **changes) -> PretrainOptions:
        values = {
            "model": TINY_MODEL, "tokens": sample_folders.tokens, "max_tokens": UPDATES * 512, "batch_tokens": 512,
            "micro_batch_rows": 4, "learning_rate": 3e-3, "warmup_tokens": 1024, "evaluate_every": 4,
            "evaluation_documents": 3, "save_every": 4,
        }  # fmt: skip
        return PretrainOptions(output=output, **(values | changes))

    return make


@pytest.fixture(scope="module")
def finished_run(options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(options(run))
    return run


def test_a_run_leaves_what_its_documentation_says(finished_run):
    names = {path.name for path in finished_run.iterdir()} - {"tensorboard"}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "best", "curve.png"}
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == ["step-4", "step-8"]


def test_config_yaml_is_a_recipe_that_repeats_the_run(finished_run, run_script, tmp_path):
    repeated = tmp_path / "repeated"
    done = run_script("pretrain", "--recipe", finished_run / "config.yaml", "--output", repeated)
    assert done.returncode == 0, done.stderr
    assert weights(repeated / "checkpoints/step-8") == weights(finished_run / "checkpoints/step-8")


def test_checkpoints_are_models_that_open_with_their_tokenizer(finished_run):
    for folder in (finished_run / "best", finished_run / "checkpoints/step-8"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer) == 512
        assert model(**tokenizer("The patients", return_tensors="pt")).logits.shape[-1] == 512


def test_training_learns(finished_run):
    losses = [record["loss"] for record in read_metrics(finished_run) if "loss" in record]
    assert len(losses) == UPDATES
    assert losses[-1] < losses[0] - 0.1


def test_best_is_the_model_with_the_fewest_validation_bits(finished_run, sample_folders):
    recorded = [r["validation_bits_per_byte"] for r in read_metrics(finished_run) if "validation_bits_per_byte" in r]
    assert len(recorded) == 3  # at the start, at update 4 and at the end
    split = TokenizedSplit(sample_folders.tokens, "validation")
    best = AutoModelForCausalLM.from_pretrained(finished_run / "best", trust_remote_code=True)
    score = score_documents(best, [split.document(i) for i in range(3)], split.document_bytes[:3])
    assert score.bits_per_byte == pytest.approx(min(recorded), rel=1e-6)


@pytest.mark.parametrize("model", [TINY_MODEL, TINY_GPT2], ids=["healthslm", "gpt2 with dropout"])
def test_a_resumed_run_ends_with_the_bytes_of_one_that_never_stopped(options, tmp_path, model):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pretrain(options(whole, model=model))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints/step-8")
    pretrain(options(stopped, model=model, resume=True))
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        folder = Path("checkpoints/step-8")
        assert (stopped / folder / name).read_bytes() == (whole / folder / name).read_bytes()
    without_speed = [
        [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_metrics(run)]
        for run in (whole, stopped)
    ]
    assert without_speed[0] == without_speed[1]


def test_a_run_may_be_resumed_on_its_last_checkpoint(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = weights(run / "checkpoints/step-8")
    pretrain(options(run, resume=True))
    assert weights(run / "checkpoints/step-8") == before


def test_training_goes_on_from_the_weights_of_a_folder(finished_run, options, tmp_path):
    pretrain(options(tmp_path / "further", model=str(finished_run / "best"), learning_rate=0.0, weight_decay=0.0))
    assert weights(tmp_path / "further/best") == weights(finished_run / "best")


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 on every machine, where equal sums differ by rounding alone."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_four_micro_batches_of_one_row_give_the_gradients_of_one_of_four(sample_folders, fp32):
    rows = PackedRows(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    found = []
    for micro_batch_rows in (1, 4):
        torch.manual_seed(0)
        model = make_model(TINY_MODEL).train()
        loss = accumulate_gradients(Accelerator(cpu=True), model, rows, range(8, 12), micro_batch_rows)
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_the_loss_of_an_update_is_the_mean_over_its_tokens(sample_folders, fp32):
    rows = PackedRows(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    model = make_model(TINY_MODEL).train()
    loss = accumulate_gradients(Accelerator(cpu=True), model, rows, range(4), 2)
    # Each document of each row by itself, so that nothing but the definition is at work.
    batch = {name: torch.from_numpy(array) for name, array in rows.batch(range(4)).items()}
    nats = []
    for inputs, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(inputs)], strict=True):
            logits = model(inputs[None, start:end]).logits[0]
            nats.append(torch.nn.functional.cross_entropy(logits, labels[start:end], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(nats).mean())


def test_bf16_keeps_weights_gradients_and_loss_in_fp32(sample_folders, monkeypatch):
    rows = PackedRows(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    losses, products = [], set()
    for has_bf16 in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        torch.manual_seed(0)
        model = make_model(TINY_MODEL).train()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: products.add(call[-1].dtype))
        losses.append(accumulate_gradients(Accelerator(cpu=True), model, rows, range(4), 2))
        assert {parameter.grad.dtype for parameter in model.parameters()} == {losses[-1].dtype} == {torch.float32}
    assert products == {torch.float32, torch.bfloat16}
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_grad_norm", [0.01, 100.0], ids=["beyond the norm", "within it"])
def test_the_optimizer_is_given_gradients_of_no_more_than_the_norm(
    options, sample_folders, tmp_path, fp32, monkeypatch, max_grad_norm
):
    """Read off the moments that one update of AdamW leaves: the first is (1 - 0.9) times the gradient, the second
    (1 - 0.95) times its square."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # a GPU would compute in bf16
    pretrain(options(tmp_path / "run", max_tokens=512, max_grad_norm=max_grad_norm))
    (recorded,) = (record["grad_norm"] for record in read_metrics(tmp_path / "run") if "grad_norm" in record)
    moments = load_file(tmp_path / "run/checkpoints/step-1/optimizer.safetensors")

    rows = PackedRows(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    batch = {name: torch.from_numpy(array) for name, array in rows.batch(range(8)).items()}
    torch.manual_seed(0)
    model = make_model(TINY_MODEL).train()
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
    assert 0.01 < norm < 100.0
    assert recorded == pytest.approx(norm, rel=1e-4)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad * min(1.0, max_grad_norm / norm)
        for moment, expected in (("exp_avg", 0.1 * gradient), ("exp_avg_sq", 0.05 * gradient**2)):
            error = (moments[f"{name}.{moment}"] - expected).norm() / expected.norm()
            assert error < 1e-3, f"{name}.{moment}"


def test_weight_decay_is_for_matrices_alone():
    model = make_model(TINY_MODEL)
    optimizer = make_optimizer(model, weight_decay=0.1, betas=(0.9, 0.95))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name), name


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    rates = [learning_rate_at(update, updates=100, warmup_updates=10, peak=1.0) for update in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([(100 - i) / 90 for i in range(10, 100)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": TINY_MODEL | {"vocab_size": 300}}, "512 entries, the model only 300"),
        ({"model": TINY_MODEL | {"num_attention_heads": 3, "num_key_value_heads": 2}}, "multiple of"),
        ({"model": {"model_type": "gtp2"}}, "gtp2"),
        ({"model": {"model_type": "gpt2", "n_layers": 3}}, "n_layers"),
        ({"model": "no/such/folder/or/name"}, "no/such/folder/or/name"),
        ({"batch_tokens": 500}, "no multiple of 256.*256 is"),
        ({"tokens": Path("no-such-folder")}, "no-such-folder"),
        ({"resume": True}, "no checkpoint"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_is_named_before_anything_is_written(options, tmp_path, changes, message):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        pretrain(options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(finished_run, options):
    before = (finished_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        pretrain(options(finished_run))
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    damaged = run / "checkpoints/step-8/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(UserError, match=str(damaged)):
        pretrain(options(run, resume=True))


def test_mistakes_reach_people_in_one_line(run_script, sample_folders, tmp_path):
    done = run_script(
        "pretrain", "--model", json.dumps(TINY_MODEL | {"vocab_size": 300}), "--tokens", sample_folders.tokens,
        "--output", tmp_path / "run", "--max-tokens", 512, "--batch-tokens", 512, "--micro-batch-rows", 4,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_disk_that_is_full_leaves_no_half_checkpoint(options, sample_folders, small_disk):
    with pytest.raises(UserError, match="no space left"):
        pretrain(options(small_disk / "run"))
    assert not list(small_disk.rglob("step-*")) and not (small_disk / "run" / "best").exists()


def test_training_needs_no_more_than_a_bare_machine_has(sample_folders, repository, tmp_path):
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
        "--max-tokens", 256, "--batch-tokens", 256, "--micro-batch-rows", 4, "--evaluation-documents", 1,
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


@pytest.mark.slow
def test_two_processes_train_as_one_does(finished_run, sample_folders, tmp_path):
    recipe = yaml.safe_load((finished_run / "config.yaml").read_text()) | {"output": str(tmp_path / "two")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = Path(__file__).resolve().parents[1] / "scripts" / "pretrain.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), "--recipe"]
    done = subprocess.run([*command, tmp_path / "recipe.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(run / "checkpoints/step-8/model.safetensors") for run in (finished_run, tmp_path / "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
