"""The command line: `compress` and its steps. Options are read here, the work is `recipe.py`'s.

Exit codes: 0 ok, 2 usage or bad input, 3 a check or gate failed, 4 not enough memory or disk.
Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import (
    names_among,
    pairs_of,
    pruning_options,
    required,
    rounds_of,
    sizes_of,
    statistics_folder,
    training_options,
)
from .distill_command import Iters, LearningRate, Loss, distill, refuse_unused
from .errors import InputError, exit_on_error
from .flags import (
    Batch,
    Biases,
    Carrier,
    ComputeUnits,
    Config,
    Data,
    DeploymentTarget,
    Dims,
    DropType,
    Dtype,
    EvalSamples,
    Exportable,
    Global,
    GroupSize,
    Ignored,
    Importance,
    Json,
    KvCache,
    Length,
    MaxDrop,
    MaybeModel,
    Metadata,
    Model,
    NoCache,
    NoStatistics,
    Out,
    Output,
    ParityData,
    Plan,
    Quantize,
    Ratio,
    Refit,
    RoundTo,
    Samples,
    Seed,
    Sizes,
    Stateful,
    Statistics,
    Study,
    Target,
    To,
    Trials,
    Trust,
)
from .options import EXPORTS, METHODS, DistillOptions, ExportOptions, Options

DEFAULT, EXPORT, TRAINING = Options(), ExportOptions(), DistillOptions()
DEFAULT_DIMS = ",".join(DEFAULT.dims)
app = typer.Typer(
    rich_markup_mode=None, add_completion=False, no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@app.callback(invoke_without_command=True)
def compress(
    ctx: typer.Context,
    config: Config = None,
    model: MaybeModel = None,
    mlx_path: Out = None,
    data: Data = None,
    pruning_ratio: Ratio = None,
    target: Target = None,
    importance: Importance = DEFAULT.importance,
    dims: Dims = DEFAULT_DIMS,
    ignored_layers: Ignored = None,
    round_to: RoundTo = DEFAULT.round_to,
    global_pruning: Global = DEFAULT.global_pruning,
    refit: Refit = DEFAULT.refit,
    max_trials: Trials = DEFAULT.max_trials,
    study: Study = DEFAULT.study,
    plan: Plan = None,
    carrier: Carrier = None,
    biases: Biases = False,
    max_drop: MaxDrop = DEFAULT.max_drop,
    drop_type: DropType = DEFAULT.drop_type,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", metavar="LIST",
            help="prune, or prune,distill, which then trains it to say what the dense model says; "
            "may be repeated, to remove a part each time.",
        ),
    ] = METHODS[0],
    loss: Loss = TRAINING.loss,
    iters: Iters = TRAINING.iters,
    learning_rate: LearningRate = TRAINING.learning_rate,
    export: Annotated[
        str | None,
        typer.Option(
            "--export", metavar="LIST", help=f"Then export, to any of {', '.join(EXPORTS)}."
        ),
    ] = None,
    calibration_samples: Samples = DEFAULT.calibration_samples,
    eval_samples: EvalSamples = DEFAULT.eval_samples,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Batch = DEFAULT.batch_size,
    seed: Seed = DEFAULT.seed,
    statistics: Statistics = None,
    no_statistics: NoStatistics = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make an MLX model smaller and faster.

    With options and no command: prune (and distil), save, verify and measure in one go. The folder
    that comes out opens in stock mlx-lm (that of a saved program: in the commands here) and holds
    report.json and compression.json; what --export names goes into folders in it.
    """
    if ctx.invoked_subcommand is not None:
        return
    options = pruning_options(ctx.params)
    if plan is None:
        options.require_amount()
    given = [required(*pair) for pair in (
        ("--model", model), ("--mlx-path", mlx_path), ("--data", data)
    )]  # fmt: skip
    targets = [] if export is None else names_among("--export", export, EXPORTS)
    places = {name: given[1] / name for name in targets}
    rounds = rounds_of(methods)
    kept = statistics_folder(statistics, no_statistics)
    from . import jobs, ship, training_jobs

    ship.check_places(places, EXPORT)
    more = {"plan": plan, "carrier": carrier, "biases": biases}
    if rounds:
        for name, value in more.items():
            if value:
                raise InputError(f"--{name}: not together with --methods {methods}; do one by one.")
        training_jobs.prune_and_distill(
            *given, options, training_options(ctx.params), rounds=rounds, kept=kept,
            trust=trust_remote_code,
        )  # fmt: skip
    else:
        refuse_unused(ctx, ("loss", "iters", "learning_rate"), "--methods prune,distill")
        jobs.compress(*given, options, **more, kept=kept, trust=trust_remote_code)
    if places:
        ship.export_model(str(mlx_path), places, EXPORT, data=data, trust=trust_remote_code)


