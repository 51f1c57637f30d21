"""Exports run without MLX: text, tokens, errors in one line, a bare process; int8 files."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import onnx
import pytest
from mlx_compress.bridges.decoder import module_program
from mlx_compress.bridges.onnx.bpe import ByteLevelBPE
from mlx_compress.bridges.onnx.export import export_onnx
from mlx_compress.bridges.onnx.quantize import count_quantized, quantize_onnx, set_accuracy_level
from mlx_compress.bridges.onnx.runner import (
    Decoder,
    RunError,
    generate,
    load,
    open_tokenizer,
    run_onnx,
    sample,
)
from mlx_compress.bridges.onnx.scripts import add_scripts
from mlx_compress.bridges.programs import open_program

import tiny
from mlx_compress.errors import InputError
from mlx_compress.program import program_of
from zoo_exports import stock_decode

BOOKS = Path(__file__).parents[2] / "shared/data/lm-books5m"
needs_books = pytest.mark.skipif(not BOOKS.is_dir(), reason="../shared/data/lm-books5m is absent")
TEXT = "Ünïcødé 你好 １２３ ½ ๓ it's  we'll\n\n\t x\u2028y\u00a0z \x1c 👩‍👩‍👧 "


@lru_cache
def decoder():
    module = tiny.build(tiny.LLAMA)
    return module, module_program(lambda: module, metadata={"stop_tokens": "[]"})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    export_onnx(decoder()[1], path)
    return path


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """The export of a model that was trained, as the command lays it out."""
    path = tmp_path_factory.mktemp("books") / "model.onnx"
    program = open_program(BOOKS)
    export_onnx(program, path)
    add_scripts(path, program)
    path.with_name("tokenizer.json").write_bytes((BOOKS / "tokenizer.json").read_bytes())
    return path


# ---- a byte-level BPE without a package


@needs_books
def test_plain_bpe_encodes_and_decodes_a_book_as_tokenizers_does():
    from tokenizers import Tokenizer

    plain = ByteLevelBPE.open(BOOKS / "tokenizer.json")
    theirs = Tokenizer.from_file(str(BOOKS / "tokenizer.json"))
    book = (BOOKS / "valid.txt").read_text()[:100_000] + TEXT + "<|endoftext|>end"
    ids = plain.encode(book)
    assert ids == theirs.encode(book).ids
    assert plain.decode(ids) == theirs.decode(ids)
    assert plain.decode(ids[:40]) == theirs.decode(ids[:40])


# How Llama 3 and Qwen cut words.
CUTS = {
    "llama": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def tokenizer_like(cut: str) -> dict:
    """A tokenizer.json that splits so and merges a few pairs of letters."""
    letters = ByteLevelBPE(document({}, [])).to_text.values()
    merges = [["t", "h"], ["th", "e"], ["Ġ", "t"], ["1", "2"], ["Ã", "¼"]]
    words = [*sorted(letters), *("".join(pair) for pair in merges)]
    made = document({word: k for k, word in enumerate(words)}, merges)
    made["normalizer"] = {"type": "NFC"}
    split = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}  # fmt: skip
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    begin = {"id": "<s>", "ids": [len(words)], "tokens": ["<s>"]}
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": begin},
    }  # fmt: skip
    made["added_tokens"] = [
        {"id": len(words), "content": "<s>", "special": True, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
    ]  # fmt: skip
    return made


def document(vocabulary: dict, merges: list) -> dict:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                                              "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_plain_bpe_cuts_words_as_newer_models_do(name):
    from tokenizers import Tokenizer

    made = tokenizer_like(CUTS[name])
    theirs = Tokenizer.from_str(json.dumps(made))
    for text in (TEXT, "the theme, THE 12345 'Ll  \r\n\n x", "u\u0308ber <s> the", ""):
        ids = ByteLevelBPE(made).encode(text)
        assert ids == theirs.encode(text).ids, text
        assert ByteLevelBPE(made).decode(ids) == theirs.decode(ids)


def test_another_kind_of_tokenizer_is_refused(tmp_path, monkeypatch):
    made = document({"a": 0}, [])
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(made))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RunError, match="no byte-level BPE; install the package tokenizers"):
        open_tokenizer(path)


# ---- decoding


@pytest.mark.parametrize("prompt", ([5, 17, 3, 12, 8], [7]))
def test_greedy_tokens_are_stock_mlx_lms(exported, prompt):
    tokens = list(Decoder(load(exported)).tokens(prompt, max_tokens=16))
    assert tokens == stock_decode(decoder()[0], prompt)


def test_a_seed_fixes_what_is_sampled(exported):
    runs = [
        list(Decoder(load(exported)).tokens([3, 4], max_tokens=12, temperature=1.5, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_stop_tokens_end_it(exported):
    tokens = list(Decoder(load(exported)).tokens([5], max_tokens=16))
    stop = tokens[6]
    shorter = list(Decoder(load(exported)).tokens([5], max_tokens=16, stop=[stop]))
    assert shorter == tokens[: tokens.index(stop)]


def test_sampling_keeps_to_top_k_and_top_p():
    logits, rng = np.log(np.array([0.5, 0.3, 0.15, 0.05])), np.random.default_rng(0)
    drawn = [sample(logits, rng, 1.0, 1.0, 0) for _ in range(4000)]
    frequencies = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(frequencies, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert {sample(logits, rng, 1.0, 1.0, 2) for _ in range(200)} == {0, 1}
    assert {sample(logits, rng, 1.0, 0.7, 0) for _ in range(200)} == {0, 1}
    assert sample(logits, rng, 0.0, 1.0, 0) == 0


@needs_books
def test_the_text_is_stock_mlx_lms_and_comes_piece_by_piece(books):
    import mlx_lm
    from mlx_compress.bridges.mlx_lm import open_model

    model = open_model(BOOKS)
    want = mlx_lm.generate(model.module(), model.tokenizer(), "Once upon a time", max_tokens=24)
    pieces = list(generate(books, "Once upon a time", max_tokens=24))
    assert "".join(pieces) == want and len(pieces) > 12


BARE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlx", "mlx_compress", "mlx_lm", "tokenizers", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path[0] = script.rpartition("/")[0]
runpy.run_path(script, run_name="__main__")
"""


