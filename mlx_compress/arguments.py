"""What the words of a command line say, as options and values."""

import re
from pathlib import Path

from .errors import InputError
from .options import METHODS, DistillOptions, Options, among, read_target


def pruning_options(params: dict) -> Options:
    """The `Options` among a command's parameters."""
    known = {k: v for k, v in params.items() if k in Options.__dataclass_fields__ and v is not None}
    if isinstance(known.get("dims"), str):
        known["dims"] = tuple(part.strip() for part in known["dims"].split(",") if part.strip())
    known["ignored_layers"] = tuple(known.get("ignored_layers") or ())
    if params.get("target") is not None:
        known |= read_target(params["target"])
    return Options(**known)


def training_options(params: dict) -> DistillOptions:
    """The `DistillOptions` among a command's parameters."""
    known = DistillOptions.__dataclass_fields__
    return DistillOptions(**{k: v for k, v in params.items() if k in known})


def rounds_of(methods: str) -> int:
    """How often to distil behind pruning; 0: only prune."""
    names = [part.strip() for part in methods.split(",") if part.strip()]
    among("--methods", tuple(names), METHODS)
    if names == ["prune"]:
        return 0
    rounds = len(names) // 2
    if names != ["prune", "distill"] * rounds:
        raise InputError(f"--methods {methods}: write it as prune,distill, once or several times.")
    return rounds


def statistics_folder(statistics: Path | None, no_statistics: bool) -> Path | None:
    """The folder to keep statistics in, if any."""
    if statistics is not None and no_statistics:
        raise InputError("--statistics and --no-statistics: give one of the two, not both.")
    from .store import default_folder

    return None if no_statistics else (statistics or default_folder()).expanduser()


def names_among(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    among(flag, tuple(names), known)
    return list(dict.fromkeys(names))


def sizes_of(text: str | None) -> dict[str, int | tuple[int, int]]:
    found = {}
    for part in (part for part in (text or "").split(",") if part.strip()):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)(?:\.\.(\d+))?\s*", part)
        if match is None:
            raise InputError(f"--sizes {text}: write it as batch=1,length=1..512.")
        name, low, high = match.groups()
        found[name] = int(low) if high is None else (int(low), int(high))
    return found


def pairs_of(flag: str, texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, mark, _ in pairs:
        if not name or not mark:
            raise InputError(f"{flag} {name}: write it as author=Me.")
    return {name: value for name, _, value in pairs}


def required(flag: str, value):
    if value is None:
        raise InputError(f"{flag}: is missing; see compress --help.")
    return value
