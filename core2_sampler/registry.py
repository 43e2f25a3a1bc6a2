"""Plug-ins by name: heads, samplers, scorers and suites register, and load on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


def unknown_name(kind: str, name: object, names: Iterable[str]) -> ValueError:
    """Return the error for a name that does not exist: the nearest match and the whole list.

    Args:
        kind: what the name was meant to be, such as ``"weak head"``.
        name: what was given.
        names: the names that exist.

    Returns:
        A ``ValueError`` to raise.
    """
    known = sorted(names)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind}: got {name!r}; {hint}choose one of {', '.join(known)}")


class Registry(Generic[Entry]):
    """Objects of one kind by name; an entry ``"module:Attr"`` is imported on first use.

    Args:
        kind: what the objects are, for error messages.
        entries: lazy entries, name to ``"module:Attr"``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = {}
        for name, target in (entries or {}).items():
            self._add(name, _Lazy(target))

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers a class or function under ``name``.

        Args:
            name: the name users type.

        Returns:
            The decorator; it hands the object back unchanged.

        Raises:
            ValueError: the name is taken.
        """

        def add(value: Entry) -> Entry:
            self._add(name, value)
            return value

        return add

    def get(self, name: str) -> Entry:
        """Return the object registered under ``name``, importing it if need be.

        Args:
            name: a name of `names`.

        Returns:
            The registered object.

        Raises:
            ValueError: no such name; the message has the nearest match and the list.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        entry = self._entries[name]
        if isinstance(entry, _Lazy):
            entry = self._entries[name] = entry.load()
        return entry

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)

    def _add(self, name: str, value: Any) -> None:
        if name in self._entries:
            raise ValueError(f"a {self.kind} name must be new, got {name!r} which is taken")
        self._entries[name] = value


class _Lazy:
    """An object that is not imported yet."""

    def __init__(self, target: str) -> None:
        module, _, attribute = target.partition(":")
        if not module or not attribute:
            raise ValueError(f"a lazy entry must read 'module:Attr', got {target!r}")
        self.module, self.attribute = module, attribute

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.attribute)
