"""All metrics of a released model. Each is a function in the registry `METRICS` and writes one JSON file, NAME.json.

A metric declares its inputs, further files that it writes, and a version. Its file records the `inputs` by fingerprint
and the `version` next to the result, and the `software` that computed it. A stored result is up to date if inputs and
version are the same, so an evaluation that was stopped can be resumed (`keep`). **Raise the version of a metric
whenever its definition changes**: results of an older version are then computed again.
"""

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import healthslm
from healthslm.corpus.reader import read_kinds, read_texts, split_files
from healthslm.corpus.report import REPORT
from healthslm.corpus.sources import Row, read_rows
from healthslm.documents import document_text
from healthslm.errors import UserError
from healthslm.evaluation.evaluation_set import read_held_out_pubmed, write_evaluation_set
from healthslm.evaluation.generation_quality import (
    describe_generation,
    generate_documents,
    generate_titles,
    score_titles,
)
from healthslm.evaluation.held_out import measure_held_out, measure_model, untrained_model, xz_bits_per_byte
from healthslm.evaluation.memorization import (
    OPENING_TOKENS,
    choose_openings,
    continue_greedily,
    measure_bits,
    measure_matches,
)
from healthslm.evaluation.minimal_pairs import build_pairs, count_terms, read_terms, score_pairs, similarities
from healthslm.evaluation.options import ReleaseEvaluationOptions
from healthslm.evaluation.precisions import compare_precisions
from healthslm.evaluation.question_answering import measure_hub_tasks, measure_pubmedqa
from healthslm.files import file_sha256, read_json, write_json
from healthslm.models import find_device, open_model, weights_sha256
from healthslm.quantization import available_precisions
from healthslm.tokenization.encoding import encode_documents, load_tokenizer, separator_id
from healthslm.tokenization.tokens import INFO_FILE, TokenizedSplit
from healthslm.training.run_folder import TrainingReport, report_training, tokens_seen

logger = logging.getLogger(__name__)

PUBMED_IDS = "pubmed_ids.json"
SOFTWARE = ("torch", "transformers", "lm_eval")
_RECORD = ("version", "inputs", "software")


class Tokenized(NamedTuple):
    """Tokenized documents of the corpus."""

    splits: list[TokenizedSplit]
    bytes: np.ndarray
    """(documents,), size of each text in UTF-8 bytes."""
    kinds: np.ndarray
    """(documents,), such as "abstract"."""

    def document(self, index: int) -> np.ndarray:
        """Token ids of a document, starting with the separator."""
        for split in self.splits:
            if index < len(split):
                return split.document(index)
            index -= len(split)
        raise IndexError(index)


class Subject:
    """The model under evaluation and its data, loaded when first used."""

    def __init__(self, options: ReleaseEvaluationOptions):
        self.options = options

    @cached_property
    def model(self) -> PreTrainedModel:
        return open_model(self.options.model, self.options.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.options.model)

    @cached_property
    def held_out(self) -> list[Row]:
        file = self.options.held_out
        rows = [row for row in read_rows(str(file)) if row.get("text")]
        if not rows:
            raise UserError(f"{file}: no document has any text")
        for row in rows:
            if not isinstance(row["text"], str):
                raise UserError(f"{file}: column text holds {str(row['text'])[:40]}, where text is expected")
        return rows

    @cached_property
    def held_out_texts(self) -> list[str]:
        return [document_text(row.get("title") or "", row["text"]) for row in self.held_out]

    @cached_property
    def training(self) -> TrainingReport | None:
        if self.options.training is None:
            return None
        return report_training(self.options.training, Path(self.options.model), hardware="unknown")

    def training_texts(self) -> Iterator[str]:
        files = split_files(self.options.corpus, "train")
        return (text for path in tqdm(files, desc="training text") for texts in read_texts(path) for text in texts)

    def tokenized(self, splits: Sequence[str]) -> Tokenized:
        """The documents of one or several splits, in order.

        Raises:
            UserError: The tokens belong to another corpus, judging by the number of documents.
        """
        corpus, tokens = self.options.corpus, self.options.tokens
        found = [TokenizedSplit(tokens, split) for split in splits]
        kinds = [kind for split in splits for path in split_files(corpus, split) for kind in read_kinds(path)]
        if len(kinds) != sum(map(len, found)):
            raise UserError(
                f"{tokens}: not the tokens of {corpus}: {sum(map(len, found)):,} documents instead of {len(kinds):,} "
                f"in {' and '.join(splits)}; tokenize the corpus again"
            )
        return Tokenized(found, np.concatenate([split.document_bytes for split in found]), np.array(kinds))

    def documents_read(self) -> np.ndarray:
        """Indices of the training documents whose opening the model has read: all of them if the run is unknown."""
        train = TokenizedSplit(self.options.tokens, "train")
        if self.training is None:
            return np.arange(len(train))
        sequences, indices = self.training.sequences(train, self.model.config.max_position_embeddings)
        return sequences.documents_opened(indices, OPENING_TOKENS)


