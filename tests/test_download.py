"""PubMed's files are downloaded completely and verified, or not at all, even if servers and networks fail."""

import filecmp
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ncbi_server import NcbiServer, write_pubmed_file

from healthslm.corpus import download
from healthslm.corpus.download import DownloadOptions, download_pubmed, list_files, select_files
from healthslm.corpus.pubmed_files import find_pubmed_files
from healthslm.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_pubmed.py"


def name(number: int, year: int = 26) -> str:
    return f"pubmed{year}n{number:04d}.xml.gz"


def publish(folder: Path, path: str, size: int = 8_000) -> bytes:
    """Give the server a file that cannot be compressed."""
    return write_pubmed_file(folder / path, random.Random(path).randbytes(size))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NcbiServer]:
    """Serves baseline files 1 to 3 and update files 4 and 5."""
    folder = tmp_path / "ncbi"
    for number in range(1, 6):
        publish(folder, f"{'baseline' if number < 4 else 'updatefiles'}/{name(number)}")
    with NcbiServer(folder) as running:
        yield running


@pytest.fixture
def pubmed(tmp_path: Path) -> Path:
    return tmp_path / "home" / "pubmed"


@pytest.fixture
def fetch(server: NcbiServer, pubmed: Path) -> Callable[..., None]:
    """Download from the server: `fetch("latest", "3", connections=4)`."""

    def run(*files: str, **options: object) -> None:
        given = {"output": pubmed, "files": list(files), "base_url": server.base_url} | options
        download_pubmed(DownloadOptions(**given))

    return run


def tree(folder: Path) -> list[str]:
    """All files and folders below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def data_files(folder: Path) -> list[str]:
    """The files that a reader would take for PubMed files."""
    return [path for path in tree(folder) if path.endswith(".xml.gz") and ".partial-" not in path]


def assert_complete(pubmed: Path, server: NcbiServer, *numbers: int) -> None:
    """Exactly these files and their checksum files are there, with the server's bytes, and nothing else."""
    paths = [f"{'baseline' if number < 4 else 'updatefiles'}/{name(number)}" for number in numbers]
    folders = {path.partition("/")[0] for path in paths}
    assert tree(pubmed) == sorted([*folders, *paths, *(f"{path}.md5" for path in paths)])
    for path in [*paths, *(f"{path}.md5" for path in paths)]:
        assert (pubmed / path).read_bytes() == (server.folder / path).read_bytes(), path


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("timed out")


def test_real_files_are_downloaded_unchanged_to_where_the_corpus_reads_them(test_data: Path, pubmed: Path) -> None:
    with NcbiServer(test_data / "pubmed") as server:
        download_pubmed(DownloadOptions(output=pubmed, files=["all"], base_url=server.base_url))
    paths = [path.relative_to(pubmed) for path in find_pubmed_files(pubmed)]
    assert [path.name for path in paths] == [name(number) for number in range(1, 6)]
    for path in paths:
        assert filecmp.cmp(pubmed / path, test_data / "pubmed" / path, shallow=False)


