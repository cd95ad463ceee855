"""The script that counts words of dialect: what it finds, what it leaves alone, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
script = load_script(ROOT / "scripts" / "check_language.py")


@pytest.mark.parametrize("text", ["It goes on by itself.", "the whole set", "There is none.", "a folder of its own"])
def test_words_of_the_dialect_are_found(text):
    assert script.DIALECT.search(script.PLAIN.sub(" ", text))


@pytest.mark.parametrize(
    "text", ["Training resumes.", "a whole number", "So many that they fit as that.", "T stands for"]
)
def test_plain_words_are_left_alone(text):
    assert not script.DIALECT.search(script.PLAIN.sub(" ", text))


def test_messages_and_prose_are_separate_kinds_and_code_of_a_page_is_not_counted():
    messages, prose = script.strings_of('"""A head."""\nx = "a message"  # a comment\ny = "word"\n')
    assert [text for _, text in messages] == ["a message"]
    assert [text for _, text in prose] == ["A head.", "# a comment"]
    page = "one `code` two\n```sh\nwhole\n```\nthree"
    assert [line.split() for _, line in script.prose_of_page(page)] == [["one", "two"], ["three"]]


def test_it_fails_above_the_bound_in_any_kind(monkeypatch, capsys):
    place = ROOT / "docs" / "x.md"
    texts = [("docs", place, 1, "plain " * 999 + "plain"), ("help", place, 1, "plain " * 998 + "whole anew")]
    monkeypatch.setattr(script, "texts", lambda: iter(texts))
    for bound, code in (("1.9", 1), ("2", 0)):
        monkeypatch.setattr("sys.argv", ["check_language.py", "--most", bound])
        assert script.main() == code
    assert "2.0 per 1000" in capsys.readouterr().out
