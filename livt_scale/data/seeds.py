"""One random generator for each sample and purpose, and no other source of randomness.

A crop, a mask or a mixup ratio is a function of (run seed, epoch, sample key, purpose). It does not know the rank,
the worker, the place in the batch or what was drawn before it, so a run that is resumed, or continued on another
number of GPUs, draws the same numbers, and no two epochs, samples or purposes share theirs:

    >>> sample_rng(7, 3, "img-12", "crop").random() == sample_rng(7, 3, "img-12", "crop").random()
    True

Philox (Salmon et al. 2011) is counter-based: any key gives a good stream immediately, without a warm-up.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def sample_rng(seed: int, epoch: int, key: str, purpose: str) -> np.random.Generator:
    """The generator for one `purpose` ("crop", "noise", "mix" …) of the sample `key` in `epoch`."""
    key_sequence = _Key(_digest(seed, epoch, key, purpose))
    return np.random.Generator(np.random.Philox(key_sequence))  # type: ignore[arg-type] # NumPy's stub lacks ISeedSequence


class _Key(ISeedSequence):
    """Hands Philox its 128 bits. `Philox(key=…)` gives the same, but asks the system for entropy first: 9 µs, not 3."""

    def __init__(self, digest: bytes) -> None:
        self._key = np.frombuffer(digest, dtype="<u8")

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert (n_words, np.dtype(dtype)) == (2, np.dtype(np.uint64)), "what Philox asks for"
        return self._key


def view_key(key: str, view: int) -> str:
    """Stands for `key` where a sample comes more than once in an epoch: each view has its own random numbers.

    View 0 is the key itself. No other key collides: the names of files in a tar hold no NUL.
    """
    return f"{key}\0{view}" if view else key


def _digest(seed: int, epoch: int, key: str, purpose: str) -> bytes:
    """128 bits of BLAKE2b; lengths go first, so that ("ab", "c") and ("a", "bc") differ."""
    name, use = key.encode("utf-8", "surrogateescape"), purpose.encode()
    head = struct.pack("<QQII", seed & 0xFFFFFFFFFFFFFFFF, epoch, len(name), len(use))
    return hashlib.blake2b(head + name + use, digest_size=16).digest()


@contextlib.contextmanager
def python_rng_from(seed: int) -> Iterator[None]:
    """Seed Python's global generator inside the block; put it back after it.

    For libraries that draw from it (timm's operations of RandAugment), so that they too depend on the sample alone.
    """
    state = random.getstate()
    try:
        random.seed(seed)
        yield
    finally:
        random.setstate(state)
