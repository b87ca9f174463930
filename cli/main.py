"""The program: its commands, and how errors end it.

Exit codes: 0 done · 1 the work failed on the way (busy, disk full, …) · 2 the request was wrong, nothing was
written · 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import click
import typer
from trajstore.cli import demo, inspection, plotting, record

from trajstore.errors import BusyError, TrajstoreError

__all__ = ["app", "main"]

app = typer.Typer(
    name="trajstore",
    help="Record forward and backward SGD iterates, keep them in Zarr, ask them in SQL and figures.",
    epilog="Exit codes: 0 done, 1 failed on the way, 2 wrong request (nothing written), 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("presets")(record.presets)
app.command("record")(record.record)
app.command("ls")(inspection.ls)
app.command("info")(inspection.info)
app.command("sql")(inspection.sql)
app.command("plot")(plotting.plot)


def main() -> None:
    """Run a command; every foreseeable failure is one line on standard error."""
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as help_shown:
        typer.echo(help_shown.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        code = _fail(" ".join(error.format_message().split()), 2)
    except BusyError as error:
        code = _fail(str(error), 1)
    except TrajstoreError as error:
        code = _fail(str(error), 2)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except MemoryError:
        code = _fail("out of memory", 1)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted; what was committed stays, and `record --resume` goes on", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    typer.echo(f"trajstore: {message}", err=True)
    return code


if __name__ == "__main__":
    main()
