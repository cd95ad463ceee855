"""Things that are found by name and may be added from outside the package: losses, model sizes, optimizers, …

    LOSSES: Registry[type[LossOptions]] = Registry("loss")
    LOSSES.register("focal", Focal)       # or, as a decorator: @LOSSES.register("focal")
    LOSSES["focal"]                       # a Mapping otherwise: names, iteration, `in`
    LOSSES.find("focl")                   # UsageError: unknown loss 'focl'. Did you mean 'focal'?

Each name is remembered with the file and line that registered it, which the error of a name that is taken gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar, overload

from livt_scale.util.errors import UsageError, nearest

T = TypeVar("T")
V = TypeVar("V")


class Registry(Mapping[str, T], Generic[T]):
    """Names to things of one kind, in the order of their registration. `kind`: what messages call one of them.

    `reserved`: names that cannot be registered, and where they are from.
    """

    def __init__(self, kind: str, *, reserved: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._reserved = reserved or {}
        self._things: dict[str, T] = {}
        self._places: dict[str, str] = {}

    @overload
    def register(self, name: str) -> Callable[[V], V]: ...
    @overload
    def register(self, name: str, thing: V) -> V: ...
    def register(self, name: str, thing: V | None = None) -> V | Callable[[V], V]:
        """Add `thing` under `name`; without it, a decorator that does. Raises UsageError: the name is taken."""
        place = _caller()

        def add(thing: V) -> V:
            owner = self._reserved.get(name) or self._places.get(name, place)
            if owner != place:  # the same line again: its module was loaded twice
                raise UsageError(
                    f"{place}: the {self.kind} {name!r} is already registered, by {owner}",
                    remedy="take another name",
                )
            self._things[name], self._places[name] = thing, place  # type: ignore[assignment]
            return thing

        return add if thing is None else add(thing)

    def find(self, name: str) -> T:
        """What is registered under `name`. Raises UsageError with the nearest name."""
        if name not in self._things:
            raise UsageError(f"unknown {self.kind} {name!r}", remedy=nearest(name, self._things))
        return self._things[name]

    def place(self, name: str) -> str:
        """The file and line that registered `name`."""
        return self._places[name]

    def remove(self, name: str) -> None:
        """Forget `name`. For tests."""
        del self._things[name], self._places[name]

    def __getitem__(self, name: str) -> T:
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)


# the modules between an extension and a registry: the place of a registration is the line outside of them
_OURS = (__name__, "livt_scale.extensions", "livt_scale.api.registration")


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in _OURS and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"
