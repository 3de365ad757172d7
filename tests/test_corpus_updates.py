"""Updates of PubMed apply in the order of its files, and the files are those of one year."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_builds import assert_report_adds_up, build

from healthslm.corpus.pubmed_files import find_pubmed_files
from healthslm.corpus.records import RECORD_SCHEMA
from healthslm.corpus.screening import HELD_OUT_SCHEMA, SIGNATURE_SCHEMA
from healthslm.corpus.selection import write_drop_list
from healthslm.errors import UserError


def newest_by_hand(files: list[list[tuple[int, int, bool]]]) -> dict[int, tuple[int, int]]:
    """Apply records (pmid, version, deleted) in order; return the file and position of each PMID's current record.

    The highest version of a PMID counts; a later record or deletion of the same version replaces it.
    """
    state: dict[int, tuple[int, int, int, bool]] = {}
    for file, records in enumerate(files):
        for position, (pmid, version, deleted) in enumerate(records):
            if pmid not in state or version >= state[pmid][0]:
                state[pmid] = (version, file, position, deleted)
    return {pmid: (file, position) for pmid, (_, file, position, deleted) in state.items() if not deleted}


@pytest.mark.parametrize("seed", range(5))
def test_outdated_records_agree_with_a_simulation(tmp_path, seed):
    chance = random.Random(seed)
    files = [
        [(chance.randrange(40), chance.choice([1, 1, 1, 2]), chance.random() < 0.2) for _ in range(30)]
        for _ in range(5)
    ]
    keys = iter(range(10**6))
    for number, records in enumerate(files):
        rows = [{"pmid": pmid, "version": version, "deleted": deleted} for pmid, version, deleted in records]
        signatures = [
            {"position": position, "split": "train", "id_key": next(keys), "text_key": next(keys), "bands": []}
            for position in range(len(rows))
        ]
        for folder, content, schema in (("records", rows, RECORD_SCHEMA), ("signatures", signatures, SIGNATURE_SCHEMA)):
            (tmp_path / folder).mkdir(exist_ok=True)
            name = f"pubmed26n{number:04}.parquet"
            pq.write_table(pa.Table.from_pylist(content, schema), tmp_path / folder / name)
    held_out, dropped = tmp_path / "held_out.parquet", tmp_path / "dropped.parquet"
    pq.write_table(HELD_OUT_SCHEMA.empty_table(), held_out)
    record_files, signature_files = (sorted((tmp_path / folder).iterdir()) for folder in ("records", "signatures"))
    write_drop_list(signature_files, record_files, held_out, dropped)

    listed = {(row["file"], row["position"]): row["reason"] for row in pq.read_table(dropped).to_pylist()}
    newest = newest_by_hand(files)
    for number, records in enumerate(files):
        for position, (pmid, _, deleted) in enumerate(records):
            is_current = newest.get(pmid) == (number, position)
            reason = "deletion" if deleted else "superseded" if pmid in newest else "deleted"
            assert listed.get((f"pubmed26n{number:04}", position)) == (None if is_current else reason)


def test_real_updates_apply_in_the_order_of_the_files(test_data, tmp_path):
    folder = tmp_path / "pubmed"
    for file in ("baseline/pubmed26n0003", "updatefiles/pubmed26n0004", "updatefiles/pubmed26n0005"):
        name = f"{file}.xml.gz"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(test_data / "pubmed" / name)
    build(tmp_path / "corpus", pubmed=folder)
    report = assert_report_adds_up(tmp_path / "corpus")
    assert [file["read"] for file in report["files"]] == [30, 30 + 6, 26 + 262]
    assert report["dropped"]["deletion"] == 6 + 262


def test_pubmed_files_are_from_one_year_and_have_different_names(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_pubmed_files(tmp_path / "missing")
    with pytest.raises(UserError, match="no PubMed files"):
        find_pubmed_files(tmp_path)
    for name in ("baseline/pubmed26n0010.xml.gz", "baseline/pubmed26n0002.xml.gz", "updatefiles/pubmed26n0011.xml.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "baseline" / "pubmed26n0002.xml.gz.md5").touch()
    assert [path.name[9:13] for path in find_pubmed_files(tmp_path)] == ["0002", "0010", "0011"]
    (tmp_path / "updatefiles" / "pubmed26n0002.xml").touch()
    with pytest.raises(UserError, match="has the same name as"):
        find_pubmed_files(tmp_path)
    (tmp_path / "updatefiles" / "pubmed26n0002.xml").rename(tmp_path / "updatefiles" / "pubmed25n0900.xml.gz")
    with pytest.raises(UserError, match="from another year than"):
        find_pubmed_files(tmp_path)
