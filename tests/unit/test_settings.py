"""Settings: from what users type to dataclasses; a flag either acts or is an error that names it."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pd import settings
from pd.config import ROLES, RouteConfig, ServeConfig, UpConfig, default_transfer_threads, secret_values
from pd.errors import ConfigError
from pd.settings import options, parse, settings_table, update_readme, with_log_format

COMMANDS = (ServeConfig, RouteConfig, UpConfig)


@dataclass(frozen=True)
class Backend:
    accepts: frozenset[str] = frozenset()
    reason: str | None = None
    refuses: Callable[[str, str], str | None] = lambda setting, value: None
    one_thread: bool = False

    def unavailable(self) -> str | None:
        return self.reason


BACKENDS = {
    "direct": Backend(frozenset({"transfer_memory"})),
    "mooncake": Backend(frozenset({"ib_device"})),
    "nixl": Backend(),
    "ascend": Backend(),
}
ONLY_DIRECT = {"direct": BACKENDS["direct"]}
POLICIES = {"random", "cache_aware", "power_of_two"}


def serve(line: str, environ: Mapping[str, str] | None = None, backends: Any = BACKENDS) -> ServeConfig:
    return parse(ServeConfig, shlex.split(line), environ or {}, backends=backends)


def route(line: str, environ: Mapping[str, str] | None = None) -> RouteConfig:
    return parse(RouteConfig, shlex.split(line), environ or {}, policies=POLICIES)


def refusal(call: Callable[[str], Any], line: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call(line)
    return caught.value


def up(line: str, environ: Mapping[str, str] | None = None, backends: Any = ONLY_DIRECT) -> UpConfig:
    return parse(UpConfig, shlex.split(line), environ or {}, backends=backends, policies=POLICIES)


# --- what users bring ------------------------------------------------------------------------------------------------

LLAMA = "--model-path meta-llama/Llama-3.1-8B-Instruct"
QWEN = "--model-path /data/public/model/qwen2.5/qwen2.5-7b-instruct"
QWEN_REST = (
    "--host 0.0.0.0 --tensor-parallel-size 1 --disaggregation-transfer-backend mooncake "
    "--disaggregation-ib-device mlx5_2 --max-total-tokens 4096 --dtype float16 --trust-remote-code"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"{LLAMA} --disaggregation-mode prefill --port 30000 --disaggregation-ib-device mlx5_roce0",
            {
                "model.model": "meta-llama/Llama-3.1-8B-Instruct",
                "role": "prefill",
                "http.port": 30000,
                "transfer.transfer": "mooncake",
                "transfer.ib_device": "mlx5_roce0",
                "control.control_port": 8998,
            },
        ),
        (
            f"{LLAMA} --disaggregation-mode decode --port 30001 --base-gpu-id 1 --disaggregation-ib-device mlx5_roce0",
            {"role": "decode", "http.port": 30001, "model.base_gpu_id": 1, "transfer.transfer": "mooncake"},
        ),
        (
            f"{LLAMA} --disaggregation-mode prefill --port 30000 --disaggregation-transfer-backend nixl",
            {"role": "prefill", "transfer.transfer": "nixl", "transfer.ib_device": ""},
        ),
        (
            f"{LLAMA} --disaggregation-mode decode --port 30001 --base-gpu-id 1 --disaggregation-transfer-backend nixl",
            {"role": "decode", "transfer.transfer": "nixl"},
        ),
        (
            f"{LLAMA} --disaggregation-mode decode --port 30001 --base-gpu-id 1 "
            "--disaggregation-transfer-backend ascend",
            {"role": "decode", "transfer.transfer": "ascend"},
        ),
        (
            f"{QWEN} --port 7000 --disaggregation-mode prefill --disaggregation-bootstrap-port 8998 {QWEN_REST}",
            {
                "http.host": "0.0.0.0",
                "http.port": 7000,
                "control.control_port": 8998,
                "control.control_host": "",
                "cache.max_total_tokens": 4096,
                "model.dtype": "float16",
                "model.trust_remote_code": True,
                "transfer.ib_device": "mlx5_2",
            },
        ),
        (
            f"{QWEN} --port 7001 --disaggregation-mode decode --disaggregation-bootstrap-port 8999 {QWEN_REST}",
            {"role": "decode", "http.port": 7001, "control.control_port": 8999},
        ),
        (
            "--model-path /path/to/model --disaggregation-mode prefill --port 30001",
            {"role": "prefill", "transfer.transfer": "direct"},
        ),
        ("--model-path /path/to/model --disaggregation-mode decode --port 30011", {"role": "decode"}),
        ("/path/to/model --disaggregation-mode null", {"role": "unified", "model.model": "/path/to/model"}),
        ("/m --mem-fraction-static 0.8 --max-running-requests 128", {"cache.mem_fraction_static": 0.8}),
        ("/m --kv-cache-dtype fp8_e4m3", {"cache.kv_cache_dtype": "fp8_e4m3"}),
        ("/m --kv-cache-dtype fp8", {"cache.kv_cache_dtype": "fp8_e4m3"}),  # vLLM's
        ("/m --tp-size 1 --dp-size 1 --nnodes 1 --node-rank 0 --tp 1 --moe-a2a-backend none", {"model.model": "/m"}),
    ],
)
def test_sglangs_launch_lines_start_an_instance(line: str, expected: dict[str, Any]) -> None:
    config = serve(line)
    for path, value in expected.items():
        found: Any = config
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value, path


MANY = (
    "--model-path deepseek-ai/DeepSeek-V3-0324 --disaggregation-mode {role} --host 10.0.0.5 --port 3000{n} "
    "--trust-remote-code --dist-init-addr 10.0.0.5:5000 --nnodes {nodes} --node-rank {rank} --tp-size 16 "
)
EXPERTS = "--dp-size 8 --enable-dp-attention --moe-a2a-backend deepep --mem-fraction-static 0.8 "


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("transfer", ["--disaggregation-ib-device mlx5_0", "--disaggregation-transfer-backend nixl"])
def test_lines_for_several_accelerators_are_refused_naming_every_flag_at_once(
    role: str, rank: int, transfer: str
) -> None:
    line = MANY.format(role=role, n=0 if role == "prefill" else 1, nodes=2, rank=rank) + EXPERTS + transfer
    with pytest.raises(ConfigError, match="one accelerator per instance for now") as caught:
        serve(line)
    named = "--tp-size 16, --dp-size 8, --enable-dp-attention, --moe-a2a-backend deepep, --nnodes 2, "
    assert caught.value.field == named + ("--node-rank 1, " if rank else "") + "--dist-init-addr 10.0.0.5:5000"


def test_the_ascend_line_for_one_node_is_refused_for_what_it_asks_beyond_one_accelerator() -> None:
    line = MANY.format(role="prefill", n=0, nodes=1, rank=0) + "--disaggregation-transfer-backend ascend"
    with pytest.raises(ConfigError) as caught:
        serve(line)
    assert caught.value.field == "--tp-size 16, --dist-init-addr 10.0.0.5:5000"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--pd-disaggregation --prefill http://127.0.0.1:30000 --decode http://127.0.0.1:30001 "
            "--host 0.0.0.0 --port 8000",
            {"prefill": ("http://127.0.0.1:30000",), "decode": ("http://127.0.0.1:30001",)},
        ),
        (
            "--prefill http://127.0.0.1:7000 --prefill-bootstrap-ports 8998 --decode http://127.0.0.1:7001 "
            "--host 0.0.0.0 --port 8000",
            {"prefill": ("http://127.0.0.1:7000",), "prefill_bootstrap_ports": (8998,)},
        ),
        (
            "--pd-disaggregation --prefill http://prefill1:30001 http://prefill2:30002 --decode http://decode1:30011 "
            "http://decode2:30012 --policy cache_aware --prefill-policy cache_aware --decode-policy power_of_two",
            {
                "prefill": ("http://prefill1:30001", "http://prefill2:30002"),
                "prefill_bootstrap_ports": (),
                "decode": ("http://decode1:30011", "http://decode2:30012"),
                "policy": "cache_aware",
                "decode_policy": "power_of_two",
            },
        ),
        (
            "--prefill http://a:1 9000 --prefill http://b:2 none --prefill http://c:3 --decode http://d:4",
            {"prefill": ("http://a:1", "http://b:2", "http://c:3"), "prefill_bootstrap_ports": (9000, 0, 0)},
        ),
        (
            "--prefill http://a:1 9000 http://b:2/ --prefill-bootstrap-ports none 9001 --decode http://[::1]:4",
            {"prefill_bootstrap_ports": (9000, 9001), "decode": ("http://[::1]:4",)},
        ),
        (
            "--prefill http://a:1 http://b:2 --prefill-bootstrap-ports 8998 --decode http://d:4",
            {"prefill_bootstrap_ports": (8998, 8998)},
        ),
        ("--decode http://d:4", {"prefill": (), "prefill_bootstrap_ports": ()}),
    ],
)
def test_router_lines_start_a_router(line: str, expected: dict[str, Any]) -> None:
    config = route(line)
    for name, value in expected.items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ("--prefill http://a:1", "--decode", "at least one decode"),
        ("--decode", "--decode", "expected at least one"),
        ("--decode d:4", "--decode", "http://host:port"),
        ("--decode ftp://d:4", "--decode", "http://host:port"),
        ("--decode http://d:4/v1", "--decode", "http://host:port"),
        ("--decode http://d:99999", "--decode", "out of range"),
        ("--decode http://d:4 8998", "--decode", "no bootstrap port"),
        ("--decode http://d:4 http://d:4/", "--decode", "twice"),
        ("--decode http://d:4 --prefill 8998", "--prefill", "http://host:port"),
        ("--decode http://d:4 --prefill http://a:1 70000", "--prefill", "not a port"),
        ("--decode http://d:4 --prefill http://a:1 1 2", "--prefill", "http://host:port"),
        (
            "--decode http://d:4 --prefill http://a:1 http://b:1 http://c:1 --prefill-bootstrap-ports 1 2",
            "--prefill-bootstrap-ports",
            "2 ports for 3",
        ),
        (
            "--decode http://d:4 --prefill http://a:1 5 --prefill-bootstrap-ports 6",
            "--prefill-bootstrap-ports",
            "contradicts",
        ),
        ("--decode http://d:4 --policy best", "--policy", "installed: cache_aware, power_of_two, random"),
        ("--decode http://d:4 --decode-policy round_robin", "--decode-policy", "pip install pd-policies"),
        ("--decode http://d:4 --no-pd-disaggregation", "--no-pd-disaggregation", "always pairs"),
    ],
)
def test_a_wrong_router_line_is_an_error_that_names_the_flag(line: str, field: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        route(line)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "variable", "path"),
    [
        ("THREAD_POOL_SIZE", "PD_TRANSFER_THREADS", ("transfer", "transfer_threads")),
        ("QUEUE_SIZE", "PD_TRANSFER_QUEUES", ("transfer", "transfer_queues")),
        ("BOOTSTRAP_TIMEOUT", "PD_BOOTSTRAP_TIMEOUT", ("control", "bootstrap_timeout")),
        ("HEARTBEAT_INTERVAL", "PD_HEARTBEAT_INTERVAL", ("control", "heartbeat_interval")),
        ("HEARTBEAT_MAX_FAILURE", "PD_HEARTBEAT_MAX_FAILURE", ("control", "heartbeat_max_failure")),
        ("WAITING_TIMEOUT", "PD_WAITING_TIMEOUT", ("control", "waiting_timeout")),
    ],
)
def test_flag_goes_before_own_variable_before_sglangs_variable_before_default(
    name: str, variable: str, path: tuple[str, str]
) -> None:
    sglang = f"SGLANG_DISAGGREGATION_{name}"
    flag = "--" + variable.removeprefix("PD_").lower().replace("_", "-")

    (option,) = (option for option in options(ServeConfig) if option.path == path)

    def value(line: str, environ: Mapping[str, str]) -> Any:
        role = next(iter(option.meta["roles"]), "prefill")
        return getattr(getattr(serve(f"/m --role {role} {line}", environ), path[0]), path[1])

    if option.meta["roles"]:
        assert value(f"{flag} 1", {variable: "12", sglang: "13"}) == 1
    assert value("", {variable: "12", sglang: "13"}) == 12
    assert value("", {variable: "", sglang: "13"}) == 13
    assert value("", {}) == getattr(getattr(ServeConfig(), path[0]), path[1])
    with pytest.raises(ConfigError) as caught:
        value("", {sglang: "-1"})
    assert caught.value.field == sglang


def test_the_defaults_of_sglangs_six_variables_are_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig()
    assert config.transfer.transfer_queues == 4
    assert (config.control.bootstrap_timeout, config.control.waiting_timeout) == (300.0, 300.0)
    assert (config.control.heartbeat_interval, config.control.heartbeat_max_failure) == (5.0, 2)
    for cpus, threads in ((1, 4), (64, 6), (96, 9), (256, 12)):
        monkeypatch.setattr("os.cpu_count", lambda cpus=cpus: cpus)
        assert default_transfer_threads() == threads


# --- how values are read ---------------------------------------------------------------------------------------------


def test_the_model_is_an_argument_or_a_flag_and_both_must_agree() -> None:
    for line in ("/m --port 1", "--port 1 /m", "--model /m", "--model-path /m", "/m --model-path /m"):
        assert serve(line).model.model == "/m"
    assert serve("", {"PD_MODEL": "/m"}).model.model == "/m"
    assert serve("/m", {"PD_MODEL": "/other"}).model.model == "/m"
    with pytest.raises(ConfigError, match="contradicts"):
        serve("/m --model-path /other")
    with pytest.raises(ConfigError, match="MODEL: no model given"):
        serve("--port 1")


def test_switches_go_on_and_off_by_flag_and_variable() -> None:
    def disabled(line: str, environ: Mapping[str, str] | None = None) -> bool:
        return serve("/m " + line, environ).cache.disable_prefix_cache

    assert disabled("") is False
    assert disabled("--disable-prefix-cache") is disabled("--disable-radix-cache") is True
    for on in ("1", "true", "YES", "on"):
        assert disabled("", {"PD_DISABLE_PREFIX_CACHE": on}) is True
        assert disabled("--no-disable-prefix-cache", {"PD_DISABLE_PREFIX_CACHE": on}) is False
    assert disabled("", {"PD_DISABLE_PREFIX_CACHE": "off"}) is False
    with pytest.raises(ConfigError, match="PD_DISABLE_PREFIX_CACHE: 'maybe' is not a switch"):
        disabled("", {"PD_DISABLE_PREFIX_CACHE": "maybe"})
    assert up("/m --no-restart").restart is False and up("/m").restart is True


def test_of_a_repeated_flag_the_last_counts_whatever_its_spelling() -> None:
    assert serve("/m --role prefill --disaggregation-mode decode").role == "decode"


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ("/m --port many", "--port", "'many' is not a whole number"),
        ("/m --port 65536", "--port", "more than 65535"),
        ("/m --port -1", "--port", "less than 0"),
        ("/m --port", "--port", "expected one argument"),
        ("/m --page-size 0", "--page-size", "less than 1"),
        ("/m --heartbeat-interval 0", "--heartbeat-interval", "not more than 0"),
        ("/m --heartbeat-interval nan", "--heartbeat-interval", "not a number"),
        ("/m --heartbeat-interval inf", "--heartbeat-interval", "not a number"),
        ("/m --mem-fraction-static 1", "--mem-fraction-static", "not less than 1"),
        ("/m --dtype int8", "--dtype", "not one of auto, float32, float16, bfloat16"),
        ("/m --kv-cache-dtype fp8_e5m2", "--kv-cache-dtype", "not one of auto, fp8_e4m3"),
        ("/m --disaggregation-mode both", "--disaggregation-mode", "not one of prefill, decode, unified"),
        ("/m --local-prefill always", "--local-prefill", "never, fallback or short:N"),
        ("/m --local-prefill short:0", "--local-prefill", "never, fallback or short:N"),
        ("/m --local-prefill short:", "--local-prefill", "never, fallback or short:N"),
        ("/m --local-prefill never:3", "--local-prefill", "never, fallback or short:N"),
        ("/m --no-such-flag 3", "--no-such-flag", "unknown flag"),
        ("/m --no-such-flag=3", "--no-such-flag", "unknown flag"),
        ("/m --prot 3", "--prot", "did you mean --port?"),
        ("/m --page 3", "--page", "unknown flag"),  # no abbreviations: they change meaning with the next release
        ("/m /n", "/n", "unexpected argument"),
        ("/m --tp 2", "--tp 2", "one accelerator"),
        ("/m --control-host 10.0.0.5", "--control-host", "PD_CLUSTER_SECRET"),
        ("/m --control-host 0.0.0.0", "--control-host", "--insecure-control-plane"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_flag_as_typed(line: str, field: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(line)
    assert caught.value.field == field
    assert problem in str(caught.value)


def test_good_values_of_local_prefill_and_control_host_are_kept() -> None:
    for text in ("never", "fallback", "short:64"):
        assert serve(f"/m --role decode --local-prefill {text}").scheduler.local_prefill == text
    for line in (
        "--control-host 127.0.0.1",
        "--control-host localhost",
        "--control-host 10.0.0.5 --insecure-control-plane",
        "--control-host 10.0.0.5 --cluster-secret s",
    ):
        assert serve(f"/m --role prefill {line}").control.control_host == line.split()[1]


# --- transfer backends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--transfer", "--disaggregation-transfer-backend"])
@pytest.mark.parametrize("name", ["mooncake", "nixl", "ascend"])
def test_a_backend_that_is_not_installed_is_named_with_the_package_to_install(flag: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(f"/m --role prefill {flag} {name}", backends=ONLY_DIRECT)
    assert caught.value.field == flag
    assert "installed: direct" in caught.value.problem
    assert caught.value.remedy == f"pip install pd-transfer-{name}"


def test_a_backend_that_nobody_knows_is_refused_by_flag_and_by_variable() -> None:
    with pytest.raises(ConfigError, match="--transfer: transfer backend 'pigeon' is not installed"):
        serve("/m --transfer pigeon")
    with pytest.raises(ConfigError, match="PD_TRANSFER: transfer backend 'pigeon' is not installed"):
        serve("/m", {"PD_TRANSFER": "pigeon"})


def test_an_rdma_device_without_a_backend_means_mooncake_and_says_so_when_it_is_missing() -> None:
    assert serve("/m --role decode --ib-device mlx5_0").transfer.transfer == "mooncake"
    assert serve("/m", {"PD_IB_DEVICE": "mlx5_0"}).transfer.transfer == "mooncake"
    with pytest.raises(ConfigError, match=r"means mooncake.*pip install pd-transfer-mooncake") as caught:
        serve("/m --role decode --disaggregation-ib-device mlx5_0", backends=ONLY_DIRECT)
    assert caught.value.field == "--disaggregation-ib-device"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("--transfer direct --ib-device mlx5_0", "--ib-device"),
        ("--transfer nixl --disaggregation-ib-device mlx5_0", "--disaggregation-ib-device"),
        ("--transfer mooncake --transfer-memory tcp", "--transfer-memory"),
    ],
)
def test_a_device_flag_that_the_backend_cannot_use_is_an_error(line: str, field: str) -> None:
    with pytest.raises(ConfigError, match="cannot use it") as caught:
        serve("/m --role prefill " + line)
    assert caught.value.field == field


def test_a_device_that_this_machine_lacks_is_an_error_that_names_the_flag_and_says_why() -> None:
    def refuses(setting: str, value: str) -> str | None:
        return f"no {setting} {value}" if value == "mlx5_9" else None

    backends = {**BACKENDS, "mooncake": Backend(frozenset({"ib_device"}), refuses=refuses)}
    assert serve("/m --role decode --ib-device mlx5_0", backends=backends).transfer.ib_device == "mlx5_0"
    with pytest.raises(ConfigError, match="mooncake cannot use it: no ib_device mlx5_9") as caught:
        serve("/m --role decode --disaggregation-ib-device mlx5_9", backends=backends)
    assert caught.value.field == "--disaggregation-ib-device"


def test_a_backend_without_its_library_is_refused_where_it_would_be_used() -> None:
    backends = {**BACKENDS, "nixl": Backend(reason="no module named nixl, pip install nixl")}
    with pytest.raises(ConfigError, match="nixl is unavailable: no module named nixl, pip install nixl"):
        serve("/m --role decode --transfer nixl", backends=backends)
    assert serve("/m --role unified", {"PD_TRANSFER": "nixl"}, backends=backends).transfer.transfer == "nixl"
    with pytest.raises(ConfigError, match="unavailable"):
        up("/m --transfer nixl", backends=backends)


# --- flags that would do nothing ------------------------------------------------------------------------------------

#: Flags that do not act on every instance: those on which they do.
ACT_ON = {
    "--local-prefill": "decode",
    "--local-prefill-tokens": "decode",
    "--local-prefill-queue": "decode",
    "--reserve-blocks": "decode unified",
    "--transfer": "prefill decode",
    "--disaggregation-transfer-backend": "prefill decode",
    "--ib-device": "prefill decode",
    "--disaggregation-ib-device": "prefill decode",
    "--transfer-threads": "prefill",
    "--transfer-queues": "prefill",
    "--transfer-timeout": "prefill",
    "--transfer-memory": "prefill decode",
    "--control-host": "prefill decode",
    "--control-port": "prefill",
    "--disaggregation-bootstrap-port": "prefill decode",  # SGLang's decode lines have it
    "--cluster-secret": "prefill decode",
    "--insecure-control-plane": "prefill decode",
    "--bootstrap-timeout": "prefill",
    "--waiting-timeout": "decode",
    "--heartbeat-interval": "decode",
    "--heartbeat-max-failure": "prefill decode",
    "--connect-timeout": "prefill decode",
}
FLAGS = [(option, flag) for option in options(ServeConfig) for flag in option.flags if option.name != "role"]


@pytest.mark.parametrize(("option", "flag"), FLAGS, ids=[flag for _, flag in FLAGS])
@pytest.mark.parametrize("role", ROLES)
def test_a_flag_acts_on_the_role_or_is_refused_by_its_name_and_a_variable_is_never_refused(
    option: settings.Option, flag: str, role: str
) -> None:
    words, text = _another_value(option)
    words = [flag, *words[1:]]
    line = ["--role", role, *([] if option.name == "model" else ["--model", "/m"])]
    if option.name == "ib_device":
        line += [] if role == "unified" else ["--transfer", "mooncake"]
    if option.name == "transfer":
        words[1] = text = "nixl"
    variable = {option.variables[0]: text}
    if option.name in ("ib_device", "transfer_memory"):
        variable["PD_TRANSFER"] = "mooncake" if option.name == "ib_device" else "direct"
    assert parse(ServeConfig, line, variable, backends=BACKENDS).role == role
    if role in ACT_ON.get(flag, " ".join(ROLES)).split():
        assert parse(ServeConfig, [*line, *words], {}, backends=BACKENDS).role == role
        return
    error = refusal(lambda _: parse(ServeConfig, [*line, *words], {}, backends=BACKENDS), "")
    assert error.field == flag
    assert error.problem == f"it does nothing on {role} instances"
    assert error.remedy.startswith("leave it out")


def test_the_roles_of_a_refused_flag_are_in_its_remedy() -> None:
    error = refusal(serve, "/m --role prefill --local-prefill never")
    assert str(error) == (
        "--local-prefill: it does nothing on prefill instances; leave it out: it is for decode instances"
    )
    error = refusal(serve, "/m --no-insecure-control-plane")
    assert (error.field, error.remedy) == (
        "--no-insecure-control-plane",
        "leave it out: it is for prefill and decode instances",
    )


def test_in_a_cluster_a_flag_acts_where_one_of_the_instances_uses_it() -> None:
    assert up("/m --local-prefill never --transfer-threads 2 --waiting-timeout 7").serve.transfer.transfer_threads == 2
    assert up("/m --prefill 0 --local-prefill never").serve.scheduler.local_prefill == "never"
    assert up("/m --unified 1 --request-timeout 7").serve.scheduler.request_timeout == 7
    for line, problem in (
        ("--prefill 0 --transfer-threads 2", "it does nothing on decode instances"),
        ("--unified 1 --transfer-memory shm", "it does nothing on unified instances"),
        ("--prefill 0 --bootstrap-timeout 7", "it does nothing on decode instances"),
    ):
        error = refusal(up, "/m " + line)
        assert (error.field, error.problem) == (line.split()[-2], problem)


def test_threads_that_would_have_nothing_to_do_are_refused_by_their_flag_and_not_by_a_variable() -> None:
    assert serve("/m --role prefill --transfer-threads 4").transfer.transfer_threads == 4
    assert serve("/m --role prefill --transfer-threads 8 --transfer-queues 8").transfer.transfer_threads == 8
    assert serve("/m --role prefill --transfer-queues 2").transfer.transfer_queues == 2
    assert serve("/m --role prefill", {"PD_TRANSFER_THREADS": "8"}).transfer.transfer_threads == 8
    for call, line in ((serve, "/m --role prefill --transfer-threads 5"), (up, "/m --transfer-threads 5")):
        error = refusal(call, line)
        assert (error.field, error.problem) == (
            "--transfer-threads",
            "5 threads for --transfer-queues 4: no two of them serve one queue",
        )

    backends = {**BACKENDS, "nixl": Backend(one_thread=True)}
    with pytest.raises(ConfigError, match="transfer backend nixl is driven by one thread") as caught:
        serve("/m --role prefill --transfer nixl --transfer-threads 2", backends=backends)
    assert caught.value.field == "--transfer-threads"
    assert serve("/m --role prefill --transfer nixl --transfer-threads 1", backends=backends).transfer
    assert serve("/m --role prefill --transfer nixl", {"PD_TRANSFER_THREADS": "2"}, backends=backends).transfer
    assert refusal(serve, "/m --role decode --transfer-threads 5").problem == "it does nothing on decode instances"


@pytest.mark.parametrize("config_type", [ServeConfig, UpConfig])
def test_the_number_of_a_gpu_is_refused_where_the_cpu_computes(config_type: type) -> None:
    def number(line: str, accelerator: bool | None, environ: Mapping[str, str] | None = None) -> int:
        config: Any = parse(config_type, ["/m", *line.split()], environ or {}, accelerator=accelerator)
        return int(getattr(config, "serve", config).model.base_gpu_id)

    for accelerator in (True, None):
        assert number("--base-gpu-id 1", accelerator) == 1
    assert number("--base-gpu-id 0", False) == 0
    assert number("", False, {"PD_BASE_GPU_ID": "1"}) == 1
    for line, accelerator, environ, problem in (
        ("--base-gpu-id 1", False, {}, "this machine has no GPU: the CPU computes"),
        ("--base-gpu-id 1 --device cpu", True, {}, "it numbers GPUs, and --device says cpu"),
        ("--base-gpu-id 1", True, {"PD_DEVICE": "cpu"}, "it numbers GPUs, and PD_DEVICE says cpu"),
    ):
        error = refusal(lambda line: number(line, accelerator, environ), line)  # noqa: B023
        assert (error.field, error.problem, error.remedy) == ("--base-gpu-id", problem, "leave it out")


# --- pd up -----------------------------------------------------------------------------------------------------------


def test_up_gives_host_and_port_to_the_router_and_serve_settings_to_every_instance() -> None:
    config = up("/m --port 9000 --host 0.0.0.0 --page-size 16 --prefill 2 --request-timeout 7 --log-level debug")
    assert (config.route.http.port, config.route.http.host) == (9000, "0.0.0.0")
    assert (config.serve.http.port, config.serve.http.host, config.serve.control.control_port) == (0, "127.0.0.1", 0)
    assert (config.prefill, config.decode, config.serve.cache.page_size) == (2, 1, 16)
    assert config.serve.scheduler.request_timeout == config.route.request_timeout == 7
    assert config.serve.log.log_level == config.route.log.log_level == "debug"
    assert up("/m").route.http.port == 8000


def test_the_request_timeout_means_the_same_on_instances_and_router() -> None:
    assert ServeConfig().scheduler.request_timeout == RouteConfig().request_timeout
    everywhere = {"PD_REQUEST_TIMEOUT": "7200"}
    for config in (up("/m --request-timeout 7200"), up("/m", everywhere)):
        assert config.serve.scheduler.request_timeout == config.route.request_timeout == 7200
    assert route("--decode http://d:4", everywhere).request_timeout == 7200
    assert serve("/m", everywhere).scheduler.request_timeout == 7200


def test_up_without_a_model_serves_the_built_in_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pd.rules.__file__", str(tmp_path / "rules.py"))
    with pytest.raises(ConfigError, match="MODEL"):
        up("")
    (tmp_path / "builtin_model").mkdir()
    assert up("").serve.model.model == str(tmp_path / "builtin_model")
    assert up("").serve.model.served_model_name == "builtin"
    assert up("--served-model-name mine").serve.model.served_model_name == "mine"
    assert up("/m").serve.model.model == "/m"


def test_unified_instances_take_the_place_of_pairs() -> None:
    config = up("/m --unified 2")
    assert (config.unified, config.prefill, config.decode) == (2, 0, 0)
    with pytest.raises(ConfigError, match="--prefill: --unified"):
        up("/m --unified 1 --prefill 1")
    with pytest.raises(ConfigError, match="--decode: at least one"):
        up("/m --decode 0")
    assert up("/m --prefill 0").prefill == 0


@pytest.mark.parametrize("line", ["--role prefill", "--control-port 1", "--pd-disaggregation"])
def test_up_refuses_what_the_cluster_decides_itself(line: str) -> None:
    with pytest.raises(ConfigError, match="unknown flag"):
        up("/m " + line)


# --- the fields themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_type", COMMANDS)
def test_flags_and_variables_mean_one_setting_each(config_type: type) -> None:
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for option in options(config_type):
        for name in (option.flag, *option.flags, *option.variables):
            owners[name].add(option.name)
    assert {name: fields for name, fields in owners.items() if len(fields) > 1} == {}


@pytest.mark.parametrize("config_type", COMMANDS)
def test_every_setting_can_be_set_by_flag_and_by_variable_and_says_what_it_is(config_type: type) -> None:
    for option in options(config_type):
        assert option.meta["help"]
        if option.name in ("transfer", "ib_device", "transfer_memory"):
            continue  # tested elsewhere: they depend on each other
        words, text = _another_value(option)
        rest = [] if config_type is RouteConfig or option.name == "model" else ["--model", "/m"]
        if config_type is RouteConfig:
            rest += ["--prefill", "http://p:1"] if option.name == "prefill_bootstrap_ports" else []
            rest += ["--decode", "http://d:1"] if option.name != "decode" else []
        if config_type is ServeConfig and option.name != "role":
            rest += ["--role", option.meta["roles"][0]]
        by_flag = parse(config_type, [*rest, *words], {})
        assert by_flag == parse(config_type, rest, {option.variables[0]: text})
        found: Any = by_flag
        for part in option.path:
            found = getattr(found, part)
        assert found != option.default, option.path


def _another_value(option: settings.Option) -> tuple[list[str], str]:
    """A good value that is not the default: as words of a command line and as a variable's text."""
    if option.kind is bool:
        flag = option.flags[0]
        return (["--no-" + flag[2:]], "0") if option.default else ([flag], "1")
    samples = {int: "3", float: "0.25", str: "word", tuple[str, ...]: "http://h:1", tuple[int, ...]: "3"}
    named = {"local_prefill": "never", "control_host": "127.0.0.1", "chat_template": "{{ 1 }}"}
    choices = [choice for choice in option.meta["choices"] if choice != option.default]
    text = choices[0] if choices else named.get(option.name, samples[option.kind])
    return [option.flags[0], text], text


