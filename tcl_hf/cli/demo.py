"""Train on embedded pictures from embedded encoders, and write runs/openmoji: `tcl-hf demo [--name value ...]`."""

import argparse
import sys
from collections.abc import Sequence

from . import pretrain
from .command_line import command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    return pretrain.parser()


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe `openmoji` with the options of `pretrain`."""
    pretrain.main(["--recipe", "openmoji", *(sys.argv[1:] if argv is None else argv)])
