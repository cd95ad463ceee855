"""The benchmark of an imaginary device gives the shares of both ways to read a step."""

from __future__ import annotations

import json
from pathlib import Path

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "busy_device.py"


def test_both_shares_are_written(tmp_path: Path) -> None:
    file = tmp_path / "busy.json"
    assert load_script(SCRIPT).main(["--device-ms", "1", "--steps", "20", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert 0 < found["read immediately"] <= 1
    assert 0 < found["read one step later"] <= 1.001  # rounding
