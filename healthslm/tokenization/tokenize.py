"""Tokenizing a corpus: each of its files becomes arrays of tokens, document ends and byte counts."""

import logging
import os
import shutil
import tempfile
from array import array
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from transformers import PreTrainedTokenizerBase

from healthslm.corpus.reader import read_texts, split_files
from healthslm.documents import SPLITS
from healthslm.errors import UserError
from healthslm.files import check_output_folder, file_sha256, naming_full_disk, read_json, write_json
from healthslm.fingerprints import make_fingerprint
from healthslm.pipeline import Call, Step, WorkFolder, run_steps
from healthslm.tokenization.encoding import encode_texts, load_tokenizer, separator_id
from healthslm.tokenization.options import TokenizeOptions
from healthslm.tokenization.tokens import INFO_FILE, TOKENIZER_FOLDER, tokenizer_sha256

logger = logging.getLogger(__name__)

TOKENS_VERSION = 1
"""Version of the token arrays. Raise it after any change by which the same corpus and tokenizer give other arrays: a
run does not resume from the work folder of another version."""


def tokenize_corpus(options: TokenizeOptions) -> None:
    """Turn every split of a corpus into arrays of tokens, described in `healthslm.tokenization.tokens`.

    Each corpus file is a task, and its process holds one batch of documents in memory. An interrupted run resumes.

    Raises:
        UserError: The corpus is missing, damaged or empty; the tokenizer is missing or has no separator token; or the
            output folder holds other files than tokens.
    """
    check_output_folder(options.output, "a tokenized corpus", lambda folder: (folder / INFO_FILE).exists())
    tokenizer = load_tokenizer(options.tokenizer)
    files = {split: paths for split in SPLITS if (paths := split_files(options.corpus, split))}
    if not files:
        raise UserError(
            f"{options.corpus}: no Parquet files in {', '.join(SPLITS)}; build a corpus with scripts/build_corpus.py"
        )

    work = WorkFolder(options.output.absolute())
    with naming_full_disk(work.folder), tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        sums = {str(path): file_sha256(path) for paths in files.values() for path in paths}
        fingerprint = make_fingerprint(TOKENS_VERSION, tokenizer_sha256(Path(saved)), separator_id(tokenizer), sums)
        work.open(fingerprint)
        tokenizer.save_pretrained(work.output / TOKENIZER_FOLDER)
        for split in files:
            (work.output / split).mkdir(exist_ok=True)
        inputs = [(path.absolute(), work.output / split) for split, paths in files.items() for path in paths]
        writer = TokenWriter(inputs, work.output / TOKENIZER_FOLDER, fingerprint)
        steps = [
            Step("tokenize", [writer], len(inputs), work.finished("tokenize")),
            Step("finish", [Call(_finish, work, files)], 1),
        ]
        if not run_steps(steps, options, work.logs):
            logger.info("submitted to Slurm; the logs of its tasks are in %s", work.logs)
            return
    for split, counts in read_json(options.output / INFO_FILE)["splits"].items():
        bytes_per_token = counts["bytes"] / max(counts["tokens"] - counts["documents"], 1)
        logger.info(
            "%s: %s documents, %s tokens, %.3f bytes per token",
            *(split, f"{counts['documents']:,}", f"{counts['tokens']:,}", bytes_per_token),
        )


def _finish(work: WorkFolder, files: dict[str, list[Path]]) -> None:
    """Write tokens.json, and move the tokens to their folder."""
    folder = work.output
    tokenizer = load_tokenizer(str(folder / TOKENIZER_FOLDER))
    info = {
        "tokenizer_sha256": tokenizer_sha256(folder / TOKENIZER_FOLDER),
        "vocab_size": len(tokenizer),
        "separator_id": separator_id(tokenizer),
        "dtype": token_dtype(len(tokenizer)).name,
        "splits": {split: count_split(folder / split, paths) for split, paths in files.items()},
    }
    write_json(folder / INFO_FILE, info)
    work.publish()


@cache
def _load_once(folder: Path, fingerprint: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer once per run and process: another run may write another tokenizer to the same folder."""
    return load_tokenizer(str(folder))


class TokenWriter(PipelineStep):
    """Writes the arrays of a corpus file; task i reads the file and writes to the folder in `tasks[i]`."""

    name = "tokens"
    type = "💾 - WRITER"

    def __init__(self, tasks: list[tuple[Path, Path]], tokenizer_folder: Path, fingerprint: str):
        super().__init__()
        self.tasks = tasks
        self.tokenizer_folder = tokenizer_folder
        self.fingerprint = fingerprint

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes already use all cores
        tokenizer = _load_once(self.tokenizer_folder, self.fingerprint)
        separator, dtype = separator_id(tokenizer), token_dtype(len(tokenizer))
        corpus_file, folder = self.tasks[rank]
        lengths, text_bytes = array("q"), array("q")
        with tempfile.TemporaryFile(dir=folder) as tokens:  # the array's header needs their number
            for texts in read_texts(corpus_file):
                for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
                    tokens.write(np.array([separator, *ids], dtype).tobytes())
                    lengths.append(len(ids) + 1)
                    text_bytes.append(len(text.encode()))
            _save_array(folder / f"{corpus_file.stem}.tokens.npy", tokens, dtype, sum(lengths))
        np.save(folder / f"{corpus_file.stem}.ends.npy", np.cumsum(lengths, dtype=np.int64))
        np.save(folder / f"{corpus_file.stem}.bytes.npy", np.array(text_bytes, np.int64))


def _save_array(path: Path, content: IO[bytes], dtype: np.dtype, length: int) -> None:
    """Write an array like `numpy.save`, but from a file with its bytes: the array may be larger than memory."""
    content.seek(0)
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(content, file)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type for the token ids: uint16 for up to 65,536 tokens, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def count_split(folder: Path, corpus_files: list[Path]) -> dict[str, Any]:
    """The entry of a split in tokens.json: its documents, tokens and bytes, in total and by file."""
    files: list[dict[str, Any]] = []
    for path in corpus_files:
        tokens, ends, text_bytes = (
            np.load(folder / f"{path.stem}.{kind}.npy", mmap_mode="r") for kind in ("tokens", "ends", "bytes")
        )
        files.append({"name": path.stem, "documents": len(ends), "tokens": len(tokens), "bytes": int(text_bytes.sum())})
    return {kind: sum(file[kind] for file in files) for kind in ("documents", "tokens", "bytes")} | {"files": files}
