"""Sums, noise and masks in rounds: what they leave as it was, what they hide, and what leaks without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import (
    CPU,
    SERVER_STEP,
    LossyPool,
    block_of,
    digest_after,
    hand_made,
    make_server,
    numbers,
    reconfigured,
    run,
)

from fedsim.algorithms.aggregation import Joined, tree_sum
from fedsim.algorithms.privacy import Accountant
from fedsim.algorithms.secure_sum import STEP, opened
from fedsim.errors import ConfigError, QuorumError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.parts import build_parts, rows_of
from fedsim.federation.privacy import public_scales
from fedsim.models.saved import digest

AVG = "feda2v.adapter_aggregation_mode=avg"
SUMS = (*SERVER_STEP, AVG, "feda2v.generator_type=lowrank", "privacy.statistics=sums")
SECURE = (*SUMS, "privacy.secure_sums=true")
NOISE = (*SUMS, "feda2v.generator_type=gaussian", "privacy.noise_multiplier=0.05", "privacy.embedding_norm=4")
KINDS = {"sums": SUMS, "secure": SECURE, "noise": NOISE, "secure noise": (*NOISE, "privacy.secure_sums=true")}


def update_of(setup, *clients: int, number: int = 1):
    """What a block of these clients sends in a round."""
    broadcast = make_server(setup)._broadcast(number)
    if setup.config.privacy.secure_sums:
        broadcast = replace(broadcast, ring=np.arange(setup.partition.num_clients))
    return BlockTrainer(setup, CPU).train(block_of(*clients), broadcast)


def embeddings_of(setup, client: int) -> tuple[torch.Tensor, np.ndarray]:
    """Audio embeddings [n, S, D] and classes [n] of a client."""
    rows, _ = setup.partition.rows_of(np.array([client]))
    return rows_of(build_parts(setup, CPU), rows)[0], setup.labels[rows]


# What stays as it was


@pytest.mark.parametrize("kind", ["sums", "secure", "noise", pytest.param("secure noise", marks=pytest.mark.slow)])
def test_the_size_of_blocks_leaves_no_trace(setup, kind):
    runs = [run(reconfigured(setup, *KINDS[kind], f"resources.block_size={size}"), 2) for size in (1, 2, 8)]
    assert len({digest(server.state.adapter) for server, _ in runs}) == 1
    assert numbers(runs[0][1]) == numbers(runs[1][1]) == numbers(runs[2][1])
    assert len(runs[0][0].state.buffer), "the server step has had statistics"


@pytest.mark.parametrize("kind", ["replay", "gaussian", "lowrank", "full", "residual_vae", "vae", "gan", "cgan"])
def test_every_generator_works_on_sums(setup, kind):
    server, results = run(reconfigured(setup, *SUMS, f"feda2v.generator_type={kind}"), 2)
    assert len(server.state.buffer) == 4
    assert all("server/refinement_kept" in result.metrics for result in results)


def test_a_class_row_is_the_mean_and_variance_of_all_recordings_that_count(setup):
    """Against the recordings themselves; outputs against those of the clients' own rows."""
    server, _ = run(reconfigured(setup, *SUMS), 1)
    each = make_server(reconfigured(setup, *SUMS, "privacy.statistics=clients"))
    rows = BlockTrainer(each.setup, CPU).train(block_of(*range(7)), each._broadcast(1)).stats
    table = server._receiving.stats(server.state.learnt, sums_of_a_round(setup))
    everyone = [embeddings_of(setup, client) for client in range(7)]
    assert table.label.tolist() == sorted(set(rows.label.tolist()))
    for row, label in enumerate(table.label.tolist()):
        own = [x[labels == label] for x, labels in everyone if (labels == label).sum() >= 2]
        x = torch.cat(own).double()
        assert table.count[row] == len(x)
        torch.testing.assert_close(table.audio_mean[row].double(), x.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(table.audio_var[row].double(), x.var(0, correction=0), rtol=1e-3, atol=1e-3)
        mine = np.flatnonzero(rows.label == label)
        count = torch.from_numpy(rows.count[mine]).float()
        for head, outputs in rows.output_mean.items():
            mean = torch.einsum("m,m...->...", count, outputs[mine]) / count.sum()
            torch.testing.assert_close(table.output_mean[head][row], mean, rtol=1e-4, atol=1e-4)


def sums_of_a_round(setup) -> dict[str, torch.Tensor]:
    return update_of(reconfigured(setup, *SUMS), *range(7)).sums


def test_means_add_up_over_rounds_where_cohorts_are_small(setup):
    few = reconfigured(setup, *SUMS, "federation.cohort_size=3")
    server, _ = run(few, 0)
    for number in range(1, 5):
        server.run_round()
        assert float(server.state.learnt.class_sums["rounds"]) == number
    whole = run(reconfigured(setup, *SUMS), 1)[0].state.learnt.class_sums
    assert float(server.state.learnt.class_sums["class_count"].sum()) > float(whole["class_count"].sum())


def test_secure_sums_are_the_plain_sums_to_the_step_of_the_integers(setup):
    plain, secure = (update_of(reconfigured(setup, *kind), *range(7)) for kind in (SUMS, SECURE))
    assert all(tensor.dtype == torch.int64 for tensor in (*secure.delta_sum.values(), *secure.sums.values()))
    assert float(opened(secure.sums["client_weight"].numpy())[0]) == 7
    assert secure.weight_sum == 0, "a block's weights are masked too"
    found = {name: torch.from_numpy(opened(t.numpy())) for name, t in (secure.delta_sum | secure.sums).items()}
    for name, tensor in (plain.delta_sum | plain.sums).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=10 * STEP + 1e-6)


