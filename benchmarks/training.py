"""Compare the speed and memory of our training loop with Hugging Face's Trainer and two plain PyTorch loops:

    python benchmarks/training.py --tokens tokens

All four train the same model from the same weights on the same sequences of packed documents, on one GPU or on the
CPU, with AdamW, matrix products in bf16 (fp32 on processors without bf16) and weights in fp32:

    ours      the steps of scripts/pretrain.py: attention within documents, a chunked loss, compiled on a GPU
    Trainer   transformers.Trainer on LlamaForCausalLM, without logging, saving and evaluation
    compiled  a plain loop over LlamaForCausalLM with torch.compile, which needs a C++ compiler on a CPU
    eager     the same loop without torch.compile

The other three get `input_ids`, `labels` and `position_ids` that restart at every document. Llama masks documents from
each other by them if it uses no cache, which is Trainer's default too. Llama shifts labels within a sequence, so it
learns from one token fewer per sequence; apart from that, the losses must agree. A step has one micro-batch. Each
contender runs in its own process, all of them in every round. The columns of the Markdown table:

    tokens/s            median over the rounds with the slowest and the fastest, without the first step
    of the peak         floating-point operations per second, divided by those of the best matrix product
    memory              peak above imports and weights: gradients, AdamW's moments, activations
    first step          seconds, the maximum over the rounds, with a cold cache and so with compilation
"""

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import transformers
from accelerate import Accelerator
from tqdm import tqdm
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from healthslm.cli import run
from healthslm.errors import UserError
from healthslm.export.llama import to_llama
from healthslm.models import make_model
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training.gradients import micro_batches
from healthslm.training.learner import Learner, Outcome
from healthslm.training.options import PretrainOptions
from healthslm.training.packing import PackedSequences
from healthslm.training.precision import computes_in_bf16
from healthslm.training.recipe import compiles, optimizer_settings

Result = TypeVar("Result")

RECIPE = PretrainOptions(model="", tokens=Path(), output=Path(), max_tokens=1)
"""Learning rate, betas, weight decay and clipping of all contenders: the defaults of pretraining."""


@dataclass
class BenchmarkOptions:
    """Options of `benchmark`."""

    tokens: Path | None = None
    """Folder of a tokenized corpus. By default random tokens, in documents as long as PubMed's."""
    model: dict[str, Any] = field(default_factory=dict)
    """Overrides of the released model's configuration: {"num_hidden_layers": 2}."""
    sequences: int = field(default=8, metadata={"memory": True})
    """Sequences of a step."""
    context: int = 1_024
    """Tokens of a sequence."""
    steps: int = 4
    """Timed steps of a round, after a first one that is not timed."""
    rounds: int = 3
    """Number of runs of each contender."""


@dataclass(frozen=True)
class Measurement:
    """The measurements of one contender in one round."""

    tokens_per_second: float
    first_step_seconds: float
    memory: int
    """Bytes."""
    loss: float
    """Mean over all steps."""


class RandomDocuments:
    """A `TokenizedSplit` of random tokens, in documents whose lengths have the distribution of PubMed's."""

    separator_id = 0

    def __init__(self, num_tokens: int, vocab_size: int):
        self.num_tokens, self.vocab_size = num_tokens, vocab_size
        # Mean and standard deviation of the logarithm of the lengths in a corpus of 137,561 documents.
        lengths = np.exp(np.random.default_rng(0).normal(5.79, 0.66, num_tokens)).astype(np.int64)
        ends = np.minimum(lengths.cumsum(), num_tokens)
        self.document_lengths = np.diff(np.unique(ends), prepend=0)

    def __len__(self) -> int:
        return len(self.document_lengths)

    def document(self, index: int) -> np.ndarray:
        tokens = np.random.default_rng(index).integers(1, self.vocab_size, self.document_lengths[index])
        tokens[0] = self.separator_id
        return tokens


