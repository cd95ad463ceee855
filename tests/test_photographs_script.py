"""scripts/photographs.py: no evaluation crop shows a pixel of a training crop; the same seed gives the same crops."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.study.claims import SETTINGS
from tests.scripts import load_script

script = load_script(Path(__file__).resolve().parents[1] / "scripts" / "photographs.py")


@given(rows=st.integers(302, 400), columns=st.integers(384, 460), seed=st.integers(0, 2**32 - 1))
def test_no_pixel_of_a_photograph_is_in_two_classes_or_in_both_parts(rows, columns, seed):
    photo = np.arange(rows * columns).reshape(rows, columns, 1)  # each pixel has its own number
    rng = np.random.default_rng(seed)
    seen = [
        np.unique(script.crops(part, 5, rng=rng))
        for quarter in script.quarters(photo)
        for part in script.parts(quarter)
    ]
    assert len(seen) == 8
    assert sum(map(len, seen)) == len(np.unique(np.concatenate(seen)))


def test_the_photographs_are_large_enough_and_make_the_classes_of_the_setting():
    every = script.photographs()
    assert 4 * len(every) == SETTINGS["photographs_lt"].num_classes
    for photo in every.values():
        assert (photo.dtype, photo.shape[2]) == (np.uint8, 3)
        for part in (part for quarter in script.quarters(photo) for part in script.parts(quarter)):
            crops = script.crops(part, script.FOR_TRAINING, rng=np.random.default_rng(0))
            assert {crop.shape for crop in crops} == {(script.SIDE, script.SIDE, 3)}
            again = script.crops(part, script.FOR_TRAINING, rng=np.random.default_rng(0))
            assert all(np.array_equal(a, b) for a, b in zip(crops, again, strict=True))
