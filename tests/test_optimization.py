"""The optimizers: the groups of weights, and what a step does to them."""

import pytest
import torch
from pipeline_folders import TINY_GPT2, TINY_MODEL

from healthslm.models import make_model, zero_residual_projections
from healthslm.training.optimization import Muon, make_optimizers, set_learning_rates

SETTINGS = {
    "learning_rate": 1e-3, "muon_learning_rate": 4e-3, "weight_decay": 0.1, "betas": (0.9, 0.95),
}  # fmt: skip


@pytest.mark.parametrize("muon", [True, False], ids=["muon", "adamw alone"])
@pytest.mark.parametrize("model", [TINY_MODEL, TINY_GPT2], ids=["healthslm", "gpt2"])
def test_every_weight_is_in_one_group_with_its_learning_rate_and_decay(model, muon):
    model = make_model(model)
    optimizers = make_optimizers(model, **(SETTINGS | {"muon_learning_rate": 4e-3 if muon else None}))
    set_learning_rates(optimizers, 0.5)
    found = {
        id(parameter): (type(optimizer).__name__, group["lr"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[0].endswith(("embed_tokens", "wte", "wpe")):
            expected = ("AdamW", 0.5e-3, 0.1)
        elif parameter.dim() == 1:
            expected = ("AdamW", 0.5e-3, 0.0)
        else:
            expected = ("Muon", 2e-3, 0.1) if muon else ("AdamW", 0.5e-3, 0.1)
        assert found[id(parameter)] == expected, name


def test_the_update_of_muon_is_the_orthogonal_factor_of_the_gradient():
    """From rest the momentum is the gradient: the step is U V^T of its singular value decomposition, roughly (Newton-
    Schulz leaves singular values between 0.5 and 1.5), times 0.2 sqrt(max(rows, columns)), as AdamW has it."""
    model = make_model(TINY_MODEL)
    matrix = model.model.layers[0].mlp.up_proj.weight
    before = matrix.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizers = make_optimizers(model, **(SETTINGS | {"weight_decay": 0.0}))
    set_learning_rates(optimizers, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    step = (before - matrix.detach()) / (4e-3 * 0.2 * max(matrix.shape) ** 0.5)
    left, _, right = torch.linalg.svd(matrix.grad, full_matrices=False)
    along = (left.T @ step @ right.T).diagonal()
    assert ((along > 0.5) & (along < 1.5)).all()
    assert torch.dist(left @ torch.diag(along) @ right, step) / step.norm() < 0.05


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_pytorchs_muon(nesterov, precision):
    """Wide, tall and square matrices, several of each shape; one has no gradient in the second step."""
    shapes = [(16, 48), (16, 48), (48, 16), (32, 32), (32, 32), (16, 48)]
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    found = {}
    for kind in (Muon, torch.optim.Muon):
        generator = torch.Generator().manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = kind(matrices, **settings)
        for step in range(3):
            for number, matrix in enumerate(matrices):
                matrix.grad = torch.randn(matrix.shape, generator=generator) if (step, number) != (1, 4) else None
            optimizer.step()
        found[kind] = matrices, optimizer.state_dict()["state"]
    (ours, our_state), (theirs, their_state) = found.values()
    torch.testing.assert_close(our_state, their_state, rtol=1e-6, atol=1e-6)
    for our, their in zip(ours, theirs, strict=True):
        # A step has entries of about 0.2 * 0.02, of which bf16 keeps three digits in each of several products.
        torch.testing.assert_close(our, their, rtol=0.0, atol=5e-4)


def test_layers_with_zero_projections_are_the_identity():
    model = make_model(TINY_MODEL).eval()
    zero_residual_projections(model)
    ids = torch.arange(10)[None]
    expected = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    torch.testing.assert_close(model(ids).logits, expected)
