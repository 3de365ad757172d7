"""Downloading PubMed: NCBI's baseline and update files, each of them whole and verified or not there at all.

    https://ftp.ncbi.nlm.nih.gov/pubmed/{baseline,updatefiles}/ -> pubmed/{baseline,updatefiles}/

Beside every file NCBI keeps a sidecar, NAME.md5, of one line: `MD5(pubmed26n0001.xml.gz)= e2ba…`. It is kept here too,
so a later run asks the server for the two listings and for what is missing or damaged, and for nothing else. A file
that NCBI replaces under its old name is seen when its sidecar here is removed. One run at a time writes to a folder.
"""

import io
import logging
import re
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

import pooch
import requests
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from healthslm.corpus.options import DownloadOptions
from healthslm.corpus.pubmed_files import FOLDERS, file_number, refuse_two_years
from healthslm.errors import UserError
from healthslm.files import remove_partials, replacing

logger = logging.getLogger(__name__)

TERMS = (
    "Courtesy of the U.S. National Library of Medicine, which endorses neither this project nor what is made of its "
    "data.\nWhat you keep may not be the most current data that NLM has. Its terms apply: "
    "https://www.nlm.nih.gov/databases/download/terms_and_conditions.html"
)
TRIES = 5
FIRST_WAIT = 1.0  # seconds between the first two tries; each wait after it is twice as long
TIMEOUT = 30.0  # seconds without a byte from the server
CHUNK_SIZE = 1 << 18  # bytes

_SELECTION = re.compile(r"all|latest [1-9][0-9]*|[0-9]+(-[0-9]+)?( [0-9]+(-[0-9]+)?)*")
_PASSING_STATUS = {408, 429}  # client errors that time may mend: request timeout, too many requests

Result = TypeVar("Result")


class FetchError(Exception):
    """A request that failed: the message says why, `permanent` whether another try would be in vain."""

    def __init__(self, reason: str, permanent: bool = False):
        super().__init__(reason)
        self.permanent = permanent


def download_pubmed(options: DownloadOptions) -> None:
    """Download the chosen files that are not yet there, or not valid: valid is what has the md5 of its sidecar.

    Raises:
        UserError: An option cannot work, the listing cannot be read or lacks a chosen file, files of two years would be
            mixed, or files failed in spite of all tries, after the others were fetched.
    """
    selection = _read_selection(options.files)
    _check_address(options.base_url)
    base_url = options.base_url.rstrip("/") + "/"
    paths = select_files(list_files(base_url), selection)
    there = [str(path) for folder in ("", *FOLDERS) for path in (options.output / folder).glob("pubmed*.xml*")]
    refuse_two_years([*sorted(there), base_url + paths[0]], ": remove the older ones, or name another folder")

    logger.info(TERMS)
    _remove_partial_files(options.output)
    try:
        failed = _fetch_all(paths, base_url, options.output, options.connections)
    finally:
        _remove_partial_files(options.output)
    if failed:
        raise UserError(f"{failed:,} of {len(paths):,} files missing (see above): run the command again for the rest")
    logger.info("%s: all %s files are there and verified", options.output, f"{len(paths):,}")


def _read_selection(files: list[str]) -> str:
    """Return the option `files` in its one form, `all`, `latest 3` or `1-20 1334`."""
    selection = " ".join(" ".join(files).replace(",", " ").split())
    if not _SELECTION.fullmatch(selection):
        raise UserError(f"files: expected `all`, `latest N` or numbers such as `1-20`, got {selection!r}")
    return selection


def _check_address(base_url: str) -> None:
    address = urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UserError(f"base_url: expected an address that begins with https:// or http://, got {base_url!r}")


def list_files(base_url: str) -> dict[int, str]:
    """Read both listings; return `baseline/pubmed26n0001.xml.gz` by the number in the name.

    Raises:
        UserError: A listing cannot be read, there are no PubMed files, those of two years, or one in both folders.
    """
    paths = [f"{folder}/{name}" for folder in FOLDERS for name in _list_names(f"{base_url}{folder}/")]
    if not paths:
        raise UserError(f"{base_url}: neither baseline/ nor updatefiles/ lists a file such as pubmed26n0001.xml.gz")
    refuse_two_years([base_url + path for path in paths], ": wait until the server has replaced all of them")
    files: dict[int, str] = {}
    for path in paths:
        other = files.setdefault(file_number(path.rpartition("/")[2]), path)
        if other != path:
            raise UserError(f"{base_url}{path}: listed as {other} too: one of them must be wrong")
    return files


def _list_names(url: str) -> list[str]:
    """The PubMed files that a listing links to: by a bare name, which cannot lead out of the folder."""
    try:
        page = with_retries(url, lambda: _get_text(url))
    except FetchError as error:
        raise UserError(f"{url}: no listing: {error}") from error
    links = _Links()
    links.feed(page)
    for target in links.targets:
        if target.endswith(".xml.gz") and file_number(target) is None:
            logger.warning("%s: refused %r: not the plain name of a PubMed file", url, target)
    return [target for target in links.targets if file_number(target) is not None]


