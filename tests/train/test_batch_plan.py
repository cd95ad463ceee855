"""The global batch is the recipe's whatever the world size; what does not divide is refused with what would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.train.batch_plan import plan_batches
from livt_scale.util.errors import UsageError


@given(world=st.integers(1, 64), slots=st.integers(1, 64), micro=st.integers(1, 80), pairs=st.booleans())
def test_a_plan_is_exact_or_an_error_that_names_a_number_that_fits(world, slots, micro, pairs):
    slots, micro = (2 * slots, 2 * micro) if pairs else (slots, micro)
    try:
        plan = plan_batches(world * slots, micro, world_size=world, pairs=pairs)
    except UsageError as error:
        assert slots % min(micro, slots)
        advised = int(error.remedy.split()[1])
        assert plan_batches(world * slots, advised, world_size=world, pairs=pairs).micro_batch == advised
    else:
        assert plan.micro_batch * plan.accumulation * plan.world_size == plan.global_batch == world * slots
        assert plan.micro_batch <= micro
        assert not (pairs and plan.micro_batch % 2)


def test_a_world_that_does_not_divide_the_batch_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"global batch of 64 does not give 3 ranks .*Start 1 or 2 or 4 processes"):
        plan_batches(64, 8, world_size=3, pairs=False)


def test_pairs_do_not_cross_ranks():
    with pytest.raises(UsageError, match="an even number of equal slots"):
        plan_batches(6, 2, world_size=2, pairs=True)
    assert plan_batches(8, 2, world_size=2, pairs=True).accumulation == 2


def test_a_rank_with_few_slots_takes_them_all_at_once():
    assert plan_batches(64, 64, world_size=4, pairs=True).micro_batch == 16