def test_all_files_are_downloaded_with_their_checksum_files(server, pubmed, fetch) -> None:
    fetch("all")
    assert_complete(pubmed, server, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("files", "numbers"),
    [
        (["2"], [2]),
        (["2-4"], [2, 3, 4]),
        (["1-2,5"], [1, 2, 5]),
        (["5", "1-2"], [1, 2, 5]),
        (["2-3", "3-4"], [2, 3, 4]),
        (["latest", "2"], [4, 5]),
        (["latest 1"], [5]),
        (["latest", "9"], [1, 2, 3, 4, 5]),
    ],
)
def test_files_are_chosen_by_their_numbers(server, files, numbers) -> None:
    with download.open_session() as session:
        listed = list_files(session, server.base_url)
    chosen = select_files(listed, download._read_selection(files))
    assert [Path(path).name for path in chosen] == [name(number) for number in numbers]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "files: expected `all`, `latest N` or numbers such as `1-20`, got ''"),
        (["newest"], "files: expected `all`, `latest N` or numbers such as `1-20`, got 'newest'"),
        (["latest"], "files: expected `all`, `latest N` or numbers such as `1-20`, got 'latest'"),
        (["latest", "0"], "files: expected `all`, `latest N` or numbers such as `1-20`, got 'latest 0'"),
        (["all", "3"], "files: expected `all`, `latest N` or numbers such as `1-20`, got 'all 3'"),
        (["1-"], "files: expected `all`, `latest N` or numbers such as `1-20`, got '1-'"),
        (["3-1"], "files: 3-1: the first number is greater than the last"),
        (["3-7"], "files: 3-7: no file 6 is listed; the numbers are 1 to 5"),
        (["0"], "files: 0: no file 0 is listed; the numbers are 1 to 5"),
    ],
)
def test_a_wrong_selection_is_an_error_and_nothing_is_downloaded(server, pubmed, fetch, files, message) -> None:
    with pytest.raises(UserError) as caught:
        fetch(*files)
    assert str(caught.value) == message
    assert set(server.requests) <= {"baseline/", "updatefiles/"}
    assert not pubmed.exists()


@pytest.mark.parametrize("connections", [0, 5])
def test_a_wrong_number_of_connections_is_rejected(server, fetch, connections) -> None:
    message = f"^connections: must be at least 1 and at most 4, not {connections}$"
    with pytest.raises(UserError, match=message):
        fetch("all", connections=connections)
    assert server.requests == []


@pytest.mark.parametrize(
    "address", ["ftp://127.0.0.1/pubmed/", "file:///etc", "/pubmed", "127.0.0.1", "https:///pubmed"]
)
def test_addresses_without_http_are_rejected(fetch, address) -> None:
    with pytest.raises(UserError, match="^base_url: expected an address that begins with https:// or http://, got"):
        fetch("all", base_url=address)


def test_an_address_may_lack_its_last_slash(server, pubmed, fetch) -> None:
    fetch("1", base_url=server.base_url.rstrip("/"))
    assert_complete(pubmed, server, 1)


def test_a_second_run_requests_only_the_listings(server, pubmed, fetch) -> None:
    fetch("all")
    server.requests.clear()
    fetch("all")
    assert server.requests == ["baseline/", "updatefiles/"]
    assert_complete(pubmed, server, 1, 2, 3, 4, 5)


def test_a_file_without_checksum_file_is_verified_and_kept(server, pubmed, fetch) -> None:
    fetch("1-2")
    (pubmed / "baseline" / f"{name(1)}.md5").unlink()
    server.requests.clear()
    fetch("1-2")
    assert server.requests == ["baseline/", "updatefiles/", f"baseline/{name(1)}.md5"]
    assert_complete(pubmed, server, 1, 2)


@pytest.mark.parametrize("damage", ["cut short", "changed", "empty"])
def test_only_a_damaged_file_is_downloaded_again(server, pubmed, fetch, damage) -> None:
    fetch("all")
    path = pubmed / "baseline" / name(2)
    content = path.read_bytes()
    path.write_bytes({"cut short": content[:-1], "changed": b"\0" + content[1:], "empty": b""}[damage])
    server.requests.clear()
    fetch("all")
    assert server.requested(".xml.gz") == [f"baseline/{name(2)}"]
    assert_complete(pubmed, server, 1, 2, 3, 4, 5)


def test_a_damaged_checksum_file_is_downloaded_again_without_its_file(server, pubmed, fetch) -> None:
    fetch("1")
    (pubmed / "baseline" / f"{name(1)}.md5").write_bytes(b"\xff\xfe")
    server.requests.clear()
    fetch("1")
    assert server.requested(".xml.gz") == []
    assert_complete(pubmed, server, 1)


