"""Keys of the control and data planes, all derived from the one cluster secret."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

# A person chooses the secret, so it is stretched: 16 MiB and some 50 ms for each guess at a recorded handshake.
_SALT = b"pd cluster secret, version 1"
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**14, 8, 1


@dataclass(frozen=True)
class CurveKeyPair:
    """A Curve25519 pair in Z85, as ZMQ takes it."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class ClusterKeys:
    """Every process that knows the secret has both pairs: the listening end of a link uses `server`, the dialling end
    `client`. `data` proves the secret to transfer backends that open connections of their own.
    """

    server: CurveKeyPair
    client: CurveKeyPair
    data: bytes = field(repr=False)


def derive_keys(secret: str) -> ClusterKeys:
    """scrypt (RFC 7914) stretches the secret; keyed BLAKE2b with one personalisation per purpose expands it."""
    root = hashlib.scrypt(secret.encode(), salt=_SALT, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, dklen=32)
    return ClusterKeys(
        server=_key_pair(_expand(root, b"pd-curve-server")),
        client=_key_pair(_expand(root, b"pd-curve-client")),
        data=_expand(root, b"pd-data-plane"),
    )


def _expand(root: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(key=root, person=purpose, digest_size=32).digest()


def _key_pair(seed: bytes) -> CurveKeyPair:
    scalar = bytearray(seed)  # clamped as RFC 7748 §5 says
    scalar[0] &= 248
    scalar[31] &= 127
    scalar[31] |= 64
    secret = z85.encode(bytes(scalar))
    return CurveKeyPair(public=zmq.curve_public(secret), secret=secret)
