"""A release updates weights, results and documents of the repository: all or none, and only for a better model."""

import hashlib
import importlib.metadata
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import checksums
from huggingface_hub import ModelCard
from PIL import Image
from pipeline_folders import Folders, make_folders
from release_inputs import MODEL_CONFIG, held_out_rows, write_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.data_card.describe import DataCardOptions, describe_corpus
from healthslm.errors import UserError
from healthslm.evaluation.metrics import METRICS
from healthslm.evaluation.question_answering import verdict
from healthslm.plots import FIGURES
from healthslm.release import release as release_module
from healthslm.release.card import BEGIN, END, TRAINING_CURVE
from healthslm.release.release import ReleaseOptions, release
from healthslm.training.hardware import describe_hardware
from healthslm.training.loop import pretrain
from healthslm.training.options import PretrainOptions

STEPS, BATCH_TOKENS = 30, 512


@dataclass(frozen=True)
class Inputs:
    folders: Folders
    files: dict[str, Path]
    run: Path
    root: Path
    """A model repository to copy and to release into: the project's, with the architecture of the run."""


@pytest.fixture(scope="module")
def inputs(repository, tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("release")
    files = write_inputs(folder)
    folders = make_folders(folder / "sample", held_out=list(files.values()))
    run, root = folder / "run", folder / "root"
    pretrain(
        PretrainOptions(
            model=MODEL_CONFIG,
            tokens=folders.tokens,
            output=run,
            max_tokens=STEPS * BATCH_TOKENS,
            batch_tokens=BATCH_TOKENS,
            micro_batch_size=1,
            learning_rate=3e-3,
            betas=(0.9, 0.99),
            evaluate_every=10,
            evaluation_documents=3,
            save_every=15,
        )  # fmt: skip
    )
    root.mkdir()
    for path in (*repository.glob("*_healthslm.py"), repository / "generation_config.json", repository / "README.md"):
        shutil.copy(path, root)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "best" / name, root)
    config = read_json(run / "best/config.json")
    del config["dtype"]
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    describe_corpus(DataCardOptions(folders.corpus, root / "docs/corpus-card", folders.tokens, context=256))
    names = yaml.safe_dump({"names": {"pubmedsample26n0001": "the first | of the sample"}})
    (root / "docs/corpus-card.yaml").write_text(names, encoding="utf-8")
    return Inputs(folders, files, run, root)


@pytest.fixture(scope="module")
def options(inputs) -> Callable[..., ReleaseOptions]:
    def make(root: Path, **changes: Any) -> ReleaseOptions:
        values = {"run": inputs.run, "corpus": inputs.folders.corpus, "tokens": inputs.folders.tokens, **inputs.files}
        more = {
            "hardware": "two cores of a test machine",
            "documents": 6,
            "baselines": {"same | model": str(inputs.run / "best")},
        }
        return ReleaseOptions(root=root, **(values | more | changes))

    return make


@pytest.fixture(scope="module")
def released(inputs, options, tmp_path_factory) -> Path:
    """The repository after a release."""
    root = tmp_path_factory.mktemp("released") / "root"
    shutil.copytree(inputs.root, root)
    release(options(root))
    return root


@pytest.fixture
def released_copy(released, tmp_path) -> Path:
    return shutil.copytree(released, tmp_path / "root")


@pytest.fixture
def root(inputs, tmp_path) -> Path:
    """The repository before its first release."""
    return shutil.copytree(inputs.root, tmp_path / "root")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def results_table(root: Path) -> str:
    """What the release wrote into the README."""
    return readme(root).partition(BEGIN)[2].partition(END)[0]


def evaluation_page(root: Path) -> str:
    return (root / "docs/evaluation.md").read_text(encoding="utf-8")


def training_page(root: Path) -> str:
    return (root / "docs/training-data.md").read_text(encoding="utf-8")


@torch.no_grad()
def plain_bits_per_byte(model, tokenizer) -> float:
    """Computed one document at a time. None exceeds the context."""
    bits = num_bytes = 0
    for row in held_out_rows():
        text = f"{row['title']}\n{row['text']}"
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
        log_probabilities = model(ids[None]).logits[0].double().log_softmax(-1)
        bits -= log_probabilities[:-1].gather(1, ids[1:, None]).sum().item() / math.log(2)
        num_bytes += len(text.encode())
    return bits / num_bytes


