"""Records of WebDataset tars, in which the files of a sample stand one after another: `0001.jpg`, `0001.txt`."""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import datasets

from ..models.tokenization_tcl import encodable
from .captions import caption_texts
from .roots import is_remote

_FIRST_MEMBERS = 50
_LARGEST_MEMBER = 2**28  # bytes; a sparse file of a few bytes in a tar may stand for terabytes of zeros
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^/.]*)\.(?P<field>[^/]*)", re.DOTALL)


def tar_records(
    files: Sequence[str],
    image_fields: Sequence[str],
    caption_fields: Sequence[str],
    stamps: Sequence[tuple[int, int]] = (),
) -> Iterator[dict]:
    """The records of tars, one after another.

    A sample without an image or a caption stays in, also where its file is larger than 256 MiB, and bytes that are not
    UTF-8 become U+FFFD: it is skipped and listed when a collator comes to it.

    Args:
        files: paths of the tars.
        image_fields, caption_fields: names of the fields; of each kind, a sample's first counts.
        stamps: sizes and times of the files. They are not read: `datasets` makes the name of its cache of them.
    """
    for file in files:
        for sample in _samples(file, {*image_fields, *caption_fields}):
            image = next((name for name in image_fields if name in sample), None)
            caption = next((name for name in caption_fields if name in sample), None)
            key = sample["__key__"]
            yield {
                "image": {"bytes": sample[image], "path": encodable(f"{key}.{image}")} if image else None,
                "captions": caption_texts(_decoded(caption, sample[caption])) if caption else [],
                "image_id": encodable(key),
            }


def fields_of(file: str) -> list[str]:
    """The names of the fields that the first hundred samples of a tar have."""
    return sorted({field for sample in islice(_samples(file, None), 100) for field in sample} - {"__key__"})


def _decoded(field: str, content: bytes) -> Any:
    """The text of a field, or the value of one that holds JSON; None if that is broken."""
    text = content.decode("utf-8", errors="replace")
    if not field.endswith("json"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _samples(file: str, wanted: set[str] | None) -> Iterator[dict[str, Any]]:
    """The samples of a tar as bytes by field, with their common name as `__key__`.

    The files of a sample have the same name up to the first dot. What follows the dot is the field.

    Args:
        wanted: the fields to read; None for all.
    """
    if not is_remote(file) and not _is_in_order(file):
        yield from _samples_out_of_order(file, wanted)
        return
    members = datasets.StreamingDownloadManager().iter_archive(file)
    named = ((match, member) for name, member in members if (match := _MEMBER.fullmatch(name)))
    for key, group in groupby(named, key=lambda pair: pair[0]["key"]):
        sample: dict[str, Any] = {"__key__": key}
        for match, member in group:
            field = match["field"].lower()
            if wanted is None or field in wanted:
                _read_into(sample, field, member)
        yield sample


def _read_into(sample: dict[str, Any], field: str, member: Any) -> None:
    """Add the content of an open file to a sample, unless it is larger than any image."""
    content = member.read(_LARGEST_MEMBER + 1)
    if len(content) <= _LARGEST_MEMBER:
        sample[field] = content


def _is_in_order(file: str) -> bool:
    """Whether the files of each sample of a tar stand one after another, as its headers say.

    The first ones are enough where two of them belong together, so that a large tar is not read twice.
    """
    try:
        with tarfile.open(file) as tar:
            keys = (match["key"] for member in tar if (match := _MEMBER.fullmatch(member.name)))
            first = list(islice(keys, _FIRST_MEMBERS))
            if len(set(first)) < len(first):
                return len([key for key, _ in groupby(first)]) == len(set(first))
            all_keys = [*first, *keys]
    except (tarfile.TarError, OSError):
        return True  # It breaks off, and the samples before that are read one after another.
    return len([key for key, _ in groupby(all_keys)]) == len(set(all_keys))


def _samples_out_of_order(file: str, wanted: set[str] | None) -> Iterator[dict[str, Any]]:
    """The samples of a tar whose files are sorted in another way, such as by their endings."""
    with tarfile.open(file) as tar:
        members: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            if match and member.isfile() and (wanted is None or match["field"].lower() in wanted):
                members.setdefault(match["key"], {})[match["field"].lower()] = member
        for key, fields in members.items():
            sample: dict[str, Any] = {"__key__": key}
            for field, info in fields.items():
                content = tar.extractfile(info)
                if content is not None:
                    _read_into(sample, field, content)
            yield sample
