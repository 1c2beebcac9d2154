"""Generators against a known mixture, resume to the bit, the VAE's losses by hand, and messages."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsim.errors import ConfigError, ModelError
from fedsim.models.generators import KINDS, Evidence, FitReport, GeneratorSpec, make_generator
from fedsim.models.generators.granular import class_groups
from fedsim.models.generators.residual_vae import init
from fedsim.models.generators.rows import class_draws, moments
from fedsim.models.generators.vae import Vae
from fedsim.seeding import normal, rng
from fedsim.types import ClassStats, PooledCovariance

C, S, D, V = 3, 2, 4, 5
LEARNT = ("vae", "vae_plain", "multimodal", "flow", "gan", "cgan")
MODES = {
    "vae_plain per class": ("vae_plain", {"groups": ((0,), (1,), (2,))}),
    "flow per class": ("flow", {"groups": ((0,), (1,), (2,))}),
    "vae per group": ("vae", {"groups": ((0, 2), (1,))}),
    "vae growing": ("vae", {"growth": 0.5}),
    "cgan per class": ("cgan", {"groups": ((0,), (1,), (2,))}),
}
CASES = (*KINDS, *MODES)
"""Kinds, and kinds with options."""
MEANS = 2.0 * torch.randn(C, S, D, generator=torch.Generator().manual_seed(0)) + 5.0
VARIANCES = 0.2 + torch.rand(C, S, D, generator=torch.Generator().manual_seed(1))
CONDITION = torch.randn(C, V, generator=torch.Generator().manual_seed(2))
SPEC = GeneratorSpec(
    seed=3, hidden_dim=32, latent_dim=6, learning_rate=3e-3, batch_size=32, rows_per_class=64, total_epochs=40
)


def federation(num_clients: int = 12, *, seed: int = 0, share_variances: bool = True) -> ClassStats:
    """Class statistics of clients that hold 2 to 20 recordings of every class of the mixture."""
    stream = np.random.default_rng(seed)
    columns = []
    for client in range(num_clients):
        for label in range(C):
            n = int(stream.integers(2, 20))
            rows = MEANS[label] + VARIANCES[label].sqrt() * normal(stream, n, S, D)
            columns.append((client, label, n, rows.mean(0), rows.var(0, unbiased=False)))
    client, label, count, mean, variance = zip(*columns, strict=True)
    return ClassStats(
        np.array(client),
        np.array(label),
        np.array(count),
        torch.stack(mean),
        torch.stack(variance) if share_variances else None,
        {},
    )


POOLED = PooledCovariance(0.3 * torch.randn(S * D, 2), VARIANCES.mean(0).flatten() - 0.1, 300.0)


def evidence(stats: ClassStats, condition=CONDITION, pooled: PooledCovariance | None = None) -> Evidence:
    """With outputs of two heads that go with the audio embeddings, as kinds that use them ask for."""
    x = stats.audio_mean.flatten(1)
    return Evidence(stats, condition, pooled, {"clip": 3 * x[:, :5] + 1, "t5": x - x.flip(1)})


def make(case: str, spec: GeneratorSpec = SPEC):
    kind, options = MODES.get(case, (case, {}))
    return make_generator(kind, replace(spec, **options))


def fitted(kind: str, *, epochs: int = 40, spec: GeneratorSpec = SPEC, stats: ClassStats | None = None):
    generator = make(kind, spec)
    if kind == "residual_vae":  # clients train it: as it starts
        generator.take(init(POOLED, hidden_dim=16, latent_dim=3, seed=0), POOLED.variance.sqrt())
    generator.fit(evidence(stats or federation(), CONDITION, POOLED), epochs=epochs, stream=rng(0, "test"))
    return generator


@pytest.fixture(scope="module")
def trained():
    """Every kind, fitted once; a GAN circles around its goal with larger steps."""
    slower = GeneratorSpec(**{**SPEC.__dict__, "learning_rate": 1e-3})
    return {kind: fitted(kind, spec=slower if "gan" in kind else SPEC) for kind in CASES}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(("n", "conditions"), [(1, 1), (5, 1), (5, 5)])
def test_samples_have_the_shape_asked_for(trained, kind, n, conditions):
    x = trained[kind].sample(CONDITION[[0, 1, 2, 1, 0][:conditions]], n, stream=rng(0, "x"))
    assert x.shape == (n, S, D)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert not x.requires_grad


@pytest.mark.parametrize("kind", [case for case in CASES if case not in ("replay", "oracle")])
def test_samples_are_distinct(trained, kind):
    x = trained[kind].sample(CONDITION[:1], 50, stream=rng(0, "x"))
    assert len(torch.unique(x.flatten(1), dim=0)) == 50


@pytest.mark.parametrize("kind", CASES)
def test_one_class_with_one_row_is_enough(kind):
    stats = ClassStats(np.array([4]), np.array([1]), np.array([3]), MEANS[1:2], VARIANCES[1:2], {})
    x = fitted(kind, epochs=2, stats=stats).sample(CONDITION[1:2], 4, stream=rng(0, "x"))
    assert x.shape == (4, S, D)
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("kind", [*LEARNT, *MODES])
def test_batches_of_one_row_are_batches(kind):
    spec = replace(SPEC, batch_size=1, rows_per_class=2)
    x = fitted(kind, epochs=1, spec=spec, stats=federation(2)).sample(CONDITION[:1], 2, stream=rng(0, "x"))
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("kind", [*LEARNT, *MODES])
def test_means_that_are_not_finite_are_refused(kind):
    stats = federation(3)
    stats.audio_mean[0, 0, 0] = math.nan
    with pytest.raises(ModelError, match="the loss is nan"):
        fitted(kind, epochs=1, stats=stats)


@pytest.mark.parametrize("kind", CASES)
def test_one_condition_for_all_equals_that_condition_repeated(trained, kind):
    one = trained[kind].sample(CONDITION[1:2], 6, stream=rng(0, "x"))
    many = trained[kind].sample(CONDITION[[1] * 6], 6, stream=rng(0, "x"))
    assert torch.equal(one, many)


@pytest.mark.parametrize("kind", CASES)
def test_other_conditions_give_other_rows(trained, kind):
    samples = [trained[kind].sample(CONDITION[label : label + 1], 8, stream=rng(0, "x")) for label in range(C)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isclose(samples[one], samples[other]).all(dim=(1, 2)).any()
        # Not noise alone: the distance is about that of the class means.
        assert (samples[one] - samples[other]).mean(0).norm() > 0.5 * (MEANS[one] - MEANS[other]).norm()


@pytest.mark.parametrize("kind", CASES)
def test_a_sample_is_a_function_of_its_stream(trained, kind):
    first, again, other = (trained[kind].sample(CONDITION, C, stream=rng(0, key)) for key in ("x", "x", "y"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) or kind == "replay"


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_recovers_the_class_means_of_a_known_mixture(trained, kind):
    for label in range(C):
        x = trained[kind].sample(CONDITION[label : label + 1], 2000, stream=rng(0, "mean", label))
        error = (x.mean(0) - MEANS[label]) / VARIANCES[label].sqrt()
        # Class means lie 2 to 4 within-class deviations apart, and the statistics know them to 0.09 deviations
        # (about 130 recordings).
        assert error.square().mean().sqrt() < {"vae": 0.4, "gan": 1.0}.get(kind, 0.2)


@pytest.mark.parametrize(
    "kind", ["gaussian", "cof", "vae", "vae_plain", "vae_plain per class", "multimodal", "flow", "cgan"]
)
def test_kinds_with_a_spread_recover_that_of_a_known_mixture(trained, kind):
    for label in range(C):
        x = trained[kind].sample(CONDITION[label : label + 1], 2000, stream=rng(0, "spread", label))
        ratio = x.var(0) / VARIANCES[label]
        assert 0.7 < ratio.mean() < 1.5
        if kind in ("gaussian", "cof"):
            assert ratio.min() > 0.3
            assert ratio.max() < 2.0


def correlated(label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance [S * D, S * D] of a class whose coordinates go together."""
    axes = 1.2 * torch.randn(S * D, 2, generator=torch.Generator().manual_seed(5))
    return MEANS[label].flatten(), axes @ axes.T + 0.2 * torch.eye(S * D)


