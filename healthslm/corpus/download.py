"""Downloading PubMed: NCBI's baseline and update files. A file appears once it is complete and verified.

    https://ftp.ncbi.nlm.nih.gov/pubmed/{baseline,updatefiles}/ -> pubmed/{baseline,updatefiles}/

For every file NCBI publishes a checksum file, NAME.md5, with one line: `MD5(pubmed26n0001.xml.gz)= e2ba…`. It is saved
too, so a later run requests only the two listings and the files that are missing or damaged. To download a file that
NCBI has replaced under the same name, remove its checksum file first. Only one run at a time may write to a folder.
"""

import hashlib
import io
import logging
import re
import sys
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar
from urllib.parse import urlsplit

import requests
from lxml import etree
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from urllib3 import BaseHTTPResponse
from urllib3.connectionpool import ConnectionPool
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from healthslm.corpus.options import MAX_CONNECTIONS, DownloadOptions
from healthslm.corpus.pubmed_files import FOLDERS, file_number, refuse_two_years
from healthslm.errors import UserError
from healthslm.files import check_output_folder, remove_partials, replacing

logger = logging.getLogger(__name__)

TERMS = (
    "Courtesy of the U.S. National Library of Medicine, which endorses neither this project nor what is made of its "
    "data.\nWhat you keep may not be the most current data that NLM has. Its terms apply: "
    "https://www.nlm.nih.gov/databases/download/terms_and_conditions.html"
)
TRIES = 5
BACKOFF = 1.0  # seconds; the waits between tries are 0, 2, 4 and 8 times this, or what the server asks for
TIMEOUT = 30.0  # seconds without a byte from the server
BLOCK_BYTES = 1 << 18
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)

_SELECTION = re.compile(r"all|latest [1-9][0-9]*|[0-9]+(-[0-9]+)?( [0-9]+(-[0-9]+)?)*")

Result = TypeVar("Result")


class FetchError(Exception):
    """A request failed. The message gives the reason in one line."""


class TransferError(FetchError):
    """A file arrived incomplete or damaged; another try may succeed."""


def download_pubmed(options: DownloadOptions) -> None:
    """Download the chosen files that are missing or do not match their checksum.

    Raises:
        UserError: An option is invalid, a listing cannot be read or lacks a chosen file, files from two years would be
            mixed, or files still fail after all tries; the others are downloaded first.
    """
    selection = _read_selection(options.files)
    _check_address(options.base_url)
    check_output_folder(options.output, "the download", lambda folder: True)
    base_url = options.base_url.rstrip("/") + "/"
    with open_session() as session:
        paths = select_files(list_files(session, base_url), selection)
        existing = [str(path) for folder in ("", *FOLDERS) for path in (options.output / folder).glob("pubmed*.xml*")]
        refuse_two_years([*sorted(existing), base_url + paths[0]], "; remove the older ones or choose another folder")

        logger.info(TERMS)
        _remove_partial_files(options.output)
        try:
            failed = _fetch_all(session, paths, base_url, options.output, options.connections)
        finally:
            _remove_partial_files(options.output)
    if failed:
        raise UserError(f"{failed:,} of {len(paths):,} files are missing (see above); run the command again")
    logger.info("%s: all %s files are complete and verified", options.output, f"{len(paths):,}")


def _read_selection(files: list[str]) -> str:
    """Normalize the option `files` to `all`, `latest 3` or `1-20 1334`."""
    selection = " ".join(" ".join(files).replace(",", " ").split())
    if not _SELECTION.fullmatch(selection):
        raise UserError(f"files: expected `all`, `latest N` or numbers such as `1-20`, got {selection!r}")
    return selection


def _check_address(base_url: str) -> None:
    address = urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UserError(f"base_url: expected an address that begins with https:// or http://, got {base_url!r}")


