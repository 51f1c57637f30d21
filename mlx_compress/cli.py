"""Stand-in: the real commands replace this file."""

import typer

from .errors import exit_on_error

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)


@app.callback()
def compress() -> None:
    """Make an MLX model smaller and faster."""


@app.command()
def demo() -> None:
    """Say that the frame stands."""
    typer.echo("the frame stands")


def main() -> None:
    with exit_on_error():
        app()
