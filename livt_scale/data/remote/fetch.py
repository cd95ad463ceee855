"""Fetches one file from a URL to disk over an unreliable connection, or raises one error with the reason.

    fetcher = Fetcher("https://host/train-lt", Remote(tries=8))
    fetcher.fetch("train-000003.tar", path, most_bytes=info.bytes, check=lambda path: "" or "what is wrong with it")

Retried: time-outs, resets, truncated and wrong bodies, 408, 425, 429 and 5xx; after a random wait below a bound that
doubles ("full jitter"), and no less than Retry-After asks. Not retried: 404, 403 and the like, an untrusted
certificate, a full disk, and a body that is wrong in the same way twice. A connection that is silent for
`stall_timeout_s` is closed, and `deadline_s` bounds all tries of a file together. Errors contain the URL, the tries and
the time taken, and never a secret: URLs hold none (`livt_scale.util.urls`), and messages of libraries are cleaned.

Transport is fsspec (http: aiohttp; s3: s3fs). Its file systems do not survive a fork, so each process creates its own
on first use; only complete files are read, by their full name, so no directory listing is ever requested or cached.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import itertools
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import Remote
from livt_scale.util.errors import DataError, RemoteError
from livt_scale.util.log import ANNOUNCE_AFTER_S, EVERY_RANK
from livt_scale.util.outside import open_checked, sha256_of
from livt_scale.util.urls import below, redacted

_log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5  # the bound of the first wait; it doubles from try to try
LONGEST_WAIT_S = 30.0
CREDENTIALS = (
    "check the URL and your rights; credentials come from the environment or profile files: for s3 AWS_PROFILE, "
    "AWS_ACCESS_KEY_ID or ~/.aws, for http ~/.netrc"
)
CERTIFICATES = (
    "let SSL_CERT_FILE (for s3 AWS_CA_BUNDLE) name a file with the certificate of the authority that signed the "
    "server's, on every node; if you know of none, do not trust the server"
)
_CERTIFICATE = re.compile(r"certificate verify failed(?:: (?P<why>[^\[\]()]+))?", re.IGNORECASE)
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"})


class WrongBody(Exception):
    """The received body is not the file; `digest`: of that body, to recognise it when it repeats."""

    def __init__(self, what: str, digest: str = "") -> None:
        super().__init__(what)
        self.digest = digest


class Cancelled(Exception):
    """The file is no longer needed."""


@dataclass(frozen=True)
class _Verdict:
    what: str
    again: bool = True
    wait_s: float = 0.0  # the minimum that the server requests
    remedy: str = "check that the server is up and reachable from here, then run the command again: it resumes"
    missing: bool = False


@dataclass(frozen=True)
class Fetcher:
    """The files in the folder `url`. Holds no connection: it may be pickled and used in any process and thread."""

    url: str
    remote: Remote

    def fetch(
        self,
        name: str,
        into: Path,
        *,
        most_bytes: int,
        check: Callable[[Path], str] = lambda _: "",
        may_miss: bool = False,
        cancelled: threading.Event | None = None,
    ) -> bool:
        """Write the file to `into`, overwriting it in place; False if it `may_miss` and is not there.

        `check(path)` returns what is wrong with the file, "" if nothing. Raises RemoteError; DataError for a full disk;
        Cancelled soon after `cancelled` is set.
        """
        url, begun, seen = below(self.url, name), time.monotonic(), set[str]()
        stop = cancelled or threading.Event()
        for tries in itertools.count(1):
            if stop.is_set():
                raise Cancelled
            left = self.remote.deadline_s - (time.monotonic() - begun)
            try:
                self._transfer(url, into, most_bytes=most_bytes, timeout_s=left, cancelled=stop)
                _accept(into, check)
                return True
            except Cancelled:
                raise
            except Exception as error:
                verdict = _judge(error, into, most_bytes)
                if isinstance(error, WrongBody) and error.digest:
                    verdict = _twice(verdict) if error.digest in seen else verdict
                    seen.add(error.digest)
            if verdict.missing and may_miss:
                return False
            wait_s = verdict.wait_s + random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)))
            took_s = time.monotonic() - begun
            if not verdict.again or tries >= self.remote.tries or took_s + wait_s >= self.remote.deadline_s:
                count = "1 try" if tries == 1 else f"{tries} tries"
                raise RemoteError(
                    f"{name} cannot be fetched from {url}: {count} in {took_s:.1f} s, the last: {verdict.what}",
                    remedy=verdict.remedy,
                ) from None  # the cause's own words may hold a signed URL
            if wait_s > ANNOUNCE_AFTER_S:
                _log.info("%s: %s; try %d in %.0f s", name, verdict.what, tries + 1, wait_s, extra=EVERY_RANK)
            if stop.wait(wait_s):
                raise Cancelled
        raise AssertionError("unreachable")

    def _transfer(self, url: str, into: Path, *, most_bytes: int, timeout_s: float, cancelled: threading.Event) -> None:
        from fsspec.asyn import sync

        files = _file_system(url.partition("://")[0], self.remote)
        path = files._strip_protocol(url)
        if not files.async_impl:
            _copy(path, into, most_bytes=most_bytes, cancelled=cancelled)
            return
        watch = _watch(most_bytes, cancelled)
        sync(files.loop, files._get_file, path, str(into), callback=watch, timeout=max(timeout_s, 0.001))


def matches(size: int, sha256: str) -> Callable[[Path], str]:
    """A check for `fetch`: the file has this size and this SHA-256."""

    def check(path: Path) -> str:
        found = path.stat().st_size
        if found != size:
            return f"it came with {found:,} bytes, the manifest says {size:,}"
        return "" if sha256_of(path, "shard") == sha256 else "its SHA-256 is not the manifest's"

    return check


def _accept(path: Path, check: Callable[[Path], str]) -> None:
    if problem := check(path):
        raise WrongBody(problem, sha256_of(path, "shard"))


def _copy(path: str, into: Path, *, most_bytes: int, cancelled: threading.Event) -> None:
    watch = _watch(most_bytes, cancelled)
    with open_checked(Path(path), "shard") as source, into.open("wb") as target:  # the scheme is file://
        while chunk := source.read(1 << 20):
            watch.relative_update(len(chunk))
            target.write(chunk)


def _watch(most_bytes: int, cancelled: threading.Event) -> Any:
    """Counts the bytes received: aborts an endless body, or one that is no longer needed."""
    from fsspec.callbacks import Callback

    class Watch(Callback):
        got = 0

        def relative_update(self, inc: int = 1) -> None:
            self.got += inc
            if self.got > most_bytes:
                raise WrongBody(f"more than the {most_bytes:,} bytes that it should have", f"over {most_bytes}")
            if cancelled.is_set():
                raise Cancelled

    return Watch()


_file_systems: dict[tuple[Any, ...], Any] = {}  # kept for good: closing one that a parent process made is not safe
_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def _file_system(scheme: str, remote: Remote) -> Any:
    """fsspec's, made in this process."""
    scheme = {"https": "http"}.get(scheme, scheme)
    key = (os.getpid(), scheme, remote)
    with _lock:
        if key not in _file_systems:
            _file_systems[key] = _make_file_system(scheme, remote)
        return _file_systems[key]


