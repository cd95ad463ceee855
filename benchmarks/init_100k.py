"""What `livt init` costs on a folder of 100,000 images: CPU time of all its processes, time on the clock, memory.

    python benchmarks/init_100k.py --json init.json     # ten minutes on two busy cores; 1 GB in a temporary folder
    python benchmarks/init_100k.py --quick              # 1,000 images

The images are JPEGs of 64 px of noise, no two alike, in 100 classes. `memory_mib`: the command itself (`command`) and
the largest of its processes (`largest`), at their peaks, shared libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

CLASSES, PX = 100, 64
POLL_S = 0.2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="1,000 images")
    options = parser.parse_args(arguments)
    images = 1_000 if options.quick else 100_000
    with tempfile.TemporaryDirectory(prefix="livt-init-") as folder:
        make_images(Path(folder) / "photos", images)
        result = {"images": images, **measured(Path(folder))}
    memory = result["memory_mib"]
    print(f"{images:,} images: {result['cpu_s']:.0f} s of CPU time, {result['wall_s']:.0f} s on the clock")
    print(f"memory: {memory['command']:.0f} MiB the command, {memory['largest']:.0f} MiB its largest process")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def make_images(root: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        folder = root / f"class-{c:03}"
        folder.mkdir(parents=True)
        for k in range(images // CLASSES):
            pixels = rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8)
            (folder / f"{k:05}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=80))


def measured(folder: Path) -> dict[str, Any]:
    """`livt init photos --out project` in `folder`."""
    command = [sys.executable, "-m", "livt_scale", "init", str(folder / "photos"), "--out", str(folder / "project")]
    began, own_kib = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        own_kib = max(own_kib, peak_kib(process.pid))
        time.sleep(POLL_S)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"livt init ended with {code}")
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,  # with the processes that it started
        "wall_s": time.perf_counter() - began,
        "memory_mib": {"command": own_kib / 1024, "largest": usage.ru_maxrss / 1024},
    }


def peak_kib(pid: int) -> int:
    """VmHWM of /proc/PID/status; 0 where the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    sys.exit(main())
