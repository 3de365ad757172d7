"""Train a grid of variants of one recipe and tabulate what each reaches:

    python benchmarks/ablation.py --grid benchmarks/ablation.yaml --tokens tokens --output runs/ablation

The grid is a YAML file: `common`, options of pretraining that all runs share, and `variants`, a name for each set of
options that differ from them. A list of `seeds` in a variant trains it once with each seed. Every run is an ordinary
run folder, trained by scripts/pretrain.py in its own process. Finished runs are skipped, stopped ones are resumed. The
table is printed and written to table.md, the results to results.json, and validation curves to curves.png.
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from healthslm.cli import run
from healthslm.errors import UserError
from healthslm.files import replacing, write_json
from healthslm.training.run_folder import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class AblationOptions:
    """Options of `ablate`."""

    grid: Path
    """YAML file of the variants."""
    tokens: Path
    """Folder of the tokenized corpus."""
    output: Path
    """Folder of the runs and the table."""
    only: list[str] | None = None
    """Variants to train; by default all. The table shows all that are finished."""


def ablate(options: AblationOptions) -> None:
    """Train the variants, one after another, and tabulate those that are finished."""
    grid = yaml.safe_load(options.grid.read_text(encoding="utf-8"))
    unknown = set(options.only or []) - set(grid["variants"])
    if unknown:
        raise UserError(f"{options.grid}: no variant {', '.join(sorted(unknown))}")
    for name, changes in grid["variants"].items():
        if options.only is None or name in options.only:
            for seed in changes.get("seeds", [0]):
                train(options, f"{name}-{seed}", grid["common"] | changes | {"seed": seed})
            tabulate(options, grid)
    tabulate(options, grid)
    draw(options, grid)
    print((options.output / "table.md").read_text(encoding="utf-8"))


def train(options: AblationOptions, name: str, recipe: dict[str, Any]) -> None:
    """Train a run to its end, unless it is finished."""
    run_folder = options.output / name
    if final_record(run_folder, recipe["max_tokens"]) is not None:
        return
    recipe = {key: value for key, value in recipe.items() if key != "seeds"}
    recipe |= {"tokens": str(options.tokens.resolve()), "output": str(run_folder.resolve())}
    path = options.output / "recipes" / f"{name}.yaml"
    with replacing(path) as new:
        new.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "scripts/pretrain.py"), "--recipe", str(path)]
    if any(run_folder.glob("checkpoints/step-*")):
        command.append("--resume")
    done = subprocess.run(command)
    if done.returncode != 0:
        raise UserError(f"{path}: this run failed, see above")


def final_record(run_folder: Path, max_tokens: int) -> dict[str, Any] | None:
    """The last evaluation of a finished run."""
    found = [record for record in read_metrics(run_folder) if "validation_bits_per_byte" in record]
    return found[-1] if found and found[-1]["tokens"] >= max_tokens else None


def tabulate(options: AblationOptions, grid: dict[str, Any]) -> None:
    """Write table.md and results.json: bits per byte at the end of each finished run, by variant."""
    results = []
    for name, changes in grid["variants"].items():
        recipe = grid["common"] | changes
        ends = [
            final_record(options.output / f"{name}-{seed}", recipe["max_tokens"]) for seed in recipe.get("seeds", [0])
        ]
        scores = [end["validation_bits_per_byte"] for end in ends if end is not None]
        if scores:
            shown = {key: value for key, value in changes.items() if key != "seeds"}
            steps = next(end["step"] for end in ends if end is not None)
            results.append(
                {
                    "variant": name,
                    "changes": shown,
                    "tokens": recipe["max_tokens"],
                    "steps": steps,
                    "scores": scores,
                }
            )
    lines = [
        "| variant | differs by | tokens | steps | bits per byte | spread |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        changes = ", ".join(f"{key} {value}" for key, value in result["changes"].items()) or "nothing"
        scores = result["scores"]
        spread = f"{statistics.stdev(scores):.4f} ({len(scores)} seeds)" if len(scores) > 1 else ""
        lines.append(
            f"| {result['variant']} | {changes} | {result['tokens']:,} | {result['steps']:,} | "
            f"{statistics.fmean(scores):.4f} | {spread} |"
        )
    write_json(options.output / "results.json", results)
    with replacing(options.output / "table.md") as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(options: AblationOptions, grid: dict[str, Any]) -> None:
    """Plot bits per byte over tokens for the variants with evaluations between the start and the end."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="validation, bits per byte")
    for name, changes in grid["variants"].items():
        for seed in changes.get("seeds", [0]):
            found = [r for r in read_metrics(options.output / f"{name}-{seed}") if "validation_bits_per_byte" in r]
            later = found[1:]
            if len(later) > 1:
                tokens, bits = ([record[key] for record in later] for key in ("tokens", "validation_bits_per_byte"))
                axes.plot(tokens, bits, marker="o", markersize=3, label=f"{name}, seed {seed}")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if axes.lines:
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        with replacing(options.output / "curves.png") as new:
            figure.savefig(new, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    run(ablate, AblationOptions, summary=__doc__)
