"""The TOML files of recipes: a path, or the name of a recipe that is part of freshrec. Imports nothing heavy."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freshrec.errors import OptionError, close_name, suggest_name

PACKAGE = Path(__file__).resolve().parent.parent


def recipe_folder() -> Path:
    """Return the folder of the recipes of freshrec: in the installed package, or next to src in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the recipes of freshrec, in alphabetical order."""
    return sorted(file.stem for file in recipe_folder().glob("*.toml"))


def describe_recipes() -> dict[str, str]:
    """Return what each recipe of freshrec is, by name: its first comment without the command that repeats it."""
    return {name: _first_comment((recipe_folder() / f"{name}.toml").read_text()) for name in recipe_names()}


def _first_comment(text: str) -> str:
    lines = re.match(r"(#.*\n)*", text)
    assert lines is not None
    sentences = (line.removeprefix("#").strip() for line in lines[0].splitlines())
    return " ".join(sentence for sentence in sentences if not sentence.startswith("make "))


def find_recipe(name: str | Path) -> Path:
    """Return the path of a recipe: a file, or else the recipe of freshrec with this name. ".toml" may be left out.

    Raises OptionError for anything else. The message names a close recipe of freshrec, if there is one.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir() and len(path.parts) > 1:
        raise OptionError(f"The recipe {path} cannot be read (Is a directory). Check the path.")
    stem = path.name.removesuffix(".toml")
    if str(path) in (stem, f"{stem}.toml") and stem in recipe_names():
        return recipe_folder() / f"{stem}.toml"
    close = close_name(stem, recipe_names())
    hint = f' Did you mean "{close}"?' if close else ""
    raise OptionError(f"There is no file {path}. Check the path, or use a recipe of `freshrec list recipes`.{hint}")


def merge_tables(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `tables`, section by section. Its keys win, and a list replaces a list."""
    merged = dict(tables)
    for section, table in changes.items():
        old = merged.get(section)
        merged[section] = old | table if isinstance(old, dict) and isinstance(table, dict) else table
    return merged


def read_tables(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the tables of a file, merged into those of the recipe that it extends.

    `children`: the files that led here. Raises OptionError for invalid TOML, and for an unknown or circular `extends`.
    """
    if path in children:
        raise OptionError(f"{path} extends itself, through {children[-1]}. Remove one `extends`.")
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as problem:
        raise OptionError(f"The recipe {path} cannot be read ({problem.strerror}). Check the path.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise OptionError(f"The recipe {path} is not valid TOML ({problem}). Correct it.") from None
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    return merge_tables(read_tables(_parent_file(path, parent), (*children, path)), tables)


def _parent_file(path: Path, parent: Any) -> Path:
    """Return the file that a recipe extends: in its folder, or else a recipe of freshrec."""
    folders = (path.parent, recipe_folder())
    found = [folder / f"{parent}.toml" for folder in folders if (folder / f"{parent}.toml").is_file()]
    if not found:
        names = [file.stem for folder in folders for file in folder.glob("*.toml")]
        raise OptionError(
            f'{path} extends "{parent}", which is not in the folder. {suggest_name(str(parent), set(names))}'
        )
    return found[0]
