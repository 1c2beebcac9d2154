"""Checks between keys that need no data: what can be told wrong before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args

from fedsim.config.keys import find_key, suggestion
from fedsim.config.schema import Config, Data, FedA2V, Privacy, SearchRange
from fedsim.errors import ConfigError

GRANULAR = ("vae", "vae_plain", "flow", "gan", "cgan")
VAES = ("vae", "vae_plain", "multimodal")
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
    _check_local_epochs(config)
    _check_server_optimizer(config)
    _check_control_variates(config)
    _check_distillation(config)
    _check_client_generator(config)
    _check_granularity(config.feda2v)
    _check_growth(config.feda2v)
    _check_sums(config)
    _check_noise(config)
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
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise ConfigError(f"{key} names {twice[0]!r} twice; keep one")
    unknown = [] if among is None else sorted(set(classes) - set(among))
    if unknown:
        raise ConfigError(f"{key} names {unknown[0]!r}, which isn't in data.classes")


def _check_name(name: str) -> None:
    """The experiment's name becomes a folder's name."""
    if name.startswith(".") or any(mark in name for mark in "/\\"):
        raise ConfigError(f"experiment.name is {name!r}; it names a folder, so no / or \\ and no . at its start")


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


def _check_local_epochs(config: Config) -> None:
    """Where clients don't train adapters, something else has to be trained, and nothing can be added to their loss."""
    settings = config.feda2v
    if not config.federation.local_epochs and config.training.prototype_weight:
        raise ConfigError(
            f"training.prototype_weight is {config.training.prototype_weight:g} but federation.local_epochs is 0: "
            "clients that don't train aren't drawn to prototypes; set local_epochs to at least 1, or the weight to 0"
        )
    if not config.federation.local_epochs and not settings.global_model_train and settings.clients_train == "none":
        raise ConfigError(
            "federation.local_epochs is 0 and feda2v.global_model_train is false, so nothing would be trained; set "
            "global_model_train to true (the server trains on clients' statistics), or local_epochs to at least 1"
        )


def _check_server_optimizer(config: Config) -> None:
    """A server optimiser steps along the clients' change, so there must be one."""
    settings = config.feda2v
    if settings.server_optimizer != "none" and settings.adapter_aggregation_mode == "none":
        raise ConfigError(
            f"feda2v.server_optimizer is {settings.server_optimizer} but feda2v.adapter_aggregation_mode is none, "
            "which sends the server no change to step along; aggregate (weighted, avg, ...), or set server_optimizer "
            "to none"
        )


def _check_control_variates(config: Config) -> None:
    """SCAFFOLD reads the mean gradient off the way that a client went, and corrects clients that are averaged."""
    training = config.training
    if not training.control_variates:
        return
    if training.optimizer != "SGD" or training.momentum:
        given = f"optimizer is {training.optimizer}" + (
            f" with momentum {training.momentum:g}" * bool(training.momentum)
        )
        raise ConfigError(
            f"training.control_variates is true and training.{given}, but a client's variate is the mean gradient of "
            "plain steps; set optimizer to SGD and momentum to 0"
        )
    if config.feda2v.adapter_aggregation_mode == "none":
        raise ConfigError(
            "training.control_variates is true but feda2v.adapter_aggregation_mode is none: clients that are never "
            "averaged don't drift from an average; aggregate (avg, weighted, ...), or set control_variates to false"
        )
    if not config.federation.local_epochs:
        raise ConfigError(
            "training.control_variates is true but federation.local_epochs is 0: clients that take no steps have none "
            "to correct; set local_epochs to at least 1, or control_variates to false"
        )


def _check_distillation(config: Config) -> None:
    """Clients are distilled on rows of the generator, which their adapters understand alike."""
    settings, mode = config.feda2v, "feda2v.adapter_aggregation_mode is kd"
    if settings.adapter_aggregation_mode != "kd":
        return
    if not (settings.use_generator and settings.global_model_train):
        name = "global_model_train" if settings.use_generator else "use_generator"
        raise ConfigError(
            f"{mode} but feda2v.{name} is false: clients are distilled on rows of a trained generator; set "
            "use_generator and global_model_train to true, or the mode to weighted"
        )
    if not config.federation.local_epochs:
        raise ConfigError(
            f"{mode} but federation.local_epochs is 0: clients that don't train have nothing to be distilled; set "
            "local_epochs to at least 1, or the mode to weighted"
        )
    trainable = config.model.audio_encoder.trainable
    if trainable != "none":
        raise ConfigError(
            f"{mode} and model.audio_encoder.trainable is {trainable!r}: adapters of clients with encoders of their "
            "own don't read the same embeddings; set trainable to none, or the mode to weighted"
        )


