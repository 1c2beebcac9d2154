"""Placement on paper, and demands that don't fit."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from processes import wait_for

from fedsim.cluster import resources
from fedsim.cluster.resources import Demand, check_fits, place
from fedsim.config.schema import ActorKind
from fedsim.errors import ResourceError


def needs(cpu: float = 0.0, gpu: float = 0.0) -> dict[str, float]:
    return {"CPU": cpu, "GPU": gpu}


def demand(actors: int, cpus: float, gpus: float, **server: float) -> Demand:
    return Demand({"client": ActorKind(actors=actors, cpus=cpus, gpus=gpus)}, **server)


def on(bundle: dict[str, object], **labels: str) -> dict[str, object]:
    return bundle | {"labels": labels}


FITS = {
    "nothing on nothing": ([], []),
    "nothing asked for": ([needs()], [needs()]),
    "four quarters on one GPU": ([needs(1, 0.25)] * 4, [needs(4, 1)]),
    "a whole and four quarters on two GPUs": ([needs(0, 1), *[needs(1, 0.25)] * 4], [needs(4, 2)]),
    "whole ones after fractions in the list": ([*[needs(0, 0.5)] * 2, needs(0, 1)], [needs(0, 2)]),
    "three GPUs for one actor": ([needs(0, 3)], [needs(0, 3)]),
    "on several nodes": ([needs(2)] * 3, [needs(3), needs(2), needs(2)]),
    "three thirds": ([needs(0, 1 / 3)] * 3, [needs(0, 1)]),
    "the free rest of a GPU in use": ([needs(0, 0.5)], [needs(0, 0.5)]),
    "labels that one node has": ([needs(1), on(needs(1), disk="fast")], [needs(1), on(needs(1), disk="fast")]),
    "labelled ones first": ([needs(2), on(needs(1), disk="fast")], [on(needs(2), disk="fast"), needs(2)]),
    "ten tenths": ([needs(0.1, 0.1)] * 10, [needs(1, 1)]),
}
TOO_MUCH = {
    "no node with the label": ([on(needs(1), disk="fast")], [on(needs(9), disk="slow")], on(needs(1), disk="fast")),
    "one of two labels": ([on(needs(1), a="1", b="2")], [on(needs(9), a="1")], on(needs(1), a="1", b="2")),
    "no node": ([needs(1)], [], needs(1)),
    "three 0.4 on one GPU": ([needs(0, 0.4)] * 3, [needs(0, 1)], needs(0, 0.4)),
    # Two GPUs hold 1.2 GPUs in sum, but a fraction lies on one of them.
    "0.6 on two half GPUs": ([needs(0, 0.6)] * 3, [needs(0, 2)], needs(0, 0.6)),
    "two whole GPUs on two nodes": ([needs(0, 2)], [needs(0, 1), needs(0, 1)], needs(0, 2)),
    "three CPUs on two nodes": ([needs(3)], [needs(2), needs(2)], needs(3)),
    "CPU here, GPU there": ([needs(2, 1)], [needs(2, 0), needs(0, 1)], needs(2, 1)),
    "a whole GPU where half is in use": ([needs(0, 1)], [needs(0, 1.5), needs(0, 0.5)], None),
}


@pytest.mark.parametrize(("bundles", "nodes"), FITS.values(), ids=FITS)
def test_what_fits(bundles, nodes):
    assert place(bundles, nodes) is None


@pytest.mark.parametrize(("bundles", "nodes", "first"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_does_not_fit(bundles, nodes, first):
    assert place(bundles, nodes) == first


def test_placing_changes_no_argument():
    bundles, nodes = [needs(1, 0.5)] * 2, [needs(4, 1)]
    place(bundles, nodes)
    assert bundles == [needs(1, 0.5)] * 2
    assert nodes == [needs(4, 1)]


def test_a_demand_is_a_server_and_its_clients():
    two = demand(2, 1.0, 0.25, server_cpus=0.0, server_gpus=1.0)
    assert two.bundles() == [needs(0, 1), needs(1, 0.25), needs(1, 0.25)]


@pytest.mark.parametrize(
    ("limit", "told"), [(None, None), (64 * 10**9, 10**10), (10**9, 3 * 10**8), (10**8, 80 * 2**20)]
)
def test_ray_is_told_of_a_store_that_it_takes(monkeypatch, limit, told):
    # Docker gives a container 64 MB of shared memory; Ray refuses more than is there above 10 GB.
    monkeypatch.setattr(resources, "memory_limit", lambda: limit)
    monkeypatch.setattr(resources, "usable_memory", lambda: limit)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: Mock(free=64 * 2**20))
    assert resources._store_bytes() == told


@pytest.mark.ray
class TestOnFourCpusAndTwoGpus:
    """The session's Ray, all of it free."""

    def test_what_fits_is_let_through(self, cluster):
        check_fits(demand(4, 1.0, 0.25, server_cpus=0.0, server_gpus=1.0))

    def test_too_many_gpus_are_refused_with_both_numbers(self, cluster):
        with pytest.raises(ResourceError) as caught:
            check_fits(demand(9, 0.1, 0.25, server_cpus=0.0, server_gpus=1.0))
        assert str(caught.value) == (
            "the actors ask for 3.25 GPUs (server 1 + 9 clients x 0.25) but Ray has 2 free; "
            "lower resources.client_actors, client_gpus or server_gpus, or join a larger cluster with --address"
        )

    def test_too_many_cpus_are_refused_with_both_numbers(self, cluster):
        with pytest.raises(ResourceError, match=r"ask for 6 CPUs \(server 1 \+ 5 clients x 1\) but Ray has 4 free"):
            check_fits(demand(5, 1.0, 0.0, server_cpus=1.0, server_gpus=0.0))

    def test_fractions_that_no_gpu_holds_are_refused(self, cluster):
        # 1.8 of 2 GPUs in sum, but three times 0.6 needs three GPUs.
        with pytest.raises(ResourceError, match=r"no node can hold an actor of 1 CPU, 0\.6 GPU beside the others"):
            check_fits(demand(3, 1.0, 0.6, server_cpus=0.0, server_gpus=0.0))

    def test_what_others_hold_is_not_free(self, cluster):
        import ray

        class Holder:
            def ready(self):
                return True

        holder = ray.remote(Holder).options(num_cpus=3, num_gpus=0.5).remote()
        ray.get(holder.ready.remote())
        try:
            wait_for(cpus=1, gpus=1.5)
            with pytest.raises(ResourceError, match="but Ray has 1 free"):
                check_fits(demand(2, 1.0, 0.0, server_cpus=0.0, server_gpus=0.0))
        finally:
            ray.kill(holder)
