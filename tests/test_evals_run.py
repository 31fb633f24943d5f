"""An evaluation as a directory: its files, and the same files however often it is interrupted."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtax.artifact import digest_files, read_origin
from jaxtax.chat.formats import FORMATS
from jaxtax.chat.tokenizer import load_tokenizer
from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.checkpoint import load_model, save_model
from jaxtax.config import EvalConfig, Sampling, SystemMessage, Task
from jaxtax.data import world
from jaxtax.decoding import Generated, generate
from jaxtax.decoding.sampling import reply_seed
from jaxtax.evals import run
from jaxtax.evals.directory import check_directory
from jaxtax.evals.lines import append_lines, keep_lines, read_lines
from jaxtax.evals.run import evaluate
from jaxtax.evals.verdicts import read_config, write_summary, write_verdicts
from jaxtax.model.four_bit import four_bit_experts
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import filled_rows

TASKS = tuple(Task(name=f"world_{name}", take=3) for name in ("reasoning", "harmful", "benign"))
SAMPLING = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=10, repeats=2, batch=4)
RESULTS = ("problems.jsonl", "replies.jsonl", "verdicts.jsonl", "summary.json")
FILES = {*RESULTS, "config.yaml", "model.json", "origin.json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_gpt_oss_config):
    """A directory with two model directories, `model` and `other`: random weights, the world's words."""
    home = tmp_path_factory.mktemp("evals")
    tokenizer = build_world_tokenizer(world.words())
    tokenizer.save(home / "tokenizer")
    cfg = replace(tiny_gpt_oss_config, vocab_size=tokenizer.vocab_size, num_layers=2)
    shapes = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    for seed, name in enumerate(("model", "other")):
        rng = np.random.default_rng(seed)
        model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)  # noqa: B023
        save_model(home / name, model, tokenizer_dir=home / "tokenizer", chat="harmony", origin={})
    return home


@pytest.fixture(scope="module")
def whole(home):
    """An evaluation that nothing interrupted."""
    return evaluate(config(home, home / "whole"))


def config(home, out, **changes):
    fields = {"tasks": TASKS, "sampling": SAMPLING, "out": out, "model": home / "model"}
    return EvalConfig(**(fields | changes))


def results(directory):
    return {name: (directory / name).read_bytes() for name in RESULTS}


@pytest.fixture
def batches(monkeypatch):
    """Lists the prompts of every batch that is generated."""
    seen = []

    def counted(model, prompts, **settings):
        seen.append(prompts)
        return original(model, prompts, **settings)

    original = run.generate
    monkeypatch.setattr(run, "generate", counted)
    return seen


def test_an_evaluation_has_the_files_and_fields_that_others_read(whole, home):
    assert {path.name for path in whole.iterdir()} == FILES
    replies, verdicts = read_lines(whole / "replies.jsonl"), read_lines(whole / "verdicts.jsonl")
    keys = [
        "task",
        "id",
        "repeat",
        "prompt",
        "tokens",
        "finished",
        "analysis",
        "commentary",
        "calls",
        "final",
    ]
    keys += ["faults", "text"]
    assert [list(row) for row in replies] == [keys] * 18
    keys = ["task", "id", "repeat", "judge", "outcome", "value", "detail", "quality"]
    assert [list(row) for row in verdicts] == [keys] * 18
    problems = read_lines(whole / "problems.jsonl")
    assert [list(row) for row in problems] == [["task", "id", "group", "prompt", "answer", "meta"]] * 9
    assert {row["group"] == row["meta"].get("thing", row["id"]) for row in problems} == {True}
    assert [row["repeat"] for row in replies] == [0, 1] * 9
    assert len({row["text"] for row in replies}) > 12
    assert replies[0]["text"] != replies[1]["text"], "repeats have seeds of their own"
    assert replies[0]["prompt"].startswith("calc ")
    origin = read_origin(whole, "evaluation")
    assert origin["digest"] == digest_files(whole)
    assert origin["model"]["digest"] == read_origin(home / "model")["digest"]


