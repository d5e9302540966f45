"""What settings mean together: the checks that no single field can make, and flags of other systems.

`given` maps a field's path to how the user set it ("--ib-device", "PD_IB_DEVICE"); a path that is absent has its
default. Every error names the setting as it was typed.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pd.config import (
    ROLES,
    ChatConfig,
    ControlConfig,
    HttpConfig,
    ModelConfig,
    RouteConfig,
    ServeConfig,
    TransferConfig,
    UpConfig,
)
from pd.errors import ConfigError

Given = Mapping[tuple[str, ...], str]

#: Names that pd's separately installable packages register: what to install for a name that is not here.
_BACKEND_PACKAGES = {name: f"pd-transfer-{name}" for name in ("mooncake", "nixl", "ascend")}
_POLICY_PACKAGES = dict.fromkeys(("cache_aware", "power_of_two", "least_load", "round_robin"), "pd-policies")
#: Settings that act for some transfer backends only.
_DEVICE_SETTINGS = ("ib_device", "transfer_memory")


class Backend(Protocol):
    """What `pd.abc.BackendInfo` offers."""

    @property
    def accepts(self) -> frozenset[str]: ...
    @property
    def unavailable(self) -> Any: ...
    @property
    def refuses(self) -> Any: ...
    @property
    def one_thread(self) -> bool: ...


def apply(config: Any, given: Given, backends: Mapping[str, Backend] | None, policies: Collection[str] | None) -> Any:
    """The settings with what follows from others filled in. Raises ConfigError."""
    match config:
        case ServeConfig():
            return _serve(config, given, backends)
        case RouteConfig():
            return _route(config, given, policies)
        case UpConfig():
            return _up(config, given, backends, policies)
        case _:
            return config


# --- serve ----------------------------------------------------------------------------------------------------------


def _serve(config: ServeConfig, given: Given, backends: Mapping[str, Backend] | None) -> ServeConfig:
    if not config.model.model:
        raise ConfigError("MODEL", "no model given", "name a model directory or a hub id")
    config = replace(config, http=_http(config.http, given, ("http",)))
    _check_revision(config.model, given)
    _check_local_prefill(config.scheduler.local_prefill, given.get(("scheduler", "local_prefill"), "--local-prefill"))
    _check_control_host(config.control, given.get(("control", "control_host"), "--control-host"))
    config = replace(config, chat=_with_template(config.chat, given.get(("chat", "chat_template"), "--chat-template")))
    config = _with_transfer(config, given, backends, used=config.role != "unified")
    if config.role == "prefill":
        _check_threads(config.transfer, given.get(("transfer", "transfer_threads"), ""), backends)
    return config


def _with_transfer(
    config: ServeConfig, given: Given, backends: Mapping[str, Backend] | None, *, used: bool
) -> ServeConfig:
    """`used`: this process will open the backend, so its library must be here."""
    transfer = config.transfer
    source = given.get(("transfer", "transfer"))
    device_source = given.get(("transfer", "ib_device"))
    if source is None and device_source is not None:
        transfer = replace(transfer, transfer="mooncake")  # SGLang's default backend
        source = device_source
    if backends is not None:
        name = transfer.transfer
        if name not in backends:
            needed = "" if source != device_source else "an RDMA device without a backend means mooncake: "
            raise ConfigError(
                source or "--transfer",
                f"{needed}transfer backend {name!r} is not installed; installed: {', '.join(sorted(backends))}",
                f"pip install {_BACKEND_PACKAGES[name]}" if name in _BACKEND_PACKAGES else "see pd plugins",
            )
        for setting in _DEVICE_SETTINGS:
            typed = given.get(("transfer", setting))
            if typed is not None and setting not in backends[name].accepts:
                raise ConfigError(typed, f"transfer backend {name} cannot use it")
        reason = backends[name].unavailable() if used else None
        if reason:
            raise ConfigError(source or "--transfer", f"transfer backend {name} is unavailable: {reason}")
        for setting in _DEVICE_SETTINGS if used else ():
            typed = given.get(("transfer", setting))
            reason = backends[name].refuses(setting, getattr(transfer, setting)) if typed is not None else None
            if reason:
                raise ConfigError(typed or setting, f"transfer backend {name} cannot use it: {reason}")
    return replace(config, transfer=transfer)


def _check_threads(transfer: TransferConfig, source: str, backends: Mapping[str, Backend] | None) -> None:
    """Threads that would never have anything to do. A variable may be set for a whole machine."""
    threads, queues = transfer.transfer_threads, transfer.transfer_queues
    if not source.startswith("-"):
        return
    if threads > queues:
        problem = f"{threads} threads for --transfer-queues {queues}: no two of them serve one queue"
        raise ConfigError(source, problem, f"give at least {threads} queues, or at most {queues} threads")
    if threads > 1 and backends is not None and backends[transfer.transfer].one_thread:
        raise ConfigError(source, f"transfer backend {transfer.transfer} is driven by one thread", "leave it out")


def _check_revision(model: ModelConfig, given: Given) -> None:
    """A directory has no revisions. Like any variable, PD_REVISION may be set for a whole machine."""
    source = given.get(("model", "revision"), "")
    if model.revision and source.startswith("-") and Path(model.model).is_dir():
        raise ConfigError(source, f"{model.model} is a directory", "leave it out: it is for models from the hub")


def _with_template(chat: ChatConfig, source: str) -> ChatConfig:
    """The template itself where a file was named: braces tell the two apart."""
    given = chat.chat_template
    if not given or "{{" in given or "{%" in given:
        return chat
    try:
        template = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(source, f"{given!r} cannot be read: {error}", "name a jinja2 file") from error
    if not template.strip():
        raise ConfigError(source, f"{given!r} is empty")
    return replace(chat, chat_template=template)


def _check_local_prefill(text: str, source: str) -> None:
    word, colon, number = text.partition(":")
    if text not in ("never", "fallback") and not (
        word == "short" and colon and number.isascii() and number.isdigit() and int(number) > 0
    ):
        raise ConfigError(source, f"{text!r} is not never, fallback or short:N")


def _check_control_host(control: ControlConfig, source: str) -> None:
    if not control.control_host or control.cluster_secret or control.insecure_control_plane:
        return
    if not _is_loopback(control.control_host):
        raise ConfigError(
            source,
            f"{control.control_host} is reachable from other hosts",
            "set PD_CLUSTER_SECRET, or pass --insecure-control-plane on a network that you trust",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


# --- HTTP -----------------------------------------------------------------------------------------------------------


def _http(http: HttpConfig, given: Given, prefix: tuple[str, ...]) -> HttpConfig:
    """Lists as vLLM's lines have them, `["*"]`, are lists. Files are looked at by who opens them."""

    def flag(field: str) -> str:
        return given.get((*prefix, field), "--" + field.replace("_", "-"))

    http = replace(
        http,
        allowed_origins=_words(http.allowed_origins, flag("allowed_origins")),
        allowed_methods=_words(http.allowed_methods, flag("allowed_methods")),
        allowed_headers=_words(http.allowed_headers, flag("allowed_headers")),
    )
    if not http.allowed_origins:
        raise ConfigError(flag("allowed_origins"), "no origin given", "none allows none")
    if "none" in http.allowed_origins and len(http.allowed_origins) > 1:
        raise ConfigError(flag("allowed_origins"), "none goes with no other origin")
    if http.api_key and not (http.api_key.isascii() and http.api_key.isprintable() and " " not in http.api_key):
        raise ConfigError(flag("api_key"), "it must be printable ASCII without spaces: it travels in a header")
    return http


