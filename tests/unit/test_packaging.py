"""What is installed is what was tested."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]  # what `make dev` installs
#: Of these the machine or the user chooses the version (or that they are installed at all).
UNPINNED = {"pd-serve", "triton"}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_every_dependency_is_pinned_to_a_version_that_satisfies_it(project: Path) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    metadata = tomllib.loads(project.read_text())["project"]
    extras = metadata.get("optional-dependencies", {})
    if project.parent != ROOT:  # of a vendor's wheels, the one that the tests use
        extras = {name: extras.get(name, []) for name in ("cpu", "memfabric", "adapter")}
    for line in [*metadata["dependencies"], *(line for extra in extras.values() for line in extra)]:
        requirement = Requirement(line)
        if requirement.name not in UNPINNED:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


def _imported(folder: Path) -> set[str]:
    """The top-level names that the modules under `folder` import, wherever in them."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def test_what_every_installation_gets_is_what_pd_imports() -> None:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(line).name) for line in metadata["dependencies"]}
    modules = {"pyzmq": "zmq"}
    imported = _imported(ROOT / "pd")
    unused = {name for name in names if modules.get(name, name.replace("-", "_")) not in imported}
    assert not unused, "needed by tests only? then they belong to the extra `dev`"


def test_pinned_torch_names_no_build_so_that_each_machine_takes_its_own() -> None:
    (line,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert "+" not in line
