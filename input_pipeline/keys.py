"""Random numbers that depend on nothing but their key, so rows are the same for any number of threads or processes.

Planning draws millions of numbers, and a numpy generator an image would cost 10 us each: these are hashes of
(seed, stream, counter), vectorised, about 20 ns each. Pixel work uses a real generator an example (`generator`).
"""

from collections.abc import Iterator

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def bits(seed: int, stream: str, counter: np.ndarray) -> np.ndarray:
    """64 random bits for each counter; streams of different names are independent. counter: integers, any shape."""
    name = np.uint64(int.from_bytes(stream.encode()[:8].ljust(8, b"\0"), "little"))
    with np.errstate(over="ignore"):
        base = _mix(_mix(np.atleast_1d(np.uint64(seed % 2**64) + _GOLDEN)) ^ name)
        return _mix(base + _GOLDEN * (np.asarray(counter).astype(np.uint64) + np.uint64(1)))


def uniform(seed: int, stream: str, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) for each counter (never 1)."""
    return (bits(seed, stream, counter) >> np.uint64(11)) * 2.0**-53


def generator(seed: int, stream: str, counter: int) -> np.random.Generator:
    """A numpy generator for one example's pixel work."""
    return np.random.Generator(np.random.Philox(key=int(bits(seed, stream, np.array([counter]))[0])))


def generators(seed: int, stream: str, counters: np.ndarray) -> Iterator[np.random.Generator]:
    """`generator` for each of the counters [n], in turn: use one before the next is taken, as they are one object.

    Making a generator costs 30 us, most of it to hash a single number and to ask the system for a seed; this costs 2.
    """
    philox, zeros = np.random.Philox(key=0), np.zeros(4, np.uint64)
    one = np.random.Generator(philox)
    for key in bits(seed, stream, counters):
        state = dict(counter=zeros, key=np.array([key, 0], np.uint64))
        philox.state = dict(bit_generator="Philox", state=state, buffer=zeros, buffer_pos=4, has_uint32=0, uinteger=0)
        yield one


def permute(position: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where each position of [0, size) goes in the epoch's shuffle, without making the whole permutation.

    A four-round Feistel network over the next power of two, walked until the value falls below `size` (under two walks
    on average), so resuming in any epoch costs nothing. position, epoch: int64 [n].
    """
    width = max(2, int(size - 1).bit_length())
    halves = [np.uint64(width - width // 2), np.uint64(width // 2)]  # bits on the right, and on the left
    masks = [(np.uint64(1) << half) - np.uint64(1) for half in halves]
    epochs, which = np.unique(epoch, return_inverse=True)
    keys = [bits(seed, f"shuffle{r}", epochs)[which] for r in range(4)]
    value, todo = np.asarray(position).astype(np.uint64), np.arange(np.size(position))
    while todo.size:
        left, right = value[todo] >> halves[0], value[todo] & masks[0]
        for r, key in enumerate(keys):
            left, right = right, left ^ (_mix(right * _GOLDEN + key[todo]) & masks[1 - r % 2])
        value[todo] = (left << halves[0]) | right
        todo = todo[value[todo] >= np.uint64(size)]
    return value.astype(np.int64)
