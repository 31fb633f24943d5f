"""Conversion: what comes in goes out byte for byte, computes the same, and survives kills and full disks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from broken_models import CONFIGS, GPT_OSS, LLAMA, random_tensors, whole, write_tensors
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from typer.testing import CliRunner

from jaxtax import artifact
from jaxtax.artifact import read_json, read_origin
from jaxtax.checkpoint import DamagedError, load_model, named_arrays, save_model
from jaxtax.checkpoint import stream as stream_module
from jaxtax.checkpoint.arrays import open_arrays, prepare_arrays, save_arrays, tree_inside
from jaxtax.checkpoint.model_directory import read_description
from jaxtax.checkpoint.stream import pieces_of
from jaxtax.cli import app
from jaxtax.hf.config import to_openai_config
from jaxtax.hf.files import open_checkpoint
from jaxtax.hf.from_hf import from_hf
from jaxtax.hf.job import Journal, read_journal
from jaxtax.hf.measure import as_text, measure, write_random
from jaxtax.hf.to_hf import to_hf
from jaxtax.model.transformer import Transformer
from jaxtax.ops import mxfp4

BF16 = ml_dtypes.bfloat16
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(directory, *control_tokens):
    inner = Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    inner.add_special_tokens([AddedToken(token, special=True) for token in control_tokens])
    inner.save(str(directory / "tokenizer.json"))


def published(directory, family="gpt_oss", **how):
    whole(directory, family, **how)
    write_tokenizer(directory)
    return directory


def contents(directory):
    """dtype, shape and bytes of each tensor by name."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
        for name, tensor in open_checkpoint(directory).tensors.items()
    }


FORMS = [
    ("gpt_oss", "mxfp4", "BF16"),
    ("gpt_oss", "plain", "BF16"),
    ("gpt_oss", "plain", "F32"),
    ("qwen2", "plain", "BF16"),
    ("qwen2", "plain", "F16"),
    ("llama", "plain", "F32"),
]


@pytest.mark.parametrize(("family", "experts", "dtype"), FORMS)
def test_what_comes_in_goes_out_byte_for_byte(tmp_path, family, experts, dtype):
    source = published(tmp_path / "s", family, experts=experts, dtype=dtype, max_bytes=40_000)
    model = from_hf(source, tmp_path / "m")
    made = to_hf(model, tmp_path / "b", shard_bytes=30_000)
    assert contents(made.directory) == contents(source)
    assert (made.experts, made.rounded) == (experts, [])
    assert read_json(tmp_path / "b" / "config.json") == read_json(source / "config.json")
    assert {path.name for path in tmp_path.iterdir()} == {"s", "m", "b"}
    for tensor in open_checkpoint(made.directory).tensors.values():
        assert tensor.start % tensor.read().itemsize == 0


def test_a_converted_model_is_one_that_is_loaded_and_verified(tmp_path):
    source = published(tmp_path / "s", experts="mxfp4")
    directory = from_hf(source, tmp_path / "m", workers=3)
    model = load_model(directory)
    arrays = named_arrays(model)
    tensors = random_tensors(GPT_OSS, "mxfp4")
    blocks = tensors["model.layers.3.mlp.experts.down_proj_blocks"]
    np.testing.assert_array_equal(arrays["stacks.1.mlp.down.blocks"][1], blocks)
    kernel = tensors["model.layers.2.self_attn.q_proj.weight"].reshape(10, 14, 64).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(arrays["stacks.0.attention.q.kernel"][1]), kernel)
    assert read_origin(directory)["digest"] == artifact.digest_tree(arrays)
    assert read_description(directory).experts == "mxfp4"
    piece = next((directory / "params").rglob("stacks.1.mlp.down.blocks/c/0/0/0/0/0"))
    content = bytearray(piece.read_bytes())
    content[3] ^= 1
    piece.write_bytes(content)
    with pytest.raises(DamagedError, match="are damaged"):
        load_model(directory)


