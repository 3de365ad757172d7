"""The estimate of a run, compared with values that are counted, measured or derived in another way."""

import re
from pathlib import Path

import pytest
import torch
import varlen_on_cpu  # noqa: F401
from paths import REPOSITORY
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from healthslm.arguments import parse
from healthslm.models import accepts, make_model
from healthslm.training import plan as planning
from healthslm.training.attention import PACKED_DOCUMENTS, VARLEN, document_bounds
from healthslm.training.optimization import make_optimizers
from healthslm.training.options import PretrainOptions
from healthslm.training.plan import describe_plan, fit_micro_batch, flops_per_token, memory_by_part
from healthslm.training.precision import bf16_autocast
from healthslm.training.recipe import make_schedule

CPU = torch.device("cpu")
CONTEXT, SEQUENCES = 128, 4
HEALTHSLM = {
    "model_type": "healthslm", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT,
}  # fmt: skip
BOTH = pytest.mark.parametrize("shape", [HEALTHSLM, GPT2], ids=["healthslm", "gpt2"])
# Documents of each sequence in the micro-batch that takes the most memory: several need a mask, one needs long scores.
FULLEST = pytest.mark.parametrize(("attention", "documents"), [("sdpa", 2), (PACKED_DOCUMENTS, 1)])


def make_options(shape: dict, **changes) -> PretrainOptions:
    values = {"tokens": Path("tokens"), "output": Path("run"), "max_tokens": 10_000, "micro_batch_size": SEQUENCES}
    return PretrainOptions(model=shape, **(values | changes))


def on_meta(shape: dict, attention: str = "sdpa") -> PreTrainedModel:
    with torch.device("meta"):
        model = make_model(shape)
    model.set_attn_implementation(attention)
    return model


def on_cpu(shape: dict, attention: str = "sdpa") -> PreTrainedModel:
    model = make_model(shape).train()
    model.set_attn_implementation(attention)
    return model


def micro_batch(model: PreTrainedModel, attention: str = "sdpa", documents: int = 1) -> dict:
    """Keyword arguments of a micro-batch as in training, with a number of documents in each sequence."""
    length = CONTEXT // documents
    ids = torch.randint(512, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "shift_labels": ids, "num_items_in_batch": ids.numel()}
    batch |= {"position_ids": torch.arange(length).repeat(SEQUENCES, documents), "use_cache": False}
    if accepts(model, "skip_logits"):
        batch["skip_logits"] = True
    bounds = document_bounds(batch["position_ids"], attention)
    if bounds is not None:
        batch["cu_seq_lens_q"] = bounds
    return batch


def figures(plan: str) -> dict[str, str]:
    """The exact value of each line of an estimate."""
    return dict(re.findall(r"^ +(\S.*?) {2,}([\d,.]+)(?: .*)?$", plan, re.MULTILINE))


def plan_of_recipe(name: str, *arguments: str, processes: int = 1) -> dict[str, str]:
    options = parse(PretrainOptions, ["--recipe", str(REPOSITORY / f"configs/{name}.yaml"), *arguments])
    model = on_meta(options.model)
    schedule = make_schedule(options, model.config.max_position_embeddings, processes)
    return figures(describe_plan(model, schedule, options, 54_415_447, processes, CPU))


def test_the_estimate_of_the_released_model_has_its_published_values():
    plan = plan_of_recipe("healthslm-15m", "--batch-tokens", "65536", "--micro-batch-size", "4", processes=2)
    assert plan["parameters"] == "15,276,288"
    assert plan["embeddings"] == "8,192,000"
    assert plan["others"] == "7,084,288"
    assert plan["tensors to train"] == "110"
    assert int(plan["operations a token"].replace(",", "")) / 1e6 == pytest.approx(110, abs=1)
    assert plan["weights"] == plan["gradients"] == f"{4 * 15_276_288:,}"
    assert plan["micro-batches of a step and process"] == "8"  # 65,536 / (2 processes x 4 sequences x 1,024)


def test_a_gpt2_is_estimated_too():
    plan = plan_of_recipe("lightbrain-tiny", "--muon-learning-rate", "0.001")
    assert plan["parameters"] == "29,995,392"
    assert plan["embeddings"] == f"{(50_257 + 128) * 384:,}"
    assert plan["moments of Muon"] == f"{4 * 6 * 12 * 384**2:,}"  # one moment of twelve squares a layer


def test_tokens_epochs_and_hours_follow_from_the_schedule():
    options = make_options(HEALTHSLM, max_tokens=1_000_000, batch_tokens=4096, warmup_tokens=0, tokens_per_second=2500)
    schedule = make_schedule(options, CONTEXT, processes=1)
    plan = describe_plan(on_meta(HEALTHSLM), schedule, options, 400_000, 1, CPU)
    tokens = 245 * 4096  # the first multiple of a step at a million
    assert figures(plan)["tokens"] == f"{tokens:,}"
    assert figures(plan)["steps"] == "245"
    assert figures(plan)["epochs"] == f"{tokens / 400_000:.2f}"
    assert figures(plan)["hours"] == "0.11"  # 1,003,520 / 2,500 = 401 s
    assert "at 2,500 tokens a second" in plan


