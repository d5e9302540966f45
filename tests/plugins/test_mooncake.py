"""pd-transfer-mooncake with the real wheel over TCP: the conformance suite, its fence, what it refuses."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pd_transfer_mooncake import bare, plugin
from pd_transfer_mooncake.backend import MooncakeBackend
from pd_transfer_mooncake.engines import own_sockets
from suite_kit import SHORT, EndsEngines, LosesWhoHangs, in_short, run_alone

from pd.abc import BackendContext, Call, Region, hosts
from pd.cli import main
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd.plugins import load_plugins
from pd.rules import builtin_model
from pd.testing import NO_DIGESTS, NOT_REVOCABLE
from pd.testing.transfer_harness import BLOCK
from pd.testing.transfer_peer import HostMemory, Side

PAGE = 16
FACTORY = "pd_transfer_mooncake.plugin:make_mooncake"


@pytest.mark.slow
class TestMooncake(LosesWhoHangs, EndsEngines):
    """The package's README explains the exceptions, and that Mooncake binds its listeners to every interface."""

    factory = FACTORY
    engine = "engine"
    exceptions = dict.fromkeys((*NOT_REVOCABLE, *NO_DIGESTS), "the engine knows neither hand-offs nor digests")
    secret = "cluster secret"
    authenticates = True

    def test_nothing_listens_beyond_the_configured_host(self) -> None:
        """What Mooncake opens is fenced: a peer's host reaches it at the configured host, others get no answer."""
        remote = self.connected("there")
        self.works(remote)
        beyond = set(remote.call("listeners")) - {self.host}
        assert beyond == {"0.0.0.0", "::"}
        mine = ports_of_engines()
        assert mine
        for port in mine:  # engines that only send take nobody's connections
            assert not answers(port, "127.0.0.1", self.host)

    def test_an_engine_answers_only_its_own_peers_host_at_the_configured_host(self) -> None:
        remote = self.remote("there")
        before = ports_of_engines()
        remote.call("connect", self.here.descriptor())
        receiving = ports_of_engines() - before
        assert len(receiving) == 2
        for port in receiving:
            assert answers(port, "127.0.0.1", self.host)
            assert not answers(port, "127.0.0.2", self.host)
            assert not answers(port, "127.0.0.1", "127.0.0.3")

    def test_ending_an_engine_stops_no_other_thread_for_long(self) -> None:
        remote = self.connected("there")
        self.works(remote)
        longest, stop = [0.0], threading.Event()

        def watch() -> None:
            last = time.monotonic()
            while not stop.wait(0.001):
                now = time.monotonic()
                longest[0], last = max(longest[0], now - last), now

        thread = threading.Thread(target=watch)
        thread.start()
        self.here.reset_peer("there")
        stop.set()
        thread.join()
        assert longest[0] < 0.5  # Mooncake's own is up to a second

    def test_both_sides_must_move_kv_by_the_same_protocol(self) -> None:
        remote = self.remote("there")
        self.here.backend._protocol = "rdma"  # type: ignore[attr-defined]
        with pytest.raises(PeerLost, match="by tcp, not rdma"):
            self.connect(remote)

    def test_a_post_is_applied_when_each_of_its_writes_is_and_lost_when_one_fails(self) -> None:
        remote = self.connected("there")
        peer: Any = self.here._peers["there"]
        peer.engine = engine = Scripted()
        rows = self.rows([(0, 0), (2, 1), (4, 2)])
        ticket = self.here.post(remote.identity, rows, 1)
        for engine.says, applied in (([0, 1, 1], False), ([1, 1, 0], False), ([1, 1, 1], True)):
            assert self.here.poll(ticket) is applied
        engine.says = [1, -1, 1]
        ticket = self.here.post(remote.identity, rows, 1)
        for _ in range(2):
            with pytest.raises(PeerLost, match="a write failed"):
                self.here.poll(ticket)
        engine.takes = False
        with pytest.raises(PeerLost, match="takes no write"):
            self.here.post(remote.identity, rows, 1)

    def test_a_peer_whose_engine_does_not_answer_is_lost_and_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        remote, mine = self.remote("there"), cast(MooncakeBackend, self.here.backend)
        dial, calls = mine.call, list[Call]()

        def kept(*what: Any) -> Call:
            calls.append(dial(*what))
            return calls[-1]

        monkeypatch.setattr(mine, "call", kept)
        monkeypatch.setattr("pd_transfer_mooncake.backend.first_contact", lambda *what: False)
        with pytest.raises(PeerLost, match=r"its engine at .* does not answer"):
            self.here.connect(remote.call("descriptor"))
        assert calls[0].end

    def test_to_a_peer_whose_connection_has_ended_nothing_is_written(self) -> None:
        """Another process may have its ports by now."""
        remote = self.connected("there")
        peer: Any = self.here._peers["there"]
        peer.engine = object()  # which is not asked
        remote.kill()
        self.until(lambda: peer.call.end)
        with pytest.raises(PeerLost):
            self.here.post(remote.identity, self.rows([(0, 0)]), 1)

    def test_the_bare_engine_that_the_benchmark_compares_with_moves_the_same_spans(self) -> None:
        other = self.local("other")
        self.here.pattern(3)
        descriptor, _, close_receiver = bare.receive(int(other.memory.ctypes.data), other.memory.size, "cpu")
        write, close_sender = bare.send(int(self.here.memory.ctypes.data), self.here.memory.size, "cpu", descriptor)
        rows = self.everything()
        write(np.array(rows, dtype=np.uint64))
        close_sender()
        close_receiver()
        assert np.array_equal(other.memory, self.expected(rows))