def test_experts_decoded_on_the_way_in_are_those_decoded_in_the_model(tmp_path):
    source = published(tmp_path / "s", experts="mxfp4")
    packed = open_arrays(from_hf(source, tmp_path / "packed") / "params")
    plain = open_arrays(from_hf(source, tmp_path / "plain", experts="plain", dtype="float32") / "params")
    for stack in (0, 1):
        for name in ("up", "down"):
            path = f"stacks.{stack}.mlp.{name}"
            expected = mxfp4.decode_numpy(packed[f"{path}.blocks"][:], packed[f"{path}.scales"][:])
            np.testing.assert_array_equal(plain[path][:], expected.swapaxes(-1, -2))
    np.testing.assert_array_equal(plain["embed"][:], packed["embed"][:].astype(np.float32))


@pytest.mark.parametrize(("family", "experts"), [("gpt_oss", "mxfp4"), ("qwen2", "plain")])
def test_an_export_computes_the_same_in_transformers(tmp_path, family, experts):
    torch = pytest.importorskip("torch", reason="torch is the reference; it is not installed")
    from transformers import AutoModelForCausalLM

    source = published(tmp_path / "s", family, experts=experts)
    # Random weights make logits of up to 8, which float32 alone rounds by 1e-6; usual ones are near 1.
    tensors = random_tensors(CONFIGS[family], experts)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] / 8
    write_tensors(source, tensors)
    directory = from_hf(source, tmp_path / "m", experts="plain", dtype="float32")
    made = to_hf(directory, tmp_path / "b", experts="plain", dtype="float32")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        made.directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens_BT = np.random.default_rng(1).integers(0, 104, (2, 90))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens_BT)).logits.numpy()
    model = load_model(directory)
    positions_BT = jnp.tile(jnp.arange(90)[None], (2, 1))
    found = jax.jit(lambda m, *x: m.logits(m(*x)))(
        model, jnp.asarray(tokens_BT), positions_BT, jnp.ones_like(positions_BT)
    )
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-5)


def test_plain_experts_become_4_bits_on_the_way_in_as_on_the_way_out(tmp_path):
    source = published(tmp_path / "s", experts="plain")
    packed = from_hf(source, tmp_path / "m", experts="mxfp4")
    plain = from_hf(source, tmp_path / "p")
    first = to_hf(packed, tmp_path / "a", experts="mxfp4")
    second = to_hf(plain, tmp_path / "b", experts="mxfp4")
    assert contents(first.directory) == contents(second.directory)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    values = random_tensors(GPT_OSS, "plain")[name].swapaxes(1, 2)
    blocks, scales = mxfp4.encode_numpy(np.ascontiguousarray(values))
    tensors = open_checkpoint(first.directory).tensors
    np.testing.assert_array_equal(tensors[f"{name}_blocks"].read(), blocks)
    np.testing.assert_array_equal(tensors[f"{name}_scales"].read(), scales)
    assert len(second.rounded) == 2 * GPT_OSS.num_layers
    one = next(one for one in second.rounded if one.tensor == f"{name}_blocks")
    change = mxfp4.decode_numpy(blocks, scales) - values.astype(np.float32)
    assert one.experts == 9
    expected = np.linalg.norm(change) / np.linalg.norm(values.astype(np.float32))
    np.testing.assert_allclose(one.relative_error, expected, rtol=1e-5)
    assert 0.05 < one.relative_error < 0.2
    np.testing.assert_allclose(one.largest_error, np.abs(change).max(), rtol=1e-6)


