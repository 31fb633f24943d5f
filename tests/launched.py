"""`jaxtax train` in some processes on this machine, for tests of what happens to runs."""

import json
import os
import socket
import subprocess
import sys
import time

from jaxtax.artifact import write_text
from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.data import world

CONFIG = """
out: {home}/run
model: {{size: tiny-qwen2, tokenizer: {home}/tokenizer}}
data: {{sources: [{{name: world_pretrain, take: 100}}], row_tokens: 64}}
epochs: 3
batch_rows: 4
optimizer: {{learning_rate: 3.0e-3, warmup_fraction: 0.1, weight_decay: 0.01}}
log_every_steps: 1
seed: 7
"""


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def environment(processes, index, port, devices):
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    here = {"JAXTAX_COORDINATOR": f"127.0.0.1:{port}", "JAXTAX_NUM_PROCESSES": f"{processes}"}
    return os.environ | here | {"JAXTAX_PROCESS_ID": f"{index}", "XLA_FLAGS": " ".join(flags)}


class Launched:
    """`jaxtax train` in some processes of some devices each."""

    def __init__(self, home, out, processes, devices, *overrides, begin=("-m", "jaxtax"), cwd=(None,) * 4):
        """`begin`: what Python runs; `cwd`: where each process is."""
        port = free_port()
        command = [sys.executable, *begin, "train", str(home / "train.yaml"), f"out={out}", *overrides]
        self.logs = [out.with_name(f"{out.name}-{time.time_ns()}-{index}.log") for index in range(processes)]
        self.processes = []
        for index, log in enumerate(self.logs):
            with log.open("w") as file:
                env = environment(processes, index, port, devices)
                self.processes.append(
                    subprocess.Popen(command, env=env, stdout=file, stderr=file, cwd=cwd[index])
                )

    def end(self):
        codes = [process.wait(timeout=240) for process in self.processes]
        return codes, "\n".join(log.read_text() for log in self.logs)


def make_home(directory):
    """A directory with a tokenizer, and the config of a run."""
    build_world_tokenizer(world.words()).save(directory / "tokenizer")
    write_text(directory / "train.yaml", CONFIG.format(home=directory))
    return directory


def undisturbed_run(home, devices, *overrides):
    """The directory of a run of two processes, of so many devices each, that nothing disturbed."""
    codes, said = Launched(home, home / "whole", 2, devices, *overrides).end()
    assert codes == [0, 0], said
    return home / "whole"


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def wait_for_lines(launched, out, number):
    metrics, end = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= number):
        assert time.monotonic() < end, [log.read_text() for log in launched.logs]
        time.sleep(0.01)
