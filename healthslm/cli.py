"""The commands: `healthslm build-corpus` and `python scripts/build_corpus.py` do the same.

This module imports nothing that takes time. A command imports its options to read them, and its function when they are
right, so that `--help` and usage errors are quick.
"""

import errno
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from healthslm.errors import Stopped, UsageError, UserError, unknown

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
    "describe-corpus": Command(
        "Write the data card of a corpus",
        "--corpus corpus --tokens tokens --output card",
        "healthslm.data_card.describe:describe_corpus",
        "healthslm.data_card.options:DataCardOptions",
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
    "generate": Command(
        "Generate text with a model",
        '--model runs/NAME/best --prompt "Aspirin and the risk of"',
        "healthslm.generation:generate",
        "healthslm.generation_options:GenerationOptions",
    ),
    "finetune": Command(
        "Fine-tune a model on examples",
        "--model . --data train.jsonl --validation validation.jsonl --output runs/NAME",
        "healthslm.finetuning.sft:finetune",
        "healthslm.finetuning.options:FinetuneOptions",
    ),
    "finetune-classifier": Command(
        "Fine-tune a classifier of mentions, sentences or texts",
        "--model . --train train.tsv --validation devel.tsv --test test.tsv --bidirectional --output runs/mentions",
        "healthslm.classification.finetune:finetune_classifier",
        "healthslm.classification.options:ClassifierOptions",
    ),
    "build-sentence-roles": Command(
        "Build a dataset of sentences and their roles from structured abstracts",
        "--corpus corpus --output data/sentence-roles",
        "healthslm.classification.sentence_roles:build_sentence_roles",
        "healthslm.classification.options:SentenceRolesOptions",
    ),
    "build-pubmedqa-artificial": Command(
        "Make artificial training questions for PubMedQA",
        "--corpus corpus --held-out data/pubmedqa/train.jsonl data/pubmedqa/test.jsonl --output pubmedqa-artificial",
        "healthslm.pubmedqa.artificial:build_pubmedqa_artificial",
        "healthslm.pubmedqa.options:ArtificialQuestionsOptions",
    ),
    "cross-validate-pubmedqa": Command(
        "Train and evaluate on PubMedQA by cross-validation",
        "--recipe configs/finetune/pubmedqa.yaml --output runs/pubmedqa.json",
        "healthslm.pubmedqa.cross_validation:cross_validate_pubmedqa",
        "healthslm.pubmedqa.options:CrossValidationOptions",
    ),
    "quantize": Command(
        "Compare a model's size, loss and speed in fp32, bf16, int8, nf4 and int4, or save it in one of them",
        "--model runs/NAME/best --data corpus/validation (or: --precisions nf4 --save runs/NAME-nf4)",
        "healthslm.evaluation.quantize:quantize",
        "healthslm.evaluation.options:QuantizationOptions",
    ),
    "export": Command(
        "Export a model to stock Llama, GGUF or ONNX",
        "--model . --format gguf --output exports/gguf",
        "healthslm.export.export:export",
        "healthslm.export.options:ExportOptions",
    ),
    "evaluate-release": Command(
        "Run every evaluation in the model card",
        "--recipe configs/evaluation.yaml --model . --output results",
        "healthslm.evaluation.evaluate_release:evaluate_release",
        "healthslm.evaluation.options:ReleaseEvaluationOptions",
    ),
    "release": Command(
        "Release the model of a run",
        "runs/NAME --recipe configs/evaluation.yaml",
        "healthslm.release.release:release",
        "healthslm.release.options:ReleaseOptions",
    ),
    "push-to-hub": Command(
        "Publish the model and its other forms on the Hub",
        "OWNER/NAME --siblings '{llama: exports/llama}' --tag v1.0.0",
        "healthslm.hub.publish:push_to_hub",
        "healthslm.hub.options:PushOptions",
    ),
}


def main(name: str | None = None) -> None:
    """Run the command of this name, by default the one that the first argument names, with the other arguments."""
    arguments = sys.argv[1:]
    with reporting_errors():
        if name is None:
            name, *arguments = arguments or ["--help"]
        if name in ("-h", "--help"):
            print(_overview())
            return
        if name not in COMMANDS:
            raise UsageError(unknown("command", name, COMMANDS))
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
        with naming_options(type(options), given):
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
    if before is signal.default_int_handler:  # otherwise it is ignored, as in a shell's background job
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
    # There is no distribution if healthslm itself is on the path, but not installed.
    requirements = "\n".join(line for found in distributions(name="healthslm") for line in found.requires or ())
    extra = re.search(rf"(?im)^{package.replace('_', '[_-]')}\b(?!-).*extra == .(\w+)", requirements)
    cure = f"; in the repository, pip install -e '.[{extra[1]}]' installs it" if extra else ""
    return f"{package} is not installed{cure}"


def _exit(message: str, status: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)
