"""Whether a training run fits into memory, before it begins."""

import math
from dataclasses import replace

from .distill_text import CHUNK_BYTES, LOGITS_BYTES
from .errors import ResourceError
from .graph import SHAPE_ONLY, Graph, dynamic_values
from .options import DistillOptions

# Of a parameter that is trained, in float32: its gradient, and before and after an update the
# weight and two moments of AdamW.
STATES = 7
# Arrays as large as the logits: the student's and the teacher's, and what their loss makes of them.
LOGITS = 8


def training_bytes(
    student: Graph, options: DistillOptions, *, layers: int = 1, trained: int | None = None
) -> tuple[int, int]:
    """Bytes that a run needs for the student's weights, and for each window of a batch.

    `student` is its graph at one window, `trained` the number of parameters that are trained, if
    not all. What a pass computes is held for the way back; with `grad_checkpoint`, that of one of
    the `layers`.
    """
    held = sum(_bytes(student, i) for i in student.parameters.values())
    weights = STATES * held if trained is None else held + STATES * 4 * trained
    dynamic, logits = dynamic_values(student), student.outputs[0]
    computed = [node for node in student.nodes if node.op not in SHAPE_ONLY]
    ids = {i for node in computed for i in node.outputs if i in dynamic} - {logits}
    values = sum(_bytes(student, i) for i in ids) // (layers if options.grad_checkpoint else 1)
    if options.batch_size * _bytes(student, logits) > LOGITS_BYTES:  # they are never whole
        return weights + LOGITS * CHUNK_BYTES, values
    return weights, values + LOGITS * _bytes(student, logits)


def _bytes(graph: Graph, i: int) -> int:
    return math.prod(graph.values[i].shape) * 4  # float32


def require_memory(
    student: Graph, teacher_bytes: int, options: DistillOptions, has: int,
    *, layers: int = 1, trained: int | None = None,
) -> None:  # fmt: skip
    """Raise `ResourceError` that says what would fit."""

    def needs(beside: int = teacher_bytes, **changed) -> int:
        wanted = replace(options, **changed)
        fixed, window = training_bytes(student, wanted, layers=layers, trained=trained)
        return beside + fixed + wanted.batch_size * window

    if needs() <= has:
        return
    twice = needs(0, batch_size=1, grad_checkpoint=True)
    rows = next((n for n in range(options.batch_size - 1, 0, -1) if needs(batch_size=n) <= has), 0)
    if rows:
        remedy = f"--batch-size {rows} would fit"
    elif teacher_bytes and not options.live_only and needs(0, batch_size=1) <= has:
        remedy = "without the teacher it would fit: cache what it says with --target-dir"
        remedy += ", and take --batch-size 1" if needs(0) > has else ""
    elif layers > 1 and not options.held_only and twice <= has:
        remedy = "try --grad-checkpoint"
    elif trained is None:
        remedy = "give a smaller student, --lora-rank, or a shorter --max-seq-length"
    else:
        remedy = "give a smaller student, or a shorter --max-seq-length"
    raise ResourceError(
        f"distilling needs about {needs() / 1e9:.1f} GB, this machine has {has / 1e9:.1f} GB; "
        f"{remedy}."
    )
