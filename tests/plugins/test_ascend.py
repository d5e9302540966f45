"""pd-transfer-ascend: what it does over a module of the library's surface; how the real ones fail without an NPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pd_transfer_ascend import plugin
from pd_transfer_ascend.backend import ALIGNMENT, AscendBackend
from suite_kit import SHORT, LosesWhoHangs, in_short, run_alone

from pd.abc import BackendContext, Region
from pd.cli import main
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd.plugins import load_plugins
from pd.rules import builtin_model
from pd.testing import NO_DIGESTS, NOT_REVOCABLE
from pd.testing.transfer_peer import HostMemory
from tests.plugins import fake_memfabric

URL = "tcp://127.0.0.1:24669"


@pytest.fixture(autouse=True)
def _fabric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fabric of its own for each test, which the processes that it starts are in, too."""
    monkeypatch.setenv("FAKE_MEMFABRIC", str(tmp_path))
    monkeypatch.setenv("ASCEND_MF_STORE_URL", URL)
    for name in (plugin.PROTOCOL, plugin.OVER_MOONCAKE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fake_memfabric.TransferEngine, "calls", [])
    monkeypatch.setitem(sys.modules, "memfabric_hybrid", fake_memfabric.install())
    yield


@pytest.mark.slow
class TestAscend(LosesWhoHangs):
    """Over the fake module, whose writes go from process to process in host memory."""

    factory = "tests.plugins.fake_memfabric:make"
    secret = "cluster secret"
    authenticates = True
    exceptions = dict.fromkeys((*NOT_REVOCABLE, *NO_DIGESTS), "the engine knows neither hand-offs nor digests")

    @pytest.fixture(autouse=True)
    def _in_the_fabric(self, _fabric: None) -> None:
        """The suite's own set-up runs after the fabric is there."""

    def test_expelling_a_living_sender_is_quiet_once_that_has_closed(self) -> None:
        remote = self.remote("there")
        remote.call("connect", self.here.descriptor())
        assert not self.here.expel("there")
        with pytest.raises(PeerLost, match="closed"):
            remote.call("post", "here", self.rows([(0, 0)]), 1)
        self.until(lambda: self.here.expel("there"), 5.0)
        with pytest.raises(PeerLost):
            remote.call("connect", self.here.descriptor())
        assert self.here.expel("nobody who ever came")

    def test_a_write_that_the_library_refuses_loses_the_peer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        remote = self.connected("there")
        monkeypatch.setattr(fake_memfabric.TransferEngine, "batch_transfer_sync_write", lambda *what: -1)
        with pytest.raises(PeerLost, match="a write failed: -1"):
            self.here.post(remote.identity, self.rows([(0, 0)]), 1)


@in_short(
    {
        TestAscend: (
            *SHORT,
            "test_another_process_writes_here",
            "test_threads_may_post_to_different_peers_at_the_same_time",
            "test_expelling_a_living_sender_is_quiet_once_that_has_closed",
        )
    }
)
def test_in_short(kind: type[TestAscend], name: str) -> None:
    run_alone(kind, name)


def backend(protocol: str = "sdma", **context: Any) -> AscendBackend:
    made = BackendContext(**{"host": "127.0.0.1", "device": "cpu", "memory": HostMemory(), **context})
    return AscendBackend(made, sys.modules["memfabric_hybrid"], URL, protocol)


def regions(*sizes: int, start: int = 0) -> list[Region]:
    memory = np.zeros(sum(sizes) + 2 * ALIGNMENT, np.uint8)
    address = int(memory.ctypes.data) + -int(memory.ctypes.data) % ALIGNMENT + start
    return [Region(i, address + sum(sizes[:i]), size, "npu:0", owner=memory) for i, size in enumerate(sizes)]


def test_a_prefill_instance_opens_the_store_and_both_roles_join_it_with_their_device(tmp_path: Path) -> None:
    pair = [
        backend("device_rdma", role=role, device=device) for role, device in (("prefill", "npu:3"), ("decode", "npu:4"))
    ]
    for one in pair:
        one.open(one.context.role)
    calls = [call for call in fake_memfabric.TransferEngine.calls if call[0] == "initialize"]
    assert [(call[1], *call[3:]) for call in calls] == [
        (URL, "Prefill", 3, "DEVICE_RDMA"),
        (URL, "Decode", 4, "DEVICE_RDMA"),
    ]
    assert calls[0][2] != calls[1][2]
    for one in pair:
        one.close()
    assert fake_memfabric.TransferEngine.calls.count(("unInitialize",)) == 2


