"""A saved folder opens through the Auto classes with Transformers alone, without the healthslm package."""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from clean_process import result_of, start_clean_process
from paths import REPOSITORY
from safetensors import safe_open
from tiny_models import HEADS, byte_model, byte_tokenizer, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

CLASS_NAMES = {f"AutoModel{head.removeprefix('Model')}": f"HealthSLM{head}" for head in HEADS}
CODE_FILES = {f"{part}_healthslm.py" for part in ("configuration", "modeling", "packing", "loss")}


def open_every_way(folder: str, copy: str, ids: str) -> dict:
    """Open a folder in every way that users have, save what was opened to `copy`; runs in a clean process."""
    import builtins

    import torch
    import transformers

    questions = []  # of Transformers, whether it may run the code of the folder
    builtins.input = lambda question="": questions.append(question) or "n"
    ids = torch.tensor(json.loads(ids))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    models = {
        name: getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        for name in config.auto_map
        if name != "AutoConfig"
    }
    model = models["AutoModelForCausalLM"]
    placed = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    untrusted_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    fast_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    generate = transformers.pipeline("text-generation", model=folder, trust_remote_code=True)
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    return {
        "config_class": type(config).__name__,
        "classes": {name: type(model).__name__ for name, model in models.items()},
        "packages": list({type(model).__module__.split(".")[0] for model in models.values()}),
        "logits": model(ids).logits.tolist(),
        "placed_logits": placed(ids.to(placed.device)).logits.tolist(),
        "tokens": tokenizer("Aspirin")["input_ids"],
        "tokens_without_trust": untrusted_tokenizer("Aspirin")["input_ids"],
        "tokens_of_fast_tokenizer": fast_tokenizer("Aspirin")["input_ids"],
        "questions": questions,
        "generated": generate("Aspirin", max_new_tokens=5, do_sample=False)[0]["generated_text"],
    }


def open_causal_lm(folder: str, ids: str, shared_folder: str, processes: str = "1") -> dict:
    """Open the folder at the same moment as the other processes do; runs in clean processes."""
    import os
    import pathlib
    import time

    import torch
    import transformers

    (pathlib.Path(shared_folder) / f"{os.getpid()}.ready").touch()
    while len(list(pathlib.Path(shared_folder).glob("*.ready"))) < int(processes):
        time.sleep(0.001)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return {"logits": model(torch.tensor(json.loads(ids))).logits.tolist()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "small-model"
    byte_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def copy(folder: Path) -> Path:
    """The folder as a clean process saves it again; written by the fixture `opened`."""
    return folder.with_name("copy")


@pytest.fixture(scope="module")
def opened(folder: Path, copy: Path) -> dict:
    process = start_clean_process(folder.with_name("home"), open_every_way, folder, copy, random_ids(2, 9).tolist())
    return result_of(process)


def expected_logits() -> torch.Tensor:
    return byte_model()(random_ids(2, 9)).logits


def test_a_clean_process_opens_every_class_from_the_folders_own_code(opened: dict) -> None:
    assert opened["config_class"] == "HealthSLMConfig"
    assert opened["classes"] == CLASS_NAMES
    assert opened["packages"] == ["transformers_modules"]


def test_a_clean_process_computes_the_same_logits(opened: dict) -> None:
    torch.testing.assert_close(torch.tensor(opened["logits"]), expected_logits())


def test_an_automatic_device_map_gives_the_same_logits(opened: dict) -> None:
    torch.testing.assert_close(torch.tensor(opened["placed_logits"]), expected_logits())


def test_the_tokenizer_opens_with_and_without_trust(opened: dict) -> None:
    expected = byte_tokenizer()("Aspirin")["input_ids"]
    assert opened["tokens"] == opened["tokens_without_trust"] == opened["tokens_of_fast_tokenizer"] == expected


def test_nothing_waits_for_an_answer_on_standard_input(opened: dict) -> None:
    assert opened["questions"] == []


def test_a_pipeline_continues_the_prompt(opened: dict) -> None:
    assert opened["generated"].startswith("Aspirin")
    assert len(opened["generated"]) > len("Aspirin")


def test_a_loaded_model_is_saved_with_its_code_and_configuration(opened: dict, folder: Path, copy: Path) -> None:
    for name in CODE_FILES:
        assert (copy / name).read_text() == (REPOSITORY / name).read_text()
    assert json.loads((copy / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_a_saved_copy_opens_from_the_cache_of_the_hub(opened: dict, copy: Path, tmp_path: Path) -> None:
    """Transformers collects the code files of a cached repository differently from those of a folder."""
    cached = tmp_path / "hub/hub/models--tests--small-model"  # HF_HOME is the first of the two folders `hub`
    commit = "0" * 40
    shutil.copytree(copy, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    process = start_clean_process(tmp_path, open_causal_lm, "tests/small-model", random_ids(2, 9).tolist(), tmp_path)
    torch.testing.assert_close(torch.tensor(result_of(process)["logits"]), expected_logits())


def logits_in_a_spawned_process(model: PreTrainedModel, ids: torch.Tensor) -> list:
    return model(ids).logits.tolist()


@pytest.mark.slow
def test_a_model_can_be_passed_to_a_spawned_process() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        logits = pool.submit(logits_in_a_spawned_process, byte_model(), random_ids(2, 9)).result()
    torch.testing.assert_close(torch.tensor(logits), expected_logits())


@pytest.mark.slow
def test_two_processes_at_once_share_an_empty_modules_cache(folder: Path, tmp_path: Path) -> None:
    ids = random_ids(2, 9).tolist()
    processes = [start_clean_process(tmp_path, open_causal_lm, folder, ids, tmp_path, 2) for _ in range(2)]
    for process in processes:
        torch.testing.assert_close(torch.tensor(result_of(process)["logits"]), expected_logits())


@pytest.mark.parametrize("head", HEADS)
def test_a_folder_saved_with_one_head_opens_with_the_others(head: str, tmp_path: Path) -> None:
    saved = byte_model(head)
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [f"HealthSLM{head}"]
    assert config["auto_map"] == json.loads((REPOSITORY / "config.json").read_text())["auto_map"]
    assert {path.name for path in tmp_path.glob("*.py")} == CODE_FILES

    body = dict(saved.base_model.state_dict())
    for auto_class, class_name in CLASS_NAMES.items():
        model = getattr(transformers, auto_class).from_pretrained(tmp_path, trust_remote_code=True)
        assert type(model).__name__ == class_name
        torch.testing.assert_close(dict(model.base_model.state_dict()), body, rtol=0, atol=0)


def test_the_default_model_is_saved_as_110_tensors_without_a_second_head(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        shapes = {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118
    assert len(shapes) == 110
    assert not any("lm_head" in name for name in shapes)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 15_276_288


def test_the_root_of_the_repository_gives_a_configuration_and_an_untrained_model() -> None:
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.num_parameters() == 15_276_288
    assert GenerationConfig.from_pretrained(REPOSITORY).eos_token_id == config.eos_token_id
