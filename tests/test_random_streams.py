"""Named random streams: known numbers, independence, and one name per use in the code."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import freshrec
from freshrec.models.mf import MFSpec
from freshrec.random_streams import global_stream, numpy_stream, stream, stream_seed

SRC = Path(freshrec.__file__).parent
STREAMS = ("stream", "numpy_stream", "stream_seed", "global_stream")

# Names that occur in several places, and the reason. Each place is in another model, and a run has only one model.
SHARED = {
    "items": "the table of item vectors of each model",
    "taken": "the table of items as they stand in a history, in models that have one",
    "users": "the table of user vectors of each model that has one",
    "dense weights": "the layers of each model",
}

# Places where random numbers come from a seed instead of a stream, and the reason.
EXCEPTIONS = {
    "data/log.py": "the sample of users is part of the protocol: published results are for these users",
    "data/split.py": "the forgotten users and the drawn targets are part of the protocol",
    "data/synthetic.py": "the worlds are part of the protocol",
    "replay/measure.py": "the sampled negatives are part of the protocol",
    "replay/significance.py": "published intervals and p-values come from these draws",
}
SEEDING = (
    "manual_seed",
    "manual_seed_all",
    "seed",
    "default_rng",
    "RandomState",
    "Random",
    "splitmix64",
    "SeedSequence",
)


def stream_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of each stream that a file opens. The name is "" if it is not a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in STREAMS:
            second = node.args[1] if len(node.args) > 1 else None
            is_literal = isinstance(second, ast.Constant) and isinstance(second.value, str)
            yield node.lineno, second.value if is_literal else ""


def seedings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, call) of each call that makes random numbers from a seed without a stream."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            seeds = [word for word in node.keywords if word.arg == "seed" and called.endswith(".sample")]
            own = any("stream_seed" not in ast.unparse(word.value) for word in seeds)
            if called.rpartition(".")[2] in SEEDING or own or called.startswith(("np.random.", "random.")):
                yield node.lineno, called


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Path and syntax tree of each file of src/freshrec except random_streams.py."""
    for path in sorted(SRC.rglob("*.py")):
        if path.name != "random_streams.py":
            yield path.relative_to(SRC).as_posix(), ast.parse(path.read_text())


def test_a_stream_gives_the_recorded_numbers() -> None:
    # recorded once: every machine and every version of NumPy and PyTorch must give the same numbers
    drawn = torch.randint(0, 2**31, (4,), generator=stream(0, "items", 3))
    assert drawn.tolist() == [2060132607, 463492877, 1479635201, 1015561632]
    assert numpy_stream(0, "items", 3).integers(0, 2**31, 4).tolist() == [1961840467, 989967733, 733853311, 94232868]
    assert stream_seed(0, "items", 3) == 5186829896035349657


def test_a_stream_has_the_whole_state_that_numpy_gives_the_same_generator() -> None:
    # words: 1 number in the path; seed 0 has no words and no sign; 2 bytes of name; -5 has 1 word and a sign.
    # NumPy's Mersenne Twister starts from the same 624 words; PyTorch's small integers are its outputs, modulo
    words = np.random.SeedSequence([1, 0, 0, 2, int.from_bytes(b"ab", "little"), 1, 1, 5]).generate_state(624)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": np.r_[np.uint32(2**31), words[1:]], "pos": 624}}
    drawn = torch.randint(0, 2**20, (700,), generator=stream(0, "ab", -5))
    assert drawn.tolist() == [int(twister.random_raw()) % 2**20 for _ in range(700)]


def test_no_two_of_ten_thousand_streams_start_with_the_same_number() -> None:
    seeds = [0, 1, 2, -1, 2**32, 2**32 + 1, 2**63, 2**64, 2**64 + 1, -(2**64)]  # 10 seeds x 10 names x 100 paths
    names = ["", "a", "b", "ab", "ba", "a\0", "items", "users", "items ", "Interessen für zwölf"]
    paths = [(), *((n,) for n in range(-9, 10)), *((n, m) for n in range(-2, 6) for m in range(-5, 5))]
    begun = set()
    for seed in seeds:
        for name in names:
            for path in paths:
                begun.add(tuple(torch.randint(0, 2**31, (4,), generator=stream(seed, name, *path)).tolist()))
    assert len(begun) == len(seeds) * len(names) * len(paths) == 10_000


