#!/usr/bin/env python3
"""The first number of a keyed random stream, computed apart from src/random.rs: python3 scripts/random_stream.py

ChaCha as in RFC 8439 with 8 rounds instead of 20 and a 64-bit block counter; the key is SHA-256 of the parts listed in
src/random.rs. Prints the number that its test expects.
"""

import hashlib
import struct


def key(seed: int, use: str, words: list[int], name: str) -> bytes:
    head = use.encode() + b"\0" + struct.pack("<QQ", seed, len(words))
    return hashlib.sha256(head + b"".join(struct.pack("<Q", word) for word in words) + name.encode()).digest()


def chacha_block(key: bytes, rounds: int) -> bytes:
    start = list(struct.unpack("<4I", b"expand 32-byte k")) + list(struct.unpack("<8I", key)) + [0, 0, 0, 0]
    x = start[:]

    def step(a: int, b: int, d: int, shift: int) -> None:
        x[a] = (x[a] + x[b]) & 0xFFFFFFFF
        mixed = x[d] ^ x[a]
        x[d] = ((mixed << shift) | (mixed >> (32 - shift))) & 0xFFFFFFFF

    def quarter(a: int, b: int, c: int, d: int) -> None:
        step(a, b, d, 16), step(c, d, b, 12), step(a, b, d, 8), step(c, d, b, 7)

    for _ in range(rounds // 2):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return struct.pack("<16I", *[(a + b) & 0xFFFFFFFF for a, b in zip(start, x)])


print(hex(struct.unpack("<Q", chacha_block(key(42, "shuffle", [1], "x"), 8)[:8])[0]))
