"""Dataclasses of options whose fields have a range, which is checked when an instance is created.

    @dataclass
    class SamplingOptions(CheckedOptions):
        temperature: NonNegativeFloat = 0.8
        top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
        documents: Annotated[int | None, Range(at_least=1)] = None

A range applies to every number of a tuple or list, and allows None.
"""

import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from healthslm.errors import UserError


class OptionError(UserError):
    """An invalid value of an option. `problem` leaves out the option's name, which users write in different ways."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.name, self.problem = name, problem


@dataclass(frozen=True)
class Range:
    """The finite numbers that an option accepts."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __repr__(self) -> str:
        """In words: "above 0 and at most 1"."""
        bounds = {name.replace("_", " "): bound for name, bound in vars(self).items() if math.isfinite(bound)}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items())


Device = Literal["auto", "cpu", "cuda"]
"""Where a model runs: "auto" is the GPU if there is one, otherwise the CPU."""

Precision = Literal["fp32", "bf16", "int8", "nf4", "int4"]
"""The type of a saved model's weights, see `healthslm.quantization`."""

PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
UnitInterval = Annotated[float, Range(at_least=0, at_most=1)]
Seed = Annotated[int, Range(at_least=0, below=2**32)]
"""What NumPy accepts as a seed."""


class CheckedOptions:
    """Base class of options dataclasses: checks the ranges of the fields.

    Raises:
        OptionError: A value is outside its option's range.
    """

    def __post_init__(self) -> None:
        for name, allowed in option_ranges(type(self)).items():
            value = getattr(self, name)
            values = value if isinstance(value, list | tuple) else [value]
            if any(number is not None and number not in allowed for number in values):
                raise OptionError(name, f"must be {allowed}, not {value}")


def option_ranges(options_class: type) -> dict[str, Range]:
    """The ranges of the fields of an options dataclass, by name."""
    annotations = typing.get_type_hints(options_class, include_extras=True).items()
    return {
        name: found
        for name, annotation in annotations
        for found in getattr(annotation, "__metadata__", ())
        if isinstance(found, Range)
    }


def plain(value: Any) -> Any:
    """Values of options as JSON has them: paths as text, tuples as lists."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass
class ExecutorOptions(CheckedOptions):
    """Where tasks run, and how many at once."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """Where to run tasks: on this machine, or on a Slurm or Ray cluster with a shared file system."""
    workers: NonNegativeInt = 0
    """Tasks to run in parallel; 0 means one per core on this machine, and no limit on a cluster."""
    executor_settings: dict[str, Any] = field(default_factory=dict)
    """Other settings of datatrove's executor; Slurm needs {"partition": "cpu", "time": "12:00:00"}."""
