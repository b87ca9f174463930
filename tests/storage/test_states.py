"""States are read as zarr reads them, whatever part is asked for."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from trajstore.errors import DamageError, FormatError, UnreachableError
from trajstore.reading.verify import verify
from trajstore.storage.format.codecs import Codec, chunk_codecs, write_block
from trajstore.storage.places.folder import Folder
from trajstore.storage.states import States

SHAPE, CHUNKS = (2, 2, 11, 7), (1, 1, 4, 3)


@pytest.fixture(scope="module", params=get_args(Codec))
def both(request, tmp_path_factory) -> tuple[States, zarr.Array]:
    place = Folder(tmp_path_factory.mktemp("states") / "s.zarr")
    serializer, compressors = chunk_codecs(request.param)
    array = zarr.open_group(place.keeper(read_only=False), mode="w").create_array(
        "e/params", shape=SHAPE, chunks=CHUNKS, dtype="float32", serializer=serializer, compressors=compressors,
        fill_value=np.nan, config={"write_empty_chunks": True},
    )  # fmt: skip
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for i, k in np.ndindex(2, 2):
        if (i, k) != (1, 1):  # nobody wrote this one
            write_block(array, (i, k, 0, 0), values[i : i + 1, k : k + 1])
    return States.of(place, array, request.param), array


def part(length: int):
    whole = st.slices(length).filter(lambda s: s.step is None or s.step > 0)
    return st.one_of(st.integers(0, length - 1), whole)


@settings(max_examples=150, deadline=None)
@given(where=st.tuples(*map(part, SHAPE)))
def test_any_part_is_what_zarr_reads(both, where):
    states, array = both
    expected = np.asarray(array[...])[where]
    found = states[where]
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected, equal_nan=True)


def test_a_damaged_chunk_is_an_error(both, tmp_path):
    states, _ = both
    file = Path(states.address) / "e/params/c/0/1/2/1"
    whole = bytearray(file.read_bytes())
    try:
        file.write_bytes(bytes([whole[0], whole[1] ^ 4, *whole[2:]]))
        with pytest.raises(ValueError, match=r"checksum do not match: e/params, chunk \(0, 1, 2, 1\)"):
            states[0, 1, 10, 4]
    finally:
        file.write_bytes(whole)


def read(states: States) -> float:
    return float(states[(slice(None),) * 4].sum())


def test_a_fork_and_another_process_read_too(both):
    states, _ = both
    expected = read(states)
    for kind in "fork", "spawn":
        with multiprocessing.get_context(kind).Pool(1) as pool:
            assert np.array_equal(pool.apply(read, (states,)), expected, equal_nan=True)
    assert pickle.loads(pickle.dumps(states)) == states


def test_states_of_a_folder_that_is_not_seen_are_not_taken_for_missing(both, tmp_path):
    states, _ = both
    packed = pickle.dumps(states)
    Path(states.address).rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(UnreachableError, match="this process sees no store at"):
            pickle.loads(packed)
    finally:
        (tmp_path / "elsewhere").rename(states.address)


def test_what_a_later_pcodec_wrote_is_no_damage_and_a_repair_takes_nothing_out(record, monkeypatch):
    def later(*_):
        raise RuntimeError("pco error: pco Compatibility error: file's format version (9) exceeds max supported (3)")

    store = record(steps=3, seeds=[0]).store
    before = {key: store.place.read(key) for key, _ in store.place.files("net")}
    monkeypatch.setattr("trajstore.storage.states.simple_decompress_into", later)
    for ask in (lambda: store["net"].arrays(order="forward", seed=0, step=3), lambda: [*verify(store, repair=True)]):
        with pytest.raises(
            FormatError, match=r"later pcodec than is installed .*; nothing is damaged: `pip install"
        ) as told:
            ask()
        assert not isinstance(told.value, DamageError)
    assert {key: store.place.read(key) for key, _ in store.place.files("net")} == before
