"""A generator is a function of seed, epoch, key and purpose; the global generators stay as they were."""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.data.seeds import python_rng_from, sample_rng

KEYS = st.text(max_size=20)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6), key=KEYS, purpose=st.sampled_from(["crop", "mix"]))
def test_the_same_four_give_the_same_numbers(seed, epoch, key, purpose):
    draws = [sample_rng(seed, epoch, key, purpose).random(8) for _ in range(2)]
    np.testing.assert_array_equal(*draws)


@settings(max_examples=40, deadline=None)
@given(
    a=st.tuples(st.integers(0, 3), st.integers(0, 3), KEYS, KEYS),
    b=st.tuples(st.integers(0, 3), st.integers(0, 3), KEYS, KEYS),
)
def test_any_difference_gives_other_numbers(a, b):
    same = np.array_equal(sample_rng(*a).random(4), sample_rng(*b).random(4))
    assert same == (a == b)


def test_the_numbers_are_philox_s_under_the_128_bits_of_the_hash():
    head = struct.pack("<QQII", 7, 3, 6, 4)
    key = int.from_bytes(hashlib.blake2b(head + b"img-12crop", digest_size=16).digest(), "little")
    expected = np.random.Generator(np.random.Philox(key=key))
    ours = sample_rng(7, 3, "img-12", "crop")
    np.testing.assert_array_equal(ours.random(5), expected.random(5))
    np.testing.assert_array_equal(ours.integers(0, 9, size=5), expected.integers(0, 9, size=5))


def test_the_border_between_key_and_purpose_counts():
    assert sample_rng(0, 0, "ab", "c").random() != sample_rng(0, 0, "a", "bc").random()


def test_a_key_that_is_no_unicode_has_a_generator():
    assert 0 <= sample_rng(0, 0, b"caf\xe9".decode("utf-8", "surrogateescape"), "crop").random() < 1


def test_the_stream_is_the_one_that_old_runs_drew():
    # A resumed run must draw what its first half would have drawn: these numbers may never change.
    assert sample_rng(7, 3, "img-12", "crop").integers(0, 2**32, size=3).tolist() == [4108288723, 470603963, 3640848756]


def test_numbers_over_samples_are_uniform():
    draws = np.array([sample_rng(1, 2, f"k{i}", "crop").random() for i in range(4000)])
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 45.3  # chi-square, 19 degrees of freedom, p = 0.0006


def test_python_s_generator_is_seeded_and_put_back_and_the_others_left_alone():
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    drawn = []
    for _ in range(2):
        with python_rng_from(3):
            drawn.append(random.random())
        assert random.getstate() == before[0]
    assert drawn[0] == drawn[1] == random.Random(3).random()
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_python_s_generator_is_put_back_after_an_error():
    before = random.getstate()
    with pytest.raises(ZeroDivisionError), python_rng_from(3):
        _ = random.random() / 0
    assert random.getstate() == before
