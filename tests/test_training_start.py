"""How a run starts: from a configuration or weights, with their tokenizer, and which mistakes are named before it."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from pipeline_folders import TINY_GPT2, TINY_MODEL
from training_fixtures import weights
from transformers import GenerationConfig

from healthslm.errors import UserError
from healthslm.models import make_model
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus
from healthslm.tokenization.tokens import TokenizedSplit
from healthslm.training import plan, setup
from healthslm.training.loop import pretrain
from healthslm.training.setup import fit_to_tokenizer, load_model

pytest_plugins = "training_fixtures"
pytestmark = pytest.mark.usefixtures("short_runs_are_quick")


def test_training_starts_from_the_weights_of_a_folder(finished_run, pretrain_options, tmp_path):
    pretrain(
        pretrain_options(tmp_path / "further", model=str(finished_run / "best"), learning_rate=0.0, weight_decay=0.0)
    )
    assert weights(tmp_path / "further/best") == weights(finished_run / "best")


def test_weights_in_another_format_are_trained_further_too(tmp_path):
    """They must not be taken for a folder without weights, which starts from new ones."""
    trained = make_model(TINY_GPT2)
    trained.config.save_pretrained(tmp_path)
    torch.save(trained.state_dict(), tmp_path / "pytorch_model.bin")
    torch.manual_seed(1)
    opened = make_model(str(tmp_path)).state_dict()
    assert all(torch.equal(weight, opened[name]) for name, weight in trained.state_dict().items())


@pytest.fixture(scope="module")
def other_tokens(sample_folders, tmp_path_factory) -> Path:
    """The same corpus, tokenized with two tokens of the vocabulary swapped."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(sample_folders.tokenizer, root / "tokenizer")
    path = root / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = str(root / "tokenizer")
    tokenize_corpus(TokenizeOptions(corpus=sample_folders.corpus, tokenizer=tokenizer, output=root / "tokens"))
    return root / "tokens"


