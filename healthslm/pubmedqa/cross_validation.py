"""PubMedQA in the reasoning-required setting: question and contexts in, yes, no or maybe out, by cross-validation.

The training has two phases, as in the paper (Jin et al., EMNLP 2019, "PubMedQA: a dataset for biomedical research
question answering"). The first fine-tunes a classifier on artificial questions (`finetune_classifier.py` does it). The
second, here, trains a new head for the three answers on the expert questions, since 450 questions are too few for
more: multinomial logistic regression on the last hidden state of the last token. It is done ten times, each time
without a tenth of the training questions, on which the head is validated. All ten are evaluated on the test questions.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from healthslm.errors import UserError, one_line
from healthslm.files import file_sha256, write_json
from healthslm.finetuning.card import Result
from healthslm.models import by_device, find_device, weights_sha256
from healthslm.pubmedqa.artificial import ANSWERS, Row, input_text, read_questions
from healthslm.pubmedqa.options import CrossValidationOptions
from healthslm.statistics import macro_f1, macro_f1_interval, mean, share
from healthslm.tokenization.encoding import open_tokenizer

logger = logging.getLogger(__name__)

Predict = Callable[[np.ndarray], np.ndarray]
"""From (questions, features) to the probabilities of the answers, (questions, answers)."""


def cross_validate_pubmedqa(options: CrossValidationOptions) -> None:
    """Train the heads, evaluate them and the baselines on the test questions, and write all results to a JSON file.

    Raises:
        UserError: There is no such file, model or device, a file doesn't hold PubMedQA's questions, the training and
            test questions overlap, or an answer has fewer training questions than there are folds.
    """
    train, test = read_questions(options.train), read_questions(options.test)
    if common := {int(row["pmid"]) for row in train} & {int(row["pmid"]) for row in test}:
        raise UserError(f"{options.test}: {len(common)} questions are also in {options.train}, such as {min(common)}")
    for answer, count in zip(ANSWERS, np.bincount(encode_answers(train), minlength=len(ANSWERS)), strict=True):
        if count < options.folds:
            raise UserError(
                f"{options.train}: {count} questions with the answer {answer}, but each of the {options.folds} folds "
                "needs one: add questions or lower --folds"
            )
    answers = encode_answers(train), encode_answers(test)
    models = {"majority": majority_result(*answers), "word_counts": word_counts(train, test, options)}
    if options.artificial:
        artificial = read_questions(options.artificial)
        models["word_counts_two_phases"] = word_counts_in_two_phases(train, test, artificial, options)
    sources = [("two_phases", options.model, False)]
    if options.base:
        sources += [("expert_questions_alone", options.base, False), ("untrained", options.base, True)]
    for name, source, new_weights in sources:
        tokenizer, model = open_classifier(source, options, new_weights)
        train_states, test_states = (
            last_hidden_states(model, tokenizer, [input_text(row, options.max_words) for row in rows])
            for rows in (train, test)
        )
        models[name] = cross_validate(train_states, test_states, *answers, options)
    for name, result in models.items():
        logger.info("%-24s accuracy %.1f%%, macro-F1 %.3f", name, *_both(result))
    write_json(
        options.output,
        {
            "setting": "reasoning required: question and contexts, without the conclusion",
            "models": models,
            "results": [asdict(result) for result in _results(models)],
            "base": {"model": options.base or options.model, "sha256": weights_sha256(options.base or options.model)},
            "seed": options.seed,
            "settings": {name: getattr(options, name) for name in ("folds", "max_words", "penalty", "balance", "seed")},
            "data": {
                name: file_sha256(path)
                for name, path in (("train", options.train), ("test", options.test), ("artificial", options.artificial))
                if path
            },
            "weights_sha256": weights_sha256(options.model),
            "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        },
    )


def _results(models: dict[str, dict[str, Any]]) -> list[Result]:
    """The scores of the heads' mean probabilities, and those of the other models as baselines."""
    found = {name.replace("_", " "): model["ensemble"] for name, model in models.items()}
    ours = found.pop("two phases")
    accuracies = {name: other["accuracy"]["share"] for name, other in found.items()}
    f1 = {name: other["macro_f1"]["value"] for name, other in found.items()}
    return [
        Result("accuracy, test", ours["accuracy"]["share"], ours["accuracy"]["interval"], accuracies),
        Result("macro-F1, test", ours["macro_f1"]["value"], ours["macro_f1"]["interval"], f1),
    ]


