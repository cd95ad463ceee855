"""The contract of the package at the level of files, for `make lint`: what import-linter does not see.

    python scripts/check_imports.py              prints each breach; exit code 1 if there is one
    python scripts/check_imports.py --numbers    files, rooms, imports inside functions

1. No circle of imports. Those inside functions and under TYPE_CHECKING count: they hide a circle, they do not open it.
2. Imports inside functions only in the files of DEFERRED, each with its reason.
3. A class name occurs once in the package, and so does a file name, unless SHARED_FILE_NAMES gives the role that the
   files have in common.

A line of a list that is no longer needed is a breach as well: the lists only shrink.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "livt_scale"

START_UP = "start-up: a command imports what it runs when it runs; `livt --help` needs none of it"
TORCH = "start-up: torch takes seconds; `livt --help`, `livt plan` and the checks of a recipe do without"
CHECKS = "a library that is missing or broken is a finding of livt doctor, not its end"
# Files or folders ("cli/") that may import inside functions, and why.
DEFERRED: dict[str, str] = {
    "cli/": START_UP,
    "losses/options.py": TORCH,
    "config/timm_models.py": TORCH,
    "api/init.py": TORCH,
    "api/registration.py": TORCH,
    "api/train.py": TORCH,
    "data/build/writer.py": "start-up: webdataset imports torch, and only writing a shard needs it",
    "data/image/augment.py": "start-up: timm takes seconds, and only RandAugment needs it",
    "data/remote/fetch.py": "start-up: fsspec and aiohttp take half a second, and only sets at a URL need them",
    "train/telemetry/trackers.py": "start-up: only the trackers that a recipe asks for; mlflow is optional",
    "train/telemetry/tensorboard.py": "start-up: accelerate and TensorBoard, which a recipe may turn off",
    "export/timm.py": "start-up: timm takes seconds, and only the check of an export needs it",
    "export/peft.py": "optional: peft comes with an extra",
    "models/parameter_efficient.py": "optional: peft comes with an extra",
    "export/onnx.py": "optional: onnxruntime comes with an extra, and without it an export is not checked",
    "plan/exact.py": "start-up: torch is for the process that it starts",
    "optim.py": "start-up: timm takes seconds, and only LARS and layer decay need it",
    "weights/timm_weights.py": "optional: only a download needs the hub's client",
    "train/preflight.py": TORCH,
    "study/collect.py": TORCH,
    "study/table.py": TORCH,
    "study/report/html.py": "optional: bokeh comes with an extra, and its absence is an error that names it",
    "study/report/interactive.py": "optional: bokeh comes with an extra, and its absence is an error that names it",
    "util/plots.py": "start-up: matplotlib takes half a second, and most runs of a command draw nothing",
    "distributed/flight_recorder.py": "start-up: doctor/checks.py, which needs no torch, takes the limits from there",
    "doctor/bench.py": CHECKS,
    "doctor/checks.py": CHECKS,
    "doctor/node.py": CHECKS,
}

# File names that occur several times. Files of cli/ are named as their commands, and are not counted.
SHARED_FILE_NAMES: dict[str, str] = {
    "catalog.py": "what there is: checkpoints of a stage, recipes that ship",
    "decode.py": "decoding images, and how fast a machine does it",
    "load.py": "from files to objects: a checkpoint, a recipe",
    "manifest.py": "the manifest of shards and that of a checkpoint",
    "plots.py": "the style of all plots, and the plots of an evaluation",
}

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """File by module name: "livt_scale.data.manifest", and "livt_scale.losses" for losses/__init__.py."""
    named = {path: path.relative_to(root.parent).with_suffix("").parts for path in sorted(root.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in named.items()}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def import_graph(found: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which of the modules each of them imports, wherever in the file."""
    return {
        name: {other for other in _imported(path, found) if other in found} - {name} for name, path in found.items()
    }


def _imported(path: Path, found: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:  # a module of the package, or a name in its __init__.py
                full = f"{node.module}.{alias.name}"
                yield full if full in found else node.module


def circles(graph: Graph) -> list[set[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(component)

    for module in graph:
        if module not in index:
            visit(module)
    return found


def deferred_imports(path: Path) -> int:
    """Import statements inside functions of the file."""
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = {id(node) for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)}
    return len(found)


def check_circles(graph: Graph) -> list[str]:
    return [f"circle of imports: {', '.join(sorted(component))}" for component in circles(graph)]


def check_deferred(counts: Mapping[str, int], allowed: Mapping[str, str]) -> list[str]:
    """counts: deferred imports by path below the package."""

    def covers(entry: str, path: str) -> bool:
        return path.startswith(entry) if entry.endswith("/") else path == entry

    unlisted = [p for p, n in counts.items() if n and not any(covers(entry, p) for entry in allowed)]
    idle = [entry for entry in allowed if not any(n and covers(entry, p) for p, n in counts.items())]
    return [
        *(f"{path}: {counts[path]} imports inside functions; move them up, or list the file" for path in unlisted),
        *(f"DEFERRED: {entry} has no import inside a function; take it out of the list" for entry in idle),
    ]


def check_class_names(found: Mapping[str, Path]) -> list[str]:
    """Names with a leading underscore belong to their file alone."""
    places = defaultdict(list)
    for module, path in found.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    return [f"class {name} occurs in {', '.join(where)}" for name, where in places.items() if len(where) > 1]


def check_file_names(paths: list[str], allowed: Mapping[str, str]) -> list[str]:
    places = defaultdict(list)
    for path in paths:
        name = Path(path).name
        if not path.startswith("cli/") and not name.startswith("__"):
            places[name].append(path)
    several = {name: where for name, where in places.items() if len(where) > 1}
    return [
        *(f"file name {name}: {', '.join(where)}" for name, where in several.items() if name not in allowed),
        *(f"SHARED_FILE_NAMES: {name} occurs once; take it out of the list" for name in allowed if name not in several),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", action="store_true", help="print sizes instead")
    numbers = parser.parse_args().numbers

    root = ROOT / PACKAGE
    found = modules(root)
    paths = {str(path.relative_to(root)): path for path in found.values()}
    counts = {name: deferred_imports(path) for name, path in paths.items()}
    if numbers:
        rooms = {path.parent for path in paths.values() if path.name != "__init__.py"}
        inside = [n for n in counts.values() if n]
        print(
            f"{len(paths)} files in {len(rooms)} rooms; {sum(inside)} imports inside functions in {len(inside)} files"
        )
        return 0

    breaches = [
        *check_circles(import_graph(found)),
        *check_deferred(counts, DEFERRED),
        *check_class_names(found),
        *check_file_names(list(paths), SHARED_FILE_NAMES),
    ]
    for breach in breaches:
        print(breach)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
