"""All metrics of a released model: each function is a metric of its name, see `healthslm.evaluation.registry`."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from healthslm.corpus.report import REPORT
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
from healthslm.evaluation.precisions import compare_precisions
from healthslm.evaluation.question_answering import measure_hub_tasks, measure_pubmedqa
from healthslm.evaluation.registry import METRICS, metric, weights_fingerprint
from healthslm.evaluation.subject import Subject
from healthslm.files import read_json
from healthslm.models import find_device
from healthslm.quantization import available_precisions
from healthslm.tokenization.encoding import encode_documents, separator_id
from healthslm.training.run_folder import tokens_seen

logger = logging.getLogger(__name__)

PUBMED_IDS = "pubmed_ids.json"


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
    path, weights = subject.options.output / "finetuning.json", weights_fingerprint(subject.options.model)
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
