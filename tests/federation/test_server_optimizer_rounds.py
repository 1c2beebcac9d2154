"""Whole rounds with a server optimiser."""

from __future__ import annotations

import pytest
import torch
from worlds import CPU, SERVER_STEP, ReorderedPool, digest_after, make_server, reconfigured, run, slow_but, tiny_config

from fedsim.algorithms.server_optimizer import make_server_optimizer
from fedsim.errors import ConfigError
from fedsim.federation.parts import build_parts, initial_state
from fedsim.federation.setup import prepare
from fedsim.models.saved import digest

NO_STEP = "feda2v.global_model_train=false"
STEPPING = ("momentum", "adam", "yogi")


def chosen(name: str, rate: float = 0.01) -> tuple[str, ...]:
    return (f"feda2v.server_optimizer={name}", f"feda2v.server_learning_rate={rate}")


def assert_close(first, second, *, atol: float) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("mode", slow_but(["weighted", "krum"], ["avg", "weighted", "median", "trimmed_mean", "krum"]))
@pytest.mark.parametrize("name", STEPPING)
def test_a_round_is_a_step_from_what_the_aggregator_gives(setup, name, mode):
    options = (NO_STEP, f"feda2v.adapter_aggregation_mode={mode}")
    plain, _ = run(reconfigured(setup, *options), 1)
    server = make_server(reconfigured(setup, *options, *chosen(name)))
    start = server.state.adapter
    server.run_round()
    optimizer = make_server_optimizer(name, learning_rate=0.01)
    wanted, moments = optimizer.step(start, plain.state.adapter, {})
    assert digest(server.state.adapter) == digest(wanted) != digest(plain.state.adapter)
    assert digest(server.state.server_optimizer) == digest(moments)
    server.run_round()
    assert digest(server.state.server_optimizer) != digest(moments)


def test_momentum_zero_and_rate_one_is_plain_fedavg(setup):
    same = ("feda2v.server_optimizer=momentum", "feda2v.server_momentum=0")
    plain, _ = run(reconfigured(setup, NO_STEP), 1)
    server, _ = run(reconfigured(setup, NO_STEP, *same), 1)
    assert_close(server.state.adapter, plain.state.adapter, atol=1e-7)


def test_momentum_carries_on_after_clients_have_stopped(setup):
    # Clients that hardly move: the second round's step is 0.9 of the first's.
    setup = reconfigured(setup, NO_STEP, *chosen("momentum", 1.0))
    server = make_server(setup)
    start = server.state.adapter
    server.run_round()
    after = server.state.adapter
    still = ("training.optimizer=SGD", "training.learning_rate=1e-30")
    second, _ = run(reconfigured(setup, NO_STEP, *chosen("momentum", 1.0), *still), 2, state=server.state)
    for name, tensor in second.state.adapter.items():
        torch.testing.assert_close(tensor - after[name], 0.9 * (after[name] - start[name]), rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", STEPPING)
def test_order_and_blocks_leave_no_trace(setup, name):
    options = (*SERVER_STEP, *chosen(name))
    setup = reconfigured(setup, *options)
    wanted = digest_after(setup, 2)
    assert digest_after(setup, 2, pool=ReorderedPool(setup, lambda updates, _: updates[::-1])) == wanted
    assert digest_after(reconfigured(setup, *options, "resources.block_size=8"), 2) == wanted


def test_without_one_nothing_is_kept(setup):
    server, _ = run(reconfigured(setup, *SERVER_STEP), 1)
    assert server.state.server_optimizer == {}


def test_refinement_comes_after_the_step_and_is_no_part_of_its_change(setup):
    # What the server's own training moves doesn't enter the moments: only the clients' changes do.
    optimizer = make_server_optimizer("momentum", learning_rate=0.5)
    options = (*SERVER_STEP, *chosen("momentum", 0.5))
    server, _ = run(reconfigured(setup, *options), 1)
    refined, moments = server.state.adapter, server.state.server_optimizer
    again = make_server(reconfigured(setup, *SERVER_STEP), state=server.state)
    averaged = []
    again.optimizer = Spy(averaged)
    again.run_round()
    server.run_round()
    _, wanted = optimizer.step(refined, averaged[0], moments)
    assert digest(server.state.server_optimizer) == digest(wanted)


class Spy:
    """Takes over what it is given, and keeps it."""

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def step(self, old, averaged, moments):
        self.seen.append(averaged)
        return averaged, moments


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPPING)
def test_trained_encoder_layers_are_stepped_like_the_adapters(name):
    ast = (
        "model.audio_encoder={name: tiny_ast, segments: 2, dim: 16, trainable: 'last:1'}",
        "data.clips_per_class=4",
        "federation.num_clients=3",
        NO_STEP,
    )
    setup = prepare(tiny_config(*ast))
    start = initial_state(setup, build_parts(setup, CPU))
    plain, _ = run(setup, 1)
    server, _ = run(reconfigured(setup, *ast, *chosen(name)), 1)
    wanted, _ = make_server_optimizer(name, learning_rate=0.01).step(start, plain.state.adapter, {})
    assert any(tensor.startswith("encoder.") for tensor in wanted)
    assert digest(server.state.adapter) == digest(wanted)


def test_clients_apart_have_no_average_to_step_along():
    with pytest.raises(ConfigError) as refused:
        tiny_config("feda2v.adapter_aggregation_mode=none", *chosen("adam"))
    assert str(refused.value) == (
        "configuration: feda2v.server_optimizer is adam but feda2v.adapter_aggregation_mode is none, which sends the "
        "server no change to step along; aggregate (weighted, avg, ...), or set server_optimizer to none"
    )
