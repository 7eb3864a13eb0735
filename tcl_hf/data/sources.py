"""The files that a source names: paths, patterns, addresses, and folders in the layouts that data sets come in."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec

from .records import DataError
from .roots import is_remote

# The kinds of files that hold samples, by the end of their names in lower case.
KINDS = {
    **dict.fromkeys((".json",), "json"),
    **dict.fromkeys((".csv", ".tsv", ".jsonl", ".ndjson", ".token"), "table"),
    ".parquet": "parquet",
    ".tar": "tar",
}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
SHARDS = ("tar", "parquet")  # kinds of which a data set has many files
_SPLIT_WORDS = {
    "train": ("train", "training", "restval"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 1_000_000  # that one pattern in braces means


@dataclass(frozen=True)
class Files:
    """Files of one kind, a value of `KINDS`, in the order of their names."""

    kind: str
    paths: tuple[str, ...]


def find_files(source: str, split: str) -> Files | None:
    """The files of a split of a source; None where its name says nothing of files.

    A file has no splits. Of a folder, or of folders in it, these are the files of which the name, or that of a folder
    above it, begins with the name of the split; if none does, "train" is all files that belong to no other split.

    Args:
        source: a path, an address of fsspec, a pattern with `*`, `?`, `[...]`, `{a,b}` or `{00000..00012}`, or a
            folder.
        split: "train", "validation", "test" or another name.

    Raises:
        DataError: if files of several kinds are meant, or a folder has no files of the split.
    """
    source = source.removeprefix("file://")
    if not has_pattern(source) and (is_remote(source) or os.path.isfile(source)):
        kind = kind_of(source) or ("table" if source.lower().endswith(".txt") else None)
        return Files(kind, (source,)) if kind else None
    if os.path.isdir(source):
        return _in_folder(source, split)
    if has_pattern(source):
        return _of_kind(source, _matching(source))
    return None


def kind_of(path: str) -> str | None:
    """The kind of a file by the end of its name, whatever its case; None for other files."""
    return KINDS.get(PurePosixPath(path.split("?")[0]).suffix.lower())


def has_pattern(source: str) -> bool:
    """Whether a source is a pattern rather than the name of something that is there."""
    return not os.path.exists(source) and re.search(r"[*?\[{]", source.split("://")[-1]) is not None


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with braces means: `{a,b}` and `{00..12}`, whose numbers keep their leading zeros.

    Raises:
        DataError: if there are more than a million.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    bounds = _RANGE.fullmatch(found[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if not 0 <= last - first < _MOST_FILES:
            raise DataError(f"{pattern} means {last - first + 1} files: write the range as {{first..last}}.")
        parts = [f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)]
    else:
        parts = found[1].split(",")
    rest = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + part + end for part in parts for end in rest]


def _matching(pattern: str) -> list[str]:
    """The files that a pattern names, those in braces in their order."""
    paths: list[str] = []
    for one in expand_braces(pattern):
        if not re.search(r"[*?\[]", one):
            if not is_remote(one) and not os.path.isfile(one):
                raise DataError(
                    f"{one} is missing, which {pattern} names: complete the files, or name those there are."
                )
            paths.append(one)
            continue
        try:
            system, path = fsspec.core.url_to_fs(one)
            found = sorted(system.glob(path))
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{one} cannot be listed: {error}") from error
        # Local paths stay as they were typed, relative or not.
        paths += [system.unstrip_protocol(name) if is_remote(one) else os.path.relpath(name) for name in found]
    if not is_remote(pattern) and os.path.isabs(pattern):
        paths = [os.path.abspath(path) for path in paths]
    return paths


def _of_kind(source: str, paths: Sequence[str]) -> Files | None:
    kinds = sorted({str(kind_of(path)) for path in paths})
    if len(kinds) > 1:
        raise DataError(f"{source} names files of the kinds {' and '.join(kinds)}: name files of one kind.")
    return Files(kinds[0], tuple(paths)) if kinds and kinds[0] != "None" else None


def _in_folder(folder: str, split: str) -> Files | None:
    """The files of a split in a folder; None if it has shards of no kind and not one list of samples."""
    paths = sorted(_walk(folder))
    for kind in SHARDS:
        found = [path for path in paths if kind_of(path) == kind]
        if found:
            chosen = _of_split(folder, found, split)
            if not chosen:
                raise DataError(f"{folder} has no files of a split '{split}': their names must begin with it.")
            return Files(kind, tuple(chosen))
    lists = [path for path in paths if kind_of(path) in ("table", "json") and not _is_description(path)]
    lists += [path for path in paths if os.path.basename(path).lower() in ("captions.txt", "results.txt")]
    chosen = _of_split(folder, lists, split)
    if not lists:
        texts = [path for path in paths if path.lower().endswith(".txt") and image_beside(path)]
        chosen = _of_split(folder, texts, split)
        if chosen:
            return Files("table", tuple(chosen))
    if not chosen:
        if lists and split != "train":
            raise DataError(f"{folder} has no list of a split '{split}': its name must begin with it.")
        return None
    if len(chosen) > 1:
        names = ", ".join(os.path.relpath(path, folder) for path in chosen[:4])
        raise DataError(f"{folder} holds {len(chosen)} lists for '{split}' ({names}): name one of them as the data.")
    return Files(kind_of(chosen[0]) or "table", tuple(chosen))


def image_beside(text: str) -> str | None:
    """The path of the image that has the name of a text file up to its ending; None if there is not one."""
    stem = os.path.splitext(text)[0]
    endings = (ending for pair in ((name, name.upper()) for name in IMAGE_ENDINGS) for ending in pair)
    return next((stem + ending for ending in endings if os.path.exists(stem + ending)), None)


def _walk(folder: str) -> list[str]:
    """All files in a folder and its folders, without hidden ones."""
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return paths


def _is_description(path: str) -> bool:
    """Whether a list describes a data set rather than its samples: files of the Hub and of img2dataset."""
    name = os.path.basename(path).lower()
    return name in ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json") or "_stats" in name


def _of_split(folder: str, paths: Sequence[str], split: str) -> list[str]:
    """The files whose split is this one; for "train" without such files, those that have no split."""
    words = _SPLIT_WORDS.get(split) or next((w for w in _SPLIT_WORDS.values() if split in w), (split,))
    chosen = [path for path in paths if _belongs(folder, path, (split, *words))]
    if chosen or split != "train":
        return chosen
    others = tuple(word for name in ("validation", "test") for word in _SPLIT_WORDS[name])
    return [path for path in paths if not _belongs(folder, path, others)]


def _belongs(folder: str, path: str, words: Sequence[str]) -> bool:
    """Whether the name of a file, or of a folder between it and `folder`, begins with one of some words.

    A longer word may follow only after a digit or a mark: `val2014` and `val-0` are of "val", `valley` is not.
    """
    parts = os.path.relpath(path, folder).lower().split(os.sep)
    pattern = re.compile(rf"(.*[^a-z])?({'|'.join(map(re.escape, words))})(?![a-z])")
    return any(pattern.match(part) for part in parts)
