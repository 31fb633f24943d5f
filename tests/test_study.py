"""The story: a whole study at toy size, interrupted and run again, ends with the same numbers."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from jaxtax.config import StudyConfig
from jaxtax.config_file import load
from jaxtax.progress import Progress
from jaxtax.study import study, study_parts

TINY = Path(__file__).parent.parent / "configs" / "tiny" / "study.yaml"
SMALL = [
    "base.data.sources.0.take=96",
    "base.batch_rows=4",
    "reasoning.data.sources.0.take=48",
    "reasoning.batch_rows=4",
    "arms.direct_refusal.data.sources.0.take=24",
    "arms.direct_refusal.epochs=2",
    "evaluation.sampling.batch=8",
    "evaluation.sampling.max_new_tokens=16",
    *[f"evaluation.tasks.{i}.take=12" for i in range(3)],
    "report.resamples=200",
]


def small_study(out: Path, *overrides: str) -> StudyConfig:
    cfg = load(TINY, [*SMALL, f"out={out}", *overrides], StudyConfig)
    return cfg.model_copy(update={"arms": {"direct_refusal": cfg.arms["direct_refusal"]}})


class Stopped(Exception):
    pass


class StopsAt(Progress):
    """A progress that ends the process's work when the stage called `name` begins."""

    def __init__(self, name: str):
        super().__init__("study", show="nothing")
        self._stop = name

    def stage(self, name, total=1.0, **kwargs):
        if name == self._stop:
            raise Stopped(name)
        return super().stage(name, total, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("study")
    with contextlib.chdir(home):  # with a relative directory, as in the configs that are shipped
        study(small_study(Path("runs/whole")))
    return home / "runs" / "whole"


def test_a_study_ends_with_a_report_on_every_model(finished):
    summary = json.loads((finished / "report" / "summary.json").read_text())
    assert [model["name"] for model in summary["models"]] == [
        "base",
        "reasoning",
        "direct_refusal-epoch1",
        "direct_refusal-epoch2",
    ]
    for model in summary["models"]:
        for measure in ("accuracy", "harm", "over_refusal"):
            found = model[measure]
            assert found["n"] == 12
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 100
    assert [row["arm"] for row in summary["tax"]] == ["direct_refusal"]
    assert "| Problems also trained on | none of 36 |" in (finished / "report" / "report.md").read_text()


def test_a_study_stopped_anywhere_goes_on_to_the_same_numbers(finished, tmp_path):
    cfg = small_study(tmp_path / "study")
    for stop in ("base: train", "reasoning: train", "direct_refusal-epoch1: evaluate", "report"):
        with pytest.raises(Stopped):
            study(cfg, progress=StopsAt(stop))
    study(cfg)

    def numbers(out: Path) -> tuple[str, list[str]]:
        replies = [path.read_text() for path in sorted(out.glob("seed_0/evaluations/*/replies.jsonl"))]
        summary = json.loads((out / "report" / "summary.json").read_text())
        return json.dumps([summary["models"], summary["tax"]]), replies

    assert len(numbers(finished)[1]) == 4
    assert numbers(cfg.out) == numbers(finished)


def test_running_a_finished_study_again_runs_no_part_but_the_report(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("seed_0/**/origin.json")}
    assert len(before) >= 8
    study(small_study(finished), progress=StopsAt("base: train"))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_dry_look_writes_nothing_and_names_every_part(tmp_path):
    cfg = small_study(tmp_path / "nothing", "seeds=2")
    names = [part.name for part in study_parts(cfg)]
    assert names[0] == "tokenizer"
    assert names[1:3] == ["seed 0 base: train", "seed 0 base: evaluate"]
    assert names[-2:] == ["seed 1 direct_refusal-epoch2: evaluate", "report"]
    assert not any(part.done for part in study_parts(cfg))
    assert not (tmp_path / "nothing").exists()


def test_each_seed_draws_its_own_replies_and_its_models_draw_alike(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("jaxtax.study.await_seen", lambda path: None)
    monkeypatch.setattr("jaxtax.evals.run.evaluate", lambda run, progress: drawn.append(run.seed))
    for part in study_parts(small_study(tmp_path, "seeds=2", "seed=7")):
        if part.name.endswith("evaluate"):
            part.run(None)
    assert drawn == [7] * (len(drawn) // 2) + [8] * (len(drawn) // 2)
    assert len(drawn) >= 8


def test_another_study_in_the_directory_is_refused_by_its_differing_keys(tmp_path):
    cfg = small_study(tmp_path / "study")
    with pytest.raises(Stopped):
        study(cfg, progress=StopsAt("tokenizer"))
    other = small_study(tmp_path / "study", "window=8", "base.epochs=2")
    with pytest.raises(
        ValueError,
        match=r"holds another study; .*\n  window: None there, 8 here\n  base\.epochs: 1 there, 2 here",
    ):
        study(other)


def test_a_directory_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no study"):
        study(small_study(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_faults_of_every_stage_come_at_once_before_anything_is_written(tmp_path):
    cfg = small_study(
        tmp_path / "study",
        "base.data.sources.0.name=world_pretrian",
        "reasoning.data.row_tokens=1024",
        "arms.direct_refusal.data.sources.0.take=2000",
        "evaluation.sampling.max_new_tokens=600",
    )
    with pytest.raises(ValueError) as fault:
        study(cfg)
    lines = str(fault.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "base",
        "reasoning",
        "direct_refusal",
        "evaluation",
    ], lines
    assert "world_pretrain" in lines[0]
    assert "512" in lines[1]
    assert "1280" in lines[2]
    assert "512" in lines[3]
    assert not cfg.out.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("size=tiny-gpt-os", "no model size called 'tiny-gpt-os'"),
        ("mesh.tensor=3", "tensor=3 does not divide"),
        ("evaluation.mesh.tensor=3", "^evaluation: mesh tensor=3 does not divide num_heads=4"),
        ("evaluation.tasks.1.name=world_harmless", "world_harmless"),
    ],
)
def test_one_fault_anywhere_leaves_nothing_behind(tmp_path, override, words):
    cfg = small_study(tmp_path / "study", override)
    with pytest.raises(ValueError, match=words):
        study(cfg)
    assert not cfg.out.exists()


@pytest.mark.parametrize("name", ["../../evil", "base", "a b", ""])
def test_an_arm_whose_name_is_no_directory_is_refused(tmp_path, name):
    data = small_study(tmp_path).model_dump()
    data["arms"] = {name: data["arms"]["direct_refusal"]}
    with pytest.raises(ValueError, match="found arms called"):
        StudyConfig.model_validate(data)


def test_a_part_made_from_a_model_that_was_made_anew_is_refused(finished, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(finished, out)
    origin = out / "seed_0" / "base" / "model" / "origin.json"
    origin.write_text(origin.read_text().replace('"digest": "', '"digest": "0'))
    with pytest.raises(ValueError, match=r"base is of another model than .*base/model now holds"):
        study(small_study(out))
    shutil.rmtree(out / "seed_0" / "evaluations" / "base")
    with pytest.raises(ValueError, match=r"reasoning started from another model than .*base/model now holds"):
        study(small_study(out))