def _words(words: tuple[str, ...], flag: str) -> tuple[str, ...]:
    if not any(word.startswith("[") for word in words):
        return words
    try:
        found = json.loads(",".join(words))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise ConfigError(flag, f"{' '.join(words)!r} is not a list of strings in JSON")
    return tuple(found)


# --- route ----------------------------------------------------------------------------------------------------------


def _route(config: RouteConfig, given: Given, policies: Collection[str] | None) -> RouteConfig:
    source = given.get(("prefill",), "--prefill")
    urls, ports = _urls_and_ports(config.prefill, source)
    decode, decode_ports = _urls_and_ports(config.decode, given.get(("decode",), "--decode"))
    if any(decode_ports):
        raise ConfigError(given[("decode",)], "a decode instance has no bootstrap port")
    if not decode:
        raise ConfigError("--decode", "at least one decode instance is needed")
    for pool, name in ((urls, source), (decode, given.get(("decode",), "--decode"))):
        for url in pool:
            if pool.count(url) > 1:
                raise ConfigError(name, f"{url} is named twice")
    ports = _merge_ports(config, ports, given.get(("prefill_bootstrap_ports",), "--prefill-bootstrap-ports"))
    if given.get(("pd_disaggregation",)) and not config.pd_disaggregation:
        raise ConfigError(given[("pd_disaggregation",)], "pd route always pairs prefill and decode")
    _check_policies(config, given, (), policies)
    config = replace(config, http=_http(config.http, given, ("http",)))
    return replace(config, prefill=urls, decode=decode, prefill_bootstrap_ports=ports)