@pytest.mark.parametrize(
    ("kind", "worst", "away"),
    [
        ("lowrank", 0.15, 0.1),
        ("full", 0.15, 0.1),
        ("gaussian", None, 0.1),
        pytest.param("vae", 0.15, 0.1, marks=pytest.mark.slow),
        pytest.param("vae_plain", 0.15, 0.1, marks=pytest.mark.slow),
        pytest.param("multimodal", 0.2, 0.1, marks=pytest.mark.slow),
        pytest.param("flow", 0.15, 0.1, marks=pytest.mark.slow),
        pytest.param("vae growing", 0.15, 0.1, marks=pytest.mark.slow),
        # A third of the steps for each of three networks: 0.28.
        pytest.param("vae_plain per class", 0.35, 0.1, marks=pytest.mark.slow),
        pytest.param("gan", 0.4, 0.4, marks=pytest.mark.slow),
        pytest.param("cgan", 0.2, 0.1, marks=pytest.mark.slow),
    ],
)
def test_the_covariance_of_a_correlated_mixture_is_recovered(kind, worst, away):
    stream, columns, scatter, freedom = np.random.default_rng(0), [], torch.zeros(S * D, S * D), 0
    for client in range(12):
        for label in range(C):
            (mean, covariance), n = correlated(label), int(stream.integers(30, 60))
            rows = mean + normal(stream, n, S * D) @ torch.linalg.cholesky(covariance).T
            apart = rows - rows.mean(0)
            scatter, freedom = scatter + apart.T @ apart, freedom + n - 1
            columns.append((client, label, n, rows.mean(0).view(S, D), rows.var(0, unbiased=False).view(S, D)))
    clients, labels, counts, means, variances = zip(*columns, strict=True)
    stats = ClassStats(
        np.array(clients), np.array(labels), np.array(counts), torch.stack(means), torch.stack(variances), {}
    )
    rank = S * D if kind == "full" else 2
    values, vectors = torch.linalg.eigh(scatter / freedom)
    factor = vectors[:, -rank:] * values[-rank:].sqrt()
    left = ((scatter / freedom).diagonal() - factor.square().sum(1)).clamp(min=0)
    spec = GeneratorSpec(
        seed=3, hidden_dim=64, latent_dim=8, learning_rate=2e-3, rows_per_class=128, total_epochs=300, rows="lowrank"
    )
    generator = make(kind, spec)
    pooled = PooledCovariance(factor, left, float(freedom))
    generator.fit(evidence(stats, CONDITION, pooled), epochs=300, stream=rng(0, "test"))
    for label in range(C):
        x = generator.sample(CONDITION[label : label + 1], 20_000, stream=rng(0, "x", label)).flatten(1)
        mean, covariance = correlated(label)
        error = float((torch.cov(x.T) - covariance).norm() / covariance.norm())
        # Diagonal variances miss how coordinates go together.
        assert error > 0.5 if worst is None else error < worst
        shift = (x.mean(0) - mean) / covariance.diagonal().sqrt()
        assert float(shift.square().mean().sqrt()) < away


