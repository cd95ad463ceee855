"""Wrong names: one letter apart comes first, then what begins alike, and nothing where all are far away."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.util.names import MAX_GUESSES, closest, listed

SIZES = ["vit_micro", "vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "resnet18", "resnet34", "resnet50"]
DEVICES = ["v100", "v100-pcie", "a100", "a100-40gb", "a10", "h100", "h100-pcie", "h200", "mi250x"]


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("vit_base", SIZES, ["vit_b"]),
        ("vit_large", SIZES, ["vit_l"]),
        ("vit_tiny", SIZES, ["vit_ti"]),
        ("ViT-B/16", SIZES, ["vit_b"]),
        ("vit_tiny_mien", [*SIZES, "vit_tiny_mine"], ["vit_tiny_mine"]),
        ("vit_x", SIZES, ["vit_b", "vit_h", "vit_l", "vit_s"]),
        ("swin_t", SIZES, []),
        ("v100-16gb", DEVICES, ["v100"]),
        ("a100-80gb", DEVICES, ["a100"]),
        ("h200-pcie", DEVICES, ["h200"]),
        ("h10", DEVICES, ["h100"]),
        ("v100-pci", DEVICES, ["v100-pcie"]),
        ("mi250", DEVICES, ["mi250x"]),
        ("hotpink", DEVICES, []),
        ("epocs", ["epochs", "seed"], ["epochs"]),
        ("eopchs", ["epochs", "seed"], ["epochs"]),
        ("", ["epochs", "seed"], []),
        ("x" * 10**6, ["epochs", "x" * 10**6 + "y"], ["x" * 10**6 + "y"]),
    ],
)
def test_the_closest_names(name, names, expected):
    assert closest(name, names) == expected


def changed_once(name: str, draw) -> str:
    k = draw(st.integers(0, len(name) - 1))
    return draw(st.sampled_from([name[:k] + name[k + 1 :], name[:k] + "#" + name[k + 1 :], name[:k] + "#" + name[k:]]))


@given(st.data())
def test_one_wrong_letter_is_always_forgiven(data):
    """Among names that differ from each other in everything."""
    names = ["alpha", "bravo_two", "zulu-9", "kilo.metre"]
    meant = data.draw(st.sampled_from(names))
    assert closest(changed_once(meant, data.draw), names) == [meant]


@given(st.text(max_size=12), st.lists(st.text("ab_", max_size=6), max_size=9))
def test_guesses_are_few_and_among_the_names(name, names):
    found = closest(name, names)
    assert set(found) <= set(names)
    assert len(found) <= MAX_GUESSES
    assert found == sorted(set(found))


def test_a_list_reads_as_a_sentence():
    assert [listed(["a"]), listed("ab"), listed("abc")] == ["'a'", "'a' or 'b'", "'a', 'b' or 'c'"]
