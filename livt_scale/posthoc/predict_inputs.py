"""The inputs of `livt predict`: which images, and what is checked of them before PyTorch is loaded.

check_inputs(Path("exports/try"), Path("photos"))
images_at(Path("photos"))              -> (Path("photos"), ["trip/a.jpg", "trip/b.jpg"], 0)
images_at(Path("photos/trip/a.jpg"))   -> (Path("photos/trip"), ["a.jpg"], 0)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from livt_scale.data.build.sources import IMAGE_ENDINGS, OTHER_IMAGE_ENDINGS
from livt_scale.train.run_dir import is_run
from livt_scale.util.errors import DataError, UsageError

CSV_MARK = b"file,error,number_1,"  # how a file of ours starts
EXPORT_CONFIG = "config.json"


def check_inputs(path: Path, images: Path) -> None:
    """Raise UsageError if `path` can be neither a run nor an export, and DataError if there is no image at `images`.

    Reads no file, and of a folder no more names than there are before its first image.
    """
    if not is_run(path) and not (path / EXPORT_CONFIG).is_file():
        raise UsageError(
            f"{path} is neither a run nor an export",
            remedy=f"a run holds recipe.yaml and finetune/, an export {EXPORT_CONFIG} and its weights",
        )
    if not _is_one_file(images) and not any(is_image for _, is_image in _below(images)):
        raise _no_image(images)


def images_at(path: Path) -> tuple[Path, list[str], int]:
    """(a folder, paths of the images in it, by name, how many other files there are).

    `path` is the folder, or one image: any file, whatever its ending. Raises DataError where there is no image, or as
    `images_below`.
    """
    if _is_one_file(path):
        return path.parent, [path.name], 0
    files, others = images_below(path)
    if not files:
        raise _no_image(path)
    return path, files, others


def images_below(folder: Path) -> tuple[list[str], int]:
    """(paths below `folder` of all files with an image's ending, by name; how many other files there are).

    At any depth. Hidden files and folders are skipped. A link to a file is a file; one to a folder is not followed,
    because it may form a cycle. Raises DataError if a folder cannot be listed.
    """
    found, others = [], 0
    for path, is_image in _below(folder):
        if is_image:
            found.append(path)
        else:
            others += 1
    return sorted(found), others


def _below(folder: Path) -> Iterator[tuple[str, bool]]:
    """(path below `folder`, whether it is an image by its name) of each file."""

    def refuse(error: OSError) -> None:
        where = os.fsdecode(error.filename or folder)
        raise DataError(f"{where}: {error.strerror}", remedy="give a folder of images, or one image") from error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.relpath(os.path.join(here, name), folder)  # noqa: PTH118 - a million times
            yield path, name.lower().endswith((*IMAGE_ENDINGS, *OTHER_IMAGE_ENDINGS)) and not name.startswith(".")


def _is_one_file(path: Path) -> bool:
    return path.exists() and not path.is_dir()


def _no_image(folder: Path) -> DataError:
    return DataError(f"there is no image below {folder}", remedy="give the folder that holds them")
