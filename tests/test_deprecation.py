"""Old names of arguments and flags: what they become, and the one line that says so."""

from __future__ import annotations

import warnings

import pytest

from freshrec.deprecation import UNSET, Unset, replace_old_flags, value_of_renamed

RENAMED = {"fit": {"--old": "--new", "-o": "-n"}}


def public(value: int | None = 1, *, old: int | None | Unset = UNSET) -> int | None:
    """A function whose argument `old` is now `value`."""
    return value_of_renamed("value", value, "old", old)


def test_the_old_name_of_an_argument_sets_the_new_one_and_warns_its_caller_once() -> None:
    with pytest.warns(FutureWarning, match="^old is now called value. The old name still works.$") as caught:
        assert public(old=7) == 7
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(FutureWarning):
        assert public(old=None) is None  # None is a value like others


def test_the_new_name_of_an_argument_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (public(), public(5), public(None)) == (1, 5, None)


@pytest.mark.parametrize(
    ("given", "expected", "n_warnings"),
    [
        (["fit", "--old", "3"], ["fit", "--new", "3"], 1),
        (["fit", "--old=3=4", "-o"], ["fit", "--new=3=4", "-n"], 2),
        (["--flag", "fit", "x", "--old"], ["--flag", "fit", "x", "--new"], 1),
        (["fit", "--older", "--", "--old"], ["fit", "--older", "--", "--old"], 0),  # another flag; no flag
        (["update", "--old"], ["update", "--old"], 0),  # a flag of another command
        (["fit", "old"], ["fit", "old"], 0),
        ([], [], 0),
    ],
)
def test_old_flags_of_a_command_become_its_new_ones(given: list[str], expected: list[str], n_warnings: int) -> None:
    said: list[str] = []
    assert replace_old_flags(given, RENAMED, said.append) == expected
    assert len(said) == n_warnings
    assert set(said) <= {
        "--old is now called --new. The old name still works.", "-o is now called -n. The old name still works.",
    }  # fmt: skip
