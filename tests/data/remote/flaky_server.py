"""A real HTTP or HTTPS server on 127.0.0.1 that serves a folder and, where told, does it badly."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.data.remote.certificates import Certificate

FAULTS = ("503", "500", "429", "reset", "cut", "short", "wrong", "long", "nothing")
Plan = Callable[[str, int], str]  # (name of the file, how many requests for it came before) -> fault, "" for none


class FlakyServer:
    """`server.url`; `server.requests`: how often each file was asked for. `plan` may be changed while it runs."""

    def __init__(
        self, folder: Path, plan: Plan = lambda name, before: "", *, certificate: Certificate | None = None
    ) -> None:
        self.plan, self.requests, self.folder = plan, Counter[str](), folder
        self.headers: list[dict[str, str]] = []
        self.location = ""  # where "redirect" leads
        self.ended = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:  # the client went away
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate.certificate, certificate.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def __enter__(self) -> FlakyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        name = unquote(asked.path).lstrip("/")
        with self._lock:
            before = self.requests[name]
            self.requests[name] += 1
            self.headers.append(dict(asked.headers))
        fault = self.plan(name, before)
        if fault == "redirect":
            asked.send_response(302)
            asked.send_header("Location", self.location)
            asked.send_header("Content-Length", "0")
            asked.end_headers()
        elif fault[:3].isdigit():  # "503", "429 3600": status and Retry-After
            status, _, after = fault.partition(" ")
            asked.send_response(int(status))
            if after or status == "429":
                asked.send_header("Retry-After", after or "0")
            asked.send_header("Content-Length", "0")
            asked.end_headers()
        elif fault == "nothing":
            _reset(asked)
        elif not (self.folder / name).is_file():
            asked.send_error(404)
        else:
            self._send(asked, (self.folder / name).read_bytes(), fault)

    def _send(self, asked: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        half, told = len(body) // 2, len(body)
        if fault == "short":
            body, told = body[:half], half
        elif fault == "long":
            body, told = body * 2, 2 * told
        elif fault == "wrong":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        asked.send_response(200)
        asked.send_header("Content-Length", str(told))
        asked.end_headers()
        if fault in ("reset", "cut"):
            asked.wfile.write(body[:half])
            asked.wfile.flush()
            _reset(asked) if fault == "reset" else asked.connection.shutdown(socket.SHUT_RDWR)
            asked.close_connection = True
        elif fault == "stall":
            asked.wfile.write(body[:half])
            asked.wfile.flush()
            self.ended.wait(60)
        elif fault == "slow":  # a body that comes, but slowly
            for k in range(0, len(body), 4096):
                asked.wfile.write(body[k : k + 4096])
                asked.wfile.flush()
                time.sleep(0.002)
        elif fault == "drip":  # never silent for long, never done
            for k in range(len(body)):
                asked.wfile.write(body[k : k + 1])
                asked.wfile.flush()
                if self.ended.wait(0.05):
                    return
        else:
            asked.wfile.write(body)


def _reset(asked: BaseHTTPRequestHandler) -> None:
    asked.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    asked.connection.close()
    asked.close_connection = True
