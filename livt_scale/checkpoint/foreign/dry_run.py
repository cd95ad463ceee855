"""Analyses a pickle without executing it: the names it imports, the stored pieces it reads, the memory it takes.

    found = dry_run(data, pieces={"0": 4096}, allowed=lambda name: name == "collections.OrderedDict" or …)
    found.end                       # where the next pickle of the file begins

A pickle is a program for a stack machine. This is that machine with numbers in place of objects: each has a weight (how
many objects a walk through it meets) and, as far as sizes depend on it, a value. Refused with a ValueError before
anything is made: a name that is not allowed; a tensor larger than its stored piece, and tensors that show the pieces
many times over; a piece larger than what is stored for it; an object that contains another so often that a walk through
it (a hash, a comparison) would not end; a place in the memo beyond the number of objects, for which the C unpickler
would make room; `bytearray(2**40)` and the like.

Source: the opcodes of Lib/pickletools.py, protocols 0 to 5; torch/_utils.py for the arguments of the rebuilders.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_OPS = 5_000_000  # 10 s; a ViT-H with its optimizer takes 200,000
MAX_WEIGHT = 20_000_000
MAX_PARTS = 16  # of a tuple that could be arguments
MAX_SHOWN = 4  # how often tensors may refer to one stored byte: tied weights, views
SLACK_BYTES = 2**20

_ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "Untyped": 1,
}  # fmt: skip
_DTYPE_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2}
_DTYPE_BYTES |= {"bfloat16": 2, "int16": 2, "uint16": 2, "complex64": 8, "complex128": 16}  # any other: 1
# What DCP writes for a piece of a tensor: three objects whose state is a dict of a few names, each with a number, None,
# a short text, an earlier object or a torch.Size. A checkpoint of 512 ranks has a million of them: each is one step
# here. A group is an object that is memoized; these are small, and what can be hashed of them holds numbers alone.
_INT = rb"(?:K.|M..|J.{4}|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_GET = rb"(?:h.|j.{4})"
_TEXT = rb"\x8c(?:%b)(\x94)" % b"|".join(re.escape(bytes([n])) + b".{%d}" % n for n in range(1, 32))
_TUPLE = rb"(?:\)|%b\x85(\x94)|%b{2}\x86(\x94)|%b{3}\x87(\x94)|\(%b{4,8}t(\x94))" % (_INT, _INT, _INT, _INT)
_FIELD = rb"(?:%b(?:N|%b|%b%b\x85(\x94)R(\x94)|%b|%b))?" % (_GET, _INT, _GET, _TUPLE, _GET, _TEXT)
RECORD = re.compile(rb"%b\)\x81(\x94)}(\x94)\(%bub" % (_GET, _FIELD * 4), re.DOTALL)
_REBUILDERS = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))


@dataclass(frozen=True)
class Name:
    """A function or class that the pickle imports."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A stored piece: what torch calls a storage."""

    num_bytes: int
    item_bytes: int


@dataclass(slots=True)
class _Made:
    """An object made of others: a tuple, a list, what a call returns."""

    weight: int
    parts: tuple[Any, ...] | None = None  # of a short tuple, such as the arguments of a call


