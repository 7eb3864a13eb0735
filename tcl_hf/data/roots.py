"""Paths of images start from a folder, and stay in it: `below`."""

import os
import posixpath
import re

# Begins what stands in place of a path that leaves the folder of its images.
OUTSIDE = "outside of image_root: "


def is_remote(path: str) -> bool:
    """Whether a path is an address that fsspec opens, such as `s3://bucket/train.tar`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def below(root: str, path: str, allow_outside_root: bool, start: str | None = None) -> str:
    """The path of an image that starts from a root; one that leaves the root is marked as one that is not opened.

    A list that comes from somebody else could otherwise name any image of this machine. Links below the root are
    followed, because its owner has made them.

    Args:
        allow_outside_root: leave absolute paths and `../` as they are.
        start: the folder in the root from which relative paths start; the root itself if None.
    """
    joined = os.path.join(root if start is None else start, path)
    if allow_outside_root or not (os.path.isabs(path) or ".." in path):
        return joined
    if is_remote(root):
        is_inside = not os.path.isabs(path) and posixpath.normpath(joined).startswith(posixpath.normpath(root) + "/")
        return joined if is_inside else OUTSIDE + path
    is_inside = os.path.abspath(joined).startswith(os.path.abspath(root).rstrip(os.sep) + os.sep)
    return os.path.normpath(joined) if is_inside else OUTSIDE + path
