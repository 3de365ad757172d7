"""Files of PubMed with a few citations, and what is read from them before an error."""

from pathlib import Path

import pytest

from healthslm.corpus.pubmed import read_records
from healthslm.errors import UserError


def citation(title: str = "", pmid: str = "7", after: str = "") -> str:
    return (
        f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><ArticleTitle>{title}</ArticleTitle></Article>"
        f"{after}</MedlineCitation></PubmedArticle>"
    )


def file_of(*citations: str, head: str = "") -> str:
    return f"{head}<PubmedArticleSet>{''.join(citations)}</PubmedArticleSet>"


def titles_until_error(path: Path) -> tuple[list[str], str]:
    """The titles of the records before an error, and the error message."""
    titles = []
    with pytest.raises(UserError) as caught:
        titles.extend(record["title"] for record in read_records(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return titles, str(caught.value).removeprefix(f"{path}: ")
