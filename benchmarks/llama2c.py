"""Convert a llama2.c checkpoint to a Hugging Face folder that stock mlx-lm opens.

    python -P -m mlx_compress.benchmarks.llama2c MODEL.bin TOKENIZER.model OUT

Reads version 0 of Karpathy's format (https://github.com/karpathy/llama2.c, export.py): seven int32,
then float32 arrays. There, rotary embedding turns neighbouring pairs of a head; here, its two
halves: the rows of q and k move. The sentencepiece BPE becomes a `tokenizer.json`.
"""

import argparse
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import new_folder
from ..errors import InputError, exit_on_error

HEADER = struct.Struct("<7i")
SPACE = "\u2581"  # what sentencepiece writes for a space


@dataclass(frozen=True)
class Shape:
    """The header; a negative `vocab` in the file means a head of its own."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def read_bin(path: Path) -> tuple[Shape, dict[str, np.ndarray]]:
    """The shape and the weights by mlx-lm's names. Raises `InputError` for another format."""
    raw = path.read_bytes()
    if len(raw) < HEADER.size:
        raise InputError(f"{path}: {len(raw)} bytes are no llama2.c checkpoint.")
    *numbers, vocab, length = HEADER.unpack_from(raw)
    shape = Shape(*numbers, abs(vocab), length, tied=vocab > 0)
    if min(numbers) < 1 or not vocab or length < 1 or shape.dim % shape.heads:
        raise InputError(f"{path}: not a llama2.c checkpoint of version 0 (header {numbers}).")
    floats = np.frombuffer(raw[HEADER.size : len(raw) // 4 * 4], dtype="<f4")
    parts = _layout(shape)
    needed = sum(int(np.prod(size)) for _, size in parts)
    if floats.size != needed:
        raise InputError(f"{path}: holds {floats.size} floats, its header asks for {needed}.")
    return shape, _named(shape, floats, parts)


def _layout(s: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays in their order in the file; `*` stands for the layer, None is not kept."""
    kv = s.kv_heads * s.head_dim
    layer = "model.layers.*."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    table = (s.length * s.head_dim // 2,)
    return [
        ("model.embed_tokens", (s.vocab, s.dim)),
        (layer + "input_layernorm", (s.layers, s.dim)),
        (attention + "q_proj", (s.layers, s.dim, s.dim)),
        (attention + "k_proj", (s.layers, kv, s.dim)),
        (attention + "v_proj", (s.layers, kv, s.dim)),
        (attention + "o_proj", (s.layers, s.dim, s.dim)),
        (layer + "post_attention_layernorm", (s.layers, s.dim)),
        (mlp + "gate_proj", (s.layers, s.hidden, s.dim)),
        (mlp + "down_proj", (s.layers, s.dim, s.hidden)),
        (mlp + "up_proj", (s.layers, s.hidden, s.dim)),
        ("model.norm", (s.dim,)),
        ("", table),  # cosines
        ("", table),  # sines
        *([] if s.tied else [("lm_head", (s.vocab, s.dim))]),
    ]


def _named(shape: Shape, floats: np.ndarray, parts) -> dict[str, np.ndarray]:
    weights, start = {}, 0
    for name, size in parts:
        end = start + int(np.prod(size))
        array, start = floats[start:end].reshape(size), end
        for k, one in enumerate(array if "*" in name else [array] if name else []):
            path = name.replace("*", str(k)) + ".weight"
            rotary = name.endswith(("q_proj", "k_proj"))
            weights[path] = _halves(one, shape.head_dim) if rotary else one
    return weights


def _halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from (0, 1), (2, 3), ... to 0, 2, ..., 1, 3, ..."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def config(shape: Shape) -> dict:
    """A Llama config. A story ends where the next begins, so `<s>` ends the text too."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.length,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
        "torch_dtype": "float32",
    }


def fast_tokenizer(path: Path):
    """A sentencepiece BPE model, as trained for llama2.c, as a `tokenizers.Tokenizer`.

    Its normaliser drops spaces at both ends, joins runs of them, and puts one in front.
    """
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

    spm = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [spm.id_to_piece(k) for k in range(spm.vocab_size())]
    bytewise = any(map(spm.is_byte, range(len(pieces))))
    vocab = {piece: k for k, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab, _merges(spm, pieces), unk_token=pieces[spm.unk_id()], fuse_unk=True,
            byte_fallback=bytewise,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace(Regex(r"\A +| +\z"), ""),
        normalizers.Replace(Regex(" +"), SPACE),
        normalizers.Prepend(SPACE),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    bos = pieces[spm.bos_id()]
    tokenizer.add_special_tokens([pieces[k] for k in (spm.unk_id(), spm.bos_id(), spm.eos_id())])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spm.bos_id())]
    )
    return tokenizer


def _merges(spm, pieces: list[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the pieces of higher score come first."""
    plain = {
        piece: spm.get_score(k)
        for k, piece in enumerate(pieces)
        if not (spm.is_byte(k) or spm.is_control(k) or spm.is_unknown(k))
    }
    found = [
        (-score, pieces.index(piece[:cut]), (piece[:cut], piece[cut:]))
        for piece, score in plain.items()
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    return [pair for *_, pair in sorted(found)]


def convert(binary: Path, tokenizer: Path, out: Path) -> Shape:
    """Write the folder `out`, all or nothing."""
    shape, weights = read_bin(binary)
    spoken = fast_tokenizer(tokenizer)
    if spoken.get_vocab_size() != shape.vocab:
        raise InputError(
            f"{tokenizer}: {spoken.get_vocab_size()} pieces, the model has {shape.vocab}."
        )
    names = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": shape.length,
        "clean_up_tokenization_spaces": False,
    }
    with new_folder(out) as folder:
        arrays = {name: mx.array(array) for name, array in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(config(shape), indent=4) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=4) + "\n")
        spoken.save(str(folder / "tokenizer.json"))
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path, metavar="MODEL.bin")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER.model")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    for path in (args.binary, args.tokenizer):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    with exit_on_error():
        print(f"{args.out}: {convert(args.binary, args.tokenizer, args.out)}")


if __name__ == "__main__":
    main()
