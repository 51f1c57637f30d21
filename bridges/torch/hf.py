"""A Hugging Face folder of any architecture that transformers has, as an MLX function.

What the model takes is told by itself: text, images, or both. Only safetensors are read, nothing is
fetched, and code in the folder runs only on `trust_remote_code`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import torch

from ...errors import InputError
from .arrays import TO_TORCH
from .exported import one_line, quiet
from .imported import Imported, from_torch

BATCH, LENGTH = 2, 7
TEXT, IMAGE = {0: "batch", 1: "length"}, {0: "batch"}
REMEDY = "check its config.json and model*.safetensors"


def from_hf(
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: mx.Dtype | None = mx.float32,
    length: bool = True,
) -> Imported:
    """The model of a folder; its outputs are those that transformers names (last_hidden_state,
    pooler_output, logits).

    Inputs are `input_ids` and `attention_mask` [batch, length], `decoder_input_ids` [batch,
    decoder_length], or `pixel_values` [batch, channels, height, width]. Any batch will do, and any
    length unless `length` is False. `dtype` is that of the weights, None for the folder's own.

    Raises `InputError`, in one line, for a folder that transformers cannot open, for weights that
    are missing, and for what `from_torch` refuses.
    """
    folder = Path(folder)
    model, missing = open_hf(folder, trust_remote_code, dtype)
    example = _example(folder, model)
    axes = [_open_axes(name, length) for name in example]
    imported = from_torch(model, example, dynamic=axes)
    random = [path for path in missing if path in imported.parameters]
    if random:
        more = f" and {len(random) - 1} more" if len(random) > 1 else ""
        raise InputError(f"{folder}: has no weights for {random[0]}{more}; fetch it anew.")
    return imported


def open_hf(folder: Path, trust_remote_code: bool = False, dtype: mx.Dtype | None = mx.float32):
    """The model in eval mode without a cache, and the names of weights that were not found."""
    import transformers

    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with quiet(), _no_bars(), one_line(str(folder), REMEDY, who="transformers"):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder.")
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        maker = named if isinstance(named, type) else transformers.AutoModel
        model, info = maker.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True,
            dtype="auto" if dtype is None else TO_TORCH[dtype], **options,
        )  # fmt: skip
    for part in model.modules():  # each stack has a config of its own
        if getattr(getattr(part, "config", None), "use_cache", None):
            part.config.use_cache = False
    return model.eval(), sorted(info["missing_keys"])


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _example(folder: Path, model) -> Mapping[str, torch.Tensor]:
    """Inputs of the kinds that the model takes; contents do not matter."""
    config = model.config
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    example = {}
    if model.main_input_name == "input_ids":
        example = _text(text or config)
    if model.main_input_name == "pixel_values" or vision is not None:
        example["pixel_values"] = _image(vision or config)
    if getattr(config, "is_encoder_decoder", False):
        example["decoder_input_ids"] = torch.ones(BATCH, LENGTH - 2, dtype=torch.long)
    if not example:
        raise InputError(
            f"{folder}: takes {model.main_input_name}, of which the shape is not known; export the "
            "model yourself and use from_torch."
        )
    return example


def _text(config) -> dict[str, torch.Tensor]:
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ones = torch.ones(BATCH, length, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones.clone()}


def _image(config) -> torch.Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(BATCH, getattr(config, "num_channels", None) or 3, height, width)


def _open_axes(name: str, length: bool) -> dict[int, str]:
    if name == "pixel_values" or not length:
        return IMAGE
    return TEXT if not name.startswith("decoder") else {0: "batch", 1: "decoder_length"}
