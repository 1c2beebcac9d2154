"""Code and data on their way to the nodes of a cluster.

The package itself goes with the job (Ray's `py_modules`), so nodes need fedsim's dependencies, not fedsim, and never
run another version of it. Embeddings are read from storage that a node shares with the driver, where it does; else a
node gets them once, through the object store, into its own cache, whose names are those of the contents.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from fedsim.cluster.faults import alive_nodes
from fedsim.data.partition import StoredPartition
from fedsim.data.store_cache import ARRAYS, cached_store, open_store
from fedsim.errors import DataError, ResourceError
from fedsim.federation.setup import Setup, cache_dir

log = logging.getLogger(__name__)
JOB_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray keeps what `ray job submit` was told; a driver may not say it again."""


def code_for_nodes() -> dict[str, Any]:
    """Ray's runtime environment that brings this package to the nodes; nothing where the job brings modules itself."""
    told = json.loads(os.environ.get(JOB_ENVIRONMENT) or "{}").get("runtime_env") or {}
    if "py_modules" in told:
        return {}
    excludes = {} if "excludes" in told else {"excludes": ["__pycache__"]}
    return {"py_modules": [str(Path(__file__).parents[1])], **excludes}


def portable(setup: Setup) -> Setup:
    """The setup as other nodes can read it: a partition in files of this node travels by value, once per node.

    Other nodes may be there, or join, unless Ray is a private one.
    """
    partition = setup.partition
    others = setup.config.resources.address is not None or len(alive_nodes()) > 1
    if isinstance(partition, StoredPartition) and partition.folder is not None and others:
        by_value = StoredPartition(np.asarray(partition.offsets), np.asarray(partition.rows))
        return replace(setup, partition=by_value)
    return setup


def with_store_here(setup: Setup) -> Setup | None:
    """The setup with the embedding store as this node sees it: shared, or in its own cache; None where it has none."""
    for folder in (setup.store_path, cache_dir(setup.config) / setup.store_path.name):
        if (folder / "meta.json").is_file():
            return replace(setup, store_path=folder)
    return None


def pack_store(setup: Setup) -> dict[str, Any]:
    """The embedding store as arrays for Ray's object store, with its fingerprint."""
    store = open_store(setup.store_path)
    meta = json.loads((setup.store_path / "meta.json").read_text(encoding="utf-8"))
    return {"fingerprint": meta["fingerprint"]} | {name: np.asarray(getattr(store, name)) for name in ARRAYS}


def keep_store(setup: Setup, message: Mapping[str, Any]) -> Setup:
    """Write a packed store into this node's cache, once for all its processes; returns the setup with it.

    Raises:
        ResourceError: the cache can't be written.
    """

    def fill(partial: dict[str, np.ndarray]) -> None:
        for name in ARRAYS:
            partial[name][:] = message[name]

    folder = cache_dir(setup.config)
    try:
        fingerprint, shape = message["fingerprint"], message["rows"].shape
        store = cached_store(folder, setup.store_path.name, fingerprint=fingerprint, shape=shape, fill=fill)
    except (DataError, OSError) as error:
        raise ResourceError(
            f"node {platform.node()} doesn't see the embedding store {setup.store_path} and can't keep a copy in "
            f"{folder} ({' '.join(str(error).split())}); set data.cache_dir to storage that all nodes share"
        ) from error
    return replace(setup, store_path=store.path)


def check_server_sees(setup: Setup, run_dir: Path) -> None:
    """Refuse a server that is on a node without the run directory or the store, instead of writing where nobody looks.

    Raises:
        ResourceError: one of them isn't there; names the node.
    """
    place = (
        "use storage that all nodes share, or server_cpus and server_gpus 0, so that the server is beside the driver"
    )
    if not run_dir.is_dir():
        raise ResourceError(f"the server's node {platform.node()} doesn't see the run directory {run_dir}: {place}")
    if with_store_here(setup) is None:
        raise ResourceError(
            f"the server's node {platform.node()} doesn't see the embedding store {setup.store_path}: set "
            f"data.cache_dir to a folder that all nodes share ({place})"
        )


class StoreSupply:
    """The embedding store in Ray's object store, put there when the first node asks.

    Args:
        setup: whose store this node sees.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._reference: Any = None

    def message(self) -> list[Any]:
        """The one reference in a list, which Ray doesn't fetch by itself."""
        if self._reference is None:
            self._reference = ray.put(pack_store(self._setup))
        return [self._reference]
