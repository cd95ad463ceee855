"""How plain is the English that people read? Counts words of a dialect that no page, message or docstring should have.

    python scripts/check_language.py                 # words per 1000, by kind of text
    python scripts/check_language.py --lines docs    # each place in files whose path starts so
    python scripts/check_language.py --most 1        # fail above one per 1000 in any kind

Kinds: docs (Markdown without code), help (strings and docstrings of livt_scale/cli/), messages (other string literals
with a space in livt_scale/), prose (docstrings and comments there). Where a word has a plain use too (`the whole
number`), PLAIN lists that use.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

DIALECT = re.compile(
    r"\b(?:"
    r"told|tells?|telling|said"  # reported, printed, shows
    r"|go(?:es)? on|went on|going on|gone on"  # continue, resume
    r"|whole|at once|anew"  # complete, immediately, again
    r"|so (?:many|long|much)(?! (?:as|that))"
    r"|lies|lay|lain|stands?|stood"  # is
    r"|mend(?:s|ed|ing)?|reckon(?:s|ed|ing)?"  # repair, count
    r"|(?:is|are|was|were|be) (?-i:none)|of (?:its|their|his|your|our) own"
    r"|beneath|hence|thereof|whereof|bereft|how-manieth|heed(?:s|ed)?|ere"
    r")\b",
    re.IGNORECASE,
)
PLAIN = re.compile(
    r"whole (?:number|slide)|lay(?:s)? (?:out|over)|(?:stand|stands|stood) for|on the whole|data lies", re.IGNORECASE
)


def prose_of_page(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a Markdown page outside fenced blocks, without inline code and link targets."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", " ", line)


def strings_of(text: str) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(messages, prose) of a Python file: literals with a space; docstrings and comments."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    messages: list[tuple[int, str]] = []
    prose: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            (prose if id(node) in docstrings else messages).append((node.lineno, node.value))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            prose.append((token.start[0], token.string))
    return messages, prose


def texts() -> Iterator[tuple[str, Path, int, str]]:
    """(kind, file, line, text) of everything that people read."""
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]):
        yield from (("docs", page, number, line) for number, line in prose_of_page(page.read_text(encoding="utf-8")))
    for file in sorted(ROOT.glob("livt_scale/**/*.py")):
        messages, prose = strings_of(file.read_text(encoding="utf-8"))
        of_cli = file.parent.name == "cli"
        yield from (("help" if of_cli else "messages", file, number, line) for number, line in messages)
        yield from (("help" if of_cli else "prose", file, number, line) for number, line in prose)


def rates(found: Iterable[tuple[str, Path, int, str]], *, shown: str | None = None) -> dict[str, float]:
    """Words of the dialect per 1000, by kind, printed; `shown`: print each place in files whose path starts so."""
    words: Counter[str] = Counter()
    marked: Counter[str] = Counter()
    for kind, file, number, text in found:
        words[kind] += len(text.split())
        name = file.relative_to(ROOT).as_posix()
        for match in DIALECT.finditer(PLAIN.sub(" ", text)):
            marked[kind] += 1
            if shown is not None and name.startswith(shown):
                print(f"{name}:{number}: {match[0]}: {' '.join(text.split())[:120]}")
    result = {kind: 1000 * marked[kind] / words[kind] for kind in words}
    for kind, rate in result.items():
        print(f"{kind:<9} {words[kind]:>7} words {marked[kind]:>5} of the dialect {rate:>6.1f} per 1000")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", metavar="PATH", help="print each place in files whose path starts so")
    parser.add_argument("--most", type=float, help="fail above this number per 1000 words in any kind of text")
    wanted = parser.parse_args()
    highest = max(rates(texts(), shown=wanted.lines).values())
    return int(wanted.most is not None and highest > wanted.most)


if __name__ == "__main__":
    sys.exit(main())
