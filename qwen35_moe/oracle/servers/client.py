"""HTTP to the one address that the user gave, by the standard library.

It follows no redirect, uses no proxy, checks TLS certificates, and reads an answer up to a limit. A request ends after
`timeout` seconds, even if the server keeps sending. Failed requests are repeated a few times, refused ones are not.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from ...errors import Qwen35Error
from ...untrusted import parse_json
from .answer import API_KEY, clean, secret

LARGEST_ANSWER = 1 << 28  # bytes of an answer: all of a vocabulary of 250,000 for 100 tokens
RETRIES, PAUSE = 2, 0.5  # further attempts, and seconds before the first of them; twice as long before the next
MOST_PAUSE = 30.0  # seconds, however long a server wants us to wait ("Retry-After")
RETRIED_STATUS = (429, 500, 502, 503, 504)


def _parsed(data: bytes, where: str) -> Any:
    try:
        return parse_json(data, where)
    except Qwen35Error as error:
        raise error.but(found=clean(error.found)) from None


class Refused(Qwen35Error):
    """The server understood the request, and refused it."""


class Server:
    """One address. `call` gives the parsed JSON of an answer with status 200."""

    def __init__(self, url: str, timeout: float = 120.0, retries: int = RETRIES, largest: int = LARGEST_ANSWER):
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise Qwen35Error("not a URL", where=clean(url), found=error) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise Qwen35Error("not a server's URL", where=clean(url), expected="http://HOST:PORT, or https",
                              do="qwen35-moe probe CHECKPOINT http://127.0.0.1:30000")  # fmt: skip
        if parts.username or parts.password:
            do = f"set the environment variable {API_KEY}"
            raise Qwen35Error("a key in the URL would be shown in logs", where="URL", do=do)
        self.host, self.port, self.tls = parts.hostname, port, parts.scheme == "https"
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.base}"
        self.timeout, self.retries, self.largest = timeout, retries, largest

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST of a JSON body, or GET without one. Errors: down, slow, refused, too large, not JSON."""
        where = f"{self.url}{path}"
        for attempt in range(self.retries + 1):
            pause = min(PAUSE * 2**attempt, MOST_PAUSE)
            try:
                status, data, later = self._once(path, body)
            except TimeoutError as error:
                expected, do = f"an answer within {self.timeout:g} s", "raise --timeout, or ask less"
                failed = Qwen35Error("the server is slow", where=where, found=clean(error), expected=expected, do=do)
            except (OSError, http.client.HTTPException) as error:
                found, do = clean(str(error) or type(error).__name__), "check the URL, and that the server runs"
                failed = Qwen35Error("the server cannot be reached", where=where, found=found, do=do)
            else:
                if status == 200:
                    return _parsed(data, where)
                failed = self._refused(where, status, data)
                if status not in RETRIED_STATUS:
                    raise failed
                pause = max(pause, min(later, MOST_PAUSE))
            if attempt < self.retries:
                time.sleep(pause)
        raise failed

    def _refused(self, where: str, status: int, data: bytes) -> Refused:
        do = {401: f"set {API_KEY}", 403: f"set {API_KEY}"}.get(status, "")
        if 300 <= status < 400:
            do = "redirects are not followed: give the address that it leads to"
        said = clean(data[:4096].decode("utf-8", "replace"))
        return Refused("the server refused", where=where, found=f"{status} {said}", do=do)

    def _once(self, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes, float]:
        """Status, body, and seconds that the server wants us to wait."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        if self.tls:
            safe = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout, context=safe)
        data = None if body is None else json.dumps(body).encode()
        late, key = threading.Event(), secret()
        headers = {"Accept": "application/json", "Connection": "close", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}

        def end() -> None:
            late.set()
            if connection.sock is not None:
                with suppress(OSError):  # closed already
                    connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, end)
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET" if data is None else "POST", self.base + path, data, headers)
            response = connection.getresponse()
            found = response.read(self.largest + 1)
            if late.is_set():
                raise TimeoutError("cut off")
            if response.length and len(found) <= self.largest:
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise TimeoutError(str(error)) from error
            raise
        finally:
            timer.cancel()
            connection.close()
        if len(found) > self.largest:
            expected, do = f"at most {self.largest} bytes", "ask for fewer tokens, or --top less"
            raise Qwen35Error("the answer is too large", where=f"{self.url}{path}", expected=expected, do=do)
        wait = response.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isascii() and wait.isdigit() else 0.0
        return response.status, found, seconds
