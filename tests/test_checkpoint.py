import errno
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tiny
from mlx_compress import checkpoint, recipe
from mlx_compress.checkpoint import NotLoadable, check_free, copy_rest, new_folder, prove
from mlx_compress.errors import InputError, ResourceError
from mlx_compress.execute import run
from mlx_compress.options import Options
from mlx_compress.plan import PrunePlan
from mlx_compress.prune import prune_parameters, pruned_fetch, pruner

BOOKS = Path(__file__).parents[2] / "shared" / "data" / "lm-books5m"
TOKENS = mx.array([[3, 7, 1, 9, 22, 5, 4, 8]])


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a folder, the model in it, half of its units): not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "parent"
    tiny.save(tiny.LLAMA, folder)
    return folder, *planned_for(folder)


@pytest.fixture
def parent(tmp_path):
    """A folder of one's own."""
    folder = tmp_path / "parent"
    tiny.save(tiny.LLAMA, folder)
    return folder


@pytest.fixture
def unproven(monkeypatch):
    """Leave out the fresh process, which takes seconds."""
    monkeypatch.setattr(recipe, "prove", lambda *_: 0.0)


def planned_for(folder, **options):
    model = recipe.open_model(folder)
    options = {"pruning_ratio": 0.5, "importance": "magnitude", **options}
    return model, recipe.make_plan(model, Options(**options))


def saved(parent, out, **options):
    """Prune and save; returns (model, what was planned, the record)."""
    model, planned = planned_for(parent)
    return model, planned, recipe.save_pruned(model, planned, out, **options)


def stock(folder):
    """The folder as stock mlx-lm opens it."""
    from mlx_lm.utils import load_model

    return load_model(folder)[0]


def pruned_logits(model, plan, tokens=TOKENS):
    """What the edited graph makes of the pruned weights."""
    named = recipe.named_axes(model.trace(tokens))
    weights = dict(tree_flatten(model.module().parameters()))
    graph = recipe.edit_graph(named, plan)
    return run(graph, [tokens], prune_parameters(named, plan, weights))[0][0]


def close(left, right, tolerance=1e-5):
    return float(mx.abs(left - right).max()) <= tolerance * float(mx.abs(right).max())


def nothing_in(folder):
    return not list(folder.iterdir())


# ---- the round trip


