"""Freed memory is kept for the next use, which page faults of a separate process show."""

import platform
import subprocess
import sys

import pytest

from tcl_hf.training.allocation import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
FAULTS = """
import resource, sys
import torch
from tcl_hf.training.allocation import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(25_000_000)  # 100 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(6)))  # The first is new memory, and so is another one where the heap was split.
"""


def least_faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@glibc
def test_kept_memory_causes_no_page_faults():
    assert least_faults("kept") < 20
    assert least_faults("given back") > 40  # even if pages are of 2 MB


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
