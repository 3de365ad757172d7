"""The options of pretraining. They import nothing heavy, so that `--help` is fast.

A field's metadata say what may be done with it: `affects_result` is False for options that may change when a run is
resumed, `saved` is False for options of a single call, which config.yaml leaves out, and `memory` is True for options
to lower when a GPU runs out of memory.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from healthslm.options import (
    CheckedOptions,
    Device,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    Seed,
    UnitInterval,
)
from healthslm.training.schedule import Decay

Tracker = Literal["tensorboard", "wandb", "trackio", "none"]

_FREE = {"affects_result": False}
_PER_CALL = {"affects_result": False, "saved": False}


@dataclass
class PretrainOptions(CheckedOptions):
    """Options of `pretrain`."""

    model: str | dict[str, Any]
    """What to train: a folder or Hub name, to continue training its weights, or a model_type with overrides, to start
    from new weights: {model_type: gpt2, n_layer: 6}."""
    tokens: Path = field(metadata=_FREE)
    """Folder of the tokenized corpus."""
    output: Path = field(metadata=_FREE)
    """Run folder to write: runs/NAME."""
    max_tokens: PositiveInt
    """Tokens to train on. The last step may exceed it by less than batch_tokens."""
    batch_tokens: PositiveInt = 65_536
    """Tokens of one step, over all processes."""
    micro_batch_size: Annotated[int | None, Range(at_least=1)] = field(default=None, metadata=_FREE | {"memory": True})
    """Sequences in one forward pass of a process. Larger values need more memory and do not change the result. By
    default as many as fit into the GPU's memory, and at most 8 on a CPU."""
    context: Annotated[int | None, Range(at_least=1)] = field(default=None, metadata={"memory": True})
    """Tokens of a sequence. By default the model's maximum."""
    device: Device = field(default="auto", metadata=_FREE)
    """Device to train on. "auto" uses a GPU if there is one."""
    zero_residual_projections: bool = False
    """Initialize the last matrix of each attention and feed-forward block to zero, so that each layer starts as the
    identity."""
    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Annotated[float | None, Range(at_least=0)] = None
    """Peak learning rate of Muon, which then trains the hidden matrices. By default AdamW trains all weights."""
    warmup_tokens: NonNegativeInt = 2_000_000
    """Tokens over which the learning rates rise to their peaks, at most a quarter of the run."""
    decay: Decay = "linear"
    """Shape of the learning rate decay."""
    decay_fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Fraction of the tokens after warm-up over which the learning rates decay, at the end of the run."""
    final_fraction: UnitInterval = 0.0
    """Fraction of the peak that the learning rates decay to."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay, applied to matrices only."""
    betas: Annotated[tuple[float, float], Range(at_least=0, below=1)] = (0.9, 0.95)
    """AdamW's decay rates for the first and second moment of the gradient."""
    max_grad_norm: Annotated[float, Range(above=0)] = 1.0
    """Maximum gradient norm; larger gradients are clipped."""
    seed: Seed = 0
    """Random seed for initial weights, document order and dropout."""
    evaluate_every: PositiveInt = field(default=100, metadata=_FREE)
    """Steps between evaluations on the validation split. The run also evaluates at its start and end."""
    evaluation_documents: PositiveInt = field(default=500, metadata=_FREE)
    """Number of validation documents to evaluate on, from the start of the split."""
    save_every: PositiveInt = field(default=500, metadata=_FREE)
    """Steps between checkpoints. The run also saves one at its end."""
    keep_checkpoints: PositiveInt = field(default=2, metadata=_FREE)
    """Number of checkpoints to keep, the newest ones."""
    report_to: Tracker = field(default="none", metadata=_FREE)
    """Tracker to log to, in addition to metrics.jsonl."""
    compile: bool | None = field(default=None, metadata=_FREE)
    """Compile the model with torch.compile. By default only on a GPU."""
    resume: bool = field(default=False, metadata=_PER_CALL)
    """Resume from the newest valid checkpoint in the run folder."""
    accept_changes: bool = field(default=False, metadata=_PER_CALL)
    """Resume although the recipe, the corpus or the tokenizer has changed, or continue training weights on tokens of
    another tokenizer."""
    dry_run: bool = field(default=False, metadata=_PER_CALL)
    """Print an estimate of compute, memory and disk space, and exit."""
    tokens_per_second: Annotated[float | None, Range(above=0)] = field(default=None, metadata=_PER_CALL)
    """Speed over all processes, from which --dry-run estimates the hours."""


def options_with(property_name: Literal["affects_result", "saved"]) -> list[str]:
    """Names of the options that affect the result, or that are saved."""
    return [option.name for option in fields(PretrainOptions) if option.metadata.get(property_name, True)]
