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
    digest_after,
    make_server,
    numbers,
    only_client,
    reconfigured,
    run,
    tiny_config,
)

from fedsim.algorithms.aggregation import make_aggregator
from fedsim.errors import ClientError, QuorumError
from fedsim.federation.blocks import BlockTrainer, make_blocks
from fedsim.federation.parts import build_parts, initial_state
from fedsim.federation.pool import InProcessPool
from fedsim.federation.setup import prepare
from fedsim.models.saved import digest
from fedsim.types import Block, Broadcast

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
        update = trainer.train(Block(0, (client,)), Broadcast(1, 7, start))
        n = len(setup.partition.client(client))
        weight = 1 if mode == "avg" else n
        assert update.weight_sum == weight
        # The update of a block of one is weight * (local - global).
        total = {name: t + update.delta_sum[name].double() for name, t in total.items()}
        weights += weight
    server, _ = run(setup, 1)
    for name, tensor in server.state.adapter.items():
        torch.testing.assert_close(tensor.double(), start[name] + total[name] / weights, atol=1e-6, rtol=1e-6)


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
    local = BlockTrainer(own, CPU).train(Block(0, (0,)), Broadcast(1, 7, start)).personal[0]
    for mode in ("avg", "weighted"):
        server, _ = run(reconfigured(alone, NO_STEP, f"feda2v.adapter_aggregation_mode={mode}"), 1)
        for name, tensor in server.state.adapter.items():
            torch.testing.assert_close(tensor, local[name], atol=1e-6, rtol=1e-6)


