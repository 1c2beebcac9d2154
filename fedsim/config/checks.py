"""Checks between keys that need no data: what can be told wrong before anything is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import get_args

from fedsim.config.keys import find_key, suggestion
from fedsim.config.method_checks import LEARNT, VAES, check_methods
from fedsim.config.schema import NODE_LABEL, PLAIN_ACTORS, Config, Data, FedA2V, Privacy, Resources, SearchRange
from fedsim.errors import ConfigError

EFFECTIVE = {
    "novelty_weight": (*VAES, "gan", "cgan"),
    "mode_seeking": ("cgan",),
    "discriminator": ("cgan",),
    "beta_warmup": VAES,
    "loss_scaling": VAES,
    "generator_ema": LEARNT,
}
"""Kinds of generators that a key is for."""
_LABEL = r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?"
DATASETS: tuple[str, ...] = get_args(Data.model_fields["name"].annotation)


def check_config(config: Config) -> list[str]:
    """Check keys against each other.

    Returns:
        Warnings, each one line: settings that are allowed but probably not meant.

    Raises:
        ConfigError: two keys don't go together; the message names them and both values.
    """
    _check_clients(config)
    _check_nodes(config)
    _check_name(config.experiment.name)
    _check_model(config)
    _check_actors(config.resources)
    check_methods(config)
    for name, searched in config.search.space.items():
        _check_range(name, searched)
    if config.data.name == "csv" and config.data.path is None:
        raise ConfigError(
            "data.name is csv, so data.path must name the manifest (path,label[,fold|split][,client][,group])"
        )
    return _warnings(config)


def _check_clients(config: Config) -> None:
    """Cohort and partition against the population."""
    federation = config.federation
    population = len(config.nodes) or federation.num_clients
    if federation.cohort_size is not None and federation.cohort_size > population:
        counted = "nodes lists" if config.nodes else "federation.num_clients is"
        raise ConfigError(
            f"federation.cohort_size is {federation.cohort_size} but {counted} {population}; "
            f"a cohort has at most all clients"
        )
    if config.nodes:
        return
    if federation.partition == "by_column" and not federation.column:
        raise ConfigError("federation.partition is by_column, so federation.column must name a manifest column")
    classes = config.data.classes
    if federation.partition == "classes_per_client" and classes and federation.classes_per_client > len(classes):
        raise ConfigError(
            f"federation.classes_per_client is {federation.classes_per_client} but data.classes names {len(classes)}; "
            f"give at most that many"
        )


def _check_nodes(config: Config) -> None:
    """Class lists and data sets of explicit clients."""
    _check_classes("data.classes", config.data.classes)
    for name, node in config.nodes.items():
        if node.dataset is not None and node.dataset not in DATASETS:
            raise ConfigError(
                f"nodes.{name}.dataset is {node.dataset!r}, which can't be loaded; known: {', '.join(DATASETS)}; "
                f"any other data set goes in as a CSV manifest (data.name: csv, data.path: manifest.csv)"
            )
        if node.dataset not in {None, config.data.name}:
            raise ConfigError(
                f"nodes.{name}.dataset is {node.dataset!r} but data.name is {config.data.name!r}; all clients of a run "
                f"share one data set (a CSV manifest can join several)"
            )
        _check_classes(f"nodes.{name}.selected_classes", node.selected_classes, config.data.classes)
        _check_classes(f"nodes.{name}.excluded_classes", node.excluded_classes or None)
        both = sorted(set(node.selected_classes or ()) & set(node.excluded_classes or ()))
        if both:
            raise ConfigError(f"nodes.{name}: {both[0]!r} is in selected_classes and in excluded_classes; keep one")


def _check_classes(key: str, classes: list[str] | None, among: Iterable[str] | None = None) -> None:
    """A list of class names: not empty, no name twice, all of them known where that can be told."""
    if classes is None:
        return
    if not classes:
        raise ConfigError(f"{key} is an empty list; name a class, or leave the key out for all")
    twice = sorted(name for name, times in Counter(classes).items() if times > 1)
    if twice:
        raise ConfigError(f"{key} names {twice[0]!r} twice; keep one")
    unknown = [] if among is None else sorted(set(classes) - set(among))
    if unknown:
        raise ConfigError(f"{key} names {unknown[0]!r}, which isn't in data.classes")


def _check_name(name: str) -> None:
    """The experiment's name becomes a folder's name."""
    if name.startswith(".") or any(mark in name for mark in "/\\"):
        raise ConfigError(f"experiment.name is {name!r}; it names a folder, so no / or \\ and no . at its start")


def _check_actors(resources: Resources) -> None:
    """Further kinds of client actors."""
    kinds = resources.more_actors
    if kinds and resources.client_actors in (0, "auto"):
        raise ConfigError(
            f"resources.more_actors adds to resources.client_actors, which is {resources.client_actors}: give a number"
        )
    for name, kind in kinds.items():
        where = f"resources.more_actors.{name}"
        if name == PLAIN_ACTORS or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ConfigError(f"resources.more_actors: {name!r} can't name a kind: letters, digits and _, not 'client'")
        if (kind.gpus > 0) != (resources.client_gpus > 0):
            # Sums on a GPU end in other bits: the result would depend on who trained what.
            raise ConfigError(
                f"{where}.gpus is {kind.gpus:g} but resources.client_gpus is {resources.client_gpus:g}: "
                "either all client actors have GPUs or none"
            )
        if NODE_LABEL in kind.labels:
            raise ConfigError(f"{where}.labels: {NODE_LABEL} is for a quarantine; give the node a label of its own")
        for label, value in kind.labels.items():
            if not re.fullmatch(rf"([a-z0-9.-]+/)?{_LABEL}", label) or not re.fullmatch(_LABEL, value):
                raise ConfigError(
                    f"{where}.labels: {label}={value} is no label of Ray, such as ray.io/market-type=spot"
                )


def _check_model(config: Config) -> None:
    """Heads, adapters and encoders."""
    heads = config.model.head_shapes()
    if not heads:
        raise ConfigError("model.heads is empty; name at least one head with its shape, e.g. {clip: [768]}")
    for head, shape in heads.items():
        if not re.fullmatch(r"[A-Za-z]\w*", head) or head == "encoder":
            raise ConfigError(f"model.heads: {head!r} can't name a head; use letters, digits and _, and not 'encoder'")
        if len(shape) not in {1, 2}:
            raise ConfigError(f"model.heads.{head} is {list(shape)}; a head's shape is [width] or [tokens, width]")
    for head in config.model.adapters:
        if head not in heads:
            raise ConfigError(f"model.adapters names head {head!r}, but the heads are {', '.join(sorted(heads))}")
    encoder = config.model.audio_encoder
    if encoder.name == "precomputed" and encoder.path is None:
        raise ConfigError(
            "model.audio_encoder.name is precomputed, so model.audio_encoder.path must name an .npz or .npy file"
        )
    if encoder.trainable != "none" and encoder.name not in {"ast", "tiny_ast"}:
        raise ConfigError(
            f"model.audio_encoder.trainable is {encoder.trainable!r} but only ast and tiny_ast can be trained, "
            f"not {encoder.name}; set it to none"
        )


def _check_range(name: str, searched: SearchRange) -> None:
    """One searched key: it exists, and its range or choices hold something."""
    key = find_key(name)
    if key is None or key.is_section or name.startswith("search."):
        raise ConfigError(f"search.space: {name!r} isn't a key that can be searched: {suggestion(name)}")
    where = f"search.space.{name}"
    ends = (searched.low, searched.high)
    if searched.choices is not None:
        if not searched.choices or ends != (None, None):
            raise ConfigError(f"{where}: give either low and high, or choices with at least one value")
        return
    if searched.low is None or searched.high is None:
        raise ConfigError(f"{where}: give low and high, or choices")
    if searched.low >= searched.high:
        raise ConfigError(f"{where}: low is {searched.low:g} and high is {searched.high:g}; low must be below high")
    if searched.log and searched.low <= 0:
        raise ConfigError(f"{where}: low is {searched.low:g}, but log needs a range above 0")
    if searched.integer and not (searched.low.is_integer() and searched.high.is_integer()):
        raise ConfigError(f"{where}: low and high must be whole numbers when integer is true")


def _warnings(config: Config) -> list[str]:
    """Settings that are allowed but probably not meant."""
    found = []
    given = config.federation.num_clients
    if config.nodes and "num_clients" in config.federation.model_fields_set and given != len(config.nodes):
        found.append(f"federation.num_clients is {given} but nodes lists {len(config.nodes)} clients: the list wins")
    if config.feda2v.use_generator and not config.feda2v.global_model_train:
        found.append(
            "feda2v.use_generator is true but global_model_train is false: the generator is neither trained nor used"
        )
    settings = config.feda2v
    if settings.generator_class_groups and settings.generator_granularity != "per_group":
        found.append(
            f"feda2v.generator_class_groups has no effect: generator_granularity is {settings.generator_granularity}"
        )
    if settings.generator_type == "multimodal" and not settings.global_model_train_from_nodes_adapters:
        found.append(
            "feda2v.generator_type is multimodal but global_model_train_from_nodes_adapters is false: its clip and t5 "
            "rows are learnt but move no target"
        )
    if "text_anchor" in settings.model_fields_set and not settings.global_model_train_from_nodes_adapters:
        found.append(
            "feda2v.text_anchor has no effect: global_model_train_from_nodes_adapters is false, so refinement trains "
            "towards the text targets alone"
        )
    if settings.server_optimizer == "none":
        found += [
            f"feda2v.{name} has no effect: server_optimizer is none"
            for name in ("server_learning_rate", "server_momentum", "server_adaptivity")
            if getattr(settings, name) != FedA2V.model_fields[name].default
        ]
    elif not config.federation.local_epochs:
        found.append(
            f"feda2v.server_optimizer {settings.server_optimizer} has no effect: federation.local_epochs is 0, so "
            "clients send no change to step along"
        )
    if settings.server_optimizer in {"adam", "yogi"} and (settings.server_learning_rate or 0) >= 1:
        found.append(
            f"feda2v.server_learning_rate is {settings.server_learning_rate:g} with {settings.server_optimizer}: "
            f"weights may move by about that in a round; 0.001 to 0.1 is usual"
        )
    if settings.adapter_aggregation_mode != "kd":
        found += [
            f"feda2v.{name} has no effect: adapter_aggregation_mode is {settings.adapter_aggregation_mode}"
            for name in ("kd_epochs", "kd_learning_rate", "kd_samples_per_class")
            if getattr(settings, name) != FedA2V.model_fields[name].default
        ]
    if settings.use_generator:
        found += [
            f"feda2v.{name} has no effect: generator_type is {settings.generator_type}"
            for name, kinds in EFFECTIVE.items()
            if settings.generator_type not in kinds and getattr(settings, name) != FedA2V.model_fields[name].default
        ]
    if config.privacy.statistics == "sums":
        found += [
            f"feda2v.{name} has no effect: privacy.statistics is sums, which are added up over all rounds"
            for name in ("generator_buffer_size", "generator_buffer_age")
            if getattr(settings, name) != FedA2V.model_fields[name].default
        ]
    if settings.clients_train != "none" and config.federation.global_rounds == 1 and not settings.pretrained_generators:
        found.append(
            "federation.global_rounds is 1: clients measure what their generators start from in round 1, and train "
            "them from round 2 on"
        )
    if config.training.augmentation and not config.federation.local_epochs:
        found.append("training.augmentation has no effect: federation.local_epochs is 0")
    privacy = config.privacy
    if privacy.min_count == 1 and not (privacy.secure_sums or privacy.adds_noise):
        found.append(
            "privacy.min_count is 1: the statistics of a class with one recording are that recording's embedding"
        )
    if not privacy.adds_noise:
        found += [
            f"privacy.{name} has no effect: there is no noise (privacy.noise_multiplier is 0)"
            for name in ("delta", "clip_update", "clip_statistics", "embedding_norm")
            if getattr(privacy, name) != Privacy.model_fields[name].default
        ]
    return found
