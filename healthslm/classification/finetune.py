"""Fine-tune a classifier of mentions, sentences or texts with Transformers' Trainer."""

import dataclasses
import logging
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerControl,
    TrainingArguments,
)

from healthslm.classification.baselines import baseline_predictions
from healthslm.classification.card import describe, results_of
from healthslm.classification.metrics import MAIN_METRIC, score
from healthslm.classification.options import ClassifierOptions
from healthslm.classification.sequences import Split, labels_of_examples, read_splits
from healthslm.classification.tagging import trim_offsets
from healthslm.errors import UserError, one_line
from healthslm.files import naming_full_disk, replacing, write_json
from healthslm.finetuning.card import write_card
from healthslm.finetuning.console import quiet_libraries, show_metrics
from healthslm.finetuning.run import (
    CHECKPOINTS,
    METRICS_FILE,
    RUN_FILE,
    absolute_name,
    check_disk,
    check_output,
    check_resumed,
    newest_checkpoint,
    on_one_gpu,
    run_facts,
)
from healthslm.models import find_device, refuse_adapter, weights_sha256
from healthslm.options import OptionError, plain
from healthslm.tokenization.encoding import open_tokenizer
from healthslm.training.log import check_tracker
from healthslm.training.precision import bf16_autocast, computes_in_bf16

logger = logging.getLogger(__name__)

_TENSORBOARD_LOGS = "runs"  # Transformers' name
_PLACES = ("model", "train", "validation", "test", "output", "resume")  # checksums say which they were
_WARMUP = 0.1
_WEIGHT_DECAY = 0.01
_FEW_RESAMPLES = 10  # where only the value is used, not its interval


@quiet_libraries()
def finetune_classifier(options: ClassifierOptions) -> None:
    """Fine-tune a classifier, evaluate it, and save it with its metrics and its card.

    `options.output` becomes a folder that `AutoModelForTokenClassification` or `AutoModelForSequenceClassification`
    opens. During training, its folder `checkpoints` holds the last and the best epoch, with optimizer states that
    Trainer pickles, and `run.json` what a resumed run must match; they are gone at the end.

    Raises:
        UserError: The output folder holds something else, or the model, its mask, a file, a field, a label or a length
            is not what the options say.
        OptionError: An option differs from that of the run to resume.
    """
    check_output(options.output, options.resume)
    check_tracker(options.report_to)
    device = find_device(options.device)
    tokenizer = open_tokenizer(options.model)
    config = _open_config(options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    names, splits = read_splits(options, tokenizer, config.max_position_embeddings)
    train = splits["train"]
    sizes = (f"{number:,}" for number in (len(train.examples), len(train.sequences), train.tokens))
    logger.info("train: %s examples in %s sequences with %s tokens, %d labels", *sizes, len(names))
    model = _make_classifier(config, names, options).to(device)
    if options.method == "lora":
        model = _with_adapters(model, options)
    base = {"model": absolute_name(options.model), "sha256": weights_sha256(options.model)}
    data = {name: split.describe() for name, split in splits.items()}
    run = run_facts(options, base, {name: found["files"] for name, found in data.items()})
    if options.resume:
        check_resumed(options.output, run)
    baselines = _evaluate_baselines(splits, options)
    check_disk(model, options.output, saves_whole=options.method == "lora")
    write_json(options.output / RUN_FILE, run)  # when all checks have passed
    trainer = _Trainer(model, tokenizer, splits, options)
    checkpoint = newest_checkpoint(options.output)
    started = time.monotonic()
    with naming_full_disk(options.output):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    if options.method == "lora":
        model = model.merge_and_unload()
    scores: dict[str, Any] = {}
    for name in [name for name in ("validation", "test") if name in splits]:
        scores[name] = score(options.task, splits[name].expected, predict(model, tokenizer, splits[name], options))
        _log(name, scores[name], options)
    metrics = {
        **scores,
        "labels": names,
        "baselines": baselines,
        "epochs": trainer.results,
        "options": {name: value for name, value in plain(dataclasses.asdict(options)).items() if name not in _PLACES},
        "data": data,
        "parameters": model.num_parameters(),
        "base": base,
        "seed": options.seed,
        "versions": {name: version(name) for name in ("torch", "transformers", "seqeval", "scikit-learn")},
    }
    if checkpoint is None:  # otherwise the time before it is not known
        metrics["training_seconds"] = round(seconds, 1)
    results = results_of(metrics, options)
    trim_offsets(tokenizer)
    with replacing(options.output) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / METRICS_FILE, metrics | {"results": [dataclasses.asdict(result) for result in results]})
        write_card(new, describe(metrics, options, results))
        logs = options.output / CHECKPOINTS / _TENSORBOARD_LOGS
        if logs.is_dir():
            shutil.copytree(logs, new / _TENSORBOARD_LOGS)
    logger.info("%s", options.output)


