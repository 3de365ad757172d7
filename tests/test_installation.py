"""`pip install .` gives commands, library, model files and tasks that work without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import REPOSITORY
from pipeline_folders import TINY_MODEL, Folders

MODEL_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *(path.name for path in REPOSITORY.glob("*_healthslm.py")),
}

InEnvironment = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the package, built in a copy of the files that it is made from."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for pattern in ("*.py", "*.json", "*.jinja", "pyproject.toml", "README.md", "LICENSE"):
        for path in REPOSITORY.glob(pattern):
            shutil.copy(path, source)
    shutil.copytree(REPOSITORY / "healthslm", source / "healthslm", ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        built,
        source,
    ]
    subprocess.run(command, check=True)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def in_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> InEnvironment:
    """Run a command of a fresh environment with the wheel, which borrows all other packages from this one."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    borrowed = Path(sysconfig.get_path("purelib"))
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages / "borrowed.pth").write_text(f"{borrowed}\n")

    def run(command: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [environment / "bin" / command, *map(str, arguments)],
            cwd=cwd,
            env=variables,
            capture_output=True,
            text=True,
        )

    return run


def test_a_wheel_carries_the_whole_library_and_the_model_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    library = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "healthslm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == library | {f"healthslm/model_repository/{name}" for name in MODEL_FILES}


def test_the_installed_library_and_command_need_no_repository(in_environment: InEnvironment, tmp_path: Path) -> None:
    program = "import healthslm.repository as r; print(r.__file__, r.model_repository(), sep='\\n')"
    module, folder = in_environment("python", "-c", program, cwd=tmp_path).stdout.splitlines()
    assert Path(folder) == Path(module).with_name("model_repository")
    assert not Path(module).is_relative_to(REPOSITORY)
    done = in_environment("healthslm", "pretrain", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-tokens" in done.stdout


@pytest.mark.slow
def test_the_installed_command_trains_a_model_and_generates_text(
    in_environment: InEnvironment, sample_folders: Folders, tmp_path: Path
) -> None:
    arguments = ["--tokens", sample_folders.tokens, "--output", "run", "--model", TINY_MODEL]
    sizes = ["--max-tokens", 512, "--batch-tokens", 256, "--warmup-tokens", 0]
    done = in_environment("healthslm", "pretrain", *arguments, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/best/modeling_healthslm.py").is_file()
    done = in_environment(
        "healthslm", "generate", "--model", "run/best", "--prompt", "Aspirin", "--max-new-tokens", 5, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Aspirin")


@pytest.mark.slow
def test_the_installed_task_is_found_by_the_evaluation_harness(in_environment: InEnvironment, tmp_path: Path) -> None:
    folder = in_environment("python", "-m", "healthslm.evaluation.lm_eval_tasks", cwd=tmp_path).stdout.strip()
    program = (
        "from lm_eval.tasks import TaskManager\n"
        f"print(TaskManager(include_path={folder!r}, include_defaults=False).all_tasks)"
    )
    done = in_environment("python", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pubmedqa_local" in done.stdout
