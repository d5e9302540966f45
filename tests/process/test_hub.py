"""huggingface_hub's client against a hub on this machine: what it fetches, and every refusal with its remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_kit import COMMIT, LocalHub, local_hub
from oracle import tiny_model
from up_kit import run

from pd.errors import ConfigError
from pd.models.hub import HuggingFaceHub, locate, missing

pytestmark = pytest.mark.process

REPO = "some-org/tiny"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    folder = tmp_path_factory.mktemp("models")
    model = Path(tiny_model(folder, "qwen3", shards=2, tokenizer=True, head_dim=24))
    (model / "consolidated.safetensors").write_bytes(b"what nobody reads")
    (model / "README.md").write_text("neither this")
    with local_hub() as found:
        found.models[REPO] = model
        yield found


def find(hub: LocalHub | str, cache: Path, model: str = REPO) -> str:
    where = HuggingFaceHub(str(cache), hub if isinstance(hub, str) else hub.url)
    return locate(model, "", where, check=lambda path: None, downloading=lambda: None)


def test_what_is_read_is_downloaded_once_and_nothing_else(hub: LocalHub, tmp_path: Path) -> None:
    folder = find(hub, tmp_path)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    small = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert sorted(hub.fetched) == sorted([*small, "tokenizer_config.json", *shards])
    assert Path(folder).name == COMMIT and missing(folder) == []
    hub.fetched.clear()
    assert find("http://127.0.0.1:9", tmp_path) == folder and not hub.fetched
    (Path(folder) / shards[1]).unlink()
    assert find(hub, tmp_path) == folder and missing(folder) == []


@pytest.mark.parametrize(
    ("model", "answer", "problem"),
    [
        (
            "some-org/gated",
            (403, "GatedRepo"),
            "some-org/gated is gated; ask for access on its page, then set HF_TOKEN",
        ),
        ("some-org/none", (404, "RepoNotFound"), "some-org/none is neither a directory here nor a model on the hub"),
        ("some-org/private", (401, "RepoNotFound"), "for a private model set HF_TOKEN"),
        (f"{REPO}@v9", None, f"{REPO} has no revision v9; name a branch, tag or commit of it"),
    ],
)
def test_what_the_hub_refuses_is_an_error_with_a_remedy(
    hub: LocalHub, tmp_path: Path, model: str, answer: tuple[int, str] | None, problem: str
) -> None:
    if answer is not None:
        hub.errors[model] = answer
    with pytest.raises(ConfigError) as caught:
        find(hub, tmp_path, model)
    assert caught.value.field == "MODEL" and problem in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_to_be_just_that(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find("http://127.0.0.1:9", tmp_path)
    assert (
        "some-org/tiny at main is neither a directory here nor complete in the local cache, and the hub cannot be"
        in (caught.value.problem)
    )
    assert "ConnectError" in caught.value.problem and "hf download some-org/tiny" in str(caught.value)


@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_model_that_is_not_in_the_cache_is_refused_offline(tmp_path: Path, command: str) -> None:
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    words = [sys.executable, "-m", "pd", command, REPO, "--port", "0", "--log-format", "json"]
    code, out, err = run(words, tmp_path, env)
    assert (code, out) == (2, "") and "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("pd: MODEL: some-org/tiny at main is neither a directory here nor complete in the local")
    assert "HF_HUB_OFFLINE is set; unset it, or fetch it where there is a network" in line
