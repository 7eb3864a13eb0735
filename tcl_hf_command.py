"""The command `tcl-hf`: it finds the subcommand that is named, and runs it.

A subcommand is a module of `tcl_hf.cli` with a function `main(argv)`. This module stands beside the package, because to
import the package takes seconds: it registers TCL with the Auto classes, and so loads torch and transformers. Lists and
the version appear at once.
"""

import difflib
import importlib
import itertools
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

RECIPES = Path(__file__).parent / "tcl_hf" / "recipes"

SUBCOMMANDS = {
    "demo": "train on embedded pictures from embedded encoders, in minutes",
    "pretrain": "pre-train on images with captions",
    "finetune": "fine-tune a checkpoint for a task",
    "evaluate": "evaluate a checkpoint on a task",
    "index": "index pictures, so that they can be searched",
    "search": "search an index of pictures by text or picture",
    "filter": "keep the pairs of a data set whose image and text belong together",
    "data": "look at data: what was recognised, what would be skipped, and samples",
    "recipes": "list the recipes of the package, or print one",
    "plan": "memory, disk and time of a pre-training run, before it starts",
    "convert": "convert a checkpoint of the original code, or back",
    "app": "search, look and ask in a browser",
    "serve": "answer over HTTP: embeddings, matching, search, grounding, answers",
    "push": "share a model or a run on the Hub",
    "completion": "print a script that completes commands and options in your shell",
}


def usage() -> str:
    """The text of `tcl-hf --help`."""
    width = max(map(len, SUBCOMMANDS)) + 2
    lines = [f"  {name:{width}}{text}" for name, text in SUBCOMMANDS.items()]
    return (
        "usage: tcl-hf COMMAND [--name value ...]\n\nTCL for Hugging Face: vision-language pre-training with triple "
        "contrastive learning.\n\n" + "\n".join(lines) + "\n\n`tcl-hf COMMAND --help` lists the options of a command. "
        "In several processes: `accelerate launch -m tcl_hf COMMAND ...`."
    )


def recipe_summary(file: Path) -> str:
    """The first sentence of the comment at the top of a recipe."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text("utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines).split(". ")[0].rstrip(".")


def recipe_list() -> str:
    """The text of `tcl-hf recipes`: a line about each recipe of the package."""
    files = sorted(RECIPES.glob("*.yaml"), key=lambda file: file.stem)
    width = max(len(file.stem) for file in files) + 2
    return "\n".join(f"{file.stem:{width}}{recipe_summary(file)}" for file in files)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that a command line names; that of the process if `argv` is None.

    An unknown one is refused with exit code 2, as by argparse.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    name = given[0] if given else "--help"
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name in ("--version", "-V"):
        print(f"tcl-hf {version('tcl_hf')}")
    elif given == ["recipes"]:
        print(recipe_list())
    elif name not in SUBCOMMANDS:
        close = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        meant = f" (did you mean '{close[0]}'?)" if close else ""
        print(f"error: There is no command '{name}'{meant}: `tcl-hf --help` lists them.", file=sys.stderr)
        sys.exit(2)
    else:
        importlib.import_module(f"tcl_hf.cli.{name}").main(given[1:])
