"""The import rules: arrows point down only, and heavy packages stay in their one file."""

import ast
import re
import sys
from pathlib import Path

import mlx_compress

ROOT = Path(__file__).parent.parent
# Import name -> folder, as in pyproject.toml.
PACKAGES = {
    "mlx_compress": "mlx_compress",
    "mlx_compress.bridges": "bridges",
    "mlx_compress.bridges.coreml": "bridges/coreml",
    "mlx_compress.bridges.onnx": "bridges/onnx",
    "mlx_compress.bridges.torch": "bridges/torch",
    "mlx_compress.kernels": "kernels",
    "mlx_compress.benchmarks": "benchmarks",
}
ABOVE_THE_CORE = {
    "cli.py", "demo.py", "distill_recipe.py", "jobs.py", "program_recipe.py", "recipe.py",
    "ship.py", "toolkit.py", "training_jobs.py", "distill_stages.py",
    "program_distill_recipe.py",
}  # fmt: skip
NOT_IN_THE_CORE = (
    "mlx_compress.bridges",
    "mlx_compress.benchmarks",
    "coremltools",
    "mlflow",
    "mlx_lm",
    "onnxruntime",
    "torch",
    "transformers",
)
ENTRY_POINTS = ("mlx_compress.cli", "mlx_compress.toolkit")


def imports(source: str, package: str) -> set[str]:
    """Every dotted name that `source`, a module of `package`, may import, at any depth of nesting.

    `from a import b` gives both `a` and `a.b`, since b may be a module. `import_module("a")` and
    `__import__("a")` count where the name is spelled out.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def files(package: str) -> list[Path]:
    return sorted((ROOT / PACKAGES[package]).glob("*.py"))


def breaches(package: str, path: Path, forbidden) -> list[str]:
    found = sorted(filter(forbidden, imports(path.read_text(encoding="utf-8"), package)))
    return [f"{path.relative_to(ROOT)} imports {name}" for name in found]


def test_core_steps_import_no_bridge_and_no_foreign_engine():
    steps = [path for path in files("mlx_compress") if path.name not in ABOVE_THE_CORE]
    assert steps
    found = [breaches("mlx_compress", p, lambda n: within(n, NOT_IN_THE_CORE)) for p in steps]
    assert sum(found, []) == []


def test_kernels_import_only_mlx_and_the_standard_library():
    def foreign(name):
        root = name.partition(".")[0]
        return root not in sys.stdlib_module_names and not within(
            name, ("mlx", "mlx_compress.kernels")
        )

    found = [breaches("mlx_compress.kernels", p, foreign) for p in files("mlx_compress.kernels")]
    assert sum(found, []) == []


def test_nothing_imports_the_entry_points():
    found = [
        breaches(package, path, lambda name: within(name, ENTRY_POINTS))
        for package in PACKAGES
        for path in files(package)
    ]
    assert sum(found, []) == []


def test_only_graph_mentions_export_function():
    users = {
        str(path.relative_to(ROOT))
        for folder in PACKAGES.values()
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\b(export_function|mx\.exporter)\b", path.read_text(encoding="utf-8"))
    }
    assert users <= {"mlx_compress/graph.py"}


def test_no_public_name_is_hidden_by_a_file_of_the_same_name():
    assert not set(mlx_compress.PUBLIC) & {path.stem for path in files("mlx_compress")}


def test_every_public_name_is_there():
    for name in mlx_compress.PUBLIC:
        assert getattr(mlx_compress, name) is not None, name


def test_the_reader_of_imports_sees_every_form():
    source = """
import torch.nn as nn
def late():
    from mlx_lm import load
    from . import bridges
    from .bridges.onnx import export
    __import__("mlflow")
    importlib.import_module("transformers")
"""
    assert imports(source, "mlx_compress") >= {
        "torch.nn",
        "mlx_lm.load",
        "mlx_compress.bridges",
        "mlx_compress.bridges.onnx",
        "mlflow",
        "transformers",
    }
    assert "mlx_compress.cli" in imports("from .. import cli", "mlx_compress.bridges")
    assert "mlx_compress.bridges.onnx" in imports("from . import onnx", "mlx_compress.bridges")
    assert not within("torchvision", NOT_IN_THE_CORE)
