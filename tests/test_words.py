"""Documents and `--help` use the project's words: one word for one thing, and none that readers stumble over."""

import re
import subprocess
import sys

import pytest
from paths import REPOSITORY

from healthslm.cli import COMMANDS

DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/**/*.md"),
    *REPOSITORY.glob("healthslm/**/*.jinja"),
    *REPOSITORY.glob("configs/**/*.yaml"),
]

# What to write instead, and why.
WORDS = {
    r"\bbeside\b": "compared with, next to, baseline: 'beside' is not used for comparisons",
    r"\b(go|goes|going|gone|went) on (with|by|from)\b": "resume, continue: the words of training frameworks",
    r"\btells? (of|beforehand)\b": "describe, estimate: documents don't tell",
    r"\b(stands?|stood|lies?|lay) in\b": "is in: files and words don't stand or lie",
    r"\bto be had\b": "available",
    r"\bof one mind\b": "agree",
    r"\bgoes without saying\b": "leave it out",
    r"\bin the place of\b": "instead of",
    r"\bso (many|much|few) (tokens|documents|steps|bytes|of)\b": "this number of",
    r"\b(an|each|every|per|of an|the) update\b(?! file)": "step: one optimizer step has one name",
    r"\b(packed |training )rows?\b|\brows? of (one context|1,024)\b": "sequence: a row is a line of a table",
    r"\bpassages?\b(?! of its training text)": "chunk: a piece of a long document",
    r"\bstamps?\b": "fingerprint: a checksum of inputs and options",
    r"\b(take|takes|taken|every|each|other) measures?\b": "metric, evaluation",
    r"\b(tokenis|memoris|normalis|optimis|summaris|initialis)\w*": "z, as in tokenize: the spelling of Transformers",
    r"\bdata sets?\b|\bHub ids?\b": "dataset, Hub name: one spelling, as in Transformers",
    r"\bneighbour|\blicences?\b|\bbehaviour|\blabelled\b": "American spelling, as in Transformers: neighbor, license",
}


def problems(text: str) -> list[str]:
    text = re.sub(r"```.*?```|~~~~~~.*?~~~~~~|`[^`\n]*`", "", text, flags=re.DOTALL)  # code, samples and names
    return [
        f"line {text[: found.start()].count(chr(10)) + 1}: {found[0]!r}: {instead}"
        for pattern, instead in WORDS.items()
        for found in re.finditer(pattern, text, flags=re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_documents_use_the_words_of_the_project(path):
    assert problems(path.read_text(encoding="utf-8")) == []


def test_help_texts_use_the_words_of_the_project():
    """All commands in one process, because each imports the same."""
    program = (
        "import sys\nfrom contextlib import suppress\nfrom healthslm.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n    sys.argv = ['healthslm', name, '--help']\n"
        "    with suppress(SystemExit):\n        main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.count("usage: healthslm") == len(COMMANDS)
    assert problems(done.stdout) == []


def test_a_word_that_is_not_used_is_found():
    assert problems("The model beside it\ntakes 2,048 tokens an update.") == [
        "line 1: 'beside': compared with, next to, baseline: 'beside' is not used for comparisons",
        "line 2: 'an update': step: one optimizer step has one name",
    ]
