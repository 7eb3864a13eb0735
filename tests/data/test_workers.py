"""Workers of a loader are gone when they have to be, whatever they are doing."""

import multiprocessing
import os
import signal
import time

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from tcl_hf.data.streams import StreamLoader
from tcl_hf.data.workers import Workers


class Numbers(Dataset):
    """Process ids of workers; a number that is listed in `hangs` never comes."""

    def __init__(self, hangs: tuple[int, ...] = ()):
        self.hangs = hangs

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> int:
        while number in self.hangs:
            time.sleep(1)
        return os.getpid()


def loader_of(workers: Workers, hangs: tuple[int, ...] = (), persistent: bool = False) -> DataLoader:
    return DataLoader(Numbers(hangs), None, persistent_workers=persistent, **workers.options(2))


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those of the processes that are there after this time."""
    end = time.monotonic() + seconds
    while there := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return there


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_hang_are_killed_at_the_end(persistent):
    before = signal.getsignal(signal.SIGINT)
    with Workers() as workers:
        iterator = workers.iterate(loader_of(workers, (4, 5), persistent))
        pids = {int(next(iterator)) for _ in range(4)}
        assert len(pids) == 2 and os.getpid() not in pids
        began = time.monotonic()
    assert time.monotonic() - began < 6
    assert not multiprocessing.active_children()
    del iterator  # It was there until here, as where a traceback keeps it.
    assert signal.getsignal(signal.SIGINT) == before


def test_workers_that_wait_leave_when_they_are_asked_to():
    with Workers() as workers:
        next(workers.iterate(loader_of(workers)))
        children = multiprocessing.active_children()
        assert len(children) == 2
    assert [child.exitcode for child in children] == [0, 0]


def test_signals_to_the_whole_group_pass_over_workers():
    with Workers() as workers:
        iterator = workers.iterate(loader_of(workers))
        pids = {int(next(iterator)) for _ in range(4)}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            for pid in pids:
                os.kill(pid, number)
        assert {int(pid) for pid in iterator} == pids


def test_a_worker_that_has_not_begun_is_ended_too(monkeypatch):
    """A signal may come while a loader starts its workers, before there is an iterator to shut down."""
    start = multiprocessing.process.BaseProcess.start

    def start_and_fail(process):
        start(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_and_fail)
    with pytest.raises(KeyboardInterrupt), Workers() as workers:
        workers.iterate(loader_of(workers))
    assert not multiprocessing.active_children()


def run_with_workers(writing, hangs: tuple[int, ...]) -> None:
    workers = Workers()
    iterator = workers.iterate(loader_of(workers, hangs))
    writing.send([int(next(iterator)), int(next(iterator))])
    time.sleep(60)


@pytest.mark.parametrize("hangs", [(), tuple(range(2, 40))])
def test_workers_end_with_the_process_that_they_work_for(hangs):
    reading, writing = multiprocessing.Pipe(duplex=False)
    run = multiprocessing.get_context("fork").Process(target=run_with_workers, args=(writing, hangs))
    run.start()
    assert reading.poll(60)
    pids = reading.recv()
    assert len(wait_until_gone(pids, 0)) == 2
    run.kill()
    run.join()
    assert wait_until_gone(pids, 10) == []


def test_no_worker_needs_no_options():
    assert Workers().options(0) == {"num_workers": 0}


def test_a_stream_ends_its_workers(tmp_path):
    import datasets

    stream = datasets.Dataset.from_dict({"image_id": [str(i) for i in range(16)]}).to_iterable_dataset(num_shards=4)
    with Workers() as workers:
        loader = StreamLoader(stream, list, 2, 0, num_workers=2, workers=workers)
        loader.begin(0)
        batches = iter(loader)
        assert next(batches) and len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
