"""The model that is exported, as its other forms name it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from healthslm.models import weights_sha256

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Source:
    """Name, license and checksum of a model."""

    base: str
    """Its name on the Hub, or its folder."""
    name: str
    """The last part of it, without the owner."""
    license: str | None
    """As its model card states it; None if there is no card."""
    sha256: str
    """Checksum of its weights."""


def find_source(model: str, base: str | None) -> Source:
    """Describe the model of a folder or Hub name, with the name `base` if one is given."""
    card = Path(model) / CARD_FILE
    return Source(
        base=base or model,
        name=Path(base or model).resolve().name,
        license=ModelCard.load(card).data.license if card.is_file() else None,
        sha256=weights_sha256(model),
    )
