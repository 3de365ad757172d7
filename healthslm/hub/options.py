"""Options of publishing on the Hub. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path

from healthslm.repository import model_repository


@dataclass(kw_only=True)
class PushOptions:
    """Options of `push_to_hub`."""

    repository: str = field(metadata={"positional": "OWNER/NAME"})
    """Name of the model repository on the Hub: OWNER/NAME."""
    siblings: dict[str, Path] = field(default_factory=dict)
    """Folders that `export` or `finetune` wrote from this model: {llama: exports/llama} becomes OWNER/NAME-llama."""
    demo: Path | None = None
    """Folder of this model's ONNX export: the page in demo/ becomes, with it, the static Space OWNER/NAME-demo."""
    tag: str | None = None
    """Tag of the published revisions, such as v1.0.0. A tag is never moved."""
    collection: str = "HealthSLM"
    """Title of the Collection that holds the repositories."""
    public: bool = False
    """Make new repositories public. By default they are private."""
    replace: bool = False
    """Replace the files of repositories that exist already."""
    dry_run: bool = False
    """Print each repository's files with their sizes and SHA-256, and send nothing."""
    root: Path = field(default_factory=model_repository)
    """Model repository to publish: a git clone without uncommitted changes."""