@app.command()
def prune(
    ctx: typer.Context,
    model: Model,
    config: Config = None,
    mlx_path: Out = None,
    data: Data = None,
    pruning_ratio: Ratio = None,
    target: Target = None,
    importance: Importance = DEFAULT.importance,
    dims: Dims = DEFAULT_DIMS,
    ignored_layers: Ignored = None,
    round_to: RoundTo = DEFAULT.round_to,
    global_pruning: Global = DEFAULT.global_pruning,
    refit: Refit = DEFAULT.refit,
    max_trials: Trials = DEFAULT.max_trials,
    study: Study = DEFAULT.study,
    plan: Plan = None,
    save_plan: Annotated[
        Path | None, typer.Option("--save-plan", metavar="FILE", help="Write the plan as JSON.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write no model.")
    ] = False,
    carrier: Carrier = None,
    biases: Biases = False,
    calibration_samples: Samples = DEFAULT.calibration_samples,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Batch = DEFAULT.batch_size,
    seed: Seed = DEFAULT.seed,
    statistics: Statistics = None,
    no_statistics: NoStatistics = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Prune and save, or only show the plan with --dry-run."""
    options = pruning_options(ctx.params)
    if plan is None:
        options.require_amount()
    if not dry_run and mlx_path is None:
        raise InputError("--mlx-path: name the folder to write, or give --dry-run.")
    from . import jobs

    jobs.prune(
        model, None if dry_run else mlx_path, data, options,
        plan=plan, save_plan=save_plan, carrier=carrier, biases=biases,
        kept=statistics_folder(statistics, no_statistics), trust=trust_remote_code, as_json=as_json,
    )  # fmt: skip


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: Model,
    data: Data = None,
    config: Config = None,
    dense: Annotated[
        str | None,
        typer.Option("--dense", metavar="DIR", help="The dense model to compare with."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    eval_samples: EvalSamples = DEFAULT.eval_samples,
    max_seq_length: Length = DEFAULT.max_seq_length,
    batch_size: Batch = DEFAULT.batch_size,
    seed: Seed = DEFAULT.seed,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a model, alone or beside its dense parent."""
    from . import jobs

    jobs.evaluate(
        model, dense, required("--data", data), pruning_options(ctx.params), output=output,
        trust=trust_remote_code, as_json=as_json,
    )  # fmt: skip


@app.command()
def inspect(
    model: Model,
    trust_remote_code: Trust = False,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="Also list the axes of every parameter.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The named axes: what can be pruned, what not, and why."""
    from . import jobs

    jobs.inspect(model, parameters=parameters, trust=trust_remote_code, as_json=as_json)


@app.command()
def diff(
    left: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan, or a pruned folder.")],
    right: Annotated[Path, typer.Argument(metavar="PLAN", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Which units only one of two plans keeps."""
    from . import jobs

    jobs.diff(left, right, as_json=as_json)


@app.command("export")
def export_model(
    model: Exportable,
    to: To,
    output: Output,
    config: Config = None,
    quantize: Quantize = EXPORT.quantize,
    group_size: GroupSize = EXPORT.group_size,
    dtype: Dtype = EXPORT.dtype,
    sizes: Sizes = None,
    no_cache: NoCache = False,
    stateful: Stateful = EXPORT.stateful,
    kv_cache: KvCache = EXPORT.kv_cache,
    minimum_deployment_target: DeploymentTarget = EXPORT.minimum_deployment_target,
    compute_units: ComputeUnits = EXPORT.compute_units,
    metadata: Metadata = None,
    data: ParityData = None,
    seed: Seed = EXPORT.seed,
    trust_remote_code: Trust = False,
) -> None:
    """Write a model for ONNX Runtime, Core ML, torch or MLX, and prove it equal."""
    options = ExportOptions(
        dtype=dtype, quantize=quantize, group_size=group_size, sizes=sizes_of(sizes),
        minimum_deployment_target=minimum_deployment_target, compute_units=compute_units,
        stateful=stateful, kv_cache=kv_cache, seed=seed,
    )  # fmt: skip
    names = names_among("--to", to, EXPORTS)
    places = {name: output if len(names) == 1 else output / name for name in names}
    from . import ship

    ship.export_model(
        model, places, options, data=data, cached=not no_cache, trust=trust_remote_code,
        metadata=pairs_of("--metadata", metadata or []),
    )  # fmt: skip


@app.command("import")
def import_model(
    torch: Annotated[
        str,
        typer.Option(
            "--torch", metavar="PATH", help="A .pt2 file, or a folder that transformers opens."
        ),
    ],
    mlx_path: Annotated[
        Path, typer.Option("--mlx-path", metavar="DIR", help="Folder to write; must be new.")
    ],
    trust_remote_code: Trust = False,
) -> None:
    """Bring a PyTorch model in, as a folder that the other commands read."""
    from . import ship

    ship.import_model(torch, mlx_path, trust=trust_remote_code)


@app.command()
def demo(
    mlx_path: Annotated[
        Path | None,
        typer.Option("--mlx-path", metavar="DIR", help="Keep the pruned model here."),
    ] = None,
) -> None:
    """Prune the embedded model by each criterion; needs no network."""
    from .demo import run_demo

    run_demo(mlx_path)


app.command("distill")(distill)


def main() -> None:
    with exit_on_error():
        app()