def test_none_keeps_clients_apart_and_equal_to_training_alone(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none")
    server, results = run(setup)
    personal, start = server.state.personal, initial_state(setup, build_parts(setup, CPU))
    assert sorted(personal) == list(range(7))
    assert len({digest(own) for own in personal.values()}) == 7
    assert digest(server.state.adapter) == digest(start)
    trainer = BlockTrainer(setup, CPU)
    for client in range(7):
        own = {}
        for number in range(1, 5):
            own = trainer.train(Block(0, (client,), own), Broadcast(number, 7, start)).personal
        assert digest(own[client]) == digest(personal[client])
    # Client 0 keeps its number, and so its random streams, in a federation of its own.
    alone, _ = run(only_client(setup, 0))
    assert digest(alone.state.personal[0]) == digest(personal[0])
    last = results[-1].metrics
    assert 0 <= last["eval/top1_personal_worst10"] <= last["eval/top1_personal"] <= 1


def test_none_keeps_the_tensors_of_clients_that_are_not_sampled(setup):
    setup = reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none", "federation.cohort_size=3")
    server = make_server(setup)
    for _ in range(4):
        before = dict(server.state.personal)
        cohort = set(server._sample_cohort(server.state.round_number + 1).tolist())
        server.run_round()
        for client, own in server.state.personal.items():
            if client in before:
                assert (digest(own) == digest(before[client])) == (client not in cohort)
        assert set(server.state.personal) == set(before) | cohort


def test_none_with_a_server_step_trains_the_global_adapter_alone(setup):
    setup = reconfigured(setup, *SERVER_STEP, "feda2v.adapter_aggregation_mode=none")
    server, _ = run(setup, 2)
    plain, _ = run(reconfigured(setup, NO_STEP, "feda2v.adapter_aggregation_mode=none"), 2)
    assert digest(server.state.adapter) != digest(plain.state.adapter)
    assert {c: digest(own) for c, own in server.state.personal.items()} == {
        c: digest(own) for c, own in plain.state.personal.items()
    }


@pytest.mark.parametrize("kind", ["replay", "gaussian", "cof", "vae", "gan"])
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


def test_metrics_of_a_round(setup):
    _, (result, *_) = run(setup, 1)
    wanted = {"server/generator_loss", "server/adapter_finetuning_loss", "train/loss", "clients/per_second"}
    wanted |= {f"eval/{name}{end}" for end in ("", "_averaged") for name in ("top1", "nmse_clip", "nmse_t5", "margin")}
    wanted |= {"client/acc_mean", "client/acc_worst10", "server/generator_kl", "server/refinement_kept"}
    assert wanted <= result.metrics.keys()
    assert all(np.isfinite(list(result.metrics.values())))
    assert result.cohort_size == 7
    assert result.lost == ()
    assert set(result.seconds) == {"train", "aggregate", "generate", "refine", "evaluate"}


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


def test_bytes_are_those_of_adapters_and_statistics(setup):
    plain = reconfigured(setup, NO_STEP)
    server, (result,) = run(plain, 1)
    adapter = 4 * sum(t.numel() for t in server.state.adapter.values())
    counts = plain.partition.class_counts(plain.labels, 4)
    pairs = int((counts >= 2).sum())
    assert pairs > 0
    # numbers of client, class and count; mean and variance [4, 32]; outputs 16 and 4 x 16
    row = 3 * 8 + 4 * (2 * 4 * 32 + 16 + 4 * 16)
    assert result.bytes_down == 7 * adapter
    assert result.bytes_up == 7 * adapter + pairs * row
    _, (lean,) = run(reconfigured(plain, NO_STEP, "privacy.share_variances=false"), 1)
    assert result.bytes_up - lean.bytes_up == pairs * 4 * 4 * 32


def test_blocks_are_the_ordered_cohort_cut_into_pieces():
    blocks = make_blocks(np.array([4, 2, 9, 1, 7]), 2, {2: {"w": torch.ones(1)}, 5: {"w": torch.ones(1)}})
    assert [block.index for block in blocks] == [0, 1, 2]
    assert [block.client_ids for block in blocks] == [(4, 2), (9, 1), (7,)]
    assert [sorted(block.personal) for block in blocks] == [[2], [], []]


def test_lost_clients_are_named_and_left_out_of_the_mean(setup, caplog):
    setup = reconfigured(setup, NO_STEP, "federation.quorum=0.5")
    server = make_server(setup, pool=LossyPool(setup, {1, 3}))
    blocks = make_blocks(server._sample_cohort(1), 2, {})
    lost = [c for index in (1, 3) for c in blocks[index].client_ids]
    start = server.state.adapter
    with caplog.at_level(logging.WARNING):
        result = server.run_round()
    assert sorted(client.client for client in result.lost) == sorted(lost)
    assert {client.reason for client in result.lost} == {"the network is down"}
    assert result.cohort_size == 7
    for client in lost:
        assert f"lost client {client}: the network is down" in caplog.text
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
    server._require_quorum(55, 100, 1)
    with pytest.raises(QuorumError, match=r"54 of 100 clients answered, federation.quorum asks for 55"):
        server._require_quorum(54, 100, 1)


def test_nobody_answering_is_never_enough(setup):
    other = reconfigured(setup, *SERVER_STEP, "federation.quorum=0.01")
    with pytest.raises(QuorumError, match=r"round 1: 0 of 7 clients answered, federation.quorum asks for 1"):
        run(other, 1, pool=LossyPool(other, {0, 1, 2, 3}))


@pytest.mark.parametrize(("epochs", "phase"), [(3, "local training"), (1, "evaluation after local training")])
def test_a_diverging_client_is_named_with_round_and_phase(setup, epochs, phase):
    # With one epoch of one step the tensors are huge but finite: it shows when the client evaluates them.
    wild = (NO_STEP, "training.learning_rate=1e30", "training.clip_norm=0", f"federation.local_epochs={epochs}")
    with pytest.raises(ClientError) as caught:
        run(reconfigured(setup, *wild))
    pattern = (
        rf"client [0-6], round 1, phase {phase}: non-finite update \(loss (nan|inf)\); "
        r"lower training\.learning_rate or set training\.clip_norm"
    )
    assert re.fullmatch(pattern, str(caught.value))


def test_a_bug_in_client_code_names_round_block_and_clients(setup):
    # Tensors of another shape than the data asks for make the client's own code raise.
    start = {name: t[:1] for name, t in make_server(setup).state.adapter.items()}
    with pytest.raises(ClientError, match=r"^local training failed in round 3, block 5, client\(s\) 2, 4: \w+Error: "):
        BlockTrainer(setup, CPU).train(Block(5, (2, 4)), Broadcast(3, 7, start))


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
    assert list(dict.fromkeys(s["phase"] for s in told)) == ["train", "aggregate", "generate", "refine", "evaluate"]
    done = [s["clients_done"] for s in told if "clients_done" in s]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 7)
    assert {s["round"] for s in told} == {1}


def test_aggregators_agree_with_the_configuration(setup):
    for name in ("avg", "weighted", "none"):
        server = make_server(reconfigured(setup, NO_STEP, f"feda2v.adapter_aggregation_mode={name}"))
        assert type(server.aggregator) is type(make_aggregator(name))


def test_a_block_halved_because_memory_ran_out_gives_the_same_bits(setup, reference, caplog):
    pool = InProcessPool(setup, CPU)
    train_clients = pool._trainer._train_clients

    def scarce(ids, block, broadcast):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("no memory for several clients")
        return train_clients(ids, block, broadcast)

    pool._trainer._train_clients = scarce
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        halved, _ = run(setup, pool=pool)
    assert digest(halved.state.adapter) == reference[0]
    assert "clients at once in block 0: training halves" in caplog.text


def test_without_averaging_a_newcomer_starts_where_the_others_did():
    sets = ["feda2v.adapter_aggregation_mode=none", "federation.cohort_size=2", "federation.global_rounds=3"]
    personal = []
    for step in ("true", "false"):
        setup = prepare(tiny_config(*sets, f"feda2v.global_model_train={step}", f"feda2v.use_generator={step}"))
        server, _ = run(setup)
        personal.append({client: digest(own) for client, own in server.state.personal.items()})
    assert len(personal[0]) > 2
    assert personal[0] == personal[1]
