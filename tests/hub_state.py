"""What the local Hub keeps: files, repositories with their commits, and requests."""

import fnmatch
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

LFS_PATTERNS = ("*.safetensors", "*.gguf", "*.onnx", "*.bin", "*.parquet")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
NEW_SPACE = {"README.md": b"---\nsdk: static\n---\n", "index.html": b"<p>Welcome</p>", "style.css": b"p {}"}
"""What the Hub puts into a new static Space."""
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


@dataclass(frozen=True)
class Blob:
    content: bytes
    in_lfs: bool

    @property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    """The files of each commit, by name."""
    messages: list[str] = field(default_factory=list)
    """The message of each commit."""
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """The content of the files of the newest commit, without the Hub's own."""
        return {name: blob.content for name, blob in self.commits[self.head].items() if name != ".gitattributes"}

    def commit(self, message: str, files: dict[str, Blob]) -> str:
        name = hashlib.sha1(f"{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = dict(sorted(files.items()))
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit."""
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None


class Refused(Exception):
    """A response with an error, in the Hub's form."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        self.status, self.message, self.code, self.body = status, message, code, body


def owner_of(name: str) -> str:
    return name.removeprefix("spaces/").partition("/")[0]


def oid_of(blob: Blob) -> str:
    return blob.sha256 if blob.in_lfs else blob.git_id


def belongs_in_lfs(files: dict[str, Blob], path: str, size: int) -> bool:
    lines = files[".gitattributes"].content.decode().splitlines()
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
    return size > 10 << 20 or any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)


def metadata(card: bytes) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card.decode(), flags=re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}
