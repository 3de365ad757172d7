"""Fixtures of the tests of the Hub: a repository to publish, its other forms, a local Hub, and the command."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from paths import REPOSITORY
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import byte_model, byte_tokenizer
from transformers import PreTrainedModel

from healthslm.errors import UserError
from healthslm.export.export import export
from healthslm.export.options import ExportOptions
from healthslm.finetuning.card import Card, write_card
from healthslm.hub.options import PushOptions
from healthslm.hub.publish import push_to_hub

TOKEN = "hf_" + "Secret" * 6
READ_TOKEN = "hf_" + "Reader" * 6

Push = Callable[..., subprocess.CompletedProcess[str]]


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit_all(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A change")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_model(root: Path, model: PreTrainedModel) -> None:
    """Save a model in a model repository, with results that belong to it."""
    model.save_pretrained(root)
    results = json.loads((REPOSITORY / "results/pubmedqa.json").read_text())
    results["inputs"]["model"] = sha256(root / "model.safetensors")
    (root / "results").mkdir(exist_ok=True)
    (root / "results/pubmedqa.json").write_text(json.dumps(results))


def changed_model() -> PreTrainedModel:
    model = byte_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1)
    return model


def adapted_model() -> PeftModel:
    """A model with an adapter that changes its output."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(byte_model(), config).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of a model repository with a tiny model, and files that git doesn't track."""
    root = tmp_path_factory.mktemp("clones") / "tiny_model"
    root.mkdir()
    for name in ("README.md", "LICENSE", ".gitignore", ".gitattributes"):
        shutil.copy(REPOSITORY / name, root)
    save_model(root, byte_model())
    byte_tokenizer().save_pretrained(root)
    git(root, "init", "--quiet")
    commit_all(root)
    for name in ("runs/a/checkpoints/step-1/optimizer.safetensors", "tokens/train.bin", "corpus/a.parquet", ".token"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TOKEN)
    return root


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A clone to change."""
    git(tmp_path, "clone", "--quiet", str(root), "clone")
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def llama(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama form of the model."""
    folder = tmp_path_factory.mktemp("exports") / "llama"
    export(ExportOptions(str(root), "llama", folder))
    return folder


@pytest.fixture(scope="module")
def adapter(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as `finetune` saves it, which was trained from the local folder of the model."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    model = adapted_model()
    model.peft_config["default"].base_model_name_or_path = str(root)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    base = {"model": str(root), "sha256": sha256(root / "model.safetensors")}
    (folder / "metrics.json").write_text(json.dumps({"base": base}))
    card = Card("An adapter", "It writes.", "text-generation", str(root), base["sha256"], True, "", {}, [], {})
    write_card(folder, card)
    (folder / "checkpoints/checkpoint-1").mkdir(parents=True)
    (folder / "checkpoints/checkpoint-1/optimizer.pt").write_bytes(b"state")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_account(TOKEN, "someone", orgs=("lab",))
        server.add_account(READ_TOKEN, "reader", role="read")
        yield server


@pytest.fixture(scope="module")
def environment(hub: HubServer) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.origin,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "0",
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture(scope="module")
def push(root: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Push]:
    """Run the command in a fork of a process that has imported all it needs, which saves the seconds of imports.

    It must be another process than pytest's, because the client reads its settings when it is imported.
    """
    program = """
import json, os, sys
import healthslm.arguments, healthslm.hub.publish
from healthslm.cli import main
for line in sys.stdin:
    sys.argv, settings, output = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(settings)
        for descriptor in (1, 2):
            os.dup2(os.open(f"{output}/{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        main("push-to-hub")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*arguments: object, root: Path = root, **settings: str) -> subprocess.CompletedProcess[str]:
        output = tmp_path_factory.mktemp("output")
        command = ["push_to_hub.py", *map(str, arguments), "--root", str(root)]
        parent.stdin.write(json.dumps([command, settings, str(output)]) + "\n")
        parent.stdin.flush()
        status = int(parent.stdout.readline())
        return checked(subprocess.CompletedProcess(command, status, *((output / n).read_text() for n in "12")))

    yield run
    parent.stdin.close()
    parent.wait()


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The result of a command that showed no secret and no traceback."""
    assert "hf_" not in done.stdout + done.stderr
    assert "secret-of-the-upload" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(root: Path, **options: Any) -> str:
    """The error of publishing a model repository, before anything is sent."""
    with pytest.raises(UserError) as raised:
        push_to_hub(PushOptions(repository="lab/new", root=root, **options))
    return str(raised.value)
