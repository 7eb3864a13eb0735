"""Share a model or a run on the Hub: `tcl-hf push FOLDER user/name`."""

import argparse
from collections.abc import Sequence

from ..sharing.hub import push
from .command_line import argument_parser, command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("push", __doc__)
    parser.add_argument("folder", help="folder of a model or a run")
    parser.add_argument("repo_id", help="user/name; created if it does not exist")
    parser.add_argument("--training-state", action="store_true", help="include teacher, queues and newest checkpoint")
    parser.add_argument("--with-code", action="store_true", help="include the code, to open it without tcl_hf")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch; created if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--commit-message", help="title of the commit; made from the folder's name if not given")
    parser.add_argument("--max-shard-size", default="5GB", help="limit of the size of a file of weights")
    parser.add_argument("--base-model", help="for LoRA adapters: the repository of the model that they belong to")
    parser.add_argument("--token", help="token; the one saved by `hf auth login` if not given")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Push a folder, and print the address of the commit."""
    commit = push(**vars(parser().parse_args(argv)))
    print(commit.pr_url or commit.commit_url)
