"""Search, look and ask in a browser: `tcl-hf app [FOLDER]`.

FOLDER has pictures, or is an index that `tcl-hf index` has made. Without it, the app shows the held-out pictures of the
demo, with the demo's model. Each `--model` adds the tabs that its head permits. `--space user/name` shares the app.
"""

import argparse
import logging
from collections.abc import Sequence

from ..recipes.arguments import RecipeError
from .command_line import argument_parser, command
from .serve import check_positive

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("app", __doc__)
    parser.add_argument("folder", nargs="?", help="pictures or an index; the demo's held-out pictures if not given")
    parser.add_argument("--model", nargs="+", default=["runs/openmoji"], help="folders or Hub names of models")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine's")
    parser.add_argument("--port", type=int, help="port to listen at; the first free one from 7860 on if not given")
    parser.add_argument("--device", help="device of the models, such as cuda:1; a GPU if there is one if not given")
    parser.add_argument("--max_image_mb", type=float, default=10, help="size of an uploaded picture's file")
    parser.add_argument("--max_image_megapixels", type=float, default=40, help="pixels of an uploaded picture")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    parser.add_argument("--space", metavar="USER/NAME", help="push the app as a Space of the Hub instead of showing it")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Show the app until it is interrupted, or push it."""
    args = parser().parse_args(argv)
    check_positive(args)
    if args.space is not None:
        from ..app.space import push_space_of

        print(push_space_of(args.space, args.folder, args.model))
        return
    try:
        from ..app.browser import App, create_blocks, launch
    except ImportError as error:
        raise RecipeError(f"The app needs the package '{error.name}': pip install 'tcl_hf[app]'.") from error
    from ..app.heads import Heads
    from ..app.library import Library
    from ..app.limits import Limits

    limits = Limits(image_bytes=int(args.max_image_mb * 2**20), image_pixels=int(args.max_image_megapixels * 1e6))
    heads = Heads(args.model, args.device)
    library = Library(args.folder, heads) if heads.embedders else None
    if library is None and args.folder is not None:
        raise RecipeError(heads.why_absent("embed"))
    blocks = create_blocks(App(heads, library, limits))
    try:
        launch(blocks, args.host, args.port, args.max_image_mb, inbrowser=args.open, prevent_thread_lock=True)
    except OSError as error:
        raise RecipeError(f"--port {args.port}: this cannot be listened at ({error}); choose another.") from error
    print(f"The app is at {blocks.local_url}", flush=True)
    blocks.block_thread()
