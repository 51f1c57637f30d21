"""Open a checkpoint with stock mlx-lm, in a process of its own, and write down its logits.

    python -P -m mlx_compress.bridges.verify FOLDER TOKENS.npy LOGITS.npy

Only mlx-lm is used: what this process computes is what any user of the folder will get.
"""

import sys

import numpy as np


def main(folder: str, tokens: str, logits: str) -> None:
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    out = model(mx.array(np.load(tokens)))
    out = out[0] if isinstance(out, (tuple, list)) else out
    np.save(logits, np.array(out.astype(mx.float32)))


if __name__ == "__main__":
    main(*sys.argv[1:])