class Scripted:
    """An engine that says of the n-th of three writes what stands there."""

    takes = True

    def __init__(self) -> None:
        self.says: list[int] = []
        self._taken = 0

    def transfer_submit_write(self, session: str, source: int, target: int, length: int) -> int:
        self._taken += 1
        return self._taken if self.takes else 0

    def transfer_check_status(self, write: int) -> int:
        return self.says[(write - 1) % 3]


@in_short(
    {
        TestMooncake: (
            *SHORT,
            "test_another_process_writes_here",
            "test_threads_may_post_to_different_peers_at_the_same_time",
            "test_nothing_listens_beyond_the_configured_host",
            "test_an_engine_answers_only_its_own_peers_host_at_the_configured_host",
            "test_both_sides_must_move_kv_by_the_same_protocol",
        )
    }
)
def test_in_short(kind: type[TestMooncake], name: str) -> None:
    run_alone(kind, name)


def ports_of_engines() -> set[int]:
    """On which this process listens at every interface."""
    return {name[1] for _, listens, name, _ in own_sockets() if listens and name[0] in ("0.0.0.0", "::")}


def answers(port: int, source: str, target: str) -> bool:
    try:
        socket.create_connection((target, port), timeout=0.3, source_address=(source, 0)).close()
    except TimeoutError:
        return False
    return True


# --- what it needs, and what it refuses -----------------------------------------------------------------------------


def make(host: str = "127.0.0.1", **options: str) -> Any:
    return plugin.make_mooncake(BackendContext(host, "cpu", HostMemory(), options=options))


def test_a_missing_wheel_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    with pytest.raises(BackendUnavailable, match=r"the wheel of .*, pip install 'pd-transfer-mooncake\[cpu\]'"):
        make()


def test_a_missing_system_library_is_named_with_its_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.LIBRARIES == {"libibverbs.so.1": "apt-get install libibverbs1"}
    monkeypatch.setattr(plugin, "LIBRARIES", {"libnowhere.so.1": "apt-get install libnowhere1"})
    (described,) = [one for one in load_plugins().describe() if "mooncake" in one.backends]
    assert described.unavailable == {"mooncake": "libnowhere.so.1, apt-get install libnowhere1"}
    with pytest.raises(BackendUnavailable, match=r"libnowhere\.so\.1, apt-get install libnowhere1"):
        make()


def test_a_log_directory_that_would_abort_the_process_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MC_LOG_DIR", "/tmp")
    assert main(["serve", builtin_model(), "--role", "decode", "--transfer", "mooncake"]) == 2
    assert "--transfer: transfer backend mooncake is unavailable: MC_LOG_DIR, unset it" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--ib-device", "--disaggregation-ib-device"])
def test_an_rdma_device_that_is_not_there_is_refused_instead_of_becoming_tcp(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", builtin_model(), "--role", "decode", flag, "mlx5_no,mlx5_none"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pd: {flag}: transfer backend mooncake cannot use it: no RDMA device mlx5_no, mlx5_none")
    with pytest.raises(BackendUnavailable, match="--ib-device, no RDMA device mlx5_no"):
        make(ib_device="mlx5_no")


@pytest.mark.parametrize(
    ("protocol", "options", "said"),
    [
        ("smoke", {}, "use one of tcp, rdma, nvlink_intra"),
        ("tcp", {"ib_device": "mlx5_0"}, "name one of the two"),
        ("nvlink_intra", {}, "the installed wheel is built without it"),
        ("rdma", {}, "no RDMA device"),
    ],
)
def test_a_protocol_that_cannot_be_had_is_refused(
    protocol: str, options: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "RDMA_DEVICES", Path("/nowhere"))
    monkeypatch.setenv(plugin.PROTOCOL, protocol)
    with pytest.raises(BackendUnavailable, match=said):
        make(**options)


@pytest.fixture
def mlx5_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An RDMA device that the kernel names."""
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(hosts, "RDMA_DEVICES", tmp_path)


def test_memory_that_its_protocol_does_not_move_is_refused() -> None:
    backend = make()
    backend.open("here")
    with pytest.raises(TransferError, match="by tcp does not move memory of cuda:0"):
        backend.register([Region(0, 1 << 20, 4096, "cuda:0")])
    backend.close()


@pytest.mark.usefixtures("mlx5_0")
def test_a_device_that_mooncake_does_not_see_is_refused_although_it_starts() -> None:
    """The kernel names it, Mooncake does not find it and would take TCP."""
    backend = make(ib_device="mlx5_0")
    with pytest.raises(BackendUnavailable, match="RDMA device mlx5_0, Mooncake does not see it"):
        backend.open("here")
    backend.close()


@pytest.mark.usefixtures("mlx5_0")
def test_forced_tcp_contradicts_an_rdma_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.refuses("ib_device", "mlx5_0") is None
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    assert plugin.refuses("ib_device", "mlx5_0") == "MC_FORCE_TCP is set; unset it to use RDMA"


def test_ipv6_and_an_address_of_another_host_are_refused() -> None:
    for host, remedy in (("::1", "an IPv4 address"), ("192.0.2.1", "an address of this host")):
        backend = plugin.make_mooncake(BackendContext(host, "cpu", HostMemory(), b"key"))
        with pytest.raises(BackendUnavailable, match=f"cannot bind to {host}.*{remedy}"):
            backend.open("here")
        backend.close()


def test_without_a_secret_it_stays_on_this_host() -> None:
    side = Side(FACTORY, "0.0.0.0", "", {})
    side.open("here", BLOCK)
    assert b"127.0.0.1" in bytes.fromhex(side.descriptor())
    side.close()
