"""Randomness as a function of keys: no global state, so resume is exact and the number of processes does not matter.

Two forms. `keyed_generator` gives a torch generator for a purpose at a step. `keyed_uniform` gives numbers that belong
to an image (a counter-based hash, as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): any
process computes the numbers of any image without drawing those of the others.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd constant of the splitmix64 stream (Steele et al., OOPSLA 2014)


def hashed_seed(*key: int | str) -> int:
    """Maps a key of integers and words to a seed in [0, 2^63), the same on every machine."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Gives a fresh torch generator that depends on the key alone."""
    return torch.Generator(device=device).manual_seed(hashed_seed(*key))


def keyed_permutation(n: int, *key: int | str) -> np.ndarray:
    """Gives a permutation of range(n) (int64) that depends on the key alone."""
    return np.random.Generator(np.random.Philox(hashed_seed(*key))).permutation(n)


def keyed_uniform(counter: np.ndarray, slots: int, *key: int | str) -> np.ndarray:
    """Gives `slots` uniform numbers in [0, 1) for every counter, a function of (key, counter, slot) alone.

    Args:
        counter: Integers of any shape, say image indices.
        slots: How many numbers each counter gets.
        key: The run's seed, the epoch, the view and so on.

    Returns:
        float64 array of shape (*counter.shape, slots), with 53 random bits each.
    """
    with np.errstate(over="ignore"):  # uint64 wraps around, as the hash wants
        stream = _mix(counter.astype(np.uint64) * _GOLDEN + np.uint64(hashed_seed(*key)))
        bits = _mix(stream[..., None] + _GOLDEN * np.arange(1, slots + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
