"""The code that was submitted is the code that runs: package, recipe and git's view of them, kept in the run directory.

    RUN/code/3fa9c1d2e4b56677/  livt_scale/…  recipe.yaml  git.json  uncommitted.diff
                                SHA256SUMS    of all of these; its own SHA-256 is in each batch script

The folder is named by that SHA-256 and appears under its name when it is complete. Each job checks it by sha256sum
before it starts anything, so an edit of the frozen copy is refused, and one of the checkout changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import livt_scale
from livt_scale.util.atomic import new_folder
from livt_scale.util.errors import ClusterError

PACKAGE = Path(livt_scale.__file__).resolve().parent
SUMS = "SHA256SUMS"
GIT_S = 30.0


@dataclass(frozen=True)
class Frozen:
    """What the jobs run from."""

    folder: Path
    sha256: str  # of SHA256SUMS
    runs: str  # SHA-256 of what is run alone, package and recipe: git's view may differ where these do not
    git: dict[str, object]


def contents(recipe_yaml: str, *, package: Path = PACKAGE) -> tuple[dict[str, bytes], dict[str, object]]:
    """(bytes by relative name, git's view) of what a run is made of, less SHA256SUMS."""
    files = {
        f"livt_scale/{path.relative_to(package)}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and not {"__pycache__", "shipped"} & set(path.relative_to(package).parts)
    }
    git, diff = git_view(package.parent)
    files["recipe.yaml"] = recipe_yaml.encode("utf-8", "surrogateescape")
    files["git.json"] = (json.dumps(git, indent=2) + "\n").encode()
    if diff:
        files["uncommitted.diff"] = diff
    return files, git


def freeze(recipe_yaml: str, run_dir: Path, *, package: Path = PACKAGE) -> Frozen:
    """Keep what runs in RUN/code. The same contents give the same folder, so doing it twice changes nothing.

    Raises ClusterError where that folder is there and holds something else.
    """
    files, git = contents(recipe_yaml, package=package)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()
    sha256 = hashlib.sha256(sums).hexdigest()
    runs = _digest_of_what_runs(files)
    folder = run_dir / "code" / sha256[:16]
    if folder.is_dir():
        changed = [n for n, data in {**files, SUMS: sums}.items() if not _holds(folder / n, data)]
        if changed:
            raise ClusterError(
                f"{folder} is not what was frozen there: {', '.join(changed[:3])} changed",
                remedy="remove that folder and submit again",
            )
        return Frozen(folder, sha256, runs, git)
    with new_folder(folder) as temporary:
        for name, data in {**files, SUMS: sums}.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o444)
    return Frozen(folder, sha256, runs, git)


def _digest_of_what_runs(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        if name.startswith("livt_scale/") or name == "recipe.yaml":
            digest.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return digest.hexdigest()


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


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
