"""The ledger of a run: read, added up, shown and reported."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from report_study import Plan, write_study

from jaxtax.goodput import Ledger, goodput_in_words, read_goodput
from jaxtax.json_lines import JsonLines, read_json_lines
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
    assert session(tmp_path, 1, 0.5).communicate()[0] == "saved\nclosed\n"
    wall = time.time() - began
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
    command = [sys.executable, "-m", "jaxtax", "train", str(tmp_path / "train.yaml")]
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
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wall = time.time() - began
    found = read_goodput(run)
    assert found["sessions"] == 2
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"], rel=1e-9)
    assert found["wall"] == pytest.approx(wall, rel=0.01, abs=0.5)  # half a second to start and to end
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
        "| run | seconds | sessions | step | restore | compile | lost | down |"
        in (report / "report.md").read_text()
    )
    assert (
        "| seed\\_0/base | 40.0 | 2 | 37.5 | 25.0 | 12.5 | 10.0 | 15.0 |"
        in (report / "report.md").read_text()
    )
    page = (report / "index.html").read_text()
    assert '<th scope="row">seed_0/base</th><td>40.0</td><td>2</td><td>37.5</td>' in page


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
