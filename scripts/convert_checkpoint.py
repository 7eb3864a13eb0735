"""Convert a checkpoint of the original code: `python scripts/convert_checkpoint.py SOURCE FOLDER`, and back."""

import argparse
import sys
from pathlib import Path

from tcl_hf import TCLImageProcessorPil, TCLProcessor, TCLTokenizer
from tcl_hf.sharing.cards import plain_card
from tcl_hf.sharing.convert import ALBEF, CheckpointError, check_conversion, convert, write_original

DEFAULT_TOKENIZER = "google-bert/bert-base-uncased"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", help=".pth or .safetensors of TCL or ALBEF; with --to-original a folder of ours")
    parser.add_argument("target", help="folder to write; with --to-original a .pth")
    parser.add_argument("--to-original", action="store_true", help="write a .pth of the original's names")
    parser.add_argument("--albef", action="store_true", help="train on with ALBEF's objectives; the names tell nothing")
    parser.add_argument("--vision-heads", type=int, help="attention heads of the vision encoder; 64 wide if not given")
    parser.add_argument("--text-heads", type=int, help="attention heads of the text encoder; 64 wide if not given")
    parser.add_argument(
        "--tokenizer",
        default=DEFAULT_TOKENIZER,
        help="BERT tokenizer to go with the model: vocab.txt, folder or Hub name (read from the Hub if it is not in "
        "the cache); 'none' for none",
    )
    parser.add_argument("--check", action="store_true", help="compare every tensor and run the result on random inputs")
    parser.add_argument("--verbose", action="store_true", help="list every tensor")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.to_original:
        print(f"{args.target}: {write_original(args.source, args.target)} tensors")
        return
    report = convert(
        args.source,
        args.target,
        processor(args.tokenizer),
        args.vision_heads,
        args.text_heads,
        **(ALBEF if args.albef else {}),
    )
    origin = f"Converted from {Path(args.source).name} of the original code."
    plain_card(Path(args.target).resolve().name, report.model_class, None, origin).write(Path(args.target))
    if args.verbose:
        for what in ("used", "dropped", "filled"):
            for name, reason in getattr(report, what).items():
                print(f"{what}\t{name}\t{reason}")
    print(report)
    if args.check:
        for name, value in check_conversion(args.source, args.target).items():
            print(f"{name}: {value:g}" if name != "tensors" else f"checked: {value} tensors are equal, bit for bit")
    print(f"Written to {args.target}")


def processor(tokenizer: str) -> TCLProcessor | None:
    if tokenizer == "none":
        return None
    try:
        words = TCLTokenizer(tokenizer) if tokenizer.endswith(".txt") else TCLTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # tokenizers raise nothing else
        raise CheckpointError(
            f"The tokenizer {tokenizer} can not be had: name a vocab.txt or folder with --tokenizer, or 'none'."
        ) from error
    return TCLProcessor(TCLImageProcessorPil(), words)


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"error: {error}")
