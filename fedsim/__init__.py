"""fedsim: federated learning of audio-to-visual adapters, simulated on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_adapter", "load_config", "resume", "run"]

if TYPE_CHECKING:
    from fedsim.cli.session import resume as resume
    from fedsim.cli.session import run as run
    from fedsim.config import load_config as load_config
    from fedsim.models.saved import load_adapter as load_adapter

_HOMES = {
    "load_adapter": "fedsim.models.saved",
    "load_config": "fedsim.config",
    "resume": "fedsim.cli.session",
    "run": "fedsim.cli.session",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import fedsim` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
