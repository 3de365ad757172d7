"""The files of the repositories on the Hub: which are published, and the metadata that name other repositories.

The model repository is published as git tracks it. Of a folder that `export` or `finetune` wrote, the model files and
the card are published. Its records, logs and checkpoints are not: they contain local paths and the state of optimizers.
A Space is the page in demo/ with the libraries and the ONNX form that it loads, which git doesn't track.
"""

import hashlib
import json
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, SpaceCard, eval_result_entries_to_yaml

from healthslm import markdown
from healthslm.errors import UserError
from healthslm.files import file_sha256, read_json

WEIGHTS, CARD, ADAPTER_CONFIG = "model.safetensors", "README.md", "adapter_config.json"
GIT_ATTRIBUTES = ".gitattributes"
"""On the Hub, this file says which files are in LFS. The Hub writes it, so it is neither published nor deleted."""
PUBMEDQA_RESULTS = Path("results/pubmedqa.json")
PUBMEDQA, PUBMEDQA_TASK = "qiaojin/PubMedQA", "pqa_labeled"

_SIBLING_FILES = (
    *("README.md", "LICENSE", "Modelfile", "config.json", "generation_config.json", ADAPTER_CONFIG, "tokenizer*.json"),
    *("*.jinja", "*.py", "*.safetensors", "*.gguf", "onnx/*.onnx*"),
)
_PAGE = Path("demo")
MODEL_OF_PAGE = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "onnx/model_quantized.onnx",
)
"""What `demo/worker.js` loads of an ONNX export."""
_RELATIONS = {"report.json": "quantized", "metrics.json": "finetune"}
"""The files that record the base model, and the Hub's name of the relation to it. "quantized" is its word for the same
weights in another form."""
_PLACES = ("path/to/this/folder", "OWNER/NAME")
"""What the code in a card calls its folder and its repository, which have a name once they are published."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of a repository on the Hub."""

    name: str
    """Path in the repository, with slashes."""
    content: bytes

    @cached_property
    def sha256(self) -> str:
        """The checksum by which the Hub names a file in LFS."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """The checksum by which git, and so the Hub, names any other file."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content, usedforsecurity=False).hexdigest()


def current_commit(root: Path) -> str:
    """The commit of a git clone.

    Raises:
        UserError: It is not a clone, or has uncommitted changes.
    """
    commit = _git(root, "rev-parse", "HEAD").strip()
    if changed := _git(root, "status", "--porcelain", "--untracked-files=no").splitlines():
        raise UserError(f"{root}: {changed[0][3:]} has uncommitted changes: commit or undo them, then publish")
    return commit


def model_files(root: Path, repository: str) -> list[PublishedFile]:
    """The files of the model repository: those that git tracks, and the evaluation results in the Hub's format.

    Raises:
        UserError: `root` is not a git clone or has no weights, git tracks a file that .gitignore excludes (such as a
            corpus, tokens or a run folder), or the evaluation results are those of other weights.
    """
    if ignored := _names(_git(root, "ls-files", "-z", "--cached", "--ignored", "--exclude-standard")):
        raise UserError(f"{root / ignored[0]}: git tracks it, but .gitignore excludes it: git rm --cached {ignored[0]}")
    names = _names(_git(root, "ls-files", "-z"))
    if WEIGHTS not in names:
        raise UserError(f"{root}: git tracks no {WEIGHTS}: release a model first")
    files = [PublishedFile(name, (root / name).read_bytes()) for name in names if name != GIT_ATTRIBUTES]
    if str(PUBMEDQA_RESULTS) in names:
        files.append(PublishedFile(".eval_results/pubmedqa.yaml", _evaluation_results(root, repository)))
    return files


def sibling_files(folder: Path, repository: str, base: str, base_sha256: str) -> list[PublishedFile]:
    """The files of an export, a fine-tuned model or an adapter. Its card names the base model and the repository.

    Args:
        folder: What `export` or `finetune` wrote.
        repository: The name that it gets on the Hub.
        base: Hub name of the model that it was made from.
        base_sha256: Checksum of that model's weights.

    Raises:
        UserError: `folder` is something else, or was made from other weights.
    """
    record = _check_base(folder, base_sha256)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    relation = "adapter" if is_adapter else _RELATIONS[record]
    changed = {CARD: _card(folder / CARD, repository, base, relation, read_json(folder / record)["base"]["model"])}
    if is_adapter:
        config = read_json(folder / ADAPTER_CONFIG) | {"base_model_name_or_path": base}
        changed[ADAPTER_CONFIG] = json.dumps(config, indent=2)
    names = sorted({path.relative_to(folder).as_posix() for form in _SIBLING_FILES for path in folder.glob(form)})
    return [
        PublishedFile(name, changed[name].encode() if name in changed else (folder / name).read_bytes())
        for name in names
    ]


