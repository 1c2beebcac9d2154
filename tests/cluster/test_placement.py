"""Where actors go on a cluster of two nodes: packed, spread, the server in a bundle of its own."""

from __future__ import annotations

import pytest
from clusters import cluster_of, program
from worlds import SERVER_STEP, digest_after, tiny_config

from fedsim.errors import ConfigError
from fedsim.federation.setup import prepare

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_client_actors_are_packed_or_spread_with_one_digest():
    alone = digest_after(prepare(tiny_config(*SERVER_STEP)), rounds=2)
    with cluster_of({"num_cpus": 4}, {"num_cpus": 4}) as cluster:
        packed = program("placed.py", "clients", cluster.address, "pack")
        spread = program("placed.py", "clients", cluster.address, "spread")
    assert len(set(packed["nodes"])) == 1
    assert len(set(spread["nodes"])) == 2
    assert packed["digest"] == spread["digest"] == alone


def test_actors_of_two_shapes_go_where_their_labels_say_with_one_digest():
    alone = digest_after(prepare(tiny_config(*SERVER_STEP)), rounds=2)
    small, big = {"num_cpus": 3, "labels": {"size": "small"}}, {"num_cpus": 3, "labels": {"size": "big"}}
    with cluster_of(small, big) as cluster:
        found = program("placed.py", "kinds", cluster.address, "pack")
    assert found["sizes"] == {"client-0": "small", "client-1": "small", "big-2": "big"}
    assert found["replaced"], "the killed one is replaced where its label is"
    assert found["digest"] == alone


def test_after_a_quarantine_actors_start_on_another_node():
    alone = digest_after(prepare(tiny_config(*SERVER_STEP)), rounds=2)
    with cluster_of({"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        found = program("placed.py", "quarantine", cluster.address, "pack")
    *before, last = found["nodes"]
    assert found["faults"] == ["killed", "killed", "quarantined"]
    assert last != before[-1]
    assert found["digest"] == alone


def test_nobody_waits_for_a_node_that_could_never_hold_an_actor():
    # The head is alive, and has no CPUs.
    with cluster_of({"num_cpus": 2}) as cluster:
        found = program("placed.py", "quarantine", cluster.address, "pack")
    assert (len(found["nodes"]), found["faults"]) == (2, ["killed", "killed", "quarantined"])


def test_the_servers_gpu_stays_its_own_while_it_is_started_again():
    with cluster_of({"num_cpus": 2}, {"num_cpus": 1, "num_gpus": 1}) as cluster:
        found = program("placed.py", "server", cluster.address, "spread")
    assert found["free"] == 0
    assert found["faults"] == ["server killed"]
    assert found["before"][0] == found["after"][0]
    assert found["before"][1] != found["after"][1]
    assert "but Ray has" in found["refused"]
    assert found["refused"].count(" CPU, ") == 3, "every node is named with what it has"


@pytest.mark.chaos
def test_the_servers_bundle_moves_when_its_node_dies():
    alone = digest_after(prepare(tiny_config(*SERVER_STEP)))
    with cluster_of({"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 2, "num_gpus": 1}) as cluster:
        found = program("placed.py", "moved", cluster.address, "pack")
    assert found["before"] != found["after"]
    assert found["faults"][0] in ("server node lost", "server killed", "server unreachable")
    assert found["digest"] == alone


def test_another_name_is_refused():
    with pytest.raises(ConfigError, match=r"placement.*pack"):
        tiny_config("resources.placement=strict")
