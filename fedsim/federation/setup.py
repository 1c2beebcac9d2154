"""From a configuration to what a round needs: recordings, splits, partition, embeddings, targets.

`prepare` runs once, on the driver. Its result is plain data (arrays, paths, strings) that actors receive once and
from which `fedsim.federation.parts` makes the objects that compute.

Legend: N recordings, C classes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedsim.algorithms.privacy import require_accountant
from fedsim.config.schema import AdapterPreset, Config
from fedsim.data import open_recordings
from fedsim.data.download import fetch_esc50
from fedsim.data.partition import Partition, StoredPartition, map_partition
from fedsim.data.recordings import Recordings
from fedsim.data.split import split_recordings
from fedsim.data.store import Store, fill_store, write_store
from fedsim.errors import ConfigError, DataError
from fedsim.federation.generated import GeneratedData
from fedsim.federation.population import check_statistics, deal
from fedsim.federation.room import require_room
from fedsim.federation.saved_generators import open_pretrained
from fedsim.models.adapters import HeadSpec, check_heads
from fedsim.models.encoders import make_audio_encoder, require_ast
from fedsim.models.encoders.precomputed import load_precomputed, precomputed_fingerprint
from fedsim.models.encoders.text import TextTargets, make_text_targets

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]

_MAP_BYTES = 64 * 2**20
"""Partitions larger than this are memory-mapped from the cache instead of being sent to actors."""


@dataclass(frozen=True)
class Setup:
    """All that actors are told once; small, however large the population is.

    Attributes:
        config: the resolved configuration.
        class_names: C names; a class is its position.
        store_path: folder of the embedding store, rows in the order of `labels`.
        labels: class of every recording [N].
        partition: training rows of every client, stored or computed.
        test_rows: rows that no client holds.
        targets: head -> text targets [C, *shape].
        used: what was used, for people: audio and text encoder, data.
        data_fingerprint: hash of recordings, embeddings, partition and targets.
    """

    config: Config
    class_names: tuple[str, ...]
    store_path: Path
    labels: np.ndarray
    partition: Partition
    test_rows: np.ndarray
    targets: Mapping[str, np.ndarray]
    used: Mapping[str, str]
    data_fingerprint: str

    def client_name(self, client: int) -> str:
        """A client in messages: its id from `nodes`, or its number."""
        names = tuple(self.config.nodes)
        return names[client] if client < len(names) else str(client)


def prepare(config: Config, progress: Progress | None = None) -> Setup:
    """Open the recordings, split and deal them, fill the embedding store and make the text targets.

    Args:
        config: the experiment.
        progress: called with (done, total) while recordings are embedded.

    Raises:
        FedsimError: whatever is wrong with the data, the encoders or their combination, in one line.
    """
    if config.privacy.adds_noise:
        require_accountant()
    if config.data.generators is not None:
        return _prepare_generated(config)
    path = config.data.path
    if path is None and config.data.download and config.data.name.startswith("esc"):
        path = str(fetch_esc50(cache_dir(config), progress=progress))
    everything = open_recordings(
        config.data.name,
        path=path,
        classes=None,
        clips_per_class=config.data.clips_per_class,
        seed=config.experiment.seed,
    )
    wanted = _wanted_classes(config)
    recordings = everything if wanted is None else everything.select(wanted)
    if len(recordings.class_names) < 2:
        raise DataError(
            f"{recordings.name}: only class {recordings.class_names[0]!r} is selected; at least 2 are needed"
        )
    train, test = _split(config, recordings, np.ones(len(recordings.label), dtype=bool))
    partition = deal(config, recordings, train)
    if (config.federation.cohort_size or 1) > partition.num_clients:
        asked = config.federation.cohort_size
        raise DataError(f"federation.cohort_size is {asked} but the partition has {partition.num_clients} clients")
    _require_adapters(config, len(recordings.class_names), len(recordings.label))
    open_pretrained(config, class_names=recordings.class_names, num_clients=partition.num_clients)
    targets = _targets(config, recordings.class_names)
    check_statistics(config, partition, recordings)
    store, audio_encoder = _embed(config, everything, recordings, progress)
    if not store.ok.all():
        train, test = _split(config, recordings, store.ok)
        partition = deal(config, recordings, train)
    if isinstance(partition, StoredPartition) and partition.offsets.nbytes + partition.rows.nbytes > _MAP_BYTES:
        partition = map_partition(partition, cache_dir(config))
    used = {"audio_encoder": audio_encoder, "data": recordings.name}
    used |= {f"text_{head}": source for head, source in targets.source.items()}
    return Setup(
        config=config,
        class_names=recordings.class_names,
        store_path=store.path,
        labels=recordings.label,
        partition=partition,
        test_rows=test,
        targets={head: table.numpy() for head, table in targets.targets.items()},
        used=used,
        data_fingerprint=_fingerprint(recordings.fingerprint, store, partition, targets.targets),
    )


def _prepare_generated(config: Config) -> Setup:
    """The setup of clients whose rows come from saved generators (`data.generators`): no audio, no encoder."""
    data = GeneratedData(config)
    if (asked := config.federation.cohort_size or 1) > data.partition.num_clients:
        clients = data.partition.num_clients
        raise DataError(f"federation.cohort_size is {asked} but data.generators makes {clients} clients")
    log.info("clients, classes and rows are those of %s: no partition is made", config.data.generators)
    if (
        "num_clients" in config.federation.model_fields_set
        and config.federation.num_clients != data.partition.num_clients
    ):
        asked, made = config.federation.num_clients, data.partition.num_clients
        log.warning("federation.num_clients is %d, but data.generators makes %d clients", asked, made)
    _require_adapters(config, len(data.class_names), len(data.labels))
    targets = _targets(config, data.class_names)
    store = write_store(cache_dir=cache_dir(config), fingerprint=data.fingerprint, hashes=data.hashes, rows=data.rows())
    used = {"audio_encoder": data.audio_encoder, "data": data.description}
    used |= {f"text_{head}": source for head, source in targets.source.items()}
    return Setup(
        config=config,
        class_names=data.class_names,
        store_path=store.path,
        labels=data.labels,
        partition=data.partition,
        test_rows=data.test_rows,
        targets={head: table.numpy() for head, table in targets.targets.items()},
        used=used,
        data_fingerprint=_fingerprint(data.fingerprint, store, data.partition, targets.targets),
    )


def _targets(config: Config, class_names: tuple[str, ...]) -> TextTargets:
    """Text targets of the classes, as the configuration says."""
    text = config.model.text_encoder
    return make_text_targets(
        text.name,
        class_names=class_names,
        heads=config.model.head_shapes(),
        path=text.path,
        clip=text.clip,
        t5=text.t5,
        revision=text.revision,
        template=text.template,
    )


def _fingerprint(data: str, store: Store, partition: Partition, targets: Mapping[str, torch.Tensor]) -> str:
    """Hash of all that numbers depend on besides the configuration: the store's name is that of its contents."""
    sha = hashlib.sha256(f"{data}/{store.path.name}/{partition.fingerprint}".encode())
    for head in sorted(targets):
        sha.update(np.ascontiguousarray(targets[head].numpy()).tobytes())
    return sha.hexdigest()


