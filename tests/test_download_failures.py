"""A download that fails is tried again or reported, and leaves no incomplete file, even if it is killed."""

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from download_fixtures import assert_complete, data_files, file_name, publish, tree
from ncbi_server import NcbiServer
from paths import REPOSITORY
from waiting import wait_until

from healthslm.corpus import download
from healthslm.corpus.pubmed_files import find_pubmed_files
from healthslm.errors import UserError

pytest_plugins = "download_fixtures"
pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.mark.parametrize("fault", ["cut", 503, 429, "wrong bytes"])
@pytest.mark.parametrize("path", [f"baseline/{file_name(2)}", f"baseline/{file_name(2)}.md5"])
def test_a_file_or_checksum_file_that_fails_once_is_tried_again(
    ncbi, pubmed_folder, fetch_pubmed, caplog, fault, path
) -> None:
    ncbi.faults[path] = [fault]
    fetch_pubmed("1-3")
    assert ncbi.requests.count(path) == 2
    assert_complete(pubmed_folder, ncbi, 1, 2, 3)
    [failure] = [record.getMessage() for record in caplog.records if "try 1 of 5" in record.getMessage()]
    assert failure.startswith(f"/pubmed/baseline/{file_name(2)}")


@pytest.mark.parametrize("fault", ["cut", 500])
@pytest.mark.parametrize("path", ["baseline/", "updatefiles/"])
def test_a_listing_that_fails_once_is_tried_again(ncbi, pubmed_folder, fetch_pubmed, fault, path) -> None:
    ncbi.faults[path] = [fault]
    fetch_pubmed("all")
    assert ncbi.requests.count(path) == 2
    assert_complete(pubmed_folder, ncbi, 1, 2, 3, 4, 5)


def test_a_listing_that_always_fails_is_tried_five_times(ncbi, pubmed_folder, fetch_pubmed) -> None:
    ncbi.faults["baseline/"] = [503] * 100
    with pytest.raises(UserError, match=f"^{ncbi.base_url}baseline/: cannot read the listing: 503 Server Error"):
        fetch_pubmed("all")
    assert ncbi.requests == ["baseline/"] * 5
    assert not pubmed_folder.exists()


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        (f"baseline/{file_name(2)}", "cut"),
        (f"baseline/{file_name(2)}", "wrong bytes"),
        (f"baseline/{file_name(2)}.md5", 503),
    ],
)
def test_a_file_that_always_fails_is_tried_five_times_and_the_others_are_downloaded(
    ncbi, pubmed_folder, fetch_pubmed, caplog, path, fault
) -> None:
    ncbi.faults[path] = [fault] * 100
    with pytest.raises(UserError, match=r"^1 of 5 files are missing \(see above\); run the command again$"):
        fetch_pubmed("all")
    assert ncbi.requests.count(path) == 5
    assert_complete(pubmed_folder, ncbi, 1, 3, 4, 5)
    [line] = [record.getMessage() for record in caplog.records if "not downloaded" in record.getMessage()]
    reason = {"cut": "IncompleteRead", "wrong bytes": "wrong checksum: ", 503: "503 Server Error"}[fault]
    assert line.startswith(f"{ncbi.base_url}baseline/{file_name(2)}: not downloaded: {reason}") and "\n" not in line

    ncbi.faults.clear()
    ncbi.requests.clear()
    fetch_pubmed("all")
    assert ncbi.requested(".xml.gz") == [f"baseline/{file_name(2)}"]
    assert_complete(pubmed_folder, ncbi, 1, 2, 3, 4, 5)


def waits(ncbi: NcbiServer, path: str) -> list[float]:
    """The seconds between the requests for a path."""
    times = [time for requested, time in zip(ncbi.requests, ncbi.times, strict=True) if requested == path]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.mark.parametrize("fault", [503, "wrong bytes"])
