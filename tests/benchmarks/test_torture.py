"""A few cases of `benchmarks/torture.py`, which has all of them."""

import pytest
import torture

ALLOWED = 40.0  # seconds; on a machine that runs other tests at the same time, a process takes long to end


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    torture.write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def server():
    with torture.Server(ALLOWED) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "streaming", "processes"),
    [
        ("full disk", False, 1),
        ("exception in a step", True, 2),
        ("SIGTERM in an evaluation", False, 2),
        ("kill -9 of the first process", True, 1),
        ("SIGINT, workers hang", True, 1),
    ],
)
def test_nothing_of_a_run_stays_and_its_status_is_right(server, root, name, streaming, processes, capsys):
    (way,) = [way for way in torture.WAYS if way.name == name]
    assert torture.try_way(server, root, way, streaming, processes), capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_killed_at_bad_moments_equals_a_whole_one(server, root, monkeypatch, capsys):
    monkeypatch.setattr(torture, "KINDS", [(True, 1)])
    monkeypatch.setattr(torture, "KILLS", [[("before renaming", 2), ("before the log", 1)], [("model saved", 1)]])
    assert torture.try_kills(server, root), capsys.readouterr().out
