"""Keep the pairs of a data set whose image and text belong together: `tcl-hf filter SOURCE --output FOLDER`.

Each pair gets its similarity and, from a model that matches, the probability that it matches. Pairs are kept by
thresholds, or the best share of all is. A run that was interrupted goes on where it was.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from accelerate import Accelerator

from ..search.filtering import SCORES, FilterPlan, PairFilter
from ..search.pair_files import FORMATS
from ..search.ranking import SearchModel, default_model
from .command_line import argument_parser, command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("filter", __doc__)
    parser.add_argument("source", help="a source of pairs, as --data of pretrain takes it")
    parser.add_argument("--output", required=True, help="folder for the files of pairs that are kept")
    parser.add_argument("--model", help="checkpoint; the newest of the demo if not given")
    parser.add_argument("--split", default="train", help="split of the source")
    parser.add_argument("--min_similarity", type=float, help="lowest cosine similarity of a pair that is kept")
    parser.add_argument("--min_matching", type=float, help="lowest probability that a pair matches")
    parser.add_argument("--keep_share", type=float, help="share of the pairs to keep, the best ones, such as 0.3")
    parser.add_argument("--by", choices=SCORES, default="similarity", help="score by which the best are chosen")
    parser.add_argument("--format", choices=FORMATS, default="tar", help="kind of the files")
    parser.add_argument("--records_per_file", type=int, default=10_000, help="records of the source for each file")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a forward")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Filter a source, and print how many pairs were kept."""
    args = parser().parse_args(argv)
    names = ("source", "split", "min_similarity", "min_matching", "keep_share", "by", "format", "records_per_file")
    plan = FilterPlan(**{name: getattr(args, name) for name in names})
    model = SearchModel(args.model or default_model(), device=Accelerator().device)
    result = PairFilter(plan, args.output, model, args.batch_size).run()
    if args.json:
        print(json.dumps(asdict(result), indent=2))
        return
    skipped = f"; {result.skipped:,} records cannot be used (see skipped.jsonl)" if result.skipped else ""
    print(
        f"{result.kept_pairs:,} of {result.pairs:,} pairs were kept, in {result.kept_records:,} of {result.records:,} "
        f"records and {result.files:,} files in {args.output}{skipped}"
    )
