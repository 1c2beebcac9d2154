"""Rounds: what they depend on, what they don't, and what they leave."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from worlds import (
    CPU,
    SERVER_STEP,
    LossyPool,
    ReorderedPool,
    block_of,
    digest_after,
    kept_of,
    make_server,
    numbers,
    only_client,
    reconfigured,
    run,
    tiny_config,
)

from fedsim.algorithms.aggregation import AGGREGATORS, make_aggregator
from fedsim.algorithms.robust import krum
from fedsim.errors import ClientError, ConfigError, QuorumError
from fedsim.federation.blocks import BlockTrainer, make_blocks
from fedsim.federation.parts import build_parts, initial_state
from fedsim.federation.pool import InProcessPool
from fedsim.federation.setup import prepare
from fedsim.models.saved import digest
from fedsim.types import Block, Broadcast, flatten_state, unflatten_state

NO_STEP = "feda2v.global_model_train=false"


@pytest.fixture(scope="module")
def reference(setup):
    """Digest and numbers of the whole run."""
    server, results = run(setup)
    return digest(server.state.adapter), numbers(results)


def test_clients_of_this_federation_are_unequal(setup):
    assert setup.partition.num_clients == 7
    assert len(set(setup.partition.counts.tolist())) >= 3
    assert not set(setup.test_rows) & set(setup.partition.rows)


def test_a_run_repeats_itself(setup, reference):
    server, results = run(setup)
    assert (digest(server.state.adapter), numbers(results)) == reference


def test_a_run_depends_on_its_seed(setup, reference):
    assert digest_after(reconfigured(setup, *SERVER_STEP, "experiment.seed=8")) != reference[0]


def test_every_round_changes_every_tensor(setup):
    server = make_server(setup)
    for _ in range(2):
        before = server.state.adapter
        server.run_round()
        unchanged = [name for name, t in server.state.adapter.items() if torch.equal(t, before[name])]
        assert unchanged == []


@pytest.mark.parametrize(
    "reorder",
    [
        lambda updates, number: updates[::-1],
        lambda updates, number: [updates[i] for i in np.random.default_rng(number).permutation(len(updates))],
        lambda updates, number: updates[1:] + updates[:1],
    ],
    ids=["reversed", "shuffled", "rotated"],
)
def test_the_order_of_answers_leaves_no_trace(setup, reference, reorder):
    server, results = run(setup, pool=ReorderedPool(setup, reorder))
    assert digest(server.state.adapter) == reference[0]
    assert numbers(results) == reference[1]


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_the_size_of_blocks_leaves_no_trace(setup, reference, block_size):
    other = reconfigured(setup, *SERVER_STEP, f"resources.block_size={block_size}")
    server, results = run(other)
    assert digest(server.state.adapter) == reference[0]
    assert numbers(results) == reference[1]


def test_the_global_random_state_and_the_threads_do_not_count(setup, reference):
    torch.manual_seed(123)
    np.random.seed(123)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert digest_after(setup) == reference[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("mode", ["avg", "weighted"])
def test_a_round_is_fedavg_by_hand(setup, mode):
    config = (NO_STEP, f"feda2v.adapter_aggregation_mode={mode}")
    setup = reconfigured(setup, *config)
    start = make_server(setup).state.adapter
    trainer, total, weights = BlockTrainer(setup, CPU), dict.fromkeys(start, 0.0), 0.0
    for client in range(7):
        update = trainer.train(block_of(client), Broadcast(1, 7, start))
        n = len(setup.partition.client(client))
        weight = 1 if mode == "avg" else n
        assert update.weight_sum == weight
        # The update of a block of one is weight * (local - global).
        total = {name: t + update.delta_sum[name].double() for name, t in total.items()}
        weights += weight
    server, _ = run(setup, 1)
    for name, tensor in server.state.adapter.items():
        torch.testing.assert_close(tensor.double(), start[name] + total[name] / weights, atol=1e-6, rtol=1e-6)


ROBUST = {
    "median": (lambda rows: np.median(rows.astype(np.float64), axis=0), ()),
    "trimmed_mean": (
        lambda rows: np.sort(rows.astype(np.float64), axis=0)[2:-2].mean(0),
        ("feda2v.trim_share=0.3",),
    ),
    "krum": (lambda rows: krum([rows], byzantine=1), ("feda2v.byzantine_clients=1",)),
}


@pytest.mark.parametrize("mode", ROBUST)
def test_a_robust_round_is_its_centre_of_the_clients_updates(setup, mode):
    centre, options = ROBUST[mode]
    setup = reconfigured(setup, NO_STEP, f"feda2v.adapter_aggregation_mode={mode}", *options)
    server = make_server(setup)
    start = flatten_state(server.state.adapter).numpy()
    trainer, broadcast = BlockTrainer(setup, CPU), Broadcast(1, 7, server.state.adapter)
    updates = np.concatenate([trainer.train(block_of(client), broadcast).updates for client in range(7)])
    server.run_round()
    after = flatten_state(server.state.adapter).numpy()
    np.testing.assert_allclose(after, start + centre(updates), rtol=1e-6, atol=1e-7)
    assert not np.allclose(after, start + updates.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ROBUST)
def test_order_and_blocks_leave_no_trace_in_a_robust_round(setup, tmp_path, mode):
    options = (*SERVER_STEP, f"feda2v.adapter_aggregation_mode={mode}", *ROBUST[mode][1])
    setup = reconfigured(setup, *options)
    server, results = run(setup, 2, run_dir=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []  # the matrix has gone with its round
    backwards = ReorderedPool(setup, lambda updates, number: updates[::-1])
    for other in (
        run(setup, 2, pool=backwards),
        run(reconfigured(setup, *options, "resources.block_size=8"), 2),
        run(reconfigured(setup, *options, "resources.block_size=1"), 2),
    ):
        assert digest(other[0].state.adapter) == digest(server.state.adapter)
        assert numbers(other[1]) == numbers(results)


def test_lost_clients_are_left_out_of_a_robust_round(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=median", "federation.quorum=0.5")
    server = make_server(setup, pool=LossyPool(setup, {1, 3}))
    start = flatten_state(server.state.adapter).numpy()
    blocks = make_blocks(server._sample_cohort(1), 2)
    trainer, broadcast = BlockTrainer(setup, CPU), Broadcast(1, 7, server.state.adapter)
    updates = np.concatenate([trainer.train(blocks[index], broadcast).updates for index in (0, 2)])
    result = server.run_round()
    assert len(result.lost) == 3
    after = flatten_state(server.state.adapter).numpy()
    np.testing.assert_allclose(after, start + np.median(updates, axis=0), rtol=1e-6, atol=1e-7)


def test_krum_asks_for_enough_clients_before_and_during_a_run(setup):
    krum_of = (NO_STEP, "feda2v.adapter_aggregation_mode=krum")
    with pytest.raises(ConfigError) as refused:
        make_server(reconfigured(setup, *krum_of, "feda2v.byzantine_clients=3"))
    assert str(refused.value) == (
        "feda2v.adapter_aggregation_mode krum with feda2v.byzantine_clients 3 needs at least 9 clients in a cohort, "
        "it has 7"
    )
    lossy = reconfigured(setup, *krum_of, "feda2v.byzantine_clients=2", "federation.quorum=0.1")
    with pytest.raises(QuorumError, match="round 1: 5 of 7 clients answered, krum asks for 7"):
        run(lossy, 1, pool=LossyPool(lossy, {0}))


def test_lost_clients_keep_what_they_had(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none", "federation.quorum=0.1")
    server, _ = run(setup, 1)
    before = kept_of(server)
    server.pool = LossyPool(setup, {0, 2})
    lost = {client.client for client in server.run_round().lost}
    after = kept_of(server)
    assert len(lost) == 4
    assert {client for client in after if after[client] == before[client]} == lost


def test_a_round_that_failed_leaves_what_clients_keep_as_it_was(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none")
    whole, _ = run(setup, 2)
    server, _ = run(setup, 1)
    before, pool = kept_of(server), server.pool
    server.pool = LossyPool(setup, {2})
    with pytest.raises(QuorumError):
        server.run_round()
    assert kept_of(server) == before
    server.pool = pool
    server.run_round()
    assert kept_of(server) == kept_of(whole)


def test_statistics_leave_the_buffer_by_age(setup):
    options = (*SERVER_STEP, "federation.cohort_size=2", "experiment.seed=5")
    kept, _ = run(reconfigured(setup, *options), 4)
    young, _ = run(reconfigured(setup, *options, "feda2v.generator_buffer_age=1"), 4)
    assert kept.state.buffer.seen is None
    assert set(young.state.buffer.seen.tolist()) == {3, 4}
    assert len(young.state.buffer) < len(kept.state.buffer)
    # As long as nothing is too old, nothing changes.
    long = run(reconfigured(setup, *options, "feda2v.generator_buffer_age=4"), 4)[0]
    assert digest(long.state.adapter) == digest(kept.state.adapter)
    sizes = {
        digest_after(reconfigured(setup, *options, "feda2v.generator_buffer_age=1", f"resources.block_size={size}"), 4)
        for size in (1, 2, 8)
    }
    assert sizes == {digest(young.state.adapter)}


def test_a_bounded_sample_of_statistics_does_not_depend_on_order_or_blocks(setup):
    options = (*SERVER_STEP, "feda2v.statistics_rows=3")
    bounded = reconfigured(setup, *options)
    server, _ = run(bounded, 2)
    assert len(server.state.buffer) <= 2 * 3
    assert digest(server.state.adapter) != digest_after(reconfigured(setup, *SERVER_STEP), 2)
    backwards = ReorderedPool(bounded, lambda updates, number: updates[::-1])
    assert digest_after(bounded, 2, pool=backwards) == digest(server.state.adapter)
    for block_size in (1, 8):
        other = reconfigured(setup, *options, f"resources.block_size={block_size}")
        assert digest_after(other, 2) == digest(server.state.adapter)


def test_weights_count_where_clients_are_unequal(setup):
    plain, weighted = (
        digest_after(reconfigured(setup, NO_STEP, f"feda2v.adapter_aggregation_mode={mode}"), 1)
        for mode in ("avg", "weighted")
    )
    assert plain != weighted


def test_a_federation_of_one_client_is_local_training(setup):
    # Both averages leave the one client's own tensors, up to the rounding of global + (local - global).
    alone = only_client(reconfigured(setup, NO_STEP), 3)
    start = make_server(alone).state.adapter
    own = reconfigured(alone, NO_STEP, "feda2v.adapter_aggregation_mode=none")
    (row,) = BlockTrainer(own, CPU).train(block_of(0), Broadcast(1, 7, start)).updates
    local = unflatten_state(torch.from_numpy(row), start)
    for mode in ("avg", "weighted"):
        server, _ = run(reconfigured(alone, NO_STEP, f"feda2v.adapter_aggregation_mode={mode}"), 1)
        for name, tensor in server.state.adapter.items():
            torch.testing.assert_close(tensor, local[name], atol=1e-6, rtol=1e-6)


def test_none_keeps_clients_apart_and_equal_to_training_alone(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none")
    server, results = run(setup)
    kept, start = kept_of(server), initial_state(setup, build_parts(setup, CPU))
    assert sorted(kept) == list(range(7))
    assert len(set(kept.values())) == 7
    assert digest(server.state.adapter) == digest(start)
    trainer = BlockTrainer(setup, CPU)
    for client in range(7):
        own = flatten_state(start).numpy()[None]
        for number in range(1, 5):
            own = trainer.train(block_of(client, own=own), Broadcast(number, 7, start)).updates
        assert own.tobytes() == kept[client]
    # Client 0 keeps its number, and so its random streams, in a federation of its own.
    alone, _ = run(only_client(setup, 0))
    assert kept_of(alone) == {0: kept[0]}
    last = results[-1].metrics
    assert 0 <= last["eval/top1_personal_worst10"] <= last["eval/top1_personal"] <= 1


def test_none_keeps_the_tensors_of_clients_that_are_not_sampled(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none", "federation.cohort_size=3")
    server = make_server(setup)
    for _ in range(4):
        before = kept_of(server)
        cohort = set(server._sample_cohort(server.state.round_number + 1).tolist())
        server.run_round()
        after = kept_of(server)
        assert all((after[client] == before[client]) == (client not in cohort) for client in before)
        assert set(after) == set(before) | cohort


def test_none_with_a_server_step_trains_the_global_adapter_alone(setup):
    setup = reconfigured(setup, *SERVER_STEP, "feda2v.adapter_aggregation_mode=none")
    server, _ = run(setup, 2)
    plain, _ = run(reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none"), 2)
    assert digest(server.state.adapter) != digest(plain.state.adapter)
    assert kept_of(server) == kept_of(plain)


@pytest.mark.parametrize("kind", ["replay", "gaussian", "cof", "vae", "vae_plain", "multimodal", "gan", "cgan"])
def test_every_generator_reaches_the_adapters(setup, kind):
    with_it, without = (
        run(reconfigured(setup, *SERVER_STEP, f"feda2v.generator_type={kind}", f"feda2v.use_generator={use}"), 1)
        for use in ("true", "false")
    )
    assert digest(with_it[0].state.adapter) != digest(without[0].state.adapter)
    assert "server/generator_loss" in with_it[1][0].metrics
    assert "server/generator_loss" not in without[1][0].metrics
    assert "server/adapter_finetuning_loss" in without[1][0].metrics


def test_a_generator_that_is_not_asked_for_is_announced(setup, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        make_server(reconfigured(setup, *SERVER_STEP, "feda2v.use_generator=false"))
    assert "generator not initialised: feda2v.use_generator is false" in caplog.text


def test_losses_are_logged_in_the_originals_words(setup, caplog):
    with caplog.at_level(logging.INFO, logger="fedsim"):
        run(setup, 1)
    assert "Class 'dog': VAE Loss=" in caplog.text
    assert "Generator training completed. Average loss: " in caplog.text
    assert "Adapter fine-tuning completed. Average loss: " in caplog.text


def test_a_generator_that_has_no_loss_says_so(setup, caplog):
    with caplog.at_level(logging.INFO, logger="fedsim"):
        run(reconfigured(setup, *SERVER_STEP, "feda2v.generator_type=gaussian"), 1)
    assert "Generator training completed: gaussian is fitted to class statistics, without a loss" in caplog.text


def test_metrics_of_a_round(setup):
    _, (result, *_) = run(setup, 1)
    wanted = {"server/generator_loss", "server/adapter_finetuning_loss", "train/loss", "clients/per_second"}
    wanted |= {f"eval/{name}{end}" for end in ("", "_averaged") for name in ("top1", "nmse_clip", "nmse_t5", "margin")}
    wanted |= {"client/acc_mean", "client/acc_worst10", "server/generator_kl", "server/refinement_kept"}
    assert wanted <= result.metrics.keys()
    assert all(np.isfinite(list(result.metrics.values())))
    assert result.cohort_size == 7
    assert result.lost == ()
    assert set(result.seconds) == {"train", "aggregate", "generate", "refine", "evaluate", "quality"}


def test_local_training_helps_and_the_numbers_say_so(setup):
    _, results = run(reconfigured(setup, NO_STEP, "federation.local_epochs=5"), 3)
    for result in results:
        assert result.metrics["train/loss_after"] < result.metrics["train/loss_before"]
    assert results[-1].metrics["train/loss_before"] < results[0].metrics["train/loss_before"]


def test_without_a_server_step_nothing_comes_between_averaging_and_evaluation(setup):
    _, results = run(reconfigured(setup, NO_STEP), 2)
    for result in results:
        for name in ("top1", "nmse_clip", "nmse_t5", "margin"):
            assert result.metrics[f"eval/{name}"] == result.metrics[f"eval/{name}_averaged"]
        assert not any(name.startswith("server/") for name in result.metrics)


def test_a_round_is_evaluated_when_due_and_at_the_end(setup):
    _, results = run(reconfigured(setup, NO_STEP, "experiment.evaluate_every=3"))
    assert ["eval/top1" in r.metrics for r in results] == [False, False, True, True]
    assert ["evaluate" in r.seconds for r in results] == [False, False, True, True]
    own = {"train/loss_before", "train/loss_after", "train/accuracy_before", "train/accuracy_after"}
    assert [own & r.metrics.keys() for r in results] == [set(), set(), own, own]
    assert all(np.isfinite(list(r.metrics.values())).all() for r in results)
    assert all("train/loss" in r.metrics for r in results)


def test_bytes_are_those_of_adapters_and_statistics(setup):
    plain = reconfigured(setup, *SERVER_STEP)
    server, (result,) = run(plain, 1)
    adapter = 4 * sum(t.numel() for t in server.state.adapter.values())
    counts = plain.partition.class_counts_of(np.arange(7), plain.labels, 4)
    pairs = int((counts >= 2).sum())
    assert pairs > 0
    # numbers of client, class and count; mean and variance [4, 32]; outputs 16 and 4 x 16
    row = 3 * 8 + 4 * (2 * 4 * 32 + 16 + 4 * 16)
    # A basis of four directions of 4 x 32 numbers comes down, products with it, variances and one number go up.
    assert result.bytes_down == 7 * (adapter + 4 * 4 * 4 * 32)
    assert result.bytes_up == 7 * (adapter + 4 * (4 * 4 * 32 + 4 * 32 + 1)) + pairs * row
    _, (lean,) = run(reconfigured(plain, *SERVER_STEP, "privacy.share_variances=false"), 1)
    assert result.bytes_up - lean.bytes_up == pairs * 4 * 4 * 32
    # Without a server step nobody asks for statistics.
    _, (none,) = run(reconfigured(plain, NO_STEP), 1)
    assert none.bytes_up == none.bytes_down == 7 * adapter


def test_blocks_are_the_ordered_cohort_cut_into_pieces():
    blocks = make_blocks(np.array([4, 2, 9, 1, 7]), 2)
    assert [block.index for block in blocks] == [0, 1, 2]
    assert [block.client_ids.tolist() for block in blocks] == [[4, 2], [9, 1], [7]]
    assert all(block.own is None for block in blocks)


def test_lost_clients_are_named_and_left_out_of_the_mean(setup, caplog):
    setup = reconfigured(setup, NO_STEP, "federation.quorum=0.5")
    server = make_server(setup, pool=LossyPool(setup, {1, 3}))
    blocks = make_blocks(server._sample_cohort(1), 2)
    lost = [c for index in (1, 3) for c in blocks[index].client_ids]
    start = server.state.adapter
    with caplog.at_level(logging.WARNING):
        result = server.run_round()
    assert sorted(client.client for client in result.lost) == sorted(lost)
    assert {client.reason for client in result.lost} == {"the network is down"}
    assert result.cohort_size == 7
    for index in (1, 3):
        names = ", ".join(map(str, blocks[index].client_ids))
        assert f"lost {len(blocks[index].client_ids)} clients ({names}): the network is down" in caplog.text
    total, weight = dict.fromkeys(start, 0.0), 0
    for index in (0, 2):
        update = BlockTrainer(setup, CPU).train(blocks[index], Broadcast(1, 7, start))
        total = {name: t + update.delta_sum[name].double() for name, t in total.items()}
        weight += update.weight_sum
    for name, tensor in server.state.adapter.items():
        torch.testing.assert_close(tensor.double(), start[name] + total[name] / weight, atol=1e-6, rtol=1e-6)


def test_too_few_answers_stop_the_round(setup):
    for quorum, needed in ((1.0, 7), (0.8, 6), (0.6, 5)):
        other = reconfigured(setup, *SERVER_STEP, f"federation.quorum={quorum}")
        server = make_server(other, pool=LossyPool(other, {0, 1}))
        state = server.state
        with pytest.raises(QuorumError) as caught:
            server.run_round()
        assert str(caught.value) == f"round 1: 3 of 7 clients answered, federation.quorum asks for {needed}"
        assert server.state is state


def test_a_quorum_that_is_met_exactly_is_met(setup):
    # In floating point 0.55 * 100 is a little more than 55.
    server = make_server(reconfigured(setup, *SERVER_STEP, "federation.quorum=0.55"))
    server._quorum.require(55, 100, 1)
    with pytest.raises(QuorumError, match=r"54 of 100 clients answered, federation.quorum asks for 55"):
        server._quorum.require(54, 100, 1)


def test_nobody_answering_is_never_enough(setup):
    other = reconfigured(setup, *SERVER_STEP, "federation.quorum=0.01")
    with pytest.raises(QuorumError, match=r"round 1: 0 of 7 clients answered, federation.quorum asks for 1"):
        run(other, 1, pool=LossyPool(other, {0, 1, 2, 3}))


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_diverging_client_is_named_with_round_and_phase(setup, epochs):
    wild = (NO_STEP, "training.learning_rate=1e30", "training.clip_norm=0", f"federation.local_epochs={epochs}")
    with pytest.raises(ClientError) as caught:
        run(reconfigured(setup, *wild))
    pattern = (
        r"client [0-6], round 1, phase local training: non-finite update \(loss (nan|inf)\); "
        r"lower training\.learning_rate or set training\.clip_norm"
    )
    assert re.fullmatch(pattern, str(caught.value))


def test_a_bug_in_client_code_names_round_block_and_clients(setup):
    # Tensors of another shape than the data asks for make the client's own code raise.
    start = {name: t[:1] for name, t in make_server(setup).state.adapter.items()}
    with pytest.raises(ClientError, match=r"^local training failed in round 3, block 5, client\(s\) 2: \w+Error: "):
        BlockTrainer(setup, CPU).train(Block(5, np.array([2, 4])), Broadcast(3, 7, start))


def test_cohorts_change_from_round_to_round_and_are_ordered_by_work(setup):
    server = make_server(reconfigured(setup, NO_STEP, "federation.cohort_size=4"))
    cohorts = [server._sample_cohort(number).tolist() for number in range(1, 9)]
    assert all(len(set(cohort)) == 4 for cohort in cohorts)
    assert len(set(map(tuple, cohorts))) > 1
    for cohort in cohorts:
        work = [(-(-int(setup.partition.counts[client]) // 4), client) for client in cohort]
        assert work == sorted(work)


def test_status_tells_phases_and_clients(setup):
    told = []
    server = make_server(setup, status=told.append)
    server.run_round()
    phases = ["train", "aggregate", "generate", "refine", "evaluate", "quality"]
    assert list(dict.fromkeys(s["phase"] for s in told)) == phases
    done = [s["clients_done"] for s in told if "clients_done" in s]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 7)
    assert {s["round"] for s in told} == {1}


def test_aggregators_agree_with_the_configuration(setup):
    for name in AGGREGATORS:
        options = SERVER_STEP if name == "kd" else (NO_STEP,)
        server = make_server(reconfigured(setup, *options, f"feda2v.adapter_aggregation_mode={name}"))
        assert type(server.aggregator) is type(make_aggregator(name))


def test_a_block_halved_because_memory_ran_out_gives_the_same_bits(setup, reference, caplog):
    pool = InProcessPool(setup, CPU)
    stacks = pool._trainer._stacks
    train = stacks.train

    def scarce(data, broadcast, **how):
        if len(data) > 1:
            raise torch.OutOfMemoryError("no memory for several clients")
        return train(data, broadcast, **how)

    stacks.train = scarce
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        halved, _ = run(setup, pool=pool)
    assert digest(halved.state.adapter) == reference[0]
    assert "clients at once in block 0: training fewer" in caplog.text


def test_without_averaging_a_newcomer_starts_where_the_others_did():
    sets = ["feda2v.adapter_aggregation_mode=none", "federation.cohort_size=2", "federation.global_rounds=3"]
    personal = []
    for step in ("true", "false"):
        setup = prepare(tiny_config(*sets, f"feda2v.global_model_train={step}", f"feda2v.use_generator={step}"))
        server, _ = run(setup)
        personal.append(kept_of(server))
    assert len(personal[0]) > 2
    assert personal[0] == personal[1]


def test_the_oracle_draws_recordings_that_clients_hold_and_no_held_out_one(setup, caplog):
    server, _ = run(reconfigured(setup, *SERVER_STEP, "feda2v.generator_type=oracle"), 1)
    assert "generator 'oracle' draws the clients' recordings themselves" in caplog.text
    store = server.parts.store.rows
    held = {row.tobytes() for row in np.delete(store, setup.test_rows, axis=0)}
    labels, rows = server._step.draw(server.state.buffer, 8, "test", 1)
    assert len(labels) == 8 * len(setup.class_names)
    for label, row in zip(labels, rows.numpy(), strict=True):
        assert row.tobytes() in held
        assert setup.labels[(store == row).all(axis=(1, 2))].tolist() == [label]
