"""Pretraining: what an update computes, what a run leaves behind, and that a resumed run is the run."""

import functools
import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import constants
from in_precision import set_precision
from pipeline_folders import TINY_MODEL
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from healthslm.arguments import parse
from healthslm.errors import UserError
from healthslm.evaluation.bits_per_byte import score_documents
from healthslm.models import make_model
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training import checkpoint, loop, recipe
from healthslm.training.checkpoint import find_damage
from healthslm.training.gradients import accumulate_gradients, micro_batches
from healthslm.training.loop import pretrain
from healthslm.training.metrics import read_metrics
from healthslm.training.packing import PackedRows
from healthslm.training.precision import bf16_autocast
from healthslm.training.recipe import PretrainOptions

TINY_GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
}  # fmt: skip
UPDATES = 8
REPOSITORY = Path(__file__).resolve().parents[1]


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


@pytest.fixture(autouse=True)
def short_runs_are_quick(monkeypatch) -> Iterator[None]:
    """Draw no curves and keep what is in memory out of `gc.collect`, which take most of the time of a short run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def finished_run(options, precision, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(options(run))
    return run


def test_a_run_leaves_what_its_documentation_says(finished_run):
    names = {path.name for path in finished_run.iterdir()} - {"tensorboard"}
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
    assert len(losses) == UPDATES
    assert losses[-1] < losses[0] - 0.1


def test_best_is_the_model_with_the_fewest_validation_bits(finished_run, sample_folders):
    recorded = [r["validation_bits_per_byte"] for r in read_metrics(finished_run) if "validation_bits_per_byte" in r]
    assert len(recorded) == 3  # at the start, at update 4 and at the end
    split = TokenizedSplit(sample_folders.tokens, "validation")
    best = AutoModelForCausalLM.from_pretrained(finished_run / "best", trust_remote_code=True)
    with bf16_autocast(torch.device("cpu")):  # as training computes it
        score = score_documents(best, [split.document(i) for i in range(3)], split.document_bytes[:3])
    assert score.bits_per_byte == pytest.approx(min(recorded), rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": TINY_GPT2},
        {"muon_learning_rate": 5e-3},
    ],
    ids=["healthslm", "gpt2 with dropout", "muon"],
)
def test_a_resumed_run_ends_with_the_bytes_of_one_that_never_stopped(options, precision, tmp_path, changes):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pretrain(options(whole, **changes))
    shutil.copytree(whole, stopped)
    last = max((whole / "checkpoints").iterdir(), key=lambda path: int(path.name[5:])).name
    shutil.rmtree(stopped / "checkpoints" / last)
    pretrain(options(stopped, resume=True, **changes))
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


def test_a_device_that_is_an_update_ahead_of_its_notes_ends_with_the_same_bytes(options, tmp_path, monkeypatch):
    """As a GPU is."""
    in_step, ahead = tmp_path / "in step", tmp_path / "ahead"
    changes = {"muon_learning_rate": 5e-3, "save_every": 3, "evaluate_every": 5, "keep_checkpoints": 9}
    pretrain(options(in_step, **changes))
    monkeypatch.setattr(loop, "updates_ahead", lambda device: 1)
    pretrain(options(ahead, **changes))
    for step in (3, 6, 8):
        for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
            file = f"checkpoints/step-{step}/{name}"
            assert (ahead / file).read_bytes() == (in_step / file).read_bytes()
    noted = [[(r["update"], r.get("loss")) for r in read_metrics(run)] for run in (in_step, ahead)]
    assert noted[0] == noted[1]


def test_a_run_may_be_resumed_on_its_last_checkpoint(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = weights(run / "checkpoints/step-8")
    pretrain(options(run, resume=True))
    assert weights(run / "checkpoints/step-8") == before


def test_training_goes_on_from_the_weights_of_a_folder(finished_run, options, tmp_path):
    pretrain(options(tmp_path / "further", model=str(finished_run / "best"), learning_rate=0.0, weight_decay=0.0))
    assert weights(tmp_path / "further/best") == weights(finished_run / "best")


@pytest.fixture(scope="module")
def other_tokens(sample_folders, tmp_path_factory) -> Path:
    """The same corpus by another tokenizer of the same size: two of its tokens have changed places."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(sample_folders.tokenizer, root / "tokenizer")
    path = root / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = str(root / "tokenizer")
    tokenize_corpus(TokenizeOptions(corpus=sample_folders.corpus, tokenizer=tokenizer, output=root / "tokens"))
    return root / "tokens"


