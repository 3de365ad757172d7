"""What the README tells people to do, done: its commands and its Python, in order, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ncbi_server import serving, write_pubmed_file

SHORTENED = {
    "build_corpus": "--validation-fraction 0.1 --test-fraction 0.1",  # of 60 citations, half a percent is none
    "train_tokenizer": "--vocab-size 1000",
    "pretrain": "--max-tokens 2048 --batch-tokens 1024 --micro-batch-rows 1",
    "generate": "--max-new-tokens 8",
}
"""Options added to the README's own, so that they finish within minutes on the sample."""


STAGES = [
    "download_pubmed",
    "build_corpus",
    "describe_corpus",
    "train_tokenizer",
    "tokenize_corpus",
    "pretrain",
    "evaluate",
    "generate",
]
"""The scripts that the README leads through, in order."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


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
    """Lay the sample out as the files of the baseline that the README downloads; the last ones hold a citation each."""
    samples = sorted((repository / "sample/pubmed").glob("*.xml"))
    citation = "<PubmedArticleSet><MedlineCitation><PMID>{}</PMID></MedlineCitation></PubmedArticleSet>"
    for number in range(1320, 1331):
        content = samples.pop(0).read_bytes() if samples else citation.format(99_001_000 + number).encode()
        write_pubmed_file(folder / "baseline" / f"pubmed26n{number}.xml.gz", content)


@pytest.mark.slow
def test_the_readme_leads_from_ncbi_to_text_and_a_model_to_use(copy_of_repository, tmp_path):
    readme = (copy_of_repository / "README.md").read_text(encoding="utf-8")
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines()]
    commands = [line.split("  #")[0] for line in lines if line.startswith("python ")]
    stages = [re.search(r"scripts/(\w+)\.py", command)[1] for command in commands]
    assert list(dict.fromkeys(stages)) == STAGES
    publish_sample(copy_of_repository, tmp_path / "served")
    with serving(tmp_path / "served") as server:
        for stage, command in zip(stages, commands, strict=True):
            more = f"--base-url {server.base_url}" if stage == "download_pubmed" else SHORTENED.get(stage, "")
            printed = run(["bash", "-c", f"{command} {more}"], copy_of_repository)
    assert "Vitamin D and the risk of" in printed

    printed = run([sys.executable, "-c", "\n".join(blocks(readme, "python"))], copy_of_repository)
    assert "trainable params: 786,432" in printed
    assert re.search(r"19\.\d MB", printed)


@pytest.mark.slow
def test_the_demo_ends_with_text_and_says_what_it_is_worth(copy_of_repository):
    printed = run(["bash", "scripts/demo.sh", "build/demo"], copy_of_repository)
    assert "Effect of vitamin D" in printed
    assert (
        "That was gibberish" in printed and "Nothing that a model of this project writes is medical advice." in printed
    )
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
