"""WebDataset tars from a stranger: headers, names, sizes and checksums changed, in plain, GNU and PAX tars."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.examples import few, many
from tests.fuzz.limited import Outcome, example, livt
from tests.fuzz.mutations import EVIL, byte_changes, change_bytes, change_file, chosen, file_changes, fractions
from tests.small_sets import encoded

FIELDS = {  # of a header: where it begins and ends
    "name": (0, 100), "mode": (100, 108), "size": (124, 136), "checksum": (148, 156), "type": (156, 157),
    "link": (157, 257), "magic": (257, 265), "prefix": (345, 500),
}  # fmt: skip
VALUES = [
    b"", b"\0" * 12, b"77777777777", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"1_0", b"00000002000", b"x", b"g",
    b"L",
    b"K", b"S", b"1", b"2", b"5", b"6", b"../../out", b"/etc/x", b"a" * 100, EVIL.encode(), b"\xff\xfe", b"..",
    b"a/b/c.d.png",
    b"__meta__/x.png", b"ustar  \0", b"99999",
]  # fmt: skip
PAX = [
    {"path": "../out.png"}, {"size": "-5"}, {"size": "9" * 30}, {"path": EVIL}, {"GNU.sparse.major": "1"},
    {"path": "a" * 9000},
    {"comment": "x" * 100_000}, {"path": ""}, {"size": "1"},
]  # fmt: skip
IMAGES = [
    encoded(0), encoded(1, kind="jpeg"), b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60),
    b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 30,
]  # fmt: skip

cases = st.fixed_dictionaries(
    {
        "format": chosen([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
        "images": st.lists(st.tuples(chosen(IMAGES), st.one_of(st.just([]), byte_changes)), min_size=1, max_size=3),
        "labels": st.lists(
            chosen([b"0", b"1", b"2", b"", b"-1", b"9" * 9, b"1e3", b" 1\n", b"\xb2", b"0" * 70]), max_size=3
        ),
        "names": st.lists(chosen(["a", "b/c", EVIL, "a.b", "x" * 120, "é", "."]), max_size=3),
        "headers": st.lists(st.tuples(chosen([*FIELDS]), fractions, chosen(VALUES)), max_size=3),
        "pax": st.one_of(st.none(), chosen(PAX)),
        "resum": st.booleans(),
        "bytes": st.one_of(st.just([]), st.just([]), byte_changes),
        "file": st.one_of(st.none(), st.none(), st.none(), file_changes),
    }
)


def tar_of(case: dict) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=case["format"], pax_headers=None) as tar:
        for k, (image, changes) in enumerate(case["images"]):
            name = case["names"][k] if k < len(case["names"]) else f"k{k}"
            label = case["labels"][k] if k < len(case["labels"]) else b"0"
            for ending, data in (("png", change_bytes(image, changes)), ("cls", label)):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                if case["pax"] and case["format"] == tarfile.PAX_FORMAT:
                    info.pax_headers = dict(case["pax"])
                try:
                    tar.addfile(info, io.BytesIO(data))
                except ValueError:  # a name that this format cannot hold
                    info.name = f"k{k}.{ending}"
                    tar.addfile(info, io.BytesIO(data))
    raw = bytearray(file.getvalue())
    for field, where, value in case["headers"]:
        at = int(where * (len(raw) // 512)) * 512
        begin, end = FIELDS[field]
        raw[at + begin : at + end] = value[: end - begin].ljust(end - begin, b"\0")
        if case["resum"] and field != "checksum":
            header = raw[at : at + 512]
            total = 256 + sum(header[:148]) + sum(header[156:])
            raw[at + 148 : at + 156] = b"%06o\0 " % total
    return change_bytes(bytes(raw), case["bytes"])


def run_case(base: Path, case: dict) -> Outcome:
    """What `livt shards index` does with the tar, and if it succeeds `livt shards verify`."""
    with example(base) as folder:
        (folder / "tars").mkdir()
        (folder / "tars" / "a.tar").write_bytes(tar_of(case))
        if case["file"]:
            change_file(folder / "tars", case["file"])
        outcome = livt("shards", "index", "tars", "--workers", "1", cwd=folder)
        return (
            livt("shards", "verify", "tars", "--decode", "--workers", "1", cwd=folder) if not outcome.code else outcome
        )


def check(base: Path, case: dict) -> None:
    run_case(base, case)


UNCHANGED = {
    "format": tarfile.USTAR_FORMAT, "images": [(encoded(0), [])], "labels": [], "names": [], "headers": [], "pax": None,
    "resum": False, "bytes": [], "file": None,
}  # fmt: skip
DOT = encoded(0, px=1)
SIZES = DOT[12:16] + struct.pack(">II", 1, 2**26) + DOT[24:29]
THIN = DOT[:12] + SIZES + struct.pack(">I", zlib.crc32(SIZES)) + DOT[33:]  # 1 × 67,108,864 px, which took 1.75 GB
SEEDS = [
    {**UNCHANGED, "images": [(THIN, [])]},
    {**UNCHANGED, "file": ("huge", 0.0)},  # the zeros after the end were read, all 64 GiB
]


def test_both_commands_succeed_on_an_unchanged_tar(base: Path) -> None:
    assert run_case(base, UNCHANGED).code == 0


test_tars = few(cases, check, seeds=SEEDS)
test_many_tars = many(cases, check)
