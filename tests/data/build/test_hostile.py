"""Hostile and damaged tars: each is read right or refused with shard, offset and key; none acts, each is bounded.

The policy that these tests hold is the table "Odd and hostile input" of docs/data.md; images are in
test_hostile_images.py. Independent references: tarfile for what is read, the system's limits and Python's audit hooks
for what is not done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from livt_scale.cli.shards import app
from livt_scale.data import manifest
from livt_scale.data.build.folder import open_folder
from livt_scale.data.build.indexing import index_tars
from livt_scale.data.build.sources import open_list, open_tars
from livt_scale.data.build.tar import MAX_SAMPLE_BYTES, read_tar
from livt_scale.data.build.verify import verify
from livt_scale.data.build.writer import publish, scan_shard
from livt_scale.data.loader import train_batches
from livt_scale.data.reader import SampleReader
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import ManifestError, SampleError, ShardError, SourceError
from tests.data.build.hostile import BLOCK, END, entry, header, sample, tar
from tests.data.build.odd_tars import JPEG, NO_KEY, ONE, PNG, READ, REFUSED, named, tarfile_s, write
from tests.data.image.test_hostile_images import REFUSED as BAD_IMAGES
from tests.data.tiny_sets import encoded, photo, tiny_recipe
from tests.small_sets import contents


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
