"""An OpenAI-compatible server on this machine that does what a test tells it, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from saferlhf.config.rollout_schema import ServerConfig


@dataclass
class Reply:
    """What the server does: wait, then answer, drip the answer, or break the connection."""

    body: Any = None  # dict: as JSON; bytes: as they are
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    drip_s: float = 0.0  # between two bytes
    hang_up: bool = False


@dataclass
class Asked:
    """One request."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    time: float


def says(text: str | None, **more: Any) -> Reply:
    """A chat answer."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return Reply({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 3}})


@dataclass
class FakeServer:
    """See the module."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    at_once: int = 0  # most requests that were open together

    def config(self, **changes: Any) -> ServerConfig:
        patience = {"timeout_s": 5.0, "retries": 2, "backoff_s": 0.001, "max_backoff_s": 0.01, "concurrency": 4}
        return ServerConfig(**{"base_url": self.url, "model": "judge", **patience, **changes})


@contextmanager
def serving(behaviour: Callable[[Asked, int], Reply]) -> Iterator[FakeServer]:
    """A server that answers each request by `behaviour(request, how many were asked before)`."""
    lock = threading.Lock()
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal open_now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, body, dict(self.headers), time.monotonic())
            with lock:
                number = len(fake.asked)
                fake.asked.append(asked)
                open_now += 1
                fake.at_once = max(fake.at_once, open_now)
            try:
                reply = behaviour(asked, number)
                time.sleep(reply.wait_s)
            finally:
                with lock:
                    open_now -= 1  # before the answer: the client may ask again as soon as it has it
            with suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
                self._reply(reply)

        do_GET = do_POST  # noqa: N815

        def _reply(self, reply: Reply) -> None:
            if reply.hang_up:
                self.connection.close()
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if not reply.drip_s:
                self.wfile.write(data)
                return
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(reply.drip_s)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a connection that was closed on purpose

    server = Server(("127.0.0.1", 0), Handler)
    fake = FakeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
