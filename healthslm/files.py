"""Write files and folders atomically: they are complete or do not exist."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from healthslm.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path where the caller creates the file or folder that will replace `path`.

    If the block succeeds, the new file or folder is synced to disk and renamed to `path`, replacing what was there. If
    it fails, the new one is removed and `path` is unchanged. The temporary path has the same name as `path`, because
    some writers look at the suffix. It is on the same file system, in the hidden folder `.NAME.partial-*` next to
    `path`. Missing parent folders are created.

    Raises:
        UserError: The disk is full; the message names `path`.
        OSError: Writing failed for another reason; names `path` if the system names no file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        new = partial / path.name
        with naming_full_disk(path):
            yield new
            publish(new, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Raise errors about a full disk in the block as a UserError with this path; add the path to other OSErrors."""
    try:
        yield
    except Exception as error:
        # Rust libraries (safetensors, tokenizers) and Arrow report a full disk only in the text of the error.
        if "No space left on device" in str(error):
            raise UserError(f"{path}: no space left on device: free some and run the command again") from error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def publish(new: Path, path: Path) -> None:
    """Sync a finished file or folder to disk and rename it to `path`, replacing what was there.

    Both must be on the same file system.
    """
    _sync_all(new)
    aside = new.with_name(f"{new.name}.old")
    _rename_onto(new, path, aside)
    _sync(path.parent)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Remove what `replacing` leaves in a folder when the process is killed."""
    for partial in folder.glob(".*.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def check_output_folder(folder: Path, content: str, is_earlier_output: Callable[[Path], bool]) -> None:
    """Refuse to replace a file, or a folder with anything in it but the output of an earlier run.

    Args:
        folder: Folder that a stage is about to write or to replace.
        content: What the stage writes, for the message: "a corpus".
        is_earlier_output: Whether a folder that is not empty holds the output of an earlier run.

    Raises:
        UserError: `folder` would replace something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but {content} is a folder; choose another path")
    if folder.is_dir() and any(folder.iterdir()) and not is_earlier_output(folder):
        raise UserError(f"{folder}: holds other files than {content}, which would be lost; choose another folder")


def check_space(path: Path, needed: int) -> None:
    """Check before long work that the disk has room for its output.

    Args:
        path: Where it will be written; may not exist yet.
        needed: In bytes.

    Raises:
        UserError: It has not.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{path}: {free / 1e6:,.0f} MB are free, but the run needs {needed / 1e6:,.0f} MB")


def file_sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is not valid JSON; names the file and the position.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # invalid JSON or invalid UTF-8
        raise UserError(f"{path}: not valid JSON: {error}") from error


def _rename_onto(new: Path, path: Path, aside: Path) -> None:
    """Rename `new` to `path`. A rename can't replace a folder with files, so an old one is first moved to `aside`."""
    if not path.is_dir() or path.is_symlink():
        os.replace(new, path)
        return
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise


def _sync_all(path: Path) -> None:
    for inner in path.rglob("*") if path.is_dir() else ():
        _sync(inner)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
