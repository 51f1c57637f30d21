"""Options from a YAML file (`-c`). Keys are the long options, with - or _."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from .errors import InputError


def read_settings(path: Path, known: Mapping[str, object]) -> dict:
    """The file's entries by parameter name. Raises `InputError` for what is not an option."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise InputError(f"--config {path}: no such file.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--config {path}: not readable as YAML ({reason}).") from error
    if not isinstance(document, Mapping):
        raise InputError(f"--config {path}: must be a list of `option: value` lines.")
    settings = {str(key).lstrip("-").replace("-", "_"): value for key, value in document.items()}
    for key in settings:
        if key not in known:
            names = ", ".join(sorted(name.replace("_", "-") for name in known))
            raise InputError(f"--config {path}: {key!r} is no option here; known: {names}.")
    return {key: _plain(value) for key, value in settings.items()}


def _plain(value):
    """Lists stay lists for repeatable options; `dims: [channels, heads]` becomes a comma list."""
    return value
