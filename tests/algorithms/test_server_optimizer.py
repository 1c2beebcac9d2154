"""Server optimisers against steps computed by hand from the papers' equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.algorithms.server_optimizer import SERVER_OPTIMIZERS, make_server_optimizer
from fedsim.config.schema import FedA2V
from fedsim.errors import ConfigError

STEPPING = [name for name in SERVER_OPTIMIZERS if name != "none"]


def state(*numbers: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(numbers)}


def two_steps(name: str, deltas=((0.1, 0.0), (-0.2, 0.4)), **how: float) -> list[list[float]]:
    """States after two rounds whose aggregators move by `deltas`, from [1, 2]."""
    optimizer, old, moments, seen = make_server_optimizer(name, **how), state(1.0, 2.0), {}, []
    for delta in deltas:
        old, moments = optimizer.step(old, {"w": old["w"] + torch.tensor(delta)}, moments)
        seen.append(old["w"].tolist())
    return seen


def test_momentum_is_fedavgm():
    # Hsu, Qi and Brown 2019, section 4: v = 0.9 v + Delta, x = x + 0.5 v.
    # First coordinate: v = 0.1, x = 1.05; v = 0.09 - 0.2 = -0.11, x = 0.995. Second: v = 0, x = 2; v = 0.4, x = 2.2.
    first, second = two_steps("momentum", learning_rate=0.5)
    assert first == pytest.approx([1.05, 2.0], abs=1e-6)
    assert second == pytest.approx([0.995, 2.2], abs=1e-6)


def test_adam_is_fedadam():
    # Reddi et al. 2021, Algorithm 2 with eta 0.1, beta1 0.9, beta2 0.99, tau 0.1, so v_{-1} = 0.01.
    # Round 1, Delta 0.1:  m = 0.01, v = 0.0099 + 0.0001 = 0.01, x = 1 + 0.001 / 0.2 = 1.005.
    # Round 2, Delta -0.2: m = 0.009 - 0.02 = -0.011, v = 0.0099 + 0.0004 = 0.0103, sqrt(v) = 0.1014889157,
    #   x = 1.005 - 0.0011 / 0.2014889157 = 0.9995406398.
    # Second coordinate. Round 1, Delta 0: m = 0, v = 0.0099, x = 2.
    # Round 2, Delta 0.4: m = 0.04, v = 0.009801 + 0.0016 = 0.011401, sqrt(v) = 0.1067754653,
    #   x = 2 + 0.004 / 0.2067754653 = 2.0193446550.
    first, second = two_steps("adam", learning_rate=0.1, adaptivity=0.1)
    assert first == pytest.approx([1.005, 2.0], abs=1e-6)
    assert second == pytest.approx([0.9995406398, 2.0193446550], abs=5e-7)


def test_yogi_is_fedyogi():
    # Reddi et al. 2021, Algorithm 2, the same numbers with v = v - 0.01 Delta^2 sign(v - Delta^2).
    # Round 1, Delta 0.2: m = 0.02, Delta^2 = 0.04 > 0.01, v = 0.0104, sqrt(v) = 0.1019803903,
    #   x = 1 + 0.002 / 0.2019803903 = 1.0099019514.
    # Round 2, Delta -0.05: m = 0.018 - 0.005 = 0.013, Delta^2 = 0.0025 < 0.0104, v = 0.010375,
    #   sqrt(v) = 0.1018577439, x = 1.0099019514 + 0.0013 / 0.2018577439 = 1.0163421302.
    # Second coordinate. Round 1, Delta 0: m = 0, v = 0.01, x = 2.
    # Round 2, Delta 0.4: m = 0.04, v = 0.01 + 0.0016 = 0.0116, sqrt(v) = 0.1077032961,
    #   x = 2 + 0.004 / 0.2077032961 = 2.0192582404.
    first, second = two_steps("yogi", ((0.2, 0.0), (-0.05, 0.4)), learning_rate=0.1, adaptivity=0.1)
    assert first == pytest.approx([1.0099019514, 2.0], abs=5e-7)
    assert second == pytest.approx([1.0163421302, 2.0192582404], abs=5e-7)


def test_adam_and_yogi_forget_a_large_change_at_different_speed():
    # After a change of 1 and a hundred of nothing: FedAdam's v falls by 0.99 a round, FedYogi's not at all.
    for name, expected in (("adam", (1e-6 * 0.99 + 0.01) * 0.99**100), ("yogi", 1e-6 + 0.01)):
        optimizer, moments = make_server_optimizer(name), {}
        for delta in [1.0, *[0.0] * 100]:
            _, moments = optimizer.step(state(0.0), state(delta), moments)
        assert float(moments["second.w"]) == pytest.approx(expected, rel=1e-4)


def test_none_takes_over_what_is_given():
    averaged = state(1.0, 2.0)
    new, moments = make_server_optimizer("none").step(state(0.0, 0.0), averaged, {})
    assert new is averaged
    assert moments == {}


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_no_change_is_no_step(name):
    optimizer, old, moments = make_server_optimizer(name), state(0.5, -3.0), {}
    for _ in range(3):
        new, moments = optimizer.step(old, {"w": old["w"].clone()}, moments)
        assert torch.equal(new["w"], old["w"])


def test_without_momentum_and_at_rate_one_it_is_plain_averaging():
    generator = torch.Generator().manual_seed(1)
    old, change = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    optimizer, moments = make_server_optimizer("momentum", momentum=0.0), {}
    for scale in (0.1, 1e-3):
        averaged = {"w": old + scale * change}
        new, moments = optimizer.step({"w": old}, averaged, moments)
        torch.testing.assert_close(new["w"], averaged["w"], rtol=1.2e-7, atol=1e-7)  # one unit in the last place
        old = new["w"]


@pytest.mark.parametrize("name", STEPPING)
def test_the_order_of_tensors_leaves_no_trace(name):
    generator = torch.Generator().manual_seed(2)
    shapes = {"b": (3, 5), "a": (7,), "encoder.c": (2, 2, 2)}
    old, changes = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))

    def stepped(order: list[str], *, backwards: bool) -> dict[str, torch.Tensor]:
        optimizer, now, moments = make_server_optimizer(name), {n: old[n] for n in order}, {}
        for _ in range(3):
            averaged = {n: now[n] + changes[n] for n in (reversed(order) if backwards else order)}
            now, moments = optimizer.step(now, averaged, dict(reversed(moments.items())))
        return now | moments

    wanted = stepped(list(shapes), backwards=False)
    other = stepped(sorted(shapes), backwards=True)
    assert wanted.keys() == other.keys()
    assert all(torch.equal(wanted[n], other[n]) for n in wanted)


@pytest.mark.parametrize("name", STEPPING)
def test_a_tensor_is_stepped_as_if_it_were_alone(name):
    optimizer, moments, alone = make_server_optimizer(name), {}, {}
    old, changes = {"a": torch.zeros(3), "b": torch.ones(2)}, {"a": torch.arange(3.0), "b": torch.full((2,), -0.5)}
    now, single = old, {"b": old["b"]}
    for _ in range(2):
        now, moments = optimizer.step(now, {n: now[n] + changes[n] for n in now}, moments)
        single, alone = optimizer.step(single, {"b": single["b"] + changes["b"]}, alone)
    assert torch.equal(now["b"], single["b"])


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_steps_change_no_argument_and_share_no_memory_with_it(name):
    optimizer, old, averaged = make_server_optimizer(name), state(1.0, 2.0), state(1.5, 1.0)
    _, moments = optimizer.step(old, averaged, {})
    before = {n: t.clone() for n, t in moments.items()}
    new, _ = optimizer.step(old, averaged, moments)
    assert old["w"].tolist() == [1.0, 2.0]
    assert averaged["w"].tolist() == [1.5, 1.0]
    assert all(torch.equal(moments[n], t) for n, t in before.items())
    assert new["w"].dtype == torch.float32
    assert new["w"].data_ptr() != old["w"].data_ptr()


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_the_step_of_a_weight_is_bounded_by_the_learning_rate(name):
    # 0.1 Delta / (sqrt(0.01 Delta^2) + tau) < 1 in the first round, however large Delta is.
    optimizer = make_server_optimizer(name, learning_rate=0.01)
    new, _ = optimizer.step(state(0.0, 0.0), state(1e6, -1e-2), {})
    assert np.abs(new["w"].numpy()).max() <= 0.01 * (1 + 1e-5)
    assert new["w"][0] > 0 > new["w"][1]


def test_the_configuration_offers_all_of_them_with_the_same_defaults():
    fields = FedA2V.model_fields
    assert set(fields["server_optimizer"].annotation.__args__) == set(SERVER_OPTIMIZERS)
    defaults = make_server_optimizer.__kwdefaults__
    assert defaults == {name: fields[f"server_{name}"].default for name in defaults}


def test_unknown_ones_are_refused():
    with pytest.raises(ConfigError, match="unknown server optimiser 'sgd'; known: none, momentum, adam, yogi"):
        make_server_optimizer("sgd")
