"""The options of the commands: their spelling and their help."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BUDGETS, DROP_TYPES, DTYPES, EXPORTS, IMPORTANCES, KINDS, LAYER_KINDS


def config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Options from a YAML file; the command line overrides them."""
    if path is None:
        return None
    from .settings import read_settings

    options = [p for p in ctx.command.params if p.name not in ("config", "help")]
    known = {opt.lstrip("-"): p for p in options for opt in p.opts}
    ctx.default_map = {**(ctx.default_map or {}), **read_settings(path, known)}
    return path


def existing(data: Path | None) -> Path | None:
    """Refused before anything is loaded, where it is not there."""
    if data is None or data.exists():
        return data
    from .errors import InputError

    raise InputError(
        f"{data}: no such file or folder; --data takes a folder with train, valid or test, or one "
        "such file."
    )


Model = Annotated[
    str, typer.Option("--model", metavar="DIR", help="Model folder, or a repository of the hub.")
]
MaybeModel = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Model folder, or a repository of the hub."),
]
Exportable = Annotated[
    str,
    typer.Option(
        "--model", metavar="PATH", help="Model folder, .pt2 file, or a repository of the hub."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--mlx-path", metavar="DIR", help="Folder to write; must not exist yet."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="PATH", callback=existing,
        help="Folder with train/valid/test .jsonl or .txt, or one such file; for a saved program "
        ".npz with labels, or .jsonl of sentence pairs.",
    ),
]  # fmt: skip
Config = Annotated[
    Path | None,
    typer.Option(
        "-c", "--config", metavar="YAML", is_eager=True, callback=config_file,
        help="Options from a file; the command line overrides them.",
    ),
]  # fmt: skip
Ratio = Annotated[
    float | None,
    typer.Option("--pruning-ratio", metavar="R", help="Fraction of units to remove, 0-1."),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="NAME=X",
        help="What to keep: "
        + "; ".join(f"{example}, {words}" for example, words in BUDGETS.values()) + ".",
    ),
]  # fmt: skip
Importance = Annotated[
    str,
    typer.Option(
        "--importance", metavar="NAME",
        help=f"One of {', '.join(IMPORTANCES)}; or a sum, as magnitude+taylor.",
    ),
]  # fmt: skip
Dims = Annotated[
    str,
    typer.Option(
        "--dims", metavar="LIST", help=f"What to prune, of {', '.join(KINDS + LAYER_KINDS)}."
    ),
]
Ignored = Annotated[
    list[str] | None,
    typer.Option(
        "--ignored-layers", metavar="GLOB",
        help="Leave dimensions or parameters of this name alone; may be repeated.",
    ),
]  # fmt: skip
RoundTo = Annotated[
    int, typer.Option("--round-to", metavar="N", help="Keep multiples of N units.")
]
Global = Annotated[
    bool,
    typer.Option(
        "--global-pruning", help="Rank units across layers: a width of its own for each layer."
    ),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit/--no-refit",
        help="Fit anew the weights that read what is removed, and those behind dropped layers "
        "(needs --data).",
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop", metavar="X",
        help="Reject a model that loses more: nats per token, or top-1, or Spearman's correlation.",
    ),
]  # fmt: skip
DropType = Annotated[
    str, typer.Option("--drop-type", metavar="NAME", help=f"One of {', '.join(DROP_TYPES)}.")
]
Samples = Annotated[
    int,
    typer.Option(
        "--calibration-samples", metavar="N", help="Windows of text, or samples, to calibrate on."
    ),
]
EvalSamples = Annotated[
    int,
    typer.Option(
        "--eval-samples", metavar="N", help="Windows of text, or samples, to evaluate on."
    ),
]
Length = Annotated[int, typer.Option("--max-seq-length", metavar="N", help="Tokens in a window.")]
Batch = Annotated[
    int, typer.Option("--batch-size", metavar="N", help="Windows or samples at a time.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all random choices.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code from the model folder to run.")
]
Plan = Annotated[
    Path | None,
    typer.Option(
        "--plan", metavar="FILE",
        help="Apply a saved plan (or a folder's compression.json) instead of making one.",
    ),
]  # fmt: skip
Carrier = Annotated[
    str | None,
    typer.Option(
        "--carrier", metavar="NAME", help="Write as another architecture that can hold the plan."
    ),
]
Biases = Annotated[
    bool,
    typer.Option(
        "--biases", help="Put on every bias that the config can hold, for the refit to fill."
    ),
]
Trials = Annotated[
    int,
    typer.Option(
        "--max-trials", metavar="N",
        help="Search how much to keep where, by held-out loss, with N trials after a first table.",
    ),
]  # fmt: skip
Study = Annotated[
    str | None,
    typer.Option(
        "--study", metavar="FILE|URL",
        help="Where trials are kept, for several processes or machines to share: a file, or a "
        "database by optuna's URL; by default beside the statistics.",
    ),
]  # fmt: skip
Statistics = Annotated[
    Path | None,
    typer.Option(
        "--statistics", metavar="DIR",
        help="Where calibration is kept for the next run; by default in the user's cache.",
    ),
]  # fmt: skip
NoStatistics = Annotated[
    bool, typer.Option("--no-statistics", help="Calibrate anew, and keep nothing of it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

# ---- export

To = Annotated[
    str, typer.Option("--to", metavar="LIST", help=f"Of {', '.join(EXPORTS)}; commas between.")
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write; must be new.")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize", metavar="HOW",
        help="int4 or int8 weights; dynamic or static int8 arithmetic (onnx); "
        "palette2 to palette8 (coreml).",
    ),
]  # fmt: skip
GroupSize = Annotated[
    int, typer.Option("--q-group-size", metavar="N", help="Group size of int4 and int8.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help=f"One of {', '.join(DTYPES)}.")
]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--sizes", metavar="LIST",
        help="Such as batch=1,length=1..512, where a target cannot leave them open.",
    ),
]  # fmt: skip
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="A language model without its KV cache.")
]
Stateful = Annotated[
    bool | None,
    typer.Option(
        "--stateful/--no-stateful", show_default="where no --sizes are given",
        help="Keep the KV cache as state inside (coreml).",
    ),
]
KvCache = Annotated[
    str,
    typer.Option(
        "--kv-cache", metavar="NAME",
        help="grow, for any batch, or buffer, which decodes faster (onnx).",
    ),
]  # fmt: skip
DeploymentTarget = Annotated[
    str, typer.Option("--minimum-deployment-target", metavar="OS", help="As iOS18 (coreml).")
]
ComputeUnits = Annotated[
    str, typer.Option("--compute-units", metavar="NAME", help="As coremltools names them.")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata", metavar="KEY=VALUE",
        help="Such as author=Me or license=MIT, into the file; may be repeated.",
    ),
]  # fmt: skip
ParityData = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="PATH", callback=existing,
        help="Real inputs to compare on: text, or an .npz with an array for each input.",
    ),
]  # fmt: skip
