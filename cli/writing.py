"""How text is written where the output cannot hold it: Greek letters, lines and signs become ASCII.

A terminal, a pipe or a log may take Latin-1 or plain ASCII only. What it does not hold is spelled out (θ₀ becomes
theta0, ─ becomes -), and what has no spelling is escaped, so that nothing printed ends in a traceback.
"""

from __future__ import annotations

import codecs
import sys
import unicodedata
from typing import TextIO

__all__ = ["as_written", "holds", "spell_out"]

_SPELLED = "trajstore.spelled"
"""The name of the error handler."""
_ASCII = "trajstore_ascii"
"""ASCII by a name of its own: what parses the command line would write UTF-8 into a stream that is called ASCII."""
_SIGNS = {
    "─": "-", "━": "=", "╸": "=", "╺": "-", "│": "|", "–": "-", "—": "-", "−": "-", "×": "x", "·": ".", "•": "*",
    "…": "...", "→": "->", "⇄": "<->", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "±": "+-", "∞": "inf", "‖": "|",
    "√": "sqrt", "∇": "grad ", "∑": "sum", "∈": "in", "‘": "'", "’": "'", "“": '"', "”": '"', "„": '"', "¬": "not ",
    "∘": "o", "∂": "d", "µ": "micro", "✓": "ok", "✗": "x", "█": "#", "▏": "|", "⠋": "*", "ß": "ss",
    "\N{SOFT HYPHEN}": "",
}  # fmt: skip


def spell_out() -> None:
    """Have standard output and standard error take any text from now on."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is None:  # something else took its place, as tests do
            continue
        plain = _codec(stream).name == "ascii"
        reconfigure(errors=_SPELLED, **({"encoding": _ASCII} if plain else {}))


def holds(stream: TextIO, text: str) -> bool:
    """Tell whether a stream holds a text as it is."""
    try:
        _codec(stream).encode(text)
    except UnicodeEncodeError:
        return False
    return True


def as_written(text: str) -> str:
    """Return a text as standard output will show it."""
    if holds(sys.stdout, text):
        return text
    codec = _codec(sys.stdout)
    return codec.decode(codec.encode(text, _SPELLED)[0])[0]


def _codec(stream: TextIO) -> codecs.CodecInfo:
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8")


def _spelled(sign: str) -> str:
    """Return one character in ASCII."""
    if sign in _SIGNS:
        return _SIGNS[sign]
    name = unicodedata.name(sign, "")
    if name.startswith("GREEK"):
        letter = name.partition(" LETTER ")[2].partition(" WITH ")[0].removeprefix("FINAL ").lower()
        return letter.capitalize() if " CAPITAL " in name else letter
    plain = unicodedata.normalize("NFKD", sign)
    kept = "".join(_SIGNS.get(c, c) for c in plain)
    kept = "".join(c for c in kept if c.isascii())
    return kept or sign.encode("ascii", "backslashreplace").decode()


def _handler(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    raised = ["SUPERSCRIPT" in unicodedata.name(sign, "") for sign in signs]
    begins = [now and not before for now, before in zip(raised, [False, *raised], strict=False)]
    return "".join("^" * up + _spelled(sign) for sign, up in zip(signs, begins, strict=True)), error.end


def _lookup(name: str) -> codecs.CodecInfo | None:
    if name != _ASCII:
        return None
    plain = codecs.lookup("ascii")
    return codecs.CodecInfo(
        plain.encode, plain.decode, plain.streamreader, plain.streamwriter, plain.incrementalencoder,
        plain.incrementaldecoder, name=_ASCII,
    )  # fmt: skip


codecs.register_error(_SPELLED, _handler)
codecs.register(_lookup)