def test_gaussian_keeps_every_coordinates_variance():
    stats = ClassStats(np.array([0]), np.array([1]), np.array([9]), MEANS[1:2], VARIANCES[1:2], {})
    x = fitted("gaussian", stats=stats).sample(CONDITION[1:2], 20_000, stream=rng(0, "x"))
    torch.testing.assert_close(x.mean(0), MEANS[1], atol=0.03, rtol=0)
    torch.testing.assert_close(x.var(0), VARIANCES[1], atol=0, rtol=0.05)


def test_replay_returns_client_means_only_drawn_by_count():
    stats = federation(4)
    x = fitted("replay", stats=stats).sample(CONDITION[1:2], 4000, stream=rng(0, "x"))
    mine = np.flatnonzero(stats.label == 1)
    hits = (x.flatten(1).unsqueeze(1) == stats.audio_mean[mine].flatten(1)).all(2)
    assert hits.sum(1).tolist() == [1] * 4000
    shares = stats.count[mine] / stats.count[mine].sum()
    np.testing.assert_allclose(hits.double().mean(0).numpy(), shares, atol=0.03)


def test_cof_is_unbiased_over_simulated_federations():
    estimates = []
    for seed in range(300):
        generator = make_generator("cof", SPEC)
        generator.fit(
            evidence(federation(5, seed=seed, share_variances=False), CONDITION), epochs=1, stream=rng(0, "x")
        )
        estimates.append(generator.state()["audio_var"])
    # Classes are shrunk towards each other, so it is their mean that has no bias: standard error about 1.5 %.
    ratio = torch.stack(estimates).mean((0, 1)) / VARIANCES.mean(0)
    torch.testing.assert_close(ratio, torch.ones(S, D), atol=0.07, rtol=0)


