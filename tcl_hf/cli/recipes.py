"""List the recipes of the package, or print one to start from: `tcl-hf recipes [NAME] [> my.yaml]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tcl_hf_command import recipe_list

from ..recipes.arguments import RecipeError
from ..recipes.parsing import RECIPES, recipe_file, recipe_names
from .command_line import argument_parser, command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("recipes", __doc__)
    parser.add_argument("name", nargs="?", help="name of a recipe, which is printed; all are listed if not given")
    parser.add_argument("--path", action="store_true", help="print the path of the recipe's file instead")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the list of the recipes, or one of them."""
    args = parser().parse_args(argv)
    if args.name is None:
        print("\n".join(str(RECIPES / f"{name}.yaml") for name in recipe_names()) if args.path else recipe_list())
        return
    path: Path = recipe_file(args.name)
    if args.name not in recipe_names():
        raise RecipeError(f"There is no recipe {args.name}: choose one of {', '.join(recipe_names())}.")
    print(path if args.path else path.read_text(encoding="utf-8"), end="\n" if args.path else "")