def list_files(session: requests.Session, base_url: str) -> dict[int, str]:
    """Read both listings and map the number of each file to its path, such as `baseline/pubmed26n0001.xml.gz`.

    Raises:
        UserError: A listing cannot be read; or there are no PubMed files, files from two years, or one in both folders.
    """
    listed = [
        (number, f"{folder}/{name}")
        for folder in FOLDERS
        for number, name in _list_names(session, f"{base_url}{folder}/")
    ]
    if not listed:
        raise UserError(f"{base_url}: neither baseline/ nor updatefiles/ lists a file such as pubmed26n0001.xml.gz")
    refuse_two_years([base_url + path for _, path in listed], "; wait until the server has replaced all of them")
    files: dict[int, str] = {}
    for number, path in listed:
        other = files.setdefault(number, path)
        if other != path:
            raise UserError(f"{base_url}{path}: is also listed as {other}; only one of them can be right")
    return files


def _list_names(session: requests.Session, url: str) -> list[tuple[int, str]]:
    """The numbers and names of the PubMed files in a listing. Links that lead out of the folder are ignored."""
    try:
        page = fetch_bytes(session, url)
    except FetchError as error:
        raise UserError(f"{url}: cannot read the listing: {error}") from error
    targets = etree.HTML(page or b"<html/>", etree.HTMLParser(encoding="utf-8")).xpath("//a/@href")
    numbered = [(file_number(target), str(target)) for target in targets]
    for number, target in numbered:
        if number is None and target.endswith(".xml.gz"):
            logger.warning("%s: ignored %r, which is not the plain name of a PubMed file", url, target)
    return [(number, target) for number, target in numbered if number is not None]


def select_files(files: dict[int, str], selection: str) -> list[str]:
    """Return the paths that `all`, `latest 3` or `1-20 1334` selects, ordered by number.

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
        raise UserError(f"files: {text}: the first number is greater than the last")
    missing = next((number for number in numbers if number not in files), None)
    if missing is not None:
        raise UserError(f"files: {text}: no file {missing} is listed; the numbers are {min(files)} to {max(files)}")
    return numbers


def _fetch_all(session: requests.Session, paths: list[str], base_url: str, output: Path, connections: int) -> int:
    """Fetch files under a progress bar; return how many failed."""

    def fetch(path: str) -> tuple[str, FetchError | None]:
        try:
            fetch_file(session, base_url + path, output / path, lambda done, size: progress.show(path, done, size))
        except FetchError as error:
            return path, error
        return path, None

    failed = 0
    # The threads of this pool are daemons: an interrupt ends the process without waiting for them.
    with logging_redirect_tqdm(), _Progress(paths) as progress, ThreadPool(connections) as pool:
        for path, error in pool.imap_unordered(fetch, paths):
            if error is None:
                progress.count_file()
            else:
                failed += 1
                progress.show(path, 0, 0)
                logger.error("%s: not downloaded: %s", base_url + path, error)
    return failed


class _Progress:
    """One progress bar in bytes for all files. Its total is estimated: number of files times the mean known size."""

    def __init__(self, paths: list[str]):
        self.files = 0
        self.done, self.sizes = dict.fromkeys(paths, 0), dict.fromkeys(paths, 0)
        self.bar = tqdm(desc=f"0/{len(paths):,} files", unit="B", unit_scale=True, file=sys.stderr)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def count_file(self) -> None:
        self.files += 1
        self.bar.set_description(f"{self.files:,}/{len(self.done):,} files")

    def show(self, path: str, done: int, size: int) -> None:
        """Show that `done` of the `size` bytes of a file have arrived."""
        self.done[path], self.sizes[path] = done, size
        if known := [size for size in self.sizes.values() if size]:
            self.bar.total = len(self.sizes) * sum(known) // len(known)
        self.bar.update(sum(self.done.values()) - self.bar.n)


def fetch_file(session: requests.Session, url: str, path: Path, show: Callable[[int, int], object]) -> None:
    """Download the file at `url` and its checksum file to `path`, unless a valid copy is there.

    Raises:
        FetchError: All tries failed, or the server gave an answer that another try cannot change.
    """
    checksum_file = path.with_name(f"{path.name}.md5")
    if not _is_valid(path, checksum_file):
        with_retries(url, lambda: _fetch_and_verify(session, url, path, checksum_file, show))
    show(path.stat().st_size, path.stat().st_size)


def _is_valid(path: Path, checksum_file: Path) -> bool:
    if not (path.exists() and checksum_file.exists()):
        return False
    return _md5(path) == _parse_checksum(checksum_file.read_text(encoding="utf-8", errors="replace"), path.name)


def _fetch_and_verify(
    session: requests.Session, url: str, path: Path, checksum_file: Path, show: Callable[[int, int], object]
) -> None:
    text = _fetch_bytes_once(session, f"{url}.md5").decode("utf-8", "replace")
    md5 = _parse_checksum(text, path.name)
    if md5 is None:
        raise TransferError(f"{url}.md5: expected one line `MD5({path.name})= …`, got {text[:80]!r}")
    if not path.exists() or _md5(path) != md5:
        with replacing(path) as new:
            with new.open("wb") as file:
                fetch(session, url, file, show)
            if (found := _md5(new)) != md5:
                raise TransferError(f"wrong checksum: the file has the MD5 {found}, not {md5}")
    with replacing(checksum_file) as new:
        new.write_text(text, encoding="utf-8")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _parse_checksum(text: str, name: str) -> str | None:
    """The MD5 in a checksum file of NCBI's format; None if it has another format or belongs to another file."""
    match = re.fullmatch(rf"MD5\({re.escape(name)}\)= ?([0-9a-f]{{32}})\s*", text)
    return match[1] if match else None


