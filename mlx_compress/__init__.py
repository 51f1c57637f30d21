"""Make MLX models smaller and faster: trace once, and everything reads the graph.

Each public name is imported from its file at first use, so `import mlx_compress` loads no heavy
package. On Linux, import it before `mlx`: it puts a fast BLAS in place (see `blas.py`).
"""

from importlib import import_module

from . import blas

__version__ = "0.1.0"

# Public name -> the file it lives in. A name must differ from every file's, or the file hides it.
PUBLIC: dict[str, str] = {
    "DistillOptions": "options",
    "Options": "options",
    "PrunePlan": "plan",
    "apply_plan": "recipe",
    "compress": "recipe",
    "distill": "distill_recipe",
    "edit_graph": "edit",
    "make_plan": "recipe",
    "named_axes": "axes",
    "open_model": "bridges.mlx_lm",
    "open_program": "bridges.programs",
    "program_of": "program",
    "prune_parameters": "prune",
    "prune_program": "program",
    "run": "execute",
    "save_pruned": "recipe",
    "trace": "graph",
}

blas.load()


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
