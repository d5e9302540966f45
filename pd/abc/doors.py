"""The connection that a backend may keep from each sender to each receiver: who it is, that it lives, and a few words.

For engines that know neither strangers nor peers that leave. A sender calls before its first write and closes after its
last; the kernel closes for one that dies, when no thread of it is in a system call any more. So the end of a call means
that nothing of this sender is under way. Both sides prove that they know the cluster's secret, if there is one, before
either says anything else. The words are the backend's own and are not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from pd.abc.hosts import reachable_address
from pd.abc.transfer import BackendContext
from pd.errors import BackendUnavailable, PdError, PeerLost

#: Seconds for each message of a handshake, and its most bytes.
HANDSHAKE_TIMEOUT, MAX_MESSAGE = 3.0, 1 << 20

#: Callers whose handshake is not over; more are hung up on at once.
UNPROVEN_LIMIT = 64

NONCE = 16

#: Seconds of silence until a probe, between probes, and how many: how a host that vanished is noticed.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))

#: What a handshake with somebody else, or with nobody, ends in: ValueError also for what is no text, RecursionError for
#: what is nested without end.
FAILURES = (OSError, OverflowError, ValueError, RecursionError)

T = TypeVar("T")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="pd-door/1"):
    """`backend`: both sides are of one kind."""

    backend: str
    sender: str
    receiver: str
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, array_like=True):
    nonce: bytes
    proof: bytes


class Introduction(msgspec.Struct, frozen=True, array_like=True):
    words: bytes
    proof: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    words: bytes = b""
    refused: str = ""


def _send(sock: socket.socket, message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    sock.sendall(struct.pack("!I", len(data)) + data)


def _receive(sock: socket.socket, kind: type[T]) -> T:
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT
    (length,) = struct.unpack("!I", _exactly(sock, 4, deadline))
    if length > MAX_MESSAGE:
        raise ConnectionError(f"a message of {length} bytes")
    return msgspec.msgpack.decode(_exactly(sock, length, deadline), type=kind)


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Also from somebody who sends byte by byte."""
    data = bytearray()
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("it ended the connection")
        data += piece
    sock.settimeout(HANDSHAKE_TIMEOUT)
    return bytes(data)


def _proof(key: bytes, role: str, hello: Hello, nonce: bytes, words: bytes = b"") -> bytes:
    return hmac.digest(key, msgspec.msgpack.encode((role, hello, nonce, words)), "sha256")


def _check(proof: bytes, *what: Any) -> None:
    if not hmac.compare_digest(proof, _proof(*what)):
        raise ConnectionError("it does not know this cluster's secret")


class Call:
    """A sender's end. It dials in a thread of its own, so that a peer which hangs holds up nobody."""

    def __init__(
        self, context: BackendContext, backend: str, sender: str, receiver: str, address: tuple[str, int], words: bytes
    ) -> None:
        self._key, self._address, self._introduction = context.secret or b"", address, words
        self._hello = Hello(backend, sender, receiver, os.urandom(NONCE))
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._closed = False
        self._failure = ""
        self._over = threading.Event()
        self.words = b""  # the receiver's, once answered
        threading.Thread(target=self._run, name=f"pd-{backend}-call", daemon=True).start()

    def wait(self, timeout: float) -> bool:
        """Whether the handshake is over within `timeout` seconds, well or not: see `end`."""
        return self._over.wait(timeout)

    def answer(self) -> bytes:
        """What the receiver says, which is waited for. Raises PeerLost, after which the call is closed."""
        if not self.wait(HANDSHAKE_TIMEOUT) or not self.answered:
            self.close()
            raise PeerLost(self._hello.receiver, self.end or "it does not answer")
        return self.words

    @property
    def answered(self) -> bool:
        """Whether the receiver has answered. `words` is what it said."""
        return self._over.is_set() and not self._failure

    @property
    def end(self) -> str:
        """Why it failed or is over; "" while it is under way, or goes on."""
        if not self._over.is_set() or self._failure:
            return self._failure
        sock = self._sock
        try:  # the receiver never sends after its welcome
            return "it closed the connection" if sock is None or sock.recv(1, socket.MSG_PEEK) == b"" else ""
        except BlockingIOError:
            return ""
        except OSError as error:
            return str(error)

    @property
    def local_host(self) -> str:
        """The address here from which the receiver was reached. Only of a call that was answered."""
        assert self._sock is not None
        return str(self._sock.getsockname()[0])

    def close(self) -> None:
        """Tells the receiver that nothing of this sender is under way: stop the engine before."""
        with self._lock:
            self._closed = True
            if self._sock is not None:
                self._sock.close()
                self._sock = None

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                sock = stack.enter_context(socket.create_connection(self._address, timeout=HANDSHAKE_TIMEOUT))
                self.words = self._shake_hands(sock)
                sock.setblocking(False)  # from now on it is only looked at
                with self._lock:
                    if not self._closed:
                        self._sock = sock
                        stack.pop_all()
        except FAILURES as error:
            self._failure = str(error) or type(error).__name__
        finally:
            self._over.set()

    def _shake_hands(self, sock: socket.socket) -> bytes:
        key, hello = self._key, self._hello
        _send(sock, hello)
        challenge = _receive(sock, Challenge)
        _check(challenge.proof, key, "receiver", hello, challenge.nonce)
        words = self._introduction
        _send(sock, Introduction(words, _proof(key, "sender", hello, challenge.nonce, words)))
        welcome = _receive(sock, Welcome)
        if welcome.refused:
            raise ConnectionError(welcome.refused)
        return welcome.words


