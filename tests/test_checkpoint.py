"""Checkpoints are complete or absent, checked by checksums, and exact, whatever happens while one is written."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_folders import TINY_MODEL
from transformers import AutoTokenizer, PreTrainedModel

from healthslm.errors import UserError
from healthslm.files import remove_partials
from healthslm.models import make_model, open_model
from healthslm.training import checkpoint as checkpoint_module
from healthslm.training.checkpoint import (
    find_damage,
    list_checkpoints,
    load_optimizers,
    load_state,
    newest_checkpoint,
    save_checkpoint,
)
from healthslm.training.optimization import make_optimizers, set_learning_rates

TINY_GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 8, "n_layer": 11, "n_head": 2, "n_positions": 64,
}  # fmt: skip
STATE = {"tokens": 512, "best_bits_per_byte": 0.1 + 0.2}

Save = Callable[..., Path]


def optimizers_of(model: PreTrainedModel, muon: bool = False) -> list[torch.optim.Optimizer]:
    optimizers = make_optimizers(
        model,
        learning_rate=1e-3,
        muon_learning_rate=1e-3 if muon else None,
        weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    set_learning_rates(optimizers, 1.0)
    return optimizers


def take_step(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    """Take one step with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def trained(
    config: dict[str, Any] = TINY_MODEL, muon: bool = False
) -> tuple[PreTrainedModel, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = make_model(config)
    optimizers = optimizers_of(model, muon)
    for seed in range(2):
        take_step(model, optimizers, seed)
    return model, optimizers


@pytest.fixture(scope="module")
def save(sample_folders) -> Save:
    default = trained()

    def save(checkpoints: Path, number: int, of=default, keep: int = 2) -> Path:
        save_checkpoint(checkpoints, number, *of, sample_folders.tokenizer, STATE, keep=keep, writes=True)
        return checkpoints / f"step-{number}"

    return save


@pytest.fixture(scope="module")
def saved(save, tmp_path_factory) -> Path:
    """A folder with checkpoints 4 and 8, for tests to copy."""
    checkpoints = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(checkpoints, 4)
    save(checkpoints, 8)
    return checkpoints


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# The files of a checkpoint


def test_the_manifest_lists_every_other_file_with_its_sha256(saved):
    files = contents(saved / "step-8")
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert {"model.safetensors", "optimizer.safetensors", "training_state.json", "tokenizer.json"} <= manifest.keys()


def test_files_in_subfolders_of_a_checkpoint_are_listed_too(sample_folders, tmp_path):
    """A tokenizer with several chat templates has such files."""
    tokenizer = AutoTokenizer.from_pretrained(sample_folders.tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_checkpoint(tmp_path / "made", 1, *trained(), tmp_path / "tokenizer", STATE, keep=1, writes=True)
    folder = tmp_path / "made" / "step-1"
    assert find_damage(folder) is None
    (inner,) = folder.glob("*/*")
    inner.write_text("{{ tools }} ")
    assert str(inner.relative_to(folder)) in find_damage(folder)


def test_nothing_is_pickled(save, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle is at work")

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    folder = save(tmp_path, 1)
    model = open_model(folder)
    load_optimizers(folder, model, optimizers_of(model))
    assert load_state(folder) == STATE
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".py"}
    for path in folder.iterdir():
        assert not zipfile.is_zipfile(path), path
        if path.suffix == ".safetensors":  # a length, then JSON, then numbers
            content = path.read_bytes()
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        else:
            path.read_text(encoding="utf-8")


def test_only_the_writing_process_writes(sample_folders, tmp_path):
    save_checkpoint(tmp_path / "made", 1, *trained(), sample_folders.tokenizer, STATE, keep=1, writes=False)
    assert not (tmp_path / "made").exists()


# Which checkpoint a run resumes from


def test_the_newest_checkpoint_has_the_highest_step(tmp_path, saved):
    for name in ("step-9", "step-10"):
        shutil.copytree(saved / "step-8", tmp_path / name)
    for name in ("step-12.old", "step-x", ".step-11.partial-abc/step-11"):
        shutil.copytree(saved / "step-8", tmp_path / name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step-10"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_zeros(path: Path) -> None:
    """What file systems leave if the power fails before a sync."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [truncate, empty, flip_a_bit, make_zeros, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_reported_and_the_checkpoint_skipped(checkpoints, caplog, damage):
    newer = checkpoints / "step-8"
    for name, content in contents(newer).items():
        caplog.clear()
        damage(newer / name)
        assert newest_checkpoint(checkpoints) == checkpoints / "step-4"
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert str(newer) in record.message and name in record.message and "\n" not in record.message
        (newer / name).write_bytes(content)
    assert newest_checkpoint(checkpoints) == newer


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", '{"config.json": 1}', '"manifest"', "{"])
def test_an_invalid_manifest_is_damage(checkpoints, manifest):
    (checkpoints / "step-8" / "manifest.json").write_text(manifest)
    assert newest_checkpoint(checkpoints) == checkpoints / "step-4"


def test_any_wrong_byte_of_a_manifest_is_damage_unless_its_content_is_equal(checkpoints):
    folder = checkpoints / "step-8"
    path = folder / "manifest.json"
    manifest = path.read_bytes()
    for place, bit in itertools.product(range(0, len(manifest), 3), (0, 5)):
        wrong = bytearray(manifest)
        wrong[place] ^= 1 << bit
        path.write_bytes(wrong)
        assert find_damage(folder) or json.loads(wrong) == json.loads(manifest), (place, bit)


def test_a_disk_that_cannot_read_a_file_is_damage(checkpoints, monkeypatch, caplog):
    """Such an error has no file name."""
    read = checkpoint_module.file_sha256

    def fail(path: Path) -> str:
        if path == checkpoints / "step-8" / "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(checkpoint_module, "file_sha256", fail)
    assert newest_checkpoint(checkpoints) == checkpoints / "step-4"
    assert "Input/output error" in caplog.text


def test_if_all_are_damaged_each_is_reported_and_the_error_is_one_line(checkpoints, caplog):
    for folder in checkpoints.iterdir():
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="^[^\n]*no valid checkpoint[^\n]*$"):
        newest_checkpoint(checkpoints)
    assert [f"step-{n}" in record.message for n, record in zip((8, 4), caplog.records, strict=True)] == [True, True]


def test_a_partly_removed_checkpoint_does_no_harm(checkpoints, save):
    """It is skipped, and the next save removes the rest of it."""
    (checkpoints / "step-4" / "model.safetensors").unlink()
    assert newest_checkpoint(checkpoints) == checkpoints / "step-8"
    save(checkpoints, 12)
    assert names(checkpoints) == ["step-12", "step-8"]


# Which checkpoints are kept


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_old_checkpoints_are_removed_once_the_new_one_is_complete(checkpoints, save, monkeypatch, keep):
    stood = []
    remove = shutil.rmtree

    def watch(path: Path, *arguments, **settings) -> None:
        if path.parent == checkpoints and path.name.startswith("step-"):
            stood.append(find_damage(checkpoints / "step-12") is None)
        remove(path, *arguments, **settings)

    monkeypatch.setattr(shutil, "rmtree", watch)
    save(checkpoints, 12, keep=keep)
    assert names(checkpoints) == sorted(["step-4", "step-8", "step-12"][-keep:])
    assert stood == [True] * (3 - keep)


def test_a_damaged_checkpoint_of_a_later_step_is_removed_rather_than_the_new_one(checkpoints, save):
    """The run resumed from step-4 and was stopped before it reached step 8 again."""
    flip_a_bit(checkpoints / "step-8" / "model.safetensors")
    new = save(checkpoints, 6, keep=1)
    assert names(checkpoints) == ["step-6"]
    assert newest_checkpoint(checkpoints) == new


def test_a_checkpoint_that_cannot_be_removed_does_not_end_a_run(checkpoints, save, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(path, **_):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

        patch.setattr(os, "unlink", fail)
        new = save(checkpoints, 12)
    assert newest_checkpoint(checkpoints) == new
    remove_partials(checkpoints)
    save(checkpoints, 16)
    assert names(checkpoints) == ["step-12", "step-16"]


# Failures while a checkpoint is written


@pytest.mark.parametrize("writer", ["save_model", "save_file", "write_json", "file_sha256"])
@pytest.mark.parametrize("number", [8, 12], ids=["in the place of another", "as a new one"])
def test_a_save_that_fails_leaves_existing_checkpoints(checkpoints, save, monkeypatch, writer, number):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(checkpoints)
    monkeypatch.setattr(checkpoint_module, writer, fail)
    with pytest.raises(UserError, match=f"^[^\n]*step-{number}: no space left on device[^\n]*$"):
        save(checkpoints, number, keep=1)
    monkeypatch.undo()
    assert contents(checkpoints) == before
    assert newest_checkpoint(checkpoints) == checkpoints / "step-8"


def test_a_full_disk_leaves_the_last_checkpoint(save, small_disk):
    subprocess.run(["mount", "-o", "remount,size=800k", small_disk], check=True)  # one checkpoint and a half
    checkpoints = small_disk / "checkpoints"
    save(checkpoints, 4, keep=1)
    before = contents(checkpoints)
    with pytest.raises(UserError, match="^[^\n]*step-8: no space left on device[^\n]*$"):
        save(checkpoints, 8, keep=1)
    assert contents(checkpoints) == before
    folder = newest_checkpoint(checkpoints)
    model = open_model(folder)
    load_optimizers(folder, model, optimizers_of(model))


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def is_killed_before_operation(number: int, checkpoints: Path, work: Callable[[], object]) -> bool:
    """Do `work` in a process that kills itself before its operation of this number. False if it has fewer."""
    operations = itertools.count()

    def watch(event: str, arguments: tuple) -> None:
        # Operations that remove a file name it without its folder.
        is_ours = event in CHANGES and (event != "open" or str(checkpoints) in str(arguments[0]))
        if is_ours and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(12, id="a new one"),
        pytest.param(8, id="in the place of a damaged one", marks=pytest.mark.slow),
    ],
)
def test_a_save_killed_before_any_of_its_operations_leaves_a_valid_checkpoint_and_can_be_repeated(
    saved, save, tmp_path, number
):
    start, whole = tmp_path / "start", tmp_path / "whole"
    shutil.copytree(saved, start)
    if number == 8:
        flip_a_bit(start / "step-8" / "optimizer.safetensors")
    shutil.copytree(start, whole)
    save(whole, number)
    found = set()
    for operation in itertools.count():
        checkpoints = tmp_path / str(operation) / "checkpoints"
        shutil.copytree(start, checkpoints)
        killed = is_killed_before_operation(operation, checkpoints, partial(save, checkpoints, number))
        newest = newest_checkpoint(checkpoints)
        source = whole if (whole / newest.name).exists() else start
        assert contents(newest) == contents(source / newest.name)
        found.add(newest.name)
        remove_partials(checkpoints)
        save(checkpoints, number)
        assert contents(checkpoints) == contents(whole)
        if not killed:
            break
        shutil.rmtree(checkpoints)
    assert operation > 50
    assert found == {"step-4" if number == 8 else "step-8", f"step-{number}"}


# What is restored


def with_names_that_begin_alike() -> tuple[PreTrainedModel, list[torch.optim.Optimizer]]:
    """Its layers include h.1 and h.10."""
    model = make_model(TINY_GPT2)
    for name in ("scale", "scale_2", "scale_2_exp_avg"):
        model.register_parameter(name, torch.nn.Parameter(torch.randn(3)))
    optimizers = optimizers_of(model)
    take_step(model, optimizers, seed=0)
    return model, optimizers


@pytest.mark.parametrize(
    "make",
    [trained, lambda: trained(muon=True), lambda: trained(TINY_GPT2, muon=True), with_names_that_begin_alike],
    ids=["adamw", "adamw and muon", "gpt2", "names that begin alike"],
)
def test_optimizers_are_restored_bit_for_bit(save, tmp_path, make):
    model, optimizers = make()
    folder = save(tmp_path, 1, (model, optimizers))
    resumed = optimizers_of(model, muon=len(optimizers) == 2)
    load_optimizers(folder, model, resumed)
    compared = 0
    for before, after in zip(optimizers, resumed, strict=True):
        assert before.state.keys() == after.state.keys() == {p for g in before.param_groups for p in g["params"]}
        for parameter, state in before.state.items():
            assert state.keys() == after.state[parameter].keys()
            for name, tensor in state.items():
                assert tensor.dtype == after.state[parameter][name].dtype
                assert tensor.numpy().tobytes() == after.state[parameter][name].numpy().tobytes()
                compared += 1
    assert compared == sum(len(state) for optimizer in optimizers for state in optimizer.state.values()) > 0


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "adamw and muon"])
def test_the_next_step_equals_that_of_a_run_that_never_stopped(save, tmp_path, muon):
    model, optimizers = trained(muon=muon)
    folder = save(tmp_path, 1, (model, optimizers))
    resumed = open_model(folder)
    resumed_optimizers = optimizers_of(resumed, muon)
    load_optimizers(folder, resumed, resumed_optimizers)
    for each in ((model, optimizers), (resumed, resumed_optimizers)):
        take_step(*each, seed=2)
    for (name, before), after in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert before.detach().numpy().tobytes() == after.detach().numpy().tobytes(), name


@pytest.mark.parametrize("share", ["none", "half"])
def test_weights_without_optimizer_state_are_restored_too(save, tmp_path, share):
    """All steps so far were skipped, or a part of the model is not in use."""
    model = make_model(TINY_MODEL)
    optimizers = optimizers_of(model)
    if share == "half":
        for parameter in list(model.parameters())[::2]:
            parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    folder = save(tmp_path, 1, (model, optimizers))
    resumed = optimizers_of(model)
    load_optimizers(folder, model, resumed)
    expected = {parameter for parameter in model.parameters() if parameter.grad is not None}
    assert set(resumed[0].state) == expected
    for each in (optimizers, resumed):
        take_step(model, each, seed=0)
    for parameter in model.parameters():
        assert torch.equal(optimizers[0].state[parameter]["step"], resumed[0].state[parameter]["step"])


def test_optimizers_do_not_keep_the_file_open(save, tmp_path):
    """A tensor that is mapped from the file would keep its disk space in use."""
    model, optimizers = trained()
    folder = save(tmp_path, 1, (model, optimizers))
    resumed = optimizers_of(model)
    load_optimizers(folder, model, resumed)
    with (folder / "optimizer.safetensors").open("r+b") as file:
        file.write(bytes((folder / "optimizer.safetensors").stat().st_size))
    for parameter, state in optimizers[0].state.items():
        assert torch.equal(state["exp_avg"], resumed[0].state[parameter]["exp_avg"])


@pytest.mark.parametrize(
    ("config", "muon", "message"),
    [
        (TINY_GPT2, False, "transformer.wte.weight"),
        (TINY_MODEL | {"num_hidden_layers": 3}, False, "model.layers.2.*no optimizer.*AdamW"),
        (TINY_MODEL | {"num_hidden_layers": 1}, False, "model.layers.1.*AdamW.*no optimizer"),
        (
            TINY_MODEL | {"intermediate_size": 32},
            False,
            r"gate_proj.weight.exp_avg has the shape \[64, 32\].*\[32, 32\]",
        ),
        (TINY_MODEL, True, "proj.weight was trained by AdamW, now by Muon"),
    ],
    ids=["another architecture", "more layers", "fewer layers", "another width", "another optimizer"],
)
def test_optimizers_of_another_model_are_an_error_in_one_line(saved, config, muon, message):
    model = make_model(config)
    path = saved / "step-8" / "optimizer.safetensors"
    with pytest.raises(UserError, match=f"^{path}: can't resume: [^\n]*{message}[^\n]*$"):
        load_optimizers(saved / "step-8", model, optimizers_of(model, muon))
