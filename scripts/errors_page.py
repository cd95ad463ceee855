"""Make docs/errors.md from the docstrings of the error classes.

    python scripts/errors_page.py            writes docs/errors.md
    python scripts/errors_page.py --check    exit code 1, and the classes whose docstring lacks a part

A docstring has one paragraph, then "Occurs:" and "What to do:". The sources are read, not imported: the page has every
class of the package that derives from LivtError, wherever it is.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "livt_scale"
PAGE = ROOT / "docs" / "errors.md"
TOP = "LivtError"
HEAD = """\
# Errors

This page lists every kind of error, its cause and what to do. It is made from the docstrings of the classes by
`python scripts/errors_page.py`. An error is one line on stderr: what happened, where, and a remedy.

```text
livt: error: MESSAGE. REMEDY
```

The exit code is 1 for a failure, 2 for wrong usage and 85 for a run that was stopped and saved. The option `--debug`,
before the command, adds the traceback; a traceback without it is a bug. A program that calls the package
catches `livt_scale.LivtError`, whose `message` and `remedy` are the two parts of the line.
"""


@dataclass(frozen=True)
class ErrorClass:
    """One class, as its source has it; a part that its docstring lacks is empty."""

    name: str
    base: str
    module: str
    exit_code: str | None  # None: that of the base
    what: str
    occurs: str
    what_to_do: str


def error_classes(package: Path = PACKAGE) -> dict[str, ErrorClass]:
    """Every class that derives from LivtError, by name; a class comes after its base."""
    found = {one.name: one for path in sorted(package.rglob("*.py")) for one in _classes_in(path, package)}
    tree, frontier = {TOP: found[TOP]}, [TOP]
    while frontier:
        base = frontier.pop(0)
        below = [one for one in found.values() if one.base == base]
        tree |= {one.name: one for one in below}
        frontier += [one.name for one in below]
    return tree


def _classes_in(path: Path, package: Path) -> Iterator[ErrorClass]:
    module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and len(node.bases) == 1 and isinstance(node.bases[0], ast.Name):
            text = ast.get_docstring(node) or ""
            what, _, rest = text.partition("\n\n")
            parts = re.search(r"Occurs: (.+)\nWhat to do: (.+?)(?:\n\n|\Z)", rest, re.DOTALL)
            occurs, what_to_do = (_line(parts[1]), _line(parts[2])) if parts else ("", "")
            code = _exit_code(node)
            yield ErrorClass(node.name, node.bases[0].id, module, code, _line(what), occurs, what_to_do)


def _line(text: str) -> str:
    return " ".join(text.split())


def _exit_code(node: ast.ClassDef) -> str | None:
    names = {"EXIT_FAILED": "1", "EXIT_USAGE": "2", "EXIT_PREEMPTED": "85"}
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
            return names[statement.value.id]
    return None


def page(classes: dict[str, ErrorClass]) -> str:
    """docs/errors.md."""
    lines = [HEAD, "```text", *_tree(classes, TOP), "```", ""]
    for one in _in_order(classes, TOP):
        code = _inherited_code(classes, one)
        lines += [f"## {one.name}", ""]
        lines += [f"{one.what} Exit code {code}; `from {one.module} import {one.name}`.", ""]
        lines += [f"- **Occurs:** {one.occurs}", f"- **What to do:** {one.what_to_do}", ""]
    return "\n".join(lines)


def _below(classes: dict[str, ErrorClass], name: str) -> list[ErrorClass]:
    return [one for one in classes.values() if one.base == name]


def _in_order(classes: dict[str, ErrorClass], name: str) -> Iterator[ErrorClass]:
    yield classes[name]
    for one in _below(classes, name):
        yield from _in_order(classes, one.name)


def _tree(classes: dict[str, ErrorClass], name: str, indent: str = "") -> Iterator[str]:
    if not indent:
        yield name
    below = _below(classes, name)
    for k, one in enumerate(below):
        last = k == len(below) - 1
        yield f"{indent}{'└──' if last else '├──'} {one.name}"
        yield from _tree(classes, one.name, indent + ("    " if last else "│   "))


def _inherited_code(classes: dict[str, ErrorClass], one: ErrorClass) -> str:
    while one.exit_code is None:
        one = classes[one.base]
    return one.exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only look for docstrings that lack a part")
    options = parser.parse_args()
    classes = error_classes()
    lacking = [one.name for one in classes.values() if not (one.what and one.occurs and one.what_to_do)]
    if lacking:
        print(f"no 'Occurs:' and 'What to do:' in the docstring of {', '.join(lacking)}", file=sys.stderr)
        sys.exit(1)
    if not options.check:
        PAGE.write_text(page(classes), encoding="utf-8")


if __name__ == "__main__":
    main()
