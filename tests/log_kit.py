"""What tests of logs and screens have in common."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def logs_as_before() -> Iterator[None]:
    """Afterwards logs are configured as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