def test_waits_between_tries_double(ncbi, fetch_pubmed, caplog, monkeypatch, fault) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.05)
    ncbi.faults[f"baseline/{file_name(2)}"] = [fault] * 100
    with pytest.raises(UserError):
        fetch_pubmed("2")
    expected = [0, 0.1, 0.2, 0.4]
    assert all(wait >= least for wait, least in zip(waits(ncbi, f"baseline/{file_name(2)}"), expected, strict=True))
    announced = [record.getMessage().rpartition("next try in ")[2] for record in caplog.records]
    assert [text for text in announced if text.endswith(" s")] == ["0 s", "0.1 s", "0.2 s", "0.4 s"]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("path", ["baseline/", f"baseline/{file_name(1)}"])
def test_the_server_decides_how_long_to_wait(ncbi, pubmed_folder, fetch_pubmed, caplog, status, path) -> None:
    ncbi.faults[path] = [status]
    ncbi.retry_after = "1"
    fetch_pubmed("1")
    [wait] = waits(ncbi, path)
    assert wait >= 1
    assert f"try 1 of 5 failed: {status} " in caplog.text and "next try in 1 s" in caplog.text
    assert_complete(pubmed_folder, ncbi, 1)


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("ending", ["", ".md5"])
def test_permanent_errors_are_not_tried_again(ncbi, pubmed_folder, fetch_pubmed, caplog, status, ending) -> None:
    path = f"baseline/{file_name(2)}{ending}"
    ncbi.faults[path] = [status] * 100
    with pytest.raises(UserError, match="^1 of 3 files are missing"):
        fetch_pubmed("1-3")
    assert ncbi.requests.count(path) == 1
    assert_complete(pubmed_folder, ncbi, 1, 3)
    assert f"{file_name(2)}: not downloaded: {status} Client Error" in caplog.text


def test_a_missing_listing_is_an_error_that_names_it(ncbi, fetch_pubmed) -> None:
    ncbi.faults["updatefiles/"] = [404]
    with pytest.raises(UserError, match=f"^{ncbi.base_url}updatefiles/: cannot read the listing: 404 Client Error"):
        fetch_pubmed("1")


def test_a_missing_server_is_a_short_error(fetch_pubmed) -> None:
    with NcbiServer(Path("nowhere")) as gone:
        address = gone.base_url
    with pytest.raises(
        UserError, match=rf"^{address}baseline/: cannot read the listing: \[Errno \d+\] Connection refused$"
    ):
        fetch_pubmed("1", base_url=address)


@pytest.mark.parametrize("path", ["baseline/", f"baseline/{file_name(1)}.md5", f"baseline/{file_name(1)}"])
def test_a_silent_server_times_out(ncbi, pubmed_folder, fetch_pubmed, caplog, monkeypatch, path) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)  # a slow answer that exceeds it too is tried again
    ncbi.faults[path] = ["silent"]
    fetch_pubmed("1")
    assert "timed out" in caplog.text
    assert_complete(pubmed_folder, ncbi, 1)


