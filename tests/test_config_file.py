"""Configs as files: faults all at once and in words, overrides, paths, and the way back to YAML."""

from pathlib import Path

import pytest

from jaxtax import config_file, yaml_text
from jaxtax.artifact import write_origin
from jaxtax.config import EvalConfig, StudyConfig, TrainConfig
from jaxtax.config_file import ConfigError, dump, load

GOOD = """
out: runs/x
model: {size: tiny-gpt-oss}
data:
  sources: [{name: world_pretrain, take: 5}]
  row_tokens: 64
epochs: 2
batch_rows: 8
optimizer: {learning_rate: 1e-5}
"""


@pytest.fixture
def write(tmp_path):
    def write_config(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_config


def faults_of(path, *overrides, schema=TrainConfig):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, schema)
    return [fault.replace(f"{path}: ", "FILE: ") for fault in caught.value.faults]


def test_a_config_is_read_with_its_defaults(write):
    config = load(write(GOOD), [], TrainConfig)
    assert config.optimizer.learning_rate == 1e-5
    assert config.out == Path("runs/x")
    assert config.data.sources[0].take == 5
    assert config.data.sources[0].files == ()
    assert config.optimizer.schedule == "cosine"


def test_a_dumped_config_reads_back_equal(write):
    config = load(write(GOOD), ["freeze=[]", "out='1e5'"], TrainConfig)
    assert load(write(dump(config)), [], TrainConfig) == config


@pytest.mark.parametrize(
    "text",
    ["1e5", "no", "010", "1:30", "2024-01-01", "null", "", "~", ".inf", "<<", "a: b", "é # x", "3", "1_0"],
)
def test_texts_that_look_like_something_else_survive_the_way_through_yaml(text):
    assert yaml_text.parse(yaml_text.write({"title": text})) == {"title": text}


@pytest.mark.parametrize("number", [1e-5, 3e-4, 1.0, -2.5, 1e300, 0, 7, True, False, None])
def test_plain_values_survive_the_way_through_yaml(number):
    back = yaml_text.parse(yaml_text.write({"x": number}))["x"]
    assert back == number
    assert type(back) is type(number)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("no", "no"), ("on", "on"), ("010", "010"), ("1:30", "1:30"),
     ("true", True), ("2024-01-01", "2024-01-01"), ("null", None), ("", None), ("-3", -3), ("1_000", 1000),
     (".5", 0.5)],
)  # fmt: skip
def test_yaml_means_what_it_looks_like(text, value):
    assert yaml_text.parse(text) == value


def test_every_fault_is_reported_at_once(write):
    found = faults_of(
        write("""
out: runs/x
sed: 3
learning_rate: 1e-5
model: {pth: somewhere, window: five}
data:
  sources: [{name: world_pretrain, files: [absent.jsonl], take: 0}]
  row_tokens: 12.5
batch_rows: "8"
optimizer: {schedule: cosin, clip_norm: .inf, beta1: 1.0}
freeze: [routr]
"""),
        "seeds=2",
        "keep_epochs=1",
        "just_a_word",
    )
    assert [fault.partition(" known here")[0] for fault in found] == [
        "FILE: data.sources.0.take: found 0, expected a number of at least 1",
        "FILE: data.row_tokens: found 12.5, expected a whole number",
        "FILE: epochs: missing; expected a whole number",
        'FILE: batch_rows: found "8", expected a whole number',
        "FILE: optimizer.learning_rate: missing; expected a number",
        'FILE: optimizer.schedule: found "cosin", expected one of cosine, constant',
        "FILE: optimizer.beta1: found 1.0, expected a number below 1",
        "FILE: optimizer.clip_norm: found Infinity, expected a finite number",
        'FILE: freeze.0: found "routr", expected one of router, embed, unembed, norms, sinks, experts',
        "command line: keep_epochs: found 1, expected true or false",
        'FILE: model.window: found "five", expected a whole number or null',
        "FILE: model.pth: unknown key; did you mean model.path?",
        "FILE: sed: unknown key; did you mean seed?",
        "FILE: learning_rate: unknown key; did you mean optimizer.learning_rate?",
        "command line: seeds: unknown key; did you mean seed?",
        "command line: found 'just_a_word', expected key=value or key.sub=value",
        "FILE: data.sources.0.files.0: no such file: absent.jsonl; put it there, or name another",
    ]


def test_blocks_and_lists_of_the_wrong_form_are_named(write):
    found = faults_of(write(GOOD.replace("{learning_rate: 1e-5}", "fast")), "data.sources=[]", "model=null")
    assert found == [
        "command line: data.sources: found [], expected at least 1 of them",
        'FILE: optimizer: found "fast", expected a block with the keys learning_rate, schedule, '
        "warmup_fraction, final_fraction, weight_decay, decay_all, beta1, beta2, eps, clip_norm, moments, "
        "first_moment, second_moment",
        "command line: model: found null, expected a block with the keys path, size, tokenizer, window",
    ]


