"""One process of a few that tests/test_hosts_run.py starts: python hosts_worker.py SCENARIO DIRECTORY.

Results go to files: gloo writes to stdout, and into the middle of lines.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from jaxtax.hosts import store
from jaxtax.hosts.leave import exits_hard
from jaxtax.hosts.start import start
from jaxtax.hosts.told import stop_signal, stop_wanted
from jaxtax.hosts.wait import PeerMissing, barrier, share
from jaxtax.hosts.watchdog import Budgets, Watchdog

FAULT_AT = 20  # the step of a fault


def tell(directory, index, **facts):
    (directory / f"{index}.json").write_text(json.dumps(facts))


def steps():
    """Steps on all devices of all processes, without end; each begins before the one before has ended."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    place = NamedSharding(mesh, PartitionSpec("d"))
    step = jax.jit(lambda x: x * 0.5 + jnp.sum(x) / x.size, out_shardings=place)
    ones = np.ones(8, np.float32)
    x = jax.make_array_from_callback(ones.shape, place, lambda index: ones[index])
    number = 0
    while True:
        after = step(x)
        yield number
        x.block_until_ready()
        x, number = after, number + 1
        time.sleep(0.005)


def healthy(directory, peers):
    shared = [share("numbers", [peers.index, turn]) for turn in range(3)]
    began = time.monotonic()
    for _ in range(20):
        barrier("twenty times")
    seconds = (time.monotonic() - began) / 20
    for number in range(20):
        barrier(f"saving the state of step {number}")
    kept = len(store.under("wait"))
    rows = placed_rows()
    stopped = None
    with stop_signal():
        for number in steps():
            if number == FAULT_AT and peers.index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop_wanted(number):
                stopped = number
                break
    if peers.index == 1:
        time.sleep(2.0)
    missing = None
    try:
        barrier("lunch", seconds=1)
    except PeerMissing as fault:
        missing = str(fault)
    tell(
        directory, peers.index, shared=shared, seconds=seconds, rows=rows, stopped=stopped, missing=missing,
        kept=kept,
    )  # fmt: skip


def placed_rows():
    """What this process's devices hold of a batch, as [first row, first column, values]."""
    import jax
    import numpy as np
    from hosts_rows import Numbers

    from jaxtax.data.place import place_batch
    from jaxtax.sharding import make_mesh

    found = {}
    for name, sizes, split in (("rows", {"data": 2, "fsdp": 2}, False), ("pieces", {"fsdp": 4}, True)):
        batch = place_batch(Numbers(), 3, make_mesh(sizes), split_sequence=split)  # type: ignore[arg-type]
        assert isinstance(batch.tokens_BT, jax.Array)
        found[name] = [
            [shard.index[0].start or 0, shard.index[1].start or 0, np.asarray(shard.data).tolist()]
            for shard in batch.tokens_BT.addressable_shards
        ]
    return found


def fault(directory, peers, what):
    """Steps until `what` happens to process 1, at a step."""
    budgets = Budgets(step=3.0 if what is oversleep else 600.0)
    with Watchdog(budgets, directory=directory) as watchdog, stop_signal():
        watchdog.enter("compile", 60.0)
        for number in steps():
            watchdog.beat(number)
            if number == 1:
                watchdog.enter("step", budgets.step)
            if number == FAULT_AT:
                tell(directory, peers.index, host=socket.gethostname())
                if peers.index == 1:
                    what()
            stop_wanted(number)


def fail():
    raise RuntimeError("the cat walked over process 1")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def oversleep():
    time.sleep(1000.0)


def go_on():
    pass


FAULTS = {"fail": fail, "kill": kill, "freeze": freeze, "oversleep": oversleep, "go_on": go_on}


def main(scenario, directory):
    with exits_hard():
        peers = start()
        if scenario == "healthy":
            healthy(directory, peers)
        else:
            fault(directory, peers, FAULTS[scenario])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
