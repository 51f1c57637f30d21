import errno
import io
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_compress.errors import InputError, ResourceError
from mlx_compress.report import comparison_table, machine, write_report


def section(scale=1.0):
    return {
        "nats_per_token": 3.825 * scale,
        "nats_per_byte": 1.116 * scale,
        "perplexity": 45.83 * scale,
        "tokens": 44880,
        "bytes": 153782,
        "parameters": int(5_475_584 / scale),
        "parameter_bytes": int(21_902_336 / scale),
        "disk_bytes": int(21_908_384 / scale),
        "dtype": "float32",
        "prefill_tokens_per_s": 2195.8 * scale,
        "decode_tokens_per_s": 158.2 * scale,
        "peak_bytes": int(29_217_589 / scale),
    }


def around(estimate, width=0.1):
    return {"estimate": estimate, "low": estimate - width, "high": estimate + width}


def pair():
    return {
        **machine(),
        "seed": 0,
        "dtype": "float32",
        "data": {"path": "/a/long/way/to/books/valid.txt", "windows": 9, "tokens_per_window": 256},
        "dense": section(),
        "compressed": section(1.25),
        "paired": {
            "nats_per_token": around(0.218),
            "nats_per_byte": around(0.064),
            "top_token_agreement": around(0.679),
            "prefill_speedup": around(1.25),
            "decode_speedup": around(1.25),
        },
    }


def shown(report):
    screen = io.StringIO()
    Console(file=screen, width=80).print(comparison_table(report))
    return screen.getvalue()


def row(text, label):
    return next(line for line in text.splitlines() if line.strip().startswith(label)).split()


def test_the_table_has_dense_beside_compressed_and_the_change():
    text = shown(pair())
    assert row(text, "Loss, nats/token")[2:] == [
        "3.825",
        "4.781",
        "+0.218",
        "(+0.118",
        "to",
        "+0.318)",
    ]
    assert row(text, "Perplexity")[1:5] == ["45.83", "57.29", "x", "1.244"]
    assert row(text, "Parameters")[1:] == ["5.48", "M", "4.38", "M", "x", "0.800"]
    assert row(text, "On disk")[2:] == ["21.91", "MB", "17.53", "MB", "x", "0.800"]
    assert row(text, "Decode")[2:5] == ["158.2", "197.8", "x"]
    assert row(text, "Same top token")[3:] == ["67.9", "%", "(57.9", "%", "to", "77.9", "%)"]
    assert "9 windows of 256 tokens of books/valid.txt" in text and machine()["chip"] in text


def test_a_report_of_one_model_has_one_column():
    report = pair()
    del report["compressed"], report["paired"]
    text = shown(report)
    assert row(text, "Perplexity") == ["Perplexity", "45.83"]
    assert "change" not in text and "Same top token" not in text


def test_what_was_not_measured_is_left_out():
    report = pair()
    report["dense"]["decode_tokens_per_s"] = report["compressed"]["disk_bytes"] = None
    report["paired"]["nats_per_byte"] = None
    text = shown(report)
    assert "Decode" not in text and "None" not in text
    assert row(text, "On disk")[-1] == "-"
    assert row(text, "Loss, nats/byte")[2:] == ["1.116", "1.395"]


@settings(deadline=None)
@given(st.floats(1e-3, 1e6), st.floats(-50, 50))
def test_the_table_fits_80_columns_whatever_the_figures(scale, worse):
    report = pair()
    report["compressed"] = section(scale)
    report["paired"]["nats_per_token"] = around(worse)
    report["paired"]["decode_speedup"] = around(scale, scale / 3)
    text = shown(report)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_report_on_disk_is_the_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    write_report(pair(), path)
    assert json.loads(path.read_text()) == pair()
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, ResourceError, r"report.json: the disk is full \(\d+ bytes needed\); free"),
        (errno.EACCES, InputError, r"report.json: the report cannot be written \(Permission"),
    ],
)
def test_a_write_that_fails_leaves_the_old_report(tmp_path, monkeypatch, number, kind, message):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=message):
        write_report(pair(), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.json"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"none/report.json: the report cannot be written \(No such"
    ):
        write_report({}, tmp_path / "none" / "report.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report({"loss": float("nan")}, tmp_path / "report.json")
    assert os.listdir(tmp_path) == []
