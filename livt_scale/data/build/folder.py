"""An image folder, root/CLASS/**/image: every file below it is an image of its class, or is counted with the reason.

A file with the extension of an image is one, and scan.py checks it; a file with another extension, or none, is one if
its contents begin like an image's. Links are followed, to files and to folders; a folder is read once for each class,
and a link that leads back above its class is left out, since it would bring in other classes.
"""

from __future__ import annotations

import os
from pathlib import Path

from livt_scale.data.build.sources import (
    IMAGE_ENDINGS,
    OTHER_IMAGE_ENDINGS,
    FileSource,
    LeftOut,
    file_source,
    listed,
)
from livt_scale.data.build.stored import image_kind
from livt_scale.util.errors import SourceError
from livt_scale.util.outside import open_checked
from livt_scale.util.text import escaped

HIDDEN = "hidden"
NO_IMAGE = "not an image by name and contents"
READ_ALREADY = "a link to a folder that is read already"
LEADS_UP = "a link to a folder above its class"
NO_CLASS = "an image outside the classes' folders"
NOT_READ_ENDINGS = (".heif", ".avif", ".jp2", ".jxl", ".psd", ".svg")  # images too: counted, so that none is lost


def open_folder(name: str, root: Path, *, class_names: tuple[str, ...] | None = None) -> FileSource:
    """root/CLASS/**/image. Without `class_names`, the classes are the folders in the order of their names."""
    folders = class_folders(root)
    if not folders:
        raise SourceError(f"{root} holds no folders", remedy="a folder source has one folder a class, images in it")
    unknown = sorted(set(folders) - set(class_names or folders))
    if unknown:
        raise SourceError(
            f"{escaped(root / unknown[0])} is no class of class_names", remedy="add it there, or move it away"
        )
    classes = class_names or tuple(folders)
    walk = _Walk(root)
    labels: list[int] = []
    for label, folder in enumerate(classes):
        if folder in folders:
            walk.take_class(folder)
        labels += [label] * (len(walk.images) - len(labels))
    for entry in listed(root):
        if _is_hidden(entry.name):
            walk.ignored.append((entry.name, HIDDEN))
        elif not _is_folder(entry):
            is_image = _looks_like_an_image(Path(entry.path))
            (walk.unusable if is_image else walk.ignored).append((entry.name, NO_CLASS if is_image else NO_IMAGE))
    return file_source(
        name, classes, labels, root, walk.images, unusable=sorted(walk.unusable), ignored=sorted(walk.ignored)
    )


def class_folders(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted, without hidden ones. Raises SourceError."""
    return sorted(e.name for e in listed(root) if _is_folder(e) and not _is_hidden(e.name))


class _Walk:
    """The files below the classes' folders: images in the order of the classes and then of their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[str] = []  # paths below root
        self.unusable: list[LeftOut] = []
        self.ignored: list[LeftOut] = []

    def take_class(self, folder: str) -> None:
        inside = os.path.realpath(self.root / folder)
        read: set[tuple[int, int]] = set()
        found: list[str] = []
        real, linked = [folder], list[str]()  # links come last: an image keeps the name that it has without them
        while real or linked:
            here = real.pop() if real else linked.pop(0)
            if reason := self._why_not_read(here, inside, read):
                (self.ignored if reason in (READ_ALREADY, LEADS_UP) else self.unusable).append((f"{here}/", reason))
                continue
            for entry in sorted(listed(self.root / here), key=lambda e: e.name):
                path = f"{here}/{entry.name}"
                if _is_hidden(entry.name):
                    self.ignored.append((path, HIDDEN))
                elif _is_folder(entry):
                    (linked if entry.is_symlink() else real).append(path)
                elif _looks_like_an_image(Path(entry.path)):
                    found.append(path)
                else:
                    self.ignored.append((path, NO_IMAGE))
        self.images += sorted(found)

    def _why_not_read(self, here: str, class_folder: str, read: set[tuple[int, int]]) -> str:
        """Why the folder `here` is not read; "": it is, and is noted in `read`."""
        path = self.root / here
        try:
            found = path.stat()
            with os.scandir(path):
                pass
        except OSError as error:
            return f"a folder that cannot be read: {error.strerror}"
        if (found.st_dev, found.st_ino) in read:
            return READ_ALREADY
        if class_folder.startswith(os.path.join(os.path.realpath(path), "")):  # noqa: PTH118 - "/" ends in its slash
            return LEADS_UP
        read.add((found.st_dev, found.st_ino))
        return ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _looks_like_an_image(path: Path) -> bool:
    """By its name; or else by how it begins, of the kinds whose beginning no text has."""
    if path.suffix.lower() in (*IMAGE_ENDINGS, *OTHER_IMAGE_ENDINGS, *NOT_READ_ENDINGS):
        return True
    try:
        with open_checked(path, "log") as file:  # of any size: it may be no image
            return image_kind(file.read(64)) not in (None, "ppm")
    except OSError:
        return False
