"""Which image goes where in a set, decided before anything is written; and which images two sets have in common.

    chosen images ─ one shuffle by the spec's seed ─► even cuts ─► shards

A plan is a function of the spec and of what the scan of the source found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from livt_scale.data.build.record import SourceRecord
from livt_scale.data.build.scan import Digests, Scan, first_names, recorded
from livt_scale.data.build.sources import Source
from livt_scale.data.build.spec import Role, Spec
from livt_scale.data.build.writer import Prepare
from livt_scale.data.manifest import FORMAT, VERSION
from livt_scale.longtail import choose, shuffled
from livt_scale.util.errors import DataError, SourceError
from livt_scale.util.text import escaped

MAX_PAIRS = 100  # of equal images, in a manifest


@dataclass(frozen=True)
class SetPlan:
    """Which image goes where in one set."""

    name: str
    role: Role
    scanned: Scan
    class_counts: NDArray[np.int64]
    order: NDArray[np.int64]  # images of the source, as they are written
    cuts: NDArray[np.int64]  # [num_shards + 1] where in `order` each shard begins
    facts: dict[str, Any]  # of the manifest: name, seed, and what it was made from
    prepare: Prepare | None

    @property
    def source(self) -> Source:
        return self.scanned.source

    @property
    def num_shards(self) -> int:
        return len(self.cuts) - 1

    @property
    def content_sha256(self) -> str:
        """Of the images in their order: a shard of another content is not this plan's, though the keys are."""
        return hashlib.sha256(self.scanned.digests[self.order].tobytes()).hexdigest()

    def shard_name(self, shard: int) -> str:
        return f"{self.name}-{shard:06d}.tar"

    def part(self, shard: int) -> Source:
        return self.source.part(self.order[self.cuts[shard] : self.cuts[shard + 1]])

    def record(self) -> SourceRecord:
        return SourceRecord.of(self.scanned, self.order)


