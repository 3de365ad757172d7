"""Options of the release, which import nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path

from healthslm.evaluation.options import EvaluationData
from healthslm.repository import model_repository


@dataclass(kw_only=True)
class ReleaseOptions(EvaluationData):
    """Options of `release`."""

    run: Path = field(metadata={"positional": True})
    """Folder of the run."""
    model: Path | None = None
    """Folder of the model to release; by default the run's best/."""
    hardware: str | None = None
    """What the model was trained on, where the run's metrics do not tell."""
    root: Path = field(default_factory=model_repository)
    """Model repository to release into."""
    force: bool = False
    """Release a model that is no better than the released one."""
