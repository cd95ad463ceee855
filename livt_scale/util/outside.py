"""The one reader of files that somebody else may have written: what is opened is a file, and of a bounded size.

    read_checked(folder / "manifest.json", "manifest")      its bytes
    read_text(path, "recipe")                               text in UTF-8
    read_json(path, "record")                               plain values
    with open_checked(path, "shard") as file: …             for what is mapped, or read piece by piece

A name can belong to a named pipe, which blocks for ever, or be a link to /dev/zero, which never ends. So a file is
opened without blocking and refused unless it is a regular one of at most MAX_BYTES of its kind. Everything is raised
as an OSError (what open(2) raises, or RefusedFile) or, for contents, as a ValueError that fits on one line, and the
caller makes its own error of it. Parsers that take files by name are called while `open_checked` holds the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from livt_scale.util.errors import UsageError
from livt_scale.util.text import escaped

if TYPE_CHECKING:
    from pydantic import ValidationError

MIB = 2**20
ANY = 2**63  # mapped, or read piece by piece: its size costs nothing

Kind = Literal[
    "recipe",
    "shard spec",
    "study",
    "profile",
    "manifest",
    "quarantine",
    "index",
    "keys",
    "shard",
    "image",
    "list",
    "annotations",
    "class names",
    "counts",
    "IDX file",
    "checkpoint manifest",
    "checkpoint index",
    "checkpoint file",
    "weights",
    "description of weights",
    "logits",
    "status",
    "record",
    "lines",
    "note",
    "log",
]
MAX_BYTES: dict[Kind, int] = {
    "recipe": MIB,  # a resolved one has 8 KB
    "shard spec": MIB,
    "study": MIB,
    "profile": MIB,  # of a cluster or a device
    "manifest": 256 * MIB,  # a million shards
    "quarantine": 256 * MIB,
    "index": ANY,
    "keys": ANY,
    "shard": ANY,
    "image": 512 * MIB,  # a sample is read in one piece; 67 million pixels that no codec could shrink have 200 MB
    "list": 2048 * MIB,  # of ImageNet-21k: 700 MB
    "annotations": 1024 * MIB,  # of iNaturalist 2021: 400 MB, 30 million values
    "class names": 64 * MIB,
    "counts": 64 * MIB,
    "IDX file": 2048 * MIB,  # of EMNIST, the largest known: 640 MB
    "checkpoint manifest": 64 * MIB,
    "checkpoint index": 192
    * MIB,  # of a ViT-H with its average on 512 ranks: 118 MiB, 136 bytes for each of 905,694 pieces
    "checkpoint file": ANY,
    "weights": ANY,
    "description of weights": 256 * MIB,  # an export's config.json names its classes
    "logits": ANY,
    "status": MIB,
    "record": 256 * MIB,  # eval.json has values of each class; JSON that a run, a study or a chain keeps
    "lines": 256 * MIB,  # a metrics.jsonl of a million lines
    "note": 64 * 2**10,  # a line or two: a lock's holder, a mark, the reason of a failure
    "log": ANY,
}
MAX_VALUES = 10_000_000  # in one JSON file: at 100 bytes each, a gigabyte
MAX_DEPTH = 64  # of lists and objects in each other: what writes JSON is recursive
_TOO_DEEP = f"its lists or objects are nested more than {MAX_DEPTH} deep"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(r"[0-9]{19}")


class RefusedFile(OSError):
    """Something that is not a regular file, or a file that is too large; `strerror` says which."""

    def __str__(self) -> str:
        return f"{escaped(self.filename)}: {self.strerror}"


def real_path(path: Path | str) -> Path:
    """`path`, absolute and without links. Unlike Path.resolve, a link to itself is left as it is and raises nothing."""
    return Path(os.path.realpath(path))


def in_home(path: Path | str) -> Path:
    """`path` with ~ and ~user replaced by the home folder. Raises UsageError where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user, or neither HOME nor a user's entry, as in some containers
        raise UsageError(
            f"{escaped(path)}: the home folder that ~ stands for is not known", remedy="write the path in full"
        ) from error


