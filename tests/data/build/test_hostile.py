"""Hostile and damaged tars: each is read right or refused with shard, offset and key; none acts, each is bounded.

The policy that these tests hold is the table "Odd and hostile input" of docs/data.md; images are in
test_hostile_images.py. Independent references: tarfile for what is read, the system's limits and Python's audit hooks
for what is not done.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from livt_scale.cli.shards import app
from livt_scale.data import manifest
from livt_scale.data.build.folder import open_folder
from livt_scale.data.build.indexing import index_tars
from livt_scale.data.build.sources import open_list, open_tars
from livt_scale.data.build.tar import MAX_HEADER_BYTES, MAX_SAMPLE_BYTES, read_tar
from livt_scale.data.build.verify import verify
from livt_scale.data.build.writer import publish, scan_shard
from livt_scale.data.loader import train_batches
from livt_scale.data.reader import SampleReader
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import LivtError, ManifestError, SampleError, ShardError, SourceError
from tests.data.build.hostile import BLOCK, END, entry, gnu_long, header, pax, sample, tar
from tests.data.image.test_hostile_images import REFUSED as BAD_IMAGES
from tests.data.tiny_sets import encoded, photo, tiny_recipe
from tests.small_sets import contents

PNG, JPEG = encoded(photo(12, 9), "PNG"), encoded(photo(12, 9, seed=1))
ONE = sample("a", PNG, b"1") + sample("b", JPEG, b"0", kind="jpg")
LONG = "n" * 300


class Boom:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return open, ("unpickled", "w")


PICKLE = pickle.dumps(Boom())


@pytest.fixture(autouse=True)
def _nothing_hangs():
    """No test here may take long: an endless loop becomes an error."""

    def too_long(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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


@pytest.mark.parametrize("case", READ)
def test_an_odd_tar_is_read_right_and_left_as_it_is(case, tmp_path):
    members, keys = READ[case]
    folder = write(tmp_path / "tars", a=tar(members))
    shards = index_tars(folder, workers=1)
    assert shards.keys(np.arange(len(keys))) == keys
    read = list(SampleReader(shards).read(np.arange(len(keys))))
    assert [raw.label for raw in read] == ([1, 0] if case == "plain" else [0])
    assert [raw.image for raw in read] == [PNG, JPEG][: len(keys)] if "no bytes" not in case else [b""]
    if case not in ("dates where the prefix is", "ten thousand extended headers"):  # part of a name; RecursionError
        images = (".png", ".jpg")
        theirs = [(start, size) for name, start, size in tarfile_s(tar(members)) if name.lower().endswith(images)]
        ours = [(s.data_start, s.data_size) for s in read_tar(folder / "a.tar")]
        assert ours == theirs
    assert open_tars("s", folder).image(0)[1] == PNG if "no bytes" not in case else True
    assert sorted(p.name for p in folder.iterdir()) == ["a.tar", "index.npy", "keys.bin", "manifest.json"]


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_tar_is_refused_in_one_line_with_shard_offset_and_key(case, tmp_path, monkeypatch):
    members, said = REFUSED[case]
    folder = write(tmp_path / "a 'folder'\n", good=tar(named("good")), hostile=tar(members))
    monkeypatch.chdir(folder)
    before = contents(tmp_path)
    for read in (lambda: index_tars(folder, workers=1), lambda: list(read_tar(folder / "hostile.tar"))):
        if case == "a sample in two places" and "list" in read.__code__.co_names:
            continue  # seen where the keys of all tars are there
        with pytest.raises((ShardError, SampleError), match=said) as error:
            read()
        text = str(error.value)
        assert re.search("hostile.tar.?, offset", text)
        assert "\n" not in text
        assert len(text) < 1000
        if said in NO_KEY:
            assert "key 'a'" in text
    with pytest.raises(
        (ShardError, SampleError, SourceError), match="'a' is there twice" if "places" in case else said
    ):
        open_tars("s", folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "said"), [(b"", "offset 0: not a tar: it has 0 bytes"), (END, "no sample in its tars")]
)
def test_a_shard_of_nothing_is_refused(data, said, tmp_path):
    with pytest.raises((ShardError, SampleError), match=said):
        index_tars(write(tmp_path / "tars", a=data), workers=1)


def test_a_key_that_two_tars_hold_is_refused(tmp_path):
    folder = write(tmp_path / "tars", one=tar(named("a")), two=tar(named("b"), named("a")))
    with pytest.raises(SampleError, match=r"two\.tar, offset 2048, key 'a': the key is there twice, also in one\.tar"):
        index_tars(folder, workers=1)


def test_a_sample_too_large_to_be_read_at_once_is_refused_before_it_is_read(tmp_path):
    folder = write(tmp_path / "tars")
    with (folder / "a.tar").open("wb") as file:  # a file with a hole: it takes no room on the disk
        file.write(header(b"a.png", size=MAX_SAMPLE_BYTES + 1))
        file.seek(MAX_SAMPLE_BYTES + 1024 + BLOCK)
        file.write(entry("a.cls", b"0") + END)
    with pytest.raises(SampleError, match="offset 0, key 'a': more than 536,870,912 bytes"):
        index_tars(folder, workers=1)


IN_BOUNDS = """
import json, os, resource, sys, time
from pathlib import Path
import livt_scale.data.loader, PIL.Image, PIL.PngImagePlugin, PIL.JpegImagePlugin, numpy.lib.format
from livt_scale.data.build.spec import load_spec
from livt_scale.data.build.builder import build
from livt_scale.data.build.indexing import index_tars
from livt_scale.data.build.verify import verify
from livt_scale.data.reader import SampleReader
from livt_scale.util.errors import LivtError
import numpy as np

