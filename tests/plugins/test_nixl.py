"""`nixl` with the real wheel: the conformance suite over what UCX chooses on one host, and over sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

if not (find_spec("pd_transfer_nixl") and find_spec("nixl_cu12")):
    pytest.skip("needs pip install -e 'plugins/transfer_nixl[cpu]'", allow_module_level=True)

from pd_transfer_nixl import vendor
from pd_transfer_nixl.agents import Link, Memory, rows
from pd_transfer_nixl.agents import Nixl as Vendor
from pd_transfer_nixl.plugin import make_nixl
from suite_kit import SHORT, EndsEngines, in_short, run_alone

from pd.abc import BackendContext, hosts
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd.plugins import load_plugins
from pd.testing import NO_DIGESTS, NOT_REVOCABLE, ONE_THREAD
from pd.testing.transfer_harness import BLOCK, MARK, REUSED
from pd.testing.transfer_peer import HostMemory, RemoteSide, checksum


class Nixl(EndsEngines):
    factory = "pd_transfer_nixl.plugin:make_nixl"
    engine = "agent"
    secret = "cluster secret"
    authenticates = True
    exceptions = dict.fromkeys(
        (*NOT_REVOCABLE, *NO_DIGESTS, *ONE_THREAD), "the engine knows neither hand-offs nor digests nor threads"
    )


@pytest.mark.slow
class TestNixl(Nixl):
    """As it comes: shared memory and cross-memory attach."""

    def test_blocks_runs_and_slices_go_by_index_through_lists_that_are_made_once(self) -> None:
        remote = self.connected("there")
        link = self.here._peers["there"]
        self.here.pattern(20)
        before = dict(link.counts)  # type: ignore[attr-defined]
        for seed in range(3):
            pairs = [((7 * i + seed) % 64, i) for i in range(40)]
            blocks = [*self.rows(pairs[:30]), [0, 70 * BLOCK, 0, 80 * BLOCK, 3 * BLOCK]]
            slices = [[0, a * BLOCK + 4096, 0, (100 + b) * BLOCK + 8192, 1024] for a, b in pairs]
            remote.call("fill", MARK)
            self.grant_all(remote, 1)
            for spans in (blocks, slices):
                self.wait(self.here.post("there", spans, 1))
            assert remote.call("checksum") == checksum(self.expected(blocks + slices))
        moved = {name: count - before[name] for name, count in link.counts.items()}  # type: ignore[attr-defined]
        assert moved == {"indexed_posts": 6, "plain_posts": 0, "prepared_lists": 4}
        ragged = [[0, 8, 0, 16, 24], [0, 4096, 0, 8192, 40]]
        self.wait(self.here.post("there", ragged, 1))
        assert link.counts["plain_posts"] == before["plain_posts"] + 1  # type: ignore[attr-defined]

    def expelled_alive(self) -> RemoteSide:
        """A sender that has written here, and that expelling does not make quiet."""
        remote = self.sender("there")
        self.writes(remote)
        assert self.here.expel("there") is False
        return remote

    def test_a_living_sender_that_copies_by_itself_is_never_called_quiet(self) -> None:
        remote = self.expelled_alive()
        remote.kill()
        self.until(lambda: self.here.expel("there"), 5.0)

    def test_a_copying_sender_is_quiet_once_it_was_reset(self) -> None:
        remote = self.expelled_alive()
        with pytest.raises(PeerLost, match="closed"):
            remote.call("post", "here", self.rows([(0, 0)]), 1)
        remote.call("reset_peer", "here")
        self.until(lambda: self.here.expel("there"), 5.0)
        with pytest.raises(PeerLost, match="takes nothing"):
            remote.call("connect", self.here.descriptor())


class NixlTcp(Nixl):
    environment: ClassVar[dict[str, str]] = {"UCX_TLS": "tcp"}

    def test_a_living_sender_is_cut_off(self) -> None:
        remote = self.sender("there")
        self.writes(remote)
        rows = self.everything()
        for tag in range(4):
            remote.call("post", "here", rows, tag)
        assert self.bounded("expel", lambda: self.here.expel("there")) is True
        self.here.fill(MARK)
        for _ in range(300):
            self.here.progress()
        assert not self.here.count(REUSED)


@pytest.mark.slow
class TestNixlTcp(NixlTcp):
    """All of it; the most telling ones run always."""


@in_short(
    {
        TestNixl: (
            *SHORT,
            "test_blocks_runs_and_slices_go_by_index_through_lists_that_are_made_once",
            "test_many_peers_at_once_each_get_their_own_bytes",
            "test_a_living_sender_that_copies_by_itself_is_never_called_quiet",
            "test_a_copying_sender_is_quiet_once_it_was_reset",
            "test_an_idle_peer_costs_no_cpu",
        ),
        NixlTcp: (
            *SHORT,
            "test_nothing_listens_beyond_the_configured_host",
            "test_a_living_sender_is_cut_off",
        ),
    }
)
def test_in_short(kind: type[Nixl], name: str) -> None:
    run_alone(kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("base", [Nixl, NixlTcp])
def test_ten_seconds_of_an_idle_peer_cost_no_cpu(base: type[Nixl]) -> None:
    kind = type("Long", (base,), {"idle_seconds": 10.0})
    run_alone(kind, "test_an_idle_peer_costs_no_cpu")


def test_any_spans_of_whole_blocks_are_the_rows_that_the_indices_name() -> None:
    source = np.random.default_rng(0)
    for _ in range(50):
        counts = source.integers(1, 6, 20)
        starts = source.integers(0, 1000, 20)
        found = rows(starts * 4096, counts * 4096, 4096)
        assert found is not None and found[0] == (0, 4096, 4096)
        want = [block for start, count in zip(starts, counts, strict=True) for block in range(start, start + count)]
        assert found[1].tolist() == want and found[1].dtype == np.int32


def test_spans_that_cross_blocks_or_differ_are_no_rows() -> None:
    def of(*spans: tuple[int, int]) -> object:
        offsets, lengths = np.array(spans, dtype=np.int64).T
        return rows(offsets, lengths, 4096)

    assert of((4000, 200)) is None and of((0, 8), (4096, 16)) is None and of((0, 8), (4104, 8)) is None
    assert of((8, 8), (4104, 8)) is not None


class Agent:
    """Stands for NIXL's: every request is in the state that the test says."""

    def __init__(self) -> None:
        self.agent, self.state = Handle(), "PROC"

    def add_remote_agent(self, metadata: bytes) -> bytes:
        return b"there"

    def prep_xfer_dlist(self, *what: Any) -> Handle:
        return Handle()

    def make_prepped_xfer(self, *what: Any) -> Handle:
        return Handle()

    def transfer(self, request: Any) -> str:
        return self.state

    def check_xfer_state(self, request: Any) -> str:
        return self.state


