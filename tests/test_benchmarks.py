"""Each benchmark runs at a tiny size and prints its table. No test looks at a clock."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.benchmarks import criteria, lean, llama2c
from mlx_lm.utils import load_model, load_tokenizer

from mlx_compress.errors import InputError

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, LENGTH = 16, 24, 2, 4, 2, 64
TEXT = [
    "Once upon a time there was a cat, and the cat had a hat.\nIt sat on the mat all day.",
    "The dog ran to the pond; a big red ball fell in. 'Oh no!' said the dog. 12 times.",
] * 200


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("spm") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXT).split("\n")), model_prefix=str(prefix),
        vocab_size=300, model_type="bpe", byte_fallback=True, split_digits=True,
        allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def arrays(spm_path):
    """Random weights in the order of a llama2.c file."""
    import sentencepiece

    vocab = sentencepiece.SentencePieceProcessor(model_file=str(spm_path)).vocab_size()
    kv, rng = KV_HEADS * DIM // HEADS, np.random.default_rng(0)
    shapes = {
        "embedding": (vocab, DIM), "attention_norm": (LAYERS, DIM), "q": (LAYERS, DIM, DIM),
        "k": (LAYERS, kv, DIM), "v": (LAYERS, kv, DIM), "o": (LAYERS, DIM, DIM),
        "mlp_norm": (LAYERS, DIM), "gate": (LAYERS, HIDDEN, DIM), "down": (LAYERS, DIM, HIDDEN),
        "up": (LAYERS, HIDDEN, DIM), "norm": (DIM,), "cos": (LENGTH, DIM // HEADS // 2),
        "sin": (LENGTH, DIM // HEADS // 2),
    }  # fmt: skip
    return {name: rng.normal(0, 0.3, shape).astype("<f4") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def bin_path(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("bin") / "model.bin"
    header = (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, len(arrays["embedding"]), LENGTH)
    path.write_bytes(struct.pack("<7i", *header) + b"".join(a.tobytes() for a in arrays.values()))
    return path


@pytest.fixture(scope="module")
def folder(bin_path, spm_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    llama2c.convert(bin_path, spm_path, out)
    return out


def forward(w: dict, ids: list[int]) -> np.ndarray:
    """llama2.c's forward pass, position by position as it is written there."""
    head = DIM // HEADS

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def turned(vector, position):
        out = vector.copy()
        for i in range(0, len(vector), 2):
            angle = position / 10000 ** ((i % head) / head)
            c, s = np.cos(angle), np.sin(angle)
            a, b = vector[i], vector[i + 1]
            out[i], out[i + 1] = a * c - b * s, a * s + b * c
        return out

    keys, values = [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)]
    logits = []
    for position, token in enumerate(ids):
        x = w["embedding"][token].astype(float)
        for n in range(LAYERS):
            y = norm(x, w["attention_norm"][n])
            q = turned(w["q"][n] @ y, position)
            keys[n].append(turned(w["k"][n] @ y, position))
            values[n].append(w["v"][n] @ y)
            mixed = []
            for h in range(HEADS):
                own = slice(h * head, (h + 1) * head)
                group = h // (HEADS // KV_HEADS)
                shared = slice(group * head, (group + 1) * head)
                scores = np.array([q[own] @ k[shared] for k in keys[n]]) / np.sqrt(head)
                weights = np.exp(scores - scores.max())
                seen = np.array([v[shared] for v in values[n]])
                mixed.append(weights / weights.sum() @ seen)
            x = x + w["o"][n] @ np.concatenate(mixed)
            y = norm(x, w["mlp_norm"][n])
            gate = w["gate"][n] @ y
            x = x + w["down"][n] @ (gate / (1 + np.exp(-gate)) * (w["up"][n] @ y))
        logits.append(w["embedding"] @ norm(x, w["norm"]))
    return np.array(logits)


def test_a_converted_llama2c_model_computes_what_llama2c_does(folder, arrays):
    model, _ = load_model(folder)
    ids = np.random.default_rng(1).integers(0, len(arrays["embedding"]), 12).tolist()
    got = np.array(model(mx.array([ids]))[0])
    want = forward(arrays, ids)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_the_converted_tokenizer_encodes_as_sentencepiece_does(folder, spm_path):
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    tokenizer = load_tokenizer(folder)
    odd = [
        "",
        " ",
        "  two  spaces  ",
        "\n\n",
        " a\n b ",
        "caf\u00e9 \u65e5\u672c \U0001f642",
        "1234",
    ]
    for text in [*TEXT[:2], *odd]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == spm.encode(text), text
        assert tokenizer.encode(text) == [spm.bos_id(), *ids]
        assert tokenizer.decode(ids) == spm.decode(ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "5 bytes are no llama2.c checkpoint"),
        (bytes(100), "not a llama2.c checkpoint of version 0"),
        (struct.pack("<7i", 16, 24, 2, 4, 2, 32, 64) + bytes(400), "holds 100 floats"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, content, message):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        llama2c.read_bin(path)