def test_the_repository_opens_in_fp32_and_has_the_bits_per_byte_of_its_card(released):
    model = AutoModelForCausalLM.from_pretrained(released, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(released, trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    in_card = float(re.search(r"\*\*(\d\.\d+) bits per byte\*\*", readme(released))[1])
    assert plain_bits_per_byte(model, tokenizer) == pytest.approx(in_card, abs=0.001)


def test_the_weights_are_those_of_the_run_rounded_to_bf16_in_one_file(inputs, released):
    assert [path.name for path in released.glob("*.safetensors")] == ["model.safetensors"]
    trained, rounded = (load_file(folder / "model.safetensors") for folder in (inputs.run / "best", released))
    assert trained.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in trained.items())
    with safe_open(released / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_only_the_dtype_in_config_json_the_readme_and_generated_files_change(inputs, released):
    config = read_json(released / "config.json")
    assert config == read_json(inputs.root / "config.json") | {"dtype": "float32"}
    assert len(config["auto_map"]) == 6
    before, after = checksums(inputs.root), checksums(released)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", "README.md"}
    new = {name for name in after if name not in before}
    assert {name for name in new if name.startswith("results/")} == {
        "results/pubmed_ids.json", "results/training/config.yaml", "results/training/metrics.jsonl",
        *(f"results/{name}.json" for name in METRICS),
    }  # fmt: skip
    assert {name for name in new if not name.startswith("results/")} == {
        "model.safetensors", "docs/evaluation.md", "docs/training-data.md",
        *(f"docs/evaluation/{name}" for name in (TRAINING_CURVE, *FIGURES)),
    }  # fmt: skip


def test_the_metadata_of_the_card_contain_the_results_and_keep_everything_else(inputs, released):
    before, card = (ModelCard.load(root / "README.md").data for root in (inputs.root, released))
    for name in ("language", "license", "library_name", "pipeline_tag", "tags"):
        assert card[name] == before[name] is not None
    found = {(result.dataset_type, result.metric_type): result for result in card.eval_results}
    held_out, pubmedqa = (read_json(released / f"results/{name}.json") for name in ("held_out", "pubmedqa"))
    bits = found["held-out-abstracts", "bits_per_byte"]
    assert bits.metric_value == pytest.approx(held_out["model"]["bits_per_byte"], abs=5e-5)
    assert bits.metric_args["interval"] == pytest.approx(held_out["model"]["interval"], abs=5e-5)
    assert found["pubmedqa", "accuracy"].metric_value == pubmedqa["pubmedqa"]["accuracy"]["share"]
    assert found.keys() == {
        ("held-out-abstracts", "bits_per_byte"),
        ("harder-minimal-pairs", "accuracy"),
        ("pubmedqa", "accuracy"),
    }
    assert card.model_name == "HealthSLM"


def test_the_readme_changes_only_between_the_marks(inputs, released):
    old, new = (readme(root).partition("\n---\n")[2] for root in (inputs.root, released))
    assert new.partition(BEGIN)[0] == old.partition(BEGIN)[0]
    assert new.partition(END)[2] == old.partition(END)[2]
    old_section, new_section = (text.partition(BEGIN)[2].partition(END)[0] for text in (old, new))
    assert old_section != new_section


def test_the_training_page_describes_the_run_and_the_corpus(inputs, released):
    page = training_page(released)
    report = read_json(inputs.folders.corpus / "report.json")
    assert f"| tokens seen | {STEPS * BATCH_TOKENS:,} |" in page
    tokens = read_json(inputs.folders.tokens / "tokens.json")["splits"]["train"]["files"]
    passes = STEPS * BATCH_TOKENS / sum(file["tokens"] for file in tokens)
    assert f"| passes over the training data | {passes:.2f} |" in page
    assert f"| steps | {STEPS}, of which 0 were skipped" in page
    assert f"| hardware | {describe_hardware(torch.device('cpu'))} |" in page
    assert "| optimizer | AdamW |" in page and "| seed | 0 |" in page
    for path in (released / "model.safetensors", released / "tokenizer.json", inputs.folders.corpus / "report.json"):
        assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" in page
    for file in (*report["files"], *report["held_out"]):
        assert f"`{file['sha256']}`" in page
    assert "; 0% of the documents come without a stated license" in page
    assert "| the first \\| of the sample | " in page and "NLM terms" in page


def test_the_recipe_on_the_training_page_lists_the_options_that_differ_from_the_defaults(released):
    recipe = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", training_page(released), re.MULTILINE | re.DOTALL)[1])
    assert recipe == {
        "model": MODEL_CONFIG, "max_tokens": STEPS * BATCH_TOKENS, "batch_tokens": BATCH_TOKENS, "learning_rate": 3e-3,
        "betas": [0.9, 0.99],
    }  # fmt: skip


def test_the_samples_are_the_first_five_generated_documents(released):
    shown = re.findall(r"^~~~~~~text\n(.*?)\n~~~~~~$", evaluation_page(released), re.MULTILINE | re.DOTALL)
    generated = read_json(released / "results/generation.json")["samples"]
    assert [sample.split() for sample in shown] == [sample.split() for sample in generated]
    assert len(shown) == 5


def test_the_documents_link_to_existing_files_and_have_no_unfilled_templates(released, repository):
    docs = {path.name for path in (repository / "docs").glob("*.md")}  # which the copy has only in part
    for page, text in (
        (released / "README.md", results_table(released)),
        (released / "docs/evaluation.md", evaluation_page(released)),
        (released / "docs/training-data.md", training_page(released)),
    ):
        assert "{{" not in text and "{%" not in text
        links = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
        assert links and all((page.parent / link).exists() for link in links - docs)


def test_the_results_table_has_one_row_for_each_main_result_with_its_baselines(released):
    table = results_table(released).replace("\\|", "/")
    rows = [row.strip("|").split("|") for row in table.splitlines() if row.startswith("|")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    held_out, baselines, pubmed, pairs, pubmedqa, memorization = (
        read_json(released / f"results/{name}.json")
        for name in ("held_out", "baselines", "pubmed", "minimal_pairs", "pubmedqa", "memorization")
    )
    value, interval, compared = cells["bits per byte of held-out abstracts"]
    assert value == f"**{held_out['model']['bits_per_byte']:.4f}**"
    assert interval == "{:.4f} to {:.4f}".format(*held_out["model"]["interval"])
    others = {
        "untrained": held_out["untrained"]["bits_per_byte"],
        f"same / model ({STEPS * BATCH_TOKENS:,} tokens)": baselines["models"]["same | model"]["bits_per_byte"],
        "xz": held_out["xz"]["together"],
    }
    assert compared == "; ".join(f"{name} {bits:.4f}" for name, bits in others.items())
    assert (
        cells[f"bits per byte of {pubmed['documents']} held-out PubMed citations"][0]
        == f"{pubmed['bits_per_byte']:.4f}"
    )
    rates = [found["scores"]["all"]["win_rate"]["share"] for found in (pairs, pairs["harder"])]
    names = [name for name in cells if "minimal pairs" in name]
    assert [cells[name][0] for name in names] == [f"{rate:.1%}" for rate in rates]
    answers = pubmedqa["pubmedqa"]
    assert cells["PubMedQA, accuracy, zero-shot"][0] == f"{answers['accuracy']['share']:.1%}"
    assert cells["PubMedQA, accuracy, zero-shot"][2] == 'always "yes" 50.0%'
    assert cells["PubMedQA, macro-F1, zero-shot"][0] == f"{answers['macro_f1']['mean']:.3f}"
    training, unseen = (memorization[split]["abstracts"]["bits_per_byte"] for split in ("training", "held_out"))
    value, _, baseline = cells["memorization: bits per byte of training abstracts"]
    assert (value, baseline) == (f"{training:.4f}", f"held-out abstracts {unseen:.4f}")
    assert verdict("PubMedQA", answers) in results_table(released)


def test_the_evaluation_page_shows_the_results_of_each_metric(released):
    text = evaluation_page(released)
    assert {Path(link).name for link in re.findall(r"\]\(([^)]+\.png)\)", text)} == set(FIGURES)
    held_out, baselines = (read_json(released / f"results/{name}.json") for name in ("held_out", "baselines"))
    for found in (held_out["model"], held_out["untrained"], baselines["models"]["same | model"]):
        assert f"| {found['bits_per_byte']:.4f} | {found['interval'][0]:.4f} to {found['interval'][1]:.4f} |" in text
    pairs = read_json(released / "results/minimal_pairs.json")
    for scores in (pairs["scores"], pairs["harder"]["scores"]):
        for kind, found in scores.items():
            assert f"| {kind} | {found['pairs']} | {found['win_rate']['share']:.1%} (" in text
    memorization = read_json(released / "results/memorization.json")
    for split in ("training", "held_out"):
        assert f"{memorization[split]['matching_tokens']['mean']:.1%} (" in text
        assert f"| {memorization[split]['abstracts']['bits_per_byte']:.4f} |" in text
        exact = round(memorization[split]["exact"]["share"] * memorization[split]["documents"])
        assert f" {exact} of {memorization[split]['documents']:,} {split.replace('_', '-')} documents" in text
    assert "too few documents to tell" in text
    quantization = read_json(released / "results/quantization.json")
    assert f"| fp32 | {quantization['precisions']['fp32']['file_bytes']:,} |" in text
    assert f"on {quantization['machine']}." in text and f"torch {importlib.metadata.version('torch')}" in text
    assert f"`{hashlib.sha256((released / 'model.safetensors').read_bytes()).hexdigest()}`" in text


def test_all_rows_of_a_table_have_the_same_number_of_cells(released):
    for page in (results_table(released), evaluation_page(released), training_page(released)):
        text = page.replace("\\|", "")
        for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
            assert len({row.count("|") for row in table.splitlines()}) == 1, table
            assert re.fullmatch(r"\|( ---:? \|)+", table.splitlines()[1]), table


def test_figures_are_images_without_times_and_versions(released):
    for name in (TRAINING_CURVE, *FIGURES):
        with Image.open(released / "docs/evaluation" / name) as image:
            assert image.format == "PNG" and image.width > 600
            assert image.info.keys() <= {"dpi"}
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_the_comparison_shows_the_training_tokens_of_each_model(released):
    section = evaluation_page(released).partition("## Bits per byte of held-out abstracts")[2].partition("\n## ")[0]
    text = section.replace("\\|", "/")
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]*) \| ([\d,]*) \| \d\.\d{4} \|", text, re.MULTILINE)
    assert {name: tokens for name, _, tokens in rows} == {
        "**HealthSLM**": f"{STEPS * BATCH_TOKENS:,}",
        "HealthSLM, untrained": "0",
        "same / model": f"{STEPS * BATCH_TOKENS:,}",
    }


def test_the_metrics_of_the_run_are_published_up_to_the_step_of_the_weights(inputs, released):
    """All of them here, since the last evaluation is the best."""
    assert (released / "results/training/metrics.jsonl").read_bytes() == (inputs.run / "metrics.jsonl").read_bytes()


def test_the_recipe_of_the_run_is_published_without_local_folders(inputs, released):
    published = (released / "results/training/config.yaml").read_text(encoding="utf-8")
    assert str(inputs.folders.tokens.parent) not in published
    of_run, found = yaml.safe_load((inputs.run / "config.yaml").read_text(encoding="utf-8")), yaml.safe_load(published)
    assert found == of_run | {"tokens": "../../tokens", "output": "../../runs/healthslm"}


def test_a_release_that_failed_late_does_not_evaluate_again(inputs, options, root, tmp_path, monkeypatch):
    """Measuring the speed of generation twice would give different results."""
    run = shutil.copytree(inputs.run, tmp_path / "run", ignore=shutil.ignore_patterns("results"))

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(release_module, "write_pages", fail)
        with pytest.raises(OSError, match="No space left"):
            release(options(root, run=run))
    first = (run / "results/quantization.json").read_bytes()
    release(options(root, run=run))
    assert (root / "results/quantization.json").read_bytes() == first


def test_a_model_that_is_not_better_is_refused_naming_both_results(inputs, released_copy, run_script_here):
    before = checksums(released_copy)
    bits = read_json(released_copy / "results/held_out.json")["model"]["bits_per_byte"]
    files = {"corpus": inputs.folders.corpus, "tokens": inputs.folders.tokens, **inputs.files}
    arguments = [argument for name, path in files.items() for argument in (f"--{name.replace('_', '-')}", path)]
    done = run_script_here("release", inputs.run, *arguments, "--root", released_copy, "--hardware", "a test machine")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: not released: {bits:.4f} bits per byte on abstracts.jsonl; the released model has {bits:.4f}, "
        "which must improve by 0.01; use --force to release it"
    )
    assert checksums(released_copy) == before


