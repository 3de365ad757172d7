"""What a step computes, and that one that fails changes nothing."""

import functools

import pytest
import torch
from accelerate import Accelerator
from in_precision import set_precision
from pipeline_folders import TINY_MODEL
from safetensors.torch import load_file
from transformers import PreTrainedModel

from healthslm.errors import UserError
from healthslm.models import make_model
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training import learner, loop
from healthslm.training.checkpoint import find_damage
from healthslm.training.gradients import accumulate_gradients, micro_batches
from healthslm.training.loop import pretrain
from healthslm.training.packing import PackedSequences
from healthslm.training.run_folder import read_metrics

pytest_plugins = "training_fixtures"
pytestmark = pytest.mark.usefixtures("short_runs_are_quick")


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
    pretrain_options, sample_folders, tmp_path, fp32, monkeypatch, max_grad_norm
):
    """Read off the moments that one step of AdamW leaves: the first is (1 - 0.9) times the gradient, the second
    (1 - 0.95) times its square."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # a GPU would compute in bf16
    pretrain(pretrain_options(tmp_path / "run", max_tokens=512, warmup_tokens=0, max_grad_norm=max_grad_norm))
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


@pytest.mark.parametrize("what", ["loss", "gradient", "no gradient"])
def test_a_failed_step_changes_nothing_but_the_position_in_the_data(
    pretrain_options, precision, tmp_path, failing_steps, what
):
    """The fifth step is skipped: weights and moments are the same before and after it."""
    failing_steps(range(4, 5), what)
    run = tmp_path / "run"
    pretrain(pretrain_options(run, max_tokens=5 * 512, save_every=1, keep_checkpoints=9))
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = (run / f"checkpoints/step-{step}" / name for step in (4, 5))
        assert before.read_bytes() == after.read_bytes()
    (skipped,) = (record for record in read_metrics(run) if "skipped" in record)
    assert skipped["step"] == 5 and skipped["skipped"]["sequences"] == [32, 40] and "loss" not in skipped
    documents = skipped["skipped"]["documents"]
    assert len(documents) == 8 and all(0 <= number < 10**6 for sequence in documents for number in sequence)


@pytest.mark.slow
def test_a_compiled_model_trains_like_an_eager_one(finished_run, pretrain_options, tmp_path, monkeypatch):
    compilers = []

    def compiler(graph, inputs):
        compilers.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # the default one takes a minute

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler, fullgraph=True))
    torch._dynamo.reset()
    pretrain(pretrain_options(tmp_path / "run", compile=True))
    assert compilers
    plain, compiled = (
        [r["loss"] for r in read_metrics(run) if "loss" in r] for run in (finished_run, tmp_path / "run")
    )
    assert compiled == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize("what", ["gradient", "no gradient"])
def test_a_run_ends_when_too_many_steps_in_a_row_fail(pretrain_options, tmp_path, failing_steps, monkeypatch, what):
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 3)
    failing_steps(range(4, 9), what)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=f"3 steps in a row failed.*the last checkpoint is {run}/checkpoints/step-4"):
        pretrain(pretrain_options(run))
    assert find_damage(run / "checkpoints/step-4") is None


def test_a_jump_of_the_loss_is_recorded_with_its_sequences(pretrain_options, tmp_path, monkeypatch):
    real = learner.accumulate_gradients
    calls = iter(range(1000))
    monkeypatch.setattr(
        learner, "accumulate_gradients", lambda *arguments: real(*arguments) * (3.0 if next(calls) == 104 else 1.0)
    )
    small = TINY_MODEL | {"num_hidden_layers": 1}
    pretrain(
        pretrain_options(tmp_path / "run", model=small, max_tokens=106 * 256, batch_tokens=256, evaluate_every=1000)
    )
    (spike,) = (record for record in read_metrics(tmp_path / "run") if "spike" in record)
    assert spike["step"] == 105 and spike["spike"]["sequences"] == [104 * 4, 105 * 4]


def test_progress_is_reported_after_every_micro_batch(sample_folders):
    sequences = PackedSequences(TokenizedSplit(sample_folders.tokens, "train"), context=64, seed=0)
    reported: list[int] = []
    model = make_model(TINY_MODEL).train()
    (batches,) = micro_batches(Accelerator(cpu=True), model, sequences, [range(8)], 2)
    accumulate_gradients(Accelerator(cpu=True), model, batches, progress=reported.append)
    assert reported == [2 * 64] * 4