def test_faults_between_keys_are_reported_where_they_stand(write):
    assert faults_of(write(GOOD), "model={}") == [
        "command line: model: give either path (a model directory) or size (a new model), not both or neither"
    ]
    assert faults_of(write(GOOD), "micro_batches=3") == ["FILE: micro_batches=3 does not divide batch_rows=8"]


def test_overrides_reach_into_blocks_and_lists(write):
    overrides = [
        "optimizer.beta1=0.5",
        "data.sources.0.take=7",
        "precision.compute=bfloat16",
        "save_every_steps=3",
    ]
    config = load(write(GOOD), overrides, TrainConfig)
    assert config.optimizer.beta1 == 0.5
    assert config.optimizer.learning_rate == 1e-5
    assert config.data.sources[0].take == 7
    assert config.precision.compute == "bfloat16"
    assert load(write(GOOD), [*overrides, "save_every_steps=null"], TrainConfig).save_every_steps is None


def test_null_switches_an_optional_path_off(write, tmp_path):
    (tmp_path / "tokenizer.json").touch()
    text = GOOD.replace("{size: tiny-gpt-oss}", f"{{size: tiny-gpt-oss, tokenizer: {tmp_path}}}")
    assert load(write(text), [], TrainConfig).model.tokenizer == tmp_path
    assert load(write(text), ["model.tokenizer=null"], TrainConfig).model.tokenizer is None


def test_quotes_of_an_override_are_no_part_of_it(write):
    assert load(write(GOOD), ["out='a b'"], TrainConfig).out == Path("a b")


def test_an_override_of_a_path_or_a_text_is_never_taken_for_a_number(write):
    config = load(write(GOOD), ["out=2026", "data.sources.0.name=1e5"], TrainConfig)
    assert config.out == Path("2026")
    assert config.data.sources[0].name == "1e5"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seed", "command line: found 'seed', expected key=value or key.sub=value"),
        ("a..b=1", "command line: found 'a..b=1', expected key=value or key.sub=value"),
        ("seed=", "command line: seed: nothing after '='; null switches an optional key off"),
        ("data.sources.1.take=2", "data.sources has 1 entries, counted from 0; found '1'"),
        ("out.x=2", 'command line: out.x: out is "runs/x", which has no keys'),
        ("seed={a", "command line: seed: line 1, column 3: not YAML"),
        ("optimizer={beta1: 1, beta1: 2}", "line 1: the key beta1 was given before, in line 1"),
    ],
)
def test_malformed_overrides_are_faults(write, override, fault):
    (found,) = faults_of(write(GOOD), override)
    assert fault in found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "a: 1\nb: 2\na: 3\nb: 4",
            ["line 3: the key a was given before, in line 1", "line 4: the key b was given"],
        ),
        ("1: x", ["line 1: the key 1 is not text"]),
        ("a: [1", ["line 1, column 6: not YAML"]),
        ("- a", ['found ["a"], expected keys and values']),
        ("", ["found null, expected keys and values"]),
        (
            "!!python/object/apply:os.system [ls]",
            ["line 1, column 1: not YAML: could not determine a constructor"],
        ),
    ],
)
def test_files_that_are_no_mapping_are_faults(write, text, fault):
    found = faults_of(write(text))
    assert len(found) == len(fault)
    for said, expected in zip(found, fault, strict=True):
        assert said.startswith(f"FILE: {expected}")


def test_files_that_cannot_be_read_are_faults(tmp_path):
    assert faults_of(tmp_path / "absent.yaml") == ["FILE: no such file; expected a YAML config"]
    assert faults_of(tmp_path) == ["FILE: found a directory, expected a YAML config"]
    (tmp_path / "latin1.yaml").write_bytes(b"out: \xe9")
    assert faults_of(tmp_path / "latin1.yaml") == ["FILE: byte 5 is not UTF-8; expected a YAML config"]


