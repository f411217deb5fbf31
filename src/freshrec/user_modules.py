"""Models and strategies from modules of the user's own, named "their_package.module:Thing". No torch."""

import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from freshrec.errors import OptionError, unknown_name_error

IMPORTS = "FRESHREC_IMPORT"  # environment variable: modules, separated by commas, that commands import first


@dataclass(frozen=True)
class Interface:
    """What a model or strategy of the user's own must be."""

    protocol: type
    method: str  # of the protocol, for messages


def import_instance(kind: str, name: str, valid: Iterable[str], interface: Interface | None) -> Any:
    """The instance "their_package.module:Thing" or "their_package.module.Thing". OptionError where there is none."""
    module, mark, attribute = name.rpartition(":" if ":" in name else ".")
    if not mark:
        raise unknown_name_error(kind, name, valid)
    try:
        found = vars(import_named(module))[attribute]
    except (ImportError, KeyError, ValueError) as problem:
        reason = "there is no such name" if isinstance(problem, KeyError) else problem
        raise OptionError(f'{kind} "{name[:60]}": cannot import "{attribute}" from "{module}" ({reason}).') from None
    return as_instance(kind, name, found, interface) if interface else found


def as_instance(kind: str, name: str, found: Any, interface: Interface) -> Any:
    """`found`, or an instance made without arguments where it is a class. OptionError where that does not fit."""
    instance = found
    if isinstance(found, type):
        try:
            inspect.signature(found).bind()
        except (TypeError, ValueError):
            raise OptionError(
                f'{kind} "{name[:60]}" is a class that needs arguments; give them defaults, or name an instance.'
            ) from None
        instance = found()
    if not isinstance(instance, interface.protocol):
        raise OptionError(
            f'{kind} "{name[:60]}" has no method {interface.method}; name a class that has it, or an instance of one.'
        )
    return instance


def import_named(module: str) -> ModuleType:
    """A module that the user names: it may lie in the current folder, which the `freshrec` script does not search."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it hides nothing
    return importlib.import_module(module)
