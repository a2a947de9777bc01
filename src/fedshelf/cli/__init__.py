"""The command line: thin typer commands over the floors below. Nothing heavy is imported before a command runs."""

from fedshelf.cli.app import main

__all__ = ["main"]