def test_cof_tells_classes_apart_when_there_are_many_clients():
    generator = make_generator("cof", SPEC)
    report = generator.fit(evidence(federation(3000, share_variances=False), CONDITION), epochs=1, stream=rng(0, "x"))
    torch.testing.assert_close(generator.state()["audio_var"], VARIANCES, atol=0, rtol=0.15)
    assert report.metrics == {"degrees_of_freedom": 3 * 2999}


def test_cof_by_hand():
    stats = ClassStats(np.array([0, 1]), np.array([0, 0]), np.array([2, 6]), torch.tensor([[[1.0]], [[5.0]]]), None, {})
    generator = make_generator("cof", SPEC)
    generator.fit(evidence(stats, CONDITION[:1]), epochs=1, stream=rng(0, "x"))
    # mean (2 * 1 + 6 * 5) / 8 = 4; spread 2 * 9 + 6 * 1 = 24 with one degree of freedom, alone its own pool
    assert generator.state()["audio_mean"].item() == 4.0
    assert generator.state()["audio_var"].item() == 24.0


@pytest.mark.parametrize(
    ("kind", "stats", "message"),
    [
        ("gaussian", federation(share_variances=False), "got no variances"),
        ("cof", federation(1), "found no class on two clients"),
    ],
)
def test_a_kind_that_can_only_replay_says_so(kind, stats, message, caplog):
    with caplog.at_level(logging.WARNING):
        generator = fitted(kind, stats=stats)
    assert message in caplog.text
    x = generator.sample(CONDITION[:1], 3, stream=rng(0, "x"))
    known = stats.audio_mean[torch.from_numpy(stats.label == 0)]
    assert all((known == row).all(dim=(1, 2)).any() for row in x)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("share_variances", [True, False])
def test_a_resumed_generator_goes_on_to_the_bit(kind, share_variances):
    first = fitted(kind, epochs=2, stats=federation(share_variances=share_variances))
    second = make(kind)
    # Copies, as a file gives them back: nothing may hang on shared memory.
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    later = federation(seed=1, share_variances=share_variances)
    reports = [g.fit(evidence(later, CONDITION, POOLED), epochs=2, stream=rng(1, "test")) for g in (first, second)]
    assert reports[0] == reports[1]
    one, other = first.state(), second.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    samples = [g.sample(CONDITION, C, stream=rng(0, "x")) for g in (first, second)]
    assert torch.equal(*samples)


