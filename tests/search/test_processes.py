"""Indexing in several processes, and indexing that is killed: the index is that of one run that was never stopped."""

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import FORKING, in_two_processes, photo, tiny

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.search import ImageIndex

pytest.importorskip("lancedb", reason="LanceDB is not installed")

KILLS = 20


def write_pictures(folder: Path, number: int) -> None:
    for name in range(number):
        photo(36, 30, seed=name).save(folder / f"{name:03d}.png")


def assert_same_rows(index: Path, other: Path) -> None:
    """All columns are equal, row by row; vectors and states may differ by rounding, because batches are others."""
    tables = []
    for path in (index, other):
        storage = ImageIndex.open(path)._storage
        tables.append(storage.rows(storage.table.schema.names).sort_by("image_id"))
    assert tables[0].drop_columns(["vector", "states"]) == tables[1].drop_columns(["vector", "states"])
    vectors = [np.stack(table["vector"].to_numpy()) for table in tables]
    states = [np.stack([np.frombuffer(one, np.float32) for one in table["states"].to_pylist()]) for table in tables]
    np.testing.assert_allclose(*vectors, atol=1e-6, rtol=0)
    np.testing.assert_allclose(*states, atol=1e-5, rtol=0)


def index_in_a_process(rank: int, index: Path, folder: Path) -> None:
    Accelerator()
    made = ImageIndex.open(index, *tiny(TCLForImageTextRetrieval))
    changes = vars(made.sync(folder, batch_size=4, progress=False))
    assert changes == {"new": 21, "changed": 0, "moved": 0, "deleted": 0, "unchanged": 0, "skipped": 1}, rank
    records = [
        {"image": photo(seed=50 + number), "captions": ["a dog"], "image_id": str(number)} for number in range(5)
    ]
    assert vars(made.add([*records, records[0]], progress=False))["new"] == 5, rank
    if rank == 0:
        (folder / "000.png").rename(folder / "moved.png")
    torch.distributed.barrier()
    assert vars(made.sync(folder, progress=False))["moved"] == 1, rank


@pytest.mark.slow
def test_two_processes_make_the_index_of_one(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder, 21)
    (folder / "bad.jpg").write_text("not a picture")
    ImageIndex.create(tmp_path / "two", *tiny(TCLForImageTextRetrieval))
    in_two_processes(index_in_a_process, tmp_path / "two", folder)
    one = ImageIndex.create(tmp_path / "one", *tiny(TCLForImageTextRetrieval))
    one.sync(folder, progress=False)
    records = [
        {"image": photo(seed=50 + number), "captions": ["a dog"], "image_id": str(number)} for number in range(5)
    ]
    one.add(records, progress=False)
    assert_same_rows(tmp_path / "two", tmp_path / "one")


def sync_slowly(index: Path, folder: Path, started: Path) -> None:
    """Synchronise in commits of few rows, so that a kill can come between any two."""
    import tcl_hf.search.encoding as encoding

    torch.set_num_threads(1)
    encoding.COMMIT_ROWS = 3
    made = ImageIndex.open(index, *tiny(TCLForImageTextRetrieval))
    made._storage.tidy = lambda _: made._storage.table.optimize()  # as after many commits
    started.touch()
    made.sync(folder, batch_size=2, num_workers=1, progress=False)
    (started.parent / f"{started.name}.ended").touch()


@pytest.mark.slow
def test_twenty_kills_and_one_run_make_the_index_of_a_run_never_killed(tmp_path):
    drawn = random.Random(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder, 60)
    index = tmp_path / "killed"
    ImageIndex.create(index, *tiny(TCLForImageTextRetrieval))
    seen, survived = [], 0
    for kill in range(KILLS):
        started = tmp_path / f"started-{kill}"
        process = FORKING.Process(target=sync_slowly, args=(index, folder, started))
        process.start()
        while not started.exists():
            time.sleep(0.01)
            assert process.is_alive()
        time.sleep(drawn.uniform(0, 0.6))
        process.kill()
        process.join()
        survived += started.with_name(f"{started.name}.ended").exists()
        rows = ImageIndex.open(index)._storage.rows(["image_id"])["image_id"].to_pylist()
        assert len(set(rows)) == len(rows)  # nothing twice
        seen.append(set(rows))
        change_some(folder, drawn, kill)
    assert survived < KILLS / 2 and len(seen[-1]) > 10
    killed = ImageIndex.open(index, *tiny(TCLForImageTextRetrieval))
    killed.sync(folder, progress=False)
    whole = ImageIndex.create(tmp_path / "whole", *tiny(TCLForImageTextRetrieval))
    whole.sync(folder, progress=False)
    assert len(whole) == len(list(folder.iterdir()))
    assert_same_rows(index, tmp_path / "whole")


def change_some(folder: Path, drawn: random.Random, number: int) -> None:
    """Move, change, delete, copy and add a picture."""
    files = sorted(folder.iterdir())
    moved, changed, deleted, copied = drawn.sample(files, 4)
    moved.rename(folder / f"moved-{number}.png")
    photo(36, 30, seed=1000 + number).save(changed)
    deleted.unlink()
    shutil.copy(copied, folder / f"copied-{number}.png")
    for new in range(4):
        photo(36, 30, seed=2000 + 10 * number + new).save(folder / f"new-{number}-{new}.png")
