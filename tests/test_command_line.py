"""Options come from defaults, a recipe and the command line, and mistakes in them are told in one line."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import command_line
import pytest
from command_line import UsageError, parse

from healthslm.options import CheckedOptions, NonNegativeFloat, OptionError, PositiveInt, Range, option_ranges

SCRIPTS = Path(__file__).parents[1] / "scripts"
STAGES = sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "command_line.py")


@dataclass
class Optimizer:
    """Options of the optimizer."""

    learning_rate: float = 1e-3
    """Peak of the learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""


@dataclass
class Options:
    """Options of the function under test."""

    output: Path
    """Folder to write."""
    held_out: list[Path] = field(default_factory=list)
    """Files kept out of training:
    documents in them are dropped."""
    model: str | dict = "small"
    """A folder, a name, or a configuration."""
    steps: int | None = None
    """Number of updates; 10% of them warm up."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    resume: bool = False
    """Continue from the last checkpoint."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.5))


def write_recipe(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return str(folder / "recipe.yaml")


def test_defaults_give_way_to_the_recipe_and_the_recipe_to_the_command_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "steps: 2_000_000\nprecision: bfloat16\noptimizer:\n  betas: [0.8, 0.9]\n")
    options = parse(Options, ["--output", "out", "--steps", "7", "--recipe", recipe])
    assert options == Options(
        output=Path("out"),
        steps=7,  # command line
        precision="bfloat16",  # recipe
        resume=False,  # default
        optimizer=Optimizer(learning_rate=0.5, betas=(0.8, 0.9)),  # default of the outer class, and recipe
    )


def test_underscores_of_large_numbers_and_bare_exponents_are_numbers_in_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "output: out\nsteps: 2_000_000\noptimizer: {learning_rate: 1e-3}\n")
    options = parse(Options, ["--recipe", recipe])
    assert (options.steps, options.optimizer.learning_rate) == (2_000_000, 0.001)


def test_a_list_takes_several_values_and_none_empties_the_recipes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "output: out\nheld_out: [a, b]\n")
    assert parse(Options, ["--output", "x", "--held-out", "a", "b c"]).held_out == [Path("a"), Path("b c")]
    assert parse(Options, ["--recipe", recipe, "--held-out", "c"]).held_out == [Path("c")]
    assert parse(Options, ["--recipe", recipe, "--held-out"]).held_out == []
    assert parse(Options, ["--output", "x", "--held-out", "a", "--held-out", "b"]).held_out == [Path("a"), Path("b")]


def test_nested_options_switches_and_dictionaries_can_be_given_on_the_command_line() -> None:
    arguments = ["--output", "x", "--resume", "--optimizer.learning-rate", "0.1", "--model", '{"hidden_size": 8}']
    options = parse(Options, arguments)
    assert (options.resume, options.optimizer.learning_rate, options.model) == (True, 0.1, {"hidden_size": 8})
    assert parse(Options, ["--output", "x", "--resume", "false"]).resume is False


def test_text_that_looks_like_a_number_stays_text_where_text_is_expected() -> None:
    assert parse(Options, ["--output", "12", "--model", "350"]) == Options(output=Path("12"), model="350")


def test_paths_of_a_recipe_start_at_its_folder_and_those_of_the_command_line_at_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(
        tmp_path / "configs", "output: ../out\nheld_out: [a, ./b, /c]\nmodel: {tokenizer: ../gpt2, name: a/b}\n"
    )
    options = parse(Options, ["--recipe", "configs/recipe.yaml"])
    assert options.output == Path("out")
    assert options.held_out == [Path("configs/a"), Path("configs/b"), Path("/c")]
    assert options.model == {"tokenizer": str(tmp_path / "gpt2"), "name": "a/b"}
    assert parse(Options, ["--recipe", "configs/recipe.yaml", "--held-out", "a"]).held_out == [Path("a")]


def test_text_in_a_recipe_is_a_path_only_where_it_begins_with_dots(tmp_path: Path) -> None:
    for text, expected in [
        ("../runs/best", str(tmp_path / "runs/best")),
        ("openai-community/gpt2", "openai-community/gpt2"),
    ]:
        recipe = write_recipe(tmp_path / "configs", f"output: out\nmodel: {text}\n")
        assert parse(Options, ["--recipe", recipe]).model == expected


@dataclass
class Positional:
    """Options of a function with one argument that stands by itself."""

    run_folder: Path = field(metadata={"positional": True})
    """Folder of the run."""
    held_out: list[Path] = field(default_factory=list)
    """Files kept out of training."""


