"""What several groups of flags check alike."""

from __future__ import annotations

from urllib.parse import urlsplit

from pd.errors import ConfigError


def flag_of(name: str) -> str:
    """The flag of an argparse name."""
    return "--" + name.replace("_", "-")


def base_url(flag: str, url: str) -> str:
    """Scheme, host, port, perhaps a prefix, without a trailing slash. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ConfigError(flag, f"{url!r} is not a base URL", "give one such as http://127.0.0.1:8000")
    return url.rstrip("/")
