"""Garbage is collected at steps that all ranks share, and by Python itself before and after."""

from __future__ import annotations

import gc

from livt_scale.train.garbage import COLLECT_EVERY, GarbageCollection
from tests.train.loops import a_step, idle_loop, started, take


def test_garbage_is_collected_at_fixed_steps_and_at_saves_alone(monkeypatch):
    hook = GarbageCollection()
    loop, calls, step = idle_loop(hook, total=200, epoch=100), [], 0
    monkeypatch.setattr(gc, "collect", lambda generation=2: calls.append((step, generation)))
    assert gc.isenabled()
    with started(loop):
        assert not gc.isenabled()
        for step in range(1, 2 * COLLECT_EVERY + 2):
            take(loop, a_step(step))
        hook.on_save(loop, a_step(step))
    assert calls == [(0, 2), (COLLECT_EVERY, 1), (2 * COLLECT_EVERY, 1), (2 * COLLECT_EVERY + 1, 2)]
    assert gc.isenabled()


def test_what_is_there_before_a_stage_is_left_out_of_its_collections():
    gc.unfreeze()  # what the tests' own set-up has frozen
    with started(idle_loop(GarbageCollection())):
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    before = gc.get_freeze_count()
    with started(idle_loop(GarbageCollection())):
        assert gc.get_freeze_count() <= before
    assert 0 < gc.get_freeze_count() <= before


def test_who_has_switched_collection_off_finds_it_off():
    gc.disable()
    try:
        with started(idle_loop(GarbageCollection())):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