def test_a_saved_folder_opens_in_a_fresh_process_and_computes_the_pruned_graph(parent, tmp_path):
    if (BOOKS / "tokenizer.json").exists():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(BOOKS / name, parent / name)
    out = tmp_path / "made" / "on the way" / "out"
    model, planned, record = saved(parent, out)
    assert 0 <= record["verified"]["logit_error"] <= 1e-4
    assert close(stock(out)(TOKENS), pruned_logits(model, planned.plan))
    written = (out / "compression.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(record))
    assert not [entry for entry in out.parent.iterdir() if entry != out]


def test_the_tokenizer_goes_with_the_weights(parent, tmp_path, unproven):
    if not (BOOKS / "tokenizer.json").exists():
        pytest.skip("needs the tokenizer of ../shared/data/lm-books5m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BOOKS / name, parent / name)
    saved(parent, tmp_path / "out")
    text = "It was the best of times"
    tokenizers = [recipe.open_model(f).tokenizer() for f in (parent, tmp_path / "out")]
    one, two = (tokenizer.encode(text) for tokenizer in tokenizers)
    assert one == two and len(one) > 3


def test_the_weights_are_the_kept_slots_of_the_parents(parent, tmp_path, unproven):
    model, planned, _ = saved(parent, tmp_path / "out")
    named = recipe.named_axes(model.trace(TOKENS))
    weights = prune_parameters(named, planned.plan, mx.load(str(parent / "model.safetensors")))
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert written.keys() == weights.keys()
    assert all(mx.array_equal(written[path], weights[path]) for path in weights)
    channels = written["model.layers.0.mlp.down_proj.weight"].shape[1]
    assert channels == 10


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_the_dtype_is_kept(tmp_path, unproven, dtype):
    tiny.save(tiny.LLAMA, tmp_path / "parent", dtype=dtype)
    saved(tmp_path / "parent", tmp_path / "out")
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {array.dtype for array in written.values()} == {dtype}


def test_the_config_is_the_new_one_sorted_by_name(parent, tmp_path, unproven):
    _, planned, _ = saved(parent, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == planned.config and list(config) == sorted(config)
    assert config["intermediate_size"] == 10 and config["num_attention_heads"] == 2


def test_the_record_holds_the_plan_the_recipe_and_the_parents_hash(parent, tmp_path, unproven):
    _, planned, _ = saved(parent, tmp_path / "out", finish=lambda folder: {"loss": 1.5})
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert PrunePlan.from_json(record["plan"]).cuts == planned.plan.cuts
    assert record["plan"]["recipe"]["importance"] == "magnitude"
    assert record["plan"]["recipe"]["pruning_ratio"] == 0.5
    digest = hashlib.sha256((parent / "model.safetensors").read_bytes()).hexdigest()
    assert record["parent"]["name"] == "parent"
    assert record["parent"]["sha256"]["model.safetensors"] == digest
    assert set(record["parent"]["sha256"]) == {"config.json", "model.safetensors"}
    assert record["metrics"] == {"loss": 1.5}
    assert 0 < record["kept_block_parameters"] < 1


def test_weights_are_sharded_as_mlx_lm_shards_them(parent, tmp_path, unproven, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2000)
    model, planned, _ = saved(parent, tmp_path / "out")
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors"
                     for k in range(1, len(files) + 1)]  # fmt: skip
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {f: set(mx.load(str(tmp_path / "out" / f))) for f in files}
    assert {path: f for f, paths in held.items() for path in paths} == index["weight_map"]
    sizes = [a.nbytes for f in files for a in mx.load(str(tmp_path / "out" / f)).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert close(stock(tmp_path / "out")(TOKENS), pruned_logits(model, planned.plan))
    for f in files:  # a shard is larger than allowed only where one parameter is
        held_bytes = [a.nbytes for a in mx.load(str(tmp_path / "out" / f)).values()]
        assert sum(held_bytes) <= 2000 or len(held_bytes) == 1


def test_what_is_not_weights_or_code_is_copied(tmp_path):
    parent, folder = tmp_path / "parent", tmp_path / "out"
    copied = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json",
              "merges.txt", "vocab.txt", "README.md"]  # fmt: skip
    left = ["model.safetensors", "pytorch_model.bin", "model.gguf", "tf_model.h5", "train.txt",
            "modeling.py", ".gitattributes", "model.safetensors.index.json", "model.onnx",
            "pytorch_model.bin.index.json", "hf_quant_config.json", "report.json",
            "compression.json", "config.json"]  # fmt: skip
    parent.mkdir()
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    for name in copied + left:
        (parent / name).write_text("theirs")
    (parent / "original").mkdir()
    copy_rest(parent, folder)
    assert sorted(f.name for f in folder.iterdir()) == sorted([*copied, "config.json"])
    assert (folder / "config.json").read_text() == "mine"


def test_pruning_twice_records_the_second_time(parent, tmp_path, unproven):
    saved(parent, tmp_path / "once", finish=lambda folder: (folder / "report.json").touch() or {})
    saved(tmp_path / "once", tmp_path / "twice")
    record = json.loads((tmp_path / "twice" / "compression.json").read_text())
    assert record["parent"]["name"] == "once"
    assert not (tmp_path / "twice" / "report.json").exists()


# ---- all or nothing

STEPS = ("write_weights", "write_config", "copy_rest", "prove", "parent_record", "write_record")
ERRORS = (KeyboardInterrupt(), MemoryError(), InputError("boom"))
FAILURES = [(step, RuntimeError("boom")) for step in STEPS] + [("copy_rest", e) for e in ERRORS]


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("step, error", FAILURES)
def test_an_error_anywhere_leaves_nothing(made, tmp_path, monkeypatch, unproven, step, error):
    _, model, planned = made
    monkeypatch.setattr(recipe, step, failing(error))
    with pytest.raises(type(error)) as caught:
        recipe.save_pruned(model, planned, tmp_path / "deep" / "er" / "out")
    assert caught.value is error
    assert nothing_in(tmp_path)


def test_an_error_while_measuring_leaves_nothing(made, tmp_path, unproven):
    seen = []

    def finish(folder):
        seen.extend(entry.name for entry in folder.iterdir())
        raise InputError("the text is too short")

    with pytest.raises(InputError, match="too short"):
        recipe.save_pruned(*made[1:], tmp_path / "out", finish=finish)
    assert "model.safetensors" in seen and nothing_in(tmp_path)


def test_folders_that_were_there_before_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "mine" / "out"):
        raise RuntimeError
    assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())


def test_the_folder_appears_only_when_all_is_done(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists() and folder.parent == tmp_path
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


# ---- where it cannot go


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_what_exists_already_is_refused_and_left_alone(tmp_path, make):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(InputError, match=f"--mlx-path {out}: exists already; name a new folder"):
        check_free(out)
    with pytest.raises(InputError, match="exists already"), new_folder(out):
        pytest.fail("entered")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_in_the_meantime_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot be made, {tmp_path / 'file'} is not a folder"):
        check_free(tmp_path / "file" / "out")


def test_a_name_that_the_disk_does_not_take_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be made"), new_folder(tmp_path / ("x" * 300)):
        pytest.fail("entered")
    assert not list(tmp_path.iterdir())


# ---- a full disk


def test_a_disk_without_room_is_told_before_anything_is_written(made, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="needs 2 MB, 1 MB are free; name a folder") as caught:
        check_free(tmp_path / "out", 2_000_000)
    assert caught.value.exit_code == 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError):
        recipe.save_pruned(*made[1:], tmp_path / "out")
    assert nothing_in(tmp_path)


