"""The door of the service: token, size and time of a request, before anything of it is understood."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from .limits import Limits, RequestError
from .metrics import Metrics

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Paths that need no token: for load balancers, and the page that describes the service.
OPEN_PATHS = ("/health", "/docs", "/openapi.json", "/static-offline-docs")
BODIES_IN_MEMORY = 8  # bodies of the largest size that are held at a time


class Guard:
    """ASGI middleware that lets complete and permitted requests through, and ends those whose client has left.

    The body is read before the app runs. The app is cancelled when the client closes the connection, so that what it
    waits for gives its place to others, and when the answer takes too long.

    Args:
        token: bearer token that requests must carry; none if None.
        hosts: names under which the service may be called; any if None. A page of another site, whose name resolves to
            this machine, is refused by it.
    """

    def __init__(self, app: App, limits: Limits, metrics: Metrics, token: str | None, hosts: list[str] | None = None):
        self.app, self.limits, self.metrics, self.token, self.hosts = app, limits, metrics, token, hosts
        self.bytes_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # the client has left

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        except RequestError as error:
            await refuse(counted, error)
        finally:
            self.metrics.request(scope, status, time.monotonic() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        if not any(scope["path"] == path or scope["path"].startswith(f"{path}/") for path in OPEN_PATHS):
            self._check_token(headers.get(b"authorization", b""))
        size = self._size(headers.get(b"content-length"))
        held = size if size is not None else self.limits.request_bytes
        if held and self.bytes_held + held > BODIES_IN_MEMORY * self.limits.request_bytes:
            raise RequestError(429, "Too many large requests are being read; try again in a second.")
        self.bytes_held += held
        try:
            body = await self._body(receive)
            if body is not None:
                await self._answer(scope, body, receive, send)
        finally:
            self.bytes_held -= held

    def _check_host(self, header: str) -> None:
        host = header.rsplit(":", 1)[0] if not header.endswith("]") else header
        if self.hosts is not None and host not in self.hosts:
            raise RequestError(403, f"This service is called as {self.hosts[0]}, not as {host[:100]!r}.")

    def _check_token(self, header: bytes) -> None:
        if self.token is None:
            return
        kind, _, given = header.partition(b" ")
        # Compared in full whatever is given, so that the time does not say how much of it was right.
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token.encode()):
            raise RequestError(401, "The token is missing or wrong; send the header `Authorization: Bearer TOKEN`.")

    def _size(self, header: bytes | None) -> int | None:
        """The size that a request announces; None if it comes in chunks. Without a body it announces none or 0."""
        if header is None:
            return None
        if not header.isdigit():
            raise RequestError(400, "The header Content-Length is not a number.")
        if int(header) > self.limits.request_bytes:
            raise self._too_large()
        return int(header)

    def _too_large(self) -> RequestError:
        return RequestError(
            413, f"The request is larger than {self.limits.request_bytes / 1e6:.1f} MB; send several smaller ones."
        )

    async def _body(self, receive: Receive) -> bytes | None:
        """The body of a request; None if the client leaves before it is complete."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.limits.request_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise RequestError(
                408, f"The request did not arrive within {self.limits.seconds:g} seconds; send it again."
            ) from error

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the app on a complete request until it has answered, the client leaves, or the time is over."""
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        left = asyncio.ensure_future(receive())

        async def replay() -> Message:
            message = next(messages, None)
            return message if message is not None else await asyncio.shield(left)

        has_started = False

        async def noted(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        app = asyncio.ensure_future(self.app(scope, replay, noted))
        try:
            await asyncio.wait({app, left}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if app.done():
                app.result()
            elif not left.done() and not has_started:
                await _ended(app)
                raise RequestError(503, f"The answer took more than {self.limits.seconds:g} seconds; try again later.")
        finally:
            await _ended(app)
            left.cancel()


async def _ended(task: asyncio.Future) -> None:
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def refuse(send: Send, error: RequestError) -> None:
    """Answer a request that is refused."""
    content = json.dumps({"error": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += extra_headers(error)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def extra_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    """Headers that HTTP asks for with the status of an error."""
    if error.status == 401:
        return [(b"www-authenticate", b"Bearer")]
    if error.status in (429, 503):
        return [(b"retry-after", b"1")]
    if error.status in (408, 413):  # what is still on its way is not read
        return [(b"connection", b"close")]
    return []
