"""Lets clients find classes where they look for what a config names: `getattr(transformers, config.architectures[0])`.

Serving and TRL do so. Transformers has no public way to add a name, so it is set as an attribute of the module.
"""

import sys
from types import ModuleType
from typing import Any

import transformers


def modules_of_transformers() -> list[ModuleType]:
    """The `transformers` modules that code in this process holds: Transformers makes a second one when it imports its
    processors, and who imported it before goes on with the first."""
    found = {id(transformers): transformers}
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            # asks for the type, since `isinstance` asks the value itself, and some of torch's warn when they are asked
            if issubclass(type(value), ModuleType) and value.__name__ == "transformers":
                found[id(value)] = value
    return [*found.values(), sys.modules["transformers"]]


def make_findable(named: dict[str, Any], replace: bool = True) -> None:
    """Gives the `transformers` module these attributes; those that it has stay if `replace` is not set."""
    for module in modules_of_transformers():
        for name, value in named.items():
            if replace or not hasattr(module, name):
                setattr(module, name, value)


def stand_in(config: Any) -> None:
    """Makes a model findable whose code lies beside its config: its class's name then means the Auto class that loads it."""
    auto_map = getattr(config, "auto_map", None) or {}
    named: dict[str, Any] = {}
    for architecture in getattr(config, "architectures", None) or []:
        for auto, places in auto_map.items():
            places = [places] if isinstance(places, str) else places  # has a slow and a fast one for tokenizers
            names = {place.split(".")[-1] for place in places if place}
            if architecture in names and hasattr(transformers, auto):
                named.setdefault(architecture, getattr(transformers, auto))
    if named:
        make_findable(named, replace=False)
