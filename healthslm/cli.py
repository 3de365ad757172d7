"""The commands: `healthslm build-corpus` and `python scripts/build_corpus.py` do the same.

This module imports nothing that takes time. A command imports its options to read them, and its function when they are
right, so that `--help` and usage errors are quick.
"""

import dataclasses
import difflib
import errno
import importlib
import importlib.metadata
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from healthslm.errors import Stopped, UsageError, UserError

STOPPED = 75
"""Exit status of a run that was stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h."""


class Command(NamedTuple):
    """What a command does, an example, and where its function and its options are."""

    summary: str
    example: str
    function: str
    options: str


COMMANDS = {
    "download-pubmed": Command(
        "Download PubMed's files",
        "--output pubmed --files 1-20 (or: all; or: latest 3)",
        "healthslm.corpus.download:download_pubmed",
        "healthslm.corpus.options:DownloadOptions",
    ),
    "build-corpus": Command(
        "Build the corpus",
        "--pubmed pubmed --sources 'texts/*.parquet' --output corpus",
        "healthslm.corpus.build:build_corpus",
        "healthslm.corpus.options:CorpusOptions",
    ),
    "describe-corpus": Command(
        "Write the data card of a corpus",
        "--corpus corpus --tokens tokens --output card",
        "healthslm.data_card.describe:describe_corpus",
        "healthslm.data_card.options:DataCardOptions",
    ),
    "train-tokenizer": Command(
        "Train a tokenizer on a corpus",
        "--corpus corpus --output tokenizer",
        "healthslm.tokenization.tokenizer:train_tokenizer",
        "healthslm.tokenization.options:TokenizerOptions",
    ),
    "evaluate-tokenizer": Command(
        "Compare tokenizers",
        "--tokenizers tokenizer gpt2 --data corpus/validation",
        "healthslm.tokenization.tokenizer_report:report_tokenizers",
        "healthslm.tokenization.options:TokenizerReportOptions",
    ),
    "tokenize-corpus": Command(
        "Tokenize a corpus",
        "--corpus corpus --tokenizer tokenizer --output tokens",
        "healthslm.tokenization.tokenize:tokenize_corpus",
        "healthslm.tokenization.options:TokenizeOptions",
    ),
    "pretrain": Command(
        "Train a model",
        "--recipe configs/healthslm-15m.yaml",
        "healthslm.training.loop:pretrain",
        "healthslm.training.options:PretrainOptions",
    ),
    "evaluate": Command(
        "Compute a model's bits per byte on held-out text",
        "--model runs/NAME/best --data corpus/validation",
        "healthslm.evaluation.evaluate:evaluate",
        "healthslm.evaluation.options:EvaluationOptions",
    ),
    "fetch-evaluation-set": Command(
        "Download the held-out documents from NCBI",
        "--ids results/pubmed_ids.json --output held-out",
        "healthslm.evaluation.evaluation_set:fetch_evaluation_set",
        "healthslm.evaluation.options:FetchOptions",
    ),
    "evaluate-release": Command(
        "Run every evaluation in the model card",
        "--recipe configs/evaluation.yaml --model . --output results",
        "healthslm.evaluation.metrics:evaluate_release",
        "healthslm.evaluation.options:ReleaseEvaluationOptions",
    ),
    "release": Command(
        "Release the model of a run",
        "runs/NAME --recipe configs/evaluation.yaml",
        "healthslm.release.release:release",
        "healthslm.release.options:ReleaseOptions",
    ),
    "build-sentence-roles": Command(
        "Build a data set of sentences and their roles from structured abstracts",
        "--corpus corpus --output data/sentence-roles",
        "healthslm.finetuning.sentence_roles:build_sentence_roles",
        "healthslm.finetuning.classifier_options:SentenceRolesOptions",
    ),
    "finetune-classifier": Command(
        "Fine-tune a classifier of mentions, sentences or texts",
        "--model . --train train.tsv --validation devel.tsv --test test.tsv --bidirectional --output runs/mentions",
        "healthslm.finetuning.classification:finetune_classifier",
        "healthslm.finetuning.classifier_options:ClassifierOptions",
    ),
    "generate": Command(
        "Generate text with a model",
        '--model runs/NAME/best --prompt "Aspirin and the risk of"',
        "healthslm.generation:generate",
        "healthslm.generation_options:GenerationOptions",
    ),
}


