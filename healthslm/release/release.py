"""Release the model of a run: check and evaluate it, and put weights, results and pages into the model repository.

    model.safetensors, config.json      the weights, in bf16 and in one file, and fp32 as the type to load them in
    results/                            what `healthslm.evaluation.measures` has measured
    results/training/                   the run's recipe and metrics
    docs/evaluation.md, docs/evaluation/    the same as tables and figures
    README.md                           the section on the released model, and the metadata that the Hub reads

A better model takes the place of a released one. All of these files change, or none of them. What has been measured is
kept in the run's folder, so that a release that was stopped, or whose pages are to change, does not measure it again.
"""

import filecmp
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from healthslm.errors import UserError
from healthslm.evaluation.figures import write_evaluation_figures
from healthslm.evaluation.measures import MEASURES, PUBMED_IDS, evaluate_release, read_results
from healthslm.evaluation.options import EvaluationData, ReleaseEvaluationOptions
from healthslm.files import file_sha256, publish, read_json, remove_partials, write_json
from healthslm.models import open_model
from healthslm.release.card import FIGURES_FOLDER, NAME, Release, write_pages
from healthslm.release.options import ReleaseOptions
from healthslm.release.training_data import TrainingData, describe_training_data
from healthslm.training.run_folder import CONFIG_FILE, TrainingReport, check_tokens, report_training, write_metrics

logger = logging.getLogger(__name__)

LEAST_IMPROVEMENT = 0.01
"""Bits per byte by which a model must be better than the released one to take its place."""

WEIGHTS, CONFIG, TOKENIZER = SAFE_WEIGHTS_NAME, "config.json", "tokenizer.json"
RESULTS = "results"
HELD_OUT = "held_out"
TRAINING = "training"
_NOT_OF_THE_NETWORK = {"dtype", "transformers_version"}


def release(options: ReleaseOptions) -> None:
    """Check, evaluate and release the model of a run.

    Raises:
        UserError: The model is not the repository's network with its tokenizer, was not trained on the corpus given, or
            is not better than the released one; or what `evaluate_release` raises. The repository is as it was.
    """
    root, folder = options.root, options.model or options.run / "best"
    model = open_candidate(folder, root)
    training = report_training(options.run, folder, options.hardware)
    check_tokens(options.run, options.tokens)
    data = describe_training_data(options.corpus, options.tokens, model.config.max_position_embeddings, root)
    check_held_out(options, data)

    remove_partials(root)
    # On the file system of the repository, where a finished file is renamed and not copied.
    with tempfile.TemporaryDirectory(prefix=".release.partial-", dir=root) as partial:
        staged, results = Path(partial) / "new", options.run / RESULTS
        stage_model(model, root, staged)
        stage_training(training, staged / RESULTS / TRAINING)
        evaluate(options, staged, results, [HELD_OUT])
        if not options.force:
            check_improvement(read_json(results / f"{HELD_OUT}.json"), root / RESULTS / f"{HELD_OUT}.json")
        evaluate(options, staged, results, [measure for measure in MEASURES if measure != HELD_OUT])
        found = read_results(results)
        stage_results(results, staged / RESULTS)

        (staged / FIGURES_FOLDER).mkdir(parents=True)
        write_evaluation_figures(staged / FIGURES_FOLDER, found, training.records, NAME)
        write_pages(Release(staged / WEIGHTS, model.num_parameters(), found, training, data), root, staged)
        publish_all(staged, root, Path(partial) / "old")
    logger.info("%s: released, %.4f bits per byte", root, found[HELD_OUT]["model"]["bits_per_byte"])