def _urls_and_ports(words: tuple[str, ...], source: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """`URL [PORT|none]`, repeated. Port 0: not given."""
    urls: list[str] = []
    ports: list[int] = []
    port_allowed = False
    for word in words:
        if port_allowed and (word == "none" or word.isdigit()):
            ports[-1] = 0 if word == "none" else _port(word, source)
            port_allowed = False
            continue
        urls.append(_url(word, source))
        ports.append(0)
        port_allowed = True
    return tuple(urls), tuple(ports)


def _port(text: str, source: str) -> int:
    if not 0 < int(text) < 65536:
        raise ConfigError(source, f"{text} is not a port")
    return int(text)


def _url(word: str, source: str) -> str:
    try:
        parts = urlsplit(word)
        port = parts.port
    except ValueError as error:
        raise ConfigError(source, f"{word!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(source, f"{word!r} is not of the form http://host:port or https://host:port")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(source, f"{word!r} is not of the form http://host:port or https://host:port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or (443 if parts.scheme == 'https' else 80)}"


def _merge_ports(config: RouteConfig, ports: tuple[int, ...], source: str) -> tuple[int, ...]:
    """`--prefill-bootstrap-ports`: one for all, or one for each; ports given beside a URL must agree."""
    listed = config.prefill_bootstrap_ports
    if not listed:
        return ports if any(ports) else ()
    if len(listed) == 1:
        listed *= len(ports)
    if len(listed) != len(ports):
        raise ConfigError(source, f"{len(listed)} ports for {len(ports)} prefill instances")
    for port in listed:
        if port:
            _port(str(port), source)
    for beside, own in zip(ports, listed, strict=True):
        if beside and own and beside != own:
            raise ConfigError(source, f"{own} contradicts the port {beside} beside the prefill's URL")
    return tuple(beside or own for beside, own in zip(ports, listed, strict=True))


def _check_policies(
    config: RouteConfig, given: Given, prefix: tuple[str, ...], policies: Collection[str] | None
) -> None:
    if policies is None:
        return
    for setting in ("policy", "prefill_policy", "decode_policy"):
        name = getattr(config, setting)
        if name and name not in policies:
            raise ConfigError(
                given.get((*prefix, setting), setting),
                f"routing policy {name!r} is not installed; installed: {', '.join(sorted(policies))}",
                f"pip install {_POLICY_PACKAGES[name]}" if name in _POLICY_PACKAGES else "see pd plugins",
            )


# --- up -------------------------------------------------------------------------------------------------------------


def _up(
    config: UpConfig, given: Given, backends: Mapping[str, Backend] | None, policies: Collection[str] | None
) -> UpConfig:
    serve = config.serve
    if not serve.model.model:
        name = serve.model.served_model_name or "builtin"
        serve = replace(serve, model=replace(serve.model, model=builtin_model(), served_model_name=name))
    if config.unified:
        for pool in ("prefill", "decode"):
            if (pool,) in given and getattr(config, pool):
                raise ConfigError(given[(pool,)], "--unified runs unified instances instead of pairs")
        config = replace(config, prefill=0, decode=0)
    elif not config.decode:
        raise ConfigError(given.get(("decode",), "--decode"), "at least one decode instance is needed")
    inner = {path[1:]: source for path, source in given.items() if path[0] == "serve"}
    _check_revision(serve.model, inner)
    _check_local_prefill(serve.scheduler.local_prefill, inner.get(("scheduler", "local_prefill"), "--local-prefill"))
    serve = replace(serve, chat=_with_template(serve.chat, inner.get(("chat", "chat_template"), "--chat-template")))
    serve = _with_transfer(serve, inner, backends, used=not config.unified)
    if config.prefill:
        _check_threads(serve.transfer, inner.get(("transfer", "transfer_threads"), ""), backends)
    _check_policies(config.route, given, ("route",), policies)
    route = replace(config.route, http=_http(config.route.http, given, ("route", "http")))
    config = replace(config, route=route)
    return replace(config, serve=serve)


def builtin_model() -> str:
    """The small model that comes with pd: what `pd up` serves when no model is named."""
    path = Path(__file__).resolve().parent / "builtin_model"
    if not path.is_dir():
        raise ConfigError("MODEL", "no model given, and this installation lacks the built-in one")
    return str(path)


# --- flags that would do nothing ------------------------------------------------------------------------------------


def roles_at_work(config: Any) -> frozenset[str]:
    """The roles of the instances that a command starts; none for the router."""
    match config:
        case ServeConfig():
            return frozenset({config.role})
        case UpConfig():
            return frozenset(role for role in ROLES if getattr(config, role))
        case _:
            return frozenset()


def refuse_idle(flag: str, meta: Mapping[str, Any], working: Collection[str]) -> None:
    """A flag that acts on none of the instances is an error. A variable is not: it may be set for a whole machine."""
    roles = meta["roles"]
    if not {*roles, *meta["tolerated"].get(flag, ())}.isdisjoint(working):
        return
    where = " and ".join(role for role in ROLES if role in working)
    raise ConfigError(
        flag, f"it does nothing on {where} instances", f"leave it out: it is for {' and '.join(roles)} instances"
    )


def refuse_gpu(config: Any, given: Given, accelerator: bool | None) -> None:
    """The number of a GPU where the CPU computes. `accelerator`: whether this machine has one; None: not known."""
    prefix, serve = (("serve",), config.serve) if isinstance(config, UpConfig) else ((), config)
    source = given.get((*prefix, "model", "base_gpu_id"), "")
    if not source.startswith("-") or not serve.model.base_gpu_id:
        return
    if serve.model.device == "cpu":
        device = given.get((*prefix, "model", "device"), "--device")
        raise ConfigError(source, f"it numbers GPUs, and {device} says cpu", "leave it out")
    if serve.model.device == "auto" and accelerator is False:
        raise ConfigError(source, "this machine has no GPU: the CPU computes", "leave it out")


# --- flags of other systems -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ForeignFlag:
    """A flag of SGLang for what pd does not do: only a value that says what is true anyway is accepted."""

    flags: tuple[str, ...]
    true_anyway: tuple[str, ...] = ()
    switch: bool = False


_FOREIGN_FLAGS = (
    _ForeignFlag(("--tensor-parallel-size", "--tp-size", "--tp"), ("1",)),
    _ForeignFlag(("--data-parallel-size", "--dp-size", "--dp"), ("1",)),
    _ForeignFlag(("--enable-dp-attention",), switch=True),
    _ForeignFlag(("--moe-a2a-backend",), ("none",)),
    _ForeignFlag(("--nnodes",), ("1",)),
    _ForeignFlag(("--node-rank",), ("0",)),
    _ForeignFlag(("--dist-init-addr",)),
)


def add_foreign_flags(parser: argparse.ArgumentParser, config_type: type) -> None:
    if config_type not in (ServeConfig, UpConfig):
        return
    for foreign in _FOREIGN_FLAGS:
        for flag in foreign.flags:  # a dest for each spelling, to name it as typed
            dest = "foreign:" + flag
            if foreign.switch:
                parser.add_argument(flag, dest=dest, action="append_const", const="", help=argparse.SUPPRESS)
            else:
                parser.add_argument(flag, dest=dest, action="append", help=argparse.SUPPRESS)


def refuse_foreign_flags(namespace: argparse.Namespace) -> None:
    """One error that names every such flag that does not hold."""
    refused: list[str] = []
    for foreign in _FOREIGN_FLAGS:
        for flag in foreign.flags:
            for value in getattr(namespace, "foreign:" + flag, None) or ():
                if value not in foreign.true_anyway:
                    refused.append(f"{flag} {value}".strip())
    if refused:
        raise ConfigError(
            ", ".join(refused),
            "pd runs one accelerator per instance for now",
            "start one instance per accelerator (tp-size 1, dp-size 1, nnodes 1 and node-rank 0 are accepted)",
        )
