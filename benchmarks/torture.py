"""End small runs in every way and at bad moments: nothing of them may stay, and a killed run must equal a whole one.

`python benchmarks/torture.py` takes map-style and streamed data, one and two processes, each with two workers.

- Ways out (`--only ways`): a full disk, an exception in a step or in a worker, a process or a worker that is lost,
  SIGINT once and twice, SIGTERM also during an evaluation, `kill -9` of the main process, and workers that hang. It
  prints the exit statuses, and how long it took until all processes of the run were gone.
- Kills (`--only kills`): `kill -9` of all processes at a moment that is chosen in the code, such as between the writing
  of a checkpoint and its renaming, or while a run resumes. The run is then resumed. It prints whether the final weights
  and the log are bit for bit those of a run that was never killed, and whether each sample was read once in an epoch.

A server imports PyTorch and the package once. It forks for each run, so that a run takes seconds.
"""

import argparse
import collections
import contextlib
import gc
import hashlib
import io
import json
import os
import queue
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

NUM_SAMPLES, BATCH, EPOCHS = 48, 4, 2
SEEN = "seen-{}.jsonl"
PREEMPTED = 75  # exit status of a run that was asked to stop
ALLOWED = 10.0  # seconds until all processes of a run have to be gone
KINDS = [(streaming, processes) for streaming in (False, True) for processes in (1, 2)]


@dataclass
class Case:
    """A run of the server.

    Args:
        folder: its output_dir.
        moment: where in the code something happens, a key of `moments`; empty for nowhere.
        occurrence: at which passage of that moment.
        rank: in which process; -1 for all.
        deed: a key of `DEEDS`.
        hang: whether workers hang from their fourth batch on.
    """

    folder: str
    streaming: bool = False
    processes: int = 1
    resume: bool = False
    moment: str = ""
    occurrence: int = 1
    rank: int = 0
    deed: str = ""
    hang: bool = False

    @property
    def kind(self) -> str:
        """The name of its data and number of processes."""
        return f"{'stream' if self.streaming else 'map'}-{self.processes}"


# The runs, in forked processes


def train(case: Case) -> None:
    """Train a tiny model, and record the samples of each step."""
    import torch
    import torch.distributed as dist

    from tcl_hf import TCLConfig, TCLForPreTraining, TCLImageProcessorPil, TCLProcessor
    from tcl_hf.data.collators import TCLPreTrainingCollator
    from tcl_hf.data.pairs import load_pairs
    from tcl_hf.data.tokenizer import train_tokenizer
    from tcl_hf.evaluation.shares import gather_results, in_batches, process_share
    from tcl_hf.training.arguments import TCLTrainingArguments
    from tcl_hf.training.log import MetricsLog
    from tcl_hf.training.loop import TrainingRun

    folder = Path(case.folder)
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([f"word{i}" for i in range(NUM_SAMPLES)], vocab_size=300)
    processor = TCLProcessor(TCLImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(int(case.resume))  # a resumed run starts from other weights, which the checkpoint must replace
    config = TCLConfig(
        vision_config=small | {"image_size": 32, "patch_size": 8},
        text_config=small | {"fusion_layer": 1, "vocab_size": len(tokenizer)},
        projection_dim=16,
        queue_size=64,
    )
    model = TCLForPreTraining(config)
    last: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: last.append(kwargs["image_ids"].tolist()), with_kwargs=True)
    write = MetricsLog.write

    def write_and_record(self, line):
        if "loss" in line:
            rank = dist.get_rank() if dist.is_initialized() else 0
            with (folder / SEEN.format(rank)).open("a") as file:
                file.write(json.dumps({"step": line["step"], "ids": last[-1]}) + "\n")
        write(self, line)

    MetricsLog.write = write_and_record
    collator = TCLPreTrainingCollator(processor, with_image_ids=True)
    if case.hang or case.moment == "collate":
        collator = Collate(collator, case.hang)

    def evaluate(model) -> dict[str, float]:
        values = []
        for rows in in_batches(process_share(8), 1):
            evaluation_batch()
            time.sleep(0.02)
            values += [float(sum(weight.double().sum() for weight in model.parameters())) for _ in rows]
        return {"weights": sum(gather_results(values, 8))}

    args = TCLTrainingArguments(
        output_dir=str(folder),
        max_steps=EPOCHS * NUM_SAMPLES // BATCH // case.processes,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=3,
        dataloader_num_workers=2,
        logging_steps=1,
        eval_steps=5,
        save_steps=3,
        resume=case.resume,
    )
    pairs = load_pairs(str(folder.parent / "data"), streaming=case.streaming)
    TrainingRun(model, pairs, collator, processor, args, evaluate).train()


