"""The node names in a Slurm host list, without asking Slurm: `SLURM_STEP_NODELIST`.

    expand("gpu[08-10,12]-ib,login")            gpu08-ib, gpu09-ib, gpu10-ib, gpu12-ib, login
    expand("rack[1-2]n[1-2].cluster.local")     rack1n1.cluster.local, rack1n2.…, rack2n1.…, rack2n2.…

A name may hold several brackets and text after them; the last bracket varies fastest, as in `scontrol show hostnames`.
A number keeps the width that its range begins with. Names are produced one at a time: a list of a billion costs nothing
until they are asked for.

Source: slurm_hostlist, src/common/hostlist.c, and `man scontrol`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from livt_scale.util.errors import UsageError

_ENTRY = re.compile(r"(?:[^\[\],]|\[[^\[\]]*\])+")  # commas within brackets do not separate entries
_PART = re.compile(r"\[([^\[\]]*)\]|[^\[\]]+")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
MAX_PARTS = 64  # brackets, and texts between them, of one entry


def expand(text: str) -> Iterator[str]:
    """The names in `text`, in its order. Raises UsageError, before the first name, for what is not a host list.

    >>> list(expand("a[1-2]b[7,9]"))
    ['a1b7', 'a1b9', 'a2b7', 'a2b9']
    """
    entries = _ENTRY.findall(text)
    if ",".join(entries) != text:
        raise _not_a_host_list(text)
    parsed = [[_choices(part, text) for part in _PART.finditer(entry)] for entry in entries]
    if any(len(parts) > MAX_PARTS for parts in parsed):
        raise _not_a_host_list(text)
    return (name for parts in parsed for name in _names(parts))


def _choices(part: re.Match[str], text: str) -> str | list[tuple[int, int, int]]:
    """Plain text, or the ranges (first, last, width) of a bracket."""
    if part[1] is None:
        return part[0]
    ranges = [_RANGE.fullmatch(item) for item in part[1].split(",")]
    if not all(ranges):
        raise _not_a_host_list(text)
    return [(int(r[1]), int(r[2] or r[1]), len(r[1])) for r in ranges if r]


def _names(parts: list[str | list[tuple[int, int, int]]]) -> Iterator[str]:
    if not parts:
        yield ""
        return
    first, rest = parts[0], parts[1:]
    for head in [first] if isinstance(first, str) else _numbers(first):
        for tail in _names(rest):
            yield head + tail


def _numbers(ranges: list[tuple[int, int, int]]) -> Iterator[str]:
    for first, last, width in ranges:
        for number in range(first, last + 1):
            yield f"{number:0{width}}"


def _not_a_host_list(text: str) -> UsageError:
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return UsageError(
        f"Slurm's list of nodes is {shown!r}, which is not of the form node[01-04],login",
        remedy="set MASTER_ADDR to the first node of the step",
    )
