"""A federation without audio: clients whose recordings are rows drawn from the generators that a run has saved.

For every class whose mean it has, a client draws as many rows as it had recordings (`data.generators`). Nothing else of
the first run's data is read, and no audio encoder is built; held-out embeddings come from the same folder.

Legend: K clients of a part, M (client, class) pairs, E = S * D.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from fedsim.algorithms.augmentation import StackGenerator, least_values
from fedsim.algorithms.client_generator import ClassMeans, stack_of
from fedsim.config.schema import Config
from fedsim.data.partition import StoredPartition
from fedsim.errors import ConfigError
from fedsim.federation.saved_generators import SavedGenerators, check_embeddings, open_generators
from fedsim.types import flatten_state

log = logging.getLogger(__name__)
KEY = "data.generators"
AT_ONCE = 256
"""Clients that draw together."""
ROWS = 32
"""Rows of a draw: fixed, so that a client's rows don't depend on the others."""


class GeneratedData:
    """Training and held-out rows of `data.generators`.

    Args:
        config: the run's configuration.

    Raises:
        ConfigError: the run has saved none, or of other embeddings or classes.
        ModelError: the files are damaged.
    """

    def __init__(self, config: Config) -> None:
        assert config.data.generators is not None
        self._saved = saved = open_generators(config.data.generators, key=KEY)
        self._seed = config.experiment.seed
        check_embeddings(saved, config, key=KEY)
        self.class_names = tuple(saved.info["class_names"])
        wanted = config.data.classes
        if wanted is not None and sorted(wanted) != sorted(self.class_names):
            raise ConfigError(f"{KEY}: data.classes differs from the classes of {saved.folder}; leave it out")
        if not len(saved.mean_client):
            raise ConfigError(f"{KEY}: {saved.folder} holds no class mean (privacy.min_count was too high)")
        ids, counts = np.unique(saved.mean_client, return_counts=True)
        self._ids, self._pairs = ids, np.concatenate([[0], np.cumsum(counts)])
        self._require_names(list(config.nodes))
        left_out = int(saved.info["num_clients"]) - len(ids)
        if left_out:
            log.warning("%d clients of %s have no class mean there: they are left out", left_out, saved.folder)
        made = np.add.reduceat(saved.mean_count, self._pairs[:-1])
        offsets = np.concatenate([[0], np.cumsum(made)])
        self.partition = StoredPartition(offsets, np.arange(offsets[-1]))
        held_out = saved.rows("held_out_label", 0, saved.num_held_out)
        self.labels = np.concatenate([np.repeat(saved.mean_label, saved.mean_count), held_out])
        self.test_rows = np.arange(offsets[-1], len(self.labels))
        self.audio_encoder = str(saved.info["audio_encoder_used"])
        self.description = f"rows drawn from the generators of {saved.folder.parent} ({saved.info['data']})"
        self.fingerprint = f"generators {saved.info['sha256']}, seed {self._seed}"

    def _require_names(self, wanted: list[str]) -> None:
        """Where `nodes` names clients, they are the saved ones."""
        known = self._saved.info["client_names"]
        names = [known[client] for client in self._ids] if known else []
        if wanted and wanted != names:
            found = ", ".join(names) or "nobody by name"
            raise ConfigError(
                f"{KEY}: nodes names {', '.join(wanted)}, but {self._saved.folder} has class means of {found}; leave "
                "nodes out"
            )

    @property
    def hashes(self) -> list[str]:
        """A name for every row."""
        return [str(row) for row in range(len(self.labels))]

    def rows(self) -> np.ndarray:
        """Training rows, client after client and class after class, then held-out ones [N, S, D]."""
        saved, shape = self._saved, tuple(self._saved.info["input_shape"])
        parts = [self._draw(first) for first in range(0, len(self._ids), AT_ONCE)]
        held_out = saved.rows("held_out", 0, saved.num_held_out)
        return np.concatenate([*(part.reshape(-1, *shape) for part in parts), held_out])

    def _draw(self, first: int) -> np.ndarray:
        """Rows of clients `first` and up [n, E]."""
        some, last = self._ids[first : first + AT_ONCE], min(first + AT_ONCE, len(self._ids))
        pairs = slice(self._pairs[first], self._pairs[last])
        place = np.repeat(np.arange(len(some)), np.diff(self._pairs[first : last + 1]))
        label, count = self._saved.mean_label[pairs], self._saved.mean_count[pairs]
        generator = self._generator(some, place * len(self.class_names) + label, pairs)
        wanted = np.repeat(label, count)
        ends = np.cumsum(np.bincount(place, count, minlength=len(some)).astype(np.int64))
        sizes = np.diff(ends, prepend=0)
        rows = np.empty((len(wanted), len(self._saved.deviation)), dtype=np.float32)
        for step in range(-(-int(sizes.max()) // ROWS)):
            # Behind its last row a client draws that one's class again, for nothing.
            position = np.minimum(step * ROWS + np.arange(ROWS), sizes[:, None] - 1)
            index = (ends - sizes)[:, None] + position
            made = generator.draw(0, torch.from_numpy(wanted[index]), step).numpy()
            real = step * ROWS + np.arange(ROWS) < sizes[:, None]
            rows[index[real]] = made[real]
        return rows

    def _generator(self, clients: np.ndarray, pairs: np.ndarray, where: slice) -> StackGenerator:
        saved, classes = self._saved, len(self.class_names)
        mean = torch.from_numpy(saved.rows("mean", where.start, where.stop))
        known = ClassMeans(pairs, np.zeros(0, dtype=np.int64), saved.mean_count[where], mean)
        return StackGenerator(
            client=clients,
            pairs=torch.from_numpy(pairs),
            mean=mean,
            least=least_values(known, clients=len(clients), num_classes=classes),
            params=stack_of(_networks(saved, clients), saved.start),
            deviation=saved.deviation,
            num_classes=classes,
            seed=self._seed,
            purpose="generated",
            round_number=0,
        )


def _networks(saved: SavedGenerators, clients: np.ndarray) -> np.ndarray:
    """Flat networks of some clients [K, P], ascending; the start's where they have none of their own."""
    rows = np.tile(flatten_state(saved.start).numpy(), (len(clients), 1))
    place = np.searchsorted(saved.clients, clients)
    own = np.flatnonzero(np.isin(clients, saved.clients))
    if len(own):
        first, last = int(place[own[0]]), int(place[own[-1]]) + 1
        rows[own] = saved.rows("network", first, last)[place[own] - first]
    return rows
