"""What every package of plugins keeps to: small, of pd only what is public, a vendor's library in the factory only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    [path.parent for path in ROOT.glob("plugins/*/pd_*/__init__.py")] + [ROOT / "tests/plugins/third_party/pd_example"]
)
PUBLIC = {"pd", "pd.abc", "pd.types", "pd.messages", "pd.errors"}

#: The modules of a transfer backend's vendor; any of them may be installed.
VENDORS = {
    "pd_transfer_nixl": ("nixl", "nixl_cu12", "nixl_cu13"),
    "pd_transfer_mooncake": ("mooncake",),
    "pd_transfer_ascend": ("memfabric_hybrid", "mf_adapter"),
}


def imported_of_pd(path: Path) -> Iterator[str]:
    """Modules of pd that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [node.module, *(name for name in inner if node.module == "pd" and find_spec(name))]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "pd")


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_is_at_most_600_lines(package: Path) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in package.rglob("*.py"))
    assert 0 < lines <= 600


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_imports_of_pd_only_what_is_public_and_its_tests_also_what_tests_plugins(package: Path) -> None:
    for path in package.rglob("*.py"):
        assert set(imported_of_pd(path)) <= PUBLIC, path
    for path in package.parent.glob("test_*.py"):
        beside = {name for name in imported_of_pd(path) if not f"{name}.".startswith("pd.testing.")}
        assert beside <= PUBLIC, path


IMPORT_ALL = """
import importlib, pkgutil, sys
from pd.plugins import load_plugins
package, *vendors = sys.argv[1:]
for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
    importlib.import_module(f"{package}.{module.name}")
plugins = load_plugins()
plugins.check()
plugins.describe()
assert package.rpartition("_")[2] in plugins.backends()
print({name.partition(".")[0] for name in sys.modules}.intersection(vendors))
"""


@pytest.mark.parametrize("package", VENDORS)
def test_no_module_of_a_package_imports_the_vendors_library_nor_does_asking_what_there_is(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-c", IMPORT_ALL, package, *VENDORS[package]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