def test_a_lost_client_ends_a_secure_round(setup):
    secure = reconfigured(setup, *SECURE)
    with pytest.raises(QuorumError, match=r"round 1: 2 clients were lost.*secure_sums"):
        make_server(secure, pool=LossyPool(secure, {1})).run_round()


def test_a_lost_client_does_not_end_a_round_with_noise(setup):
    noisy = reconfigured(setup, *NOISE, "federation.quorum=0.5")
    result = make_server(noisy, pool=LossyPool(noisy, {1})).run_round()
    assert len(result.lost) == 2


# Presence


@pytest.mark.parametrize("overrides", [SUMS, SECURE, NOISE], ids=["sums", "secure", "noise"])
def test_messages_have_one_length_whatever_classes_a_client_holds(setup, overrides):
    setup = reconfigured(setup, *overrides)
    held = {len(set(embeddings_of(setup, client)[1].tolist())) for client in range(7)}
    assert len(held) > 1
    sizes = set()
    for client in range(7):
        update = update_of(setup, client)
        assert len(update.stats) == 0
        sizes.add(tuple((name, tuple(t.shape)) for name, t in sorted((update.delta_sum | update.sums).items())))
    assert len(sizes) == 1


def test_a_class_below_the_threshold_is_not_in_a_client_s_sums(setup):
    for client in range(7):
        labels = embeddings_of(setup, client)[1]
        counts = np.bincount(labels, minlength=4)
        sums = update_of(reconfigured(setup, *SUMS), client).sums
        np.testing.assert_array_equal(sums["class_count"].numpy(), np.where(counts >= 2, counts, 0))
        assert not sums["class_total"][counts < 2].any()


# Noise


def test_no_client_counts_for_more_than_the_clip_norms(setup):
    strict = reconfigured(setup, *NOISE, "privacy.clip_update=0.02", "privacy.clip_statistics=0.5")
    scales = public_scales(strict.config, build_parts(strict, CPU))
    for client in range(7):
        update = update_of(strict, client)
        change = torch.cat([t.flatten() for t in update.delta_sum.values()])
        assert 0.0199 < float(change.norm()) < 0.02 * (1 + 1e-5)
        statistics = torch.cat([t.flatten() * scales[name] for name, t in update.sums.items()])
        # The only client without a class of two recordings has nothing to clip.
        assert float(statistics.norm()) < 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("step", [True, False])
def test_noise_is_calibrated_for_both_groups_at_once(setup, step):
    """One mechanism of multiplier z: each group has z * sqrt(groups) * its clip norm, in its own units."""
    wanted = NOISE if step else (*NOISE, "feda2v.global_model_train=false", "feda2v.use_generator=false")
    server = make_server(reconfigured(setup, *wanted, "privacy.noise_multiplier=3"))
    zeros = {"a": torch.zeros(40_000)}
    sums = {"class_total": torch.zeros(40_000), "class_count": torch.zeros(40_000)} if step else {}
    joined, noisy = server._receiving.read(Joined(zeros, 5.0), sums, 1)
    each = 3 * (2 if step else 1) ** 0.5
    assert joined.weight_sum == 7, "the denominator doesn't tell who came"
    assert float(joined.delta_sum["a"].std()) == pytest.approx(each * 1.0, rel=0.02)
    if step:
        assert float(noisy["class_total"].std()) == pytest.approx(each * 4 * 4, rel=0.02)
        assert float(noisy["class_count"].std()) == pytest.approx(each * 4, rel=0.02)


