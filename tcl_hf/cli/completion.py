"""Print a script for your shell that completes commands and options: `tcl-hf completion bash > FILE`.

To make it takes seconds. Write it to a file once, where your shell looks for completions, such as
~/.local/share/bash-completion/completions/tcl-hf.
"""

import argparse
import importlib
from collections.abc import Sequence

import shtab

from tcl_hf_command import SUBCOMMANDS

from .command_line import argument_parser, command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("completion", __doc__)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="shell that the script is for")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the script for a shell."""
    args = parser().parse_args(argv)
    everything = argparse.ArgumentParser("tcl-hf", add_help=False)
    subcommands = everything.add_subparsers()
    for name, text in SUBCOMMANDS.items():
        module = importlib.import_module(f".{name}", __package__)
        subcommands.add_parser(name, parents=[module.parser()], add_help=False, help=text)
    print(shtab.complete(everything, args.shell))
