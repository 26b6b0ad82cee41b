"""Randomness as a function of keys: no global state, so resume is exact and the number of processes does not matter.

Two forms. `keyed_generator` gives a torch generator for a purpose at a step. `keyed_uniform` gives numbers that belong
to an image (a counter-based hash, as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): any
process computes the numbers of any image without drawing those of the others.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd constant of the splitmix64 stream (Steele et al., OOPSLA 2014)


def hashed_seed(*key: int | str) -> int:
    """Maps a key of integers and words to a seed in [0, 2^63), the same on every machine."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a fresh torch generator that depends on the key alone."""
    return torch.Generator(device=device).manual_seed(hashed_seed(*key))


def keyed_permutation(n: int, *key: int | str) -> np.ndarray:
    """Returns a permutation of range(n) (int64) that depends on the key alone."""
    return np.random.Generator(np.random.Philox(hashed_seed(*key))).permutation(n)


def keyed_uniform(counter: np.ndarray, slots: int, *key: int | str) -> np.ndarray:
    """Returns `slots` uniform numbers in [0, 1) for every counter, a function of (key, counter, slot) alone.

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
    """The splitmix64 finalizer: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def keyed_orders(index_B: torch.Tensor, views: int, slots: int, *key: int | str) -> torch.Tensor:
    """Returns each view of each image an order of `slots` things, a function of (key, image, view), on the device.

    Sorts the bits behind the numbers that `keyed_uniform` gives to the images; nothing is read back to the host.

    Args:
        index_B: Image indices (int64).
        views: V, the orders that each image gets.
        slots: S, how many things are ordered.
        key: The run's seed, the step and so on.

    Returns:
        Permutations of range(S), int64 of shape (V, B, S).
    """
    stream_B = _mix_int64(index_B * _as_int64(_GOLDEN) + hashed_seed(*key))
    slots_S = torch.arange(1, views * slots + 1, device=index_B.device)
    bits_BS = _shift(_mix_int64(stream_B[:, None] + slots_S * _as_int64(_GOLDEN)), 11)
    return bits_BS.unflatten(1, (views, slots)).transpose(0, 1).argsort(-1)


def keyed_normal(seed_N: torch.Tensor, count: int) -> torch.Tensor:
    """Returns `count` standard normal numbers for each seed, a function of (seed, place) alone, on the seeds' device.

    Args:
        seed_N: Keys (int64).
        count: P, how many numbers each gets.

    Returns:
        float32 (N, P), by the transform of Box and Muller (1958).
    """
    half = -(-count // 2)
    places_P = torch.arange(1, 2 * half + 1, device=seed_N.device) * _as_int64(_GOLDEN)
    bits_NP = _shift(_mix_int64(_mix_int64(seed_N[:, None]) + places_P), 40)  # 24 bits, what float32 holds
    uniform_NP = (bits_NP.float() + 0.5) * 2.0**-24
    radius, angle = (-2 * uniform_NP[:, :half].log()).sqrt(), uniform_NP[:, half:] * (2 * torch.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _as_int64(bits: np.uint64) -> int:
    return int(bits.astype(np.int64))


def _mix_int64(x: torch.Tensor) -> torch.Tensor:
    """The same on int64, which wraps around as uint64 does and is what torch can multiply on every device."""
    x = (x ^ _shift(x, 30)) * _as_int64(_FIRST)
    x = (x ^ _shift(x, 27)) * _as_int64(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # without copies of the sign
