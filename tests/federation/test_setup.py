"""From a configuration to splits, clients, embeddings and targets; and what is refused on the way."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from worlds import CLASSES, CPU, SERVER_STEP, run, tiny_config

from fedsim.data import open_recordings
from fedsim.data.store import open_store
from fedsim.errors import ConfigError, DataError, FedsimError, ModelError
from fedsim.federation.parts import adapter_part, build_parts, initial_state, rows_of
from fedsim.federation.setup import head_specs, prepare
from fedsim.models.saved import digest


def test_training_and_held_out_recordings_are_disjoint_and_cover_everything(setup):
    dealt = setup.partition.rows.tolist()
    assert len(set(dealt)) == len(dealt)
    assert sorted(dealt + setup.test_rows.tolist()) == list(range(len(setup.labels))) == list(range(32))
    assert set(setup.labels[setup.test_rows]) == {0, 1, 2, 3}
    assert setup.class_names == tuple(CLASSES)


def test_the_same_configuration_prepares_the_same(setup):
    again = prepare(tiny_config(*SERVER_STEP))
    assert again.store_path == setup.store_path
    assert np.array_equal(again.partition.rows, setup.partition.rows)
    assert np.array_equal(again.partition.offsets, setup.partition.offsets)
    assert np.array_equal(again.test_rows, setup.test_rows)
    assert all(np.array_equal(again.targets[head], setup.targets[head]) for head in setup.targets)
    assert again.data_fingerprint == setup.data_fingerprint
    other = prepare(tiny_config(*SERVER_STEP, "experiment.seed=8"))
    assert other.data_fingerprint != setup.data_fingerprint or not np.array_equal(
        other.partition.rows, setup.partition.rows
    )


def test_what_was_used_is_said(setup):
    assert setup.used == {
        "audio_encoder": setup.used["audio_encoder"],
        "data": "synthetic",
        "text_clip": "seeded unit vectors (offline, no meaning)",
        "text_t5": "seeded unit vectors (offline, no meaning)",
    }
    assert "log-mel" in setup.used["audio_encoder"].lower()


def test_no_statistics_could_ever_arrive():
    with pytest.raises(DataError) as caught:
        prepare(tiny_config(*SERVER_STEP, "privacy.min_count=1000"))
    assert str(caught.value) == (
        "no statistics from clients: none of the cohort's (client, class) pairs has privacy.min_count (1000) "
        "recordings; lower privacy.min_count, or give clients more recordings per class"
    )
    # Without a server step nobody needs them.
    prepare(tiny_config("feda2v.global_model_train=false", "privacy.min_count=1000"))


def test_a_cohort_without_statistics_skips_the_server_step(setup, caplog):
    # Only some of the clients have a class with 3 recordings; rounds whose cohort has none are told and go on.
    counts = setup.partition.class_counts(setup.labels, 4).max(1)
    minimum = int(counts.max())
    config = tiny_config(
        *SERVER_STEP, f"privacy.min_count={minimum}", "federation.cohort_size=1", "federation.global_rounds=6"
    )
    with caplog.at_level(logging.WARNING):
        _, results = run(prepare(config))
    stepped = ["server/adapter_finetuning_loss" in result.metrics for result in results]
    assert not all(stepped)
    # Once there are statistics, they are kept and serve the rounds that bring none.
    waiting = stepped.index(True) if any(stepped) else 6
    assert stepped == [False] * waiting + [True] * (6 - waiting)
    assert caplog.text.count("no statistics from clients") == waiting


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.classes=[dog]", "only class 'dog' is selected; at least 2 are needed"),
        (
            "model.adapters={clip: {preset: slim, width: 10, num_heads: 8}}",
            "8 attention heads don't divide the width 10",
        ),
    ],
)
def test_what_can_be_told_early_is_told_before_anything_is_embedded(override, message):
    def embedding(done: int, total: int) -> None:
        raise AssertionError("recordings were embedded")

    with pytest.raises(FedsimError, match=message):
        prepare(tiny_config(override, "model.audio_encoder={name: logmel, segments: 3, dim: 17}"), embedding)


def test_explicit_nodes_are_the_clients():
    nodes = (
        "nodes={kitchen: {selected_classes: [dog, rain]}, "
        "garden: {selected_classes: [rain, sneezing], num_samples_per_class: 2}, hall: {excluded_classes: [dog]}}"
    )
    setup = prepare(tiny_config(nodes))
    assert setup.client_names == ("kitchen", "garden", "hall")
    held = setup.partition.class_counts(setup.labels, 4) > 0
    assert set(np.flatnonzero(held[0])) <= {0, 1}
    assert set(np.flatnonzero(held[1])) <= {1, 2}
    assert setup.partition.class_counts(setup.labels, 4)[1].max() <= 2
    assert not held[2, 0]
    assert not set(setup.partition.rows) & set(setup.test_rows)


def test_classes_that_only_nodes_name_are_the_classes():
    config = tiny_config(
        "data.classes=null", "nodes={a: {selected_classes: [rain, dog]}, b: {selected_classes: [dog]}}"
    )
    assert prepare(config).class_names == ("dog", "rain")


def test_more_clients_than_recordings():
    with pytest.raises(DataError, match=r"lower federation.num_clients"):
        prepare(tiny_config("federation.num_clients=1000"))


def test_a_column_that_is_not_there():
    with pytest.raises(ConfigError, match=r"federation.column: synthetic has no column 'speaker'; it has: "):
        prepare(tiny_config("federation.partition=by_column", "federation.column=speaker"))


def precomputed(tmp_path, rows: np.ndarray) -> tuple[str, str]:
    np.savez(tmp_path / "ready.npz", embeddings=rows)
    return "model.audio_encoder.name=precomputed", f"model.audio_encoder.path={tmp_path / 'ready.npz'}"


def test_ready_made_embeddings_follow_their_recordings(tmp_path):
    everything = open_recordings("synthetic", path=None, classes=None, clips_per_class=8, seed=7)
    rows = np.random.default_rng(0).standard_normal((len(everything), 4, 32), dtype=np.float32)
    setup = prepare(tiny_config(*precomputed(tmp_path, rows)))
    chosen = [everything.class_names[label] in CLASSES for label in everything.label]
    stored = open_store(setup.store_path).rows
    assert stored.shape == (32, 4, 32)
    # Classes are renumbered, rows stay with their recordings.
    for row, label in zip(stored, setup.labels, strict=True):
        (at,) = np.flatnonzero((rows == row).all(axis=(1, 2)))
        assert chosen[at]
        assert everything.class_names[everything.label[at]] == CLASSES[label]
    run(setup, 1)


def test_ready_made_embeddings_must_fit(tmp_path):
    with pytest.raises(ModelError, match="5"):
        prepare(tiny_config(*precomputed(tmp_path, np.zeros((5, 4, 32), np.float32))))
    with pytest.raises(ConfigError, match=r"model\.audio_encoder\.path must name"):
        tiny_config("model.audio_encoder.name=precomputed")


def test_embeddings_are_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = []
    first = prepare(tiny_config(), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (32, 32)
    seen.clear()
    assert prepare(tiny_config(), lambda done, total: seen.append((done, total))).store_path == first.store_path
    assert seen == []
    assert first.store_path.is_relative_to(tmp_path)
    elsewhere = prepare(tiny_config(f"data.cache_dir={tmp_path / 'other'}"))
    assert elsewhere.store_path.is_relative_to(tmp_path / "other")


def test_parts_are_a_function_of_the_setup(setup):
    one, other = build_parts(setup, CPU), build_parts(setup, CPU)
    states = [initial_state(setup, parts) for parts in (one, other)]
    assert digest(states[0]) == digest(states[1])
    inputs, lengths = rows_of(one, np.array([3, 1]))
    assert torch.equal(inputs, torch.from_numpy(np.array(one.store.rows[[3, 1]])))
    assert inputs.shape == (2, 4, 32)
    assert lengths.tolist() == [0, 0]
    assert adapter_part({"clip.w": inputs, "encoder.w": inputs}).keys() == {"clip.w"}
    inputs += 1  # a copy: the store is read-only and stays as it was
    assert not torch.equal(inputs, rows_of(one, np.array([3, 1]))[0])


def test_adapters_by_default_and_by_name():
    plain = tiny_config("model.adapters=null", "model.heads=null")
    specs = head_specs(plain)
    assert {head: (spec.preset, spec.shape, spec.hidden) for head, spec in specs.items()} == {
        "clip": ("mlp", (768,), (1024,)),
        "t5": ("slim", (17, 4096), (1024, 2048)),
    }
    sd = head_specs(tiny_config("model.adapters=null", "model.heads=null", "model.diffusion_type=sd"))
    assert {head: spec.shape for head, spec in sd.items()} == {"clip": (77, 768)}
    named = head_specs(tiny_config("model.adapters.clip.preset=map"))
    assert named["clip"].preset == "map"
    assert named["t5"].preset == "slim"
