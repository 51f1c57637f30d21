"""Options from a YAML file (`-c`). Keys are the long options, with - or _."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from .errors import InputError


def read_settings(path: Path, known: Mapping[str, object]) -> dict:
    """The file's entries by parameter name; a list may stand where the option takes commas.

    `known` maps an option's spelling, without dashes in front, to the command's parameter. Raises
    `InputError` for a file that cannot be read and for what is no option.
    """
    found = {}
    for key, value in _entries(path).items():
        option = known.get(str(key).lstrip("-").replace("_", "-"))
        if option is None:
            raise InputError(
                f"--config {path}: {key!r} is no option here; known: {', '.join(sorted(known))}."
            )
        as_commas = isinstance(value, list) and not option.multiple
        found[option.name] = ",".join(map(str, value)) if as_commas else value
    return found


def _entries(path: Path) -> Mapping:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise InputError(f"--config {path}: no such file.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--config {path}: not readable as YAML ({reason}).") from error
    if not isinstance(document, Mapping):
        raise InputError(f"--config {path}: must hold lines of `option: value`.")
    return document
