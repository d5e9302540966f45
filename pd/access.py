"""Who may ask over HTTP, and how: API key, web pages (CORS), TLS. The api and the router ask the same questions."""

from __future__ import annotations

import hmac
import ssl
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


def server_tls(http: HttpConfig) -> ssl.SSLContext | None:
    """The context of a server; None without a certificate. Raises ConfigError naming the flag at fault."""
    if not http.ssl_certfile:
        for flag, given in (("--ssl-keyfile", http.ssl_keyfile), ("--ssl-keyfile-password", http.ssl_keyfile_password)):
            if given:
                raise ConfigError(flag, "it needs a certificate", "give --ssl-certfile, too")
        return None
    _check_readable("--ssl-certfile", http.ssl_certfile)
    _check_readable("--ssl-keyfile", http.ssl_keyfile)
    if not _has_certificate(http.ssl_certfile):
        raise ConfigError("--ssl-certfile", f"{http.ssl_certfile} has no certificate in PEM form")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    password, asked = http.ssl_keyfile_password, False

    def tell() -> str:  # or an encrypted key would be asked for on the terminal
        nonlocal asked
        asked = True
        return password

    try:
        context.load_cert_chain(http.ssl_certfile, http.ssl_keyfile or None, tell)
    except (ssl.SSLError, ValueError) as error:
        if asked:
            problem = "is wrong" if password else "is needed: the key is encrypted"
            raise ConfigError("--ssl-keyfile-password", f"it {problem}") from error
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise ConfigError("--ssl-keyfile", "the key is not that of the certificate") from error
        where = http.ssl_keyfile or http.ssl_certfile
        raise ConfigError("--ssl-keyfile", f"{where} has no private key in PEM form") from error
    if password and not asked:
        raise ConfigError("--ssl-keyfile-password", "the key is not encrypted", "leave it out")
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


def client_tls(authorities: str) -> ssl.SSLContext:
    """The context of a client that trusts what `authorities`, a file, vouches for; "" is the system's. ConfigError."""
    _check_readable("--worker-ca-certs", authorities)
    if authorities and not _has_certificate(authorities):
        raise ConfigError("--worker-ca-certs", f"{authorities} has no certificate in PEM form")
    return ssl.create_default_context(cafile=authorities or None)
