"""The files of a recipe: each read once, and laid over those that it extends.

    read_tree(Path("mine.yaml"))        # the values of mine.yaml over those of its bases; `extends` is taken out

A recipe may come from somebody else, so the size of a file, the number of files and the length of a chain are bounded,
and a file that is not a recipe is refused without quoting it: `extends: /etc/passwd` shows nothing of that file.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import Recipe
from livt_scale.config.renamed import REMOVED, RENAMED
from livt_scale.config.run_place import run_of_saved
from livt_scale.config.yaml import Tree, Where, parse, shown_value
from livt_scale.util.errors import RecipeError, UsageError, nearest
from livt_scale.util.outside import read_text, real_path
from livt_scale.util.resources import is_name, named

MAX_FILES = 64
MAX_CHAIN = 16
ENDINGS = (".yaml", ".yml")


def read_tree(path: Path) -> Tree:
    """The tree of `path` laid over the trees that it extends. Raises RecipeError.

    The saved recipe of a run is of that folder, whatever it was once called.
    """
    tree = _Files().read(path, chain=())
    if run := run_of_saved(path):
        tree.values["run_dir"] = str(run)
    return tree


@dataclass
class _Files:
    """The trees read so far, by the path without links: a file that is extended twice is read once."""

    trees: dict[Path, Tree] = field(default_factory=dict)

    def read(self, path: Path, *, chain: tuple[Path, ...]) -> Tree:
        """`chain`: the files on the way here."""
        text, real = _text(path), real_path(path)
        if real in chain:
            names = " -> ".join(p.name for p in (*chain[chain.index(real) :], real))
            raise RecipeError(f"{path}: `extends` goes round in a circle: {names}", remedy="remove one of them")
        if real in self.trees:
            return self.trees[real]
        if len(chain) >= MAX_CHAIN or len(self.trees) >= MAX_FILES:
            raise RecipeError(
                f"{path}: `extends` leads through more than {MAX_CHAIN} files in a row, or {MAX_FILES} in all",
                remedy="join some of them",
            )
        own = parse(text, path)
        _check_is_recipe(own, path)
        where = own.origins.get(("extends",), str(path))
        tree = Tree()
        for base in _bases(own.values.pop("extends", []), where):
            file = _base_file(path, base, where)
            under = self.read(file, chain=(*chain, real))
            if run_of_saved(file):  # this is another run, with the values of that one
                under = Tree({name: value for name, value in under.values.items() if name != "run_dir"}, under.origins)
            _lay_over(tree, under)
        _lay_over(tree, own)
        self.trees[real] = tree
        return tree


def _check_is_recipe(tree: Tree, path: Path) -> None:
    known = {"extends", *Recipe.model_fields, *(name.partition(".")[0] for name in (*RENAMED, *REMOVED))}
    if not known & tree.values.keys():
        raise RecipeError(f"{path} is not a recipe: no name at its top is a field of one", remedy="see docs/recipes.md")


def _bases(extends: Any, where: str) -> list[str]:
    bases = [extends] if isinstance(extends, str) else extends
    if not isinstance(bases, list) or not all(isinstance(b, str) and b for b in bases):
        raise RecipeError(
            f"{where}: extends is {shown_value(extends)}", remedy="give the path of a recipe file, or a list of them"
        )
    return bases


def _base_file(path: Path, base: str, where: str) -> Path:
    if is_name(base):
        try:
            return named(base, kind="recipes")
        except UsageError as error:
            raise RecipeError(f"{where}: extends: {error.message}", remedy=error.remedy) from None
    file = _beside(path, base)
    if file.suffix not in ENDINGS:
        raise RecipeError(f"{where}: extends {base}, which does not end in .yaml", remedy="only recipes are extended")
    if not file.exists():
        raise RecipeError(f"{where}: extends {base}, but there is no such file", remedy=_near(file))
    return file


def _beside(path: Path, base: str) -> Path:
    """`base` as seen from `path`, without `..` on the way where that is the same file (a link may lead elsewhere)."""
    direct = path.parent / base
    short = Path(os.path.normpath(direct))
    return short if real_path(short) == real_path(direct) else direct


def _text(path: Path) -> str:
    try:
        return read_text(path, "recipe")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}", remedy=_near(path)) from None
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not a recipe: {error}") from None


def _near(path: Path) -> str:
    options = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    return nearest(str(path), options) if options else "give the path of a YAML file, such as recipes/SET/SIZE.yaml"


def _lay_over(base: Tree, over: Tree) -> None:
    """Put `over` on `base` in place: parts are joined name by name, anything else is replaced."""
    replaced: set[Where] = set()

    def laid(under: Any, top: Any, where: Where) -> Any:
        if isinstance(under, dict) and isinstance(top, dict):
            return {**under, **{key: laid(under.get(key), value, (*where, key)) for key, value in top.items()}}
        if isinstance(under, dict | list):
            replaced.add(where)
        return top

    base.values = laid(base.values, over.values, ())
    forget_below(base, replaced)
    base.origins.update(over.origins)


def forget_below(tree: Tree, replaced: Collection[Where]) -> None:
    """The values at the paths `replaced` are other ones now: what was inside them is no longer written anywhere."""
    if replaced:
        gone = [path for path in tree.origins if any(path[:depth] in replaced for depth in range(1, len(path)))]
        for path in gone:
            del tree.origins[path]
