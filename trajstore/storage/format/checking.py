"""What a store says is data: it is checked for type, form and range before anything acts on it.

Anybody can write a document, and a disk can change one. A number may be a path there, a size may be negative or beyond
all memory, a name may hold a terminal's commands. So every document of an experiment goes through `checked` once, and
what is not as a recording would have written it is a ValueError that names the field.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

__all__ = [
    "MOST_METRICS",
    "checked",
    "checked_fills",
    "checked_layout",
    "checked_schema",
    "is_label",
    "is_metric",
    "is_name",
    "is_new_label",
    "most_bytes",
    "refuse_beyond_memory",
]

Check = Callable[[Any, str], None]
"""Raises a ValueError where a value is not what belongs at a place."""

_SEED = 2**63 - 1
_STEPS = 2**40
_A_SNAPSHOT = 36
"""Bytes that the step of a stored state takes as a label."""
_A_STEP = 32
"""Bytes that it takes for each step of a slab to find out which of them count."""
_DEEPEST = 32
"""Tables and lists in one another."""
MOST_METRICS = 63
"""Bits of `measured`, but for the sign."""
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")


def checked(attributes: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the attributes of an experiment, if they are as a recording writes them."""
    _refuse_strange_form(attributes)
    _ATTRIBUTES(attributes, "")
    if (attributes["format"] == 1) != ("fills" in attributes):
        _wrong("fills", attributes.get("fills"), "be there in format 1, and nowhere else")
    record = attributes["config"]["record"]
    if record.get("adaptive") is not None and record.get("tolerance") is None:
        _wrong("config.record.tolerance", None, "be a number where adaptive is given")
    schema = checked_schema(attributes["schema"])
    for name in ("orders", "seeds", "steps"):  # both are written at once, and grow together
        if attributes["config"][name] != schema[name]:
            _wrong(f"config.{name}", attributes["config"][name], f"be what schema.{name} is")
    return dict(attributes)


def checked_fills(fills: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return fills, if they are as a recording notes them."""
    _refuse_strange_form(fills)
    _FILLS(fills, "fills")
    return list(fills)


def checked_schema(schema: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the schema of an experiment, if its parts fit together and can be read with this machine's memory."""
    _SCHEMA(schema, "schema")
    for name in ("orders", "seeds", "late"):
        if len(set(schema[name])) != len(schema[name]):
            _wrong(f"schema.{name}", schema[name], "hold each once")
    if len(schema["metrics"]) > MOST_METRICS:
        _wrong("schema.metrics", f"of {len(schema['metrics'])} metrics", f"have at most {MOST_METRICS}")
    for name in ("init_seeds", "data_seeds"):
        if len(schema[name]) != len(schema["seeds"]):
            _wrong(f"schema.{name}", schema[name], "have one for each seed")
    snapshots = _snapshots(schema)
    checked_layout(schema["layout"])
    _opens(schema, snapshots)
    return dict(schema)


def _refuse_strange_form(attributes: Any) -> None:  # noqa: ANN401
    """Refuse text that cannot be encoded, and tables in tables beyond what anything that follows them could take.

    Level by level, not by recursion.
    """
    level, depth = [attributes], 0
    while level := [
        item
        for part in level
        if isinstance(part, Mapping | list | tuple)
        for item in ((*part, *part.values()) if isinstance(part, Mapping) else part)
    ]:
        depth += 1
        if any(isinstance(item, str) and not _is_text(item) for item in level):
            raise ValueError("it holds text with half a character (a lone surrogate), as no recording writes it")
        if depth > _DEEPEST:
            raise ValueError(f"its tables lie in one another more than {_DEEPEST} deep, as those of no recording do")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(text: object) -> bool:
    """Tell whether an experiment can have a name: it is a folder, and no other place than its own."""
    return isinstance(text, str) and ".." not in text and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text))


def is_label(text: object) -> bool:
    """Tell whether an order can have a label."""
    return isinstance(text, str) and 0 < len(text) <= 240 and text.isprintable() and not {*" ,"} & {*text}


def is_new_label(text: object) -> bool:
    """Tell whether somebody's own order can be given a label: shorter than what a leg can say of itself."""
    return is_label(text) and len(str(text)) <= 100


def is_metric(text: object) -> bool:
    """Tell whether a metric can have a name: it is an array, a flag and a column."""
    return isinstance(text, str) and bool(re.fullmatch(r"[A-Za-z_]\w{0,99}", text))


