"""Import custom models and strategies, named "their_package.module:Thing". This module does not import torch.

Only a person names modules: in an option, in FRESHREC_IMPORT or in a recipe. A store never causes an import.
"""

import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

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
    """Return `found`, or an instance with default options if it is a class.

    A class of models stands for the class of its options. Raises OptionError if there is no such instance, or if it
    does not have the interface.
    """
    label = f'{kind.capitalize()} "{name[:60]}"'
    method, n_arguments = interface.method.partition("(")[0], interface.method.count(",") + 1
    if method not in dir(found):
        options = _options_class(found if isinstance(found, type) else type(found), method)
        if options is not None and not isinstance(found, type):
            raise OptionError(f"{label} is a model, not its options. Pass its options, such as {options.__name__}().")
        if options is None:
            raise OptionError(f"{label} has no method {interface.method}. Add it, or name another class.")
        found = options
    instance = found
    if isinstance(found, type):
        try:
            inspect.signature(found).bind()
        except (TypeError, ValueError):
            raise OptionError(
                f"{label} is a class that needs arguments. Give them defaults, or name an instance."
            ) from None
        instance = found()
    try:
        inspect.signature(getattr(instance, method)).bind(*range(n_arguments))
    except (TypeError, ValueError):
        raise OptionError(f"{label} has a method {method} with other arguments. Write {interface.method}.") from None
    for field in fields(instance) if is_dataclass(instance) else ():
        value = getattr(instance, field.name)
        if isinstance(value, type) and is_dataclass(value):
            raise OptionError(f"{label}: option {field.name} is a class. Write {field.name}={value.__name__}().")
    return instance


def _options_class(kind: type, method: str) -> type | None:
    """Return the class of the options of a model: the type of an argument of its `__init__` that has this method."""
    try:
        hints = get_type_hints(vars(kind).get("__init__"))
    except (NameError, TypeError):  # a type that is known to type checkers only, or no `__init__`
        return None
    return next((hint for hint in hints.values() if isinstance(hint, type) and method in dir(hint)), None)


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
