"""Generators of audio embeddings, all behind one protocol.

A generator is fitted on class statistics and gives synthetic audio embeddings for the prompt embedding ("condition")
of a class. Only audio embeddings can be fed to adapters, so that is what every kind makes.

Legend: C classes, V condition width, n rows, S segments, D audio embedding width, M rows of class statistics.

To add a kind, write a class with `fit`, `sample`, `state` and `load`, and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedsim.errors import ModelError
from fedsim.models.generators.centred import Centred
from fedsim.models.generators.cgan import Cgan
from fedsim.models.generators.flow import Flow
from fedsim.models.generators.gan import Gan
from fedsim.models.generators.granular import Granular
from fedsim.models.generators.multimodal import Multimodal
from fedsim.models.generators.protocol import Evidence, Generator, GeneratorSpec
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.residual_vae import ResidualVae
from fedsim.models.generators.samplers import Cof, Gaussian, LowRank, Replay
from fedsim.models.generators.vae import Vae
from fedsim.seeding import rng

__all__ = [
    "KINDS",
    "LEARNT",
    "Evidence",
    "FitReport",
    "Generator",
    "GeneratorSpec",
    "Multimodal",
    "make_generator",
    "uses_covariance",
]


LEARNT = ("vae", "vae_plain", "multimodal", "flow", "gan", "cgan")
"""Kinds with networks that the server trains, on `generator_rows`."""

KINDS: dict[str, Callable[[GeneratorSpec], Generator]] = {
    "replay": lambda spec: Replay(),
    "oracle": lambda spec: Replay(),  # of recordings: see federation.oracle
    "gaussian": lambda spec: Gaussian(),
    "cof": lambda spec: Cof(),
    "lowrank": lambda spec: LowRank(),
    "full": lambda spec: LowRank(),
    "residual_vae": lambda spec: ResidualVae(),
    "vae": Vae,
    "vae_plain": lambda spec: Centred(Vae(spec)),
    "multimodal": Multimodal,
    "flow": lambda spec: Centred(Flow(spec)),
    "gan": Gan,
    "cgan": Cgan,
}


def uses_covariance(kind: str, rows: str) -> bool:
    """Whether a kind, trained on these rows, needs the pooled within-class covariance."""
    return kind in ("lowrank", "full", "residual_vae") or (kind in LEARNT and rows == "lowrank")


def make_generator(kind: str, spec: GeneratorSpec) -> Generator:
    """Build a generator by kind; of several networks where `spec.groups` asks for them.

    Raises:
        ModelError: unknown kind.
    """
    if kind not in KINDS:
        raise ModelError(f"unknown generator {kind!r}; known: {', '.join(KINDS)}")
    make = KINDS[kind]
    if not spec.groups:
        return make(spec)
    # Networks of their own start apart.
    seeds = [int(rng(spec.seed, "generator-group", number).integers(2**31)) for number in range(len(spec.groups))]
    return Granular(spec.groups, [make(replace(spec, seed=seed, groups=())) for seed in seeds])
