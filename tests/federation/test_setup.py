"""From a configuration to splits, clients, embeddings and targets; and what is refused on the way."""

from __future__ import annotations

import logging
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from worlds import CLASSES, CPU, SERVER_STEP, run, tiny_config

from fedsim.algorithms.sampling import sample_cohort
from fedsim.data import open_recordings
from fedsim.data.store import open_store
from fedsim.errors import ConfigError, DataError, FedsimError, ModelError
from fedsim.federation.parts import adapter_part, build_parts, initial_state, rows_of
from fedsim.federation.setup import cache_dir, head_specs, prepare
from fedsim.models.saved import digest


def class_counts(setup) -> np.ndarray:
    """Recordings of every client and class."""
    return setup.partition.class_counts_of(np.arange(setup.partition.num_clients), setup.labels, 4)


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
    counts = class_counts(setup).max(1)
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
    assert [setup.client_name(client) for client in range(3)] == ["kitchen", "garden", "hall"]
    held = class_counts(setup) > 0
    assert set(np.flatnonzero(held[0])) <= {0, 1}
    assert set(np.flatnonzero(held[1])) <= {1, 2}
    assert class_counts(setup)[1].max() <= 2
    assert not held[2, 0]
    assert not set(setup.partition.rows) & set(setup.test_rows)


DRAWN = ("federation.partition=drawn", "federation.examples_per_client=12", "federation.alpha=0.3")


def test_a_drawn_population_is_computed(caplog):
    with caplog.at_level(logging.INFO):
        setup = prepare(tiny_config(*DRAWN, "federation.num_clients=15000000", "federation.cohort_size=10000"))
    assert "recordings are shared between clients" in caplog.text
    assert setup.partition.num_clients == 15_000_000
    assert setup.client_name(14_999_999) == "14999999"
    assert len(pickle.dumps(setup)) < 50_000
    cohort = sample_cohort(15_000_000, 10_000, np.random.default_rng(0))
    rows, counts = setup.partition.rows_of(cohort)
    assert counts.tolist() == [12] * 10_000
    # Every recording that isn't held out is drawn by somebody, and no other.
    assert sorted(set(rows.tolist()) | set(setup.test_rows.tolist())) == list(range(32))
    assert not set(rows.tolist()) & set(setup.test_rows.tolist())


def test_preparing_a_population_takes_no_memory_per_client():
    peaks = []
    for num_clients in (100, 100, 15_000_000):  # the first fills caches
        config = tiny_config(*DRAWN, f"federation.num_clients={num_clients}", "federation.cohort_size=10")
        tracemalloc.start()
        prepare(config)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 200_000


def test_the_fingerprint_of_a_drawn_population_is_that_of_its_parameters():
    changes = ("federation.alpha=0.4", "federation.examples_per_client=13", "federation.num_clients=8")
    plain = prepare(tiny_config(*DRAWN)).data_fingerprint
    assert prepare(tiny_config(*DRAWN)).data_fingerprint == plain
    assert len({plain, *(prepare(tiny_config(*DRAWN, change)).data_fingerprint for change in changes)}) == 4


def test_statistics_of_a_drawn_population_are_judged_by_some_of_its_clients(caplog):
    population = (*DRAWN, *SERVER_STEP, "federation.num_clients=15000000", "federation.cohort_size=10")
    with caplog.at_level(logging.INFO):
        prepare(tiny_config(*population, "privacy.min_count=3"))
    assert "of 16384 clients looked at" in caplog.text
    # 12 of one class: rare where all classes are alike, so it's said; 13 can't be, so it's refused.
    with caplog.at_level(logging.WARNING):
        prepare(tiny_config(*population, "privacy.min_count=12", "federation.alpha=1000"))
    assert "16384 of 15000000 clients looked at: no statistics from clients" in caplog.text
    with pytest.raises(DataError, match="no statistics from clients"):
        prepare(tiny_config(*population, "privacy.min_count=13"))


def test_a_large_stored_partition_is_mapped(monkeypatch, setup):
    monkeypatch.setattr("fedsim.federation.setup._MAP_BYTES", 10)
    mapped = prepare(tiny_config(*SERVER_STEP))
    assert isinstance(mapped.partition.rows, np.memmap)
    assert mapped.partition.folder.is_relative_to(cache_dir(mapped.config))
    assert mapped.data_fingerprint == setup.data_fingerprint
    again = pickle.loads(pickle.dumps(mapped))
    assert np.array_equal(again.partition.rows, setup.partition.rows)


def test_a_population_has_a_limit():
    with pytest.raises(ConfigError, match=r"federation\.num_clients"):
        tiny_config("federation.num_clients=4294967296")


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
