"""Partitions: every row once, no source recording in two clients, no empty client, for every kind and shape of data."""

from __future__ import annotations

import hashlib
import logging
import pickle

import numpy as np
import pytest

from fedsim.data import NodeSpec, StoredPartition, make_partition, open_recordings, partition_nodes, split_recordings
from fedsim.data.dealing import PARTITIONS
from fedsim.data.partition import compact, map_partition, open_partition
from fedsim.errors import DataError
from fedsim.seeding import rng

CLASSES = tuple(f"c{n}" for n in range(6))


def make_data(case, num_groups=120, num_classes=6, max_size=3, is_mixed=False):
    """Labels and source recordings of random data; `is_mixed`: source recordings hold several classes."""
    chance = np.random.default_rng(case)
    sizes = chance.integers(1, max_size + 1, num_groups)
    of_group = np.concatenate([np.arange(num_classes), chance.integers(0, num_classes, num_groups - num_classes)])
    label, group = np.repeat(of_group, sizes), np.repeat(np.arange(num_groups), sizes)
    if is_mixed:
        label = chance.permutation(label)
    order = chance.permutation(len(label))
    return label[order], np.array([f"rec{n}" for n in group[order]])


def deal(kind, label, group, num_clients, seed=0, **options):
    return make_partition(
        kind, label=label, group=group, num_clients=num_clients, stream=rng(seed, "partition"), **options
    )


def class_counts(partition, label, num_classes):
    return partition.class_counts_of(np.arange(partition.num_clients), label, num_classes)


def check(partition, group, *, is_complete=True):
    clients = [partition.client(k) for k in range(partition.num_clients)]
    dealt = np.concatenate(clients)
    assert len(set(dealt.tolist())) == len(dealt)
    assert not is_complete or sorted(dealt.tolist()) == list(range(len(group)))
    owner = {}
    for k, rows in enumerate(clients):
        assert len(rows) > 0
        assert (np.diff(rows) > 0).all()
        for name in set(group[rows].tolist()):
            assert owner.setdefault(name, k) == k
    assert partition.counts.tolist() == [len(rows) for rows in clients]


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if kind != "by_column"])
@pytest.mark.parametrize("num_clients", [1, 2, 7, 40])
@pytest.mark.parametrize("case", range(4))
def test_every_row_once_and_whole_source_recordings(kind, num_clients, case):
    label, group = make_data(case, is_mixed=case == 3)
    options = {"alpha": 10.0 ** (case - 3), "classes_per_client": 6 if num_clients < 3 else 2}
    partition = deal(kind, label, group, num_clients, **options)
    assert partition.num_clients == num_clients
    check(partition, group)
    again = deal(kind, label, group, num_clients, **options)
    np.testing.assert_array_equal(partition.rows, again.rows)
    np.testing.assert_array_equal(partition.offsets, again.offsets)
    if num_clients > 1:
        other = deal(kind, label, group, num_clients, seed=1, **options)
        assert not np.array_equal(partition.rows, other.rows) or not np.array_equal(partition.offsets, other.offsets)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_as_many_clients_as_source_recordings(kind):
    label, group = make_data(0)
    check(deal(kind, label, group, 120, alpha=0.01), group)
    with pytest.raises(DataError, match=r"121 clients need .* the training data has 120 \(with \d+ recordings\)"):
        deal(kind, label, group, 121)


def test_one_class_is_fine():
    group = np.arange(30).astype(str)
    for kind in ("iid", "dirichlet", "shards", "classes_per_client"):
        check(deal(kind, np.zeros(30, dtype=np.int64), group, 5), group)


def test_class_counts():
    label, group = make_data(1)
    partition = deal("dirichlet", label, group, 9)
    counts = class_counts(partition, label, 8)
    assert counts.shape == (9, 8)
    for k in range(9):
        np.testing.assert_array_equal(counts[k], np.bincount(label[partition.client(k)], minlength=8))

    some = np.array([4, 4, 0])
    np.testing.assert_array_equal(partition.class_counts_of(some, label, 8), counts[some])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("iid", "e57e63d6ca3fa00d"),
        ("dirichlet", "f345d67f2783f3f0"),
        ("shards", "e471ae84b738ea53"),
        ("classes_per_client", "a5c73931759ad426"),
        ("by_column", "1efffbba86f8382c"),
    ],
)
def test_who_holds_what_stays_as_it_was(kind, expected):
    """Recorded from an earlier version: published runs must be repeatable."""
    sha = hashlib.sha256()
    for case, num_clients in ((0, 7), (1, 40), (3, 40)):
        label, group = make_data(case, is_mixed=case == 3)
        column = np.array([name[-2:] for name in group])
        options = {"alpha": 0.1, "classes_per_client": 2, "column": column}
        dealt = deal(kind, label, group, num_clients, seed=case, **options)
        sha.update(dealt.offsets.astype("<i8").tobytes() + dealt.rows.astype("<i8").tobytes())
    assert sha.hexdigest()[:16] == expected