def _wanted_classes(config: Config) -> list[str] | None:
    """Classes of `data.classes`, or those that explicit nodes name; None for all."""
    if config.data.classes is not None or not config.nodes:
        return config.data.classes
    named = [node.selected_classes for node in config.nodes.values()]
    if any(classes is None for classes in named):
        return None
    return sorted({name for classes in named for name in classes or ()})


def _split(config: Config, recordings: Recordings, ok: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out rows among the readable recordings."""
    kept = np.flatnonzero(ok)
    train, test = split_recordings(
        recordings.take(kept),
        test_fold=config.data.test_fold,
        test_share=config.data.test_share,
        seed=config.experiment.seed,
    )
    return kept[train], kept[test]


def cache_dir(config: Config) -> Path:
    """Folder of the embedding cache."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir).expanduser().absolute()  # actors may be in other folders
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsim"


def _embed(
    config: Config, everything: Recordings, recordings: Recordings, progress: Progress | None
) -> tuple[Store, str]:
    """Fill or open the store of what clients read: audio embeddings, or spectrograms when AST layers are trained."""
    wanted = config.model.audio_encoder
    if wanted.name == "precomputed":
        if wanted.path is None:
            raise ConfigError("model.audio_encoder.path is needed: the file that holds the ready-made embeddings")
        rows = load_precomputed(wanted.path, num_rows=len(everything.label), segments=wanted.segments, dim=wanted.dim)
        position = {name: row for row, name in enumerate(everything.names)}
        store = write_store(
            cache_dir=cache_dir(config),
            fingerprint=precomputed_fingerprint(wanted.path, segments=wanted.segments, dim=wanted.dim),
            hashes=recordings.names,
            rows=rows[[position[name] for name in recordings.names]],
        )
        return store, f"precomputed ({wanted.path})"
    encoder = make_audio_encoder(
        wanted.name, path=wanted.path, revision=wanted.revision, segments=wanted.segments, dim=wanted.dim
    )
    fingerprint, row_shape = encoder.fingerprint, tuple(encoder.shape)
    encode = lambda waves: (encoder.encode(waves), np.zeros(len(waves), dtype=np.int64))  # noqa: E731
    if wanted.trainable != "none":
        trainable = require_ast(encoder, wanted.name)
        fingerprint, row_shape, encode = f"inputs of {fingerprint}", trainable.input_shape, trainable.inputs
    store = fill_store(
        cache_dir=cache_dir(config),
        fingerprint=fingerprint,
        hashes=[recordings.source.content_hash(row) for row in range(len(recordings.label))],
        names=recordings.names,
        load=lambda row: recordings.source.waveform(row, encoder.sample_rate),
        encode=encode,
        row_shape=row_shape,
        batch_size=wanted.batch_size,
        on_bad_audio=config.data.on_bad_audio,
        progress=progress,
    )
    return store, encoder.description


def _require_adapters(config: Config, num_classes: int, num_recordings: int) -> None:
    """Refuse heads that no adapter can be built for, and sizes that this machine can't hold."""
    specs = head_specs(config)
    check_heads(specs)
    require_room(config, specs, num_classes=num_classes, num_recordings=num_recordings)


MLP = AdapterPreset(preset="mlp", hidden=[1024])
SLIM = AdapterPreset(preset="slim", hidden=[1024, 2048])


def head_specs(config: Config) -> dict[str, HeadSpec]:
    """How each head's adapter is built: `model.adapters`, else mlp for clip and slim for t5."""
    specs = {}
    for head, shape in config.model.head_shapes().items():
        preset = config.model.adapters.get(head, SLIM if head == "t5" else MLP)
        specs[head] = HeadSpec(preset.preset, shape, tuple(preset.hidden), preset.width, preset.num_heads, preset.norm)
    return specs
