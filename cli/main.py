"""The program: its commands, and how errors end it.

Exit codes: 0 done · 1 the work failed, perhaps midway (busy, disk full, damage, …) · 2 the request was refused,
nothing was written · 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import typer
from trajstore.cli import analyze, claims, compute, demo, doctor, exchange, inspection, maintenance, plotting, record
from trajstore.cli.console import tell
from trajstore.cli.interrupting import heed
from trajstore.cli.writing import spell_out

from trajstore.errors import TrajstoreError

__all__ = ["app", "main"]

_INTERRUPTED = 130
# The root of what the parser raises. Some releases of typer bring their own click, so it is found by inheritance.
_CommandLineError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="trajstore",
    help="Record forward and backward SGD iterates, keep them in Zarr, ask them in SQL and figures.",
    epilog="Exit codes: 0 done, 1 failed midway, 2 request refused (nothing written), 130 interrupted.",
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
app.command("analyze")(analyze.analyze)
app.command("claims")(claims.claims)
app.command("compute")(compute.compute)
app.command("plot")(plotting.plot)
app.command("export")(exchange.export)
app.command("import")(exchange.import_)
app.command("verify")(maintenance.verify)
app.command("copy")(maintenance.copy)
app.command("merge")(maintenance.merge)
app.command("pack")(maintenance.pack)
app.command("rm")(maintenance.rm)
app.command("unlock")(maintenance.unlock)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run a command; every foreseeable failure is one line on standard error."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # problems of one's own lie there; last, so that they stand in nobody's way
    spell_out()
    heed()
    warnings.showwarning = lambda message, *_, **__: tell(f"trajstore: {message}")
    # Zarr writes several documents at once, and when one fails it lets go of those that it has not begun.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    try:
        code = typer.main.get_command(app).main(prog_name="trajstore", standalone_mode=False) or 0
        if code == _INTERRUPTED:
            _fail("interrupted; what was committed is kept; the same command continues (`record` with --resume)", code)
    except _CommandLineError as error:
        wants_help = type(error).__name__ == "NoArgsIsHelpError"
        code = _fail(error.format_message(), 2, "" if wants_help else "trajstore: ")
    except TrajstoreError as error:
        code = _fail(str(error), error.exit_code)
    except OSError as error:
        code = _fail(_system_said(error), 1)
    except MemoryError:
        code = _fail("out of memory", 1)
    except RuntimeError as error:
        if "allocate" not in str(error) and "out of memory" not in str(error):
            raise
        code = _fail(f"out of memory ({error})", 1)  # torch's way of saying so
    sys.exit(code)


def _system_said(error: OSError) -> str:
    from trajstore._common.system import refuse_too_many, system_told
    from trajstore.errors import OpenFilesError

    try:
        refuse_too_many(error, "a file")
    except OpenFilesError as too_many:
        return str(too_many)
    return system_told(error)


def _fail(message: str, code: int, prefix: str = "trajstore: ") -> int:
    tell(f"{prefix}{message if not prefix else ' '.join(message.split())}")
    return code


if __name__ == "__main__":
    main()
