"""Build the corpus: turn PubMed's XML and other text into training, validation and test documents in Parquet.

    pubmed/ -> records/ -> signatures/ -> corpus/{train,validation,test}/

Three steps process each input file by itself, in parallel; the others process all files together:

    parse    PubMed's XML, file by file, to records
    screen   records and other text, file by file, to signatures: whether a document is usable, and keys of its content
    select   all signatures to a list of documents to drop: outdated, unusable, held-out, copied and retracted ones
    write    records and other text, file by file, to the splits, without the dropped documents
    finish   the report; the corpus is moved to its folder

Records and signatures are kept and reused while their inputs are unchanged: after an update, only the new files are
parsed and screened. The corpus folder is replaced when the new corpus is complete. If a run fails, the old corpus is
kept, and the same command resumes.
"""

import importlib.metadata
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from healthslm.corpus.options import CorpusOptions
from healthslm.corpus.pubmed_files import file_name, find_pubmed_files
from healthslm.corpus.reader import split_files
from healthslm.corpus.records import RECORDS_VERSION, PubmedReader, read_record_documents, record_writer
from healthslm.corpus.report import REPORT, corpus_report, summary
from healthslm.corpus.screening import (
    SIGNATURES_VERSION,
    Criteria,
    Screen,
    SourceReader,
    signature_writer,
    write_held_out,
)
from healthslm.corpus.selection import write_drop_list
from healthslm.corpus.sources import Columns, Source, find_sources
from healthslm.corpus.splits import CORPUS_VERSION, DROPPED, ChunkSplitter, DroppedFilter, corpus_writer
from healthslm.documents import SPLITS, split_position
from healthslm.errors import UserError
from healthslm.files import check_output_folder, naming_full_disk, read_json, remove_partials, write_json
from healthslm.fingerprints import has_fingerprint, make_fingerprint
from healthslm.options import OptionError
from healthslm.pipeline import Call, Step, WorkFolder, run_steps

logger = logging.getLogger(__name__)

# Libraries whose version may change records or signatures.
_LIBRARIES = [importlib.metadata.version(library) for library in ("lxml", "py3langid", "rensa")]


def build_corpus(options: CorpusOptions) -> None:
    """Build a corpus, with a report of the documents read, kept and dropped in its report.json.

    Raises:
        UserError: An input is missing, damaged or in an unknown format; or the training split is empty, or the
            validation split although validation_fraction is above 0.
    """
    check_output_folder(options.output, "a corpus", lambda folder: (folder / REPORT).exists())
    pubmed_files = find_pubmed_files(options.pubmed) if options.pubmed else []
    names = [file_name(path) for path in pubmed_files]
    records_folder = options.output.absolute().parent / "records"
    record_files = [records_folder / f"{name}.parquet" for name in names]
    columns = Columns(tuple(options.id_columns), tuple(options.title_columns), tuple(options.text_columns))
    sources = [
        Source(name, str(path.absolute()), partial(read_record_documents, record_file))
        for name, path, record_file in zip(names, pubmed_files, record_files, strict=True)
    ] + find_sources(options.sources, taken=names, columns=columns)
    # In held-out files every number is taken as a PMID: holding out too much does no harm.
    held_out = find_sources([str(path) for path in options.held_out], default_kind="abstract")
    if not sources:
        raise UserError("no input: give --pubmed FOLDER, --sources FILES or both")

    work = WorkFolder(options.output.absolute())
    with naming_full_disk(work.folder):
        steps = _plan(options, work, sources, record_files, held_out)
        if not run_steps(steps, options, work.logs):
            logger.info("submitted to Slurm; the logs of its tasks are in %s", work.logs)
            return
    logger.info("%s", summary(read_json(options.output / REPORT)))


