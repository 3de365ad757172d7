"""Compute the metrics of a released model, and read their results."""

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import healthslm
from healthslm.errors import UserError
from healthslm.evaluation.metrics import METRICS
from healthslm.evaluation.options import ReleaseEvaluationOptions
from healthslm.evaluation.subject import Subject
from healthslm.files import read_json, write_json
from healthslm.models import find_device

logger = logging.getLogger(__name__)

SOFTWARE = ("torch", "transformers", "lm_eval")
_RECORD = ("version", "inputs", "software")


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
