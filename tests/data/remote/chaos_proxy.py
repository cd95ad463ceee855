"""A TCP proxy on 127.0.0.1 before a real server, which treats connections badly at random."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nRetry-After: 0\r\nConnection: close\r\n\r\n"
KINDS = ("whole", "whole", "cut", "reset", "busy", "slow")


class ChaosProxy:
    """Each connection is, in an order drawn: whole; ended or reset after some bytes; answered 503; slow."""

    def __init__(self, port: int, *, seed: int, most_bytes: int) -> None:
        self._upstream, self._most_bytes = port, most_bytes
        self._draw, self._lock = random.Random(seed), threading.Lock()
        self._next: list[str] = []
        self.seen: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> ChaosProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._next:
                    self._next = self._draw.sample(KINDS, len(KINDS))
                kind, most = self._next.pop(), self._draw.randrange(1, self._most_bytes)
                self.seen[kind] += 1
            threading.Thread(target=self._connection, args=(client, kind, most), daemon=True).start()

    def _connection(self, client: socket.socket, kind: str, most: int) -> None:
        with client, contextlib.suppress(OSError):
            if kind == "busy":
                client.recv(65536)
                client.sendall(BUSY)
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                threading.Thread(target=_forward, args=(client, server), daemon=True).start()
                left = most if kind in ("cut", "reset") else 1 << 40
                _forward(server, client, left=left, pause_s=0.001 if kind == "slow" else 0.0)
                if kind == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _forward(source: socket.socket, target: socket.socket, *, left: int = 1 << 40, pause_s: float = 0.0) -> None:
    try:
        while left and (data := source.recv(min(left, 4096 if pause_s else 65536))):
            target.sendall(data)
            left -= len(data)
            time.sleep(pause_s)
    except OSError:
        pass
    finally:
        if left:  # the source ended by itself
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
