"""Fixtures of the tests of downloading: NCBI's server, a folder for its files, and quick retries."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ncbi_server import NcbiServer, write_pubmed_file

from healthslm.corpus import download
from healthslm.corpus.download import DownloadOptions, download_pubmed


def file_name(number: int, year: int = 26) -> str:
    return f"pubmed{year}n{number:04d}.xml.gz"


def publish(folder: Path, path: str, size: int = 8_000) -> bytes:
    """Give the server a file that cannot be compressed."""
    return write_pubmed_file(folder / path, random.Random(path).randbytes(size))


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def ncbi(tmp_path: Path) -> Iterator[NcbiServer]:
    """Serves baseline files 1 to 3 and update files 4 and 5."""
    folder = tmp_path / "ncbi"
    for number in range(1, 6):
        publish(folder, f"{'baseline' if number < 4 else 'updatefiles'}/{file_name(number)}")
    with NcbiServer(folder) as running:
        yield running


@pytest.fixture
def pubmed_folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "pubmed"


@pytest.fixture
def fetch_pubmed(ncbi: NcbiServer, pubmed_folder: Path) -> Callable[..., None]:
    """Download from the server: `fetch("latest", "3", connections=4)`."""

    def run(*files: str, **options: object) -> None:
        given = {"output": pubmed_folder, "files": list(files), "base_url": ncbi.base_url} | options
        download_pubmed(DownloadOptions(**given))

    return run


def tree(folder: Path) -> list[str]:
    """All files and folders below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def data_files(folder: Path) -> list[str]:
    """The files that a reader would take for PubMed files."""
    return [path for path in tree(folder) if path.endswith(".xml.gz") and ".partial-" not in path]


def assert_complete(pubmed_folder: Path, ncbi: NcbiServer, *numbers: int) -> None:
    """Exactly these files and their checksum files are there, with the server's bytes, and nothing else."""
    paths = [f"{'baseline' if number < 4 else 'updatefiles'}/{file_name(number)}" for number in numbers]
    folders = {path.partition("/")[0] for path in paths}
    assert tree(pubmed_folder) == sorted([*folders, *paths, *(f"{path}.md5" for path in paths)])
    for path in [*paths, *(f"{path}.md5" for path in paths)]:
        assert (pubmed_folder / path).read_bytes() == (ncbi.folder / path).read_bytes(), path
