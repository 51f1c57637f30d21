"""Several processes that share each batch, as `mlx.launch` starts them; one where it did not.

Every process computes the gradient of its part of a batch, and all take the same step on the sum.
The first one alone writes, and tells.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .errors import InputError, ResourceError

LOST = "another process of this run was lost, or it was asked to end"


@dataclass(frozen=True)
class Workers:
    """`rank` of `count` processes."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """Raise `InputError` for a batch that cannot be shared."""
        if batch_size % self.count:
            raise InputError(
                f"--batch-size {batch_size}: {self.count} processes share a batch; give a multiple "
                f"of {self.count}."
            )

    def part(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows of a batch, or of anything."""
        return rows[self.rank :: self.count]

    def sum(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The sums over all processes, in float32 and by one message: the same bits in each."""
        if self.count == 1:
            return arrays
        flat = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays.values()])
        flat = mx.distributed.all_sum(flat, stream=mx.cpu)
        ends = np.cumsum([array.size for array in arrays.values()])[:-1].tolist()
        parts = zip(arrays.items(), mx.split(flat, ends), strict=True)
        return {name: p.reshape(array.shape).astype(array.dtype) for (name, array), p in parts}

    def wait(self) -> None:
        """For all the others."""
        mx.eval(self.sum({"": mx.zeros(1)}))

    def tell(self, document: dict | None) -> dict | None:
        """The first process's document, in JSON's terms, to all."""
        if self.count == 1:
            return document
        text = json.dumps(document if self.first else None).encode() if self.first else b""
        size = int(self.sum({"size": mx.array(float(len(text)))})["size"].item())
        data = np.zeros(size, np.float32)
        data[: len(text)] = np.frombuffer(text, np.uint8)
        shared = np.array(self.sum({"text": mx.array(data)})["text"]).astype(np.uint8)
        return json.loads(shared.tobytes())


ALONE = Workers()


def workers() -> Workers:
    """Who this process is. Raises `ResourceError` where the others cannot be reached."""
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"the other processes cannot be reached: {reason}") from error
    return Workers(group.rank(), group.size())


@contextlib.contextmanager
def told_when_lost(team: Workers, advice: str) -> Iterator[None]:
    """End with one line and exit code 4 when another process is lost.

    The exchange fails then, or waits for ever until `mlx.launch` asks this process to end; Python's
    own handlers would wait with it. Each process that is left says so, since the first may be the
    one that was lost.
    """
    if team.count == 1:
        yield
        return

    def end(reason: str) -> None:
        who = f"process {team.rank + 1} of {team.count}"
        print(f"error: {who}: {LOST}{reason}; {advice}", file=sys.stderr, flush=True)
        os._exit(ResourceError.exit_code)

    def watch() -> None:
        while said := os.read(read, 1):
            if signal.SIGTERM in said:
                end("")
        os.close(read)

    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    descriptor = signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        end(f" ({str(error).splitlines()[0]})")
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, before)
        os.close(write)
