"""Named random streams: where random numbers come from.

A stream is chosen by a seed, a name and a path of integers, such as span and epoch. The same three give the same
numbers on every machine; streams that differ in any of them are independent. The name says what the numbers are for,
so each use of randomness has a name of its own: two uses of one name would draw the same numbers.

NumPy's SeedSequence mixes seed, name and path. A part of the program that draws for several purposes gets a seed of
its own (`stream_seed`): the tables of a model, for example, are seeded with `stream_seed(seed, "items")` and
`stream_seed(seed, "users")`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

STATE_WORDS = 624  # of the Mersenne Twister, PyTorch's generator on the CPU
STATE_OFFSET = 24  # bytes before them in what `torch.Generator.get_state` returns
NONZERO_WORD = 0x80000000  # in place of the first word, as NumPy does it: the state must not be all zeros


def stream(seed: int, name: str, *path: int) -> torch.Generator:
    """A PyTorch generator on the CPU, at the beginning of the stream.

    All integers are allowed, also negative ones and those of more than 64 bits. The whole state is set, because
    PyTorch's `manual_seed` uses 32 bits of a seed only: of 100,000 streams, two would probably be the same.
    """
    generator = torch.Generator()
    state = generator.manual_seed(0).get_state()
    words = _seed_sequence(seed, name, path).generate_state(STATE_WORDS)
    words[0] = NONZERO_WORD
    state.numpy()[STATE_OFFSET : STATE_OFFSET + 8 * STATE_WORDS].view(np.uint64)[:] = words
    return generator.set_state(state)


def numpy_stream(seed: int, name: str, *path: int) -> np.random.Generator:
    """A NumPy generator at the beginning of the stream; its numbers are not those of `stream`."""
    return np.random.default_rng(_seed_sequence(seed, name, path))


def stream_seed(seed: int, name: str, *path: int) -> int:
    """An integer of 63 bits as the seed of a part of the program, or of another library."""
    return int(_seed_sequence(seed, name, path).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def global_stream(seed: int, name: str, *path: int) -> Iterator[None]:
    """Within it, draws without a generator come from the stream: initial weights of `torch.nn` layers, dropout.

    On the CPU, the process goes on afterwards as if nothing had been drawn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, name, *path))  # for accelerators, which have generators of their own
        torch.set_rng_state(stream(seed, name, *path).get_state())
        yield


def _seed_sequence(seed: int, name: str, path: tuple[int, ...]) -> np.random.SeedSequence:
    """Seed, name and path as 32-bit words, mixed.

    Lengths stand before what they measure, so no two of (seed, name, path) are written as the same words.
    """
    encoded_name = name.encode()
    parts = [[len(path)], _number_words(seed), [len(encoded_name)], _words(encoded_name), *map(_number_words, path)]
    return np.random.SeedSequence(np.concatenate([np.asarray(part, np.uint32) for part in parts]))


def _number_words(number: int) -> npt.NDArray[np.uint32]:
    """How many words its magnitude has, its sign (0 or 1), and its magnitude, the lowest word first."""
    n_words = -(-abs(number).bit_length() // 32)
    magnitude = _words(abs(number).to_bytes(4 * n_words, "little"))
    return np.concatenate([np.asarray([n_words, int(number < 0)], np.uint32), magnitude])


def _words(content: bytes) -> npt.NDArray[np.uint32]:
    """Bytes as little-endian 32-bit words, the last one filled up with zeros."""
    return np.frombuffer(content + b"\0" * (-len(content) % 4), "<u4").astype(np.uint32)
