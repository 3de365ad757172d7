"""Building the corpus: PubMed's XML and other text become training, validation and test documents in Parquet.

    pubmed/ -> records/ -> corpus/{train,validation,test}/

A step is a datatrove pipeline with one task for each file, or a query over the files of the step before:

    parse            PubMed's XML, file by file, to records
    list_outdated    the records that a later record or a deletion replaces
    collect          records and other text, file by file, to candidates: current, with a whole abstract or text
    list_duplicates  the candidates that are held out, or copies of one in front of them
    write            candidates, file by file, to the splits: not listed, not retracted

Copies leave before retracted articles do, so that a retracted article leaves with its copies in other sources.
A folder appears under its name when it is complete: a run that fails leaves what was there before.
"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from healthslm.candidates import (
    CandidateReader,
    Fingerprint,
    SourceReader,
    Split,
    candidate_writer,
    corpus_writer,
    list_duplicates,
    retraction,
    unusable,
    write_held_out,
)
from healthslm.documents import SPLITS
from healthslm.errors import UserError
from healthslm.files import replacing, write_json
from healthslm.pipeline import DropFilter, ListedFilter, run_tasks
from healthslm.records import PubmedReader, file_name, list_outdated, read_record_documents, record_writer
from healthslm.report import REPORT, corpus_report, summary
from healthslm.sources import Source, find_sources

logger = logging.getLogger(__name__)

_YEAR_OF_FILE = re.compile(r"pubmed(\d\d)n\d+\.xml")


@dataclass
class CorpusOptions:
    """Options of `build_corpus`."""

    output: Path
    """Folder to write the corpus to."""
    pubmed: Path | None = None
    """Folder with PubMed's XML files (.xml, .xml.gz), or with NCBI's folders baseline/ and updatefiles/ of them."""
    records: Path | None = None
    """Folder to write PubMed's records to; when left out, records/ beside the corpus."""
    sources: list[str] = field(default_factory=list)
    """Other text: files, folders or patterns of .parquet, .jsonl and .txt, or hub:NAME for a data set of the Hub."""
    held_out: list[Path] = field(default_factory=list)
    """Files (.parquet, .jsonl) whose documents, known by their id or text, stay out of the corpus."""
    validation_fraction: float = 0.005
    """Share of the documents that becomes the validation split."""
    test_fraction: float = 0.005
    """Share of the documents that becomes the test split."""
    min_words: int = 20
    """Documents with a text of fewer words are dropped."""
    workers: int = 0
    """Processes at once; 0: one for each core."""


def build_corpus(options: CorpusOptions) -> None:
    """Build the records and the corpus, with a report of what was read, kept and dropped in its report.json.

    Raises:
        UserError: an input is missing, damaged or of no known format, or no document is left to train on.
    """
    _check(options)
    pubmed_files = find_pubmed_files(options.pubmed) if options.pubmed else []
    names = [file_name(path) for path in pubmed_files]
    sources = find_sources(options.sources, taken=names)
    # A number as id is a PMID here, whatever the kind of text: to hold out too much does no harm.
    held_out = find_sources([str(path) for path in options.held_out], default_kind="abstract")
    if not pubmed_files and not sources:
        raise UserError("nothing to read: give --pubmed FOLDER, --sources FILES, or both")

    with replacing(options.output) as corpus:
        work = corpus / "work"
        for folder in (work, *(corpus / split for split in SPLITS)):
            folder.mkdir(parents=True)
        write_held_out(held_out, work / "held_out.parquet")
        if pubmed_files:
            records = _records_folder(options)
            parse(pubmed_files, records, options.workers, work)
            list_outdated(records, work / "outdated.parquet")
            sources = [
                Source(name, str(path), partial(read_record_documents, records / f"{name}.parquet"))
                for name, path in zip(names, pubmed_files, strict=True)
            ] + sources
        collect(sources, work, options)
        if not any((work / "candidates").glob("*.parquet")):
            raise UserError(
                f"no usable document: all are deleted, without text, truncated or below {options.min_words} words"
            )
        list_duplicates(work / "candidates", work / "held_out.parquet", work / "duplicates.parquet")
        write(sources, work, corpus, options)

        report = corpus_report(sources, held_out, _settings(options), work / "logs", corpus)
        if report["splits"]["train"]["documents"] == 0:
            raise UserError(f"no document is left to train on: of {report['read']:,} read, dropped {report['dropped']}")
        write_json(corpus / REPORT, report)
        shutil.rmtree(work)
    logger.info("%s", summary(report))


