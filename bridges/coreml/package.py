"""Write a MIL program as an .mlpackage, and what it says about itself."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from .quiet import Program, ct, no_progress

SPEC = Path("Data/com.apple.CoreML/model.mlmodel")


def write_package(program: Program, path: Path, *, inputs: list, target) -> None:
    """Run coremltools' passes over `program`, which is used up, and write the package."""
    with no_progress(), warnings.catch_warnings():
        # coremltools leaves its temporary folder to the garbage collector.
        warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            inputs=inputs,
            compute_precision=ct.precision.FLOAT32,  # the types are chosen already
            skip_model_load=True,
            package_dir=str(path),
        )


FIELDS = {
    "author": "author",
    "license": "license",
    "short_description": "shortDescription",
    "version": "versionString",
}


def describe(path: Path, metadata: Mapping[str, str], features: Mapping[str, str]) -> None:
    """Put metadata and the descriptions of inputs and outputs into a package."""
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
