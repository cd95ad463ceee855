"""The code that was submitted is the code that runs: a copy of the package, one for all runs that have the same code.

    RUN/code/3fa9c1d2e4b56677/     livt_scale/…  SHA256SUMS; of an array, beside its run directories
    RUN/slurm/git.json, uncommitted.diff     git's view of the checkout at the submission; of an array, in its folder

The folder is named by the SHA-256 of SHA256SUMS, which is in each batch script too, and appears under its name when it
is complete. Each job checks it by sha256sum before it starts anything, and each process of the job that it was imported
from there (LIVT_CODE): an edit of the copy is refused, and one of the checkout changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import livt_scale
from livt_scale.util.atomic import new_folder, write_atomic
from livt_scale.util.errors import ClusterError
from livt_scale.util.outside import read_checked, real_path

PACKAGE = Path(livt_scale.__file__).resolve().parent
SUMS = "SHA256SUMS"
GIT_S = 30.0


@dataclass(frozen=True)
class Frozen:
    """What the jobs run from. sha256: of SHA256SUMS."""

    folder: Path
    sha256: str


@dataclass(frozen=True)
class Code:
    """The package as it is now: bytes by name, relative to the folder that Python imports it from."""

    files: Mapping[str, bytes]

    @cached_property
    def sums(self) -> bytes:
        return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in self.files.items()).encode()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.sums).hexdigest()

    def frozen_in(self, folder: Path) -> Frozen:
        """Where `freeze` puts it. Writes nothing."""
        return Frozen(folder / "code" / self.sha256[:16], self.sha256)


def read_code(package: Path = PACKAGE) -> Code:
    """The package, without what Python or the build has made of it."""
    return Code(
        {
            f"livt_scale/{path.relative_to(package)}": path.read_bytes()
            for path in sorted(package.rglob("*"))
            if path.is_file() and not {"__pycache__", "shipped"} & set(path.relative_to(package).parts)
        }
    )


def freeze(code: Code, folder: Path) -> Frozen:
    """Keep `code` in FOLDER/code. The same code gives the same folder, so doing it twice changes nothing.

    Raises ClusterError where that folder is there and holds something else.
    """
    frozen = code.frozen_in(folder)
    files = {**code.files, SUMS: code.sums}
    if frozen.folder.is_dir():
        changed = [name for name, data in files.items() if not _holds(frozen.folder / name, data)]
        if changed:
            raise ClusterError(
                f"{frozen.folder} is not what was frozen there: {', '.join(changed[:3])} changed",
                remedy="remove that folder and submit again",
            )
        return frozen
    with new_folder(frozen.folder) as temporary:
        for name, data in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o444)
    return frozen


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and read_checked(path, "record") == data


def check_running_code(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ClusterError in a process of a batch job that runs other code than LIVT_CODE, what was submitted.

    PYTHONPATH names that code, and srun, a container or a wrapper of Python can lose it.
    """
    code = environ.get("LIVT_CODE")
    if code and real_path(Path(code, "livt_scale")) != PACKAGE:
        raise ClusterError(
            f"this process runs {PACKAGE}, and the job was submitted with {code}: PYTHONPATH did not reach it "
            f"(here it is {environ.get('PYTHONPATH', 'not set')!r})",
            remedy="see what starts Python: srun --export, the container's options, slurm.python, slurm.setup",
        )


def keep_git_view(folder: Path, *, checkout: Path = PACKAGE.parent) -> dict[str, object]:
    """Write git.json and, if files were changed, uncommitted.diff into `folder`; git's view."""
    view, diff = git_view(checkout)
    write_atomic(folder / "git.json", (json.dumps(view, indent=2) + "\n").encode())
    if diff:
        write_atomic(folder / "uncommitted.diff", diff)
    else:
        (folder / "uncommitted.diff").unlink(missing_ok=True)
    return view


def git_view(checkout: Path) -> tuple[dict[str, object], bytes]:
    """Commit, whether it was changed since, and that change as a diff; without git or a checkout, the reason."""
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "why": "not a git checkout, or no git"}, b""
    changed = (_git(checkout, "status", "--porcelain", "--untracked-files=normal") or b"").decode(errors="replace")
    view: dict[str, object] = {
        "commit": commit.decode().strip(),
        "version": livt_scale.__version__,
        "changed": changed.splitlines(),
    }
    return view, (_git(checkout, "diff", "HEAD", "--no-color", "--no-ext-diff") or b"") if changed else b""


def _git(checkout: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