class _Links(HTMLParser):
    """Collects what a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for name, value in attrs if name == "href" and value]


def select_files(files: dict[int, str], selection: str) -> list[str]:
    """Return the paths that `all`, `latest 3` or `1-20 1334` selects, in the order of their numbers.

    Raises:
        UserError: A number is not among the files.
    """
    match selection.split():
        case ["all"]:
            numbers = sorted(files)
        case ["latest", count]:
            numbers = sorted(files)[-int(count) :]
        case ranges:
            numbers = sorted({number for text in ranges for number in _numbers(text, files)})
    return [files[number] for number in numbers]


def _numbers(text: str, files: dict[int, str]) -> range:
    first, _, last = text.partition("-")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise UserError(f"files: {text}: the first number is above the last")
    missing = next((number for number in numbers if number not in files), None)
    if missing is not None:
        raise UserError(f"files: {text}: no file {missing} is listed: there are {min(files)} to {max(files)}")
    return numbers


def _fetch_all(paths: list[str], base_url: str, output: Path, connections: int) -> int:
    """Fetch files under a progress bar; return how many failed."""

    def fetch(path: str) -> tuple[str, FetchError | None]:
        file_progress = progress.add_file()
        try:
            fetch_file(base_url + path, output / path, file_progress)
        except FetchError as error:
            file_progress.reset()
            return path, error
        return path, None

    failed = 0
    # The threads of this pool are daemons: an interrupt ends the process without waiting for what they wait for.
    with logging_redirect_tqdm(), _Progress(len(paths)) as progress, ThreadPool(connections) as pool:
        for path, error in pool.imap_unordered(fetch, paths):
            if error is None:
                progress.count_file()
            else:
                failed += 1
                logger.error("%s: not fetched: %s", base_url + path, error)
    return failed


class FileProgress:
    """The bytes of one file, as pooch tells of them: it sets `total` and calls the methods."""

    def __init__(self, show: Callable[[], None]):
        self.total = self.bytes = 0
        self.show = show

    def update(self, count: int) -> None:
        self.bytes = min(self.bytes + count, self.total)  # pooch counts whole chunks, the last one too
        self.show()

    def reset(self) -> None:
        self.bytes = 0

    def close(self) -> None:
        self.show()


class _Progress:
    """One bar of files and bytes, on which several threads show theirs.

    Listings give no exact sizes: the total is the number of files times the mean size of those begun.
    """

    def __init__(self, files: int):
        self.files, self.done = files, 0
        self.parts: list[FileProgress] = []
        self.bar = tqdm(desc=f"0/{files:,} files", unit="B", unit_scale=True, file=sys.stderr)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add_file(self) -> FileProgress:
        self.parts.append(FileProgress(self.show))
        return self.parts[-1]

    def count_file(self) -> None:
        self.done += 1
        self.bar.set_description(f"{self.done:,}/{self.files:,} files")

    def show(self) -> None:
        if sizes := [part.total for part in self.parts if part.total]:
            self.bar.total = self.files * sum(sizes) // len(sizes)
        self.bar.update(sum(part.bytes for part in self.parts) - self.bar.n)


def fetch_file(url: str, path: Path, progress: FileProgress) -> None:
    """Make `path` the file at `url`, with its sidecar beside it, unless it is there and valid.

    Raises:
        FetchError: All tries failed, or one in a way that no other could mend; says how the last one did.
    """
    sidecar = path.with_name(f"{path.name}.md5")
    if not _is_valid(path, sidecar):
        with_retries(url, lambda: _fetch_once(url, path, sidecar, progress))
    progress.total = path.stat().st_size
    progress.update(progress.total)


def _is_valid(path: Path, sidecar: Path) -> bool:
    if not (path.exists() and sidecar.exists()):
        return False
    return pooch.file_hash(path, "md5") == _read_md5(sidecar.read_text(encoding="utf-8", errors="replace"), path.name)


def _fetch_once(url: str, path: Path, sidecar: Path, progress: FileProgress) -> None:
    text = _get_text(f"{url}.md5")
    md5 = _read_md5(text, path.name)
    if md5 is None:
        raise FetchError(f"{url}.md5: expected one line `MD5({path.name})= …`, got {text[:80]!r}")
    if not path.exists() or pooch.file_hash(path, "md5") != md5:
        progress.reset()
        with replacing(path) as new:
            get(url, str(new), progress)
            found = pooch.file_hash(new, "md5")
            if found != md5:
                raise FetchError(f"wrong bytes: their md5 is {found}, the sidecar's {md5}")
    with replacing(sidecar) as new:
        new.write_text(text, encoding="utf-8")


def _read_md5(text: str, name: str) -> str | None:
    """The md5 in a sidecar of NCBI's format; None where it has another format, or is of another file."""
    match = re.fullmatch(rf"MD5\({re.escape(name)}\)= ?([0-9a-f]{{32}})\s*", text)
    return match[1] if match else None


def with_retries(url: str, attempt: Callable[[], Result]) -> Result:
    for tried in range(1, TRIES):
        try:
            return attempt()
        except FetchError as error:
            if error.permanent:
                raise
            wait = FIRST_WAIT * 2 ** (tried - 1)
            logger.warning("%s: try %d of %d: %s: next try in %g s", url, tried, TRIES, error, wait)
        time.sleep(wait)
    return attempt()


def _get_text(url: str) -> str:
    content = io.BytesIO()
    get(url, content)
    return content.getvalue().decode("utf-8", "replace")


def get(url: str, output: str | IO[bytes], progress: FileProgress | bool = False) -> None:
    """Write what a URL gives to a path or a file; raises FetchError."""
    headers = {"Accept-Encoding": "identity"}  # the bytes as they are stored: those of which the sidecar tells
    download = pooch.HTTPDownloader(progressbar=progress, chunk_size=CHUNK_SIZE, timeout=TIMEOUT, headers=headers)
    try:
        download(url, output, None)
    except requests.RequestException as error:
        status = None
        if error.response is not None:
            status = error.response.status_code
            error.response.close()  # it would stay open while we wait for the next try
        permanent = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
        raise FetchError(_root_cause(error), permanent) from None


def _root_cause(error: BaseException) -> str:
    """What the socket or the server said, below what requests and urllib3 wrap around it."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def _remove_partial_files(folder: Path) -> None:
    """Remove what is left of files when a run is killed, or ends before its threads."""
    for inner in FOLDERS:
        remove_partials(folder / inner)
