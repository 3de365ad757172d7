"""conda's environment installs what `make` installs, with versions that pyproject.toml allows."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


@pytest.fixture(scope="module")
def project(repository) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def dependencies(repository) -> list:
    return yaml.safe_load((repository / "environment.yml").read_text(encoding="utf-8"))["dependencies"]


def test_its_python_is_one_that_the_project_and_the_constraints_are_for(repository, project, dependencies):
    (python,) = (
        SpecifierSet(f"=={name.partition('=')[2]}.*") for name in dependencies if str(name).startswith("python=")
    )
    first, last = re.search(r"Python (3\.\d+) to (3\.\d+)", (repository / "constraints.txt").read_text()).groups()
    (version,) = (str(specifier.version).removesuffix(".*") for specifier in python)
    assert version in SpecifierSet(f">={first},<={last}")
    assert version in SpecifierSet(project["requires-python"])


def test_pip_installs_the_project_as_make_does(repository, project, dependencies):
    (lines,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    installed = re.search(r"\$\(PIP\) (-c constraints\.txt -e \"\.\[all\]\")", (repository / "Makefile").read_text())[1]
    assert " ".join(lines) == installed.replace('"', "")
    assert "all" in project["optional-dependencies"]
    assert "pip" in dependencies  # conda warns if pip is used and not named


def test_the_constraints_pin_every_dependency_to_a_version_that_the_project_allows(repository, project):
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.partition(" ;")[0].split("==") for line in lines if not line.startswith("#"))
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in map(Requirement, (line for group in groups for line in group)):
        if requirement.name != "healthslm":
            pin = pins[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(pin), f"{requirement}: {pin}"
