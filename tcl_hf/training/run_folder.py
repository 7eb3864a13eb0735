"""The folder of a run: what an earlier run has left there is replaced only if that is asked for."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..models.checksums import CHECKSUMS
from ..models.tokenization_tcl import TCLTokenizer
from .adapters import ADAPTER_CONFIG
from .arguments import TCLTrainingArguments, TrainingError
from .checkpoints import CHECKPOINTS, newest_checkpoint, read_manifest, saved_checkpoints, what_is_damaged
from .log import METRICS

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
_WEIGHTS = ".safetensors"


def check_new(folder: str | os.PathLike, overwrite: bool) -> None:
    """Refuse a folder in which a new run would replace a model or the checkpoints of a run.

    Raises:
        TrainingError: naming what is there, and what to do.
    """
    folder = Path(folder)
    if overwrite:
        return
    if newest_checkpoint(folder) is not None:
        raise TrainingError(
            f"{folder} holds checkpoints of an earlier run: go on with --resume, choose another output_dir, or replace "
            "them with --overwrite_output_dir true."
        )
    if any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        raise TrainingError(
            f"{folder} holds a model, which a new run would replace: choose another output_dir, or replace it with "
            "--overwrite_output_dir true."
        )


def clear(folder: Path) -> None:
    """Remove the checkpoints and the lists of an earlier run. Its model stays until there is another one."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in (METRICS, SKIPPED):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """A folder to save a model into, whose files replace those of `folder` when the `with` block ends without error.

    An earlier model, such as the best one so far, is whole until all of the new one is written.
    """
    unfinished = folder / ".model.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        written = {path.name for path in unfinished.iterdir()}
        # The sums come last: between the two renames, weights without sums open, and weights with others' do not.
        (folder / CHECKSUMS).unlink(missing_ok=True)
        for name in sorted(written, key=lambda name: (name == CHECKSUMS, name)):
            os.replace(unfinished / name, folder / name)
        for path in folder.glob("model*.safetensors*"):  # shards of an earlier model
            if path.name not in written:
                path.unlink()
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def tokenizer_of_run(args: TCLTrainingArguments) -> TCLTokenizer | None:
    """The tokenizer of the run that is resumed, of its newest checkpoint that has it whole; None in a new run.

    One that is trained anew would give words other numbers where the data or a library has changed.

    Raises:
        TrainingError: if it cannot be opened.
    """
    for checkpoint in saved_checkpoints(Path(args.output_dir)) if args.resume else []:
        try:
            names = {name for name in read_manifest(checkpoint)["files"] if not name.endswith(_WEIGHTS)}
        except (OSError, ValueError):  # The search for a whole checkpoint says so.
            continue
        if "tokenizer.json" not in names or what_is_damaged(checkpoint, names) is not None:
            continue
        try:
            return TCLTokenizer.from_pretrained(checkpoint)
        except Exception as error:  # The readers of tokenizers raise any kind.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(f"The tokenizer in {checkpoint} cannot be opened: {reason}.") from error
    return None
