"""Trust: what a store names is called, or read from elsewhere, only if the user said so.

A store is data, and anybody can write one. Its configuration may name a function of somebody's own
(``module:function``), or a folder that images lie in. Making such a problem again imports and calls what is named, so
it takes one of two things: that the user trusts the store (``trajstore.open(path, trust=True)``, ``--trust``), which
holds for this process; or that it was recorded here, by this user on this machine. The latter is remembered in the
user's cache as the random id of a recording, what it named, and the file in which Python found the module: neither
another store at the same path, nor another module of the same name, is taken for it. Losing the memory loses no more
than a ``--trust`` asks for. A function of a script or a notebook (``__main__:make``) is in no file that another process
would find: whoever recorded with it may compute with it for as long as the process runs.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trajstore._common.cache import user_cache
from trajstore.errors import UntrustedError
from trajstore.experiment.configuration import shortened
from trajstore.storage.format.digest import config_digest

__all__ = ["allow", "refuse_untrusted", "remember"]

_FACTORY, _FOLDER = "factory", "folder"
_SCRIPT = "__main__"
"""How Python calls the module of whatever program runs."""
_SHOWN = 6
"""Arguments that a message names."""
_allowed: set[str] = set()
"""Recordings, with what they name, that were allowed in this process."""
_unrecorded: set[tuple[str, str]] = set()
"""Addresses of stores, with what was allowed there of an experiment of which nothing was recorded yet."""


def allow(problem: Any, recordings: Iterable[str], address: str) -> None:  # noqa: ANN401
    """Let the problem of an experiment be made in this process, whatever it names.

    `problem` is its stored table, `recordings` are the ids of the experiment's fills, `address` is where its store is:
    where nothing was recorded yet, there is no id to know it by.
    """
    if any(_named_in(problem)):
        _allowed.update(_key(one, problem) for one in recordings)
        _unrecorded.add((address, _key("", problem)))


def remember(problem: Any, recordings: Iterable[str]) -> None:  # noqa: ANN401
    """Note that the recordings with these ids were made here, of a problem of which this is the stored table."""
    ids = list(recordings)
    if not any(_named_in(problem)) or not ids or _recorded_here(problem, ids):
        return
    if _module(problem) == _SCRIPT:
        # Of a script or a notebook: what has this name in another process is another function.
        _allowed.update(_key(one, problem) for one in ids)
        return
    with suppress(OSError):  # a home that cannot be written to: --trust will be asked for
        file = _memory(ids[0], problem)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
        partial.write_text(json.dumps(_origin(problem)), encoding="utf-8")
        partial.replace(file)


def refuse_untrusted(experiment: str, problem: Any, recordings: Iterable[str], address: str | None) -> None:  # noqa: ANN401
    """Raise where a stored problem names what is not trusted, and say what would be done.

    `address` is where the store is; None of what came without one.
    """
    named, ids = list(_named_in(problem)), list(recordings)
    if not named or any(_key(one, problem) in _allowed for one in ids):
        return
    if not ids and address is not None and (address, _key("", problem)) in _unrecorded:
        return
    if not _recorded_here(problem, ids):
        module = _module(problem)
        if module == _SCRIPT and not _is_in_script(problem):
            raise UntrustedError(
                f"experiment {experiment!r} would {' and '.join(named)}, defined in a script or notebook, and no other "
                "process can import it: compute there, or put the function into a module and record with that"
            )
        lost = module and module != _SCRIPT and _origin(problem) is None
        why = f"names the module {shortened(module)}, which cannot be found" if lost else "was not recorded here"
        raise UntrustedError(
            f"experiment {experiment!r} {why}, and to compute with it would {' and '.join(named)}; if "
            "you trust whoever made this store, give --trust (in Python trajstore.open(path, trust=True))"
        )


def _named_in(problem: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield what making a problem would do, beyond calling trajstore."""
    if not isinstance(problem, Mapping):
        return
    if problem.get("family") == _FACTORY:
        arguments = problem.get("arguments")
        given = list(arguments.items()) if isinstance(arguments, Mapping) else []
        told = [f"{_cut(name)}={shortened(value)}" for name, value in given[:_SHOWN]]
        told += [f"and {len(given) - _SHOWN} more"] if len(given) > _SHOWN else []
        yield f"call {_cut(problem.get('function'))}({', '.join(told)})"
    images = problem.get("images")
    if isinstance(images, Mapping):
        where = images.get("path") if images.get("family") == _FOLDER else images.get("root")
        if where is not None:
            yield f"read the images in {shortened(where)}"


def _cut(name: object) -> str:
    return shortened(name).strip("'")


def _recorded_here(problem: Any, recordings: Iterable[str]) -> bool:  # noqa: ANN401
    origin = _origin(problem)
    if origin is None and _module(problem):
        return False  # the one that is there when it is called may be another
    for one in recordings:
        with suppress(OSError, ValueError):
            remembered = json.loads(_memory(one, problem).read_text(encoding="utf-8"))
            if remembered == origin:
                return True
    return False


def _memory(recording: str, problem: Any) -> Path:  # noqa: ANN401
    return user_cache() / "recorded" / _key(recording, problem)


def _key(recording: str, problem: Mapping[str, Any]) -> str:
    # A factory's table also tells what the function made.
    named = {key: value for key, value in problem.items() if key != "made"}
    return config_digest({"id": recording, "problem": named}).removeprefix("sha256:")[:32]


def _module(problem: Mapping[str, Any]) -> str:
    """Return the first part of the name of the module that a problem names, nothing where it names none."""
    return str(problem.get("function") or "").partition(":")[0].partition(".")[0]


def _is_in_script(problem: Mapping[str, Any]) -> bool:
    """Tell whether the program that runs here has a function of the name that a problem of a script says."""
    return hasattr(sys.modules[_SCRIPT], str(problem.get("function")).partition(":")[2])


def _origin(problem: Mapping[str, Any]) -> str | None:
    """Return where Python would find the module that a problem names, without running anything of it."""
    top = _module(problem)
    if top == _SCRIPT:
        return None
    found: ModuleSpec | None = None
    with suppress(ImportError, ValueError):  # the parents of a module would be imported: its top alone is looked for
        found = find_spec(top) if top.isidentifier() else None
    if found is None:
        return None
    places = [found.origin] if found.has_location else list(found.submodule_search_locations or [str(found.origin)])
    return os.pathsep.join(os.path.realpath(str(place)) for place in places)
