"""Views of handles: transposed, reshaped, joined. They become nodes when a node reads them so.

Moves that undo each other fall away, and static handles are moved when the file is written.
"""

from collections.abc import Callable, Sequence

from ...sizes import Size
from .builder import Handle, Static, View, current, emit, tensor
from .extents import ints


def transpose(handle: Handle, permutation: Sequence[int]) -> Handle:
    permutation = tuple(permutation)
    if permutation == tuple(range(len(permutation))):
        return handle
    shape = tuple(handle.shape[k] for k in permutation)
    if handle.static:
        steps = handle.static.steps
        if permutation == (1, 0) and steps and steps[-1][0] == "T":
            return Handle(shape, handle.dtype, static=Static(handle.static.value, steps[:-1]))
        key = "T" if permutation == (1, 0) else "t" + "".join(map(str, permutation))
        return then(handle, key, lambda array: array.transpose(permutation), shape)
    if handle.view and handle.view.kind == "transpose":
        inner = handle.view.detail
        return transpose(handle.view.parents[0], [inner[k] for k in permutation])

    def write() -> Handle:
        return current().remember(
            ("transpose", tensor(handle), permutation),
            lambda: emit("Transpose", handle, shape=shape, perm=permutation),
        )

    return lazily("transpose", (handle,), permutation, write, shape)


def reshape(handle: Handle, shape: Sequence) -> Handle:
    shape = tuple(shape)
    if shape == handle.shape:
        return handle
    if handle.static:
        return then(handle, "x".join(map(str, shape)), lambda array: array.reshape(shape), shape)
    if handle.view and handle.view.kind == "reshape":
        return reshape(handle.view.parents[0], shape)
    if handle.view and handle.view.kind == "transpose":
        parent = handle.view.parents[0]
        moved = [k for k in handle.view.detail if parent.shape[k] != 1]
        if moved == sorted(moved):  # only axes of size 1 change their places
            return reshape(parent, shape)

    def write() -> Handle:
        key = ("reshape", tensor(handle), shape)
        return current().remember(key, lambda: _reshaped(handle, shape))

    return lazily("reshape", (handle,), shape, write, shape)


def concatenate(parts: Sequence[Handle], axis: int, shape: tuple) -> Handle:
    parts = tuple(parts)
    return lazily(
        "concatenate", parts, (axis,), lambda: emit("Concat", *parts, shape=shape, axis=axis), shape
    )


def lazily(
    kind: str, parents: tuple[Handle, ...], detail: tuple, write: Callable[[], Handle], shape: tuple
) -> Handle:
    """What `write()` adds nodes for, when something reads it."""
    return Handle(shape, parents[0].dtype, view=View(kind, parents, detail, write))


def then(handle: Handle, key: str, step, shape: tuple, dtype: int | None = None) -> Handle:
    """A static handle after one more step on its array."""
    static = Static(handle.static.value, (*handle.static.steps, (key, step)))
    return Handle(shape, handle.dtype if dtype is None else dtype, static=static)


def _reshaped(handle: Handle, shape: tuple) -> Handle:
    """Reshape is told 0 for what it can copy, and -1 for one size that it can infer."""
    told: list = [
        0 if isinstance(n, Size) and k < len(handle.shape) and handle.shape[k] == n else n
        for k, n in enumerate(shape)
    ]
    literal = any(n == 0 for n in shape)  # a size that is zero, not one to copy
    if literal:
        told = list(shape)
    unknown = [k for k, n in enumerate(told) if isinstance(n, Size)]
    others = {
        name for k, n in enumerate(shape) if isinstance(n, Size) and k not in unknown[:1]
        for name in n.names
    }  # fmt: skip
    if len(unknown) == 1 and not literal and not others & current().may_be_zero:
        told[unknown[0]] = -1
    return emit("Reshape", handle, ints(told), shape=shape, allowzero=int(literal))
