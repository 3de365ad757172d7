"""The options of fine-tuning. They import nothing heavy, so that `--help` is fast.

A field whose metadata has `affects_result` False may change when a run is resumed, and `memory` is True for options to
lower when a GPU runs out of memory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from healthslm.options import (
    CheckedOptions,
    Device,
    NonNegativeFloat,
    NonNegativeInt,
    OptionError,
    PositiveInt,
    Range,
    Seed,
)
from healthslm.options import UnitInterval as Fraction
from healthslm.training.options import Tracker

_FREE = {"affects_result": False}

Method = Literal["lora", "qlora", "full"]


@dataclass
class FinetuneOptions(CheckedOptions):
    """Options of `finetune`."""

    model: str
    """Folder or Hub name of a causal language model, with its tokenizer."""
    data: list[str]
    """Training examples: JSON Lines or Parquet files, folders or glob patterns of such files, or hub:NAME for the
    training split of a Hub dataset and hub:NAME:SPLIT for another one."""
    output: Path = field(metadata=_FREE)
    """Folder to write: the adapter, or the model with `--method full`, its tokenizer, README.md and metrics.json."""
    validation: list[str] = field(default_factory=list)
    """Held-out examples to evaluate on, given like `--data`. The weights with the lowest loss on them are kept."""
    prompt: str | None = None
    """Field of the prompt, or a template with fields in braces, such as $'{abstract}\\n\\nTitle:' in bash."""
    completion: str | None = None
    """Field or template of the text to learn to write after the prompt. Loss is computed on it alone."""
    messages: str | None = None
    """Field of chat messages, a list of role and content. Loss is computed on the assistant's messages alone."""
    text: str | None = None
    """Field or template of plain text. Loss is computed on all of it. By default, the fields `prompt` and `completion`,
    `messages` or `text` are read, whichever the data has."""
    completion_after: str | None = None
    """Split `--text` into prompt and completion after this text, such as $'\\nAnswer:' in bash. Rows without it are
    skipped."""
    examples: Annotated[int | None, Range(at_least=1)] = None
    """Number of training examples, chosen at random. By default all."""
    validation_examples: Annotated[int | None, Range(at_least=1)] = None
    """Number of validation examples, chosen at random. By default all."""
    generate: NonNegativeInt = field(default=0, metadata=_FREE)
    """Number of validation examples to write completions for, before and after training. They are scored with ROUGE
    and token F1."""
    max_new_tokens: PositiveInt = field(default=64, metadata=_FREE)
    """Maximum length of such a completion in tokens."""
    method: Method = "lora"
    """Train an adapter (`lora`), an adapter on weights in 4 bits (`qlora`), or all weights (`full`)."""
    rank: PositiveInt = 16
    """Rank of the adapter."""
    alpha: PositiveInt = 32
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Dropout of the adapter's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers to adapt, such as q_proj v_proj. By default all linear layers but the head."""
    context: Annotated[int | None, Range(at_least=2)] = field(default=None, metadata={"memory": True})
    """Tokens of a sequence. By default the model's maximum."""
    truncate: bool = False
    """Cut examples that are longer than the context at their end. By default they are an error."""
    packing: bool = True
    """Put several examples into one sequence. They don't see each other."""
    epochs: Annotated[float, Range(above=0)] = 1.0
    """Passes over the training examples."""
    batch_size: PositiveInt = 8
    """Sequences of one step."""
    micro_batch_size: PositiveInt = field(default=1, metadata=_FREE | {"memory": True})
    """Sequences in one forward pass. Larger values need more memory."""
    gradient_checkpointing: bool = field(default=False, metadata=_FREE)
    """Save memory by computing activations twice."""
    learning_rate: Annotated[float | None, Range(at_least=0)] = None
    """Peak learning rate of AdamW, which then decays linearly to zero. By default 1e-3 for adapters and 1e-4 for
    `--method full`."""
    warmup: Fraction = 0.05
    """Fraction of the steps over which the learning rate rises to its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""
    evaluations: PositiveInt = 5
    """Number of evaluations on the validation examples during training. A checkpoint is saved at each of them."""
    patience: Annotated[int | None, Range(at_least=1)] = None
    """Stop early after this number of evaluations without a lower loss. By default the run trains to its end."""
    seed: Seed = 0
    """Random seed for the adapter's weights, the choice and order of examples, and dropout."""
    report_to: Tracker = field(default="none", metadata=_FREE)
    """Tracker to log to."""
    merge: bool = field(default=False, metadata=_FREE)
    """Also write a whole model with the adapter merged into its weights, to `merged` in the output folder."""
    resume: bool = field(default=False, metadata=_FREE)
    """Resume from the newest checkpoint in the output folder."""
    device: Device = field(default="auto", metadata=_FREE)
    """Device to run on. `auto` uses a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise OptionError("batch_size", f"must be a multiple of --micro-batch-size {self.micro_batch_size}")
        for name in ("patience", "generate", "validation_examples"):
            if getattr(self, name) and not self.validation:
                raise OptionError(name, "needs --validation")
        if self.method == "full":
            defaults = FinetuneOptions(self.model, self.data, self.output)
            for name in ("rank", "alpha", "dropout", "target_modules", "merge"):
                if getattr(self, name) != getattr(defaults, name):
                    raise OptionError(name, "is for adapters, but --method full trains all weights")