def test_numpy_streams_and_seeds_differ_by_seed_name_and_path_too() -> None:
    ways = [(s, name, *path) for s in (-1, 0, 1, 2**64) for name in ("a", "b") for path in ((), (0,), (-1,), (0, 0))]
    assert len({stream_seed(*way) for way in ways}) == len(ways) == 32
    assert len({tuple(numpy_stream(*way).integers(0, 2**31, 4).tolist()) for way in ways}) == len(ways)
    assert all(0 <= stream_seed(*way) < 2**63 for way in ways)


def test_the_users_of_seed_1_are_not_the_items_of_seed_0() -> None:
    rows = {}
    for seed in (0, 1, 2):
        model = MFSpec(d=4).build(seed)
        model.grow(3, 3)
        rows |= {("users", seed): model.users.weights[1:], ("items", seed): model.items.weights[1:]}
    beginnings = {round(float(row_D[0]), 6) for rows_RD in rows.values() for row_D in rows_RD}
    assert len(beginnings) == 18  # 3 seeds x 2 tables x 3 rows


def test_a_global_stream_repeats_and_does_not_change_later_draws() -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    with global_stream(0, "test", 1):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), undisturbed)
    torch.rand(7)
    with global_stream(0, "test", 1):
        assert torch.equal(torch.rand(3), first)
    with global_stream(0, "test", 2):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3, generator=stream(0, "test", 1)), first)


def test_each_use_of_randomness_has_its_own_name() -> None:
    places: dict[str, list[str]] = {}
    for path, tree in sources():
        for line, name in stream_names(tree):
            assert name, f"src/freshrec/{path}:{line} opens a stream without a literal name; write the name there"
            places.setdefault(name, []).append(f"{path}:{line}")
    again = {name: where for name, where in places.items() if len(where) > 1 and name not in SHARED}
    assert again == {}, "two uses of one name draw the same numbers; rename one, or give the reason in SHARED"
    assert [name for name in SHARED if len(places.get(name, [])) < 2] == []
    for name in SHARED:
        files = [place.partition(":")[0] for place in places[name]]
        assert len(set(files)) == len(files), f'one file uses "{name}" twice'
        assert all(file.startswith("models/") for file in files), name


def test_only_streams_make_random_numbers_from_a_seed() -> None:
    found = {path: list(seedings(tree)) for path, tree in sources()}
    assert {path: calls for path, calls in found.items() if calls and path not in EXCEPTIONS} == {}
    assert [path for path in EXCEPTIONS if path != "data/split.py" and not found[path]] == []
    # `_select_users` of data/split.py hashes by itself, beside the generator that draws targets
    assert [call for _, call in found["data/split.py"]] == ["np.random.default_rng"]


@pytest.mark.parametrize(
    "code",
    [
        "torch.manual_seed(seed)",
        "torch.Generator().manual_seed(seed + 1)",
        "np.random.default_rng((seed, 7))",
        "np.random.rand(3)",
        "random.Random(0)",
        "users.sample(5, seed=seed)",
    ],
)
def test_a_seed_without_a_stream_is_found(code: str) -> None:
    assert len(list(seedings(ast.parse(code)))) >= 1


def test_literal_and_other_names_are_found() -> None:
    code = """
        rng = stream(seed, "holdout", *path)
        table = EmbeddingTable(4, 0.1, stream_seed(seed, "items"))
        with global_stream(seed, f"layer {n}"):
            users.sample(5, seed=stream_seed(0, "compared users"))
    """
    tree = ast.parse(textwrap.dedent(code))
    assert sorted(name for _, name in stream_names(tree)) == ["", "compared users", "holdout", "items"]
    assert list(seedings(tree)) == []
