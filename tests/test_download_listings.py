"""Only PubMed files of one year are downloaded, whatever a server lists."""

import pytest
from download_fixtures import assert_complete, file_name, publish, tree
from ncbi_server import NcbiServer, write_pubmed_file

from healthslm.corpus.download import DownloadOptions, download_pubmed
from healthslm.errors import UserError

pytest_plugins = "download_fixtures"
pytestmark = pytest.mark.usefixtures("quick_retries")

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


def test_links_that_are_not_plain_names_are_ignored(ncbi, pubmed_folder, fetch_pubmed, tmp_path, caplog) -> None:
    (ncbi.folder / "baseline" / file_name(1)).rename(ncbi.folder / "kept")  # so that only the odd links lead to it
    ncbi.odd_links = ODD_LINKS
    before = tree(tmp_path)
    fetch_pubmed("all")
    assert sorted(set(tree(tmp_path)) - set(before))[:2] == ["home", "home/pubmed"]
    assert_complete(pubmed_folder, ncbi, 2, 3, 4, 5)
    assert [path for path in ncbi.requests if "0001" in path] == []
    for link in ODD_LINKS:
        assert (f"baseline/: ignored {link!r}" in caplog.text) == link.endswith(".xml.gz")


def test_two_years_in_a_listing_are_rejected(ncbi, pubmed_folder, fetch_pubmed) -> None:
    publish(ncbi.folder, f"baseline/{file_name(7, year=25)}")
    with pytest.raises(UserError, match=r"pubmed26n0001.xml.gz: from another year than .*pubmed25n0007.xml.gz: "):
        fetch_pubmed("1")
    assert not pubmed_folder.exists()


def test_a_baseline_of_one_year_and_updates_of_another_are_rejected(ncbi, pubmed_folder, fetch_pubmed) -> None:
    for number in (4, 5):
        (ncbi.folder / "updatefiles" / file_name(number)).unlink()
    publish(ncbi.folder, f"updatefiles/{file_name(4, year=27)}")
    with pytest.raises(UserError, match=r"pubmed27n0004.xml.gz: from another year than .*pubmed26n0001.xml.gz: "):
        fetch_pubmed("1")
    assert not pubmed_folder.exists()


@pytest.mark.parametrize(
    "there", ["baseline/pubmed25n0001.xml.gz", "updatefiles/pubmed27n0009.xml", "pubmed25n0001.xml"]
)
def test_a_folder_with_files_from_another_year_is_rejected_and_unchanged(
    ncbi, pubmed_folder, fetch_pubmed, there
) -> None:
    write_pubmed_file(pubmed_folder / there, b"another year")
    before = tree(pubmed_folder)
    with pytest.raises(UserError) as caught:
        fetch_pubmed("all")
    assert str(caught.value) == (
        f"{ncbi.base_url}baseline/{file_name(1)}: from another year than {pubmed_folder / there}: PubMed's files of "
        "one year replace all earlier ones; remove the older ones or choose another folder"
    )
    assert tree(pubmed_folder) == before
    assert ncbi.requested(".gz") == []


def test_the_next_year_has_another_prefix_and_works_the_same(pubmed_folder, tmp_path) -> None:
    content = publish(tmp_path / "ncbi", f"baseline/{file_name(1, year=31)}")
    with NcbiServer(tmp_path / "ncbi") as ncbi:
        download_pubmed(DownloadOptions(output=pubmed_folder, files=["all"], base_url=ncbi.base_url))
    assert (pubmed_folder / "baseline" / "pubmed31n0001.xml.gz").read_bytes() == content


def test_a_number_listed_in_both_folders_is_an_error(ncbi, fetch_pubmed) -> None:
    publish(ncbi.folder, f"updatefiles/{file_name(3)}")
    message = f"updatefiles/{file_name(3)}: is also listed as baseline/{file_name(3)}; only one of them can be right$"
    with pytest.raises(UserError, match=message):
        fetch_pubmed("all")


def test_a_server_without_pubmed_files_is_an_error(fetch_pubmed, tmp_path) -> None:
    with (
        NcbiServer(tmp_path / "nothing") as empty,
        pytest.raises(UserError, match="neither baseline/ nor updatefiles/"),
    ):
        fetch_pubmed("all", base_url=empty.base_url)
