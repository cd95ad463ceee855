"""Which valid name a wrong one was meant to be: the one with the longest common beginning, then with the fewest slips.

    closest("vit_base", ["vit_b", "vit_s"])           ["vit_b"]           one name is the beginning of the other
    closest("epocs", ["epochs", "seed"])              ["epochs"]          one letter is missing
    closest("a100-80gb", ["a100", "a100-40gb"])       ["a100"]            another number is another thing, not a slip
    closest("vit_x", ["vit_b", "vit_s", "seed"])      ["vit_b", "vit_s"]  equally near
    closest("zebra", ["epochs", "seed"])              []                  no guess is better than a wrong one

Not difflib's ratio: it takes `vit_base` for `vit_s`, whose three letters in common count as much as those of `vit_b`.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_GUESSES = 4  # of equally near names; of more, none is a help
MAX_LENGTH = 100  # of names whose letters are compared
MIN_PREFIX = 2
SHOWN_BESIDE_A_GUESS = 20  # valid names; where there are more, the guess has to do


def closest(name: str, names: Iterable[str]) -> list[str]:
    """The names of `names` that `name` most likely means, sorted; none where all are far away."""
    folded = {other: _folded(other) for other in names}
    wanted = _folded(name)

    def longer_part(other: str) -> int | None:
        """Letters that one of the two has behind the other's end; None: neither begins with the other."""
        short, long = sorted((wanted, other), key=len)
        return len(long) - len(short) if len(short) >= MIN_PREFIX and long.startswith(short) else None

    in_common = max(
        (min(len(wanted), len(text)) for text in folded.values() if longer_part(text) is not None), default=0
    )

    def slip(other: str) -> int | None:
        is_likely = _digits(wanted) == _digits(other) and wanted[:in_common] == other[:in_common]
        return _edits(wanted, other, most=1) if is_likely else None

    return (
        _least({other: slip(text) for other, text in folded.items()})
        or _least({other: longer_part(text) for other, text in folded.items()})
        or _least({other: _edits(wanted, text, most=max(1, len(wanted) // 3)) for other, text in folded.items()})
    )


def listed(names: Iterable[str], *, joint: str = "or") -> str:
    """ "'a', 'b' or 'c'"."""
    quoted = [repr(name) for name in names]
    return f" {joint} ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def _digits(name: str) -> list[str]:
    return [letter for letter in name if letter.isdigit()]


def _least(distances: dict[str, int | None]) -> list[str]:
    known = {name: distance for name, distance in distances.items() if distance is not None}
    found = sorted(name for name, distance in known.items() if distance == min(known.values()))
    return found if len(found) <= MAX_GUESSES else []


def _edits(a: str, b: str, *, most: int) -> int | None:
    """Letters to insert, remove, replace or swap with their neighbour to make `b` of `a`; None: more than `most`."""
    if abs(len(a) - len(b)) > most or max(len(a), len(b)) > MAX_LENGTH:
        return None
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, row = row, [i]
        for j, right in enumerate(b, start=1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return None
        before = above
    return row[-1] if row[-1] <= most else None
