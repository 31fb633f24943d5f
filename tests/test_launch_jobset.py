"""launch/jobset.yaml against schemas: its shape, never its behavior."""

import copy
import math
import re
from pathlib import Path

import pytest
import yaml

from jaxtax import config, config_file
from jaxtax.hosts.detect import detect
from jaxtax.model.config import named_size
from jaxtax.sharding import MESH_AXES, check_mesh

ROOT = Path(__file__).parent.parent
JOBSET, POLICY = yaml.safe_load_all((ROOT / "launch" / "jobset.yaml").read_text())

# What jobset.x-k8s.io/v1alpha2 allows, without what the file does not need: a type, the allowed values, a
# list of one form, or a block of fields, of which REQUIRED ones must be there. A JOB is checked against
# Kubernetes' own schema.
JOB = object()
SPEC = {
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "failurePolicy": {
        "maxRestarts": int,
        "restartStrategy": ("Recreate", "BlockingRecreate"),
        "rules": [
            {
                "name": str,
                "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                "onJobFailureReasons": [("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy")],
                "targetReplicatedJobs": [str],
            }
        ],
    },
    "successPolicy": {"operator": ("All", "Any"), "targetReplicatedJobs": [str]},
    "replicatedJobs": [{"name": str, "replicas": int, "groupName": str, "template": JOB}],
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
}
METADATA = {"name": str, "namespace": str, "labels": dict, "annotations": dict}
SCHEMA = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": METADATA,
    "spec": SPEC,
}
REQUIRED = {"": {"apiVersion", "kind", "metadata", "spec"}, "rules": {"name", "action"}}
REQUIRED |= {"replicatedJobs": {"name", "template"}, "metadata": {"name"}}


def faults(value, schema, where=""):
    """What of `value` the schema does not allow, each with its place."""
    last = where.rsplit(".", 1)[-1].split("[")[0]
    if schema is JOB:
        return [] if isinstance(value, dict) else [f"{where}: no block"]
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{where}: {value!r} is none of {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: no list"]
        return [line for i, one in enumerate(value) for line in faults(one, schema[0], f"{where}[{i}]")]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]
    if not isinstance(value, dict):
        return [f"{where}: no block"]
    found = [f"{where}.{name}: unknown" for name in value.keys() - schema.keys()]
    found += [f"{where}.{name}: missing" for name in REQUIRED.get(last, set()) - value.keys()]
    for name in sorted(value.keys() & schema.keys()):
        found += faults(value[name], schema[name], f"{where}.{name}")
    return found


def job():
    """The Job that JobSet makes of the file's template, as a copy to change."""
    template = copy.deepcopy(JOBSET["spec"]["replicatedJobs"][0]["template"])
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "jaxtax-hosts-0"}, **template}


@pytest.fixture(scope="module")
def refused():
    """Whether Kubernetes' own schema, without unknown fields, refuses a manifest."""
    kubernetes = pytest.importorskip("kubernetes_validate")

    def check(manifest):
        try:
            kubernetes.validate(manifest, "1.31", strict=True)
        except kubernetes.ValidationError as error:
            return str(error)
        return ""

    return check


def test_the_jobset_has_the_form_that_jobset_wants():
    assert faults(JOBSET, SCHEMA) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda spec: spec["failurePolicy"].update(maxRestart=3), ".spec.failurePolicy.maxRestart: unknown"),
        (
            lambda spec: spec["failurePolicy"].update(maxRestarts="3"),
            ".spec.failurePolicy.maxRestarts: '3' is no int",
        ),
        (lambda spec: spec["network"].update(enableDnsHostnames=True), ".enableDnsHostnames: unknown"),
        (lambda spec: spec["failurePolicy"]["rules"][0].update(action="Fail"), "'Fail' is none of"),
        (lambda spec: spec["failurePolicy"]["rules"][0].pop("name"), "rules[0].name: missing"),
        (lambda spec: spec.update(replicatedJob=[]), ".spec.replicatedJob: unknown"),
    ],
)
def test_a_mistake_in_the_jobset_is_found(change, fault):
    broken = copy.deepcopy(JOBSET)
    change(broken["spec"])
    assert any(fault in line for line in faults(broken, SCHEMA))


