"""The house rules that a machine can check: levels, names, imports, sizes, configs, README."""

import ast
import dataclasses
import inspect
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import shape_watch

from jaxtax import config, config_file

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxtax"

# A file imports only from lower levels, or from its own folder.
LEVELS = {
    "config_blocks": -1, "tell": -1,
    "hosts": 0, "artifact": 0, "json_lines": 0, "progress": 0, "config": 0, "yaml_text": 0, "config_words": 0,
    "faults": 0,
    "config_file": 0.5, "goodput": 0.5, "owner": 0.5,
    "sharding": 0.9, "ops": 1,
    "model": 2, "chat": 2,
    "checkpoint": 3, "data": 3, "hf": 3.5,
    "decoding": 4, "train": 4,
    "evals": 5, "bench": 5, "plan": 5, "api": 5, "ask": 5.5, "show_run": 4, "show": 5,
    "report": 6,
    "study_tokenizer": 6, "study_check": 6.5, "study_overlap": 6, "study": 7, "examples": 7.5, "doctor": 6.8,
    "convert": 4, "cli_output": 7, "cli_faults": 7, "cli_convert": 7.5, "cli_doctor": 7.5, "cli_plan": 7.5,
    "cli": 8, "__main__": 9, "__init__": 9,
}  # fmt: skip

# What the capital letters at the end of an array's name stand for, in the whole package.
LEGEND = {
    "B": "batch", "T": "query time", "S": "key time", "D": "embed", "N": "heads", "K": "kv heads",
    "G": "heads per kv head", "H": "head_dim", "F": "mlp", "U": "gate and up together", "E": "experts",
    "A": "experts per token", "R": "flattened tokens", "V": "vocab", "L": "layers", "C": "chunk or capacity",
    "X": "blocks", "Y": "bytes", "W": "window", "J": "half of head_dim",
    "M": "labels",
}  # fmt: skip

SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in SOURCES}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMAS = {"train": config.TrainConfig, "eval": config.EvalConfig, "study": config.StudyConfig}


def short(path):
    return path.relative_to(ROOT).as_posix()


def top(path):
    """The entry of LEVELS that a file belongs to: its folder, or itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree):
    """Names below jaxtax that a file imports, at its top, inside functions and for types alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write from jaxtax. ..."
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "jaxtax" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1], node.lineno


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.fixture
def no_files_needed(monkeypatch):
    """Configs are checked without the data sets that they name."""
    monkeypatch.setenv("JAXTAX_ASSETS", str(ROOT))
    monkeypatch.setattr(config_file, "_missing", lambda path, what: None)


def test_every_file_has_a_level():
    assert {top(path) for path in SOURCES} - {"__init__"} <= LEVELS.keys()


def test_files_import_only_from_lower_levels_or_their_own_folder():
    faults = [
        f"{short(path)}:{line}: level {LEVELS[top(path)]} imports {name} of level {LEVELS[name]}"
        for path, tree in TREES.items()
        for name, line in imported(tree)
        if top(path) != name and LEVELS[name] >= LEVELS[top(path)]
    ]
    assert faults == []


def test_shape_suffixes_use_the_letters_of_the_legend():
    faults = []
    for path, tree in TREES.items():
        module = ".".join(["jaxtax", *path.relative_to(PACKAGE).with_suffix("").parts])
        if not shape_watch.WATCHED.match(module):
            continue
        for node in ast.walk(tree):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
            match = shape_watch.SUFFIXED.fullmatch(name) if isinstance(name, str) else None
            if match and not set(match[1]) <= LEGEND.keys():
                faults.append(f"{short(path)}:{node.lineno}: {name}")
    assert faults == []


LIE = """
def attend(q_BT, w_BKS, n_B=None):
    return q_BT

def helper(x_B):
    y_B = x_B
    if y_B is None:
        return
    del x_B

def nested(x_BT):
    def inner():
        z_TB = x_BT
        return z_TB
    return inner()
"""


