"""The node's cache: one fetch for all, a limit that holds, and nothing lost or hung when processes are killed."""

import contextlib
import fcntl
import hashlib
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.config import recipe
from livt_scale.data.manifest import FileInfo
from livt_scale.data.remote import cache as cache_module
from livt_scale.data.remote.cache import GIB, ShardCache, closing_fd
from livt_scale.data.remote.fetch import Cancelled
from livt_scale.util.errors import DataError, UsageError
from tests import warm
from tests.data.remote.cache_users import hold as hold_from
from tests.data.remote.flaky_server import FlakyServer

SIZE = 200_000
HOLDER = re.compile(r"process \d+ on \S+")


def body(number, size=SIZE):
    return bytes([number]) * size


def info_of(number, size=SIZE):
    return FileInfo(name=f"f{number:02d}.tar", bytes=size, sha256=hashlib.sha256(body(number, size)).hexdigest())


def writes(number, size=SIZE):
    return lambda path: path.write_bytes(body(number, size))


def unexpected(path):
    raise AssertionError("fetched again")


def make(folder, limit=3 * SIZE):
    return ShardCache.of(recipe.Cache(dir=str(folder), limit_gib=limit / GIB))


def use(cache, number, fetch=None):
    with closing_fd(cache.hold(info_of(number), fetch or writes(number), wait_s=5)) as handle:
        assert os.pread(handle, SIZE, 0) == body(number)


def kept(cache):
    return [n for n in range(20) if cache.has(info_of(n))]


@pytest.fixture
def cache(tmp_path):
    return make(tmp_path / 'a cache\'s\n"dir"')


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    for number in range(8):
        (tmp_path / "served" / info_of(number).name).write_bytes(body(number))
    with FlakyServer(tmp_path / "served") as running:
        yield running


def start(what, cache, server, *numbers, seed=0, rounds=1):
    infos = [info_of(n).model_dump_json() for n in numbers]
    arguments = [what, str(cache.folder), str(cache.limit), server.url, str(seed), str(rounds), *infos]
    return warm.Popen(["-m", "tests.data.remote.cache_users", *arguments], stdout=warm.PIPE)


def ended_well(process):
    out, _ = process.communicate(timeout=120)
    return process.returncode == 0 and "done" in out


def wait_until(true):
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass in 60 s")


def test_a_file_is_fetched_once(cache):
    use(cache, 1)
    use(cache, 1, unexpected)
    assert cache.used() == SIZE


def test_four_processes_that_want_one_shard_download_it_once(cache, server):
    server.plan = lambda name, before: "slow"  # long enough for all four to ask
    processes = [start("read", cache, server, 3) for _ in range(4)]
    assert [ended_well(p) for p in processes] == [True] * len(processes)
    assert server.requests == {"f03.tar": 1}