def test_a_positional_option_is_written_without_its_name_or_in_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "run_folder: runs/a\nheld_out: [b]\n")
    assert parse(Positional, ["runs/a", "--held-out", "b"]) == Positional(Path("runs/a"), [Path("b")])
    assert parse(Positional, ["--recipe", recipe]) == Positional(tmp_path / "runs/a", [tmp_path / "b"])
    assert parse(Positional, ["x", "--recipe", recipe]).run_folder == Path("x")
    with pytest.raises(UsageError, match="missing: RUN_FOLDER$"):
        parse(Positional, ["--held-out", "b"])
    with pytest.raises(UsageError, match="unexpected argument 'y'"):
        parse(Positional, ["x", "y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-ot", "x"], "unknown option '--held-ot', did you mean '--held-out'?"),
        (["--held_out", "x"], "unknown option '--held_out', did you mean '--held-out'?"),
        (
            ["--optimizer.learningrate=1"],
            "unknown option '--optimizer.learningrate', did you mean '--optimizer.learning-rate'?",
        ),
        (["--step", "1"], "unknown option '--step', did you mean '--steps'?"),
        (["--recip", "x"], "unknown option '--recip', did you mean '--recipe'?"),
        (["stray"], "unexpected argument 'stray'"),
        (["--steps"], "--steps: expected one argument"),
        (["--steps", "two"], "--steps: expected int | None, got 'two'"),
        (["--steps", "2.5"], "--steps: expected int | None, got '2.5'"),
        (["--resume", "maybe"], "--resume: expected bool, got 'maybe'"),
        (["--precision", "int8"], "--precision: expected Literal['float32', 'bfloat16'], got 'int8'"),
        (["--optimizer.betas", "0.9"], "--optimizer.betas: expected tuple[float, float], got ['0.9']"),
        (["--steps", "1"], "missing: --output"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments: list[str], message: str) -> None:
    output = [] if "missing" in message else ["--output", "x"]
    with pytest.raises(UsageError) as caught:
        parse(Options, [*output, *arguments])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heldout: [a]", "unknown option 'heldout', did you mean 'held_out'?"),
        (
            "optimizer: {learning_rat: 1}",
            "unknown option 'optimizer.learning_rat', did you mean 'optimizer.learning_rate'?",
        ),
        ("optimizer: 3", "unknown option 'optimizer', did you mean 'optimizer.betas'?"),
        ("held_out: 7", "held_out: expected list[Path], got 7"),
        ("steps: 1.5", "steps: expected int | None, got 1.5"),
        ("output: 3", "output: expected Path, got 3"),
        ("optimizer: {betas: [1, 2, 3]}", "optimizer.betas: expected tuple[float, float], got [1, 2, 3]"),
        ("- steps", "expected lines `option: value`"),
        ("steps: [1", "not valid YAML: .* line 1, column 8.*"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_the_recipe(tmp_path: Path, text: str, message: str) -> None:
    recipe = write_recipe(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        parse(Options, ["--output", "x", "--recipe", recipe] if "output" not in text else ["--recipe", recipe])
    pattern = message if ".*" in message else re.escape(message)
    assert re.fullmatch(f"{re.escape(recipe)}: {pattern}", str(caught.value))


def test_a_required_option_left_empty_in_a_recipe_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing: --output"):
        parse(Options, ["--recipe", write_recipe(tmp_path, "output:\n")])


@dataclass
class Decay(CheckedOptions):
    """Options of a schedule."""

    final: NonNegativeFloat = 0.0


@dataclass
class Ranged(CheckedOptions):
    """Options that have a range each."""

    steps: PositiveInt = 10
    documents: Annotated[int | None, Range(at_least=1)] = None
    fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    betas: Annotated[tuple[float, float], Range(at_least=0, below=1)] = (0.9, 0.95)
    decay: Decay = field(default_factory=Decay)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, not 0"),
        (["--documents", "-5"], "--documents: must be at least 1, not -5"),
        (["--fraction", "0"], "--fraction: must be above 0 and at most 1, not 0.0"),
        (["--fraction", "1.5"], "--fraction: must be above 0 and at most 1, not 1.5"),
        (["--betas", "0.9", "1"], "--betas: must be at least 0 and below 1, not (0.9, 1.0)"),
        (["--decay.final", "-1"], "--decay.final: must be at least 0, not -1.0"),
        (["--decay.final", "1e999"], "--decay.final: must be at least 0, not inf"),
    ],
)
def test_a_value_outside_of_its_range_is_named_with_the_option(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(Ranged, arguments)
    assert str(caught.value) == message


def test_a_value_of_a_recipe_outside_of_its_range_is_named_with_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "fraction: -1\nsteps: 3\n")
    with pytest.raises(UsageError, match=rf"^{re.escape(recipe)}: fraction: must be above 0 and at most 1, not -1\.0$"):
        parse(Ranged, ["--recipe", recipe])
    with pytest.raises(UsageError, match="^--steps: must be at least 1, not 0$"):
        parse(Ranged, ["--recipe", recipe, "--fraction", "1", "--steps", "0"])


