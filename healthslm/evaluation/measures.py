"""The whole evaluation of a model, a JSON file for each measure:

held_out.json        bits per byte of held-out abstracts, beside xz and the untrained network
beside.json          those of other models
pubmed.json          the same of the corpus's held-out PubMed citations, by decade and section
pubmed_ids.jsonl     these citations as ids and checksums: scripts/fetch_evaluation_set.py fetches them
minimal_pairs.json   the true term against another one, in its sentence
pubmedqa.json        PubMedQA's questions, and MedQA and MedMCQA where a hub is reached
generation.json      what generated documents and titles are like
memorisation.json    bits per byte of training abstracts, and how much of a document it goes on with word for word
footprint.json       size by precision, and speed

Each holds, as `inputs`, what it was measured on by checksum: so a command that was stopped need not measure all again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from healthslm.corpus.reader import read_kinds, read_texts, split_files
from healthslm.corpus.report import REPORT
from healthslm.corpus.sources import Row, read_rows
from healthslm.documents import document_text
from healthslm.errors import UserError
from healthslm.evaluation.evaluation_set import read_held_out_pubmed, write_evaluation_set
from healthslm.evaluation.footprint import measure_sizes, measure_speed
from healthslm.evaluation.generation_quality import (
    describe_generation,
    generate_documents,
    generate_titles,
    score_titles,
)
from healthslm.evaluation.held_out import measure_held_out, measure_model, untrained_network, xz_bits_per_byte
from healthslm.evaluation.memorisation import (
    OPENING_TOKENS,
    choose_openings,
    continue_greedily,
    measure_bits,
    measure_matches,
)
from healthslm.evaluation.minimal_pairs import build_pairs, count_terms, read_terms, score_pairs, similarities
from healthslm.evaluation.options import ReleaseEvaluationOptions
from healthslm.evaluation.question_answering import measure_hub_tasks, measure_pubmedqa
from healthslm.files import file_sha256, read_json, write_json
from healthslm.models import find_device, open_model
from healthslm.tokenization.encoding import load_tokenizer, separator_id
from healthslm.tokenization.tokens import INFO_FILE, TokenizedSplit
from healthslm.training.run_folder import CONFIG_FILE, METRICS_FILE, report_training, tokens_seen

logger = logging.getLogger(__name__)

PUBMED_IDS = "pubmed_ids.jsonl"


class Tokenized(NamedTuple):
    """Documents of the corpus."""

    documents: list[np.ndarray]
    """Token ids of each, its separator first."""
    bytes: np.ndarray
    """(documents,), of their texts in UTF-8."""
    kinds: np.ndarray
    """(documents,), such as "abstract"."""


class Subject:
    """What is measured, and what with: opened when first asked for."""

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
        return list(read_rows(str(self.options.held_out)))

    @cached_property
    def held_out_texts(self) -> list[str]:
        return [document_text(row.get("title") or "", row["text"]) for row in self.held_out]

    def inputs(self, measure: str) -> dict[str, Any]:
        """What a measure depends on, by checksum."""
        options = self.options
        if measure == "beside":
            models = {name: _weights(source) for name, source in options.beside.items()}
            return {options.held_out.name: file_sha256(options.held_out)} | models
        files = (options.corpus / REPORT, options.tokens / INFO_FILE, options.held_out, options.pubmedqa)
        inputs = {path.name: file_sha256(path) for path in files} | {"documents": options.documents}
        inputs["model"] = _weights(options.model)
        if measure == "memorisation" and options.training is not None:
            inputs |= {name: file_sha256(options.training / name) for name in (CONFIG_FILE, METRICS_FILE)}
        return inputs

    def training_texts(self) -> Iterator[str]:
        files = split_files(self.options.corpus, "train")
        return (text for path in tqdm(files, desc="training text") for texts in read_texts(path) for text in texts)

    def tokenized(self, splits: Sequence[str]) -> "Tokenized":
        """The documents of some splits of the corpus, one after another.

        Raises:
            UserError: The tokens are not of the corpus, by the number of documents.
        """
        corpus, tokens = self.options.corpus, self.options.tokens
        found = [TokenizedSplit(tokens, split) for split in splits]
        kinds = [kind for split in splits for path in split_files(corpus, split) for kind in read_kinds(path)]
        if len(kinds) != sum(map(len, found)):
            raise UserError(
                f"{tokens}: not the tokens of {corpus}: {sum(map(len, found)):,} documents and not {len(kinds):,} "
                f"in {' and '.join(splits)}"
            )
        documents = [split.document(index) for split in found for index in range(len(split))]
        return Tokenized(documents, np.concatenate([split.document_bytes for split in found]), np.array(kinds))

    def documents_read(self) -> np.ndarray:
        """The training documents whose opening the model has read, as far as is known, as numbers of the split's."""
        options = self.options
        train = TokenizedSplit(options.tokens, "train")
        if options.training is None:
            return np.arange(len(train))
        report = report_training(options.training, Path(options.model), hardware="of no account here")
        sequences, indices = report.sequences(train, self.model.config.max_position_embeddings)
        return sequences.documents_opened(indices, OPENING_TOKENS)


def _weights(model: str) -> str:
    """The checksum of a folder's weights; a model on the Hub is known by its name, a missing folder by its last two."""
    path = Path(model) / SAFE_WEIGHTS_NAME
    if path.is_file():
        return file_sha256(path)
    return "/".join(Path(model).parts[-2:])