def test_the_shape_watcher_catches_a_lie_and_passes_the_truth():
    import jax
    import numpy as np

    watched = {"__watch_shapes__": shape_watch._watch}
    exec(shape_watch.watched_code(LIE, "lie.py"), watched)
    truth = np.zeros((2, 3))
    assert watched["attend"](truth, np.zeros((2, 3, 5))) is truth
    with pytest.raises(AssertionError, match=r"attend: w_BKS has shape \(2, 3\), rank 2; its name says 3"):
        watched["attend"](None, np.zeros((2, 3)))
    with pytest.raises(AssertionError, match=r"attend: w_BKS has shape \(4, 1, 5\), but B was 2 in q_BT"):
        jax.eval_shape(watched["attend"], np.zeros((2, 3)), np.zeros((4, 1, 5)))
    assert watched["helper"](None) is None
    with pytest.raises(AssertionError, match=r"helper: y_B has shape \(2, 3\)"):
        watched["helper"](np.zeros((2, 3)))
    assert watched["nested"](np.zeros((2, 2))).shape == (2, 2)
    with pytest.raises(AssertionError, match="inner: z_TB has shape"):
        jax.jit(watched["nested"])(np.zeros((2, 3)))


def test_the_shape_watcher_watches_the_package():
    import jaxtax.model.transformer
    import jaxtax.ops.attention

    assert hasattr(jaxtax.ops.attention, "__watch_shapes__")
    assert hasattr(jaxtax.model.transformer, "__watch_shapes__")


def test_the_tiny_models_have_pairwise_different_sizes(tiny_gpt_oss_config, tiny_qwen2_config):
    for cfg in (tiny_gpt_oss_config, tiny_qwen2_config):
        sizes = {
            "V": cfg.vocab_size, "D": cfg.embed_dim, "F": cfg.mlp_dim, "U": 2 * cfg.mlp_dim,
            "N": cfg.num_heads, "K": cfg.num_kv_heads, "G": cfg.num_heads // cfg.num_kv_heads,
            "H": cfg.head_dim, "half of H": cfg.head_dim // 2, "NH": cfg.num_heads * cfg.head_dim,
            "KH": cfg.num_kv_heads * cfg.head_dim, "L": cfg.depth,
        }  # fmt: skip
        if cfg.moe:
            sizes |= {"E": cfg.moe.num_experts, "A": cfg.moe.experts_per_token, "window": cfg.windows[0]}
        equal = [pair for pair in itertools.combinations(sizes, 2) if sizes[pair[0]] == sizes[pair[1]]]
        assert equal == []


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_nothing_heavy():
    done = run_python("import sys, jaxtax; print(sorted(n for n in sys.modules if n.count('.') == 0))")
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"jax", "numpy", "flax", "pydantic", "typer", "rich", "yaml", "orbax", "transformers"}


