"""Whether a training run fits into memory, before it begins."""

import math

from .distill_text import CHUNK_BYTES, LOGITS_BYTES
from .errors import ResourceError
from .graph import SHAPE_ONLY, Graph, dynamic_values
from .options import DistillOptions

# Of a parameter that is trained, in float32: the weight, its gradient, two moments of AdamW.
STATES = 4
# Arrays as large as the logits: the student's and the teacher's, and what their loss makes of them.
LOGITS = 8


def training_bytes(student: Graph, options: DistillOptions, *, layers: int = 1) -> tuple[int, int]:
    """Bytes that a run needs for the student's weights, and for each window of a batch.

    `student` is its graph at one window. What a pass computes is held for the way back; with
    `grad_checkpoint`, that of one of the `layers`.
    """
    weights = STATES * sum(_bytes(student, i) for i in student.parameters.values())
    dynamic, logits = dynamic_values(student), student.outputs[0]
    computed = [node for node in student.nodes if node.op not in SHAPE_ONLY]
    held = {i for node in computed for i in node.outputs if i in dynamic} - {logits}
    values = sum(_bytes(student, i) for i in held) // (layers if options.grad_checkpoint else 1)
    if options.batch_size * _bytes(student, logits) > LOGITS_BYTES:  # they are never whole
        return weights + LOGITS * CHUNK_BYTES, values
    return weights, values + LOGITS * _bytes(student, logits)


def _bytes(graph: Graph, i: int) -> int:
    return math.prod(graph.values[i].shape) * 4  # float32


def require_memory(
    student: Graph, teacher_bytes: int, options: DistillOptions, has: int, *, layers: int = 1
) -> None:
    """Raise `ResourceError` that says what would fit."""
    fixed, window = training_bytes(student, options, layers=layers)
    needs = teacher_bytes + fixed + options.batch_size * window
    if needs <= has:
        return
    rows = math.floor((has - teacher_bytes - fixed) / window)
    if rows >= 1:
        remedy = f"--batch-size {rows} would fit"
    elif fixed + window <= has:
        remedy = "without the teacher it would fit: cache what it says with --target-dir"
    elif not options.grad_checkpoint and layers > 1 and fixed + window // layers <= has:
        remedy = "try --grad-checkpoint"
    else:
        remedy = "give a smaller student, --lora-rank, or a shorter --max-seq-length"
    raise ResourceError(
        f"distilling needs about {needs / 1e9:.1f} GB, this machine has {has / 1e9:.1f} GB; "
        f"{remedy}."
    )
