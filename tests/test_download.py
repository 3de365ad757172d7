"""PubMed's files are downloaded completely and verified, and only those that are missing."""

import filecmp
import threading
from pathlib import Path

import pytest
from download_fixtures import assert_complete, data_files, file_name
from ncbi_server import NcbiServer
from waiting import wait_until

from healthslm.corpus.download import DownloadOptions, download_pubmed
from healthslm.corpus.pubmed_files import find_pubmed_files
from healthslm.errors import UserError

pytest_plugins = "download_fixtures"
pytestmark = pytest.mark.usefixtures("quick_retries")


def test_real_files_are_downloaded_unchanged_to_where_the_corpus_reads_them(
    test_data: Path, pubmed_folder: Path
) -> None:
    with NcbiServer(test_data / "pubmed") as ncbi:
        download_pubmed(DownloadOptions(output=pubmed_folder, files=["all"], base_url=ncbi.base_url))
    paths = [path.relative_to(pubmed_folder) for path in find_pubmed_files(pubmed_folder)]
    assert [path.name for path in paths] == [file_name(number) for number in range(1, 6)]
    for path in paths:
        assert filecmp.cmp(pubmed_folder / path, test_data / "pubmed" / path, shallow=False)


def test_all_files_are_downloaded_with_their_checksum_files(ncbi, pubmed_folder, fetch_pubmed) -> None:
    fetch_pubmed("all")
    assert_complete(pubmed_folder, ncbi, 1, 2, 3, 4, 5)


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
def test_files_are_chosen_by_their_numbers(ncbi, pubmed_folder, fetch_pubmed, files, numbers) -> None:
    fetch_pubmed(*files)
    assert_complete(pubmed_folder, ncbi, *numbers)


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
def test_a_wrong_selection_is_an_error_and_nothing_is_downloaded(
    ncbi, pubmed_folder, fetch_pubmed, files, message
) -> None:
    with pytest.raises(UserError) as caught:
        fetch_pubmed(*files)
    assert str(caught.value) == message
    assert set(ncbi.requests) <= {"baseline/", "updatefiles/"}
    assert not pubmed_folder.exists()


@pytest.mark.parametrize("connections", [0, 5])
def test_a_wrong_number_of_connections_is_rejected(ncbi, fetch_pubmed, connections) -> None:
    message = f"^connections: must be at least 1 and at most 4, not {connections}$"
    with pytest.raises(UserError, match=message):
        fetch_pubmed("all", connections=connections)
    assert ncbi.requests == []


@pytest.mark.parametrize(
    "address", ["ftp://127.0.0.1/pubmed/", "file:///etc", "/pubmed", "127.0.0.1", "https:///pubmed"]
)
def test_addresses_without_http_are_rejected(fetch_pubmed, address) -> None:
    with pytest.raises(UserError, match="^base_url: expected an address that begins with https:// or http://, got"):
        fetch_pubmed("all", base_url=address)


def test_an_address_may_lack_its_last_slash(ncbi, pubmed_folder, fetch_pubmed) -> None:
    fetch_pubmed("1", base_url=ncbi.base_url.rstrip("/"))
    assert_complete(pubmed_folder, ncbi, 1)


def test_a_second_run_requests_only_the_listings(ncbi, pubmed_folder, fetch_pubmed) -> None:
    fetch_pubmed("all")
    ncbi.requests.clear()
    fetch_pubmed("all")
    assert ncbi.requests == ["baseline/", "updatefiles/"]
    assert_complete(pubmed_folder, ncbi, 1, 2, 3, 4, 5)


def test_a_file_without_checksum_file_is_verified_and_kept(ncbi, pubmed_folder, fetch_pubmed) -> None:
    fetch_pubmed("1-2")
    (pubmed_folder / "baseline" / f"{file_name(1)}.md5").unlink()
    ncbi.requests.clear()
    fetch_pubmed("1-2")
    assert ncbi.requests == ["baseline/", "updatefiles/", f"baseline/{file_name(1)}.md5"]
    assert_complete(pubmed_folder, ncbi, 1, 2)


@pytest.mark.parametrize("damage", ["cut short", "changed", "empty"])
def test_only_a_damaged_file_is_downloaded_again(ncbi, pubmed_folder, fetch_pubmed, damage) -> None:
    fetch_pubmed("all")
    path = pubmed_folder / "baseline" / file_name(2)
    content = path.read_bytes()
    path.write_bytes({"cut short": content[:-1], "changed": b"\0" + content[1:], "empty": b""}[damage])
    ncbi.requests.clear()
    fetch_pubmed("all")
    assert ncbi.requested(".xml.gz") == [f"baseline/{file_name(2)}"]
    assert_complete(pubmed_folder, ncbi, 1, 2, 3, 4, 5)


def test_a_damaged_checksum_file_is_downloaded_again_without_its_file(ncbi, pubmed_folder, fetch_pubmed) -> None:
    fetch_pubmed("1")
    (pubmed_folder / "baseline" / f"{file_name(1)}.md5").write_bytes(b"\xff\xfe")
    ncbi.requests.clear()
    fetch_pubmed("1")
    assert ncbi.requested(".xml.gz") == []
    assert_complete(pubmed_folder, ncbi, 1)


@pytest.mark.parametrize("connections", [1, 2, 4])
def test_as_many_files_are_downloaded_in_parallel_as_there_are_connections(
    ncbi, pubmed_folder, fetch_pubmed, connections
) -> None:
    ncbi.gate.clear()
    # The connection of the failed try must be reused or closed.
    ncbi.faults[f"baseline/{file_name(1)}"] = [503]
    thread = threading.Thread(target=fetch_pubmed, args=("all",), kwargs={"connections": connections})
    thread.start()
    wait_until(lambda: ncbi.at_once == ncbi.open_connections == connections)
    assert data_files(pubmed_folder) == []  # they are all incomplete
    ncbi.gate.set()
    thread.join()
    assert ncbi.most_at_once == connections
    assert_complete(pubmed_folder, ncbi, 1, 2, 3, 4, 5)


def test_an_output_that_is_a_file_is_rejected(ncbi, fetch_pubmed, tmp_path) -> None:
    (tmp_path / "pubmed").write_text("mine")
    with pytest.raises(UserError, match=f"^{tmp_path / 'pubmed'}: is a file"):
        fetch_pubmed("1", output=tmp_path / "pubmed")
    assert (tmp_path / "pubmed").read_text() == "mine" and ncbi.requests == []


def test_two_files_are_downloaded_in_parallel_by_default() -> None:
    assert DownloadOptions(output=Path("pubmed"), files=["all"]).connections == 2


def test_the_script_shows_terms_files_and_bytes(ncbi, pubmed_folder, run_script) -> None:
    arguments = ("--output", pubmed_folder, "--base-url", ncbi.base_url, "--files", "latest", "3")
    done = run_script("download_pubmed", *arguments)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("Courtesy of the U.S. National Library of Medicine") == 1
    assert done.stderr.count("https://www.nlm.nih.gov/databases/download/terms_and_conditions.html") == 1
    size = sum(path.stat().st_size for path in pubmed_folder.rglob("*.xml.gz"))
    assert f"3/3 files: 100%|██████████| {size / 1000:.1f}k/{size / 1000:.1f}k [" in done.stderr
    assert done.stderr.endswith(f"{pubmed_folder}: all 3 files are complete and verified\n")
    assert_complete(pubmed_folder, ncbi, 3, 4, 5)
