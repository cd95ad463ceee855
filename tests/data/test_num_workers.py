"""How many loader processes: what the step asks for, never more than the rank's cores, within a bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.config.recipe import Data
from livt_scale.data import loader, num_workers
from livt_scale.data.loader import eval_batches, train_batches
from livt_scale.data.num_workers import CHUNK, choose_workers, decode_rate
from livt_scale.data.order.for_rank import MicroBatch
from tests.data.tiny_sets import tiny_recipe, tiny_set

MB = 10**6
AUTO = Data(train="x", workers="auto", prefetch=4)


@given(
    rate=st.floats(1, 1e5),
    demand=st.none() | st.floats(0, 1e6),
    cores=st.integers(1, 200),
    has_gpu=st.booleans(),
    size=st.integers(1, 10**9),
    most=st.integers(0, 10**10),
)
def test_a_choice_stays_within_cores_and_memory(rate, demand, cores, has_gpu, size, most):
    options = {"demand": demand, "cores": cores, "has_gpu": has_gpu, "micro_batch_bytes": size}
    chosen = choose_workers(AUTO, rate=rate, most_ready_bytes=most, **options)
    assert 1 <= chosen.workers <= min(cores, num_workers.MAX_WORKERS)
    assert 1 <= chosen.prefetch <= 4
    assert chosen.max_bytes == chosen.workers * chosen.prefetch * size
    assert chosen.max_bytes <= most or chosen.prefetch == 1


def test_a_known_demand_gets_a_quarter_more_than_it_asks_for():
    chosen = choose_workers(AUTO, rate=900, demand=3000, cores=8, has_gpu=True, micro_batch_bytes=MB)
    assert chosen.workers == 5  # 1.25 · 3000 / 900 = 4.2
    assert "3,000 images/s" in str(chosen)
    assert "at most 20.0 MB ready" in str(chosen)


def test_a_demand_beyond_the_cores_is_told():
    chosen = choose_workers(AUTO, rate=900, demand=9000, cores=4, has_gpu=True, micro_batch_bytes=MB)
    assert chosen.workers == 3
    assert "13 processes would be needed" in chosen.why


def test_without_a_gpu_the_cores_are_the_training_s():
    assert choose_workers(AUTO, rate=900, demand=None, cores=64, has_gpu=False, micro_batch_bytes=MB).workers == 2
    assert choose_workers(AUTO, rate=900, demand=None, cores=64, has_gpu=True, micro_batch_bytes=MB).workers == 16


def test_prefetch_is_lowered_where_memory_is_short_and_told():
    chosen = choose_workers(
        AUTO, rate=900, demand=900, cores=8, has_gpu=True, micro_batch_bytes=100 * MB, most_ready_bytes=500 * MB
    )
    assert (chosen.workers, chosen.prefetch) == (2, 2)
    assert "lowered from 4" in chosen.why


def test_the_rate_is_measured_over_whole_parts_on_one_thread_and_within_its_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(num_workers.time, "perf_counter", lambda: clock[0])
    threads, seen = torch.get_num_threads(), []

    def load(part):
        assert torch.get_num_threads() == 1
        clock[0] += 0.01 * len(part.samples)
        seen.append(part.samples.tolist())

    rate, images = decode_rate(load, MicroBatch(0, 0, 0, np.arange(40)), seconds=1.0)
    assert rate == pytest.approx(100)
    assert clock[0] <= 1.0 + 2 * 0.01 * CHUNK + 1e-9
    assert images == sum(map(len, seen[1:]))
    assert seen[:4] == [list(range(16)), list(range(16, 32)), list(range(32, 40)), list(range(16))]
    assert torch.get_num_threads() == threads


def test_the_samples_do_not_depend_on_the_choice(tmp_path, monkeypatch):
    shards = tiny_set(tmp_path / "set")
    monkeypatch.setattr(loader.num_workers, "MEASURE_S", 0.05)
    seen = []
    for workers in (0, 1, "auto"):
        recipe = tiny_recipe(tmp_path / "set", data__workers=workers, stages__finetune__epochs=1)
        options = {"stage": "finetune", "rank": 0, "world_size": 1, "micro_batch": 4, "epoch": 0, "step": 1}
        with train_batches(shards, recipe, **options, demand=10.0) as batches:
            seen.append([(b.keys, b.images.clone(), b.mix.lam.clone()) for b in batches])
            assert batches.loading.workers >= (0 if workers == "auto" else workers)
        with eval_batches(shards, recipe, rank=0, world_size=1, batch=8) as batches:
            assert sum(len(b.keys) for b in batches) == 23
    for other in seen[1:]:
        assert len(other) == len(seen[0]) == 2
        for (keys, images, lam), (keys_0, images_0, lam_0) in zip(other, seen[0], strict=True):
            assert keys == keys_0
            assert torch.equal(images, images_0)
            assert torch.equal(lam, lam_0)


def test_what_is_ready_has_a_share_for_each_rank_of_the_node(monkeypatch):
    assert num_workers.ready_bytes(8) == pytest.approx(num_workers.ready_bytes(1) / 8, rel=0.1)
    monkeypatch.setattr(num_workers, "usable_cores", lambda: 13)
    assert [num_workers.cores_for_rank(n) for n in (1, 4, 20)] == [13, 3, 1]