def evaluation_batch() -> None:
    """Stands for a batch of an evaluation, so that something can happen there."""


def collated() -> None:
    """Stands for a batch in a worker, so that something can happen there."""


class Collate:
    """A collator whose workers may hang from their fourth batch on."""

    def __init__(self, collator: Any, hang: bool):
        self.collator, self.hang, self.number = collator, hang, 0

    def for_run(self, skipped: Any) -> "Collate":
        """The same for a run."""
        return Collate(self.collator.for_run(skipped), self.hang)

    def __call__(self, records: list[dict]) -> Any:
        """Make a batch."""
        self.number += 1
        while self.hang and self.number > 3:
            time.sleep(1)
        collated()
        return self.collator(records)


def moments() -> dict[str, tuple[Any, str, bool]]:
    """Places in the code: an object, its function, and whether the moment is after it or before it."""
    import multiprocessing.process

    from tcl_hf.models import encoders
    from tcl_hf.training import checkpoints, engine, log, loop, ownership

    return {
        "worker start": (multiprocessing.process.BaseProcess, "start", True),
        "lock": (ownership.FolderLock, "take", True),
        "step": (loop.TrainingRun, "step", False),
        "collate": (sys.modules[__name__], "collated", False),
        "evaluation": (sys.modules[__name__], "evaluation_batch", False),
        "evaluated": (loop.TrainingRun, "evaluate", True),
        "before saving": (loop.TrainingRun, "save_checkpoint", False),
        "states written": (checkpoints.Accelerator, "save_state", True),
        "before renaming": (checkpoints.Path, "rename", False),
        "after renaming": (checkpoints.Path, "rename", True),
        "before rotation": (checkpoints, "_remove_in_background", False),
        "after rotation": (checkpoints, "_remove_in_background", True),
        "before loading": (engine.Engine, "load_state", False),
        "after loading": (engine.Engine, "load_state", True),
        "before the log": (log.MetricsLog, "__init__", False),
        "after the log": (log.MetricsLog, "__init__", True),
        "weights written": (encoders, "write_checksums", False),
        "model saved": (engine.Engine, "save_model", True),
    }


def _kill_all() -> None:
    os.killpg(0, signal.SIGKILL)


def _raise() -> None:
    raise RuntimeError("an exception that nobody expects")


def _fill_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


def _interrupt_twice() -> None:
    me = os.getpid()
    if os.fork() == 0:  # in another process, because the first one is busy with ending
        for wait in (0.0, 0.3):
            time.sleep(wait)
            os.kill(me, signal.SIGINT)
        os._exit(0)
    time.sleep(60)


DEEDS: dict[str, Callable[[], None]] = {
    "kill all": _kill_all,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "full disk": _fill_disk,
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGINT twice": _interrupt_twice,
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def arrange(case: Case, rank: int) -> None:
    """Let the deed of a case happen at its moment."""
    if not case.moment or case.rank not in (-1, rank):
        return
    place, name, is_after = moments()[case.moment]
    function, passages = getattr(place, name), 0

    def passing(*args: Any, **kwargs: Any) -> Any:
        nonlocal passages
        passages += 1
        is_now = passages == case.occurrence
        if is_now and not is_after:
            DEEDS[case.deed]()
        result = function(*args, **kwargs)
        if is_now and is_after:
            DEEDS[case.deed]()
        return result

    setattr(place, name, passing)


# The server


def serve() -> tuple[Case, int]:
    """Fork the processes of each case that comes on stdin; returns only in them, with the case and the rank."""
    import tcl_hf.recipes.train  # noqa: F401 (all that a run needs)

    gc.collect()
    gc.freeze()  # so that a collection does not copy the memory that forked processes share
    print("{}", flush=True)
    for line in sys.stdin:
        case = Case(**json.loads(line))
        reading, writing = os.pipe()
        if os.fork() == 0:  # the parent of the run's processes, in a session of its own, by which they are found
            os.setsid()
            variables = _variables(case.processes)
            children: list[int] = []
            for rank in range(case.processes):
                child = os.fork()
                if child == 0:
                    os.setpgid(0, children[0] if children else 0)
                    os.close(reading)
                    os.close(writing)
                    _become(case, rank, variables)
                    return case, rank
                with contextlib.suppress(OSError):  # It may have done so itself.
                    os.setpgid(child, children[0] if children else child)
                children.append(child)
            _report(writing, {"session": os.getpid(), "pids": children})
            for _ in children:
                pid, status = os.wait()
                _report(writing, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})
            os._exit(0)
        os.close(writing)
        with open(reading) as reports:
            for report in reports:
                print(report, end="", flush=True)
        os.wait()
        print("{}", flush=True)
    sys.exit()


