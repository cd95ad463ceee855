"""Commands on files from strangers, each in a fork with 10 s of CPU and 1 GiB, and what must hold of their outcome."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import warm

MAX_CPU_S = 10
MAX_MEMORY = 2**30
WAIT_S = 120.0  # on a machine that does other things too
NEVER = ("Traceback", "weights_only", "pydantic.dev", "Warning:", "site-packages")


@dataclass(frozen=True)
class Outcome:
    words: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def problem(self) -> str:
        """What a command must not do; empty if it did not."""
        said = f"\n{' '.join(self.words)}\n{self.out[-2000:]}\n{self.err[-6000:]}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}{said}"
        if found := [word for word in NEVER if word in self.out + self.err]:
            return f"it says {found}{said}"
        strange = {c for c in self.out + self.err if not (c.isprintable() or c in "\n\t")}
        return f"it prints {strange!r}{said}" if strange else ""


def livt(*words: str | Path, cwd: Path) -> Outcome:
    """Run `livt WORDS` in the folder `cwd`, which holds whatever it may write."""
    (cwd / "tmp").mkdir(exist_ok=True)
    places = {"HOME": str(cwd), "TMPDIR": str(cwd / "tmp"), "LIVT_CACHE_DIR": str(cwd / "cache"), "COLUMNS": "200"}
    done = warm.run(
        ["-c", "from tests.fuzz import watched; watched.run()", *words],
        cwd=cwd,
        env={**os.environ, **places},
        timeout=WAIT_S,
        max_cpu_s=MAX_CPU_S,
        max_memory=MAX_MEMORY,
    )
    return Outcome(tuple(map(str, words)), done.returncode, done.stdout, done.stderr)


@contextmanager
def example(base: Path, source: Path | None = None) -> Iterator[Path]:
    """A new folder for one example, a copy of `source` in it under its name; removed at the end."""
    folder = base / "example"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if source is not None:
        shutil.copytree(source, folder / source.name, symlinks=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
