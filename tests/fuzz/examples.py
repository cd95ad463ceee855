"""Each fuzzer as two tests: 60 examples, the same ones each time; and, among the slow tests, 5,000 new ones.

test_recipes = few(recipes, check, seeds=[…])          # seeds: what was once handled wrongly
test_many_recipes = many(recipes, check)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import example as seed
from hypothesis.strategies import SearchStrategy

FEW = settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example),
)
MANY = settings(FEW, max_examples=int(os.environ.get("LIVT_FUZZ_EXAMPLES", "5000")), derandomize=False)


def few(cases: SearchStrategy[Any], check: Callable[..., None], *, seeds: Sequence[Any] = ()) -> Callable[..., None]:
    test = given(case=cases)(check)
    for case in seeds:
        test = seed(case=case)(test)
    return FEW(test)


def many(cases: SearchStrategy[Any], check: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.timeout(4 * 3600)(MANY(given(case=cases)(check))))
