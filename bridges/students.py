"""mlx-lm's models as teachers and students."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import InputError
from ..heads import first_array
from ..inner import without_projections
from ..options import DistillOptions
from ..report import machine
from ..stream import Fetch
from ..vocabulary import real_tokens
from .measure import loaded_bytes
from .mlx_lm import LanguageModel

LORA_SCALE = 20.0  # as mlx-lm's
ROOM = 1 / 3  # of the memory


def teacher_of(model: LanguageModel) -> nn.Module:
    """A frozen model as it is on disk; on the CPU in float32, where there is room for it.

    Half precision and packed weights are some 30 times slower there.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return model.module(dequantised=False)
    if loaded_bytes(model) <= machine()["memory_bytes"] * ROOM:
        return explained_teacher(model)
    module = model.module(dequantised=False)
    module.set_dtype(mx.float32)
    return module


def teacher_bytes(model: LanguageModel) -> int:
    """What the teacher takes in memory."""
    return sum(array.nbytes for _, array in tree_flatten(teacher_of(model).parameters()))


def explained_teacher(model: LanguageModel) -> nn.Module:
    """A frozen model in float32, dequantised, so that its input can be differentiated by."""
    module = model.module()
    module.set_dtype(mx.float32)
    return module


def continued(module: nn.Module, prompts_BP: mx.array, count: int, key: mx.array) -> mx.array:
    """The prompts and `count` tokens [B, P + count] that the model samples behind them."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, tokens_BT = make_prompt_cache(module), prompts_BP
    following = prompts_BP
    for each in mx.random.split(key, count):
        logits_BV = first_array(module(following, cache=cache))[:, -1].astype(mx.float32)
        following = mx.random.categorical(logits_BV, key=each)[:, None].astype(prompts_BP.dtype)
        tokens_BT = mx.concatenate([tokens_BT, following], axis=1)
        mx.eval(tokens_BT)
    return tokens_BT


def student_of(model: LanguageModel, options: DistillOptions) -> nn.Module:
    """The model to train, dequantised: whole, or adapters of it alone."""
    module = model.module()
    if options.lora_rank:
        _add_adapters(model, module, options)
    if options.grad_checkpoint:
        for layer in _layers(model, module, "--grad-checkpoint"):
            _checkpoint(layer)
    return module


def trained_fetch(model: LanguageModel, options: DistillOptions, best: dict) -> Fetch:
    """The model's parameters with trained ones in their place, adapters merged, as on disk.

    What was only learnt along is left behind.
    """
    module = student_of(model, options)
    module.set_dtype(mx.float32)
    module.update(tree_unflatten(list(without_projections(best).items())))
    merged = [(path, m.fuse()) for path, m in module.named_modules() if hasattr(m, "fuse")]
    module.update_modules(tree_unflatten(merged))
    weights = dict(tree_flatten(module.parameters()))
    dtypes = {path: array.dtype for path, array in tree_flatten(model.module().parameters())}
    return lambda paths: {path: weights[path].astype(dtypes[path]) for path in paths}


def common_tokens(teacher: LanguageModel, student: LanguageModel) -> int:
    """How many logits the two can be compared on. Raises `InputError` for other tokenizers."""
    probe = mx.zeros((1, 2), mx.int32)
    widths = []
    for model in (teacher, student):
        graph = model.trace(probe)
        widths.append(graph.values[graph.outputs[0]].shape[-1])
    vocabularies = (model.tokenizer().get_vocab() for model in (teacher, student))
    return real_tokens(*vocabularies, widths=widths)


def _add_adapters(model: LanguageModel, module: nn.Module, options: DistillOptions) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = _layers(model, module, "--lora-rank")
    mx.random.seed(options.seed)
    module.freeze()
    config = {"rank": options.lora_rank, "scale": LORA_SCALE, "dropout": 0.0}
    linear_to_lora_layers(module, len(layers), config)


def _layers(model: LanguageModel, module: nn.Module, flag: str) -> list[nn.Module]:
    layers = getattr(module, "layers", None)
    if layers is None:
        raise InputError(f"{flag}: {model.path} has no list of layers; leave it out.")
    return layers


def _checkpoint(layer: nn.Module) -> None:
    """Compute this layer anew on the way back. A class of its own: its kind has other users."""
    kind = type(layer)

    def call(self, *args, **kwargs):
        def inner(parameters, *args, **kwargs):
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
