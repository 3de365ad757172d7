"""Stand-ins for the three Slurm commands that job scripts use: jobs run immediately, one after the other, locally.

As with Slurm, `sbatch` runs a script once per index of its array, and skips a job that depends on a failed one. Scripts
are kept for tests to read.
"""

import os
import subprocess
import sys
from pathlib import Path

SBATCH = """
import os, re, subprocess, sys
from pathlib import Path

jobs = Path(os.environ["FAKE_SLURM_JOBS"])
options, script = sys.argv[1:-1], Path(sys.argv[-1]).read_text()
number = len(list(jobs.glob("*.sh"))) + 1
(jobs / f"{number}.sh").write_text(script)
(jobs / f"{number}.options").write_text(" ".join(options))
print("Submitted batch job", number)
directives = dict(re.findall(r"#SBATCH --([a-z-]+)=(.*)", script))
needed = re.findall(r"afterok:(\\d+)", " ".join([*options, directives.get("dependency", "")]))
statuses = [int((jobs / f"{job}.status").read_text()) for job in needed]
first, last = map(int, re.match(r"(\\d+)-(\\d+)", directives.get("array", "0-0")).groups())
status = 1 if any(statuses) else 0
if status == 0:
    exported = dict(pair.split("=") for option in options for pair in re.findall(r"[A-Z_]+=\\w+", option))
    for index in range(first, last + 1):
        environment = os.environ | exported | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "localhost"}
        with (jobs / f"{number}_{index}.out").open("w") as output:
            done = subprocess.run(["bash", jobs / f"{number}.sh"], env=environment, stdout=output, stderr=output)
        status |= done.returncode != 0
(jobs / f"{number}.status").write_text(str(int(status)))
"""
SRUN = """
import subprocess, sys

command = sys.argv[1:]
while command[0].startswith("-"):
    command = command[2:] if command[0] == "-n" else command[1:]
sys.exit(subprocess.run(command).returncode)
"""
SCONTROL = "import sys; print(sys.argv[-1])"


def install(folder: Path) -> dict[str, str]:
    """Write the commands to folder/bin; return the environment variables for processes that use them."""
    (folder / "jobs").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name, program in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        command = folder / "bin" / name
        command.write_text(f"#!{sys.executable}\n{program}")
        command.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM_JOBS": str(folder / "jobs")}


def bash_syntax_errors(script: Path) -> str:
    """The syntax errors that bash finds in a script; an empty string if there are none."""
    return subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr
