"""A set of shards at a URL whose server answers anything: statuses, headers, lengths, encodings, bodies, silence."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz.examples import few, many
from tests.fuzz.limited import Outcome, example, livt
from tests.fuzz.mutations import EVIL, byte_changes, change_bytes, chosen

SILENT_S = 1.0
FILES = ("manifest.json", "index.npy", "keys.bin", "quarantine.json", "set-000000.tar")
STATUSES = [
    "200 OK", "200", "204 No Content", "206 Partial Content", "301 Moved", "302 Found", "304 Not Modified", "308 x",
    "400 x", "401 x",
    "403 x", "404 x", "416 x", "429 x", "500 x", "503 x", "999 x", "-1 x", "200 " + "x" * 10_000, "",
    EVIL.replace("\n", " "),
]  # fmt: skip
HEADERS = [
    "Location: file:///etc/passwd", "Location: /", "Location: http://[", "Location: " + "a" * 20_000,
    "Retry-After: -1",
    "Retry-After: Fri, 99 Foo 99999 99:99:99 GMT", "Retry-After: nan", "Retry-After: inf", "Retry-After: 0",
    "Content-Encoding: gzip",
    "Content-Encoding: br", "Content-Encoding: deflate", "Content-Type: text/html", "Transfer-Encoding: chunked",
    "Content-Length: -5", "Content-Length: " + "9" * 30, "Content-Length: 1", "Content-Range: bytes 5-1/0",
    "Set-Cookie: a=\x07b",
    "X: " + "y" * 100_000, "no colon", ": empty", "ETag: \x1b[2J", "Content-Length: 99999999999",
]  # fmt: skip
BODIES: dict[str, Callable[[bytes], bytes]] = {
    "right": lambda body: body,
    "empty": lambda body: b"",
    "cut": lambda body: body[: len(body) // 2],
    "more": lambda body: body + b"x" * 2**20,
    "page": lambda body: b"<html>\x1b[2J login</html>",
    "zipped": lambda body: gzip.compress(body),
    "bomb": lambda body: gzip.compress(bytes(2**26)),
    "chunks": lambda body: b"ffffffffffffffff\r\n" + body,
    "brackets": lambda body: b"[" * 10**6,
    "surrogate": lambda body: b'{"format": "\\ud800"}',
}
answers = st.fixed_dictionaries(
    {
        "status": chosen([*STATUSES, *["200 OK"] * 20]),
        "headers": st.lists(chosen(HEADERS), max_size=3),
        "body": chosen([*BODIES]),
        "bytes": st.one_of(st.just([]), st.just([]), byte_changes),
        "length": st.booleans(),  # a Content-Length that is right
        "raw": chosen([None, None, None, b"", b"\0" * 100, b"HTTP/9.9 200\r\n\r\n", b"SSH-2.0-x\r\n", "silence"]),
    }
)
cases = st.fixed_dictionaries(
    {
        "answers": st.dictionaries(chosen(FILES), answers, min_size=1, max_size=2),
        "command": chosen(["check", "check", "trace"]),
    }
)
RECIPE = """\
name: t
data:
  {{train: "http://127.0.0.1:{port}/set", mean: [0.5], std: [0.5], workers: 0,
  remote: {{tries: 2, connect_timeout_s: 0.5, stall_timeout_s: 0.3, deadline_s: 2}}}}
model: {{size: vit_micro, image_px: 28, channels: 1}}
stages: {{finetune: {{init: scratch, epochs: 1, warmup_epochs: 0, global_batch: 2, micro_batch: 2}}}}
"""


class Server:
    """Answers each request as the case says, one connection for each."""

    def __init__(self, folder: Path, case: dict) -> None:
        self._folder, self._answers = folder, case["answers"]
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._over = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._socket.close()

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(SILENT_S)
                asked = connection.recv(2**16).split(b" ")
                name = asked[1].decode(errors="replace").rpartition("/")[2] if len(asked) > 1 else ""
                told = self.bytes_for(name)
                if told is None:
                    self._over.wait(SILENT_S)
                else:
                    connection.sendall(told)
            except OSError:
                return

    def bytes_for(self, name: str) -> bytes | None:
        path = self._folder / name
        body = path.read_bytes() if path.is_file() else b""
        answer = self._answers.get(name)
        if answer is None:
            status = "200 OK" if path.is_file() else "404 Not Found"
            return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        if answer["raw"] is not None:
            return None if answer["raw"] == "silence" else answer["raw"]
        body = change_bytes(BODIES[answer["body"]](body), answer["bytes"])
        lines = [f"HTTP/1.1 {answer['status']}", *answer["headers"], "Connection: close"]
        lines += [f"Content-Length: {len(body)}"] if answer["length"] else []
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def run_case(base: Path, shards: Path, case: dict) -> Outcome:
    with example(base) as folder, Server(shards, case) as server:
        (folder / "tiny.yaml").write_text(RECIPE.format(port=server.port))
        words = ("recipe", "check", "tiny.yaml", "--data")
        if case["command"] == "trace":
            words = ("shards", "trace", "tiny.yaml", "--world-size", "1", "--rank", "0", "--epoch", "0")
        return livt(*words, cwd=folder)


def check(base: Path, shards: Path, case: dict) -> None:
    run_case(base, shards, case)


@pytest.mark.parametrize("command", ["check", "trace"])
def test_each_command_succeeds_when_the_server_answers_correctly(base: Path, shards: Path, command: str) -> None:
    assert run_case(base, shards, {"answers": {}, "command": command}).code == 0


test_servers = few(cases, check)
test_many_servers = many(cases, check)
