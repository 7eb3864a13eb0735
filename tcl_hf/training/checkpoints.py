"""Checkpoints of a run: whole or not there, verified before they are read, the oldest removed.

A checkpoint is what Accelerate saves, and a manifest with the size and checksum of every file, which is written last.
It is made under another name and renamed when all of it is on the disk.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch.utils.serialization import config as serialization

from ..models.checksums import checksum

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
_NAME = "step-????????"
_REMOVED = ".removed"  # ends the name of one that is being removed


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; the message says why, and which one is the last good."""


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    limit: int,
    any_process: Callable[[bool], bool],
    spared: Path | None = None,
) -> Path:
    """Save the state of all processes as the checkpoint of a step, and remove the oldest beyond `limit`.

    Args:
        any_process: whether its argument holds in any process, called by all at the same points.
        spared: a checkpoint that is still needed, and is not removed.

    Raises:
        CheckpointWriteError: if it can not be written, for example to a full disk; earlier ones are as they were.
    """
    final = output_dir / CHECKPOINTS / f"step-{step:08d}"
    unfinished = final.with_suffix(".tmp")
    failure: Exception | None = None
    try:
        if accelerator.is_main_process:
            for suffix in (".tmp", _REMOVED):  # what a kill has left, perhaps of another step
                for left in final.parent.glob(f"{_NAME}{suffix}"):
                    shutil.rmtree(left, ignore_errors=True)
        accelerator.wait_for_everyone()
        with serialization.patch("save.compute_crc32", False):  # the manifest has better, and one is slow enough
            accelerator.save_state(str(unfinished))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
        failure = error
    if any_process(failure is not None):
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise _not_written(final, output_dir, failure) from failure
    if accelerator.is_main_process:
        try:
            _write_manifest(unfinished, {"step": step, "num_processes": accelerator.num_processes})
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            _flush(final.parent)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            failure = error
        else:
            # Newer ones can only be damaged, passed over by a run that was resumed: they go first.
            others = sorted(final.parent.glob(_NAME), key=lambda path: (path.name <= final.name, path.name))
            for old in others[: -max(limit, 1)]:
                if old != spared:
                    _remove_in_background(old)
    if any_process(failure is not None):
        raise _not_written(final, output_dir, failure) from failure
    return final


def _not_written(final: Path, output_dir: Path, failure: Exception | None) -> CheckpointWriteError:
    reason = str(failure).strip().splitlines()[0] if failure else "another process failed"
    return CheckpointWriteError(
        f"{final} could not be written ({reason}): make room and go on with --resume. "
        f"Last good checkpoint: {newest_checkpoint(output_dir) or 'none'}."
    )


def _remove_in_background(checkpoint: Path) -> None:
    """Take a checkpoint's name away at once, and its files while training goes on: a second or so for gigabytes."""
    unnamed = checkpoint.with_suffix(_REMOVED)  # if this is killed, the next checkpoint removes what is left
    try:
        checkpoint.rename(unnamed)
    except OSError as error:
        logger.warning("%s could not be removed: %s.", checkpoint, error)
        return
    Thread(target=shutil.rmtree, args=(unnamed,), kwargs={"ignore_errors": True}).start()


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as flushing, ThreadPoolExecutor(4) as hashing:  # the disk and the cores work together
        flushed = flushing.map(_flush, files)
        sums = dict(zip(files, hashing.map(checksum, files), strict=True))
        list(flushed)  # raises what a flush has raised
    listed = {path.relative_to(folder).as_posix(): [path.stat().st_size, sums[path]] for path in files}
    (folder / MANIFEST).write_text(json.dumps(facts | {"files": listed}, indent=1) + "\n")
    _flush(folder / MANIFEST)
    _flush(folder)


def _flush(path: Path) -> None:
    """Have the disk keep a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run, by its name."""
    return max((output_dir / CHECKPOINTS).glob(_NAME), default=None)


def newest_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says; says which newer ones are not."""
    for checkpoint in sorted((output_dir / CHECKPOINTS).glob(_NAME), reverse=True):
        damage = what_is_damaged(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is passed over: %s.", checkpoint, damage)
    return None


def what_is_damaged(checkpoint: Path) -> str | None:
    """What differs from the manifest, in words; None if the checkpoint is whole."""
    try:
        files = read_manifest(checkpoint)["files"]
        for name, (size, expected) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"its file {name} is missing"
            if path.stat().st_size != size or checksum(path) != expected:
                return f"its file {name} is not what was saved"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest can not be read ({error})"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """`step`, `num_processes` and `files` of a checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
