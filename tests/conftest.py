"""Fixtures for all tests: no network, temporary caches, files, and ways to run a script."""

import logging
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from paths import REPOSITORY

if TYPE_CHECKING:
    from pipeline_folders import Folders

# Set before anything imports transformers, which reads them at import; scripts run by the tests inherit them.
_hub_home = tempfile.TemporaryDirectory(prefix="healthslm-tests-")
os.environ.update(
    HF_HOME=_hub_home.name,
    HF_MODULES_CACHE=f"{_hub_home.name}/modules",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For the messages of their assertions.
pytest.register_assert_rewrite(
    "corpus_builds", "download_fixtures", "growth", "hub_fixtures", "pubmed_xml", "training_fixtures"
)

RunScript = Callable[..., subprocess.CompletedProcess[str]]


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "accelerate"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository, which is also a model folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real files, such as NCBI's, that HEALTHSLM_TEST_DATA names."""
    folder = os.environ.get("HEALTHSLM_TEST_DATA")
    if not folder:
        pytest.skip("HEALTHSLM_TEST_DATA names no folder of real files")
    return Path(folder)


@pytest.fixture(scope="session")
def run_script() -> RunScript:
    """Run `scripts/NAME.py` in its own process: `run_script("evaluate", "--model", folder, cwd=…, env=…)`."""

    def run(name: str, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None):
        command = [sys.executable, str(REPOSITORY / "scripts" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)

    return run


@pytest.fixture
def run_script_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunScript:
    """The same in this process and the current folder, which saves the seconds of imports."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        script = REPOSITORY / "scripts" / f"{name}.py"
        command, status = [str(script), *map(str, arguments)], 0
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, for which scripts would print no messages
        capfd.readouterr()
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(command, status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def sample_folders(tmp_path_factory: pytest.TempPathFactory) -> "Folders":
    """Corpus, tokenizer and tokens that the stages make from the sample."""
    from pipeline_folders import make_folders  # seconds to import, and few tests need it

    return make_folders(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="session")
def sample(sample_folders: "Folders") -> Path:
    """The folder of these with the corpus, the records and the signatures. Not to be changed."""
    return sample_folders.corpus.parent


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Train on the CPU in fp32 and bf16, whether or not this processor supports bf16."""
    from in_precision import set_precision  # seconds to import, and few tests need it

    with pytest.MonkeyPatch.context() as patch:
        set_precision(request.param, patch.setattr)
        yield request.param


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB. Mounting it needs root."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
