"""Hub ids: what is one, which directory it means, and what is fetched in which order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pd.config import ServeConfig, UpConfig
from pd.errors import ConfigError, ModelError
from pd.instance import check, located
from pd.models.hub import SMALL_FILES, HuggingFaceHub, hub_id, locate, missing
from pd.plugins import load_plugins
from pd.settings import parse
from tests.hub_kit import COMMIT, cache_model
from tests.oracle import tiny_model

REPO = "some-org/Tiny-Model_1.5"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three shards, with a tokenizer."""
    return Path(tiny_model(tmp_path_factory.mktemp("models"), "qwen3", shards=3, tokenizer=True))


def never() -> None:
    raise AssertionError("nothing has to be fetched")


def find(model: str, hub: Any, revision: str = "", check: Callable[[str], None] = lambda path: None) -> str:
    return locate(model, revision, hub, check=check, downloading=lambda: None)


@dataclass
class ScriptedHub:
    """Has a model in `source`; its cache is `cache`, where `held` is there from the beginning."""

    source: Path
    cache: Path
    held: bool = False
    asked: list[tuple[str, str, list[str]]] = field(default_factory=list)

    def cached(self, repo: str, revision: str) -> str | None:
        return str(self.cache) if self.held else None

    def download(self, repo: str, revision: str, files: Sequence[str]) -> str:
        self.asked.append((repo, revision, list(files)))
        self.cache.mkdir(exist_ok=True)
        for name in files:
            if (self.source / name).exists():
                shutil.copy(self.source / name, self.cache / name)
        return str(self.cache)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", ("meta-llama/Llama-3.1-8B-Instruct", "")),
        ("Qwen/Qwen3-8B@main", ("Qwen/Qwen3-8B", "main")),
        ("Qwen/Qwen3-8B@refs/pr/1", ("Qwen/Qwen3-8B", "refs/pr/1")),
        ("/data/models/llama", None),
        ("./org/name", None),
        ("../org", None),
        ("~/models", None),
        ("name", None),
        ("a/b/c", None),
        ("org/", None),
        ("org/name@", None),
        ("org/na--me", None),
        ("org/na..me", None),
        ("org/-name", None),
        ("org/" + "n" * 93, None),
        ("org/näme", None),
    ],
)
def test_an_id_is_an_organisation_and_a_name(text: str, expected: tuple[str, str] | None) -> None:
    assert hub_id(text) == expected


def test_a_directory_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/name") is None
    assert locate("org/name", "", ScriptedHub(tmp_path, tmp_path), check=never, downloading=never) == "org/name"  # type: ignore[arg-type]
    assert hub_id("org/other") == ("org/other", "")


def test_a_cached_snapshot_is_used_as_it_is(whole: Path, tmp_path: Path) -> None:
    snapshot = str(cache_model(tmp_path, REPO, whole))
    hub = HuggingFaceHub(str(tmp_path))
    for text, revision in ((REPO, ""), (f"{REPO}@main", ""), (f"{REPO}@{COMMIT}", ""), (REPO, COMMIT), (REPO, "main")):
        assert locate(text, revision, hub, check=lambda path: never(), downloading=never) == snapshot
    assert missing(snapshot) == []


def test_a_revision_names_its_own_snapshot(whole: Path, tmp_path: Path) -> None:
    cache_model(tmp_path, REPO, whole)
    other = str(cache_model(tmp_path, REPO, whole, revision="v2", commit="f" * 40))
    hub = HuggingFaceHub(str(tmp_path))
    assert locate(f"{REPO}@v2", "", hub, check=lambda path: never(), downloading=never) == other
    assert locate(REPO, "v2", hub, check=lambda path: never(), downloading=never) == other
    assert hub.cached(REPO, "v3") is None and hub.cached("some-org/else", "main") is None
    with pytest.raises(ConfigError, match=r"--revision: main contradicts v2 in some-org"):
        find(f"{REPO}@v2", hub, "main")


def test_weights_are_fetched_last_and_nothing_that_is_not_read(whole: Path, tmp_path: Path) -> None:
    hub = ScriptedHub(whole, tmp_path / COMMIT)
    checked: list[tuple[str, list[str]]] = []
    folder = find(f"{REPO}@v1", hub, check=lambda path: checked.append((path, missing(path))))
    weights = [f"model-{shard:05d}-of-00003.safetensors" for shard in (1, 2, 3)]
    assert checked == [(folder, weights)] and missing(folder) == []
    assert hub.asked == [(REPO, "v1", list(SMALL_FILES)), (REPO, COMMIT, weights)]


def test_of_a_model_in_one_file_that_file_is_fetched(tmp_path: Path) -> None:
    whole = Path(tiny_model(tmp_path, "llama", tokenizer=True, vocab_size=300))
    hub = ScriptedHub(whole, tmp_path / COMMIT)
    find(REPO, hub)
    assert [files for _, _, files in hub.asked] == [list(SMALL_FILES), ["model.safetensors"]]


def test_a_model_that_cannot_be_served_is_refused_before_its_weights_are_fetched(whole: Path, tmp_path: Path) -> None:
    def refuse(path: str) -> None:
        raise ModelError(path, "unsupported")

    hub = ScriptedHub(whole, tmp_path / COMMIT)
    with pytest.raises(ModelError, match="unsupported"):
        find(REPO, hub, check=refuse)
    assert [files for _, _, files in hub.asked] == [list(SMALL_FILES)]


@pytest.mark.parametrize("lost", ["tokenizer.json", "model-00002-of-00003.safetensors"])
def test_what_a_cached_snapshot_lacks_is_fetched_or_named(whole: Path, tmp_path: Path, lost: str) -> None:
    part = tmp_path / COMMIT
    shutil.copytree(whole, part)
    (part / lost).unlink()
    begun: list[bool] = []
    hub = ScriptedHub(whole, part, held=True)
    found = locate(REPO, "", hub, check=lambda path: None, downloading=lambda: begun.append(True))
    assert found == str(part) and begun == [True] and missing(str(part)) == []
    (part / lost).unlink()
    with pytest.raises(ConfigError, match=f"MODEL: {REPO} at main lacks {lost}; only safetensors and tokenizer.json"):
        find(REPO, ScriptedHub(tmp_path / "empty", part, held=True))


def test_an_instance_is_given_the_directory_and_serves_the_id(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = str(cache_model(tmp_path, REPO, whole))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plugins = load_plugins()
    for line, name in (
        (["--model-path", REPO], REPO),
        ([f"{REPO}@main"], f"{REPO}@main"),
        ([REPO, "--revision", "main", "--served-model-name", "mine"], "mine"),
    ):
        config = located(parse(ServeConfig, line, {}), plugins)
        assert (config.model.model, config.model.served_model_name, config.model.revision) == (snapshot, name, "")
        info = check(config, plugins)
        assert (info.name, info.path, info.architecture) == (name, snapshot, "Qwen3ForCausalLM")
    directory = parse(ServeConfig, [str(whole)], {"PD_REVISION": "v1"})
    assert located(directory, plugins) == directory


@pytest.mark.parametrize("command", [ServeConfig, UpConfig])
def test_a_directory_has_no_revision(whole: Path, command: type) -> None:
    with pytest.raises(ConfigError, match=r"--revision: .* is a directory; leave it out"):
        parse(command, [str(whole), "--revision", "main"], {})
    parse(command, [str(whole)], {"PD_REVISION": "main"})
