"""Reading a tokenized corpus: memory-mapped arrays of tokens, document ends and byte counts.

    tokens/tokens.json                      number of documents, tokens and bytes of each file
    tokens/tokenizer/                       the tokenizer
    tokens/SPLIT/NAME.tokens.npy            uint16 or uint32: of each document the separator, then its tokens
    tokens/SPLIT/NAME.ends.npy              int64: exclusive end of each document in NAME.tokens.npy
    tokens/SPLIT/NAME.bytes.npy             int64: UTF-8 bytes of each document's text

A document here is a row of the corpus, so a chunk of a long document is one too. Needs only NumPy, so that training
runs on a minimal installation.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json

INFO_FILE = "tokens.json"
TOKENIZER_FOLDER = "tokenizer"


def tokenizer_sha256(folder: Path) -> str:
    """SHA-256 of a folder's tokenizer.json, in hexadecimal."""
    path = folder / "tokenizer.json"
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_info(folder: Path) -> dict[str, Any]:
    """Read the tokens.json of a tokenized corpus.

    Raises:
        UserError: The folder has none; says so if it is a corpus that was not tokenized.
    """
    if (folder / INFO_FILE).is_file():
        return read_json(folder / INFO_FILE)
    if any(folder.glob("*/*.parquet")):
        command = f"scripts/tokenize_corpus.py --corpus {folder} --tokenizer TOKENIZER --output tokens"
        raise UserError(f"{folder}: this is a corpus, not a tokenized corpus; tokenize it first: {command}")
    raise UserError(f"{folder}: not a tokenized corpus (no {INFO_FILE}); write one with scripts/tokenize_corpus.py")


@dataclass(frozen=True)
class TokenFile:
    """The arrays of one corpus file."""

    tokens: np.ndarray
    """Shape (tokens,), uint16 or uint32."""
    ends: np.ndarray
    """Shape (documents,), int64."""
    document_bytes: np.ndarray
    """Shape (documents,), int64."""

    @classmethod
    def open(cls, folder: Path, dtype: str, name: str, documents: int, tokens: int, bytes: int) -> "TokenFile":
        """Open the three arrays and check them against their entry in tokens.json."""
        file = cls(
            _open_array(folder / f"{name}.tokens.npy", dtype, tokens),
            _open_array(folder / f"{name}.ends.npy", "int64", documents),
            _open_array(folder / f"{name}.bytes.npy", "int64", documents),
        )
        if file.ends[-1:].sum() != tokens or file.document_bytes.sum() != bytes:
            raise UserError(f"{folder / name}.*.npy: lengths not as in tokens.json; tokenize the corpus again")
        return file


class TokenizedSplit:
    """One split of a tokenized corpus.

    Raises:
        UserError: The folder, the split or a file is missing, or a file does not match tokens.json.
    """

    def __init__(self, folder: Path, split: str):
        info = read_info(folder)
        if tokenizer_sha256(folder / TOKENIZER_FOLDER) != info["tokenizer_sha256"]:
            raise UserError(
                f"{folder / TOKENIZER_FOLDER}: not the tokenizer that {folder} was made with; tokenize the corpus again"
            )
        if not info["splits"].get(split, {}).get("documents"):
            advice = "" if split == "train" else f"; build the corpus with a larger --{split}-fraction"
            raise UserError(f"{folder}: no {split} documents{advice}")
        self.vocab_size: int = info["vocab_size"]
        self.separator_id: int = info["separator_id"]
        self.files = [
            TokenFile.open(folder / split, dtype=info["dtype"], **file) for file in info["splits"][split]["files"]
        ]
        self._first_documents = np.cumsum([0, *(len(file.ends) for file in self.files)], dtype=np.int64)

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._first_documents[-1])

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including separators."""
        return sum(len(file.tokens) for file in self.files)

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """Shape (documents,), int64: tokens of each document, including its separator."""
        return np.concatenate([np.diff(file.ends, prepend=0) for file in self.files])

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """Shape (documents,), int64: UTF-8 bytes of each document's text."""
        return np.concatenate([file.document_bytes for file in self.files])

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, beginning with its separator; raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        file, local = self.files[number], index - int(self._first_documents[number])
        start = file.ends[local - 1] if local else 0
        return file.tokens[start : file.ends[local]]


def _open_array(path: Path, dtype: str, length: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or truncated ({error}); tokenize the corpus again") from error
    if array.shape != (length,) or array.dtype != np.dtype(dtype):
        raise UserError(
            f"{path}: {array.dtype} {array.shape} but tokens.json says {dtype} ({length},); tokenize the corpus again"
        )
    return array