def test_trained_weights_refuse_tokens_of_another_tokenizer_unless_accepted(
    finished_run, pretrain_options, other_tokens, tmp_path
):
    changes = {"model": str(finished_run / "best"), "tokens": other_tokens, "max_tokens": 512}
    with pytest.raises(UserError, match=f"not the tokenizer of the weights in {finished_run}/best.*--accept-changes"):
        pretrain(pretrain_options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    pretrain(pretrain_options(tmp_path / "run", **changes, accept_changes=True))


def test_a_configuration_without_weights_takes_any_tokenizer(finished_run, pretrain_options, other_tokens, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished_run / "best", folder)
    (folder / "model.safetensors").unlink()
    pretrain(pretrain_options(tmp_path / "run", model=str(folder), tokens=other_tokens, max_tokens=512))


def test_weights_from_the_hub_refuse_tokens_of_another_tokenizer(
    pretrain_options, sample_folders, other_tokens, tmp_path
):
    """Of a repository like GPT-2's: with the vocabulary and the merges in files of their own, and no tokenizer.json."""
    name = f"someone/{tmp_path.name}"  # of which the cache, which all tests share, has nothing else
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    make_model(TINY_GPT2).save_pretrained(snapshot)
    content = json.loads((sample_folders.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    (snapshot / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (snapshot / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in content["model"]["merges"]))
    special = {"eos_token": content["added_tokens"][0]["content"], "tokenizer_class": "GPT2Tokenizer"}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(special))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)

    tokens = tmp_path / "tokens"
    tokenize_corpus(TokenizeOptions(corpus=sample_folders.corpus, tokenizer=name, output=tokens))
    assert not (snapshot / "tokenizer.json").exists()
    pretrain(pretrain_options(tmp_path / "same", model=name, tokens=tokens, max_tokens=512))
    with pytest.raises(UserError, match=f"not the tokenizer of the weights in {name}"):
        pretrain(pretrain_options(tmp_path / "other", model=name, tokens=other_tokens, max_tokens=512))


def test_weights_without_a_tokenizer_are_refused(finished_run, pretrain_options, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished_run / "best" / name, folder)
    with pytest.raises(UserError, match=f"{folder}: no tokenizer in this folder.*use --accept-changes to train"):
        pretrain(pretrain_options(tmp_path / "run", model=str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": TINY_MODEL | {"vocab_size": 300}}, "512 entries, the model only 300"),
        ({"model": TINY_MODEL | {"num_attention_heads": 3, "num_key_value_heads": 2}}, "multiple of"),
        ({"model": {"model_type": "gtp2"}}, "gtp2"),
        ({"model": {"model_type": "gpt2", "n_layers": 3}}, "n_layers"),
        ({"model": "no/such/folder/or/name"}, "no/such/folder/or/name"),
        ({"batch_tokens": 500}, "not a multiple of 256.*use 256"),
        ({"tokens": Path("no-such-folder")}, "no-such-folder"),
        ({"resume": True}, "no run to resume"),
        ({"context": 512}, "context: must be at most 64, the model's context, not 512"),
        ({"context": 512, "dry_run": True}, "context: must be at most 64, the model's context, not 512"),
        ({"save_every": 0}, "save_every: must be at least 1, not 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_is_named_before_anything_is_written(pretrain_options, tmp_path, changes, message):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        pretrain(pretrain_options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_tokens_without_validation_documents_are_refused_before_anything_is_written(
    sample_folders, pretrain_options, tmp_path
):
    corpus, tokens = shutil.copytree(sample_folders.corpus, tmp_path / "corpus"), tmp_path / "tokens"
    shutil.rmtree(corpus / "validation")
    tokenize_corpus(TokenizeOptions(corpus=corpus, tokenizer=str(sample_folders.tokenizer), output=tokens))
    for dry_run in (True, False):
        with pytest.raises(UserError, match="no validation documents"):
            pretrain(pretrain_options(tmp_path / "run", tokens=tokens, dry_run=dry_run))
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_asked_for_and_missing_is_reported(pretrain_options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: PyTorch .* finds no GPU here; use --device cpu"):
        pretrain(pretrain_options(tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_compiled_is_reported_with_the_option_to_change(pretrain_options, tmp_path):
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(UserError, match="^can't compile the model: .*use --compile false$"),
    ):
        pretrain(pretrain_options(tmp_path / "run", compile=True))


def test_a_run_of_days_on_a_cpu_warns_with_its_hours(pretrain_options, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(setup, "CPU_FLOPS", 100.0)
    pretrain(pretrain_options(tmp_path / "run", max_tokens=512, device="cpu"))
    (warning,) = [record.getMessage() for record in caplog.records if "hours on this CPU" in record.getMessage()]
    hours = float(re.search(r"at best ([\d,]+) hours", warning)[1].replace(",", ""))
    operations = plan.flops_per_token(make_model(TINY_MODEL), context=64) * 512
    assert hours == pytest.approx(operations / 100 / torch.get_num_threads() / 3600, rel=0.01)


@pytest.mark.parametrize("shape", [TINY_MODEL, TINY_GPT2], ids=lambda shape: shape["model_type"])
def test_layers_with_zero_residual_projections_are_the_identity(pretrain_options, tmp_path, shape):
    """So a new model predicts about evenly: its loss is the logarithm of the vocabulary size."""
    options = pretrain_options(tmp_path / "run", model=shape, zero_residual_projections=True)
    ids = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = load_model(options, None).eval()
        logits, loss = model(ids).logits, model(ids, labels=ids).loss
        assert loss.item() == pytest.approx(math.log(512), rel=0.01)
        del next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[:]
        assert torch.equal(model(ids).logits, logits)
        usual = load_model(replace(options, zero_residual_projections=False), None).eval()
        assert not torch.allclose(usual(ids).logits, logits, atol=1e-3)


@pytest.mark.parametrize("shape", [TINY_MODEL, TINY_GPT2], ids=lambda shape: shape["model_type"])
def test_a_model_takes_the_special_tokens_of_the_tokenizer(sample_folders, shape):
    """GPT-2's configuration names 50256, which a small vocabulary doesn't have."""
    model = make_model(shape | {"pad_token_id": 7})
    model.generation_config.update(bos_token_id=7, eos_token_id=7, pad_token_id=7)
    fit_to_tokenizer(model, TokenizedSplit(sample_folders.tokens, "train"), sample_folders.tokenizer)
    vocabulary = json.loads((sample_folders.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    for config in (model.config, model.generation_config):
        found = [getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")]
        assert found == [vocabulary["<|endoftext|>"], vocabulary["<|endoftext|>"], vocabulary["<|pad|>"]]
        assert 50_256 not in config.to_dict().values()


def test_a_new_model_takes_no_settings_from_the_current_folder(tmp_path, monkeypatch):
    GenerationConfig(do_sample=True, temperature=0.5).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert make_model(TINY_GPT2).generation_config.temperature != 0.5


def test_a_run_is_not_overwritten(finished_run, pretrain_options):
    before = (finished_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        pretrain(pretrain_options(finished_run))
    assert (finished_run / "metrics.jsonl").read_bytes() == before