def _make_file_system(scheme: str, remote: Remote) -> Any:
    import fsspec

    plain: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "http":
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=remote.connect_timeout_s, sock_read=remote.stall_timeout_s
        )
        headers = {"Accept-Encoding": "identity"}  # a body that was compressed on the way has another length
        client = {"timeout": timeout, "headers": headers, "trust_env": True}  # proxies, ~/.netrc
        return fsspec.filesystem("http", encoded=True, client_kwargs=client, **plain)
    if scheme == "s3":
        try:
            config = {
                "connect_timeout": remote.connect_timeout_s,
                "read_timeout": remote.stall_timeout_s,
                "retries": {"total_max_attempts": 1},  # ours are counted, jittered and bounded by one deadline
            }
            files = fsspec.filesystem("s3", config_kwargs=config, **plain)
        except ImportError as error:
            raise RemoteError(
                "s3:// needs the package s3fs, which is not installed", remedy="pip install s3fs"
            ) from error
        files.retries = 1
        return files
    return fsspec.filesystem(scheme, **plain)


def _judge(error: BaseException, into: Path, needed: int) -> _Verdict:
    """What happened, and whether to try again. Raises `error` where it is a fault of ours."""
    if isinstance(error, RemoteError):
        raise error
    if isinstance(error, WrongBody):
        return _Verdict(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(into.parent).free
        raise DataError(
            f"{into.parent}: no room for a file of {needed:,} bytes ({os.strerror(error.errno)}; {free:,} free)",
            remedy="lower data.cache.limit_gib, or choose another data.cache.dir",
        ) from None
    name, status = type(error).__name__, _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        remedy = "check the URL: is it the folder with manifest.json?"
        return _Verdict("it is not there (404)", again=False, remedy=remedy, missing=True)
    if isinstance(error, PermissionError) or status in (401, 403) or name in _NO_CREDENTIALS:
        what = f"access is denied ({status or name})"
        return _Verdict(what, again=False, remedy=CREDENTIALS)
    if status is not None:
        again = status in _AGAIN or status >= 500
        return _Verdict(f"the server answered {status}", again=again, wait_s=_retry_after(error))
    if found := _CERTIFICATE.search(str(error).replace("CERTIFICATE_VERIFY_FAILED", "")):  # botocore keeps words alone
        why = (found["why"] or "no reason is given").strip()
        return _Verdict(f"the server's certificate is not trusted ({why})", again=False, remedy=CERTIFICATES)
    if isinstance(error, TimeoutError):  # fsspec's, asyncio's and aiohttp's all are
        return _Verdict(f"the connection stalled or could not be made in time ({name})")
    if name in ("InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError"):
        return _Verdict(redacted(f"{name}: {error}"), again=False, remedy="check the URL")
    theirs = type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore")
    if theirs or isinstance(error, OSError | EOFError):
        return _Verdict(redacted(f"{name}: {error}"[:300]))
    raise error


def _twice(verdict: _Verdict) -> _Verdict:
    remedy = "the file there is not the one that was built: copy the set there again"
    return _Verdict(f"{verdict.what}, twice the same", again=False, remedy=remedy)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind `error`; s3fs keeps botocore's answer as the cause of the errors it raises."""
    for one in (error, error.__cause__, error.__context__):
        status = getattr(one, "status", None)
        if isinstance(status, int) and status:
            return status
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks us to wait; 0 if it does not."""
    text = str((getattr(error, "headers", None) or {}).get("Retry-After", "")).strip()
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(Exception):  # the parser raises various errors for an invalid date
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
