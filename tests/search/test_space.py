from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from fedsim.config import Config, config_from_mapping, resolved_yaml
from fedsim.config.schema import SearchRange
from fedsim.errors import ConfigError
from fedsim.search.space import check_search, distributions, parameters, shares_preparation, shown, trial_config

Make = Callable[..., Config]


def ranges(**space: dict[str, Any]) -> dict[str, SearchRange]:
    return {name.replace("__", "."): SearchRange(**given) for name, given in space.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ranges_become_distributions_with_their_ends_and_scale() -> None:
    found = distributions(
        ranges(
            training__learning_rate={"low": 1e-4, "high": 1e-1, "log": True},
            training__momentum={"low": 0.0, "high": 0.9},
            federation__local_epochs={"low": 1.0, "high": 8.0, "log": True},
            training__batch_size={"low": 8.0, "high": 64.0, "integer": True},
            feda2v__generator_type={"choices": ["vae", "gan"]},
        )
    )
    kinds = {
        name: (type(of).__name__, getattr(of, "low", None), getattr(of, "high", None)) for name, of in found.items()
    }
    assert kinds == {
        "training.learning_rate": ("FloatDistribution", 1e-4, 1e-1),
        "training.momentum": ("FloatDistribution", 0.0, 0.9),
        "federation.local_epochs": ("IntDistribution", 1, 8),  # a whole number by the key's own type
        "training.batch_size": ("IntDistribution", 8, 64),
        "feda2v.generator_type": ("CategoricalDistribution", None, None),
    }
    assert [found[name].log for name in list(found)[:4]] == [True, False, True, False]
    assert found["feda2v.generator_type"].choices == (0, 1)


def test_positions_become_choices_of_any_kind() -> None:
    space = ranges(
        model__adapters__clip__hidden={"choices": [[8], [16, 16]]},
        privacy__share_variances={"choices": [True, False]},
        training__learning_rate={"low": 0.1, "high": 0.2},
    )
    sample = {"model.adapters.clip.hidden": 1, "privacy.share_variances": 0, "training.learning_rate": 0.15}
    assert parameters(space, sample) == {
        "model.adapters.clip.hidden": [16, 16],
        "privacy.share_variances": True,
        "training.learning_rate": 0.15,
    }


def test_a_trial_is_the_configuration_with_the_keys_set_and_without_the_search(make_config: Make) -> None:
    config = make_config(space={"training.learning_rate": {"low": 0.1, "high": 0.2}}, num_trials=3)
    values = {"training.learning_rate": 0.15, "model.adapters.clip.hidden": [32], "feda2v.generator_type": "gan"}
    trial = trial_config(config, values)
    assert (trial.training.learning_rate, trial.feda2v.generator_type) == (0.15, "gan")
    assert trial.model.adapters["clip"].hidden == [32]
    assert trial.search.space == {}
    assert config_from_mapping(yaml.safe_load(resolved_yaml(trial))) == trial
    same = trial_config(config, {})
    assert same.model_copy(update={"search": config.search}) == config


def test_values_that_do_not_go_together_are_one_clear_error(make_config: Make) -> None:
    config = make_config(space={"federation.cohort_size": {"choices": [2, 50]}})
    check_search(config)  # each value alone is allowed
    with pytest.raises(ConfigError, match=r"^trial: federation.cohort_size is 50 but federation.num_clients is 3"):
        trial_config(config, {"federation.cohort_size": 50})


def test_preparation_is_shared_unless_a_key_changes_data_or_encoders() -> None:
    one = {"low": 0.0, "high": 1.0}
    assert shares_preparation(
        ranges(training__learning_rate=one, feda2v__text_anchor=one, model__adapters__clip__width=one)
    )
    for name in ("federation__alpha", "model__audio_encoder__dim", "experiment__seed", "data__test_share"):
        assert not shares_preparation(ranges(training__learning_rate=one, **{name: one}))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"training.learning_rat": {"low": 0.1, "high": 1.0}}, "did you mean 'training.learning_rate'"),
        ({"training.learning_rate": {"low": 1.0, "high": 0.1}}, "low is 1 and high is 0.1; low must be below high"),
        ({"training.learning_rate": {"low": 0.1, "high": 0.1}}, "low must be below high"),
        ({"training.learning_rate": {}}, "give low and high, or choices"),
        ({"training.learning_rate": {"low": 0.1}}, "give low and high, or choices"),
        ({"training.learning_rate": {"low": 0.0, "high": 1.0, "log": True}}, "log needs a range above 0"),
        ({"training.learning_rate": {"low": 0.0, "high": 1.0}}, "0.0 isn't allowed, expected number, above 0"),
        ({"training.momentum": {"low": 0.0, "high": 1.0}}, "1.0 isn't allowed, expected number, at least 0, below 1"),
        ({"federation.local_epochs": {"low": 1.0, "high": 2.5}}, "2.5 isn't allowed, expected whole number"),
        (
            {"feda2v.generator_type": {"choices": ["vae", "vea"]}},
            "'vea' isn't allowed, expected one of replay, gaussian",
        ),
        ({"feda2v.generator_type": {"low": 0.0, "high": 1.0}}, "low and high are for numbers, give choices"),
        ({"feda2v.generator_type": {"choices": []}}, "choices with at least one value"),
        ({"search.num_trials": {"low": 1.0, "high": 3.0}}, "isn't a key that can be searched"),
        ({"training": {"choices": [1]}}, "isn't a key that can be searched"),
        ({"resources.client_actors": {"choices": [1, 2]}}, "must be the same in all trials"),
        ({"federation.global_rounds": {"choices": [1, 2]}}, "must be the same in all trials"),
        ({}, "search.space is empty"),
    ],
)
def test_a_bad_space_is_one_line_before_anything_starts(make_config: Make, space: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_search(make_config(space=space))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_optuna_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "optuna.distributions", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedsim-a2v\[search\]'"):
        distributions(ranges(training__learning_rate={"low": 0.1, "high": 0.2}))


def test_parameters_are_shown_with_four_digits() -> None:
    assert shown({"training.learning_rate": 0.00123456, "feda2v.generator_type": "vae", "x": 12345}) == (
        "training.learning_rate 0.001235, feda2v.generator_type vae, x 12345"
    )