def space_files(root: Path, onnx: Path, base: str, base_sha256: str) -> list[PublishedFile]:
    """The files of the Space: the page in demo/, with its libraries in vendor/ and the model in model/.

    Args:
        root: The model repository.
        onnx: What `export` wrote in ONNX form.
        base: Hub name of the model repository, which the card names.
        base_sha256: Checksum of the model's weights.

    Raises:
        UserError: `onnx` is something else or was made from other weights, or demo/vendor/ lacks a library.
    """
    _check_base(onnx, base_sha256)
    page = root / _PAGE
    paths = {name: page / name for name in _names(_git(page, "ls-files", "-z"))}
    for line in (page / "vendor.sha256").read_text(encoding="utf-8").splitlines():
        sha256, name = line.split()
        path = paths[f"vendor/{name}"] = page / "vendor" / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise UserError(f"{path}: missing or changed: delete {path.parent} and run `make demo/vendor`")
    for name in MODEL_OF_PAGE:
        paths[f"model/{name}"] = onnx / name
        if not (onnx / name).is_file():
            raise UserError(f"{onnx}: no {name}: the page needs a folder that `export` wrote with --format onnx")
    contents = {name: path.read_bytes() for name, path in paths.items()}
    card = contents[CARD].decode()
    (released,) = SpaceCard(card).data["models"]
    contents[CARD] = card.replace(released, base).encode()
    return [PublishedFile(name, content) for name, content in contents.items()]


def _check_base(folder: Path, base_sha256: str) -> str:
    """Check that `export` or fine-tuning wrote a folder from the weights to publish.

    Returns:
        The name of the file that records it.

    Raises:
        UserError: The folder is something else, or was made from other weights.
    """
    record = next((name for name in _RELATIONS if (folder / name).is_file()), "")
    recorded = read_json(folder / record).get("base") if record else None
    if recorded is None or not (folder / CARD).is_file():
        raise UserError(
            f"{folder}: not a folder of `healthslm export` or `finetune`: no {CARD} or no record of its base"
        )
    if recorded["sha256"] != base_sha256:
        raise UserError(
            f"{folder}: made from other weights (SHA-256 {recorded['sha256'][:12]}, not {base_sha256[:12]}): "
            "make it again from the model to publish"
        )
    return record


def _card(path: Path, repository: str, base: str, relation: str, local_base: str) -> str:
    """A model card with the Hub's names of the repository and of its base model instead of local folders."""
    text = path.read_text(encoding="utf-8")
    for place in _PLACES:
        text = text.replace(place, repository)
    card = ModelCard(text)
    card.data["base_model"], card.data["base_model_relation"] = base, relation
    if Path(local_base).is_absolute():
        for written in (local_base, markdown.escape(local_base)):
            card.text = card.text.replace(written, base)
    return str(card)


def _evaluation_results(root: Path, repository: str) -> bytes:
    """The evaluation on a dataset of the Hub, in the format of `.eval_results/*.yaml`."""
    results = read_json(root / PUBMEDQA_RESULTS)
    if results["inputs"]["model"] != file_sha256(root / WEIGHTS):
        raise UserError(f"{root / PUBMEDQA_RESULTS}: results of other weights: run scripts/evaluate_release.py")
    found: dict[str, Any] = results["pubmedqa"]
    low, high = found["accuracy"]["interval"]
    entry = EvalResultEntry(
        dataset_id=PUBMEDQA,
        task_id=PUBMEDQA_TASK,
        value=round(found["accuracy"]["share"], 4),
        source_url=f"https://huggingface.co/{repository}/blob/main/{PUBMEDQA_RESULTS.as_posix()}",
        source_name="Results with intervals",
        notes=f"accuracy, zero-shot, {found['questions']} test questions, 95% interval {low:.3f} to {high:.3f}; "
        f"always {found['majority_option']!r}: {found['majority_share']:.3f}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError("git is not installed, which lists the files to publish: install it") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{root}: publish from a git clone: {error.stderr.strip().splitlines()[0]}") from error


def _names(listed: str) -> list[str]:
    return [name for name in listed.split("\0") if name]