def plan_set(spec: Spec, name: str, scanned: Scan) -> SetPlan:
    """The plan of the set `name`. Raises SourceError: too few images, a training set without one of its classes."""
    seed, part, source = spec.build.seed, spec.build.sets[name], scanned.source
    usable = source if len(scanned.usable) == len(source) else source.part(scanned.usable)
    mine = spec.part_for(name, usable)
    images = scanned.usable[mine]  # those that the set may have
    available = usable if len(mine) == len(usable) else usable.part(mine)
    counts = spec.class_counts(name, available)
    _check_counts(spec, name, counts, source)
    try:
        chosen = choose(available.labels, counts, seed=seed)
    except DataError as error:
        raise SourceError(f"set {name}, source {source.name}: {error.message}", remedy=error.remedy) from error
    order = images[chosen[shuffled(len(chosen), seed=seed)]]
    num_shards = -(-len(order) // part.shard_samples)
    cuts = np.arange(num_shards + 1) * len(order) // num_shards
    plan = hashlib.sha256(cuts.tobytes())
    for i in order:
        plan.update(f"{source.key(i)} {source.label(i)}\n".encode())
    facts = {
        "spec": spec.neutral(name),
        "spec_sha256": spec_sha256(spec, name),
        "plan_sha256": plan.hexdigest(),
    }
    # Only what happened is recorded, so that a set of plain JPEGs and PNGs has the manifest that it always had.
    facts |= {"converted": converted} if (converted := scanned.converted(order)) else {}
    facts |= {"left_out": recorded(scanned.unusable)} if scanned.unusable else {}
    return SetPlan(
        name,
        spec.role(name),
        scanned,
        counts,
        order,
        cuts,
        {"name": name, "seed": seed, "source": facts},
        part.prepare,
    )


def spec_sha256(spec: Spec, name: str) -> str:
    """Of all in `spec` that decides what the set `name` holds."""
    facts = [FORMAT, VERSION, spec.build.seed, spec.build.class_names, name, spec.neutral(name)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_counts(spec: Spec, name: str, counts: NDArray[np.int64], source: Source) -> None:
    empty = np.flatnonzero(counts == 0)
    if spec.role(name) == "training" and len(empty):
        more = f" (nor have {len(empty) - 1:,} more)" if len(empty) > 1 else ""
        raise SourceError(
            f"set {name}, source {source.name}: class {empty[0]} ({source.class_names[empty[0]]!r}) has no image{more}",
            remedy=f"a training set has an image of each class: give it one, leave the class out of class_names and "
            f"of all sources, or give sets.{name} the role evaluation",
        )
    if not counts.sum():
        raise SourceError(f"set {name}, source {source.name}: no images", remedy="give it images, or leave the set out")


def check_same_classes(plans: Sequence[SetPlan]) -> None:
    """Raises SourceError where two sets have other classes."""
    for plan in plans[1:]:
        first = plans[0]
        if plan.source.class_names != first.source.class_names:
            raise SourceError(
                f"the sets {first.name} and {plan.name} have different classes "
                f"({_named(first.source.class_names)}; {_named(plan.source.class_names)})",
                remedy="give class_names in the spec, the same for all; an evaluation set may lack images of some",
            )


def _named(class_names: Sequence[str]) -> str:
    shown = ", ".join(escaped(name) for name in class_names[:4])
    return f"{len(class_names)}: {shown}" + (", …" if len(class_names) > 4 else "")


@dataclass(frozen=True)
class SetImages:
    """The images of a set by their digests, to find equal ones."""

    name: str
    role: Role
    places: Sequence[str]
    labels: NDArray[np.int64]
    digests: Digests

    @classmethod
    def of(cls, name: str, role: Role, record: SourceRecord) -> SetImages:
        used = np.flatnonzero(record.used)
        return cls(name, role, [record.places[i] for i in used], record.labels[used], record.digests[used])

    def pairs_between_classes(self) -> list[tuple[str, str]]:
        """(image, an equal one of another class), each image once."""
        order = np.argsort(self.digests, kind="stable")
        same = self.digests[order[1:]] == self.digests[order[:-1]]
        differ = self.labels[order[1:]] != self.labels[order[:-1]]
        return [(self.places[order[k]], self.places[order[k + 1]]) for k in np.flatnonzero(same & differ)]

    def pairs_with(self, other: SetImages) -> list[tuple[str, str]]:
        """(image, an equal one of `other`), each image of this set once."""
        mine = np.flatnonzero(np.isin(self.digests, other.digests))
        theirs = np.flatnonzero(np.isin(other.digests, self.digests[mine]))
        place_of = {other.digests[k].tobytes(): other.places[k] for k in theirs.tolist()}
        return [(self.places[k], place_of[self.digests[k].tobytes()]) for k in mine.tolist()]


def with_equal_images(plans: Sequence[SetPlan], finished: Sequence[SetImages]) -> tuple[list[SetPlan], list[str]]:
    """(plans whose facts name the equal images, a line for each kind of them).

    Equal images count between a training and an evaluation set, and between two classes of one set.
    """
    pictures = {plan.name: SetImages.of(plan.name, plan.role, plan.record()) for plan in plans}
    every = sorted((*pictures.values(), *finished), key=lambda p: p.name)
    training = [p for p in every if p.role == "training"]
    lines, made = [], []
    for plan in plans:
        mine = pictures[plan.name]
        found = {f"with {p.name}": mine.pairs_with(p) for p in training if plan.role == "evaluation"}
        found["between classes"] = mine.pairs_between_classes()
        found = {what: pairs for what, pairs in found.items() if pairs}
        lines += [_line(plan.name, what, pairs) for what, pairs in found.items()]
        equal = {
            what: {"count": len(pairs), "pairs": [list(pair) for pair in pairs[:MAX_PAIRS]]}
            for what, pairs in found.items()
        }
        source = plan.facts["source"] | ({"equal_images": equal} if equal else {})
        made.append(replace(plan, facts=plan.facts | {"source": source}))
    return made, lines


def _line(name: str, what: str, pairs: Sequence[tuple[str, str]]) -> str:
    which = first_names([f"{first} = {second}" for first, second in pairs])
    return f"{name}: {len(pairs):,} equal images {what}: {which}"
