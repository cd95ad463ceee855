"""Tars: ours are plain and the same each time; a stranger's are read whole or refused, and nothing in them acts."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from webdataset import tariterators

from livt_scale.data.build.tar import read_tar
from livt_scale.util.errors import LivtError, SampleError, ShardError
from tests.data.build.hostile import END, sample_bytes
from tests.small_sets import encoded

IMAGE = encoded(0)


def write_tar(path: Path, members, *, format=tarfile.PAX_FORMAT) -> Path:
    """`members`: (name, bytes), or a TarInfo that stands for itself."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


# webdataset 1.0.2 leaves the files it reads to the garbage collector
LEAVES_FILES_OPEN = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@LEAVES_FILES_OPEN
def test_our_own_tar_opens_in_tarfile_and_webdataset(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(sample_bytes(f"k-{k}", k, ("png", encoded(k))) for k in range(3)) + END)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["k-0.png", "k-0.cls", "k-1.png", "k-1.cls", "k-2.png", "k-2.cls"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar.getmembers()} == {(0, 0, 0, "", 0o644)}
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], s["cls"], s["png"]) for s in samples] == [
        (f"k-{k}", str(k).encode(), encoded(k)) for k in range(3)
    ]


@LEAVES_FILES_OPEN
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_strangers_tar_is_read_as_webdataset_reads_it(tmp_path, format):
    long = f"{'d' * 60}/{'f' * 60}" if format == tarfile.USTAR_FORMAT else f"{'é d' * 60}/{'f' * 90}"
    path = write_tar(
        tmp_path / "a.tar",
        [
            special("folder", tarfile.DIRTYPE, ""),
            ("folder/a.cls", b"7\n"),
            ("folder/a.seg.png", b"not the image"),
            ("folder/a.JPG", IMAGE),
            ("__notes__", b"x"),
            (f"{long}.json", b"{}"),
            (f"{long}.png", IMAGE),
            (f"{long}.cls", b"0"),
        ],
        format=format,
    )
    ours = list(read_tar(path))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s.key for s in ours] == [s["__key__"] for s in theirs] == ["folder/a", long]
    assert [s.label for s in ours] == [7, 0]
    data = path.read_bytes()
    for sample in ours:
        assert data[sample.data_start : sample.data_start + sample.data_size] == IMAGE
        with tarfile.open(fileobj=io.BytesIO(data[sample.start : sample.start + sample.nbytes] + END)) as tar:
            assert {n.split(".")[0] for n in tar.getnames()} <= {sample.key, "__notes__"}  # a tar of its own


NAMES = st.text(st.sampled_from("a_./\nB"), min_size=1, max_size=9).filter(
    lambda name: not name.startswith("/") and ".." not in name.split("/") and not name.endswith("/")
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(NAMES, min_size=1, max_size=5))
@example(keys=["__a/b", "__c__/d", "e.f/g", "h.i\n/j"])
def test_webdataset_and_we_agree_on_which_members_are_a_sample(tmp_path, keys):
    members = [(f"{key}.{kind}", data) for key in keys for kind, data in (("PNG", IMAGE), ("cls", b"1"))]
    path = write_tar(tmp_path / "a.tar", members)
    try:
        files = tariterators.tar_file_expander([{"url": "a.tar", "stream": io.BytesIO(path.read_bytes())}])
        theirs = list(tariterators.group_by_keys(files))
    except ValueError:  # a key twice
        theirs = []
    valid = [sample for sample in theirs if {"png", "cls"} <= sample.keys()]
    try:
        ours = list(read_tar(path))
    except SampleError:
        assert len(valid) < len(theirs) or not theirs
        return
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]


HOSTILE = {
    "an absolute name": ([("/etc/a.png", IMAGE), ("/etc/a.cls", b"1")], "leads out"),
    "a name that climbs": ([("x/../../a.png", IMAGE)], "leads out"),
    "a symbolic link": ([special("a.png", tarfile.SYMTYPE)], "link"),
    "a hard link": ([special("a.png", tarfile.LNKTYPE)], "link"),
    "a device": ([special("a.png", tarfile.CHRTYPE)], "device"),
    "a pipe": ([special("a.png", tarfile.FIFOTYPE)], "a pipe"),
    "no label": ([("a.png", IMAGE)], "one cls"),
    "no image": ([("a.cls", b"1")], "one image"),
    "two images": ([("a.png", IMAGE), ("a.jpg", IMAGE), ("a.cls", b"1")], "one image"),
    "a member twice": ([("a.png", IMAGE), ("a.png", IMAGE), ("a.cls", b"1")], "twice"),
    "a label that is code": ([("a.png", IMAGE), ("a.cls", b"__import__('os')")], "the label is"),
    "a negative label": ([("a.png", IMAGE), ("a.cls", b"-1")], "the label is"),
    "an endless label": ([("a.png", IMAGE), ("a.cls", b"1" * 100)], "the label is"),
    "a pickle for a label": ([("a.png", IMAGE), ("a.cls", b"\x80\x04K\x01.")], "the label is"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_is_refused_by_name_and_offset(tmp_path, case):
    members, said = HOSTILE[case]
    path = write_tar(tmp_path / "a 'b'\n.tar", members)
    with pytest.raises((ShardError, SampleError), match=said) as error:
        list(read_tar(path))
    assert "offset" in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_member_that_claims_more_than_there_is_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 60
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ShardError, match="offset 0"):
        list(read_tar(path))


def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path):
    whole = b"".join(sample_bytes(f"k-{k}", k, ("png", IMAGE)) for k in range(2)) + END
    path = tmp_path / "a.tar"
    for end in range(0, len(whole) - len(END) + 1, 64):
        path.write_bytes(whole[:end])
        with pytest.raises((ShardError, SampleError)):
            list(read_tar(path))


def test_what_follows_the_end_of_a_tar_is_not_lost_in_silence(tmp_path):
    one = sample_bytes("a", 1, ("png", IMAGE)) + END
    path = tmp_path / "a.tar"
    path.write_bytes(one + one)
    with pytest.raises(ShardError, match="not a tar from here on"):
        list(read_tar(path))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_tar_of_any_damage_gives_samples_or_one_of_our_errors(tmp_path, data):
    members = [("é" * 80 + ".png", IMAGE), ("é" * 80 + ".cls", b"1"), ("b.png", IMAGE), ("b.cls", b"2")]
    path = write_tar(tmp_path / "a.tar", members)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        samples = list(read_tar(path))
    except LivtError:
        return
    assert all(s.start + s.nbytes <= len(whole) and s.data_start >= s.start for s in samples)
