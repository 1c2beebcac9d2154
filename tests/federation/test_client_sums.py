"""What clients are told and add up for the generator: the same in this process as over the wire."""

from __future__ import annotations

import pytest
import torch
from worlds import SERVER_STEP, reconfigured, run

from fedsim.cluster.wire import pack_broadcast, unpack_broadcast
from fedsim.errors import ModelError

KINDS = ("replay", "lowrank", "full", "residual_vae", "vae")


@pytest.mark.parametrize("kind", KINDS)
def test_what_clients_are_told_lies_in_memory_as_it_does_out_of_a_message(setup, kind):
    server, _ = run(reconfigured(setup, *SERVER_STEP, f"feda2v.generator_type={kind}"), 2)
    broadcast = server._broadcast(3)
    assert sorted({name.split(".")[0] for name in broadcast.extra}) == {
        "replay": [],
        "residual_vae": ["basis", "deviation", "generator"],
    }.get(kind, ["basis"])
    for name, tensor in unpack_broadcast(pack_broadcast(broadcast)).extra.items():
        assert torch.equal(tensor, broadcast.extra[name])
        assert tensor.stride() == broadcast.extra[name].stride()


def test_a_network_is_trained_from_the_second_round_on_and_only_where_it_is_used(setup):
    server, _ = run(reconfigured(setup, *SERVER_STEP, "feda2v.generator_type=residual_vae"), 1)
    first = server.state.learnt.network
    assert not first["decoder.1.weight"].any()  # the Gaussian of the covariance: no client has trained it
    told = server._broadcast(2).extra
    assert all(torch.equal(tensor, told[f"generator.{name}"]) for name, tensor in first.items())
    server.run_round()
    learnt = server.state.learnt
    assert {f"generator.{name}" for name in learnt.network} == {name for name in told if "generator" in name}
    assert all(not torch.equal(tensor, told[f"generator.{name}"]) for name, tensor in learnt.network.items())
    assert torch.equal(learnt.deviation, told["deviation"])
    without, _ = run(reconfigured(setup, *SERVER_STEP, "feda2v.generator_type=lowrank"), 2)
    assert not without.state.learnt.network


def test_a_residual_vae_draws_around_class_means_in_the_first_round(setup):
    _, results = run(reconfigured(setup, *SERVER_STEP, "feda2v.generator_type=residual_vae"), 1)
    assert results[0].metrics["generator/diversity"] > 0.2


def test_a_generator_that_diverges_is_named_with_its_own_learning_rate(setup):
    diverging = (*SERVER_STEP, "feda2v.generator_type=residual_vae", "feda2v.generator_learning_rate=1e4")
    with pytest.raises(ModelError, match=r"aren't finite; lower feda2v\.generator_learning_rate"):
        run(reconfigured(setup, *diverging), 3)


@pytest.mark.parametrize("share", [7, 3])
def test_a_cohort_that_is_everyone_needs_no_memory(setup, share):
    lowrank = (*SERVER_STEP, "feda2v.generator_type=lowrank", f"federation.cohort_size={share}")
    freedoms = []
    server, _ = run(reconfigured(setup, *lowrank), 0)
    for _ in range(4):
        server.run_round()
        freedoms.append(server.state.learnt.pooled.freedom)
    assert (len(set(freedoms)) == 1) == (share == 7)
