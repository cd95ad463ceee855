"""The runner of whole runs, and a pretraining by two ranks that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.ranks import Ranks
from tests.whole_runs import Livt


@pytest.fixture
def livt(tmp_path: Path) -> Livt:
    return Livt(tmp_path)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining by two ranks that nothing disturbed. Read only."""
    livt = Livt(tmp_path_factory.mktemp("unbroken"))
    with Ranks(livt, livt.folder / "run") as ranks:
        codes, _ = ranks.ended(within_s=120)
        assert codes == [0, 0], ranks.said(0)
    return livt.folder / "run"
