"""A patient client of an OpenAI-compatible server: many requests at once, each tried again where that can help.

| what happens | what is done |
|---|---|
| no connection, no answer in time, an answer that is no JSON | tried again, after a pause |
| status 408, 409, 425, 429 or 5xx: the server is busy or broken | the same |
| 401, 403, 404, a redirect | `UserError`: key, address or model are wrong for every request |
| any other status | this request is refused; the others go on |

Pauses double from `backoff_s` up to `max_backoff_s`, shortened at random by up to a half so that requests that failed
together do not come back together; a `Retry-After` of the server is kept to as far as `max_backoff_s`. Where several
requests in a row find no server at all, the rest of them fails at once. The key comes from the environment, goes into
one header, follows no redirect and is in no message; messages of the server are not repeated, for they may quote both
the key and harmful texts.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from saferlhf.config.rollout_schema import ServerConfig
from saferlhf.errors import UserError

Result = TypeVar("Result")

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
WRONG_FOR_ALL = {401: "refuses the key", 403: "refuses the key", 404: "knows no such address or model"}
MOST_BYTES = 16 * 1024 * 1024
LOCAL = ("localhost", "127.0.0.1", "::1")


class ServerError(Exception):
    """One request came to nothing.

    Args:
        kind: timeout | unreachable | refused | unparsable, as in `rollout/scorers.py`.
        reason: one line.
        again: whether another try could help.
        pause_s: what the server asked for before the next try.
    """

    def __init__(self, kind: str, reason: str, *, again: bool = False, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.again, self.pause_s = kind, reason, again, pause_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whoever it names."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class Traffic:
    """What went over the wire.

    Attributes:
        requests: tries, the first ones and the later ones.
        retries: later ones alone.
        prompt_tokens, completion_tokens: as the server counts them.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Client:
    """Posts JSON and gets JSON.

    Args:
        config: where the server is, and how patient to be.
        where: the config key, for messages.

    Attributes:
        traffic: counts since it was made.

    Raises:
        UserError: no model or address, or the key is not in the environment.
    """

    def __init__(self, config: ServerConfig, where: str = "judge.server") -> None:
        address = urlsplit(config.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            mend = "write it as http://localhost:8000/v1"
            raise UserError(f"'{config.base_url}' is no address of a server", f"{where}.base_url", mend)
        if not config.model:
            raise UserError("no model of the server is named", f"{where}.model", f"give it: {where}.model=NAME")
        if config.concurrency < 1 or config.retries < 0 or config.timeout_s <= 0:
            what = "concurrency and timeout_s must be above 0, retries not below"
            raise UserError(what, where, "see the comments above these keys in conf/")
        self.config, self.where = config, where
        self.traffic = Traffic()
        self._key = _key_from(config.api_key_env, where)
        # a server on this machine is not asked for through a proxy
        proxies = [urllib.request.ProxyHandler({})] if address.hostname in LOCAL else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def map(
        self, path: str, payloads: Sequence[dict[str, Any]], read: Callable[[int, dict[str, Any]], Result]
    ) -> list[Result | ServerError]:
        """Post all payloads, `concurrency` at once; results in the order of the payloads.

        Args:
            path: below `base_url`.
            payloads: bodies.
            read: (place of the payload, answer) -> result; it may raise a `ServerError`, with `again` for another try.
                Called in several threads.

        Raises:
            UserError: what is wrong for every request.
        """
        if not payloads:
            return []
        self._stopped.clear()
        lost = _InARow(limit=max(3, self.config.concurrency))

        def one(place: int) -> Result | ServerError:
            if lost.enough or self._stopped.is_set():
                return ServerError("unreachable", f"given up after {lost.limit} requests in a row found no server")
            try:
                result = self._patiently(path, payloads[place], lambda answer: read(place, answer))
            except ServerError as error:
                lost.add(error.kind == "unreachable")
                return error
            lost.add(False)
            return result

        with ThreadPoolExecutor(max_workers=min(self.config.concurrency, len(payloads))) as pool:
            futures = [pool.submit(one, place) for place in range(len(payloads))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stopped.set()  # those that pause wake up, those that wait are not begun
                for future in futures:
                    future.cancel()
                raise

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """One request, tried again where that can help.

        Raises:
            ServerError: it came to nothing.
            UserError: what is wrong for every request.
        """
        return self._patiently(path, payload, lambda answer: answer)

    # -------------------------------------------------------------------------------------------- tries
    def _patiently(self, path: str, payload: dict[str, Any], read: Callable[[dict[str, Any]], Result]) -> Result:
        for attempt in range(self.config.retries + 1):
            with self._lock:
                self.traffic.requests += 1
                self.traffic.retries += attempt > 0
            try:
                return read(self._once(path, payload))
            except ServerError as error:
                if not error.again or attempt == self.config.retries or self._stopped.is_set():
                    raise
                self._stopped.wait(self._pause(attempt, error.pause_s))
        raise AssertionError("unreachable")

    def _pause(self, attempt: int, wanted: float | None) -> float:
        most = self.config.max_backoff_s
        return max(min(self.config.backoff_s * 2.0**attempt, most) * random.uniform(0.5, 1.0), min(wanted or 0.0, most))

    def _once(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.config.base_url.rstrip('/')}/{path.lstrip('/')}"
        request = urllib.request.Request(url, json.dumps(payload).encode(), headers, method="POST")
        deadline = time.monotonic() + self.config.timeout_s
        try:
            with self._opener.open(request, timeout=self.config.timeout_s) as response:
                body = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._of_status(error) from None
        except TimeoutError:
            raise self._late() from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._late() from None
            raise ServerError("unreachable", f"no connection: {_name(error.reason)}", again=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError("unreachable", f"the connection broke: {_name(error)}", again=True) from None
        return self._json(body)

    def _late(self) -> ServerError:
        return ServerError("timeout", f"no answer in {self.config.timeout_s:g} s", again=True)

    def _of_status(self, error: urllib.error.HTTPError) -> Exception:
        status = error.code
        if status in WRONG_FOR_ALL or 300 <= status < 400:
            what = WRONG_FOR_ALL.get(status, "wants to send the request somewhere else")
            key = f"{self.where}.api_key_env" if status in (401, 403) else f"{self.where}.base_url, {self.where}.model"
            mend = "check them against the server's documentation"
            return UserError(f"the server {what} (status {status})", key, mend)
        if status in AGAIN:
            return ServerError("unreachable", f"status {status}", again=True, pause_s=_seconds(error.headers))
        return ServerError("refused", f"status {status}")

    def _json(self, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerError("unparsable", "the server's answer is no JSON object", again=True)
        usage = answer.get("usage")
        if isinstance(usage, dict):
            with self._lock:
                self.traffic.prompt_tokens += _count(usage.get("prompt_tokens"))
                self.traffic.completion_tokens += _count(usage.get("completion_tokens"))
        return answer


class _InARow:
    """Counts events that follow each other; `limit` of them are enough."""

    def __init__(self, limit: int) -> None:
        self.limit, self._count, self._lock = limit, 0, threading.Lock()

    def add(self, event: bool) -> None:
        with self._lock:
            if not self.enough:
                self._count = self._count + 1 if event else 0

    @property
    def enough(self) -> bool:
        return self._count >= self.limit


def _key_from(variable: str | None, where: str) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        mend = f"export {variable}=..., or {where}.api_key_env=null for a server that wants none"
        raise UserError(f"the environment has no {variable}", f"{where}.api_key_env", mend)
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the value of {variable} is no key", f"{where}.api_key_env", "set it again, on one line")
    return key


def _read(response: Any, deadline: float) -> bytes:
    """The body; a server that drips it out byte by byte is late all the same."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > MOST_BYTES:
            raise ServerError("unparsable", f"the server's answer is longer than {MOST_BYTES:,} bytes")
    return b"".join(parts)


def _seconds(headers: Any) -> float | None:
    """`Retry-After` in seconds; its other form, a date, is left to the doubling pauses."""
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _name(error: Any) -> str:
    return type(error).__name__ if isinstance(error, BaseException) else "unknown"
