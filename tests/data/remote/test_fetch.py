"""Fetching a file over bad connections: what is tried again, what is not, and what the error says."""

import hashlib
import threading
from pathlib import Path

import fsspec.asyn
import pytest

from livt_scale.config.recipe import Remote
from livt_scale.data.remote import fetch as remote
from livt_scale.data.remote.fetch import Cancelled, Fetcher, matches
from livt_scale.util.errors import DataError, RemoteError
from livt_scale.util.urls import below, is_url, redacted, url_problem
from tests.data.remote.flaky_server import FAULTS, FlakyServer

BODY = bytes(range(256)) * 400
CHECK = matches(len(BODY), hashlib.sha256(BODY).hexdigest())
QUICK = Remote(tries=4, connect_timeout_s=5, stall_timeout_s=5, deadline_s=60)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a b#?é%41.tar").write_bytes(BODY)
    (tmp_path / "served" / "a.tar").write_bytes(BODY)
    with FlakyServer(tmp_path / "served") as running:
        yield running


def fetch(server, tmp_path, name="a.tar", *, told=QUICK, **options):
    return Fetcher(server.url, told).fetch(name, tmp_path / "out", most_bytes=len(BODY), check=CHECK, **options)


def faults_before(number, fault):
    return lambda name, before: fault if before < number else ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_tried_again(server, tmp_path, fault):
    server.plan = faults_before(1, fault)
    assert fetch(server, tmp_path)
    assert (tmp_path / "out").read_bytes() == BODY
    assert server.requests["a.tar"] == 2


def test_a_name_with_odd_characters_is_asked_for_as_it_is(server, tmp_path):
    assert fetch(server, tmp_path, "a b#?é%41.tar")
    assert (tmp_path / "out").read_bytes() == BODY


@pytest.mark.parametrize("scheme", ["file"])
def test_other_schemes_are_fetched_too(server, tmp_path, scheme):
    fetcher = Fetcher(f"file://{server.folder}", QUICK)
    assert fetcher.fetch("a.tar", tmp_path / "out", most_bytes=len(BODY), check=CHECK)
    assert (tmp_path / "out").read_bytes() == BODY
    with pytest.raises(RemoteError, match=r"1 try .*it is not there"):
        fetcher.fetch("b.tar", tmp_path / "out", most_bytes=len(BODY))


@pytest.mark.parametrize(
    ("fault", "said"), [("404", "404"), ("403", "access is denied"), ("401", "access"), ("400", "400")]
)
def test_what_stays_wrong_fails_at_the_first_try_with_a_remedy(server, tmp_path, fault, said):
    server.plan = lambda name, before: fault
    with pytest.raises(RemoteError, match=said) as caught:
        fetch(server, tmp_path)
    assert server.requests["a.tar"] == 1
    assert caught.value.remedy


def test_a_file_that_may_miss_may(server, tmp_path):
    assert not fetch(server, tmp_path, "quarantine.json", may_miss=True)
    server.plan = lambda name, before: "503"
    with pytest.raises(RemoteError):
        fetch(server, tmp_path, "quarantine.json", may_miss=True)


def test_the_error_names_url_shard_tries_and_how_long(server, tmp_path):
    server.plan = lambda name, before: "503"
    with pytest.raises(RemoteError) as caught:
        fetch(server, tmp_path)
    said = str(caught.value)
    assert f"a.tar cannot be fetched from {server.url}/a.tar: 4 tries in " in said
    assert " s, the last: the server answered 503" in said
    assert server.requests["a.tar"] == 4


def test_a_stalled_connection_is_cut(server, tmp_path):
    server.plan = faults_before(1, "stall")
    told = QUICK.model_copy(update={"stall_timeout_s": 0.2, "deadline_s": 10})  # that alone: no second try
    assert fetch(server, tmp_path, told=told)
    server.plan = lambda name, before: "stall"
    with pytest.raises(RemoteError, match=r"2 tries .* stalled"):
        fetch(server, tmp_path, told=QUICK.model_copy(update={"stall_timeout_s": 0.2, "tries": 2}))


def test_a_body_that_drips_is_cut_by_the_deadline(server, tmp_path):
    server.plan = lambda name, before: "drip"
    with pytest.raises(RemoteError, match="1 try"):
        fetch(server, tmp_path, told=QUICK.model_copy(update={"deadline_s": 0.5}))


def test_a_server_that_is_not_there_is_an_error_after_all_tries(tmp_path):
    with pytest.raises(RemoteError, match=r"4 tries in .*Connect"):
        Fetcher("http://127.0.0.1:9", QUICK).fetch("a.tar", tmp_path / "out", most_bytes=1)


