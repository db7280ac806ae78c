"""Files made wrong in a way that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Callable

_BIG = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80")


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to three changes to `data`; `other` is a file of the same kind to take pieces from. Never equal to `data`."""
    found = data
    while found == data:
        for _ in range(rng.choice((1, 1, 2, 3))):
            found = rng.choice(_CHANGES)(bytearray(found or b"\0"), other, rng)
    return found


def _flip(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _early_flip(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    """Headers are where sizes are."""
    data[rng.randrange(min(600, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _number(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(min(600, len(data)))
    data[begin : begin + 4] = rng.choice(_BIG)
    return bytes(data)


def _cut(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _remove(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    del data[begin : begin + rng.randint(1, 600)]
    return bytes(data)


def _repeat(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    piece = data[begin : begin + rng.randint(1, 600)]
    return bytes(data[:begin] + piece * rng.randint(2, 50) + data[begin:])


def _noise(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    data[begin : begin + rng.randint(1, 64)] = rng.randbytes(rng.randint(1, 64))
    return bytes(data)


def _zeros(data: bytearray, _other: bytes, rng: random.Random) -> bytes:
    begin, count = rng.randrange(len(data)), rng.randint(1, 600)
    data[begin : begin + count] = bytes(len(data[begin : begin + count]))
    return bytes(data)


def _splice(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))]) + other[rng.randrange(len(other)) :]


_CHANGES: tuple[Callable[[bytearray, bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _early_flip, _early_flip, _number, _number),
    *(_cut, _remove, _repeat, _noise, _zeros, _splice),
)
