"""The documentation site: every page is in its navigation, every reference resolves, each page has a purpose."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


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
