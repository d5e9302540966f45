"""The launch lines that users of SGLang bring, word for word, and what becomes of each: the program's name changes.

`$X` are the user's own values. Numbers are those of the table that the documents make; a number with a letter is one of
several lines of its row.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROGRAMS = {
    "sglang.launch_server": "serve",
    "sglang_router.launch_router": "route",
    "sglang.srt.disaggregation.mini_lb": "route",
}
VALUES = {
    "$DEVICE": "mlx5_0",
    "$LOCAL_IP": "10.0.0.5",
    "$PREFILL_MASTER_IP": "10.0.0.6",
    "$DECODE_MASTER_IP": "10.0.0.7",
    "$HOST": "10.0.0.8",
    "$PORT": "24669",
}
MODELS = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "deepseek-ai/DeepSeek-V3-0324",
    "/data/public/model/qwen2.5/qwen2.5-7b-instruct",
    "/path/to/model",
)


@dataclass(frozen=True)
class Line:
    """One line. `refused`: what exit code 2 names, one refusal after the other as each is taken out of the line;

    what is left then starts. `expected`: settings of what starts, by their path. `before`: the `export` lines.
    """

    number: str
    text: str
    refused: tuple[str, ...] = ()
    expected: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[str, ...] = ()

    def command(self, model: str) -> tuple[str, list[str], dict[str, str]]:
        """pd's command, its arguments and the variables set for it, with `model` in place of the line's."""
        words = shlex.split(_with_values(self.text))
        environ = {}
        for assignment in [*(_with_values(line.removeprefix("export ")) for line in self.before), *_leading(words)]:
            name, _, value = assignment.partition("=")
            environ[name] = value.strip('"')
        python, dash_m, module, *arguments = words[len(_leading(words)) :]
        assert python in ("python", "python3") and dash_m == "-m", self.text
        return PROGRAMS[module], [model if word in MODELS else word for word in arguments], environ


def _leading(words: list[str]) -> list[str]:
    """Assignments before the program."""
    count = next(index for index, word in enumerate(words) if "=" not in word)
    return words[:count]


def _with_values(text: str) -> str:
    for name, value in VALUES.items():
        text = text.replace(name, value)
    return text


SERVER = "python -m sglang.launch_server"
LLAMA = f"{SERVER} --model-path meta-llama/Llama-3.1-8B-Instruct"
LLAMA_PREFILL = f"{LLAMA} --disaggregation-mode prefill --port 30000"
LLAMA_DECODE = f"{LLAMA} --disaggregation-mode decode --port 30001 --base-gpu-id 1"
ROCE = "--disaggregation-ib-device mlx5_roce0"
DEEPSEEK = f"{SERVER} --model-path deepseek-ai/DeepSeek-V3-0324"
DEEPSEEK_PREFILL = (
    "--disaggregation-mode prefill --host $LOCAL_IP --port 30000 --trust-remote-code "
    "--dist-init-addr $PREFILL_MASTER_IP:5000 --nnodes 2 --node-rank 0 --tp-size 16 --dp-size 8 --enable-dp-attention "
    "--moe-a2a-backend deepep --mem-fraction-static 0.8"
)
DEEPSEEK_DECODE = (
    "--disaggregation-mode decode --host $LOCAL_IP --port 30001 --trust-remote-code "
    "--dist-init-addr $DECODE_MASTER_IP:5000 --nnodes 2 --node-rank 0 --tp-size 16 --dp-size 8 --enable-dp-attention "
    "--moe-a2a-backend deepep --mem-fraction-static 0.8 --max-running-requests 128"
)
ONE_NODE = "--trust-remote-code --dist-init-addr {master}:5000 --nnodes 1 --node-rank 0 --tp-size 16"
QWEN = (
    "CUDA_VISIBLE_DEVICES={gpu} python -m sglang.launch_server --model-path "
    "/data/public/model/qwen2.5/qwen2.5-7b-instruct --port {port} --host 0.0.0.0 --tensor-parallel-size 1 "
    "--disaggregation-mode {mode} --disaggregation-bootstrap-port {bootstrap} --disaggregation-transfer-backend "
    "mooncake --disaggregation-ib-device mlx5_2 --max-total-tokens 4096 --dtype float16 --trust-remote-code"
)
NIXL, ASCEND = (f"--disaggregation-transfer-backend {name}" for name in ("nixl", "ascend"))
STORE = 'export ASCEND_MF_STORE_URL="tcp://$HOST:$PORT"'
OVER_MOONCAKE = "export ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE=true"

#: Refusals: one accelerator per instance, no RDMA device or GPU on a machine without one, and no such backend.
DEVICE, BACKEND, GPU = "--disaggregation-ib-device", "--disaggregation-transfer-backend", "--base-gpu-id"
WIDE = "--tp-size 16, --dp-size 8, --enable-dp-attention, --moe-a2a-backend deepep, --nnodes 2, {rank}--dist-init-addr {master}:5000"  # noqa: E501
PREFILL: dict[str, Any] = {"role": "prefill", "http.port": 30000, "control.control_port": 8998}
DECODE: dict[str, Any] = {"role": "decode", "http.port": 30001}
WIDE_PREFILL = {**PREFILL, "http.host": "10.0.0.5", "cache.mem_fraction_static": 0.8}
WIDE_DECODE = {
    **DECODE,
    "http.host": "10.0.0.5",
    "cache.mem_fraction_static": 0.8,
    "scheduler.max_running_requests": 128,
}


def _deepseek(number: str, transfer: str, mode: str, refused: str) -> list[Line]:
    """The line for node 0, and the one for node 1."""
    prefill = mode == "prefill"
    text = f"{DEEPSEEK} {transfer} {DEEPSEEK_PREFILL if prefill else DEEPSEEK_DECODE}"
    master = "10.0.0.6" if prefill else "10.0.0.7"
    expected = WIDE_PREFILL if prefill else WIDE_DECODE
    lines = []
    for rank, named in ((0, ""), (1, "--node-rank 1, ")):
        wide = WIDE.format(rank=named, master=master)
        ranked = text.replace("--node-rank 0", f"--node-rank {rank}")
        refusals = (wide, refused) if refused else (wide,)
        lines.append(Line(f"{number}-{mode}-{rank}", ranked, refusals, expected))
    return lines


def _ascend(number: str, before: tuple[str, ...]) -> list[Line]:
    one_node = {
        mode: f"{DEEPSEEK} {ASCEND} --disaggregation-mode {mode} --host $LOCAL_IP --port {port} "
        + ONE_NODE.format(master=master)
        for mode, port, master in (("prefill", 30000, "$PREFILL_MASTER_IP"), ("decode", 30001, "$DECODE_MASTER_IP"))
    }
    tp = "--tp-size 16, --dist-init-addr {}:5000"
    prefill, decode = ({**role, "transfer.transfer": "ascend"} for role in (PREFILL, DECODE))
    return [  # without an NPU the runner of what starts ends with what the driver says
        Line(f"{number}a", f"{LLAMA_PREFILL} {ASCEND}", (), prefill, before),
        Line(f"{number}b", f"{LLAMA_DECODE} {ASCEND}", (GPU,), decode, before),
        Line(f"{number}c", one_node["prefill"], (tp.format("10.0.0.6"),), prefill, before),
        Line(f"{number}d", one_node["decode"], (tp.format("10.0.0.7"),), decode, before),
    ]


ROUTE_3 = Line(
    "3",
    "python -m sglang_router.launch_router --pd-disaggregation --prefill http://127.0.0.1:30000 "
    "--decode http://127.0.0.1:30001 --host 0.0.0.0 --port 8000",
    expected={
        "prefill": ("http://127.0.0.1:30000",),
        "decode": ("http://127.0.0.1:30001",),
        "http.host": "0.0.0.0",
        "http.port": 8000,
    },
)
QWEN_SETTINGS: dict[str, Any] = {
    "http.host": "0.0.0.0",
    "cache.max_total_tokens": 4096,
    "model.dtype": "float16",
    "model.trust_remote_code": True,
    "transfer.transfer": "mooncake",
}
SERVE_9 = Line(
    "9",
    QWEN.format(gpu=0, port=7000, mode="prefill", bootstrap=8998),
    (DEVICE,),
    {**QWEN_SETTINGS, "role": "prefill", "http.port": 7000, "control.control_port": 8998},
)
SERVE_10 = Line(
    "10",
    QWEN.format(gpu=1, port=7001, mode="decode", bootstrap=8999),
    (DEVICE,),
    {**QWEN_SETTINGS, "role": "decode", "http.port": 7001, "control.control_port": 8999},
)
ROUTE_11 = Line(
    "11",
    "python -m sglang.srt.disaggregation.mini_lb --prefill http://127.0.0.1:7000 --prefill-bootstrap-ports 8998 "
    "--decode http://127.0.0.1:7001 --host 0.0.0.0 --port 8000",
    expected={
        "prefill": ("http://127.0.0.1:7000",),
        "prefill_bootstrap_ports": (8998,),
        "decode": ("http://127.0.0.1:7001",),
        "http.port": 8000,
    },
)
CURL_12 = (
    'curl -X POST http://localhost:8000/generate -H "Content-Type: application/json" '
    """-d '{"text": "请介绍一下你自己","max_new_tokens": 32,"temperature": 0.7}'"""
)
SERVE_13 = "python3 -m sglang.launch_server --model-path /path/to/model --disaggregation-mode prefill --port 30001"
SERVE_13A = Line("13a", SERVE_13, expected={"role": "prefill", "http.port": 30001, "transfer.transfer": "direct"})
SERVE_13B = Line(
    "13b",
    SERVE_13.replace("prefill --port 30001", "decode --port 30011"),
    expected={"role": "decode", "http.port": 30011, "transfer.transfer": "direct"},
)
ROUTE_14 = Line(
    "14",
    "python -m sglang_router.launch_router --pd-disaggregation --prefill http://prefill1:30001 http://prefill2:30002 "
    "--decode http://decode1:30011 http://decode2:30012 --policy cache_aware --prefill-policy cache_aware "
    "--decode-policy power_of_two",
    expected={
        "prefill": ("http://prefill1:30001", "http://prefill2:30002"),
        "prefill_bootstrap_ports": (),
        "decode": ("http://decode1:30011", "http://decode2:30012"),
        "policy": "cache_aware",
        "prefill_policy": "cache_aware",
        "decode_policy": "power_of_two",
    },
)

LINES = (
    Line("1", f"{LLAMA_PREFILL} {ROCE}", (DEVICE,), PREFILL),
    Line("2", f"{LLAMA_DECODE} {ROCE}", (DEVICE, GPU), DECODE),
    ROUTE_3,
    *_deepseek("4", "--disaggregation-ib-device $DEVICE", "prefill", DEVICE),
    *_deepseek("5", "--disaggregation-ib-device $DEVICE", "decode", DEVICE),
    Line("6a", f"{LLAMA_PREFILL} {NIXL}", (), {**PREFILL, "transfer.transfer": "nixl"}),
    Line("6b", f"{LLAMA_DECODE} {NIXL}", (GPU,), {**DECODE, "transfer.transfer": "nixl"}),
    *_deepseek("6", NIXL, "prefill", ""),
    *_deepseek("6", NIXL, "decode", ""),
    *_ascend("7", (STORE,)),
    *_ascend("8", (STORE, OVER_MOONCAKE)),
    SERVE_9,
    SERVE_10,
    ROUTE_11,
    SERVE_13A,
    SERVE_13B,
    ROUTE_14,
)
