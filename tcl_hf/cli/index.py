"""Index pictures, so that they can be searched: `tcl-hf index FOLDER`.

The index follows a folder: run the same command again, and new, changed, moved and deleted files are taken over, while
the others are not read. A source of pairs (tars, parquet, a list, a data set on the Hub) is added. A run that was
interrupted goes on where it was. Without a source, it prints facts of the index.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from accelerate import Accelerator

from ..search.index import MAX_STATES_BYTES, ImageIndex
from ..search.indexing import Changes
from ..search.pictures import is_picture_folder
from ..search.ranking import default_model
from ..search.storage import DEFAULT_INDEX, is_index
from .command_line import argument_parser, command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("index", __doc__)
    parser.add_argument("source", nargs="*", help="folder of pictures, or a source as --data of pretrain takes it")
    parser.add_argument(
        "--index", default=DEFAULT_INDEX, help="folder or address of the index; made if it is not there"
    )
    parser.add_argument("--model", help="checkpoint; that of the index or else the newest of the demo if not given")
    parser.add_argument("--split", default="train", help="split of a source of pairs")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a forward")
    parser.add_argument("--num_workers", type=int, help="threads that decode; as many as cores, up to 8, if not given")
    parser.add_argument(
        *("--max_states_bytes", "--max-states-bytes"),
        type=int,
        default=MAX_STATES_BYTES,
        help="of a new index: bytes of encoded pictures to keep, which make re-ranking fast; 0 for none",
    )
    parser.add_argument("--remove", metavar="FOLDER", help="remove the pictures of a folder from the index")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Bring pictures into an index, and print what has changed."""
    args = parser().parse_args(argv)
    accelerator = Accelerator()  # so that several processes know each other
    options = {"device": accelerator.device, "max_states_bytes": args.max_states_bytes}
    index = open_index(args.index, args.model, is_filled=bool(args.source), **options)
    if args.remove is not None and accelerator.is_main_process:
        number = index.remove(folder=args.remove)
        print(f"{number:,} pictures of {args.remove} were removed")
    changes: dict[str, Changes] = {}
    for source in args.source:
        options = {"batch_size": args.batch_size, "num_workers": args.num_workers}
        if is_picture_folder(source):
            changes[source] = index.sync(source, **options)
        else:
            changes[source] = index.add(source, args.split, **options)
    if not accelerator.is_main_process:
        return
    stats = index.stats()
    if args.json:
        print(json.dumps({"changes": {name: asdict(one) for name, one in changes.items()}, **asdict(stats)}, indent=2))
        return
    for name, one in changes.items():
        print(f"{name}: {one}")
    size = "" if stats.bytes is None else f", {stats.bytes / 1e6:,.0f} MB"
    print(f"{args.index}: {stats.rows:,} pictures, {stats.search} search, model {stats.model}{size}")


def open_index(
    place: str,
    model: str | None,
    device: torch.device,
    is_filled: bool,
    max_states_bytes: int = MAX_STATES_BYTES,
) -> ImageIndex:
    """The index at a place.

    Args:
        place: its folder or address.
        model: checkpoint; that of the index, or for a new one the newest of the demo, if None.
        device: device to compute on.
        is_filled: whether pictures will be brought into it, so that it is made if it is not there.
        max_states_bytes: bytes of states that a new one keeps.
    """
    if is_index(place) or not is_filled:
        return ImageIndex.open(place, model, device=device)
    return ImageIndex.create(place, model or default_model(), device=device, max_states_bytes=max_states_bytes)
