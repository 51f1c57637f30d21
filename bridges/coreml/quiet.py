"""coremltools, imported without the noise that it makes wherever it cannot run models.

Only lines that say nothing about the model are silenced; every other warning passes.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = (
    "Failed to load _ML",  # the runtime, which only macOS has
    "Torch version",
    "scikit-learn version",
)
logging.getLogger("coremltools").addFilter(lambda record: not record.getMessage().startswith(NOISE))
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.optimize.coreml import _quantization_passes

__all__ = ["Function", "Program", "ct", "get_new_symbol", "mb", "no_progress", "types"]


@contextmanager
def no_progress() -> Iterator[None]:
    """Without the bars of the passes, which go to stderr."""
    shown = pass_pipeline.tqdm
    for module in (pass_pipeline, _quantization_passes):
        module.tqdm = lambda steps, **_: steps
    try:
        yield
    finally:
        for module in (pass_pipeline, _quantization_passes):
            module.tqdm = shown
