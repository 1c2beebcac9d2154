"""The search space: which keys can be searched, as Optuna distributions, and a trial's configuration from a sample.

A choice is sampled as its position in the list, so that values may be lists and mappings, and 1 and true stay apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fedsim.config import Config, check_config, config_from_mapping
from fedsim.config.keys import Key, find_key
from fedsim.config.schema import SearchRange
from fedsim.errors import ConfigError

# Trials share their resources, their store and the rounds by which they are compared.
FIXED = ("experiment.name", "experiment.description", "experiment.output_dir", "federation.global_rounds", "tracking.",
         "resources.")  # fmt: skip
# What the recordings' split, embeddings and targets don't depend on: trials that differ in these share one preparation.
UNPREPARED = ("training.", "feda2v.", "model.adapters.", "federation.cohort_size", "federation.local_epochs",
              "federation.quorum", "experiment.checkpoint_every", "experiment.evaluate_every",
              "privacy.share_variances")  # fmt: skip


def check_search(config: Config) -> None:
    """Refuse what no trial could run, before anything is started.

    Raises:
        ConfigError: the space is empty, a key can't be searched, or an end of a range or a choice isn't allowed.
    """
    check_config(config)
    space = config.search.space
    if any(kind.labels for kind in config.resources.more_actors.values()):
        raise ConfigError("resources.more_actors: a search places each trial as a whole, so no labels can be asked for")
    if not space:
        raise ConfigError(
            "search.space is empty: name keys to search, e.g. "
            "--set 'search.space.training.learning_rate={low: 1e-4, high: 1e-2, log: true}'"
        )
    for name, searched in space.items():
        if name.startswith(FIXED):
            raise ConfigError(f"search.space: {name!r} can't be searched, it must be the same in all trials")
        key = find_key(name)
        if key is None:  # check_config knows every key of the space
            raise AssertionError(name)
        if searched.choices is None and not _kinds(key) & {"number", "whole number"}:
            raise ConfigError(f"search.space.{name}: low and high are for numbers, give choices ({key.allowed})")
        for value in _extremes(searched, key):
            _check_value(name, value, key)


def distributions(space: Mapping[str, SearchRange]) -> dict[str, Any]:
    """Optuna's distribution of every searched key.

    Raises:
        ConfigError: Optuna isn't installed.
    """
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ImportError as error:
        raise ConfigError("searching needs Optuna: pip install 'fedsim-a2v[search]'") from error
    found: dict[str, Any] = {}
    for name, searched in space.items():
        if searched.choices is not None:
            found[name] = CategoricalDistribution(tuple(range(len(searched.choices))))
        elif searched.low is None or searched.high is None:  # check_config refuses it
            raise AssertionError(name)
        elif _is_whole(name, searched):
            found[name] = IntDistribution(int(searched.low), int(searched.high), log=searched.log)
        else:
            found[name] = FloatDistribution(searched.low, searched.high, log=searched.log)
    return found


def parameters(space: Mapping[str, SearchRange], sample: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the searched keys from what Optuna sampled: positions become the choices that stand there."""
    values: dict[str, Any] = {}
    for name, searched in space.items():
        values[name] = sample[name] if searched.choices is None else searched.choices[sample[name]]
    return values


def trial_config(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration of one trial: the searched keys set, the section `search` gone; checked as a file would be.

    Raises:
        ConfigError: the values don't go together.
    """
    mapping = config.model_dump(mode="json") | {"search": {}}
    for name, value in values.items():
        _set(mapping, name, value)
    return config_from_mapping(mapping, source="trial")


def shares_preparation(space: Mapping[str, SearchRange]) -> bool:
    """Whether no searched key changes recordings, split, partition, embeddings or targets."""
    return all(name.startswith(UNPREPARED) for name in space)


def shown(values: Mapping[str, Any]) -> str:
    """Parameters in one line, numbers with 4 digits: `training.learning_rate 0.00123, feda2v.generator_type vae`."""
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _is_whole(name: str, searched: SearchRange) -> bool:
    key = find_key(name)
    return searched.integer or (key is not None and "whole number" in _kinds(key))


def _kinds(key: Key) -> set[str]:
    return set(key.kind.split(" or "))


def _extremes(searched: SearchRange, key: Key) -> list[Any]:
    """The values that must be allowed for all to be."""
    if searched.choices is not None:
        return searched.choices
    ends = [end for end in (searched.low, searched.high) if end is not None]
    if not _is_whole(key.name, searched):
        return ends
    return [int(end) if end.is_integer() else end for end in ends]


def _check_value(name: str, value: Any, key: Key) -> None:
    """Hold a value against the schema alone; whether it goes with the others is told per trial."""
    mapping: dict[str, Any] = {}
    _set(mapping, name, value)
    try:
        Config.model_validate(mapping, strict=True)
    except ValidationError:
        raise ConfigError(f"search.space.{name}: {value!r} isn't allowed, expected {key.allowed}") from None


def _set(mapping: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        mapping = mapping.setdefault(section, {})
    mapping[last] = value
