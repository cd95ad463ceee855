"""A registry finds by name, and knows who registered what."""

from __future__ import annotations

import pytest

from livt_scale.util.errors import UsageError
from livt_scale.util.registry import Registry


def test_it_is_a_mapping_in_the_order_of_registration():
    sizes: Registry[int] = Registry("size")
    sizes.register("large", 3)
    sizes.register("small", 1)
    assert dict(sizes) == {"large": 3, "small": 1}
    assert list(sizes) == ["large", "small"]
    assert "medium" not in sizes
    assert sizes.find("small") == 1


def test_as_a_decorator_it_gives_the_thing_back():
    functions: Registry[type] = Registry("thing")

    @functions.register("a")
    class A: ...

    assert functions["a"] is A


def test_an_unknown_name_gets_the_nearest():
    sizes: Registry[int] = Registry("size")
    sizes.register("small", 1)
    with pytest.raises(UsageError) as caught:
        sizes.find("smal")
    assert (caught.value.message, caught.value.remedy) == ("unknown size 'smal'", "did you mean 'small'?")
    sizes.register("large", 2)
    with pytest.raises(UsageError, match="Did you mean 'small'\\? Valid names: large, small"):
        sizes.find("smal")


def test_a_name_that_is_taken_is_refused_with_both_places(tmp_path):
    sizes: Registry[int] = Registry("size")
    for name, line in (("first", 1), ("second", 3)):
        file = tmp_path / f"{name}.py"
        source = "\n" * (line - 1) + f"sizes.register('small', {line})"
        code = compile(source, str(file), "exec")
        if name == "first":
            exec(code, {"sizes": sizes, "__name__": name})
            exec(code, {"sizes": sizes, "__name__": name})  # the same line again is no other registration
        else:
            with pytest.raises(UsageError) as caught:
                exec(code, {"sizes": sizes, "__name__": name})
    assert sizes["small"] == 1
    first, second = f"{tmp_path / 'first.py'}, line 1", f"{tmp_path / 'second.py'}, line 3"
    assert caught.value.message == f"{second}: the size 'small' is already registered, by {first}"