def test_a_server_that_falls_silent_within_a_file_times_out(ncbi, pubmed_folder, fetch_pubmed, monkeypatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    monkeypatch.setattr(download, "TRIES", 2)
    ncbi.gate.clear()
    with pytest.raises(UserError, match="^1 of 1 files are missing"):
        fetch_pubmed("1")
    assert ncbi.requests.count(f"baseline/{file_name(1)}") == 2
    assert data_files(pubmed_folder) == []


@pytest.mark.parametrize(
    "content",
    ["", "{md5}  {name}\n", "MD5(pubmed26n0002.xml.gz)= {md5}\n", "MD5({name})= 12ab\n", "<html>Please log in</html>"],
)
def test_a_checksum_file_in_another_format_is_an_error_that_names_it(
    ncbi, pubmed_folder, fetch_pubmed, caplog, content
) -> None:
    path = ncbi.folder / "baseline" / f"{file_name(1)}.md5"
    md5 = path.read_text().split()[-1]
    path.write_text(content.format(md5=md5, name=file_name(1)))
    with pytest.raises(UserError, match="^1 of 1 files are missing"):
        fetch_pubmed("1")
    expected = f"{ncbi.base_url}baseline/{file_name(1)}.md5: expected one line `MD5({file_name(1)})= …`, got"
    assert f"not downloaded: {expected}" in caplog.text
    assert data_files(pubmed_folder) == []


def start(ncbi: NcbiServer, pubmed_folder: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        REPOSITORY / "scripts/download_pubmed.py",
        "--output",
        pubmed_folder,
        "--base-url",
        ncbi.base_url,
        *arguments,
    ]
    # Children of a shell in the background ignore interrupts by default.
    return subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def stop_in_the_middle(ncbi: NcbiServer, pubmed_folder: Path, how: signal.Signals) -> tuple[int, str]:
    """Start to download files 1 and 2, and stop the process once part of each is on disk."""
    for number in (1, 2):
        publish(ncbi.folder, f"baseline/{file_name(number)}", size=4 * download.BLOCK_BYTES)
    ncbi.gate.clear()
    process = start(ncbi, pubmed_folder, "--files", "1-2")
    wait_until(lambda: sum(path.stat().st_size > 0 for path in pubmed_folder.glob("*/.*/*.gz")) == 2)
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)  # less than the timeout for a silent server
    ncbi.gate.set()
    return process.returncode, errors


def test_a_killed_run_leaves_no_incomplete_file_and_the_next_run_completes(ncbi, pubmed_folder, run_script) -> None:
    status, _ = stop_in_the_middle(ncbi, pubmed_folder, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert data_files(pubmed_folder) == []
    assert len(list(pubmed_folder.glob("baseline/.*.partial-*"))) == 2
    with pytest.raises(UserError, match=r"no PubMed files"):
        find_pubmed_files(pubmed_folder)
    done = run_script("download_pubmed", "--output", pubmed_folder, "--files", "1-2", "--base-url", ncbi.base_url)
    assert done.returncode == 0, done.stderr
    assert_complete(pubmed_folder, ncbi, 1, 2)


def test_an_interrupted_run_ends_at_once_with_one_line_and_leaves_nothing(ncbi, pubmed_folder) -> None:
    status, errors = stop_in_the_middle(ncbi, pubmed_folder, signal.SIGINT)
    assert status == 130
    assert errors.endswith("\ninterrupted\n") and "Traceback" not in errors
    assert set(tree(pubmed_folder)) <= {"baseline"}


def test_errors_of_the_script_are_one_line_and_a_status(ncbi, pubmed_folder, run_script) -> None:
    arguments = ("--output", pubmed_folder, "--base-url", ncbi.base_url)
    done = run_script("download_pubmed", *arguments, "--files", "1-20")
    message = "error: files: 1-20: no file 6 is listed; the numbers are 1 to 5\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)

    ncbi.faults[f"baseline/{file_name(1)}"] = [404]
    done = run_script("download_pubmed", *arguments, "--files", "1-2")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1] == "error: 1 of 2 files are missing (see above); run the command again"
    assert sum(f"{file_name(1)}: not downloaded: 404 Client Error: Not Found" in line for line in lines) == 1
    assert_complete(pubmed_folder, ncbi, 2)


def test_a_full_disk_ends_the_run_with_one_line_that_names_the_file(ncbi, small_disk, run_script) -> None:
    (small_disk / "ballast").write_bytes(bytes(56_000))
    done = run_script("download_pubmed", "--output", small_disk, "--files", "all", "--base-url", ncbi.base_url)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {small_disk}/baseline/pubmed26n000") and "no space left" in last.lower()
    assert len(ncbi.requested(".xml.gz")) < 5  # later files would fail too
    for path in data_files(small_disk):
        assert (small_disk / path).read_bytes() == (ncbi.folder / path).read_bytes()
