"""Options of the release. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path

from healthslm.evaluation.options import EvaluationData
from healthslm.repository import model_repository


@dataclass(kw_only=True)
class ReleaseOptions(EvaluationData):
    """Options of `release`."""

    run: Path = field(metadata={"positional": "RUN"})
    """Folder of the training run."""
    model: Path | None = None
    """Folder of the model to release. By default best/ of the run."""
    hardware: str | None = None
    """Hardware that the model was trained on, if the run's metrics don't record it."""
    root: Path = field(default_factory=model_repository)
    """Model repository to update."""
    force: bool = False
    """Release the model even if it is not better than the released one."""
