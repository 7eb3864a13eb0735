"""Run the service until it is told to stop: one process, which answers what it has accepted and then ends."""

import ipaddress
import logging
import signal
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..recipes.arguments import RecipeError
from .guard import Guard

logger = logging.getLogger(__name__)

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(host: str) -> list[str] | None:
    """The names under which a service that listens at `host` is called; None for any, where others can reach it."""
    return LOOPBACK_NAMES if is_loopback(host) else None


def impatient_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection whose headers are not complete after some time.

    uvicorn waits for them without end, and a client that sends a byte now and then would keep its connection.
    """

    class Impatient(H11Protocol):
        _closing: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._closing is not None:
                self._closing.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the clock when headers are awaited, and stop it when they are there."""
            are_awaited = self.conn.their_state is h11.IDLE
            if are_awaited and self._closing is None:
                self._closing = self.loop.call_later(seconds, self.transport.close)
            elif not are_awaited and self._closing is not None:
                self._closing.cancel()
                self._closing = None

    return Impatient


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            logger.info("Serving at http://%s:%d, described at /docs", f"[{host}]" if ":" in host else host, port)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        RecipeError: if the host is not one of this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"--host {host} --port {port}: this cannot be listened at ({error}); choose others."
        ) from error


def serve(app: Guard, listener: socket.socket, seconds: float = 30.0) -> None:
    """Answer requests until SIGTERM or SIGINT; then answer those that were accepted, and return.

    Args:
        seconds: time in which the headers of a request have to arrive, and in which the last requests are answered.
    """
    config = uvicorn.Config(
        app,
        http=impatient_protocol(seconds),
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(seconds) + 1,
    )
    # uvicorn hands the signal on to the handlers that were there before it, once it has stopped. Ours do nothing, so
    # that a service that was asked to stop ends as it should, with 0.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config).run([listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
