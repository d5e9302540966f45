"""Models by their id on the Hugging Face hub: found in the local cache, or else downloaded into it. No torch.

A directory that exists always wins. A snapshot in the cache (HF_HOME, HF_HUB_CACHE) that has all that is read is used
as it is, without asking the hub. Otherwise only the files that pd reads are fetched, the weights last: a model that
cannot be served is refused before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pd.errors import ConfigError, PdError
from pd.models.checkpoint import INDEX, SINGLE, shards

#: What api, scheduler and runner read besides weights. Of these a model need not have more than the first two.
NEEDED = ("config.json", "tokenizer.json")
SMALL_FILES = (
    *NEEDED,
    INDEX,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[A-Za-z0-9._/-]+))?", re.ASCII)
_LONGEST = 96
_FIELD = "MODEL"


class Hub(Protocol):
    """Where snapshots come from."""

    def cached(self, repo: str, revision: str) -> str | None:
        """The directory of the snapshot in the local cache, complete or not."""

    def download(self, repo: str, revision: str, files: Sequence[str]) -> str:
        """Those of `files` that the model has are in the directory that this returns. Raises ConfigError."""


def hub_id(model: str) -> tuple[str, str] | None:
    """ "ORG/NAME@revision" as ("ORG/NAME", "revision" or ""); None for what is no id or is a directory here."""
    found = _ID.fullmatch(model)
    if found is None or os.path.isdir(model):
        return None
    repo = found["repo"]
    if len(repo) > _LONGEST or "--" in repo or ".." in repo:  # the hub has no such names
        return None
    return repo, found["revision"] or ""


def locate(
    model: str, revision: str, hub: Hub, *, check: Callable[[str], None], downloading: Callable[[], None]
) -> str:
    """The directory that holds `model`: itself where it is no hub id.

    `check(directory)` is called when config.json is there and weights are not yet; `downloading()` when anything is
    about to be fetched. Raises ConfigError for what cannot be had, and what `check` raises.
    """
    found = hub_id(model)
    if found is None:
        return model
    repo, own = found
    if own and revision and own != revision:
        raise ConfigError("--revision", f"{revision} contradicts {own} in {model}")
    wanted = own or revision or "main"
    folder = hub.cached(repo, wanted)
    if folder is not None and not missing(folder):
        return folder
    downloading()
    folder = hub.download(repo, wanted, SMALL_FILES)
    check(folder)
    # The same version, whatever the branch names by now: a snapshot's directory has the name of its commit.
    folder = hub.download(repo, os.path.basename(folder), weight_files(folder))
    lacking = missing(folder)
    if lacking:
        raise ConfigError(
            _FIELD,
            f"{repo} at {wanted} lacks {', '.join(lacking)}",
            "only safetensors and tokenizer.json are read; if the cache holds a part of the model and there is no "
            f"network, fetch the rest where there is one (hf download {repo} --revision {wanted})",
        )
    return folder


def weight_files(folder: str) -> list[str]:
    """The files that hold the weights: what the index names, or the only one."""
    return shards(folder) if os.path.exists(os.path.join(folder, INDEX)) else [SINGLE]


def missing(folder: str) -> list[str]:
    """Files without which nothing can be served, and that the directory lacks."""
    return [name for name in (*NEEDED, *weight_files(folder)) if not os.path.exists(os.path.join(folder, name))]


@dataclass(frozen=True)
class HuggingFaceHub:
    """`huggingface_hub` and its cache, as its own variables have them (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, …)."""

    cache_dir: str | None = None
    endpoint: str | None = None

    def cached(self, repo: str, revision: str) -> str | None:
        found = _library().try_to_load_from_cache(repo, NEEDED[0], cache_dir=self.cache_dir, revision=revision)
        return os.path.dirname(found) if isinstance(found, str) else None

    def download(self, repo: str, revision: str, files: Sequence[str]) -> str:
        library = _library()
        try:
            folder: str = library.snapshot_download(
                repo,
                revision=revision,
                cache_dir=self.cache_dir,
                endpoint=self.endpoint,
                allow_patterns=list(files),
                library_name="pd",
            )
        except (library.errors.HTTPError, library.errors.XetDownloadError, OSError) as error:
            raise _refusal(library.errors, repo, revision, error) from error
        return folder


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise PdError("huggingface_hub is not installed: pip install 'pd-serve[engine]'") from error
    return huggingface_hub


def _refusal(errors: Any, repo: str, revision: str, error: Exception) -> ConfigError:
    """Why a model cannot be had, and what to do."""
    match error:
        case errors.GatedRepoError():
            return ConfigError(
                _FIELD,
                f"{repo} is gated",
                "ask for access on its page, then set HF_TOKEN to a token of that account, or run: hf auth login",
            )
        case errors.RepositoryNotFoundError():
            return ConfigError(
                _FIELD,
                f"{repo} is neither a directory here nor a model on the hub that can be seen",
                "check the spelling; for a private model set HF_TOKEN",
            )
        case errors.RevisionNotFoundError():
            return ConfigError(_FIELD, f"{repo} has no revision {revision}", "name a branch, tag or commit of it")
        case errors.LocalEntryNotFoundError():
            return _unreachable(errors, repo, revision, error)
        case _:
            return ConfigError(
                _FIELD, f"{repo} cannot be downloaded: {_one_line(error)}", "try again, or name a directory"
            )


def _unreachable(errors: Any, repo: str, revision: str, error: Exception) -> ConfigError:
    where = f"{repo} at {revision} is neither a directory here nor complete in the local cache"
    fetch = f"fetch it where there is a network (hf download {repo} --revision {revision}), or name a directory"
    cause = error.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return ConfigError(_FIELD, f"{where}, and HF_HUB_OFFLINE is set", f"unset it, or {fetch}")
    return ConfigError(_FIELD, f"{where}, and the hub cannot be reached: {_one_line(cause or error)}", fetch)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