class Meter:
    """Measures time and memory of a contender, from `begin` over one `step_done` per step."""

    def __init__(self, options: BenchmarkOptions):
        self.options = options

    def begin(self) -> None:
        """Start measuring, when model and data are ready."""
        self.before = torch.cuda.memory_allocated() if on_gpu() else psutil.Process().memory_info().rss
        self.marks = [time.perf_counter()]

    def step_done(self) -> None:
        # Wait for a GPU only at the start and the end of the timed steps.
        if on_gpu() and len(self.marks) in (1, self.options.steps + 1):
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def measurement(self, loss: float) -> Measurement:
        started, first, *_, last = self.marks
        tokens = self.options.steps * self.options.sequences * self.options.context
        most = (
            torch.cuda.max_memory_allocated() if on_gpu() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return Measurement(tokens / (last - first), first - started, most - self.before, loss)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def in_bf16() -> bool:
    return computes_in_bf16(torch.device("cuda" if on_gpu() else "cpu"))


def our_model(options: BenchmarkOptions) -> PreTrainedModel:
    torch.manual_seed(0)
    return make_model({"model_type": "healthslm"} | options.model)


def llama(options: BenchmarkOptions) -> LlamaForCausalLM:
    """The same model with the same weights, as a LlamaForCausalLM."""
    return to_llama(our_model(options))


def packed_sequences(options: BenchmarkOptions, vocab_size: int) -> PackedSequences:
    if options.tokens is None:
        tokens = (options.steps + 1) * options.sequences * options.context + 1
        return PackedSequences(RandomDocuments(tokens, vocab_size), options.context, seed=0)
    split = TokenizedSplit(options.tokens, "train")
    if split.vocab_size > vocab_size:
        raise UserError(f"{options.tokens}: tokens of {split.vocab_size} entries, the model has only {vocab_size}")
    return PackedSequences(split, options.context, seed=0)


def step_indices(options: BenchmarkOptions, step: int) -> range:
    return range(step * options.sequences, (step + 1) * options.sequences)


def llama_batch(options: BenchmarkOptions, sequences: PackedSequences, step: int) -> dict[str, torch.Tensor]:
    """The sequences of a step for Transformers: (sequences, context) each, with labels not yet shifted."""
    batch = {name: torch.from_numpy(array) for name, array in sequences.batch(step_indices(options, step)).items()}
    return batch | {"labels": batch["input_ids"]}


def train_ours(options: BenchmarkOptions, meter: Meter) -> float:
    """The steps of `healthslm.training.loop.train`. Returns the mean loss, as the others do."""
    accelerator = Accelerator(cpu=not on_gpu())
    learner = Learner(
        accelerator,
        our_model(options),
        compiled=compiles(RECIPE, accelerator.device),
        max_grad_norm=RECIPE.max_grad_norm,
        settings=optimizer_settings(RECIPE),
    )
    sequences = packed_sequences(options, learner.unwrapped_model.config.vocab_size)
    steps = (step_indices(options, step) for step in range(options.steps + 1))
    outcomes: list[Outcome] = []
    meter.begin()
    for batches in micro_batches(accelerator, learner.unwrapped_model, sequences, steps, options.sequences):
        outcomes.append(learner.step(batches, learning_rate_factor=1.0))
        outcomes[max(len(outcomes) - 2, 0)].wait()  # the loop also waits for the step before
        meter.step_done()
    return statistics.fmean(outcome.wait()[0] for outcome in outcomes)


def train_by_trainer(options: BenchmarkOptions, meter: Meter) -> float:
    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            meter.begin()

        def on_step_end(self, *_, **__) -> None:
            meter.step_done()

    model = llama(options)
    sequences = packed_sequences(options, model.config.vocab_size)
    batches = [llama_batch(options, sequences, step) for step in range(options.steps + 1)]
    dataset = [{name: batch[name][i] for name in batch} for batch in batches for i in range(options.sequences)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps + 1,
            per_device_train_batch_size=options.sequences,
            train_sampling_strategy="sequential",
            bf16=in_bf16(),
            use_cpu=not on_gpu(),
            optim="adamw_torch_fused",
            learning_rate=RECIPE.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=RECIPE.betas[0],
            adam_beta2=RECIPE.betas[1],
            weight_decay=RECIPE.weight_decay,
            max_grad_norm=RECIPE.max_grad_norm,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[Steps()])
        trainer.remove_callback(PrinterCallback)
        return trainer.train().training_loss


def train_plainly(options: BenchmarkOptions, meter: Meter, compiled: bool) -> float:
    device = torch.device("cuda" if on_gpu() else "cpu")
    model = llama(options).to(device)
    trained = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), RECIPE.learning_rate, RECIPE.betas, weight_decay=RECIPE.weight_decay, fused=True
    )
    sequences = packed_sequences(options, model.config.vocab_size)

    total = torch.zeros((), device=device)
    meter.begin()
    for step in range(options.steps + 1):
        batch = llama_batch(options, sequences, step)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16()):
            loss = trained(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        meter.step_done()
    return (total / (options.steps + 1)).item()


CONTENDERS: dict[str, Callable[[BenchmarkOptions, Meter], float]] = {
    "ours": train_ours,
    "Trainer": train_by_trainer,
    "compiled": partial(train_plainly, compiled=True),
    "eager": partial(train_plainly, compiled=False),
}


def measure(name: str, options: BenchmarkOptions) -> Measurement:
    meter = Meter(options)
    return meter.measurement(CONTENDERS[name](options, meter))


def matrix_peak() -> float:
    """Floating-point operations per second of a large matrix product in the training dtype, the best of ten."""
    size, device = (8192, "cuda") if on_gpu() else (4096, "cpu")
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16 if in_bf16() else torch.float32, device=device)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        if on_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def describe(options: BenchmarkOptions, peak: float) -> tuple[float, str]:
    """Floating-point operations per token, forward and backward, and a description of the measurement."""
    model = our_model(options)
    config = model.config
    sequences = packed_sequences(options, config.vocab_size)
    batches = [sequences.batch(step_indices(options, step)) for step in range(options.steps + 1)]
    keys = np.mean([batch["position_ids"] for batch in batches]) + 1
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    width = config.num_attention_heads * config.head_dim
    operations = 6 * weights + 12 * config.num_hidden_layers * width * keys
    place = torch.cuda.get_device_name() if on_gpu() else f"CPU with {torch.get_num_threads()} threads"
    return operations, (
        f"{model.num_parameters():,} parameters, {options.sequences} x {options.context:,} tokens a step of "
        f"{'random documents' if options.tokens is None else 'the corpus'}, on {place}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}. A token takes {operations / 1e6:.1f} MFLOP: 6 x {weights:,} weights "
        f"of matrices, the output projection's included, and 12 x {config.num_hidden_layers} layers x {width} x "
        f"{keys:.1f} positions of its document that it attends to. The best matrix product in "
        f"{'bf16' if in_bf16() else 'fp32'} reaches "
        f"{peak / 1e12:.3f} TFLOP/s."
    )


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call the function in a new process, to measure its memory alone."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError("a contender's process was killed, probably out of memory; lower --sequences") from error


