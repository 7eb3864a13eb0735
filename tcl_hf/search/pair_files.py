"""Files of pairs with their scores: WebDataset tars and parquet files, which `load_pairs` reads again."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FORMATS = ("tar", "parquet")
_ROWS = 100  # records in a row group of parquet, which are held in memory
_ENDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
_SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "captions": pa.list_(pa.string()),
        "image_id": pa.string(),
        "similarity": pa.list_(pa.float32()),
        "matching": pa.list_(pa.float32()),
    }
)


class AddPairs(Protocol):
    """Adds a record to a file."""

    def __call__(
        self,
        number: int,
        record: dict[str, Any],
        texts: list[str],
        similarity: list[float],
        matching: list[float | None],
    ) -> None:
        """Add a record with some of its texts, and their scores; `number` counts the records of the file."""


@contextmanager
def pair_file(path: Path, kind: str) -> Iterator[AddPairs]:
    """Write a file of pairs completely or not at all; one without records is not written.

    Args:
        path: the file, with `kind`, a value of `FORMATS`, as the end of its name.

    Raises:
        OSError: if it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    file = _Tar(unfinished) if kind == "tar" else _Parquet(unfinished)
    try:
        yield file.add
        file.close()
        if file.number:
            with open(unfinished, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _content_of(record: dict[str, Any]) -> bytes:
    """The bytes of a record's image."""
    image = record["image"]
    content: bytes | None = image.get("bytes")
    return Path(image["path"]).read_bytes() if content is None else content


class _Tar:
    """A WebDataset tar: each record is its image, `.txt` with its only text or `.json` with several, and its scores."""

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "w")  # noqa: SIM115
        self.number = 0

    def add(self, number: int, record: dict[str, Any], texts: list[str], similarity: list, matching: list) -> None:
        content = _content_of(record)
        with Image.open(io.BytesIO(content)) as image:
            end = _ENDS.get(image.format or "", (image.format or "img").lower())
        key = f"{number:08d}"
        facts = {"captions": texts, "image_id": str(record.get("image_id")), "similarity": similarity}
        self._file(f"{key}.{end}", content)
        if len(texts) == 1:
            self._file(f"{key}.txt", texts[0].encode())
        self._file(f"{key}.json", json.dumps(facts | {"matching": matching}, ensure_ascii=False).encode())
        self.number += 1

    def _file(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self._tar.close()


class _Parquet:
    """A parquet file with the columns of a record and the scores of its texts."""

    def __init__(self, path: Path):
        self._writer = pq.ParquetWriter(path, _SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self.number = 0

    def add(self, number: int, record: dict[str, Any], texts: list[str], similarity: list, matching: list) -> None:
        image = {"bytes": _content_of(record), "path": os.path.basename(record["image"].get("path") or "") or None}
        row = {"image": image, "captions": texts, "image_id": str(record.get("image_id"))}
        self._rows.append(row | {"similarity": similarity, "matching": matching})
        self.number += 1
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