def _both(result: dict[str, Any]) -> tuple[float, float]:
    return 100 * result["ensemble"]["accuracy"]["share"], result["ensemble"]["macro_f1"]["value"]


def encode_answers(rows: Sequence[Row]) -> np.ndarray:
    """(questions,), the index of each answer in `ANSWERS`."""
    return np.array([ANSWERS.index(row["final_decision"]) for row in rows], dtype=np.int64)


def open_classifier(
    source: str, options: CrossValidationOptions, new_weights: bool = False
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A model for sequence classification with its tokenizer; only its hidden states are used.

    Raises:
        UserError: There is no such model, tokenizer or device.
    """
    tokenizer = open_tokenizer(source)
    how: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    try:
        if new_weights:
            torch.manual_seed(options.seed)
            config = AutoConfig.from_pretrained(source, trust_remote_code=True)
            model = AutoModelForSequenceClassification.from_config(config, **how)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(source, **how)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: can't load a classifier: {one_line(error)}") from error
    return tokenizer, model.to(find_device(options.device)).eval()


@torch.inference_mode()
def last_hidden_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """The state that the head classifies: that of the last token after the last layer, (texts, hidden), float32.

    A text that exceeds the context loses its beginning.
    """
    limit = model.config.max_position_embeddings
    token_ids = [ids[-limit:] for ids in tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]]
    order = sorted(range(len(token_ids)), key=lambda number: len(token_ids[number]))
    size = by_device(model, cpu=8, gpu=64)
    states = np.zeros((len(token_ids), model.config.hidden_size), np.float32)
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        inputs = tokenizer.pad({"input_ids": [token_ids[number] for number in numbers]}, return_tensors="pt")
        mask = inputs["attention_mask"].to(model.device)
        hidden = model.base_model(input_ids=inputs["input_ids"].to(model.device), attention_mask=mask).last_hidden_state
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * places).argmax(dim=1)  # wherever the tokenizer pads
        states[numbers] = hidden[torch.arange(len(numbers)), last].float().cpu().numpy()
    return states


def cross_validate(
    train: np.ndarray,
    test: np.ndarray,
    train_answers: np.ndarray,
    test_answers: np.ndarray,
    options: CrossValidationOptions,
) -> dict[str, Any]:
    """Train a head per fold and evaluate it.

    Args:
        train: (questions, features)
        test: (questions, features)

    Returns:
        `validation`, over the folds together, each question answered by the head that has not seen it; `test`, the
        mean over the heads; and `ensemble`, the mean of their probabilities on the test questions.
    """
    scale = np.sqrt((train**2).mean())  # so that one penalty suits all models

    def fit(places: np.ndarray) -> Predict:
        head = LogisticRegression(C=1 / options.penalty, max_iter=2000)
        answers = train_answers[places]
        head.fit(train[places] / scale, answers, sample_weight=answer_weights(answers, options.balance))
        return head.predict_proba

    return _over_folds(fit, train / scale, test / scale, train_answers, test_answers, options)


def word_counts(train: list[Row], test: list[Row], options: CrossValidationOptions) -> dict[str, Any]:
    """The baseline of TF-IDF and logistic regression, trained on the expert questions of a fold.

    Returns:
        Like `cross_validate`.
    """
    texts, test_texts = ([input_text(row, options.max_words) for row in rows] for rows in (train, test))
    answers = encode_answers(train)

    def fit(places: np.ndarray) -> Predict:
        weights = answer_weights(answers[places], options.balance)
        classifier = _word_classifier()
        classifier.fit([texts[place] for place in places], answers[places], logisticregression__sample_weight=weights)
        return classifier.predict_proba

    inputs, test_inputs = np.array(texts, object), np.array(test_texts, object)
    return _over_folds(fit, inputs, test_inputs, answers, encode_answers(test), options)


def word_counts_in_two_phases(
    train: list[Row], test: list[Row], artificial: list[Row], options: CrossValidationOptions
) -> dict[str, Any]:
    """The same, but trained on the artificial questions. Its logits are the features of the second phase.

    Returns:
        Like `cross_validate`.
    """
    texts, test_texts, artificial_texts = (
        [input_text(row, options.max_words) for row in rows] for rows in (train, test, artificial)
    )
    classifier = _word_classifier().fit(artificial_texts, encode_answers(artificial))
    logits, test_logits = (classifier.decision_function(rows).reshape(len(rows), -1) for rows in (texts, test_texts))
    weak = replace(options, penalty=1.0)  # a few logits need hardly any
    return cross_validate(logits, test_logits, encode_answers(train), encode_answers(test), weak)


def _word_classifier() -> Pipeline:
    return make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1000))


def answer_weights(answers: np.ndarray, balance: float) -> np.ndarray:
    """The weight of each training question: 1 for `balance` 0, and so that all answers count the same for 1."""
    counts = np.bincount(answers, minlength=len(ANSWERS))
    return ((len(answers) / (len(ANSWERS) * np.maximum(counts, 1))) ** balance)[answers]


def _over_folds(
    fit: Callable[[np.ndarray], Predict],
    train: np.ndarray,
    test: np.ndarray,
    train_answers: np.ndarray,
    test_answers: np.ndarray,
    options: CrossValidationOptions,
) -> dict[str, Any]:
    folds = StratifiedKFold(options.folds, shuffle=True, random_state=options.seed)
    validated, tested = np.zeros(len(train_answers), int), []
    for inside, outside in folds.split(train_answers, train_answers):
        predict = fit(inside)
        validated[outside] = predict(train[outside]).argmax(axis=1)
        tested.append(predict(test))
    return {
        "validation": scores(train_answers, validated),
        "test": mean_scores(test_answers, [probabilities.argmax(axis=1) for probabilities in tested]),
        "ensemble": scores(test_answers, np.mean(tested, axis=0).argmax(axis=1)),
    }


def scores(answers: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Accuracy and macro-F1 with 95% intervals over questions, and the confusion matrix."""
    confusion = _confusion(answers, chosen)
    return {
        "accuracy": share(int(confusion.trace()), len(answers)),
        "macro_f1": {"value": float(macro_f1(confusion)), "interval": macro_f1_interval(confusion)},
        "confusion": confusion.tolist(),
    }


def mean_scores(answers: np.ndarray, chosen: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean accuracy and macro-F1 of several models on the same questions, and those of each.

    The interval of the accuracy is a bootstrap over questions, of which each counts the share of models that are right.
    """
    by_model = macro_f1(np.stack([_confusion(answers, one) for one in chosen]))
    correct = np.stack([one == answers for one in chosen])
    return {
        "accuracy": mean(correct.mean(axis=0)) | {"each": correct.mean(axis=1).tolist()},
        "macro_f1": {"mean": float(by_model.mean()), "each": by_model.tolist()},
    }


def majority_result(train_answers: np.ndarray, test_answers: np.ndarray) -> dict[str, Any]:
    """The scores of always giving the most frequent answer of the training questions."""
    most_frequent = np.bincount(train_answers).argmax()
    return {"ensemble": scores(test_answers, np.full(len(test_answers), most_frequent))}


def _confusion(answers: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    counts = np.zeros((len(ANSWERS), len(ANSWERS)), dtype=np.int64)
    np.add.at(counts, (answers, chosen), 1)
    return counts
