"""How a host and a port are written."""

from __future__ import annotations


def url_of(scheme: str, host: str, port: int) -> str:
    """`SCHEME://HOST:PORT`; an IPv6 address is put in brackets if it is not."""
    written = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{scheme}://{written}:{port}"