@pytest.mark.parametrize("fault", ["cut", 503, 429, "wrong bytes"])
@pytest.mark.parametrize("path", [f"baseline/{name(2)}", f"baseline/{name(2)}.md5"])
def test_a_file_or_checksum_file_that_fails_once_is_tried_again(server, pubmed, fetch, caplog, fault, path) -> None:
    server.faults[path] = [fault]
    fetch("1-3")
    assert server.requests.count(path) == 2
    assert_complete(pubmed, server, 1, 2, 3)
    [failure] = [record.getMessage() for record in caplog.records if "try 1 of 5" in record.getMessage()]
    assert failure.startswith(f"/pubmed/baseline/{name(2)}")


@pytest.mark.parametrize("fault", ["cut", 500])
@pytest.mark.parametrize("path", ["baseline/", "updatefiles/"])
def test_a_listing_that_fails_once_is_tried_again(server, pubmed, fetch, fault, path) -> None:
    server.faults[path] = [fault]
    fetch("all")
    assert server.requests.count(path) == 2
    assert_complete(pubmed, server, 1, 2, 3, 4, 5)


def test_a_listing_that_always_fails_is_tried_five_times(server, pubmed, fetch) -> None:
    server.faults["baseline/"] = [503] * 100
    with pytest.raises(UserError, match=f"^{server.base_url}baseline/: cannot read the listing: 503 Server Error"):
        fetch("all")
    assert server.requests == ["baseline/"] * 5
    assert not pubmed.exists()


@pytest.mark.parametrize(
    ("path", "fault"),
    [(f"baseline/{name(2)}", "cut"), (f"baseline/{name(2)}", "wrong bytes"), (f"baseline/{name(2)}.md5", 503)],
)
def test_a_file_that_always_fails_is_tried_five_times_and_the_others_are_downloaded(
    server, pubmed, fetch, caplog, path, fault
) -> None:
    server.faults[path] = [fault] * 100
    with pytest.raises(UserError, match=r"^1 of 5 files are missing \(see above\); run the command again$"):
        fetch("all")
    assert server.requests.count(path) == 5
    assert_complete(pubmed, server, 1, 3, 4, 5)
    [line] = [record.getMessage() for record in caplog.records if "not downloaded" in record.getMessage()]
    reason = {"cut": "IncompleteRead", "wrong bytes": "wrong checksum: ", 503: "503 Server Error"}[fault]
    assert line.startswith(f"{server.base_url}baseline/{name(2)}: not downloaded: {reason}") and "\n" not in line

    server.faults.clear()
    server.requests.clear()
    fetch("all")
    assert server.requested(".xml.gz") == [f"baseline/{name(2)}"]
    assert_complete(pubmed, server, 1, 2, 3, 4, 5)


def waits(server: NcbiServer, path: str) -> list[float]:
    """The seconds between the requests for a path."""
    times = [time for requested, time in zip(server.requests, server.times, strict=True) if requested == path]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.mark.parametrize("fault", [503, "wrong bytes"])
def test_waits_between_tries_double(server, fetch, caplog, monkeypatch, fault) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.05)
    server.faults[f"baseline/{name(2)}"] = [fault] * 100
    with pytest.raises(UserError):
        fetch("2")
    expected = [0, 0.1, 0.2, 0.4]
    assert all(wait >= least for wait, least in zip(waits(server, f"baseline/{name(2)}"), expected, strict=True))
    announced = [record.getMessage().rpartition("next try in ")[2] for record in caplog.records]
    assert [text for text in announced if text.endswith(" s")] == ["0 s", "0.1 s", "0.2 s", "0.4 s"]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("path", ["baseline/", f"baseline/{name(1)}"])
def test_the_server_decides_how_long_to_wait(server, pubmed, fetch, caplog, status, path) -> None:
    server.faults[path] = [status]
    server.retry_after = "1"
    fetch("1")
    [wait] = waits(server, path)
    assert 1 <= wait < 5
    assert f"try 1 of 5 failed: {status} " in caplog.text and "next try in 1 s" in caplog.text
    assert_complete(pubmed, server, 1)


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("ending", ["", ".md5"])
def test_permanent_errors_are_not_tried_again(server, pubmed, fetch, caplog, status, ending) -> None:
    path = f"baseline/{name(2)}{ending}"
    server.faults[path] = [status] * 100
    with pytest.raises(UserError, match="^1 of 3 files are missing"):
        fetch("1-3")
    assert server.requests.count(path) == 1
    assert_complete(pubmed, server, 1, 3)
    assert f"{name(2)}: not downloaded: {status} Client Error" in caplog.text


