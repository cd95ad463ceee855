"""Wheels for Python 3.12 that a machine with PyTorch, and without a network, lacks: `make gpu-bundle`, into .whl/.

    python scripts/gpu_bundle.py .whl

`benchmarks/gpu.sh` installs them there. All else that the package imports is on such a machine (benchmarks/bare.txt).
Versions are those of constraints.txt, one of each. deepspeed is built here, without compiled operators: pure Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READY_MADE = (
    "annotated-types", "braceexpand", "hjson", "pydantic", "pydantic_core", "simplejpeg", "typing-inspection",
    "webdataset",
)  # fmt: skip
BUILT = ("deepspeed",)
MAX_BYTES = 40 * 10**6
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def main() -> int:
    """Fill the folder; what was in it is removed."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pinned = ["--no-deps", "--constraint", str(ROOT / "constraints.txt")]
    target = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target += ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
    subprocess.run([*pip, "download", *pinned, *target, "--dest", str(folder), *READY_MADE], check=True)
    build = [*pip, "wheel", *pinned, "--no-build-isolation", "--wheel-dir", str(folder), *BUILT]
    subprocess.run(build, env={**os.environ, "DS_BUILD_OPS": "0"}, check=True)

    wheels = sorted(folder.iterdir())
    names = [path.name.split("-")[0].lower() for path in wheels]
    total = sum(path.stat().st_size for path in wheels)
    expected = sorted(name.replace("-", "_") for name in (*READY_MADE, *BUILT))
    if names != expected or total > MAX_BYTES or any("cp311" in path.name for path in wheels):
        found = ", ".join(path.name for path in wheels)
        print(f"{folder}: expected a wheel of each of {expected} and at most {MAX_BYTES} bytes; found {found}, {total}")
        return 1
    print(f"{folder}: {len(wheels)} wheels, {total / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
