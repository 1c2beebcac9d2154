"""Configuration: the schema, loading with overrides, the original's files, and explanations of keys."""

from __future__ import annotations

from fedsim.config.checks import check_config
from fedsim.config.explain import explain
from fedsim.config.loading import config_from_mapping, flatten, load_config, quickstart_path, resolved_yaml
from fedsim.config.schema import Config

__all__ = [
    "Config",
    "check_config",
    "config_from_mapping",
    "explain",
    "flatten",
    "load_config",
    "quickstart_path",
    "resolved_yaml",
]
