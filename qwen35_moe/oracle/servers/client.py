"""HTTP to the one address that the user gave, by the standard library.

No redirect is followed, no proxy is used, TLS certificates are checked, an answer is read up to a limit, and a request
ends after `timeout` seconds however slowly the server drips. What failed on the way is asked again a few times; what
the server refused is not.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ...errors import Qwen35Error
from ...untrusted import parse_json
from .answer import clean

API_KEY = "QWEN35_MOE_API_KEY"
LARGEST = 1 << 28  # bytes of an answer: all of a vocabulary of 250,000 for 100 tokens
RETRIES, PAUSE = 2, 0.5  # further attempts, and seconds before the first of them; twice as long before the next
AGAIN = (429, 500, 502, 503, 504)


class Refused(Qwen35Error):
    """The server understood, and said no: `status`."""

    status = 0


class Server:
    """One address. `call` gives the parsed JSON of an answer with status 200."""

    def __init__(self, url: str, timeout: float = 120.0, retries: int = RETRIES, largest: int = LARGEST):
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise Qwen35Error("not a URL", where=clean(url), found=error) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise Qwen35Error("not a server's URL", where=clean(url), expected="http://HOST:PORT, or https")
        if parts.username or parts.password:
            do = f"set the environment variable {API_KEY}"
            raise Qwen35Error("a key in the URL would be shown in logs", where="URL", do=do)
        self.host, self.port, self.tls = parts.hostname, port, parts.scheme == "https"
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.base}"
        self.timeout, self.retries, self.largest = timeout, retries, largest

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST of a JSON body, or GET without one. Errors: down, slow, refused, too large, not JSON."""
        for attempt in range(self.retries + 1):
            try:
                status, data = self._once(path, body)
            except TimeoutError as error:
                failed = Qwen35Error(
                    "the server is slow",
                    where=f"{self.url}{path}",
                    found=clean(error),
                    expected=f"an answer within {self.timeout:g} s",
                    do="raise --timeout, or ask less",
                )
            except (OSError, http.client.HTTPException) as error:
                failed = Qwen35Error(
                    "the server cannot be reached",
                    where=f"{self.url}{path}",
                    found=clean(str(error) or type(error).__name__),
                    do="check URL and server",
                )
            else:
                if status == 200:
                    return parse_json(data, f"{self.url}{path}")
                failed = self._refused(path, status, data)
                if status not in AGAIN:
                    raise failed
            if attempt < self.retries:
                time.sleep(PAUSE * 2**attempt)
        raise failed

    def _refused(self, path: str, status: int, data: bytes) -> Refused:
        key = os.environ.get(API_KEY)
        text = data[:4096].decode("utf-8", "replace")
        said = clean(text.replace(key, "***") if key else text)
        do = {401: f"set {API_KEY}", 403: f"set {API_KEY}"}.get(status, "")
        if 300 <= status < 400:
            do = "redirects are not followed: give the address that it leads to"
        error = Refused("the server refused", where=f"{self.url}{path}", found=f"{status} {said}", do=do)
        error.status = status
        return error

    def _once(self, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        connection = (
            http.client.HTTPSConnection(
                self.host, self.port, timeout=self.timeout, context=ssl.create_default_context()
            )
            if self.tls
            else http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        )
        late = threading.Event()
        headers = {"Accept": "application/json", "Connection": "close"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"

        def end() -> None:
            late.set()
            if connection.sock is not None:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    return  # closed already

        timer = threading.Timer(self.timeout, end)
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET" if data is None else "POST", self.base + path, data, headers)
            response = connection.getresponse()
            found = response.read(self.largest + 1)
            if late.is_set():
                raise TimeoutError("cut off")
            if len(found) > self.largest:
                raise Qwen35Error(
                    "the answer is too large",
                    where=f"{self.url}{path}",
                    expected=f"at most {self.largest} bytes",
                    do="ask for fewer tokens, or --top less",
                )
            return response.status, found
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise TimeoutError(str(error)) from error
            raise
        finally:
            timer.cancel()
            connection.close()
