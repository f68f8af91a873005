"""The one declaration of a method's options: arguments of its class with a default, explained in its ``Args:``.

For losses, calibrators, samplers and whatever else a registry holds. Config nodes, the checks of options and the
documentation's tables follow from it. Imports nothing of lt_det or Detectron2.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fvcore.common.registry import Registry


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: of the argument. default: its value. comment: what the docstring says of it.
    """

    name: str
    default: Any
    comment: str

    @property
    def key(self) -> str:
        """The config's name of it."""
        return self.name.upper()

    @property
    def type(self) -> type:
        return type(self.default)


def documented_arguments(cls: type) -> dict[str, str]:
    """What the ``Args:`` of a class's docstring say of each argument; base classes' where it says nothing."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        text = textwrap.dedent(" " * 4 + (base.__dict__.get("__doc__") or ""))
        match = re.search(r"^ *Args:\n(.*?)(\n\s*\n|\Z)", text, re.S | re.M)
        if not match:
            continue
        names = r"\w+(?:, \w+)*"
        for item in re.finditer(rf"^ +({names}): (.*?)(?=^ +{names}: |\Z)", match.group(1), re.S | re.M):
            for name in item.group(1).split(", "):
                found.setdefault(name, " ".join(item.group(2).split()))
    return found


def declared_options(cls: type) -> tuple[Option, ...]:
    """The options of a class: its constructor's arguments with a default, in their order.

    Arguments named in the class's ``shared_arguments`` are not its options: something else gives them to all classes
    of the registry (to a loss, the class statistics and the prior).
    """
    shared = getattr(cls, "shared_arguments", ())
    comments = documented_arguments(cls)
    parameters = inspect.signature(cls.__init__).parameters.values()
    return tuple(
        Option(p.name, p.default, comments.get(p.name, ""))
        for p in parameters
        if p.default is not p.empty and p.name not in shared
    )


def default_node(cls: type) -> dict[str, Any]:
    """The config node of a class as a dict: KEY to default, in the order of the arguments."""
    return {option.key: option.default for option in declared_options(cls)}


def checked_options(cls: type, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``options`` (in either case) as keyword arguments for ``cls``.

    Args:
        where: the config node or file, for the error.

    Raises:
        ValueError: for one that the class does not have: names it, the closest one and all that there are.
    """
    known = {option.name for option in declared_options(cls)}
    arguments = {name.lower(): value for name, value in options.items()}
    for name in arguments:
        if name not in known:
            there = ", ".join(sorted(n.upper() for n in known)) or "none"
            raise ValueError(
                f"{where}: {cls.__name__} has no option {name.upper()}{suggestion(name, known, str.upper)}; "
                f"its options: {there}"
            )
    return arguments


def shared_node(registry: Registry) -> dict[str, Any]:
    """The config node that all classes of a registry share, as a dict: each option of any of them and its default.

    Raises:
        ValueError: two classes have an option of one name and other defaults.
    """
    node: dict[str, Any] = {}
    for name, cls in registry:
        for key, default in default_node(cls).items():
            if node.setdefault(key, default) != default:
                raise ValueError(f"{name}: the default of {key} is {default!r}, and {node[key]!r} in another class")
    return node


def options_in_shared_node(cls: type, node: Mapping[str, Any], registry: Registry, where: str) -> dict[str, Any]:
    """The options of ``cls`` in a node that all classes of its registry share, as keyword arguments.

    Args:
        node: KEY to value. where: its name, for the error.

    Raises:
        ValueError: for a key that ``cls`` does not have and that differs from its default: see :func:`checked_options`.
    """
    defaults, own = shared_node(registry), default_node(cls)
    asked = {key: v for key, v in node.items() if key in own or key not in defaults or v != defaults[key]}
    return checked_options(cls, asked, where)


def lookup(registry: Registry, name: str, key: str, what: str) -> type[Any]:
    """The class of ``name``.

    Args:
        key: the config key that has the name. what: plural of what the registry holds. Both for the error.

    Raises:
        ValueError: for a name that the registry lacks: names the key, the closest name and all that there are.
    """
    known = sorted(n for n, _ in registry)
    if name not in known:
        raise ValueError(f"{key} is {name!r}{suggestion(name, known)}; known {what}: {', '.join(known)}")
    return registry.get(name)


def suggestion(word: str, known: Iterable[str], show=str) -> str:
    """ " (did you mean ...?)" with the closest of ``known``, upper and lower case alike; empty if none is close."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {show(by_lower[close[0]])}?)" if close else ""
