"""All ranks train on one set, or none does."""

from __future__ import annotations

import json
from pathlib import Path

from tests import warm
from tests.whole_runs import REPO

TWO_RANKS = """
import shutil, sys
from pathlib import Path
from livt_scale.util.errors import DataError
from livt_scale.distributed.world import detect, process_group
from livt_scale.config.load import load_recipe
from livt_scale.train.run import open_alike

world = detect()
recipe = load_recipe(sys.argv[1], sets=[f"data.train={sys.argv[2 + world.rank]}"])
with process_group(world, timeout_s=60):
    try:
        told = f"opened {open_alike(recipe, world=world).num_samples}"
    except DataError as error:
        told = str(error)
Path(sys.argv[4], f"rank {world.rank}").write_text(told)
"""


def told_by_ranks(tmp_path: Path, first: Path, second: Path) -> list[str]:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    recipe = REPO / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
    warm.run([script, recipe, first, second, tmp_path], ranks=2, check=True, timeout=120)
    return [(tmp_path / f"rank {rank}").read_text() for rank in (0, 1)]


SHIPPED = REPO / "shards" / "fashion-mnist-lt"


def test_ranks_with_one_set_open_it(tmp_path):
    assert told_by_ranks(tmp_path, SHIPPED / "train-lt", SHIPPED / "train-lt") == ["opened 2478"] * 2


def test_a_rank_that_reads_another_set_stops_all(tmp_path):
    told = told_by_ranks(tmp_path, SHIPPED / "train-lt", SHIPPED / "train-balanced")
    assert all(text.startswith("rank 1 reads another manifest or quarantine") for text in told)


def test_a_set_that_is_missing_on_one_rank_stops_all(tmp_path):
    told = told_by_ranks(tmp_path, SHIPPED / "train-lt", tmp_path / "nothing here")
    assert all("nothing here" in text for text in told), json.dumps(told)
