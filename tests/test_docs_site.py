"""The documentation site: every page is in its navigation, every reference resolves, each page has a purpose."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import livt_scale

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
MAX_WORDS = 2000
MADE = {"results.md"}  # as long as its results


@pytest.mark.slow  # .ci/run makes the site
def test_the_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-d", f"{tmp_path}/cache"]
    result = subprocess.run(
        [*build, "-b", "html", "docs", f"{tmp_path}/site"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert {page.stem for page in PAGES} <= {page.stem for page in (tmp_path / "site").glob("*.html")}
    assert (tmp_path / "site/searchindex.js").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_one_title(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    outside, inside_block = [], False
    for line in lines:
        inside_block ^= line.startswith("```")
        outside += [] if inside_block else [line]
    assert [line for line in outside if line.startswith("# ")] == lines[:1]


def without_blocks(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in MADE], ids=lambda page: page.stem)
def test_a_page_can_be_read_in_one_go(page):
    assert len([word for word in without_blocks(page).split() if re.search(r"\w", word)]) <= MAX_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_heading_is_a_question(page):
    heads = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    assert [head for head in heads if head.endswith("?")] == []


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs/reference-api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, re.MULTILINE))
    objects = set(livt_scale.__all__) - {"losses", "optim", "__version__"}
    assert {name for name in named if "." not in name} == objects


def test_no_page_installs_the_package_by_name():
    pages = [*PAGES, ROOT / "README.md"]
    assert [
        p.name for p in pages if re.search(r"pip3? install ['\"]?livt[-_]scale", p.read_text(encoding="utf-8"))
    ] == []
