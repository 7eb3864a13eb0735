"""Freed memory is kept for the next use, which page faults of a separate process show."""

import platform
import resource

import pytest
import torch
from helpers import in_a_process

from tcl_hf.training.allocation import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(25_000_000)  # 100 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def print_faults(how: str) -> None:
    if how == "kept":
        assert keep_freed_memory()
    print(min(faults() for _ in range(6)))  # The first is new memory, and so is another one where the heap was split.


def least_faults(how: str) -> int:
    return int(in_a_process(print_faults, how).stdout)


@glibc
def test_kept_memory_causes_no_page_faults():
    assert least_faults("kept") < 20
    assert least_faults("given back") > 40  # even if pages are of 2 MB


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