def test_all_memory_is_registered_by_one_call_and_once() -> None:
    one = backend()
    one.open("here")
    given = regions(ALIGNMENT, 3 * ALIGNMENT)
    one.register([*given, given[0]])
    (call,) = [call for call in fake_memfabric.TransferEngine.calls if call[0] == "register"]
    assert call[1:] == ([region.address for region in given], [ALIGNMENT, 3 * ALIGNMENT])
    with pytest.raises(TransferError, match="registered no memory"):  # the library takes none any more
        one.register(given)
    one.close()


@pytest.mark.parametrize(("size", "start"), [(ALIGNMENT, 4096), (ALIGNMENT - 4096, 0)])
def test_memory_that_is_not_aligned_is_refused_before_the_library_sees_it(size: int, start: int) -> None:
    one = backend()
    one.open("here")
    with pytest.raises(TransferError, match="not 2 MiB aligned"):
        one.register(regions(size, start=start))
    assert not [call for call in fake_memfabric.TransferEngine.calls if call[0] == "register"]
    one.close()


def test_host_memory_that_it_supplies_is_aligned_whatever_its_size() -> None:
    one = backend()
    one.open("here")
    region = one.allocate(ALIGNMENT + 4096, "cpu")
    assert region is not None and region.buffer is not None
    assert region.address % ALIGNMENT == 0 and len(region.buffer) == region.nbytes == ALIGNMENT + 4096
    one.register([region])
    assert one.allocate(ALIGNMENT, "npu:0") is None
    one.close()


def test_a_start_that_fails_says_what_the_library_said_and_nothing_works_after_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    one = backend(role="decode")  # nobody has opened the store
    with pytest.raises(BackendUnavailable, match="the driver says no, check the NPU's driver"):
        one.open("here")
    assert "the driver says no" in capfd.readouterr().out, "it stays in the log, too"
    one.close()
    engine = fake_memfabric.TransferEngine()
    assert engine.batch_register_memory([0], [ALIGNMENT]) == fake_memfabric.NOT_STARTED
    assert engine.batch_transfer_sync_write("there", [0], [0], [8]) == fake_memfabric.NOT_STARTED


def test_a_protocol_that_the_library_lacks_is_refused_with_those_that_it_has() -> None:
    with pytest.raises(BackendUnavailable, match="ASCEND_MF_TRANSFER_PROTOCOL=warp, use one of device_rdma, sdma"):
        backend("warp")


# --- without an NPU -------------------------------------------------------------------------------------------------

OPEN = """
import sys
for name in sys.argv[2:]:
    sys.modules[name] = None
from pd.abc import BackendContext
from pd.errors import BackendUnavailable
from pd.testing.transfer_peer import HostMemory
from pd_transfer_ascend.plugin import make_ascend
assert not {"memfabric_hybrid", "mf_adapter"} & {name for name, module in sys.modules.items() if module}
backend = make_ascend(BackendContext("127.0.0.1", "cpu", HostMemory(), role="prefill"))
assert sys.argv[1] in sys.modules, "another library was taken"
try:
    backend.open("here")
except BackendUnavailable as error:
    print("REFUSED", error, flush=True)
backend.close()
"""


@pytest.mark.parametrize(("library", "hidden"), [("memfabric_hybrid", []), ("mf_adapter", ["memfabric_hybrid"])])
def test_the_real_library_fails_at_open_with_its_drivers_own_message(
    library: str, hidden: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_MF_STORE_URL", "tcp://127.0.0.1:24671")
    done = subprocess.run(
        [sys.executable, "-c", OPEN, library, *hidden], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert "transfer backend ascend unavailable: the current version of ascend driver does not support mf!" in said


def test_a_missing_library_or_store_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ASCEND_MF_STORE_URL")
    assert main(["serve", builtin_model(), "--role", "decode", "--transfer", "ascend"]) == 2
    assert "unavailable: ASCEND_MF_STORE_URL, set it to the address" in capsys.readouterr().err
    for name in plugin.VENDORS:
        monkeypatch.setitem(sys.modules, name, None)
    (described,) = [one for one in load_plugins().describe() if "ascend" in one.backends]
    assert described.unavailable == {
        "ascend": "memfabric_hybrid, pip install 'pd-transfer-ascend[memfabric]'",
    }


def test_over_mooncake_it_is_the_mooncake_backend_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from pd_transfer_mooncake.backend import MooncakeBackend

    monkeypatch.setenv(plugin.OVER_MOONCAKE, "true")
    made = plugin.make_ascend(BackendContext("127.0.0.1", "cpu", HostMemory()))
    assert isinstance(made, MooncakeBackend)
    made.close()
    monkeypatch.setitem(sys.modules, "pd_transfer_mooncake", None)
    with pytest.raises(BackendUnavailable, match="pd_transfer_mooncake, pip install pd-transfer-mooncake, or unset"):
        plugin.make_ascend(BackendContext("127.0.0.1", "cpu", HostMemory()))
