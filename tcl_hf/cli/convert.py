"""Convert a checkpoint of the original code: `tcl-hf convert SOURCE FOLDER`, and back."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..models.image_processing_tcl import TCLImageProcessorPil
from ..models.processing_tcl import TCLProcessor
from ..models.tokenization_tcl import TCLTokenizer
from ..sharing.cards import plain_card
from ..sharing.convert import ALBEF, check_conversion, convert, write_original
from ..sharing.original_files import CheckpointError
from .command_line import argument_parser, command

DEFAULT_TOKENIZER = "google-bert/bert-base-uncased"


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("convert", __doc__)
    parser.add_argument("source", help="a .pth or .safetensors of TCL or ALBEF; with --to-original, a folder of ours")
    parser.add_argument("target", help="the folder to write; with --to-original, the .pth")
    parser.add_argument("--to-original", action="store_true", help="write a .pth with the original's names")
    parser.add_argument("--albef", action="store_true", help="set ALBEF's objectives; the file does not show them")
    parser.add_argument("--vision-heads", type=int, help="attention heads of the vision encoder; by default 64 wide")
    parser.add_argument("--text-heads", type=int, help="attention heads of the text encoder; by default 64 wide")
    parser.add_argument(
        "--tokenizer",
        default=DEFAULT_TOKENIZER,
        help="BERT tokenizer to save with the model: a vocab.txt, a folder or a name on the Hub (downloaded if it is "
        "not in the cache), or 'none'",
    )
    parser.add_argument("--check", action="store_true", help="compare every tensor, and run the result on random data")
    parser.add_argument("--verbose", action="store_true", help="list every tensor")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Convert a file to a folder, or back, and print what became of its tensors."""
    args = parser().parse_args(argv)
    if args.to_original:
        print(f"{args.target}: {write_original(args.source, args.target)} tensors")
        return
    heads = {"vision_heads": args.vision_heads, "text_heads": args.text_heads}
    processor = partial(open_processor, args.tokenizer)  # which may look for it on the Hub
    report = convert(args.source, args.target, processor, **heads, **(ALBEF if args.albef else {}))
    origin = f"It was converted from {Path(args.source).name} of the original code."
    plain_card(Path(args.target).resolve().name, report.model_class, None, origin).write(Path(args.target))
    if args.verbose:
        for fate, tensors in (("used", report.used), ("dropped", report.dropped), ("filled", report.filled)):
            for name, reason in tensors.items():
                print(f"{fate}\t{name}\t{reason}")
    print(report)
    if args.check:
        for name, value in check_conversion(args.source, args.target).items():
            print(f"{name}: {value:g}" if name != "tensors" else f"checked: {value} tensors are equal, bit for bit")
    print(f"Written to {args.target}")


def open_processor(name: str) -> TCLProcessor | None:
    if name == "none":
        return None
    try:
        tokenizer = TCLTokenizer(name) if name.endswith(".txt") else TCLTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raise plain exceptions
        raise CheckpointError(
            f"The tokenizer {name} cannot be opened: name a vocab.txt or a folder with --tokenizer, or 'none'."
        ) from error
    return TCLProcessor(TCLImageProcessorPil(), tokenizer)
