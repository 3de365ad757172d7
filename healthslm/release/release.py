"""Release the model of a training run: check it, evaluate it, and update the model repository.

    model.safetensors, config.json          the weights in bf16 in one file, with fp32 as the default type to load
    results/                                the results of `healthslm.evaluation.metrics`
    results/training/                       the recipe and the metrics of the run
    docs/evaluation.md, docs/evaluation/    the results as tables and figures
    docs/training-data.md                   the training run and its data
    README.md                               the results table, and the metadata for the Hub

Only a model that is better than the released one replaces it. Either all of these files change or none. Results are
also kept in the run folder, so that a release that was interrupted, or that only changes the documents, doesn't
evaluate the model again.
"""

import filecmp
import logging
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from healthslm.errors import UserError
from healthslm.evaluation.evaluate_release import evaluate_release, read_results, read_software
from healthslm.evaluation.metrics import METRICS
from healthslm.evaluation.options import EvaluationData, ReleaseEvaluationOptions
from healthslm.files import file_sha256, publish, read_json, remove_partials, write_json
from healthslm.models import open_model
from healthslm.plots import draw_evaluation, draw_training, write_figures
from healthslm.release.card import FIGURES_FOLDER, NAME, TRAINING_CURVE, Release, write_pages
from healthslm.release.options import ReleaseOptions
from healthslm.release.training_data import TrainingData, describe_training_data
from healthslm.training.run_folder import CONFIG_FILE, TrainingReport, check_tokens, report_training, write_metrics

logger = logging.getLogger(__name__)

LEAST_IMPROVEMENT = 0.01
"""Bits per byte by which a model must be better than the released one to replace it."""

WEIGHTS, CONFIG, TOKENIZER = SAFE_WEIGHTS_NAME, "config.json", "tokenizer.json"
RESULTS = "results"
HELD_OUT = "held_out"
TRAINING = "training"
_NOT_ARCHITECTURE = {"dtype", "transformers_version"}
"""Keys of config.json that may differ."""


def release(options: ReleaseOptions) -> None:
    """Check, evaluate and release the model of a training run.

    Raises:
        UserError: The model doesn't have the repository's architecture and tokenizer, was not trained on this corpus,
            or is not better than the released one, or `evaluate_release` failed. The repository is unchanged.
    """
    root, folder = options.root, options.model or options.run / "best"
    model = open_candidate(folder, root)
    training = report_training(options.run, folder, options.hardware)
    check_tokens(options.run, options.tokens)
    data = describe_training_data(options.corpus, options.tokens, model.config.max_position_embeddings, root)
    check_held_out(options, data)

    remove_partials(root)
    # Inside the repository, so that finished files can be renamed into place.
    with tempfile.TemporaryDirectory(prefix=".release.partial-", dir=root) as partial_release:
        staged, results = Path(partial_release) / "new", options.run / RESULTS
        stage_model(model, root, staged)
        stage_training(training, staged / RESULTS / TRAINING)
        evaluate(options, staged, results, [HELD_OUT])
        if not options.force:
            check_improvement(read_json(results / f"{HELD_OUT}.json"), root / RESULTS / f"{HELD_OUT}.json")
        evaluate(options, staged, results, [name for name in METRICS if name != HELD_OUT])
        found = read_results(results)
        stage_results(results, staged / RESULTS)

        (staged / FIGURES_FOLDER).mkdir(parents=True)
        write_figures(
            staged / FIGURES_FOLDER,
            lambda: draw_evaluation(found, NAME) | {TRAINING_CURVE: draw_training(training.records)},
        )
        software = read_software(results)
        write_pages(Release(staged / WEIGHTS, model.num_parameters(), found, software, training, data), root, staged)
        publish_all(staged, root, Path(partial_release) / "old")
    logger.info("%s: released, %.4f bits per byte", root, found[HELD_OUT]["model"]["bits_per_byte"])


