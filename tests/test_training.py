"""Pretraining: what a step computes, what a run writes, and that a resumed run equals one that never stopped."""

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
from healthslm.bits_per_byte import score_documents
from healthslm.errors import UserError
from healthslm.models import make_model
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training import checkpoint, learner, log, loop, recipe
from healthslm.training.checkpoint import find_damage
from healthslm.training.gradients import accumulate_gradients, micro_batches
from healthslm.training.loop import pretrain
from healthslm.training.options import PretrainOptions
from healthslm.training.packing import PackedSequences
from healthslm.training.precision import bf16_autocast
from healthslm.training.run_folder import read_metrics

TINY_GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
}  # fmt: skip
STEPS = 8
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def options(sample_folders) -> Callable[..., PretrainOptions]:
    def make(output: Path, **changes) -> PretrainOptions:
        values = {
            "model": TINY_MODEL, "tokens": sample_folders.tokens, "max_tokens": STEPS * 512, "batch_tokens": 512,
            "micro_batch_size": 4, "learning_rate": 3e-3, "warmup_tokens": 1024, "evaluate_every": 4,
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


def test_a_device_with_a_queue_ends_with_the_same_bytes(options, tmp_path, monkeypatch):
    """A GPU computes a step while the host records the one before."""
    waiting, ahead = tmp_path / "waiting", tmp_path / "ahead"
    changes = {"muon_learning_rate": 5e-3, "save_every": 3, "evaluate_every": 5, "keep_checkpoints": 9}
    pretrain(options(waiting, **changes))
    monkeypatch.setattr(loop, "steps_ahead", lambda device: 1)
    pretrain(options(ahead, **changes))
    for step in (3, 6, 8):
        for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
            file = f"checkpoints/step-{step}/{name}"
            assert (ahead / file).read_bytes() == (waiting / file).read_bytes()
    losses = [[(r["step"], r.get("loss")) for r in read_metrics(run)] for run in (waiting, ahead)]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_changes_nothing(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    pretrain(options(run, resume=True))
    assert weights(run / "checkpoints/step-8") == weights(finished_run / "checkpoints/step-8")
    steps = [record["step"] for record in read_metrics(run) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_training_starts_from_the_weights_of_a_folder(finished_run, options, tmp_path):
    pretrain(options(tmp_path / "further", model=str(finished_run / "best"), learning_rate=0.0, weight_decay=0.0))
    assert weights(tmp_path / "further/best") == weights(finished_run / "best")


@pytest.fixture(scope="module")
def other_tokens(sample_folders, tmp_path_factory) -> Path:
    """The same corpus, tokenized with two tokens of the vocabulary swapped."""
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


def test_trained_weights_refuse_tokens_of_another_tokenizer_unless_accepted(
    finished_run, options, other_tokens, tmp_path
):
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


def test_weights_from_the_hub_refuse_tokens_of_another_tokenizer(options, sample_folders, other_tokens, tmp_path):
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


def test_weights_without_a_tokenizer_are_refused(finished_run, options, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished_run / "best" / name, folder)
    with pytest.raises(UserError, match=f"{folder}: no tokenizer in this folder.*use --accept-changes to train"):
        pretrain(options(tmp_path / "run", model=str(folder)))


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 on every machine, where equal sums differ by rounding alone."""
    set_precision("fp32", monkeypatch.setattr)


def gradients_of(
    model: PreTrainedModel, sequences: PackedSequences, indices: range, micro_batch_size: int
) -> torch.Tensor:
    """Accumulate the gradients of one step; returns its loss."""
    accelerator = Accelerator(cpu=True)
    (batches,) = micro_batches(accelerator, model, sequences, [indices], micro_batch_size)
    return accumulate_gradients(accelerator, model, batches)


def test_four_micro_batches_of_one_sequence_give_the_gradients_of_one_of_four(sample_folders, fp32):
    sequences = PackedSequences(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    found = []
    for micro_batch_size in (1, 4):
        torch.manual_seed(0)
        model = make_model(TINY_MODEL).train()
        loss = gradients_of(model, sequences, range(8, 12), micro_batch_size)
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(sample_folders, fp32):
    sequences = PackedSequences(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    model = make_model(TINY_MODEL).train()
    loss = gradients_of(model, sequences, range(4), 2)
    # By definition: each document of each sequence on its own.
    batch = {name: torch.from_numpy(array) for name, array in sequences.batch(range(4)).items()}
    nats = []
    for inputs, labels, indices in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = (indices == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(inputs)], strict=True):
            logits = model(inputs[None, start:end]).logits[0]
            nats.append(torch.nn.functional.cross_entropy(logits, labels[start:end], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(nats).mean())


def test_bf16_keeps_weights_gradients_and_loss_in_fp32(sample_folders, monkeypatch):
    sequences = PackedSequences(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    losses, products = [], set()
    for precision in ("fp32", "bf16"):
        set_precision(precision, monkeypatch.setattr)
        torch.manual_seed(0)
        model = make_model(TINY_MODEL).train()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: products.add(call[-1].dtype))
        losses.append(gradients_of(model, sequences, range(4), 2))
        assert {parameter.grad.dtype for parameter in model.parameters()} == {losses[-1].dtype} == {torch.float32}
    assert products == {torch.float32, torch.bfloat16}
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_grad_norm", [0.01, 100.0], ids=["beyond the norm", "within it"])
def test_the_optimizer_is_given_gradients_of_no_more_than_the_norm(
    options, sample_folders, tmp_path, fp32, monkeypatch, max_grad_norm
):
    """Read off the moments that one step of AdamW leaves: the first is (1 - 0.9) times the gradient, the second
    (1 - 0.95) times its square."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # a GPU would compute in bf16
    pretrain(options(tmp_path / "run", max_tokens=512, warmup_tokens=0, max_grad_norm=max_grad_norm))
    (recorded,) = (record["grad_norm"] for record in read_metrics(tmp_path / "run") if "grad_norm" in record)
    moments = load_file(tmp_path / "run/checkpoints/step-1/optimizer.safetensors")

    sequences = PackedSequences(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    batch = {name: torch.from_numpy(array) for name, array in sequences.batch(range(8)).items()}
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
        ({"batch_tokens": 500}, "not a multiple of 256.*use 256"),
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


def test_a_run_without_a_checkpoint_starts_again(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints")
    pretrain(options(run, resume=True))
    assert weights(run / "checkpoints/step-8") == weights(finished_run / "checkpoints/step-8")
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, STEPS + 1))


def test_a_run_is_not_overwritten(finished_run, options):
    before = (finished_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        pretrain(options(finished_run))
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_a_run_resumes_from_the_newest_valid_checkpoint(finished_run, options, tmp_path, caplog):
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
def test_a_run_is_not_resumed_with_other_options_unless_accepted(finished_run, options, tmp_path, changes, message):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints/step-8")
    with pytest.raises(UserError, match=message):
        pretrain(options(run, resume=True, **changes))
    pretrain(options(run, resume=True, accept_changes=True, **changes))
    assert read_metrics(run)[-1]["tokens"] == changes.get("max_tokens", STEPS * 512)


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


def test_options_that_do_not_affect_the_result_may_change_when_a_run_is_resumed(finished_run, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints/step-8")
    pretrain(options(run, resume=True, micro_batch_size=2, save_every=1, evaluate_every=8, keep_checkpoints=1))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-8"]
    # Smaller micro-batches add the same gradients in another order: compared with the four steps, a rounding error.
    start, whole = (load_file(finished_run / f"checkpoints/step-{step}/model.safetensors") for step in (4, 8))
    resumed = load_file(run / "checkpoints/step-8/model.safetensors")
    for name in whole:
        assert (resumed[name] - whole[name]).norm() < 0.02 * (whole[name] - start[name]).norm(), name


def test_a_tracker_gets_the_numbers_of_the_metrics(options, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    pretrain(options(run, report_to="tensorboard"))
    shutil.rmtree(run / "checkpoints/step-8")
    pretrain(options(run, report_to="tensorboard", resume=True))
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(record["step"], record["loss"]) for record in read_metrics(run) if "loss" in record]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    assert [event.step for event in board.Scalars("validation_bits_per_byte")] == [0, 4, 8]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--report-to wandb: wandb is not installed: pip install wandb"):
        pretrain(options(tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def failing_steps(monkeypatch) -> Callable[..., None]:
    """Make the loss or the gradients of some steps, counted from 0, infinite, or all their gradients zero."""
    real = learner.accumulate_gradients

    def fail(steps: range, what: str) -> None:
        calls = iter(range(1000))

        def accumulate(accelerator, model, *arguments):
            loss = real(accelerator, model, *arguments)
            if next(calls) in steps:
                if what == "loss":
                    return loss * torch.inf
                if what == "no gradient":
                    for parameter in model.parameters():
                        parameter.grad.zero_()
                else:
                    next(model.parameters()).grad[0] = torch.nan
            return loss

        monkeypatch.setattr(learner, "accumulate_gradients", accumulate)

    return fail


@pytest.mark.parametrize("what", ["loss", "gradient", "no gradient"])
def test_a_failed_step_changes_nothing_but_the_position_in_the_data(
    options, finished_run, tmp_path, failing_steps, what
):
    """The fifth step is skipped: weights and moments are the same before and after it."""
    failing_steps(range(4, 5), what)
    run = tmp_path / "run"
    pretrain(options(run, max_tokens=5 * 512, save_every=1, keep_checkpoints=9))
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = (run / f"checkpoints/step-{step}" / name for step in (4, 5))
        assert before.read_bytes() == after.read_bytes()
    (skipped,) = (record for record in read_metrics(run) if "skipped" in record)
    assert skipped["step"] == 5 and skipped["skipped"]["sequences"] == [32, 40] and "loss" not in skipped
    documents = skipped["skipped"]["documents"]
    assert len(documents) == 8 and all(0 <= number < 10**6 for sequence in documents for number in sequence)


@pytest.mark.slow
def test_a_compiled_model_trains_like_an_eager_one(finished_run, options, tmp_path, monkeypatch):
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
def test_a_run_ends_when_too_many_steps_in_a_row_fail(options, tmp_path, failing_steps, monkeypatch, what):
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 3)
    failing_steps(range(4, 9), what)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=f"3 steps in a row failed.*the last checkpoint is {run}/checkpoints/step-4"):
        pretrain(options(run))
    assert find_damage(run / "checkpoints/step-4") is None


def test_a_jump_of_the_loss_is_recorded_with_its_sequences(options, tmp_path, monkeypatch):
    real = learner.accumulate_gradients
    calls = iter(range(1000))
    monkeypatch.setattr(
        learner, "accumulate_gradients", lambda *arguments: real(*arguments) * (3.0 if next(calls) == 104 else 1.0)
    )
    small = TINY_MODEL | {"num_hidden_layers": 1}
    pretrain(options(tmp_path / "run", model=small, max_tokens=106 * 256, batch_tokens=256, evaluate_every=1000))
    (spike,) = (record for record in read_metrics(tmp_path / "run") if "spike" in record)
    assert spike["step"] == 105 and spike["spike"]["sequences"] == [104 * 4, 105 * 4]


def test_a_full_disk_leaves_the_last_checkpoint_valid(options, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    real = checkpoint.save_file
    calls = iter([real, full])
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(UserError, match="step-8: no space left"):
        pretrain(options(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-4"]
    assert find_damage(tmp_path / "run/checkpoints/step-4") is None


def test_a_mistake_is_reported_in_one_line(run_script, sample_folders, tmp_path):
    done = run_script(
        "pretrain", "--model", json.dumps(TINY_MODEL | {"vocab_size": 300}), "--tokens", sample_folders.tokens,
        "--output", tmp_path / "run", "--max-tokens", 512, "--batch-tokens", 512, "--micro-batch-size", 4,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_full_disk_leaves_no_incomplete_checkpoint(options, sample_folders, small_disk):
    with pytest.raises(UserError, match="no space left"):
        pretrain(options(small_disk / "run"))
    assert not list(small_disk.rglob("step-*")) and not (small_disk / "run" / "best").exists()


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


def test_progress_is_reported_after_every_micro_batch(sample_folders):
    sequences = PackedSequences(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    reported: list[int] = []
    model = make_model(TINY_MODEL).train()
    (batches,) = micro_batches(Accelerator(cpu=True), model, sequences, [range(8)], 2)
    accumulate_gradients(Accelerator(cpu=True), model, batches, progress=reported.append)
    assert reported == [2 * 64] * 4


def test_the_progress_bar_moves_within_a_step_and_ends_at_the_tokens_of_the_run(options, tmp_path, monkeypatch):
    seen: list[int] = []

    class Bar(log.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append(self.n)

    monkeypatch.setattr(log, "tqdm", Bar)
    pretrain(options(tmp_path / "run", max_tokens=3 * 512, micro_batch_size=2))
    assert seen == list(range(128, 3 * 512 + 1, 128))


def test_the_remaining_time_does_not_include_evaluations(options, tmp_path, monkeypatch):
    """Evaluations take a second each, steps a few milliseconds."""
    real, spent = loop.score_documents, []

    def slowly(*arguments, **settings):
        time.sleep(1.0)
        return real(*arguments, **settings)

    class Bar(log.tqdm):
        def close(self):
            if not self.disable:
                spent.append(self.format_dict["elapsed"])
            super().close()

    monkeypatch.setattr(loop, "score_documents", slowly)
    monkeypatch.setattr(log, "tqdm", Bar)
    started = time.monotonic()
    pretrain(options(tmp_path / "run", max_tokens=2 * 512, evaluate_every=1))
    whole = time.monotonic() - started
    assert whole > 3.0 and spent[0] < whole - 3.0


def test_a_run_warns_of_many_epochs_of_a_small_corpus(options, sample_folders, tmp_path, caplog, monkeypatch):
    tokens = TokenizedSplit(sample_folders.tokens, "train").num_tokens
    pretrain(options(tmp_path / "run", max_tokens=20 * tokens - 512, dry_run=True))
    assert not [record for record in caplog.records if "epochs" in record.message]
    pretrain(options(tmp_path / "run", max_tokens=174 * tokens, dry_run=True))
    (warning,) = (record for record in caplog.records if "epochs" in record.message)
    assert warning.levelname == "WARNING"
    assert f"174 epochs of a corpus of {tokens:,} tokens" in warning.message
    assert f"lower max_tokens (20 epochs are {20 * tokens:,})" in warning.message

    caplog.clear()
    monkeypatch.setattr(recipe, "MANY_EPOCHS", 0)  # so that a short run has many
    pretrain(options(tmp_path / "run", max_tokens=512))
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


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
