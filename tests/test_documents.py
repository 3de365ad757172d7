"""What the documents tell people to do works: their commands and their Python run in a copy of the repository."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from huggingface_hub import constants
from ncbi_server import NcbiServer, write_pubmed_file
from paths import REPOSITORY

from healthslm.cli import COMMANDS

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "docs/quickstart.md", "docs/pipeline.md")),
    *sorted(
        set(REPOSITORY.glob("docs/**/*.md")) - {REPOSITORY / "docs/quickstart.md", REPOSITORY / "docs/pipeline.md"}
    ),
]
"""In the order in which they run: the first ones make the corpus and the model that later ones use."""

MARK = re.compile(r"# (needs|takes) ")
"""The first line of a block that tests don't run: `# needs a network`, `# needs a GPU`, `# takes minutes`."""

SHORTENED = {
    "build_corpus": "--validation-fraction 0.1 --test-fraction 0.1",  # half a percent of 60 citations is none
    "train_tokenizer": "--vocab-size 1000",
    "pretrain": "--max-tokens 2048 --batch-tokens 1024 --micro-batch-size 1",
    "finetune": "--examples 8 --context 256 --truncate",
    "generate": "--max-new-tokens 8",
}
"""Options added to commands, so that they take minutes on the sample."""

HUB_ID = "healthslm/healthslm-15m"


def blocks(document: Path, language: str) -> list[str]:
    """The blocks of a document in a language, without those that are marked."""
    text = document.read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [block for block in found if not MARK.match(block)]


def commands(document: Path) -> list[str]:
    """The commands of a document's shell blocks, without comments."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("  #")[0].split()) for line in lines if line and not line.startswith("#")]


@pytest.fixture
def copy_of_repository(repository, tmp_path) -> Path:
    copy = tmp_path / "healthslm"
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (repository / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, copy / name)
    return copy


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def publish_sample(repository: Path, folder: Path) -> None:
    """Serve the sample as the baseline files that the documents download. The last ones hold one citation each."""
    samples = sorted((repository / "sample/pubmed").glob("*.xml"))
    citation = "<PubmedArticleSet><MedlineCitation><PMID>{}</PMID></MedlineCitation></PubmedArticleSet>"
    for number in range(1320, 1331):
        content = samples.pop(0).read_bytes() if samples else citation.format(99_001_000 + number).encode()
        write_pubmed_file(folder / "baseline" / f"pubmed26n{number}.xml.gz", content)


def publish_model(repository: Path) -> None:
    """Put the repository into the Hub's cache, as if it had been downloaded."""
    cached = Path(constants.HF_HUB_CACHE) / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for path in repository.glob("*"):
        if path.suffix in (".jinja", ".json", ".py", ".safetensors"):
            shutil.copy(path, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0" * 40)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_commands_and_python_of_all_documents_run(copy_of_repository, tmp_path):
    publish_sample(copy_of_repository, tmp_path / "served")
    publish_model(copy_of_repository)
    printed: dict[str, str] = {}
    with NcbiServer(tmp_path / "served") as server:
        for document in DOCUMENTS:
            for command in commands(document):
                if command in printed:
                    continue
                stage = re.search(r"scripts/(\w+)\.py", command)
                more = SHORTENED.get(stage[1], "") if stage else ""
                if stage and stage[1] == "download_pubmed":
                    more = f"--base-url {server.base_url}"
                printed[command] = run(["bash", "-c", f"{command} {more}"], copy_of_repository)
            if python := "\n".join(blocks(document, "python")):
                printed[document.name] = run([sys.executable, "-c", python], copy_of_repository)
    assert "Vitamin D and the risk of" in next(text for command, text in printed.items() if "generate.py" in command)
    assert "Vitamin D and the risk of" in printed["README.md"]
    assert "trainable params: 786,432" in printed["finetuning.md"]
    adapter = json.loads((copy_of_repository / "runs/plain/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == HUB_ID


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_names_options_that_exist(document):
    """Also in blocks that tests don't run."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, arguments in re.findall(r"(?:python scripts/|healthslm )([a-z][\w-]+)(?:\.py)? ((?:--)?[^\n`|]*)", text):
        command = COMMANDS.get(name.replace("_", "-"))
        if command is None:
            continue
        module, _, options_class = command.options.partition(":")
        options = {field.name for field in fields(getattr(importlib.import_module(module), options_class))}
        given = {option.replace("-", "_") for option in re.findall(r"(?<!\S)--([\w-]+)", arguments.split("  #")[0])}
        assert given <= options | {"recipe", "help"}, f"{name}: {given - options}"


def test_git_ignores_what_the_commands_of_documents_write(repository):
    """Publishing on the Hub needs a clone without other files."""
    texts = [path.read_text(encoding="utf-8") for path in (*DOCUMENTS, *repository.glob("configs/**/*.yaml"))]
    texts += [command.example for command in COMMANDS.values()]
    written = {path for text in texts for path in re.findall(r"--(?:output|save) ([\w./-]+)", text)}
    written -= {"results", "docs/corpus-card"}  # of a release
    done = subprocess.run(
        ["git", "check-ignore", *(f"{path}/" for path in written)], cwd=repository, capture_output=True, text=True
    )
    assert {line.rstrip("/") for line in done.stdout.splitlines()} == written


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_ends_with_text_and_says_what_it_is_worth(copy_of_repository):
    printed = run(["bash", "scripts/demo.sh", "build/demo"], copy_of_repository)
    assert "Effect of vitamin D" in printed
    assert "The generated text is gibberish" in printed
    assert "Nothing that a model of this project generates is medical advice." in printed
    model = copy_of_repository / "build/demo/run/best"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}


@pytest.mark.parametrize("document", ["docs/architecture.md"])
def test_python_blocks_print_what_the_document_shows(repository, document):
    """The blocks run one after the other in the root of the repository. A text block after one shows what it prints."""
    text = (repository / document).read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, flags=re.MULTILINE | re.DOTALL)
    code, shown = ("".join(parts) for parts in zip(*found, strict=True))
    assert run([sys.executable, "-c", code], repository) == shown


def test_links_of_documents_lead_somewhere(repository):
    for document in [*repository.glob("*.md"), *repository.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_model_card_s_metadata_are_what_the_hub_reads(repository):
    from huggingface_hub import ModelCard

    metadata = ModelCard.load(repository / "README.md").data
    assert (metadata.license, metadata.library_name, metadata.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
