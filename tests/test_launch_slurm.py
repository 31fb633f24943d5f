"""launch/slurm.sbatch on a real Slurm of two nodes, which the test starts itself on this machine."""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster, wait_for, why_not

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

CONFIG = """
out: {home}/run
model: {{size: tiny-qwen2, tokenizer: {home}/tokenizer}}
data: {{sources: [{{name: world_reasoning, take: 1000}}], row_tokens: 64}}
epochs: 1
batch_rows: 8
optimizer: {{learning_rate: 1.0e-3}}
mesh: {{fsdp: 2}}
log_every_steps: 1
"""
JAXTAX = (sys.executable, "-m", "jaxtax", "train")


MOST_SECONDS = 90.0  # for all of these tests together
_began = []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(f"no Slurm of one's own: {reason}")
    _began.append(time.monotonic())
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where starts after the first one find what it compiled; most of their time goes there."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def submit(cluster, compiled, tmp_path):
    """Submits the script with a command; the job's number."""

    def submit(*command, **environment):
        return cluster.run(
            "sbatch", "--parsable", "--gres=none", f"--chdir={tmp_path}", f"--output={tmp_path}/%j.log",
            str(ROOT / "launch" / "slurm.sbatch"), *command, PYTHONPATH=str(ROOT),
            XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            JAX_COMPILATION_CACHE_DIR=str(compiled), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
            **environment,
        ).strip()  # fmt: skip

    return submit


def ends(cluster, number, seconds=120):
    """The state that a job ends in, and its exit code."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: cluster.job(number)["JobState"] in over, f"the end of job {number}", seconds)
    job = cluster.job(number)
    return job["JobState"], job["ExitCode"]


def steps(run):
    """The steps that a run has logged."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def tasks(config):
    """Process ids of the tasks that train with `config`, as this machine counts them."""
    wanted = "\0".join([*JAXTAX, str(config)]).encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_bytes().startswith(wanted):
                found.append(int(place.name))
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.fixture
def config(tmp_path):
    from jaxtax.chat.vocabulary import build_world_tokenizer
    from jaxtax.data import world

    build_world_tokenizer(world.words()).save(tmp_path / "tokenizer")
    (tmp_path / "train.yaml").write_text(CONFIG.format(home=tmp_path))
    return tmp_path / "train.yaml"


def test_a_run_that_is_asked_to_leave_saves_is_queued_again_goes_on_and_finishes(
    cluster, submit, config, tmp_path
):
    run = tmp_path / "run"
    number = submit(*JAXTAX, str(config))
    log = tmp_path / f"{number}.log"
    wait_for(lambda: len(steps(run)) >= 3, "three steps", 120)
    # What --signal=TERM@300 does before the time limit: to the steps of the job, not to its script.
    cluster.run("scancel", "--signal=TERM", number)
    wait_for(lambda: cluster.job(number)["Restarts"] == "1", "the job in the queue again", 60)
    assert f"ended with 75; job {number} is queued again" in log.read_text()
    saved = max(int(path.name) for path in (run / "state").iterdir() if path.name.isdigit())
    wait_for(lambda: cluster.job(number)["JobState"] == "PENDING", "the job waiting", 30)
    # Slurm waits two minutes before it starts the job again: the nodes take a start in the same second for
    # one of those that they were told to end.
    time.sleep(2.5)
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    assert ends(cluster, number) == ("COMPLETED", "0:0"), log.read_text()
    text = log.read_text()
    assert "on n[1-2], restart 1: " in text
    assert f"going on from step {saved}" in text
    assert (run / "model" / "origin.json").exists()
    assert steps(run) == list(range(1, max(steps(run)) + 1))
    assert saved < max(steps(run))
    assert {line.split(":")[0] for line in text.splitlines() if line[:2] in ("0:", "1:")} == {"0", "1"}


def test_a_task_that_is_killed_takes_the_job_along_within_seconds_and_it_is_queued_again(
    cluster, submit, config, tmp_path
):
    number = submit(*JAXTAX, str(config))
    wait_for(lambda: len(steps(tmp_path / "run")) >= 2, "two steps", 120)
    victims = tasks(config)
    assert len(victims) == 2
    killed = time.monotonic()
    os.kill(max(victims), signal.SIGKILL)
    wait_for(lambda: cluster.job(number)["Restarts"] == "1", "the job in the queue again", 30)
    assert time.monotonic() - killed < 15
    assert f"ended with 137; job {number} is queued again" in (tmp_path / f"{number}.log").read_text()
    assert (tmp_path / f"jaxtax-{number}.faults").read_text().endswith(" 137\n")
    cluster.run("scancel", number)
    assert tasks(config) == []


def in_tasks(script):
    return ("bash", "-c", script)


def test_only_what_may_go_on_is_queued_again_and_a_fault_not_without_end(cluster, submit, tmp_path):
    # The second task takes its time to save; Slurm waits for it.
    slow = submit(*in_tasks('trap "" TERM; sleep $SLURM_PROCID; exit 75'))
    wait_for(lambda: cluster.job(slow)["Restarts"] == "1", "the job in the queue again", 30)
    cluster.run("scancel", slow)
    failed = submit(*in_tasks("exit $((SLURM_PROCID * 3))"))
    assert ends(cluster, failed, 30) == ("FAILED", "3:0")
    often = submit(*in_tasks("exit 134"), JAXTAX_MAX_FAULTS="0")
    assert ends(cluster, often, 30) == ("FAILED", "134:0")


def test_a_task_that_refuses_ends_the_job_though_the_other_one_waits_for_it(
    cluster, submit, config, tmp_path
):
    program = f"exec {shlex.join(JAXTAX)}"
    number = submit(
        *in_tasks(f"if [ $SLURM_PROCID = 1 ]; then sleep 3; {program} absent.yaml; fi; {program} {config}")
    )
    assert ends(cluster, number, 60) == ("FAILED", "2:0")
    text = (tmp_path / f"{number}.log").read_text()
    assert "1: absent.yaml" in text
    assert "Exited with exit code 75" in text  # the other one, when Slurm asked it to leave


def test_a_canceled_job_stays_canceled_though_its_tasks_saved(cluster, submit, tmp_path):
    number = submit(*in_tasks('trap "exit 75" TERM; echo up; while :; do sleep 0.1; done'))
    log = tmp_path / f"{number}.log"
    wait_for(lambda: log.exists() and log.read_text().count("up\n") == 2, "two tasks", 30)
    cluster.run("scancel", number)
    assert ends(cluster, number, 30)[0] == "CANCELLED"
    time.sleep(2)
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_without_a_command_the_script_says_how_it_is_used(cluster, submit, tmp_path):
    number = submit()
    assert ends(cluster, number, 30) == ("FAILED", "2:0")
    assert (tmp_path / f"{number}.log").read_text().startswith("usage: sbatch")


def test_all_of_this_takes_no_longer_than_it_may(cluster):
    took = time.monotonic() - _began[0]
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if took > MOST_SECONDS and busy > 2.5 * cores:  # the two tasks themselves make a load of 2 to 4
        pytest.skip(f"took {took:.0f} s, on a machine that does other work (load {busy:.1f}, {cores} cores)")
    assert took <= MOST_SECONDS, (
        f"the tests on Slurm took {took:.0f} s; at most {MOST_SECONDS:.0f} are allowed"
    )
