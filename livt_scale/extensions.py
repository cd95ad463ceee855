"""Load what others add to the registries: losses, samplers, optimizers, … See docs/extending.md.

Two places name extensions: the environment variable LIVT_EXTENSIONS (modules, or paths of .py files, separated by
commas), which torchrun's processes and Slurm jobs inherit, and the entry points `livt_scale.extensions` of installed
packages. Each is imported once per process, before a recipe is checked.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from livt_scale.util.errors import LivtError, UsageError
from livt_scale.util.outside import real_path

VARIABLE = "LIVT_EXTENSIONS"
GROUP = "livt_scale.extensions"
_loaded: set[str] = set()


def load_extensions() -> None:
    """Import every extension that is named. Raises UsageError with the file and line that failed."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    named += _installed(tuple(sys.path))
    for name in named:
        if name not in _loaded:
            _load(name)
            _loaded.add(name)


@cache
def _installed(path: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG001  what the answer depends on
    """The modules that installed packages name. Reading the metadata of all packages takes longer than a recipe."""
    return tuple(point.value.partition(":")[0] for point in entry_points(group=GROUP))


def _load(name: str) -> None:
    try:
        if name.endswith(".py"):
            _load_file(real_path(name))
        else:
            importlib.import_module(name)
    except LivtError:  # a name that is taken: the error has the place
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        line = error.lineno if isinstance(error, SyntaxError) else at.lineno
        file = error.filename if isinstance(error, SyntaxError) else at.filename
        raise UsageError(
            f"the extension {name} cannot be imported: {file}, line {line}: {type(error).__name__}: {error}",
            remedy=f"correct it, or take it out of {VARIABLE}",
        ) from error


def _load_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"livt_extension_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that its classes can be pickled
    spec.loader.exec_module(module)