def test_the_summary_counts_the_verdicts(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["sampling"] == SAMPLING.model_dump()
    assert list(summary["model"]) == ["path", "digest", "parameters"]
    verdicts = read_lines(whole / "verdicts.jsonl")
    for row, measures in zip(summary["tasks"], ("accuracy", "harm", "over_refusal"), strict=True):
        ours = [verdict for verdict in verdicts if verdict["task"] == row["task"]]
        assert (row["measures"], row["judge_strength"]) == (measures, "exact")
        assert {verdict["judge"] for verdict in ours} == {row["judge"]}
        assert (row["n"], row["unscored"]) == (6, 0)
        assert sum(row["outcomes"].values()) == 6
        assert row["value"] == sum(verdict["value"] for verdict in ours) / 6
        assert 0 < row["mean_tokens"] <= 10
        assert 0 <= row["unfinished"] <= 6


def test_the_same_evaluation_twice_gives_the_same_files(home, whole, tmp_path):
    model = load_model(home / "model")
    again = evaluate(config(home, tmp_path / "again"), model=model)
    assert results(again) == results(whole)


def test_a_finished_evaluation_is_returned_at_once(home, whole, monkeypatch):
    for name in ("load_problems", "load_model", "generate", "write_verdicts", "write_summary", "write_text"):
        monkeypatch.setattr(run, name, None)
    assert evaluate(config(home, whole)) == whole


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.45, 0.5, 0.9, 1.0])
def test_a_killed_evaluation_goes_on_to_the_same_files(home, whole, tmp_path, batches, kept):
    """Replies are cut off anywhere: inside a line, inside a batch, between batches."""
    out = tmp_path / "killed"
    shutil.copytree(whole, out)
    for name in ("origin.json", "summary.json", "verdicts.jsonl"):
        (out / name).unlink()
    replies = (out / "replies.jsonl").read_bytes()
    (out / "replies.jsonl").write_bytes(replies[: int(len(replies) * kept)])
    lines = replies[: int(len(replies) * kept)].count(b"\n")
    assert results(evaluate(config(home, out))) == results(whole)
    assert len(batches) == (0 if kept == 1.0 else 5 - lines // 4), "whole batches are not computed again"


def test_an_evaluation_goes_on_over_a_mesh_to_the_same_files(home, whole, tmp_path, monkeypatch):
    out = tmp_path / "halfway"
    shutil.copytree(whole, out)
    for name in ("origin.json", "summary.json", "verdicts.jsonl"):
        (out / name).unlink()
    keep_lines(out / "replies.jsonl", 12)
    split = []

    def looked_at(model, prompts, **settings):
        split.append((model.stacks[0].mlp.up[...].addressable_shards[0].data.shape, filled_rows(4)))
        return generate(model, prompts, **settings)

    monkeypatch.setattr(run, "generate", looked_at)
    sizes = {"fsdp": 2, "expert": 3}
    assert results(evaluate(config(home, out, mesh=sizes))) == results(whole)
    # Layers, a third of 9 experts, half of D, gate and up; six rows in place of four.
    assert split == [((1, 3, 28, 80), 6)] * 2
    assert jax.sharding.get_abstract_mesh().empty
    assert read_config(out).mesh.model_dump() == {"data": 1, "fsdp": 2, "expert": 3, "tensor": 1}


@pytest.mark.slow
def test_a_mesh_changes_no_reply_of_experts_in_4_bits(home, tmp_path, tiny_gpt_oss_config):
    plain = load_model(home / "model")
    cfg = replace(plain.cfg, embed_dim=64, mlp_dim=96)
    shapes = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    packed = four_bit_experts(drawn)
    save_model(tmp_path / "model", packed, tokenizer_dir=home / "tokenizer", chat="harmony", origin={})
    here = {"model": tmp_path / "model"}
    alone = evaluate(config(home, tmp_path / "alone", **here))
    mesh = {"fsdp": 2, "expert": 3}
    assert results(evaluate(config(home, tmp_path / "spread", mesh=mesh, **here))) == results(alone)
    with pytest.raises(ValueError, match=r"mesh fsdp\*tensor=6 does not divide embed_dim=64") as fault:
        evaluate(config(home, tmp_path / "none", mesh={"fsdp": 2, "tensor": 3}, **here))
    assert not (tmp_path / "none").exists(), fault


@pytest.mark.parametrize("missing", ["summary.json", "verdicts.jsonl", "origin.json", "half of the verdicts"])
def test_steps_that_are_missing_are_made_without_the_model(home, whole, tmp_path, monkeypatch, missing):
    out = tmp_path / "partly"
    shutil.copytree(whole, out)
    (out / "origin.json").unlink()
    if missing == "half of the verdicts":
        text = (out / "verdicts.jsonl").read_bytes()
        (out / "verdicts.jsonl").write_bytes(text[: len(text) // 2])
    else:
        (out / missing).unlink(missing_ok=True)
    monkeypatch.setattr(run, "load_model", None)
    assert results(evaluate(config(home, out))) == results(whole)
    assert read_origin(out, "evaluation")["digest"] == digest_files(out)


def test_an_interrupt_between_batches_loses_only_the_running_one(home, whole, tmp_path, monkeypatch, batches):
    written = []

    def interrupted(path, rows):
        if path.name == "replies.jsonl":
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(rows)
        append_lines(path, rows)

    monkeypatch.setattr(run, "append_lines", interrupted)
    cfg = config(home, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        evaluate(cfg)
    assert not (cfg.out / "origin.json").exists()
    assert len(batches) == 3
    monkeypatch.setattr(run, "append_lines", append_lines)
    assert results(evaluate(cfg)) == results(whole)
    assert len(batches) == 3 + 3


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 1}, "seed"),
        ({"sampling": SAMPLING.model_copy(update={"temperature": 0.5})}, "sampling"),
        ({"tasks": TASKS[:2], "compute": "bfloat16"}, "tasks, compute"),
    ],
)
def test_another_evaluation_in_the_directory_is_refused(home, whole, changes, differing):
    before = results(whole)
    with pytest.raises(ValueError, match=f"an evaluation with another {differing}; give another out=DIR"):
        evaluate(config(home, whole, **changes))
    with pytest.raises(ValueError, match=f"an evaluation with another {differing}; give another out=DIR"):
        check_directory(config(home, whole, **changes))
    check_directory(config(home, whole))
    assert results(whole) == before