@pytest.mark.parametrize("config_type", COMMANDS)
def test_defaults_satisfy_their_own_bounds(config_type: type) -> None:
    for option in options(config_type):
        if option.kind in (int, float):
            settings._number(option, option.kind, "default", str(option.default))


def test_the_help_shows_settings_once_and_never_the_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for config_type in COMMANDS:
        parser = settings.Parser(prog="pd")
        settings.add_settings(parser, config_type)
        text = parser.format_help()
        assert text.count("--log-level {") == 2  # in the usage line and in the list
        assert "--fault" not in text
    assert secret_values(serve("/m --role decode --cluster-secret hush")) == ("hush",)
    assert secret_values(up("/m --cluster-secret hush")) == ("hush",)


def test_the_log_format_is_decided_once_for_every_part() -> None:
    decided = with_log_format(up("/m"), terminal=True)
    assert decided.serve.log.log_format == decided.route.log.log_format == "human"
    assert with_log_format(serve("/m"), terminal=False).log.log_format == "json"
    assert with_log_format(serve("/m --log-format human"), terminal=False).log.log_format == "human"


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_table_names_flag_aliases_variables_and_default_and_hides_internal_settings() -> None:
    table = settings_table(ServeConfig, RouteConfig, UpConfig)
    assert "| `MODEL` | `--model-path` `--model` | `PD_MODEL` |  | model directory" in table
    assert (
        "| `--heartbeat-interval` |  | `PD_HEARTBEAT_INTERVAL` `SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL` | `5` |"
        in table
    )
    assert "| `--transfer-threads` |" in table and "| computed |" in table
    assert "--fault" not in table and "link-heartbeat" not in table
    assert table.count("`--log-level`") == 1
    assert "URL [PORT\\|none]" in table


def test_only_the_part_between_the_markers_is_replaced() -> None:
    text = "before\n<!-- settings:begin -->\nold\n<!-- settings:end -->\nafter\n"
    updated = update_readme(text)
    assert updated.startswith("before\n<!-- settings:begin -->\n\n`pd serve`:") and updated.endswith("-->\nafter\n")
    assert "old" not in updated and update_readme(updated) == updated
    with pytest.raises(ValueError, match="settings:begin"):
        update_readme("no markers")


def test_the_readmes_table_is_up_to_date() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if settings.BEGIN in text:
        assert update_readme(text) == text, "run: python -m pd.settings --write README.md"