@dataclass
class DryRun:
    """One pickle, as far as it was run. On its stack are an int, a str, a Name, a Storage, or None for other values."""

    data: bytes
    end: int  # where the next opcode is
    pieces: Mapping[str, int] | None  # bytes stored for each key; None: those behind the pickle in the same file
    allowed: Callable[[str], bool]
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)  # bytes of each piece that is read
    shown: int = 0  # bytes of all tensors together
    num_ops: int = 0

    # --- reading arguments ---

    def take(self, count: int) -> bytes:
        begin, self.end = self.end, self.end + count
        if self.end > len(self.data):
            raise ValueError("its pickle is cut")
        return self.data[begin : self.end]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def counted(self, form: str) -> bytes:
        return self.take(self.number(form))

    def line(self) -> bytes:
        found = self.data.find(b"\n", self.end)
        if found < 0:
            raise ValueError("its pickle is cut")
        text = self.take(found - self.end)
        self.end += 1
        return text

    # --- the stack ---

    def push(self, value: Any = None) -> None:
        self.stack.append(value)

    def skip(self, _value: bytes) -> None:
        """A value that no size depends on."""
        self.stack.append(None)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its pickle takes from an empty stack")
        return self.stack.pop()

    def above_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("its pickle has no mark where one belongs")
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def gather(self, values: Sequence[Any]) -> None:
        """A new tuple, list or dict of `values`."""
        self.stack.append(_Made(_weight_of(values), tuple(values) if len(values) <= MAX_PARTS else None))

    def fill(self, values: Sequence[Any]) -> None:
        """Add `values` to the list, dict or set below them."""
        target = self.pop()
        if not isinstance(target, _Made):
            raise ValueError("its pickle adds to something that is not a list, dict or set")
        target.weight = _weight_of(values, target.weight)
        target.parts = None
        self.stack.append(target)

    def put(self, place: int) -> None:
        if not 0 <= place <= self.num_ops:
            raise ValueError(f"its pickle keeps an object at place {place:,} of its memo, and has made fewer")
        value = self.pop()
        self.stack.append(value)
        self.memo[place] = value

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError(f"its pickle asks for place {place:,} of its memo, which is empty")
        self.stack.append(self.memo[place])

    def skip_record(self, record: re.Match[bytes]) -> None:
        """An object with a few plain values, which weighs as much as one of them."""
        groups = record.groups()
        for _ in range(len(groups) - groups.count(None)):
            self.memo[len(self.memo)] = None
            self.num_ops += 1
        self.stack.append(None)
        self.end = record.end()

    # --- what has consequences ---

    def ask(self, name: str) -> None:
        module, _, rest = name.partition(".")
        name = f"builtins.{rest}" if module == "__builtin__" else name  # as Python 2 called it, and protocol 2 does
        if not self.allowed(name):
            raise ValueError(f"it asks for {name[:200]}")
        self.stack.append(Name(name))

    def read_piece(self) -> None:
        """torch's persistent id: ("storage", type, key, device, number of items[, view])."""
        parts = _parts(self.pop())
        known = len(parts) >= 5 and isinstance(parts[1], Name) and isinstance(parts[2], str)
        if not known or parts[0] != "storage" or not _is_count(parts[4]):
            raise ValueError("it asks for a persistent object that is not a stored piece")
        item_bytes = _ITEM_BYTES.get(parts[1].name.rpartition(".")[2].removesuffix("Storage"), 0)
        num_bytes = parts[4] * item_bytes
        if not item_bytes:
            raise ValueError(f"it stores items of the unknown type {parts[1].name[:80]}")
        if self.pieces is not None and num_bytes > self.pieces.get(parts[2], -1):
            stored = self.pieces.get(parts[2], 0)
            raise ValueError(f"piece {parts[2][:80]} has {stored:,} bytes, the pickle asks for {num_bytes:,}")
        self.stored[parts[2]] = max(num_bytes, self.stored.get(parts[2], 0))
        self.stack.append(Storage(num_bytes, item_bytes))

    def call(self) -> None:
        arguments, called = self.pop(), self.pop()
        name, parts = called.name if isinstance(called, Name) else "", _parts(arguments)
        made: Any = _Made(_weight_of([arguments]))
        if name == "torch._tensor._rebuild_from_type_v2" and len(parts) > 2 and isinstance(parts[0], Name):
            name, parts = parts[0].name, _parts(parts[2])
        if name in _REBUILDERS:
            self.show(name, parts)
        elif name == "torch.Size" and len(parts) == 1:
            made = parts[0]
        elif name == "_codecs.encode" and (len(parts) != 2 or parts[1] != "latin1"):  # some codecs take n^2
            raise ValueError("it calls _codecs.encode, and not for latin1")
        self.stack.append(made)

    def show(self, name: str, parts: Sequence[Any]) -> None:
        """_rebuild_tensor…(piece, offset, size, stride, …): no larger than its piece."""
        piece, size = (parts[0], parts[2]) if len(parts) >= 4 else (None, None)
        sides = list(_parts(size))
        is_size = isinstance(size, _Made) and size.parts is not None
        if not isinstance(piece, Storage) or not is_size or not all(map(_is_count, sides)):
            raise ValueError("it makes a tensor of something that is not a stored piece")
        item_bytes = piece.item_bytes
        if name.endswith("_v3") and len(parts) > 6 and isinstance(parts[6], Name):
            item_bytes = _DTYPE_BYTES.get(parts[6].name.removeprefix("torch."), 1)
        num_bytes = math.prod(sides) * item_bytes
        if num_bytes > piece.num_bytes:
            raise ValueError(f"a tensor of {sides} is larger than what is stored for it ({piece.num_bytes:,} bytes)")
        self.shown += num_bytes
        if self.shown > MAX_SHOWN * sum(self.stored.values()) + SLACK_BYTES:
            raise ValueError(f"its tensors show the stored bytes more than {MAX_SHOWN} times over")


def dry_run(
    data: bytes, *, begin: int = 0, pieces: Mapping[str, int] | None = None, allowed: Callable[[str], bool]
) -> DryRun:
    """Dry-run the pickle at `begin` of `data`. Raises ValueError with the reason if it is refused."""
    machine = DryRun(data, begin, pieces, allowed)
    for _ in range(MAX_OPS):
        if record := RECORD.match(data, machine.end):
            machine.skip_record(record)
            continue
        opcode = machine.byte()
        machine.num_ops += 1
        if opcode == STOP:
            machine.pop()
            return machine
        act = _ACTS[opcode]
        if act is None:
            raise ValueError(f"its pickle has the opcode {bytes([opcode])!r}, which no file of tensors needs")
        act(machine)
    raise ValueError(f"its pickle has more than {MAX_OPS:,} steps")


