"""Fixtures of whole runs: a runner, and a run that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.whole_runs import Livt


@pytest.fixture
def livt(tmp_path: Path) -> Livt:
    return Livt(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages that nothing disturbed. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    Livt(folder).train(folder / "run")
    return folder / "run"
