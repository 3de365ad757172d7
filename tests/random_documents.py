"""Documents of random English words, in the format of other text for a corpus."""

import random
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from typing import Any

from paths import SAMPLE


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