def evaluate_release(options: ReleaseEvaluationOptions) -> None:
    """Take the measures of a model, one after another, and write each as soon as it is taken.

    Raises:
        UserError: There is no such model, data, measure or device.
    """
    find_device(options.device)
    unknown = set(options.only) - set(MEASURES)
    if unknown:
        raise UserError(f"no measure {', '.join(sorted(unknown))}, only {', '.join(MEASURES)}")
    subject = Subject(options)
    for name in options.only or MEASURES:
        path, inputs = options.output / f"{name}.json", subject.inputs(name)
        if options.keep and path.is_file() and read_json(path).get("inputs") == inputs:
            logger.info("keeping %s", path)
            continue
        logger.info("measuring %s", name)
        write_json(path, MEASURES[name](subject) | {"inputs": inputs})


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder of results says, by measure, without what it was measured on."""
    results = {measure: read_json(folder / f"{measure}.json") for measure in MEASURES}
    return {measure: {key: found[key] for key in found if key != "inputs"} for measure, found in results.items()}


def measure_abstracts(subject: Subject) -> dict[str, Any]:
    return {
        "data": subject.options.held_out.name,
        "model": measure_held_out(subject.model, subject.tokenizer, subject.held_out, progress=True),
        "untrained": measure_held_out(
            untrained_network(subject.model), subject.tokenizer, subject.held_out, progress=True
        ),
        "xz": xz_bits_per_byte(subject.held_out_texts),
    }


def measure_others(subject: Subject) -> dict[str, Any]:
    """Each with the tokens that it was trained on, where the folder of its run tells them.

    A model that can't be opened keeps what the results' folder has of it on the same abstracts.
    """
    path, held_out = subject.options.output / "beside.json", subject.options.held_out
    earlier = read_json(path) if path.is_file() else {"inputs": {}}
    is_same = earlier["inputs"].get(held_out.name) == file_sha256(held_out)
    models = {}
    for name, source in subject.options.beside.items():
        found = measure_model(source, subject.held_out, subject.options.device, progress=True)
        if "not_measured" in found and is_same and name in earlier["models"]:
            models[name] = earlier["models"][name]
        else:
            models[name] = {"training_tokens": tokens_seen(Path(source))} | found
    return {"models": models}


def measure_pubmed(subject: Subject) -> dict[str, Any]:
    documents = read_held_out_pubmed(subject.options.corpus)
    write_evaluation_set(subject.options.output / PUBMED_IDS, documents)
    return measure_held_out(subject.model, subject.tokenizer, documents, progress=True)


def measure_minimal_pairs(subject: Subject) -> dict[str, Any]:
    terms = read_terms()
    counts, neighbours = count_terms(subject.training_texts(), terms)

    def measure(similarity: np.ndarray | None = None) -> dict[str, Any]:
        pairs = build_pairs(subject.held_out, terms, counts, subject.tokenizer, similarity=similarity)
        scores = score_pairs(subject.model, subject.tokenizer, pairs, progress=True)
        return {"scores": scores, "pairs": [pair.to_dict() for pair in pairs]}

    return measure() | {"harder": measure(similarities(terms, neighbours))}


def measure_question_answering(subject: Subject) -> dict[str, Any]:
    model, device = subject.options.model, subject.options.device
    pubmedqa = measure_pubmedqa(model, subject.options.pubmedqa, device=device)
    return {"pubmedqa": pubmedqa, **measure_hub_tasks(model, device=device)}


def measure_generation(subject: Subject) -> dict[str, Any]:
    model, tokenizer, count = subject.model, subject.tokenizer, subject.options.documents
    generated = generate_documents(model, tokenizer, count, seed=0, progress=True)
    titled = [row for row in subject.held_out if row.get("title")][:count]
    abstracts = [row["text"] for row in titled]
    titles = generate_titles(model, tokenizer, abstracts, progress=True)
    return {
        "documents": describe_generation(
            tokenizer, generated, subject.held_out_texts[:count], subject.training_texts()
        ),
        "titles": score_titles(titles, [row["title"] for row in titled], abstracts),
        "samples": [tokenizer.decode(ids, skip_special_tokens=True) for ids in generated[:5]],  # the first, not chosen
    }


def measure_memorisation(subject: Subject) -> dict[str, Any]:
    """Held-out documents are those of the corpus's own two other splits, which come from the same sources."""
    count, separator = subject.options.documents, separator_id(subject.tokenizer)
    found = {}
    for name, splits in (("training", ("train",)), ("held_out", ("validation", "test"))):
        documents, sizes, kinds = subject.tokenized(splits)
        numbers = subject.documents_read() if name == "training" else np.arange(len(documents))
        abstracts = numbers[kinds[numbers] == "abstract"]
        if not len(abstracts):
            raise UserError(f"{subject.options.tokens}: no abstracts in {' and '.join(splits)} to measure on")
        openings = choose_openings(documents.__getitem__, numbers, 2 * count)
        written = continue_greedily(subject.model, openings, separator, progress=True)
        found[name] = {
            "chosen_from": len(numbers),
            **measure_matches(written, openings),
            "abstracts": measure_bits(
                subject.model, [documents[number] for number in abstracts], sizes[abstracts], count, progress=True
            ),
        }
    return found


def measure_footprint(subject: Subject) -> dict[str, Any]:
    model = subject.options.model
    return {"sizes": measure_sizes(model), "speed": measure_speed(model, separator_id(subject.tokenizer))}


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "held_out": measure_abstracts,
    "beside": measure_others,
    "pubmed": measure_pubmed,
    "minimal_pairs": measure_minimal_pairs,
    "pubmedqa": measure_question_answering,
    "generation": measure_generation,
    "memorisation": measure_memorisation,
    "footprint": measure_footprint,
}