def test_the_ends_of_a_range_are_in_it_or_not_as_it_says() -> None:
    accepted = Ranged(steps=1, documents=None, fraction=1.0, betas=(0.0, 0.0))
    assert parse(Ranged, ["--steps", "1", "--betas", "0", "0"]) == accepted


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_options_made_in_python_are_checked_too(value: float) -> None:
    with pytest.raises(OptionError, match="^fraction: must be above 0 and at most 1, not"):
        Ranged(fraction=value)


@pytest.mark.parametrize("script", STAGES)
def test_every_number_that_a_script_takes_has_a_range(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes: list[Any] = []
    monkeypatch.setattr(command_line, "run", lambda function, options_class: classes.append(options_class))
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    (options_class,) = classes
    numbers = {f.name for f in command_line._fields(options_class) if re.search(r"\b(int|float)\b", f.type)}
    assert numbers == option_ranges(options_class).keys()
    assert not numbers or issubclass(options_class, CheckedOptions)


SCRIPT = '''"""Do what the test asks.

python scripts/act.py --act write
"""

import errno
from dataclasses import dataclass, field
from pathlib import Path

from command_line import run
from healthslm.errors import UserError


@dataclass
class ActOptions:
    """Options of `act`."""

    act: str
    """What to do, 100% of it."""
    path: Path = Path("nothing here")
    """File to read."""
    batch_tokens: int = field(default=64, metadata={"memory": True})
    """Tokens of a batch."""
    device: str = "auto"
    """Where to compute."""


def act(options: ActOptions) -> None:
    match options.act:
        case "read":
            options.path.read_text()
        case "complain":
            raise UserError("a.xml: cut off at line 3: download it again")
        case "fill":
            raise OSError(errno.ENOSPC, "No space left on device")
        case "allocate":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        case "interrupt":
            raise KeyboardInterrupt
        case "stream":
            while True:
                print("text", flush=True)
        case "break":
            raise ValueError("a mistake of ours")


if __name__ == "__main__":
    run(act, ActOptions)
'''


@pytest.fixture
def act(tmp_path: Path):
    """Run a script that uses the command line, in a process of its own."""
    (tmp_path / "act.py").write_text(SCRIPT, encoding="utf-8")

    def run(*arguments: str, pipe: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "COLUMNS": "120"}
        command = f"set -o pipefail; {shlex.join([sys.executable, 'act.py', *arguments])} {pipe}"
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--act", "read"], 1, "error: nothing here: No such file or directory"),
        (["--act", "complain"], 1, "error: a.xml: cut off at line 3: download it again"),
        (["--act", "fill"], 1, "error: cannot write: No space left on device"),
        (["--act", "allocate"], 1, "error: out of GPU memory: lower --batch-tokens or use --device cpu"),
        (["--act", "interrupt"], 130, "interrupted"),
        (["--act", "read", "--recipe", "none.yaml"], 1, "error: none.yaml: No such file or directory"),
        (["--atc", "read"], 2, "error: unknown option '--atc', did you mean '--act'? (see --help)"),
        ([], 2, "error: missing: --act (see --help)"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_a_status(act, arguments: list[str], status: int, message: str) -> None:
    done = act(*arguments)
    assert (done.returncode, done.stderr, done.stdout) == (status, message + "\n", "")


def test_a_reader_that_has_seen_enough_ends_the_script_quietly(act) -> None:
    done = act("--act", "stream", pipe="| head -n 1")
    assert (done.returncode, done.stderr, done.stdout) == (141, "", "text\n")


def test_a_mistake_of_ours_keeps_its_traceback(act) -> None:
    done = act("--act", "break")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ValueError: a mistake of ours\n")


def test_help_says_what_the_script_does_and_explains_each_option_with_its_default(act) -> None:
    done = act("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "Do what the test asks. python scripts/act.py --act write" in text
    assert "--act ACT What to do, 100% of it. (str, required)" in text
    assert "--path PATH File to read. (Path, default: nothing here)" in text
    assert "--recipe FILE YAML file of options" in text


@pytest.mark.parametrize("script", STAGES)
def test_every_script_explains_all_its_options(script: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "1000")  # one option, one line
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"python scripts/{script}" in text, "the docstring shows no command"
    assert re.findall(r"--[\w.-]+ [^a-z]*\s{2,}\(.*", text) == [], "options without a text"


@pytest.mark.parametrize(("script", "package"), [("describe_corpus", "matplotlib"), ("build_corpus", "datatrove")])
def test_a_package_that_is_not_installed_is_told_in_a_line(script, package):
    program = f"""import runpy, sys
sys.modules[{package!r}] = None  # counts as not installed
sys.path.insert(0, {str(SCRIPTS)!r})
sys.argv[1:] = ["--help"]
runpy.run_path({str(SCRIPTS / f"{script}.py")!r}, run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {package}, which this command needs, is not installed: "
        "pip install -c constraints.txt -e '.[all]' installs all\n"
    )
