"""Tars changed at random: each is read as tarfile reads it, or refused by an error of ours."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from livt_scale.data.build.indexing import index_tars
from livt_scale.data.build.verify import verify
from livt_scale.data.reader import SampleReader
from livt_scale.util.errors import LivtError
from tests.data.build.hostile import BLOCK, sample, tar
from tests.data.build.odd_tars import JPEG, PNG, gnu_named, named, pax_named, tarfile_s

pytestmark = pytest.mark.timeout(120)

WHOLE = tar(
    sample("a", PNG, b"1"),
    pax_named("é".encode() * 60),
    named("c"),
    gnu_named(b"d" * 120),
    sample("e", JPEG, kind="jpg"),
)
FIELDS = {"name": (0, 100), "size": (124, 136), "type": (156, 157), "magic": (257, 265), "prefix": (345, 500)}
TYPES = [b"\0", b"x", b"g", b"L", b"K", b"S", b"1", b"5"]
SIZES = [b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\1", b"77777777777", b"00000000000", b"00000001000"]
NAMES = [b"../a.png", b"/a.png", b"a.png", b"c.cls", b"\xff.png", b"ustar\x0000"]


@st.composite
def mutated_tars(draw) -> bytes:
    """WHOLE, cut, with bytes changed, blocks swapped, doubled or lost, header fields set and checksums corrected."""
    data = bytearray(WHOLE)
    for kind in draw(
        st.lists(st.sampled_from(["byte", "field", "field", "swap", "double", "lose", "cut"]), max_size=4)
    ):
        blocks = len(data) // BLOCK
        one, other = (draw(st.integers(0, max(blocks - 1, 0))) * BLOCK for _ in range(2))
        if kind == "byte" and data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        elif kind == "field" and blocks:
            start, end = FIELDS[draw(st.sampled_from(sorted(FIELDS)))]
            value = draw(st.one_of(st.sampled_from(TYPES + SIZES + NAMES), st.binary(max_size=12)))
            data[one + start : one + end] = value.ljust(end - start, b"\0")[: end - start]
            data[one + 148 : one + 156] = b" " * 8
            data[one + 148 : one + 156] = b"%06o\0 " % sum(data[one : one + BLOCK])
        elif kind == "swap":
            data[one : one + BLOCK], data[other : other + BLOCK] = data[other : other + BLOCK], data[one : one + BLOCK]
        elif kind == "double":
            data[other:other] = data[one : one + BLOCK]
        elif kind == "lose":
            del data[one : one + BLOCK]
        elif kind == "cut":
            del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutated_tars())
def test_any_mutated_tar_gives_what_tarfile_sees_or_one_of_our_errors(tmp_path, data):
    folder = tmp_path / "tars"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "a.tar").write_bytes(data)
    try:
        shards = index_tars(folder, workers=1)
    except LivtError as error:
        assert "a.tar" in str(error) or "no sample" in str(error)  # noqa: PT017 - whether it raises is open
        assert "\n" not in str(error)  # noqa: PT017
        shards = None
    if shards is not None:
        faults = verify(folder, decode=True, workers=1)
        assert all("decode" not in fault.what and fault.key is not None for fault in faults)
        numbers = np.arange(shards.manifest.num_samples)
        try:
            theirs = {name: data[start : start + size] for name, start, size in tarfile_s(data)}
        except tarfile.TarError:  # it also reads owner and date, and a damaged one ends it
            numbers = numbers[:0]
        for raw in SampleReader(shards).read(numbers):
            found = {n: d for n, d in theirs.items() if n.rpartition(".")[0] == raw.key and not n.endswith("cls")}
            assert raw.image in found.values(), raw.key
    assert {p.name for p in tmp_path.iterdir()} == {"tars"}
    assert {p.name for p in folder.iterdir()} <= {"a.tar", "index.npy", "keys.bin", "manifest.json"}
