"""Run an exported model with ONNX Runtime and NumPy alone: as a module, or copied as a script.

    model = load("model.onnx")
    model.run({"pixels": x})                                     named inputs -> outputs in order
    for text in generate("model.onnx", "Once upon a time"): ...  a language model, streaming

    python generate.py "Once upon a time" --temperature 0.8      where the export put it

Needs neither MLX nor this project. Text goes through the package `tokenizers` if it is there, else
through `bpe.py`.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32,
    "tensor(int64)": np.int64, "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8, "tensor(double)": np.float64,
}  # fmt: skip
PAST, PRESENT, LENGTH = "past_key_values.", "present.", "past_length"


class RunError(ValueError):
    """What a user can cause, in one line."""

    exit_code = 2


class Model:
    """An ONNX file that ONNX Runtime has opened. `metadata` is what its export wrote into it."""

    def __init__(self, path: Path, session):
        self.path, self.session = path, session
        self.inputs = {one.name: one for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]
        self.metadata = session.get_modelmeta().custom_metadata_map

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in order. Raises `RunError` for inputs that do not fit, naming them."""
        return _run(self, self.session.run, None, self.checked(feeds))

    def checked(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        unknown, missing = feeds.keys() - self.inputs.keys(), self.inputs.keys() - feeds.keys()
        if unknown or missing:
            what = f"{min(unknown)}: is no input" if unknown else f"{min(missing)}: is missing"
            raise RunError(f"input {what} of {self.path.name}; it takes {', '.join(self.inputs)}.")
        return {name: self._fitting(name, array) for name, array in feeds.items()}

    def _fitting(self, name: str, array) -> np.ndarray:
        array, wanted = np.asarray(array), self.inputs[name]
        sizes = [n if isinstance(n, int) else None for n in wanted.shape]
        fits = len(sizes) == array.ndim and all(
            n in (None, m) for n, m in zip(sizes, array.shape, strict=True)
        )
        if not fits:
            words = ", ".join(map(str, wanted.shape))
            raise RunError(f"input {name}: shape {array.shape}, but ({words}) is expected.")
        kind = TYPES[wanted.type]
        if not np.can_cast(array.dtype, kind, "same_kind"):
            raise RunError(f"input {name}: {array.dtype} was given, {np.dtype(kind)} is expected.")
        return array.astype(kind, copy=False)


def load(path: str | Path, *, threads: int | None = None) -> Model:
    """Open an ONNX file. `threads` are those of one operator; all of the machine's by default.

    Raises `RunError` when it or its weights are missing or damaged.
    """
    import onnxruntime as ort

    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: there is no such file.")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own, of many types and several lines
        raise RunError(_reason(path, str(error))) from error
    return Model(path, session)


def _cores() -> int:
    """Those that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _reason(path: Path, text: str) -> str:
    data = path.with_name(path.name + ".data")
    if "external" in text.lower() or data.name in text:
        if not data.is_file():
            return f"{path}: its weights are missing; put {data.name} beside it."
        return f"{path}: {data.name} does not fit it; export both anew."
    if "INVALID_PROTOBUF" in text or "parse" in text.lower():
        return f"{path}: is damaged or no ONNX file; export it anew."
    return f"{path}: ONNX Runtime cannot open it ({_one_line(text)})."


def _run(model: Model, call, *args):
    try:
        return call(*args)
    except Exception as error:  # ONNX Runtime's own
        raise RunError(f"{model.path}: ONNX Runtime failed ({_one_line(str(error))}).") from error


def _one_line(text: str) -> str:
    return re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(text.split()))[:300]


def run_onnx(path: str | Path, feeds: Mapping[str, np.ndarray], **options) -> dict[str, np.ndarray]:
    """Outputs by name."""
    model = load(path, **options)
    return dict(zip(model.outputs, model.run(feeds), strict=True))


# ---- language models


class Decoder:
    """A language model with its cache, which stays inside ONNX Runtime from step to step."""

    def __init__(self, model: Model):
        if "input_ids" not in model.inputs or "logits" not in model.outputs:
            raise RunError(f"{model.path}: is no language model: it has no input_ids or no logits.")
        limits = json.loads(model.metadata.get("mlx_compress.limits", "{}"))
        self.model, self.vocabulary = model, limits.get("input_ids")
        self.positions = int(model.metadata.get("mlx_compress.positions", 0))
        self.buffered = LENGTH in model.inputs
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = self.capacity = 0
        self.cache = {
            name: self._value(np.zeros(self._shape(one, 0), TYPES[one.type]))
            for name, one in self.model.inputs.items() if name.startswith(PAST)
        }  # fmt: skip

    @staticmethod
    def _shape(one, positions: int) -> tuple[int, ...]:
        _, heads, _, width = one.shape
        return 1, heads, positions, width

    @staticmethod
    def _value(array: np.ndarray):
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(array)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Take in tokens; returns the logits [vocabulary] after the last of them."""
        if not self.cache and self.length:
            raise RunError(f"{self.model.path}: has no cache; export it with one to generate.")
        binding = self.model.session.io_binding()
        kind = TYPES[self.model.inputs["input_ids"].type]
        held = [self._value(np.array([tokens], kind))]
        binding.bind_ortvalue_input("input_ids", held[0])
        if self.buffered:
            self._make_room(self.length + len(tokens))
            held.append(self._value(np.array([self.length], np.int64)))
            binding.bind_ortvalue_input(LENGTH, held[1])
        binding.bind_output("logits")
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace(PAST, PRESENT, 1)
            if self.buffered:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        _run(self.model, self.model.session.run_with_iobinding, binding)
        logits, *state = binding.get_outputs()
        if not self.buffered:
            self.cache = dict(zip(self.cache, state, strict=True))
        self.length += len(tokens)
        return logits.numpy()[0, -1].astype(np.float32)

    def _make_room(self, needed: int) -> None:
        """Larger buffers, with what the old ones hold."""
        if needed > self.positions:
            raise RunError(f"{needed} tokens: its cache holds {self.positions} positions at most.")
        if needed <= self.capacity:
            return
        self.capacity = min(max(256, needed, 2 * self.capacity), self.positions)
        for name, one in self.model.inputs.items():
            if name.startswith(PAST):
                wider = np.zeros(self._shape(one, self.capacity), TYPES[one.type])
                wider[:, :, : self.length] = self.cache[name].numpy()[:, :, : self.length]
                self.cache[name] = self._value(wider)

    def check(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise RunError("the prompt is empty; give at least one token.")
        bad = [t for t in tokens if self.vocabulary and not 0 <= t < self.vocabulary]
        if bad:
            raise RunError(f"token {bad[0]}: the vocabulary has {self.vocabulary} tokens.")

    def tokens(
        self, prompt: Sequence[int], *, max_tokens: int = 128, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0, stop: Sequence[int] = (),
    ) -> Iterator[int]:  # fmt: skip
        """New tokens, one by one, until one of `stop`. Temperature 0 takes the likeliest."""
        self.check(prompt)
        rng, given = np.random.default_rng(seed), list(prompt)
        for _ in range(max_tokens):
            chosen = sample(self.step(given), rng, temperature, top_p, top_k)
            if chosen in stop:
                return
            yield chosen
            given = [chosen]


def sample(logits: np.ndarray, rng, temperature: float, top_p: float, top_k: int) -> int:
    """Of the `top_k` likeliest tokens, those that together reach `top_p`; one of them at random."""
    if temperature <= 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = (logits[order] - logits[order[0]]).astype(np.float64) / temperature
    weights = np.exp(scaled)
    weights /= weights.sum()
    count = int(np.searchsorted(np.cumsum(weights), top_p)) + 1 if top_p < 1 else len(order)
    weights = weights[:count] / weights[:count].sum()
    return int(order[rng.choice(len(weights), p=weights)])


def generate(
    path: str | Path | Model, prompt: str | Sequence[int], *, tokenizer=None,
    threads: int | None = None, **options,
) -> Iterator[str]:  # fmt: skip
    """Text that follows `prompt` (a text, or tokens), piece by piece.

    `options` are those of `Decoder.tokens`; it ends at the model's own stop tokens. `tokenizer` is
    a tokenizer.json or an object that encodes and decodes; by default the tokenizer.json beside
    the model. Raises `RunError` for an empty prompt or a missing file.
    """
    model = path if isinstance(path, Model) else load(path, threads=threads)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = open_tokenizer(tokenizer or model.path.with_name("tokenizer.json"))
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    ids = list(getattr(ids, "ids", ids))
    ends = json.loads(model.metadata.get("stop_tokens", "[]"))
    yield from _pieces(tokenizer, Decoder(model).tokens(ids, **{"stop": ends, **options}))


def _pieces(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes certain: a letter may take several tokens."""
    held: list[int] = []
    shown = ""
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        # Some tokenizers drop a space that comes first, so one word stays to be decoded with.
        held, shown = (held[-1:], tokenizer.decode(held[-1:])) if text else (held, text)
    if held:
        yield tokenizer.decode(held)[len(shown) :]


def open_tokenizer(path: str | Path):
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: there is no such file; give the model's tokenizer.json.")
    try:
        try:
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(path))
        except ImportError:
            if __package__:
                from .bpe import ByteLevelBPE
            else:
                from bpe import ByteLevelBPE
            return ByteLevelBPE.open(path)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise RunError(f"{path}: cannot be used ({_one_line(str(error))}).") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Text from an exported language model.")
    parser.add_argument("prompt")
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model.onnx"))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = vars(parser.parse_args(argv))
    prompt, times = args.pop("prompt"), []
    print(prompt, end="", flush=True)
    try:
        for text in generate(args.pop("model"), prompt, **args):
            print(text, end="", flush=True)
            times.append(time.perf_counter())
    except RunError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    speed = ""
    if len(times) > 1:  # from the first one on: what opens the model is not counted
        speed = f"[{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s]"
    print(f"\n{speed}", file=sys.stderr)


if __name__ == "__main__":
    main()
