"""What every tool does around its main function: an error of the user's in one line, Ctrl-C without a traceback."""

from __future__ import annotations

import dis
import logging
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["INTERRUPTED", "error_line", "exit_code", "interruption_note", "run_tool"]

INTERRUPTED = 130  # the exit status of shells for SIGINT

# What was kept, to be told on Ctrl-C; set by what keeps it.
interruption_note: list[Callable[[], str]] = []

_TOOLS = Path(__file__).resolve().parent.parent / "tools"
# Modules whose ``raise`` speaks to the user. yacs is Detectron2's config.
_SPEAKING = ("lt_det", "yacs", "__main__")


def _raised_for_the_user(error: BaseException, traceback: TracebackType | None) -> bool:
    """Whether the error was raised on purpose to be read, and is no bug."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return True  # no space left, permission denied, ...: with the file's name
    if traceback is None or not isinstance(error, (ValueError, KeyError, OSError)):
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    raised = dis.opname[code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
    module = traceback.tb_frame.f_globals.get("__name__", "")
    return raised and (module.split(".")[0] in _SPEAKING or Path(code.co_filename).parent == _TOOLS)


_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")


def _line_of_worker(error: BaseException) -> str | None:
    """The last line of an error of lt_det's that torch brings from a data worker as text; None for others."""
    text = str(error.args[0] if error.args else error)
    if not _FROM_WORKER.match(text):
        return None
    files = re.findall(r'^ +File "([^"]+)", line', text, re.M)
    ours = bool(files) and Path(files[-1]).is_relative_to(Path(__file__).resolve().parent)
    last = text.strip().splitlines()[-1]
    return last if ours and re.match(r"(ValueError|KeyError|OSError|FileNotFoundError)\b", last) else None


def exit_code(name: str, work: Callable[[], int | None]) -> int:
    """``work()``, as the main function of a command on files: its exit code, or 2 and one line for what it cannot use.

    With ``LT_DET_TRACEBACK=1`` errors keep their traceback.
    """
    try:
        return work() or 0
    except BrokenPipeError:
        raise  # no input: the reader of the output has left, see run_tool
    except (ValueError, OSError, KeyError, ImportError) as error:
        if os.environ.get("LT_DET_TRACEBACK") == "1":
            raise
        print(f"{name}: {_message(error)}", file=sys.stderr)
        return 2


def _message(error: BaseException) -> Any:
    """KeyError would put its message into quotes."""
    return error.args[0] if isinstance(error, KeyError) and error.args else error


def error_line(error: BaseException) -> str:
    """``FileNotFoundError: what to do``."""
    return f"{type(error).__name__}: {_message(error)}"


def _nobody_reads() -> bool:
    """Whether the reader of the output has left; what is still to be written then goes nowhere."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return left


def run_tool(main: Callable[[], Any], *, name: str | None = None) -> Any:
    """``main()``, as the main function of a tool.

    Errors that lt_det raises to be read end the process with status 1 and their message alone; their traceback goes
    to the log file where there is one, and to the console with ``LT_DET_TRACEBACK=1``. Others, which are bugs, keep
    theirs. Ctrl-C ends it with status 130 and one line, a reader of its output that has left (``| head``) with status
    1 and none.

    Args:
        main: without arguments.
        name: of the tool, for messages; by default that of the script.

    Returns:
        What ``main`` returns.
    """
    script = Path(sys.argv[0])
    name = name or (script.parent.name if script.stem == "__main__" else script.stem)
    try:
        result = main()
        sys.stdout.flush()
        return result
    except KeyboardInterrupt:
        notes = "".join(f" {note()}" for note in interruption_note)
        print(f"\n{name}: interrupted.{notes}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(1)
        line = _line_of_worker(error)
        if line is None and _raised_for_the_user(error, error.__traceback__):
            line = error_line(error)
        if line is None or os.environ.get("LT_DET_TRACEBACK") == "1":
            raise
        logging.getLogger("lt_det").debug("Ended by an error", exc_info=True)
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(1)