FULL = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota exceeded"),
        RuntimeError("[write] Unable to write 8 bytes to file.")]  # fmt: skip


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_disk_that_fills_up_is_exit_code_4(made, tmp_path, monkeypatch, error):
    monkeypatch.setattr(recipe, "copy_rest", failing(error))
    with pytest.raises(ResourceError, match="out: the disk is full; nothing was") as caught:
        recipe.save_pruned(*made[1:], tmp_path / "out")
    assert caught.value.exit_code == 4 and nothing_in(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_mlx_itself_meeting_a_full_disk_is_exit_code_4(made, tmp_path):
    _, model, planned = made
    with pytest.raises(ResourceError, match="the disk is full"):
        with new_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").symlink_to("/dev/full")
            named = recipe.inspect(model)
            dtypes = dict.fromkeys(named.graph.parameters, mx.float32)
            fetch = pruned_fetch(model.fetch, pruner(named, planned.plan))
            checkpoint.write_weights(folder, named, planned.plan, fetch, dtypes)
    assert nothing_in(tmp_path)


# ---- proof


def test_weights_that_were_changed_after_writing_are_caught(made, tmp_path, monkeypatch):
    def tamper(folder, config):
        checkpoint.write_config(folder, config)
        weights = mx.load(str(folder / "model.safetensors"))
        weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})

    monkeypatch.setattr(recipe, "write_config", tamper)
    with pytest.raises(NotLoadable, match="logits differ from the pruned graph's by") as caught:
        recipe.save_pruned(*made[1:], tmp_path / "out")
    assert caught.value.exit_code == 3 and nothing_in(tmp_path)


def process(monkeypatch, *, logits=None, code=0, stderr=""):
    """Put a process in the fresh one's place, that gives these logits or fails."""

    def fake(command, **_):
        if logits is not None:
            np.save(command[-1], logits)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(checkpoint.subprocess, "run", fake)


def proven(logits, dtype=mx.float32):
    return prove(Path("folder"), TOKENS, mx.array(logits), dtype)


LOGITS = np.array([[[1.0, -2.0, 0.5]]], np.float32)


def test_the_error_is_relative_to_the_largest_logit(monkeypatch):
    process(monkeypatch, logits=LOGITS + np.float32(1e-5))
    assert proven(LOGITS) == pytest.approx(0.5e-5, rel=0.05)


@pytest.mark.parametrize("dtype, passes, fails", [(mx.float32, 5e-5, 3e-4), (mx.float16, 1e-2, 0.1),
                                                  (mx.bfloat16, 5e-2, 0.3)])  # fmt: skip
def test_half_precision_is_given_more_room(monkeypatch, dtype, passes, fails):
    process(monkeypatch, logits=LOGITS * (1 + passes))
    proven(LOGITS, dtype)
    process(monkeypatch, logits=LOGITS * (1 + fails))
    with pytest.raises(NotLoadable, match="differ from the pruned graph's"):
        proven(LOGITS, dtype)


def test_nan_does_not_pass(monkeypatch):
    process(monkeypatch, logits=LOGITS * np.float32(np.nan))
    with pytest.raises(NotLoadable, match="by nan"):
        proven(LOGITS)


def test_equal_infinities_pass_and_others_do_not(monkeypatch):
    masked = LOGITS.copy()
    masked[..., 1] = -np.inf
    process(monkeypatch, logits=masked)
    assert proven(masked) == 0
    with pytest.raises(NotLoadable, match="by inf"):
        proven(LOGITS)


def test_logits_of_another_shape_do_not_pass(monkeypatch):
    process(monkeypatch, logits=LOGITS[..., :2])
    with pytest.raises(NotLoadable, match=r"logits of shape \(1, 1, 2\), not \(1, 1, 3\)"):
        proven(LOGITS)


@pytest.mark.parametrize("stderr, reason", [("Traceback ...\nValueError: no such thing\n",
                                             "ValueError: no such thing"),
                                            ("", "exit code 9")])  # fmt: skip
def test_a_result_that_does_not_load_is_told_with_the_reason(monkeypatch, stderr, reason):
    process(monkeypatch, code=9, stderr=stderr)
    with pytest.raises(NotLoadable, match=f"does not load the result: {reason}$") as caught:
        proven(LOGITS)
    assert caught.value.exit_code == 3