def test_rows_of_some_clients_are_theirs_in_the_order_asked_for():
    label, group = make_data(2)
    partition = deal("dirichlet", label, group, 30, alpha=0.1)
    for clients in (np.array([7, 3, 29, 3, 0]), np.arange(30), np.array([], dtype=np.int64), np.array([5], np.uint32)):
        rows, counts = partition.rows_of(clients)
        assert rows.dtype == counts.dtype == np.int64
        assert rows.tolist() == [row for k in clients for row in partition.client(k)]
        assert counts.tolist() == partition.counts_of(clients).tolist() == partition.counts[clients].tolist()
    empty = StoredPartition(np.array([0, 2, 2, 3]), np.array([5, 6, 1]))
    assert empty.rows_of(np.array([1, 2, 1, 0]))[0].tolist() == [1, 5, 6]
    with pytest.raises(IndexError):
        partition.rows_of(np.array([30]))


def test_stored_rows_are_small():
    label, group = make_data(0)
    partition = deal("iid", label, group, 5)
    large = np.arange(len(label), dtype=np.int64) * 3
    assert partition.rows.dtype == partition.within(large).rows.dtype == np.int32
    assert partition.within(large).rows_of(np.arange(5))[0].tolist() == (3 * partition.rows).tolist()
    assert compact(np.array([2**31 - 1])).dtype == np.int32
    assert compact(np.array([2**31])).tolist() == [2**31]


def test_a_mapped_partition_travels_as_its_folder(tmp_path):
    label, group = make_data(0, num_groups=5000)
    partition = deal("iid", label, group, 500)
    mapped = map_partition(partition, tmp_path)
    assert mapped.folder is not None
    assert len(pickle.dumps(mapped)) < 1000 < len(pickle.dumps(partition))
    for other in (mapped, pickle.loads(pickle.dumps(mapped)), map_partition(partition, tmp_path)):
        assert isinstance(other.rows, np.memmap)
        assert not other.rows.flags.writeable
        assert other.fingerprint == partition.fingerprint
        np.testing.assert_array_equal(other.rows_of(np.arange(9))[0], partition.rows_of(np.arange(9))[0])
    assert [path.name for path in (tmp_path / "partitions").iterdir()] == [partition.fingerprint]
    # What is derived from it isn't what lies in the folder.
    moved = pickle.loads(pickle.dumps(mapped.within(np.arange(len(label)) + 7)))
    assert moved.folder is None
    assert moved.client(3).tolist() == (partition.client(3) + 7).tolist()