def test_the_job_and_the_network_policy_have_the_form_that_kubernetes_wants(refused):
    assert refused(job()) == ""
    assert refused(POLICY) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["podFailurePolicy"]["rules"][1]["onExitCodes"].update(operater="NotIn"),
        lambda spec: spec["podFailurePolicy"]["rules"][0]["onPodConditions"][0].pop("status"),
        lambda spec: spec.update(paralelism=2),
        lambda spec: spec["template"]["spec"]["containers"][0]["env"][1].update(value=2),
        lambda spec: spec["template"]["spec"]["volumes"][2]["emptyDir"].update(size="16Gi"),
    ],
)
def test_a_mistake_in_the_job_is_found(change, refused):
    broken = job()
    change(broken["spec"])
    assert refused(broken)


def test_the_parts_of_the_jobset_agree():
    [hosts] = JOBSET["spec"]["replicatedJobs"]
    spec = hosts["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    # Its pods are NAME-JOB-0-INDEX, at the service that is called like the JobSet; the first one coordinates.
    name = JOBSET["metadata"]["name"]
    assert variables["JAXTAX_COORDINATOR"].rsplit(":", 1)[0] == f"{name}-{hosts['name']}-0-0.{name}"
    assert hosts["replicas"] == 1
    peers = detect(variables | {"JAXTAX_PROCESS_ID": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (peers.index, peers.count, peers.coordinator) == (1, 2, variables["JAXTAX_COORDINATOR"])
    assert spec["parallelism"] == spec["completions"] == int(variables["JAXTAX_NUM_PROCESSES"])
    assert "JAXTAX_PROCESS_ID" in variables
    assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == container["name"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # as podFailurePolicy demands
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    # JobSet puts its name on its pods; a label that other runs carry, too, would let them in.
    label = {"jobset.sigs.k8s.io/jobset-name": name}
    assert POLICY["spec"]["podSelector"]["matchLabels"] == label
    assert POLICY["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": label}}]}]
    assert "HF_TOKEN" not in str(JOBSET)


def test_the_command_of_the_jobset_fits_its_pods(monkeypatch):
    spec = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    monkeypatch.setenv("JAXTAX_ASSETS", variables["JAXTAX_ASSETS"])
    program, verb, path, *overrides = container["command"]
    assert (program, verb) == ("jaxtax", "train")
    with monkeypatch.context() as in_the_pod:
        in_the_pod.setattr(config_file, "_missing", lambda path, what: None)
        in_the_pod.setattr(config_file.os.path, "isdir", lambda path: True)
        cfg = config_file.load(ROOT / path, overrides, config.TrainConfig)
    sizes = cfg.mesh.model_dump()
    gpus = spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert math.prod(sizes[axis] for axis in MESH_AXES) == gpus
    model = named_size("gpt-oss-20b", vocab_size=201_088)
    check_mesh(model, sizes, cfg.batch_rows // cfg.micro_batches, row_tokens=cfg.data.row_tokens)
    places = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    read = [cfg.model.path, *(file for source in cfg.data.sources for file in source.files)]
    assert read[1:]
    for file in read:
        assert any(file.is_relative_to(place) for place in places), f"{file} is on no volume"
    assert [only for place, only in places.items() if cfg.out.is_relative_to(place)] == [False]


def test_the_image_is_built_from_what_is_there():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    [locked] = [word for line in lines for word in line.split() if word.startswith("requirements/py")]
    assert (ROOT / locked).exists()
    assert any("--require-hashes" in line for line in lines)


def pins(path):
    """name==version of every package of a lock."""
    return set(re.findall(r"^([a-z0-9][^ ]*==[^ ]+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("python", ["py311", "py312"])
def test_the_lock_for_gpus_adds_to_the_core_and_changes_nothing_of_it(python):
    core, gpus = (pins(ROOT / "requirements" / f"{python}{more}.txt") for more in ("", "-cuda"))
    assert len(core) > 50
    assert core < gpus
    [jax] = [pin.split("==")[1] for pin in core if pin.startswith("jax==")]
    [plugin] = [pin.split("==")[1] for pin in gpus if re.match(r"jax-cuda\d+-plugin==", pin)]
    assert plugin.split(".")[:3] == jax.split(".")[:3]
    assert any(pin.startswith("nvidia-nccl") for pin in gpus)
