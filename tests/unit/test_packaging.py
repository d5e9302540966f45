"""What is installed is what was tested."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECTS = [ROOT / "pyproject.toml", ROOT / "plugins/policies/pyproject.toml"]  # what `make dev` installs
#: Of these the machine or the user chooses the version (or that they are installed at all).
UNPINNED = {"pd-serve", "triton"}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_every_dependency_is_pinned_to_a_version_that_satisfies_it(project: Path) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    metadata = tomllib.loads(project.read_text())["project"]
    extras = metadata.get("optional-dependencies", {}) if project.parent == ROOT else {}
    for line in [*metadata["dependencies"], *(line for extra in extras.values() for line in extra)]:
        requirement = Requirement(line)
        if requirement.name not in UNPINNED:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


def test_pinned_torch_names_no_build_so_that_each_machine_takes_its_own() -> None:
    (line,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert "+" not in line