def test_a_partial_file_that_a_failed_fetch_removes_as_another_claims_it_is_not_taken(cache, monkeypatch):
    """The second thread has opened the file and not yet locked it when the first one removes it."""
    fetching, opened, removed = threading.Event(), threading.Event(), threading.Event()
    flock = cache_module.fcntl.flock

    def late(handle, operation):
        claims = operation == fcntl.LOCK_EX | fcntl.LOCK_NB and threading.current_thread().name == "second"
        if claims and Path(f"/proc/self/fd/{handle}").readlink().suffix == ".part":
            opened.set()
            removed.wait(10)
        return flock(handle, operation)

    monkeypatch.setattr(cache_module.fcntl, "flock", late)

    def fail(path):
        fetching.set()
        opened.wait(10)
        raise Cancelled

    def first():
        with contextlib.suppress(Cancelled):
            cache.hold(info_of(1), fail, wait_s=5)
        removed.set()

    found = []

    def second():
        fetching.wait(10)
        with closing_fd(cache.hold(info_of(1), writes(1), wait_s=5)) as handle:
            found.append(os.pread(handle, SIZE, 0) == body(1))

    threads = [threading.Thread(target=first), threading.Thread(target=second, name="second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True]


def test_what_was_used_longest_ago_goes_first(cache):
    for number in (1, 2, 3):
        use(cache, number)
        time.sleep(0.01)
    use(cache, 1)
    use(cache, 4)
    assert kept(cache) == [1, 3, 4]
    assert cache.used() == 3 * SIZE


def test_what_is_read_is_never_removed(cache):
    with contextlib.ExitStack() as reading:
        use(cache, 2)
        for number, fetch in ((1, writes(1)), (2, unexpected)):  # one just fetched, one that was there
            reading.enter_context(closing_fd(cache.hold(info_of(number), fetch, wait_s=5)))
        for number in (3, 4, 5):
            use(cache, number)
        assert kept(cache) == [1, 2, 5]
    use(cache, 6)
    use(cache, 7)
    assert kept(cache) == [5, 6, 7]


def test_where_all_is_in_use_the_error_names_the_figure_that_would_do(tmp_path):
    cache = make(tmp_path / "c", limit=2 * GIB)
    sparse = [FileInfo(name=f"{n}.tar", bytes=GIB, sha256=f"{n}" * 64) for n in (1, 2, 3)]
    fetch = lambda path: os.truncate(path, GIB)  # noqa: E731 - takes no disk
    with contextlib.ExitStack() as reading:
        for info in sparse[:2]:
            reading.enter_context(closing_fd(cache.hold(info, fetch, wait_s=1)))
        with pytest.raises(DataError, match=r"no room for 3\.tar .*limit_gib to at least 3\.00"):
            cache.hold(sparse[2], fetch, wait_s=0.1)
    with pytest.raises(DataError, match=r"limit_gib is 2 .* needs 3,221,225,472.*at least 3\.00"):
        cache.hold(FileInfo(name="x", bytes=3 * GIB, sha256="4" * 64), fetch, wait_s=1)


def test_the_limit_holds_and_nobody_hangs_with_room_for_three_and_eight_processes(cache, server):
    """Pain 8: reference count per open shard; limit of 3 shards, 8 workers, each after 8 shards in its own order."""
    processes = [start("read", cache, server, *range(8), seed=seed, rounds=12) for seed in range(8)]
    most = samples = 0
    while any(p.poll() is None for p in processes):
        most, samples = max(most, on_disk(cache)), samples + 1
        time.sleep(0.002)
    assert [ended_well(p) for p in processes] == [True] * len(processes)
    assert samples > 20
    assert 0 < most <= 3 * SIZE
    assert sorted(p.name for p in cache.folder.iterdir() if len(p.name) != 64) == ["lock"]


def on_disk(cache):
    """Bytes of all files, less the one line of the lock that names its holder."""
    total = 0
    for path in cache.folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += len(HOLDER.sub("", path.read_text())) if path.name == "lock" else path.stat().st_size
    return total


def test_kill_9_in_mid_download_leaves_what_the_next_start_takes_over(cache, server):
    server.plan = lambda name, before: "stall" if before == 0 else ""
    process = start("read", cache, server, 3)
    wait_until(lambda: any(p.name.endswith(".part") and p.stat().st_size for p in cache.folder.iterdir()))
    process.kill()
    process.communicate()
    assert [p.name for p in cache.folder.iterdir() if p.name != "lock"] == [f"{info_of(3).sha256}.{SIZE}.part"]
    assert ended_well(start("read", cache, server, 3))
    assert kept(cache) == [3]
    assert on_disk(cache) == SIZE


def test_who_waits_takes_over_when_the_one_that_fetches_is_killed(cache, server):
    server.plan = lambda name, before: "stall" if before == 0 else ""
    first = start("read", cache, server, 3)
    wait_until(lambda: server.requests["f03.tar"] == 1)
    second = start("read", cache, server, 3)
    assert second.stdout.readline() == "ready\n"
    first.kill()
    first.communicate()
    assert second.wait(timeout=60) == 0
    second.communicate()
    assert server.requests["f03.tar"] == 2


def test_a_part_of_a_killed_process_gives_its_room_back(cache):
    left = cache.folder / f"{'a' * 64}.{2 * SIZE}.part"
    left.write_bytes(b"half")
    assert cache.used() == 2 * SIZE
    for number in (1, 2, 3):
        use(cache, number)
    assert kept(cache) == [1, 2, 3]
    assert not left.exists()


def test_leftovers_are_removed_by_tidy_but_not_a_download_under_way(cache):
    left = cache.folder / f"{'a' * 64}.5.part"
    left.write_bytes(b"half")

    def fetch(path):
        cache.tidy()
        assert not left.exists()
        path.write_bytes(body(1))

    use(cache, 1, fetch)
    assert kept(cache) == [1]


def test_a_killed_reader_holds_nothing(cache, server):
    process = start("keep", cache, server, 1)
    while process.stdout.readline() != "holding\n":
        pass
    for number in (2, 3, 4):
        use(cache, number)
    assert 1 in kept(cache)
    process.kill()
    process.communicate()
    use(cache, 5)
    assert 1 not in kept(cache)


def test_a_stopped_download_is_not_waited_for_without_end(cache, server):
    server.plan = lambda name, before: "stall"
    process = start("read", cache, server, 3)
    wait_until(lambda: server.requests["f03.tar"] == 1)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(DataError, match=r"f03\.tar was not there after 0 s: another process fetches it.*stopped"):
        cache.hold(info_of(3), unexpected, wait_s=0.3)
    process.kill()
    process.communicate()


def test_a_held_lock_is_not_waited_for_without_end(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "LOCK_WAIT_S", 0.1)
    with cache._locked(), pytest.raises(DataError, match=r"process \d+ on .* has held"):
        cache.tidy()


def test_a_failed_fetch_leaves_nothing(cache):
    def half(path):
        path.write_bytes(b"half")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        cache.hold(info_of(1), half, wait_s=1)
    assert [p.name for p in cache.folder.iterdir()] == ["lock"]
    use(cache, 1)


def test_a_wait_that_nobody_needs_ends(cache):
    stop = threading.Event()
    stop.set()

    def fetch(path):
        with pytest.raises(Cancelled):
            cache.hold(info_of(1), unexpected, wait_s=60, cancelled=stop)
        path.write_bytes(body(1))

    use(cache, 1, fetch)


def test_a_file_that_the_disk_lost_a_part_of_is_fetched_again(cache):
    use(cache, 1)
    cache.path(info_of(1)).chmod(0o600)
    os.truncate(cache.path(info_of(1)), 10)
    use(cache, 1)
    use(cache, 1, unexpected)
    cache.drop(info_of(1))
    assert kept(cache) == []


def test_nothing_but_the_caches_own_files_is_ever_removed(tmp_path):
    """Pain 7: the cache's limit must not delete a local data set, even one that lies in the cache's folder."""
    local = tmp_path / "data"
    cache = make(local, limit=SIZE)
    foreign = {
        local / "train-000000.tar": b"the only copy",
        local / "manifest.json": b"{}",
        cache.folder / "train-000001.tar": b"the only copy",
        cache.folder / "notes.part": b"mine",
        cache.folder / f"{'A' * 64}": b"not a digest",
    }
    for path, contents in foreign.items():
        path.write_bytes(contents)
    (cache.folder / ("b" * 64)).mkdir()
    (cache.folder / ("c" * 64)).symlink_to(local / "manifest.json")
    for number in range(6):
        use(cache, number)
    cache.tidy()
    assert {path: path.read_bytes() for path in foreign} == foreign
    assert (cache.folder / ("b" * 64)).is_dir()
    assert (cache.folder / ("c" * 64)).is_symlink()
    assert kept(cache) == [5]


def test_a_link_under_a_files_name_is_not_followed(cache, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(body(1))
    cache.path(info_of(1)).symlink_to(secret)
    with pytest.raises(DataError, match="cannot be used for f01"):
        use(cache, 1)
    assert secret.read_bytes() == body(1)


def test_each_user_has_a_folder_of_their_own_by_default(tmp_path, monkeypatch):
    """Pain 6: two users on a node do not collide, and there is no named shared memory."""
    monkeypatch.delenv("LIVT_CACHE_DIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = set(Path("/dev/shm").iterdir())
    mine = ShardCache.of(recipe.Cache())
    use(mine, 1)
    assert mine.folder == tmp_path / f"livt-cache-{os.getuid()}" / "v1"
    assert mine.folder.stat().st_mode & 0o077 == 0
    assert not {p.name for p in set(Path("/dev/shm").iterdir()) - before if "livt" in p.name}
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cache_module.default_folder() == tmp_path / "livt-cache-12345"
    with pytest.raises(UsageError, match="belongs to another user"):
        ShardCache.of(recipe.Cache(dir=str(mine.folder.parent)))
    monkeypatch.setenv("LIVT_CACHE_DIR", str(tmp_path / "told"))
    assert cache_module.default_folder() == tmp_path / "told"


def test_a_folder_that_cannot_be_is_told_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be made there.*LIVT_CACHE_DIR"):
        make(tmp_path / "file" / "x")
    with pytest.raises(UsageError, match="home folder"):
        make(Path("~nobody-of-that-name/x"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "v1").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a link"):
        make(tmp_path / "c")


@settings(max_examples=30)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=25),
    sizes=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    limit=st.integers(40, 100),
)
def test_whatever_is_held_and_let_go_the_limit_holds_and_what_is_held_stays(tmp_path_factory, steps, sizes, limit):
    cache = make(tmp_path_factory.mktemp("c"), limit)
    cache = ShardCache(cache.folder, limit)
    held = {}
    for number, let_go in steps:
        info = info_of(number, sizes[number])
        if let_go and number in held:
            os.close(held.pop(number))
            continue
        needed = sum(sizes[n] for n in {*held, number})
        try:
            handle = cache.hold(info, writes(number, sizes[number]), wait_s=0)
        except DataError:
            assert needed > limit
            continue
        assert needed <= limit
        os.close(held.pop(number, handle)) if number in held else None
        held[number] = handle
        assert cache.used() <= limit
        assert all(cache.has(info_of(n, sizes[n])) for n in held)
    for handle in held.values():
        os.close(handle)


def test_the_helper_of_these_tests_reads_what_the_server_has(cache, server):
    with closing_fd(hold_from(cache, info_of(2), server.url)) as handle:
        assert os.pread(handle, 10, 0) == body(2)[:10]