def _report(descriptor: int, content: dict[str, Any]) -> None:
    os.write(descriptor, (json.dumps(content) + "\n").encode())


def _variables(processes: int) -> dict[str, str]:
    if processes == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def _become(case: Case, rank: int, variables: dict[str, str]) -> None:
    """Make a forked process one of a run, with a log of its own."""
    os.environ |= variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if variables else {})
    log = os.open(f"{case.folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    os.close(nothing)
    os.close(log)
    arrange(case, rank)


# The tests, in the process that was started


@dataclass
class Outcome:
    """The exit codes of a run's processes by rank, and the seconds from the first exit until none of them was left."""

    codes: list[int]
    gone_after: float
    left: list[str] = field(default_factory=list)


class Server:
    """Runs cases in processes that are forked from one that has imported everything.

    Args:
        allowed: seconds until all processes of a run have to be gone.
    """

    def __init__(self, allowed: float = ALLOWED) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.allowed = allowed
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._report()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def _report(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next report of the server; None if it does not come in time."""
        with contextlib.suppress(queue.Empty):
            return json.loads(self.lines.get(timeout=seconds))
        return None

    def run(self, case: Case, send: Callable[[list[int]], None] | None = None) -> Outcome:
        """Run a case to its end.

        Args:
            send: called with the process ids after the run has begun to train, to send signals.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(case)) + "\n")
        self.process.stdin.flush()
        started: Any = self._report()
        session, begun = started["session"], 0.0
        if send is not None:
            _wait_for(lambda: steps_done(Path(case.folder)) >= 3, 120)
            time.sleep(1)
            send(started["pids"])
            begun = time.monotonic()
        codes: dict[int, int] = {}
        left: list[str] = []
        while len(codes) < case.processes:
            report = self._report(self.allowed if begun else 300)
            if report is None:
                left = _kill(session)
                report = self._report()
            assert report is not None
            codes[report["pid"]] = report["code"]
            begun = begun or time.monotonic()
        _wait_for(lambda: not processes_of(session), self.allowed - (time.monotonic() - begun))
        gone_after = time.monotonic() - begun
        left += _kill(session)
        self._report()
        return Outcome([codes[pid] for pid in started["pids"]], gone_after, left)


def _kill(session: int) -> list[str]:
    """Kill the processes of a session but the one that leads it; return what they were."""
    found = processes_of(session)
    for pid, _ in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid} {name}" for pid, name in found]


def _wait_for(is_so: Callable[[], bool], seconds: float) -> bool:
    """Whether something is so within this time."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def processes_of(session: int) -> list[tuple[int, str]]:
    """The processes of a session that have not ended, but the one that leads it: their ids and names."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_led = process.pid != session and os.getsid(process.pid) == session
            if is_led and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, process.name()))
    return found


def write_data(folder: Path) -> None:
    """Six parquet files of random pictures with a word each."""
    import datasets
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(6):
        rows = []
        for number in range(shard, NUM_SAMPLES, 6):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "caption": f"word{number}"})
            rows[-1]["image_id"] = str(number)
        features = datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string"), "image_id": datasets.Value("string")}
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{shard}.parquet")


