"""Images listed by a JSON file as iNaturalist publishes it (and COCO, which it follows).

    {"images": [{"id": 7, "file_name": "train_val2018/Aves/2761/b7.jpg"}, …],
     "annotations": [{"image_id": 7, "category_id": 2761}, …],
     "categories": [{"id": 2761, "name": "…"}, …]}

The class of an image is its category's number, which are 0 to C - 1 in iNaturalist 2018. `as_text` sorts them as text
(0, 1, 10, 100, 1000 …), the order of an image folder of categories, which LiVT's code and its published weights have.
Everything but these fields is left unread. What does not fit together (an image without an annotation, or with two; a
name outside the root) is an error before a shard is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from livt_scale.data.build.sources import FileSource, below_root, check_all_there, file_source
from livt_scale.data.build.tar import MAX_CLASSES
from livt_scale.util.errors import SourceError
from livt_scale.util.outside import read_json


def open_inaturalist(
    name: str,
    root: Path,
    *,
    annotations: Path,
    class_names: tuple[str, ...] | None = None,
    as_text: bool = False,
) -> FileSource:
    """The images of `annotations`, below `root`, in the file's order. Raises SourceError.

    `as_text`: class k is the k-th category number sorted as text; `class_names` then name the classes, not the numbers.
    """
    tree = _parse(annotations)
    images, labels_of = _field(tree, "images", annotations), _labels(tree, annotations)
    paths: list[str] = []
    labels: list[int] = []
    seen: set[int] = set()
    for number, image in enumerate(images):
        where = f"{annotations}, images[{number}]"
        path, key = _get(image, "file_name", str, where), _get(image, "id", int, where)
        if key in seen:
            raise SourceError(f"{where}: the id {key} is there twice", remedy="each image needs a unique id")
        if key not in labels_of:
            raise SourceError(
                f"{where}: image {key} has no annotation", remedy="give the file of a labelled split, as train2018.json"
            )
        paths.append(below_root(path, where))
        labels.append(labels_of[key])
        seen.add(key)
    if left := labels_of.keys() - seen:
        raise SourceError(
            f"{annotations}: {len(left):,} annotations are of no image, as {min(left)}",
            remedy="take them out, or put their images back",
        )
    names = _class_names(tree, labels, annotations)
    classes = np.array(labels, dtype=np.int64)
    if as_text:
        order = np.array(sorted(range(len(names)), key=str), dtype=np.int64)
        classes = np.argsort(order)[classes]
        names = tuple(str(c) for c in order)
    return check_all_there(file_source(name, class_names or names, classes, root, paths))


def _parse(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path, "annotations")
    except OSError as error:
        remedy = "unpack the annotations, or give their folder: --source NAME=FOLDER"
        raise SourceError(f"{path} cannot be read: {error.strerror}", remedy=remedy) from error
    except ValueError as error:
        raise SourceError(f"{path} cannot be read: {error}", remedy="get it again from where it came") from error
    if not isinstance(tree, dict):
        raise SourceError(f"{path} holds no images and annotations", remedy="give the file of a labelled split")
    return tree


def _labels(tree: dict[str, Any], path: Path) -> dict[int, int]:
    """Category by image. An image with two is of no class."""
    found: dict[int, int] = {}
    for number, annotation in enumerate(_field(tree, "annotations", path)):
        where = f"{path}, annotations[{number}]"
        image, label = _get(annotation, "image_id", int, where), _get(annotation, "category_id", int, where)
        if not 0 <= label < MAX_CLASSES:
            raise SourceError(f"{where}: the category is {label}, outside 0 to {MAX_CLASSES - 1}")
        if image in found:
            raise SourceError(f"{where}: image {image} has two annotations", remedy="leave one class for each image")
        found[image] = label
    return found


def _class_names(tree: dict[str, Any], labels: list[int], path: Path) -> tuple[str, ...]:
    """The categories' numbers; their names are in no order and not always given."""
    count = max(labels, default=-1) + 1
    if "categories" in tree:
        numbers = [
            _get(c, "id", int, f"{path}, categories[{k}]") for k, c in enumerate(_field(tree, "categories", path))
        ]
        if sorted(numbers) != list(range(len(numbers))):
            raise SourceError(
                f"{path}: the categories are not numbered 0 to {len(numbers) - 1}",
                remedy="number them so, in categories and annotations",
            )
        count = max(count, len(numbers))
    return tuple(str(c) for c in range(count))


def _field(tree: dict[str, Any], name: str, path: Path) -> list[Any]:
    value = tree.get(name)
    if not isinstance(value, list):
        raise SourceError(f"{path} has no list {name!r}", remedy="give the file of a labelled split, as train2018.json")
    return value


def _get(entry: Any, name: str, kind: type[Any], where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SourceError(f"{where}: {name} is {value!r}, not of type {kind.__name__}")
    return value