class Handle:
    def release(self) -> None:
        """Nothing is held."""


def link_of(agent: Agent) -> Link:
    call, memory = SimpleNamespace(end="", answered=True, words=b""), [Memory(0, 1 << 20, "DRAM", 0, 4096)]
    bindings = SimpleNamespace(nixlRemoteDisconnectError=OSError, nixlBackendError=OSError)
    nixl = Vendor(SimpleNamespace(nixlBind=bindings))  # type: ignore[arg-type]
    return Link("there", call, nixl, agent, memory, memory)  # type: ignore[arg-type]


def test_a_post_is_done_when_its_request_is_and_its_failure_stays() -> None:
    agent = Agent()
    link = link_of(agent)
    spans = np.array([[0, 0, 0, 0, 4096]], np.uint64)
    done, failed, reset = (link.post(spans) for _ in range(3))
    assert not link.poll(done) and link.busy
    agent.state = "DONE"
    assert link.poll(done) and link.poll(done)
    agent.state = "ERR"
    for _ in range(2):
        with pytest.raises(TransferError, match="a request failed"):
            link.poll(failed)
        agent.state = "DONE"
    agent.state = "PROC"
    assert not link.poll(reset)
    del agent
    link.stop()
    for _ in range(2):
        with pytest.raises(PeerLost, match="reset"):
            link.poll(reset)
    with pytest.raises(PeerLost, match="reset"):
        link.post(spans)


