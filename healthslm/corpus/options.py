"""Options of the corpus's stages, which import nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from healthslm.options import CheckedOptions, ExecutorOptions, NonNegativeInt, OptionError, Range, UnitInterval

MAX_CONNECTIONS = 4
BINS_PER_CONTEXT = 32  # of the histogram of documents by tokens

# Names under which other text may hold a document's id, title and text.
ID_COLUMNS = ("id", "pmid", "PMID")
TITLE_COLUMNS = ("title", "QUESTION")  # PubMedQA's files have the names in capitals
TEXT_COLUMNS = ("text", "abstract", "CONTEXTS")


@dataclass
class DownloadOptions(CheckedOptions):
    """Options of `download_pubmed`."""

    output: Path
    """Folder to download to; gets NCBI's folders baseline/ and updatefiles/."""
    files: list[str]
    """Which: `all`, `latest N`, or numbers such as `1-20` or `1-20 1334`, which go on from baseline to update files."""
    base_url: str = "https://ftp.ncbi.nlm.nih.gov/pubmed/"
    """Address (https, http) that has baseline/ and updatefiles/ below it: NCBI's, or that of a mirror."""
    connections: Annotated[int, Range(at_least=1, at_most=MAX_CONNECTIONS)] = 2
    """Files to download at once, at most 4: NCBI asks for few connections."""


@dataclass
class CorpusOptions(ExecutorOptions):
    """Options of `build_corpus`."""

    output: Path = field(kw_only=True)
    """Folder to write the corpus to; records/ and signatures/ are written beside it."""
    pubmed: Path | None = None
    """Folder with PubMed's XML files (.xml, .xml.gz), or with NCBI's folders baseline/ and updatefiles/ of them."""
    sources: list[str] = field(default_factory=list)
    """Other text: files, folders or patterns of .parquet, .jsonl and .txt, or hub:NAME for a data set of the Hub."""
    id_columns: list[str] = field(default_factory=lambda: list(ID_COLUMNS))
    """Columns of other text that may hold a document's id: the first that a row has."""
    title_columns: list[str] = field(default_factory=lambda: list(TITLE_COLUMNS))
    """Columns that may hold its title."""
    text_columns: list[str] = field(default_factory=lambda: list(TEXT_COLUMNS))
    """Columns that may hold its text."""
    held_out: list[Path] = field(default_factory=list)
    """Files (.parquet, .jsonl) whose documents stay out of the corpus: by id, text, near-duplicate or 13-gram."""
    validation_fraction: UnitInterval = 0.005
    """Share of the documents that becomes the validation split, which pretraining needs; 0 for none."""
    test_fraction: UnitInterval = 0.005
    """Share of the documents that becomes the test split."""
    min_words: NonNegativeInt = 20
    """Documents with a text of fewer words are dropped."""
    any_language: bool = False
    """Keep documents whose text is not English, too."""
    max_bytes: Annotated[int, Range(at_least=256)] = 4096
    """Longer texts are cut at paragraphs into parts of at most so many bytes: about a context of 1,024 tokens."""
    write_removed: bool = False
    """Write what was dropped, with the reason, to removed/ in the corpus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_fraction + self.test_fraction >= 1:
            problem = f"{self.validation_fraction} and test_fraction {self.test_fraction} leave nothing to train on"
            raise OptionError("validation_fraction", problem)


@dataclass
class DataCardOptions(CheckedOptions):
    """Options of `describe_corpus`."""

    corpus: Path
    """Corpus folder, as scripts/build_corpus.py writes it."""
    output: Path
    """Folder to write the card to: README.md and its figures."""
    tokens: Path | None = None
    """The corpus in tokens, as scripts/tokenize_corpus.py writes it; without it, the card tells nothing of tokens."""
    context: Annotated[int, Range(at_least=BINS_PER_CONTEXT)] = 1024
    """Tokens of a context, to be marked in the figure of tokens."""
    title: str = "HealthSLM corpus"
    """The card's heading."""
    names: dict[str, str] = field(default_factory=dict)
    """Names to show instead of those of input and held-out files: {pubmed26n0001: pubmed20n0014.xml.gz}."""
