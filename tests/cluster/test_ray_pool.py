"""Real Ray actors: the same bits for any number of them, also when they are killed; bugs and losses are named."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from processes import actors, kill, wait_for
from worlds import (
    CPU,
    OWN_GENERATORS,
    SERVER_STEP,
    digest_after,
    generators_of,
    hand_made,
    kept_of,
    make_server,
    numbers,
    reconfigured,
    run,
)

from fedsim.config.schema import ActorKind
from fedsim.errors import ClientError, DataError, QuorumError, ResourceError
from fedsim.federation.blocks import BlockTrainer, make_blocks
from fedsim.federation.experiment import RunFiles
from fedsim.models.saved import digest
from fedsim.tracking.null_tracker import NullTracker
from fedsim.types import Block, Broadcast, flatten_state

pytestmark = pytest.mark.ray


@contextmanager
def ray_pool(setup, num_actors: int, *, max_attempts: int = 3) -> Iterator:
    """A pool of which all actors are up, so that all of them work."""
    import ray

    from fedsim.cluster.pool import RayPool

    pool = RayPool(setup, {"client": ActorKind(actors=num_actors)}, max_attempts=max_attempts)
    try:
        ray.get(list(pool.crew.starting))
        yield pool
    finally:
        pool.close()


@contextmanager
def remote_experiment(setup, run_dir, **kwargs) -> Iterator:
    from fedsim.cluster.handle import RemoteExperiment

    files = RunFiles(run_dir, checkpoint_every=9, last_round=setup.config.federation.global_rounds)
    experiment = RemoteExperiment(setup, files, NullTracker(), **{"state": None, "status": lambda _: None, **kwargs})
    try:
        yield experiment
    finally:
        experiment.close()


@pytest.fixture(scope="module")
def reference(setup):
    """Digest and numbers of the whole run in this process."""
    server, results = run(setup)
    return digest(server.state.adapter), numbers(results)


@pytest.mark.parametrize("num_actors", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_any_number_of_actors_gives_the_bits_of_this_process(cluster, setup, reference, num_actors):
    with ray_pool(setup, num_actors) as pool:
        server, results = run(setup, pool=pool)
        assert len(actors("ClientActor")) == num_actors
    assert digest(server.state.adapter) == reference[0]
    assert numbers(results) == reference[1]
    # Closing ends the processes, not only Ray's books on them.
    end = time.monotonic() + 20
    while actors("ClientActor") and time.monotonic() < end:
        time.sleep(0.05)
    assert actors("ClientActor") == []


@pytest.mark.slow
def test_a_server_actor_with_two_client_actors_gives_the_same_bits_and_shows_what_happens(
    cluster, setup, reference, tmp_path, caplog
):
    two, told = reconfigured(setup, *SERVER_STEP, "resources.client_actors=2"), []
    with (
        caplog.at_level(logging.INFO, logger="fedsim"),
        remote_experiment(two, tmp_path, status=told.append) as experiment,
    ):
        results = [experiment.round() for _ in range(4)]
        final = experiment.finish("FINISHED")
        assert len(actors("ServerActor")) == 1
    assert final["digest"] == reference[0]
    assert numbers(results) == reference[1]
    assert {status["round"] for status in told} <= {1, 2, 3, 4}
    assert told[-1]["phase"] == "quality"
    assert "Generator training completed. Average loss: " in caplog.text
    assert (tmp_path / "checkpoints" / "round-4" / "state.json").is_file()
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.slow
def test_a_generator_of_outputs_and_an_aging_buffer_give_the_bits_of_this_process(cluster, setup):
    options = ("feda2v.generator_type=multimodal", "feda2v.generator_growth=0.5", "feda2v.generator_buffer_age=1")
    one = reconfigured(setup, *SERVER_STEP, *options, "federation.cohort_size=4")
    here, results = run(one)
    with ray_pool(one, 2) as pool:
        there, again = run(one, pool=pool)
    assert digest(there.state.adapter) == digest(here.state.adapter)
    assert numbers(again) == numbers(results)


@pytest.mark.slow
def test_clients_that_keep_their_tensors_get_them_back_over_the_wire(cluster, setup):
    apart = reconfigured(setup, "feda2v.adapter_aggregation_mode=none", "federation.cohort_size=4")
    here, results = run(apart)
    with ray_pool(apart, 1) as pool:
        there, again = run(apart, pool=pool)
    everyone, none = np.arange(7), np.full(len(flatten_state(here.state.adapter)), np.nan, dtype=np.float32)
    own = here.clients.rows(everyone, none)
    assert np.isfinite(own).any()
    np.testing.assert_array_equal(there.clients.rows(everyone, none), own)
    assert numbers(again) == numbers(results)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["own", "shared"])
def test_generators_of_clients_are_the_same_over_the_wire(cluster, setup, mode):
    own = reconfigured(setup, "feda2v.global_model_train=false", *OWN_GENERATORS, f"feda2v.client_generator={mode}")
    here, results = run(own, 3)
    with ray_pool(own, 2) as pool:
        there, remote = run(own, 3, pool=pool)
    assert digest(there.state.adapter) == digest(here.state.adapter)
    assert digest(there.state.learnt.network) == digest(here.state.learnt.network)
    assert numbers(remote) == numbers(results)
    kept, wanted = generators_of(there), generators_of(here)
    assert kept.keys() == wanted.keys() == (set(range(7)) if mode == "own" else set())
    assert all((kept[client] == wanted[client]).all() for client in wanted)


@pytest.mark.slow
def test_actors_killed_in_mid_round_leave_the_same_bits_and_a_warning(cluster, setup, reference, caplog):
    killed = []

    def strike(status) -> None:
        # In round 2, when the first block has come back and others are under way or waiting: all actors die.
        if status["round"] == 2 and status.get("clients_done") and not killed:
            for process in actors("ClientActor"):
                kill(process)
                killed.append(process.pid)

    with ray_pool(setup, 2) as pool, caplog.at_level(logging.WARNING):
        server, results = run(setup, pool=pool, status=strike)
        assert not set(killed) & {process.pid for process in actors("ClientActor")}
    assert len(killed) == 2
    assert digest(server.state.adapter) == reference[0]
    assert numbers(results) == reference[1]
    assert all(result.lost == () for result in results)
    assert "client actor died in round 2 while training block" in caplog.text


@contextmanager
def killing_whatever_trains(pool) -> Iterator[None]:
    """Kill every client actor of a pool of one as soon as it trains."""
    stop = threading.Event()

    def hunt() -> None:
        while not stop.wait(0.1):
            if any(worker.calls for worker in pool.crew.workers):
                for process in actors("ClientActor"):
                    kill(process)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield
    finally:
        stop.set()
        hunter.join()


@pytest.mark.slow
def test_a_block_whose_actors_always_die_is_lost_after_the_last_attempt(cluster, setup, caplog):
    # One block of all clients, which would take for ever.
    endless = reconfigured(setup, *SERVER_STEP, "federation.local_epochs=1000000", "resources.block_size=8")
    with (
        ray_pool(endless, 1, max_attempts=2) as pool,
        caplog.at_level(logging.WARNING),
        killing_whatever_trains(pool),
        pytest.raises(QuorumError, match=r"round 1: 0 of 7 clients answered, federation.quorum asks for 7"),
    ):
        run(endless, 1, pool=pool)
    assert "client actor died in round 1 while training block 0 (attempt 1 of 2)" in caplog.text
    assert "client actor died in round 1 while training block 0 (attempt 2 of 2)" in caplog.text
    assert re.search(r"lost 7 clients \((\d, ){6}\d\): its actor died 2 times: ", caplog.text)


@pytest.mark.slow
def test_a_failing_client_is_named_with_its_round(cluster, setup):
    wild = reconfigured(setup, "training.learning_rate=1e30", "training.clip_norm=0", "federation.local_epochs=2")
    with (
        ray_pool(wild, 1) as pool,
        pytest.raises(ClientError, match=r"^client \d, round 1, phase [a-z ]+: non-finite update"),
    ):
        run(wild, 1, pool=pool)


@pytest.mark.slow
@pytest.mark.parametrize(("num_actors", "block_size"), [(1, 4), (3, 1)])
def test_a_client_that_fails_is_dropped_with_the_same_bits(cluster, setup, tmp_path, caplog, num_actors, block_size):
    rows = np.random.default_rng(0).standard_normal((42, 4, 32), dtype=np.float32)
    rows[12:18] *= 1e37  # client 2: sums overflow
    clients = [range(6 * k, 6 * k + 6) for k in range(7)]
    world = hand_made(setup, tmp_path, rows=rows, labels=np.arange(42) % 4, clients=clients)
    drop = ("federation.on_client_error=drop", "federation.quorum=0.8", *SERVER_STEP)
    world = replace(world, test_rows=np.arange(4), config=reconfigured(setup, *drop).config)
    here, results = run(world, 2)
    blocks = replace(world, config=reconfigured(setup, *drop, f"resources.block_size={block_size}").config)
    with ray_pool(blocks, num_actors) as pool, caplog.at_level(logging.WARNING, logger="fedsim"):
        there, again = run(blocks, 2, pool=pool)
    assert [[lost.client for lost in result.lost] for result in again] == [[2], [2]]
    assert digest(there.state.adapter) == digest(here.state.adapter)
    assert numbers(again) == numbers(results)
    assert "client 2 is dropped: client 2, round 1, phase local training: non-finite update" in caplog.text


def test_a_bug_in_client_code_is_an_error_at_once_with_clients_and_round(cluster, setup, caplog):
    server = make_server(setup)
    narrow = {name: tensor[:1] for name, tensor in server.state.adapter.items()}
    block = make_blocks(server._sample_cohort(1), 2)[1]
    name = str(block.client_ids[0])
    with (
        ray_pool(setup, 1) as pool,
        pytest.raises(
            ClientError,
            match=rf"^local training failed in round 5, block 1, client\(s\) {name}: .* \(on client-0, node .*\)$",
        ),
    ):
        list(pool.train([block], Broadcast(5, 7, narrow)))
    assert "client code failed on client-0 (pid " in caplog.text  # and the client's own traceback
    assert 'mlp.py", line ' in caplog.text
    assert "died" not in caplog.text


@pytest.mark.slow
def test_actors_that_can_not_start_are_an_error_and_no_endless_wait(cluster, setup, tmp_path):
    from fedsim.cluster.pool import RayPool

    server = make_server(setup)
    blocks = make_blocks(server._sample_cohort(1), 2)
    cut = tmp_path / "cut"
    shutil.copytree(setup.store_path, cut)
    (cut / "rows.npy").write_bytes((cut / "rows.npy").read_bytes()[:-1])
    pool = RayPool(replace(setup, store_path=cut), {"client": ActorKind(actors=1)}, max_attempts=3)
    with pytest.raises(ResourceError, match=r"^client actors can't be started \(3 tries\): .*can't be read"):
        list(pool.train(blocks, Broadcast(1, 7, server.state.adapter)))
    pool.close()


@pytest.mark.slow
def test_a_store_that_is_gone_is_an_error_and_leaves_no_actor(cluster, setup, tmp_path):
    from fedsim.cluster.pool import RayPool

    server = make_server(setup)
    blocks = make_blocks(server._sample_cohort(1), 2)
    pool = RayPool(replace(setup, store_path=tmp_path / "gone"), {"client": ActorKind(actors=1)}, max_attempts=3)
    with pytest.raises(DataError, match="can't be read"):
        list(pool.train(blocks, Broadcast(1, 7, server.state.adapter)))
    pool.close()
    wait_for(cpus=4, gpus=2)


@pytest.mark.slow
def test_the_size_of_a_message_in_the_object_store_does_not_depend_on_recordings(cluster, setup, tmp_path):
    import ray
    from ray.experimental import get_object_locations

    from fedsim.cluster.wire import pack_update

    sizes = []
    for count in (10, 1000):
        rows = np.random.default_rng(0).standard_normal((2 * count, 4, 32), dtype=np.float32)
        clients = [range(count), range(count, 2 * count)]
        world = hand_made(setup, tmp_path, rows=rows, labels=np.arange(2 * count) % 3, clients=clients)
        start = make_server(world).state.adapter
        update = BlockTrainer(world, CPU).train(Block(0, np.array([0, 1])), Broadcast(1, 7, start))
        reference = ray.put(pack_update(update))
        sizes.append(get_object_locations([reference])[reference]["object_size"])
    assert sizes[0] == sizes[1] > 0


@pytest.mark.slow
def test_fractions_of_gpus_are_placed_beside_the_server(cluster, setup, tmp_path):
    shared = reconfigured(
        setup,
        *SERVER_STEP,
        "resources.client_actors=4",
        "resources.client_gpus=0.25",
        "resources.client_cpus=0.5",
        "resources.server_gpus=1",
    )
    with remote_experiment(shared, tmp_path) as experiment:
        result = experiment.round()
        # All five hold what they asked for: 4 x 0.5 CPUs and 1 + 4 x 0.25 GPUs.
        wait_for(cpus=2, gpus=0)
        assert len(actors("ServerActor")) == 1
    assert result.lost == ()
    assert numbers([result]) == numbers(run(setup, 1)[1])


def test_an_experiment_that_does_not_fit_is_refused_at_once(cluster, setup, tmp_path):
    large = reconfigured(
        setup,
        *SERVER_STEP,
        "resources.client_actors=9",
        "resources.client_cpus=0.1",
        "resources.client_gpus=0.25",
        "resources.server_gpus=1",
    )
    start = time.monotonic()
    with (
        pytest.raises(ResourceError, match=r"ask for 3\.25 GPUs .* but Ray has 2 free"),
        remote_experiment(large, tmp_path),
    ):
        pass
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_errors_of_clients_come_through_the_server_actor_as_they_are(cluster, setup, tmp_path):
    wild = ("training.learning_rate=1e30", "training.clip_norm=0", "federation.local_epochs=2")
    with (
        remote_experiment(reconfigured(setup, *wild, "resources.client_actors=1"), tmp_path) as experiment,
        pytest.raises(ClientError, match=r"^client \d, round 1, phase [a-z ]+: non-finite update"),
    ):
        experiment.round()


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_actors(cluster, setup, reference, tmp_path):
    from fedsim.federation.checkpoint import load_checkpoint

    first, early = run(setup, 2)
    first.save(tmp_path, mlflow_run_id=None)
    state, _ = load_checkpoint(tmp_path, setup.config)
    with ray_pool(setup, 2) as pool:
        second, late = run(setup, pool=pool, state=state)
    assert digest(second.state.adapter) == reference[0] == digest_after(setup)
    assert numbers([*early, *late]) == reference[1]


GUIDED = {
    "scaffold": ("training.control_variates=true", "training.optimizer=SGD", "federation.cohort_size=5"),
    "fedproto": ("training.prototype_weight=0.5", "feda2v.adapter_aggregation_mode=none"),
    "kd": (*SERVER_STEP, "feda2v.adapter_aggregation_mode=kd", "feda2v.kd_samples_per_class=4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", GUIDED.values(), ids=GUIDED)
def test_what_guides_clients_and_what_they_teach_has_the_same_bits_with_two_actors(cluster, setup, options):
    guided = reconfigured(setup, *options)
    here, results = run(guided)
    with ray_pool(guided, 2) as pool:
        there, again = run(guided, pool=pool)
    for one, other in ((here.state.adapter, there.state.adapter), (here.state.guides, there.state.guides)):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert (here.clients is None) == (there.clients is None)
    if here.clients is not None:
        assert kept_of(there) == kept_of(here)
    assert numbers(again) == numbers(results)


@pytest.mark.slow
def test_masks_and_noise_are_the_same_in_this_process_and_with_two_actors(cluster, setup):
    private = reconfigured(
        setup,
        *SERVER_STEP,
        "feda2v.adapter_aggregation_mode=avg",
        "feda2v.generator_type=gaussian",
        "privacy.statistics=sums",
        "privacy.secure_sums=true",
        "privacy.noise_multiplier=0.05",
        "privacy.embedding_norm=4",
    )
    server, results = run(private, 2)
    with ray_pool(private, 2) as pool:
        other, others = run(private, 2, pool=pool)
    assert digest(other.state.adapter) == digest(server.state.adapter)
    assert numbers(others) == numbers(results)
    assert server.state.buffer is not None
