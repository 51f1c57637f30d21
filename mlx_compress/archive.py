"""A program as a folder: what a model is saved as when no architecture of a loader can hold it.

    graph.json            the graph, the names, the sizes
    model.safetensors     the parameters under their own names
    constants.safetensors what the traced code made by itself, where there is any

Nothing in it is code. Whatever reads programs reads it: pruning, every export.
"""

import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import mlx.core as mx

from .errors import InputError
from .graph import Graph, Node, Value
from .program import Program
from .sizes import Size

FORMAT = 1
GRAPH, WEIGHTS, CONSTANTS = "graph.json", "model.safetensors", "constants.safetensors"


def save_program(program: Program, folder: Path, record: dict | None = None) -> None:
    """Write a program into an existing folder; `record` is kept beside it (how it was made).

    Weights are in memory together while they are written.
    """
    graph = program.graph
    document = {
        "format": FORMAT,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "sizes": dict(program.sizes),
        "limits": dict(program.limits),
        "metadata": dict(program.metadata),
        "record": record or {},
        "graph": {
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "parameters": dict(graph.parameters),
            "values": [[i, _plain(v.shape), _plain(v.dtype)] for i, v in graph.values.items()],
            "nodes": [[n.op, n.inputs, n.outputs, _plain(n.attributes)] for n in graph.nodes],
        },
    }
    (folder / GRAPH).write_text(json.dumps(document) + "\n", encoding="utf8")
    weights = program.fetch(list(graph.parameters))
    mx.save_safetensors(str(folder / WEIGHTS), dict(weights), metadata={"format": "mlx"})
    if graph.constants:
        constants = {str(i): array for i, array in graph.constants.items()}
        mx.save_safetensors(str(folder / CONSTANTS), constants)


def is_program(folder: Path) -> bool:
    return (folder / GRAPH).is_file()


def load_program(folder: str | Path) -> Program:
    """Open a folder that `save_program` wrote; weights stay on disk until they are fetched.

    Raises `InputError`, in one line, when a file is missing or damaged.
    """
    folder = Path(folder)
    document = _document(folder / GRAPH)
    try:
        graph = _graph(document["graph"], _constants(folder))
        names = [tuple(document[key]) for key in ("inputs", "outputs")]
        extra = [document[key] for key in ("sizes", "limits", "metadata")]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / GRAPH}: damaged ({error!r}); write it anew.") from error
    _check_weights(folder, graph)
    return Program(graph, _fetcher(folder), *names, *extra)


def read_record(folder: str | Path) -> dict:
    """What `save_program` was told about how the program was made."""
    return _document(Path(folder) / GRAPH).get("record", {})


def _document(file: Path) -> dict:
    try:
        document = json.loads(file.read_text(encoding="utf8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); write it anew.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise InputError(f"{file}: format {found}, but this version reads format {FORMAT}.")
    return document


def _plain(entry):
    """JSON for whatever stands in an attribute: numbers, words, dtypes, sizes, nests of them."""
    if isinstance(entry, Size):
        return {"size": [[list(names), str(c)] for names, c in entry.items]}
    if isinstance(entry, mx.Dtype):
        return {"dtype": str(entry).rpartition(".")[2].replace("bool", "bool_")}
    if isinstance(entry, tuple | list):
        return [_plain(part) for part in entry]
    return entry


def _entry(plain):
    if isinstance(plain, list):
        return tuple(map(_entry, plain))
    if not isinstance(plain, dict):
        return plain
    if "dtype" in plain:
        return getattr(mx, plain["dtype"])
    return Size(tuple((tuple(names), Fraction(c)) for names, c in plain["size"]))


def _graph(plain: dict, constants: dict[int, mx.array]) -> Graph:
    return Graph(
        nodes=tuple(Node(op, tuple(i), tuple(o), _entry(a)) for op, i, o, a in plain["nodes"]),
        values={i: Value(_entry(shape), _entry(dtype)) for i, shape, dtype in plain["values"]},
        inputs=tuple(plain["inputs"]),
        outputs=tuple(plain["outputs"]),
        parameters=plain["parameters"],
        constants=constants,
    )


def _constants(folder: Path) -> dict[int, mx.array]:
    if not (folder / CONSTANTS).exists():
        return {}
    return {int(name): array for name, array in _open(folder / CONSTANTS).items()}


def _open(file: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(file))
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: missing, damaged or truncated ({reason}).") from error


def _check_weights(folder: Path, graph: Graph) -> None:
    held = _open(folder / WEIGHTS)
    for path, shape in graph.shapes().items():
        if path not in held or held[path].shape != shape:
            found = held[path].shape if path in held else "nothing"
            raise InputError(f"{folder / WEIGHTS}: {path} is {found}, {shape} is expected.")


def _fetcher(folder: Path):
    def fetch(paths: Iterable[str]) -> dict[str, mx.array]:
        held = _open(folder / WEIGHTS)
        return {path: held[path] for path in paths}

    return fetch
