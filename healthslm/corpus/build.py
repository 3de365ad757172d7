"""Building the corpus: PubMed's XML and other text become training, validation and test documents in Parquet.

    pubmed/ -> records/ -> signatures/ -> corpus/{train,validation,test}/

Three steps take each input file by itself, on as many cores or machines as there are, and two all of them together:

    parse    PubMed's XML, file by file, to records
    screen   records and other text, file by file, to signatures: whether a document is of use, and keys of its content
    select   all signatures to a list of what leaves: outdated, of no use, held out, copies, retracted
    write    records and other text, file by file, to the splits, less what is listed
    finish   the report, and the corpus under its name

Records and signatures stay, and are used again as long as their file is the same: a day's update file joins without
the rest being parsed again. The corpus appears when it is complete: a run that fails leaves what was there before, and
the same command goes on where it stopped.
"""

import importlib.metadata
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from healthslm import documents
from healthslm.corpus import (
    language,
    markup,
    passages,
    pubmed,
    records,
    screening,
    scrubbing,
    selection,
    signatures,
    splits,
)
from healthslm.corpus import sources as source_files
from healthslm.corpus.options import CorpusOptions
from healthslm.corpus.pubmed_files import file_name, find_pubmed_files
from healthslm.corpus.reader import split_files
from healthslm.corpus.records import PubmedReader, read_record_documents, record_writer
from healthslm.corpus.report import REPORT, corpus_report, summary
from healthslm.corpus.screening import Criteria, Screen, SourceReader, signature_writer, write_held_out
from healthslm.corpus.selection import list_dropped
from healthslm.corpus.sources import Columns, Source, find_sources
from healthslm.corpus.splits import REMOVED, DroppedFilter, Passages, corpus_writer
from healthslm.documents import SPLITS, split_place
from healthslm.errors import UserError
from healthslm.files import naming_full_disk, read_json, remove_partials, write_json
from healthslm.options import OptionError
from healthslm.pipeline import Call, Step, Workplace, run_steps
from healthslm.tables import has_stamp, make_stamp

logger = logging.getLogger(__name__)

_PARSING = (pubmed, markup, records)
_SCREENING = (screening, documents, records, source_files, scrubbing, language, signatures)
_WRITING = (selection, splits, documents, records, scrubbing, passages)
_LIBRARIES = [importlib.metadata.version(library) for library in ("lxml", "py3langid", "rensa")]  # that texts pass


def build_corpus(options: CorpusOptions) -> None:
    """Build the records and the corpus, with a report of what was read, kept and dropped in its report.json.

    Raises:
        UserError: an input is missing, damaged or of no known format, or no document is left to train on or, unless
            validation_fraction is 0, to validate on.
    """
    _check_output(options.output)
    pubmed_files = find_pubmed_files(options.pubmed) if options.pubmed else []
    names = [file_name(path) for path in pubmed_files]
    records_folder = options.output.absolute().parent / "records"
    record_files = [records_folder / f"{name}.parquet" for name in names]
    columns = Columns(tuple(options.id_columns), tuple(options.title_columns), tuple(options.text_columns))
    sources = [
        Source(name, str(path.absolute()), partial(read_record_documents, record_file))
        for name, path, record_file in zip(names, pubmed_files, record_files, strict=True)
    ] + find_sources(options.sources, taken=names, columns=columns)
    # A number as id is a PMID here, whatever the kind of text: to hold out too much does no harm.
    held_out = find_sources([str(path) for path in options.held_out], default_kind="abstract")
    if not sources:
        raise UserError("nothing to read: give --pubmed FOLDER, --sources FILES, or both")

    work = Workplace(options.output.absolute())
    with naming_full_disk(work.folder):
        steps = _plan(options, work, sources, record_files, held_out)
        if not run_steps(steps, options, work.logs):
            logger.info("handed to Slurm; what each task says goes to %s", work.logs)
            return
    logger.info("%s", summary(read_json(options.output / REPORT)))