root, acts = Path.cwd(), []
def watch(event, args):
    if event in ("os.system", "subprocess.Popen", "pickle.find_class", "os.exec", "os.symlink", "os.link",
                 "socket.connect", "os.posix_spawn", "os.fork", "ctypes.dlopen", "os.chmod", "shutil.unpack_archive"):
        acts.append(repr((event, args)))
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir"):
        acts.extend(repr((event, args)) for a in args[:1] if not inside(a))
    elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not isinstance(args[0], int) and not inside(args[0]):
            acts.append(repr((event, args)))
def inside(path):
    return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(root / "cases")

pages = int(Path("/proc/self/statm").read_text().split()[0])
def peak_mib():  # ru_maxrss would begin with what the parent had
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before = peak_mib()
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20), -1))
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
sys.addaudithook(watch)
said = {}
for case in sorted((root / "cases").iterdir()):
    said[case.name] = []
    def all_of_it(shards):
        return len(list(SampleReader(shards).read(np.arange(shards.manifest.num_samples))))
    spec = case / "spec.yaml"
    spec.write_text("name: x\\nsources: {t: {tars: {root: tars}}}\\nsets: {all: {source: t}}\\n")
    for step in (lambda: all_of_it(index_tars(case / "tars", workers=1)),
                 lambda: [str(f) for f in verify(case / "tars", decode=True, workers=1)],
                 lambda: build(load_spec(spec), case / "out", workers=1)[0].num_samples):
        try:
            said[case.name].append(step())
        except LivtError as error:
            said[case.name].append(type(error).__name__)
