"""Whole rounds with `kd`: statistics, generator, distillation, refinement, in this order."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from worlds import SERVER_STEP, LossyPool, ReorderedPool, make_server, numbers, reconfigured, run, tiny_config

from fedsim.config.checks import check_config
from fedsim.errors import ConfigError
from fedsim.models.saved import digest

KD = (
    *SERVER_STEP,
    "feda2v.adapter_aggregation_mode=kd",
    "feda2v.kd_epochs=3",
    "feda2v.kd_samples_per_class=8",
    "feda2v.generator_type=lowrank",
)


def test_a_round_distils_from_the_weighted_mean_after_the_generator_is_fit(setup):
    told = []
    server = make_server(reconfigured(setup, *KD), status=told.append)
    seen = []
    step = server._step.run
    server._step.run = lambda averaged, *rest: seen.append(averaged) or step(averaged, *rest)
    result = server.run_round()
    assert list(dict.fromkeys(s["phase"] for s in told))[:5] == ["train", "aggregate", "generate", "distil", "refine"]
    weighted = run(reconfigured(setup, *SERVER_STEP, "feda2v.global_model_train=false"), 1)[0]
    for name, tensor in weighted.state.adapter.items():
        torch.testing.assert_close(seen[0][name], tensor, atol=1e-6, rtol=1e-5)
    metrics = result.metrics
    assert metrics["server/distillation_loss"] < metrics["server/distillation_loss_before"]


@pytest.mark.parametrize("kind", ["replay", "lowrank", "vae", "residual_vae", "cgan"])
def test_every_kind_of_generator_serves(setup, kind):
    server, results = run(reconfigured(setup, *KD, f"feda2v.generator_type={kind}"), 2)
    assert all(np.isfinite(r.metrics["server/distillation_loss"]) for r in results)
    without = run(reconfigured(setup, *KD, f"feda2v.generator_type={kind}", "feda2v.adapter_aggregation_mode=avg"), 2)
    assert digest(server.state.adapter) != digest(without[0].state.adapter)


def test_blocks_and_their_order_leave_no_trace(setup):
    options = (*KD, "federation.cohort_size=5")
    whole, results = run(reconfigured(setup, *options, "resources.block_size=8"), 2)
    for size in (1, 2, 4):
        some = reconfigured(setup, *options, f"resources.block_size={size}")
        other, again = run(some, 2, pool=ReorderedPool(some, lambda updates, n: updates[n:][::-1] + updates[:n]))
        assert digest(other.state.adapter) == digest(whole.state.adapter)
        assert numbers(again) == numbers(results)


def test_lost_clients_teach_nothing(setup):
    setup = reconfigured(setup, *KD, "federation.quorum=0.3")
    whole, _ = run(setup, 1)
    lossy, (result,) = run(setup, 1, pool=LossyPool(setup, {1}))
    assert len(result.lost) == 2
    assert digest(lossy.state.adapter) != digest(whole.state.adapter)


def test_a_round_without_statistics_keeps_the_weighted_mean_and_says_so(setup, caplog):
    # Only some clients have three recordings of a class; a cohort of one may have none.
    setup = reconfigured(setup, *KD, "privacy.min_count=3", "federation.cohort_size=1", "federation.global_rounds=9")
    with caplog.at_level(logging.WARNING):
        _, results = run(setup)
    silent = [r for r in results if "server/distillation_loss" not in r.metrics]
    assert 0 < len(silent) < 9
    assert caplog.text.count("is not refined nor distilled") == len(silent)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("feda2v.use_generator=false",), "is kd but feda2v.use_generator is false"),
        (("feda2v.global_model_train=false",), "is kd but feda2v.global_model_train is false"),
        (("federation.local_epochs=0",), "is kd but federation.local_epochs is 0"),
        (
            ("model.audio_encoder.name=tiny_ast", "model.audio_encoder.trainable=all"),
            "is kd and model.audio_encoder.trainable is 'all'",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused_in_one_line(overrides, said):
    with pytest.raises(ConfigError) as caught:
        tiny_config(*KD, *overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_without_effect_are_named():
    notes = check_config(tiny_config("feda2v.kd_epochs=3"))
    assert "feda2v.kd_epochs has no effect: adapter_aggregation_mode is weighted" in notes
    assert not [note for note in check_config(tiny_config(*KD)) if "kd_" in note]
