"""A folder belongs to one run at a time, and that of a run that is gone can be taken without help."""

import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import tiny_run

from tcl_hf.training import ownership
from tcl_hf.training.agreement import Agreement
from tcl_hf.training.arguments import TrainingError
from tcl_hf.training.ownership import LOCK, FolderLock, Owner, owned


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every 0.1 s; an owner on another machine is gone after 1 s."""
    monkeypatch.setattr(ownership, "BEAT", 0.1)
    monkeypatch.setattr(ownership, "SILENCE", 1.0)
    monkeypatch.setattr(ownership, "_LOOK", 0.05)


def leave_lock(folder: Path, **changes) -> Path:
    """The lock of this process, with changes."""
    me = FolderLock(folder).me
    content = {"host": me.host, "pid": me.pid, "started": me.started, "since": "yesterday"} | changes
    (folder / LOCK).write_text(json.dumps(content))
    return folder / LOCK


def parent() -> dict:
    """A process that is alive, and is another one."""
    process = psutil.Process(os.getppid())
    return {"pid": process.pid, "started": process.create_time() - psutil.boot_time()}


def is_mine(folder: Path) -> bool:
    return json.loads((folder / LOCK).read_text())["pid"] == os.getpid()


def test_the_second_run_is_refused_and_the_first_one_named(tmp_path):
    lock = leave_lock(tmp_path, **parent())
    host, pid = Owner.present().host, os.getppid()
    with pytest.raises(TrainingError) as refused:
        tiny_run(tmp_path)
    assert str(refused.value) == (
        f"output_dir={tmp_path} belongs to the run of process {pid} on {host} since yesterday: wait for its end, or "
        f"choose another output_dir. If that run is not there any more, remove {lock}."
    )
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]  # Nothing of the first run was touched.


def test_a_run_owns_its_folder_until_its_end(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(is_mine(tmp_path))
        return {"recall": 1.0}

    tiny_run(tmp_path, evaluate=evaluate, max_steps=1)
    assert seen == [True] and not (tmp_path / LOCK).exists()


def test_a_run_that_fails_gives_its_folder_back(tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        tiny_run(tmp_path, records=[])
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, parent() | {"started": 1e6}], ids=["gone", "another process"])
def test_the_folder_of_a_process_that_is_gone_is_taken_at_once(tmp_path, changes):
    leave_lock(tmp_path, **changes)
    with owned(tmp_path, Agreement(), True):
        assert is_mine(tmp_path)


def test_a_process_that_nobody_has_waited_for_is_gone(tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        leave_lock(tmp_path, pid=pid, started=psutil.Process(pid).create_time() - psutil.boot_time())
        with owned(tmp_path, Agreement(), True):
            assert is_mine(tmp_path)
    finally:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1, "started": 0.0, "since": ""}', "", "[1]", "{}"])
def test_an_owner_elsewhere_that_gives_no_sign_is_gone(tmp_path, quick, content):
    (tmp_path / LOCK).write_text(content)
    began = time.monotonic()
    with owned(tmp_path, Agreement(), True):
        assert is_mine(tmp_path) and time.monotonic() - began > 0.8


def test_an_owner_elsewhere_that_gives_signs_is_alive(tmp_path, quick):
    lock, ended = leave_lock(tmp_path, host="elsewhere"), threading.Event()

    def give_signs():
        while not ended.wait(0.1):
            os.utime(lock)

    signs = threading.Thread(target=give_signs)
    signs.start()
    try:
        with pytest.raises(TrainingError, match=r"belongs to the run of process .* on elsewhere since yesterday"):
            FolderLock(tmp_path).take()
    finally:
        ended.set()
        signs.join()
    assert json.loads(lock.read_text())["host"] == "elsewhere"


def test_an_owner_gives_signs_of_life(tmp_path, quick):
    with owned(tmp_path, Agreement(), True):
        os.utime(tmp_path / LOCK, (1, 1))
        end = time.monotonic() + 5
        while (tmp_path / LOCK).stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.05)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime < 60


def test_an_owner_notices_that_its_folder_was_taken(tmp_path, quick):
    lock = FolderLock(tmp_path)
    lock.take()
    leave_lock(tmp_path, host="elsewhere", pid=77)
    end = time.monotonic() + 5
    while lock.successor is None and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(TrainingError, match="was taken over by the run of process 77 on elsewhere"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 77


def test_a_part_of_the_same_run_may_take_the_folder_again(tmp_path):
    with owned(tmp_path, Agreement(), True):
        with owned(tmp_path, Agreement(), True):
            assert is_mine(tmp_path)
        assert is_mine(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_other_processes_of_a_run_leave_the_lock_to_the_first(tmp_path):
    with owned(tmp_path, Agreement(), False):
        assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(TrainingError, match=rf"^output_dir={folder} cannot be written \(.*\): choose another"):
            tiny_run(folder)
    assert (tmp_path / "file").read_text() == "mine"

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(TrainingError, match=r"cannot be written \(Permission denied\)"):
        FolderLock(tmp_path).take()