grown = peak_mib() - before
print(json.dumps({"acts": acts, "grown_mib": grown, "said": said}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux alone")
def test_index_verify_build_and_reading_stay_in_bounds_and_do_nothing_else(tmp_path):
    everything = {**{f"read {k}": v for k, v in READ.items()}, **{f"refused {k}": v for k, v in REFUSED.items()}}
    names = list(everything)
    for number, (members, _) in enumerate(everything.values()):
        write(tmp_path / "cases" / f"{number:03d}" / "tars", a=tar(members))
    images = {name: data for name, (data, _) in BAD_IMAGES.items() if len(data) < 1 << 20}
    write(tmp_path / "cases" / "images" / "tars", a=tar(*(sample(k, image) for k, image in images.items())))
    done = subprocess.run([sys.executable, "-c", IN_BOUNDS], cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["acts"] == []
    assert seen["grown_mib"] < 100
    for number, name in enumerate(names):
        indexed, verified, built = seen["said"][f"{number:03d}"]
        if name.startswith("refused"):
            assert (indexed, verified, built) in [(e, "ManifestError", b) for e in _DATA for b in _DATA], name
        elif "no bytes" in name:
            assert (indexed, len(verified), built) == (1, 1, "SourceError")
        else:
            assert (indexed, verified, built) == (len(everything[name][1]),) * 1 + ([], len(everything[name][1])), name
    assert len(seen["said"]["images"][1]) == len(images)
    assert not list(tmp_path.glob("unpickled"))


_DATA = ("ShardError", "SampleError", "SourceError")


def test_a_pipe_or_an_endless_file_in_the_place_of_data_does_not_hang(tmp_path):
    (tmp_path / "tars").mkdir()
    os.mkfifo(tmp_path / "tars" / "a.tar")
    (tmp_path / "tars" / "b.tar").symlink_to("/dev/zero")
    with pytest.raises(ManifestError, match=r"holds no \.tar"):
        index_tars(tmp_path / "tars", workers=1)
    with pytest.raises(SourceError, match=r"holds no \.tar"):
        open_tars("s", tmp_path / "tars")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    os.mkfifo(tmp_path / "images" / "cat" / "a.jpg")
    (tmp_path / "images" / "cat" / "b.jpg").symlink_to("/dev/zero")
    source = open_folder("s", tmp_path / "images")
    for i in (0, 1):
        with pytest.raises(SourceError, match="not a regular file"):
            source.image(i)


def test_a_label_beyond_all_classes_makes_no_list_of_them(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "list.txt").write_text("a.png 999999999\n")
    with pytest.raises(SourceError, match="at most 1,000,000 classes"):
        open_list("s", tmp_path, list_file=tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("field", "value"),
    [("nbytes", 2**32 - 1), ("start", 2**64 - 1), ("start", 2**63), ("data_size", 2**32 - 1), ("data_offset", 2**31),
     ("label", -1), ("label", 7), ("image_type", 9)],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused_by_reader_and_verify(field, value, tmp_path):
    folder = write(tmp_path / "tars", a=tar(ONE))
    shard = scan_shard(folder / "a.tar")
    publish(folder, [shard], name="x", seed=None, class_names=["0", "1"], class_counts=[1, 1], source={"indexed": True})
    index = np.load(folder / manifest.INDEX)
    index[field][1] = value
    np.save(folder / manifest.INDEX, index)
    told = json.loads((folder / manifest.MANIFEST).read_text())
    del told["digest"]
    data = (folder / manifest.INDEX).read_bytes()
    told["index"] = {"name": manifest.INDEX, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / manifest.MANIFEST).write_bytes(
        manifest.ShardManifest.model_validate(told).to_bytes()
    )  # all sums are right
    shards = ShardSet.open(folder)
    assert next(SampleReader(shards).read(np.array([0]))).image == PNG
    with pytest.raises(ManifestError, match="impossible row for sample 'b'"):
        list(SampleReader(shards).read(np.array([0, 1])))
    assert ["impossible row" in fault.what for fault in verify(folder, decode=True, workers=1)] == [True]


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


def test_bad_images_of_many_kinds_go_into_quarantine_and_training_leaves_them_out(tmp_path):
    kinds = [
        "a JPEG cut in its pixels, with an end mark",
        "a PNG of 65,500 x 65,500",
        "a CMYK JPEG cut, with an end mark",
        "nothing",
        "a GIF",
        "a PNG with a changed pixel byte",
        "a pickle",
        "a WebP canvas of 2^24 x 16",
    ]
    bad = {f"bad {k} '{kind}'": BAD_IMAGES[kind][0] for k, kind in enumerate(kinds)}
    images = bad | {f"good {k}\n": encoded(photo(40, 40, seed=k)) for k in range(20)}
    members = [sample(key, images[key], b"%d" % (k % 3), kind="jpg") for k, key in enumerate(images)]
    folder = write(tmp_path / "a 'set'", one=tar(*members[::2]), two=tar(*members[1::2]))
    run = CliRunner().invoke
    assert run(app, ["index", str(folder), "--workers", "1"]).exit_code == 0
    recipe = tiny_recipe(folder)
    stage = {"stage": "pretrain", "rank": 0, "world_size": 1, "micro_batch": 8, "epoch": 0, "step": 0}
    where = r"(one|two)\.tar, byte \d+, sample .bad .*livt shards verify.*--quarantine"
    with pytest.raises(SampleError, match=where) as error:
        list(train_batches(ShardSet.open(folder), recipe, **stage))
    assert "\n" not in str(error.value)

    told = run(app, ["verify", str(folder), "--decode", "--json", "--workers", "1"])
    faults = {fault["key"]: fault for fault in json.loads(told.stdout)["faults"]}
    assert (told.exit_code, set(faults)) == (1, set(bad))
    for key, kind in zip(bad, kinds, strict=True):
        assert re.search(BAD_IMAGES[kind][1], faults[key]["what"]), kind
        assert faults[key]["offset"] % BLOCK == 0

    told = run(app, ["verify", str(folder), "--decode", "--quarantine", "--workers", "1"])
    assert told.exit_code == 0
    assert "in quarantine: 8 samples: 3 of class 0, 3 of class 1, 2 of class 2. Training leaves them out" in told.stdout
    shards = ShardSet.open(folder)
    seen = [key for batch in train_batches(shards, recipe, **stage) for key in batch.keys]
    assert {key[:4] for key in seen} == {"good"}
    assert len(set(seen)) > 16
    info = json.loads(run(app, ["info", str(folder), "--json"]).stdout)
    assert (info["samples"], info["quarantined_by_class"]) == (20, [3, 3, 2])
    labels = shards.labels(shards.usable_to_sample(np.arange(20)))
    assert info["class_counts"] == np.bincount(labels).tolist()
