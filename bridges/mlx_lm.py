"""The bridge to mlx-lm: open a checkpoint folder without reading its weights, build stock models.

Nothing in the folder is executed unless `trust_remote_code` says so. Weights come lazily and fresh
at every `fetch`, so whoever drops them frees the memory.
"""

import contextlib
import copy
import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from ..graph import Graph, trace
from ..probes import Shapes, memoised

NUMERICS_KEYS = ("quantization", "quantization_config")


@dataclass
class LanguageModel:
    """A checkpoint folder. `config` is without quantisation; `notes` say what was changed.

    `zeros` are parameters that the config asks for and the folder lacks; they are zero.
    """

    path: Path
    config: dict
    trust_remote_code: bool = False
    notes: list[str] = field(default_factory=list)
    zeros: frozenset[str] = frozenset()
    _weights: dict[str, mx.array] = field(default_factory=dict, repr=False)
    _paths: frozenset[str] = frozenset()
    _absent: frozenset[str] = frozenset()

    def module(self, *, dequantised: bool = True) -> nn.Module:
        """The stock model of this folder, dequantised if need be, with lazy weights."""
        config = self.config if self.zeros else None
        with _one_line(self.path):
            model = _load(self.path, self.trust_remote_code, dequantised, config)[0]
        known = dict(tree_flatten(model.parameters())) if self.zeros else {}
        zeros = [(path, mx.zeros_like(known[path])) for path in self.zeros]
        return model.load_weights(zeros, strict=False)

    def fetch(self, paths: Iterable[str]) -> dict[str, mx.array]:
        """Parameters by path, not yet read; each is handed out once and then opened anew."""
        paths = list(paths)
        if not self._weights.keys() >= set(paths):
            self._weights = dict(tree_flatten(self.module().parameters()))
        return {path: self._weights.pop(path) for path in paths}

    def build(self, config: dict | None = None) -> nn.Module:
        """The stock model of a config, with random weights that are not evaluated."""
        config = copy.deepcopy(self.config if config is None else config)
        model_class, args_class = _classes(self.path, config, self.trust_remote_code)
        return model_class(args_class.from_dict(config)).eval()

    @cached_property
    def shapes_of(self) -> Callable[[dict], Shapes | None]:
        """From a config to the shape of every parameter of the model that stock mlx-lm makes of it.

        None for a config that builds no model. Each config is built once: fitting asks for the
        same ones again and again.
        """

        def shapes(config: dict) -> Shapes:
            built = tree_flatten(self.build(config).parameters())
            return {path: array.shape for path, array in built if path not in self._absent}

        return memoised(shapes)

    def optional_fields(self) -> list[tuple[str, ...]]:
        """Declared config fields that are left out or None, such as `head_dim`."""
        return [
            (f.name,)
            for f in self.declared_fields()
            if self.config.get(f.name) is None and f.default is None
        ]

    def declared_fields(self) -> tuple[dataclasses.Field, ...]:
        """The config fields that the stock model declares."""
        _, args_class = _classes(self.path, self.config, self.trust_remote_code)
        return dataclasses.fields(args_class)

    def trace(self, tokens: mx.array, *, dtype: mx.Dtype | None = None) -> Graph:
        """The graph of this model at the shape of `tokens` [B, T], logits as its one output."""
        return trace_logits(self.module(), tokens, dtype=dtype)

    def trace_config(self, config: dict, tokens: mx.array) -> Graph:
        """The float32 graph of what stock mlx-lm makes of a config, at the shape of `tokens`."""
        return trace_logits(self.build(config), tokens, dtype=mx.float32)

    def tokenizer(self):
        """mlx-lm's tokenizer of this folder. Raises `InputError` when it has none."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False):
    """mlx-lm's tokenizer of a folder. Raises `InputError` when it has none."""
    from mlx_lm import utils

    with _one_line(path, "check its tokenizer files"):
        return utils.load_tokenizer(path, {"trust_remote_code": trust_remote_code})


