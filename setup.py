"""Puts copies of the shipped folders into a wheel, as livt_scale/shipped; pyproject.toml has all the rest.

In a clone and in an editable install the package finds the folders beside itself (livt_scale/util/resources.py).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# By pattern: shards/ of a clone may hold sets of many gigabytes that were built there.
PATTERNS = (
    "recipes/**/*.yaml",
    "shards/*.yaml",
    "shards/counts/*.json",
    "shards/fashion-mnist-lt/**/*",
    "slurm/*.sbatch",
    "slurm/sites/*.yaml",
    "studies/**/*.yaml",
)


class BuildWithShippedFiles(build_py):
    """Copies the shipped folders after the package, except into an editable install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return

        target = Path(self.build_lib) / "livt_scale" / "shipped"
        shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left files that no longer ship
        for pattern in PATTERNS:
            found = [path for path in ROOT.glob(pattern) if path.is_file()]
            if not found:
                raise FileNotFoundError(f"{ROOT / pattern}: nothing to ship")
            for path in found:
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithShippedFiles})
