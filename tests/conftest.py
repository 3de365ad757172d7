"""What all tests share: no network, caches of their own, two fixtures for files, and ways to run a script."""

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

REPOSITORY = Path(__file__).resolve().parents[1]

RunScript = Callable[..., subprocess.CompletedProcess[str]]


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "accelerate"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository, which is a model folder too."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real files (NCBI's among them) named by HEALTHSLM_TEST_DATA."""
    folder = os.environ.get("HEALTHSLM_TEST_DATA")
    if not folder:
        pytest.skip("HEALTHSLM_TEST_DATA names no folder of real files")
    return Path(folder)


@pytest.fixture(scope="session")
def run_script() -> RunScript:
    """Run `scripts/NAME.py` in a process of its own: `run_script("evaluate", "--model", folder, cwd=…, env=…)`."""

    def run(name: str, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None):
        command = [sys.executable, str(REPOSITORY / "scripts" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)

    return run


@pytest.fixture
def run_script_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunScript:
    """The same in this process, which has imported already what takes a new one seconds, in the current folder."""

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
    """Corpus, tokenizer and tokens made of the embedded sample by the stages themselves."""
    from pipeline_folders import make_folders  # seconds to import, and few tests need it

    return make_folders(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Train on the CPU in fp32 and in bf16, whatever this processor is fast at."""
    from in_precision import set_precision  # seconds to import, and few tests need it

    with pytest.MonkeyPatch.context() as patch:
        set_precision(request.param, patch.setattr)
        yield request.param


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB, to be filled. Mounting one takes the rights of root."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