def test_untouched_experts_keep_the_bytes_of_the_original_and_touched_ones_are_rounded(tmp_path):
    source = published(tmp_path / "s", experts="mxfp4")
    # A block whose largest value is small has another scale once it is rounded anew, of the same values.
    name = "model.layers.2.mlp.experts.down_proj"
    tensors = random_tensors(GPT_OSS, "mxfp4")
    tensors[f"{name}_blocks"][4, 2, 0] = 0x11
    write_tensors(source, tensors)
    model = load_model(from_hf(source, tmp_path / "m", experts="plain"))
    untouched = to_hf(tmp_path / "m", tmp_path / "same", original=source)
    assert contents(untouched.directory) == contents(source)
    assert untouched.rounded == []
    down = model.stacks[0].mlp.down  # layer 2 is the second of the first stack
    arrays = named_arrays(model)
    arrays["stacks.0.mlp.down"] = down[...].at[1, 6].multiply(1.1)
    touched = jax.tree.unflatten(jax.tree.structure(model), list(arrays.values()))
    origin = {"start_digest": "x"}
    save_model(tmp_path / "t", touched, tokenizer_dir=tmp_path / "m", chat="harmony", origin=origin)
    made = to_hf(tmp_path / "t", tmp_path / "out", original=source)
    assert [(one.tensor, one.experts) for one in made.rounded] == [(f"{name}_blocks", 1)]
    before, after = open_checkpoint(source).tensors, open_checkpoint(made.directory).tensors
    differing = [key for key in before if not np.array_equal(before[key].read(), after[key].read())]
    assert set(differing) <= {f"{name}_blocks", f"{name}_scales"}
    same = [
        np.array_equal(before[f"{name}_blocks"].read()[e], after[f"{name}_blocks"].read()[e])
        for e in range(9)
    ]
    assert same == [e != 6 for e in range(9)]
    anew = to_hf(tmp_path / "m", tmp_path / "anew")
    assert contents(anew.directory) != contents(source)
    assert max(one.largest_error for one in anew.rounded) == 0.0


def test_openais_layout_gives_the_same_model(tmp_path):
    theirs = tmp_path / "repository" / "original"
    theirs.mkdir(parents=True)
    tensors = random_tensors(GPT_OSS, "mxfp4", layout="openai")
    write_tensors(theirs, tensors)
    (theirs / "config.json").write_text(json.dumps(to_openai_config(GPT_OSS)))
    write_tokenizer(tmp_path / "repository", "<|channel|>")
    with pytest.raises(ValueError, match="the harmony format needs control tokens"):
        from_hf(theirs, tmp_path / "m")
    write_tokenizer(tmp_path / "repository")
    arrays = named_arrays(load_model(from_hf(theirs, tmp_path / "m")))
    qkv = tensors["block.3.attn.qkv.weight"]
    keys = qkv[10 * 14 : 15 * 14].reshape(5, 14, 64).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(arrays["stacks.1.attention.k.kernel"][1]), keys)
    made = to_hf(tmp_path / "m", tmp_path / "out")
    found = open_checkpoint(made.directory).tensors
    np.testing.assert_array_equal(found["model.layers.3.self_attn.k_proj.weight"].read(), qkv[140:210])
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == 200_002


def test_tensors_of_several_dtypes_go_out_as_they_came(tmp_path):
    source = published(tmp_path / "s", "qwen2")
    tensors = random_tensors(CONFIGS["qwen2"])
    norms = {name: array.astype(np.float32) / 3 for name, array in tensors.items() if "norm" in name}
    (source / "model.safetensors").unlink()
    write_tensors(source, {name: a for name, a in tensors.items() if name not in norms}, 1 << 30)
    (source / "model.safetensors").rename(source / "a.safetensors")
    write_tensors(source, norms, dtype="F32")
    (source / "model.safetensors").rename(source / "b.safetensors")
    model = from_hf(source, tmp_path / "m")
    assert read_description(model).dtype == "float32"
    assert contents(to_hf(model, tmp_path / "b").directory) == contents(source)
    half = to_hf(model, tmp_path / "h", dtype="float16").directory
    assert {tensor.dtype for tensor in open_checkpoint(half).tensors.values()} == {"F16"}