def open_candidate(folder: Path, root: Path) -> PreTrainedModel:
    """Open a model that is the repository's network, with its tokenizer and finite weights, in fp32.

    Raises:
        UserError: It is not, or cannot be opened.
    """
    for name in (WEIGHTS, CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no trained model with its tokenizer, for there is no {name} in it")
    if (folder / TOKENIZER).read_bytes() != (root / TOKENIZER).read_bytes():
        raise UserError(f"{folder / TOKENIZER}: not the tokenizer of {root}, byte for byte")
    given, expected = (
        {name: value for name, value in read_json(place / CONFIG).items() if name not in _NOT_OF_THE_NETWORK}
        for place in (folder, root)
    )
    if differing := sorted(name for name in given | expected if given.get(name) != expected.get(name)):
        raise UserError(f"{folder / CONFIG}: not the network of {root / CONFIG}: other {', '.join(differing)}")
    _check_weights(folder / WEIGHTS, root)
    return open_model(folder)


def _check_weights(path: Path, root: Path) -> None:
    """Hold a file's tensors against those of the repository's network, since Transformers makes up a missing one."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(root, trust_remote_code=True), trust_remote_code=True
        )
    expected = {name: parameter.shape for name, parameter in network.named_parameters()}
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != expected:
        found, wanted = (sum(shape.numel() for shape in these.values()) for these in (shapes, expected))
        raise UserError(
            f"{path}: {found:,} weights in {len(shapes)} tensors, not the network's {wanted:,} in {len(expected)}"
        )
    if infinite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path}: weights that are not finite in {infinite[0]}")


def check_held_out(options: ReleaseOptions, data: TrainingData) -> None:
    """Hold what is measured on against what was held out of the corpus.

    Raises:
        UserError: A file was not held out.
    """
    held_out = {file["sha256"] for file in data.held_out}
    for path in (options.held_out, options.pubmedqa):
        if file_sha256(path) not in held_out:
            raise UserError(f"{path}: not held out of {options.corpus}, by its checksum: build that with --held-out")


def stage_model(model: PreTrainedModel, root: Path, folder: Path) -> None:
    """Write the repository's model files into a folder, with these weights in bf16: what a user will open.

    config.json has them load as fp32: in bf16 fine-tuning loses most of its updates, and many CPUs compute slowly.
    """
    model.to(torch.bfloat16).save_pretrained(folder / "saved")
    (folder / "saved" / WEIGHTS).rename(folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it
    shutil.rmtree(folder / "saved")
    for path in (*root.glob("*.py"), *root.glob("*.json")):
        shutil.copy(path, folder)
    config = read_json(root / CONFIG) | {"dtype": "float32"}
    write_json(folder / CONFIG, dict(sorted(config.items())))


def stage_training(training: TrainingReport, folder: Path) -> None:
    """Write the recipe and the metrics of a run, up to the update of the weights, as its own folder has them."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(training.options, sort_keys=False), encoding="utf-8")
    write_metrics(folder, training.records)


def evaluate(options: ReleaseOptions, model: Path, output: Path, measures: list[str]) -> None:
    data = {name: getattr(options, name) for name in EvaluationData.__dataclass_fields__}
    training = model / RESULTS / TRAINING
    evaluate_release(
        ReleaseEvaluationOptions(**data, model=str(model), output=output, training=training, only=measures, keep=True)
    )


def stage_results(results: Path, folder: Path) -> None:
    for name in (*(f"{measure}.json" for measure in MEASURES), PUBMED_IDS):
        shutil.copy(results / name, folder)


def check_improvement(new: dict[str, Any], present: Path) -> None:
    """Hold the bits per byte of a model against those of the released one.

    Raises:
        UserError: It is not better by `LEAST_IMPROVEMENT`, or was measured on other documents.
    """
    if not present.is_file():
        return
    released = read_json(present)
    bits, released_bits = (found["model"]["bits_per_byte"] for found in (new, released))
    if new["model"]["bytes"] != released["model"]["bytes"]:
        problem = f"the released model has {released_bits:.4f} on other documents, {released['data']}"
    elif released_bits - bits < LEAST_IMPROVEMENT:
        problem = f"the released model has {released_bits:.4f}, and {LEAST_IMPROVEMENT} less is asked for"
    else:
        return
    raise UserError(f"not released: {bits:.4f} bits per byte on {new['data']}; {problem}; --force releases it anyway")


def publish_all(staged: Path, root: Path, aside: Path) -> None:
    """Put the files of a folder that the root has not, or has with other bytes, in their places there: all of them.

    Where one fails, those before it become again what they were. A process that is killed in between leaves some files
    new and some old; the same command, with --force, makes them all new.

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
