import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mlx_compress import toolkit
from mlx_compress.errors import GateFailed, InputError, ResourceError, exit_on_error

HEAVY = {"mlx.core", "mlx_lm", "torch", "transformers", "numpy"}


def run(*command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def script(name, *arguments, **environment):
    return run(str(Path(sysconfig.get_path("scripts"), name)), *arguments, **environment)


def package(folder, name, *, module, command="other", summary="Something else."):
    """Lay a package's metadata in `folder`, as an installer would, with one command."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    header = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: {summary}\n"
    (info / "METADATA").write_text(header)
    (info / "entry_points.txt").write_text(f"[{toolkit.GROUP}]\n{command} = {module}\n")


def test_help_of_the_roof_lists_compress():
    result = script("efficientai-mlx-toolkit", "--help")
    assert result.returncode == 0, result.stderr
    assert "compress" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    "command", [("mlx-compress",), ("efficientai-mlx-toolkit", "compress")], ids=" ".join
)
def test_help_of_compress_names_the_command_that_was_typed(command):
    result = script(*command, "--help")
    assert result.returncode == 0, result.stderr
    assert " ".join(command) in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    "entry, arguments",
    [("toolkit", []), ("toolkit", ["compress"]), ("cli", [])],
    ids=["roof", "roof compress", "mlx-compress"],
)
def test_help_imports_no_heavy_package(entry, arguments):
    code = f"""
import json, sys
sys.argv = ["command", *{arguments}, "--help"]
from mlx_compress.{entry} import main
try:
    main()
finally:
    print("\\n" + json.dumps(sorted(sys.modules)))
"""
    result = run(sys.executable, "-P", "-c", code)
    assert result.returncode == 0, result.stderr
    assert HEAVY.isdisjoint(json.loads(result.stdout.splitlines()[-1]))


def test_a_package_that_does_not_load_costs_the_others_nothing(tmp_path):
    package(tmp_path, "broken", module="broken_module:app", summary="Broken [/here].")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('first line\\nsecond')")
    listing = script("efficientai-mlx-toolkit", "--help", PYTHONPATH=str(tmp_path))
    assert listing.returncode == 0
    assert "compress" in listing.stdout
    assert "Broken [/here]." in listing.stdout
    helped = script("efficientai-mlx-toolkit", "compress", "--help", PYTHONPATH=str(tmp_path))
    assert (helped.returncode, helped.stderr) == (0, "")
    called = script("efficientai-mlx-toolkit", "other", PYTHONPATH=str(tmp_path))
    assert called.returncode == 2
    assert called.stderr == "error: 'other' of broken does not load: RuntimeError: first line\n"


def test_a_second_package_with_the_same_command_is_named_and_not_used(tmp_path):
    package(tmp_path, "zzz", module="nowhere:app", command="compress")
    result = script("efficientai-mlx-toolkit", "compress", "--help", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    assert result.stderr == "warning: 'compress' of zzz is hidden by mlx-compress's\n"


def test_an_unknown_command_is_a_usage_error():
    result = script("efficientai-mlx-toolkit", "compres")
    assert result.returncode == 2
    assert "No such command 'compres'" in result.stderr
    assert "Did you mean 'compress'?" in result.stderr


@pytest.mark.parametrize("error, code", [(InputError, 2), (GateFailed, 3), (ResourceError, 4)])
def test_an_error_becomes_one_line_and_its_exit_code(error, code, capsys):
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise error("model: no such folder")
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: model: no such folder\n"