@pytest.mark.parametrize("kind", CASES)
def test_a_state_is_a_snapshot(kind):
    generator = fitted(kind, epochs=1)
    taken = generator.state()
    kept = {name: tensor.clone() for name, tensor in taken.items()}
    generator.fit(evidence(federation(seed=5), CONDITION), epochs=2, stream=rng(9, "test"))
    assert all(torch.equal(taken[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", CASES)
def test_a_loaded_state_is_not_written_to(kind):
    state = fitted(kind, epochs=1).state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    generator = make(kind)
    generator.load(state)
    generator.fit(evidence(federation(seed=5), CONDITION), epochs=2, stream=rng(9, "test"))
    assert all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", [*LEARNT, "vae_plain per class"])
def test_weights_come_from_the_seed_and_the_global_random_state_stays(kind):
    before = torch.random.get_rng_state()
    one, same = fitted(kind, epochs=1), fitted(kind, epochs=1)
    other = fitted(kind, epochs=1, spec=GeneratorSpec(**{**SPEC.__dict__, "seed": 4}))
    assert torch.equal(before, torch.random.get_rng_state())
    samples = [g.sample(CONDITION, C, stream=rng(0, "x")) for g in (one, same, other)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("kind", CASES)
def test_sampling_before_a_fit_says_what_is_missing(kind):
    generator = make(kind)
    generator.load({})
    assert generator.state() == {}
    with pytest.raises(ModelError, match=r"^generator not initialised: .*feda2v.global_model_train: true"):
        generator.sample(CONDITION, C, stream=rng(0, "x"))


@pytest.mark.parametrize("kind", CASES)
def test_conditions_of_another_width_or_number_are_refused(trained, kind):
    with pytest.raises(ModelError, match=r"incompatible dimensions: .* conditions of width 5, got width 6"):
        trained[kind].sample(torch.zeros(1, V + 1), 4, stream=rng(0, "x"))
    with pytest.raises(ModelError, match=r"4 samples need 1 or 4 conditions \[n, V\], got \[3, 5\]"):
        trained[kind].sample(CONDITION, 4, stream=rng(0, "x"))


@pytest.mark.parametrize("kind", ["vae", "vae per group", "gan", "cgan"])  # vae_plain sees no condition
def test_a_fit_of_another_shape_is_refused(kind):
    generator = fitted(kind, epochs=1)
    with pytest.raises(ModelError, match=r"incompatible dimensions: .*\(2, 4, 5\), got \(2, 4, 6\)"):
        generator.fit(evidence(federation(), torch.zeros(C, V + 1)), epochs=1, stream=rng(0, "x"))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("vae", "VAE training"),
        ("vae_plain", "VAE training"),
        ("multimodal", "VAE "),
        ("flow", "flow "),
        ("gan", "GAN "),
        ("cgan", "CGAN "),
    ],
)
def test_a_diverging_fit_is_stopped(kind, what):
    with pytest.raises(ModelError, match=rf"^{what}.*the loss is (nan|inf).*feda2v\.generator_learning_rate"):
        fitted(kind, spec=GeneratorSpec(**{**SPEC.__dict__, "learning_rate": 1e30}))


def test_unknown_kinds_are_refused():
    with pytest.raises(
        ModelError,
        match=r"unknown generator 'vea'; known: replay, .*, residual_vae, vae, vae_plain, multimodal, flow, gan, cgan",
    ):
        make_generator("vea", SPEC)


@pytest.mark.parametrize("kind", [*LEARNT, *MODES])
def test_a_report_holds_every_class_of_every_epoch(kind):
    report = make(kind).fit(evidence(federation(), CONDITION), epochs=3, stream=rng(0, "x"))
    assert [sorted(epoch) for epoch in report.epochs] == [[0, 1, 2]] * 3
    for parts in report.epochs[-1].values():
        assert all(map(math.isfinite, parts.values()))
        if "vae" in kind or kind == "multimodal":
            assert parts["loss"] == pytest.approx(parts["recon"] + parts["kl"] + parts["sim"])
    assert report.mean_loss == pytest.approx(np.mean([parts["loss"] for parts in report.epochs[-1].values()]))


def test_nothing_trained_has_mean_loss_zero():
    assert FitReport((), {}).mean_loss == 0.0


@pytest.mark.parametrize("kind", ["vae", "gan"])  # cgan has them from the statistics: see test_cgan.py
def test_training_lowers_the_distance_to_the_class_means(kind, trained):
    def distance(generator) -> float:
        x = torch.stack([generator.sample(CONDITION[c : c + 1], 200, stream=rng(0, "x")).mean(0) for c in range(C)])
        return float((x - MEANS).norm())

    assert distance(trained[kind]) < 0.5 * distance(fitted(kind, epochs=1))


@pytest.mark.parametrize(
    ("total", "share", "first"), [(7, 0.5, 4), (10, 0.3, 3), (4, 1.0, 4), (5, 0.01, 1), (1, 0.5, 1)]
)
def test_beta_is_one_from_the_end_of_the_warm_up_on_over_several_fits(total, share, first):
    assert first == max(1, math.ceil(share * total))
    stats, betas = federation(2), []

    def make() -> Vae:
        return Vae(
            GeneratorSpec(0, hidden_dim=4, latent_dim=2, total_epochs=total, beta_warmup=share, rows_per_class=2)
        )

    vae = make()
    for epoch in range(total):
        betas.append(vae.beta)
        vae.fit(evidence(stats, CONDITION), epochs=1, stream=rng(0, "fit", epoch))
        if epoch % 2:  # a resume in between
            state, vae = vae.state(), make()
            vae.load(state)
    assert betas == pytest.approx([min(1.0, (epoch + 1) / first) for epoch in range(total)])
    assert betas.index(1.0) + 1 == first


@pytest.mark.parametrize("novelty", [0.0, 0.2])
def test_a_growing_latent_enters_without_a_jump_and_reaches_its_width(novelty):
    total, latent = 24, 6
    spec = GeneratorSpec(
        0, 16, latent, 3e-3, total_epochs=total, growth=0.5, beta_warmup=0.01, rows_per_class=32, novelty_weight=novelty
    )
    vae, stats, units = Vae(spec), federation(), []
    x, v = torch.randn(200, S * D, generator=torch.Generator().manual_seed(0)), CONDITION[torch.arange(200) % C]
    for epoch in range(total):
        units.append(vae.units)
        report = vae.fit(evidence(stats, CONDITION), epochs=1, stream=rng(0, "fit", epoch))
        assert report.metrics["latent_units"] == units[-1]
        if vae.units > units[-1]:  # the coming epoch has another unit
            after = vae._loss_parts(x, x, v, rng(0, "z"))
            drawn = vae._decode(vae._sampler(), v, rng(0, "prior"))
            vae._epoch -= 1
            before = vae._loss_parts(x, x, v, rng(0, "z"))
            for name, part in after.items():
                torch.testing.assert_close(part, before[name], atol=2e-3, rtol=0)
            assert torch.equal(drawn, vae._decode(vae._sampler(), v, rng(0, "prior")))
            vae._epoch += 1
        if epoch % 5 == 4:  # a resume in between
            state, vae = vae.state(), Vae(spec)
            vae.load(state)
    assert units == [math.ceil(latent * min(1, (epoch + 1) / 12)) for epoch in range(total)]
    assert units.index(latent) + 1 == 11
    mu, _ = vae._encode(x, v)
    # Units that came late have learnt something too.
    assert (vae.state()["network.decoder.0.weight"][:, :latent].norm(dim=0) > 0.05).all()
    assert (mu.std(0) > 0.01).all()


def test_without_growth_the_latent_is_whole_from_the_start():
    assert Vae(SPEC).units == SPEC.latent_dim
    names = (fitted("vae", epochs=2).state(), fitted("vae", epochs=2, spec=replace(SPEC, growth=0.001)).state())
    assert all(torch.equal(names[0][name], names[1][name]) for name in names[0])


def perceptron(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """Linear layers with LeakyReLU 0.2 between them, from a state."""
    layers = sorted({int(key.split(".")[2]) for key in state if key.startswith(f"network.{name}.")})
    for layer in layers:
        x = x @ state[f"network.{name}.{layer}.weight"].T + state[f"network.{name}.{layer}.bias"]
        x = functional.leaky_relu(x, 0.2) if layer != layers[-1] else x
    return x


@pytest.mark.parametrize("calibrated", [False, True])
def test_losses_of_a_batch_by_hand(calibrated):
    scaling = "calibrated" if calibrated else "legacy"
    spec = GeneratorSpec(0, 8, 3, learning_rate=1e-2, rows_per_class=8, total_epochs=8, loss_scaling=scaling)
    vae = Vae(spec)
    vae.fit(evidence(federation(), CONDITION), epochs=2, stream=rng(0, "fit"))
    beta = 3 / 4  # two of the eight epochs are done, the warm-up takes four
    x = torch.randn(4, S * D, generator=torch.Generator().manual_seed(0))
    noisy, v = x + 0.1, CONDITION[[0, 1, 2, 2]]
    parts = vae._loss_parts(x, noisy, v, rng(0, "z"))

    state, eps = vae.state(), normal(rng(0, "z"), 4, 3)
    mu, log_variance = perceptron(state, "encoder", torch.cat([noisy, v], 1)).chunk(2, 1)
    decoded = perceptron(state, "decoder", torch.cat([mu + (log_variance / 2).exp() * eps, v], 1))
    mse = ((decoded - x) ** 2).mean(1)
    kl = -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).sum(1)
    dots = (decoded.view(4, S, D) * x.view(4, S, D)).sum(2)
    cosine = (dots / decoded.view(4, S, D).norm(dim=2) / x.view(4, S, D).norm(dim=2)).mean(1)
    loss = torch.stack(list(parts.values())).sum(0).mean()
    if calibrated:
        size = S * D
        literal = 0.5 * mse.mean().log() + beta * kl.mean() / size + 0.05 * (1 - cosine.mean())
    else:
        literal = mse.mean() + beta * kl.mean() + 0.1 * (1 - cosine.mean())
    torch.testing.assert_close(loss, literal)


def test_the_calibrated_gradient_is_that_of_the_log_of_the_mean_squared_error():
    vae = Vae(GeneratorSpec(0, hidden_dim=8, latent_dim=3, rows_per_class=8))
    vae.fit(evidence(federation(), CONDITION), epochs=1, stream=rng(0, "fit"))
    x, v = torch.randn(6, S * D, generator=torch.Generator().manual_seed(0)), CONDITION[[0, 1, 2, 0, 1, 2]]
    weights = list(vae._network.parameters())
    ours = torch.autograd.grad(vae._loss_parts(x, x, v, rng(0, "z"))["recon"].mean(), weights)
    mu, log_variance = vae._encode(x, v)
    z = mu + (0.5 * log_variance).exp() * normal(rng(0, "z"), 6, 3)
    mse = (vae._network["decoder"](torch.cat([z, v], 1)) - x).square().mean()
    literal = torch.autograd.grad(0.5 * mse.log(), weights)
    for one, other in zip(ours, literal, strict=True):
        torch.testing.assert_close(one, other)


def test_a_collapsed_vae_is_reported(caplog):
    # One class and one row: there is nothing for a latent to tell.
    stats = ClassStats(np.array([0]), np.array([0]), np.array([5]), MEANS[:1], None, {})
    with caplog.at_level(logging.WARNING):
        report = make_generator("vae", SPEC).fit(evidence(stats, CONDITION[:1]), epochs=2, stream=rng(0, "x"))
    assert report.metrics["active_units"] == 0
    assert "the VAE has collapsed: no latent unit is active" in caplog.text


def test_a_vae_that_learns_is_not_reported_as_collapsed(caplog):
    with caplog.at_level(logging.WARNING):
        report = make_generator("vae", SPEC).fit(evidence(federation(), CONDITION), epochs=20, stream=rng(0, "x"))
    assert report.metrics["active_units"] >= 1
    assert not caplog.records


def test_class_draws_weight_clients_by_count_and_classes_equally():
    stats = ClassStats(
        np.array([0, 1, 1]),
        np.array([0, 0, 2]),
        np.array([9, 1, 1]),
        torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
        None,
        {},
    )
    labels, x = class_draws(stats, 1000, rng(0, "x"))
    assert labels.tolist() == [0] * 1000 + [2] * 1000
    assert (x[:1000] == 1.0).double().mean().item() == pytest.approx(0.9, abs=0.03)
    assert (x[1000:] == 3.0).all()


def test_moments_are_those_of_the_mixture():
    stats = federation(40)
    mean, deviation = moments(stats)
    torch.testing.assert_close(mean, MEANS.mean(0), atol=0.1, rtol=0)
    wanted = (MEANS.var(0, unbiased=False) + VARIANCES.mean(0)).sqrt()
    torch.testing.assert_close(deviation, wanted, atol=0, rtol=0.05)


def test_constant_coordinates_stay_finite():
    means = torch.zeros(2, 1, 3)
    means[:, 0, 0] = torch.tensor([-1.0, 1.0])
    stats = ClassStats(np.zeros(2, int), np.arange(2), np.ones(2, int), means, None, {})
    _, deviation = moments(stats)
    assert deviation[0, 0] == 1.0
    assert (deviation[0, 1:] > 0.001).all()
    for kind in LEARNT:
        generator = make_generator(kind, SPEC)
        generator.fit(evidence(stats, CONDITION[:2]), epochs=2, stream=rng(0, "x"))
        x = generator.sample(CONDITION[:2], 2, stream=rng(0, "x"))
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("kind", ["vae", "vae_plain", "flow", "gan", "cgan"])
def test_a_groups_network_learns_the_same_whichever_other_classes_there_are(kind):
    spec = replace(SPEC, groups=((0, 2), (1,)))
    stats = federation()
    alone = stats.take(np.flatnonzero(stats.label == 1))
    states = [fitted(kind, epochs=2, spec=spec, stats=some).state() for some in (stats, alone)]
    mine = [name for name in states[0] if name.startswith("group.1.")]
    assert mine
    assert all(torch.equal(states[0][name], states[1][name]) for name in mine)
    assert not any(name.startswith("group.0.") for name in states[1])
    assert not torch.equal(
        *(
            fitted(kind, epochs=1, spec=replace(spec, groups=groups)).sample(CONDITION, C, stream=rng(0, "x"))
            for groups in ((), ((0,), (1,), (2,)))
        )
    )


def test_a_plain_vae_learns_no_class_means_and_one_per_class_learns_each_spread():
    stats = federation(40)
    wide = stats.label == 1
    spread = torch.where(torch.from_numpy(wide).view(-1, 1, 1), 9.0, 1.0) * stats.audio_var
    stats = replace(stats, audio_var=spread)
    ratios = {}
    for case in ("vae_plain", "vae_plain per class"):
        generator = fitted(case, stats=stats)
        x = [generator.sample(CONDITION[c : c + 1], 2000, stream=rng(0, "x")) for c in (0, 1)]
        ratios[case] = float((x[1].var(0) / x[0].var(0)).mean())
    assert ratios["vae_plain"] == pytest.approx(1.0, abs=0.01)  # one spread, by the same chance
    assert ratios["vae_plain per class"] > 4
    shift = 100.0 * torch.from_numpy(stats.label).view(-1, 1, 1)
    both = (stats, replace(stats, audio_mean=stats.audio_mean + shift))
    x = [fitted("vae_plain", epochs=1, stats=s).sample(CONDITION[2:], 9, stream=rng(0, "x")) for s in both]
    torch.testing.assert_close(x[1] - x[0], torch.full((9, S, D), 200.0), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["dog"], "b": ["rani"]}, "'rani', which isn't a class; nearest: 'rain'"),
        ({"a": ["dog"]}, "leaves out 'rain'"),
    ],
)
def test_groups_hold_every_class(groups, message):
    with pytest.raises(ConfigError, match=message):
        class_groups(groups, ["dog", "rain"])
    assert class_groups({"x": ["rain"], "y": ["dog"]}, ["dog", "rain"]) == ((1,), (0,))


def test_networks_that_had_no_rows_keep_pace_with_the_schedules():
    """With one client a round, most classes are absent from most rounds: beta is that of the run all the same."""
    spec = GeneratorSpec(
        0, hidden_dim=4, latent_dim=4, total_epochs=8, rows_per_class=2, growth=0.5, groups=((0,), (1,), (2,))
    )
    made, stats = make_generator("vae_plain", spec), federation(2)
    reports = [
        made.fit(
            Evidence(stats.take(np.flatnonzero(stats.label == number % 3)), CONDITION, epoch=number),
            epochs=1,
            stream=rng(0, "fit", number),
        )
        for number in range(8)
    ]
    assert [r.metrics["beta"] for r in reports] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [r.metrics["latent_units"] for r in reports] == [1, 2, 3, 4, 4, 4, 4, 4]
