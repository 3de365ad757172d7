"""Documents of random English words, in the format of other text for a corpus."""

import random
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pipeline_folders import SAMPLE


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@cache
def english_words() -> list[str]:
    document = ElementTree.parse(SAMPLE / "pubmedsample26n0001.xml")
    texts = (" ".join(section.itertext()) for section in document.iter("AbstractText"))
    return sorted({word for text in texts for word in re.findall(r"\b[a-z]{2,}\b", text)})


def random_text(seed: object) -> str:
    """Random English words, different for every seed."""
    return f"{' '.join(random.Random(str(seed)).choices(english_words(), k=150)).capitalize()}."


def random_rows(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}:{number}", "kind": "text", "title": f"Text {number}", "text": random_text((name, number))}
        for number in range(count)
    ]
