"""The location of a run: one rule for `run_dir`, and the folders that may be one.

    run_dir: runs/a             relative to the working directory, in a recipe and with --set alike; saved as absolute
    livt train RUN/recipe.yaml  a run's saved recipe means that run, wherever its folder was moved or copied

A relative `run_dir` names another folder in another working directory. So before a command starts a run it looks for
that name beside the recipe file and in the folders above it, where a command in the folder of the project would have
put it, and refuses to start a second one (`other_run`). A new run needs a new or an empty folder (`check_place`).
"""

from __future__ import annotations

import os
from pathlib import Path

from livt_scale.config.recipe import STAGES
from livt_scale.util.errors import UsageError
from livt_scale.util.outside import real_path

RUNS = "runs"  # a run without run_dir is in runs/NAME
SAVED = "recipe.yaml"
LOCK = ".lock"

# what `livt submit`, a study and a shell leave in the folder of a run before its first start
_BEFORE_A_START = ("slurm", "code", "lost+found")
_HIDDEN = (LOCK, ".livt-writing-", ".nfs", ".gitkeep")
_LOG_ENDINGS = (".log", ".txt", ".out", ".err")
_MAX_NAMED = 3
# /dev/shm is memory for users, and the rest is not for their files
_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr")
_OF_USERS = ("/dev/shm", "/usr/local")  # noqa: S108 - not a temporary file


def absolute_run_dir(run_dir: str | None, *, name: str) -> Path:
    """`run_dir` (None: runs/NAME) from the working directory on; links stay links."""
    return Path(os.path.abspath(run_dir or Path(RUNS) / name))  # noqa: PTH100


def holds_run(folder: Path) -> bool:
    """Whether a run was started in `folder` or submitted from it; a recipe.yaml alone proves nothing."""
    started = any((folder / stage / name).exists() for stage in STAGES for name in ("status.json", "checkpoints"))
    saved = (folder / SAVED).is_file() and (folder / LOCK).is_file()
    return started or saved or (folder / "slurm" / "chain.json").is_file()


def run_of_saved(recipe: Path) -> Path | None:
    """The run directory of which `recipe` is the saved recipe, absolute; None: it is not the recipe of a run."""
    folder = Path(os.path.abspath(recipe)).parent  # noqa: PTH100 - links stay links
    return folder if recipe.name == SAVED and recipe.is_file() and holds_run(folder) else None


def other_run(run_dir: str | None, *, name: str, recipe: Path) -> Path | None:
    """The run that a relative `run_dir` means in the folder of `recipe` or above, if there is no such run here."""
    relative = Path(run_dir or Path(RUNS) / name)
    if relative.is_absolute() or holds_run(relative):
        return None
    places = (folder / relative for folder in real_path(recipe).parents)
    return next((place for place in places if holds_run(place)), None)


def check_place(run_dir: Path) -> None:
    """Raise UsageError unless `run_dir` is a run, or new, or empty but for logs."""
    remedy = "give a new folder, as --set run_dir=runs/NAME"
    real = real_path(run_dir)
    if real in (Path("/"), real_path(Path.home())) or _is_of_the_system(real):
        raise UsageError(f"run_dir is {run_dir}, which is not a folder for a run", remedy=remedy)
    there = next(place for place in (real, *real.parents) if place.exists())
    if not there.is_dir():
        raise UsageError(f"run_dir is {run_dir}, and {there} is a file", remedy=remedy)
    if there != real or holds_run(real):
        return
    try:
        names = sorted(entry.name for entry in real.iterdir())
    except OSError as error:
        raise UsageError(f"run_dir {run_dir} cannot be read: {error.strerror}", remedy=remedy) from error
    foreign = [name for name in names if not _may_be_there(name)]
    if foreign:
        some = ", ".join(map(repr, foreign[:_MAX_NAMED])) + ", …" * (len(foreign) > _MAX_NAMED)
        raise UsageError(f"run_dir is {run_dir}, which is not a run and holds other files ({some})", remedy=remedy)


def _may_be_there(name: str) -> bool:
    return name in _BEFORE_A_START or name.startswith(_HIDDEN) or name.endswith(_LOG_ENDINGS)


def _is_of_the_system(folder: Path) -> bool:
    if any(folder.is_relative_to(place) and folder != Path(place) for place in _OF_USERS):
        return False
    return any(folder.is_relative_to(place) for place in _SYSTEM)