def test_an_evaluation_of_another_model_is_refused_but_a_moved_model_is_the_same(home, whole, tmp_path):
    with pytest.raises(ValueError, match="another model; give another out=DIR"):
        evaluate(config(home, whole, model=home / "other"))
    shutil.copytree(home / "model", tmp_path / "moved")
    assert evaluate(config(home, whole, model=tmp_path / "moved")) == whole


def test_changed_problems_are_refused(home, whole, tmp_path, monkeypatch):
    out = tmp_path / "changed"
    shutil.copytree(whole, out)
    (out / "origin.json").unlink()
    monkeypatch.setattr("jaxtax.evals.tasks.WORLD_TEST_SEED", 1)
    with pytest.raises(ValueError, match="holds other problems than the config gives now"):
        evaluate(config(home, out))


def test_faults_are_told_before_anything_is_written(home, tmp_path):
    out = tmp_path / "none"
    with pytest.raises(ValueError, match="no task called 'world'"):
        evaluate(config(home, out, tasks=(Task(name="world", take=1),)))
    with pytest.raises(
        ValueError, match=r"reasoning calc:0:0 has 18 tokens.* expected 1 to 6 \(context of 256"
    ):
        evaluate(config(home, out, sampling=Sampling(max_new_tokens=250)))
    with pytest.raises(ValueError, match="is no jaxtax artifact"):
        evaluate(config(home, out, model=tmp_path / "no_model"))
    with pytest.raises(ValueError) as fault:
        evaluate(config(home, out, mesh={"expert": 5, "data": 2}, tasks=(Task(name="world", take=1),)))
    assert [line.partition(";")[0] for line in str(fault.value).splitlines()] == [
        "no task called 'world'",
        "mesh expert=5 does not divide num_experts=9",
        "mesh (data=2, fsdp=1, expert=5, tensor=1) needs 10 devices, but this process sees 8 (cpu)",
    ]
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        evaluate(config(home, tmp_path / "full"))


def test_replies_are_parsed_by_channel_and_one_without_a_final_channel_is_marked(home, tmp_path, monkeypatch):
    fmt = FORMATS["harmony"](load_tokenizer(home / "model"))

    def tokens(text):
        tokenizer = fmt.tokenizer
        parts = text.replace("<|", " <|").replace("|>", "|> ").split()
        return [tokenizer.control_ids.get(part) or tokenizer.encode(part)[0] for part in parts]

    texts = [
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
        "<|channel|>analysis<|message|>I should not answer this",
    ]

    def scripted(model, prompts, **settings):
        problems = world.problems("calc", 2, 0)
        said = [tokens(texts[0].format(problems[0].answer)), tokens(texts[1])]
        return [Generated(said[0], finished=True), Generated(said[1], finished=False)]

    monkeypatch.setattr(run, "generate", scripted)
    tasks = (Task(name="world_reasoning", take=2),)
    out = evaluate(config(home, tmp_path / "out", tasks=tasks, sampling=Sampling()))
    one, two = read_lines(out / "replies.jsonl")
    assert (one["analysis"], one["finished"]) == ("so", True)
    assert (two["analysis"], two["final"], two["finished"]) == ("I should not answer this", None, False)
    assert two["text"].startswith("<|channel|>")
    (row,) = json.loads((out / "summary.json").read_text())["tasks"]
    assert (row["value"], row["unfinished"]) == (0.5, 1)
    assert row["outcomes"]["correct"] == row["outcomes"]["no_final"] == 1


