"""One line of `livt doctor`: what was checked, its status, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """ok; note: works, but know this; problem: something would fail."""

    name: str
    status: Literal["ok", "note", "problem"]
    message: str
    fix: str = ""
