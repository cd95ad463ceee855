"""What a folder of images or a list file is: the sources and sets of the shard spec that `livt init` writes.

photos/CLASS/**/image                 one folder for each class: a part is held out for evaluation
photos/train/CLASS/**, photos/val/…   both sets are there; val may also be called valid, validation or test
photos/list.txt                       lines "path label", the paths below the folder of the file
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.data.build.folder import class_folders
from livt_scale.data.build.sources import FileSource, Source
from livt_scale.util.errors import SourceError, UsageError
from livt_scale.util.text import escaped

TRAIN = ("train", "training")
EVALUATION = ("val", "valid", "validation", "test")  # the first that is there is taken
SHOWN = 3  # names in a note


@dataclass(frozen=True)
class RawImages:
    """Where the images are, as sources of a spec."""

    location: Path  # absolute: what was given
    train: dict[str, Any]  # the options of a source
    evaluation: dict[str, Any] | None  # None: a part of `train` is to be held out
    unused: tuple[str, ...] = ()  # folders beside the two sets


def find_images(given: Path) -> RawImages:
    """What `given`, a folder or a list file, is. Raises UsageError (not there), SourceError (no folders of classes)."""
    path = given.absolute()
    if not str(path).isprintable():
        raise UsageError(
            f"the path {escaped(path)!r} has characters that a YAML file cannot hold", remedy="rename the folder"
        )
    if path.is_file():
        return RawImages(path, {"list": {"root": str(path.parent), "list": path.name}}, None)
    if not path.is_dir():
        raise UsageError(f"there is no {escaped(given)}", remedy="give a folder of images, or a list file")
    folders = class_folders(path)
    if not folders:
        raise SourceError(
            f"{escaped(given)} holds no folders",
            remedy="put the images of each class into a folder named after it: FOLDER/CLASS/image.jpg",
        )
    by_lower = {name.lower(): name for name in folders}
    train = next((by_lower[name] for name in TRAIN if name in by_lower), None)
    others = [by_lower[name] for name in EVALUATION if name in by_lower]
    if train is None or set(folders) != {train, *others}:  # classes; one of them may be called train
        return RawImages(path, _folder(path), None)
    if not others:
        return RawImages(path, _folder(path / train), None)
    return RawImages(path, _folder(path / train), _folder(path / others[0]), unused=tuple(others[1:]))


def _folder(root: Path) -> dict[str, Any]:
    return {"folder": {"root": str(root)}}


def check_classes(source: Source, given: Path) -> None:
    """Raise SourceError where `source` has fewer than two classes, or a class without an image."""
    empty = [name for c, name in enumerate(source.class_names) if not (source.labels == c).any()]
    if empty:
        raise SourceError(
            f"{escaped(given)}: {len(empty)} of {len(source.class_names)} classes have no image: {_first(empty)}",
            remedy="remove the empty folders, or put images in; a list file numbers its classes from 0 without gaps",
        )
    if len(source.class_names) > 1:
        return
    name = source.class_names[0]
    inside = nested_classes(source).get(name, [])
    remedy = "a classifier needs two classes or more: FOLDER/CLASS/image.jpg"
    if len(inside) > 1:
        remedy = f"if the folders in it ({_first(inside)}) are the classes, give {escaped(given / name)}"
    raise SourceError(f"{escaped(given)} has one class, {escaped(name)!r}", remedy=remedy)


def names_for_both(train: Source, evaluation: Source) -> list[str] | None:
    """The class names to write into the spec: None, where both sets have the same. Raises SourceError."""
    if train.class_names == evaluation.class_names:
        return None
    unknown = sorted(set(evaluation.class_names) - set(train.class_names))
    if unknown:
        raise SourceError(
            f"{len(unknown)} classes of the evaluation images are none of the training images: {_first(unknown)}",
            remedy="give each class a folder in both, or move these away",
        )
    return list(train.class_names)


def notes(source: Source, images: RawImages) -> Iterator[str]:
    """What a reader should know of the classes: nested folders, single images, sets that are not used."""
    if images.unused and images.evaluation:
        taken = Path(images.evaluation["folder"]["root"]).name
        yield f"{_first(images.unused)} is not used: the evaluation set is {escaped(taken)}"
    if "folder" in images.train and (nested := nested_classes(source)):
        name, inside = next(iter(nested.items()))
        more = f", and of {len(nested) - 1} more classes alike" if len(nested) > 1 else ""
        yield (
            f"all images of class {escaped(name)!r} are in folders inside it ({_first(inside)}){more}: they are one "
            "class. If these folders are the classes, move them up, or number the classes in a list file"
        )
    single = [name for c, name in enumerate(source.class_names) if (source.labels == c).sum() == 1]
    if single and images.evaluation is None:
        yield (
            f"{len(single)} {'class has' if len(single) == 1 else 'classes have'} one image ({_first(single)}): it is "
            "trained on, and the accuracy of the class cannot be measured"
        )


def nested_classes(source: Source) -> dict[str, list[str]]:
    """The classes whose images are all in folders inside of the class's folder, with the names of these folders."""
    inside: dict[str, set[str]] = {}
    for path in source.paths if isinstance(source, FileSource) else ():
        name, *folders, _ = path.split("/")
        inside.setdefault(name, set()).add(folders[0] if folders else "")
    return {name: sorted(folders) for name, folders in inside.items() if "" not in folders}


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(escaped(name) for name in names[:SHOWN]) + more
