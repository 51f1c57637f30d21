"""Write a MIL program as an .mlpackage, and what it says about itself."""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...errors import InputError
from .quiet import Program, ct, no_progress

# Of coremltools' passes those that find anything in what the rules write: each costs a check of the
# whole program. Names and casts come last, and what is dead goes after each group.
PASSES = [
    f"common::{name}"
    for name in (
        "cast_optimization", "noop_elimination", "const_elimination",
        "sanitize_input_output_names", "divide_to_multiply", "select_optimization",
        "const_deduplication", "fuse_matmul_weight_bias", "compose_conv1d",
        "merge_consecutive_paddings", "fuse_pad_conv", "reduce_transposes",
        "fuse_conv_bias", "fuse_conv_scale", "fuse_conv_bias", "fuse_conv_scale",
        "merge_consecutive_reshapes", "merge_consecutive_transposes",
        "fuse_transpose_matmul", "expand_high_rank_reshape_and_transpose", "remove_redundant_ops",
        "guard_negative_gather_indices", "dead_code_elimination", "cast_optimization",
        "const_elimination", "canonicalize_inplace_pattern", "prefer_state_in_downstream",
        "expand_dynamic_linear", "const_deduplication", "noop_elimination",
        "dedup_op_and_var_names", "topological_reorder", "dead_code_elimination",
    )
]  # fmt: skip
SPEC = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


def write_package(program: Program, path: Path, *, inputs: list, target) -> None:
    """Run coremltools' passes over `program`, which is used up, and write the package.

    Raises `InputError` for what Core ML does not hold, such as an array of six axes.
    """
    with _silenced():
        try:
            ct.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=target,
                inputs=inputs,
                compute_precision=ct.precision.FLOAT32,  # the types are chosen already
                pass_pipeline=ct.PassPipeline(PASSES, pipeline_name="mlx_compress"),
                skip_model_load=True,
                package_dir=str(path),
            )
        except ValueError as refused:
            words = " ".join(str(refused).split())
            raise InputError(f"Core ML cannot hold it: {words}") from refused


FIELDS = {
    "author": "author",
    "license": "license",
    "short_description": "shortDescription",
    "version": "versionString",
}


def palettize(path: Path, bits: int) -> None:
    """Put a table of 2**bits numbers, found by k-means, in place of each large weight."""
    config = ct.optimize.coreml.OpPalettizerConfig(mode="kmeans", nbits=bits)
    with _silenced():
        opened = ct.models.MLModel(str(path), skip_model_load=True)
        smaller = ct.optimize.coreml.palettize_weights(
            opened, ct.optimize.coreml.OptimizationConfig(global_config=config)
        )
        shutil.rmtree(path)
        smaller.save(str(path))


@contextmanager
def _silenced() -> Iterator[None]:
    with no_progress(), warnings.catch_warnings():
        # coremltools leaves its temporary folder to the garbage collector.
        warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
        yield


def describe(path: Path, metadata: Mapping[str, str], features: Mapping[str, str]) -> None:
    """Put metadata into a package, and the descriptions of inputs, outputs and states by name."""
    spec = ct.utils.load_spec(str(path))
    about = spec.description.metadata
    for key, text in metadata.items():
        if key in FIELDS:
            setattr(about, FIELDS[key], str(text))
        else:
            about.userDefined[key] = str(text)
    described = spec.description
    for feature in (*described.input, *described.output, *described.state):
        feature.shortDescription = features.get(feature.name, "")
    (path / SPEC).write_bytes(spec.SerializeToString())


def feature_name(name: str) -> str:
    """A name as Core ML takes them: letters, digits and underscores."""
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
