"""Results that are gone on with: what a file holds is not measured again."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..report import machine


def begun(out: Path, settings: Mapping, **empty) -> dict:
    """The result that a file holds, or an empty one: the machine, the settings, and no rows.

    `empty` is what it is to hold in place of rows. Raises `InputError` where the file was made
    with other settings.
    """
    fresh = {**machine(), "settings": json.loads(json.dumps(settings)), **(empty or {"rows": []})}
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return fresh
    held = json.loads(out.read_text())
    if held.get("settings") != fresh["settings"]:
        raise InputError(f"{out}: made with other settings; remove it, or name another --out.")
    return held
