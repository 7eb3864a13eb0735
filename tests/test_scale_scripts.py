"""The Slurm script of docs/scale.md requeues a run that was preempted, and resumes it."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT


def slurm_script() -> str:
    (script,) = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs" / "scale.md").read_text(), flags=re.DOTALL
    )
    return script


def run_job(folder: Path, status: int) -> tuple[int, str]:
    """The exit status of a job whose run ends with a status, and the calls of Slurm's commands."""
    commands = {
        "srun": f'echo "srun $@" >> calls; exit {status}',
        "scontrol": 'if [ "$1" = show ]; then echo first-node; else echo "scontrol $@" >> calls; fi',
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    job = subprocess.run(
        ["bash", "-c", slurm_script()], cwd=folder, env=os.environ | path | {"SLURM_JOB_ID": "7"}, check=False
    )
    return job.returncode, (folder / "calls").read_text()


@pytest.mark.parametrize(("status", "is_requeued"), [(0, False), (1, False), (75, True)])
def test_a_job_is_requeued_if_its_run_was_asked_to_stop(tmp_path, status, is_requeued):
    returned, calls = run_job(tmp_path, status)
    assert returned == status and ("scontrol requeue 7" in calls) == is_requeued
    assert "-m tcl_hf pretrain" in calls and "--resume" not in calls


@pytest.mark.parametrize(
    ("names", "resumes"),
    [
        (["step-00000004.tmp", "step-00000002.removed"], False),
        (["step-00000004.tmp", "step-00000002"], True),
    ],
)
def test_a_job_resumes_where_there_is_a_whole_checkpoint(tmp_path, names, resumes):
    for name in names:
        (tmp_path / "runs" / "cc12m" / "checkpoints" / name).mkdir(parents=True)
    _, calls = run_job(tmp_path, 75)
    assert calls.count("--resume true") == int(resumes)