def main(name: str | None = None) -> None:
    """Run the command of this name, by default the one that the first argument names, with the other arguments."""
    arguments = sys.argv[1:]
    if name is None:
        if not arguments or arguments[0] in ("-h", "--help"):
            with reporting_errors():
                print(_overview())
            return
        name, *arguments = arguments
        if name not in COMMANDS:
            nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
            _exit(f"error: unknown command {name!r}, did you mean {nearest!r}? (see --help)", 2)
    command = COMMANDS[name]
    summary = f"{command.summary}: healthslm {name} {command.example}"
    run(command.function, command.options, arguments, f"healthslm {name}", summary)


def run(
    function: str | Callable[[Any], None],
    options_class: str | type,
    arguments: Sequence[str] | None = None,
    command: str = "",
    summary: str | None = "",
) -> None:
    """Call a function with its options from the command line, and report errors as `reporting_errors` does.

    Args:
        function: The function, or its place as "module:name", which is imported when the options are known to be right.
        options_class: The dataclass of its options, or its place.
        arguments: The arguments, by default those of the process.
        command: Name of the command in `--help`.
        summary: What it does, in `--help`.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("healthslm").setLevel(logging.INFO)
    # Without a GPU, bitsandbytes warns at every import of Transformers.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    given = sys.argv[1:] if arguments is None else arguments
    with reporting_errors():
        with _ending_on_interrupt():
            from healthslm.arguments import naming_options, parse

            options = parse(_find(options_class), given, command, summary)
            call = _find(function)
        with naming_options(given), _naming_memory_options(options):
            call(options)


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Report the user's errors in one line, and end the process with a status that says what happened.

    The status is 1 after an error of the user or the file system, 2 after wrong usage, 75 when a run was stopped on
    request and can be resumed, and what shells expect after an interrupt or a closed pipe. Any other exception is a bug
    and keeps its traceback.
    """
    try:
        yield
    except UsageError as error:
        _exit(f"error: {error} (see --help)", 2)
    except UserError as error:
        _exit(f"error: {error}", 1)
    except ModuleNotFoundError as error:
        _exit(f"error: {_missing_package(error)}", 1)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _exit(f"error: {error.filename or 'cannot write'}: {error.strerror}", 1)
    except Stopped as stopped:
        _exit(str(stopped), STOPPED)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


@contextmanager
def _ending_on_interrupt() -> Iterator[None]:
    """End the process at once on Ctrl-C in the block, in which modules are imported: some of them catch all errors."""

    def end(number: int, frame: FrameType | None) -> None:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as in a shell's background job
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _find(place: Any) -> Any:
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"usage: healthslm COMMAND [options]\n\n{commands}\n\n`healthslm COMMAND --help` explains the options."


def _missing_package(error: ModuleNotFoundError) -> str:
    """Name the package that is not installed and the extra that installs it."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "healthslm"):
        raise error
    wanted, requirements = package.replace("_", "-").lower(), []
    with suppress(importlib.metadata.PackageNotFoundError):  # healthslm itself is on the path, but not installed
        requirements = importlib.metadata.requires("healthslm") or []
    for requirement in requirements:
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if extra and re.match(rf"{re.escape(wanted)}\b(?!-)", requirement.replace("_", "-").lower()):
            return f"{package} is not installed; in the repository, pip install -e '.[{extra[1]}]' installs it"
    return f"{package} is not installed"


@contextmanager
def _naming_memory_options(options: Any) -> Iterator[None]:
    """Raise a GPU's lack of memory as a UserError that names the options to lower."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which takes seconds to import
            raise
        fields = dataclasses.fields(options)
        ways = [f"lower --{field.name.replace('_', '-')}" for field in fields if field.metadata.get("memory")]
        ways += ["use --device cpu" for field in fields if field.name == "device"]
        raise UserError(f"out of GPU memory: {' or '.join(ways or ['close other programs that use it'])}") from error


def _exit(message: str, status: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)
