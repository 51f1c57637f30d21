import errno
import io
import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_compress.errors import InputError, ResourceError
from mlx_compress.plan import PrunePlan
from mlx_compress.report import add_plan, comparison_table, machine, record_of, write_report


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


def judged(scale=1.0):
    return {
        "loss": 0.4439 * scale,
        "score": 0.9297 / scale,
        "parameters": int(271_098 / scale),
        "parameter_bytes": int(1_084_392 / scale),
        "disk_bytes": None,
        "macs_per_sample": int(40_551_050 / scale),
        "ms_per_sample": 20.72 / scale,
    }


def programs(unit="nats", measure="top-1"):
    return {
        **machine(),
        "task": {"measure": measure, "higher_is_better": True, "loss": unit},
        "data": {"path": "/a/data/test.npz", "samples": 128, "samples_per_batch": 50},
        "dense": judged(),
        "compressed": judged(1.25),
        "paired": {"loss": around(0.111), "score": around(-0.186), "speedup": around(1.25)},
    }


def test_a_report_of_programs_is_in_the_units_of_their_task():
    text = shown(programs())
    assert row(text, "Loss, nats")[2:5] == ["0.4439", "0.5549", "+0.111"]
    assert row(text, "top-1")[1:4] == ["0.9297", "0.7438", "-0.186"]
    assert row(text, "ms/sample")[2:6] == ["20.72", "16.58", "x", "1.250"]
    assert "token" not in text and "128 samples of data/test.npz" in text
    text = shown(programs("squared error", "Spearman"))
    assert "Loss, squared error" in text and row(text, "Spearman")[1] == "0.9297"
    assert max(map(len, text.splitlines())) <= 80


def planned(**changes):
    plan = PrunePlan({}, {"seed": 0})
    return SimpleNamespace(**{
        "plan": plan, "kept_parameters": 0.7, "notes": ["a note"], "refit": {}, "cut": None,
        "verdicts": {}, **changes,
    })  # fmt: skip


def test_a_report_says_what_was_decided_and_keeps_the_notes_that_follow():
    report, made = programs(), planned()
    add_plan(report, made, 12.5)
    assert report["kept_block_parameters"] == 0.7 and report["recipe"] == {"seed": 0}
    assert report["seconds"] == 12.5 and "criteria" not in report
    made.notes.append("another")
    assert report["notes"] == ["a note", "another"]


def test_a_record_says_how_weights_were_fitted_where_they_were():
    parent, verified = {"name": "net"}, {"logit_error": 0.0}
    plain = record_of(planned(), parent, verified)
    assert plain["parent"] == parent and plain["verified"] == verified and "refit" not in plain
    cut = SimpleNamespace(chosen={"a": 0.01}, left={"b": "it is shared"})
    fitted = record_of(planned(refit={"method": "closed form"}, cut=cut), parent, verified)
    assert fitted["refit"] == {
        "method": "closed form", "lambda": {"a": 0.01}, "left_as_it_is": {"b": "it is shared"},
    }  # fmt: skip


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