def test_the_assets_variable_stands_for_its_directory(write, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").touch()
    files = "data.sources.0.files=['${JAXTAX_ASSETS}/a.jsonl', '${JAXTAX_ASSETS}/b.jsonl']"
    monkeypatch.setenv("JAXTAX_ASSETS", str(tmp_path))
    (found,) = faults_of(write(GOOD), files)
    place = "command line: data.sources.0.files.1"
    assert found == f"{place}: no such file: {tmp_path}/b.jsonl; put it there, or name another"
    (tmp_path / "b.jsonl").touch()
    config = load(write(GOOD), [files], TrainConfig)
    assert config.data.sources[0].files == (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    monkeypatch.delenv("JAXTAX_ASSETS")
    (found,) = faults_of(write(GOOD), files)
    assert found.startswith(
        "command line: data.sources.0.files.0: needs the environment variable JAXTAX_ASSETS"
    )
    assert "(1 more key needs it)" in found
    monkeypatch.setenv("HOME", str(tmp_path.parent))  # nobody expands it in a container's environment
    monkeypatch.setenv("JAXTAX_ASSETS", f"~/{tmp_path.name}")
    assert load(write(GOOD), [files], TrainConfig) == config
    monkeypatch.setenv("JAXTAX_ASSETS", str(tmp_path / "absent"))
    (found,) = faults_of(write(GOOD), files)
    assert f"JAXTAX_ASSETS, which is {tmp_path}/absent, and that is no directory (1 more key" in found


def test_a_block_that_only_the_command_line_has_is_blamed_on_it(write):
    found = faults_of(write(GOOD), "foo.bar=3", "optimizer.beta3=1")
    assert [fault.partition(" known here")[0] for fault in found] == [
        "command line: optimizer.beta3: unknown key; did you mean optimizer.beta2?",
        "command line: foo: unknown key;",
    ]


def test_a_fault_of_files_alone_leaves_the_config_to_look_at(write):
    with pytest.raises(ConfigError) as caught:
        load(write(GOOD), ["data.sources.0.files=[absent.jsonl]", "seed=5"], TrainConfig)
    assert isinstance(caught.value.config, TrainConfig)
    assert caught.value.config.seed == 5
    for more in ("seed=x", "seed"):
        with pytest.raises(ConfigError) as caught:
            load(write(GOOD), ["data.sources.0.files=[absent.jsonl]", more], TrainConfig)
        assert caught.value.config is None


def test_only_the_assets_variable_is_expanded(write):
    (found,) = faults_of(write(GOOD), "out=${HOME}/x")
    assert found == "command line: out: found '${HOME}/x'; only ${JAXTAX_ASSETS} is expanded"


def test_a_path_that_must_be_a_model_or_a_tokenizer_is_looked_at(write, tmp_path):
    run = tmp_path / "run"
    write_origin(run, "run")
    text = f"{{out: x, model: {run}, tasks: [{{name: calc, files: [{run}]}}]}}"
    assert faults_of(write(text), schema=EvalConfig) == [
        f"FILE: model: {run} is a run directory, not a model directory; give a model directory",
        f"FILE: tasks.0.files.0: no such file: {run}; put it there, or name another",
    ]
    write_origin(run / "model", "model")
    found = faults_of(write(text), schema=EvalConfig)
    assert f"FILE: model: {run} is a run directory, not a model directory; its model is {run}/model" in found
    (found,) = faults_of(write(GOOD), f"model.tokenizer={run}")
    assert found.endswith("is no tokenizer directory; expected one that holds a tokenizer.json")


def test_a_run_writes_into_a_directory(write, tmp_path):
    (tmp_path / "file").touch()
    fault = f"command line: out: {tmp_path}/file is a file; give a directory"
    assert faults_of(write(GOOD), f"out={tmp_path}/file") == [fault]
    assert faults_of(write(GOOD), f"out={tmp_path}/file/below/it") == [fault]
    assert load(write(GOOD), [f"out={tmp_path}/a/b"], TrainConfig).out == tmp_path / "a" / "b"
    assert load(write(GOOD), [f"out={tmp_path}"], TrainConfig).out == tmp_path


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_an_address_is_no_path_and_makes_no_directory_of_its_name(write, address):
    (found,) = faults_of(write(GOOD), f"out={address}")
    assert found == (
        f"command line: out: found '{address}', an address; expected a path: mount what is there (with "
        "gcsfuse, say), and give the path that it has then"
    )


def test_a_config_of_another_verb_is_told_apart_from_a_faulty_one(write):
    schemas = {"train": TrainConfig, "study": StudyConfig, "eval": EvalConfig}

    def fault(text, verb):
        path = write(text)
        try:
            config_file.check_kind(path, verb, schemas[verb], schemas)
        except ConfigError as error:
            return str(error).replace(str(path), "FILE")
        return None

    evaluation = "{out: x, model: y, tasks: []}"
    assert fault(evaluation, "train") == "FILE is a config of `jaxtax eval`, not of `jaxtax train`"
    assert fault(GOOD, "study") == "FILE is a config of `jaxtax train`, not of `jaxtax study`"
    assert fault(GOOD, "eval") == "FILE is a config of `jaxtax train`, not of `jaxtax eval`"
    assert fault(evaluation, "eval") is None
    for half in ("{out: x}", "{otu: x, modle: y}", "{}", GOOD.replace("data:", "dta:") + "tasks: []\n"):
        assert fault(half, "train") is None


def test_the_closest_schema_is_the_one_that_knows_most_keys(write):
    schemas = {"train": TrainConfig, "study": StudyConfig, "eval": EvalConfig}
    assert config_file.closest_schema(write(GOOD), schemas) == "train"
    assert config_file.closest_schema(write("{out: x, arms: {}, base: {}, seeds: 1}"), schemas) == "study"
