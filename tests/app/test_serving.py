"""A service that listens on loopback: slow clients, signals, and the command."""

import http.client
import logging
import os
import signal
import socket
import threading
import time

import pytest
from helpers import free_port

pytest.importorskip("uvicorn", reason="uvicorn is not installed (tcl_hf[serve])")
import uvicorn

from tcl_hf.app.guard import Guard
from tcl_hf.app.limits import Limits
from tcl_hf.app.metrics import Metrics
from tcl_hf.app.serving import hosts_of, impatient_protocol, is_loopback, listen, serve
from tcl_hf.cli import serve as command
from tcl_hf.recipes.arguments import RecipeError


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port():
    """A service with a patience of 0.3 s, in a thread."""
    with listen("127.0.0.1", 0) as listener:
        guard = Guard(app, Limits(seconds=0.3), Metrics(frozenset(["/"])), token=None)
        protocol = impatient_protocol(0.3)
        server = uvicorn.Server(uvicorn.Config(guard, http=protocol, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def answer(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """The bytes that the service sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(pause)
        received = b""
        try:
            while chunk := client.recv(4096):
                received += chunk
        except ConnectionError:
            pass
        return received


def test_a_client_that_sends_slowly_is_let_go(port):
    start = time.monotonic()
    assert answer(port) == b""  # nothing at all
    assert answer(port, b"GET / HT") == b""  # half of a line
    late = answer(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", b"12")
    assert late.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.3 seconds" in late
    assert time.monotonic() - start < 5
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for _ in range(3):  # a client in time is answered, and may go on with its connection
        client.request("POST", "/", b"{}")
        assert client.getresponse().read() == b"ok"
    client.close()


def test_headers_in_drops_are_late_too(port):
    with pytest.raises((ConnectionError, BrokenPipeError)):
        answer(port, b"GET / HTTP/1.1\r\n", *[b"X: a\r\n"] * 20, pause=0.05)


def test_sigterm_ends_it_after_what_was_accepted(caplog):
    """The process goes on after `serve` as after any function, so that it ends with 0."""
    answers = []

    async def slow(scope, receive, send):
        if scope["type"] == "http":
            import asyncio

            started.set()
            await asyncio.sleep(0.3)
            await app(scope, receive, send)

    def client() -> None:
        answers.append(answer(port, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))

    def stop() -> None:
        thread.start()
        started.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)

    started, thread = threading.Event(), threading.Thread(target=client)
    before = signal.getsignal(signal.SIGTERM)
    with listen("127.0.0.1", 0) as listener, caplog.at_level(logging.INFO):
        port = listener.getsockname()[1]
        threading.Thread(target=stop).start()
        serve(slow, listener, seconds=5)
    thread.join()
    assert answers[0].startswith(b"HTTP/1.1 200 ") and answers[0].endswith(b"ok")
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"Serving at http://127.0.0.1:{port}" in caplog.text


def test_a_taken_port_is_refused():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RecipeError, match=rf"--port {port}: .*in use.*choose others"):
            listen("127.0.0.1", port)
    with pytest.raises(RecipeError, match=r"--host 192\.0\.2\.1"):
        listen("192.0.2.1", free_port())


def test_other_machines_are_let_in_on_request_only():
    assert command.parser().parse_args([]).host == "127.0.0.1"
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4
    assert hosts_of("0.0.0.0") is None and "localhost" in hosts_of("::1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_texts", "0"], r"--max_texts must be above 0, got 0"),
        (["--timeout", "-1"], r"--timeout must be above 0, got -1"),
        (["--max_wait_ms", "-1"], r"--max_wait_ms must be at least 0"),
        (["--max_queue", "10"], r"--max_queue 10 is less than --max_texts"),
        (["--model", "nowhere/at/all"], r"^error: nowhere/at/all cannot be opened"),
        ([], r"^error: There is no runs/openmoji: make it with `tcl-hf demo`"),
    ],
)
def test_the_command_refuses_what_cannot_work(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        command.main(["--port", "0", *argv])


def test_the_command_serves_a_model(model_folders, monkeypatch):
    """It answers over HTTP with the token of the environment, and returns when it is told to stop."""
    found = {}

    def client(port: int) -> None:
        for token in ("wrong", "secret"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request("POST", "/embed", b'{"texts": ["a red dog"]}', headers)
            response = connection.getresponse()
            found[token] = (response.status, response.read())
            connection.close()
        os.kill(os.getpid(), signal.SIGTERM)

    def listened(host: str, port: int):
        listener = listen(host, port)
        threading.Thread(target=client, args=(listener.getsockname()[1],)).start()
        return listener

    monkeypatch.setenv(command.TOKEN, "secret")
    monkeypatch.setattr("tcl_hf.app.serving.listen", listened)
    command.main(["--model", str(model_folders["retrieval"]), "--port", "0", "--device", "cpu"])
    assert found["wrong"][0] == 401 and found["secret"][0] == 200 and b'"dimensions":16' in found["secret"][1]