def test_weights_refuse_the_tokens_of_another_tokenizer_unless_told_so(finished_run, options, other_tokens, tmp_path):
    changes = {"model": str(finished_run / "best"), "tokens": other_tokens, "max_tokens": 512}
    with pytest.raises(UserError, match=f"not the tokenizer of the weights in {finished_run}/best.*--accept-changes"):
        pretrain(options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    pretrain(options(tmp_path / "run", **changes, accept_changes=True))


def test_a_configuration_without_weights_takes_any_tokenizer(finished_run, options, other_tokens, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished_run / "best", folder)
    (folder / "model.safetensors").unlink()
    pretrain(options(tmp_path / "run", model=str(folder), tokens=other_tokens, max_tokens=512))


def test_weights_of_the_hub_refuse_the_tokens_of_another_tokenizer(options, sample_folders, other_tokens, tmp_path):
    """Of a repository like GPT-2's: with the vocabulary and the merges in files of their own, and no tokenizer.json."""
    repository = Path(constants.HF_HUB_CACHE) / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    make_model(TINY_GPT2).save_pretrained(snapshot)
    content = json.loads((sample_folders.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    (snapshot / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (snapshot / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in content["model"]["merges"]))
    special = {"eos_token": content["added_tokens"][0]["content"], "tokenizer_class": "GPT2Tokenizer"}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(special))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)

    tokens = tmp_path / "tokens"
    tokenize_corpus(TokenizeOptions(corpus=sample_folders.corpus, tokenizer="someone/tiny", output=tokens))
    assert not (snapshot / "tokenizer.json").exists()
    pretrain(options(tmp_path / "same", model="someone/tiny", tokens=tokens, max_tokens=512))
    with pytest.raises(UserError, match="not the tokenizer of the weights in someone/tiny"):
        pretrain(options(tmp_path / "other", model="someone/tiny", tokens=other_tokens, max_tokens=512))


def test_weights_without_a_tokenizer_are_not_compared_but_refused(finished_run, options, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished_run / "best" / name, folder)
    with pytest.raises(UserError, match=f"{folder}: no tokenizer in this folder.*--accept-changes trains"):
        pretrain(options(tmp_path / "run", model=str(folder)))


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 on every machine, where equal sums differ by rounding alone."""
    set_precision("fp32", monkeypatch.setattr)


def gradients_of(model: PreTrainedModel, rows: PackedRows, positions: range, micro_batch_rows: int) -> torch.Tensor:
    """Accumulate the gradients of one step; returns its loss."""
    accelerator = Accelerator(cpu=True)
    (batches,) = micro_batches(accelerator, model, rows, [positions], micro_batch_rows)
    return accumulate_gradients(accelerator, model, batches)


def test_four_micro_batches_of_one_row_give_the_gradients_of_one_of_four(sample_folders, fp32):
    rows = PackedRows(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    found = []
    for micro_batch_rows in (1, 4):
        torch.manual_seed(0)
        model = make_model(TINY_MODEL).train()
        loss = gradients_of(model, rows, range(8, 12), micro_batch_rows)
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_the_loss_of_an_update_is_the_mean_over_its_tokens(sample_folders, fp32):
    rows = PackedRows(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    model = make_model(TINY_MODEL).train()
    loss = gradients_of(model, rows, range(4), 2)
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
    for precision in ("fp32", "bf16"):
        set_precision(precision, monkeypatch.setattr)
        torch.manual_seed(0)
        model = make_model(TINY_MODEL).train()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: products.add(call[-1].dtype))
        losses.append(gradients_of(model, rows, range(4), 2))
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
    pretrain(options(tmp_path / "run", max_tokens=512, warmup_tokens=0, max_grad_norm=max_grad_norm))
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
        ({"resume": True}, "no run to resume"),
        ({"context": 512}, "context: must be at most 64, the model's context, not 512"),
        ({"context": 512, "dry_run": True}, "context: must be at most 64, the model's context, not 512"),
        ({"save_every": 0}, "save_every: must be at least 1, not 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_is_named_before_anything_is_written(options, tmp_path, changes, message):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        pretrain(options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_no_checkpoint_yet_begins_again(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints")
    pretrain(options(run, resume=True))
    assert weights(run / "checkpoints/step-8") == weights(finished_run / "checkpoints/step-8")
    assert [r["update"] for r in read_metrics(run) if "loss" in r] == list(range(1, UPDATES + 1))


def test_a_run_is_not_overwritten(finished_run, options):
    before = (finished_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        pretrain(options(finished_run))
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(finished_run, options, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    damaged = run / "checkpoints/step-8/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    pretrain(options(run, resume=True))
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
def test_a_run_is_not_resumed_with_other_options_unless_told_so(finished_run, options, tmp_path, changes, message):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints/step-8")
    with pytest.raises(UserError, match=message):
        pretrain(options(run, resume=True, **changes))
    pretrain(options(run, resume=True, accept_changes=True, **changes))
    assert read_metrics(run)[-1]["tokens"] == changes.get("max_tokens", UPDATES * 512)


def test_a_run_is_not_resumed_on_another_corpus(finished_run, options, sample_folders, tmp_path):
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    shutil.copytree(finished_run, run)
    shutil.copytree(sample_folders.tokens, tokens)
    pretrain(options(run, resume=True, tokens=tokens))  # the same corpus, elsewhere
    info = json.loads((tokens / "tokens.json").read_text())
    info["splits"].pop("test")
    (tokens / "tokens.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="tokens.json was "):
        pretrain(options(run, resume=True, tokens=tokens))


def test_options_that_change_no_result_may_change(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    pretrain(options(run, resume=True, micro_batch_rows=2, save_every=1, evaluate_every=8, keep_checkpoints=1))


@pytest.fixture
def spoilt_updates(monkeypatch) -> Callable[..., None]:
    """Have the loss of some updates, counted from 0, or their gradients, become infinite, or all gradients zero."""
    real = loop.accumulate_gradients

    def spoil(updates: range, what: str) -> None:
        calls = iter(range(1000))

        def accumulate(accelerator, model, *arguments):
            loss = real(accelerator, model, *arguments)
            if next(calls) in updates:
                if what == "loss":
                    return loss * torch.inf
                if what == "no gradient":
                    for parameter in model.parameters():
                        parameter.grad.zero_()
                else:
                    next(model.parameters()).grad[0] = torch.nan
            return loss

        monkeypatch.setattr(loop, "accumulate_gradients", accumulate)

    return spoil


@pytest.mark.parametrize("what", ["loss", "gradient", "no gradient"])
def test_an_update_that_failed_changes_nothing_but_the_place_in_the_data(
    options, finished_run, tmp_path, spoilt_updates, what
):
    """Update 4 is skipped: before it weights and moments are those of the whole run, after it they go on from there."""
    spoilt_updates(range(4, 5), what)
    run = tmp_path / "run"
    pretrain(options(run, max_tokens=5 * 512, save_every=1, keep_checkpoints=9))
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = (run / f"checkpoints/step-{step}" / name for step in (4, 5))
        assert before.read_bytes() == after.read_bytes()
    (skipped,) = (record for record in read_metrics(run) if "skipped" in record)
    assert skipped["update"] == 5 and skipped["skipped"]["positions"] == [32, 40] and "loss" not in skipped
    documents = skipped["skipped"]["documents"]
    assert len(documents) == 8 and all(0 <= number < 10**6 for row in documents for number in row)


@pytest.mark.slow
def test_a_compiled_network_trains_as_a_plain_one(finished_run, options, tmp_path, monkeypatch):
    compilers = []

    def compiler(graph, inputs):
        compilers.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # the default one takes a minute

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler, fullgraph=True))
    torch._dynamo.reset()
    pretrain(options(tmp_path / "run", compile=True))
    assert compilers
    plain, compiled = (
        [r["loss"] for r in read_metrics(run) if "loss" in r] for run in (finished_run, tmp_path / "run")
    )
    assert compiled == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize("what", ["gradient", "no gradient"])
def test_a_run_gives_up_when_too_many_updates_in_a_row_fail(options, tmp_path, spoilt_updates, monkeypatch, what):
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 3)
    spoilt_updates(range(4, 9), what)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=f"3 updates in a row failed.*last good checkpoint is {run}/checkpoints/step-4"):
        pretrain(options(run))
    assert find_damage(run / "checkpoints/step-4") is None


def test_a_leap_of_the_loss_is_noted_with_its_place(options, tmp_path, monkeypatch):
    real = loop.accumulate_gradients
    calls = iter(range(1000))
    monkeypatch.setattr(
        loop, "accumulate_gradients", lambda *arguments: real(*arguments) * (3.0 if next(calls) == 104 else 1.0)
    )
    small = TINY_MODEL | {"num_hidden_layers": 1}
    pretrain(options(tmp_path / "run", model=small, max_tokens=106 * 256, batch_tokens=256, evaluate_every=1000))
    (spike,) = (record for record in read_metrics(tmp_path / "run") if "spike" in record)
    assert spike["update"] == 105 and spike["spike"]["positions"] == [104 * 4, 105 * 4]


def test_a_full_disk_leaves_the_last_checkpoint_whole(options, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    real = checkpoint.save_file
    calls = iter([real, full])
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(UserError, match="step-8: no space left"):
        pretrain(options(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-4"]
    assert find_damage(tmp_path / "run/checkpoints/step-4") is None


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


def test_progress_is_told_after_every_micro_batch_and_adds_up_to_the_step(sample_folders):
    rows = PackedRows(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    told: list[int] = []
    model = make_model(TINY_MODEL).train()
    (batches,) = micro_batches(Accelerator(cpu=True), model, rows, [range(8)], 2)
    accumulate_gradients(Accelerator(cpu=True), model, batches, progress=told.append)
    assert told == [2 * 64] * 4


def test_the_bar_moves_within_a_step_and_ends_at_the_tokens_of_the_run(options, tmp_path, monkeypatch):
    seen: list[int] = []

    class Bar(loop.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append(self.n)

    monkeypatch.setattr(loop, "tqdm", Bar)
    pretrain(options(tmp_path / "run", max_tokens=3 * 512, micro_batch_rows=2))
    assert seen == list(range(128, 3 * 512 + 1, 128))


def test_the_bar_s_time_left_does_not_count_evaluations(options, tmp_path, monkeypatch):
    """Evaluations of a second each among steps of a few milliseconds."""
    real, spent = loop.score_documents, []

    def slowly(*arguments, **settings):
        time.sleep(1.0)
        return real(*arguments, **settings)

    class Bar(loop.tqdm):
        def close(self):
            if not self.disable:
                spent.append(self.format_dict["elapsed"])
            super().close()

    monkeypatch.setattr(loop, "score_documents", slowly)
    monkeypatch.setattr(loop, "tqdm", Bar)
    started = time.monotonic()
    pretrain(options(tmp_path / "run", max_tokens=2 * 512, evaluate_every=1))
    whole = time.monotonic() - started
    assert whole > 3.0 and spent[0] < whole - 3.0


def test_many_passes_over_a_small_corpus_are_warned_of(options, sample_folders, tmp_path, caplog, monkeypatch):
    tokens = TokenizedSplit(sample_folders.tokens, "train").num_tokens
    pretrain(options(tmp_path / "run", max_tokens=20 * tokens - 512, dry_run=True))
    assert not [record for record in caplog.records if "passes" in record.message]
    pretrain(options(tmp_path / "run", max_tokens=174 * tokens, dry_run=True))
    (warning,) = (record for record in caplog.records if "passes" in record.message)
    assert warning.levelname == "WARNING"
    assert f"174 passes over a corpus of {tokens:,} tokens" in warning.message
    assert f"lower max_tokens (20 passes are {20 * tokens:,})" in warning.message

    caplog.clear()
    monkeypatch.setattr(recipe, "MANY_PASSES", 0)  # so that a short run has many
    pretrain(options(tmp_path / "run", max_tokens=512))
    assert [record for record in caplog.records if "passes over a corpus" in record.message]


@pytest.mark.slow
def test_two_processes_train_as_one_does(finished_run, precision, tmp_path):
    recipe = yaml.safe_load((finished_run / "config.yaml").read_text()) | {"output": str(tmp_path / "two")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "tests/in_precision.py", precision, "scripts/pretrain.py"]
    command += ["--recipe", tmp_path / "recipe.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(run / "checkpoints/step-8/model.safetensors") for run in (finished_run, tmp_path / "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