Compute = Callable[[Subject], dict[str, Any]]
"""Computes the result of a metric, ready for JSON."""


def _training_read(subject: Subject) -> dict[str, Any] | None:
    """What decides which training documents a model has read."""
    if subject.training is None:
        return None
    return {"tokens": subject.training.tokens} | {name: subject.training.config[name] for name in ("context", "seed")}


def _weights(model: str) -> str:
    """The checksum of a model's weights, or if there is none, the name of the Hub model or the last two components of
    the folder's path."""
    try:
        return weights_sha256(model)
    except UserError:
        return "/".join(Path(model).parts[-2:])


INPUTS: dict[str, Callable[[Subject], Any]] = {
    "model": lambda subject: _weights(subject.options.model),
    "corpus": lambda subject: file_sha256(subject.options.corpus / REPORT),
    "tokens": lambda subject: file_sha256(subject.options.tokens / INFO_FILE),
    "held_out": lambda subject: file_sha256(subject.options.held_out),
    "pubmedqa": lambda subject: file_sha256(subject.options.pubmedqa),
    "baselines": lambda subject: {name: _weights(source) for name, source in subject.options.baselines.items()},
    "finetuned": lambda subject: {
        name: [file_sha256(file) for file in files if file.is_file()]
        for name, files in subject.options.finetuned.items()
    },
    "documents": lambda subject: subject.options.documents,
    "training": _training_read,
}
"""The fingerprint of each input, by the name of its option."""


@dataclass(frozen=True)
class Metric:
    """An entry of the registry."""

    name: str
    compute: Compute
    inputs: tuple[str, ...]
    """Names of the inputs (see `INPUTS`) that decide the result."""
    version: int
    files: tuple[str, ...]
    """Names of all files that it writes into the folder of the results."""

    def fingerprint(self, subject: Subject) -> dict[str, Any]:
        """What an up-to-date result must record."""
        return {"version": self.version, "inputs": {name: INPUTS[name](subject) for name in self.inputs}}

    def is_up_to_date(self, subject: Subject) -> bool:
        """Whether the output folder has a result of this version for these inputs."""
        files = [subject.options.output / file for file in self.files]
        if not all(file.is_file() for file in files):
            return False
        return read_json(files[0]).items() >= self.fingerprint(subject).items()


METRICS: dict[str, Metric] = {}
"""All metrics by name, in the order in which they are computed."""


def metric(*inputs: str, version: int, files: tuple[str, ...] = ()) -> Callable[[Compute], Compute]:
    """Register a function as the metric of its name.

    Args:
        inputs: Names of the inputs (see `INPUTS`) that the function reads.
        version: Raise it whenever the definition of the metric changes.
        files: Further files that the function writes into the output folder.
    """

    def register(compute: Compute) -> Compute:
        name = compute.__name__
        METRICS[name] = Metric(name, compute, inputs, version, (f"{name}.json", *files))
        return compute

    return register


