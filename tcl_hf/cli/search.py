"""Search an index of pictures: `tcl-hf search "a dog in the snow"`, `tcl-hf search --image FILE`, or both. With
`--folder`, the pictures of a folder are indexed first.

Candidates come by similarity, and the best of them are ranked anew by how well text and picture match.
"""

import argparse
import json
import os
from collections.abc import Sequence

from accelerate import Accelerator

from ..search.pages import hit_facts, show_page, table, write_page
from ..search.storage import DEFAULT_INDEX, quoted
from .command_line import argument_parser, command
from .index import open_index


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("search", __doc__)
    parser.add_argument("text", nargs="?", help="what the pictures show")
    parser.add_argument("--image", help="picture that the hits resemble")
    parser.add_argument("--folder", help="folder of pictures to bring into the index first, and to search alone")
    parser.add_argument("--index", default=DEFAULT_INDEX, help="folder or address of the index")
    parser.add_argument("--model", help="checkpoint; that of the index if not given")
    parser.add_argument("--k", type=int, default=10, help="number of hits")
    parser.add_argument("--rerank", type=int, default=32, help="candidates to rank anew; 0 for similarity alone")
    parser.add_argument("--where", help="filter in SQL, for example \"caption LIKE '%%dog%%' AND width > 500\"")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--open",
        nargs="?",
        const="search.html",
        metavar="FILE",
        help="write a page (.html) or a sheet (.png), and show it",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the hits, and write them as a page if that is asked for."""
    args = parser().parse_args(argv)
    index = open_index(args.index, args.model, Accelerator().device, is_filled=args.folder is not None)
    where = args.where
    if args.folder is not None:
        changes = index.sync(args.folder)
        if not args.json:
            print(f"{args.folder}: {changes}")
        inside = f"source = {quoted(os.path.abspath(args.folder))}"
        where = f"{inside} AND ({where})" if where else inside
    hits = index.search(args.text, args.image, args.k, args.rerank, where)
    if args.json:
        print(json.dumps([hit_facts(hit) for hit in hits], indent=2, ensure_ascii=False))
    else:
        print(table(hits) if hits else "No picture was found.")
    if args.open is not None:
        write_page(hits, args.text or f"Pictures like {args.image}", args.open)
        if not args.json:
            print(f"The hits are in {args.open}")
        show_page(args.open)