def _check(options: CorpusOptions) -> None:
    """Refuse options that cannot work, or that would replace a folder which no earlier run has written."""
    if min(options.validation_fraction, options.test_fraction) < 0:
        raise UserError("validation_fraction and test_fraction must not be negative")
    if options.validation_fraction + options.test_fraction >= 1:
        raise UserError("validation_fraction and test_fraction must leave something to train on: a sum below 1")
    _refuse_to_replace(options.output, _is_corpus)
    if options.pubmed:
        records, output = _records_folder(options), options.output
        _refuse_to_replace(records, _is_records)
        if records.resolve().is_relative_to(output.resolve()) or output.resolve().is_relative_to(records.resolve()):
            raise UserError(f"{records}: lies in the folder {output}, or that in it: each needs a folder of its own")


def _records_folder(options: CorpusOptions) -> Path:
    return options.records or options.output.parent / "records"


def _refuse_to_replace(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    if folder.exists() and not is_ours(folder):
        raise UserError(f"{folder}: holds other things than the output of an earlier run, and would be replaced")


def _is_corpus(folder: Path) -> bool:
    return folder.is_dir() and ((folder / REPORT).exists() or not any(folder.iterdir()))


def _is_records(folder: Path) -> bool:
    return folder.is_dir() and all(path.suffix == ".parquet" for path in folder.iterdir())


def _settings(options: CorpusOptions) -> dict[str, Any]:
    """The options that decide what the corpus holds."""
    return {name: getattr(options, name) for name in ("validation_fraction", "test_fraction", "min_words")}


def find_pubmed_files(folder: Path) -> list[Path]:
    """The XML files of a folder, in the order in which their records apply: that of their names.

    Raises:
        UserError: there are none, two have one name, or they are of two years: each year replaces all files before it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = [path for path in (folder / "baseline", folder / "updatefiles") if path.is_dir()] or [folder]
    files = [path for inner in folders for path in inner.iterdir() if path.name.endswith((".xml", ".xml.gz"))]
    if not files:
        raise UserError(f"{folder}: no PubMed files (.xml, .xml.gz) in it")
    files.sort(key=lambda path: path.name)
    by_name: dict[str, Path] = {}
    by_year: dict[str, Path] = {}
    for path in files:
        other = by_name.setdefault(file_name(path), path)
        if other is not path:
            raise UserError(f"{path}: has the name of {other}: remove one of them")
        if match := _YEAR_OF_FILE.match(path.name):
            by_year.setdefault(match[1], path)
    if len(by_year) > 1:
        first, second, *_ = by_year.values()
        raise UserError(f"{second}: of another year than {first}: PubMed's files of one year replace all earlier ones")
    return files


def parse(files: list[Path], records: Path, workers: int, work: Path) -> None:
    """Turn PubMed's XML files into Parquet files of records, of the same names."""
    with replacing(records) as new:
        blocks = [PubmedReader(files), record_writer(new)]
        run_tasks("parse", blocks, len(files), workers, work / "logs")


def collect(sources: list[Source], work: Path, options: CorpusOptions) -> None:
    """Turn all sources into candidates: the documents that are current and whole."""
    outdated = work / "outdated.parquet"
    blocks = [
        SourceReader(sources),
        *([ListedFilter(outdated)] if outdated.exists() else []),
        DropFilter(partial(unusable, min_words=options.min_words)),
        Fingerprint(),
        candidate_writer(work / "candidates"),
    ]
    run_tasks("collect", blocks, len(sources), options.workers, work / "logs")


def write(sources: list[Source], work: Path, corpus: Path, options: CorpusOptions) -> None:
    """Write the candidates that stay to the splits of the corpus."""
    blocks = [
        CandidateReader([work / "candidates" / f"{source.name}.parquet" for source in sources]),
        ListedFilter(work / "duplicates.parquet"),
        DropFilter(retraction),
        Split(options.validation_fraction, options.test_fraction),
        corpus_writer(corpus),
    ]
    run_tasks("write", blocks, len(sources), options.workers, work / "logs")
