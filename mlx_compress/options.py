"""The choices of a run, with their defaults: the only place where a default is written.

Light on purpose: the command line reads this for its help and imports nothing else.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import InputError

KINDS = ("channels", "heads", "query_heads", "head_dim", "experts", "width")
LAYER_KINDS = ("layers", "attention", "mlp")
EXPORTS = ("onnx", "coreml", "torch", "mlxfn")
PALETTES = ("palette2", "palette4", "palette6", "palette8")
QUANTIZE = ("int4", "int8", "dynamic", "static", *PALETTES)
KV_CACHES = ("grow", "buffer")
EMBEDDING_LOSSES = ("cosine", "mse")
METHODS = ("prune", "distill")
DROP_TYPES = ("relative", "absolute")
DTYPES = ("float32", "float16")
ATTRIBUTIONS = ("align", "weights")
TRAINING_DTYPES = ("float32", "bfloat16")
DIVERGENCES = (
    "reverse-kl", "forward-kl", "js", "skew-kl", "skew-reverse-kl", "adaptive-kl", "taid",
)  # fmt: skip
SMALL = 8  # tokens
# What --target can hold a model to: how it is written, and what is meant.
BUDGETS = {
    "params": ("params=0.75", "the fraction of block parameters to keep"),
    "macs": ("macs=0.5", "the fraction of multiply-accumulates to keep"),
    "disk_mb": ("disk_mb=12", "megabytes of weights as they are saved"),
    "latency_ms": ("latency_ms=3.5", "milliseconds of a forward pass on this machine"),
}
# What changes no result, and may differ when something is gone on with.
OF_THE_MEASURING = ("eval_samples", "max_drop", "drop_type", "study")
FRACTIONS = ("params", "macs")  # of the dense model's
IMPORTANCES = (
    "auto", "random", "magnitude", "activation", "wanda", "fluctuation", "fisher", "taylor",
    "combined", "osscar",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How to prune and how to measure.

    `pruning_ratio` is the fraction of units removed along each prunable dimension. The others say
    what may be left: `params`, a fraction of the block parameters (all but embeddings and head);
    `macs`, a fraction of the multiply-accumulates of a forward pass; `disk_mb`, megabytes (10^6) of
    all weights as they are saved; `latency_ms`, milliseconds of a forward pass on this machine. A
    pass reads `max_seq_length` tokens, or a batch of one. One of the five is given.
    `importance` auto tries every criterion and judges on held-out calibration text. With `refit`
    the weights that read what is removed, or stand behind a dropped layer, are fitted anew
    (`refit.py`, `sequential.py`), where there is text.
    `dims` are the kinds of dimension to prune, `ignored_layers` glob patterns of dimension or
    parameter names to leave alone, `round_to` a step for the counts that are kept.
    `max_drop` is a gate on what is lost, in nats per token of text, for others in the task's
    measure (top-1, Spearman's correlation): a model that loses more is rejected.
    Calibration reads `calibration_samples` windows of `max_seq_length` tokens, evaluation
    `eval_samples`; `batch_size` windows are computed at a time. With `max_trials`, how much is kept
    where is searched, by held-out loss (`search.py`), and its trials are kept in `study`, a file or
    the URL of a database of optuna's.
    """

    pruning_ratio: float | None = None
    params: float | None = None
    macs: float | None = None
    disk_mb: float | None = None
    latency_ms: float | None = None
    importance: str = "auto"
    refit: bool = True
    dims: tuple[str, ...] = ("channels", "heads")
    ignored_layers: tuple[str, ...] = ()
    round_to: int = 1
    global_pruning: bool = False
    max_drop: float | None = None
    drop_type: str = "relative"
    calibration_samples: int = 128
    eval_samples: int = 128
    max_seq_length: int = 256
    batch_size: int = 4
    seed: int = 0
    max_trials: int = 0
    study: str | None = None

    def __post_init__(self):
        _at_least(self, (
            ("round_to", 1), ("max_trials", 0), ("calibration_samples", 1), ("eval_samples", 2),
            ("max_seq_length", 2), ("batch_size", 1),
        ))  # fmt: skip
        self._check_amount()
        _check_gate(self)
        if self.study is not None and not self.max_trials:
            raise InputError(f"--study {self.study}: holds trials; give --max-trials N too.")
        among("--importance", tuple(self.importance.split("+")), IMPORTANCES)
        among("--dims", self.dims, KINDS + LAYER_KINDS)

    def _check_amount(self) -> None:
        given = [("--pruning-ratio", " ", self.pruning_ratio, 1)]
        for name in BUDGETS:
            most = 1 if name in FRACTIONS else math.inf
            given.append((f"--target {name}", "=", getattr(self, name), most))
        given = [each for each in given if each[2] is not None]
        for flag, sign, value, most in given:
            if not 0 < value < most:
                bounds = "lie between 0 and 1, both excluded" if most == 1 else "be more than 0"
                raise InputError(f"{flag}{sign}{value:g}: must {bounds}.")
        if len(given) > 1:
            flags = " and ".join(flag for flag, *_ in given)
            raise InputError(f"{flags}: give one of them, not both.")

    @property
    def budget(self) -> tuple[str, float] | None:
        """What is to be left, by its name in `BUDGETS` and in its unit; None without a target."""
        given = ((name, getattr(self, name)) for name in BUDGETS)
        return next(((name, value) for name, value in given if value is not None), None)

    def require_amount(self) -> None:
        """Raise `InputError` unless it was said how much to remove."""
        if self.pruning_ratio is None and self.budget is None:
            targets = ", ".join(f"{example} ({words})" for example, words in BUDGETS.values())
            raise InputError(
                "how much to remove? Give --pruning-ratio 0.25 (of the units of each dimension) "
                f"or --target, with one of {targets}."
            )


