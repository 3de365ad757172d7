"""The card of a classifier, from its metrics and options."""

from typing import Any

from healthslm.classification.options import ClassifierOptions
from healthslm.finetuning.card import Card, Result

_SUMMARIES = {
    "mentions": "Finds mentions in biomedical English and gives their types: {labels}.",
    "sentences": "Gives each sentence of a document one of these labels: {labels}.",
    "text": "Gives a text one of these labels: {labels}.",
}
_SETTINGS = ("epochs", "learning_rate", "batch_size", "join", "seed", "method", "bidirectional")
_PIPELINE = """\
from transformers import pipeline

classifier = pipeline("{task}", model="path/to/this/folder", trust_remote_code=True{more})
print(classifier("Lithium caused tremor in a patient with bipolar disorder."))"""
_UNITS = """\
from transformers import AutoModelForTokenClassification, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
units = {units}
inputs = tokenizer(units, is_split_into_words=True, return_tensors="pt")
last_tokens = {{unit: place for place, unit in enumerate(inputs.word_ids()) if unit is not None}}
labels = model(**inputs).logits[0].argmax(-1)[list(last_tokens.values())]
print([model.config.id2label[label] for label in labels.tolist()])"""


def results_of(metrics: dict[str, Any], options: ClassifierOptions) -> list[Result]:
    """The main metrics on the test and validation data, with those of the baselines."""
    kinds = [("macro_f1", "macro-F1", "interval"), ("accuracy", "accuracy", "accuracy_interval")]
    if options.task == "mentions":
        kinds = [("f1", "F1", "interval")]
    results = []
    for split in ("test", "validation"):
        for kind, name, interval in kinds if split in metrics else ():
            baselines = {other: scores[kind] for other, scores in metrics["baselines"].items() if split == "test"}
            results.append(Result(f"{name}, {split}", metrics[split][kind], metrics[split][interval], baselines))
    return results


def describe(metrics: dict[str, Any], options: ClassifierOptions, results: list[Result]) -> Card:
    """The card of a classifier with these contents of metrics.json."""
    task = "text-classification" if options.task == "text" else "token-classification"
    data = {
        split: f"{found['examples']:,} examples ({found['tokens']:,} tokens) of "
        + ", ".join(file["name"] for file in found["files"])
        for split, found in metrics["data"].items()
    }
    labels = metrics["labels"]
    if options.task == "mentions":
        labels = sorted({label[2:] for label in labels if label != "O"})
    summary = _SUMMARIES[options.task].format(labels=", ".join(labels))
    return Card(
        title=options.output.name,
        summary=f"{summary} It was trained from new weights, as a baseline." if options.from_scratch else summary,
        task=task,
        base=metrics["base"]["model"],
        base_sha256=metrics["base"]["sha256"],
        is_adapter=False,
        usage=_usage(task, options),
        data=data,
        results=results,
        settings={name: getattr(options, name) for name in _SETTINGS}
        | {name: metrics[name] for name in ("training_seconds",) if name in metrics},
        limits=_limits(metrics, options),
    )


def _usage(task: str, options: ClassifierOptions) -> str:
    if options.task == "sentences":
        return _UNITS.format(units='["We studied sleep.", " Forty adults took part.", " They slept well."]')
    if options.task == "mentions" and options.tokens_with_labels == "last":
        return _UNITS.format(units='["Lithium", " caused", " tremor", "."]')
    more = ', aggregation_strategy="simple"' if options.task == "mentions" else ""
    return _PIPELINE.format(task=task, more=more)


def _limits(metrics: dict[str, Any], options: ClassifierOptions) -> list[str]:
    limits = ["The labels are those of the training data; on text of another kind expect more errors."]
    if not options.from_scratch:
        limits.append(
            "The base model may have read the text of the evaluation data in pretraining, without the labels: expect "
            "less on new text."
        )
    if "test" not in metrics:
        limits.append("It has not been evaluated on test data.")
    if "validation" in metrics:
        limits.append("The epoch was chosen on the validation data, so its result there is too good.")
    return limits
