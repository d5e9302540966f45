"""Who may ask over HTTP, and how: API key, web pages (CORS), TLS. The api and the router ask the same questions."""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pd.config import HttpConfig
from pd.errors import ConfigError

Headers = list[tuple[bytes, bytes]]

#: Open whatever the key: what load balancers, probes and scrapers ask.
OPEN_PATHS = frozenset(["/health", "/health_generate", "/metrics", "/version"])

#: Seconds that a browser may remember the answer to a preflight.
_PREFLIGHT_AGE = b"600"


@dataclass(frozen=True)
class Access:
    """`origins`, `methods`, `headers` of web pages that may ask; "*" is any. An empty `api_key` lets everybody in."""

    api_key: str = ""
    origins: frozenset[str] = frozenset()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False

    @classmethod
    def of(cls, http: HttpConfig) -> Access:
        return cls(
            http.api_key,
            frozenset(origin for origin in http.allowed_origins if origin != "none"),
            http.allowed_methods,
            http.allowed_headers,
            http.allow_credentials,
        )

    def permits(self, path: str, authorization: str) -> bool:
        """Whether a request with this `Authorization` may go on. The comparison takes the same time for every key."""
        if not self.api_key or path in OPEN_PATHS:
            return True
        scheme, _, given = authorization.partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.api_key.encode())
        return same and scheme.lower() == "bearer"

    @property
    def authorization(self) -> bytes:
        """The header line with which pd itself asks; empty without a key."""
        return b"authorization: Bearer %b\r\n" % self.api_key.encode() if self.api_key else b""

    def cors(self, origin: str) -> Headers:
        """What an answer to a page of `origin` carries; "" is no page."""
        if not self.origins:
            return []
        if "*" in self.origins and not self.credentials:
            return [(b"access-control-allow-origin", b"*")] if origin else []
        if not origin or ("*" not in self.origins and origin not in self.origins):
            return [(b"vary", b"Origin")]
        found = [(b"access-control-allow-origin", origin.encode("latin-1", "replace")), (b"vary", b"Origin")]
        return [*found, (b"access-control-allow-credentials", b"true")] if self.credentials else found

    def preflight(self, origin: str, methods: tuple[str, ...], wanted_headers: str) -> Headers | None:
        """The answer to a browser that asks first; None when pages of `origin` may not. `methods` is what exists."""
        found = self.cors(origin)
        if not any(name == b"access-control-allow-origin" for name, _ in found):
            return None
        allowed = methods if "*" in self.methods else tuple(m for m in methods if m in self.methods)
        headers = wanted_headers if "*" in self.headers else ", ".join(self.headers)
        found.append((b"access-control-allow-methods", ", ".join(allowed).encode("latin-1", "replace")))
        if headers:
            found.append((b"access-control-allow-headers", headers.encode("latin-1", "replace")))
        return [*found, (b"access-control-max-age", _PREFLIGHT_AGE)]


def server_tls(http: HttpConfig, flag: Callable[[str], str] | None = None) -> ssl.SSLContext | None:
    """The context of a server; None without a certificate. Raises ConfigError; `flag` tells how a field was set."""
    name = flag or (lambda field: "--" + field.replace("_", "-"))
    if not http.ssl_certfile:
        for field in ("ssl_keyfile", "ssl_keyfile_password"):
            if getattr(http, field):
                raise ConfigError(name(field), "it needs a certificate", "give --ssl-certfile, too")
        return None
    for field in ("ssl_certfile", "ssl_keyfile"):
        _check_readable(name(field), getattr(http, field))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A key that is encrypted would otherwise be asked for on the terminal.
    password = http.ssl_keyfile_password
    key_flag = name("ssl_keyfile" if http.ssl_keyfile else "ssl_certfile")
    try:
        context.load_cert_chain(http.ssl_certfile, http.ssl_keyfile or None, lambda: password)
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        if reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(key_flag, "the key is not that of the certificate") from error
        if "DECRYPT" in reason or "PASSWORD" in reason or "PKCS12" in reason:
            problem = "wrong" if password else "missing"
            raise ConfigError(
                name("ssl_keyfile_password"), f"the key is encrypted, and the password is {problem}"
            ) from (error)
        culprit = name("ssl_certfile") if not _has_certificate(http.ssl_certfile) else key_flag
        raise ConfigError(culprit, f"not a PEM file of the right kind: {reason}") from error
    return context


def _check_readable(flag: str, path: str) -> None:
    try:
        if path:
            Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(flag, f"cannot read {path}: {error.strerror}") from error


def _has_certificate(path: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True


def client_tls(authorities: str, flag: str = "--worker-ca-certs") -> ssl.SSLContext:
    """The context of a client that trusts what `authorities`, a file, vouches for; "" is the system's. ConfigError."""
    _check_readable(flag, authorities)
    try:
        return ssl.create_default_context(cafile=authorities or None)
    except ssl.SSLError as error:
        raise ConfigError(flag, f"not a PEM file of certificates: {error.reason or error}") from error
