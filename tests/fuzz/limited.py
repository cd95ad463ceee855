"""Commands on files from strangers, each in a fork with 10 s of CPU and 1 GiB, and what must hold of their outcome."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import warm

MAX_CPU_S = 10
MAX_MEMORY = 2**30
WAIT_S = 120.0  # on a machine that does other things too
MAX_KEPT = 9  # failed examples
REPLAY = "replay.sh"
PLAIN = ("tests.fuzz.rehearsed",)  # without torch, a fork takes a fifth of the time
TORCH = (
    *PLAIN,
    "livt_scale.checkpoint.foreign.convert",
    "livt_scale.export.write_export",
    "livt_scale.weights.importer",
    "torch.utils.serialization",
)
NEED_TORCH = {"export", "import", "convert"}  # commands
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
    """Run `livt WORDS` in the folder `cwd`, which holds whatever it may write; assert that its outcome is allowed."""
    (cwd / "tmp").mkdir(exist_ok=True)
    command = shlex.join(["env", f"PYTHONPATH={warm.REPO}", sys.executable, "-m", "livt_scale", *map(str, words)])
    (cwd / REPLAY).write_text(f'cd "$(dirname "$0")" && {command}\n', errors="backslashreplace")
    places = {"HOME": str(cwd), "TMPDIR": str(cwd / "tmp"), "LIVT_CACHE_DIR": str(cwd / "cache"), "COLUMNS": "200"}
    done = warm.run(
        ["-c", "from tests.fuzz import watched; watched.run()", *words],
        cwd=cwd,
        env={**os.environ, **places, "PYTHONPATH": str(warm.REPO)},
        timeout=WAIT_S,
        max_cpu_s=MAX_CPU_S,
        max_memory=MAX_MEMORY,
        imports=TORCH if NEED_TORCH.intersection(words[:2]) else PLAIN,
    )
    outcome = Outcome(tuple(map(str, words)), done.returncode, done.stdout, done.stderr)
    if outcome.problem:
        (cwd / "outcome.txt").write_text(outcome.problem, errors="backslashreplace")
    assert not outcome.problem
    return outcome


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
    except BaseException:
        _keep(folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_example(base: Path, source: Path, write: Callable[[Path, Any], None], case: Any) -> Outcome:
    """Change a copy of `source` as `case` says, and run the case's command there."""
    with example(base, source) as folder:
        write(folder, case)
        return livt(*case["command"], cwd=folder)


def _keep(folder: Path) -> None:
    """Move a failed example to FOLDER/../failed-N, and say how to run its command again."""
    free = (folder.with_name(f"failed-{k}") for k in range(1, MAX_KEPT + 1))
    kept = next((place for place in free if not place.exists()), None)
    if kept is not None:
        folder.rename(kept)
        print(f"kept: sh {kept / REPLAY}")
