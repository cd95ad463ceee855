"""The files that ship with the package: recipes, shard specs with their small sets, batch script and sites, studies.

    shipped("recipes/base/livt.yaml")                       its path, in a clone and in an installed wheel
    named("livt:imagenet_lt/vit_b16", kind="recipes")       recipes/imagenet_lt/vit_b16.yaml of the above
    named("mine.yaml", kind="recipes")                      Path("mine.yaml"): not a shipped name

In a clone they are the top-level folders beside the package; a wheel has copies of them in livt_scale/shipped (setup.py
makes them, laid out alike, so that relative paths from one file to another hold). A package without either was built
or copied incompletely, and the first use of a file reports that.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from livt_scale.util.errors import InstallationError, UsageError, nearest

PREFIX = "livt:"
MARKER = "recipes/base/livt.yaml"  # a folder named recipes next to the package may be another project's
Kind = Literal["recipes", "shards", "studies", "counts"]
SINGULAR: dict[Kind, str] = {
    "recipes": "recipe", "shards": "shard spec", "studies": "study", "counts": "list of class counts",
}  # fmt: skip
COUNTS = "shards/counts"  # JSON; the other kinds are YAML, in a folder named as the kind


def root() -> Path:
    """The folder that holds recipes/, shards/, slurm/ and studies/. Raises InstallationError if it is missing."""
    package = Path(str(files("livt_scale")))
    for folder in (package / "shipped", package.parent):
        if (folder / MARKER).is_file():
            return folder
    raise InstallationError(
        f"the files that ship with livt_scale are missing: there is neither {package / 'shipped'} nor "
        f"{package.parent / 'recipes'}",
        remedy="install a wheel that `pip wheel .` built in a clone, or run from a clone",
    )


def shipped(name: str) -> Path:
    """The path of a shipped file or folder. Raises InstallationError where it is missing."""
    path = root() / name
    if not path.exists():
        raise InstallationError(
            f"{path} is missing", remedy="install the package again, or restore it with git checkout"
        )
    return path


def is_name(path: str | Path) -> bool:
    return str(path).startswith(PREFIX)


def named(path: str | Path, *, kind: Kind) -> Path:
    """The shipped file that `livt:NAME` means; any other `path` as it is. Raises UsageError: no such name."""
    if not is_name(path):
        return Path(path)
    folder, ending = _place(kind)
    name = str(path).removeprefix(PREFIX).removesuffix(ending)
    names = names_of(kind)
    if name not in names:
        raise UsageError(f"{PREFIX}{name} is not a shipped {SINGULAR[kind]}", remedy=nearest(name, names))
    return folder / f"{name}{ending}"


def names_of(kind: Kind) -> list[str]:
    """Every NAME of `livt:NAME`, sorted."""
    folder, ending = _place(kind)
    found = [*folder.glob(f"*{ending}"), *folder.glob(f"*/*{ending}")]
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in found)


def _place(kind: Kind) -> tuple[Path, str]:
    """The folder of the files of a kind, and how their names end."""
    return (root() / COUNTS, ".json") if kind == "counts" else (root() / kind, ".yaml")
