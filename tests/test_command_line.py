"""Options come from defaults, a recipe and the command line, and errors are reported in one line."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from conftest import RunScript
from paths import REPOSITORY

from healthslm.arguments import naming_options, parse
from healthslm.cli import COMMANDS
from healthslm.errors import UsageError, UserError
from healthslm.options import CheckedOptions, OptionError, PositiveInt, Range, option_ranges
from healthslm.training.options import PretrainOptions

SCRIPTS = REPOSITORY / "scripts"


def options_of(command: str) -> type:
    module, _, name = COMMANDS[command].options.partition(":")
    return getattr(importlib.import_module(module), name)


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
    """Number of steps; 10% of them warm up."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    resume: bool = False
    """Continue from the last checkpoint."""
    learning_rate: float = 0.5
    """Peak of the learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""


def write_recipe(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return str(folder / "recipe.yaml")


def test_defaults_give_way_to_the_recipe_and_the_recipe_to_the_command_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "steps: 2_000_000\nprecision: bfloat16\nbetas: [0.8, 0.9]\n")
    options = parse(Options, ["--output", "out", "--steps", "7", "--recipe", recipe])
    assert options == Options(
        output=Path("out"),
        steps=7,  # command line
        precision="bfloat16",  # recipe
        resume=False,  # default
        learning_rate=0.5,  # default
        betas=(0.8, 0.9),  # recipe
    )


def test_underscores_of_large_numbers_and_bare_exponents_are_numbers_in_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "output: out\nsteps: 2_000_000\nlearning_rate: 1e-3\n")
    options = parse(Options, ["--recipe", recipe])
    assert (options.steps, options.learning_rate) == (2_000_000, 0.001)


def test_a_list_takes_several_values_and_none_empties_the_recipes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "output: out\nheld_out: [a, b]\n")
    assert parse(Options, ["--output", "x", "--held-out", "a", "b c"]).held_out == [Path("a"), Path("b c")]
    assert parse(Options, ["--recipe", recipe, "--held-out", "c"]).held_out == [Path("c")]
    assert parse(Options, ["--recipe", recipe, "--held-out"]).held_out == []
    assert parse(Options, ["--output", "x", "--held-out=a", "b"]).held_out == [Path("a"), Path("b")]
    assert parse(Options, ["--output", "x", "--betas", "0.5", "0.6"]).betas == (0.5, 0.6)


def test_switches_and_dictionaries_can_be_given_on_the_command_line() -> None:
    options = parse(Options, ["--output", "x", "--resume", "--model", '{"hidden_size": 8}'])
    assert (options.resume, options.model) == (True, {"hidden_size": 8})
    assert parse(Options, ["--output", "x", "--resume", "false"]).resume is False
    assert parse(Options, ["--output=x", "--model={hidden_size: 8}"]).model == {"hidden_size": 8}


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
    """Options of a function with one positional argument."""

    run_folder: Path = field(metadata={"positional": "RUN"})
    """Folder of the run."""
    held_out: list[Path] = field(default_factory=list)
    """Files kept out of training."""


def test_a_positional_option_can_be_written_without_its_name_or_in_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "run_folder: runs/a\nheld_out: [b]\n")
    assert parse(Positional, ["runs/a", "--held-out", "b"]) == Positional(Path("runs/a"), [Path("b")])
    assert parse(Positional, ["--recipe", recipe]) == Positional(tmp_path / "runs/a", [tmp_path / "b"])
    assert parse(Positional, ["x", "--recipe", recipe]).run_folder == Path("x")
    with pytest.raises(UsageError, match="missing: --run-folder$"):
        parse(Positional, ["--held-out", "b"])
    with pytest.raises(UsageError, match="unrecognized arguments: y"):
        parse(Positional, ["x", "y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-ot", "x"], "unknown option '--held-ot', did you mean '--held-out'?"),
        (["--held_out", "x"], "unknown option '--held_out', did you mean '--held-out'?"),
        (["--learningrate=1"], "unknown option '--learningrate', did you mean '--learning-rate'?"),
        (["--step", "1"], "unknown option '--step', did you mean '--steps'?"),
        (["--recip", "x"], "unknown option '--recip', did you mean '--recipe'?"),
        (["--steps", "1", "stray"], "unrecognized arguments: stray"),
        (["-x"], "unrecognized arguments: -x"),
        (["--steps"], "--steps: expected one argument"),
        (["--steps", "two"], "--steps: expected int | None, got two"),
        (["--steps", "2.5"], "--steps: expected int | None, got 2.5"),
        (["--resume", "maybe"], "--resume: expected bool, got maybe"),
        (["--precision", "int8"], "--precision: expected Literal['float32', 'bfloat16'], got int8"),
        (["--betas", "0.9"], "--betas: expected tuple[float, float], got ['0.9']"),
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
        ("learning_rat: 1", "unknown option 'learning_rat', did you mean 'learning_rate'?"),
        ("held_out: 7", "held_out: expected list[Path], got 7"),
        ("steps: 1.5", "steps: expected int | None, got 1.5"),
        ("output: 3", "output: expected Path"),
        ("betas: [1, 2, 3]", "betas: expected tuple[float, float], got [1, 2, 3]"),
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
        parse(Options, ["--recipe", write_recipe(tmp_path, "output:\nsteps: 3\n")])


@dataclass
class Ranged(CheckedOptions):
    """Options that have a range each."""

    steps: PositiveInt = 10
    documents: Annotated[int | None, Range(at_least=1)] = None
    fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    betas: Annotated[tuple[float, float], Range(at_least=0, below=1)] = (0.9, 0.95)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, not 0"),
        (["--documents", "-5"], "--documents: must be at least 1, not -5"),
        (["--fraction", "0"], "--fraction: must be above 0 and at most 1, not 0.0"),
        (["--fraction", "1.5"], "--fraction: must be above 0 and at most 1, not 1.5"),
        (["--betas", "0.9", "1"], "--betas: must be at least 0 and below 1, not (0.9, 1.0)"),
        (["--fraction", "1e999"], "--fraction: must be above 0 and at most 1, not inf"),
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


def test_a_range_includes_its_ends_unless_it_says_above_or_below() -> None:
    accepted = Ranged(steps=1, documents=None, fraction=1.0, betas=(0.0, 0.0))
    assert parse(Ranged, ["--steps", "1", "--betas", "0", "0"]) == accepted


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_options_created_in_python_are_checked_too(value: float) -> None:
    with pytest.raises(OptionError, match="^fraction: must be above 0 and at most 1, not"):
        Ranged(fraction=value)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_that_a_command_takes_has_a_range(command: str) -> None:
    options_class = options_of(command)
    types = typing.get_type_hints(options_class)
    numbers = {name for name, kind in types.items() if re.search(r"\b(int|float)\b", str(kind))}
    assert numbers == option_ranges(options_class).keys()
    assert not numbers or issubclass(options_class, CheckedOptions)


SCRIPT = '''import errno
from dataclasses import dataclass, field
from pathlib import Path

from healthslm.cli import run
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
            raise ValueError("a bug")


if __name__ == "__main__":
    run(act, ActOptions, summary="Do what the test asks: act.py --act write")
'''


@pytest.fixture
def act(tmp_path: Path) -> RunScript:
    """Run a script that uses `healthslm.cli.run`, in its own process."""
    (tmp_path / "act.py").write_text(SCRIPT, encoding="utf-8")

    def run(*arguments: str, pipe: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}
        command = f"set -o pipefail; {shlex.join([sys.executable, 'act.py', *arguments])} {pipe}"
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("kind", ["OutOfMemoryError", "AcceleratorError"])
def test_every_error_of_a_full_gpu_names_the_options_to_lower(kind: str) -> None:
    """PyTorch has one for its allocator, and another one for memory that CUDA itself needs."""
    message = "^out of GPU memory: lower --micro-batch-size or lower --context or use --device cpu$"
    with pytest.raises(UserError, match=message), naming_options(PretrainOptions, []):
        raise getattr(torch, kind)("CUDA error: out of memory")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--act", "read"], 1, "error: nothing here: No such file or directory"),
        (["--act", "complain"], 1, "error: a.xml: cut off at line 3: download it again"),
        (["--act", "fill"], 1, "error: cannot write: No space left on device"),
        (["--act", "allocate"], 1, "error: out of GPU memory: lower --batch-tokens or use --device cpu"),
        (["--act", "interrupt"], 130, "interrupted"),
        (["--act", "read", "--recipe", "none"], 2, "error: none: File does not exist: '{folder}/none' (see --help)"),
        (["--atc", "read"], 2, "error: unknown option '--atc', did you mean '--act'? (see --help)"),
        ([], 2, "error: missing: --act (see --help)"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_a_status(
    act: RunScript, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    done = act(*arguments)
    assert (done.returncode, done.stderr, done.stdout) == (status, message.format(folder=tmp_path) + "\n", "")


def test_a_closed_pipe_ends_the_script_quietly(act: RunScript) -> None:
    done = act("--act", "stream", pipe="| head -n 1")
    assert (done.returncode, done.stderr, done.stdout) == (141, "", "text\n")


def test_a_bug_keeps_its_traceback(act: RunScript) -> None:
    done = act("--act", "break")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ValueError: a bug\n")


def test_help_describes_the_command_and_each_option_with_its_type_and_default(act: RunScript) -> None:
    done = act("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "Do what the test asks: act.py --act write" in text
    assert "--act ACT What to do, 100% of it. (required, type: str)" in text
    assert "--path PATH File to read. (type: Path, default: nothing here)" in text
    assert "--recipe FILE YAML file of options" in text


def test_there_is_a_script_for_each_command() -> None:
    assert {path.stem.replace("_", "-") for path in SCRIPTS.glob("*.py")} == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_explains_all_options_of_its_command(
    command: str, run_script_here: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # one option, one line
    done = run_script_here(command.replace("-", "_"), "--help")
    assert done.returncode == 0
    assert f"healthslm {command} {COMMANDS[command].example}" in done.stdout
    assert str(REPOSITORY) not in done.stdout, "a path of this machine"
    explained = dict(re.findall(r"^  --([\w-]+)[^\n]*?\s{2,}(\S.*)$", done.stdout, re.MULTILINE))
    assert explained.keys() == {
        "recipe",
        *(name.replace("_", "-") for name in typing.get_type_hints(options_of(command))),
    }
    assert not [name for name, text in explained.items() if text.startswith("(")], "options without a text"


def test_help_shows_an_option_without_a_name_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Positional, ["--help"], "healthslm release")
    assert capsys.readouterr().out.startswith("usage: healthslm release RUN [options]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_read_without_an_error(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    example = COMMANDS[command].example.partition(" (or")[0]
    assert isinstance(parse(options_of(command), shlex.split(example)), options_of(command))


def run_healthslm(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from healthslm.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def test_the_console_command_lists_its_commands() -> None:
    for arguments in [(), ("--help",)]:
        done = run_healthslm(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        for name, command in COMMANDS.items():
            assert re.search(rf"^  {name} +{re.escape(command.summary)}$", done.stdout, re.MULTILINE)


def test_an_unknown_command_is_an_error_with_a_suggestion() -> None:
    done = run_healthslm("pretran", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'pretran', did you mean 'pretrain'? (see --help)\n"


def test_help_and_usage_errors_import_none_of_the_large_packages() -> None:
    program = f"""