def test_a_model_that_is_not_better_is_released_with_force(options, released_copy):
    """It replaces another model with better results."""
    expected = readme(released_copy)
    path = released_copy / "results/held_out.json"
    found = read_json(path)
    found["model"]["bits_per_byte"] = 0.5
    path.write_text(json.dumps(found), encoding="utf-8")
    (released_copy / "model.safetensors").write_bytes(b"other weights")
    (released_copy / "README.md").write_text(
        expected.replace("The released weights", "Other weights"), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"bits per byte on abstracts.jsonl; the released model has 0.5000"):
        release(options(released_copy))
    release(options(released_copy, force=True))
    assert plain_bits_per_byte(
        AutoModelForCausalLM.from_pretrained(released_copy, trust_remote_code=True, dtype=torch.float32),
        AutoTokenizer.from_pretrained(released_copy, trust_remote_code=True),
    ) == pytest.approx(read_json(path)["model"]["bits_per_byte"], rel=1e-5)
    assert readme(released_copy) == expected


@pytest.mark.parametrize("step", ["evaluate_release", "write_figures", "write_pages", "publish"])
def test_a_step_that_fails_leaves_the_repository_as_it_was(root, options, monkeypatch, step):
    """Publishing fails after some files were published, the other steps after they are done."""
    before, done, original = checksums(root), [], getattr(release_module, step)

    def fail(*arguments: Any) -> None:
        original(*arguments)
        done.append(step)
        if step != "publish" or len(done) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(release_module, step, fail)
    with pytest.raises(OSError, match="No space left"):
        release(options(root))
    assert checksums(root) == before
    assert not list(root.glob(".*"))


