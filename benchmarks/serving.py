"""Measure the service on loopback: clients at a time against one, errors, throughput and waiting times.

    python benchmarks/serving.py --model runs/openmoji --seconds 60 --clients 8

It makes an index of the demo's held-out pictures, starts `tcl-hf serve` in a process of its own, sends requests to
127.0.0.1 for a bounded time, stops the service by SIGTERM, and prints a table. Requests differ, so that no answer could
have been kept. Clients are plain sockets in one process, which take little of the time of two cores.
"""

import argparse
import asyncio
import base64
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HOST = "127.0.0.1"


@dataclass
class Load:
    """The requests of one measurement: their path and bodies, which are sent in turn."""

    name: str
    path: str
    bodies: list[bytes]


@dataclass
class Result:
    """Waiting times in seconds, errors, and the time that the measurement took."""

    waits: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def throughput(self) -> float:
        """Answers in a second."""
        return len(self.waits) / self.seconds


def message(path: str, body: bytes) -> bytes:
    """A request as it is sent."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of an answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    (length,) = (line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return status, await reader.readexactly(int(length))


async def client(port: int, load: Load, turns: itertools.count, end: float, result: Result) -> None:
    """Send one request after another until the time is over."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        while time.monotonic() < end:
            start = time.monotonic()
            writer.write(message(load.path, load.bodies[next(turns) % len(load.bodies)]))
            status, body = await read_answer(reader)
            if status == 200:
                result.waits.append(time.monotonic() - start)
            else:
                result.errors.append(f"{status} {body[:200]!r}")
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        result.errors.append(repr(error))
    finally:
        writer.close()


async def measure(port: int, load: Load, clients: int, seconds: float) -> Result:
    """Let clients send for some seconds."""
    result, turns, start = Result(), itertools.count(), time.monotonic()
    await asyncio.gather(*(client(port, load, turns, start + seconds, result) for _ in range(clients)))
    result.seconds = time.monotonic() - start
    return result


def loads(captions: list[str], pictures: list[bytes]) -> list[Load]:
    """The requests of each measurement."""

    def bodies(*requests: dict) -> list[bytes]:
        return [json.dumps(request).encode() for request in requests]

    coded = [base64.b64encode(picture).decode() for picture in pictures]
    return [
        Load("/embed, a text", "/embed", bodies(*({"texts": [text]} for text in captions))),
        Load("/embed, a picture", "/embed", bodies(*({"images": [picture]} for picture in coded))),
        Load("/search, similarity", "/search", bodies(*({"text": text, "rerank": 0} for text in captions))),
        Load("/search, 32 re-ranked", "/search", bodies(*({"text": text, "rerank": 32} for text in captions))),
    ]


def start_service(model: str, index: Path, log: Path) -> tuple[subprocess.Popen, int]:
    """The process of the service, and its port, once it listens."""
    command = [sys.executable, "-m", "tcl_hf", "serve", "--model", model, "--index", str(index), "--port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output)
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("Serving at "):
                return process, int(line.split(",")[0].rsplit(":", 1)[1])
        time.sleep(0.1)
    raise SystemExit(f"The service did not start:\n{log.read_text()}")


def make_index(model: str, folder: Path) -> tuple[list[str], list[bytes]]:
    """Index the demo's held-out pictures, and return their captions and files."""
    from tcl_hf.data.pairs import load_pairs
    from tcl_hf.search import ImageIndex

    ImageIndex.create(folder, model).add("openmoji", "validation")
    records = load_pairs("openmoji", "validation")
    return [names[0] for names in records["captions"]], [image["bytes"] for image in records["image"]]


def row(load: Load, single: Result, many: Result) -> dict:
    """The numbers of a measurement."""
    p50, p95 = np.percentile(many.waits, [50, 95]) if many.waits else (float("nan"), float("nan"))
    return {
        "requests": load.name,
        "one_at_a_time_per_s": round(single.throughput, 1),
        "per_s": round(many.throughput, 1),
        "ratio": round(many.throughput / single.throughput, 2),
        "p50_ms": round(1000 * p50),
        "p95_ms": round(1000 * p95),
        "errors": len(single.errors) + len(many.errors),
    }


def main() -> None:
    """Print the table, and end with 1 if there was an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="runs/openmoji")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", default="", help="measure requests whose name contains this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        captions, pictures = make_index(args.model, Path(folder) / "index")
        process, port = start_service(args.model, Path(folder) / "index", Path(folder) / "log")
        rows, errors = [], []
        try:
            for load in loads(captions, pictures):
                if args.only in load.name:
                    asyncio.run(measure(port, load, args.clients, 2))  # the first forwards are slower
                    single = asyncio.run(measure(port, load, 1, args.seconds / 2))
                    many = asyncio.run(measure(port, load, args.clients, args.seconds))
                    rows.append(row(load, single, many))
                    errors += single.errors + many.errors
                    print(json.dumps(rows[-1]), flush=True)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    print(f"The service ended with {code}." + "".join(f"\n{error}" for error in errors[:5]))
    sys.exit(1 if errors or code else 0)


if __name__ == "__main__":
    main()
