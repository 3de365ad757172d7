"""Supervised fine-tuning with TRL's SFTTrainer and PEFT: adapters, adapters on 4-bit weights, or all weights.

The output folder appears when the run is complete: the adapter or the model, its tokenizer, `README.md` and
`metrics.json`. Until then it holds `run.json`, from which a resumed run learns what it must match, and the Trainer's
checkpoints, which contain pickled files of its optimizer: they are for the same machine, and end with the run.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import SFTTrainer

from healthslm.errors import UserError
from healthslm.files import naming_full_disk, replacing, write_json
from healthslm.finetuning.adapters import add_adapter, base_of, check_packing, merge_adapter, open_base
from healthslm.finetuning.card import Card, Result, write_card
from healthslm.finetuning.completions import can_complete, measure_completions, score_completions, write_completions
from healthslm.finetuning.console import quiet_libraries
from healthslm.finetuning.examples import Examples, read_examples
from healthslm.finetuning.options import FinetuneOptions
from healthslm.finetuning.run import (
    METRICS_FILE,
    RUN_FILE,
    TENSORBOARD,
    absolute_name,
    check_disk,
    check_output,
    check_resumed,
    newest_checkpoint,
    run_facts,
)
from healthslm.finetuning.trainer import make_trainer
from healthslm.models import choose_context, refuse_adapter, weights_sha256
from healthslm.options import plain
from healthslm.tokenization.encoding import load_tokenizer
from healthslm.training.log import check_tracker

logger = logging.getLogger(__name__)

MERGED = "merged"

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "healthslm")
_SCORES = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "token_f1": "token F1"}
_USAGE = """from {package} import {opener}
from transformers import AutoTokenizer

folder = "path/to/this/folder"
model = {opener}.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = {prompt}
{encoding}
written = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(written, skip_special_tokens=True))"""
_ENCODING = 'inputs = tokenizer(prompt, return_tensors="pt")'
_CHAT_ENCODING = """inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""


@quiet_libraries()
def finetune(options: FinetuneOptions) -> None:
    """Fine-tune a causal language model on examples and evaluate it before and after.

    Raises:
        UserError: There is no such model or device, the data can't be used (see `read_examples`), the output folder
            holds something else, or a package is missing.
        OptionError: The layers can't be adapted, or the context is too long.
    """
    check_tracker(options.report_to)
    check_output(options.output, options.resume)
    refuse_adapter(options.model)
    source = absolute_name(options.model)
    tokenizer = load_tokenizer(source)
    model = open_base(source, options)
    context = choose_context(model, options.context)
    training = read_examples(options.data, options, tokenizer, context, options.examples)
    validation = None
    if options.validation:
        validation = read_examples(options.validation, options, tokenizer, context, options.validation_examples)
    for name, found in (("training", training), ("validation", validation)):
        if found is not None:
            _report(name, found)
    if options.packing:
        check_packing(model, options)
    base = {"model": source, "sha256": weights_sha256(source)}
    data: dict[str, Any] = {"training": training.describe(), "validation": validation and validation.describe()}
    run = run_facts(options, base, {split: found and found["sha256"] for split, found in data.items()})
    if options.resume:
        check_resumed(options.output, run)
    model = add_adapter(model, options)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    logger.info("%s: %s of %s weights are trained", options.method, f"{trained:,}", f"{model.num_parameters():,}")
    check_disk(model, options.output, options.merge)
    evaluation = _Evaluation(tokenizer, validation, options, context)
    before = evaluation.measure(model)
    write_json(options.output / RUN_FILE, run)  # when all checks have passed
    trainer = make_trainer(model, tokenizer, training, validation, options, context)
    checkpoint = newest_checkpoint(options.output)
    started, computed = time.perf_counter(), time.process_time()
    with naming_full_disk(options.output):
        trainer.train(resume_from_checkpoint=checkpoint)
    training_facts = _describe_training(trainer)
    if checkpoint is None:  # otherwise the time before it is not known
        training_facts["seconds"] = round(time.perf_counter() - started, 1)
        training_facts["processor_seconds"] = round(time.process_time() - computed, 1)
    model = trainer.model
    metrics = {
        "base": base,
        "data": data,
        "method": options.method,
        "trained_weights": trained,
        "training": training_facts,
        "validation": evaluation.compare(before, model),
        "seed": options.seed,
        "options": plain(asdict(options)),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    metrics["results"] = [asdict(result) for result in _results(metrics)]
    _save(model, tokenizer, options, source, metrics)
    _report_result(options, metrics)


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
        model = base_of(model).eval()  # with the adapter's layers in it
        found = measure_completions(model, self.examples, progress=True)
        if self.to_complete:
            found["written"] = write_completions(
                model, self.tokenizer, self.to_complete, self.options.max_new_tokens, progress=True
            )
        return found

    def compare(self, before: dict[str, Any], model: PreTrainedModel) -> dict[str, Any] | None:
        """The metrics before and after training, and the scores of both models' completions."""
        if not self.examples:
            return None
        after = self.measure(model)
        compared: dict[str, Any] = {"before": before, "after": after}
        if self.to_complete:
            written = {name: found.pop("written") for name, found in compared.items()}
            compared["completions"] = score_completions(self.to_complete, written)
            compared["samples"] = [
                {"prompt": example.prompt, "answer": example.answer, "before": old, "after": new}
                for example, old, new in zip(self.to_complete[:3], written["before"], written["after"], strict=False)
            ]
        return compared


def _describe_training(trainer: SFTTrainer) -> dict[str, Any]:
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
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_step": state.best_global_step,
        "evaluations": evaluations,
        "device": str(trainer.args.device),
    }


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
    is_chat = metrics["data"]["training"]["kind"] == "chats"
    skill = "It answers messages." if is_chat else "It continues text."
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
        "device": training["device"],
        **({"time": f"{training['seconds'] / 60:.1f} minutes"} if "seconds" in training else {}),
        "seed": options.seed,
        "versions": ", ".join(f"{package} {number}" for package, number in metrics["versions"].items()),
    }
    limits = ["It writes text of the form of its training data. What the text says is often not true."]
    if options.validation and options.evaluations > 1:
        limits.append("Its weights were chosen on the validation data, so its results there are too good.")
    return Card(
        title=name,
        summary=f"{Path(source).name} fine-tuned on {', '.join(data.values())}. {skill}",
        task="text-generation",
        base=source,
        base_sha256=metrics["base"]["sha256"],
        is_adapter=is_adapter,
        usage=_USAGE.format(
            opener=opener,
            package=package,
            prompt=_prompt_of(metrics),
            encoding=_CHAT_ENCODING if is_chat else _ENCODING,
        ),
        data=data,
        results=_results(metrics),
        settings=settings,
        limits=limits,
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
    for name, label in _SCORES.items() if "completions" in found else ():
        scores = {model: found["completions"][model][name] for model in ("before", "after", "first_sentence")}
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
    logger.info("%s%s", options.output, change)
