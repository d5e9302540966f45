"""Shared memory between processes: a memfd handed over by its descriptor."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pd.errors import ProtocolError
from pd.ipc.memory import SharedMemory, peer_credentials, recv_fd, send_fd

pytestmark = pytest.mark.process

_CHILD = """
import socket, sys
from pd.ipc.memory import SharedMemory, recv_fd
connection = socket.socket(fileno=int(sys.argv[1]))
connection.settimeout(10)
fd, payload = recv_fd(connection)
with SharedMemory.attach(fd, int(payload)) as memory:
    memory.buffer[:5] = bytes(reversed(memory.buffer[:5]))
connection.sendall(b"done")
"""


def _open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_another_process_reads_and_writes_the_same_bytes() -> None:
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parents[2])
    with ours, SharedMemory.create("pd-test", 1 << 16) as memory:
        memory.buffer[:5] = b"hello"
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": root},
            )
        ours.settimeout(10)
        send_fd(ours, memory.fd, b"65536")
        assert ours.recv(4) == b"done"
        assert child.wait(10) == 0
        assert bytes(memory.buffer[:5]) == b"olleh"


def test_closing_leaves_no_descriptor_behind() -> None:
    before = _open_fds()
    memory = SharedMemory.create("pd-test", 4096)
    assert _open_fds() != before
    memory.close()
    memory.close()
    assert _open_fds() == before


def test_closing_under_a_living_array_leaves_the_array_usable() -> None:
    before = _open_fds()
    memory = SharedMemory.create("pd-test", 4096)
    array = np.frombuffer(memory.buffer, np.uint8)
    memory.close()
    array[:] = 7
    assert int(array.sum()) == 7 * 4096
    del array, memory
    assert _open_fds() == before


def test_the_size_of_shared_memory_cannot_be_changed_by_anybody() -> None:
    with SharedMemory.create("pd-test", 8192) as memory, pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)


@pytest.mark.parametrize("seal", [True, False])
def test_memory_that_its_owner_could_shrink_is_refused(seal: bool) -> None:
    before = _open_fds()
    fd = os.memfd_create("pd-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        SharedMemory.attach(fd, 4096).close()
    else:
        with pytest.raises(ProtocolError, match="sealed"):
            SharedMemory.attach(fd, 4096)
    assert _open_fds() == before


def test_memory_of_another_size_or_kind_is_refused(tmp_path: Path) -> None:
    before = _open_fds()
    with SharedMemory.create("pd-test", 4096) as memory, pytest.raises(ProtocolError, match="4096 bytes"):
        SharedMemory.attach(os.dup(memory.fd), 8192)
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(4096))
    with pytest.raises(ProtocolError, match=r"not a memfd|not sealed"):
        SharedMemory.attach(os.open(plain, os.O_RDWR), 4096)
    assert _open_fds() == before


def test_a_message_without_a_descriptor_or_cut_short_is_refused_and_leaks_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = _open_fds()
        ours.sendall(b"\x01\x00\x00\x00x")
        with pytest.raises(ProtocolError):
            recv_fd(theirs)
        theirs.recv(16)
        socket.send_fds(ours, [b"\x05\x00\x00\x00ab"], [ours.fileno()])
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError, match="middle"):
            recv_fd(theirs)
        assert _open_fds() == before


def test_a_received_descriptor_is_not_inherited_by_children() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, SharedMemory.create("pd-test", 4096) as memory:
        send_fd(ours, memory.fd, b"p")
        fd, payload = recv_fd(theirs)
        assert payload == b"p" and not os.get_inheritable(fd)
        os.close(fd)


def test_the_peer_of_a_unix_socket_is_known_by_the_kernel() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        credentials = peer_credentials(ours)
    assert (credentials.pid, credentials.uid) == (os.getpid(), os.getuid())
