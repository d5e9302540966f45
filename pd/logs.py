"""Structured logs on stderr: coloured lines in a terminal, one JSON object per line otherwise.

Logs are for the life cycle: a process started, a peer was lost, a request failed. Nothing is logged per token or step.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, Protocol, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

REDACTED = "***"


class LogSettings(Protocol):
    """What `pd.config.LogConfig` offers."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> str: ...


class Stream(Protocol):
    """Where lines go: a text file, or what stands for one."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


def configure(
    role: str,
    instance: str,
    settings: LogSettings,
    *,
    secrets: Sequence[str] = (),
    stream: Stream | None = None,
) -> None:
    """Set up this process's logs; every line carries `role` and, where it is not empty, `instance`.

    `secrets` are values that must never be seen: each occurrence in a finished line becomes `***`, whatever field,
    message or traceback it is in. Libraries that log through `logging` appear in the same form, from level warning on.
    """
    stream = sys.stderr if stream is None else stream
    human = is_human(settings, stream)
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[structlog.typing.Processor] = [
        _Identity(role, instance),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if human else "iso", utc=not human),
        _redact_fields,
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback)]
        if human
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    finish: list[structlog.typing.Processor] = [*render, _Redactor(secrets)]
    structlog.configure(
        processors=[*shared, *finish],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, stream)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


def is_human(settings: LogSettings, stream: Stream) -> bool:
    """Whether `auto` means lines for people on this stream."""
    return settings.log_format == "human" or (settings.log_format == "auto" and stream.isatty())


def get_logger(**fields: Any) -> FilteringBoundLogger:
    """A logger whose lines carry `fields`. Use: `log.info("peer_lost", peer=…, reason=…)`."""
    logger: FilteringBoundLogger = structlog.get_logger(**fields)
    return logger


class _Identity:
    def __init__(self, role: str, instance: str) -> None:
        self.fields = {"role": role} | ({"instance": instance} if instance else {})

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {**self.fields, **event}


def _redact_fields(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    for key in event:
        if "secret" in key or "password" in key or key in ("token", "authorization"):
            event[key] = REDACTED
    return event


class _Redactor:
    """Last step: works on the finished line, so that no field, message or traceback is missed."""

    def __init__(self, secrets: Sequence[str]) -> None:
        # Longest first: one may contain another. JSON and repr write some characters escaped.
        forms = {
            form for secret in secrets if secret for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1])
        }
        self.forms = sorted(forms, key=len, reverse=True)

    def __call__(self, logger: WrappedLogger, method: str, line: Any) -> Any:
        for form in self.forms:
            line = line.replace(form, REDACTED)
        return line
