"""The registry of metrics. Each is a function that computes the content of one JSON file, NAME.json.

A metric declares its inputs, further files that it writes, and a version. Its file records the `inputs` by fingerprint
and the `version` next to the result. A stored result is up to date if inputs and version are the same, so an evaluation
that was stopped can be resumed (`keep`). **Raise the version of a metric whenever its definition changes**: results of
an older version are then computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from healthslm.corpus.report import REPORT
from healthslm.errors import UserError
from healthslm.evaluation.subject import Subject
from healthslm.files import file_sha256, read_json
from healthslm.models import weights_sha256
from healthslm.tokenization.tokens import INFO_FILE

Compute = Callable[[Subject], dict[str, Any]]
"""Computes the result of a metric, ready for JSON."""


def _training_read(subject: Subject) -> dict[str, Any] | None:
    """What decides which training documents a model has read."""
    if subject.training is None:
        return None
    return {"tokens": subject.training.tokens} | {name: subject.training.config[name] for name in ("context", "seed")}


def weights_fingerprint(model: str) -> str:
    """The checksum of a model's weights, or if there is none, the name of the Hub model or the last two components of
    the folder's path."""
    try:
        return weights_sha256(model)
    except UserError:
        return "/".join(Path(model).parts[-2:])


INPUTS: dict[str, Callable[[Subject], Any]] = {
    "model": lambda subject: weights_fingerprint(subject.options.model),
    "corpus": lambda subject: file_sha256(subject.options.corpus / REPORT),
    "tokens": lambda subject: file_sha256(subject.options.tokens / INFO_FILE),
    "held_out": lambda subject: file_sha256(subject.options.held_out),
    "pubmedqa": lambda subject: file_sha256(subject.options.pubmedqa),
    "baselines": lambda subject: {
        name: weights_fingerprint(source) for name, source in subject.options.baselines.items()
    },
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