def change_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes() + b"\n")


def change_config(model: Path) -> None:
    config = read_json(model / "config.json") | {"rms_norm_eps": 1e-5}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return apply


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (change_tokenizer, r"tokenizer.json: differs from the tokenizer of .*root"),
        (change_config, r"config.json: differs from .*root/config.json in rms_norm_eps"),
        (
            change_weights(lambda tensors: tensors.pop("model.norm.weight")),
            r"model.safetensors: 106,752 weights in 19 tensors, but the model has 106,816 in 20",
        ),
        (
            change_weights(lambda tensors: tensors["model.norm.weight"].fill_(math.nan)),
            "model.safetensors: model.norm.weight has weights that are not finite",
        ),
        (lambda model: (model / "model.safetensors").write_bytes(b"cut"), "model.safetensors: can't be read: "),
        (
            lambda model: (model / "model.safetensors").unlink(),
            "not a trained model with its tokenizer: model.safetensors is missing",
        ),
    ],
    ids=["tokenizer", "config", "missing tensor", "not finite", "damaged", "no weights"],
)
def test_a_model_with_another_tokenizer_architecture_or_broken_weights_is_refused(
    inputs, options, root, tmp_path, damage, problem
):
    model = shutil.copytree(inputs.run / "best", tmp_path / "model")
    damage(model)
    before = checksums(root)
    with pytest.raises(UserError, match=problem) as caught:
        release(options(root, model=model))
    assert "\n" not in str(caught.value)
    assert checksums(root) == before


