"""Writing a tokenised corpus: each of its files becomes arrays of tokens, document ends and byte counts."""

import logging
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from healthslm import corpus_reader, encoding
from healthslm.corpus_reader import read_texts, split_files
from healthslm.documents import SPLITS
from healthslm.encoding import encode_texts, load_tokenizer, separator_id
from healthslm.errors import UserError
from healthslm.files import file_sha256, naming_full_disk, read_json, write_json
from healthslm.pipeline import Call, ExecutorOptions, Step, Workplace, run_steps
from healthslm.tables import make_stamp
from healthslm.tokens import INFO_FILE, TOKENIZER_FOLDER, tokenizer_sha256

logger = logging.getLogger(__name__)


@dataclass
class TokenizeOptions(ExecutorOptions):
    """Options of `tokenize_corpus`."""

    corpus: Path = field(kw_only=True)
    """Corpus folder: Parquet files in train/, validation/ and test/."""
    tokenizer: str = field(kw_only=True)
    """Folder or Hub name of a tokenizer, any that Transformers opens as a fast one."""
    output: Path = field(kw_only=True)
    """Folder to write the arrays to."""


def tokenize_corpus(options: TokenizeOptions) -> None:
    """Turn every split of a corpus into memory-mapped arrays; healthslm/tokens.py describes and reads their folder.

    Each corpus file is a task, whose process holds the tokens of that file in memory. A run that was killed goes on.

    Raises:
        UserError: The corpus is missing, damaged or empty, or the tokenizer missing or unfit.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    files = {split: paths for split in SPLITS if (paths := split_files(options.corpus, split))}
    if not files:
        raise UserError(
            f"{options.corpus}: no Parquet files in {', '.join(SPLITS)}; scripts/build_corpus.py writes them"
        )
    if options.output.exists() and not (options.output / INFO_FILE).exists():
        raise UserError(f"{options.output}: holds other things than tokens, and would be replaced")

    work = Workplace(options.output.absolute())
    with naming_full_disk(work.folder), TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        sums = {str(path): file_sha256(path) for paths in files.values() for path in paths}
        work.open(make_stamp([encoding, corpus_reader], tokenizer_sha256(Path(saved)), sums))
        tokenizer.save_pretrained(work.output / TOKENIZER_FOLDER)
        for split in files:
            (work.output / split).mkdir(exist_ok=True)
        inputs = [(path.absolute(), work.output / split) for split, paths in files.items() for path in paths]
        writer = TokenWriter(inputs, work.output / TOKENIZER_FOLDER)
        steps = [
            Step("tokenise", [writer], len(inputs), work.finished("tokenise")),
            Step("finish", [Call(_finish, work, files)], 1),
        ]
        if not run_steps(steps, options, work.logs):
            logger.info("handed to Slurm; what each task says goes to %s", work.logs)
            return
    for split, counts in read_json(options.output / INFO_FILE)["splits"].items():
        bytes_per_token = counts["bytes"] / max(counts["tokens"] - counts["documents"], 1)
        logger.info(
            "%s: %s documents, %s tokens, %.3f bytes per token",
            *(split, f"{counts['documents']:,}", f"{counts['tokens']:,}", bytes_per_token),
        )


def _finish(work: Workplace, files: dict[str, list[Path]]) -> None:
    """Write tokens.json, and put the folder under its name."""
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
    work.close()


_load_once = cache(load_tokenizer)  # for all tasks of a process


class TokenWriter(PipelineStep):
    """Writes the arrays of corpus file i, as task i; each file comes with the folder to write them to."""

    name = "tokens"
    type = "💾 - WRITER"

    def __init__(self, tasks: list[tuple[Path, Path]], tokenizer_folder: Path):
        super().__init__()
        self.tasks = tasks
        self.tokenizer_folder = tokenizer_folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes share the cores already
        tokenizer = _load_once(str(self.tokenizer_folder))
        separator, dtype = separator_id(tokenizer), token_dtype(len(tokenizer))
        corpus_file, folder = self.tasks[rank]
        tokens, lengths, text_bytes = [np.zeros(0, dtype)], [], []
        for texts in read_texts(corpus_file):
            documents = [[separator, *ids] for ids in encode_texts(tokenizer, texts)]
            tokens += [np.array(ids, dtype) for ids in documents]
            lengths += [len(ids) for ids in documents]
            text_bytes += [len(text.encode()) for text in texts]
        np.save(folder / f"{corpus_file.stem}.tokens.npy", np.concatenate(tokens))
        np.save(folder / f"{corpus_file.stem}.ends.npy", np.cumsum(lengths, dtype=np.int64))
        np.save(folder / f"{corpus_file.stem}.bytes.npy", np.array(text_bytes, np.int64))


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids: uint16 for up to 65,536 of them, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def count_split(folder: Path, corpus_files: list[Path]) -> dict[str, int | list[dict[str, int | str]]]:
    """What tokens.json says of one split: its documents, tokens and bytes, all together and file by file."""
    files = []
    for path in corpus_files:
        tokens, ends, text_bytes = (
            np.load(folder / f"{path.stem}.{kind}.npy", mmap_mode="r") for kind in ("tokens", "ends", "bytes")
        )
        files.append({"name": path.stem, "documents": len(ends), "tokens": len(tokens), "bytes": int(text_bytes.sum())})
    return {kind: sum(file[kind] for file in files) for kind in ("documents", "tokens", "bytes")} | {"files": files}
