"""pd as other people meet it: wheels in a fresh environment, with plugins that pd knows nothing of.

Third-party libraries are not installed again: the fresh environment sees those of this one, through links, except every
distribution that is a plugin of pd or pd itself.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from up_kit import environment, run, running

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
THIRD_PARTY, BROKEN = ROOT / "tests/plugins/third_party", ROOT / "tests/plugins/broken"
#: What is built, and from where.
SOURCES = {
    "pd_serve": ROOT,
    "pd_policies": ROOT / "plugins/policies",
    "pd_example": THIRD_PARTY,
    **{f"pd_broken_{path.name}": path for path in sorted(BROKEN.iterdir()) if path.is_dir()},
}
PROMPT = "A prompt that is longer than one block of the cache, so that there is something to send. " * 3


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every wheel, by the name of its distribution. Built from copies: building writes into the source tree."""
    folder = tmp_path_factory.mktemp("wheels")
    for name, source in SOURCES.items():
        copy = folder / "source" / name
        if source == ROOT:
            copy.mkdir(parents=True)
            for file in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / file, copy)
            shutil.copytree(ROOT / "pd", copy / "pd", ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    sources = sorted((folder / "source").iterdir())
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder / "out", *sources)
    return {wheel.name.partition("-")[0]: wheel for wheel in (folder / "out").iterdir()}


@dataclass(frozen=True)
class Fresh:
    """A virtual environment with pd, its policies and the third-party plugin."""

    bin: Path
    site: Path
    folder: Path

    def run(self, *words: str | Path, **env: str) -> tuple[int, str, str]:
        return run([self.bin / words[0], *words[1:]], self.folder, env)


@pytest.fixture(scope="module")
def fresh(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=60)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    libraries = folder / "libraries"
    libraries.mkdir()
    for path in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for entry in path.iterdir():
            if entry.name not in hidden() and entry.suffix != ".pth" and entry.name != "__pycache__":
                (libraries / entry.name).symlink_to(entry)
    (site / "libraries.pth").write_text(f"{libraries}\n")
    chosen = [wheels[name] for name in ("pd_serve", "pd_policies", "pd_example")]
    pip("--python", python, "install", "--no-deps", "--no-index", *chosen)
    return Fresh(python.parent, site, folder)


def hidden() -> set[str]:
    """What the fresh environment must not see of this one: pd and its plugins."""
    names: set[str] = set()
    for distribution in metadata.distributions():
        if any(entry.group == "pd" for entry in distribution.entry_points):
            names |= {file.parts[0] for file in distribution.files or ()}
    return names


# --- wheels ---------------------------------------------------------------------------------------------------------


def test_pds_wheel_holds_every_module_the_built_in_model_and_its_types(wheels: dict[str, Path]) -> None:
    names = zipfile.ZipFile(wheels["pd_serve"]).namelist()
    wanted = [
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "py.typed", "builtin_model/*")
        for path in (ROOT / "pd").rglob(pattern)
    ]
    assert set(wanted) <= set(names)
    assert {"pd/py.typed", "pd/builtin_model/config.json", "pd/builtin_model/tokenizer.json"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pd"}
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize(("name", "package"), [("pd_policies", "pd_policies"), ("pd_example", "pd_example")])
def test_a_plugins_wheel_holds_its_package_and_its_types(wheels: dict[str, Path], name: str, package: str) -> None:
    names = zipfile.ZipFile(wheels[name]).namelist()
    modules = {str(path.relative_to(SOURCES[name])) for path in (SOURCES[name] / package).rglob("*.py")}
    assert modules | {f"{package}/py.typed"} <= set(names)


# --- found, listed, tested, run -------------------------------------------------------------------------------------


def test_the_plugin_is_listed_with_its_origin_and_hooks(fresh: Fresh) -> None:
    code, out, err = fresh.run("pd", "plugins", "--json")
    assert code == 0, err
    plugins = {plugin["name"]: plugin for plugin in json.loads(out)}
    assert set(plugins) == {"direct", "random", "dense", "policies", "example"}
    example = plugins["example"]
    assert (example["distribution"], example["version"]) == ("pd-example", "0.3.0")
    assert Path(example["origin"]) == fresh.site / "pd_example/plugin.py"
    assert example["hooks"] == ["pd_register_routing_policies", "pd_register_transfer_backends"]
    assert (example["backends"], example["policies"]) == (["memfd"], ["sticky"])
    assert all(Path(plugin["origin"]).is_relative_to(fresh.site) for plugin in plugins.values())
    code, out, err = fresh.run("pd", "plugins")
    assert code == 0 and re.search(r"^example +pd-example 0\.3\.0 +backends: memfd; policies: sticky", out, re.M), out


def test_the_plugin_passes_pds_conformance_suites(fresh: Fresh) -> None:
    shutil.copy(THIRD_PARTY / "test_pd_example.py", fresh.folder)
    shutil.copy(THIRD_PARTY / "pyproject.toml", fresh.folder)
    code, out, err = fresh.run("python", "-m", "pytest", "test_pd_example.py")
    assert code == 0, out + err
    assert int(re.search(r"(\d+) passed", out)[1]) > 25, out  # type: ignore[index]


def test_a_cluster_answers_through_the_plugins_backend_and_policy(fresh: Fresh, tmp_path: Path) -> None:
    up = [fresh.bin / "pd", "up", "--port", "0", "--max-total-tokens", "20000"]
    chosen = ["--transfer", "memfd", "--prefill-policy", "sticky", "--log-format", "json"]
    with running([*up, *chosen], tmp_path) as cluster:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        prefill, decode = cluster.instance("prefill-0"), cluster.instance("decode-0")
        assert httpx.get(f"{decode}/server_info", timeout=10).json()["transfer"] == "memfd"
        pushed = cluster.metric(prefill, "pd_kv_pushed_bytes_total")
        assert pushed > 0 and cluster.metric(decode, "pd_kv_landed_bytes_total") == pushed
        assert cluster.metric(decode, 'pd_prompt_tokens_total{source="computed"}') == 0
        policies = {line["pool"]: line["policy"] for line in cluster.logged("routing_policy")}
        assert policies == {"prefill": "sticky", "decode": "power_of_two"}
        assert cluster.logged("memfd_connected")
        assert cluster.stop() == 0


# --- broken ones ----------------------------------------------------------------------------------------------------

REASONS = {
    "import_error": "plugin broken-import-error: .* does not load: ModuleNotFoundError: .*a_library_that_nobody_has",
    "duplicate_name": "plugin broken-duplicate-name: transfer backend direct is already registered by plugin direct",
    "unknown_hook": "plugin broken-unknown-hook: unknown hook 'pd_register_schedulers'",
}


def test_there_is_a_reason_for_every_broken_plugin() -> None:
    assert {f"pd_broken_{name}" for name in REASONS} == {name for name in SOURCES if "broken" in name}


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_plugin_stops_the_start_up_with_its_name(
    fresh: Fresh, wheels: dict[str, Path], tmp_path: Path, name: str
) -> None:
    pip("install", "--no-deps", "--no-index", "--target", tmp_path, wheels[f"pd_broken_{name}"])
    for command in (
        ["plugins"],
        ["up", "--port", "0"],
        ["serve", "/no/model", "--role", "prefill", "--port", "0"],
        ["route", "--decode", "http://127.0.0.1:9", "--port", "0"],
    ):
        code, out, err = fresh.run("pd", *command, PYTHONPATH=str(tmp_path))
        assert (code, out) == (1, ""), (command, out, err)
        assert re.fullmatch(f"pd: {REASONS[name]}.*\n", err), (command, err)
