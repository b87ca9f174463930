"""Streaming: statistics of iterates in one pass over the parameters, with bounded memory.

A statistic is a declaration: what it needs of a slab, what a block of iterates gives, how two such parts combine, and
what comes out. It knows nothing of files, chunks or threads. What runs them cuts the parameters into ranges as they
are chunked in the store; one task walks one range of one slab through its snapshots, block by block, for all statistics
together. Parts merge along snapshots; once closed, they add up along parameters. So a task holds one block, and what
it passes on is small, whatever the length of the run.

Everything is a dask graph until it is computed: by threads here, or by a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from dask.optimization import cull
from numpy.typing import NDArray

from trajstore.errors import ConfigurationError
from trajstore.reading.iterates import Iterates, Layers, Slab
from trajstore.storage.format.layout import Entry

__all__ = ["Block", "Need", "PerLayer", "Statistic", "streamed"]

_TILE = 131_072
"""Numbers that are worked on at a time: as float64, with a scratch as large, they stay in a core's own cache."""
_SQUARE = 8_192
"""Numbers that are turned at a time."""
_NARROW, _WIDE = 16, 8_192
"""Fewest and most parameters of a tile."""

Part = TypeVar("Part")


@dataclass(frozen=True)
class Need:
    """Which of a slab's stored iterates a statistic is of, by their positions."""

    over: range
    reference: int | None = None
    """The position of one that all are compared with."""


@dataclass(frozen=True)
class Block:
    """Some successive iterates of a slab, some of their parameters."""

    steps: NDArray[np.float64]
    """(iterate)."""
    values: NDArray[np.float64]
    """(iterate, parameter); valid, as all the rest, until the statistic returns."""
    reference: NDArray[np.float64] | None
    """(parameter)."""
    scratch: NDArray[np.float64]
    """As large as the values, to be written to: fresh memory would cost more than most of what is done in it."""