def _trained_by_clients(settings: FedA2V) -> str:
    """Why clients train a generator, in words."""
    if settings.client_generator != "none":
        return f"feda2v.client_generator is {settings.client_generator}"
    return "feda2v.generator_type is residual_vae"


def _check_client_generator(config: Config) -> None:
    """Clients train residuals of embeddings that stay as they are."""
    settings, trainable = config.feda2v, config.model.audio_encoder.trainable
    trained = settings.clients_train
    if trained == "shared" and settings.client_generator == "own":
        raise ConfigError(
            "feda2v.generator_type is residual_vae, which clients average, but feda2v.client_generator is own; set "
            "generator_type to lowrank, or leave client_generator out"
        )
    if trained != "none" and trainable != "none":
        raise ConfigError(
            f"{_trained_by_clients(settings)} and model.audio_encoder.trainable is {trainable!r}, but clients "
            "train it on embeddings of a frozen encoder; set trainable to none, or generator_type to lowrank"
            " and client_generator to none"
        )
    needing = {
        "training.augmentation": config.training.augmentation > 0,
        "feda2v.save_generators": settings.save_generators,
        "feda2v.pretrained_generators": settings.pretrained_generators is not None,
    }
    if trained == "none" and any(needing.values()):
        name = next(name for name, given in needing.items() if given)
        raise ConfigError(f"{name} needs a generator on the clients; set feda2v.client_generator to own or shared")
    if settings.save_generators and config.federation.global_rounds == 1 and not settings.pretrained_generators:
        raise ConfigError(
            "feda2v.save_generators needs federation.global_rounds of 2 or more: clients measure what their generators "
            "start from in round 1, and train them from round 2 on"
        )
    if config.data.generators is None:
        return
    if trained != "none":
        raise ConfigError(
            "data.generators replaces recordings by rows of saved generators, on which clients can't train generators; "
            "set feda2v.client_generator to none, or feda2v.generator_type to lowrank"
        )
    if trainable != "none":
        raise ConfigError("data.generators makes embeddings, not audio; set model.audio_encoder.trainable to none")


def _check_granularity(settings: FedA2V) -> None:
    """Networks per class or group, where there are networks that the server trains."""
    granularity, kind, groups = settings.generator_granularity, settings.generator_type, settings.generator_class_groups
    if granularity != "unified" and kind not in GRANULAR:
        raise ConfigError(
            f"feda2v.generator_granularity is {granularity} but generator_type is {kind}, which has no networks to "
            f"share out; it goes with {', '.join(GRANULAR)}"
        )
    if granularity == "per_group" and not groups:
        raise ConfigError(
            "feda2v.generator_granularity is per_group, so generator_class_groups must list the classes of every group"
        )
    if not all((groups or {}).values()):
        raise ConfigError("feda2v.generator_class_groups has a group without a class; leave it out")
    grouped = [name for names in (groups or {}).values() for name in names]
    twice = sorted({name for name in grouped if grouped.count(name) > 1})
    if twice:
        raise ConfigError(f"feda2v.generator_class_groups names {twice[0]!r} twice; keep one")


def _check_growth(settings: FedA2V) -> None:
    """Only a latent vector of a VAE on the server grows."""
    if settings.generator_growth is not None and settings.generator_type not in VAES:
        raise ConfigError(
            f"feda2v.generator_growth is {settings.generator_growth:g} but generator_type is "
            f"{settings.generator_type}; it goes with {', '.join(VAES)}"
        )


def _wants_noise(privacy: Privacy) -> bool:
    return privacy.noise_multiplier > 0 or privacy.target_epsilon is not None


