"""Files that are written whole or not at all."""

import os
from pathlib import Path


def replace_file(file: str | os.PathLike, content: str | bytes) -> None:
    """Write a small file whole or not at all: a reader finds the former content or this one, never a part.

    The content is on the disk before it gets the file's name, so that a power failure loses nothing either.

    Raises:
        OSError: if it cannot be written; the file is then as it was.
    """
    file = Path(file)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as written:
            written.write(content.encode("utf-8") if isinstance(content, str) else content)
            written.flush()
            os.fsync(written.fileno())
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
