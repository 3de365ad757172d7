"""Where the repository's files are."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
"""The root of the repository, which is also a model folder."""
SAMPLE = REPOSITORY / "sample" / "pubmed"
"""PubMed files of invented citations."""
