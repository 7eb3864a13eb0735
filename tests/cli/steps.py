"""Run steps, each in a process of its own that is forked from one which has imported the package: `steps.py FILE`.

FILE is a JSON list of steps, each with `name`, and `words` of the command or `code` in Python, and
perhaps folders to remove before it (`anew`). `results.json` gets the
exit status, the end of the output, and the seconds of each.
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import tcl_hf
import tcl_hf_command
from tcl_hf.cli import convert, data, evaluate, finetune, plan, pretrain, push  # noqa: F401

LONGEST = 240  # seconds of a step


def work(step: dict) -> int:
    """Run a step, and return its exit status."""
    try:
        for folder in step.get("anew", ()):
            shutil.rmtree(folder, ignore_errors=True)
        if "words" in step:
            tcl_hf_command.main(step["words"])
        else:
            exec(compile(step["code"], step["name"], "exec"), {"__name__": "__main__"})
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(step: dict, log: Path) -> dict:
    """Run a step in a process of its own."""
    begun = time.monotonic()
    process = os.fork()
    if not process:
        signal.alarm(LONGEST)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        status = work(step)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(process, 0)
    seconds = round(time.monotonic() - begun, 1)
    output = log.read_text(errors="replace")[-1500:]
    return {"name": step["name"], "status": os.waitstatus_to_exitcode(status), "output": output, "seconds": seconds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    results = []
    for number, step in enumerate(json.loads(file.read_text())):
        results.append(run(step, file.with_name(f"step-{number}.log")))
        everything = {"package": tcl_hf.__file__, "results": results}
        file.with_name("results.json").write_text(json.dumps(everything, indent=1))