def test_a_missing_listing_is_an_error_that_names_it(server, fetch) -> None:
    server.faults["updatefiles/"] = [404]
    with pytest.raises(UserError, match=f"^{server.base_url}updatefiles/: cannot read the listing: 404 Client Error"):
        fetch("1")


def test_a_missing_server_is_a_short_error(fetch) -> None:
    with NcbiServer(Path("nowhere")) as gone:
        address = gone.base_url
    with pytest.raises(
        UserError, match=rf"^{address}baseline/: cannot read the listing: \[Errno \d+\] Connection refused$"
    ):
        fetch("1", base_url=address)


@pytest.mark.parametrize("path", ["baseline/", f"baseline/{name(1)}.md5", f"baseline/{name(1)}"])
def test_a_silent_server_times_out(server, pubmed, fetch, caplog, monkeypatch, path) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.faults[path] = ["silent"]
    fetch("1")
    assert "timed out" in caplog.text
    assert_complete(pubmed, server, 1)


def test_a_server_that_falls_silent_within_a_file_times_out(server, pubmed, fetch, monkeypatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.gate.clear()
    with pytest.raises(UserError, match="^1 of 1 files are missing"):
        fetch("1")
    assert server.requests.count(f"baseline/{name(1)}") == 5
    assert data_files(pubmed) == []


@pytest.mark.parametrize(
    "content",
    ["", "{md5}  {name}\n", "MD5(pubmed26n0002.xml.gz)= {md5}\n", "MD5({name})= 12ab\n", "<html>Please log in</html>"],
)
def test_a_checksum_file_in_another_format_is_an_error_that_names_it(server, pubmed, fetch, caplog, content) -> None:
    path = server.folder / "baseline" / f"{name(1)}.md5"
    md5 = path.read_text().split()[-1]
    path.write_text(content.format(md5=md5, name=name(1)))
    with pytest.raises(UserError, match="^1 of 1 files are missing"):
        fetch("1")
    expected = f"{server.base_url}baseline/{name(1)}.md5: expected one line `MD5({name(1)})= …`, got"
    assert f"not downloaded: {expected}" in caplog.text
    assert data_files(pubmed) == []


ODD_LINKS = [
    "../pubmed26n0001.xml.gz",
    "../../pubmed26n0001.xml.gz",
    "../../../../../../tmp/pubmed26n0001.xml.gz",
    "/pubmed26n0001.xml.gz",
    "%2e%2e%2fpubmed26n0001.xml.gz",
    "%2e%2e/%2e%2e/pubmed26n0001.xml.gz",
    "..\\pubmed26n0001.xml.gz",
    "..%5cpubmed26n0001.xml.gz",
    "sub/pubmed26n0001.xml.gz",
    "https://example.org/pubmed26n0001.xml.gz",
    "file:///pubmed26n0001.xml.gz",
    "PUBMED26N0001.XML.GZ",
    "pubmed26n0001.xml.gz?x=.xml.gz",
    "pubmed26n0001.xml.gz%00.xml.gz",
    "pubmed26n٠٠٠١.xml.gz",
    "pubmed26n0001.xml.gz.xml.gz",
    "pubmed26n00001.xml.gz",
    "..",
    ".",
    "/",
]


def test_links_that_are_not_plain_names_are_ignored(server, pubmed, fetch, tmp_path, caplog) -> None:
    (server.folder / "baseline" / name(1)).rename(server.folder / "kept")  # so that only the odd links lead to it
    server.odd_links = ODD_LINKS
    before = tree(tmp_path)
    fetch("all")
    assert sorted(set(tree(tmp_path)) - set(before))[:2] == ["home", "home/pubmed"]
    assert_complete(pubmed, server, 2, 3, 4, 5)
    assert [path for path in server.requests if "0001" in path] == []
    for link in ODD_LINKS:
        assert (f"baseline/: ignored {link!r}" in caplog.text) == link.endswith(".xml.gz")


def test_two_years_in_a_listing_are_rejected(server, pubmed, fetch) -> None:
    publish(server.folder, f"baseline/{name(7, year=25)}")
    with pytest.raises(UserError, match=r"pubmed26n0001.xml.gz: from another year than .*pubmed25n0007.xml.gz: "):
        fetch("1")
    assert not pubmed.exists()


def test_a_baseline_of_one_year_and_updates_of_another_are_rejected(server, pubmed, fetch) -> None:
    for number in (4, 5):
        (server.folder / "updatefiles" / name(number)).unlink()
    publish(server.folder, f"updatefiles/{name(4, year=27)}")
    with pytest.raises(UserError, match=r"pubmed27n0004.xml.gz: from another year than .*pubmed26n0001.xml.gz: "):
        fetch("1")
    assert not pubmed.exists()


@pytest.mark.parametrize(
    "there", ["baseline/pubmed25n0001.xml.gz", "updatefiles/pubmed27n0009.xml", "pubmed25n0001.xml"]
)
def test_a_folder_with_files_from_another_year_is_rejected_and_unchanged(server, pubmed, fetch, there) -> None:
    write_pubmed_file(pubmed / there, b"another year")
    before = tree(pubmed)
    with pytest.raises(UserError) as caught:
        fetch("all")
    assert str(caught.value) == (
        f"{server.base_url}baseline/{name(1)}: from another year than {pubmed / there}: PubMed's files of one year "
        "replace all earlier ones; remove the older ones or choose another folder"
    )
    assert tree(pubmed) == before
    assert server.requested(".gz") == []


def test_the_next_year_has_another_prefix_and_works_the_same(pubmed, tmp_path) -> None:
    content = publish(tmp_path / "ncbi", f"baseline/{name(1, year=31)}")
    with NcbiServer(tmp_path / "ncbi") as server:
        download_pubmed(DownloadOptions(output=pubmed, files=["all"], base_url=server.base_url))
    assert (pubmed / "baseline" / "pubmed31n0001.xml.gz").read_bytes() == content


def test_a_number_listed_in_both_folders_is_an_error(server, fetch) -> None:
    publish(server.folder, f"updatefiles/{name(3)}")
    message = f"updatefiles/{name(3)}: is also listed as baseline/{name(3)}; only one of them can be right$"
    with pytest.raises(UserError, match=message):
        fetch("all")


def test_a_server_without_pubmed_files_is_an_error(fetch, tmp_path) -> None:
    with (
        NcbiServer(tmp_path / "nothing") as empty,
        pytest.raises(UserError, match="neither baseline/ nor updatefiles/"),
    ):
        fetch("all", base_url=empty.base_url)


@pytest.mark.parametrize("connections", [1, 2, 4])
def test_as_many_files_are_downloaded_in_parallel_as_there_are_connections(server, pubmed, fetch, connections) -> None:
    server.gate.clear()
    # The connection of the failed try must be reused or closed.
    server.faults[f"baseline/{name(1)}"] = [503]
    thread = threading.Thread(target=fetch, args=("all",), kwargs={"connections": connections})
    thread.start()
    wait_until(lambda: server.at_once == connections)
    time.sleep(0.3)  # time for another request to start, and for unused connections to close
    assert (server.at_once, server.open_connections) == (connections, connections)
    assert data_files(pubmed) == []  # they are all incomplete
    server.gate.set()
    thread.join()
    assert server.most_at_once == connections
    assert_complete(pubmed, server, 1, 2, 3, 4, 5)


def test_an_output_that_is_a_file_is_rejected(server, fetch, tmp_path) -> None:
    (tmp_path / "pubmed").write_text("mine")
    with pytest.raises(UserError, match=f"^{tmp_path / 'pubmed'}: is a file"):
        fetch("1", output=tmp_path / "pubmed")
    assert (tmp_path / "pubmed").read_text() == "mine" and server.requests == []


def test_two_files_are_downloaded_in_parallel_by_default() -> None:
    assert DownloadOptions(output=Path("pubmed"), files=["all"]).connections == 2


def start(server: NcbiServer, pubmed: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--output", pubmed, "--base-url", server.base_url, *arguments]
    # Children of a shell in the background ignore interrupts by default.
    return subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def stop_in_the_middle(server: NcbiServer, pubmed: Path, how: signal.Signals) -> tuple[int, str]:
    """Start to download files 1 and 2, and stop the process once part of each is on disk."""
    for number in (1, 2):
        publish(server.folder, f"baseline/{name(number)}", size=4 * download.BLOCK_BYTES)
    server.gate.clear()
    process = start(server, pubmed, "--files", "1-2")
    wait_until(lambda: sum(path.stat().st_size > 0 for path in pubmed.glob("*/.*/*.gz")) == 2)
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)  # less than the timeout for a silent server
    server.gate.set()
    return process.returncode, errors


def test_a_killed_run_leaves_no_incomplete_file_and_the_next_run_completes(server, pubmed, run_script) -> None:
    status, _ = stop_in_the_middle(server, pubmed, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert data_files(pubmed) == []
    assert len(list(pubmed.glob("baseline/.*.partial-*"))) == 2
    with pytest.raises(UserError, match=r"no PubMed files"):
        find_pubmed_files(pubmed)
    done = run_script("download_pubmed", "--output", pubmed, "--files", "1-2", "--base-url", server.base_url)
    assert done.returncode == 0, done.stderr
    assert_complete(pubmed, server, 1, 2)


def test_an_interrupted_run_ends_at_once_with_one_line_and_leaves_nothing(server, pubmed) -> None:
    status, errors = stop_in_the_middle(server, pubmed, signal.SIGINT)
    assert status == 130
    assert errors.endswith("\ninterrupted\n") and "Traceback" not in errors
    assert set(tree(pubmed)) <= {"baseline"}


def test_the_script_shows_terms_files_and_bytes(server, pubmed, run_script) -> None:
    arguments = ("--output", pubmed, "--base-url", server.base_url, "--files", "latest", "3")
    done = run_script("download_pubmed", *arguments)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("Courtesy of the U.S. National Library of Medicine") == 1
    assert done.stderr.count("https://www.nlm.nih.gov/databases/download/terms_and_conditions.html") == 1
    size = sum(path.stat().st_size for path in pubmed.rglob("*.xml.gz"))
    assert f"3/3 files: 100%|██████████| {size / 1000:.1f}k/{size / 1000:.1f}k [" in done.stderr
    assert done.stderr.endswith(f"{pubmed}: all 3 files are complete and verified\n")
    assert_complete(pubmed, server, 3, 4, 5)


def test_errors_of_the_script_are_one_line_and_a_status(server, pubmed, run_script) -> None:
    arguments = ("--output", pubmed, "--base-url", server.base_url)
    done = run_script("download_pubmed", *arguments, "--files", "1-20")
    message = "error: files: 1-20: no file 6 is listed; the numbers are 1 to 5\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)

    server.faults[f"baseline/{name(1)}"] = [404]
    done = run_script("download_pubmed", *arguments, "--files", "1-2")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1] == "error: 1 of 2 files are missing (see above); run the command again"
    assert sum(f"{name(1)}: not downloaded: 404 Client Error: Not Found" in line for line in lines) == 1
    assert_complete(pubmed, server, 2)


def test_a_full_disk_ends_the_run_with_one_line_that_names_the_file(server, small_disk, run_script) -> None:
    (small_disk / "ballast").write_bytes(bytes(56_000))
    done = run_script("download_pubmed", "--output", small_disk, "--files", "all", "--base-url", server.base_url)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {small_disk}/baseline/pubmed26n000") and "no space left" in last.lower()
    assert len(server.requested(".xml.gz")) < 5  # later files would fail too
    for path in data_files(small_disk):
        assert (small_disk / path).read_bytes() == (server.folder / path).read_bytes()