def _check_sums(config: Config) -> None:
    """What can be summed up, and what can be masked."""
    settings, privacy = config.feda2v, config.privacy
    used = settings.use_generator and settings.global_model_train
    by_client = {
        "feda2v.adapter_aggregation_mode is kd": settings.adapter_aggregation_mode == "kd",
        "training.prototype_weight isn't 0": config.training.prototype_weight > 0,
    }
    if privacy.statistics == "sums" and any(by_client.values()):
        what = next(name for name, wanted in by_client.items() if wanted)
        raise ConfigError(
            f"privacy.statistics is sums and {what}, which needs a row per client and class; set statistics to clients"
        )
    if (privacy.secure_sums or _wants_noise(privacy)) and config.training.control_variates:
        raise ConfigError(
            "training.control_variates is true, but changes of control variates are neither masked nor hidden by "
            "noise; leave it out, or privacy.secure_sums, noise_multiplier and target_epsilon"
        )
    if privacy.statistics == "sums" and used and settings.generator_type == "cof":
        raise ConfigError(
            "privacy.statistics is sums and feda2v.generator_type is cof, which recovers variances from the spread of "
            "the clients' means, which sums hide; set generator_type to lowrank or gaussian, or statistics to clients"
        )
    if not privacy.secure_sums:
        return
    if settings.adapter_aggregation_mode not in {"avg", "weighted"}:
        raise ConfigError(
            f"privacy.secure_sums is true and feda2v.adapter_aggregation_mode is {settings.adapter_aggregation_mode}, "
            "which needs more than the sum of the clients; set it to avg or weighted"
        )
    if settings.global_model_train and privacy.statistics != "sums":
        raise ConfigError(
            "privacy.secure_sums is true and privacy.statistics is clients, which sends a row per client and class; "
            "set statistics to sums"
        )
    if settings.clients_train != "none":
        raise ConfigError(
            f"privacy.secure_sums is true and {_trained_by_clients(settings)}, whose weights aren't masked; set "
            "generator_type to lowrank and client_generator to none"
        )
    if config.federation.quorum < 1:
        raise ConfigError(
            f"privacy.secure_sums is true and federation.quorum is {config.federation.quorum:g}, but a sum that a "
            "client is missing from can't be opened; set quorum to 1"
        )


def _check_noise(config: Config) -> None:
    """What the clients' contributions must be for noise to hide one of them."""
    settings, privacy = config.feda2v, config.privacy
    if privacy.noise_multiplier and privacy.target_epsilon is not None:
        raise ConfigError(
            f"privacy.noise_multiplier is {privacy.noise_multiplier:g} and privacy.target_epsilon is "
            f"{privacy.target_epsilon:g}; give one of them, the other follows"
        )
    if not _wants_noise(privacy):
        return
    if settings.adapter_aggregation_mode != "avg":
        raise ConfigError(
            f"privacy noise is on and feda2v.adapter_aggregation_mode is {settings.adapter_aggregation_mode}, but "
            "noise is calibrated for a plain sum in which all clients weigh the same; set it to avg"
        )
    if settings.global_model_train and privacy.statistics != "sums":
        raise ConfigError(
            "privacy noise is on and privacy.statistics is clients, but noise hides a client in a sum, not in its own "
            "means; set statistics to sums"
        )
    if settings.clients_train != "none":
        raise ConfigError(
            f"privacy noise is on and {_trained_by_clients(settings)}, whose numbers aren't bounded; set "
            "generator_type to lowrank and client_generator to none"
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
    if settings.clients_train != "none" and config.federation.global_rounds == 1 and not settings.pretrained_generators:
        found.append(
            "federation.global_rounds is 1: clients measure what their generators start from in round 1, and train "
            "them from round 2 on"
        )
    if config.training.augmentation and not config.federation.local_epochs:
        found.append("training.augmentation has no effect: federation.local_epochs is 0")
    privacy = config.privacy
    if privacy.min_count == 1 and not (privacy.secure_sums or _wants_noise(privacy)):
        found.append(
            "privacy.min_count is 1: the statistics of a class with one recording are that recording's embedding"
        )
    if not _wants_noise(privacy):
        found += [
            f"privacy.{name} has no effect: there is no noise (privacy.noise_multiplier is 0)"
            for name in ("delta", "clip_update", "clip_statistics", "embedding_norm")
            if getattr(privacy, name) != Privacy.model_fields[name].default
        ]
    return found
