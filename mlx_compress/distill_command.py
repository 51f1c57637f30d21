"""`compress distill`: its options, and nothing heavy."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError
from .flags import Batch, Config, Data, DropType, EvalSamples, Length, MaxDrop, Out, Seed, Trust
from .options import DIVERGENCES, EMBEDDING_LOSSES, TRAINING_DTYPES, DistillOptions

DEFAULT = DistillOptions()


def _count(flag: str, words: str):
    return Annotated[int, typer.Option(flag, metavar="N", help=words)]


def _number(flag: str, words: str):
    return Annotated[float, typer.Option(flag, metavar="X", help=words)]


Student = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="The student: a smaller model of its tokens."),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss", metavar="NAME",
        help=f"Of distributions: {', '.join(DIVERGENCES)} (reverse-kl of next tokens, forward-kl "
        f"of classes unless named). Of embeddings: {', '.join(EMBEDDING_LOSSES)}.",
    ),
]  # fmt: skip
Iters = _count("--iters", "Steps of training.")
LearningRate = _number("--learning-rate", "The highest; a cosine ends at 0.")
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience", metavar="N", help="End after N evaluations without a better one."
    ),
]  # fmt: skip
MaskPrompt = Annotated[
    bool, typer.Option("--mask-prompt", help="Learn from answers alone, not from prompts.")
]
Checkpoint = Annotated[
    bool, typer.Option("--grad-checkpoint", help="Compute layers twice, to hold less memory.")
]
Arithmetic = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="NAME",
        help=f"Of the student's arithmetic, {' or '.join(TRAINING_DTYPES)}; weights are float32.",
    ),
]  # fmt: skip
Attribution = Annotated[
    str | None,
    typer.Option(
        "--attribution", metavar="NAME",
        help="What the teacher's answers rest on: align the student's with it, or as weights of "
        "tokens (and blocks). Costs time, see the README for what it brings.",
    ),
]  # fmt: skip
TargetDir = Annotated[
    Path | None,
    typer.Option(
        "--target-dir", metavar="DIR",
        help="Ask the teacher once and keep its answers here: it need not be in memory later.",
    ),
]  # fmt: skip
TargetsOnly = Annotated[
    bool, typer.Option("--targets-only", help="Only fill --target-dir, and train later.")
]


def distill(
    ctx: typer.Context,
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="DIR", help="The model to learn from, of any bits.")
    ],
    data: Data,
    model: Student = None,
    mlx_path: Out = None,
    config: Config = None,
    loss: Loss = DEFAULT.loss,
    iters: Iters = DEFAULT.iters,
    batch_size: Batch = DEFAULT.batch_size,
    learning_rate: LearningRate = DEFAULT.learning_rate,
    max_seq_length: Length = DEFAULT.max_seq_length,
    temperature: _number("--temperature", "Of both distributions.") = DEFAULT.temperature,
    hard_labels: _number("--hard-labels", "Weight of the text's own next tokens, 0-1.")
    = DEFAULT.hard_labels,
    mask_prompt: MaskPrompt = DEFAULT.mask_prompt,
    warmup: _count("--warmup", "Steps to the highest learning rate.") = DEFAULT.warmup,
    clip: _number("--clip", "Largest norm of the gradient.") = DEFAULT.clip,
    grad_accumulation_steps: _count("--grad-accumulation-steps", "Batches of a step.")
    = DEFAULT.grad_accumulation_steps,
    grad_checkpoint: Checkpoint = DEFAULT.grad_checkpoint,
    dtype: Arithmetic = DEFAULT.dtype,
    lora_rank: _count("--lora-rank", "Train adapters of this rank; 0: all weights.")
    = DEFAULT.lora_rank,
    steps_per_eval: _count("--steps-per-eval", "Steps between held-out losses.")
    = DEFAULT.steps_per_eval,
    val_samples: _count("--val-samples", "Windows that are held out to choose by.")
    = DEFAULT.val_samples,
    patience: Patience = DEFAULT.patience,
    on_policy: _number("--on-policy", "Fraction of steps on text that the student writes, 0-1.")
    = DEFAULT.on_policy,
    hidden_weight: _number("--hidden-weight", "How much blocks' outputs are to be the teacher's.")
    = DEFAULT.hidden_weight,
    attention_weight: _number("--attention-weight", "How much attention maps are to be.")
    = DEFAULT.attention_weight,
    attribution: Attribution = DEFAULT.attribution,
    attribution_weight: _number("--attribution-weight", "Of it, where it is aligned.")
    = DEFAULT.attribution_weight,
    attribution_every: _count("--attribution-every", "Steps from one alignment to the next.")
    = DEFAULT.attribution_every,
    attribution_views: _count("--attribution-views", "Answers of the teacher to each window.")
    = DEFAULT.attribution_views,
    attribution_steps: _count("--attribution-steps", "Of integrated gradients; 1: none.")
    = DEFAULT.attribution_steps,
    target_dir: TargetDir = None,
    targets_only: TargetsOnly = False,
    top_k: _count("--top-k", "Tokens of each of its answers that are kept.") = DEFAULT.top_k,
    max_drop: MaxDrop = DEFAULT.max_drop,
    drop_type: DropType = DEFAULT.drop_type,
    stages: Annotated[
        Path | None,
        typer.Option(
            "--stages", metavar="YAML",
            help="Several students one after the other, instead of --model; see the README.",
        ),
    ] = None,
    eval_samples: EvalSamples = DEFAULT.eval_samples,
    seed: Seed = DEFAULT.seed,
    trust_remote_code: Trust = False,
) -> None:
    """Train a smaller model to say what a larger one says.

    The folder that comes out opens in stock mlx-lm and holds report.json. Until then the state is
    kept in OUT.training, and the same command goes on from there.
    """
    known = {k: v for k, v in ctx.params.items() if k in DistillOptions.__dataclass_fields__}
    options = DistillOptions(**known)
    if target_dir is None:
        refuse_unused(ctx, ("top_k",), "--target-dir")
    if attribution is None:
        names = tuple(name for name in known if name.startswith("attribution_"))
        refuse_unused(ctx, names, "--attribution")
    if targets_only and target_dir is None:
        raise InputError("--targets-only: name the folder to keep them in with --target-dir.")
    if not targets_only and mlx_path is None:
        raise InputError("--mlx-path: name the folder to write, or give --targets-only.")
    if (stages is None) == (model is None):
        raise InputError("--model: name the student, or list students with --stages; one of them.")
    if stages is not None and target_dir is not None:
        raise InputError("--target-dir: not together with --stages, which have several texts.")
    from . import training_jobs

    more = {"trust": trust_remote_code}
    if stages is not None:
        training_jobs.distill_in_stages(teacher, stages, mlx_path, data, options, **more)
    else:
        place = None if targets_only else mlx_path
        more["target_dir"] = target_dir
        training_jobs.distill(teacher, model, place, data, options, **more)


def refuse_unused(ctx: typer.Context, names: tuple[str, ...], needs: str) -> None:
    """Raise `InputError` for an option that was given and does nothing without another."""
    for name in names:
        if ctx.get_parameter_source(name).name != "DEFAULT":
            raise InputError(f"--{name.replace('_', '-')}: does nothing without {needs}.")