def test_verdicts_and_summary_need_neither_jax_nor_the_model(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    for name in ("origin.json", "summary.json", "verdicts.jsonl"):
        (out / name).unlink()
    code = (
        "import sys\n"
        "for name in ('jax', 'flax', 'grain', 'transformers', 'tokenizers'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from jaxtax.evals.verdicts import write_summary, write_verdicts\n"
        f"write_verdicts(Path({str(out)!r})); write_summary(Path({str(out)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert results(out) == results(whole)


def test_verdicts_of_another_judge_or_of_other_replies_are_not_mixed(whole, tmp_path):
    path = tmp_path / "copy" / "verdicts.jsonl"
    shutil.copytree(whole, path.parent)
    rows = read_lines(path)
    keep_lines(path, 0)
    append_lines(path, [rows[0] | {"judge": "world_calculation/0"}])
    with pytest.raises(ValueError, match=r"line 1 was judged by world_calculation/0, this version judges by"):
        write_verdicts(path.parent)
    keep_lines(path, 0)
    append_lines(path, [rows[1]])
    with pytest.raises(ValueError, match=r"line 1 is about world_reasoning calc:0:0, which is not line 1"):
        write_verdicts(path.parent)


def test_a_summary_of_missing_verdicts_is_refused(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    keep_lines(out / "verdicts.jsonl", 5)
    with pytest.raises(ValueError, match="has 18 replies and 5 verdicts, expected 18 of each"):
        write_summary(out)


def test_unscored_replies_are_counted_apart_and_leave_the_mean_alone(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    rows = read_lines(out / "verdicts.jsonl")
    keep_lines(out / "verdicts.jsonl", 0)
    changed = [row | {"outcome": "correct", "value": 1.0} for row in rows[:2]]
    changed += [row | {"outcome": "unscored", "value": None} for row in rows[2:6]]
    append_lines(out / "verdicts.jsonl", changed + rows[6:])
    write_summary(out)
    row = json.loads((out / "summary.json").read_text())["tasks"][0]
    assert (row["n"], row["unscored"], row["value"], row["outcomes"]["correct"]) == (6, 4, 1.0, 2)


def test_seeds_are_stable_and_differ_between_items_and_repeats():
    assert reply_seed(0, "gsm8k", "test:1", 0) == 2112436456
    seeds = {reply_seed(s, t, i, r) for s in (0, 1) for t in "ab" for i in ("x", "y") for r in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_torn_lines_do_not_count_and_broken_ones_are_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"a": "\u2028 \u00e9\n"}, {"b": None}])
    assert read_lines(path) == [{"a": "\u2028 \u00e9\n"}, {"b": None}]
    with path.open("ab") as file:
        file.write(b'{"c": 1}')
    assert len(read_lines(path)) == 2
    keep_lines(path, 1)
    assert read_lines(path) == [{"a": "\u2028 \u00e9\n"}]
    with path.open("ab") as file:
        file.write(b"{]\n")
    with pytest.raises(ValueError, match=r"lines.jsonl line 2 is not JSON"):
        read_lines(path)


def test_the_chat_format_is_the_models_own_and_the_evaluation_says_so(home, whole):
    own = {"format": "harmony", "system": None}
    assert read_origin(whole, "evaluation")["chat"] == {"used": own, "trained_with": own}
    assert "chat: harmony" in (whole / "config.yaml").read_text()
    assert evaluate(config(home, whole, chat="harmony")) == whole, "the same, said out loud"


def test_another_chat_format_is_a_choice_that_the_evaluation_records(home, tmp_path, monkeypatch):
    class Quiet(FORMATS["harmony"]):
        pass

    monkeypatch.setitem(FORMATS, "quiet", Quiet)
    out = evaluate(config(home, tmp_path / "quiet", chat="quiet", tasks=TASKS[:1]))
    chat = read_origin(out, "evaluation")["chat"]
    assert (chat["used"]["format"], chat["trained_with"]["format"]) == ("quiet", "harmony")
    with pytest.raises(ValueError, match="holds an evaluation with another chat; give another out=DIR"):
        evaluate(config(home, out, tasks=TASKS[:1]))


def test_a_chat_format_that_does_not_fit_is_told_before_anything_is_written(home, tmp_path):
    out = tmp_path / "none"
    with pytest.raises(ValueError, match=r"chat: no chat format called 'harmny'; did you mean harmony\?"):
        evaluate(config(home, out, chat="harmny"))
    with pytest.raises(ValueError, match="the s1 format needs control tokens that the tokenizer lacks"):
        evaluate(config(home, out, chat="s1"))
    with pytest.raises(ValueError, match="the tokenizer knows only its own words"):
        evaluate(config(home, out, system=SystemMessage(effort="low")))
    assert not out.exists()


def test_a_batch_of_several_processes_has_an_hour_and_a_second_for_each_token(home, tmp_path, monkeypatch):
    entered = []

    class Watched:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def enter(self, what, seconds):
            entered.append((what, seconds))

        def beat(self):
            pass

    monkeypatch.setattr(run, "connected", lambda: True)
    monkeypatch.setattr(run, "Watchdog", Watched)
    evaluate(config(home, tmp_path / "watched", tasks=TASKS[:1]))
    [(what, seconds)] = entered
    assert seconds == 3600 + SAMPLING.max_new_tokens
    assert "give a smaller sampling.batch" in what