def test_epsilon_is_in_every_round_and_is_the_accountant_s(setup):
    server, results = run(reconfigured(setup, *NOISE, "privacy.noise_multiplier=2"), 3)
    accountant = Accountant(2.0, 1.0, 7**-1.1)
    assert [r.metrics["privacy/epsilon"] for r in results] == [accountant.epsilon(n) for n in (1, 2, 3)]
    promised = server.guarantee()
    assert promised["epsilon"] == accountant.epsilon(3)
    assert promised["delta"] == pytest.approx(7**-1.1)
    without, results = run(reconfigured(setup, *SUMS), 1)
    assert "privacy/epsilon" not in results[0].metrics
    assert without.guarantee()["epsilon"] is None
    assert "none" in without.guarantee()["guarantee"]


def test_a_target_is_kept_at_the_end_of_the_run(setup):
    target = (*SUMS, "feda2v.generator_type=gaussian", "privacy.target_epsilon=8", "privacy.delta=0.001")
    server = make_server(reconfigured(setup, *target))
    assert 7.9 < server._receiving.metrics(4)["privacy/epsilon"] <= 8


def test_noise_changes_with_the_seed(setup):
    assert digest_after(reconfigured(setup, *NOISE), 2) != digest_after(
        reconfigured(setup, *NOISE, "experiment.seed=8"), 2
    )


def test_noise_with_sampling_draws_the_size_of_cohorts_and_asks_for_enough(setup):
    with pytest.raises(ConfigError, match=r"cohort_size is 3 with privacy noise.*at least 20"):
        make_server(reconfigured(setup, *NOISE, "federation.cohort_size=3"))
    rows = np.concatenate([setup.partition.rows] * 10)
    many = np.array_split(rows, 60)
    large = replace(
        reconfigured(setup, *NOISE, "federation.num_clients=60", "federation.cohort_size=30"),
        partition=type(setup.partition)(
            np.concatenate([[0], np.cumsum([len(own) for own in many])]), np.concatenate(many)
        ),
    )
    server = make_server(large)
    sizes = [len(server._sample_cohort(number)) for number in range(1, 400)]
    assert np.mean(sizes) == pytest.approx(30, abs=1)
    assert np.var(sizes) == pytest.approx(15, rel=0.25), "binomial: Poisson sampling"
    assert server._receiving.metrics(1)["privacy/epsilon"] == Accountant(0.05, 0.5, 60**-1.1).epsilon(1)


# What leaks


@pytest.fixture
def lonely(setup, tmp_path):
    """Client 0 holds one dog; client 1 the same rain as before and one more; the others something of everything."""
    stream = np.random.default_rng(0)
    rows = stream.normal(size=(24, 4, 32)).astype(np.float32) + 2
    labels = np.array([0, 1, 1, 1, *np.tile([0, 1, 2, 3], 5)])
    clients = [[0], [1, 2, 3], list(range(4, 14)), list(range(14, 24))]

    def with_(*overrides: str, second: int = 3):
        base = reconfigured(setup, *SUMS, "privacy.min_count=1", *overrides)
        return hand_made(
            base, tmp_path / "store", rows=rows, labels=labels, clients=[[0], [1, 2, 3][:second], *clients[2:]]
        )

    return rows, with_


def test_without_a_threshold_the_mean_of_one_recording_is_the_recording(lonely):
    rows, world = lonely
    stats = update_of(world("privacy.statistics=clients"), 0).stats
    np.testing.assert_array_equal(stats.audio_mean[0].numpy(), rows[0])


