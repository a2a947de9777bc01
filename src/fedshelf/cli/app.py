"""The `fedshelf` command: registers all subcommands and handles errors."""

import errno
import io
import logging
import os
import sys
from typing import Annotated

import click
import typer.main

from fedshelf import __version__
from fedshelf.cli.commands import BadParametersError, Commands, usage_error_message
from fedshelf.core.child_process import exit_with_parent
from fedshelf.core.errors import FedShelfError
from fedshelf.core.settings import load
from fedshelf.core.system_errors import current_user, reason
from fedshelf.core.text import from_filesystem
from fedshelf.tracking.terminal import log_to_stderr, make_console, print_line, show_uncaught_exceptions

HELP = "Train one product-recognition model over the stores of a retail chain. Photos never leave a store."
EPILOG = """Run 'fedshelf COMMAND --help' for the flags of a command.

Certificates, decoded photos, and client state are kept in $FEDSHELF_HOME, by default in the user's data
directory.

Documentation: docs/index.md in the source folder; 'make docs' builds it as a website.

Example: fedshelf demo"""

_OUTPUT = "the standard output of this command"
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE})

COMMANDS: dict[str, str] = {
    "demo": "fedshelf.cli.demo:demo",
    "server": "fedshelf.cli.server:server",
    "client": "fedshelf.cli.client:client",
    "enroll": "fedshelf.cli.enroll:app",
    "audit-log": "fedshelf.cli.audit_log:audit_log",
    "privacy": "fedshelf.cli.privacy:app",
    "simulate": "fedshelf.cli.simulate:simulate",
    "distill": "fedshelf.cli.distill:distill",
    "predict": "fedshelf.cli.predict:predict",
    "evaluate": "fedshelf.cli.evaluate:evaluate",
    "export": "fedshelf.cli.export:export",
    "edge": "fedshelf.cli.edge:app",
    "runs": "fedshelf.cli.runs:app",
    "catalogue": "fedshelf.cli.catalogue:app",
    "data": "fedshelf.cli.data:app",
}
"""Functions, and groups of commands, by name; in the order of the help."""

app = Commands(help=HELP, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
for _name, _line in COMMANDS.items():
    _found = load(_line)
    app.add_typer(_found, name=_name) if isinstance(_found, Commands) else app.command(_name)(_found)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedshelf {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show informational messages, too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    log_to_stderr(logging.INFO if verbose else logging.WARNING)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Expected errors are printed as one line per problem, without a traceback.

    Args:
        arguments: the arguments; None uses the process's.

    Raises:
        SystemExit: with the exit code, if it is not 0.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot show are escaped
            stream.reconfigure(errors="backslashreplace")
    if arguments is None:
        show_uncaught_exceptions()
    try:
        if sys.stdout is None:
            raise FedShelfError(f"{_OUTPUT} is closed: redirect it to /dev/null, for example, to discard it")
        exit_with_parent()
        code = typer.main.get_command(app).main(args=arguments, prog_name="fedshelf", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.message, err=True)
        code = error.exit_code
    except click.UsageError as error:
        errors = error.errors if isinstance(error, BadParametersError) else (error,)
        code = _fail(tuple(map(usage_error_message, errors)), error.exit_code)
        if error.ctx is not None:
            click.echo(f"Try '{error.ctx.command_path} --help'.", err=True)
    except FedShelfError as error:
        code = _fail(error.args, error.exit_code)
    except OSError as error:
        if error.filename is not None:
            path = from_filesystem(str(error.filename))
            problem = f"'{path}' cannot be used by {current_user()}: {reason(error)}"
        elif error.errno in _UNWRITABLE and sys.stdout is not None:  # files are written by `storage.atomic_files`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
            problem = f"{_OUTPUT} cannot be written: {reason(error)}"
        else:
            raise
        code = _fail((problem,), FedShelfError.exit_code)
    except KeyboardInterrupt:
        code = 130
    if isinstance(code, int) and code:
        sys.exit(code)


def _fail(problems: tuple[object, ...], exit_code: int) -> int:
    """Print the problems to standard error and return the exit code."""
    console = make_console(stderr=True)
    for problem in problems:
        print_line(console, str(problem), label="error: ", label_style="bold red")
    return exit_code