def test_the_model_and_its_step_need_only_jax_flax_optax_and_numpy():
    modules = [
        ".".join(["jaxtax", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in SOURCES
        if top(path) in ("ops", "model")
    ]
    modules += ["jaxtax.train.step", "jaxtax.train.optimizer", "jaxtax.decoding", "jaxtax.bench"]
    done = run_python(
        "import sys, importlib\n"
        "for name in ('pydantic', 'grain', 'orbax', 'transformers', 'tokenizers', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    assert done.returncode == 0, done.stderr


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=short)
def test_every_config_parses(path, no_files_needed):
    schema = SCHEMAS[config_file.closest_schema(path, SCHEMAS)]
    found = config_file.load(path, [], schema)
    assert schema.model_validate(found.model_dump()) == found


def attributes_read(*, outside):
    return {
        node.attr
        for path, tree in TREES.items()
        if path != outside
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_config_field_is_read_by_something():
    from jaxtax.sharding import MESH_AXES

    read = attributes_read(outside=PACKAGE / "config.py") | set(MESH_AXES)  # make_mesh reads these by name
    blocks = [
        block for _, block in inspect.getmembers(config, inspect.isclass) if issubclass(block, config.Strict)
    ]
    assert len(blocks) > 10
    unread = [
        f"{block.__name__}.{name}" for block in blocks for name in block.model_fields if name not in read
    ]
    assert unread == []


def test_every_field_of_the_model_config_is_read_by_something():
    from jaxtax.model.config import ModelConfig, Moe, Rope

    read = attributes_read(outside=PACKAGE / "model" / "config.py")
    fields = [
        (block, field.name) for block in (ModelConfig, Moe, Rope) for field in dataclasses.fields(block)
    ]
    assert [f"{block.__name__}.{name}" for block, name in fields if name not in read] == []


def test_nothing_that_is_loaded_can_run_code():
    modules = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "runpy", "code"}
    calls = {
        "eval", "exec", "compile", "__import__", "torch.load", "os.system", "yaml.load", "yaml.full_load",
        "yaml.unsafe_load",
    }  # fmt: skip
    faults = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            found = None
            if isinstance(node, ast.Import):
                found = next((a.name for a in node.names if a.name.split(".")[0] in modules), None)
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found = node.module if (node.module or "").split(".")[0] in modules else None
                found = found or next(iter(names & calls), None)
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {k.arg for k in node.keywords} & {"trust_remote_code", "allow_pickle", "shell"}
                found = called if called.removeprefix("builtins.") in calls else None
                found = found or next(iter(keywords), None)
            if found:
                faults.append(f"{short(path)}:{node.lineno}: {found}")
    assert faults == []


def test_files_and_functions_are_short():
    faults = []
    for path, tree in TREES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 300:
            faults.append(f"{short(path)}: {lines} lines; at most 300")
        for node in functions(tree):
            lines = node.end_lineno - node.lineno + 1
            if lines > 50:
                faults.append(f"{short(path)}:{node.lineno}: {node.name} has {lines} lines; at most 50")
    assert faults == []


def test_public_functions_are_typed():
    faults = []
    for path, tree in TREES.items():
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in (n for owner in owners for n in owner.body if isinstance(n, ast.FunctionDef)):
            if node.name.startswith("_") and node.name != "__call__":
                continue
            args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            untyped = [a.arg for a in args if a.annotation is None and a.arg not in ("self", "cls")]
            if untyped or node.returns is None:
                what = ", ".join(untyped + ["its result"] * (node.returns is None))
                faults.append(f"{short(path)}:{node.lineno}: {node.name}: no type for {what}")
    assert faults == []


def test_code_is_ascii():
    faults = [
        f"{short(path)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if not line.isascii()
    ]
    assert faults == []


def test_no_exception_is_swallowed_unnamed():
    handlers = [
        (path, n) for path, t in TREES.items() for n in ast.walk(t) if isinstance(n, ast.ExceptHandler)
    ]
    assert [f"{short(path)}:{node.lineno}" for path, node in handlers if node.type is None] == []


LAUNCHERS = ("srun", "sbatch", "launch/local.sh", "launch/tpu_pod.sh")


def readme_lines():
    """The words of every line of a code block of README, without the variables before them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def readme_commands():
    """What README has jaxtax or make do, through a launcher, too."""
    for words in readme_lines():
        if words[0] in LAUNCHERS:
            names = [number for number, word in enumerate(words) if Path(word).name == "jaxtax"]
            yield ["jaxtax", *words[names[-1] + 1 :]]
        elif words[0] in ("jaxtax", "make"):
            yield words


def test_every_file_of_launch_that_the_readme_names_is_there():
    named = {word for words in readme_lines() for word in words if word.startswith("launch/")}
    assert named >= {"launch/slurm.sbatch", "launch/jobset.yaml", "launch/tpu_pod.sh", "launch/local.sh"}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_readme_has_commands():
    assert ["make", "study"] in readme_commands()
    assert ["make", "test"] in readme_commands()
    assert sum("doctor" in words for words in readme_commands()) >= 3


@pytest.mark.parametrize("words", list(readme_commands()), ids=" ".join)
def test_every_readme_command_parses(words, no_files_needed):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    words = ["configs/tiny/train.yaml" if word == "CONFIG" else word for word in words]  # any
    import typer

    from jaxtax.cli import app

    command, name, rest = typer.main.get_command(app), "jaxtax", words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no verb {rest[0]!r}"
        command, name, rest = command.commands[rest[0]], rest[0], rest[1:]
    if "--version" in rest:
        return
    params = command.make_context(name, list(rest)).params
    schemas = {"study": config.StudyConfig, "train": config.TrainConfig, "eval": config.EvalConfig}
    if params.get("config") is not None:
        path = ROOT / params["config"]
        schema = schemas.get(name) or SCHEMAS[config_file.closest_schema(path, SCHEMAS)]
        config_file.load(path, params["overrides"] or [], schema)
