from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from livt_scale.checkpoint.catalog import Retention
from livt_scale.checkpoint.manifest import CheckpointManifest, Position


def manifest(step: int, *, per_epoch: int = 1, score: float | None = None, final: bool = False) -> CheckpointManifest:
    return CheckpointManifest.model_validate(
        {
            "saved_at": "2026-01-02T03:04:05+00:00",
            "position": {"epoch": step // per_epoch, "step": step},
            "world_size": 1,
            "score": score,
            "final": final,
            "num_tensors": 1,
            "torch": "2.14.1",
            "files": [{"name": "x", "bytes": 1, "sha256": "a" * 64, "rank": 0}],
            "facts": {},
        }
    )


def test_the_example_of_the_header():
    kept = Retention(keep_last=2, keep_every_epochs=2).kept([manifest(step) for step in range(1, 8)])
    assert {p.step for p in kept} == {2, 4, 6, 7}


def test_of_an_epoch_with_several_the_first_is_kept():
    kept = Retention(keep_last=1, keep_every_epochs=2).kept([manifest(s, per_epoch=10) for s in range(5, 50, 5)])
    assert {p.step for p in kept} == {20, 40, 45}


def test_best_and_final_stay():
    saved = [manifest(1, score=0.3), manifest(2, score=0.8), manifest(3, score=0.8), manifest(4, final=True)]
    saved += [manifest(5), manifest(6)]
    assert {p.step for p in Retention(keep_last=1).kept(saved)} == {2, 4, 6}
    assert {p.step for p in Retention(keep_last=1, keep_best=False).kept(saved)} == {4, 6}


@given(
    steps=st.sets(st.integers(0, 60), min_size=1),
    keep_last=st.integers(1, 4),
    every=st.none() | st.integers(1, 4),
    scores=st.dictionaries(st.integers(0, 60), st.floats(-1, 1)),
)
def test_pruning_as_one_goes_keeps_what_pruning_at_the_end_keeps(steps, keep_last, every, scores):
    rule = Retention(keep_last=keep_last, keep_every_epochs=every)
    saved = [manifest(step, per_epoch=5, score=scores.get(step)) for step in sorted(steps)]
    left: list[CheckpointManifest] = []
    for one in saved:
        left.append(one)
        stay = rule.kept(left)
        assert one.position in stay  # the newest never goes
        left = [m for m in left if m.position in stay]
    assert {m.position for m in left} == rule.kept(saved)
    assert len(left) >= min(keep_last, len(saved))
    assert max(m.position for m in left) == Position(max(steps) // 5, max(steps))
