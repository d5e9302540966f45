"""Settings. Every setting is one dataclass field: its flag, its PD_* variable and its README line come from the field.

One frozen dataclass per component, composed into one per command, resolved once; a process gets the slice it needs.
Nothing reads the environment after `pd.settings` has resolved these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

#: What an instance can be, and those of them that take part in hand-offs.
ROLES = ("prefill", "decode", "unified")
PAIR = ("prefill", "decode")
#: Those that answer requests.
ANSWERING = ("decode", "unified")

#: Prompt tokens per step, of one request and of all, where they are not set: what keeps the device busy and no longer.
STEP_TOKENS = {"cpu": (512, 2048), "cuda": (8192, 8192)}


def setting(
    default: Any,
    help: str,
    *,
    flag: str = "",
    aliases: tuple[str, ...] = (),
    env: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    metavar: str = "",
    unit: str = "",
    secret: bool = False,
    readme: bool = True,
    roles: tuple[str, ...] = ROLES,
    tolerated: Mapping[str, tuple[str, ...]] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """One setting. `flag` defaults to --field-name; the variable is PD_FIELD_NAME, `env` lists further names.

    `roles`: the instances on which it acts; its flag is refused where nothing that runs is one of these. `tolerated`:
    aliases that are accepted on further roles because SGLang's own lines have them there. `at_least`, `above`,
    `at_most`, `below` bound a number.
    """
    meta = {
        "help": help,
        "flag": flag,
        "aliases": aliases,
        "env": env,
        "choices": choices,
        "metavar": metavar,
        "unit": unit,
        "secret": secret,
        "readme": readme,
        "roles": roles,
        "tolerated": tolerated or {},
        "bounds": {"at_least": at_least, "above": above, "at_most": at_most, "below": below},
        "setting": True,
    }
    if callable(default):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


def secret_values(config: Any) -> tuple[str, ...]:
    """The values of every `secret` setting in a (nested) settings object that are set: what logs must not show."""
    found: list[str] = []
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            found.extend(secret_values(value))
        elif item.metadata.get("secret") and value:
            found.append(value)
    return tuple(found)


def default_transfer_threads() -> int:
    return min(12, max(4, int(0.75 * (os.cpu_count() or 1)) // 8))


@dataclass(frozen=True)
class ModelConfig:
    model: str = setting(
        "",
        "model directory, or id on the Hugging Face hub: ORG/NAME[@REVISION]",
        flag="MODEL",
        aliases=("--model-path", "--model"),
    )
    served_model_name: str = setting("", "name in /v1/models and answers (default: the model as given)")
    dtype: str = setting("auto", "weights, activations and KV", choices=("auto", "float32", "float16", "bfloat16"))
    trust_remote_code: bool = setting(False, "accepted for compatibility: pd never runs code from a model directory")
    context_length: int = setting(0, "longest prompt plus output (0: the model's own)", unit="tokens", at_least=0)
    device: str = setting("auto", "cpu, cuda or auto", choices=("auto", "cpu", "cuda"))
    base_gpu_id: int = setting(0, "first GPU of this instance; computing on the CPU there is only 0", at_least=0)
    load_format: str = setting(
        "auto",
        "auto reads the directory's weights; dummy makes random ones of config.json's shapes, to measure with",
        choices=("auto", "dummy"),
    )
    attention_backend: str = setting(
        "auto",
        "kernels of a GPU's attention: triton, or torch, which is slow and for comparison (auto: triton)",
        choices=("auto", "triton", "torch"),
    )
    cuda_graph_max_bs: int = setting(
        256, "largest decode batch that is captured as a CUDA graph", unit="requests", at_least=1
    )
    disable_cuda_graph: bool = setting(False, "launch every kernel of a decode step by itself")
    device_wait: str = setting(
        "auto",
        "how a GPU's step is waited for: spin occupies a core while one is computed, sleep learns of its end some "
        "0.1 ms later (auto: spin where this process may use four cores or more per GPU)",
        choices=("auto", "spin", "sleep"),
    )
    revision: str = setting("", "branch, tag or commit of a model from the hub (default: main)")


@dataclass(frozen=True)
class CacheConfig:
    page_size: int = setting(32, "tokens per KV block", unit="tokens", at_least=1)
    max_total_tokens: int = setting(0, "size of the KV pool (0: from free memory)", unit="tokens", at_least=0)
    mem_fraction_static: float = setting(
        0.0,
        "share of device memory for weights and KV pool (0: 0.88 on a GPU, 0.15 of free memory on the CPU)",
        at_least=0,
        below=1,
    )
    kv_cache_dtype: str = setting(
        "auto",
        "KV blocks: fp8_e4m3 halves them (also spelled fp8); auto is the type of weights and activations",
        choices=("auto", "fp8_e4m3"),
    )
    disable_prefix_cache: bool = setting(
        False, "do not reuse KV blocks of equal prefixes", aliases=("--disable-radix-cache",)
    )


@dataclass(frozen=True)
class SchedulerConfig:
    max_running_requests: int = setting(256, "requests decoded at once", at_least=1)
    max_queued_requests: int = setting(4096, "requests waiting before new ones get 503", at_least=1)
    chunked_prefill_size: int = setting(
        0, "prompt tokens of one request per step (0: 8192 on a GPU, 512 on the CPU)", unit="tokens", at_least=0
    )
    max_prefill_tokens: int = setting(
        0, "prompt tokens of all requests per step (0: 8192 on a GPU, 2048 on the CPU)", unit="tokens", at_least=0
    )
    local_prefill: str = setting("fallback", "when it prefills itself: never, fallback or short:N", roles=("decode",))
    local_prefill_tokens: int = setting(
        512, "local prefill tokens per step", unit="tokens", roles=("decode",), at_least=1
    )
    local_prefill_queue: int = setting(
        65536,
        "local prefill tokens that may be pending; beyond, requests get 503",
        unit="tokens",
        roles=("decode",),
        at_least=1,
    )
    reserve_blocks: int = setting(
        1, "growth blocks per running request that are never granted", readme=False, roles=ANSWERING, at_least=0
    )
    request_timeout: float = setting(600.0, "longest time without a new token", unit="s", above=0)
    step_timeout: float = setting(
        60.0, "a step or a transfer command that takes longer means that the runner hangs", unit="s", above=0
    )


def for_device(config: ServeConfig, accelerator: bool) -> ServeConfig:
    """With "auto" and 0 replaced by what they mean on this machine: `accelerator` is whether it has a GPU."""
    device = config.model.device
    if device == "auto":
        device = "cuda" if accelerator else "cpu"
    chunk, step = STEP_TOKENS[device]
    limits = config.scheduler
    return replace(
        config,
        model=replace(config.model, device=device),
        scheduler=replace(
            limits,
            chunked_prefill_size=limits.chunked_prefill_size or chunk,
            max_prefill_tokens=limits.max_prefill_tokens or step,
        ),
    )


@dataclass(frozen=True)
class TransferConfig:
    transfer: str = setting("direct", "transfer backend", aliases=("--disaggregation-transfer-backend",), roles=PAIR)
    ib_device: str = setting(
        "", "RDMA device(s) for backends that use one", aliases=("--disaggregation-ib-device",), roles=PAIR
    )
    transfer_threads: int = setting(
        default_transfer_threads,
        "threads per rank that drive the transfer queues, each queue by one (0.75 x CPUs / 8, clamped to 4..12)",
        env=("SGLANG_DISAGGREGATION_THREAD_POOL_SIZE",),
        roles=("prefill",),
        at_least=1,
    )
    transfer_queues: int = setting(
        4,
        "parallel transfer queues, sharded by peer; 1 = first come, first served",
        env=("SGLANG_DISAGGREGATION_QUEUE_SIZE",),
        roles=("prefill",),
        at_least=1,
    )
    transfer_timeout: float = setting(
        30.0, "a push longer than this fails and its peer is reset", unit="s", roles=("prefill",), above=0
    )
    transfer_memory: str = setting(
        "auto",
        "how `direct` reaches peers: auto, shm (mapped memory of one host, between GPUs by CUDA IPC) or tcp",
        choices=("auto", "shm", "tcp"),
        roles=PAIR,
    )


@dataclass(frozen=True)
class ControlConfig:
    control_host: str = setting(
        "", "address of the control and data planes (default: 127.0.0.1, or --host with a secret)", roles=PAIR
    )
    control_port: int = setting(
        8998,
        "port that answers Hello (0: any)",
        flag="--control-port",
        aliases=("--disaggregation-bootstrap-port",),
        roles=("prefill",),
        tolerated={"--disaggregation-bootstrap-port": ("decode",)},
        at_least=0,
        at_most=65535,
    )
    cluster_secret: str = setting(
        "", "shared secret, which encrypts the control plane and opens it across hosts", secret=True, roles=PAIR
    )
    insecure_control_plane: bool = setting(
        False, "allow control and data planes across hosts without a secret", roles=PAIR
    )
    bootstrap_timeout: float = setting(
        300.0,
        "longest wait of a request with a bootstrap_room for the decode instance that asks for it, and of its first "
        "token for the request",
        unit="s",
        env=("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT",),
        roles=("prefill",),
        above=0,
    )
    waiting_timeout: float = setting(
        300.0,
        "longest wait from asking a prefill instance until the KV cache is here; then the next one is asked",
        unit="s",
        env=("SGLANG_DISAGGREGATION_WAITING_TIMEOUT",),
        roles=("decode",),
        above=0,
    )
    heartbeat_interval: float = setting(
        5.0,
        "application heartbeats between this instance and its prefill instances, both ways",
        unit="s",
        env=("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL",),
        roles=("decode",),
        above=0,
    )
    heartbeat_max_failure: int = setting(
        2,
        "missed heartbeats in a row after which a peer is lost",
        env=("SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE",),
        roles=PAIR,
        at_least=1,
    )
    watchdog_timeout: float = setting(
        10.0,
        "a process whose event loop gives no sign of life for so long is ended by its parent (0: never)",
        unit="s",
        at_least=0,
    )
    link_heartbeat: float = setting(
        0.5, "ZMQ heartbeats: a frozen peer is lost after three", unit="s", readme=False, above=0
    )
    connect_timeout: float = setting(
        3.0,
        "longest wait for a prefill instance's Hello answer, and on that instance for the data connection back",
        unit="s",
        roles=PAIR,
        above=0,
    )


@dataclass(frozen=True)
class ChatConfig:
    """What /v1/chat/completions makes of messages and outputs."""

    chat_template: str = setting(
        "",
        "jinja2 file instead of the model's own chat template, or the template itself",
        metavar="FILE",
    )
    tool_call_parser: str = setting(
        "auto",
        "how the model writes calls: hermes (also for Qwen), llama3, or auto: by the chat template",
        choices=("auto", "hermes", "llama3"),
    )
    reasoning_parser: str = setting(
        "auto",
        "how thoughts and answer are separated: deepseek-r1 (every output begins with thoughts), qwen3 (those in "
        "`<think>`), none, or auto: qwen3 if the chat template knows `<think>`",
        choices=("auto", "deepseek-r1", "qwen3", "none"),
    )


@dataclass(frozen=True)
class HttpConfig:
    host: str = setting("127.0.0.1", "HTTP address")
    port: int = setting(30000, "HTTP port (0: any)", at_least=0, at_most=65535)
    drain_timeout: float = setting(30.0, "longest wait for running requests on SIGTERM", unit="s", at_least=0)
    api_workers: int = setting(
        1,
        "processes that speak HTTP: more when one is too busy with the tokens of all streams",
        at_least=1,
        at_most=64,
    )
    max_request_bytes: int = setting(
        64 << 20, "largest request body", unit="bytes", aliases=("--max-body",), env=("PD_MAX_BODY",), at_least=1
    )
    api_key: str = setting(
        "",
        "key that requests must bring as `Authorization: Bearer KEY`; a router also asks its workers with it",
        secret=True,
        metavar="KEY",
    )
    ssl_certfile: str = setting("", "certificate chain (PEM): HTTPS instead of HTTP", metavar="FILE")
    ssl_keyfile: str = setting("", "its private key (PEM), if it is not in the same file", metavar="FILE")
    ssl_keyfile_password: str = setting("", "password of the private key", secret=True)
    allowed_origins: tuple[str, ...] = setting(
        ("*",), "origins of web pages that may ask (CORS): any, or `none`, or a list", metavar="ORIGIN"
    )
    allowed_methods: tuple[str, ...] = setting(("*",), "methods that web pages may use", metavar="METHOD")
    allowed_headers: tuple[str, ...] = setting(("*",), "headers that web pages may send", metavar="HEADER")
    allow_credentials: bool = setting(False, "web pages may send cookies and the like")


@dataclass(frozen=True)
class LogConfig:
    log_level: str = setting("info", "log level", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("auto", "human in a terminal, JSON otherwise", choices=("auto", "human", "json"))


@dataclass(frozen=True)
class ServeConfig:
    """`pd serve`."""

    role: str = setting(
        "unified",
        "what this instance does",
        choices=ROLES,
        aliases=("--disaggregation-mode",),
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile_dir: str = setting(
        "/tmp", "where /start_profile writes unless it says where", env=("SGLANG_TORCH_PROFILER_DIR",), metavar="DIR"
    )
    name: str = setting("", "instance name, for logs and peers (default: host and port)")
    fault: str = setting("", "folder of armed fault points, for tests", readme=False)


@dataclass(frozen=True)
class RouteConfig:
    """`pd route`."""

    prefill: tuple[str, ...] = setting((), "prefill instances: URL [PORT|none], repeated or as a list", metavar="URL")
    prefill_bootstrap_ports: tuple[int, ...] = setting(
        (),
        "control port of each prefill instance, in order, instead of the one that it reports (0 or none: the reported)",
        metavar="PORT",
    )
    decode: tuple[str, ...] = setting((), "decode instances", metavar="URL")
    policy: str = setting("", "routing policy of every pool that names none of its own")
    prefill_policy: str = setting("", "policy of the prefill pool (default: cache_aware if installed, else random)")
    decode_policy: str = setting("", "policy of the decode pool (default: power_of_two if installed, else random)")
    pd_disaggregation: bool = setting(False, "accepted for compatibility: pd route always pairs prefill and decode")
    health_interval: float = setting(1.0, "between health checks of a worker", unit="s", above=0)
    health_timeout: float = setting(2.0, "a health check longer than this is a failure", unit="s", above=0)
    health_failures: int = setting(2, "failures in a row before a worker is out", at_least=1)
    request_timeout: float = setting(
        600.0,
        "longest time without a byte of a stream (of another answer: 1800 s or this, whichever is more), for requests "
        "without x-request-timeout; 2 s later than that the router gives up",
        unit="s",
        above=0,
    )
    connect_timeout: float = setting(2.0, "longest wait for a worker's connection", unit="s", above=0)
    worker_ca_certs: str = setting(
        "", "certificate authorities (PEM) by which https workers are judged (default: the system's)", metavar="FILE"
    )
    http: HttpConfig = field(default_factory=lambda: HttpConfig(port=8000))
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class UpConfig:
    """`pd up`: a local cluster. Settings of `pd serve` apply to every instance, those of `pd route` to the router.

    `omit`: settings that the cluster itself decides, or whose flag means the other part's. `--host` and `--port` are
    the router's; a flag that both parts have (`--log-level`) sets both.
    """

    prefill: int = setting(1, "prefill instances", at_least=0)
    decode: int = setting(1, "decode instances", at_least=0)
    unified: int = setting(0, "unified instances instead of pairs", at_least=0)
    restart: bool = setting(True, "restart an instance that died, with back-off")
    serve: ServeConfig = field(
        default_factory=lambda: ServeConfig(http=HttpConfig(port=0), control=ControlConfig(control_port=0)),
        metadata={
            "omit": (
                "role",
                "host",
                "port",
                "control_host",
                "control_port",
                "insecure_control_plane",
                "ssl_certfile",  # instances listen for the router only, on this host
                "ssl_keyfile",
                "ssl_keyfile_password",
                "allowed_origins",
                "allowed_methods",
                "allowed_headers",
                "allow_credentials",
            )
        },
    )
    route: RouteConfig = field(
        default_factory=lambda: RouteConfig(http=HttpConfig(port=8000)),
        metadata={
            "omit": (
                "prefill",
                "prefill_bootstrap_ports",
                "decode",
                "pd_disaggregation",
                "connect_timeout",
                "worker_ca_certs",
            )
        },
    )
