"""Options of the stages of the corpus. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from healthslm.options import CheckedOptions, ExecutorOptions, NonNegativeInt, OptionError, Range, UnitInterval

MAX_CONNECTIONS = 4

HUB_PREFIX = "hub:"

# Names under which other text may hold a document's id, title and text.
ID_COLUMNS = ("id", "pmid", "PMID")
TITLE_COLUMNS = ("title", "QUESTION")  # capitals: PubMedQA
TEXT_COLUMNS = ("text", "abstract", "CONTEXTS")


@dataclass
class DownloadOptions(CheckedOptions):
    """Options of `download_pubmed`."""

    output: Path
    """Folder to download to; gets NCBI's folders baseline/ and updatefiles/."""
    files: list[str]
    """Files to download: `all`, `latest N`, or numbers such as `1-20` or `1-20 1334`."""
    base_url: str = "https://ftp.ncbi.nlm.nih.gov/pubmed/"
    """Address of the folder with baseline/ and updatefiles/ (https or http): NCBI's, or that of a mirror."""
    connections: Annotated[int, Range(at_least=1, at_most=MAX_CONNECTIONS)] = 2
    """Files to download in parallel, at most 4: NCBI asks for few connections."""


@dataclass
class CorpusOptions(ExecutorOptions):
    """Options of `build_corpus`."""

    output: Path = field(kw_only=True)
    """Folder to write the corpus to; records/ and signatures/ are written next to it."""
    pubmed: Path | None = None
    """Folder of PubMed XML files (.xml, .xml.gz), or of NCBI's folders baseline/ and updatefiles/."""
    sources: list[str] = field(default_factory=list)
    """Other text: .parquet, .jsonl and .txt files, folders or patterns of them, or a Hub dataset: hub:NAME,
    hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT."""
    id_columns: list[str] = field(default_factory=lambda: list(ID_COLUMNS))
    """Names of the id column in other text; the first that a row has is read."""
    title_columns: list[str] = field(default_factory=lambda: list(TITLE_COLUMNS))
    """Names of the title column in other text; the first that a row has is read."""
    text_columns: list[str] = field(default_factory=lambda: list(TEXT_COLUMNS))
    """Names of the text column in other text; the first that a row has is read. In all three, `a.b` is the field `b` of
    column `a`, and `a+b` reads both columns."""
    held_out: list[Path] = field(default_factory=list)
    """Evaluation files (.parquet, .jsonl). Documents that share an id, a near-duplicate text or 13 words in a row with
    them are dropped."""
    validation_fraction: UnitInterval = 0.005
    """Share of the documents in the validation split, which pretraining needs; 0 for none."""
    test_fraction: UnitInterval = 0.005
    """Share of the documents in the test split."""
    min_words: NonNegativeInt = 20
    """Drop documents with fewer words of text."""
    any_language: bool = False
    """Also keep documents that are not in English."""
    max_bytes: Annotated[int, Range(at_least=256)] = 4096
    """Split longer texts into chunks of at most this many bytes; 4,096 are about 1,024 tokens."""
    write_dropped: bool = False
    """Write the dropped documents, with the reason, to dropped/ in the corpus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_fraction + self.test_fraction >= 1:
            problem = f"{self.validation_fraction} and test_fraction {self.test_fraction} leave no training documents"
            raise OptionError("validation_fraction", problem)
        for path in self.held_out:
            if str(path).startswith(HUB_PREFIX):  # without a checksum, by which to reuse signatures
                raise OptionError("held_out", f"{path}: not a file; save the dataset as Parquet or JSON Lines first")
