"""The command line, built with typer. Heavy packages are imported only when a command runs."""

from fedshelf.cli.app import main

__all__ = ["main"]