@pytest.fixture
def text_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(TEXT))
    return tmp_path


def run_criteria(folder, data, out, *extra):
    criteria.main([
        "--model", str(folder), "--data", str(data), "--out", str(out), "--samples", "4",
        "--eval-samples", "4", "--max-seq-length", "16", "--removed", "0.2,0.5",
        "--random-seeds", "2", *extra,
    ])  # fmt: skip


def assert_rows(out, count):
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == count
    for row in rows:
        low, high = (row["paired"]["nats_per_token"][end] for end in ("low", "high"))
        assert low <= row["paired"]["nats_per_token"]["estimate"] <= high
        assert 0.4 < row["removed"] < 0.6 and row["seconds"] > 0
        assert np.mean(row["by_window"]) == pytest.approx(row["nats_per_token"], abs=1e-4)
    return rows


def test_methods_are_compared_row_by_row_and_auto_with_the_others(folder, text_folder, capsys):
    out = text_folder / "result.json"
    run_criteria(folder, text_folder, out, "--markdown", "--samples", "8", "--removed", "0.5")
    printed = capsys.readouterr().out
    for name in criteria.METHODS:
        assert f"\n| {name} | " in printed
    rows = {row["method"]: row for row in assert_rows(out, len(criteria.METHODS) + 1)}
    assert "Chosen by auto: 50 % " in printed
    for ours in criteria.OURS:
        assert f"\n| {ours} against the best without refit (" in printed
        ratio = rows[ours]["perplexity"] / rows["OSSCAR"]["perplexity"]
        assert f"\n| {ours} against OSSCAR | x {ratio:.3f}; lost x " in printed
    for name in set(rows) - {"layers", "FLAP", "searched"}:
        assert rows[name]["removed"] == rows["magnitude"]["removed"]


def test_criteria_are_compared_plain_and_refitted(folder, text_folder, capsys):
    out = text_folder / "result.json"
    run_criteria(folder, text_folder, out, "--markdown", "--criteria", "all", "--removed", "0.5")
    printed = capsys.readouterr().out
    for name in criteria.CRITERIA:
        assert f"\n| {name} | " in printed and f"\n| {name} + refit | " in printed
    assert_rows(out, 2 * (len(criteria.CRITERIA) + 1))


def test_criteria_goes_on_where_it_stopped(folder, text_folder, capsys):
    out, chosen = text_folder / "result.json", ("--criteria", "random,magnitude+taylor")
    run_criteria(folder, text_folder, out, *chosen)
    result = json.loads(out.read_text())
    finished = result["rows"][:-1]
    out.write_text(json.dumps(result | {"rows": finished}))
    run_criteria(folder, text_folder, out, *chosen)
    again = json.loads(out.read_text())["rows"]
    assert again[:-1] == finished and len(again) == len(result["rows"])
    assert again[-1]["nats_per_token"] == result["rows"][-1]["nats_per_token"]
    with pytest.raises(SystemExit):
        run_criteria(folder, text_folder, out, "--criteria", "random")
    assert "made with other settings" in capsys.readouterr().err


def test_a_method_of_no_name_is_refused_in_one_line(folder, text_folder, capsys):
    with pytest.raises(SystemExit):
        run_criteria(folder, text_folder, text_folder / "result.json", "--methods", "FLOP")
    assert "there is no FLOP; choose from" in capsys.readouterr().err


def test_lean_prints_its_table(tmp_path, capsys):
    lean.main([
        "--layers", "2", "--hidden", "64", "--ffn", "128", "--heads", "4", "--kv-heads", "2",
        "--vocab", "100", "--samples", "2", "--length", "16", "--batch-size", "2",
        "--keep", str(tmp_path / "model"), "--out", str(tmp_path / "lean.json"),
        "--importance", "taylor", "--markdown",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert "\n| forward | " in printed and "\n| taylor | " in printed
    row = json.loads((tmp_path / "lean.json").read_text())["rows"]["taylor"]
    assert 0 < row["kept"] < 1 and row["peak_bytes"] > 0


def test_the_random_model_is_the_one_that_its_config_declares(tmp_path):
    size = lean.Size(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, vocab=100)
    weights = lean.write_model(tmp_path / "model", size)
    model, _ = load_model(tmp_path / "model")  # strict: names and shapes must be the model's
    assert model(mx.array(size.windows().tokens[:1, :4])).shape == (1, 4, 100)
    files = (tmp_path / "model").glob("*.safetensors")
    assert weights <= sum(file.stat().st_size for file in files) < weights * 1.1
