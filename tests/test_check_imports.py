"""scripts/check_imports.py: each kind of breach is found. That the package has none, `make lint` says."""

from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
check = load_script(ROOT / "scripts" / "check_imports.py")


@pytest.fixture
def package(tmp_path):
    """`package(path=text, …)` writes a package named p and gives its modules."""

    def write(**files):
        for name, text in {"": "", **files}.items():
            path = tmp_path / "p" / f"{name.replace('__', '/') or '__init__'}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return check.modules(tmp_path / "p")

    return write


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p import a",
        "from p.a import x",
        "def f():\n    from p.a import x\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import x\n",
        "from p import c",  # by way of c
    ],
)
def test_a_circle_is_found_however_it_is_hidden(package, back):
    graph = check.import_graph(package(a="import p.b\nx = 1\n", b=back, c="from p.a import x\n", d="import p.a\n"))
    [circle] = check.circles(graph)
    assert {"p.a", "p.b"} <= circle <= {"p.a", "p.b", "p.c"}
    assert check.check_circles(graph) == [f"circle of imports: {', '.join(sorted(circle))}"]


def test_modules_that_import_one_way_are_no_circle(package):
    assert (
        check.check_circles(check.import_graph(package(a="import p.b\n", b="import p.c\n", c="", d="import p.a\n")))
        == []
    )


def test_imports_inside_functions_are_counted_once_and_need_a_reason(package):
    found = package(
        a="import os\nclass A:\n    def f(self):\n        import re\n        def g():\n            import sys\n"
    )
    assert check.deferred_imports(found["p.a"]) == 2
    assert len(check.check_deferred({"a.py": 2, "cli/b.py": 1, "c.py": 0}, {"cli/": "start-up"})) == 1
    assert check.check_deferred({"a.py": 2}, {"a.py": "torch"}) == []
    assert len(check.check_deferred({"a.py": 0, "cli/b.py": 0}, {"a.py": "", "cli/": ""})) == 2  # no longer needed


def test_a_class_name_belongs_to_one_file(package):
    found = package(a="class Plan: ...\nclass _Part: ...\n", b="class Plan: ...\nclass _Part: ...\n")
    assert check.check_class_names(found) == ["class Plan occurs in p.a, p.b"]


def test_a_file_name_occurs_once_or_has_its_role_listed():
    paths = ["a/load.py", "b/load.py", "a/__init__.py", "b/__init__.py", "cli/x.py", "a/x.py"]
    assert check.check_file_names(paths, {}) == ["file name load.py: a/load.py, b/load.py"]
    assert check.check_file_names(paths, {"load.py": "role"}) == []
    assert len(check.check_file_names(paths, {"load.py": "role", "x.py": "role"})) == 1
