"""Running a function in a process where every cache is empty and none of our code can be imported."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def start_clean_process(
    home: Path, function: Callable[..., dict], *arguments: object, without: Sequence[str] = ()
) -> subprocess.Popen:
    """Start `function(*arguments)`, its arguments as strings, where these packages count as not installed."""
    home.mkdir(exist_ok=True)
    code = f"""import json, sys
sys.modules.update(dict.fromkeys({["healthslm", *without]}))  # importing one of them is an error from here on
{inspect.getsource(function)}
print(json.dumps({function.__name__}(*sys.argv[1:])))"""
    empty_folders = {"HOME": str(home), "HF_HOME": str(home / "hub"), "HF_MODULES_CACHE": str(home / "modules")}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        cwd=home,
        env={**os.environ, **empty_folders},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen, timeout: float = 300) -> dict:
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])
