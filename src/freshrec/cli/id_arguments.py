"""Ids on the command line: those that start with `-`, and lists of ids that may hold commas."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from freshrec.errors import OptionError

QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?:,|$)')
PLAIN = re.compile(r"([^,]*)(?:,|$)")


def parse_ids(lists: Iterable[str]) -> list[str]:
    """Parse lists such as `a,b`. As in CSV, an id between quotation marks may hold commas: `"a,b",c`.

    Blanks around an id are dropped, unless it is quoted. Raises OptionError for a quotation mark that is not closed.
    """
    found = []
    for text in lists:
        place = 0
        while place < len(text):
            if quoted := QUOTED.match(text, place):
                found.append(quoted[1].replace('""', '"'))
                place = quoted.end()
                continue
            plain = PLAIN.match(text, place)
            assert plain is not None
            if plain[1].lstrip().startswith('"'):
                raise OptionError(
                    f'The quotation mark in {text[place:][:60]} has no end before a comma. Write "a,b" for the id a,b, '
                    'and two marks ("") for each mark in an id.'
                )
            found += [plain[1].strip()] if plain[1].strip() else []
            place = plain.end()
    return found


def separate_ids(arguments: Sequence[str], parameters: Iterable[Any]) -> list[str]:
    """Move ids that start with one `-` behind `--`, so that they are not read as options.

    `arguments` follow the name of a command, and `parameters` are those of its click command. Such an argument is an id
    if it is no option. Raises OptionError for an option with one `-` too few.
    """
    takes_value = {
        name: not option.is_flag
        for option in parameters
        if option.param_type_name == "option"
        for name in (*option.opts, *option.secondary_opts)
    } | {"--help": False}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, ids = [], list[str]()
    words = iter(arguments[:end])
    for word in words:
        if _is_option(word, takes_value):
            options.append(word)
            if takes_value.get(word):
                options += [value for value in [next(words, None)] if value is not None]
        else:
            ids.append(word)
    return [*options, "--", *ids, *arguments[end + 1 :]]


def _is_option(word: str, names: Collection[str]) -> bool:
    """Whether a word of the command line is an option. An unknown one with two `-` is, so that it is refused."""
    if word.startswith("--") or word[:2] in names:
        return True
    if not word.startswith("-"):
        return False
    if f"-{word.partition('=')[0]}" in names:
        raise OptionError(f'There is no option "{word[:60]}". Did you mean "-{word[:60]}"? Write -- before an id.')
    return False
