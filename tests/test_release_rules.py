"""The parts of a release: what is better, what counts as memorized, what is published, and where in the README."""

import json
from pathlib import Path
from typing import Any

import pytest
from folders import checksums

from healthslm.arguments import parse
from healthslm.errors import UserError
from healthslm.markdown import environment
from healthslm.release import release as release_module
from healthslm.release.card import BEGIN, END, insert_results
from healthslm.release.release import ReleaseOptions, check_improvement, publish_all


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            (0.75, [0.7, 0.79]),
            "has memorized part of its training text**: training abstracts need 6.2% fewer bits per byte",
        ),
        ((0.75, [0.7, 0.81]), "overlap, so this metric shows no memorization"),
        ((0.9, [0.85, 0.95]), "overlap, so this metric shows no memorization"),
        ((0.75, None), "too few documents to tell"),
    ],
)
def test_the_evaluation_page_says_whether_the_model_has_memorized_its_training_text(training, message):
    def measured(bits: float, interval: list[float] | None) -> dict[str, Any]:
        return {"documents": 500, "chosen_from": 900, "bits_per_byte": bits, "interval": interval}

    memorization = {
        "training": {"abstracts": measured(*training)},
        "held_out": {"abstracts": measured(0.8, [0.795, 0.86])},
    }
    held_out = {"data": "abstracts.jsonl", "model": measured(0.81, [0.8, 0.82])}
    table = environment("healthslm.release").get_template("tables.jinja").module.memorized(memorization, held_out)
    assert message in table and table.count("**") in (0, 2)
    assert f"| training documents | 500 of 900 | {training[0]:.4f} |" in table


@pytest.mark.parametrize(
    ("better_by", "bytes_of_text", "problem"),
    [
        (0.011, 100, None),
        (0.009, 100, "the released model has 1.0090, which must improve by 0.01"),
        (-0.2, 100, "the released model has 0.8000, which must improve by 0.01"),
        (0.5, 99, r"the released model was measured on other documents, old.jsonl \(1.5000\)"),
    ],
)
def test_a_release_must_improve_by_a_hundredth_of_a_bit_on_the_same_documents(
    tmp_path, better_by, bytes_of_text, problem
):
    released = {"data": "old.jsonl", "model": {"bits_per_byte": 1 + better_by, "bytes": bytes_of_text}}
    (tmp_path / "held_out.json").write_text(json.dumps(released), encoding="utf-8")
    new = {"data": "new.jsonl", "model": {"bits_per_byte": 1.0, "bytes": 100}}
    check_improvement(new, tmp_path / "none.json")
    if problem is None:
        check_improvement(new, tmp_path / "held_out.json")
    else:
        with pytest.raises(UserError, match=f"1.0000 bits per byte on new.jsonl; {problem}"):
            check_improvement(new, tmp_path / "held_out.json")


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
    for name in wanted:  # some were moved before the failure
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text("same" if name == "same" else f"new {name[-1]}", encoding="utf-8")
    publish_all(new, root, tmp_path / "old")
    assert checksums(root) == before | wanted


def test_the_command_takes_the_run_as_an_argument_and_the_recipe_of_the_evaluation(repository):
    options = parse(ReleaseOptions, ["runs/a", "--recipe", str(repository / "configs/evaluation.yaml")])
    assert (options.run, options.root, options.model) == (Path("runs/a"), repository, None)
    assert options.baselines["GPT-2"] == "openai-community/gpt2"


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN}\n", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_marks_for_the_results_is_refused(text):
    with pytest.raises(UserError, match=r"README.md: expected one line <!-- release.* one line <!-- /release -->"):
        insert_results(f"---\nlicense: mit\n---\n{text}", "table", [])
