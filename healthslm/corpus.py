"""Building the corpus: PubMed's XML and other text become training, validation and test documents in Parquet.

    pubmed/ -> records/ -> corpus/{train,validation,test}/

A step is a datatrove pipeline with one task for each input file, or a query over the files of the step before:

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from healthslm.candidates import (
    CandidateReader,
    Fingerprint,
    Input,
    InputReader,
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
from healthslm.report import corpus_report, summary
from healthslm.sources import find_sources, read_source_documents

logger = logging.getLogger(__name__)

_PUBMED_NAME = re.compile(r"pubmed(\d\d)n\d+")


@dataclass
class CorpusOptions:
    """Options of `build_corpus`."""

    output: Path
    """Folder to write the corpus to."""
    pubmed: Path | None = None
    """Folder of PubMed's XML files, .xml or .xml.gz: NCBI's baseline/ and updatefiles/ in it, or else the files in it."""
    records: Path | None = None
    """Folder to write PubMed's records to; left out: records/ beside the corpus."""
    sources: list[str] = field(default_factory=list)
    """Other text: files, folders or patterns of .parquet, .jsonl and .txt, or hub:NAME for a data set of the Hub."""
    held_out: list[str] = field(default_factory=list)
    """Files (as for sources) whose documents, known by their id or text, stay out of the corpus."""
    validation_fraction: float = 0.005
    """Share of the documents that becomes the validation split."""
    test_fraction: float = 0.005
    """Share of the documents that becomes the test split."""
    min_words: int = 20
    """Documents of fewer words are dropped."""
    workers: int = 0
    """Processes at once; 0: one for each core."""


def build_corpus(options: CorpusOptions) -> None:
    """Build the records and the corpus, with a report of what was read, kept and dropped in its report.json.

    Raises:
        UserError: an input is missing, damaged or of no known format, or no document is left to train on.
    """
    if min(options.validation_fraction, options.test_fraction) < 0:
        raise UserError("validation_fraction and test_fraction must not be negative")
    if options.validation_fraction + options.test_fraction >= 1:
        raise UserError("validation_fraction and test_fraction leave nothing to train on: their sum must be below 1")
    pubmed_files = find_pubmed_files(options.pubmed) if options.pubmed else []
    names = [file_name(path) for path in pubmed_files]
    sources = find_sources(options.sources, taken=names)
    held_out_sources = find_sources(options.held_out)
    if not pubmed_files and not sources:
        raise UserError("nothing to read: give --pubmed FOLDER, --sources FILES, or both")

    with replacing(options.output) as corpus:
        work, logs = corpus / "work", corpus / "logs"
        for folder in (work, logs, *(corpus / split for split in SPLITS)):
            folder.mkdir(parents=True)
        write_held_out(held_out_sources, work / "held_out.parquet")

        inputs = [Input(source.name, source.location, partial(read_source_documents, source)) for source in sources]
        outdated = work / "outdated.parquet"
        if pubmed_files:
            records = options.records or options.output.parent / "records"
            parse(pubmed_files, records, options.workers, logs / "parse")
            list_outdated(records, outdated)
            inputs = [
                Input(name, str(path), partial(read_record_documents, records / f"{name}.parquet"))
                for name, path in zip(names, pubmed_files, strict=True)
            ] + inputs
        candidates, duplicates = work / "candidates", work / "duplicates.parquet"
        collect(inputs, outdated, candidates, options, logs / "collect")
        list_duplicates(candidates, work / "held_out.parquet", duplicates)
        write(inputs, candidates, duplicates, corpus, options, logs / "write")

        report = corpus_report(inputs, held_out_sources, _settings(options), corpus)
        if report["splits"]["train"]["documents"] == 0:
            raise UserError(f"no document is left to train on; dropped: {report['dropped']}")
        write_json(corpus / "report.json", report)
        shutil.rmtree(work)
    logger.info("%s", summary(report))


def _settings(options: CorpusOptions) -> dict[str, Any]:
    """The options that decide what the corpus holds."""
    return {name: getattr(options, name) for name in ("validation_fraction", "test_fraction", "min_words")}


def find_pubmed_files(folder: Path) -> list[Path]:
    """The XML files below a folder, in the order in which their records apply: that of their names.

    Raises:
        UserError: there are none, two have one name, or they are of two years: each year replaces all files before it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = [path for path in (folder / "baseline", folder / "updatefiles") if path.is_dir()] or [folder]
    files = [path for inner in folders for path in inner.iterdir() if path.name.endswith((".xml", ".xml.gz"))]
    if not files:
        raise UserError(f"{folder}: no PubMed files (.xml or .xml.gz) in it")
    files.sort(key=lambda path: path.name)
    for first, second in zip(files, files[1:], strict=False):
        if file_name(first) == file_name(second):
            raise UserError(f"{second}: has the name of {first}: remove one of them")
        years = [match[1] for path in (first, second) if (match := _PUBMED_NAME.match(path.name))]
        if len(set(years)) > 1:
            raise UserError(f"{second}: of another year than {first}: never mix two years of PubMed's files")
    return files


def parse(files: list[Path], records: Path, workers: int, logs: Path) -> None:
    """Turn PubMed's XML files into Parquet files of records, of the same names."""
    with replacing(records) as new:
        run_tasks("parse", [PubmedReader(files), record_writer(new)], len(files), workers, logs)


def collect(inputs: list[Input], outdated: Path, candidates: Path, options: CorpusOptions, logs: Path) -> None:
    """Turn all inputs into candidates: the documents that are current and whole."""
    blocks = [
        InputReader(inputs),
        *([ListedFilter(outdated)] if outdated.exists() else []),
        DropFilter(partial(unusable, min_words=options.min_words)),
        Fingerprint(),
        candidate_writer(candidates),
    ]
    run_tasks("collect", blocks, len(inputs), options.workers, logs)


def write(
    inputs: list[Input], candidates: Path, duplicates: Path, corpus: Path, options: CorpusOptions, logs: Path
) -> None:
    """Write the candidates that stay to the splits of the corpus."""
    blocks = [
        CandidateReader([candidates / f"{input.name}.parquet" for input in inputs]),
        ListedFilter(duplicates),
        DropFilter(retraction),
        Split(options.validation_fraction, options.test_fraction),
        corpus_writer(corpus),
    ]
    run_tasks("write", blocks, len(inputs), options.workers, logs)
