"""NCBI's PubMed files: pubmed26n0001.xml.gz is file 1 of 2026. The files of a year replace all earlier ones."""

import re
from collections.abc import Iterable
from pathlib import Path

from healthslm.errors import UserError

FOLDERS = ("baseline", "updatefiles")

_NAME = re.compile(r"pubmed([0-9]{2})n([0-9]+)\.xml(\.gz)?")


def file_name(path: Path) -> str:
    """The name of an XML file without its suffixes, such as pubmed26n0001."""
    return path.name.removesuffix(".gz").removesuffix(".xml")


def file_number(name: str) -> int | None:
    """The number in the name of one of NCBI's compressed files; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[2]) if match and match[3] and len(match[2]) == 4 else None


def refuse_two_years(locations: Iterable[str], advice: str = "") -> None:
    """Raise a UserError that ends in `advice` if files are from different years. Other names are ignored."""
    by_year: dict[str, str] = {}
    for location in locations:
        if match := _NAME.fullmatch(location.rpartition("/")[2]):
            by_year.setdefault(match[1], location)
    if len(by_year) > 1:
        first, second, *_ = by_year.values()
        raise UserError(
            f"{second}: from another year than {first}: PubMed's files of one year replace all earlier ones{advice}"
        )


def find_pubmed_files(folder: Path) -> list[Path]:
    """List the XML files of a folder in the order in which their records apply, which is that of their names.

    Raises:
        UserError: There are none, two have the same name, or they are from different years.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = [path for path in map(folder.joinpath, FOLDERS) if path.is_dir()] or [folder]
    files = [path for inner in folders for path in inner.iterdir() if path.name.endswith((".xml", ".xml.gz"))]
    if not files:
        raise UserError(f"{folder}: no PubMed files (.xml, .xml.gz) in this folder")
    files.sort(key=lambda path: path.name)
    by_name: dict[str, Path] = {}
    for path in files:
        other = by_name.setdefault(file_name(path), path)
        if other is not path:
            raise UserError(f"{path}: has the same name as {other}; remove one of them")
    refuse_two_years(map(str, files))
    return files