# --- what is not here ---


def context(host: str = "127.0.0.1", **options: str) -> BackendContext:
    return BackendContext(host, "cpu", HostMemory(), b"secret", options)


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The process's environment, given back afterwards; nothing of UCX is set."""
    for name in ("UCX_NET_DEVICES", "UCX_TLS", "UCX_LOG_FILE", "NIXL_LOG_LEVEL", "NIXL_UCX_SGL_ENABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_without_the_library_pd_says_what_to_install(environ: pytest.MonkeyPatch) -> None:
    environ.setattr(vendor, "MODULES", ("nixl_of_nobody",))
    info = load_plugins().backends()["nixl"]
    assert info.unavailable() == "nixl, pip install 'pd-transfer-nixl[cpu]' (with a GPU [cuda12] or [cuda13])"
    environ.setitem(sys.modules, "nixl", None)
    with pytest.raises(BackendUnavailable, match=r"nixl unavailable: .*pd-transfer-nixl\[cpu\]"):
        make_nixl(context())


def test_where_ucx_cannot_start_it_says_what_to_check(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("UCX_TLS", "sm")
    backend = make_nixl(context())
    with pytest.raises(BackendUnavailable, match="check UCX_TLS"):
        backend.open("here")
    backend.close()


def test_one_thread_drives_it_so_that_the_flag_for_more_is_refused() -> None:
    from pd_transfer_nixl.backend import NixlBackend

    assert load_plugins().backends()["nixl"].one_thread is not NixlBackend.capabilities.concurrent_posts


@pytest.mark.parametrize(
    ("host", "devices"), [("127.0.0.1", "lo"), ("localhost", "lo"), ("0.0.0.0", None), ("::", None), ("::1", "lo")]
)
def test_network_devices_follow_the_host(environ: pytest.MonkeyPatch, host: str, devices: str | None) -> None:
    vendor.configure(context(host))
    assert os.environ.get("UCX_NET_DEVICES") == devices


def test_without_a_secret_nothing_leaves_the_host(environ: pytest.MonkeyPatch) -> None:
    vendor.configure(BackendContext("0.0.0.0", "cpu", HostMemory(), None, {}))
    assert os.environ["UCX_NET_DEVICES"] == "lo"


def test_what_the_user_has_set_stays(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("UCX_NET_DEVICES", "eth7")
    vendor.configure(context())
    assert os.environ["UCX_NET_DEVICES"] == "eth7"


def test_an_rdma_device_is_named_by_its_port_and_must_exist(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ.setattr(hosts, "RDMA_DEVICES", tmp_path / "none")
    with pytest.raises(BackendUnavailable, match=r"--ib-device, no RDMA device mlx5_0 on this machine .there: none"):
        vendor.configure(context(ib_device="mlx5_0"))
    (tmp_path / "mlx5_0").mkdir()
    (tmp_path / "mlx5_1").mkdir()
    environ.setattr(hosts, "RDMA_DEVICES", tmp_path)
    vendor.configure(context(ib_device="mlx5_0, mlx5_1:2"))
    assert os.environ["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_1:2"
    with pytest.raises(BackendUnavailable, match="there: mlx5_0, mlx5_1"):
        vendor.configure(context(ib_device="mlx5_7"))


def test_an_address_of_another_machine_is_refused(environ: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match=r"address 203\.0\.113\.9: no interface has it"):
        vendor.configure(context("203.0.113.9"))


def test_the_bench_measures_it_against_nixl_by_itself(tmp_path: Path) -> None:
    results = tmp_path / "transfer.json"
    words = ["--backend", "nixl", "--bytes", "4M", "--sizes", "64K", "--rounds", "2", "--latency-count", "5"]
    command = [sys.executable, "-m", "pd", "bench", "transfer", *words, "--json", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {row["variant"]: row for row in json.loads(results.read_text())["throughput"]}
    assert set(found) == {"raw", "bare", "nixl"} and found["bare"]["of_bare"] == 1
    assert found["nixl"]["of_bare"] > 0 and found["nixl"]["gb_per_s"] > 0
