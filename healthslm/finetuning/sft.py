"""Supervised fine-tuning with TRL's SFTTrainer and PEFT: adapters, adapters on 4-bit weights, or all weights.

The output folder appears when the run is complete: the adapter or the model, its tokenizer, `README.md` and
`metrics.json`. Until then it holds `run.json`, from which a resumed run learns what it must match, and the Trainer's
checkpoints, which contain pickled files of its optimizer: they are for the same machine, and end with the run.
"""

import hashlib
import importlib.util
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file
from trl import SFTConfig, SFTTrainer

from healthslm.errors import UserError
from healthslm.files import check_output_folder, file_sha256, naming_full_disk, read_json, replacing, write_json
from healthslm.finetuning.card import Card, Result, write_card
from healthslm.finetuning.completions import can_complete, measure_completions, score_completions, write_completions
from healthslm.finetuning.examples import IGNORED, Examples, read_examples
from healthslm.finetuning.options import FinetuneOptions
from healthslm.models import accepts, choose_context, find_device, open_model
from healthslm.options import OptionError
from healthslm.tokenization.encoding import load_tokenizer
from healthslm.training.log import check_tracker
from healthslm.training.precision import computes_in_bf16

logger = logging.getLogger(__name__)

METRICS_FILE, RUN_FILE = "metrics.json", "run.json"
CHECKPOINTS, MERGED, TENSORBOARD = "checkpoints", "merged", "tensorboard"
LEARNING_RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-4}

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "healthslm")
_OWN_FILES = (METRICS_FILE, RUN_FILE)
_USAGE = """from {package} import {opener}
from transformers import AutoTokenizer

folder = "path/to/this/folder"
model = {opener}.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(written, skip_special_tokens=True))"""
_NOISY = ("transformers", "trl", "peft", "accelerate", "datasets")


