"""Class statistics against numpy, what is withheld, and the evaluation pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clients import C, client_rows, dense, joined, plain_sgd, steps_of, training, world

from fedsim.algorithms.local_training import Buffers, shared_start, train_stack
from fedsim.algorithms.statistics import empty_stats, evaluate_stack
from fedsim.models.adapters import stack, unstack
from fedsim.models.adapters.shared_weight import SharedWeight
from fedsim.types import concatenate_stats

COUNTS = [3, 8, 21]


@pytest.fixture(scope="module")
def evaluation():
    return evaluate(min_count=1)


def members():
    return [client_rows(10 + k, count) for k, count in enumerate(COUNTS)]


def parameters():
    adapter = world()[0]
    states = [adapter.init(k) for k in range(len(COUNTS))]
    return {name: torch.stack([s[name] for s in states]) for name in states[0]}


def evaluate(*, min_count, batch_size=4, share_variances=True):
    _, objective, model = world()
    return evaluate_stack(
        model,
        parameters(),
        joined(members()),
        objective=objective,
        batch_size=batch_size,
        stats_min_count=min_count,
        share_variances=share_variances,
    )


def test_means_and_variances_are_numpys(evaluation):
    adapter, stats = world()[0], evaluation.stats
    pairs = []
    for k, client in enumerate(members()):
        outputs = adapter.forward(stack(unstack(parameters(), k)), client.inputs.unsqueeze(0))
        for label in np.unique(client.labels):
            rows = client.labels.numpy() == label
            at = np.flatnonzero((stats.client == client.client[0]) & (stats.label == label))
            assert len(at) == 1
            row = stats.take(at)
            pairs.append((client.client[0], label))
            assert row.count.item() == rows.sum()
            own = client.inputs.numpy()[rows].astype(np.float64)
            np.testing.assert_allclose(row.audio_mean[0], own.mean(0), atol=1e-6)
            np.testing.assert_allclose(row.audio_var[0], own.var(0), atol=1e-6)
            for head, out in outputs.items():
                wanted = out[0].double().numpy()[rows].mean(0)
                np.testing.assert_allclose(row.output_mean[head][0], wanted, atol=1e-5)
    assert len(stats) == len(pairs)
    assert stats.count.sum() == sum(COUNTS)


def test_loss_and_accuracy_are_means_over_recordings(evaluation):
    adapter, objective, _ = world()
    for k, client in enumerate(members()):
        outputs = adapter.forward(stack(unstack(parameters(), k)), client.inputs.unsqueeze(0))
        loss = objective.loss_rows(outputs, client.labels.unsqueeze(0)).mean()
        hits = objective.cosines("clip", outputs["clip"])[0].argmax(1) == client.labels
        assert evaluation.loss[k] == pytest.approx(float(loss), rel=1e-5)
        assert evaluation.accuracy[k] == pytest.approx(float(hits.double().mean()))


@pytest.mark.parametrize("min_count", [2, 3, 5, 1000])
def test_classes_below_the_minimum_are_withheld_and_the_others_unchanged(evaluation, min_count):
    stats = evaluate(min_count=min_count).stats
    wanted = evaluation.stats.take(np.flatnonzero(evaluation.stats.count >= min_count))
    assert stats.client.tolist() == wanted.client.tolist()
    assert stats.label.tolist() == wanted.label.tolist()
    assert stats.count.tolist() == wanted.count.tolist()
    assert torch.equal(stats.audio_mean, wanted.audio_mean)
    assert torch.equal(stats.audio_var, wanted.audio_var)
    assert all(torch.equal(stats.output_mean[head], wanted.output_mean[head]) for head in ("clip", "t5"))
    assert len(stats) < len(evaluation.stats)


def test_a_class_no_client_may_send_leaves_empty_tables_of_the_right_shape():
    stats = evaluate(min_count=1000).stats
    assert len(stats) == 0
    assert stats.audio_mean.shape == stats.audio_var.shape == (0, *world()[0].input_shape)
    assert stats.output_mean["t5"].shape == (0, 3, 8)
    assert len(concatenate_stats([stats, stats])) == 0


def test_variances_stay_at_home_when_asked():
    assert evaluate(min_count=1, share_variances=False).stats.audio_var is None


def test_no_statistics_unless_asked_for():
    assert evaluate(min_count=None).stats is None


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_results_do_not_depend_on_the_chunks(evaluation, batch_size):
    # Beyond rounding: the chunk size is a client's own batch size, fixed for a run.
    other = evaluate(min_count=1, batch_size=batch_size)
    np.testing.assert_allclose(other.loss, evaluation.loss, rtol=1e-5)
    assert other.accuracy.tolist() == evaluation.accuracy.tolist()
    torch.testing.assert_close(other.stats.audio_mean, evaluation.stats.audio_mean)
    torch.testing.assert_close(other.stats.output_mean["t5"], evaluation.stats.output_mean["t5"])


@pytest.mark.parametrize("how", [plain_sgd(batch_size=4, local_epochs=1), training()], ids=str)
def test_weights_that_are_still_shared_score_as_if_multiplied_out(how):
    # Clients with one to six steps: the later outer products belong to the last clients alone.
    sizes = {"hidden": (64,), "width": 64, "input_shape": (1, 64), "shapes": {"clip": (64,), "t5": (3, 64)}}
    adapter, objective, model = world(**sizes)
    data = joined([client_rows(10 + k, count, input_shape=(1, 64)) for k, count in enumerate(COUNTS)])
    params = shared_start(adapter.init(0), len(data))
    kwargs = {"objective": objective, "batch_size": 4, "stats_min_count": 1}
    for trained in (False, True):
        if trained:
            batches = steps_of(data, how)
            train_stack(model, params, batches, objective=objective, how=how, buffers=Buffers(), most_steps=1)
            assert any(isinstance(p, SharedWeight) for p in params.values()) == (how.optimizer == "SGD")
        ours = evaluate_stack(model, params, data, **kwargs)
        plain = evaluate_stack(model, dense(params), data, **kwargs)
        np.testing.assert_allclose(ours.loss, plain.loss, rtol=1e-5)
        assert ours.accuracy.tolist() == plain.accuracy.tolist()
        for head, mean in plain.stats.output_mean.items():
            torch.testing.assert_close(ours.stats.output_mean[head], mean, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.stats.audio_mean, plain.stats.audio_mean)


def test_an_empty_table_has_the_shapes_of_the_others(evaluation):
    empty = empty_stats(world()[0])
    assert len(empty) == 0
    both = concatenate_stats([evaluation.stats, empty])
    assert both.client.tolist() == evaluation.stats.client.tolist()
    assert torch.equal(both.audio_var, evaluation.stats.audio_var)
    assert torch.equal(both.output_mean["t5"], evaluation.stats.output_mean["t5"])


def test_the_variance_of_far_away_embeddings_is_exact():
    _, objective, model = world()
    client = client_rows(0, 12)
    # 2**13 + x is exact to 2**-10: a one-pass variance (mean of squares minus squared mean) would lose it all.
    shifted = replace(client, inputs=torch.round(client.inputs * 1024) / 1024 + 8192)
    stats = evaluate_stack(
        model, stack(model.adapter.init(0)), shifted, objective=objective, batch_size=4, stats_min_count=2
    ).stats
    for row, label in enumerate(stats.label):
        own = shifted.inputs[shifted.labels == int(label)].double().numpy()
        np.testing.assert_allclose(stats.audio_var[row], own.var(0), rtol=1e-2, atol=1e-4)


def test_tables_are_joined_in_the_order_of_clients_and_classes_whatever_the_arrival():
    stats = evaluate(min_count=1).stats
    parts = [stats.take(np.flatnonzero(stats.client == client)) for client in (10, 11, 12)]
    one, other = concatenate_stats(parts), concatenate_stats(parts[::-1])
    assert one.client.tolist() == other.client.tolist() == sorted(one.client)
    assert one.label.tolist() == other.label.tolist()
    assert torch.equal(one.audio_mean, other.audio_mean)
    assert torch.equal(one.output_mean["clip"], other.output_mean["clip"])
    assert max(one.label) < C
    with pytest.raises(ValueError, match="no tables of class statistics"):
        concatenate_stats([])