def test_a_release_with_other_data_or_an_incomplete_run_is_refused(inputs, options, root, tmp_path):
    other_file = tmp_path / "other.jsonl"
    other_file.write_text(json.dumps(held_out_rows()[0]), encoding="utf-8")
    no_config = shutil.copytree(inputs.run, tmp_path / "no config")
    (no_config / "config.yaml").unlink()
    no_metrics = shutil.copytree(inputs.run, tmp_path / "no metrics")
    (no_metrics / "metrics.jsonl").unlink()
    other_tokens = shutil.copytree(inputs.folders.tokens, tmp_path / "tokens")
    (other_tokens / "tokens.json").write_text(json.dumps(read_json(other_tokens / "tokens.json")), encoding="utf-8")
    for changes, problem in [
        ({"held_out": other_file}, "other.jsonl: not held out of .*corpus: build the corpus with --held-out"),
        ({"pubmedqa": other_file}, "other.jsonl: not held out of .*corpus: build the corpus with --held-out"),
        ({"run": no_config}, "no config: not a run folder, it has no config.yaml"),
        ({"run": no_metrics}, "no metrics: its metrics.jsonl has no training step"),
        ({"tokens": other_tokens}, "tokens: not the tokens that .*run was trained on"),
    ]:
        with pytest.raises(UserError, match=problem):
            release(options(root, **changes))
    shutil.rmtree(root / "docs/corpus-card")
    with pytest.raises(
        UserError, match="corpus-card/README.md: not the card of .*corpus: write it with scripts/describe_corpus.py"
    ):
        release(options(root))
