"""Gradient checkpointing, compilation, export and tensor parallelism."""

import inspect
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def reset_compiler():
    """All compiled models share one limit of recompilations, because they share their code."""
    torch.compiler.reset()


# Tracing takes seconds: Llama is traced in slow tests only.
either_family = pytest.mark.parametrize("family", ("healthslm", pytest.param("llama", marks=pytest.mark.slow)))
PACKED = {"position_ids": (torch.arange(12) % 5).expand(2, -1)}


def loss_and_gradients(model: PreTrainedModel, **arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(random_ids(2, 12), labels=random_ids(2, 12), **arguments).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize(
    ("family", "arguments"),
    (("healthslm", {}), ("healthslm", PACKED), ("llama", {}), ("llama", {"use_cache": False, **PACKED})),
    ids=("plain", "packed", "llama, plain", "llama, packed"),
)
def test_gradient_checkpointing_saves_memory_and_keeps_gradients(family, arguments, use_reentrant):
    model = tiny_model(family, num_hidden_layers=4).train()

    def saved_elements(**more) -> int:
        saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_ids(2, 12), **more)
        return saved

    expected, saved = loss_and_gradients(model, **arguments), saved_elements(**arguments)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    if use_reentrant:
        model.enable_input_require_grads()
    assert_close(loss_and_gradients(model, **arguments), expected, atol=1e-6, rtol=1e-5)
    assert saved_elements(**arguments) < saved / 2
    model.gradient_checkpointing_disable()
    assert saved_elements(**arguments) == saved


@pytest.mark.parametrize(
    ("family", "attention", "arguments"),
    (
        pytest.param("healthslm", "sdpa", {}, id="plain"),
        pytest.param("healthslm", "sdpa", PACKED, id="packed"),
        pytest.param("healthslm", "eager", PACKED, id="packed, eager attention", marks=pytest.mark.slow),
        pytest.param("llama", "sdpa", {}, id="llama, plain", marks=pytest.mark.slow),
        pytest.param("llama", "sdpa", {"use_cache": False, **PACKED}, id="llama, packed", marks=pytest.mark.slow),
    ),
)
def test_a_training_step_compiles_without_graph_breaks(family, attention, arguments):
    model = tiny_model(family, attention=attention, num_hidden_layers=1).train()
    eager = loss_and_gradients(model, **arguments)
    compiled = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), **arguments)
    assert_close(compiled[0], eager[0])
    assert_close({name.removeprefix("_orig_mod."): gradient for name, gradient in compiled[1].items()}, eager[1])


@either_family
def test_one_compiled_graph_works_for_all_lengths(family):
    graphs = []

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        graphs.append(graph)
        return graph

    model = tiny_model(family, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for length in (12, 9, 30):
            input_ids = random_ids(2, length)
            assert_close(compiled(input_ids, use_cache=False).logits, model(input_ids).logits)
    assert len(graphs) == 1


@either_family
@pytest.mark.parametrize("strict", (pytest.param(True, marks=pytest.mark.slow), False))
def test_an_exported_model_accepts_other_shapes_and_other_documents(family, strict):
    model = tiny_model(family, num_hidden_layers=1)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = {"input_ids": random_ids(2, 12), "position_ids": torch.arange(12).repeat(2, 1)}
    exported = torch.export.export(
        model,
        (),
        {**example, "use_cache": False},
        strict=strict,
        dynamic_shapes={**dict.fromkeys(example, sizes), "use_cache": None},
    ).module()
    packed = {"input_ids": random_ids(3, 10), "position_ids": (torch.arange(10) % 4).repeat(3, 1), "use_cache": False}
    assert_close(exported(**packed).logits, model(**packed).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_enable_input_require_grads_works_with_frozen_weights(family):
    """Adapters need it with gradient checkpointing."""
    model = tiny_model(family).train().requires_grad_(False)
    model.enable_input_require_grads()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    model(random_ids(2, 5)).logits.sum().backward()
    assert seen[0].requires_grad
    model.disable_input_require_grads()


def compare_tensor_parallel(folder: str) -> None:
    """Run in each of two processes: compare a model that they share with one on a single process."""
    import torch
    from torch import distributed
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    distributed.init_process_group("gloo")
    single = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    options = {"distributed_config": DistributedConfig(tp_size=2)}
    shared = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)

    weights = [model.model.layers[0].self_attn.q_proj.weight for model in (single, shared)]
    assert weights[1].to_local().shape[0] == weights[0].shape[0] / 2
    input_ids = torch.arange(2, 26).view(2, 12)
    torch.testing.assert_close(shared(input_ids).logits, single(input_ids).logits, atol=1e-5, rtol=1e-5)
    for skip_logits in (False, True):
        losses = [model(input_ids, labels=input_ids, skip_logits=skip_logits).loss for model in (single, shared)]
        torch.testing.assert_close(*losses)
        for weight, loss in zip(weights, losses, strict=True):
            weight.grad = None
            loss.backward()
        half = weights[0].grad.chunk(2)[distributed.get_rank()]
        torch.testing.assert_close(weights[1].grad.to_local(), half, atol=1e-5, rtol=1e-5)
    generated = [model.generate(input_ids, max_new_tokens=5, do_sample=False) for model in (single, shared)]
    assert torch.equal(*generated)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tied", (True, False))
def test_tensor_parallelism_matches_a_single_process(tied, tmp_path):
    tiny_model("healthslm", tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    script = tmp_path / "compare.py"
    script.write_text(f"import sys\n{inspect.getsource(compare_tensor_parallel)}\ncompare_tensor_parallel(sys.argv[1])")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    result = subprocess.run([*torchrun, script, tmp_path / "model"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
