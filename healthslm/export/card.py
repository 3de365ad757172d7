"""The model card of an export: what it is, how to open it, and how it compares with the original model."""

from pathlib import Path
from typing import Any

import yaml

from healthslm import markdown
from healthslm.export.source import CARD_FILE, Source

_LIBRARIES = {"llama": "transformers", "gguf": "gguf", "onnx": "transformers.js"}


def write_card(folder: Path, source: Source, report: dict[str, Any]) -> None:
    """Write `README.md` into the folder of an export.

    Args:
        report: What `healthslm.export.export` writes to report.json.
    """
    form = report["format"]
    metadata: dict[str, Any] = {
        "base_model": source.base,
        "base_model_relation": "quantized",  # the Hub's word for the same weights in another form
        "library_name": _LIBRARIES[form],
        "pipeline_tag": "text-generation",
        "language": "en",
        "tags": ["biology", "medical", form],
    }
    if source.license:
        metadata["license"] = source.license
    context = {"source": source, "metadata": yaml.safe_dump(metadata, sort_keys=False).strip(), **report}
    (folder / CARD_FILE).write_text(markdown.render("healthslm.export", "card.md.jinja", context), encoding="utf-8")