def evaluate_release(options: ReleaseEvaluationOptions) -> None:
    """Compute the metrics of a model and write each result as soon as it is there.

    Raises:
        UserError: There is no such model, data, metric or device.
    """
    find_device(options.device)
    if unknown := set(options.only) - set(METRICS):
        raise UserError(f"unknown metric {', '.join(sorted(unknown))}: choose from {', '.join(METRICS)}")
    subject = Subject(options)
    software = {name: importlib.metadata.version(name) for name in SOFTWARE}
    for name in options.only or METRICS:
        if options.keep and METRICS[name].is_up_to_date(subject):
            logger.info("keeping %s, which is up to date", name)
            continue
        logger.info("computing %s", name)
        record = METRICS[name].fingerprint(subject) | {"software": {"healthslm": healthslm.__version__} | software}
        write_json(options.output / f"{name}.json", record | METRICS[name].compute(subject))


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder by the name of the metric, without their version, inputs and software."""
    results = {name: read_json(folder / f"{name}.json") for name in METRICS}
    return {name: {key: result[key] for key in result if key not in _RECORD} for name, result in results.items()}


def read_software(folder: Path) -> dict[str, list[str]]:
    """The versions of each library that computed the results in a folder."""
    records = [read_json(folder / f"{name}.json")["software"] for name in METRICS]
    return {name: sorted({record[name] for record in records}) for name in records[0]}


@metric("model", "held_out", version=1)
def held_out(subject: Subject) -> dict[str, Any]:
    """Bits per byte of held-out abstracts, compared with the untrained model and xz."""
    return {
        "data": subject.options.held_out.name,
        "model": measure_held_out(subject.model, subject.tokenizer, subject.held_out, progress=True),
        "untrained": measure_held_out(
            untrained_model(subject.model), subject.tokenizer, subject.held_out, progress=True
        ),
        "xz": xz_bits_per_byte(subject.held_out_texts),
    }


@metric("held_out", "baselines", version=1)
def baselines(subject: Subject) -> dict[str, Any]:
    """Bits per byte of other models on the same abstracts, with the number of training tokens if their run is known.

    A model that can't be opened keeps its earlier result on the same abstracts.
    """
    path, this = subject.options.output / "baselines.json", METRICS["baselines"].fingerprint(subject)
    earlier = read_json(path) if path.is_file() else {}
    is_same = earlier.get("version") == this["version"] and earlier["inputs"]["held_out"] == this["inputs"]["held_out"]
    models = {}
    for name, source in subject.options.baselines.items():
        found = measure_model(source, subject.held_out, subject.options.device, progress=True)
        if "not_measured" in found and is_same and name in earlier["models"]:
            models[name] = earlier["models"][name]
        else:
            models[name] = {"training_tokens": tokens_seen(Path(source))} | found
    return {"models": models}


@metric("model", "corpus", version=1, files=(PUBMED_IDS,))
def pubmed(subject: Subject) -> dict[str, Any]:
    """Bits per byte of the corpus's held-out PubMed citations, by decade and by section.

    `scripts/fetch_evaluation_set.py` downloads the citations that are listed in the second file.
    """
    documents = read_held_out_pubmed(subject.options.corpus)
    settings = read_json(subject.options.corpus / REPORT)["settings"]
    write_evaluation_set(subject.options.output / PUBMED_IDS, documents, settings)
    return measure_held_out(subject.model, subject.tokenizer, documents, progress=True)


@metric("model", "corpus", "held_out", version=1)
def minimal_pairs(subject: Subject) -> dict[str, Any]:
    """How often the model prefers the original biomedical term of a sentence to another one."""
    terms = read_terms()
    counts, neighbors = count_terms(subject.training_texts(), terms)

    def measure(similarity: np.ndarray | None = None) -> dict[str, Any]:
        pairs = build_pairs(subject.held_out, terms, counts, subject.tokenizer, similarity=similarity)
        if not pairs:
            raise UserError(f"{subject.options.held_out}: no sentence has a biomedical term that makes a pair")
        scores = score_pairs(subject.model, subject.tokenizer, pairs, progress=True)
        return {"scores": scores, "pairs": [pair.to_dict() for pair in pairs]}

    return measure() | {"harder": measure(similarities(terms, neighbors))}


@metric("model", "pubmedqa", version=1)
def pubmedqa(subject: Subject) -> dict[str, Any]:
    """Accuracy and macro-F1 on PubMedQA, and on MedQA and MedMCQA if the Hub is available."""
    model, device = subject.options.model, subject.options.device
    return {
        "pubmedqa": measure_pubmedqa(model, subject.options.pubmedqa, device=device),
        **measure_hub_tasks(model, device=device),
    }


@metric("model", "corpus", "held_out", "documents", version=1)
def generation(subject: Subject) -> dict[str, Any]:
    """Properties of generated documents and titles, with five samples."""
    model, tokenizer, count = subject.model, subject.tokenizer, subject.options.documents
    titled = [row for row in subject.held_out if row.get("title")][:count]
    if not titled:
        raise UserError(f"{subject.options.held_out}: no document has a title to compare with")
    generated = generate_documents(model, tokenizer, count, seed=0, progress=True)
    abstracts = [row["text"] for row in titled]
    titles = generate_titles(model, tokenizer, abstracts, progress=True)
    return {
        "documents": describe_generation(
            tokenizer, generated, subject.held_out_texts[:count], subject.training_texts()
        ),
        "titles": score_titles(titles, [row["title"] for row in titled], abstracts),
        "samples": [tokenizer.decode(ids, skip_special_tokens=True) for ids in generated[:5]],  # not cherry-picked
    }


@metric("model", "corpus", "tokens", "documents", "training", version=1)
def memorization(subject: Subject) -> dict[str, Any]:
    """Bits per byte and exact continuations of training documents, compared with held-out documents.

    The held-out documents are those of the corpus's validation and test splits, which come from the same sources.
    """
    count, separator = subject.options.documents, separator_id(subject.tokenizer)
    chosen = {}
    for name, splits in (("training", ("train",)), ("held_out", ("validation", "test"))):
        documents = subject.tokenized(splits)
        numbers = subject.documents_read() if name == "training" else np.arange(len(documents.bytes))
        abstracts = numbers[documents.kinds[numbers] == "abstract"]
        openings = choose_openings(documents.document, numbers, 2 * count)
        for needed, what in ((abstracts, "abstracts"), (openings, f"documents of {OPENING_TOKENS - 1} tokens")):
            if not len(needed):
                raise UserError(f"{subject.options.tokens}: no {what} in {' and '.join(splits)} to evaluate on")
        chosen[name] = documents, numbers, abstracts, openings
    return {
        name: {
            "chosen_from": len(numbers),
            **measure_matches(continue_greedily(subject.model, openings, separator, progress=True), openings),
            "abstracts": measure_bits(
                subject.model, documents.document, documents.bytes, abstracts, count, progress=True
            ),
        }
        for name, (documents, numbers, abstracts, openings) in chosen.items()
    }


@metric("model", "held_out", "documents", version=1)
def quantization(subject: Subject) -> dict[str, Any]:
    """Size, bits per byte of held-out abstracts, and speed in each precision that is available."""
    texts = subject.held_out_texts[: subject.options.documents]
    return compare_precisions(
        subject.options.model,
        available_precisions(),
        encode_documents(subject.tokenizer, texts),
        [len(text.encode()) for text in texts],
        find_device(subject.options.device),
        progress=True,
    )


@metric("model", "finetuned", version=1)
def finetuning(subject: Subject) -> dict[str, Any]:
    """Results of models that were fine-tuned from this one, from the records of their runs.

    If a record is not available, the earlier result from the same weights is kept.

    Raises:
        UserError: A run started from other weights.
    """
    path, weights = subject.options.output / "finetuning.json", _weights(subject.options.model)
    earlier = read_json(path) if path.is_file() else {"models": {}, "inputs": {}}
    models = {}
    for name, files in subject.options.finetuned.items():
        if all(file.is_file() for file in files):
            records = [read_json(file) for file in files]
            for file, record in zip(files, records, strict=True):
                if record["base"]["sha256"] != weights:
                    raise UserError(
                        f"{file}: this model was fine-tuned from other weights than {subject.options.model}"
                    )
            models[name] = [{key: record[key] for key in ("seed", "results")} for record in records]
        elif name in earlier["models"] and earlier["inputs"]["model"] == weights:
            models[name] = earlier["models"][name]
        else:
            logger.info("%s: skipped, its runs are not available", name)
    return {"models": models}
