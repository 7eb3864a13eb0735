"""Checkpoints of a run: written whole or not at all, verified before they are read, and the oldest removed.

A checkpoint is a folder of what `Engine.save_state` writes, and a manifest, which is written last, with the size and
checksum of every file and the identity of the run. The folder has another name until all of it is on the disk, and is
then renamed.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from accelerate import Accelerator
from safetensors import SafetensorError
from torch.utils.serialization import config as serialization

from ..data.skipped import DEAD_WORKER
from ..models.checksums import checksum
from .agreement import Agreement

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 2  # Checkpoints of the first format had no number, and held pickles.
_NAME = "step-????????"
_PART = re.compile(r"[\w-][\w.-]*", re.ASCII)  # a part of a file's name: not hidden, not "..", without wildcards
_REMOVED = ".removed"  # the end of the name of a checkpoint that is being removed


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; the message gives the reason and the last good checkpoint."""


class CheckpointPusher(Protocol):
    """Takes checkpoints elsewhere while training goes on, such as `sharing.hub.BackgroundPush`."""

    @property
    def on_its_way(self) -> Path | None:
        """The checkpoint that is being pushed, and must not be removed."""

    def start(self, checkpoint: Path) -> None:
        """Begin to push a checkpoint."""

    def finish(self) -> None:
        """Wait for the push that is on its way."""


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    limit: int,
    agreement: Agreement,
    save: Callable[[Path], None],
    spared: Path | None = None,
    identity: dict[str, Any] | None = None,
) -> Path:
    """Save the state of all processes as the checkpoint of a step, and remove the oldest beyond `limit`.

    Args:
        agreement: of all processes, which call this together.
        save: writes the files of the state into a folder, for each process.
        spared: a checkpoint that is still needed, and is not removed.
        identity: of the run, for the manifest.

    Raises:
        CheckpointWriteError: if it cannot be written, for example to a full disk; earlier ones are as they were.
    """
    final = output_dir / CHECKPOINTS / f"step-{step:08d}"
    unfinished = final.with_suffix(".tmp")
    failure: Exception | None = None
    try:
        if accelerator.is_main_process:
            for left in final.parent.glob(f"{_NAME}.*"):  # A kill may have left them, perhaps at another step.
                shutil.rmtree(left, ignore_errors=True)
        accelerator.wait_for_everyone()
        # The checksums of the manifest are stronger, and a second pass over all bytes would cost time.
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            save(unfinished)
    except (OSError, RuntimeError, SafetensorError) as error:  # Torch and safetensors raise errors of their own.
        if DEAD_WORKER.search(str(error)):
            raise  # It has nothing to do with the disk.
        failure = error
    is_saved = not agreement.any(failure is not None)
    if accelerator.is_main_process and is_saved:
        try:
            facts = {"format": FORMAT, "step": step, "num_processes": accelerator.num_processes}
            _write_manifest(unfinished, facts | {"identity": identity or {}})
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            _flush(final.parent)
        except OSError as error:
            failure = error
    if agreement.any(failure is not None):
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = str(failure).strip().splitlines()[0] if failure else "another process failed"
        raise CheckpointWriteError(
            f"{final} could not be written ({reason}): make room and go on with --resume. "
            f"Last good checkpoint: {newest_checkpoint(output_dir) or 'none'}."
        ) from failure
    if accelerator.is_main_process:
        # Newer checkpoints must be damaged, because a resumed run has passed over them: they are removed first.
        others = sorted(final.parent.glob(_NAME), key=lambda path: (path.name <= final.name, path.name))
        for old in others[: -max(limit, 1)]:
            if old != spared:
                _remove_in_background(old)
    return final


def _remove_in_background(checkpoint: Path) -> None:
    """Rename a checkpoint at once, and remove its files while training goes on, which takes seconds for gigabytes."""
    unnamed = checkpoint.with_suffix(_REMOVED)  # If this is killed, the next checkpoint removes what is left.
    try:
        checkpoint.rename(unnamed)
    except OSError as error:
        logger.warning("%s could not be removed: %s.", checkpoint, error)
        return
    Thread(target=shutil.rmtree, args=(unnamed,), kwargs={"ignore_errors": True}).start()


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as flushing, ThreadPoolExecutor(4) as hashing:  # Disk and cores work at the same time.
        flushed = flushing.map(_flush, files)
        sums = dict(zip(files, hashing.map(checksum, files), strict=True))
        list(flushed)  # raises the error of a flush
    listed = {path.relative_to(folder).as_posix(): [path.stat().st_size, sums[path]] for path in files}
    (folder / MANIFEST).write_text(json.dumps(facts | {"files": listed}, indent=1) + "\n")
    for path in files:
        path.chmod((folder / MANIFEST).stat().st_mode)  # safetensors lets only the owner read what it writes
    _flush(folder / MANIFEST)
    _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run, by its name."""
    return max((output_dir / CHECKPOINTS).glob(_NAME), default=None)


def saved_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run by their names, the newest first."""
    return sorted((output_dir / CHECKPOINTS).glob(_NAME), reverse=True)


def newest_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint whose files agree with its manifest; the log names newer ones that do not."""
    for checkpoint in saved_checkpoints(output_dir):
        damage = what_is_damaged(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is passed over: %s.", checkpoint, damage)
    return None


def what_is_damaged(checkpoint: Path, names: Collection[str] | None = None) -> str | None:
    """The first difference between a checkpoint and its manifest, in words; None if it is whole.

    Args:
        names: the files to look at; all of them if None.
    """
    try:
        for name, (size, expected) in read_manifest(checkpoint)["files"].items():
            if names is not None and name not in names:
                continue
            path = checkpoint / name
            if not path.is_file():
                return f"its file {name} is missing"
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                return f"its file {name} is a link out of it"
            if path.stat().st_size != size or checksum(path) != expected:
                return f"its file {name} is not what was saved"
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """`format`, `step`, `num_processes`, `identity` and `files` of a checkpoint; `format` is 1 in old ones.

    Raises:
        OSError, ValueError: if there is no manifest, or it lists something else than files of the checkpoint.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        manifest = {"format": 1, "identity": {}} | manifest
        for name in ("format", "step", "num_processes"):
            if type(manifest[name]) is not int:
                raise ValueError(f"{name} is {manifest[name]!r}")
        if not isinstance(manifest["identity"], dict):
            raise ValueError(f"identity is {manifest['identity']!r}")
        for name, (size, sum_of_file) in manifest["files"].items():
            if not all(map(_PART.fullmatch, name.split("/"))):
                raise ValueError(f"'{name}' is not the name of a file in a checkpoint")
            if type(size) is not int or type(sum_of_file) is not str:
                raise ValueError(f"the entry of {name} is not a size and a checksum")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return manifest


def files_of(checkpoint: Path) -> list[str]:
    """The names of the files that make up a checkpoint: those of its manifest and the manifest, and no others.

    Raises:
        OSError, ValueError: as `read_manifest`.
    """
    return [*sorted(read_manifest(checkpoint)["files"]), MANIFEST]