def open_model(name: str | Path, *, trust_remote_code: bool = False) -> LanguageModel:
    """Open a folder, or a repository of the Hugging Face hub by its name.

    Checks what can be checked without reading weights. Raises `InputError`, in one line, for a
    missing folder, config or weights, damaged JSON or safetensors, an unknown architecture, or a
    config that asks for code from the folder.
    """
    path = locate(name)
    raw = read_config(path)
    _check_code(path, raw, trust_remote_code)
    _check_weights(path)
    with _one_line(path):
        module, config = _load(path, trust_remote_code)
    notes = []
    if any(key in config for key in NUMERICS_KEYS):
        bits = (config.get("quantization") or {}).get("bits")
        notes.append(f"{path} is quantised{f' to {bits} bits' if bits else ''}: dequantised first")
    config = {k: v for k, v in config.items() if k not in NUMERICS_KEYS}
    model = LanguageModel(path, config, trust_remote_code, notes)
    paths = frozenset(p for p, _ in tree_flatten(module.parameters()))
    with _one_line(path):  # without its quantisation, which some cannot do without
        built = frozenset(p for p, _ in tree_flatten(model.build().parameters()))
    return dataclasses.replace(model, _paths=paths, _absent=built - paths)


def read_config(path: Path) -> dict:
    """The folder's config.json. Raises `InputError` when it is missing or damaged."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: has no config.json; it is not a model folder.") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); fetch it anew.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{file}: names no model_type; it is not the config of a model.")
    return config


def trace_logits(module: nn.Module, tokens: mx.array, *, dtype=None) -> Graph:
    """Trace a language model to its logits; some return more than those."""
    graph = trace(module, tokens, dtype=dtype)
    logits = graph.outputs[0]
    return graph if len(graph.outputs) == 1 else dataclasses.replace(graph, outputs=(logits,))


def _load(
    path: Path, trust_remote_code: bool, dequantised: bool = True, config: dict | None = None
) -> tuple[nn.Module, dict]:
    """With a `config` of its own the model may have parameters that the folder lacks."""
    from mlx_lm.utils import dequantize_model, load_model

    model, config = load_model(
        path, lazy=True, strict=config is None, model_config=config,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if dequantised and any(key in config for key in NUMERICS_KEYS):
        model = dequantize_model(model)
    return model, config


def _classes(path: Path, config: dict, trust_remote_code: bool):
    from mlx_lm.utils import _get_classes

    if config.get("model_file") is None:
        return _get_classes(config)
    _check_code(path, config, trust_remote_code)
    import importlib.util

    spec = importlib.util.spec_from_file_location("custom_model", path / config["model_file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model, module.ModelArgs


def _check_code(path: Path, config: dict, trust_remote_code: bool) -> None:
    for key in ("model_file", "auto_map"):
        if config.get(key) and not trust_remote_code:
            if key == "auto_map" and is_known(config):
                continue
            raise InputError(
                f"{path}: its config asks to run code from the folder ({key}: {config[key]!r}); "
                "pass --trust-remote-code if you trust it."
            )


def is_known(config: dict) -> bool:
    """Whether mlx-lm has the architecture itself, so that the folder's own code is not needed."""
    from mlx_lm.utils import _get_classes

    try:
        _get_classes(config)
    except (ValueError, KeyError):
        return False
    return True


def locate(name: str | Path) -> Path:
    """The folder of that name, or what the hub's repository of that name was fetched to."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    parts = str(name).split("/")
    if path.exists() or len(parts) != 2 or str(name).startswith((".", "/", "~")):
        raise InputError(f"--model {name}: no such folder.")
    from mlx_lm.utils import _download

    try:
        return Path(_download(str(name)))
    except Exception as error:  # the hub's client raises many kinds
        reason = type(error).__name__
        raise InputError(
            f"--model {name}: no such folder, and it could not be fetched from the hub ({reason})."
        ) from error


def _check_weights(path: Path) -> None:
    """Read the header of each weight file; a truncated one shows there."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{path}: has no model*.safetensors; other formats are not read.")
    for file in files:
        try:
            with safe_open(str(file), framework="numpy") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or truncated ({error}).") from error


REMEDIES = {
    "Missing": "the weights are incomplete, fetch the folder anew",
    "not in model": "the weights are not of the model that config.json describes",
    "Expected shape": "the weights are not of the model that config.json describes",
    "not supported": "choose another model, or a newer mlx-lm",
}


@contextlib.contextmanager
def _one_line(path: Path, remedy: str = "check its config.json") -> Iterator[None]:
    """Turn whatever mlx-lm and transformers raise for a bad folder into one line."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]!r} is missing; {remedy}.") from error
    except (Exception, SystemExit) as error:  # some model files exit when a package is missing
        text = " ".join(str(error).split()).rstrip(" .") or type(error).__name__
        text = f"it stops with exit code {text}" if isinstance(error, SystemExit) else text
        remedy = next((r for sign, r in REMEDIES.items() if sign in text), remedy)
        reason = textwrap.shorten(text, 200, placeholder=" ...")
        raise InputError(f"{path}: mlx-lm cannot open it: {reason}; {remedy}.") from error
