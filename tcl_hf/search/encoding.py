"""Pictures to rows of an index: threads decode, the model encodes, and a thread writes what is encoded."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.images import IMAGE_ERRORS
from ..models.distributed import is_distributed
from .pictures import Picture, hash_of, thumbnail_of
from .ranking import SearchModel, read_rgb

logger = logging.getLogger(__name__)

AHEAD = 4  # batches of decoded pictures that wait for the model at most
COMMIT_ROWS = 1024  # rows in a commit, and
COMMIT_SECONDS = 10.0  # seconds after which fewer are committed: about the work that a kill can lose

Given = TypeVar("Given")
Made = TypeVar("Made")
Row = dict[str, Any]  # a row of the table by its columns


@dataclass
class Decoded:
    """A picture that was read: its pixels (3, H, W) with the row as far as it is known, or why it cannot be used.

    A picture whose content is in the index already has neither: its row is made from the one that is there.
    """

    picture: Picture
    hash: str = ""
    pixels: Tensor | None = None
    row: Row | None = None
    reason: str | None = None


def in_threads(
    function: Callable[[Given], Made], items: Iterable[Given], threads: ThreadPoolExecutor, ahead: int
) -> Iterator[Made]:
    """Results of a function in the order of the items, of which some are computed ahead.

    Args:
        function: called for each item.
        items: read as they are needed.
        threads: where the function runs.
        ahead: how many items at most are computed before their results are taken.
    """
    waiting: deque[Future[Made]] = deque()
    for item in items:
        waiting.append(threads.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def decode(picture: Picture, is_known: Callable[[str], bool], model: SearchModel) -> Decoded:
    """Read a picture, and decode it unless its content is known."""
    try:
        content = picture.read()
        digest = picture.image_id if picture.path is None else hash_of(content)
        if is_known(digest):
            return Decoded(picture, digest)
        image = read_rgb(content)
        row = facts_of(picture, digest) | {
            "width": image.width,
            "height": image.height,
            "thumbnail": thumbnail_of(image, int(model.processor.image_size)),
            "bytes": picture.content,
        }
        return Decoded(picture, digest, model.pixel_values(image), row)
    except IMAGE_ERRORS as error:
        return Decoded(picture, reason=f"{type(error).__name__}: {error}")


def facts_of(picture: Picture, digest: str) -> Row:
    """The columns of a row that do not depend on the content alone."""
    names = ("image_id", "path", "name", "source", "caption", "size", "modified")
    return {name: getattr(picture, name) for name in names} | {"hash": digest}


def encode_rows(batch: list[Decoded], model: SearchModel, states_left: int) -> list[Row]:
    """The rows of decoded pictures, with vectors, and with the states of the first `states_left`."""
    pixels = torch.stack([one.pixels for one in batch if one.pixels is not None])
    states, features = model.encode_images(pixels)
    vectors = features.cpu().numpy()
    kept = [bytes_of(one) for one in states[: max(states_left, 0)].cpu()]
    rows = [one.row for one in batch if one.row is not None]
    return [
        row | {"vector": vectors[place], "states": kept[place] if place < len(kept) else None}
        for place, row in enumerate(rows)
    ]


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def tensor_of(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of bytes that `bytes_of` made."""
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def gathered(rows: list[Any]) -> list[Any]:
    """The rows of all processes in the first one, and none in the others."""
    if not is_distributed():
        return rows
    shares: list[list[Any]] | None = [[]] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, shares)
    return [row for share in shares for row in share] if shares is not None else []


def any_left(has_more: bool) -> bool:
    """Whether one of the processes has more to do."""
    if not is_distributed():
        return has_more
    left = [False] * dist.get_world_size()
    dist.all_gather_object(left, has_more)
    return any(left)


class Committer:
    """Commits rows in a thread of its own, while the model encodes the next ones.

    Args:
        commit: writes rows.
    """

    def __init__(self, commit: Callable[[list[Any]], None]):
        self._commit = commit
        self._thread = ThreadPoolExecutor(1)
        self._rows: list[Any] = []
        self._running: Future[None] | None = None
        self._since = time.monotonic()

    def add(self, rows: list[Any]) -> None:
        """Take rows, and begin a commit if it is time."""
        self._rows += rows
        if len(self._rows) >= COMMIT_ROWS or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Begin a commit of what is there, after the one before it has ended.

        Raises:
            SearchError: if that failed.
        """
        self.wait()
        if self._rows:
            self._running = self._thread.submit(self._commit, self._rows)
        self._rows, self._since = [], time.monotonic()

    def wait(self) -> None:
        """Wait for the commit that is running."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Commit the rest, and end the thread."""
        try:
            self.flush()
            self.wait()
        finally:
            self._thread.shutdown()
