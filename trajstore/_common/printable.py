"""Text that a terminal shows and does not obey.

Names and values may come from a stranger's store, and a terminal takes some characters for commands: to move the
cursor, to write over what is there, to set its title, to turn the direction of a line. They are shown as what they are.
"""

from __future__ import annotations

from unicodedata import category

__all__ = ["printable"]

_COMMANDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls, formats (directions of text among them), halves of characters, separators of lines."""


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with what a terminal would take for a command escaped, but for the characters to keep.

    >>> print(printable("\x1b[31mred\x07"))
    \x1b[31mred\x07
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or category(c) not in _COMMANDS else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
