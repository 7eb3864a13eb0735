"""Dynamic batches: what several requests ask of the model at the same time runs as one batch, in one thread."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from .limits import RequestError

Run = Callable[[list[Any]], Sequence[Any]]


@dataclass(eq=False)
class _Place:
    """A place in the queue."""

    item: Any
    result: asyncio.Future
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects what requests ask for into batches of one kind, and runs them in a thread of its own.

    A batch starts as soon as the thread is free, so that a single client does not wait. While others are sending
    theirs (see `arriving`), it waits for them, but never longer than `max_wait`. The kind that has waited longest is
    next. Who stops waiting gives the place back.

    Args:
        max_batch_size: items of one batch.
        max_wait: seconds.
        max_queue: items that wait, in all.
        observe: called with the kind, the size and the seconds of each batch.
    """

    def __init__(
        self,
        max_batch_size: int = 32,
        max_wait: float = 0.005,
        max_queue: int = 512,
        observe: Callable[[Hashable, int, float], None] | None = None,
    ):
        self.max_batch_size, self.max_wait, self.max_queue = max_batch_size, max_wait, max_queue
        self.observe = observe
        self._queues: dict[Hashable, tuple[Run, deque[_Place]]] = {}
        self._arriving = 0
        self._thread = ThreadPoolExecutor(1, "model")
        self._worker: asyncio.Task | None = None
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        """The number of items in the queue, without the batch that runs."""
        return sum(len(places) for _, places in self._queues.values())

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Say that a request is being read, for which the next batch may wait."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1
            self._changed.set()

    async def submit(self, kind: Hashable, items: Sequence[Any], run: Run) -> list[Any]:
        """The results of `run` for these items, which may run in several batches and together with those of others.

        Args:
            kind: items of the same kind, whose `run` is the same, may share a batch.
            run: takes a list of items, and returns a result for each.

        Raises:
            RequestError: with the status 429, if the queue has too few places left.
            Exception: that of `run` for these items; it does not concern the others of the batch.
        """
        if self.waiting + len(items) > self.max_queue:
            raise RequestError(429, f"{self.waiting} texts and pictures are waiting already; try again in a second.")
        loop = asyncio.get_running_loop()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        places = [_Place(item, loop.create_future()) for item in items]
        queue = self._queues.setdefault(kind, (run, deque()))[1]
        queue.extend(places)
        self._changed.set()
        try:
            return list(await asyncio.gather(*(place.result for place in places)))
        finally:  # after an error or a cancellation, the others of this request are not wanted any more
            for place in places:
                if not place.result.done():
                    place.result.cancel()
                if place in queue:
                    queue.remove(place)
            if not queue and self._queues.get(kind, (None, None))[1] is queue:
                del self._queues[kind]

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function that runs alone in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def close(self) -> None:
        """Finish what waits, and end the thread."""
        while self.waiting:
            await asyncio.sleep(0.01)
        if self._worker is not None:
            self._worker.cancel()
        self._thread.shutdown(wait=True)

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            filled = {kind: queue for kind, queue in self._queues.items() if queue[1]}
            if not filled:
                await self._changed.wait()
                continue
            kind = min(filled, key=lambda one: filled[one][1][0].since)
            run, queue = filled[kind]
            left = queue[0].since + self.max_wait - time.monotonic()
            if self._arriving and len(queue) < self.max_batch_size and left > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left)
                continue
            batch = [queue.popleft() for _ in range(min(len(queue), self.max_batch_size))]
            if not queue:
                del self._queues[kind]
            await self._run(kind, run, batch)

    async def _run(self, kind: Hashable, run: Run, batch: list[_Place]) -> None:
        """Run a batch; if it fails, run its items one by one, so that each has its own result or error."""
        start = time.monotonic()
        results: Sequence[Any]
        try:
            results = await self.call(run, [place.item for place in batch])
        except Exception as error:
            if len(batch) == 1:
                results = [error]
            else:
                for place in batch:
                    if not place.result.done():
                        await self._run(kind, run, [place])
                return
        if self.observe is not None:
            self.observe(kind, len(batch), time.monotonic() - start)
        for place, result in zip(batch, results, strict=True):
            if place.result.done():
                continue
            if isinstance(result, Exception):
                place.result.set_exception(result)
            else:
                place.result.set_result(result)