def _plan(
    options: CorpusOptions, work: WorkFolder, sources: list[Source], record_files: list[Path], held_out: list[Source]
) -> list[Step]:
    criteria = Criteria(options.min_words, not options.any_language, options.validation_fraction, options.test_fraction)
    settings = vars(criteria) | {"max_bytes": options.max_bytes}
    columns = [options.id_columns, options.title_columns, options.text_columns]
    held_out_sums = [source.sha256 for source in held_out]
    signature_files = [work.target.parent / "signatures" / f"{source.name}.parquet" for source in sources]
    parsing = [RECORDS_VERSION, _LIBRARIES]
    screening = [*parsing, SIGNATURES_VERSION, vars(criteria), columns, held_out_sums]
    record_fingerprints = [make_fingerprint(parsing, source.sha256) for source in sources[: len(record_files)]]
    signature_fingerprints = [make_fingerprint(screening, source.name, source.sha256) for source in sources]
    work.open(make_fingerprint(CORPUS_VERSION, signature_fingerprints, settings, options.write_dropped))
    held_out_keys, held_out_ngrams = work.folder / "held_out.parquet", work.folder / "held_out_ngrams.npy"
    write_held_out(held_out, held_out_keys, held_out_ngrams)
    for folder in {path.parent for path in (*record_files, *signature_files)}:
        folder.mkdir(exist_ok=True)
        remove_partials(folder)

    drop_list = work.folder / "drop_list.parquet"
    dropped = work.output / DROPPED if options.write_dropped else None
    parse = [
        PubmedReader([Path(source.location) for source in sources[: len(record_files)]]),
        record_writer(record_files, record_fingerprints),
    ]
    screen = [
        SourceReader(sources),
        Screen(criteria, held_out_ngrams),
        signature_writer(signature_files, signature_fingerprints),
    ]
    kept = [*record_files, *signature_files], [*record_fingerprints, *signature_fingerprints]
    select = Call(_select, kept, signature_files, record_files, held_out_keys, drop_list)
    write = [
        SourceReader(sources),
        DroppedFilter(drop_list, dropped),
        ChunkSplitter(options.max_bytes, criteria),
        corpus_writer(work.output),
    ]
    finish = Call(_finish, work, sources, signature_files, held_out, settings)
    # Datasets of the Hub have no checksum to tell whether they have changed.
    unknown = {rank for rank, source in enumerate(sources) if source.sha256 is None}
    return [
        Step("parse", parse, len(record_files), _up_to_date(record_files, record_fingerprints)),
        Step("screen", screen, len(sources), _up_to_date(signature_files, signature_fingerprints) - unknown),
        Step("select", [select], 1),
        Step("write", write, len(sources), work.finished("write") - unknown),
        Step("finish", [finish], 1),
    ]


def _up_to_date(paths: list[Path], fingerprints: list[str]) -> frozenset[int]:
    """Numbers of the files that exist and have the right fingerprint."""
    pairs = zip(paths, fingerprints, strict=True)
    return frozenset(number for number, (path, fingerprint) in enumerate(pairs) if has_fingerprint(path, fingerprint))


def _select(kept: tuple[list[Path], list[str]], *arguments: Any) -> None:
    """Write the documents to drop, and check that what they were selected by is still that of this build.

    Raises:
        UserError: Another build has replaced records or signatures in the meantime.
    """
    write_drop_list(*arguments)
    if len(_up_to_date(*kept)) < len(kept[0]):
        folder = kept[0][0].parent.parent
        raise UserError(
            f"{folder}: another build has written to records/ or signatures/ there: run the command again once it is "
            "finished, or give the corpora --output in different folders"
        )


def _finish(
    work: WorkFolder,
    sources: list[Source],
    signature_files: list[Path],
    held_out: list[Source],
    settings: dict[str, Any],
) -> None:
    """Write the report, and move the corpus to its folder."""
    drop_list = work.folder / "drop_list.parquet"
    for split in SPLITS:
        (work.output / split).mkdir(exist_ok=True)
    report = corpus_report(sources, signature_files, held_out, drop_list, work.output, settings)
    if report["splits"]["train"]["documents"] == 0:
        raise UserError(f"no training documents are left: {report['read']:,} were read, dropped {report['dropped']}")
    if settings["validation_fraction"] > 0 and report["splits"]["validation"]["documents"] == 0:
        problem = f"{settings['validation_fraction']} of {report['kept']:,} documents gives no validation document"
        raise OptionError("validation_fraction", f"{problem}; use {_min_fraction(work.output)} or more")
    write_json(work.output / REPORT, report)
    work.publish()


def _min_fraction(corpus: Path) -> float:
    """The smallest validation fraction, rounded up to four decimals, that gives a validation document."""
    files = (path for split in SPLITS for path in split_files(corpus, split))
    ids = (identifier for path in files for identifier in pq.read_table(path, columns=["id"])["id"].to_pylist())
    return (math.floor(min(map(split_position, ids)) * 10_000) + 1) / 10_000