def benchmark(options: BenchmarkOptions) -> None:
    """Measure all contenders and print the table.

    Raises:
        UserError: A number is less than one, the corpus does not fit the model, or a contender's process was killed.
    """
    for name in ("sequences", "context", "steps", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} {getattr(options, name)} must be at least 1")
    # Trainer would distribute the sequences over all GPUs that it sees.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    rounds: dict[str, list[Measurement]] = {name: [] for name in CONTENDERS}
    peak = 0.0
    with tempfile.TemporaryDirectory() as cache, tqdm(total=options.rounds * len(CONTENDERS)) as bar:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for _ in range(options.rounds):
            peak = max(peak, alone(matrix_peak))
            for name in CONTENDERS:
                bar.set_postfix_str(name)
                rounds[name].append(alone(measure, name, options))
                bar.update()
    operations, description = describe(options, peak)
    print(description + "\n")
    print(table(rounds, operations, peak))


def table(rounds: dict[str, list[Measurement]], operations: float, peak: float) -> str:
    speeds = {name: [measured.tokens_per_second for measured in of_name] for name, of_name in rounds.items()}
    medians = {name: statistics.median(of_name) for name, of_name in speeds.items()}
    memory = {name: max(measured.memory for measured in of_name) for name, of_name in rounds.items()}
    lines = [
        "| | tokens/s | slowest to fastest round | to Trainer's | of the peak | memory, GiB | to Trainer's | "
        "first step, s | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, of_name in rounds.items():
        lines.append(
            f"| {name} | {medians[name]:,.0f} | {min(speeds[name]):,.0f} to {max(speeds[name]):,.0f} | "
            f"{medians[name] / medians['Trainer']:.2f} | {medians[name] * operations / peak:.1%} | "
            f"{memory[name] / 2**30:.2f} | {memory[name] / memory['Trainer']:.2f} | "
            f"{max(measured.first_step_seconds for measured in of_name):.1f} | {of_name[0].loss:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(benchmark, BenchmarkOptions, summary=__doc__)