def test_a_tied_model_goes_in_with_or_without_its_head(tmp_path):
    from dataclasses import replace

    from jaxtax.hf.config import to_hf_config

    cfg = replace(CONFIGS["qwen2"], tied_embedding=True)
    tensors = random_tensors(cfg)
    source = tmp_path / "s"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf_config(cfg, dtype="bfloat16")))
    write_tokenizer(source)
    write_tensors(source, tensors)
    bare = contents(source)
    assert contents(to_hf(from_hf(source, tmp_path / "m"), tmp_path / "b").directory) == bare
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    write_tensors(source, tensors | head)
    assert contents(to_hf(from_hf(source, tmp_path / "m2"), tmp_path / "b2").directory) == bare
    head["lm_head.weight"][3, 4] += 1
    write_tensors(source, tensors | head)
    with pytest.raises(
        ValueError, match=r"model.safetensors: tensor lm_head.weight differs from model.embed"
    ):
        from_hf(source, tmp_path / "m3")


def test_what_a_published_model_came_with_is_kept_through_training_and_given_back(tmp_path):
    source = published(tmp_path / "s", "qwen2")
    write_tokenizer(source, *CHATML)  # ids 26, 27 and 28
    config = read_json(source / "config.json") | {"eos_token_id": 28, "transformers_version": "4.43.1"}
    (source / "config.json").write_text(json.dumps(config))
    kept = {"generation_config.json": '{"eos_token_id": [28, 26]}', "chat_template.jinja": "{{ x }}"}
    kept |= {"merges.txt": "a b\n", "tokenizer_config.json": "{}"}
    for name, text in kept.items():
        (source / name).write_text(text)
    (source / "pytorch_model.bin").write_text("never touched")
    model = load_model(from_hf(source, tmp_path / "m"))
    trained = tmp_path / "trained"
    save_model(trained, model, tokenizer_dir=tmp_path / "m", chat="chatml", origin={})
    load_model(trained)
    out = to_hf(trained, tmp_path / "out").directory
    assert {name: (out / name).read_text() for name in kept} == kept
    assert read_json(out / "config.json") == config
    assert not (out / "pytorch_model.bin").exists()
    (trained / "source" / "merges.txt").write_text("changed")
    with pytest.raises(DamagedError, match=r"source/merges.txt of .* changed"):
        load_model(trained)


def trained(directory, model, chat):
    """As if the model in the directory `model` had been trained in another chat format."""
    save_model(directory, load_model(model), tokenizer_dir=model, chat=chat, origin={})
    return directory


def test_an_export_ends_as_the_chat_format_that_the_model_was_trained_in(tmp_path):
    source = published(tmp_path / "s", "qwen2")
    write_tokenizer(source, *CHATML)
    # A base model's: it ends texts, not turns.
    config = read_json(source / "config.json") | {"eos_token_id": 26, "pad_token_id": 26}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text('{"eos_token_id": 26, "top_p": 0.9}')
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "tokenizer_config.json").write_text('{"chat_template": "y", "eos_token": "<|endoftext|>"}')
    model = from_hf(source, tmp_path / "m")
    untouched = to_hf(model, tmp_path / "untouched").directory
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert read_text(untouched / name) == read_text(source / name)
    same = to_hf(trained(tmp_path / "t", model, "chatml"), tmp_path / "same").directory
    other = to_hf(trained(tmp_path / "o", model, "s1"), tmp_path / "other").directory
    for out in (same, other):
        assert read_json(out / "config.json")["eos_token_id"] == 28
        assert read_json(out / "config.json")["pad_token_id"] == 26
        told = {"eos_token_id": [28, 26], "pad_token_id": 26, "top_p": 0.9}
        assert read_json(out / "generation_config.json") == told
    assert (same / "chat_template.jinja").read_text() == "{{ x }}"
    assert not (other / "chat_template.jinja").exists()
    told = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert read_json(other / "tokenizer_config.json") == told