def test_a_mapped_partition_that_is_damaged_or_cannot_be_written(tmp_path):
    partition = deal("iid", *make_data(0), 5)
    mapped = map_partition(partition, tmp_path)
    (mapped.folder / "rows.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"can't be read .*; delete the folder"):
        open_partition(mapped.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"can't be kept in .*; set data\.cache_dir"):
        map_partition(partition, tmp_path / "file")


def test_iid_clients_are_equally_large_and_alike():
    label, group = make_data(0, num_groups=1200)
    partition = deal("iid", label, group, 10)
    assert np.ptp(partition.counts) <= 3
    shares = class_counts(partition, label, 6) / partition.counts[:, None]
    assert np.abs(shares - np.bincount(label) / len(label)).max() < 0.12


def test_alpha_sets_how_skewed_clients_are():
    """Mean share of a client's largest class falls with alpha, from nearly 1 to that of iid."""
    label, group = np.arange(6000) % 6, np.arange(6000).astype(str)
    largest = {}
    for alpha in (0.01, 0.5, 1000.0):
        counts = class_counts(deal("dirichlet", label, group, 10, alpha=alpha), label, 6)
        largest[alpha] = (counts.max(axis=1) / counts.sum(axis=1)).mean()
    assert largest[0.01] > 0.8 > largest[0.5] + 0.05
    assert largest[0.5] > 0.3 > largest[1000.0]
    assert largest[1000.0] < 0.2


def test_dirichlet_shares_follow_the_distribution():
    """Each class's share at a client has the Dirichlet's mean 1/K and variance (K - 1) / (K^2 (K alpha + 1))."""
    label, group = np.repeat([0, 1], 500), np.arange(1000).astype(str)
    shares = np.concatenate(
        [class_counts(deal("dirichlet", label, group, 4, seed=s, alpha=0.7), label, 2) / 500 for s in range(200)]
    ).ravel()
    assert shares.mean() == pytest.approx(0.25, abs=1e-9)
    assert shares.var() == pytest.approx(3 / (16 * (4 * 0.7 + 1)), rel=0.1)


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_alphas_work(alpha):
    label, group = make_data(2)
    check(deal("dirichlet", label, group, 10, alpha=alpha), group)


def test_shards_hold_few_classes():
    label, group = np.arange(600) % 6, np.arange(600).astype(str)
    partition = deal("shards", label, group, 12, shards_per_client=2)
    assert set(partition.counts.tolist()) == {50}
    assert ((class_counts(partition, label, 6) > 0).sum(axis=1) <= 2).all()
    with pytest.raises(DataError, match=r"12 clients with 60 shards each need 720 .* has 600"):
        deal("shards", label, group, 12, shards_per_client=60)


@pytest.mark.parametrize(("num_clients", "classes"), [(6, 1), (3, 2), (10, 3), (1, 6), (50, 6), (100, 1)])
def test_classes_per_client_is_exact_and_covers_all(num_clients, classes):
    label, group = np.arange(1200) % 6, np.arange(1200).astype(str)
    partition = deal("classes_per_client", label, group, num_clients, classes_per_client=classes)
    check(partition, group)
    counts = class_counts(partition, label, 6)
    assert ((counts > 0).sum(axis=1) == classes).all()
    holders = (counts > 0).sum(axis=0)
    assert np.ptp(holders) <= 1
    for c in range(6):
        assert np.ptp(counts[counts[:, c] > 0, c]) <= 1


def test_classes_per_client_with_impossible_numbers():
    label, group = make_data(0)
    with pytest.raises(DataError, match="classes_per_client is 7, but the training data has 6 classes"):
        deal("classes_per_client", label, group, 3, classes_per_client=7)
    with pytest.raises(DataError, match="2 clients with 2 classes each can't hold 6 classes"):
        deal("classes_per_client", label, group, 2, classes_per_client=2)


def test_scarce_classes_are_said(caplog):
    label = np.array([0] * 50 + [1])
    with caplog.at_level(logging.WARNING):
        partition = deal("classes_per_client", label, np.arange(51).astype(str), 5, classes_per_client=2)
    check(partition, np.arange(51).astype(str))
    assert "1 classes have fewer source recordings than clients" in caplog.text


def test_by_column_is_one_client_per_value(caplog):
    label, group = np.arange(20) % 2, np.arange(20).astype(str)
    column = np.array([*"aaaaaaaaaabbbbbccdde"])
    partition = deal("by_column", label, group, 5, column=column)
    check(partition, group)
    assert [set(column[partition.client(k)]) for k in range(5)] == [{"a"}, {"b"}, {"c"}, {"d"}, {"e"}]
    assert caplog.text == ""
    merged = deal("by_column", label, group, 3, column=column)
    check(merged, group)
    assert [set(column[merged.client(k)]) for k in range(3)] == [{"a"}, {"b"}, {"c", "d", "e"}]
    assert "the smallest are merged" in caplog.text
    assert deal("by_column", label, group, 99, column=column).num_clients == 5
    assert "there will be 5 clients" in caplog.text
    assert deal("by_column", label, group, 1, column=column).num_clients == 1


def test_by_column_mistakes():
    label, group = np.array([0, 1, 0]), np.array(["r", "r", "s"])
    with pytest.raises(DataError, match=r"needs federation\.column"):
        deal("by_column", label, group, 2)
    with pytest.raises(DataError, match="values 'a' and 'b' share a source recording"):
        deal("by_column", label, group, 2, column=np.array(["a", "b", "b"]))
    with pytest.raises(DataError, match="1 recordings have no value"):
        deal("by_column", label, group, 2, column=np.array(["a", "a", ""]))


def test_unknown_kind():
    with pytest.raises(DataError, match="unknown partition 'dirichlett'; did you mean 'dirichlet'"):
        deal("dirichlett", *make_data(0), 2)


def test_a_large_population_is_dealt():
    label, group = np.arange(200_000) % 10, np.arange(200_000)
    for kind in ("iid", "dirichlet"):
        partition = deal(kind, label, group, 100_000, alpha=0.1)
        assert partition.num_clients == 100_000
        assert partition.counts.min() >= 1
        assert partition.counts.sum() == 200_000
        np.testing.assert_array_equal(np.sort(partition.rows), np.arange(200_000))


def test_real_esc10_by_author_and_dirichlet(shared_data):
    recordings = open_recordings("esc10", path=str(shared_data / "esc10"), classes=None, clips_per_class=2, seed=0)
    train, _ = split_recordings(recordings, test_fold=5, test_share=0.2, seed=0)
    data = recordings.take(train)
    check(deal("dirichlet", data.label, data.group, 10, alpha=0.05), data.group)
    authors = data.columns["author"]
    check(deal("by_column", data.label, data.group, len(set(authors)), column=authors), data.group)


def nodes(specs, label, group, seed=0):
    partition = partition_nodes(specs, label=label, group=group, class_names=CLASSES, stream=rng(seed, "nodes"))
    check(partition, group, is_complete=False)
    return partition


@pytest.mark.parametrize("case", range(6))
def test_nodes_share_their_classes_evenly(case):
    label, group = make_data(case, num_groups=300, is_mixed=case >= 4)
    specs = [NodeSpec(selected_classes=["c0", "c1"]), NodeSpec(selected_classes=("c1", "c2")), NodeSpec(("c1",))]
    partition = nodes(specs, label, group, seed=case)
    counts = class_counts(partition, label, 6)
    held = np.array([[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=bool)
    assert (counts[~held] == 0).all()
    assert (counts[held] > 0).all()
    if case < 4:  # one class per source recording: everything wanted is used
        total = np.bincount(label, minlength=6)
        assert counts[0, 0] == total[0]
        assert counts[1, 2] == total[2]
        assert counts[:, 1].sum() == total[1]
        assert np.ptp(counts[:, 1]) <= 3


def test_node_limits_exclusions_and_defaults():
    label, group = np.arange(240) % 6, np.arange(240).astype(str)
    specs = [NodeSpec(num_samples_per_class=5), NodeSpec(excluded_classes=["c0"]), NodeSpec(("c0", "c1"), ("c1",), 7)]
    counts = class_counts(nodes(specs, label, group), label, 6)
    assert counts.tolist() == [[5] * 6, [0] + [35] * 5, [7, 0, 0, 0, 0, 0]]


def test_a_limit_cuts_a_source_recording_but_never_shares_it():
    label, group = np.zeros(40, dtype=np.int64), np.repeat(np.arange(4), 10).astype(str)
    partition = nodes([NodeSpec(("c0",), None, 7), NodeSpec(("c0",))], label, group)
    assert partition.counts.tolist() == [7, 30]


def test_the_stream_decides_who_gets_what():
    label, group = make_data(0)
    specs = [NodeSpec(), NodeSpec()]
    same = [nodes(specs, label, group, seed=s).client(0).tolist() for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one entry under nodes"),
        (
            [NodeSpec(), NodeSpec(("c0", "zebra"), name="kitchen")],
            "node 'kitchen': there is no class 'zebra'; known: c0, c1",
        ),
        ([NodeSpec(excluded_classes=("C1",))], "node 0: there is no class 'C1'; did you mean 'c1'?"),
        ([NodeSpec(("c1",), ("c1",))], "node 0 holds no class"),
        ([NodeSpec(())], "node 0 holds no class"),
        ([NodeSpec(("c5",)), NodeSpec(("c5",))], "has no training recording"),
    ],
)
def test_node_mistakes(specs, message):
    label = np.array([0, 1, 2, 3, 4, 5])
    with pytest.raises(DataError) as error:
        nodes(specs, label, np.arange(6).astype(str))
    assert message in str(error.value)


def test_a_class_that_runs_out_is_said(caplog):
    label = np.array([0] * 10 + [5])
    with caplog.at_level(logging.WARNING):
        nodes([NodeSpec(("c0", "c5")), NodeSpec(("c0", "c5"), name="b")], label, np.arange(11).astype(str))
    assert "class 'c5': no recording is left for nodes" in caplog.text
