"""Tars by what is odd about them: READ with the keys that they hold, REFUSED with what is said of them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

from livt_scale.data.build.tar import MAX_HEADER_BYTES
from tests.data.build.hostile import BLOCK, entry, gnu_long, header, pax, sample, tar
from tests.data.tiny_sets import encoded, photo

PNG, JPEG = encoded(photo(12, 9), "PNG"), encoded(photo(12, 9, seed=1))
ONE = sample("a", PNG, b"1") + sample("b", JPEG, b"0", kind="jpg")
LONG = "n" * 300


class Boom:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return open, ("unpickled", "w")


PICKLE = pickle.dumps(Boom())


def named(name: str | bytes, *, before: bytes = b"", **fields) -> bytes:
    """A sample of this name, whatever has to stand before its two headers."""
    raw = name.encode() if isinstance(name, str) else name
    return entry(raw + b".png", PNG, before=before, **fields) + entry(raw + b".cls", b"0", **fields)


def pax_named(name: bytes) -> bytes:
    first, second = (pax({"path": name + ending}) for ending in (b".png", b".cls"))
    return entry("x", PNG, before=first) + entry("x", b"0", before=second)


def gnu_named(name: bytes) -> bytes:
    first, second = (gnu_long(name + ending) for ending in (b".png", b".cls"))
    return entry(name[:99], PNG, before=first, magic=b"ustar  \0") + entry(name[:99], b"0", before=second)


CLS = entry("a.cls", b"0")
BASE_256 = b"\x80" + len(PNG).to_bytes(11, "big")

READ = {
    "plain": (ONE, ["a", "b"]),
    "a long name, PAX": (pax_named(LONG.encode()), [LONG]),
    "a long name, GNU": (gnu_named(LONG.encode()), [LONG]),
    "a name in two fields": (named("c", prefix=b"p" * 150), ["p" * 150 + "/c"]),
    "a newline in the name": (named("a\nb"), ["a\nb"]),
    "quotes and a dollar in the name": (named("'a' \"b\" $(touch x); `y` \\"), ["'a' \"b\" $(touch x); `y` \\"]),
    "an emoji in the name": (named("🦊"), ["🦊"]),
    **{f"the name {n!r}": (named(n), [n]) for n in ("-rf", "~root/a", "%s{}%n", " ", "C:\\a", "./a", "a//b")},
    **{f"the name {n!r}": (named(n), [n]) for n in ("a\u202egpj", "a\u2028b", "\ufeffa", "e\u0301")},
    "an empty file beside the image": (entry("a.png", PNG) + entry("a.txt", b"") + CLS, ["a"]),
    "an escape sequence in the name": (named("\x1b]0;x\x07"), ["\x1b]0;x\x07"]),
    "a PAX size": (entry("a.png", PNG, before=pax({"size": b"%d" % len(PNG)}), claimed=0) + CLS, ["a"]),
    "a size in base 256": (entry("a.png", PNG, claimed=BASE_256) + CLS, ["a"]),
    "an attribute in PAX": (entry("a.png", PNG, before=pax({"SCHILY.xattr.user.x": b"=\n\0"})) + CLS, ["a"]),
    "a global comment": (pax({"comment": b"0" * 40}, type=b"g") + named("a"), ["a"]),
    "ten thousand extended headers": (pax({"mtime": b"1"}) * 10_000 + named("a"), ["a"]),
    "a tar from before ustar": (named("a", magic=bytes(8), type=b"\0"), ["a"]),
    "dates where the prefix is": (named("a", magic=b"ustar  \0", prefix=b"14536471234"), ["a"]),
    "folders": (entry("x/", type=b"5") + entry("y/", type=b"\0") + named("x/a"), ["x/a"]),
    "pickles beside the image": (
        entry("a.pyd", PICKLE) + entry("a.png", PNG) + CLS + entry("a.pkl", PICKLE) + entry("a.pth", PICKLE),
        ["a"],
    ),
    "a tar beside the image": (entry("a.png", PNG) + entry("a.tar", tar(entry("../x", b"y"))) + CLS, ["a"]),
    "hidden notes": (entry("__init__", PICKLE) + entry(".hidden", b"") + named("a"), ["a"]),
    "a label with blanks": (entry("a.png", PNG) + entry("a.cls", b" \t0\r\n"), ["a"]),
    "a label with leading zeros": (entry("a.png", PNG) + entry("a.cls", b"000"), ["a"]),
    "an image of no bytes": (entry("a.png", b"") + entry("a.cls", b"0"), ["a"]),  # refused when it is decoded
}  # fmt: skip

SPARSE = {"0.0": {"GNU.sparse.size": b"9"}, "0.1": {"GNU.sparse.map": b"0,1"}, "1.0": {"GNU.sparse.major": b"1"}}

REFUSED = {
    "an absolute name": (named("/etc/a"), "leads out"),
    "an absolute name, PAX": (pax_named(b"/etc/a"), "leads out"),
    "an absolute name in two fields": (named("a", prefix=b"/etc"), "leads out"),
    "a name that climbs": (named("x/../../a"), "leads out"),
    "a name that climbs, GNU": (gnu_named(b"../" * 50 + b"a"), "leads out"),
    "a hard link": (entry("a.png", type=b"1", linkname=b"/etc/passwd"), "hard link"),
    "a symbolic link": (entry("a.png", type=b"2", linkname=b"/etc/passwd"), "symbolic link"),
    "a character device": (entry("a.png", type=b"3"), "device"),
    "a block device": (entry("a.png", type=b"4"), "device"),
    "a pipe": (entry("a.png", type=b"6"), "pipe"),
    "a sparse file": (entry("a.png", type=b"S"), "sparse"),
    **{f"a sparse file, PAX {v}": (entry("a.png", PNG, before=pax(told)), "sparse") for v, told in SPARSE.items()},
    "an unknown type": (entry("a.png", type=b"Z"), "unknown type"),
    "a part of another volume": (entry("a.png", type=b"M"), "unknown type"),
    "a folder with contents": (entry("x/", type=b"5", claimed=5), "folder"),
    "a claim of 8 GiB": (entry("a.png", claimed=8**11 - 1), "claims 8,589,934,591 bytes"),
    "a claim of 2^60": (entry("a.png", claimed=b"\x80" + (1 << 60).to_bytes(11, "big")), "claims"),
    "a claim of 10^18, PAX": (entry("a.png", PNG, before=pax({"size": b"9" * 18})), "claims"),
    "a claim of 10^5000, PAX": (entry("a.png", PNG, before=pax({"size": b"9" * 5000})), "no number"),
    "a negative size": (entry("a.png", claimed=b"\xff" * 12), "no number"),
    "a negative size, PAX": (entry("a.png", PNG, before=pax({"size": b"-512"})), "no number"),
    "a negative size of an extended header": (entry("x", type=b"x", claimed=b"\xff" * 11 + b"\0"), "no size"),
    "a size with an underscore": (entry("a.png", PNG, claimed=b"0000000_0100"), "no number"),
    "an extended header of 8 GiB": (entry("x", type=b"x", claimed=8**11 - 1), "at most 1,048,576"),
    "a long name of 8 GiB": (entry("x", type=b"L", claimed=8**11 - 1), "at most 1,048,576"),
    "an extended header of too much": (pax({"comment": bytes(MAX_HEADER_BYTES)}), "at most 1,048,576"),
    "a PAX record of no length": (entry("x", b"0 path=a\n", type=b"x") + ONE, "no `length key=value`"),
    "a PAX record that is too long": (entry("x", b"999 path=a\n", type=b"x") + ONE, "no `length key=value`"),
    "a PAX record without =": (entry("x", b"7 path\n", type=b"x") + ONE, "no `length key=value`"),
    "a megabyte of digits in PAX": (entry("x", b"1" * 10**6, type=b"x") + ONE, "no `length key=value`"),
    "one name for all": (pax({"path": b"a.png"}, type=b"g") + ONE, "global header"),
    "a name given twice": (entry("x", before=pax({"path": b"a.png"}) + gnu_long(b"b.png")), "given twice"),
    "an extended header alone": (pax({"path": b"a.png"}), "ends after an extended header"),
    "a name that is not UTF-8": (named(b"\xff\xfea"), "not UTF-8"),
    "a name that is not UTF-8, PAX": (pax_named(b"\xff\xfea"), "not UTF-8"),
    "a name of 5,000 bytes": (gnu_named(b"n" * 5000), "a name of 5,004 bytes"),
    "a thousand members for one key": (b"".join(entry(f"a.{k}\n") for k in range(1000)), "one image"),
    "a name with a NUL, PAX": (pax_named(b"a\0b"), "NUL"),
    "a wrong checksum": (header(b"a.png", checksum=b"000000\0 "), "not a tar"),
    "a zip": (b"PK\3\4" + bytes(2000), "not a tar"),
    "a compressed tar": (gzip.compress(tar(ONE)) + b"x" * BLOCK, "not a tar"),
    "a sample in two places": (named("a") + named("b") + named("a"), "there twice"),
    "a member twice": (entry("a.png", PNG) * 2 + entry("a.cls", b"0"), "there twice"),
    "a member twice, by case": (entry("a.png", PNG) + entry("a.PNG", PNG) + entry("a.cls", b"0"), "there twice"),
    "two images": (entry("a.png", PNG) + entry("a.jpg", JPEG) + entry("a.cls", b"0"), "one image"),
    "no label": (entry("a.png", PNG), "one cls"),
    "no image": (entry("a.cls", b"0"), "one image"),
    "a pickle for an image": (entry("a.pkl", PICKLE) + entry("a.cls", b"0"), "one image"),
    "a tar for an image": (entry("a.tar", tar(ONE)) + entry("a.cls", b"0"), "one image"),
    **{
        f"the label {label[:12]!r}": (entry("a.png", PNG) + entry("a.cls", label), said)
        for label, said in {
            b"": "the label is", b"-1": "the label is", b"1.0": "the label is", b"0x1": "the label is",
            b"1_0": "the label is", b"cat": "the label is", "٣".encode(): "the label is", b"1 2": "the label is",
            b"1\0": "the label is", b"9" * 5000: "the label is", b"__import__('os')": "the label is",
            PICKLE: "the label is", b"999999999": "at most 1,000,000 classes", b"1000000": "at most 1,000,000",
        }.items()
    },
}  # fmt: skip
NO_KEY = ("there twice", "one image", "one cls", "the label is", "at most 1,000,000 classes")  # all others are of tars


def write(folder: Path, **tars: bytes) -> Path:
    """`folder` (made) with these tars in it."""
    folder.mkdir(parents=True)
    for name, data in tars.items():
        (folder / f"{name}.tar").write_bytes(data)
    return folder


def tarfile_s(data: bytes) -> list[tuple[str, int, int]]:
    """(name, where its data begin, size) of the plain files, as Python's own reader finds them."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
