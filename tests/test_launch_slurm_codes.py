"""What launch/slurm.sbatch makes of the codes of its tasks, with stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "slurm.sbatch"
SRUN = """#!/usr/bin/env bash
echo "0: a line of a task"
cat said >&2
exit "$(cat code)"
"""


def ended(place, *said, code, restarts=0, **environment):
    """Runs the script once; its exit code, whether the job is queued again, and its log.

    Args:
      place: the directory that the job was submitted from.
      said: the lines of srun on stderr.
      code: with which srun ends.
    """
    programs = place / "bin"
    if not programs.exists():
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" >> queued\n')):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    (place / "said").write_text("".join(f"{line}\n" for line in said))
    (place / "code").write_text(f"{code}")
    (place / "queued").unlink(missing_ok=True)
    settings = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    if restarts:
        settings["SLURM_RESTART_COUNT"] = f"{restarts}"
    with (place / "log").open("a") as log:
        done = subprocess.run(
            ["bash", str(SCRIPT), "true"], env=os.environ | settings | environment, cwd=place,
            stdout=log, stderr=log, check=False, timeout=20,
        )  # fmt: skip
    again = (place / "queued").exists() and (place / "queued").read_text() == "requeue 7\n"
    return done.returncode, again, (place / "log").read_text()


def exited(task, code, tasks="task"):
    return f"srun: error: n{task + 1}: {tasks} {task}: Exited with exit code {code}"


@pytest.mark.parametrize(
    ("said", "code", "expected", "again"),
    [
        ([exited(1, 2), exited(0, 75)], 75, 2, False),  # a task refuses, the other waits for it
        ([exited(1, 1), "srun: error: n1: task 0: Killed"], 137, 1, False),  # and does not hear TERM
        ([exited(0, 75), exited(1, 75)], 75, 75, True),
        ([exited(0, 75), "srun: error: n2: task 1: Killed"], 137, 75, True),
        (["srun: error: n2: tasks 8-15: Exited with exit code 3", exited(0, 75)], 75, 3, False),
        (["srun: error: n2: task 1: Killed", exited(0, 134)], 137, 137, True),
        (["srun: error: n2: task 1: Out Of Memory", exited(0, 75)], 125, 137, True),
        (["srun: error: n2: task 1: Aborted (core dumped)", exited(0, 75)], 134, 134, True),
        (["srun: error: n2: task 1: Segmentation fault", exited(0, 75)], 139, 139, False),
        (["srun: error: n2: task 1: Terminated", exited(0, 75)], 143, 143, False),
        (["srun: error: Unable to create step for job 7: Invalid node name specified"], 1, 1, False),
        (["0: " + exited(0, 75), "srun: launch/slurm: _step_signal: Terminating", exited(1, 2)], 2, 2, False),
        ([], 0, 0, False),
    ],
)  # fmt: skip
def test_the_task_that_fails_first_decides(tmp_path, said, code, expected, again):
    (tmp_path / "log").write_text(f"{exited(1, 42)}\n")  # of the start before
    got = ended(tmp_path, *said, code=code)
    assert got[:2] == (expected, again), got[2]
    assert "\n".join(["0: a line of a task", *said]) in got[2]


def test_faults_in_a_row_are_counted_and_not_those_between_which_the_run_saved(tmp_path):
    lost, saved = {"code": 134, "JAXTAX_MAX_FAULTS": "2"}, {"code": 75, "JAXTAX_MAX_FAULTS": "2"}
    for restarts, one in enumerate((lost, lost, saved, lost, lost), 30):
        assert ended(tmp_path, restarts=restarts, **one)[:2] == (one["code"], True)
    assert ended(tmp_path, restarts=40, **lost)[:2] == (134, False)
    assert not list(tmp_path.glob("*.faults"))  # whoever queues it again by hand begins anew


def test_a_job_of_the_same_number_does_not_inherit_faults(tmp_path):
    (tmp_path / "jaxtax-7.faults").write_text("long ago\n" * 9)
    assert ended(tmp_path, code=42, JAXTAX_MAX_FAULTS="1")[:2] == (42, True)
    assert ended(tmp_path, code=42, restarts=1, JAXTAX_MAX_FAULTS="1")[:2] == (42, False)


def test_restarts_have_an_end_too(tmp_path):
    assert ended(tmp_path, code=75, restarts=4, JAXTAX_MAX_RESTARTS="5")[:2] == (75, True)
    assert ended(tmp_path, code=75, restarts=5, JAXTAX_MAX_RESTARTS="5")[:2] == (75, False)
    assert ended(tmp_path, code=134, restarts=5, JAXTAX_MAX_RESTARTS="5")[:2] == (134, False)


def test_without_a_log_that_can_be_read_again_the_code_of_srun_counts(tmp_path):
    ended(tmp_path, code=0)
    (tmp_path / "said").write_text(f"{exited(1, 2)}\n")
    (tmp_path / "code").write_text("42")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT), "true"], cwd=tmp_path, capture_output=True, check=False, timeout=20,
        env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PATH": path},
    )  # fmt: skip
    assert done.returncode == 42, done.stderr


@pytest.mark.parametrize("code", [42, 75])
def test_a_disk_that_takes_no_count_of_faults_keeps_no_job_from_being_queued_again(tmp_path, code):
    (tmp_path / "jaxtax-7.faults" / "in the way").mkdir(parents=True)  # neither written nor removed
    assert ended(tmp_path, code=code)[:2] == (code, True)
    assert ended(tmp_path, code=code, restarts=3)[:2] == (code, True)


def test_outside_of_slurm_the_script_says_how_it_is_started(tmp_path):
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(SCRIPT), "true"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "submit this with sbatch" in done.stderr


def test_bounds_that_are_no_numbers_are_refused_before_anything_runs(tmp_path):
    for name in ("JAXTAX_MAX_FAULTS", "JAXTAX_MAX_RESTARTS"):
        code, again, said = ended(tmp_path, code=75, **{name: "many"})
        assert (code, again) == (2, False)
        assert f"{name}='many'; expected a whole number" in said
        assert "a line of a task" not in said
