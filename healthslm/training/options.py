"""Options of pretraining, which import nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from healthslm.options import CheckedOptions, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed, UnitInterval
from healthslm.training.schedule import Decay


@dataclass
class PretrainOptions(CheckedOptions):
    """Options of `pretrain`."""

    model: str | dict[str, Any]
    """What to train: a folder or Hub name, whose weights are trained further, or a model_type with overrides, which
    starts from new weights: {model_type: gpt2, n_layer: 6}."""
    tokens: Path
    """Folder of the tokenised corpus."""
    output: Path
    """Run folder to write: runs/NAME."""
    max_tokens: PositiveInt
    """Tokens to train on; the last update may go beyond by less than batch_tokens."""
    batch_tokens: PositiveInt = 65_536
    """Tokens of an update, over all processes."""
    micro_batch_rows: Annotated[int | None, Range(at_least=1)] = field(default=None, metadata={"memory": True})
    """Rows of one context that a process computes at once; more need more memory and change no result. By default as
    many as fit into a GPU's memory, and at most 8 on a CPU."""
    context: Annotated[int | None, Range(at_least=1)] = None
    """Tokens of a row; by default the model's longest."""
    zero_residual_projections: bool = False
    """Start with zeros in the last matrix of each attention and feed-forward block: layers begin as the identity."""
    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Annotated[float | None, Range(at_least=0)] = None
    """Peak learning rate of Muon, which then trains the hidden matrices; by default AdamW does."""
    warmup_tokens: NonNegativeInt = 2_000_000
    """Tokens over which the learning rates rise to their peaks; at most a quarter of the run."""
    decay: Decay = "linear"
    """How they fall: in a straight line or along a cosine."""
    decay_fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Part of the tokens after warm-up over which they fall: the last."""
    final_fraction: UnitInterval = 0.0
    """Part of the peaks towards which they fall."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay, on matrices alone."""
    betas: Annotated[tuple[float, float], Range(at_least=0, below=1)] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    max_grad_norm: Annotated[float, Range(above=0)] = 1.0
    """Norm to which larger gradients are clipped."""
    seed: Seed = 0
    """Of the initial weights, the order of the documents and dropout."""
    evaluate_every: PositiveInt = 100
    """Updates from one evaluation on the validation split to the next; there is one at the start and the end too."""
    evaluation_documents: PositiveInt = 500
    """Documents of the validation split to evaluate on: the first so many."""
    save_every: PositiveInt = 500
    """Updates from one checkpoint to the next; there is one at the end too."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""
    compile: bool | None = None
    """Compile the network with torch.compile; by default on a GPU."""
    resume: bool = False
    """Go on from the newest valid checkpoint in the run folder."""
    accept_changes: bool = False
    """Resume even though the recipe, the corpus or the tokenizer has changed, or train the weights of a folder or Hub
    name on tokens of another tokenizer than theirs."""
    dry_run: bool = False
    """Print what the run would take (operations, memory by part, disk), and start nothing."""
    tokens_per_second: Annotated[float | None, Range(above=0)] = None
    """Speed over all processes, for the dry run to tell hours."""
