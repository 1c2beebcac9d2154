"""Whole rounds with control variates: the same for any blocks and stacks, and a plain loop's numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import (
    CPU,
    SERVER_STEP,
    LossyPool,
    ReorderedPool,
    block_of,
    kept_of,
    make_server,
    numbers,
    reconfigured,
    run,
)

from fedsim.algorithms.batches import ClientRows, training_batches
from fedsim.algorithms.control_variates import PREFIX
from fedsim.errors import ClientError, ConfigError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.messages import check_update
from fedsim.models.adapters import stack
from fedsim.models.saved import digest
from fedsim.types import flatten_state

NO_STEP = "feda2v.global_model_train=false"
SCAFFOLD = (
    NO_STEP,
    "training.optimizer=SGD",
    "training.learning_rate=0.1",
    "training.control_variates=true",
    "federation.local_epochs=2",
)


def test_rounds_are_those_of_a_plain_loop_over_clients(setup):
    setup = reconfigured(setup, *SCAFFOLD, "federation.cohort_size=4", "feda2v.adapter_aggregation_mode=weighted")
    server = make_server(setup)
    parts, training = server.parts, setup.config.training
    x, total = server.state.adapter, float(setup.partition.counts.sum())
    c, own = {n: torch.zeros_like(t) for n, t in x.items()}, {}
    for number in (1, 2, 3):
        cohort = server._sample_cohort(number)
        server.run_round()
        change, new, weight = {n: 0.0 for n in x}, {}, 0.0
        for client in cohort.tolist():
            rows = setup.partition.client(client)
            data = ClientRows(
                np.array([client]),
                np.array([len(rows)]),
                rows,
                parts.table.inputs,
                parts.table.lengths,
                parts.table.labels,
            )
            batches = training_batches(data, seed=7, round_number=number, epochs=2, batch_size=training.batch_size)
            kept = own.get(client, {n: torch.zeros_like(t) for n, t in x.items()})
            y, steps = {n: t.clone() for n, t in x.items()}, 0
            for batch in batches:
                leaves = {n: t.requires_grad_() for n, t in stack(y).items()}
                loss = parts.objective.loss_rows(parts.adapter.forward(leaves, batch.inputs), batch.labels)
                loss = (loss * batch.mask).sum() / batch.mask.sum()
                found = dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), allow_unused=True), strict=True))
                g = {n: torch.zeros_like(y[n]) if t is None else t[0] for n, t in found.items()}
                norm = torch.linalg.vector_norm(torch.cat([t.flatten() for t in g.values()]))
                factor = min(1.0, training.clip_norm / float(norm))
                for n in y:
                    step = factor * g[n] + training.weight_decay * y[n] - kept[n] + c[n]
                    y[n] = y[n] - training.learning_rate * step
                steps += 1
            new[client] = {n: kept[n] - c[n] + (x[n] - y[n]) / (steps * training.learning_rate) for n in x}
            weight += len(rows)
            change = {n: change[n] + len(rows) * (y[n] - x[n]) for n in x}
        x = {n: x[n] + change[n] / weight for n in x}
        for client, after in new.items():
            before = own.get(client, {n: torch.zeros_like(t) for n, t in x.items()})
            share = len(setup.partition.client(client)) / total
            c = {n: c[n] + share * (after[n] - before[n]) for n in x}
        own |= new
        for n in x:
            torch.testing.assert_close(server.state.adapter[n], x[n], atol=2e-5, rtol=1e-4, msg=n)
            torch.testing.assert_close(server.state.guides[PREFIX + n], c[n], atol=2e-5, rtol=1e-3, msg=n)
        assert sorted(own) == server.state.clients.ids.tolist()
        for client, after in own.items():
            row = server.clients.rows(np.array([client]), np.float32(np.nan))[0]
            np.testing.assert_allclose(row, flatten_state(after).numpy(), atol=5e-5, rtol=1e-3)


def everything(server) -> tuple[str, str, dict[int, bytes]]:
    return digest(server.state.adapter), digest(server.state.guides), kept_of(server)


@pytest.mark.parametrize("mode", ["avg", "weighted"])
def test_blocks_and_their_order_leave_no_trace(setup, mode):
    options = (*SCAFFOLD, f"feda2v.adapter_aggregation_mode={mode}", "federation.cohort_size=5")
    whole, results = run(reconfigured(setup, *options, "resources.block_size=8"))
    for size in (1, 2, 4):
        some = reconfigured(setup, *options, f"resources.block_size={size}")
        pool = ReorderedPool(some, lambda updates, n: updates[n:][::-1] + updates[:n])
        other, again = run(some, pool=pool)
        assert everything(other) == everything(whole)
        assert numbers(again) == numbers(results)


def test_stacks_of_any_size_have_the_same_bits(setup, monkeypatch):
    setup = reconfigured(setup, *SCAFFOLD)
    server, _ = run(setup, 2)
    block = block_of(*server._sample_cohort(3)[-4:])
    own = server.clients.rows(block.client_ids, np.float32(0))
    block, broadcast = replace(block, own=own), server._broadcast(3)
    whole = BlockTrainer(setup, CPU).train(block, broadcast)
    halved = BlockTrainer(setup, CPU)
    monkeypatch.setattr(halved._stacks, "size", lambda costs: 1)
    parts = halved.train(block, broadcast)
    np.testing.assert_array_equal(whole.kept, parts.kept)
    assert digest(whole.sums) == digest(parts.sums)
    assert digest(whole.delta_sum) == digest(parts.delta_sum)


def test_the_first_round_is_plain_training_and_later_ones_are_not(setup):
    plain, with_variates = (reconfigured(setup, *SCAFFOLD, f"training.control_variates={on}") for on in (False, True))
    for rounds, same in ((1, True), (2, False)):
        one, other = (run(world, rounds)[0].state.adapter for world in (plain, with_variates))
        close = all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)
        assert close == same


def test_lost_clients_keep_what_they_had_and_c_stays_the_mean_of_all(setup):
    setup = reconfigured(setup, *SCAFFOLD, "feda2v.adapter_aggregation_mode=avg", "federation.quorum=0.3")
    server, _ = run(setup, 2)
    before = kept_of(server)
    server.pool = LossyPool(setup, {1})
    server.run_round()
    lost = set(server._sample_cohort(3)[2:4].tolist())
    assert {client for client, row in kept_of(server).items() if row == before[client]} == lost
    rows = np.stack([np.frombuffer(row, dtype=np.float32) for row in kept_of(server).values()])
    c = flatten_state({n.removeprefix(PREFIX): t for n, t in server.state.guides.items()}).numpy()
    np.testing.assert_allclose(rows.mean(0), c, atol=1e-5)


def test_only_clients_that_took_part_take_room_and_bytes_are_counted(setup, tmp_path):
    plain = run(reconfigured(setup, *SCAFFOLD, "training.control_variates=false", "federation.cohort_size=3"), 1)[1][0]
    setup = reconfigured(setup, *SCAFFOLD, "federation.cohort_size=3")
    server, (result,) = run(setup, 1, run_dir=tmp_path)
    size = 4 * sum(t.numel() for t in server.state.adapter.values())
    assert (tmp_path / "clients" / "rows.f32").stat().st_size == 3 * size
    assert (result.bytes_up, result.bytes_down) == (plain.bytes_up + 3 * size, plain.bytes_down + 3 * size)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda u: replace(u, kept=None), "it holds no control variates of its clients"),
        (lambda u: replace(u, kept=u.kept[:1]), "its control variates are float32 [1, "),
        (lambda u: replace(u, kept=np.full_like(u.kept, np.nan)), "its control variates have non-finite numbers"),
        (lambda u: replace(u, sums={}), "its sums are [], expected ['variate."),
    ],
)
def test_bad_variates_are_refused(setup, change, problem):
    setup = reconfigured(setup, *SCAFFOLD)
    server = make_server(setup)
    block = replace(
        block_of(*server._sample_cohort(1)[-2:]), own=np.zeros((2, server._expected.row_size), dtype=np.float32)
    )
    update = BlockTrainer(setup, CPU).train(block, server._broadcast(1))
    check_update(update, block, server._expected, server._broadcast(1))
    with pytest.raises(ClientError) as caught:
        check_update(change(update), block, server._expected, server._broadcast(1))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("training.optimizer=AdamW",), "training.optimizer is AdamW, but a client's variate is the mean gradient"),
        (("training.momentum=0.9",), "training.optimizer is SGD with momentum 0.9, but"),
        (("feda2v.adapter_aggregation_mode=none",), "feda2v.adapter_aggregation_mode is none"),
        ((*SERVER_STEP, "federation.local_epochs=0"), "federation.local_epochs is 0"),
    ],
)
def test_what_it_does_not_go_with_is_refused_in_one_line(setup, overrides, said):
    with pytest.raises(ConfigError) as caught:
        reconfigured(setup, *SCAFFOLD, *overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
