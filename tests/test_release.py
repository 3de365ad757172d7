"""A release puts weights, results and pages into the model repository: all or nothing, and only what is better."""

import hashlib
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
from huggingface_hub import ModelCard
from PIL import Image
from pipeline_folders import Folders, make_folders
from release_inputs import NETWORK, held_out_rows, write_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.arguments import parse
from healthslm.data_card.describe import DataCardOptions, describe_corpus
from healthslm.errors import UserError
from healthslm.evaluation.figures import FIGURES, TRAINING
from healthslm.evaluation.measures import MEASURES
from healthslm.release import release as release_module
from healthslm.release.card import BEGIN, END, insert_section, templates
from healthslm.release.release import ReleaseOptions, check_improvement, publish_all, release
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
    """A model repository to copy and to release into: that of the project, with the network of the run."""


@pytest.fixture(scope="module")
def inputs(repository, tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("release")
    files = write_inputs(folder)
    folders = make_folders(folder / "sample", held_out=list(files.values()))
    run, root = folder / "run", folder / "root"
    pretrain(
        PretrainOptions(
            model=NETWORK,
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
            "beside": {"the same": str(inputs.run / "best")},
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
    """The repository before any release."""
    return shutil.copytree(inputs.root, tmp_path / "root")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def checksums(folder: Path) -> dict[str, str]:
    """Of all files below a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@torch.no_grad()
def plain_bits_per_byte(model, tokenizer) -> float:
    """One document at a time, none of which is longer than the context."""
    bits = num_bytes = 0
    for row in held_out_rows():
        text = f"{row['title']}\n{row['text']}"
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
        log_probabilities = model(ids[None]).logits[0].double().log_softmax(-1)
        bits -= log_probabilities[:-1].gather(1, ids[1:, None]).sum().item() / math.log(2)
        num_bytes += len(text.encode())
    return bits / num_bytes


def test_the_repository_is_a_model_that_opens_in_fp32_and_gives_the_bits_per_byte_of_its_card(released):
    model = AutoModelForCausalLM.from_pretrained(released, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(released, trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    in_card = float(re.search(r"\*\*(\d\.\d+) bits per byte\*\*", readme(released))[1])
    assert plain_bits_per_byte(model, tokenizer) == pytest.approx(in_card, abs=0.001)


def test_the_weights_are_one_file_of_those_of_the_run_rounded_to_bf16(inputs, released):
    assert [path.name for path in released.glob("*.safetensors")] == ["model.safetensors"]
    trained, rounded = (load_file(folder / "model.safetensors") for folder in (inputs.run / "best", released))
    assert trained.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in trained.items())
    with safe_open(released / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_of_the_model_s_other_files_only_config_json_changes_by_the_type_to_load_in(inputs, released):
    config = read_json(released / "config.json")
    assert config == read_json(inputs.root / "config.json") | {"dtype": "float32"}
    assert len(config["auto_map"]) == 6
    before, after = checksums(inputs.root), checksums(released)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", "README.md"}
    new = {name for name in after if name not in before}
    assert {name for name in new if name.startswith("results/")} == {
        "results/pubmed_ids.jsonl", "results/training/config.yaml", "results/training/metrics.jsonl",
        *(f"results/{measure}.json" for measure in MEASURES),
    }  # fmt: skip
    assert {name for name in new if not name.startswith("results/")} == {
        "model.safetensors", "docs/evaluation.md", *(f"docs/evaluation/{name}" for name in (TRAINING, *FIGURES))
    }  # fmt: skip


def test_the_hub_reads_the_results_from_the_card_and_all_that_it_read_before(inputs, released):
    before, card = (ModelCard.load(root / "README.md").data for root in (inputs.root, released))
    for name in ("language", "license", "library_name", "pipeline_tag", "tags"):
        assert card[name] == before[name] is not None
    found = {(result.dataset_type, result.metric_type): result for result in card.eval_results}
    held_out, pubmedqa = (read_json(released / f"results/{name}.json") for name in ("held_out", "pubmedqa"))
    bits = found["held-out-abstracts", "bits_per_byte"]
    assert bits.metric_value == pytest.approx(held_out["model"]["bits_per_byte"], abs=5e-5)
    assert bits.metric_args["interval"] == pytest.approx(held_out["model"]["interval"], abs=5e-5)
    assert found["pubmedqa", "accuracy"].metric_value == pubmedqa["pubmedqa"]["accuracy"]["share"]
    assert ("pubmedqa", "f1") in found and len(found) == 6
    assert card.model_name == "HealthSLM"


def test_the_readme_keeps_all_that_stands_outside_of_the_marks(inputs, released):
    old, new = (readme(root).partition("\n---\n")[2] for root in (inputs.root, released))
    assert new.partition(BEGIN)[0] == old.partition(BEGIN)[0]
    assert new.partition(END)[2] == old.partition(END)[2]
    old_section, new_section = (text.partition(BEGIN)[2].partition(END)[0] for text in (old, new))
    assert old_section != new_section


def test_the_card_says_what_the_run_and_the_corpus_say(inputs, released):
    card = readme(released)
    report = read_json(inputs.folders.corpus / "report.json")
    assert f"| tokens seen | {STEPS * BATCH_TOKENS:,} |" in card
    tokens = read_json(inputs.folders.tokens / "tokens.json")["splits"]["train"]["files"]
    passes = STEPS * BATCH_TOKENS / sum(file["tokens"] for file in tokens)
    assert f"| passes over the training text | {passes:.2f} |" in card
    assert f"| steps | {STEPS}, of which 0 were skipped" in card
    assert f"| hardware | {describe_hardware(torch.device('cpu'))} |" in card
    assert "| optimizer | AdamW |" in card and "| seed | 0 |" in card
    for path in (released / "model.safetensors", released / "tokenizer.json", inputs.folders.corpus / "report.json"):
        assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" in card
    for file in (*report["files"], *report["held_out"]):
        assert f"`{file['sha256']}`" in card
    assert "| the first \\| of the sample | " in card and "NLM terms" in card
    assert "at chance" in card and "medical advice" in card


def test_the_recipe_on_the_card_are_the_options_that_are_not_the_defaults(released):
    recipe = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", readme(released), re.MULTILINE | re.DOTALL)[1])
    assert recipe == {
        "model": NETWORK, "max_tokens": STEPS * BATCH_TOKENS, "batch_tokens": BATCH_TOKENS, "learning_rate": 3e-3,
        "betas": [0.9, 0.99],
    }  # fmt: skip


def test_the_samples_on_the_card_are_the_first_five(released):
    shown = re.findall(r"^~~~~~~text\n(.*?)\n~~~~~~$", readme(released), re.MULTILINE | re.DOTALL)
    measured = read_json(released / "results/generation.json")["samples"]
    assert [sample.split() for sample in shown] == [sample.split() for sample in measured]
    assert len(shown) == 5


def test_both_pages_show_each_measure_and_lead_to_files_that_are_there(released):
    for page in (released / "README.md", released / "docs/evaluation.md"):
        text = page.read_text(encoding="utf-8")
        section = text.partition(BEGIN)[2].partition(END)[0] or text
        assert "{{" not in section and "{%" not in section
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", section)
        not_of_the_copy = {"docs/corpus.md"}  # the project has it
        assert all((page.parent / link).exists() for link in set(links) - not_of_the_copy)
        pictures = {Path(link).name for link in links if link.endswith(".png")}
        assert pictures >= {"bits_per_byte.png", "decades_and_sections.png", "minimal_pairs.png"}
        held_out, beside = (read_json(released / f"results/{name}.json") for name in ("held_out", "beside"))
        for found in (held_out["model"], held_out["untrained"], beside["models"]["the same"]):
            assert (
                f"| {found['bits_per_byte']:.4f} | {found['interval'][0]:.4f} to {found['interval'][1]:.4f} |" in text
            )
        pairs = read_json(released / "results/minimal_pairs.json")["scores"]
        assert all(
            f"| {kind} | {found['pairs']} | {found['win_rate']['share']:.1%} (" in text for kind, found in pairs.items()
        )
        harder = read_json(released / "results/minimal_pairs.json")["harder"]["scores"]
        assert all(
            f"| {kind} | {found['pairs']} | {found['win_rate']['share']:.1%} (" in text
            for kind, found in harder.items()
        )
        memorised = read_json(released / "results/memorisation.json")
        assert all(f"{memorised[split]['matching_tokens']['mean']:.1%} (" in text for split in ("training", "held_out"))
        bits = [memorised[split]["abstracts"]["bits_per_byte"] for split in ("training", "held_out")]
        assert all(f"| {found:.4f} |" in text for found in bits) and "too few documents to tell" in text


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            (0.75, [0.7, 0.79]),
            "has memorized part of its training text**: abstracts that it was trained on take 6.2% fewer",
        ),
        ((0.75, [0.7, 0.81]), "overlap, so this metric shows no memorization"),
        ((0.9, [0.85, 0.95]), "overlap, so this metric shows no memorization"),
        ((0.75, None), "too few documents to tell"),
    ],
)
def test_the_card_says_plainly_whether_the_model_has_memorized_its_text(training, message):
    def measured(bits: float, interval: list[float] | None) -> dict[str, Any]:
        return {"documents": 500, "chosen_from": 900, "bits_per_byte": bits, "interval": interval}

    memorisation = {
        "training": {"abstracts": measured(*training)},
        "held_out": {"abstracts": measured(0.8, [0.795, 0.86])},
    }
    held_out = {"data": "abstracts.jsonl", "model": measured(0.81, [0.8, 0.82])}
    table = templates().get_template("tables.jinja").module.memorized(memorisation, held_out)
    assert message in table and table.count("**") in (0, 2)
    assert f"| training documents | 500 of 900 | {training[0]:.4f} |" in table


def test_tables_have_as_many_cells_in_each_row(released):
    for page in ("README.md", "docs/evaluation.md"):
        text = (released / page).read_text(encoding="utf-8").replace("\\|", "")
        for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
            assert len({row.count("|") for row in table.splitlines()}) == 1, table
            assert re.fullmatch(r"\|( ---:? \|)+", table.splitlines()[1]), table


def test_figures_are_pictures_without_a_trace_of_when_or_with_what_they_were_made(released):
    for name in (TRAINING, *FIGURES):
        with Image.open(released / "docs/evaluation" / name) as image:
            assert image.format == "PNG" and image.width > 600
            assert image.info.keys() <= {"dpi"}
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_the_card_says_how_much_text_each_model_was_trained_on(released):
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]*) \| ([\d,]*) \| \d\.\d{4} \|", readme(released), re.MULTILINE)
    assert {name: tokens for name, _, tokens in rows} == {
        "**HealthSLM**": f"{STEPS * BATCH_TOKENS:,}",
        "the same network, untrained": "0",
        "the same": f"{STEPS * BATCH_TOKENS:,}",
    }


def test_the_metrics_of_the_run_are_published_up_to_the_step_of_the_weights(inputs, released):
    """Here the run's last evaluation is the best, so these are all."""
    assert (released / "results/training/metrics.jsonl").read_bytes() == (inputs.run / "metrics.jsonl").read_bytes()


def test_the_recipe_of_the_run_is_published_without_the_folders_of_the_machine(inputs, released):
    published = (released / "results/training/config.yaml").read_text(encoding="utf-8")
    assert str(inputs.folders.tokens.parent) not in published
    of_run, found = yaml.safe_load((inputs.run / "config.yaml").read_text(encoding="utf-8")), yaml.safe_load(published)
    assert found.items() <= of_run.items()
    assert {"model", "max_tokens", "seed", "context", "betas"} <= found.keys()


def test_a_release_that_failed_at_its_end_does_not_measure_again(inputs, options, root, tmp_path, monkeypatch):
    """The speed of generation would not be the same twice."""
    run = shutil.copytree(inputs.run, tmp_path / "run", ignore=shutil.ignore_patterns("results"))

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(release_module, "write_pages", fail)
        with pytest.raises(OSError, match="No space left"):
            release(options(root, run=run))
    measured = (run / "results/footprint.json").read_bytes()
    release(options(root, run=run))
    assert (root / "results/footprint.json").read_bytes() == measured


def test_a_model_that_is_no_better_is_refused_in_a_line_that_names_both_figures(inputs, released_copy, run_script_here):
    before = checksums(released_copy)
    bits = read_json(released_copy / "results/held_out.json")["model"]["bits_per_byte"]
    files = {"corpus": inputs.folders.corpus, "tokens": inputs.folders.tokens, **inputs.files}
    arguments = [argument for name, path in files.items() for argument in (f"--{name.replace('_', '-')}", path)]
    done = run_script_here("release", inputs.run, *arguments, "--root", released_copy, "--hardware", "a test machine")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: not released: {bits:.4f} bits per byte on abstracts.jsonl; the released model has {bits:.4f}, "
        "and 0.01 less is asked for; --force releases it anyway"
    )
    assert checksums(released_copy) == before


def test_a_model_that_is_no_better_is_released_by_force(options, released_copy):
    """In the place of another one, whose results were better."""
    expected = readme(released_copy)
    path = released_copy / "results/held_out.json"
    found = read_json(path)
    found["model"]["bits_per_byte"] = 0.5
    path.write_text(json.dumps(found), encoding="utf-8")
    (released_copy / "model.safetensors").write_bytes(b"other weights")
    (released_copy / "README.md").write_text(expected.replace("## The released model", "## Another"), encoding="utf-8")
    with pytest.raises(UserError, match=r"bits per byte on abstracts.jsonl; the released model has 0.5000"):
        release(options(released_copy))
    release(options(released_copy, force=True))
    assert plain_bits_per_byte(
        AutoModelForCausalLM.from_pretrained(released_copy, trust_remote_code=True, dtype=torch.float32),
        AutoTokenizer.from_pretrained(released_copy, trust_remote_code=True),
    ) == pytest.approx(read_json(path)["model"]["bits_per_byte"], rel=1e-5)
    assert readme(released_copy) == expected


@pytest.mark.parametrize(
    ("better_by", "bytes_of_text", "problem"),
    [
        (0.011, 100, None),
        (0.009, 100, "the released model has 1.0090, and 0.01 less"),
        (-0.2, 100, "the released model has 0.8000, and 0.01 less"),
        (0.5, 99, "the released model has 1.5000 on other documents, old.jsonl"),
    ],
)
def test_a_hundredth_of_a_bit_on_the_same_documents_is_asked_for(tmp_path, better_by, bytes_of_text, problem):
    released = {"data": "old.jsonl", "model": {"bits_per_byte": 1 + better_by, "bytes": bytes_of_text}}
    (tmp_path / "held_out.json").write_text(json.dumps(released), encoding="utf-8")
    new = {"data": "new.jsonl", "model": {"bits_per_byte": 1.0, "bytes": 100}}
    check_improvement(new, tmp_path / "none.json")
    if problem is None:
        check_improvement(new, tmp_path / "held_out.json")
    else:
        with pytest.raises(UserError, match=f"1.0000 bits per byte on new.jsonl; {problem}"):
            check_improvement(new, tmp_path / "held_out.json")


@pytest.mark.parametrize("step", ["evaluate_release", "write_evaluation_figures", "write_pages", "publish"])
def test_a_step_that_fails_leaves_the_repository_as_it_was(root, options, monkeypatch, step):
    """Publishing fails when other files are in their places already, the others when they have done their work."""
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


@pytest.mark.parametrize("failing", range(1, 4))
def test_files_are_published_all_or_none(tmp_path, monkeypatch, failing):
    new, root = tmp_path / "new", tmp_path / "root"
    for folder, name, text in [
        (new, "a", "new a"), (new, "b/c", "new c"), (new, "d", "new d"), (new, "same", "same"),
        (root, "a", "old a"), (root, "d", "old d"), (root, "same", "same"), (root, "other", "other"),
    ]:  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    before, wanted, publish, calls = checksums(root), checksums(new), release_module.publish, []

    def fail(new: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == failing:
            raise KeyboardInterrupt
        publish(new, path)

    monkeypatch.setattr(release_module, "publish", fail)
    with pytest.raises(KeyboardInterrupt):
        publish_all(new, root, tmp_path / "old")
    assert checksums(root) == before
    monkeypatch.setattr(release_module, "publish", publish)
    for name in wanted:  # those before the failure were moved
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text("same" if name == "same" else f"new {name[-1]}", encoding="utf-8")
    publish_all(new, root, tmp_path / "old")
    assert checksums(root) == before | wanted


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
        (change_tokenizer, r"tokenizer.json: not the tokenizer of .*root, byte for byte"),
        (change_config, r"config.json: not the network of .*root/config.json: other rms_norm_eps"),
        (
            change_weights(lambda tensors: tensors.pop("model.norm.weight")),
            r"model.safetensors: 106,752 weights in 19 tensors, not the network's 106,816 in 20",
        ),
        (
            change_weights(lambda tensors: tensors["model.norm.weight"].fill_(math.nan)),
            "model.safetensors: weights that are not finite in model.norm.weight",
        ),
        (lambda model: (model / "model.safetensors").write_bytes(b"cut"), "model.safetensors: cannot be read: "),
        (lambda model: (model / "model.safetensors").unlink(), "there is no model.safetensors in it"),
    ],
    ids=["tokenizer", "config", "missing tensor", "not finite", "damaged", "no weights"],
)
def test_a_model_that_is_not_the_repository_s_is_refused(inputs, options, root, tmp_path, damage, problem):
    model = shutil.copytree(inputs.run / "best", tmp_path / "model")
    damage(model)
    before = checksums(root)
    with pytest.raises(UserError, match=problem) as caught:
        release(options(root, model=model))
    assert "\n" not in str(caught.value)
    assert checksums(root) == before


def test_what_the_card_could_not_tell_truly_is_refused(inputs, options, root, tmp_path):
    other_file = tmp_path / "other.jsonl"
    other_file.write_text(json.dumps(held_out_rows()[0]), encoding="utf-8")
    no_config = shutil.copytree(inputs.run, tmp_path / "no config")
    (no_config / "config.yaml").unlink()
    no_metrics = shutil.copytree(inputs.run, tmp_path / "no metrics")
    (no_metrics / "metrics.jsonl").unlink()
    other_tokens = shutil.copytree(inputs.folders.tokens, tmp_path / "tokens")
    (other_tokens / "tokens.json").write_text(json.dumps(read_json(other_tokens / "tokens.json")), encoding="utf-8")
    for changes, problem in [
        ({"held_out": other_file}, "other.jsonl: not held out of .*corpus, by its checksum"),
        ({"pubmedqa": other_file}, "other.jsonl: not held out of .*corpus, by its checksum"),
        ({"run": no_config}, "no config: not a run folder, it has no config.yaml"),
        ({"run": no_metrics}, "no metrics: its metrics.jsonl has no training step"),
        ({"tokens": other_tokens}, "tokens: not the tokens that .*run was trained on"),
    ]:
        with pytest.raises(UserError, match=problem):
            release(options(root, **changes))
    shutil.rmtree(root / "docs/corpus-card")
    with pytest.raises(UserError, match="corpus-card/README.md: not the card of .*corpus: write it by"):
        release(options(root))


def test_the_command_takes_the_run_without_a_name_and_the_recipe_of_the_evaluation(repository):
    options = parse(ReleaseOptions, ["runs/a", "--recipe", str(repository / "configs/evaluation.yaml")])
    assert (options.run, options.root, options.model) == (Path("runs/a"), repository, None)
    assert options.beside["GPT-2"] == "openai-community/gpt2"


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN}\n", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_a_place_for_the_section_is_refused(text):
    with pytest.raises(UserError, match=r"README.md: expected one line <!-- release.* one line <!-- /release -->"):
        insert_section(f"---\nlicense: mit\n---\n{text}", "section", [])
