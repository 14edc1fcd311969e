"""The command line as a process, which ends as soon as its work is done."""

from __future__ import annotations

import atexit
import os
import sys
import threading

from normswap.cli.main import main


def run() -> None:
    """Run the command that the arguments name, and end the process."""
    try:
        main(prog_name="normswap")
    except SystemExit as ended:
        _end(ended.code)
        raise


def _end(code: object) -> None:
    """End at once where that is safe: taking torch apart, object by object, takes nearly a second."""
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    if not isinstance(code, int) or any(not thread.daemon for thread in others):
        return
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more: Python has its own way of ending then
        return
    os._exit(code)