@dataclass(frozen=True)
class DistillOptions:
    """How to distil.

    Next tokens are compared by the divergence `loss` (reverse KL by default), class scores too
    (forward KL), embeddings by "cosine" (the default) or "mse".
    A step reads `grad_accumulation_steps` batches of `batch_size` windows of `max_seq_length`
    tokens. The learning rate rises over `warmup` steps, at most a
    tenth of all, then falls along a cosine to 0 at `iters`.
    `hard_labels` is the weight of the text's own next tokens (0 to 1) beside the teacher's, which
    at 1 are not asked for. Gradients are clipped to the global norm `clip`. `val_samples` windows
    are held out; their loss is taken every `steps_per_eval` steps, the weights of the lowest are
    kept, and after `patience` of those without a better one the run ends. With `mask_prompt` only
    answers are learnt from. `dtype` is that of the student's arithmetic; its weights are float32.
    With `grad_checkpoint` layers are computed a second time instead of held. A `lora_rank` above 0
    trains adapters of that rank, which are merged at the end. Where a teacher's answers are kept on
    disk they are its `top_k` likeliest tokens. In a fraction `on_policy` of the steps the student
    writes the last three quarters of each window itself, and learns what the teacher says of that
    (GKD, https://arxiv.org/abs/2306.13649). With a `hidden_weight` what the student's blocks hand
    on is held to what the teacher's do, with an `attention_weight` their attention maps (`inner.py`
    says how). With `attribution` "align" every
    `attribution_every`-th step also holds what the student's answers rest on to what the teacher's
    do, with `attribution_weight`; with "weights" tokens count as much as the teacher's answers rest
    on them, and so do blocks where what is inside them is held to the teacher's. Of each window
    `attribution_views` of the teacher's answers are explained; `attribution_steps` are those of
    integrated gradients. `eval_samples` windows are measured at last, and `max_drop` is a gate on
    their loss as in `Options`.
    """

    loss: str | None = None
    iters: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-4
    temperature: float = 1.0
    hard_labels: float = 0.0
    warmup: int = 20
    clip: float = 1.0
    grad_accumulation_steps: int = 1
    steps_per_eval: int = 100
    patience: int | None = None
    max_seq_length: int = 256
    val_samples: int = 32
    eval_samples: int = 128
    mask_prompt: bool = False
    dtype: str = "float32"
    grad_checkpoint: bool = False
    lora_rank: int = 0
    top_k: int = 128
    on_policy: float = 0.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    attribution: str | None = None
    attribution_weight: float = 1.0
    attribution_every: int = 4
    attribution_views: int = 2
    attribution_steps: int = 1
    max_drop: float | None = None
    drop_type: str = "relative"
    seed: int = 0

    def __post_init__(self):
        if self.loss is not None:
            among("--loss", (self.loss,), DIVERGENCES + EMBEDDING_LOSSES)
        among("--dtype", (self.dtype,), TRAINING_DTYPES)
        _check_gate(self)
        _at_least(self, (
            ("iters", 1), ("batch_size", 1), ("warmup", 0), ("grad_accumulation_steps", 1),
            ("steps_per_eval", 1), ("patience", 1), ("max_seq_length", 2), ("val_samples", 1),
            ("eval_samples", 2), ("lora_rank", 0), ("top_k", 1), ("seed", 0),
            ("attribution_every", 1), ("attribution_views", 1), ("attribution_steps", 1),
        ))  # fmt: skip
        if self.attribution is not None:
            among("--attribution", (self.attribution,), ATTRIBUTIONS)
        for name in ("learning_rate", "temperature", "clip", "attribution_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{_flag(name)} {getattr(self, name):g}: must be more than 0.")
        for name in ("hard_labels", "on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise InputError(f"{_flag(name)} {value:g}: must lie between 0 and 1.")
        for name in ("hidden_weight", "attention_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{_flag(name)} {getattr(self, name):g}: must be 0 or more.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = min(self.warmup, self.iters // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        part = (step - warmup) / max(1, self.iters - warmup)
        return self.learning_rate * (1 + math.cos(math.pi * part)) / 2

    @property
    def looks_inside(self) -> bool:
        """Whether values inside the models are compared."""
        return bool(self.hidden_weight or self.attention_weight)

    @property
    def live_only(self) -> list[str]:
        """The flags of what a teacher that answers from disk cannot tell."""
        names = ("attribution", "on_policy", "hidden_weight", "attention_weight")
        return [_flag(name) for name in names if getattr(self, name)]

    @property
    def held_only(self) -> list[str]:
        """The flags of what layers that are computed twice cannot give: values, and second
        derivatives."""
        names = [name for name in ("hidden_weight", "attention_weight") if getattr(self, name)]
        return [_flag(name) for name in names + ["attribution"] * (self.attribution == "align")]

    @property
    def windows(self) -> int:
        """How many windows all steps read."""
        return self.iters * self.batch_size * self.grad_accumulation_steps

    @property
    def measuring(self) -> Options:
        """How the result is measured."""
        return Options(
            eval_samples=self.eval_samples, max_seq_length=self.max_seq_length,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    `dtype` is that of weights and arithmetic. `quantize`: int4 and int8 are MLX's affine groups of
    weights; dynamic and static are ONNX Runtime's int8 arithmetic; palettes are Core ML's. `sizes`
    fix what a target cannot leave open, by a number, or bound it, by the least and the largest.
    `group_size` is that of int4 and int8. `stateful` keeps a KV cache inside; None: where no sizes
    are given. `kv_cache` of an onnx: one that grows, for any batch, or buffers for one sequence,
    which decode faster behind a long past.
    """

    dtype: str = "float32"
    quantize: str | None = None
    group_size: int = 64
    sizes: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    minimum_deployment_target: str = "iOS18"
    compute_units: str = "ALL"
    stateful: bool | None = None
    kv_cache: str = "grow"
    seed: int = 0

    def __post_init__(self):
        among("--dtype", (self.dtype,), DTYPES)
        among("--kv-cache", (self.kv_cache,), KV_CACHES)
        if self.quantize is not None:
            among("--quantize", (self.quantize,), QUANTIZE)

    @property
    def example(self) -> dict[str, int]:
        """The sizes to compare at: of a range, a small one that lies in it."""
        return {n: s if isinstance(s, int) else min(max(s[0], SMALL), s[1])
                for n, s in self.sizes.items()}  # fmt: skip


def read_target(text: str) -> dict[str, float]:
    """A budget as it is written: its name in `BUDGETS` and its value."""
    name, mark, value = (part.strip() for part in text.partition("="))
    if mark:
        among("--target", (name,), tuple(BUDGETS))
        with contextlib.suppress(ValueError):
            return {name: float(value)}
    examples = " or ".join(example for example, _ in BUDGETS.values())
    raise InputError(f"--target {text}: write it as {examples}.")


def _at_least(options, bounds: tuple[tuple[str, int], ...]) -> None:
    for name, least in bounds:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{_flag(name)} {value}: must be at least {least}.")


def _check_gate(options) -> None:
    among("--drop-type", (options.drop_type,), DROP_TYPES)
    if options.max_drop is not None and not options.max_drop >= 0:
        raise InputError(f"--max-drop {options.max_drop:g}: must be 0 or more.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def among(flag: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raise `InputError` for a value that is not known, or when there are none."""
    for value in values:
        if value not in known:
            raise InputError(f"{flag} {value}: unknown; choose from {', '.join(known)}.")
    if not values:
        raise InputError(f"{flag}: is empty; choose from {', '.join(known)}.")
