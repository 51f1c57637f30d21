"""Measure checkpoint folders as mlx-lm runs them: loss, speed with its cache, a sample."""

import mlx.core as mx
from mlx.utils import tree_flatten

from ..data import Windows
from ..errors import ResourceError
from ..evaluate import EvaluateConfig, Subject, evaluate_pair, subject
from ..options import Options
from ..report import machine
from ..stream import Progress, silent
from .mlx_lm import LanguageModel


def evaluate_folders(
    dense: LanguageModel, compressed: LanguageModel | None, windows: Windows, options: Options,
    *, progress: Progress = silent,
) -> dict:  # fmt: skip
    """One or two checkpoints on the same windows: `evaluate.evaluate_pair`'s report, with samples.

    On the CPU both are computed in float32, as half precision is some 30 times slower there.
    """
    check_memory(dense, compressed)
    config = EvaluateConfig(batch_size=options.batch_size, seed=options.seed)
    models = {"dense": dense, "compressed": compressed}
    subjects = [None if model is None else _subject(model) for model in models.values()]
    report = evaluate_pair(*subjects, windows, config, progress=progress)
    for name, model in models.items():
        if model is not None:
            report[name]["sample"] = sample(model, windows, options.seed)
    return report


def check_memory(*models: LanguageModel | None) -> None:
    """Raise `ResourceError` when the models together are larger than this machine's memory."""
    needs, has = _needs(models), machine()["memory_bytes"]
    if needs > has:
        raise ResourceError(
            f"evaluation loads {needs / 1e9:.1f} GB of weights, this machine has {has / 1e9:.1f} "
            "GB; prune without it (compress prune), or evaluate the models one at a time."
        )


def fit_together(*models: LanguageModel) -> bool:
    """Whether the models are together no larger than this machine's memory."""
    return _needs(models) <= machine()["memory_bytes"]


def _needs(models) -> int:
    return sum(loaded_bytes(model) for model in models if model is not None)


def loaded_bytes(model: LanguageModel) -> int:
    """Bytes of the weights as they are loaded to be run."""
    whole = mx.default_device().type == mx.DeviceType.cpu
    return sum(
        array.size * (4 if whole else array.dtype.size)
        for _, array in tree_flatten(model.module().parameters())
    )


def sample(model: LanguageModel, windows: Windows, seed: int, *, tokens: int = 40) -> dict:
    """What the model makes of the text's first words, sampled at temperature 0.8, top-p 0.95."""
    from mlx_lm import generate
    from mlx_lm.sample_utils import make_sampler

    tokenizer = model.tokenizer()
    prompt = windows.tokens[0][: min(12, windows.tokens.shape[1] // 2)].tolist()
    mx.random.seed(seed)
    sampler = make_sampler(temp=0.8, top_p=0.95)
    text = generate(_module(model), tokenizer, prompt, max_tokens=tokens, sampler=sampler)
    return {"prompt": tokenizer.decode(prompt), "continuation": text}


def _subject(model: LanguageModel) -> Subject:
    from mlx_lm.models.cache import make_prompt_cache

    return subject(_module(model), folder=model.path, make_cache=make_prompt_cache)


def _module(model: LanguageModel):
    module = model.module()
    if mx.default_device().type == mx.DeviceType.cpu:
        module.set_dtype(mx.float32)
    return module
