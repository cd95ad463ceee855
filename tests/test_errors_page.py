"""docs/errors.md is what the docstrings of the error classes say, and each of them says it."""

from pathlib import Path

import pytest

from livt_scale.util import atomic, errors
from livt_scale.util.errors import LivtError
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
page = load_script(ROOT / "scripts" / "errors_page.py")
CLASSES = page.error_classes()


def test_the_page_is_what_the_script_makes():
    made = page.page(CLASSES)
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == made, "python scripts/errors_page.py"


@pytest.mark.parametrize("one", CLASSES.values(), ids=CLASSES)
def test_each_class_says_when_it_occurs_and_what_to_do(one):
    assert one.what.endswith((".", "line."))
    assert one.occurs.endswith(".")
    assert one.what_to_do.endswith((".", ")."))


def test_the_tree_is_that_of_the_classes_themselves():
    imported = {c.__name__: c for module in (errors, atomic) for c in vars(module).values() if isinstance(c, type)}
    imported = {name: c for name, c in imported.items() if issubclass(c, LivtError)}
    assert imported.keys() == CLASSES.keys()
    for name, one in CLASSES.items():
        assert imported[name].__bases__[0].__name__ == one.base
        assert str(imported[name].exit_code) == page._inherited_code(CLASSES, one)


def test_a_class_anywhere_below_another_error_is_found(tmp_path):
    package = tmp_path / "pack"
    (package / "inner").mkdir(parents=True)
    (package / "errors.py").write_text("class LivtError(Exception):\n    exit_code = EXIT_FAILED\n")
    (package / "inner" / "odd.py").write_text(
        'class Odd(LivtError):\n    """Odd."""\n\n\nclass Other(ValueError): ...\n'
    )
    found = page.error_classes(package)
    assert list(found) == ["LivtError", "Odd"]
    assert (found["Odd"].module, found["Odd"].what, found["Odd"].occurs) == ("pack.inner.odd", "Odd.", "")
