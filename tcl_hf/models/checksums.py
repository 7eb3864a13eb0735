"""Checksums of weight files: `SHA256SUMS` beside them, as `sha256sum --check` reads it."""

import hashlib
import os
from pathlib import Path

from .whole_files import replace_file

CHECKSUMS = "SHA256SUMS"
_WEIGHTS = "*.safetensors"


def write_checksums(folder: str | os.PathLike) -> None:
    """Write the checksums of a folder's weight files, which others may then read as they may read new files."""
    weights, sums = sorted(Path(folder).glob(_WEIGHTS)), Path(folder) / CHECKSUMS
    replace_file(sums, "".join(f"{checksum(path)}  {path.name}\n" for path in weights))
    for path in weights:
        path.chmod(sums.stat().st_mode)  # safetensors lets only the owner read what it writes


def verify_checksums(folder: str | os.PathLike) -> None:
    """Compare a folder's weight files with their checksums, if it has checksums.

    Safetensors files have none inside: a flipped bit would load as another number.

    Raises:
        OSError: if a file is not the one that was saved.
    """
    sums = Path(folder) / CHECKSUMS
    if not sums.is_file():
        return
    for line in sums.read_text(errors="replace").splitlines():
        expected, _, name = line.strip().partition(" ")
        # Behind the sum and a space stands a second space, or the `*` of `sha256sum -b`.
        path = Path(folder) / os.path.basename(name.removeprefix(" ").removeprefix("*"))
        if path.is_file() and checksum(path) != expected.lower():
            raise OSError(
                f"{path} is not the file that was saved: its checksum differs from {CHECKSUMS}. Download or copy it "
                f"again, or remove {CHECKSUMS} if you changed the weights yourself."
            )


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
