"""Reading a tokenised corpus: memory-mapped token arrays, document ends and byte counts.

    tokens/tokens.json                      what the arrays must be
    tokens/tokenizer/                       the tokenizer that made them
    tokens/SPLIT/NAME.tokens.npy            every document: the separator, then its tokens
    tokens/SPLIT/NAME.ends.npy              int64: where each document ends in NAME.tokens.npy, exclusive
    tokens/SPLIT/NAME.bytes.npy             int64: UTF-8 bytes of each document's text

Needs nothing but NumPy, so that training runs on a bare machine.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from healthslm.errors import UserError
from healthslm.files import read_json

INFO_FILE = "tokens.json"
TOKENIZER_FOLDER = "tokenizer"


def tokenizer_sha256(folder: Path) -> str:
    """Checksum of a tokenizer folder's tokenizer.json, in hexadecimal digits."""
    path = folder / "tokenizer.json"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class TokenFile:
    """The arrays made from one corpus file."""

    tokens: np.ndarray
    """Shape (tokens,), uint16 or uint32."""
    ends: np.ndarray
    """Shape (documents,), int64."""
    document_bytes: np.ndarray
    """Shape (documents,), int64."""

    @classmethod
    def open(cls, folder: Path, dtype: str, name: str, documents: int, tokens: int, bytes: int) -> "TokenFile":
        """Map the three arrays and hold them against what tokens.json says of them."""
        file = cls(
            _open_array(folder / f"{name}.tokens.npy", dtype, tokens),
            _open_array(folder / f"{name}.ends.npy", "int64", documents),
            _open_array(folder / f"{name}.bytes.npy", "int64", documents),
        )
        if file.ends[-1:].sum() != tokens or file.document_bytes.sum() != bytes:
            raise UserError(f"{folder / name}.*.npy: not the lengths that tokens.json gives; tokenise again")
        return file


class TokenizedSplit:
    """One split of a tokenised corpus.

    Raises:
        UserError: The folder, the split or a file is missing, or a file is not what tokens.json says.
    """

    def __init__(self, folder: Path, split: str):
        info = read_json(folder / INFO_FILE)
        if tokenizer_sha256(folder / TOKENIZER_FOLDER) != info["tokenizer_sha256"]:
            raise UserError(f"{folder / TOKENIZER_FOLDER}: not the tokenizer that made {folder}; tokenise again")
        if not info["splits"].get(split, {}).get("documents"):
            advice = "" if split == "train" else f"; build the corpus with a --{split}-fraction that gives some"
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
        """Number of tokens, separators included."""
        return sum(len(file.tokens) for file in self.files)

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """Shape (documents,), int64: tokens of each document, its separator included."""
        return np.concatenate([np.diff(file.ends, prepend=0) for file in self.files])

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """Shape (documents,), int64: UTF-8 bytes of each document's text."""
        return np.concatenate([file.document_bytes for file in self.files])

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, its separator first."""
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
        raise UserError(f"{path}: missing or cut short ({error}); tokenise again") from error
    if array.shape != (length,) or array.dtype != np.dtype(dtype):
        raise UserError(
            f"{path}: {array.dtype} {array.shape} where tokens.json says {dtype} ({length},); tokenise again"
        )
    return array