class _LoggedRetry(Retry):
    """Retries requests, and logs each failure."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: ConnectionPool | None = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        retry = super().increment(method, url, response, error, _pool, _stacktrace)  # raises after the last try
        reason, seconds = _root_cause(error) if error else "", retry.get_backoff_time()
        if response is not None:
            reason = f"{response.status} {response.reason}"
            seconds = retry.get_retry_after(response) or seconds
        message = "%s: try %d of %d failed: %s; next try in %g s"
        logger.warning(message, urlsplit(url or "").path, len(retry.history), TRIES, reason, seconds)
        return retry


def _make_retry() -> Retry:
    return _LoggedRetry(TRIES - 1, backoff_factor=BACKOFF, status_forcelist=RETRIED_STATUS, raise_on_status=False)


def open_session() -> requests.Session:
    """Open a session that retries connections that fail, servers that do not answer, and `RETRIED_STATUS`."""
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # the bytes as they are stored, to which the checksums belong
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=MAX_CONNECTIONS, max_retries=_make_retry()))
    return session


def with_retries(url: str, attempt: Callable[[], Result]) -> Result:
    """Call `attempt` until it raises no TransferError, with the same number of tries and waits as a session's.

    Raises:
        FetchError: The last try failed, or a try failed in another way.
    """
    retry = _make_retry()
    while True:
        try:
            return attempt()
        except TransferError as error:
            try:
                retry = retry.increment("GET", url, error=error)
            except MaxRetryError:
                raise error from None
            retry.sleep()


def fetch_bytes(session: requests.Session, url: str) -> bytes:
    """Return the content of a URL, with retries; raises FetchError."""
    return with_retries(url, lambda: _fetch_bytes_once(session, url))


def _fetch_bytes_once(session: requests.Session, url: str) -> bytes:
    content = io.BytesIO()
    fetch(session, url, content)
    return content.getvalue()


def fetch(
    session: requests.Session, url: str, output: IO[bytes], show: Callable[[int, int], object] = lambda done, size: None
) -> None:
    """Write the content of a URL to a file, and call `show` with the bytes that have arrived and their total.

    Raises:
        TransferError: The connection broke while the content was sent.
        FetchError: The request failed, after the session's retries.
    """
    try:
        with session.get(url, stream=True, timeout=TIMEOUT) as response:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0))
            _copy_content(response, output, lambda done: show(done, size))
    except requests.RequestException as error:
        raise FetchError(_root_cause(error)) from None


def _copy_content(response: requests.Response, output: IO[bytes], show: Callable[[int], object]) -> None:
    done = 0
    try:
        for block in response.iter_content(BLOCK_BYTES):
            output.write(block)
            done += len(block)
            show(done)
    except requests.RequestException as error:
        raise TransferError(_root_cause(error)) from None


def _root_cause(error: BaseException) -> str:
    """The message of the socket or the server, without what requests and urllib3 wrap around it."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def _remove_partial_files(folder: Path) -> None:
    """Remove the partial files of a run that was killed, or that ends before its threads."""
    for inner in FOLDERS:
        remove_partials(folder / inner)
