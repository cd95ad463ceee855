"""What may change between a run's start and its continuation: each field of a recipe carries its own policy.

    free     moves files and work, not the numbers learnt: may always change
    allow    may change in mid-stage when `livt train --allow FIELD` says so
    fixed    what the model is and which samples come when: another run (the default)

    many_over: Annotated[PositiveInt, ALLOW] = Field(100, …)

A part that is free is free in all its fields. A field that a subclass redefines keeps the policy of its base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from livt_scale.config.yaml import part_in

ResumePolicy = Literal["free", "allow", "fixed"]


@dataclass(frozen=True)
class Resume:
    """The policy of a field; `with_batchnorm`: where the model has batch norm, which takes statistics of a batch."""

    policy: ResumePolicy
    with_batchnorm: ResumePolicy | None = None

    def of(self, *, batchnorm: bool) -> ResumePolicy:
        return self.with_batchnorm or self.policy if batchnorm else self.policy


FREE, ALLOW, FIXED = Resume("free"), Resume("allow"), Resume("fixed")


@dataclass(frozen=True)
class Change:
    """A field in which two recipes differ; `old`, `new`: None where the field is absent."""

    path: str
    old: Any
    new: Any
    policy: ResumePolicy


def resume_of(path: str, model: type[BaseModel]) -> Resume:
    """The policy of the dotted field `path` of `model`: its own, or that of the part around it."""
    part: type[BaseModel] | None = model
    for name in path.split("."):
        if part is None or name not in part.model_fields:
            break
        own = _own(part, name)
        if own is not None:
            return own
        part = part_in(part.model_fields[name].annotation)
    return FIXED


def allowable(model: type[BaseModel]) -> tuple[str, ...]:
    """The dotted fields whose change `--allow` can let through, for one model or another."""
    return tuple(
        path for path in _leaves(model) if any(resume_of(path, model).of(batchnorm=b) == "allow" for b in (False, True))
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any], model: type[BaseModel], *, batchnorm: bool) -> list[Change]:
    """Where two mappings of dotted fields of `model` differ, by path."""
    return [
        Change(path, old.get(path), new.get(path), resume_of(path, model).of(batchnorm=batchnorm))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def _own(part: type[BaseModel], name: str) -> Resume | None:
    for cls in part.__mro__:
        field = cls.model_fields.get(name) if issubclass(cls, BaseModel) and cls is not BaseModel else None
        found = [each for each in field.metadata if isinstance(each, Resume)] if field else []
        if found:
            return found[0]
    return None


def _leaves(model: type[BaseModel], above: Sequence[str] = ()) -> Iterator[str]:
    for name, field in model.model_fields.items():
        part = part_in(field.annotation)
        if part is None:
            yield ".".join((*above, name))
        else:
            yield from _leaves(part, (*above, name))
