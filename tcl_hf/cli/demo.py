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
    """Run the recipe `openmoji` with the options of `pretrain`; its own folder is replaced without being asked."""
    options = list(sys.argv[1:] if argv is None else argv)
    is_elsewhere = any(option.partition("=")[0] in ("--output_dir", "--output-dir") for option in options)
    own = [] if is_elsewhere else ["--overwrite_output_dir", "true"]
    pretrain.main(["--recipe", "openmoji", *own, *options])
