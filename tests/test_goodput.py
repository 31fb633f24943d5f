"""The ledger of a run: read, added up, shown and reported."""

import json

import pytest
from report_study import Plan, write_study

from jaxtax.goodput import Ledger, goodput_in_words, read_goodput
from jaxtax.json_lines import JsonLines, read_json_lines
from jaxtax.report.write import write_report


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


def test_a_report_says_where_the_time_went_of_runs_that_have_a_ledger(tmp_path):
    study = write_study(tmp_path, Plan(items=4, epochs=1, resamples=100))
    without = (write_report(study) / "report.md").read_text()
    assert "Where the time" not in without
    run = study / "seed_0" / "base"
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {"session": 1, "time": 30.0, "step": 2, "began": 10.0, "seconds": {"step": 15.0, "compile": 5.0}},
        {"session": 2, "time": 50.0, "step": 2, "began": 40.0, "seconds": {"restore": 10.0}},
    ]
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write_report(study)
    assert (
        "| run | seconds | sessions | step | restore | compile | down |" in (report / "report.md").read_text()
    )
    assert "| seed\\_0/base | 40.0 | 2 | 37.5 | 25.0 | 12.5 | 25.0 |" in (report / "report.md").read_text()
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
