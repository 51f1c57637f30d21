"""The roof: `efficientai-mlx-toolkit COMMAND ...`, where each command comes from some package.

A package adds a command by an entry point of the group `efficientai_mlx_toolkit.commands` that
names a `typer.Typer`. The list of commands is read from the packages' metadata; only the
command that is called gets imported, so a slow or broken one costs the others nothing.
"""

import sys
from importlib.metadata import EntryPoint, entry_points

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import exit_on_error

GROUP = "efficientai_mlx_toolkit.commands"


class Roof(TyperGroup):
    """A group of stand-ins, one for each entry point; the real command replaces it when called."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.found = find_commands()
        for name, entry in self.found.items():
            self.add_command(TyperCommand(name, help=_summary(entry)))

    def resolve_command(self, ctx, args):
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(self.found[name]), rest


app = typer.Typer(cls=Roof, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def roof() -> None:
    """Tools for efficient models on MLX."""


def find_commands() -> dict[str, EntryPoint]:
    """The entry points by command name. Of two with one name the first package's is kept."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=_package):
        kept = found.setdefault(entry.name, entry)
        if kept is not entry:
            _say(f"warning: {entry.name!r} of {_package(entry)} is hidden by {_package(kept)}'s")
    return found


def load_command(entry: EntryPoint):
    """Import the command behind an entry point, or stop with one line and exit code 2."""
    try:
        return typer.main.get_command(entry.load())
    except Exception as error:  # another package's code may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _say(f"error: {entry.name!r} of {_package(entry)} does not load: {reason}")
        raise typer.Exit(2) from error


def main() -> None:
    with exit_on_error():
        app()


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _summary(entry: EntryPoint) -> str:
    return entry.dist.metadata.get("Summary", "") if entry.dist else ""


def _say(line: str) -> None:
    print(line, file=sys.stderr)
