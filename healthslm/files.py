"""Files that exist whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from healthslm.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path at which the caller creates a file or a folder that becomes `path`.

    When the block ends without an error, what was created is synced to disk and renamed onto `path`, in the place of a
    file or folder that was there; otherwise it is removed and `path` stays as it was. The temporary path has the name
    of `path`, so that writers which look at the suffix see the right one, and lies on the same file system, in a hidden
    folder `.NAME.partial-*` beside `path`. Missing parent folders are created.

    Raises:
        UserError: the disk is full; names `path`.
        OSError: another failure of writing; names `path` where the system names no file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        new = partial / path.name
        yield new
        _sync_all(new)
        _rename_onto(new, path, aside=partial / f"{path.name}.old")
        _sync(path.parent)
    except Exception as error:
        # Rust libraries (safetensors, tokenizers) and Arrow report a full disk by its text alone.
        if "No space left on device" in str(error):
            raise UserError(f"{path}: no space left on device: free some and run the command again") from error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError that names the file and the place where it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON, or of the UTF-8 below it
        raise UserError(f"{path}: not valid JSON: {error}") from error


def _rename_onto(new: Path, path: Path, aside: Path) -> None:
    """Rename `new` to `path`. No call replaces a folder that holds files, so an old one is first put `aside`."""
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
    """Wait until the file, or the list of a folder's entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