def open_candidate(folder: Path, root: Path) -> PreTrainedModel:
    """Open a model in fp32 after checking its architecture, tokenizer and weights against the repository.

    Raises:
        UserError: One of them differs, a weight is not finite, or the model can't be opened.
    """
    for name in (WEIGHTS, CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a trained model with its tokenizer: {name} is missing")
    if (folder / TOKENIZER).read_bytes() != (root / TOKENIZER).read_bytes():
        raise UserError(f"{folder / TOKENIZER}: differs from the tokenizer of {root}")
    given, expected = (
        {name: value for name, value in read_json(place / CONFIG).items() if name not in _NOT_ARCHITECTURE}
        for place in (folder, root)
    )
    if differing := sorted(name for name in given | expected if given.get(name) != expected.get(name)):
        raise UserError(f"{folder / CONFIG}: differs from {root / CONFIG} in {', '.join(differing)}")
    _check_weights(folder / WEIGHTS, root)
    return open_model(folder)


def _check_weights(path: Path, root: Path) -> None:
    """Check the tensors of a file, since Transformers initializes missing ones randomly."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(root, trust_remote_code=True), trust_remote_code=True
        )
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != expected:
        found, wanted = (sum(shape.numel() for shape in these.values()) for these in (shapes, expected))
        raise UserError(
            f"{path}: {found:,} weights in {len(shapes)} tensors, but the model has {wanted:,} in {len(expected)}"
        )
    if infinite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path}: {infinite[0]} has weights that are not finite")


def check_held_out(options: ReleaseOptions, data: TrainingData) -> None:
    """Check that the evaluation data were held out of the corpus.

    Raises:
        UserError: They were not.
    """
    held_out = {file["sha256"] for file in data.held_out}
    for path in (options.held_out, options.pubmedqa):
        if file_sha256(path) not in held_out:
            raise UserError(f"{path}: not held out of {options.corpus}: build the corpus with --held-out {path}")


def stage_model(model: PreTrainedModel, root: Path, folder: Path) -> None:
    """Write the repository's model files into a folder, with the weights of a model in bf16.

    config.json names fp32 as the type to load: in bf16, fine-tuning loses most of its updates, and many CPUs are slow.
    """
    model.to(torch.bfloat16).save_pretrained(folder / "saved")
    (folder / "saved" / WEIGHTS).rename(folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it readable for the owner only
    shutil.rmtree(folder / "saved")
    for path in (*root.glob("*.py"), *root.glob("*.json")):
        shutil.copy(path, folder)
    config = read_json(root / CONFIG) | {"dtype": "float32"}
    write_json(folder / CONFIG, dict(sorted(config.items())))


def stage_training(training: TrainingReport, folder: Path) -> None:
    """Write the recipe of a run and its metrics up to the step at which the model was saved, as in a run folder.

    The paths of the recipe are those of the documentation, relative to the recipe in the repository.
    """
    folder.mkdir(parents=True)
    paths = {"tokens": "../../tokens", "output": f"../../runs/{NAME.lower()}"}
    recipe = training.config | training.options | paths
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    write_metrics(folder, training.records)


def evaluate(options: ReleaseOptions, model: Path, output: Path, metrics: list[str]) -> None:
    data = {field.name: getattr(options, field.name) for field in fields(EvaluationData)}
    training = model / RESULTS / TRAINING
    evaluate_release(
        ReleaseEvaluationOptions(**data, model=str(model), output=output, training=training, only=metrics, keep=True)
    )


def stage_results(results: Path, folder: Path) -> None:
    for name in (file for metric in METRICS.values() for file in metric.files):
        shutil.copy(results / name, folder)


def check_improvement(new: dict[str, Any], present: Path) -> None:
    """Check that the bits per byte of a model are better than those of the released one.

    Raises:
        UserError: They are not better by `LEAST_IMPROVEMENT`, or were measured on other documents.
    """
    if not present.is_file():
        return
    released = read_json(present)
    bits, released_bits = (found["model"]["bits_per_byte"] for found in (new, released))
    if new["model"]["bytes"] != released["model"]["bytes"]:
        problem = f"the released model was measured on other documents, {released['data']} ({released_bits:.4f})"
    elif released_bits - bits < LEAST_IMPROVEMENT:
        problem = f"the released model has {released_bits:.4f}, which must improve by {LEAST_IMPROVEMENT}"
    else:
        return
    raise UserError(f"not released: {bits:.4f} bits per byte on {new['data']}; {problem}; use --force to release it")


def publish_all(staged: Path, root: Path, aside: Path) -> None:
    """Move the new and changed files of a folder into the repository: all of them or none.

    If one fails, those before it are restored. If the process is killed in between, some files are new and some old:
    running the same command again with --force updates them all.

    Args:
        aside: A folder for the old files, on the same file system.
    """
    names = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    changed = [name for name in names if not (root / name).is_file() or not _same(staged / name, root / name)]
    for name in changed:
        if (root / name).is_file():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, aside / name)
    begun = []
    try:
        for name in changed:
            begun.append(name)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            publish(staged / name, root / name)
    except BaseException:
        for name in begun:
            if (aside / name).is_file():
                publish(aside / name, root / name)
            else:
                (root / name).unlink(missing_ok=True)
        raise


def _same(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)
