"""Makes untrusted text safe to print: names of files, tensors, classes and checkpoints, and servers' replies.

    escaped("cat\\x1b[2J\\n.jpg")             "cat\\\\x1b[2J\\\\n.jpg"
    escaped("a\\nb\\x07", keep="\\n")         a text of several lines of ours, in which only "\\x07" is replaced

A control character could move the cursor, retitle the terminal or fake a line of a log; a direction override reverses
what follows it; half a surrogate pair cannot be encoded at all. Errors (`util.errors`), log lines (`util.log`) and what
commands print (`cli.output`) pass through here, so a caller only escapes a name that may contain a newline.
"""

from __future__ import annotations

import unicodedata

UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode's categories


def escaped(text: object, *, keep: str = "") -> str:
    """`text` with each character that is not printable as a backslash escape, except those in `keep`."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def visible(text: str) -> str:
    """For a page: `text` with each character that is not seen (controls, turns of direction, no character at all) as
    its number."""
    plain = "".join(f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in UNSEEN else c for c in text)
    return plain if plain.strip() else repr(text)


def first_line(error: BaseException, *, max_chars: int = 300) -> str:
    """The message of a library's `error`, as one short line; its class if the message is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return escaped(lines[0])[:max_chars]


def counted(count: int, one: str, many: str = "") -> str:
    """1 rank, 2 ranks; `many`: the plural where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