import sys
from healthslm.cli import main
large = {{"torch", "transformers", "datatrove", "numpy", "pyarrow", "duckdb"}}
for command in {list(COMMANDS)}:
    for argument in ("--help", "--mistyped"):
        sys.argv[1:] = [command, argument]
        try:
            main()
        except SystemExit:
            pass
        assert not large & sys.modules.keys(), (command, large & sys.modules.keys())
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_while_a_module_is_imported_ends_in_one_line_even_if_the_module_catches_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"
        "    pass\n"
        "def function(options): print('called')\n"
    )
    (tmp_path / "main.py").write_text(
        "from dataclasses import dataclass\n"
        "from healthslm.cli import run\n"
        "@dataclass\n"
        "class Options:\n"
        "    steps: int = 3\n"
        "run('slow:function', Options)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("describe-corpus", "matplotlib", "plots"), ("build-corpus", "datatrove", "data"), ("generate", "torch", None)],
)
def test_a_missing_package_is_reported_with_the_extra_that_installs_it(
    command: str, package: str, extra: str | None, tmp_path: Path
) -> None:
    program = f"""import sys
sys.modules[{package!r}] = None  # counts as not installed
from healthslm.cli import main
main()"""
    example = shlex.split(COMMANDS[command].example)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program, command, *example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    cure = "" if extra is None else f"; in the repository, pip install -e '.[{extra}]' installs it"
    assert done.stderr == f"error: {package} is not installed{cure}\n"
