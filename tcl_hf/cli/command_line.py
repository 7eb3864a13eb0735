"""The frame of a command: its log, and its errors as one sentence."""

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence

from ..data.pairs import DataError
from ..evaluation.metrics import NonFiniteScoreError
from ..recipes.arguments import RecipeError
from ..sharing.hub import HubError
from ..sharing.original_files import CheckpointError
from ..training.arguments import TrainingError
from ..training.checkpoints import CheckpointWriteError
from ..training.guard import NonFiniteError

ERRORS = (
    *(CheckpointError, CheckpointWriteError, DataError, HubError, NonFiniteError, NonFiniteScoreError),
    *(RecipeError, TrainingError),
)
CHATTY = ("accelerate", "httpx", "httpx2")  # libraries of whose log only warnings are shown


def argument_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """A parser of the options of a subcommand that has no recipe; `text` describes it."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(prog=f"tcl-hf {name}", description=text, formatter_class=formatter)


Main = Callable[[Sequence[str] | None], None]


def command(main: Main) -> Callable[..., None]:
    """Make `main(argv=None)` a command: it logs to stderr, and an error of its input is one sentence there.

    The exit code of such an error is 1. Other exceptions pass, among them `Preempted` with its own exit code.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            main(argv)
        except ERRORS as error:
            sys.exit(f"error: {' '.join(str(error).split())}")  # Those of transformers may have several lines.

    return run
