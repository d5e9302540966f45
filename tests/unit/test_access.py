"""Settings of key, web pages and HTTPS: what is refused, by which name, and that the key never shows."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import pytest
import trustme

from pd import logs
from pd.access import Access, client_tls, server_tls
from pd.config import HttpConfig, LogConfig, RouteConfig, ServeConfig, UpConfig, secret_values
from pd.errors import ConfigError
from pd.instance import Plan
from pd.models.info import check_model
from pd.router.workers import Fleet
from pd.rules import builtin_model
from pd.settings import parse, settings_table


def serve(line: str, **environ: str) -> ServeConfig:
    return parse(ServeConfig, ["/m", *line.split()], environ)


@pytest.mark.parametrize(
    ("line", "environ", "expected"),
    [
        ("", {}, ("*",)),
        ("--allowed-origins https://a https://b", {}, ("https://a", "https://b")),
        ('--allowed-origins ["https://a","https://b"]', {}, ("https://a", "https://b")),
        ("", {"PD_ALLOWED_ORIGINS": '["https://a","https://b"]'}, ("https://a", "https://b")),
        ("", {"PD_ALLOWED_ORIGINS": "https://a,https://b"}, ("https://a", "https://b")),
        ("--allowed-origins none", {}, ("none",)),
    ],
)
def test_origins_are_words_or_a_list_in_json(line: str, environ: dict[str, str], expected: tuple[str, ...]) -> None:
    assert serve(line, **environ).http.allowed_origins == expected


@pytest.mark.parametrize(
    ("line", "environ", "field"),
    [
        ('--allowed-origins ["a"', {}, "--allowed-origins"),
        ("--allowed-methods [3]", {}, "--allowed-methods"),
        ("--allowed-origins []", {}, "--allowed-origins"),
        ("--allowed-origins none https://a", {}, "--allowed-origins"),
        ("--max-request-bytes 0", {}, "--max-request-bytes"),
        ("", {"PD_API_KEY": "a b"}, "PD_API_KEY"),
        ("--api-key schlüssel", {}, "--api-key"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_that_was_typed(line: str, environ: dict[str, str], field: str) -> None:
    for kind, rest in ((ServeConfig, ["/m"]), (RouteConfig, ["--decode", "http://d:1"])):
        with pytest.raises(ConfigError) as caught:
            parse(kind, [*rest, *line.split()], environ)
        assert caught.value.field == field


def test_one_key_guards_a_whole_cluster_and_https_its_router_only() -> None:
    config = parse(UpConfig, ["/m", "--api-key", "k", "--ssl-certfile", "c", "--allowed-origins", "none"], {})
    assert config.serve.http.api_key == config.route.http.api_key == "k"
    assert config.route.http.ssl_certfile == "c" and not config.serve.http.ssl_certfile
    assert config.route.http.allowed_origins == ("none",)


def test_the_key_shows_in_no_log_and_no_table() -> None:
    for config in (serve("--api-key hush"), parse(RouteConfig, ["--decode", "http://d:1", "--api-key", "hush"], {})):
        assert secret_values(config) == ("hush",)
        stream = io.StringIO()
        logs.configure("x", "", LogConfig(log_format="json"), secrets=secret_values(config), stream=stream)
        logs.get_logger().info("started", config=config)
        assert "hush" not in stream.getvalue() and "started" in stream.getvalue()
    assert "| `--api-key` |  | `PD_API_KEY` |  |" in settings_table(ServeConfig)


def test_a_password_of_a_private_key_is_a_secret_too() -> None:
    assert secret_values(serve("--ssl-keyfile-password hush")) == ("hush",)


@pytest.mark.parametrize(
    ("given", "path", "allowed"),
    [
        ("Bearer k", "/v1/models", True),
        ("bearer   k", "/v1/models", True),
        ("Bearer kk", "/v1/models", False),
        ("Bearer ", "/v1/models", False),
        ("k", "/v1/models", False),
        ("Basic k", "/v1/models", False),
        ("", "/v1/models", False),
        ("", "/health", True),
        ("", "/health/..", False),
        ("", "/metrics", True),
    ],
)
def test_the_key_is_asked_for_everywhere_but_where_probes_look(given: str, path: str, allowed: bool) -> None:
    assert Access("k").permits(path, given) is allowed
    assert Access("").permits(path, given)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"hush"))
    contents = {
        "cert": issued.cert_chain_pems[0].bytes(),
        "key": issued.private_key_pem.bytes(),
        "both": issued.private_key_and_cert_chain_pem.bytes(),
        "other": other.private_key_pem.bytes(),
        "encrypted": encrypted,
        "nonsense": b"nonsense",
        "ca": authority.cert_pem.bytes(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {**{name: str(folder / name) for name in contents}, "absent": str(folder / "absent"), "": ""}


@pytest.mark.parametrize(
    ("cert", "key", "password"),
    [("cert", "key", ""), ("both", "", ""), ("cert", "encrypted", "hush")],
)
def test_a_certificate_and_its_key_make_a_server(files: dict[str, str], cert: str, key: str, password: str) -> None:
    http = HttpConfig(ssl_certfile=files[cert], ssl_keyfile=files[key], ssl_keyfile_password=password)
    assert server_tls(http) is not None
    assert server_tls(HttpConfig()) is None


@pytest.mark.parametrize(
    ("cert", "key", "password", "field", "problem"),
    [
        ("absent", "key", "", "--ssl-certfile", "cannot read"),
        ("cert", "absent", "", "--ssl-keyfile", "cannot read"),
        ("nonsense", "key", "", "--ssl-certfile", "no certificate"),
        ("key", "key", "", "--ssl-certfile", "no certificate"),
        ("cert", "nonsense", "", "--ssl-keyfile", "no private key"),
        ("cert", "", "", "--ssl-keyfile", "no private key"),
        ("cert", "other", "", "--ssl-keyfile", "not that of the certificate"),
        ("cert", "encrypted", "", "--ssl-keyfile-password", "needed"),
        ("cert", "encrypted", "wrong", "--ssl-keyfile-password", "wrong"),
        ("cert", "key", "hush", "--ssl-keyfile-password", "not encrypted"),
        ("", "key", "", "--ssl-keyfile", "needs a certificate"),
        ("", "", "hush", "--ssl-keyfile-password", "needs a certificate"),
    ],
)
def test_a_file_that_does_not_do_is_named_by_its_flag(
    files: dict[str, str], cert: str, key: str, password: str, field: str, problem: str
) -> None:
    http = HttpConfig(ssl_certfile=files[cert], ssl_keyfile=files[key], ssl_keyfile_password=password)
    with pytest.raises(ConfigError, match=problem) as caught:
        server_tls(http)
    assert caught.value.field == field


def test_authorities_must_be_certificates_and_of_use(files: dict[str, str]) -> None:
    assert client_tls(files["ca"]).cert_store_stats()["x509_ca"] == 1

    def fleet(**settings: Any) -> None:
        Fleet(RouteConfig(**settings))

    for settings, problem in (
        ({"decode": ("https://d:1",), "worker_ca_certs": files["nonsense"]}, "no certificate"),
        ({"decode": ("https://d:1",), "worker_ca_certs": files["absent"]}, "cannot read"),
        ({"decode": ("http://d:1",), "worker_ca_certs": files["ca"]}, "no worker is asked by https"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            fleet(**settings)
        assert caught.value.field == "--worker-ca-certs"


def test_a_worker_by_https_has_that_scheme_and_its_port() -> None:
    config = parse(RouteConfig, ["--decode", "https://d", "--prefill", "https://p:9"], {})
    assert config.decode == ("https://d:443",) and config.prefill == ("https://p:9",)


@pytest.mark.parametrize(
    ("line", "url"),
    [
        ("", "http://127.0.0.1:30000"),
        ("--ssl-certfile c --host ::1", "https://[::1]:30000"),
        ("--host 0.0.0.0", f"http://{socket.gethostname()}:30000"),
        ("--ssl-certfile c --name p0", "p0"),
    ],
)
def test_an_instance_is_known_to_its_peers_by_the_url_that_clients_ask(line: str, url: str) -> None:
    plan = Plan(serve(line), check_model(builtin_model()), "p", 1, "127.0.0.1", Path("/nowhere"))
    assert plan.scheduler().config.settings.http == url
