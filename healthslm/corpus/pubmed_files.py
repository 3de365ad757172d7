"""NCBI's PubMed files by name: pubmed26n0001.xml.gz is file 1 of the year 2026, which replaces all earlier years."""

import re
from collections.abc import Iterable
from pathlib import Path

from healthslm.errors import UserError

FOLDERS = ("baseline", "updatefiles")

_NAME = re.compile(r"pubmed([0-9]{2})n([0-9]+)\.xml(\.gz)?")


def file_name(path: Path) -> str:
    """The name of an XML file without its suffixes: pubmed26n0001."""
    return path.name.removesuffix(".gz").removesuffix(".xml")


def file_number(name: str) -> int | None:
    """The number in a name as NCBI gives it to compressed files; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[2]) if match and match[3] and len(match[2]) == 4 else None


def refuse_two_years(locations: Iterable[str], advice: str = "") -> None:
    """Raise UserError, with the advice, where files are of different years; other names are passed over."""
    by_year: dict[str, str] = {}
    for location in locations:
        if match := _NAME.fullmatch(location.rpartition("/")[2]):
            by_year.setdefault(match[1], location)
    if len(by_year) > 1:
        first, second, *_ = by_year.values()
        raise UserError(
            f"{second}: of another year than {first}: PubMed's files of one year replace all earlier ones{advice}"
        )


def find_pubmed_files(folder: Path) -> list[Path]:
    """The XML files of a folder, in the order in which their records apply: that of their names.

    Raises:
        UserError: there are none, two have one name, or they are of two years.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = [path for path in map(folder.joinpath, FOLDERS) if path.is_dir()] or [folder]
    files = [path for inner in folders for path in inner.iterdir() if path.name.endswith((".xml", ".xml.gz"))]
    if not files:
        raise UserError(f"{folder}: no PubMed files (.xml, .xml.gz) in it")
    files.sort(key=lambda path: path.name)
    by_name: dict[str, Path] = {}
    for path in files:
        other = by_name.setdefault(file_name(path), path)
        if other is not path:
            raise UserError(f"{path}: has the name of {other}: remove one of them")
    refuse_two_years(map(str, files))
    return files
