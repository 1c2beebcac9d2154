"""What clients keep: like a dictionary, but on disk, and exact for every checkpoint that refers to it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fedsim.errors import CheckpointError
from fedsim.federation.client_store import ClientIndex, ClientStore, require_rows

P = 5
DEFAULT = np.full(P, -1, dtype=np.float32)


def rows_of(clients, version: float) -> np.ndarray:
    """Rows that tell client, version and place."""
    return np.array([[client, version, *range(P - 2)] for client in clients], dtype=np.float32).reshape(-1, P)


def ids(*clients: int) -> np.ndarray:
    return np.array(clients, dtype=np.int64)


@pytest.fixture
def store(tmp_path):
    store = ClientStore(tmp_path / "clients", P)
    yield store
    store.close()


def read(store, *clients: int) -> list[list[float]]:
    return store.rows(ids(*clients), DEFAULT).tolist()


def test_clients_that_never_wrote_have_the_default_and_cost_nothing(store, tmp_path):
    assert read(store, 3, 10**12) == [DEFAULT.tolist()] * 2
    assert store.rows(ids(), DEFAULT).shape == (0, P)
    assert len(store.commit()) == 0
    assert list(tmp_path.iterdir()) == []


def test_rows_count_from_the_commit_on(store):
    store.put(ids(7, 2), rows_of([7, 2], 1))
    assert read(store, 2, 7) == [DEFAULT.tolist()] * 2
    index = store.commit()
    assert index.ids.tolist() == [2, 7]
    assert read(store, 2, 5, 7) == [rows_of([2], 1)[0].tolist(), DEFAULT.tolist(), rows_of([7], 1)[0].tolist()]


def test_what_a_failed_round_has_put_is_dropped(store):
    store.put(ids(1, 2), rows_of([1, 2], 1))
    before = store.commit()
    store.put(ids(2, 3), rows_of([2, 3], 2))
    store.discard()
    assert store.commit() is before
    assert read(store, 1, 2, 3) == [*rows_of([1, 2], 1).tolist(), DEFAULT.tolist()]


@pytest.mark.parametrize("kept_every", [1, 2, 5, 1000])
def test_a_store_is_a_dictionary_and_every_kept_index_stays_true(tmp_path, kept_every):
    random = np.random.default_rng(kept_every)
    store, truth, kept = ClientStore(tmp_path, P), {}, []
    for version in range(40):
        cohort = random.permutation(60)[: random.integers(1, 25)]
        for block in np.array_split(cohort, 3):
            wanted = [truth.get(int(client), DEFAULT.tolist()) for client in block]
            assert store.rows(block, DEFAULT).tolist() == wanted
            store.put(block, rows_of(block, version))
        index = store.commit()
        truth |= {int(client): rows_of([client], version)[0].tolist() for client in cohort}
        assert index.ids.tolist() == sorted(truth)
        assert len(set(index.slots.tolist())) == len(index)
        if version % kept_every == 0:
            store.pin(index)
            kept.append((index, dict(truth)))
    store.flush()
    for index, then in kept:
        old = ClientStore(tmp_path, P, index=index)
        assert old.rows(np.arange(60), DEFAULT).tolist() == [then.get(k, DEFAULT.tolist()) for k in range(60)]
        old.close()
    store.close()


def test_space_is_used_again_where_no_checkpoint_wants_it(store, tmp_path):
    cohort = np.arange(10)
    for version in range(20):
        store.put(cohort, rows_of(cohort, version))
        store.commit()
    # The versions of the last round, and those that it was made from.
    assert (tmp_path / "clients" / "rows.f32").stat().st_size == 2 * 10 * P * 4


def test_a_row_that_a_checkpoint_refers_to_is_never_written_over(store):
    store.put(ids(*range(10)), rows_of(range(10), 0))
    store.pin(first := store.commit())
    for version in range(1, 8):
        store.put(ids(3, 4), rows_of([3, 4], version))
        assert not set(store.commit().slots_of(ids(3, 4))) & set(first.slots)
    assert store.index.slots.max() < 10 + 2 * 2


def test_a_store_opened_again_keeps_to_what_its_checkpoints_refer_to(tmp_path):
    store = ClientStore(tmp_path, P)
    store.put(ids(1, 2, 3), rows_of([1, 2, 3], 1))
    store.pin(first := store.commit())
    store.put(ids(2), rows_of([2], 2))
    store.pin(second := store.commit())
    store.put(ids(1, 2), rows_of([1, 2], 3))  # after the last checkpoint: lost with the process
    store.commit()
    store.close()
    again = ClientStore(tmp_path, P, index=second, kept=[first, second])
    assert again.rows(ids(1, 2, 3), DEFAULT)[:, 1].tolist() == [1, 2, 1]
    for version in range(4, 9):
        again.put(ids(1, 2, 3, 4), rows_of([1, 2, 3, 4], version))
        again.commit()
    again.close()
    for index, versions in ((first, [1, 1, 1]), (second, [1, 2, 1])):
        old = ClientStore(tmp_path, P, index=index)
        assert old.rows(ids(1, 2, 3), DEFAULT)[:, 1].tolist() == versions
        old.close()


def test_a_client_put_twice_has_its_last_row(store):
    store.put(ids(1, 2), rows_of([1, 2], 1))
    store.put(ids(2), rows_of([2], 9))
    assert store.commit().ids.tolist() == [1, 2]
    assert store.rows(ids(1, 2), DEFAULT)[:, 1].tolist() == [1, 9]


def test_the_bits_of_a_row_come_back(store):
    odd = np.array([[np.nan, np.inf, -0.0, 1e-45, 3.4e38]], dtype=np.float32)
    store.put(ids(4), odd)
    store.commit()
    assert store.rows(ids(4), DEFAULT).tobytes() == odd.tobytes()


def test_rows_from_elsewhere_in_memory_are_written_right(store):
    wide = np.arange(60, dtype=np.float32).reshape(6, 10)
    wide.flags.writeable = False
    store.put(ids(0, 1, 2), wide[::2, 5:])
    store.commit()
    assert read(store, 0, 1, 2) == wide[::2, 5:].tolist()


def test_missing_and_short_files_are_named_in_one_line(tmp_path):
    index = ClientIndex(ids(5, 9), ids(3, 0))
    with pytest.raises(CheckpointError, match=r"rows\.f32 is missing: it holds the tensors that 2 clients keep"):
        ClientStore(tmp_path, P, index=index)
    (tmp_path / "rows.f32").write_bytes(bytes(4 * P * 4 - 1))
    with pytest.raises(CheckpointError, match=r"rows\.f32 is too short: 79 bytes, the checkpoint needs 80; restore it"):
        ClientStore(tmp_path, P, index=index)
    (tmp_path / "rows.f32").write_bytes(bytes(4 * P * 4))
    require_rows(tmp_path, index, P)
    store = ClientStore(tmp_path, P, index=index)
    (tmp_path / "rows.f32").write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match=r"rows\.f32 ends before byte"):
        store.rows(ids(5), DEFAULT)
    store.close()


def test_an_empty_index_asks_for_no_file(tmp_path):
    require_rows(tmp_path / "nowhere", ClientIndex(), P)


def test_a_full_disk_is_an_error_that_says_so(tmp_path):
    program = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from fedsim.errors import ResourceError
from fedsim.federation.client_store import ClientStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = ClientStore(Path({str(tmp_path)!r}), 100)
store.put(np.arange(2), np.zeros((2, 100)))
try:
    store.put(np.arange(2), np.zeros((2, 100)))
except ResourceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("can't write ")
    assert "rows.f32: File too large; make room, or" in done.stdout


def test_a_large_index_is_two_arrays():
    many = np.arange(0, 3_000_000, 3)
    index = ClientIndex(many, many[::-1].copy())
    assert index.slots_of(ids(0, 1, 2_999_997, 3_000_000, 10**15)).tolist() == [2_999_997, -1, 0, -1, -1]
    after = index.updated(ids(1, 3), ids(7, 8))
    assert len(after) == 1_000_001
    assert after.slots_of(ids(0, 1, 3, 6)).tolist() == [2_999_997, 7, 8, 2_999_991]
