"""Checks between keys of methods: training, server step, generators and privacy that don't go together."""

from __future__ import annotations

from collections import Counter

from fedsim.config.schema import Config, FedA2V
from fedsim.errors import ConfigError

COVARIANCE = ("lowrank", "full")
LEARNT = ("vae", "vae_plain", "multimodal", "flow", "gan", "cgan")
GRANULAR = ("vae", "vae_plain", "flow", "gan", "cgan")
VAES = ("vae", "vae_plain", "multimodal")


def check_methods(config: Config) -> None:
    """Check keys of methods against each other.

    Raises:
        ConfigError: two keys don't go together; the message names them and both values.
    """
    _check_local_epochs(config)
    _check_server_optimizer(config)
    _check_control_variates(config)
    _check_distillation(config)
    _check_client_generator(config)
    _check_granularity(config.feda2v)
    _check_growth(config.feda2v)
    _check_sums(config)
    _check_noise(config)


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
    mode = config.feda2v.adapter_aggregation_mode
    if mode not in {"avg", "weighted", "kd"}:
        why = "clients that are never averaged don't drift from an average"
        if mode != "none":
            why = "the server's variate is a plain mean, which one wrong client moves as far as it likes"
        raise ConfigError(
            f"training.control_variates is true but feda2v.adapter_aggregation_mode is {mode}: {why}; set it to avg, "
            "weighted or kd, or control_variates to false"
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
    twice = sorted(name for name, times in Counter(grouped).items() if times > 1)
    if twice:
        raise ConfigError(f"feda2v.generator_class_groups names {twice[0]!r} twice; keep one")


def _check_growth(settings: FedA2V) -> None:
    """Only a latent vector of a VAE on the server grows."""
    if settings.generator_growth is not None and settings.generator_type not in VAES:
        raise ConfigError(
            f"feda2v.generator_growth is {settings.generator_growth:g} but generator_type is "
            f"{settings.generator_type}; it goes with {', '.join(VAES)}"
        )


def _check_sums(config: Config) -> None:
    """What can be summed up, and what can be masked."""
    settings, privacy = config.feda2v, config.privacy
    used = settings.use_generator and settings.global_model_train
    by_client = {
        "feda2v.adapter_aggregation_mode is kd": settings.adapter_aggregation_mode == "kd",
        "training.prototype_weight isn't 0": config.training.prototype_weight > 0,
        "feda2v.generator_type is oracle": used and settings.generator_type == "oracle",
    }
    hidden = {
        "privacy.statistics is sums": privacy.statistics == "sums",
        "privacy.secure_sums is true": privacy.secure_sums,
        "privacy noise is on": privacy.adds_noise,
    }
    if any(hidden.values()) and any(by_client.values()):
        how, what = (next(name for name, given in said.items() if given) for said in (hidden, by_client))
        raise ConfigError(f"{how} and {what}, which needs what single clients hold; leave out one of them")
    if (privacy.secure_sums or privacy.adds_noise) and config.training.control_variates:
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
    if not privacy.adds_noise:
        return
    used = settings.use_generator and settings.global_model_train
    wants_rows = settings.generator_type in LEARNT and settings.generator_rows == "lowrank"
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
    if used and (settings.generator_type in COVARIANCE or wants_rows):
        what = f"generator_type is {settings.generator_type}" + (", generator_rows lowrank" if wants_rows else "")
        raise ConfigError(
            f"privacy noise is on and feda2v.{what}: a covariance under noise is mostly noise; set generator_type to "
            "replay or gaussian, or generator_rows to moments"
        )
    if settings.clients_train != "none":
        raise ConfigError(
            f"privacy noise is on and {_trained_by_clients(settings)}, whose numbers aren't bounded; set "
            "generator_type to lowrank and client_generator to none"
        )
