"""The plans that are kept, made again with the compilers for GPUs and TPUs (make install-plan).

They are held to what was written down: peaks within 5 %, the state in place, no copy of the weights of all
layers, no tokens expanded to all experts. tests/test_plan.py shows that copies are found.
"""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from jaxtax.artifact import read_json
from jaxtax.model.config import SIZES
from jaxtax.plan.machines import machine
from jaxtax.plan.packages import add_to_path, missing
from jaxtax.plan.record import make
from jaxtax.plan.report import Report

ROOT = Path(__file__).parent.parent
PLANS = read_json(ROOT / "configs/plans.json")["plans"]


def largest_gradient(report):
    """Bytes of the largest matrix of a layer, or of the head, in float32 and on a device that has all of D.

    This is what a device has of its own tokens before the gradient is summed over `fsdp` and split: its sum
    over the chunks of the loss must be float32, and to split it in every chunk would send it many times. For
    the split it is turned once, so that the parts of the devices follow each other.
    """
    cfg = SIZES[re.match(r"[\w.-]+\w", report["model"])[0]]
    of_all = 1 if cfg.moe is None else 2 * cfg.moe.num_experts / report["mesh"]["expert"]
    layer = of_all * cfg.embed_dim * cfg.mlp_dim
    return 4 * max(layer, cfg.vocab_size * cfg.embed_dim) / report["mesh"]["tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("kept", PLANS, ids=lambda kept: kept["command"].replace("configs/", ""))
def test_a_kept_plan_is_made_again(kept, monkeypatch):
    wanted = kept["report"]
    add_to_path()
    if absent := missing(machine(wanted["topology"]).kind.platform):
        pytest.skip(absent)
    if version("jaxlib") != kept["versions"]["jaxlib"]:
        pytest.skip(f"kept plans are of jaxlib {kept['versions']['jaxlib']}, here is {version('jaxlib')}")
    monkeypatch.delenv("XLA_FLAGS")  # those of the tests compile less well
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.chdir(ROOT)
    found = make(kept["command"] + " --tries 0")
    peaks = found["bytes_per_device"]["peak"], wanted["bytes_per_device"]["peak"]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)
    assert found["fits"] == wanted["fits"]
    assert found["state_aliased"] in ((True,) if wanted["state_aliased"] else (None,))
    assert found["largest_expanded"] == 0
    assert found["largest_copy"] <= largest_gradient(found)
    # Weights of all layers are held once, and their gradients.
    assert Report.from_json(found).copied_stacks == []
    for name in ("num_devices", "num_params", "flops_per_token", "collectives"):
        assert found[name] == wanted[name]
