"""Training with shared weights plus outer products: the numbers of weights of every client's own, and of float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clients import clients_of, dense, plain_sgd, steps_of, training, world
from torch.nn import functional

from fedsim.algorithms.aggregation import SumTree
from fedsim.algorithms.local_training import Buffers, keeps_factors, shared_start, train_stack, weighted_deltas
from fedsim.models.adapters import stack
from fedsim.models.adapters.shared_weight import SUM_GROUP, SharedWeight

WIDTH = 64
SHAPES = {"clip": (WIDTH,), "t5": (3, WIDTH)}
COUNTS = [1, 3, 4, 5, 7]  # one step an epoch, or two


def wide_world(*, segments=1, shapes=SHAPES, **changes):
    """Layers so wide that a few steps of 4 recordings are less than their rank."""
    sizes = {"hidden": (WIDTH,), "width": WIDTH, "input_shape": (segments, WIDTH), "cosine_weight": 1.0}
    return world(shapes, **{**sizes, **changes})


def clients(counts, *, segments=1):
    return clients_of(counts, input_shape=(segments, WIDTH))


def trained(parts, params, data, how, **kwargs):
    _, objective, model = parts
    train_stack(model, params, steps_of(data, how), objective=objective, how=how, buffers=Buffers(), **kwargs)
    return params


def float64_loop(parts, data, how) -> list[dict[str, torch.Tensor]]:
    """Every client alone in double precision: gradients of the loss as it is defined, and plain steps."""
    adapter, objective, _ = parts
    results = []
    for alone in data.split(1):
        params = {name: p.double() for name, p in stack(adapter.init(0)).items()}
        for batch in steps_of(alone, how):
            real = batch.mask[0].bool()
            labels = batch.labels[0, real]
            leaves = {name: p.requires_grad_() for name, p in params.items()}
            loss = torch.zeros((), dtype=torch.float64)
            for head, out in adapter.forward(leaves, batch.inputs[:, real].double()).items():
                targets = objective.targets[head].double()
                loss = loss + (out[0] - targets[labels]).square().mean() / targets.var(0, unbiased=False).mean()
                directions = ((out[0] - targets.mean(0)).flatten(1), (targets - targets.mean(0))[labels].flatten(1))
                loss = loss + 1 - functional.cosine_similarity(*directions).mean()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), grads, strict=True)]
            norm = torch.stack([g.norm() for g in grads]).norm()
            scale = how.learning_rate * (min(1.0, float(how.clip_norm / norm)) if how.clip_norm else 1.0)
            params = {name: p.detach() - scale * g for (name, p), g in zip(leaves.items(), grads, strict=True)}
        results.append({name: p[0] for name, p in params.items()})
    return results


@pytest.mark.parametrize(
    ("preset", "segments", "norm", "epochs", "clip_norm"),
    [
        ("mlp", 1, False, 1, 0.0),
        ("mlp", 1, True, 2, 0.5),
        ("mlp", 3, False, 2, 0.5),
        ("mlp", 3, True, 1, 0.0),
        ("slim", 1, True, 2, 0.5),
        ("slim", 3, True, 2, 0.0),
        ("map", 1, False, 2, 0.0),
        ("map", 3, True, 1, 0.5),
    ],
)
def test_factors_give_the_weights_of_a_plain_loop_and_no_larger_error_than_own_weights(
    preset, segments, norm, epochs, clip_norm
):
    parts = wide_world(preset=preset, segments=segments, norm=norm)
    how, data = plain_sgd(local_epochs=epochs, clip_norm=clip_norm), clients(COUNTS, segments=segments)
    start = parts[0].init(0)
    params = trained(parts, shared_start(start, len(data)), data, how)
    assert any(isinstance(p, SharedWeight) for p in params.values())
    factored, own = dense(params), trained(parts, stack(start, len(data)), data, how)
    errors = [0.0, 0.0]
    for k, exact in enumerate(float64_loop(parts, data, how)):
        for name, wanted in exact.items():
            moved = float((wanted - start[name]).abs().max())
            # A ten-thousandth of the way that the weights have gone, or a few roundings of the weights themselves.
            for weights in (factored, own):
                torch.testing.assert_close(weights[name][k].double(), wanted, rtol=5e-7, atol=1e-4 * moved + 1e-7)
            errors[0] += float((factored[name][k] - wanted).square().sum())
            errors[1] += float((own[name][k] - wanted).square().sum())
        assert any(moved_far(exact[name], start[name]) for name in exact)
    assert errors[0] <= 1.5**2 * errors[1]


def moved_far(weights: torch.Tensor, start: torch.Tensor) -> bool:
    return float((weights - start).abs().max()) > 1e-3


def test_the_update_from_factors_is_nearer_to_float64_at_the_widths_of_the_benchmark():
    parts = wide_world(shapes={"clip": (768,)}, preset="mlp", hidden=(1024,), input_shape=(1, 512), norm=False)
    how = plain_sgd(batch_size=20, local_epochs=1, learning_rate=0.05)
    data, start = clients_of([40, 40], input_shape=(1, 512)), parts[0].init(0)
    factored = trained(parts, shared_start(start, 2), data, how)
    assert isinstance(factored["clip.mlp.layer0.weight"], SharedWeight)
    assert isinstance(factored["clip.last.weight"], SharedWeight)
    own = trained(parts, stack(start, 2), data, how)
    sums = [weighted_deltas(params, start, np.ones(2)) for params in (factored, own)]
    one, other = float64_loop(parts, data, how)
    for name in ("clip.mlp.layer0.weight", "clip.last.weight"):
        exact = one[name] + other[name] - 2 * start[name]
        errors = [float((total[name] - exact).norm() / exact.norm()) for total in sums]
        # Own weights lose a delta's last bits when it is added to the weights, a factor never is.
        assert errors[0] < 0.7 * errors[1]
        assert errors[0] < 1e-5


@pytest.mark.parametrize(
    ("rows", "steps", "dims", "kept"),
    [
        (20, 2, (512, 1024), True),  # the benchmark's layers
        (20, 2, (1024, 768), True),
        (8, 4, (64, 64), True),  # rank 32 of 64: 32 * 128 = 64 * 64
        (8, 5, (64, 64), False),
        (11, 3, (64, 64), False),  # 33
        (20, 2, (64, 32), False),
        (20, 1, (64, 32), True),  # one step never meets its own outer product
        (10**4, 1, (2, 2), True),
    ],
)
def test_factors_are_kept_where_they_are_less_work(rows, steps, dims, kept):
    assert keeps_factors(dims, rows=rows, steps=steps, how=plain_sgd()) is kept
    assert keeps_factors(dims, rows=rows, steps=steps, how=plain_sgd(clip_norm=1.0)) is kept


@pytest.mark.parametrize(
    "how",
    [
        plain_sgd(momentum=0.9),
        plain_sgd(weight_decay=1e-3),
        training(weight_decay=0.0),
        training(),
    ],
    ids=str,
)
def test_factors_are_never_kept_where_a_step_is_more_than_a_multiple_of_the_gradient(how):
    assert not any(keeps_factors((512, 1024), rows=1, steps=steps, how=how) for steps in (1, 2))
    parts, data = wide_world(), clients([1, 2])
    params = trained(parts, shared_start(parts[0].init(0), 2), data, how)
    assert not any(isinstance(p, SharedWeight) for p in params.values())


def test_a_layer_with_more_rows_gets_own_weights_and_the_others_stay_shared():
    parts, how = wide_world(preset="slim"), plain_sgd(local_epochs=2)
    params = trained(parts, shared_start(parts[0].init(0), 5), clients(COUNTS), how)
    # Four steps of 4 rows are kept at width 64, of 12 (three tokens each) not.
    assert isinstance(params["clip.last.weight"], SharedWeight)
    assert isinstance(params["t5.pool.project.weight"], SharedWeight)
    assert isinstance(params["t5.last.weight"], torch.Tensor)


@pytest.mark.parametrize("preset", ["mlp", "slim"])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_client_has_the_same_bits_alone_and_in_a_stack(preset, segments, batch_size):
    parts = wide_world(preset=preset, segments=segments)
    counts = sorted([1, 2, batch_size, batch_size + 1, 2 * batch_size + 1])
    data, how = clients(counts, segments=segments), plain_sgd(batch_size=batch_size, clip_norm=1.0, local_epochs=1)
    most = int(steps_of(data, how).steps[-1])
    together = dense(trained(parts, shared_start(parts[0].init(0), len(data)), data, how))
    for k, alone in enumerate(data.split(1)):
        own = dense(trained(parts, shared_start(parts[0].init(0), 1), alone, how, most_steps=most))
        assert all(torch.equal(own[name][0], p[k]) for name, p in together.items())


def test_batches_of_one_recording_are_clipped_once():
    # One recording and one token: autograd gives a layer's output and the biases added to it the same gradient.
    parts = wide_world(shapes={"t5": (1, WIDTH)}, preset="mlp")
    how, data = plain_sgd(batch_size=1, clip_norm=0.05, local_epochs=1), clients([1])
    weights = parts[0].init(0)
    for order in (list(weights), list(weights)[::-1]):
        for kind in (shared_start, stack):
            start = kind({name: weights[name] for name in order}, 1)
            ours = dense(trained(parts, start, data, how))
            for name, wanted in float64_loop(parts, data, how)[0].items():
                moved = float((wanted - weights[name]).abs().max())
                torch.testing.assert_close(ours[name][0].double(), wanted, rtol=5e-7, atol=1e-3 * moved)


def some_weights(count: int) -> np.ndarray:
    return np.linspace(1, 90, count)


SETTINGS = {"factors": plain_sgd(local_epochs=1), "own weights": training(local_epochs=1)}


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("count", [1, 7, SUM_GROUP, 37])
def test_the_sum_over_clients_is_that_of_weighted_deltas(how, count):
    parts = wide_world(preset="slim")
    data, start, weights = clients(sorted(1 + 5 * k % 11 for k in range(count))), parts[0].init(0), some_weights(count)
    params = trained(parts, shared_start(start, count), data, how)
    own = dense(params)
    assert any(isinstance(p, SharedWeight) for p in params.values()) == (how.optimizer == "SGD")
    sums = weighted_deltas(params, start, weights)
    assert list(sums) == list(start)
    for name, total in sums.items():
        deltas = torch.from_numpy(weights).view(-1, *(1,) * start[name].ndim) * (own[name].double() - start[name])
        assert total.shape == start[name].shape
        # Own weights are W + delta rounded to float32, which loses up to half a unit of W in every client's delta.
        rounding = float(start[name].abs().max()) * 2**-24 * weights.sum()
        torch.testing.assert_close(
            total.double(), deltas.sum(0), rtol=1e-6, atol=rounding + 1e-6 * float(deltas.abs().sum(0).max())
        )


@pytest.mark.parametrize(
    ("kind", "sizes"), [("factors", (SUM_GROUP, 2 * SUM_GROUP, 4 * SUM_GROUP)), ("own weights", (1, 2, 4, 16, 64))]
)
@pytest.mark.parametrize("count", [64, 39])
def test_parts_cut_at_aligned_places_join_to_the_same_sum_bit_for_bit(kind, sizes, count):
    how, parts = SETTINGS[kind], wide_world(shapes={"clip": (16,)}, hidden=(32,))
    # 1 to 3 batches, so that clients leave in the middle of groups and of parts, and one part is through early.
    data, start = clients(sorted(1 + 7 * k % 12 for k in range(count))), parts[0].init(0)
    weights = some_weights(count)
    reference = None
    for size in sizes:
        split = data.split(size)
        tree = SumTree(len(split))
        for number, part in enumerate(split):
            params = trained(parts, shared_start(start, len(part)), part, how, most_steps=1)
            kept = isinstance(params["clip.last.weight"], SharedWeight)
            assert kept == (kind == "factors")
            tree.add(number, weighted_deltas(params, start, weights[number * size :][: len(part)]))
        total = tree.root()
        reference = total if reference is None else reference
        assert all(torch.equal(total[name], reference[name]) for name in start)


def test_sums_outlive_the_stack_they_came_from():
    parts, how, buffers = wide_world(), training(local_epochs=1), Buffers()
    start, data = parts[0].init(0), clients([4, 5])

    def sums(data):
        params = shared_start(start, len(data))
        kwargs = {"objective": parts[1], "how": how, "buffers": buffers}
        train_stack(parts[2], params, steps_of(data, how), **kwargs)
        return weighted_deltas(params, start, np.ones(len(data)))

    first = sums(data)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    sums(clients([9, 9]))
    assert all(torch.equal(first[name], kept[name]) for name in kept)