def predict(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: Split, options: ClassifierOptions
) -> list[list[str]]:
    """The predicted labels of each example of a split. Units that truncation has cut off are O, or the first label."""
    names = model.config.id2label
    order = sorted(range(len(split.sequences)), key=lambda number: len(split.sequences[number]["input_ids"]))
    found: dict[int, list[str]] = {}
    collate = _collator(tokenizer, options)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), options.batch_size):
        batch = order[start : start + options.batch_size]
        inputs = collate([split.sequences[number] for number in batch])
        mask = inputs["attention_mask"].bool()
        with torch.inference_mode(), bf16_autocast(model.device):
            logits = model(
                input_ids=inputs["input_ids"].to(model.device), attention_mask=mask.to(model.device).long()
            ).logits
        for number, chosen, real in zip(batch, logits.argmax(-1).cpu(), mask, strict=True):
            chosen = chosen.view(1) if options.task == "text" else chosen[real][split.places[number]]
            found[number] = [names[index] for index in chosen.tolist()]
    model.train(was_training)
    return labels_of_examples(split, [found[number] for number in range(len(order))], names[0])


def _evaluate_baselines(splits: dict[str, Split], options: ClassifierOptions) -> dict[str, Any]:
    """The metrics of the baselines on the test data, by name."""
    if "test" not in splits:
        return {}
    train, test = splits["train"], splits["test"]
    results = {
        name: score(options.task, test.expected, predicted)
        for name, predicted in baseline_predictions(options.task, train.examples, test.examples).items()
    }
    for name, result in results.items():
        _log(f"baseline {name}", result, options)
    return results


def _log(name: str, result: dict[str, Any], options: ClassifierOptions) -> None:
    main = MAIN_METRIC[options.task]
    ends = result["interval"]
    interval = f"95% interval {ends[0]:.4f} to {ends[1]:.4f}" if ends else "too few mentions for an interval"
    logger.info("%s: %s %.4f (%s)", name, main, result[main], interval)


class _Trainer(Trainer):
    """A Trainer that evaluates by the metrics of the task, of which `results` has those of each epoch."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        splits: dict[str, Split],
        options: ClassifierOptions,
    ):
        self.options, self.splits, self.tokenizer = options, splits, tokenizer
        validated = "validation" in splits
        main = MAIN_METRIC[options.task]
        arguments = TrainingArguments(
            output_dir=str(options.output / CHECKPOINTS),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            train_sampling_strategy="group_by_length",
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=_WARMUP,
            weight_decay=_WEIGHT_DECAY,
            eval_strategy="epoch" if validated else "no",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=validated,
            metric_for_best_model=main,
            greater_is_better=True,
            logging_steps=20,
            bf16=computes_in_bf16(model.device),
            use_cpu=model.device.type == "cpu",
            seed=options.seed,
            report_to=options.report_to,
        )
        super().__init__(
            model=model,
            args=on_one_gpu(arguments),
            train_dataset=splits["train"].sequences,
            data_collator=_collator(tokenizer, options),
            processing_class=tokenizer,
            callbacks=[EarlyStoppingCallback(options.patience)] if options.patience else None,
            eval_dataset=splits["validation"].sequences if validated else None,
        )
        show_metrics(self, {"loss": "loss", f"eval_{main}": f"validation {main}"})

    @property
    def results(self) -> list[dict[str, float]]:
        """The main metric on the validation data after each epoch."""
        main = f"eval_{MAIN_METRIC[self.options.task]}"
        return [
            {"epoch": entry["epoch"], main.removeprefix("eval_"): entry[main]}
            for entry in self.state.log_history
            if main in entry
        ]

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        split = self.splits["validation"]
        predicted = predict(self.model, self.tokenizer, split, self.options)
        scores = score(self.options.task, split.expected, predicted, _FEW_RESAMPLES)
        metrics = {f"eval_{name}": value for name, value in scores.items() if isinstance(value, float)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _open_config(options: ClassifierOptions) -> PreTrainedConfig:
    refuse_adapter(options.model)
    try:
        config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.model}: can't load a model: {one_line(error)}") from error
    if options.bidirectional:
        if not hasattr(config, "is_causal"):
            raise OptionError("bidirectional", f"a {config.model_type} model has no is_causal in its configuration")
        config.is_causal = False
    return config


def _make_classifier(config: PreTrainedConfig, names: Sequence[str], options: ClassifierOptions) -> PreTrainedModel:
    """The model with a new head for these labels, in fp32."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    auto_class = AutoModelForSequenceClassification if options.task == "text" else AutoModelForTokenClassification
    how = {"trust_remote_code": True, "dtype": torch.float32}
    torch.manual_seed(options.seed)
    try:
        if options.from_scratch:
            return auto_class.from_config(config, **how)
        return auto_class.from_pretrained(options.model, config=config, **how)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.model}: can't load a classifier: {one_line(error)}") from error


def _with_adapters(model: PreTrainedModel, options: ClassifierOptions) -> Any:
    from peft import LoraConfig, get_peft_model

    task_type = "SEQ_CLS" if options.task == "text" else "TOKEN_CLS"
    heads = ["score", "classifier"]
    return get_peft_model(
        model,
        LoraConfig(
            task_type=task_type,
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            exclude_modules=heads,
        ),
    )


def _collator(tokenizer: PreTrainedTokenizerBase, options: ClassifierOptions) -> Any:
    return (DataCollatorWithPadding if options.task == "text" else DataCollatorForTokenClassification)(tokenizer)
