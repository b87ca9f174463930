"""Ctrl-C, which Python may lose.

What is raised in a destructor, or in a callback of the garbage collector, is printed and forgotten, a KeyboardInterrupt
too: the program went on for minutes. So that it was pressed is noted as well, and whatever reports progress looks.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["heed", "stop_if_asked"]

_asked = threading.Event()


def heed() -> None:
    """Note that Ctrl-C is pressed, besides raising KeyboardInterrupt; what a shell has ignore it goes on doing so."""
    _asked.clear()
    heard = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _note)
    if heard and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _note)


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt, once, if Ctrl-C was pressed and this goes on all the same."""
    if _asked.is_set():
        _asked.clear()
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    _asked.set()
    signal.default_int_handler(number, frame)
