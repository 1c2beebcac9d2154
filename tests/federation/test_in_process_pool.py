"""A pool that is closed while blocks train: each is left at its next step, whatever its client trains."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from worlds import CPU, OWN_GENERATORS, SERVER_STEP, make_server, reconfigured

from fedsim.federation.blocks import make_blocks
from fedsim.federation.pool import Abandoned, InProcessPool, _patiently

LONG = {
    "adapters": ("federation.local_epochs=5000",),
    "generators": (*SERVER_STEP, *OWN_GENERATORS, "feda2v.generator_epochs=5000"),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", LONG)
def test_blocks_under_way_end_soon(setup, what, threads):
    world = reconfigured(setup, *LONG[what])
    server = make_server(reconfigured(setup, *LONG[what], "federation.local_epochs=1", "feda2v.generator_epochs=1"))
    server.run_round()  # clients are told of a network from the second round on
    broadcast = server._broadcast(2)
    assert (what == "generators") == any(name.startswith("generator.") for name in broadcast.extra)
    pool, ended = InProcessPool(world, CPU, threads=threads), []

    def train() -> None:
        blocks = server.kept.blocks(make_blocks(np.arange(7), 2), broadcast)
        try:
            ended.extend(pool.train(blocks, broadcast))
        except Abandoned as error:
            ended.append(error)

    worker = threading.Thread(target=train)
    worker.start()
    time.sleep(0.5)
    assert worker.is_alive(), ended
    began = time.monotonic()
    pool.close()
    worker.join(timeout=20)
    assert not worker.is_alive()
    assert time.monotonic() - began < 5  # hundredths of a second where nobody else needs the cores
    assert isinstance(ended[-1], Abandoned)
    assert len(ended) < 4  # a client with nothing to train a generator on may have been done


def test_a_signal_that_another_thread_takes_ends_the_wait():
    class HeardError(Exception):
        pass

    def hear(number, frame):
        raise HeardError

    def work():
        time.sleep(0.3)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        released.wait(20)

    before, released, start = signal.signal(signal.SIGUSR1, hear), threading.Event(), time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        try:
            with pytest.raises(HeardError):
                _patiently(threads.submit(work))
            assert time.monotonic() - start < 10
        finally:
            released.set()
            signal.signal(signal.SIGUSR1, before)
