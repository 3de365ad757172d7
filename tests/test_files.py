"""Files and folders are written completely or not at all."""

import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from healthslm.errors import UserError
from healthslm.files import read_json, replacing, write_json


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_appears_under_its_name_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "a.txt"
    with replacing(path) as new:
        new.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_the_temporary_path_has_the_same_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.npy") as new:
        np.save(new, np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as new:
        new.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_folder_replaces_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "old.txt").write_text("old")
    with replacing(path) as new:
        (new / "inner").mkdir(parents=True)
        (new / "inner" / "new.txt").write_text("new")
        assert names(path / "inner") == ["old.txt"]
    assert names(path / "inner") == ["new.txt"]
    assert names(tmp_path) == ["checkpoint"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as new:
        new.mkdir()
        (new / "new.txt").write_text("half")
        _ = 1 / 0
    assert names(path) == ["old.txt"]
    assert names(tmp_path) == ["checkpoint"]


def test_the_old_folder_stays_when_nothing_was_created(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert names(path) == ["old.txt"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_reader_never_sees_an_incomplete_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [0] * 10_000)
    seen, done = set(), threading.Event()

    def write() -> None:
        for value in itertools.count():
            if done.is_set():
                return
            write_json(path, [value] * 10_000)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while len(seen) < 20:
            values = json.loads(path.read_text())
            assert len(values) == 10_000 and len(set(values)) == 1
            seen.add(values[0])
    finally:
        done.set()
        thread.join()


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"title": "Überleben nach 5 µg/dL", "years": [2025, None], "share": 0.1}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes() == (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize("content", [b'{"a": 1,\n "b" 2}', b"", b'{"a": "\xff"}'])
def test_broken_json_is_an_error_in_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="^[^\n]*a.json: not valid JSON: [^\n]*$"):
        read_json(path)


def test_an_error_while_writing_names_the_file(tmp_path: Path) -> None:
    """A limit on file sizes makes a real write fail with an error that doesn't name the file."""
    code = "import sys, healthslm.files as files; files.write_json(files.Path(sys.argv[1]), [0] * 10_000)"
    path = tmp_path / "a.json"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def fill_by_python(path: Path) -> None:
    path.write_bytes(bytes(200_000))


def fill_by_numpy(path: Path) -> None:
    np.zeros(200_000, dtype=np.uint8).tofile(path)


def fill_by_safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(50_000)}, path)


@pytest.mark.parametrize("fill", [fill_by_python, fill_by_numpy, fill_by_safetensors])
def test_a_full_disk_is_an_error_in_one_line_that_names_the_file(small_disk: Path, fill) -> None:
    path = small_disk / "a.bin"
    path.write_text("old")
    with pytest.raises((UserError, OSError)) as caught, replacing(path) as new:
        fill(new)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert names(small_disk) == ["a.bin"]
