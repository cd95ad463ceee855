"""The benchmark of the start measures each point of it in its order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import warm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "startup.py"


@pytest.mark.slow
def test_the_points_of_a_start_come_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "startup.json"
    warm.run([SCRIPT, "--quick", "--json", file], check=True, timeout=300)
    found = json.loads(file.read_text())["startup"]
    assert list(found) == ["1", "2"]
    for figures in found.values():
        assert 0 < figures["group_s"] < figures["loop_s"] < figures["step_s"]
        assert figures["cpu_s"] > 0