@BOTH
def test_operations_are_those_of_the_matrix_products(shape):
    # Eager attention also computes the scores of later tokens, which the estimate doesn't count.
    model = on_cpu(shape, attention="eager")
    ids = torch.zeros(1, CONTEXT, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    later_scores = 6 * 3 * 64 * CONTEXT
    assert flops_per_token(on_meta(shape), CONTEXT) + later_scores == pytest.approx(
        counter.get_total_flops() / CONTEXT, rel=0.01
    )


@BOTH
@pytest.mark.parametrize("muon_learning_rate", [None, 1e-3], ids=["adamw", "muon"])
def test_weights_gradients_and_moments_equal_those_of_a_real_step(shape, muon_learning_rate):
    options = make_options(shape, muon_learning_rate=muon_learning_rate)
    model = on_cpu(shape)
    optimizers = make_optimizers(
        model,
        learning_rate=1e-3,
        muon_learning_rate=muon_learning_rate,
        weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    model(**micro_batch(model)).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    memory = memory_by_part(on_meta(shape), options, CONTEXT, CPU)
    assert memory["weights"] == sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert memory["gradients"] == sum(p.grad.untyped_storage().nbytes() for p in model.parameters())
    for optimizer in optimizers:
        tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
        expected = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert memory[f"moments of {type(optimizer).__name__}"] == expected


@BOTH
@pytest.mark.parametrize(("attention", "documents"), [("sdpa", 2), (PACKED_DOCUMENTS, 1), (VARLEN, 1)])
def test_activations_are_what_autograd_saves_for_the_backward_pass(shape, attention, documents, precision):
    model = on_cpu(shape, attention)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    batch = micro_batch(model, attention, documents)
    bounds = {name: batch[name] for name in ("cu_seq_lens_q",) if name in batch}
    with bf16_autocast(CPU), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **bounds)
    memory = memory_by_part(on_meta(shape, attention), make_options(shape), CONTEXT, CPU)
    expected = sum(storage.nbytes() for storage in saved.values())
    assert memory["bf16 copies"] + memory["activations"] == pytest.approx(expected, rel=0.03)


@BOTH
@FULLEST
def test_the_peak_equals_what_pytorch_allocates_for_a_micro_batch(shape, attention, documents, precision):
    model = on_cpu(shape, attention)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = micro_batch(model, attention, documents)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, bf16_autocast(CPU):
        model(**batch).loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    memory = memory_by_part(on_meta(shape, attention), make_options(shape), CONTEXT, CPU)
    planned = memory["bf16 copies"] + memory["activations"] + memory["logits and temporaries"]
    assert planned == pytest.approx(peak, rel=0.03)


def test_a_micro_batch_is_the_largest_that_fits_into_the_free_memory_of_a_gpu(monkeypatch):
    options = make_options(HEALTHSLM, micro_batch_size=None, batch_tokens=2 * 24 * CONTEXT)
    model = on_meta(HEALTHSLM, VARLEN)
    memory = {
        sequences: sum(
            memory_by_part(model, make_options(HEALTHSLM, micro_batch_size=sequences), CONTEXT, CPU).values()
        )
        for sequences in (1, 2, 3, 4, 6, 8, 12, 24)
    }
    for free in (2 * memory[1], 2 * memory[4], 2 * memory[24]):
        monkeypatch.setattr(planning, "free_memory", lambda device, free=free: free)
        fitting = [sequences for sequences, needed in memory.items() if needed <= 0.8 * free]
        assert fit_micro_batch(model, options, CONTEXT, 2, CPU) == max(fitting)
    assert max(fitting) == 24


def test_on_a_cpu_a_micro_batch_has_at_most_eight_sequences_and_divides_a_step():
    for sequences, expected in ((64, 8), (12, 6), (7, 7), (22, 2)):
        options = make_options(HEALTHSLM, micro_batch_size=None, batch_tokens=sequences * CONTEXT)
        assert fit_micro_batch(on_meta(HEALTHSLM), options, CONTEXT, 1, CPU) == expected
    asked_for = make_options(HEALTHSLM, micro_batch_size=32, batch_tokens=64 * CONTEXT)
    assert fit_micro_batch(on_meta(HEALTHSLM), asked_for, CONTEXT, 1, CPU) == 32


def test_a_dry_run_prints_the_estimate_and_writes_nothing(sample_folders, run_script, tmp_path):
    shape = '{"model_type": "healthslm", "vocab_size": 512, "hidden_size": 32, "max_position_embeddings": 64}'
    options = ("--tokens", sample_folders.tokens, "--output", "run", "--max-tokens", 4096, "--batch-tokens", 512)
    dry = ("--warmup-tokens", 0, "--dry-run", "--tokens-per-second", 1000)
    done = run_script("pretrain", "--model", shape, *options, *dry, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(done.stdout)["tokens"] == "4,096"
    assert not list(tmp_path.iterdir())
