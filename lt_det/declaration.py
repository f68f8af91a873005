"""The one declaration of a method's options: arguments of its class with a default, explained in its ``Args:``.

For losses, calibrators, samplers and whatever else a registry holds. The arguments are those of the constructor, or of
the classmethod that the class's ``made_by`` names. Config nodes, the checks of options and the documentation's tables
follow from it. Imports nothing of lt_det or Detectron2.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
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
    texts = [vars(base).get("__doc__") for base in cls.__mro__]
    if hasattr(cls, "made_by"):
        texts += [vars(base)[cls.made_by].__func__.__doc__ for base in cls.__mro__ if cls.made_by in vars(base)]
    for text in filter(None, texts):
        match = re.search(r"^ *Args:\n(.*?)(\n\s*\n|\Z)", textwrap.dedent(" " * 4 + text), re.S | re.M)
        if not match:
            continue
        names = r"\w+(?:, \w+)*"
        for item in re.finditer(rf"^ +({names}): (.*?)(?=^ +{names}: |\Z)", match.group(1), re.S | re.M):
            for name in item.group(1).split(", "):
                found.setdefault(name, " ".join(item.group(2).split()))
    return found


@cache
def declared_options(cls: type) -> tuple[Option, ...]:
    """The options of a class: the arguments with a default of what makes its objects, in their order.

    Arguments named in the class's ``shared_arguments`` are not its options: something else gives them to all classes
    of the registry (to a loss, the class statistics and the prior).
    """
    shared = getattr(cls, "shared_arguments", ())
    comments = documented_arguments(cls)
    parameters = inspect.signature(getattr(cls, getattr(cls, "made_by", "__init__"))).parameters.values()
    return tuple(
        Option(p.name, p.default, comments.get(p.name, ""))
        for p in parameters
        if p.default is not p.empty and p.name not in shared
    )


def default_node(cls: type) -> dict[str, Any]:
    """The config node of a class as a dict: KEY to default, in the order of the arguments."""
    return {option.key: option.default for option in declared_options(cls)}


def checked_options(cls: type, options: Mapping[str, Any], where: str, show=str.upper) -> dict[str, Any]:
    """``options`` (in either case) as keyword arguments for ``cls``.

    Args:
        where: the config node or file, for the error. show: how it writes the name of an option there.

    Raises:
        ValueError: for one that the class does not have: names it, the closest one and all that there are.
    """
    known = {option.name for option in declared_options(cls)}
    arguments = {name.lower(): value for name, value in options.items()}
    for name in arguments:
        if name not in known:
            there = ", ".join(sorted(map(show, known))) or "none"
            hint = suggestion(name, known, show) or "."
            raise ValueError(f"{where}: {cls.__name__} has no option {show(name)}{hint} Its options: {there}")
    return arguments


def shared_node(registry: Iterable[tuple[str, type]]) -> dict[str, Any]:
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


def lookup(registry: Registry, name: str, key: str) -> type[Any]:
    """The class of ``name``; ``key`` names it in the config, for the error, see :func:`check_name`."""
    check_name(key, name, (n for n, _ in registry))
    return registry.get(name)


def check_name(key: str, name: str, known: Iterable[str]) -> None:
    """
    Raises:
        ValueError: if ``name`` is not among ``known``; with the key, similar names and the list.
    """
    known = sorted(known)
    if name not in known:
        hint = suggestion(name, known) or "."
        known_names = (k or "'' (none)" for k in known)
        raise ValueError(f"{key} is {name!r}, and there is none of that name{hint} Known: {', '.join(known_names)}")


def suggestion(word: str, known: Iterable[str], show=str) -> str:
    """ "; did you mean A or B?" with the closest of ``known``, upper and lower case alike; empty if none is close."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(show(by_lower[c]) for c in close)}?" if close else ""
