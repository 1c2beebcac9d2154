"""Generators written at a run's end, loaded by another: to go on with them, or to train adapters without audio."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import OWN_GENERATORS, SERVER_STEP, generators_of, make_server, reconfigured, run, tiny_config

from fedsim.errors import ConfigError, FedsimError, ModelError
from fedsim.federation.checkpoint import load_checkpoint
from fedsim.federation.generated import GeneratedData
from fedsim.federation.saved_generators import DOCUMENT, FOLDER, TABLE, open_generators
from fedsim.federation.setup import Setup, prepare
from fedsim.models.guarded_files import sealed
from fedsim.models.saved import digest
from fedsim.types import flatten_state

NO_STEP = "feda2v.global_model_train=false"
ONLY_GENERATORS = (NO_STEP, *OWN_GENERATORS[:-1], "feda2v.save_generators=true", "federation.local_epochs=0")
SHARED = "feda2v.client_generator=shared"
PRETRAINED = (NO_STEP, *OWN_GENERATORS)


def saved_run(setup: Setup, folder: Path, *overrides: str):
    server, _ = run(reconfigured(setup, *ONLY_GENERATORS, *overrides), 3)
    server.save_generators(folder)
    return server


@pytest.fixture(scope="module")
def own(setup, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return saved_run(setup, folder, "federation.cohort_size=4"), folder


@pytest.fixture(scope="module")
def shared(setup, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return saved_run(setup, folder, SHARED), folder


def recordings_of(server, client: int, label: int) -> torch.Tensor:
    rows = server.setup.partition.client(client)
    return torch.from_numpy(np.array(server.parts.store.rows[rows[server.setup.labels[rows] == label]]))


def test_the_table_holds_networks_class_means_and_held_out_embeddings(own):
    server, folder = own
    saved, kept = open_generators(folder, key="x"), generators_of(server)
    assert saved.clients.tolist() == sorted(kept)
    assert len(kept) < 7, "clients that have not taken part have none"
    networks = torch.from_numpy(saved.rows("network", 0, len(kept)))
    assert torch.equal(networks, torch.stack([kept[client] for client in saved.clients.tolist()]))
    assert digest(saved.start) == digest(server.state.learnt.network)
    means = torch.from_numpy(saved.rows("mean", 0, len(saved.mean_client)))
    assert set(saved.mean_client.tolist()) <= set(kept)
    assert saved.mean_count.min() >= 2, "privacy.min_count holds here too"
    for client, label, count, mean in zip(saved.mean_client, saved.mean_label, saved.mean_count, means, strict=True):
        mine = recordings_of(server, client, label).flatten(1)
        assert len(mine) == count
        torch.testing.assert_close(mean, mine.mean(0))
    rows, labels = server.held_out.embeddings(server.state.adapter)
    assert torch.equal(torch.from_numpy(saved.rows("held_out", 0, saved.num_held_out)), rows)
    assert saved.rows("held_out_label", 0, saved.num_held_out).tolist() == labels.tolist()
    assert saved.info["class_names"] == list(server.setup.class_names)
    assert {path.name for path in (folder / FOLDER).iterdir()} == {TABLE, DOCUMENT}


def test_of_shared_generators_one_network_is_written_and_every_clients_means(shared):
    server, folder = shared
    saved = open_generators(folder, key="x")
    assert len(saved.clients) == 0
    assert digest(saved.start) == digest(server.state.learnt.network)
    partition, labels = server.setup.partition, server.setup.labels
    counts = partition.class_counts_of(np.arange(7), labels, 4)
    assert len(saved.mean_client) == (counts >= 2).sum()


def test_networks_of_any_population_are_written_piece_by_piece(own, tmp_path, monkeypatch):
    from fedsim.federation import saving_generators

    monkeypatch.setattr(saving_generators, "AT_ONCE", 2)
    own[0].save_generators(tmp_path)
    assert (tmp_path / FOLDER / TABLE).read_bytes() == (own[1] / FOLDER / TABLE).read_bytes()
    assert load_file(tmp_path / FOLDER / TABLE)["network"].shape[0] == len(generators_of(own[0]))


def test_clients_go_on_with_the_generators_they_had(setup, own):
    server, folder = own
    world = reconfigured(setup, *PRETRAINED, f"feda2v.pretrained_generators={folder}")
    again = make_server(world)
    assert {c: row.tolist() for c, row in generators_of(again).items()} == {
        c: row.tolist() for c, row in generators_of(server).items()
    }
    assert torch.equal(flatten_state(again.state.learnt.network), flatten_state(server.state.learnt.network))
    before = generators_of(again)
    again.run_round()  # they are trained, and used, from round 1 on
    assert len(generators_of(again)) == 7
    assert any(not torch.equal(row, generators_of(again)[client]) for client, row in before.items())
    unaided = run(reconfigured(setup, *PRETRAINED), 1)[0]
    assert digest(again.state.adapter) != digest(unaided.state.adapter)


def test_a_run_with_pretrained_generators_is_resumed_bit_for_bit(setup, own, tmp_path):
    world = reconfigured(setup, *PRETRAINED, f"feda2v.pretrained_generators={own[1]}", "federation.cohort_size=3")
    whole = run(world, 3)[0]
    first = run(world, 1, run_dir=tmp_path)[0]
    first.save(tmp_path, mlflow_run_id=None)
    second = run(world, 3, state=load_checkpoint(tmp_path, world.config)[0], run_dir=tmp_path)[0]
    assert digest(second.state.adapter) == digest(whole.state.adapter)
    assert {c: r.tolist() for c, r in generators_of(second).items()} == {
        c: r.tolist() for c, r in generators_of(whole).items()
    }


def test_a_shared_network_can_be_where_own_ones_start(setup, shared):
    world = reconfigured(setup, *PRETRAINED, f"feda2v.pretrained_generators={shared[1]}")
    server = make_server(world)
    assert generators_of(server) == {}
    server.run_round()
    assert len(generators_of(server)) == 7


def generated_config(folder: Path, cache: Path, *overrides: str):
    return tiny_config(
        NO_STEP, f"data.generators={folder}", f"data.cache_dir={cache}", "federation.global_rounds=2", *overrides
    )


@pytest.fixture
def no_audio(monkeypatch):
    """Reading audio or building an encoder ends the test."""
    from fedsim.federation import setup as module

    def refuse(*_, **__):
        raise AssertionError("audio was asked for")

    for name in ("open_recordings", "make_audio_encoder", "fill_store", "fetch_esc50"):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("which", ["own", "shared"])
def test_adapters_are_trained_without_audio(which, request, no_audio, tmp_path):
    server, folder = request.getfixturevalue(which)
    setup = prepare(generated_config(folder, tmp_path))
    saved = open_generators(folder, key="x")
    assert setup.partition.num_clients == len(np.unique(saved.mean_client))
    assert setup.class_names == server.setup.class_names
    counts = setup.partition.class_counts_of(np.arange(setup.partition.num_clients), setup.labels, 4)
    ids = np.unique(saved.mean_client)
    for client, label, count in zip(saved.mean_client, saved.mean_label, saved.mean_count, strict=True):
        assert counts[np.searchsorted(ids, client), label] == count
    _, results = run(setup)
    assert results[-1].metrics["train/loss"] < results[0].metrics["train/loss"]
    embeddings, labels = server.held_out.embeddings(server.state.adapter)
    held_out = make_server(setup).held_out.embeddings({})
    assert torch.equal(held_out[0], embeddings)
    assert torch.equal(held_out[1], labels)


def test_the_server_step_works_on_generated_rows(own, no_audio, tmp_path):
    setup = prepare(generated_config(own[1], tmp_path, *SERVER_STEP, "feda2v.generator_type=lowrank"))
    server, results = run(setup, 2)
    assert server.state.buffer is not None
    assert np.isfinite(results[-1].metrics["server/adapter_finetuning_loss"])


def test_generated_rows_lie_around_the_clients_own_means_whoever_draws_beside_it(own, tmp_path, monkeypatch):
    from fedsim.federation import generated

    data = GeneratedData(generated_config(own[1], tmp_path))
    rows = data.rows()
    saved = open_generators(own[1], key="x")
    monkeypatch.setattr(generated, "AT_ONCE", 1)
    assert np.array_equal(rows, data.rows())
    other = GeneratedData(generated_config(own[1], tmp_path, "experiment.seed=8")).rows()
    train = data.partition.num_clients and int(data.partition.offsets[-1])
    assert not np.array_equal(rows[:train], other[:train])
    assert np.array_equal(rows[train:], other[train:])
    assert len(np.unique(rows[:train], axis=0)) == train
    means, spread = saved.rows("mean", 0, len(saved.mean_client)), saved.deviation.numpy()
    first = 0
    for mean, count in zip(means, saved.mean_count.tolist(), strict=True):
        z = (rows[first : first + count].reshape(count, -1) - mean) / spread
        assert 0.1 < np.square(z).mean() < 4
        first += count


def edited(source: Path, target: Path, **changes) -> Path:
    """A copy of a run's generators with other entries in its document."""
    shutil.copytree(source / FOLDER, target / FOLDER)
    document = target / FOLDER / DOCUMENT
    document.write_text(json.dumps(sealed(json.loads(document.read_text()) | changes)))
    return target


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"class_names": ["a", "b", "c", "d"]}, "other classes"),
        ({"num_clients": 8}, "other clients"),
        ({"client_names": ["a"]}, "other nodes"),
        ({"input_shape": [4, 64]}, "segments, dim"),
        ({"audio_encoder": "yamnet"}, "other model.audio_encoder.name: yamnet there, logmel here"),
        ({"hidden_dim": 32}, "generator_hidden_dim"),
        ({"latent_dim": 32}, "generator_latent_dim"),
        ({"kind": "gan"}, "gan in format 1"),
        ({"format": 2}, "format 2"),
        ({"sha256": "0"}, "damaged"),
        ({"network": 3}, "no readable folder"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(setup, own, tmp_path, changes, part):
    folder = edited(own[1], tmp_path, **changes)
    with pytest.raises(FedsimError, match=part) as caught:
        make_server(reconfigured(setup, *PRETRAINED, f"feda2v.pretrained_generators={folder}"))
    assert "\n" not in str(caught.value)


def test_other_mistakes(setup, own, tmp_path):
    with pytest.raises(ConfigError, match=r"feda2v\.pretrained_generators is .*save_generators"):
        make_server(reconfigured(setup, *PRETRAINED, f"feda2v.pretrained_generators={tmp_path}"))
    with pytest.raises(ConfigError, match=r"to own$"):
        make_server(reconfigured(setup, *PRETRAINED, SHARED, f"feda2v.pretrained_generators={own[1]}"))
    with pytest.raises(ConfigError, match="classes differs"):
        prepare(generated_config(own[1], tmp_path, "data.classes=[dog, rain]"))
    with pytest.raises(ConfigError, match="segments, dim"):
        prepare(generated_config(own[1], tmp_path, "model.audio_encoder.segments=2"))
    shutil.copytree(own[1] / FOLDER, tmp_path / FOLDER)
    save_file({"start": torch.zeros(3)}, tmp_path / FOLDER / TABLE)
    with pytest.raises(ModelError, match="damaged"):
        open_generators(tmp_path, key="x")


def sounds(folder: Path) -> Path:
    """Eight recordings of each of three classes, noise of different colours, and their manifest."""
    import soundfile
    from scipy.signal import lfilter

    from fedsim.seeding import rng

    folder.mkdir()
    lines = ["path,label,fold"]
    for number, pole in enumerate((-0.9, 0.0, 0.9)):
        for clip in range(8):
            noise = rng(0, "sound", number, clip).standard_normal(8000)
            soundfile.write(folder / f"{number}-{clip}.wav", 0.1 * lfilter([1], [1, -pole], noise), 16000)
            lines.append(f"{folder}/{number}-{clip}.wav,class{number},{clip % 4 + 1}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_the_second_of_two_runs_needs_no_audio_and_knows_the_classes(tmp_path):
    from fedsim.cli import session

    audio = sounds(tmp_path / "audio")
    alike = (
        "federation.num_clients=1",
        "federation.partition=iid",
        "data.test_fold=4",
        "data.classes=null",
    )
    first = session.run(
        tiny_config(
            *ONLY_GENERATORS,
            *alike,
            "data.name=csv",
            f"data.path={audio}/manifest.csv",
            f"data.cache_dir={tmp_path}/1",
            "experiment.name=first",
        ),
        output=tmp_path / "first",
    )
    for gone in (audio, tmp_path / "1"):
        shutil.rmtree(gone)
    config = generated_config(tmp_path / "first", tmp_path / "2", *alike, "federation.local_epochs=30")
    second = session.run(config, output=tmp_path / "second")
    assert second["metrics"]["eval/top1"] > first["metrics"]["eval/top1"]
    assert second["metrics"]["eval/top1"] >= 0.8
    assert second["used"]["audio_encoder"] == first["used"]["audio_encoder"]
    assert "rows drawn from the generators of" in second["used"]["data"]
    # The same again: rows are a function of the seed.
    third = session.run(config, output=tmp_path / "third")
    assert third["digest"] == second["digest"]


def test_nodes_are_those_of_the_first_run(setup, own, tmp_path):
    names = ["a", "b", "c", "d", "e", "f", "g"]
    folder, nodes = edited(own[1], tmp_path, client_names=names), "nodes={x: {}, y: {}}"
    with pytest.raises(ConfigError, match="nodes names x, y"):
        prepare(generated_config(folder, tmp_path, nodes))
    ids = np.unique(open_generators(folder, key="x").mean_client).tolist()
    right = ", ".join(f"{names[client]}: {{}}" for client in ids)
    made = prepare(generated_config(folder, tmp_path, f"nodes={{{right}}}"))
    assert made.client_name(0) == names[ids[0]]


def test_a_run_whose_clients_never_trained_saves_nothing_and_says_so(setup, tmp_path, caplog):
    server, _ = run(reconfigured(setup, *ONLY_GENERATORS), 1)
    server.save_generators(tmp_path)
    assert "nothing to save" in caplog.text
    assert not (tmp_path / FOLDER).exists()
