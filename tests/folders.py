"""What is in a folder, to compare it with another one or with itself at another time."""

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder, including hidden ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the same files."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()}
