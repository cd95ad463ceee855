"""How a data set becomes shards, as one YAML file defines it: sources, and sets made from them.

    name: fashion-mnist-lt
    sources:
      train: {idx: {root: /usr/share/datasets/fashion-mnist, images: train-images-idx3-ubyte.gz, labels: …}}
    sets:
      train-lt: {source: train, exponential: {n0: 1000, imbalance: 100}}
      train-balanced: {source: train, balanced: {like: train-lt}}       # as many images, the classes alike

A set without exponential, counts or balanced takes every image. A source with `split` is two: its sets of the role
evaluation have the part that is held out, those of the role training the rest. Relative paths are looked for below
`root`, and a relative `root` or counts file beside the spec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    create_model,
    field_validator,
    model_validator,
)

from livt_scale.config.runtime import RecipePart
from livt_scale.config.yaml import Tree, read_file, validated
from livt_scale.data.build.formats import SOURCE_FORMATS, SourceFormat
from livt_scale.data.build.sources import Source, checked
from livt_scale.data.build.split import Split, held_out
from livt_scale.data.build.writer import Prepare
from livt_scale.extensions import load_extensions
from livt_scale.longtail import Counts, balanced_counts, class_counts_exponential
from livt_scale.util.errors import SourceError, UsageError, nearest
from livt_scale.util.outside import in_home, read_checked, read_json, real_path
from livt_scale.util.resources import named

PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]  # becomes a folder's name, or a key's


Role = Literal["training", "evaluation"]


class SourceSpec(RecipePart):
    """Where labelled images come from: one of the registered formats. `build_spec_model` gives it a field for each."""

    split: Split | None = Field(None, description="a part of each class for evaluation, the rest for training")

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        _exactly_one(self, tuple(name for name in type(self).model_fields if name != "split"), at_least=1)
        return self

    @property
    def format(self) -> SourceFormat:
        """The options of the format that is given."""
        given: SourceFormat = next(part for _, part in self if isinstance(part, SourceFormat))
        return given


class Exponential(RecipePart):
    """n_c = int(n0 · imbalance^(−c / (C − 1)))."""

    n0: PositiveInt | None = Field(None, description="images of the first class; None: all that the source has of it")
    imbalance: Annotated[float, Field(ge=1)]


class CountsProfile(RecipePart):
    """Images of each class, written here or in a JSON file that holds a list."""

    values: list[NonNegativeInt] | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, ("values", "file"), at_least=1)
        return self


class Balanced(RecipePart):
    """The same number of images of each class."""

    like: PlainName | None = Field(None, description="as many images in all as this set has")
    per_class: PositiveInt | None = None
    total: PositiveInt | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, ("like", "per_class", "total"), at_least=1)
        return self


class Expected(RecipePart):
    """What is known of a published set: another number means other files, another list or another order of classes."""

    images: PositiveInt
    classes: PositiveInt
    largest: PositiveInt | None = Field(None, description="images of the largest class; None: not compared")
    smallest: PositiveInt | None = Field(None, description="images of the smallest class; None: not compared")
    counts: str | None = Field(None, description="a JSON file with the images of each class, in the classes' order")


class SetSpec(RecipePart):
    """One set: a folder of shards."""

    source: PlainName
    role: Role | None = Field(
        None, description="None: training for the first set and those with a profile, else evaluation"
    )
    exponential: Exponential | None = None
    counts: CountsProfile | None = None
    balanced: Balanced | None = None
    prepare: Prepare | None = Field(None, description="images made smaller once; None: their bytes as they are")
    expected: Expected | None = Field(None, description="compared before anything is written; None: nothing is")
    shard_samples: PositiveInt = Field(1024, description="samples a shard, at most; shards of a set are of one size")

    @model_validator(mode="after")
    def _at_most_one_profile(self) -> Self:
        _exactly_one(self, ("exponential", "counts", "balanced"), at_least=0)
        return self


class BuildSpec(RecipePart):
    """All that a spec file has."""

    name: PlainName
    seed: NonNegativeInt = Field(0, description="of the choice of images and of their order")
    class_names: list[str] | None = Field(None, description="None: the folders' names, or the labels' numbers")
    sources: dict[PlainName, SourceSpec]
    sets: dict[PlainName, SetSpec]

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if not self.sets:
            raise ValueError("sets is empty: name a set to build")
        for name, part in self.sets.items():
            if part.source not in self.sources:
                raise ValueError(
                    f"sets.{name}.source is {part.source!r}, which is not one of the sources: "
                    + nearest(part.source, self.sources)
                )
            if self.sources[part.source].split and part.role is None:
                raise ValueError(
                    f"sources.{part.source} is split, so sets.{name} needs a role: "
                    "training (the rest) or evaluation (the held-out part)"
                )
            like = part.balanced and part.balanced.like
            if like and (like not in self.sets or like == name):
                others = [other for other in self.sets if other != name]
                raise ValueError(f"sets.{name}.balanced.like is {like!r}, no other set: {nearest(like, others)}")
            if like and self.sets[like].balanced:
                raise ValueError(
                    f"sets.{name}.balanced.like is {like!r}, itself balanced: give the set that it is like"
                )
        return self._both_parts_are_used()

    def _both_parts_are_used(self) -> Self:
        for source, options in self.sources.items():
            roles = {part.role for part in self.sets.values() if part.source == source}
            if options.split and len(roles) == 1:
                missing = "evaluation" if "training" in roles else "training"
                raise ValueError(f"sources.{source} is split, but there is no set of it with the role {missing}")
        return self

    @field_validator("class_names")
    @classmethod
    def _names_are_names(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (problem := problem_of_names(names)):
            raise ValueError(problem)
        return names


def problem_of_names(names: Sequence[str]) -> str:
    """What is wrong with these names of classes; "": nothing."""
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name.strip():
            return f"the name of class {number} is blank"
        if seen.setdefault(name, number) != number:
            return f"the classes {seen[name]} and {number} have the same name, {name!r}"
    return ""


def build_spec_model() -> type[BuildSpec]:
    """BuildSpec with every format that is registered now as a field of its sources."""
    formats: Any = {name: (options | None, None) for name, options in SOURCE_FORMATS.items()}
    source = create_model("SourceSpec", __base__=SourceSpec, **formats)
    return create_model("BuildSpec", __base__=BuildSpec, sources=(dict[PlainName, source], ...))


class Spec(RecipePart):
    """A spec and the folder that its relative paths start from."""

    build: BuildSpec
    folder: Path

    def open_source(self, name: str) -> Source:
        """The source `name`, its files looked at and its labels read. Raises SourceError."""
        part = self.build.sources[name].format
        classes = tuple(self.build.class_names) if self.build.class_names is not None else None
        return checked(part.open(name, self.root(name), class_names=classes))

    def root(self, name: str) -> Path:
        """The folder of the source `name`."""
        return self.folder / in_home(self.build.sources[name].format.root)

    def role(self, name: str) -> Role:
        """Whether the set `name` is for training or for evaluation."""
        part = self.build.sets[name]
        has_profile = bool(part.exponential or part.counts or part.balanced)
        is_first = name == next(iter(self.build.sets))
        return part.role or ("training" if has_profile or is_first else "evaluation")

    def part_for(self, name: str, source: Source) -> NDArray[np.int64]:
        """Which images of `source` the set `name` may have: all, or its part of a source that is split."""
        split = self.build.sources[self.build.sets[name].source].split
        if split is None:
            return np.arange(len(source))
        return np.flatnonzero(held_out(source, split) == (self.role(name) == "evaluation"))

    def open_part(self, name: str) -> Source:
        """The images that the set `name` is drawn from, unchecked. Raises SourceError."""
        source = self.open_source(self.build.sets[name].source)
        return source.part(self.part_for(name, source))

    def class_counts(self, name: str, source: Source) -> Counts:
        """[C] Images of each class in the set `name`, drawn from `source`. Raises SourceError: not what is expected."""
        counts = self._profile_counts(name, source)
        expected = self.build.sets[name].expected
        if expected is not None:
            known = None
            if expected.counts:
                listed = CountsProfile(file=expected.counts)
                known = self._listed_counts(name, listed, expected.classes)
            check_published_counts(
                name,
                counts,
                images=expected.images,
                classes=expected.classes,
                known=known,
                largest=expected.largest,
                smallest=expected.smallest,
            )
        return counts

    def _profile_counts(self, name: str, source: Source) -> Counts:
        part, num_classes = self.build.sets[name], len(source.class_names)
        available = np.bincount(source.labels, minlength=num_classes).astype(np.int64)
        if part.exponential:
            return class_counts_exponential(
                part.exponential.n0 or int(available[0]), num_classes, part.exponential.imbalance
            )
        if part.counts:
            return self._listed_counts(name, part.counts, num_classes)
        if part.balanced and part.balanced.per_class:
            return np.full(num_classes, part.balanced.per_class, dtype=np.int64)
        if part.balanced and part.balanced.like:
            twin = self.build.sets[part.balanced.like]
            like = part.balanced.like
            is_split = self.build.sources[twin.source].split is not None
            alike = twin.source == part.source and (not is_split or self.role(like) == self.role(name))
            other = source if alike else self.open_part(like)
            return balanced_counts(int(self._profile_counts(like, other).sum()), num_classes)
        if part.balanced:
            return balanced_counts(part.balanced.total or 0, num_classes)
        return available

    def _listed_counts(self, name: str, part: CountsProfile, num_classes: int) -> Counts:
        values: Any = part.values
        where = f"sets.{name}.counts"
        if part.file:
            where = str(self.folder / part.file)
            try:
                values = read_json(self.folder / part.file, "counts")
            except (OSError, ValueError) as error:
                raise SourceError(f"{where}: the counts cannot be read: {error}") from error
        whole = isinstance(values, list) and all(type(v) is int and 0 <= v < 2**31 for v in values)
        if not whole or len(values) != num_classes:
            raise SourceError(
                f"{where}: not a list of {num_classes} whole numbers", remedy="give one count for each class, in order"
            )
        if 0 in values:
            raise SourceError(f"{where}: class {values.index(0)} has no image", remedy="give it one, or leave it out")
        return np.array(values, dtype=np.int64)

    def neutral(self, name: str) -> dict[str, Any]:
        """What of the spec decides what the set `name` holds: no folders, so that it can be built elsewhere."""
        part = self.build.sets[name]
        source = self.build.sources[part.source].model_dump(exclude_none=True)
        for field, options in source.items():
            if field != "split":
                options.pop("root")
        facts: dict[str, Any] = {"source": source, "set": part.model_dump(exclude_none=True, exclude={"expected"})}
        facts = _without_folders(facts)
        if part.balanced and part.balanced.like:
            facts["like"] = self.neutral(part.balanced.like)
        if part.counts and part.counts.file:
            facts["counts_sha256"] = hashlib.sha256(_bytes(self.folder / part.counts.file)).hexdigest()
        return facts


def load_spec(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    prepare: Prepare | None = None,
    ignore_expected: bool = False,
) -> Spec:
    """The spec in `path`, or the shipped one that `livt:NAME` means.

    `overrides`: "source=FOLDER" for the root of a source, "source.field=PATH" for one of its files.
    `prepare`: for every set, instead of what the spec says. `ignore_expected`: build whatever is there.

    Raises UsageError: field, file and line, and the nearest valid name.
    """
    path = named(path, kind="shards")
    hint = "give the path of a YAML file, as shards/fashion-mnist-lt.yaml"
    tree = read_file(path, "shard spec", what="spec", remedy=hint)
    for override in overrides:
        _override(tree, override)
    load_extensions()
    build = validated(tree, path, build_spec_model())
    if prepare:
        sets = {name: part.model_copy(update={"prepare": prepare}) for name, part in build.sets.items()}
        build = build.model_copy(update={"sets": sets})
    if ignore_expected:
        sets = {name: part.model_copy(update={"expected": None}) for name, part in build.sets.items()}
        build = build.model_copy(update={"sets": sets})
    return Spec(build=build, folder=real_path(path).parent)


def _override(tree: Tree, text: str) -> None:
    name, equals, value = text.partition("=")
    source, _, field = name.partition(".")
    known = tree.values.get("sources")
    known = known if isinstance(known, dict) else {}
    if not equals or not value:
        raise UsageError(f"--source {text!r} is not of the form NAME=FOLDER or NAME.FIELD=PATH")
    if source not in known:
        raise UsageError(f"--source {text}: there is no source {source!r}: {nearest(source, known)}")
    field = field or "root"
    parts = known[source] if isinstance(known[source], dict) else {}
    for kind, fields in parts.items():
        if isinstance(fields, dict) and kind != "split":
            # a path on the command line is relative to where the command is given, not to the spec
            fields[field] = str(real_path(in_home(value))) if field == "root" or "/" in value else value
            tree.origins[("sources", source, kind, field)] = f"--source {name}"


def _without_folders(value: Any) -> Any:
    """`value`, plain and nested, with the name of the file in place of each absolute path."""
    if isinstance(value, dict):
        return {name: _without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith("/") else value


def _exactly_one(part: BaseModel, names: tuple[str, ...], *, at_least: int) -> None:
    given = [name for name in names if getattr(part, name) is not None]
    if not at_least <= len(given) <= 1:
        said = " and ".join(given) if given else "none"
        raise ValueError(f"give {'one' if at_least else 'at most one'} of {', '.join(names)}: there is {said}")


def _bytes(path: Path) -> bytes:
    try:
        return read_checked(path, "counts")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error


REMEDY = "compare list file and folder with what the authors publish; to build it all the same: --ignore-expected"
SHOWN = 5  # classes that a complaint names


def check_published_counts(
    name: str,
    counts: Counts,
    *,
    images: int,
    classes: int,
    known: Counts | None = None,
    largest: int | None = None,
    smallest: int | None = None,
) -> None:
    """Raise SourceError where `counts` [C] are not the published ones.

    known [C]: those of each class, where there are; largest, smallest: images of these classes, for sets whose numbers
    are published no closer.
    """
    if len(counts) != classes:
        raise SourceError(f"set {name} has {len(counts)} classes, the published set {classes}", remedy=REMEDY)
    total = int(counts.sum())
    if known is not None and (differ := np.flatnonzero(counts != known)).size:
        same = np.array_equal(np.sort(counts), np.sort(known))
        order = "; the same numbers in another order, so the classes are numbered otherwise" if same else ""
        raise SourceError(
            f"set {name} has {total:,} images, the published set {int(known.sum()):,}; "
            f"{differ.size} of {classes} classes differ ({_first(counts, known, differ)}){order}",
            remedy=REMEDY,
        )
    if total != images:
        raise SourceError(f"set {name} has {total:,} images, the published set {images:,}", remedy=REMEDY)
    for which, wanted, found, c in (
        ("largest", largest, counts.max(), counts.argmax()),
        ("smallest", smallest, counts.min(), counts.argmin()),
    ):
        if wanted is not None and found != wanted:
            raise SourceError(
                f"set {name} has {total:,} images as the published set, but its {which} class, {c}, has {found} "
                f"of them and the published one's {wanted}",
                remedy=REMEDY,
            )


def _first(counts: Counts, known: Counts, differ: Counts) -> str:
    first = ", ".join(f"class {c}: {counts[c]} instead of {known[c]}" for c in differ[:SHOWN])
    return first + (f" and {differ.size - SHOWN} more" if differ.size > SHOWN else "")