@needs_books
def test_the_script_needs_onnxruntime_and_numpy_alone(books):
    want = "".join(generate(books, "It was", max_tokens=8))
    command = [sys.executable, "-c", BARE, str(books.with_name("generate.py"))]
    done = subprocess.run([*command, "It was", "--max-tokens", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "It was" + want
    empty = subprocess.run([*command, ""], capture_output=True, text=True)
    assert empty.returncode == 2 and "error: the prompt is empty" in empty.stderr


# ---- errors


def test_errors_are_one_line_and_name_the_thing(exported, tmp_path):
    feeds = decoder()[1].feeds({"batch": 1, "length": 3, "past": 2})
    for change, text in (
        ({"input_ids": feeds["input_ids"][0]}, r"input input_ids: shape \(3,\), but \(batch, leng"),
        ({"past_key_values.0.key": np.zeros((1, 3, 2, 6))}, "input past_key_values.0.key: shape"),
        ({"input_ids": np.zeros((1, 3))}, "input_ids: float64 was given, int32 is expected"),
        ({"pixels": np.zeros(3)}, "input pixels: is no input of model.onnx; it takes input_ids"),
        ({"past_key_values.0.key": np.zeros((2, 2, 2, 6))}, "ONNX Runtime failed"),
    ):
        with pytest.raises(RunError, match=text) as caught:
            load(exported).run({**feeds, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="input past_key_values.0.key: is missing"):
        load(exported).run({k: v for k, v in feeds.items() if k != "past_key_values.0.key"})
    with pytest.raises(RunError, match="there is no such file"):
        load(tmp_path / "none.onnx")
    for prompt, text in (([], "the prompt is empty"), ([5, 99], "token 99: the vocabulary has 23")):
        with pytest.raises(RunError, match=text):
            next(generate(exported, prompt, tokenizer=object()))
    with pytest.raises(RunError, match=r"tokenizer.json: there is no such file"):
        next(generate(exported, "Hello"))


def test_damaged_files_and_lost_weights_are_named(tmp_path):
    path = export_onnx(decoder()[1], tmp_path / "model.onnx", external_bytes=0).path
    data = tmp_path / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:5000])
    with pytest.raises(RunError, match="model.onnx.data does not fit it"):
        load(path)
    data.unlink()
    with pytest.raises(RunError, match="weights are missing; put model.onnx.data beside it"):
        load(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(RunError, match="damaged or no ONNX file"):
        load(path)


def test_a_model_that_takes_no_tokens_is_no_language_model(tmp_path):
    program = program_of(lambda _, x: 2 * x, {"x": mx.zeros((3,))}, parameters={}, outputs=["y"])
    path = export_onnx(program, tmp_path / "x.onnx").path
    with pytest.raises(RunError, match="is no language model"):
        next(generate(path, [1], tokenizer=object()))
    assert run_onnx(path, {"x": np.ones(3, np.float32)})["y"].tolist() == [2, 2, 2]


def test_a_full_buffer_says_how_much_it_holds(tmp_path):
    module = tiny.build({**tiny.LLAMA, "head_dim": 16})
    program = module_program(lambda: module)
    path = export_onnx(program, tmp_path / "x.onnx", cache="buffer", positions=8).path
    with pytest.raises(RunError, match="its cache holds 8 positions"):
        list(Decoder(load(path)).tokens([1, 2, 3], max_tokens=16))


# ---- int8


def test_int8_weights_are_smaller_near_and_counted(exported, tmp_path):
    program = decoder()[1]
    batches = [program.feeds({"batch": 1, "length": 9, "past": 2}, seed) for seed in range(4)]
    feeds = program.feeds({"batch": 2, "length": 4, "past": 3}, 9)
    want = load(exported).run(feeds)[0]
    for name, calibration, near in (("dynamic", None, 0.15), ("static", batches, 0.5)):
        done = quantize_onnx(exported, tmp_path / f"{name}.onnx", calibration=calibration)
        assert done.layers == done.layers_before == 15 == count_quantized(done.path)
        assert done.bytes_before == exported.stat().st_size
        got = load(done.path).run(feeds)[0]
        assert 0 < np.abs(got - want).max() / np.abs(want).max() < near
        assert load(done.path).metadata == load(exported).metadata


def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(tmp_path):
    program = program_of(
        lambda p, x: x * p["w"], {"x": mx.zeros((2, 3))}, parameters={"w": mx.ones(3)},
        outputs=["y"],
    )  # fmt: skip
    path = export_onnx(program, tmp_path / "x.onnx").path
    with pytest.raises(InputError, match="none of its 0 layers can be quantised"):
        quantize_onnx(path, tmp_path / "y.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


def test_a_transposed_weight_is_not_taken_for_a_quantised_one(tmp_path):
    """What ONNX Runtime leaves as it is, and reports as done."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [
        onnx.helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    info = [onnx.helper.make_tensor_value_info(n, 1, [2, 4]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], [weight])
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="none of its 1 layers"):
        quantize_onnx(tmp_path / "x.onnx", tmp_path / "y.onnx")


def test_the_accuracy_level_can_be_changed_in_a_file(tmp_path):
    import mlx.nn as nn

    module = tiny.build({**tiny.LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64})
    nn.quantize(module, 32, 4)
    program = module_program(lambda: module)
    path = export_onnx(program, tmp_path / "x.onnx", accuracy_level=0, external_bytes=0).path
    feeds = program.feeds({"batch": 1, "length": 4, "past": 0})
    exact = load(path).run(feeds)[0]
    assert set_accuracy_level(path, 4) == 15
    off = np.abs(load(path).run(feeds)[0] - exact).max() / np.abs(exact).max()
    assert 1e-4 < off < 0.1
