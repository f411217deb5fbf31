"""Import custom models and strategies, named "their_package.module:Thing". This module does not import torch.

Only a person names modules: in an option, in FRESHREC_IMPORT or in a recipe. A store never causes an import.
"""

import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from freshrec.errors import OptionError, unknown_name_error

IMPORTS = "FRESHREC_IMPORT"  # environment variable: modules that commands import first, separated by commas
ALLOW_IMPORT = "--allow-import"  # the option of commands that open a store; it does the same


@dataclass(frozen=True)
class Interface:
    """The interface of a custom model or strategy."""

    protocol: type
    method: str  # the method of the protocol, for messages


def import_instance(kind: str, name: str, valid: Iterable[str], interface: Interface | None) -> Any:
    """Import "their_package.module:Thing" or "their_package.module.Thing". Raises OptionError if that fails."""
    module, mark, attribute = name.rpartition(":" if ":" in name else ".")
    if not mark:
        raise unknown_name_error(kind, name, valid)
    try:
        found = vars(import_named(module))[attribute]
    except (ImportError, KeyError, ValueError) as problem:
        reason = "the module has no such name" if isinstance(problem, KeyError) else problem
        raise OptionError(
            f'{kind.capitalize()} "{name[:60]}": cannot import "{attribute}" from "{module}" ({reason}). '
            "Check both names."
        ) from None
    return as_instance(kind, name, found, interface) if interface else found


def as_instance(kind: str, name: str, found: Any, interface: Interface) -> Any:
    """Return `found`, or an instance of it if it is a class. Raises OptionError if it does not have the interface."""
    instance = found
    if isinstance(found, type):
        try:
            inspect.signature(found).bind()
        except (TypeError, ValueError):
            raise OptionError(
                f'{kind.capitalize()} "{name[:60]}" is a class that needs arguments. Give them defaults, or name an '
                "instance."
            ) from None
        instance = found()
    if not isinstance(instance, interface.protocol):
        raise OptionError(
            f'{kind.capitalize()} "{name[:60]}" has no method {interface.method}. Add it, or name another class.'
        )
    return instance


def import_named(module: str) -> ModuleType:
    """Import a module that the user names. It may be in the current folder, which `freshrec` would not search."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that it hides no other module
    return importlib.import_module(module)


def is_module_name(name: str) -> bool:
    """Whether `name` can be the name of a module, such as my_model or shop.models."""
    return all(part.isidentifier() for part in name.split("."))


def import_allowed(modules: Iterable[str], source: str) -> None:
    """Import the modules that the user allows. `source` is the option or variable that names them.

    Raises OptionError for a module that does not exist.
    """
    for module in modules:
        if not is_module_name(module):
            raise OptionError(f'{source} is "{module[:60]}", which is not a module. Write a name such as my_model.')
        try:
            import_named(module)
        except ImportError as problem:
            raise OptionError(f"{source} names {module}, which cannot be imported ({problem}). Correct it.") from None