def test_two_means_at_n_and_one_more_recordings_give_the_new_one(lonely):
    rows, world = lonely
    before, after = (
        update_of(world("privacy.statistics=clients", second=count), 1).stats.audio_mean[0].numpy() for count in (2, 3)
    )
    np.testing.assert_allclose(3 * after - 2 * before, rows[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistics", ["clients", "sums"])
def test_a_plain_message_tells_the_classes_of_its_client(lonely, statistics):
    """Sums alone have one length, but not one content: a block of one client is its client."""
    rows, world = lonely
    update = update_of(world(f"privacy.statistics={statistics}"), 0)
    if statistics == "clients":
        assert update.stats.label.tolist() == [0]
    else:
        assert update.sums["class_count"].tolist() == [1, 0, 0, 0]
        np.testing.assert_allclose(update.sums["class_total"][0].numpy(), rows[0], rtol=1e-5)


def test_a_secure_message_is_noise_to_the_same_attacks(lonely):
    """The server's reconstruction from one message is unrelated to the recording, and all classes look alike."""
    rows, world = lonely
    update = update_of(world("privacy.secure_sums=true"), 0)
    found = opened(update.sums["class_total"].numpy())
    assert abs(np.corrcoef(found[0].ravel(), rows[0].ravel())[0, 1]) < 0.3
    assert (np.abs(found) > 1e6).mean(axis=(1, 2)).min() > 0.9, "no class stands out by zeros"
    assert (np.abs(found).mean(axis=(1, 2)) > 1e8).all()
    assert (np.abs(opened(update.sums["class_count"].numpy())) > 1e3).all()
    bits = update.sums["class_total"].numpy().view(np.uint64).ravel().astype(np.float64) / 2.0**64
    counts = np.histogram(bits, bins=8, range=(0, 1))[0]
    assert ((counts - len(bits) / 8) ** 2 / (len(bits) / 8)).sum() < 30, "chi square, 7 degrees of freedom: p = 1e-4"
    changes = np.concatenate([t.numpy().ravel() for t in update.delta_sum.values()]).view(np.uint64)
    assert 0.45 < float((changes >> np.uint64(63)).mean()) < 0.55


def test_the_secure_sum_of_all_is_the_sum_and_less_than_all_is_noise(lonely):
    _, world = lonely
    setup = world("privacy.secure_sums=true")
    messages = [update_of(setup, client).sums["class_count"] for client in range(4)]
    plain = [update_of(world(), client).sums["class_count"] for client in range(4)]
    np.testing.assert_array_equal(opened(sum(messages).numpy()), tree_sum(torch.stack(plain)).numpy())
    assert (np.abs(opened(sum(messages[1:]).numpy())) > 1e3).all(), "sums with and without a client don't give it away"


def test_with_noise_a_recording_can_not_be_told_from_two_sums(lonely):
    """Even from the cohort's sums with and without client 0: the error is that of the noise, larger than the row."""
    rows, world = lonely
    noise = (
        "feda2v.generator_type=gaussian",
        "privacy.noise_multiplier=1",
        "privacy.embedding_norm=22",
        "privacy.clip_statistics=1.5",
    )
    setup = world(*noise)
    receiving = make_server(setup)._receiving
    released = []
    for number, clients in enumerate([(0, 1, 2, 3), (1, 2, 3)], start=1):
        update = update_of(setup, *clients)
        released.append(receiving.read(Joined(update.delta_sum, 4.0), update.sums, number)[1]["class_total"][0])
    found = (released[0] - released[1]).numpy()
    error = np.linalg.norm(found - rows[0]) / np.linalg.norm(rows[0])
    # Two draws of z * sqrt(2) * clip * length on every one of 128 numbers: sqrt(2 * 128) * 1.41 * 1.5 * 22 / 25.
    assert error > 20
    assert abs(np.corrcoef(found.ravel(), rows[0].ravel())[0, 1]) < 0.3


@pytest.mark.parametrize("clients", [1, 2])
def test_a_secure_sum_of_one_or_two_clients_is_refused(setup, clients):
    with pytest.raises(ConfigError, match=f"secure_sums is true with cohorts of {clients}.*at least 3"):
        make_server(reconfigured(setup, *SECURE, f"federation.cohort_size={clients}"))


def test_masked_changes_are_counted_at_eight_bytes(setup):
    plain, secure = (run(reconfigured(setup, *kind), 1)[1][0].bytes_up for kind in (SUMS, SECURE))
    weights = 7 * 8  # every client's own weight is masked too
    assert secure == 2 * plain + weights


def test_a_large_delta_is_named(setup, caplog):
    make_server(reconfigured(setup, *NOISE))
    assert "privacy.delta is 0.118" in caplog.text