def read_text(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def test_an_export_says_what_it_left_out(tmp_path):
    source = published(tmp_path / "s", "qwen2")
    write_tokenizer(source, *CHATML)
    (source / "chat_template.jinja").write_text("{{ x }}")
    done = CliRunner().invoke(app, ["convert", "from-hf", str(source), str(tmp_path / "m")])
    assert "chat   chatml, by its tokenizer" in done.output, done.output
    trained(tmp_path / "t", tmp_path / "m", "s1")
    done = CliRunner().invoke(app, ["convert", "to-hf", str(tmp_path / "t"), str(tmp_path / "b")])
    assert "left out chat_template.jinja: not of the chat format s1" in done.output, done.output


def test_a_model_made_from_nothing_says_how_it_ends(tmp_path):
    write_tokenizer(tmp_path, *CHATML)
    model = Transformer(CONFIGS["qwen2"], rngs=nnx.Rngs(0))
    save_model(tmp_path / "m", model, tokenizer_dir=tmp_path, chat="chatml", origin={})
    out = to_hf(tmp_path / "m", tmp_path / "b").directory
    assert read_json(out / "generation_config.json") == {"eos_token_id": [28, 26], "pad_token_id": 26}
    assert read_json(out / "config.json")["eos_token_id"] == 28
    assert read_json(out / "config.json")["pad_token_id"] == 26


def test_every_fault_is_told_at_once_and_nothing_is_written(tmp_path):
    source = published(tmp_path / "s", experts="mxfp4")
    tensors = random_tensors(GPT_OSS, "mxfp4")
    for layer in (0, 3):
        tensors[f"model.layers.{layer}.mlp.experts.up_proj_scales".replace("up_proj", "gate_up_proj")][
            1, 2
        ] = 255
    write_tensors(source, tensors)
    with pytest.raises(ValueError, match="NaN") as caught:
        from_hf(source, tmp_path / "m")
    for layer in (0, 3):
        where = f"model.safetensors: tensor model.layers.{layer}.mlp.experts.gate_up_proj_scales: 2 of 3456"
        assert where in str(caught.value)
    shutil.copyfile(source / "tokenizer.json", tmp_path / "tokenizer.json")
    (source / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="dtype: found 'int8'") as caught:
        from_hf(source, tmp_path / "m", dtype="int8", tokenizer=source)
    assert "has no tokenizer.json" in str(caught.value)
    with pytest.raises(ValueError, match="no chat format called 'harmoni'"):
        from_hf(source, tmp_path / "m", chat="harmoni", tokenizer=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"s", "tokenizer.json"}


def test_numbers_too_large_for_float16_are_refused_by_name(tmp_path):
    source = published(tmp_path / "s", "qwen2")
    tensors = random_tensors(CONFIGS["qwen2"])
    tensors["model.norm.weight"][5] = 1e6
    write_tensors(source, tensors)
    with pytest.raises(ValueError, match=r"tensor model.norm.weight: 1 numbers are too large for float16"):
        from_hf(source, tmp_path / "m", dtype="float16")


def test_nothing_is_written_over(tmp_path):
    source = published(tmp_path / "s", "llama", dtype="F32")
    model = from_hf(source, tmp_path / "m")
    with pytest.raises(ValueError, match="exists already"):
        from_hf(source, model)
    with pytest.raises(ValueError, match="exists already"):
        to_hf(model, source)


def test_a_full_disk_is_told_before_and_during_and_the_conversion_goes_on(tmp_path, monkeypatch):
    source = published(tmp_path / "s", "llama", dtype="F32")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(ValueError, match=r"are to be written, and 10 are free on this disk; make room"):
            from_hf(source, tmp_path / "m")
    written, write_all = [], stream_module._write_all

    def fills_up(descriptor, content):
        if content and len(written) == 8:
            os.write(descriptor, content[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        if content:
            written.append(len(content))
        write_all(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(stream_module, "_write_all", fills_up)
        with pytest.raises(ValueError, match="No space left on device; make room and run the same command"):
            from_hf(source, tmp_path / "m", workers=1)
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(stream_module, "_write_all", lambda d, c: (written.append(len(c)), write_all(d, c)))
    before = len(written)
    model = from_hf(source, tmp_path / "m")
    arrays = open_arrays(model / "params")
    assert sum(map(bool, written[before:])) == len(arrays) - 8
    assert contents(to_hf(model, tmp_path / "b").directory) == contents(source)


def test_another_conversion_to_the_same_place_is_refused(tmp_path, monkeypatch):
    source = published(tmp_path / "s", "qwen2")

    def stops(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jaxtax.hf.from_hf.seal", stops)
        with pytest.raises(KeyboardInterrupt):
            from_hf(source, tmp_path / "m")
    with pytest.raises(ValueError, match=r"holds another conversion.*differs in dtype\); run that command"):
        from_hf(source, tmp_path / "m", dtype="float32")
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match="differs in files"):
        from_hf(source, tmp_path / "m")
    shutil.rmtree(tmp_path / ".m.tmp")
    load_model(from_hf(source, tmp_path / "m"))


DIES = """
import itertools, os, signal, sys
from jaxtax.checkpoint.stream import Piece
from jaxtax.hf.writer import ShardWriter
from jaxtax.hf.from_hf import from_hf
from jaxtax.hf.to_hf import to_hf

def dies(function, at):
    count = itertools.count()
    def run(*args):
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return run

source, model, out = sys.argv[1:4]
Piece.write, ShardWriter.append = dies(Piece.write, int(sys.argv[4])), dies(ShardWriter.append, 24)
if not os.path.exists(model):
    from_hf(source, model, workers=2)
to_hf(model, out, shard_bytes=20_000, workers=1)
"""


def test_a_kill_leaves_nothing_that_looks_finished_and_the_same_command_goes_on(tmp_path, monkeypatch):
    source = published(tmp_path / "s", "qwen2")
    model, out = tmp_path / "m", tmp_path / "out"
    for at in ("9", "99"):  # in the middle of from_hf; then, going on, in the middle of to_hf
        code = [sys.executable, "-c", DIES, str(source), str(model), str(out), at]
        assert subprocess.run(code, check=False).returncode == -signal.SIGKILL
        assert model.exists() == (at == "99")
        assert not out.exists()
        if at == "9":
            assert len(read_journal(tmp_path / ".m.tmp" / "done.0.jsonl")[0]) >= 8
    load_model(model)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.tmp").rglob("model-*")}
    assert len(shards) >= 2
    assert contents(to_hf(model, out, shard_bytes=20_000).directory) == contents(source)
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == shards
    assert {path.name for path in tmp_path.iterdir()} == {"s", "m", "out"}


def test_a_piece_that_the_disk_lost_is_written_again(tmp_path, monkeypatch):
    source = published(tmp_path / "s", "llama", dtype="F32")
    with monkeypatch.context() as patch:
        patch.setattr("jaxtax.hf.from_hf.seal", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            from_hf(source, tmp_path / "m")
    lost = next((tmp_path / ".m.tmp").rglob("embed/c/0/0"))
    lost.write_bytes(bytes(lost.stat().st_size))
    load_model(from_hf(source, tmp_path / "m"))


def test_a_journal_that_was_cut_off_goes_on(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.add("a", 1)
    journal.close()
    with (tmp_path / "j").open("ab") as file:
        file.write(b'["b", ')
    journal = Journal(tmp_path / "j")
    assert journal.done == {"a": 1}
    journal.add("c", {"x": 2})
    journal.close()
    assert read_journal(tmp_path / "j")[0] == {"a": 1, "c": {"x": 2}}


def test_arrays_written_in_pieces_are_read_by_orbax_and_have_the_digest_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "PIECE", 100)
    drawn = np.random.default_rng(0)
    arrays = {
        "stacks.0.x": drawn.standard_normal((3, 5, 7)).astype(BF16),  # 14 bytes a row, 70 a layer
        "wide": drawn.integers(0, 256, (2, 2, 130), np.uint8),
        "embed": drawn.standard_normal((11, 13)).astype(np.float32),  # 52 bytes a row
        "norm": drawn.standard_normal(4).astype(np.float16),
    }
    prepare_arrays(tmp_path / "p", arrays)
    tree, digests, count = tree_inside(tmp_path / "p"), {}, 0
    for name, array in arrays.items():
        found = [piece.write(array[piece.index]) for piece in pieces_of(tree, name, array)]
        digests[name] = artifact.digest_array(array.shape, array.dtype, found)
        count += len(found)
        for piece in pieces_of(tree, name, array):
            assert piece.nbytes <= 100
            np.testing.assert_array_equal(piece.read(), array[piece.index])
    assert count == 3 + 8 + 11 + 1
    assert artifact.combine_arrays(digests) == artifact.digest_tree(arrays)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for name, a in arrays.items()}
    loaded = ocp.load(str((tmp_path / "p").absolute()), abstract)
    save_arrays(tmp_path / "q", loaded)
    for place in ("p", "q"):
        stored = open_arrays(tmp_path / place)
        assert stored.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (stored[name].shape, stored[name].dtype) == (array.shape, array.dtype)
            np.testing.assert_array_equal(stored[name][:], array)
            np.testing.assert_array_equal(stored[name][1:2], array[1:2])
            np.testing.assert_array_equal(stored[name][1:3], array[1:3])
            np.testing.assert_array_equal(np.asarray(loaded[name]), array)
        np.testing.assert_array_equal(stored["stacks.0.x"][2, 1:4], arrays["stacks.0.x"][2, 1:4])
    next((tmp_path / "p").rglob("embed/c/1/0")).unlink()
    with pytest.raises(DamagedError, match="embed cannot be read"):
        open_arrays(tmp_path / "p")["embed"][1:2]


def test_mixed_dtypes_are_refused_before_anything_is_written(tmp_path, tiny_qwen2_config):
    model = jax.eval_shape(lambda: Transformer(tiny_qwen2_config, rngs=nnx.Rngs(0)))
    model.norm.scale.set_value(jax.ShapeDtypeStruct((56,), "bfloat16"))
    with pytest.raises(ValueError, match=r"bfloat16: norm.scale\); cast it"):
        save_model(tmp_path / "m", model, tokenizer_dir=tmp_path, chat="harmony", origin={})
    assert not (tmp_path / "m").exists()


def test_the_commands_convert_and_say_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtax.hf.check.missing", lambda: ["torch"])  # whose part has tests of its own
    source = published(tmp_path / "s", experts="mxfp4")
    place = {name: str(tmp_path / name) for name in ("s", "m", "b", "j.json")}
    run = CliRunner().invoke
    done = run(app, ["convert", "from-hf", place["s"], place["m"], "--experts", "plain", "--workers", "2"])
    assert done.exit_code == 0, done.output
    assert f"next   jaxtax convert check {place['s']} {place['m']}" in done.output
    done = run(app, ["convert", "to-hf", place["m"], place["b"]])
    assert done.exit_code == 0, done.output
    assert "model.layers.3.mlp.experts.down_proj_blocks" in done.output
    assert "relative error" in done.output
    for hf, passed in ((place["b"], True), (str(published(tmp_path / "o", seed=1)), False)):
        done = run(app, ["convert", "check", hf, place["m"], "--json", str(tmp_path / "c.json")])
        assert done.exit_code == (0 if passed else 1), done.output
        assert read_json(tmp_path / "c.json")["passed"] == passed
    done = run(app, ["convert", "to-hf", str(source), place["j.json"]])
    assert done.exit_code == 2
    assert "is not a model directory" in done.output


def test_the_measurement_runs_on_any_size(tmp_path):
    write_random(tmp_path / "s", LLAMA, dtype="float32", sparse=True)
    assert all(not tensor.read().any() for tensor in open_checkpoint(tmp_path / "s").tensors.values())
    one = {"seconds": 2.0, "peak_bytes": 2.0**30}
    text = as_text({"size": "tiny", "bytes": 4e9, "cp": one, "from-hf": one | {"seconds": 4.0}})
    assert "from-hf      4.0 s     1000 MB/s   0.50 x cp   1.00 GiB peak" in text
    with pytest.raises(KeyError):
        measure("no such size", tmp_path / "x")
