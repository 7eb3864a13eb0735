"""Look at data before you train on it: `tcl-hf data SOURCE`.

It prints what was recognised (columns, splits, sizes, lengths of captions, duplicates), what would be skipped and why,
and draws ten samples. The exit code is 0 if every sample that was looked at can be used, 3 if some would be skipped,
and 1 if the source cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.inspection import SPLITS, inspect
from ..data.pairs import DataError, captions_of, load_pairs, recognised_columns
from ..data.tokenizer import train_tokenizer
from ..models.image_processing_tcl import TCLImageProcessorPil
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from ..models.tokenization_tcl import TCLTokenizer
from ..recipes.report import sample_sheet
from .command_line import argument_parser, command

SOME_SKIPPED = 3  # exit code


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("data", __doc__)
    parser.add_argument("source", nargs="+", help="a source, as --data of pretrain takes it, or several")
    parser.add_argument("--split", default="train", help="the split to look at")
    parser.add_argument("--image_root", help="folder that the paths of images start from")
    parser.add_argument(
        "--allow_outside_root", action="store_true", help="open images that a list names outside of image_root"
    )
    parser.add_argument("--image_column", help="column of the images, if its name is unusual")
    parser.add_argument("--caption_column", help="column of the captions, if its name is unusual")
    parser.add_argument("--tokenizer", help="tokenizer or model to count tokens with; one is trained if not given")
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, help="longest text in training")
    parser.add_argument("--max_samples", type=int, default=2000, help="samples to look at, spread evenly; 0 for all")
    parser.add_argument("--samples", default="samples.png", help="picture of ten samples to write; empty for none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print facts about a source, and draw samples."""
    args = parser().parse_args(argv)
    names = ("image_root", "allow_outside_root", "image_column", "caption_column")
    options = {name: getattr(args, name) for name in names}
    records = load_pairs(args.source, args.split, **options)
    columns = recognised_columns(args.source[0], args.split, options["image_column"], options["caption_column"])
    counts = {args.split: len(records)} | _other_splits(args.source, args.split, options)
    tokenizer = (
        TCLTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else train_tokenizer(captions_of(records))
    )
    found = inspect(records, TCLProcessor(TCLImageProcessorPil(), tokenizer), args.max_samples)
    if args.json:
        facts = {"columns": columns, "splits": counts, **found.to_dict(args.max_tokens)}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print(f"columns: {', '.join(f'{name} from {column!r}' for name, column in columns.items())}")
        print(f"splits: {', '.join(f'{name} {number:,}' for name, number in counts.items())}")
        print("\n".join(found.describe(args.max_tokens)))
    bad = {row for row, _ in found.unusable}
    good = [row for row in found.looked_at if row not in bad]
    if args.samples and good:
        rows = good[:: max(1, len(good) // 10)][:10]
        sample_sheet([records[row] for row in rows], Path(args.samples))
        if not args.json:
            print(f"Ten samples are in {args.samples}")
    if found.unusable:
        sys.exit(SOME_SKIPPED)


def _other_splits(source: list[str], split: str, options: dict) -> dict[str, int]:
    """The number of samples of other splits, for a source that distinguishes them."""
    counts: dict[str, int] = {}
    if all(Path(one).is_file() for one in source):
        return counts
    for name in SPLITS:
        if name != split:
            try:
                counts[name] = len(load_pairs(source, name, **options))
            except DataError:
                continue
    return counts