def test_retry_after_is_kept_to_or_given_up_on(server, tmp_path):
    server.plan = lambda name, before: "429 3600"
    with pytest.raises(RemoteError, match=r"1 try in .*429"):  # an hour is beyond the deadline: no use to wait
        fetch(server, tmp_path)


def test_waits_are_drawn_below_a_bound_that_doubles(server, tmp_path, monkeypatch):
    bounds = []
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: bounds.append((low, high)) or 0.0)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.003)
    server.plan = lambda name, before: "503"
    with pytest.raises(RemoteError):
        fetch(server, tmp_path)
    assert bounds == [(0, 0.001), (0, 0.002), (0, 0.003), (0, 0.003)]


@pytest.mark.parametrize("fault", ["wrong", "short"])
def test_a_body_that_is_wrong_twice_the_same_is_what_lies_there(server, tmp_path, fault):
    server.plan = lambda name, before: fault
    with pytest.raises(RemoteError, match=r"2 tries .*manifest.*twice the same.*copy the set there again"):
        fetch(server, tmp_path)


def test_a_body_without_end_is_broken_off(server, tmp_path):
    (server.folder / "a.tar").write_bytes(BODY * 300)  # 30 MB
    with pytest.raises(RemoteError, match="more than the 102,400 bytes"):
        fetch(server, tmp_path)
    assert (tmp_path / "out").stat().st_size < 100 * len(BODY)


def test_a_fetch_that_nobody_needs_ends(server, tmp_path):
    stop = threading.Event()
    stop.set()
    server.plan = lambda name, before: "503"
    with pytest.raises(Cancelled):
        fetch(server, tmp_path, cancelled=stop)
    server.plan = lambda name, before: ""
    with pytest.raises(Cancelled):
        fetch(server, tmp_path, cancelled=stop)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_full_disk_is_told_as_that_and_not_tried_again(server, scheme):
    url = server.url if scheme == "http" else f"file://{server.folder}"
    with pytest.raises(DataError, match=r"no room .* free\).*limit_gib"):
        Fetcher(url, QUICK).fetch("a.tar", Path("/dev/full"), most_bytes=len(BODY), check=CHECK)
    assert server.requests["a.tar"] == (scheme == "http")


class Faulty(fsspec.asyn.AsyncFileSystem):
    async def _get_file(self, *_, **__):
        return 1 / 0


def test_a_fault_of_our_own_is_not_hidden(tmp_path):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    with pytest.raises(ZeroDivisionError):
        Fetcher("faulty://x", QUICK).fetch("a.tar", tmp_path / "out", most_bytes=1)


@pytest.mark.parametrize("fault", ["403", "503", "reset", "404"])
def test_a_signed_link_behind_a_redirect_is_never_told(server, tmp_path, fault):
    server.location = f"{server.url.replace('//', '//user:pa55@')}/real?X-Amz-Signature=s3cr3t"
    server.plan = lambda name, before: "redirect" if name == "a.tar" else fault
    with pytest.raises(RemoteError) as caught:
        fetch(server, tmp_path)
    for told in (str(caught.value), repr(caught.value.__cause__)):
        assert "pa55" not in told
        assert "s3cr3t" not in told
    assert caught.value.__suppress_context__  # nor by a traceback of --debug


SECRETS = [
    "https://me:pa55@host/train",
    "https://pa55@host/train",
    "s3://KEY:pa55@bucket/train",
    "https://host/train?X-Amz-Signature=pa55",
    "https://host/train#pa55",
    "https://me:pa55/x@host/train",
    "https://[pa55/train",
    "ftp://pa55/train",
    "https:///pa55",
    "https://host/pa 55",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_url_with_a_secret_or_no_sense_is_refused_in_words_that_do_not_hold_it(url):
    problem = url_problem(url)
    assert problem
    assert "pa55" not in problem
    assert "pa 55" not in problem


@pytest.mark.parametrize("url", ["file:///a/b", "http://127.0.0.1:80/a@b", "https://h/a/", "s3://bucket", "s3://b/a=1"])
def test_a_plain_url_is_taken(url):
    assert is_url(url)
    assert url_problem(url) is None


def test_names_are_joined_and_texts_cleaned():
    assert below("https://h/a/", "x y.tar") == "https://h/a/x%20y.tar"
    assert below("s3://b/a", "x y.tar") == "s3://b/a/x y.tar"
    assert (
        redacted("GET 'https://me:pw@h/x?sig=1', http://h/a#b s3://k:s@b/c.")
        == "GET 'https://h/x?…', http://h/a?… s3://b/c."
    )
    assert redacted("nothing to see") == "nothing to see"
