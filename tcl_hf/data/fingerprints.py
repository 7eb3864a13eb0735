"""Fingerprints of data sets: what they hold and in which order, without reading the pixels of their images.

They do not depend on where the data is, so that a run may go on after its files were moved.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from .streams import MixedStreams

_ROWS = 100_000  # that are hashed at a time


def fingerprint_of(dataset: Any) -> dict[str, Any]:
    """Facts by which samples are told from others, and their order from other orders.

    Of a map-style data set these are the number of `samples` and a hash of its `rows`: all texts, ids and labels, and
    of every image the number of its bytes or the name of its file. Of a stream they are the number of its `shards` and
    a hash of their names and sizes, `files`.
    """
    if isinstance(dataset, MixedStreams):
        parts = [fingerprint_of(stream) for stream in dataset.streams]
        return {"weights": dataset.weights, "streams": len(parts)} | {
            f"{number}.{name}": value for number, part in enumerate(parts, 1) for name, value in part.items()
        }
    if isinstance(dataset, IterableDataset):
        content = json.dumps([_file(name) for name in _files_of(dataset)])
        return {"shards": dataset.num_shards, "files": _hash(content.encode())}
    if isinstance(dataset, Dataset):
        return {"samples": len(dataset), "rows": _hash(*_content_of(dataset))}
    inner = getattr(dataset, "dataset", None)  # Records may be looked up by image or with their kept states.
    if inner is not None:
        return fingerprint_of(inner) | {"samples": len(dataset)}
    return {"samples": len(dataset)} if hasattr(dataset, "__len__") else {}


def _hash(*parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _content_of(dataset: Dataset) -> Iterator[bytes | memoryview]:
    """The content of a map-style data set that is hashed, piece by piece."""
    images = [name for name in ("image", "images") if name in dataset.column_names]
    others = sorted(set(dataset.column_names) - set(images))
    yield json.dumps([images, others]).encode()
    if others:
        for table in dataset.select_columns(others).with_format("arrow").iter(_ROWS):
            for name in others:
                yield from _bytes_of(table[name].combine_chunks())
    rows = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
    for name in images:  # Selecting rows of such a column would copy all images.
        for values in _traits_of_images(dataset.data.column(name)):
            yield np.ascontiguousarray(values if rows is None else values[rows]).data


def _traits_of_images(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Numbers by row of a column of images: the sizes of their bytes, and hashes of the names of their files."""
    if not pa.types.is_struct(column.type):  # several images in a row
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        yield pc.fill_null(
            pc.list_value_length(column) if is_list else pc.is_valid(column).cast("int32"), -1
        ).to_numpy()
        return
    fields = {field.name for field in column.type}
    if "bytes" in fields:
        content = pc.struct_field(column, "bytes")
        sizes = pc.binary_length(content.cast("binary") if pa.types.is_null(content.type) else content)
        yield pc.fill_null(sizes.cast("int64"), -1).to_numpy()
    if "path" in fields:
        paths = pc.struct_field(column, "path").cast("string")
        names = pc.replace_substring_regex(paths, r"^.*[/\\]", "")
        # A name becomes 8 bytes of its hash, because rows are selected by number afterwards.
        yield np.array([_number(name) for name in names.to_pylist()], dtype=np.uint64)


def _number(name: str | None) -> int:
    content = b"\xff" if name is None else name.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _bytes_of(array: pa.Array) -> Iterator[bytes | memoryview]:
    """The values of a column as bytes, which do not depend on how the table is cut into pieces."""
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False).tobytes()
        yield from _bytes_of(array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield pc.fill_null(pc.binary_length(array), -1).to_numpy(zero_copy_only=False).tobytes()
        yield "".join(text or "" for text in array.to_pylist()).encode(errors="surrogatepass")
    else:
        yield json.dumps(array.to_pylist(), default=str).encode()


def _files_of(stream: IterableDataset) -> Iterator[str]:
    """The names of the files that a stream reads, in their order."""
    source: Any = stream._ex_iterable
    while hasattr(source, "ex_iterable"):
        source = source.ex_iterable
    waiting = [getattr(source, "kwargs", None), getattr(source, "ex_iterables", None)]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting[:0] = value.values()
        elif isinstance(value, list | tuple):
            waiting[:0] = value


def _file(name: str) -> list[Any]:
    """The name of a file without its folder, and its size where it is on this machine."""
    return [os.path.basename(name), os.path.getsize(name) if os.path.isfile(name) else None]