def open_checked(path: Path, kind: Kind, *, max_bytes: int | None = None) -> BufferedReader:
    """Open `path` for reading. Raises OSError, RefusedFile where it is not a file of at most MAX_BYTES of its kind."""
    return os.fdopen(open_fd(path, kind, max_bytes=max_bytes), "rb")


def open_fd(path: Path | str, kind: Kind, *, max_bytes: int | None = None) -> int:
    """As `open_checked`, but a file descriptor, which the caller closes."""
    limit = MAX_BYTES[kind] if max_bytes is None else max_bytes
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise RefusedFile(errno.EINVAL, "this cannot be the name of a file", str(path)) from error
    try:
        size = check_regular(handle, path)
        if size > limit:
            raise _too_large(path, kind, limit, size)
    except BaseException:
        os.close(handle)
        raise
    return handle


def check_regular(handle: int, path: Path | str) -> int:
    """The bytes of the open file `handle`. Raises RefusedFile where `path` names something else than a file."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise RefusedFile(errno.EINVAL, f"it is {_what(found.st_mode)}, not a regular file", str(path))
    return found.st_size


def read_checked(path: Path, kind: Kind, *, max_bytes: int | None = None) -> bytes:
    """The contents of `path`. Raises as `open_checked`, also where the file grows beyond the bound meanwhile."""
    limit = MAX_BYTES[kind] if max_bytes is None else max_bytes
    chunks, num_bytes = [], 0
    with open_checked(path, kind, max_bytes=max_bytes) as file:
        while chunk := file.read(MIB):
            chunks.append(chunk)
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise _too_large(path, kind, limit, num_bytes)
    return b"".join(chunks)


def sha256_of(path: Path, kind: Kind = "checkpoint file") -> str:
    """In hexadecimal digits. Raises as `open_checked`."""
    with open_checked(path, kind) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, kind: Kind) -> str:
    """The contents as text. Raises as `read_checked`, and ValueError where they are not UTF-8."""
    return decoded(read_checked(path, kind))


def read_note(path: Path) -> str:
    """One or two lines that another process of livt wrote for people. Raises as `read_checked`."""
    return read_checked(path, "note").decode(errors="replace").strip()


def read_json(path: Path, kind: Kind) -> Any:
    """The value in a JSON file. Raises as `read_checked`, and ValueError as `parse_json`."""
    return parse_json(read_checked(path, kind), max_values=MAX_BYTES[kind] if kind == "annotations" else MAX_VALUES)


def parse_json(raw: bytes, *, max_values: int = MAX_VALUES) -> Any:
    """The value that `raw` spells.

    ValueError: not JSON in UTF-8, too deep, too many values, half a character, an integer of more than 64 bits.
    """
    text = decoded(raw)
    if text.count(",") + text.count("[") + text.count("{") > max_values:
        raise ValueError(f"it has more than {max_values:,} values")
    try:
        # A call for each integer takes longer than all the rest, so only where one may be too large.
        value = json.loads(text, parse_int=_int64 if _LONG_NUMBER.search(text) else None)
        _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except UnicodeEncodeError:
        raise ValueError("it contains half a character (a lone surrogate)") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return value


def _int64(digits: str) -> int:
    # Python refuses to read thousands of digits with an error of its own.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError("it contains an integer of more than 64 bits")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def decoded(raw: bytes) -> str:
    """`raw` as text; ValueError where it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 (byte {error.start})") from None


def first_mistake(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, as one line: "shards.0.bytes: Input should be …"."""
    found = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, found["loc"]))
    return f"{where}: {found['msg']}" if where else found["msg"]


def _too_large(path: Path | str, kind: Kind, limit: int, size: int) -> RefusedFile:
    why = f"it has {size:,} bytes, more than a file of this kind ({kind}) may have: {limit:,}"
    return RefusedFile(errno.EFBIG, why, str(path))


def _what(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