class Statistic(Protocol[Part]):
    """A declaration. Make it a frozen dataclass, so that equal ones are computed once."""

    @property
    def name(self) -> str:
        """What the result is called."""

    @property
    def dims(self) -> tuple[str, ...]:
        """`("snapshot",)` for a number an iterate, `("snapshot", "other")` for one a pair, `()` for one a slab."""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the result says of itself."""

    def need(self, slab: Slab) -> Need:
        """Say what it takes; raise a StatisticError where the slab does not have it."""

    def block(self, block: Block) -> Part:
        """Return the part of one block, which holds at least one iterate."""

    def merge(self, earlier: Part, later: Part) -> Part:
        """Combine the parts of successive iterates, same parameters. Associative."""

    def close(self, part: Part) -> NDArray[np.float64]:
        """Turn the part of all iterates into what adds up over parameters, over iterates as `dims` says."""

    def finish(self, total: NDArray[np.float64], parameters: int) -> NDArray[np.float64]:
        """Return the result, from the sum over so many parameters."""


@dataclass(frozen=True)
class PerLayer(Generic[Part]):
    """A statistic of each layer by itself, instead of all parameters together."""

    of: Statistic[Part]

    @property
    def name(self) -> str:
        """What the result is called."""
        return f"{self.of.name}_per_layer"


def streamed(ds: xr.Dataset, statistics: Sequence[Statistic[Any] | PerLayer[Any]], layers: Layers = None) -> xr.Dataset:
    """Return statistics of the parameters as a lazy dataset; computed together, they make one pass.

    `layers` gives globs of the parameters to take, by default all. What a statistic needs is looked for at once, so
    that this call raises if it is not there.
    """
    names = [statistic.name for statistic in statistics]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigurationError(f"two statistics are called {min(twice)!r}; compute them in two calls")
    iterates, wanted = Iterates.of(ds), list(statistics)
    asked = list(dict.fromkeys(s.of if isinstance(s, PerLayer) else s for s in wanted))
    entries = iterates.layers(layers)
    shape = iterates.stored.shape[:2]
    slabs = [_of_slab(iterates, i, k, asked, entries, wanted) for i, k in np.ndindex(*shape)]
    variables = {}
    for number, statistic in enumerate(wanted):
        dims = (*(("layer",) if isinstance(statistic, PerLayer) else ()), *_plain(statistic).dims)
        snapshots = iterates.stored.shape[2]
        lengths = {"layer": len(entries), "snapshot": snapshots, "other": snapshots}
        parts = [
            da.from_delayed(slab[number], tuple(lengths[dim] for dim in dims), np.float64)  # type: ignore[no-untyped-call]
            for slab in slabs
        ]
        stacked = da.stack(parts).reshape(*shape, *(lengths[dim] for dim in dims))  # type: ignore[no-untyped-call]
        attrs = {"parameters": sum(e.size for e in entries), **_plain(statistic).attrs}
        variables[statistic.name] = (("order", "seed", *dims), stacked, attrs)
    return _labelled(variables, iterates, entries)


def _plain(statistic: Statistic[Any] | PerLayer[Any]) -> Statistic[Any]:
    return statistic.of if isinstance(statistic, PerLayer) else statistic


def _labelled(variables: Mapping[str, Any], iterates: Iterates, entries: Sequence[Entry]) -> xr.Dataset:
    """Give results the labels of what they are of."""
    result = xr.Dataset(variables, attrs={"experiment": iterates.experiment})
    for name, coordinate in iterates.params.coords.items():
        if {*coordinate.dims} <= {*result.dims} and name != "stored":
            result = result.assign_coords({name: coordinate.variable})
    if "other" in result.dims:
        result = result.assign_coords(other=("other", iterates.steps, {"description": "step of a stored state"}))
    if "snapshot" in result.dims:
        result = result.assign_coords(stored=(("order", "seed", "snapshot"), iterates.stored))
    if "layer" in result.dims:
        result = result.assign_coords(layer=[e.name for e in entries], size=("layer", [e.size for e in entries]))
    return result.squeeze([dim for dim in iterates.selected if dim in result.dims])


@dataclass(frozen=True)
class _Piece:
    """A block of a dask array, with the part of the graph that makes it."""

    graph: dict[Any, Any]
    key: tuple[Any, ...]

    def __call__(self) -> NDArray[Any]:
        return np.asarray(dask.get(self.graph, self.key))  # type: ignore[attr-defined]


def _pieces(array: Any) -> Callable[..., _Piece]:  # noqa: ANN401  dask has no types
    """Return what finds a block of an array by its position."""
    (optimized,) = dask.optimize(array)  # type: ignore[attr-defined, no-untyped-call]  # reading and selecting become one
    graph = dict(optimized.__dask_graph__())

    def find(*at: int) -> _Piece:
        key = (optimized.name, *at)
        return _Piece(cull(graph, [key])[0], key)  # type: ignore[no-untyped-call]

    return find


@dataclass(frozen=True)
class _Span:
    """One block of snapshots: which of its columns hold the stored iterates from a position on."""

    piece: _Piece
    columns: NDArray[np.intp]
    first: int


@dataclass(frozen=True)
class _Tile:
    """Parameters of one layer, by their positions in a range."""

    layer: int
    begin: int
    stop: int


@dataclass(frozen=True)
class _Walk:
    """One range of parameters of one slab, through all its snapshots, for all statistics."""

    asked: Sequence[tuple[Statistic[Any], Need]]
    steps: NDArray[np.float64]
    spans: Sequence[_Span]
    references: frozenset[int]
    """Positions of iterates that others are compared with."""
    tiles: Sequence[_Tile]

    def totals(self) -> dict[tuple[int, int], NDArray[np.float64]]:
        """Return what adds up over parameters, by the positions of statistic and layer."""
        compared, held = self._ahead()
        most = max(
            (len(span.columns) * (tile.stop - tile.begin) for span in self.spans for tile in self.tiles), default=0
        )
        values, scratch = np.empty(most), np.empty(most)
        parts: dict[tuple[int, int], Any] = {}
        for span in self.spans:
            raw = held.pop(span.first) if span.first in held else span.piece()
            rows = raw.T if len(span.columns) == raw.shape[1] else raw[:, span.columns].T
            for number, tile in enumerate(self.tiles):
                shape = (len(rows), tile.stop - tile.begin)
                turned = values[: shape[0] * shape[1]].reshape(shape)
                _turn(rows[:, tile.begin : tile.stop], turned)
                for which, (statistic, need) in enumerate(self.asked):
                    within = slice(max(need.over.start - span.first, 0), max(need.over.stop - span.first, 0))
                    part = turned[within]
                    if not len(part):
                        continue
                    reference = None
                    if need.reference is not None:
                        reference = compared[need.reference][tile.begin : tile.stop]
                    spare = scratch[: part.size].reshape(part.shape)
                    steps = self.steps[span.first :][: shape[0]][within]
                    new = statistic.block(Block(steps, part, reference, spare))
                    at = which, number
                    parts[at] = statistic.merge(parts[at], new) if at in parts else new
        totals: dict[tuple[int, int], NDArray[np.float64]] = {}
        for (which, number), whole in parts.items():
            closed, to = self.asked[which][0].close(whole), (which, self.tiles[number].layer)
            totals[to] = totals[to] + closed if to in totals else closed
        return totals

    def _ahead(self) -> tuple[dict[int, NDArray[np.float64]], dict[int, NDArray[Any]]]:
        """Return the iterates that others are compared with, and the blocks that were read for it, to be used again."""
        compared, held = {}, {}
        for at in self.references:
            span = next(span for span in self.spans if 0 <= at - span.first < len(span.columns))
            if span.first not in held:
                held[span.first] = span.piece()
            compared[at] = held[span.first][:, span.columns[at - span.first]].astype(np.float64)
        return compared, held


@dataclass(frozen=True)
class _Finish:
    """Adds up the ranges of a slab, always in one order, and makes the results of it."""

    wanted: Sequence[Statistic[Any] | PerLayer[Any]]
    asked: Sequence[tuple[Statistic[Any], Need]]
    sizes: Sequence[int]
    """Parameters of each layer."""
    places: NDArray[np.intp]
    """Of the stored iterates among the snapshots."""
    snapshots: int

    def results(self, walks: Sequence[Mapping[tuple[int, int], NDArray[np.float64]]]) -> list[NDArray[np.float64]]:
        """Return one array a statistic."""
        return [self._result(statistic, walks) for statistic in self.wanted]

    def _result(
        self, wanted: Statistic[Any] | PerLayer[Any], walks: Sequence[Mapping[Any, Any]]
    ) -> NDArray[np.float64]:
        statistic = _plain(wanted)
        which = next(k for k, (other, _) in enumerate(self.asked) if other == statistic)
        need = self.asked[which][1]
        layers: list[NDArray[np.float64]] = []
        for layer in range(len(self.sizes)):
            found = [walk[which, layer] for walk in walks if (which, layer) in walk]
            layers.append(np.asarray(np.sum(found, axis=0)) if found else np.full(len(need.over), np.nan))
        if isinstance(wanted, PerLayer):
            return np.stack(
                [self._placed(statistic.finish(*one), statistic, need) for one in zip(layers, self.sizes, strict=True)]
            )
        return self._placed(statistic.finish(np.asarray(np.sum(layers, axis=0)), sum(self.sizes)), statistic, need)

    def _placed(self, values: NDArray[np.float64], statistic: Statistic[Any], need: Need) -> NDArray[np.float64]:
        """Put the number of an iterate where its snapshot is; the others have none."""
        if not statistic.dims:
            return np.asarray(values)
        placed = np.full([self.snapshots] * len(statistic.dims), np.nan)
        places = self.places[need.over.start : need.over.stop]
        placed[np.ix_(*[places] * len(statistic.dims))] = values if len(places) else np.nan
        return placed


def _turn(rows: NDArray[Any], out: NDArray[np.float64]) -> None:
    """Copy rows that lie in memory as columns, in squares that stay in the cache: twice as fast as in one go."""
    width = max(_NARROW, _SQUARE // max(1, len(rows)))
    for begin in range(0, rows.shape[1], width):
        out[:, begin : begin + width] = rows[:, begin : begin + width]


def _of_slab(
    iterates: Iterates,
    i: int,
    k: int,
    statistics: Sequence[Statistic[Any]],
    entries: Sequence[Entry],
    wanted: Sequence[Statistic[Any] | PerLayer[Any]],
) -> Any:  # noqa: ANN401  dask has no types
    """Return the results of one slab, one a statistic, to be computed."""
    slab, array = iterates.slab(i, k), iterates.params.data[i, k]
    asked = [(statistic, statistic.need(slab)) for statistic in statistics]
    places = np.flatnonzero(iterates.stored[i, k])
    find = _pieces(array)
    references = frozenset(need.reference for _, need in asked if need.reference is not None)
    used = np.zeros(len(places), dtype=bool)
    used[list(references)] = True
    for _, need in asked:
        used[need.over.start : need.over.stop] = True
    along, across = (np.cumsum([0, *lengths]) for lengths in array.chunks)
    walks = []
    for number, (begin, stop) in enumerate(pairwise(along.tolist())):
        tiles = list(_tiles(entries, begin, stop, int(max(array.chunks[1]))))
        if not tiles or not used.any():
            continue
        spans = []
        for at, (left, right) in enumerate(pairwise(across.tolist())):
            first, last = np.searchsorted(places, [left, right]).tolist()
            if used[first:last].any():
                spans.append(_Span(find(number, at), places[first:last] - left, first))
        walk = _Walk(asked, slab.steps.astype(np.float64), spans, references, tiles)
        walks.append(delayed(walk.totals, traverse=False, pure=False)())
    finish = _Finish(wanted, asked, [e.size for e in entries], places, iterates.stored.shape[2])
    return delayed(finish.results, traverse=False, pure=False, nout=len(wanted))(walks)


def _tiles(entries: Sequence[Entry], begin: int, stop: int, snapshots: int) -> Iterator[_Tile]:
    """Cut the layers in a range of parameters into what is worked on at a time."""
    width = min(max(_NARROW, _TILE // max(1, snapshots)), _WIDE)
    for layer, entry in enumerate(entries):
        first, last = max(begin, entry.offset), min(stop, entry.offset + entry.size)
        for left in range(first, last, width):
            yield _Tile(layer, left - begin, min(left + width, last) - begin)
