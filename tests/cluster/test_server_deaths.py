"""The server actor is killed: it is started again, the rounds since the last checkpoint are repeated, and told once."""

from __future__ import annotations

import logging
import re
import threading
import time

import pytest
from processes import actors, kill, wait_for
from worlds import SERVER_STEP, numbers, reconfigured, run

from fedsim.cluster.handle import RemoteExperiment
from fedsim.errors import ResourceError
from fedsim.federation.experiment import RunFiles
from fedsim.federation.run_directory import read_history
from fedsim.models.saved import digest
from fedsim.tracking.null_tracker import NullTracker

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]
LONG = (*SERVER_STEP, "federation.local_epochs=200", "resources.client_actors=2")
"""Rounds of more than a second, twice as long as the driver takes between two looks at the server."""


def remote(setup, run_dir, *, every: int = 9, status=lambda _: None) -> RemoteExperiment:
    files = RunFiles(run_dir, checkpoint_every=every, last_round=setup.config.federation.global_rounds)
    return RemoteExperiment(setup, files, NullTracker(), state=None, status=status)


def kill_server_in(round_number: int, times: int = 1):
    """A status callback that kills the server actor once it trains in a round."""
    killed = []

    def strike(status) -> None:
        if status["round"] >= round_number and status.get("phase") == "train" and len(killed) < times:
            (server,) = actors("ServerActor")
            killed.append(server.pid)
            kill(server)

    return strike, killed


@pytest.mark.parametrize("every", [9, 2])
def test_a_killed_server_goes_on_with_the_same_bits_and_no_round_twice(cluster, setup, tmp_path, caplog, every):
    two = reconfigured(setup, *LONG)
    reference, expected = run(two)
    strike, killed = kill_server_in(4)
    experiment = remote(two, tmp_path, every=every, status=strike)
    try:
        with caplog.at_level(logging.WARNING, logger="fedsim"):
            results = [experiment.round() for _ in range(4)]
        final = experiment.finish("FINISHED")
    finally:
        experiment.close()
    assert len(killed) == 1
    assert final["digest"] == digest(reference.state.adapter)
    assert numbers(results) == numbers(expected)
    history = read_history(tmp_path)
    assert [record["round"] for record in history] == [1, 2, 3, 4]
    assert [len(record["faults"]) for record in history] == [0, 0, 0, 1]
    (fault,) = history[3]["faults"]
    assert (fault["kind"], fault["actor"], fault["round"]) == ("server killed", f"server (pid {killed[0]})", 4)
    assert final["faults"] == {"server killed": 1}
    repeated = "rounds 1 to 3 are repeated" if every == 9 else "rounds 3 to 3 are repeated"
    assert repeated in caplog.text
    assert re.search(r"server actor is up again, \d+\.\d s after its death", caplog.text)
    wait_for(cpus=4, gpus=2)


def test_a_server_that_always_dies_ends_the_run_in_one_line(cluster, setup, tmp_path):
    two = reconfigured(setup, *LONG)
    strike, killed = kill_server_in(1, times=99)
    experiment = remote(two, tmp_path, status=strike)
    try:
        with pytest.raises(
            ResourceError, match=r"^the server actor died 4 times in round 1 \(killed: .*`fedsim resume`$"
        ):
            experiment.round()
    finally:
        experiment.close()
    assert len(killed) == 4
    wait_for(cpus=4, gpus=2)  # client actors go with their owner


def test_a_server_that_dies_while_it_writes_the_results_writes_them_again(cluster, setup, tmp_path):
    two = reconfigured(setup, *LONG, "federation.global_rounds=1")
    reference, _ = run(two)
    experiment = remote(two, tmp_path)
    try:
        experiment.round()
        (server,) = actors("ServerActor")
        killer = threading.Timer(0.05, kill, (server,))
        killer.start()
        final = experiment.finish("FINISHED")
        killer.join()
    finally:
        experiment.close()
    assert final["digest"] == digest(reference.state.adapter)
    assert final["faults"] == {"server killed": 1}
    assert [record["round"] for record in read_history(tmp_path)] == [1]


def kill_first_server() -> None:
    """Kill the server actor as soon as it has a process, long before it is up."""
    end = time.monotonic() + 60
    while not (found := actors("ServerActor")) and time.monotonic() < end:
        time.sleep(0.005)
    kill(found[0])


def test_a_server_that_dies_before_it_is_up_is_started_again(cluster, setup, tmp_path):
    two = reconfigured(setup, *LONG, "federation.global_rounds=1")
    reference, _ = run(two)
    killer = threading.Thread(target=kill_first_server)
    killer.start()
    experiment = remote(two, tmp_path)
    killer.join()
    try:
        result = experiment.round()
        final = experiment.finish("FINISHED")
    finally:
        experiment.close()
    assert final["digest"] == digest(reference.state.adapter)
    assert [fault.kind for fault in result.faults] == ["server killed"]
