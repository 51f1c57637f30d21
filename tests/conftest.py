"""What tests share: a cache of their own, and the command line."""

import sys

import pytest

from mlx_compress import cli


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Statistics are kept here, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlx-compress", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return run