def most_bytes() -> int:
    """Return how much may be taken at once for what a document declares: half of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _snapshots(schema: Mapping[str, Any]) -> int:
    """Check the runs of snapshots before they are written out, and return how many there are."""
    count, before = 0, -1
    for run in schema["snapshots"]:
        first, last, spacing = run if len(run) == 3 else (0, -1, 1)
        if not before < first <= last <= schema["steps"] or spacing < 1 or (last - first) % spacing:
            _wrong("schema.snapshots", run, "hold runs (first, last, spacing) that increase, up to the last step")
        count, before = count + (last - first) // spacing + 1, last
    if not count:
        _wrong("schema.snapshots", schema["snapshots"], "hold at least one step")
    return count


def checked_layout(layout: Any) -> None:  # noqa: ANN401
    """Refuse a layout whose entries do not lie one behind the other, or are no tensors."""
    _LAYOUT(layout, "schema.layout")
    ends, names = {"params": 0, "counters": 0}, set[str]()
    for k, entry in enumerate(layout["entries"]):
        at = f"schema.layout.entries[{k}]"
        if entry["array"] != ("params" if entry["dtype"] in _FLOATS else "counters"):
            _wrong(f"{at}.array", entry["array"], f"be the vector of {entry['dtype']}")
        if entry["offset"] != ends[entry["array"]]:
            _wrong(f"{at}.offset", entry["offset"], f"be {ends[entry['array']]}, where the entry before ends")
        ends[entry["array"]] += math.prod(entry["shape"])
        if entry["name"] in names and entry["role"] != "memory":
            _wrong(f"{at}.name", entry["name"], "be of one entry")
        names.add(entry["name"])
    for alias, name in layout["tied"].items():
        if name not in names:
            _wrong(f"schema.layout.tied[{alias!r}]", name, "be the name of an entry")


def refuse_beyond_memory(needed: int, what: str) -> None:
    """Refuse to take more memory at once than there may be for what a document declares."""
    if needed > most_bytes():
        raise ValueError(
            f"{what} would take {needed / 1e9:,.1f} GB at once, which is more than half of this machine's memory "
            f"({most_bytes() / 1e9:,.1f} GB)"
        )


def _opens(schema: Mapping[str, Any], snapshots: int) -> None:
    """Refuse what could not be opened: its labels are held whole, and what counts is found a slab at a time."""
    needed = _A_SNAPSHOT * snapshots + _A_STEP * (schema["steps"] + 1)
    refuse_beyond_memory(needed, f"schema: {schema['steps']:,} steps with {snapshots:,} states")


def _wrong(where: str, value: Any, must: str) -> NoReturn:  # noqa: ANN401
    told = repr(value)
    raise ValueError(f"{where} is {told if len(told) <= 80 else told[:80] + '…'}; it must {must}")


def _whole(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> None:  # noqa: ANN401
        if type(value) is not int or not low <= value <= high:
            _wrong(where, value, f"be a whole number from {low} to {high}")

    return check


def _of(kind: type | tuple[type, ...], called: str) -> Check:
    def check(value: Any, where: str) -> None:  # noqa: ANN401
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            _wrong(where, value, f"be {called}")

    return check


def _that(holds: Callable[[object], bool], called: str) -> Check:
    def check(value: Any, where: str) -> None:  # noqa: ANN401
        if not holds(value):
            _wrong(where, value, f"be {called}")

    return check


def _one_of(*known: object) -> Check:
    def check(value: Any, where: str) -> None:  # noqa: ANN401
        if not any(type(value) is type(one) and value == one for one in known):
            _wrong(where, value, f"be one of {', '.join(map(str, known))}")

    return check


def _or_none(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _list(check: Check, length: int | None = None) -> Check:
    def every(value: Any, where: str) -> None:  # noqa: ANN401
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            _wrong(where, value, "be a list" if length is None else f"be a list of {length}")
        for k, item in enumerate(value):
            check(item, f"{where}[{k}]")

    return every


def _each(key: Check, check: Check) -> Check:
    """Check a table whose keys are names of somebody's choice."""

    def every(value: Any, where: str) -> None:  # noqa: ANN401
        _TABLE(value, where)
        for name, item in value.items():
            key(name, f"a key of {where}")
            check(item, f"{where}[{name!r}]")

    return every