def lines_of(file: Path) -> list[dict]:
    """The lines of a file of JSON, without one that was cut off by a kill."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def steps_done(folder: Path) -> int:
    """The step of the last line of the log."""
    return max((line["step"] for line in lines_of(folder / "metrics.jsonl")), default=0)


def can_resume(folder: Path) -> bool:
    """Whether there is a checkpoint. If not, the folder is emptied for a run from the start."""
    if any((folder / "checkpoints").glob("step-????????")):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return False


def result_of(folder: Path) -> tuple[str, list[dict]]:
    """The checksum of the saved weights, and the logged lines without their speed."""
    lines = [
        {name: value for name, value in line.items() if name != "pairs_per_second"}
        for line in lines_of(folder / "metrics.jsonl")
    ]
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), lines


def each_once(folder: Path, processes: int) -> bool:
    """Whether each sample was read once in each epoch, counting for each step the last run that took it."""
    steps = {
        (rank, line["step"]): line["ids"]
        for rank in range(processes)
        for line in lines_of(folder / SEEN.format(rank))
        if "ids" in line
    }
    per_epoch = NUM_SAMPLES // BATCH // processes
    epochs: list[collections.Counter] = [collections.Counter() for _ in range(EPOCHS)]
    for (_, step), ids in steps.items():
        epochs[(step - 1) // per_epoch].update(ids)
    return all(set(epoch.values()) == {1} and len(epoch) == NUM_SAMPLES for epoch in epochs)


ERROR, KILLED, INTERRUPTED = 1, -signal.SIGKILL, -signal.SIGINT
Send = Callable[[list[int]], None]


@dataclass
class Way:
    """A way to end a run.

    Args:
        options: of its case.
        codes: the right exit code of the first process and of the other one.
        says: words that the log of the run must contain.
        send: sends signals to its processes.
    """

    name: str
    options: dict[str, Any]
    codes: tuple[int, int]
    says: str
    send: Send | None = None
    least_processes: int = 1


def _send(number: int, ranks: slice = slice(None), times: int = 1) -> Send:
    def send(pids: list[int]) -> None:
        for turn in range(times):
            time.sleep(0.3 * turn)
            for pid in pids[ranks]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    return send


def _at(moment: str, occurrence: int, deed: str, rank: int = 0) -> dict[str, Any]:
    return {"moment": moment, "occurrence": occurrence, "deed": deed, "rank": rank}


FIRST, HANG = slice(1), {"hang": True}
WAYS = [
    Way("full disk", _at("before saving", 2, "full disk", -1), (ERROR, ERROR), "File too large"),
    Way("exception in a step", _at("step", 5, "raise"), (ERROR, ERROR), "an exception that nobody expects"),
    Way("exception in a worker", _at("collate", 4, "raise"), (ERROR, ERROR), "an exception that nobody expects"),
    Way("a worker is lost", _at("collate", 4, "kill"), (ERROR, ERROR), "A worker of the loader died"),
    Way("SIGINT in a step", _at("step", 5, "SIGINT"), (INTERRUPTED, ERROR), "KeyboardInterrupt"),
    Way("SIGINT twice", _at("step", 5, "SIGINT twice"), (INTERRUPTED, ERROR), "KeyboardInterrupt"),
    Way("SIGINT while workers start", _at("worker start", 1, "SIGINT"), (INTERRUPTED, ERROR), "KeyboardInterrupt"),
    Way("SIGTERM in a step", _at("step", 5, "SIGTERM"), (PREEMPTED, PREEMPTED), "step-00000005 is saved"),
    Way("SIGTERM in an evaluation", _at("evaluation", 2, "SIGTERM"), (PREEMPTED, PREEMPTED), "step-00000005 is saved"),
    Way("kill -9 of the first process", _at("step", 5, "kill"), (KILLED, ERROR), ""),
    Way("kill -9 of the other process", _at("step", 5, "kill", 1), (ERROR, KILLED), "", None, 2),
    Way("SIGINT, workers hang", HANG, (INTERRUPTED, INTERRUPTED), "KeyboardInterrupt", _send(signal.SIGINT)),
    Way("SIGINT twice, workers hang", HANG, (INTERRUPTED, INTERRUPTED), "", _send(signal.SIGINT, times=2)),
    Way("kill -9, workers hang", HANG, (KILLED, KILLED), "", _send(signal.SIGKILL)),
    Way("SIGINT to the first, workers hang", HANG, (INTERRUPTED, ERROR), "", _send(signal.SIGINT, FIRST)),
]


def try_ways(server: Server, root: Path) -> bool:
    """End runs in every way; return whether nothing stayed and all statuses are right."""
    good = True
    for streaming, processes in KINDS:
        for way in WAYS:
            if way.least_processes <= processes:
                good = try_way(server, root, way, streaming, processes) and good
    return good


def try_way(server: Server, root: Path, way: Way, streaming: bool, processes: int) -> bool:
    """End a run in a way; return whether nothing stayed and the statuses are right."""
    folder = root / "ended"
    log = root / "ended.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    folder.mkdir()
    case = Case(str(folder), streaming, processes, **way.options)
    outcome = server.run(case, way.send)
    expected = list(way.codes[:processes])
    is_right = outcome.codes == expected and way.says in log.read_text()
    if not is_right:
        shutil.copy(log, root / f"{case.kind} {way.name}.log")
    print(
        f"{case.kind}: {way.name}: status {outcome.codes}{'' if is_right else f' NOT {expected}'}, gone after "
        f"{outcome.gone_after:.1f} s{f', LEFT {outcome.left}' if outcome.left else ''}",
        flush=True,
    )
    return is_right and not outcome.left


# Each entry is a list of kills, one run after the other, and then the run is resumed to its end.
KILLS: list[list[tuple[str, int]]] = [
    [("worker start", 1)],
    [("lock", 1), ("step", 4)],
    [("evaluation", 2)],
    [("states written", 2), ("before loading", 1)],
    [("before renaming", 2), ("after loading", 1)],
    [("after renaming", 2), ("before the log", 1), ("before the log", 1)],
    [("before rotation", 1), ("after the log", 1)],
    [("after rotation", 1)],
    [("evaluated", 1)],
    [("weights written", 1)],
    [("model saved", 1)],
]


def try_kills(server: Server, root: Path) -> bool:
    """Kill runs at bad moments and resume them; return whether they equal whole ones."""
    good, number = True, 0
    for streaming, processes in KINDS:
        whole = root / f"whole-{'stream' if streaming else 'map'}-{processes}"
        whole.mkdir()
        first = Case(str(whole), streaming, processes)
        outcome = server.run(first)
        if any(outcome.codes):
            sys.exit(f"{whole} failed: see {whole}.log")
        expected = result_of(whole)
        for kills in KILLS:
            folder = root / f"killed-{first.kind}-{number}"
            folder.mkdir()
            names, codes = [], []
            for moment, occurrence in kills:
                case = Case(str(folder), streaming, processes, can_resume(folder), moment, occurrence, 0, "kill all")
                codes += server.run(case).codes
                names.append(moment)
                number += 1
            codes_at_end = server.run(Case(str(folder), streaming, processes, can_resume(folder))).codes
            was_killed = set(codes) == {KILLED}
            same = not any(codes_at_end) and result_of(folder) == expected
            once = each_once(folder, processes)
            good = good and was_killed and same and once
            killed = "killed" if was_killed else f"NOT KILLED {codes}"
            print(
                f"{first.kind}: {killed} at {', then at '.join(names)}: "
                f"{'same' if same else f'NOT THE SAME {codes_at_end}'} weights and log, each sample once {once}",
                flush=True,
            )
            if same:
                shutil.rmtree(folder)
    print(f"{number} kills")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ways", "kills"])
    parser.add_argument("--allowed", type=float, default=ALLOWED, help="seconds until all processes have to be gone")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    write_data(root / "data")
    with Server(args.allowed) as server:
        good = args.only == "kills" or try_ways(server, root)
        good = (args.only == "ways" or try_kills(server, root)) and good
    print("nothing stays, and killed runs are as if never killed" if good else f"NOT RIGHT: see {root}")
    sys.exit(not good)


if __name__ == "__main__":
    if "--server" in sys.argv:
        train(serve()[0])  # here, so that a run ends as a program does
    else:
        main()