def finetune(options: FinetuneOptions) -> None:
    """Fine-tune a causal language model on examples and evaluate it before and after.

    Raises:
        UserError: There is no such model or device, the data can't be used (see `read_examples`), the output folder
            holds something else, or a package is missing.
        OptionError: The layers can't be adapted, or the context is too long.
    """
    check_tracker(options.report_to)
    _check_output(options)
    source = _absolute(options.model)
    tokenizer = load_tokenizer(source)
    with _quiet():
        model = _open_base(source, options)
        context = choose_context(model, options.context)
        training = read_examples(options.data, options, tokenizer, context, options.examples)
        validation = None
        if options.validation:
            validation = read_examples(options.validation, options, tokenizer, context, options.validation_examples)
        for name, found in (("training", training), ("validation", validation)):
            if found is not None:
                _report(name, found)
        if options.packing:
            _check_packing(model, options)
        facts = {
            "base": {"model": source, "sha256": weights_sha256(source)},
            "data": {"training": training.describe(), "validation": validation and validation.describe()},
        }
        run = _run_facts(options, facts)
        if options.resume:
            _check_resumed(options, run)
        model = _add_adapter(model, options)
        _check_disk(model, options)
        evaluation = _Evaluation(tokenizer, validation, options, context)
        before = evaluation.measure(model)
        trainer = _make_trainer(model, tokenizer, training, validation, options, context)
        write_json(options.output / RUN_FILE, run)  # when all checks have passed
        started, computed = time.perf_counter(), time.process_time()
        with naming_full_disk(options.output):
            trainer.train(resume_from_checkpoint=_checkpoint(options) if options.resume else None)
        seconds, computed = time.perf_counter() - started, time.process_time() - computed
        model = trainer.model
        metrics = facts | {
            "method": options.method,
            "trained_weights": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "training": _describe_training(trainer, seconds, computed),
            "validation": evaluation.compare(before, model),
            "seed": options.seed,
            "options": _plain(asdict(options)),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        _save(model, tokenizer, options, source, metrics)
    _report_result(options, metrics)


class CompletionTrainer(SFTTrainer):
    """TRL's SFTTrainer, but the head computes logits only where there is a label.

    Most tokens of a prompt with a short completion have none, and the head is half of the work of a small model. TRL
    does the same on GPUs alone. The loss is the same.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if return_outputs or not accepts(_base_of(self.accelerator.unwrap_model(model)), "logits_to_keep"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[:, 1:]
        places = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
        logits = model(**inputs, use_cache=False, logits_to_keep=places).logits
        targets = labels[:, places]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        if num_items_in_batch is None:
            return loss / (targets != IGNORED).sum().clamp(min=1)
        return loss * self.accelerator.num_processes / num_items_in_batch

    def create_model_card(self, *arguments: Any, **settings: Any) -> None:
        """Write none: the output has a card of its own."""


class _Progress(ProgressCallback):
    """A progress bar with losses in short lines."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **settings: Any,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        for key, name in (("loss", "loss"), ("eval_loss", "validation loss")):
            if key in logs:
                self.training_bar.write(f"step {state.global_step:,}: {name} {float(logs[key]):.4f}")


class _Evaluation:
    """The evaluation before and after training."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        validation: Examples | None,
        options: FinetuneOptions,
        context: int,
    ):
        self.tokenizer, self.options = tokenizer, options
        self.examples = validation.examples if validation else []
        fitting = [example for example in self.examples if can_complete(example, context, options.max_new_tokens)]
        self.to_complete = fitting[: options.generate]
        if options.generate and not self.to_complete:
            raise UserError(
                f"--generate {options.generate}: no validation example has a prompt that leaves room for "
                f"--max-new-tokens {options.max_new_tokens} in the context"
            )

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """The metrics of `measure_completions`, and the completions that the model writes."""
        if not self.examples:
            return {}
        model = _base_of(model).eval()  # with the adapter's layers in it
        found = measure_completions(model, self.examples, progress=True)
        if self.to_complete:
            found["written"] = write_completions(
                model, self.tokenizer, self.to_complete, self.options.max_new_tokens, progress=True
            )
        return found

    def compare(self, before: dict[str, Any], model: PreTrainedModel) -> dict[str, Any] | None:
        """The metrics before and after training, and ROUGE of both."""
        if not self.examples:
            return None
        after = self.measure(model)
        compared: dict[str, Any] = {"before": before, "after": after}
        if self.to_complete:
            written = {name: found.pop("written") for name, found in compared.items()}
            compared["rouge"] = score_completions(self.to_complete, written)
            compared["samples"] = [
                {"prompt": example.prompt, "answer": example.answer, "before": old, "after": new}
                for example, old, new in zip(self.to_complete[:3], written["before"], written["after"], strict=False)
            ]
        return compared


def weights_sha256(source: str) -> str:
    """Checksum of the weights in a folder or of a Hub model. Of a single file, it is the one that sha256sum prints."""
    folder = Path(cached_file(source, "config.json")).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    checksums = [file_sha256(file) for file in files]
    if len(checksums) == 1:
        return checksums[0]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def merge_adapter(source: str, adapter: Path) -> PreTrainedModel:
    """The base model in fp32 with the adapter of a folder merged into its weights."""
    return PeftModel.from_pretrained(open_model(source), adapter).merge_and_unload()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' remarks on settings that are not the user's."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [found.level for found in loggers]
    disable_progress_bar()
    for found in loggers:
        found.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that the libraries themselves pass on
            yield
    finally:
        for found, level in zip(loggers, levels, strict=True):
            found.setLevel(level)


def _absolute(model: str) -> str:
    """The name of a model that is valid in any folder."""
    folder = Path(model)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{model}: an adapter, not a whole model: fine-tune the `{MERGED}` folder that --merge writes")
    return str(folder.resolve()) if folder.is_dir() else model


def _open_base(source: str, options: FinetuneOptions) -> PreTrainedModel:
    if options.method != "qlora":
        return open_model(source, options.device)
    if not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--method qlora: bitsandbytes is not installed: pip install bitsandbytes, or use --method lora")
    device = find_device(options.device)
    dtype = torch.bfloat16 if computes_in_bf16(device) else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=True,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{source}: can't load it in 4 bits: {' '.join(str(error).split())}") from error
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _add_adapter(model: PreTrainedModel, options: FinetuneOptions) -> PreTrainedModel | PeftModel:
    if options.method == "full":
        return model
    _check_targets(model, options.target_modules)
    targets: str | list[str] = options.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    set_seed(options.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, config)


def _base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """
    Raises:
        OptionError: A layer doesn't exist, or is the head or the embedding.
    """
    excluded = (model.get_input_embeddings(), model.get_output_embeddings())
    layers: dict[str, bool] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if module in excluded:
            layers[name] = False
        elif isinstance(module, torch.nn.Linear | Conv1D):
            layers[name] = True
    names = ", ".join(sorted(name for name, allowed in layers.items() if allowed))
    for target in targets:
        if target == "all-linear" and len(targets) == 1:
            continue
        if layers.get(target) is False:
            problem = f"{target} shares its weights with the embedding or the head and can't be adapted"
            raise OptionError("target_modules", f"{problem}; choose from {names}")
        if target not in layers:
            raise OptionError("target_modules", f"the model has no linear layer {target!r}; choose from {names}")


@torch.no_grad()
def _check_packing(model: PreTrainedModel, options: FinetuneOptions) -> None:
    """
    Raises:
        UserError: With restarting `position_ids`, the model attends to the other examples of a sequence.
    """
    model.eval()
    ids = torch.arange(2, 10, device=model.device)
    places = torch.arange(4, device=model.device)
    alone = model(input_ids=ids[None, 4:], position_ids=places[None], use_cache=False).logits
    packed = model(input_ids=ids[None], position_ids=places.repeat(2)[None], use_cache=False).logits[:, 4:]
    if not torch.allclose(alone, packed, atol=1e-2 * float(alone.abs().max())):
        raise UserError(
            f"{options.model}: with several examples in a sequence, this model mixes them up: use --packing false"
        )


def _make_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Examples,
    validation: Examples | None,
    options: FinetuneOptions,
    context: int,
) -> SFTTrainer:
    bf16 = computes_in_bf16(find_device(options.device))
    # A share of the steps, or so many that only the end is left.
    interval = 1 / options.evaluations if options.evaluations > 1 else sys.maxsize
    rate = options.learning_rate if options.learning_rate is not None else LEARNING_RATES[options.method]
    micro_batch_size = min(options.micro_batch_size, options.batch_size)
    if options.batch_size % micro_batch_size:
        raise OptionError("batch_size", f"must be a multiple of --micro-batch-size {micro_batch_size}")
    arguments = SFTConfig(
        output_dir=str(options.output / CHECKPOINTS),
        max_length=context,
        packing=options.packing,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=micro_batch_size,
        gradient_accumulation_steps=options.batch_size // micro_batch_size,
        gradient_checkpointing=options.gradient_checkpointing,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        bf16=bf16,
        use_cpu=options.device == "cpu",
        eval_strategy="steps" if validation else "no",
        eval_steps=interval,
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=validation is not None,
        metric_for_best_model="eval_loss" if validation else None,
        prediction_loss_only=True,
        logging_first_step=True,
        logging_steps=0.02,
        logging_nan_inf_filter=False,
        report_to="none" if options.report_to == "tensorboard" else options.report_to,
        run_name=options.output.name,
        seed=options.seed,
        dataloader_pin_memory=False,
    )
    callbacks: list[TrainerCallback] = []
    if options.report_to == "tensorboard":  # whose files would end with the checkpoints
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(options.output / TENSORBOARD)))
    if validation is not None and options.patience is not None:
        callbacks.append(EarlyStoppingCallback(options.patience))
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=_as_dataset(training),
        eval_dataset=_as_dataset(validation) if validation else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_Progress())
    if not bf16:  # TRL turns adapters on 4-bit weights into bf16
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    return trainer


def _as_dataset(examples: Examples) -> Dataset:
    columns = ("input_ids", "labels")
    return Dataset.from_dict({name: [getattr(example, name) for example in examples.examples] for name in columns})


def _check_output(options: FinetuneOptions) -> None:
    """
    Raises:
        UserError: The output folder holds something else, a finished run, or an unfinished one without `--resume`.
    """
    output = options.output
    check_output_folder(output, "a fine-tuned model", lambda folder: any((folder / f).exists() for f in _OWN_FILES))
    if (output / METRICS_FILE).exists():
        raise UserError(f"{output}: already holds a finished run: choose another folder, or remove it")
    unfinished = (output / RUN_FILE).exists()
    if unfinished and not options.resume:
        raise UserError(f"{output}: holds an unfinished run: continue it with --resume, or remove the folder")
    if options.resume and not unfinished:
        raise UserError(f"{output}: no run to resume: start it without --resume")
    output.mkdir(parents=True, exist_ok=True)


def _run_facts(options: FinetuneOptions, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the result of a run depends on."""
    affecting = {field.name for field in fields(options) if field.metadata.get("affects_result", True)}
    chosen = {name: value for name, value in _plain(asdict(options)).items() if name in affecting}
    return {
        "options": chosen | {"model": facts["base"]["model"]},
        "base weights": facts["base"]["sha256"],
        "training data": facts["data"]["training"]["sha256"],
        "validation data": (facts["data"]["validation"] or {}).get("sha256"),
    }


def _check_resumed(options: FinetuneOptions, run: Mapping[str, Any]) -> None:
    """
    Raises:
        OptionError: An option that affects the result differs from the one of the run.
        UserError: The base model or the data do.
    """
    before = read_json(options.output / RUN_FILE)
    for name, value in before["options"].items():
        now = run["options"].get(name)
        if now != value:
            raise OptionError(name, f"the run was started with {value!r}, not {now!r}: resume it with the same")
    for name in ("base weights", "training data", "validation data"):
        if run[name] != before[name]:
            raise UserError(f"{options.output}: the {name} changed since the run was started: start a new run")


def _checkpoint(options: FinetuneOptions) -> str | None:
    """The newest complete checkpoint, or None to start from the beginning."""
    folder = options.output / CHECKPOINTS
    for path in folder.glob("checkpoint-*"):
        if not (path / "trainer_state.json").exists():  # written last
            shutil.rmtree(path)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _check_disk(model: PreTrainedModel | PeftModel, options: FinetuneOptions) -> None:
    """
    Raises:
        UserError: The disk has no room for the checkpoints and the result.
    """
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    whole = model.num_parameters() if options.merge else 0
    # Up to three checkpoints of weights and two moments exist at a time, and the result; all in fp32.
    needed = 4 * (3 * 3 * trained + trained + whole)
    free = shutil.disk_usage(options.output).free
    if free < needed:
        raise UserError(f"{options.output}: {free / 1e6:,.0f} MB are free, but the run needs {needed / 1e6:,.0f} MB")


def _describe_training(trainer: SFTTrainer, seconds: float, computed: float) -> dict[str, Any]:
    state, training = trainer.state, trainer.train_dataset
    losses = [record["loss"] for record in state.log_history if "loss" in record]
    evaluations = [
        {"step": record["step"], "loss": record["eval_loss"]} for record in state.log_history if "eval_loss" in record
    ]
    tokens = sum(map(len, training["input_ids"])) * (state.epoch or 0)
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "sequences": len(training),
        "tokens": round(tokens),
        "seconds": round(seconds, 1),
        "processor_seconds": round(computed, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_step": state.best_global_step,
        "evaluations": evaluations,
        "device": str(trainer.args.device),
    }


def _plain(value: Any) -> Any:
    """Options as JSON holds them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    options: FinetuneOptions,
    source: str,
    metrics: dict[str, Any],
) -> None:
    """Replace the folder of the run by its result."""
    with replacing(options.output) as folder:
        folder.mkdir()
        _save_whole(model, tokenizer, folder)
        if (options.output / TENSORBOARD).is_dir():
            shutil.copytree(options.output / TENSORBOARD, folder / TENSORBOARD)
        write_json(folder / METRICS_FILE, metrics)
        write_card(folder, _card(options, source, metrics, is_adapter=options.method != "full"))
        if options.merge and options.method != "full":
            _save_whole(merge_adapter(source, folder), tokenizer, folder / MERGED)
            write_card(folder / MERGED, _card(options, source, metrics, is_adapter=False))


def _save_whole(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(str(folder))  # PEFT takes no Path
    tokenizer.save_pretrained(folder)


def _card(options: FinetuneOptions, source: str, metrics: Mapping[str, Any], is_adapter: bool) -> Card:
    name, training = options.output.name, metrics["training"]
    data = {
        split: f"{found['examples']:,} examples from {', '.join(Path(s).name for s in found['sources'])}"
        for split, found in metrics["data"].items()
        if found
    }
    opener = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    package = "peft" if is_adapter else "transformers"
    settings = {
        "method": options.method,
        "trained weights": f"{metrics['trained_weights']:,}",
        "steps": f"{training['steps']:,} of {options.batch_size} sequences",
        "tokens": f"{training['tokens']:,}",
        "time": f"{training['seconds'] / 60:.1f} minutes on {training['device']}",
        "seed": options.seed,
        "versions": ", ".join(f"{package} {number}" for package, number in metrics["versions"].items()),
    }
    return Card(
        title=name,
        summary=f"{Path(source).name} fine-tuned on {', '.join(data.values())}. It continues text.",
        task="text-generation",
        base=source,
        base_sha256=metrics["base"]["sha256"],
        is_adapter=is_adapter,
        usage=_USAGE.format(opener=opener, package=package, prompt=_prompt_of(metrics)),
        data=data,
        results=_results(metrics),
        settings=settings,
        limits=["It writes text of the form of its training data. What the text says is often not true."],
    )


def _prompt_of(metrics: Mapping[str, Any]) -> str:
    samples = (metrics["validation"] or {}).get("samples")
    return repr(samples[0]["prompt"] if samples else "A prompt like those of the training data")


def _results(metrics: Mapping[str, Any]) -> list[Result]:
    found = metrics["validation"]
    if not found:
        return []
    before, after = found["before"], found["after"]
    results = [
        Result("bits per byte", after["bits_per_byte"], after["interval"], {"base model": before["bits_per_byte"]}),
        Result("loss per token", after["loss"], None, {"base model": before["loss"]}),
    ]
    for name, label in (("rouge1", "ROUGE-1"), ("rougeL", "ROUGE-L")) if "rouge" in found else ():
        scores = {model: found["rouge"][model][name] for model in ("before", "after", "first_sentence")}
        baselines = {"base model": scores["before"]["mean"], "first sentence": scores["first_sentence"]["mean"]}
        results.append(Result(label, scores["after"]["mean"], scores["after"]["interval"], baselines))
    return results


def _report(name: str, found: Examples) -> None:
    facts = found.describe()
    logger.info(
        "%s: %s examples (%s of them cut), %s tokens, %s of them to learn; %s rows skipped, %s examples dropped",
        name,
        *(f"{facts[key]:,}" for key in ("examples", "truncated", "tokens", "completion_tokens", "skipped", "dropped")),
    )


def _report_result(options: FinetuneOptions, metrics: Mapping[str, Any]) -> None:
    found = metrics["validation"]
    change = ""
    if found:
        change = f": {found['before']['bits_per_byte']:.3f} to {found['after']['bits_per_byte']:.3f} bits per byte"
    logger.info("%s%s in %.1f minutes", options.output, change, metrics["training"]["seconds"] / 60)
