"""Named random streams: the source of all random numbers.

A stream is chosen by a seed, a name and a path of integers, such as span and epoch. The same three give the same
numbers on every machine. Streams that differ in any of them are independent. Each use of randomness has its own name,
because two uses with the same name would draw the same numbers.

NumPy's SeedSequence mixes seed, name and path. A component that needs several streams gets its own seed from
`stream_seed`. For example, the tables of a model are seeded with `stream_seed(seed, "items")` and
`stream_seed(seed, "users")`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

STATE_WORDS = 624  # words in the state of the Mersenne Twister, PyTorch's generator on the CPU
STATE_OFFSET = 24  # bytes before these words in the result of `torch.Generator.get_state`
NONZERO_WORD = 0x80000000  # first word of the state, as in NumPy: the state must not be all zeros


def stream(seed: int, name: str, *path: int) -> torch.Generator:
    """Return a PyTorch generator on the CPU, at the beginning of the stream.

    All integers are allowed, including negative ones and those of more than 64 bits. The whole state is set, because
    PyTorch's `manual_seed` uses only 32 bits of a seed: of 100,000 streams, two would probably be equal.
    """
    generator = torch.Generator()
    state = generator.manual_seed(0).get_state()
    words = _seed_sequence(seed, name, path).generate_state(STATE_WORDS)
    words[0] = NONZERO_WORD
    state.numpy()[STATE_OFFSET : STATE_OFFSET + 8 * STATE_WORDS].view(np.uint64)[:] = words
    return generator.set_state(state)


def numpy_stream(seed: int, name: str, *path: int) -> np.random.Generator:
    """Return a NumPy generator at the beginning of the stream. Its numbers differ from those of `stream`."""
    return np.random.default_rng(_seed_sequence(seed, name, path))


def stream_seed(seed: int, name: str, *path: int) -> int:
    """Return a 63-bit integer to seed a component or another library."""
    return int(_seed_sequence(seed, name, path).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def global_stream(seed: int, name: str, *path: int) -> Iterator[None]:
    """Let draws without a generator use the stream: initial weights of `torch.nn` layers, dropout.

    Afterwards, the CPU generator of the process has its previous state again.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, name, *path))  # for accelerators, which have their own generators
        torch.set_rng_state(stream(seed, name, *path).get_state())
        yield


def _seed_sequence(seed: int, name: str, path: tuple[int, ...]) -> np.random.SeedSequence:
    """Mix seed, name and path, written as 32-bit words.

    The length of each part comes before it, so different (seed, name, path) give different words.
    """
    encoded_name = name.encode()
    parts = [[len(path)], _number_words(seed), [len(encoded_name)], _words(encoded_name), *map(_number_words, path)]
    return np.random.SeedSequence(np.concatenate([np.asarray(part, np.uint32) for part in parts]))


def _number_words(number: int) -> npt.NDArray[np.uint32]:
    """Write a number as words: the number of words, the sign (0 or 1), and the magnitude, lowest word first."""
    n_words = -(-abs(number).bit_length() // 32)
    magnitude = _words(abs(number).to_bytes(4 * n_words, "little"))
    return np.concatenate([np.asarray([n_words, int(number < 0)], np.uint32), magnitude])


def _words(content: bytes) -> npt.NDArray[np.uint32]:
    """Return bytes as little-endian 32-bit words, padded with zeros."""
    return np.frombuffer(content + b"\0" * (-len(content) % 4), "<u4").astype(np.uint32)
