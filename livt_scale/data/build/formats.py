"""The formats of raw images that a spec can name, and the registry that adds one from outside the package.

    @SOURCE_FORMATS.register("csv")
    class Csv(SourceFormat):
        file: str                              # options, checked like those of the built-in formats

        def open(self, name, root, *, class_names):
            return FileSource(name, …)

    sources: {train: {csv: {root: /data/train, file: labels.csv}}}         # in a spec

`root` is resolved by the spec; other paths are relative to it. Options that name files and folders do not change what
a set contains, except through the files themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from livt_scale.config.runtime import RecipePart
from livt_scale.data.build import cifar, folder, idx, inaturalist, sources
from livt_scale.data.build.sources import Source
from livt_scale.util.registry import Registry


class SourceFormat(RecipePart, ABC):
    """The options of one format, and how to open the source that they describe."""

    root: str
    reads_every_file: ClassVar[bool] = False  # below root: shards there would become images of a class

    @abstractmethod
    def open(self, name: str, root: Path, *, class_names: tuple[str, ...] | None) -> Source:
        """The source `name` below the resolved `root`, its labels read. Raises SourceError."""


SOURCE_FORMATS: Registry[type[SourceFormat]] = Registry("source format")


@SOURCE_FORMATS.register("folder")
class Folder(SourceFormat):
    """root/CLASS/**/image."""

    reads_every_file: ClassVar[bool] = True

    def open(self, name: str, root: Path, *, class_names: tuple[str, ...] | None) -> Source:
        return folder.open_folder(name, root, class_names=class_names)


@SOURCE_FORMATS.register("list")
class ListFile(SourceFormat):
    """Lines `path label`, the paths below root."""

    list: str

    def open(self, name: str, root: Path, *, class_names: tuple[str, ...] | None) -> Source:
        return sources.open_list(name, root, list_file=root / self.list, class_names=class_names)


@SOURCE_FORMATS.register("idx")
class Idx(SourceFormat):
    """Grey images and labels in the IDX format, .gz or not."""

    images: str
    labels: str

    def open(self, name: str, root: Path, *, class_names: tuple[str, ...] | None) -> Source:
        return idx.open_idx(name, root / self.images, labels=root / self.labels, class_names=class_names)


@SOURCE_FORMATS.register("inaturalist")
class INaturalist(SourceFormat):
    """Images below root, listed by a JSON file as iNaturalist publishes it."""

    annotations: str
    as_text: bool = Field(False, description="categories in the order 0, 1, 10, 100 …, as LiVT's published weights")

    def open(self, name: str, root: Path, *, class_names: tuple[str, ...] | None) -> Source:
        return inaturalist.open_inaturalist(
            name, root, annotations=root / self.annotations, class_names=class_names, as_text=self.as_text
        )


@SOURCE_FORMATS.register("cifar")
class Cifar(SourceFormat):
    """Records of CIFAR's binary version, in one or more files below root."""

    files: list[str] = Field(min_length=1)
    classes: Literal[10, 100]

    def open(self, name: str, root: Path, *, class_names: tuple[str, ...] | None) -> Source:
        return cifar.open_cifar(name, root, files=self.files, classes=self.classes, class_names=class_names)


@SOURCE_FORMATS.register("tars")
class Tars(SourceFormat):
    """Every *.tar in root: WebDataset's key.jpg|jpeg|png + key.cls."""

    def open(self, name: str, root: Path, *, class_names: tuple[str, ...] | None) -> Source:
        return sources.open_tars(name, root, class_names=class_names)
