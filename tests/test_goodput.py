"""The ledger of a run: read, added up, shown and reported."""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from report_study import Plan, write_study
from test_study import SMALL

from jaxtax.artifact import write_origin
from jaxtax.goodput import Ledger, goodput_in_words, read_goodput
from jaxtax.json_lines import JsonLines, read_json_lines
from jaxtax.owner import claim
from jaxtax.report.time import time_spent
from jaxtax.report.write import write_report

ROOT = Path(__file__).parent.parent


def test_what_a_killed_session_did_after_its_last_save_is_lost(tmp_path):
    rows = [
        {"session": 1, "time": 100.0, "step": None, "began": 90.0, "seconds": {"start": 10.0}},
        {"session": 1, "time": 130.0, "step": 6, "seconds": {"step": 30.0}},
        {"session": 1, "time": 140.0, "step": 8, "seconds": {"step": 9.0, "input": 1.0}},
        {"session": 2, "time": 171.0, "step": 6, "began": 160.0, "seconds": {"restore": 11.0}},
        {"session": 2, "time": 181.0, "step": 9, "seconds": {"step": 10.0}, "event": "damaged"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"session": 2, "ti'
    (tmp_path / "ledger.jsonl").write_text(text)
    found = read_goodput(tmp_path)
    assert found["wall"] == 181 - 90
    assert {kind: spent for kind, spent in found["seconds"].items() if spent} == {
        "start": 10, "restore": 11, "step": 40, "lost": 10, "down": 20,
    }  # fmt: skip
    assert found["events"] == [[181.0, "damaged"]]
    assert read_goodput(tmp_path / "nowhere") is None
    (tmp_path / "ledger.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="is not a ledger that jaxtax wrote"):
        read_goodput(tmp_path)


SESSION = """
import sys, time
from pathlib import Path
from jaxtax import goodput
goodput._BEAT = 0.02
ledger = goodput.Ledger(began=float(sys.argv[2]))
ledger.open(Path(sys.argv[1]))
step = int(sys.argv[3])
ledger.at(step)
ledger.saved()
ledger.now("step")
time.sleep(0.2)
ledger.at(step + 1)
with ledger.doing("save"):
    time.sleep(0.1)
ledger.saved()
print("saved", flush=True)
time.sleep(float(sys.argv[4]))
ledger.at(step + 2)
ledger.close()
print("closed", flush=True)
"""


def session(run, step, seconds):
    """A session in a process of its own: it saves, says so, works on for so many seconds, and ends."""
    command = [sys.executable, "-c", SESSION, str(run), str(time.time()), str(step), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_what_a_session_did_from_its_last_save_until_it_was_killed_is_lost_by_an_outside_clock(tmp_path):
    began = time.time()
    first = session(tmp_path, 0, 60)
    assert first.stdout.readline() == "saved\n"
    saved = time.time()
    time.sleep(2.0)
    first.kill()
    first.communicate()
    killed = time.time()
    time.sleep(1.5)
    again = time.time()
    second = session(tmp_path, 1, 0.5)
    assert [second.stdout.readline(), second.stdout.readline()] == ["saved\n", "closed\n"]
    wall = time.time() - began  # how long Python takes to end is not the ledger's
    second.communicate()
    found = read_goodput(tmp_path)
    near = {"abs": 0.01 * wall + 0.1}  # a tenth of a second for processes to start, say something and end
    assert found["seconds"]["lost"] == pytest.approx(killed - saved, **near)
    assert found["seconds"]["down"] == pytest.approx(again - killed, **near)
    assert found["wall"] == pytest.approx(wall, **near)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"], rel=1e-9)


CONFIG = """
out: {home}/run
model: {{size: tiny-qwen2, tokenizer: {home}/tokenizer}}
data: {{sources: [{{name: world_reasoning, take: 1500}}], row_tokens: 64}}
epochs: 1
batch_rows: 8
save_every_steps: 40
optimizer: {{learning_rate: 1.0e-3}}
"""


@pytest.mark.slow
def test_the_ledger_of_a_training_that_was_killed_agrees_with_an_outside_clock(tmp_path):
    from jaxtax.chat.vocabulary import build_world_tokenizer
    from jaxtax.data import world

    build_world_tokenizer(world.words()).save(tmp_path / "tokenizer")
    (tmp_path / "train.yaml").write_text(CONFIG.format(home=tmp_path))
    command = [sys.executable, "-u", "-m", "jaxtax", "train", str(tmp_path / "train.yaml")]
    run = tmp_path / "run"
    began = time.time()
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "state" / "40").exists():
        assert first.poll() is None
        time.sleep(0.01)
    time.sleep(0.7)
    first.kill()
    first.wait()
    killed = time.time()
    saved = max((run / "state").glob("[0-9]*"), key=lambda path: int(path.name)).stat().st_mtime
    time.sleep(3)
    again = time.time()
    second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert second.stdout.readline().startswith(b"model ")
    wall = time.time() - began  # what follows is Python's and JAX's own end
    second.communicate()
    assert second.returncode == 0
    found = read_goodput(run)
    assert found["sessions"] == 2
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"], rel=1e-9)
    assert found["wall"] == pytest.approx(wall, rel=0.01, abs=0.5)  # half a second to start
    # The last sign of life is up to a second old.
    assert found["seconds"]["lost"] == pytest.approx(killed - saved, rel=0.01, abs=1.2)
    assert found["seconds"]["down"] == pytest.approx(again - killed, rel=0.01, abs=1.2)
    assert found["seconds"]["down"] >= again - killed - 0.1


def test_a_session_that_ended_by_itself_lost_nothing_and_a_strange_clock_is_not_believed(tmp_path):
    rows = [
        {"session": 1, "time": 100.0, "step": 4, "began": 90.0, "seconds": {"step": 10.0}},
        {"session": 2, "time": 130.0, "step": 4, "began": 120.0, "seconds": {"step": 10.0}},
    ]
    for before, lost in ((100.0, 0), (90.0, 0), (103.0, 3), (999.0, 20)):
        rows[1]["before"] = before
        (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = read_goodput(tmp_path)
        assert (found["seconds"]["lost"], found["seconds"]["down"], found["wall"]) == (lost, 20 - lost, 40)


def test_a_ledger_that_is_closed_or_forgotten_shows_no_life(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtax.goodput._BEAT", 0.01)
    for forget in (False, True):
        ledger = Ledger()
        ledger.open(tmp_path)
        beats = [thread for thread in threading.enumerate() if thread.name == "ledger"]
        assert len(beats) == 1
        if forget:
            del ledger
        else:
            ledger.close()
        beats[0].join(5)
        assert not beats[0].is_alive()


def test_a_report_says_where_the_time_went_of_runs_that_have_a_ledger(tmp_path):
    study = write_study(tmp_path, Plan(items=4, epochs=1, resamples=100))
    without = (write_report(study) / "report.md").read_text()
    assert "Where the time" not in without
    run = study / "seed_0" / "base"
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {"session": 1, "time": 30.0, "step": 2, "began": 10.0, "seconds": {"step": 15.0, "compile": 5.0}},
        {"session": 2, "time": 50.0, "step": 2, "began": 40.0, "before": 34.0, "seconds": {"restore": 10.0}},
    ]
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write_report(study)
    assert (
        "| part | seconds | sessions | step | restore | compile | lost | down |"
        in (report / "report.md").read_text()
    )
    assert (
        "| seed\\_0/base | 40.0 | 2 | 37.5 | 25.0 | 12.5 | 10.0 | 15.0 |"
        in (report / "report.md").read_text()
    )
    page = (report / "index.html").read_text()
    assert '<th scope="row">seed_0/base</th><td>40.0</td><td>2</td><td>37.5</td>' in page


def write_ledger(directory, rows):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# Killed in an evaluation, 3 seconds after its last line, and started again 12 seconds later.
STUDY_LEDGER = [
    {"session": 1, "time": 10.0, "step": None, "began": 6.0, "seconds": {"start": 4.0},
     "doing": "seed_0/base"},
    {"session": 1, "time": 41.0, "step": None, "seconds": {"seed_0/base": 31.0}},
    {"session": 1, "time": 42.0, "step": None, "seconds": {"start": 1.0}, "doing": "seed_0/evaluations/base"},
    {"session": 2, "time": 62.0, "step": None, "began": 57.0, "before": 45.0, "seconds": {"start": 5.0},
     "doing": "seed_0/evaluations/base"},
    {"session": 2, "time": 69.0, "step": None, "seconds": {"seed_0/evaluations/base": 7.0}},
    {"session": 2, "time": 70.0, "step": None, "seconds": {"start": 1.0}, "doing": "report"},
]  # fmt: skip
RUN_LEDGER = [{"session": 1, "time": 40.0, "step": 2, "began": 10.0, "seconds": {"step": 24.0, "save": 6.0}}]


def test_the_parts_of_a_study_add_up_to_its_wall_time(tmp_path, monkeypatch):
    study = write_study(tmp_path, Plan(items=4, epochs=1, resamples=100))
    write_ledger(study, STUDY_LEDGER)
    write_ledger(study / "seed_0" / "base", RUN_LEDGER)
    rows, kinds = time_spent(study)
    assert {row.name: (row.wall, row.sessions) for row in rows} == {
        "seed_0/base": (30.0, 1),
        "seed_0/evaluations/base": (10.0, None),
        "all else: start, checks, time between sessions": (24.0, None),
        "the whole study": (64.0, 2),
    }
    assert sum(row.wall for row in rows[:-1]) == rows[-1].wall
    assert list(kinds) == ["step", "save", "down"]
    assert {kind: rows[-1].share(kind) for kind in kinds} == {
        "step": 100 * 24 / 64, "save": 100 * 6 / 64, "down": 100 * 12 / 64,
    }  # fmt: skip
    assert rows[1].share("step") is None
    # While it reports, the report is the part at work, up to now.
    monkeypatch.setattr("jaxtax.report.time.time.time", lambda: 74.0)
    with claim(study, "a study"):
        rows, _ = time_spent(study)
    told = {row.name: row.wall for row in rows}
    assert (told["report"], told["the whole study"]) == (4.0, 68.0)
    text = (write_report(study) / "report.md").read_text()
    assert "| seed\\_0/evaluations/base | 10.0 |  |  |  |  |\n" in text
    assert "| the whole study | 64.0 | 2 | 37.5 | 9.4 | 18.8 |\n" in text
    # A study that began before it had a ledger: what that does not tell is not made up.
    write_ledger(study / "seed_0" / "base", [RUN_LEDGER[0] | {"began": 1.0}])
    assert [row.name for row in time_spent(study)[0]] == ["seed_0/base", "seed_0/evaluations/base"]


PARTS = """
import sys, time
from pathlib import Path
from jaxtax import goodput
goodput._BEAT = 0.02
ledger = goodput.Ledger(began=float(sys.argv[2]))
ledger.open(Path(sys.argv[1]))
for name, seconds in zip(sys.argv[3::2], sys.argv[4::2]):
    with ledger.part(name):
        print(name, flush=True)
        time.sleep(float(seconds))
ledger.close()
"""


def test_a_part_that_was_killed_has_its_time_by_an_outside_clock(tmp_path):
    def start(*parts):
        command = [sys.executable, "-c", PARTS, str(tmp_path), str(time.time()), *map(str, parts)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    began = time.time()
    first = start("a", 0.4, "seed_0/b", 60)
    assert [first.stdout.readline(), first.stdout.readline()] == ["a\n", "seed_0/b\n"]
    entered = time.time()
    time.sleep(1.5)
    first.kill()
    first.communicate()
    killed = time.time()
    time.sleep(1.0)
    again = time.time()
    second = start("seed_0/b", 0.8)
    second.communicate()
    wall = time.time() - began
    rows, _ = time_spent(tmp_path)
    told = {row.name: row.wall for row in rows}
    near = {"abs": 0.01 * wall + 0.1}  # a tenth of a second for processes to start, say something and end
    assert told["seed_0/b"] == pytest.approx(killed - entered + 0.8, **near)
    assert told["the whole study"] == pytest.approx(wall, **near)
    assert rows[-1].seconds["down"] == pytest.approx(again - killed, **near)
    assert sum(row.wall for row in rows[:-1]) == pytest.approx(rows[-1].wall, rel=1e-9)


def test_a_study_keeps_a_ledger_of_its_parts_until_it_is_done(tmp_path, monkeypatch):
    from jaxtax import study
    from jaxtax.config import StudyConfig
    from jaxtax.config_file import load

    def part(name, fails=False):
        def make(progress):
            time.sleep(0.2)
            if fails:
                raise OSError("full")
            write_origin(tmp_path / "study" / name, "report")

        return study.Part(name, tmp_path / "study" / name, 1.0, make, again=name == "report")

    cfg = load(ROOT / "configs" / "tiny" / "study.yaml", [f"out={tmp_path}/study"], StudyConfig)
    monkeypatch.setattr(study, "_look_for_overlap", lambda cfg, progress: None)
    monkeypatch.setattr(study, "_write_index", lambda cfg: None)
    monkeypatch.setattr(study, "check", lambda cfg: [part("tokenizer"), part("report", fails=True)])
    began = time.time() - 5
    with pytest.raises(OSError, match="full"):
        study.study(cfg, began=began)
    monkeypatch.setattr(study, "check", lambda cfg: [part("tokenizer"), part("report")])
    study.study(cfg)
    found = read_goodput(cfg.out)
    assert found["sessions"] == 2
    assert found["wall"] == pytest.approx(time.time() - began, abs=0.1)
    assert found["seconds"]["tokenizer"] == pytest.approx(0.2, abs=0.1)
    assert found["seconds"]["report"] == pytest.approx(0.4, abs=0.2)
    assert found["seconds"]["start"] >= 5
    study.study(cfg)  # only its report, once more
    assert read_goodput(cfg.out) == found


@pytest.mark.slow
def test_the_table_of_a_study_that_was_killed_twice_agrees_with_an_outside_clock(tmp_path):
    out = tmp_path / "study"
    arms = [f"arms.{arm}" for arm in ("safechain", "direct_refusal_replay")]
    less = [f"{arm}.{what}" for arm in arms for what in ("epochs=1", "data.sources.0.take=24")]
    config = ROOT / "configs" / "tiny" / "study.yaml"
    command = [sys.executable, "-u", "-m", "jaxtax", "study", str(config), f"out={out}", *SMALL, *less]
    began = time.time()
    for started in ("base/metrics.jsonl", "evaluations/reasoning/replies.jsonl"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "seed_0" / started).exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.7)
        process.kill()
        process.wait()
        time.sleep(2)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline().startswith("report")  # then the interpreter ends, which takes a while
    wall = time.time() - began
    process.communicate()
    rows, _ = time_spent(out)
    assert rows[-1].name == "the whole study"
    assert rows[-1].sessions == 3
    assert rows[-1].wall == pytest.approx(wall, rel=0.01)
    assert sum(row.wall for row in rows[:-1]) == pytest.approx(rows[-1].wall, rel=1e-9)
    assert sum("/evaluations/" in row.name for row in rows) == 6
    assert rows[-1].seconds["down"] >= 4
    [told] = [
        line for line in (out / "report" / "report.md").read_text().splitlines() if "the whole s" in line
    ]
    assert float(told.split("|")[2]) == pytest.approx(wall, rel=0.01)  # up to when it was written


def test_a_ledger_in_words_names_the_largest_shares_first():
    found = {
        "wall": 200.0,
        "sessions": 1,
        "seconds": {"step": 150.0, "save": 49.9, "input": 0.05, "down": 0.0},
    }
    assert goodput_in_words(found) == "200.0 s: step 75.0 %, save 24.9 %"


def test_a_ledger_counts_each_moment_once(tmp_path):
    ledger = Ledger(began=0.0)  # long ago: the start
    ledger.open(tmp_path)
    with ledger.doing("save"):
        ledger.event("odd")
    ledger.now("step")
    ledger.at(3)
    ledger.close()
    found = read_goodput(tmp_path)
    assert found["seconds"]["start"] > 1e9
    assert found["wall"] == pytest.approx(found["seconds"]["start"], abs=5)
    assert [text for _, text in found["events"]] == ["odd"]
    assert Ledger().close() is None  # writes nothing


def test_a_session_that_has_only_begun_tells_where_its_time_went(tmp_path):
    Ledger(began=time.time() - 5).open(tmp_path)
    [line] = read_json_lines(tmp_path / "ledger.jsonl")
    assert line["seconds"] == {"start": pytest.approx(5, abs=1)}
    assert line["time"] == pytest.approx(line["began"] + line["seconds"]["start"], abs=1e-5)
    assert re.fullmatch(r"[5-6]\.\d s: start 100\.0 %", goodput_in_words(read_goodput(tmp_path)))


def test_a_ledger_of_no_time_at_all_is_put_into_words(tmp_path):
    line = {"session": 1, "time": 90.0, "step": None, "began": 90.0, "seconds": {}}  # as older versions began
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    assert goodput_in_words(read_goodput(tmp_path)) == "0.0 s"


def test_lines_that_find_the_disk_full_are_written_when_there_is_room(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path)
    lines.add({"a": 1})
    full = {"yes": True}

    class Disk(type(path)):
        def open(self, *args, **named):
            opened = super().open(*args, **named)
            if full["yes"]:
                opened.write(b'{"ha')  # as much as there was room for
                opened.close()
                raise OSError(28, "No space left on device")
            return opened

    lines._path = Disk(path)
    lines.add({"a": 2})
    with pytest.raises(OSError, match="No space left"):
        lines.flush()
    assert read_json_lines(path) == [{"a": 1}]
    full["yes"] = False
    lines.add({"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