def _weight_of(values: Sequence[Any], start: int = 1) -> int:
    weight = start
    for value in values:
        weight += value.weight if isinstance(value, _Made) else 1
    if weight > MAX_WEIGHT:
        raise ValueError("its pickle makes an object that contains another too often to be walked through")
    return weight


def _parts(value: Any) -> tuple[Any, ...]:
    return (value.parts or ()) if isinstance(value, _Made) else ()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _line_name(m: DryRun) -> None:
    module = m.line()
    m.ask(_text(module + b"." + m.line()))


def _stack_name(m: DryRun) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("it asks for a name that is not text")
    m.ask(f"{module}.{name}")


def _line_number(m: DryRun) -> None:
    text = m.line().rstrip(b"L")
    m.push(None if text in (b"00", b"01") else int(text))  # false and true; Python limits the digits


def _build(m: DryRun) -> None:
    state, target = m.pop(), m.pop()
    if isinstance(target, _Made):
        target.weight = _weight_of([state], target.weight)
    m.stack.append(target)


def _mark(m: DryRun) -> None:
    m.marks.append(len(m.stack))


def _new(m: DryRun) -> None:
    arguments, _ = m.pop(), m.pop()
    m.push(_Made(_weight_of([arguments])))


def _duplicate(m: DryRun) -> None:
    value = m.pop()
    m.stack += [value, value]


_OPCODES: dict[bytes, Callable[[DryRun], Any]] = {
    # plain values
    b"N": lambda m: m.push(),
    b"\x88": lambda m: m.push(),
    b"\x89": lambda m: m.push(),
    b"I": _line_number,
    b"L": _line_number,
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.byte()),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.byte()), "little", signed=True)),
    b"\x8b": lambda m: m.push(int.from_bytes(m.counted("<I"), "little", signed=True)),
    b"F": lambda m: m.skip(m.line()),
    b"G": lambda m: m.skip(m.take(8)),
    b"S": lambda m: m.skip(m.line()),
    b"T": lambda m: m.push(m.counted("<I").decode("latin1")),  # text of Python 2
    b"U": lambda m: m.push(m.take(m.byte()).decode("latin1")),
    b"V": lambda m: m.push(_text(m.line())),
    b"X": lambda m: m.push(_text(m.counted("<I"))),
    b"\x8c": lambda m: m.push(_text(m.take(m.byte()))),
    b"\x8d": lambda m: m.push(_text(m.counted("<Q"))),
    b"B": lambda m: m.skip(m.counted("<I")),
    b"C": lambda m: m.skip(m.take(m.byte())),
    b"\x8e": lambda m: m.skip(m.counted("<Q")),
    # containers
    b"]": lambda m: m.gather(()),
    b"}": lambda m: m.gather(()),
    b"\x8f": lambda m: m.gather(()),
    b")": lambda m: m.gather(()),
    b"\x85": lambda m: m.gather([m.pop()]),
    b"\x86": lambda m: m.gather([m.pop(), m.pop()][::-1]),
    b"\x87": lambda m: m.gather([m.pop(), m.pop(), m.pop()][::-1]),
    b"t": lambda m: m.gather(m.above_mark()),
    b"l": lambda m: m.gather(m.above_mark()),
    b"d": lambda m: m.gather(m.above_mark()),
    b"\x91": lambda m: m.gather(m.above_mark()),
    b"a": lambda m: m.fill([m.pop()]),
    b"s": lambda m: m.fill([m.pop(), m.pop()]),
    b"e": lambda m: m.fill(m.above_mark()),
    b"u": lambda m: m.fill(m.above_mark()),
    b"\x90": lambda m: m.fill(m.above_mark()),
    # stack and memo
    b"(": _mark,
    b"0": lambda m: m.pop(),
    b"1": lambda m: m.above_mark(),
    b"2": _duplicate,
    b"g": lambda m: m.get(int(m.line())),
    b"h": lambda m: m.get(m.byte()),
    b"j": lambda m: m.get(m.number("<I")),
    b"p": lambda m: m.put(int(m.line())),
    b"q": lambda m: m.put(m.byte()),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    # names, calls, pieces
    b"c": _line_name,
    b"\x93": _stack_name,
    b"R": lambda m: m.call(),
    b"\x81": _new,
    b"b": _build,
    b"Q": lambda m: m.read_piece(),
    # frames
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
}
_ACTS = [_OPCODES.get(bytes([code])) for code in range(256)]
STOP = b"."[0]