@dataclass(eq=False)
class Caller:
    """A sender, as the receiver knows it. `kept` is the backend's, from `admit` to `leave`.

    `host` is the sender's address, `reached` the one here that it dialled.
    """

    sock: socket.socket
    host: str
    reached: str
    identity: str = ""  # "" until the handshake is over
    words: bytes = b""
    kept: Any = None
    admitted: bool = False


class Door:
    """The receiver's end: which senders are connected.

    `admit(caller)` is called in a thread of the caller's own when it has proved who it is, returns the words of the
    answer, and raises a PdError to refuse. `leave(caller)` is called once for each that was admitted, when it has gone
    or is cut off; one that raised a PdError is called again by the next `cut`. Raises BackendUnavailable where it
    cannot bind; nobody is answered before `start`.
    """

    def __init__(
        self,
        context: BackendContext,
        backend: str,
        identity: str,
        admit: Callable[[Caller], bytes],
        leave: Callable[[Caller], None] = lambda caller: None,
    ) -> None:
        self._backend, self._identity, self._admit, self._leave = backend, identity, admit, leave
        self._key, self._log = context.secret or b"", context.log
        self._lock = threading.Lock()
        self._ending = threading.Lock()  # whoever has had it knows that every `leave` begun before is over
        self._callers: dict[Caller, None] = {}  # as they came
        self._expelled: set[str] = set()
        self._vanished: set[str] = set()
        self._closed = False
        self._threads: list[threading.Thread] = []
        host = context.data_host
        try:
            with contextlib.ExitStack() as stack:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._listener = stack.enter_context(socket.socket(family))
                self._listener.bind((host, 0))
                stack.pop_all()
        except OSError as error:
            remedy = "--control-host must be an address of this host"
            raise BackendUnavailable(backend, f"cannot bind to {host}: {error}", remedy) from error
        self.host, self._port = self._listener.getsockname()[:2]

    @property
    def address(self) -> tuple[str, int]:
        """Where peers reach it."""
        return reachable_address(self.host), self._port

    def start(self) -> None:
        self._listener.listen(128)
        self._spawn(self._accept)

    def _spawn(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, name=f"pd-{self._backend}-door", daemon=True)
        with self._lock:
            self._threads = [*(one for one in self._threads if one.is_alive()), thread]
            thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, there = self._listener.accept()
            except OSError as error:  # closed, or out of descriptors: then the connection waits
                if not self._closed:
                    self._log("cannot accept a sender", reason=str(error))
                    time.sleep(0.05)
                continue
            caller = Caller(sock, there[0], sock.getsockname()[0])
            with self._lock:
                if self._closed or sum(not one.identity for one in self._callers) >= UNPROVEN_LIMIT:
                    sock.close()
                    continue
                self._callers[caller] = None
            self._spawn(self._serve, caller)

    def _serve(self, caller: Caller) -> None:
        with caller.sock as sock:
            try:
                sock.settimeout(HANDSHAKE_TIMEOUT)
                identity = self._shake_hands(sock, caller)
                welcome = self._welcome(caller, identity)
                _send(sock, welcome)
                if not welcome.refused:
                    self._watch(sock)
            except (*FAILURES, PdError) as error:
                if caller.admitted and not isinstance(error, ConnectionError):
                    self._vanished.add(caller.identity)  # its host does not answer, which does not say that it is dead
                self._log("a sender's connection ended", sender=caller.identity, reason=str(error))
            finally:
                try:
                    self._end(caller)
                except PdError as error:
                    self._log("a sender that has gone may still write", sender=caller.identity, reason=str(error))

    @staticmethod
    def _watch(sock: socket.socket) -> None:
        """Until it ends."""
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        while sock.recv(64):
            pass

    def _shake_hands(self, sock: socket.socket, caller: Caller) -> str:
        hello, nonce = _receive(sock, Hello), os.urandom(NONCE)
        if (hello.backend, hello.receiver) != (self._backend, self._identity):
            raise ConnectionError(f"looks for {hello.backend} of {hello.receiver}")
        if not hello.sender:
            raise ConnectionError("has no name")
        _send(sock, Challenge(nonce, _proof(self._key, "receiver", hello, nonce)))
        introduction = _receive(sock, Introduction)
        _check(introduction.proof, self._key, "sender", hello, nonce, introduction.words)
        caller.words = introduction.words
        return hello.sender

    def _welcome(self, caller: Caller, identity: str) -> Welcome:
        """Known under its name from before `admit` on, so that it can be cut off."""
        with self._lock:
            if self._closed or identity in self._expelled:
                return Welcome(refused="it takes nothing from this sender any more")
            caller.identity = identity
        try:
            words = self._admit(caller)
        except PdError as error:
            self._log("a sender is refused", sender=identity, reason=str(error))
            return Welcome(refused=str(error))
        with self._lock:
            caller.admitted = caller in self._callers and identity not in self._expelled
        if caller.admitted:
            return Welcome(words)
        self._leave(caller)  # it was cut off or expelled meanwhile
        return Welcome(refused="it takes nothing from this sender any more")

    def _end(self, caller: Caller) -> None:
        """Not known any more when this returns: raises what `leave` raises."""
        try:
            with self._ending:
                with self._lock:
                    admitted = caller.admitted and caller in self._callers
                    if not admitted:
                        self._callers.pop(caller, None)
                if admitted:
                    self._leave(caller)
                    with self._lock:
                        self._callers.pop(caller, None)
        finally:
            with contextlib.suppress(OSError):
                caller.sock.shutdown(socket.SHUT_RDWR)

    def callers(self, identity: str = "") -> list[Caller]:
        """Who is connected, as they came: all that have proved who they are, or those of one sender."""
        with self._lock:
            return [one for one in self._callers if one.identity and identity in ("", one.identity)]

    def cut(self, identity: str, before: Caller | None = None) -> None:
        """End the calls of one sender, or those that came before one; `leave` is over for each when this returns.

        One that `admit` is busy with is refused when that returns, and left then.
        """
        found = self.callers(identity)
        if before is not None:  # which may have been cut itself, by one that came later
            found = found[: found.index(before)] if before in found else []
        for caller in found:
            self._end(caller)

    def expel(self, identity: str) -> bool:
        """Take no call of this sender any more, and ask it to end those that it has.

        True when it has ended them itself, was cut, or never called: nothing of it is under way that `leave` has not
        ended. A host that vanished without a word never ends them.
        """
        with self._lock:
            self._expelled.add(identity)
        with self._ending:
            found = self.callers(identity)
        for caller in found:
            with contextlib.suppress(OSError):
                caller.sock.shutdown(socket.SHUT_WR)  # it sees that before its next write, and closes
        return not found and identity not in self._vanished

    def close(self) -> None:
        """Cut off everybody. Raises nothing: what `leave` raises is in the log."""
        with self._lock:
            self._closed = True
            callers, threads = list(self._callers), list(self._threads)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
        for caller in callers:
            try:
                self._end(caller)
            except PdError as error:
                self._log("a sender may still write", sender=caller.identity, reason=str(error))
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()
