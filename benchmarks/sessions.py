"""Time single steps of exported decoders, side by side, with every input and output bound.

Whoever made the file, the harness is the same: past and present are one buffer where the model
takes one (it is told the number of filled positions), else arrays of just their sizes.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

PAST, PRESENT = "past_key_values", "present"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16,
         "tensor(int64)": np.int64, "tensor(int32)": np.int32}  # fmt: skip
Call = Callable[[], None]


def share_threads(count: int) -> None:
    """Before the first session of a process: all take the same threads.

    With threads of their own, those of the last session still spin while the next one runs.
    """
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(count, 1)


def open_session(path: Path, threads: int | None = None):
    """With threads of its own, or the shared ones."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.use_per_session_threads = threads is not None
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def step(session, *, length: int, past: int, vocabulary: int, width: int, capacity: int) -> Call:
    """A call that takes `length` tokens in behind `past` others; batch 1.

    `width` is that of a head, for files that leave it open. `capacity` is that of a shared buffer.
    """
    from onnxruntime import OrtValue

    rng, binding = np.random.default_rng(0), session.io_binding()
    inputs = {one.name: one for one in session.get_inputs()}
    shared = not inputs.keys().isdisjoint(("attention_mask", "past_length"))
    held = []

    def value(array: np.ndarray):
        held.append(OrtValue.ortvalue_from_numpy(array))
        return held[-1]

    known = {
        "input_ids": rng.integers(0, vocabulary, (1, length)),
        "attention_mask": np.ones((1, past + length)),
        "past_length": np.array([past]),
    }
    for name, one in inputs.items():
        kind = TYPES[one.type]
        if name in known:
            binding.bind_ortvalue_input(name, value(known[name].astype(kind)))
            continue
        heads = one.shape[1]
        cache = rng.standard_normal((1, heads, capacity if shared else past, width)) / 10
        binding.bind_ortvalue_input(name, value(cache.astype(kind)))
        if not shared:
            value(np.zeros((1, heads, past + length, width), kind))
        binding.bind_ortvalue_output(name.replace(PAST, PRESENT), held[-1])
    binding.bind_ortvalue_output("logits", value(np.zeros((1, length, vocabulary), np.float32)))

    def call(held=held) -> None:  # the binding does not keep its arrays alive
        session.run_with_iobinding(binding)

    return call


def times_ms(calls: Sequence[Call], repeats: int, quantile: float = 0.5) -> list[float]:
    """Milliseconds of each call, run in turns so that what else the machine does meets all.

    Each round has an order of its own, as a call is slower behind one that fills the caches. The
    median; on a machine with other work a lower quantile is steadier.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(), call()
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        for k in rng.permutation(len(calls)):
            started = time.perf_counter()
            calls[k]()
            times[k].append(time.perf_counter() - started)
    return [1e3 * float(np.quantile(taken, quantile)) for taken in times]
