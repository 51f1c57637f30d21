"""The report: what it was measured on, a table for the screen, a JSON file for everything else."""

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from rich import box
from rich.table import Table

from .errors import InputError, ResourceError

PACKAGES = ("mlx", "mlx-lm", "mlx-compress", "numpy")


def machine() -> dict:
    """What figures are measured on: machine, chip, device, memory_bytes, versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "chip": mx.device_info().get("device_name", platform.processor() or "unknown"),
        "device": mx.default_device().type.name,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions,
    }


def comparison_table(report: dict) -> Table:
    """A report of `evaluate_pair` or `evaluate_programs`: dense beside compressed, and the change.

    What was not measured is left out. Fits 80 columns. A report of one model has one column.
    """
    dense, compressed = report["dense"], report.get("compressed")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(report))
    table.caption_justify, table.min_width = "left", 72 if compressed else 48
    table.add_column("", no_wrap=True)
    for title in ("dense", "compressed") if compressed else ("model",):
        table.add_column(title, justify="right", no_wrap=True)
    if compressed:
        table.add_column("change", no_wrap=True)
    for label, key, show, change in ROWS:
        if dense.get(key) is None:
            continue
        cells = [show(dense[key])]
        if compressed:
            other = compressed.get(key)
            cells += ["-", ""] if other is None else [show(other), change(report, key)]
        table.add_row(label.format(**report.get("task", {})), *cells)
    agreement = (report.get("paired") or {}).get("top_token_agreement")
    if agreement:
        interval = "      " + _range(agreement, _percent)
        table.add_row("Same top token", "", _percent(agreement["estimate"]), interval)
    return table


def add_plan(report: dict, planned, seconds: float) -> None:
    """Put what was decided, and why, beside what was measured of it."""
    report["kept_block_parameters"] = planned.kept_parameters
    report["seconds"] = seconds
    report["recipe"] = dict(planned.plan.recipe)
    report["notes"] = planned.notes
    report.update(_verdicts(planned))


def _verdicts(planned) -> dict:
    return {about: verdict.document() for about, verdict in planned.verdicts.items()}


def record_of(planned, parent: dict, verified: dict) -> dict:
    """What `compression.json` says of how a model was made, and by what it was proven."""
    record = {
        "plan": planned.plan.to_json(),
        "parent": parent,
        "kept_block_parameters": planned.kept_parameters,
        "notes": planned.notes,
        "verified": verified,
    }
    if planned.refit:
        found = {"lambda": planned.cut.chosen, "left_as_it_is": planned.cut.left}
        record["refit"] = planned.refit | found
    return record | _verdicts(planned)


def write_report(report: dict, path: str | Path) -> None:
    """Write `report` as JSON, whole or not at all: a temporary name first, then a rename.

    Raises `InputError` where the place cannot be written, `ResourceError` when the disk is full.
    """
    path = Path(path)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{path}: the disk is full ({len(text.encode())} bytes needed); free some space."
            ) from error
        raise InputError(
            f"{path}: the report cannot be written ({error.strerror}); give another place."
        ) from error


def _number(value: float) -> str:
    """Four significant digits, thousands marked: 0.1234, 45.83, 2,195, 1.2e+09."""
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def _scaled(value: float, unit: str = "") -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            prefix = "B" if prefix == "G" and not unit else prefix
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def _bytes(value: float) -> str:
    return _scaled(value, "B")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _range(interval: dict, show: Callable) -> str:
    return f"  ({show(interval['low'])} to {show(interval['high'])})"


def _difference(report: dict, key: str) -> str:
    interval = report["paired"].get(key)
    return "" if interval is None else _signed(interval["estimate"]) + _range(interval, _signed)


def _fold(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else _number(value)


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _times(interval: dict | None) -> str:
    return "" if interval is None else f"x {_fold(interval['estimate'])}" + _range(interval, _fold)


def _perplexity_ratio(report: dict, key: str) -> str:
    nats = report["paired"]["nats_per_token"]
    return _times({name: math.exp(min(value, 700.0)) for name, value in nats.items()})


def _speedup(report: dict, key: str) -> str:
    return _times(report["paired"].get(key.replace("tokens_per_s", "speedup")))


def _batch_speedup(report: dict, key: str) -> str:
    return _times(report["paired"]["speedup"])


def _ratio(report: dict, key: str) -> str:
    return f"x {_fold(report['compressed'][key] / report['dense'][key])}"


def _caption(report: dict) -> str:
    data, versions = report["data"], report["versions"]
    source = "/".join(Path(data["path"]).parts[-2:])
    what = "samples" if "samples" in data else "windows"
    words = f" of {data['tokens_per_window']} tokens" if what == "windows" else ""
    lines = [f"{data[what]} {what}{words} of {source}."]
    if report.get("compressed"):
        lines.append(f"Brackets: 95 % bootstrap over {what}; for speeds, range of repeats.")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines.append(f"{report['chip']} ({report['device']}), {report['machine']}; {packages}.")
    return "\n".join(lines)


ROWS = (
    ("Loss, {loss}", "loss", _number, _difference),
    ("{measure}", "score", _number, _difference),
    ("Loss, nats/token", "nats_per_token", _number, _difference),
    ("Loss, nats/byte", "nats_per_byte", _number, _difference),
    ("Perplexity", "perplexity", _number, _perplexity_ratio),
    ("Parameters", "parameters", _scaled, _ratio),
    ("In memory", "parameter_bytes", _bytes, _ratio),
    ("On disk", "disk_bytes", _bytes, _ratio),
    ("Peak, generating", "peak_bytes", _bytes, _ratio),
    ("MACs/sample", "macs_per_sample", _scaled, _ratio),
    ("ms/sample (speedup)", "ms_per_sample", _number, _batch_speedup),
    ("Prefill, tokens/s", "prefill_tokens_per_s", _number, _speedup),
    ("Decode, tokens/s", "decode_tokens_per_s", _number, _speedup),
)