def _table(checks: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Check a table by its keys; more of them may be there, which nothing here reads."""

    def every(value: Any, where: str) -> None:  # noqa: ANN401
        _TABLE(value, where)
        for name, check in checks.items():
            if name not in value:
                _wrong(where or "it", list(value), f"have {name!r}")
            check(value[name], f"{where}.{name}".lstrip("."))
        for name, check in (optional or {}).items():
            if name in value:
                check(value[name], f"{where}.{name}".lstrip("."))

    return every


def _pair(value: Any, where: str) -> None:  # noqa: ANN401
    if not isinstance(value, list | tuple) or len(value) != 2:
        _wrong(where, value, "be an order and a seed")
    _LABEL(value[0], f"{where}[0]")
    _whole(0, _SEED)(value[1], f"{where}[1]")


def _is_named(text: object) -> bool:
    return isinstance(text, str) and len(text) <= 1_000 and text.isprintable()


_TABLE = _of(Mapping, "a table")
_TEXT, _NUMBER, _YES = _of(str, "text"), _of((int, float), "a number"), _of(bool, "true or false")
_COUNT, _LABEL = _whole(0, _STEPS), _that(is_label, "a label of up to 240 characters without spaces and commas")
_METRIC = _that(is_metric, "the name of a metric: letters, digits and '_'")
_NAMED = _that(_is_named, "a name of up to 1,000 characters that can be read")

_ENTRY = _table(
    {
        "name": _NAMED, "role": _one_of("parameter", "buffer", "memory", "position"), "shape": _list(_COUNT),
        "dtype": _one_of(*_FLOATS, *_INTEGERS), "array": _one_of("params", "counters"), "offset": _COUNT,
    },
    {"in_state_dict": _YES},
)  # fmt: skip

_LAYOUT = _table({"entries": _list(_ENTRY), "tied": _each(_NAMED, _NAMED)})

_SCHEMA = _table(
    {
        "orders": _list(_LABEL), "seeds": _list(_whole(0, _SEED)), "init_seeds": _list(_whole(0, _SEED)),
        "data_seeds": _list(_whole(0, _SEED)), "steps": _COUNT, "snapshots": _list(_list(_COUNT, 3)),
        "snapshots_per_segment": _whole(1, _STEPS), "metrics": _each(_METRIC, _or_none(_COUNT)), "late": _list(_METRIC),
        "components": _COUNT, "parameters": _COUNT, "batch_size": _COUNT, "codec": _one_of("pcodec", "portable"),
        "sketch_seed": _whole(0, _SEED), "layout": _LAYOUT,
    }
)  # fmt: skip

_PLAN = _table(
    {"engine": _one_of("reference", "wavefront")},
    {
        "lanes": _whole(1, 4096), "compiled": _YES, "reason": _TEXT, "slowed": _YES, "workers": _whole(0, 1024),
        "threads": _whole(0, 2**20),
    },
)  # fmt: skip

_FILL = _table(
    {
        "id": _TEXT, "slabs": _list(_pair), "began": _TEXT, "ended": _or_none(_TEXT),
        "versions": _each(_TEXT, _or_none(_TEXT)), "device": _TEXT, "threads": _COUNT,
    },
    {
        "plan": _PLAN, "data": _TEXT, "seconds": _each(_TEXT, _NUMBER), "engine": _TEXT, "pattern": _TEXT,
        "keys": _list(_TEXT), "files": _each(_TEXT, _or_none(_TEXT)),
    },
)  # fmt: skip

_FILLS = _list(_FILL)

_RECORD = _table(
    {},
    {
        "every": _whole(1, _STEPS), "log_until": _or_none(_COUNT), "adaptive": _or_none(_METRIC),
        "tolerance": _or_none(_NUMBER), "snapshot_every": _or_none(_COUNT), "optimizer_state": _YES,
        "sketch": _COUNT, "codec": _TEXT, "steps": _or_none(_list(_COUNT)), "dtype": _or_none(_TEXT),
        "dense_tail": _or_none(_whole(1, _STEPS)),
    },
)  # fmt: skip

_CONFIG = _table(
    {
        "name": _that(is_name, "the name of an experiment"), "problem": _TABLE, "operator": _TABLE, "steps": _COUNT,
        "orders": _list(_LABEL), "seeds": _list(_whole(0, _SEED)), "record": _RECORD,
    },
    {"init_seed": _or_none(_whole(0, _SEED)), "stops": _list(_COUNT), "declared_steps": _or_none(_COUNT)},
)  # fmt: skip

_ATTRIBUTES = _table(
    {
        "format": _whole(1, 2), "config": _CONFIG, "config_digest": _TEXT, "schema": _TABLE,
        "batch_digests": _list(_TEXT), "digest": _TEXT,
    },
    {"fills": _FILLS, "id": _TEXT},
)  # fmt: skip