def _plan(
    options: CorpusOptions, work: Workplace, sources: list[Source], record_files: list[Path], held_out: list[Source]
) -> list[Step]:
    criteria = Criteria(options.min_words, not options.any_language, options.validation_fraction, options.test_fraction)
    settings = vars(criteria) | {"max_bytes": options.max_bytes}
    columns = [options.id_columns, options.title_columns, options.text_columns]
    held_out_sums = [source.sha256 for source in held_out]
    signature_files = [work.target.parent / "signatures" / f"{source.name}.parquet" for source in sources]
    record_stamps = [make_stamp(_PARSING, _LIBRARIES, source.sha256) for source in sources[: len(record_files)]]
    signature_stamps = [
        make_stamp(
            _PARSING + _SCREENING, _LIBRARIES, source.name, source.sha256, vars(criteria), columns, held_out_sums
        )
        for source in sources
    ]
    work.open(make_stamp(_WRITING, signature_stamps, settings, options.write_removed))
    held_out_keys, held_out_ngrams = work.folder / "held_out.parquet", work.folder / "held_out_ngrams.npy"
    write_held_out(held_out, held_out_keys, held_out_ngrams)
    for folder in {path.parent for path in (*record_files, *signature_files)}:
        folder.mkdir(exist_ok=True)
        remove_partials(folder)

    dropped = work.folder / "dropped.parquet"
    removed = work.output / REMOVED if options.write_removed else None
    parse = [
        PubmedReader([Path(source.location) for source in sources[: len(record_files)]]),
        record_writer(record_files, record_stamps),
    ]
    screen = [
        SourceReader(sources),
        Screen(criteria, held_out_ngrams),
        signature_writer(signature_files, signature_stamps),
    ]
    select = Call(list_dropped, signature_files, record_files, held_out_keys, dropped)
    write = [
        SourceReader(sources),
        DroppedFilter(dropped, removed),
        Passages(options.max_bytes, criteria),
        corpus_writer(work.output),
    ]
    finish = Call(_finish, work, sources, signature_files, held_out, settings)
    # What comes from the Hub has no checksum by which to know that it is the same.
    unknown = {rank for rank, source in enumerate(sources) if source.sha256 is None}
    return [
        Step("parse", parse, len(record_files), _standing(record_files, record_stamps)),
        Step("screen", screen, len(sources), _standing(signature_files, signature_stamps) - unknown),
        Step("select", [select], 1),
        Step("write", write, len(sources), work.finished("write") - unknown),
        Step("finish", [finish], 1),
    ]


def _standing(paths: list[Path], stamps: list[str]) -> frozenset[int]:
    """Numbers of the files that an earlier run has made of the same."""
    pairs = zip(paths, stamps, strict=True)
    return frozenset(number for number, (path, stamp) in enumerate(pairs) if has_stamp(path, stamp))


def _finish(
    work: Workplace,
    sources: list[Source],
    signature_files: list[Path],
    held_out: list[Source],
    settings: dict[str, Any],
) -> None:
    """Write the report into the corpus, and put it under its name."""
    dropped = work.folder / "dropped.parquet"
    for split in SPLITS:
        (work.output / split).mkdir(exist_ok=True)
    report = corpus_report(sources, signature_files, held_out, dropped, work.output, settings)
    if report["splits"]["train"]["documents"] == 0:
        raise UserError(f"no document is left to train on: of {report['read']:,} read, dropped {report['dropped']}")
    if settings["validation_fraction"] > 0 and report["splits"]["validation"]["documents"] == 0:
        problem = f"{settings['validation_fraction']} of {report['kept']:,} documents leaves none for validation"
        raise OptionError("validation_fraction", f"{problem}; {_least_fraction(work.output)} or more leaves some")
    write_json(work.output / REPORT, report)
    work.close()


def _least_fraction(corpus: Path) -> float:
    """The least validation fraction, rounded up to four decimals, with which a document is in that split."""
    files = (path for split in SPLITS for path in split_files(corpus, split))
    ids = (identifier for path in files for identifier in pq.read_table(path, columns=["id"])["id"].to_pylist())
    return (math.floor(min(map(split_place, ids)) * 10_000) + 1) / 10_000


def _check_output(corpus: Path) -> None:
    """Refuse to replace a folder which no earlier run has written."""
    if corpus.exists() and not _is_corpus(corpus):
        raise UserError(f"{corpus}: holds other things than the output of an earlier run, and would be replaced")


def _is_corpus(folder: Path) -> bool:
    return folder.is_dir() and ((folder / REPORT).exists() or not any(folder.iterdir()))
