"""The error tree. Every error carries the fields that a caller or a log line needs."""

from __future__ import annotations


class PdError(Exception):
    """Root of every error that pd raises on purpose."""


class ConfigError(PdError):
    """A setting is wrong. `field` is the flag or variable as the user typed it; the CLI exits 2 with this text."""

    def __init__(self, field: str, problem: str, remedy: str = "") -> None:
        self.field, self.problem, self.remedy = field, problem, remedy
        super().__init__(f"{field}: {problem}" + (f"; {remedy}" if remedy else ""))


class ModelError(PdError):
    """A model directory cannot be served: unsupported architecture, missing file, mismatched shape."""

    def __init__(self, path: str, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"model {path}: {problem}")


class PluginError(PdError):
    """A plugin failed to load, registered a duplicate name or implements an unknown hook."""

    def __init__(self, plugin: str, reason: str) -> None:
        self.plugin, self.reason = plugin, reason
        super().__init__(f"plugin {plugin}: {reason}")


class RequestError(PdError):
    """A client's request is wrong or cannot be served; becomes an HTTP answer with an OpenAI error body.

    `param` names the field; `kind` is the OpenAI error type; `code` a stable machine-readable word.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        self.message, self.status, self.param, self.kind, self.code = message, status, param, kind, code
        super().__init__(message)


class ProtocolError(PdError):
    """A peer or child process sent something that the protocol does not allow. `field` names the culprit."""

    def __init__(self, field: str, problem: str) -> None:
        self.field, self.problem = field, problem
        super().__init__(f"{field}: {problem}")


class ProcessError(PdError):
    """A child process died or did not report ready within its bound. `reason` is what it said itself, if it did."""

    def __init__(self, name: str, problem: str, exit_code: int | None = None, reason: str = "") -> None:
        self.name, self.problem, self.exit_code, self.reason = name, problem, exit_code, reason
        super().__init__(f"{name}: {problem}" + ("" if exit_code is None else f" (exit code {exit_code})"))

    def wrong_setting(self) -> ConfigError | None:
        """The child's ConfigError, if that is why it ended: a process exits 2 for a setting only."""
        field, colon, problem = self.reason.partition(": ")
        return ConfigError(field, problem) if self.exit_code == 2 and colon else None


class BackendUnavailable(PdError):
    """A transfer backend's library or device is missing. `remedy` says what to install."""

    def __init__(self, backend: str, library: str, remedy: str) -> None:
        self.backend, self.library, self.remedy = backend, library, remedy
        super().__init__(f"transfer backend {backend} unavailable: {library}, {remedy}")


class TransferError(PdError):
    """One transfer failed. Says nothing about whether its memory is quiet."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class PeerLost(TransferError):
    """The peer cannot be reached any more. Says nothing about whether its memory is quiet."""

    def __init__(self, identity: str, reason: str) -> None:
        self.identity = identity
        super().__init__(f"peer {identity}: {reason}")


class ChannelFull(PdError):
    """A message could not be queued: the peer does not read, or is not connected. Nothing was sent."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        super().__init__(f"channel {channel} is full")


class ChannelClosed(PdError):
    """The channel was closed here, or the addressed peer is gone. Nothing was sent."""

    def __init__(self, channel: str, reason: str = "closed") -> None:
        self.channel, self.reason = channel, reason
        super().__init__(f"channel {channel}: {reason}")
