"""Serve models over HTTP: `tcl-hf serve --model FOLDER [--index FOLDER]`.

`/embed`, `/match`, `/search`, `/ground`, `/answer` and `/judge` are there as far as the models have heads for them;
`/docs` describes them. Only this machine reaches the service unless `--host` says otherwise.
"""

import argparse
import logging
import os
from collections.abc import Sequence

from ..recipes.arguments import RecipeError
from .command_line import argument_parser, command

logger = logging.getLogger(__name__)

TOKEN = "TCL_SERVE_TOKEN"


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argument_parser("serve", __doc__)
    parser.add_argument("--model", nargs="+", default=["runs/openmoji"], help="folders or Hub names of models")
    parser.add_argument("--index", help="index of pictures for /search, made by `tcl-hf index`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine's")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    parser.add_argument("--token", help=f"bearer token that requests must carry; that of {TOKEN} if not given")
    parser.add_argument("--allow_urls", action="store_true", help="open pictures at addresses of the internet")
    parser.add_argument("--device", help="device of the models, such as cuda:1; a GPU if there is one if not given")
    parser.add_argument("--max_batch_size", type=int, default=32, help="texts or pictures in a batch of the model")
    parser.add_argument("--max_wait_ms", type=float, default=5.0, help="time that a batch waits for others at most")
    parser.add_argument("--max_queue", type=int, default=512, help="texts and pictures that wait; others get 429")
    parser.add_argument("--max_request_mb", type=float, default=32, help="size of a request")
    parser.add_argument("--max_image_mb", type=float, default=10, help="size of a picture's file")
    parser.add_argument("--max_image_megapixels", type=float, default=40, help="pixels of a picture")
    parser.add_argument("--max_images", type=int, default=32, help="pictures of a request")
    parser.add_argument("--max_texts", type=int, default=256, help="texts of a request")
    parser.add_argument("--max_characters", type=int, default=2000, help="characters of a text")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds for a request to arrive, and to be answered"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Listen until SIGTERM, answer what was accepted, and end with 0."""
    args = parser().parse_args(argv)
    try:
        from ..app.limits import Limits
        from ..app.service import Service, create_app
        from ..app.serving import hosts_of, is_loopback, listen, serve
    except ImportError as error:
        raise RecipeError(f"The service needs the package '{error.name}': pip install 'tcl_hf[serve]'.") from error
    from ..app.heads import Heads, open_index

    check_positive(args)
    if args.max_wait_ms < 0:
        raise RecipeError(f"--max_wait_ms must be at least 0, got {args.max_wait_ms:g}.")
    if args.max_queue < max(args.max_texts, args.max_images):
        raise RecipeError(
            f"--max_queue {args.max_queue} is less than --max_texts or --max_images, so that such a request would "
            "always be refused: raise it, or lower those."
        )
    token = args.token or os.environ.get(TOKEN) or None
    if not is_loopback(args.host) and token is None:
        logger.warning(
            "Every machine that reaches %s can use the service; --token or %s restricts it.", args.host, TOKEN
        )
    listener = listen(args.host, args.port)
    limits = Limits(
        request_bytes=int(args.max_request_mb * 2**20),
        image_bytes=int(args.max_image_mb * 2**20),
        image_pixels=int(args.max_image_megapixels * 1e6),
        images=args.max_images,
        texts=args.max_texts,
        characters=args.max_characters,
        queue=args.max_queue,
        seconds=args.timeout,
    )
    heads = Heads(args.model, args.device)
    index = None if args.index is None else open_index(args.index, heads)
    service = Service(heads, index, limits, args.allow_urls, args.max_batch_size, args.max_wait_ms / 1000)
    serve(create_app(service, token, hosts_of(args.host)), listener, args.timeout)


def check_positive(args: argparse.Namespace) -> None:
    """Refuse limits of nothing.

    Raises:
        RecipeError: naming the option.
    """
    for name, value in vars(args).items():
        is_limit = (name.startswith("max_") and name != "max_wait_ms") or name == "timeout"
        if is_limit and value <= 0:
            raise RecipeError(f"--{name} must be above 0, got {value:g}.")
