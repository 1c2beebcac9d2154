"""Synthesised environmental sounds with ESC-10's class names: a data set that needs no download.

Clips of 1.5 to 5 s, two of each source recording, recorded by imaginary authors whose microphones and rooms differ
(natural client key `author`), under background noise; five folds by source recording. Every clip is a function of
(seed, class, source recording, index) and of nothing else, and is synthesised whenever it is asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fedsim.data.audio import resample
from fedsim.data.recordings import Recordings
from fedsim.data.sounds import FAMILIES, RATE, shaped_noise
from fedsim.seeding import rng

_RECIPE = 1  # raise it whenever the sounds change, so that no cache takes the old ones for the new
_FOLDS = 5
_STEP = 800  # clip lengths are multiples of it (50 ms), which keeps the Fourier transforms fast
_AUTHORS = 40
_SNR_DB = (18.0, 40.0)  # level of the sound over the background


def open_synthetic(*, clips_per_class: int, seed: int) -> Recordings:
    """The synthesised data set; no audio is made yet.

    Args:
        clips_per_class: recordings of each of the ten classes. From 10 on two clips share a source recording, below
            that every clip has its own.
        seed: the experiment's seed.

    Returns:
        10 * clips_per_class recordings, class by class; folds 1 to 5, filled from fold 5 down.
    """
    classes = tuple(FAMILIES)
    per_group = 2 if clips_per_class >= 2 * _FOLDS else 1
    label = np.repeat(np.arange(len(classes)), clips_per_class)
    index = np.tile(np.arange(clips_per_class), len(classes))
    group = index // per_group
    num_groups = int(group.max()) + 1
    authors = [rng(seed, "synthetic author", name).integers(0, _AUTHORS, num_groups) for name in classes]
    author = np.stack(authors)[label, group]
    rows = zip(label.tolist(), group.tolist(), index.tolist(), author.tolist(), strict=True)
    clips = tuple((classes[number], *where) for number, *where in rows)
    return Recordings(
        name="synthetic",
        class_names=classes,
        label=label,
        group=np.array([f"{name}-{number}" for name, number, _, _ in clips]),
        names=tuple(f"synthetic-{seed}-{name}-{number}-{place}" for name, number, place, _ in clips),
        source=SyntheticSource(seed=seed, clips=clips),
        fold=_FOLDS - group % _FOLDS,
        columns={"author": np.array([f"author-{number:02d}" for number in author.tolist()])},
    )


@dataclass(frozen=True)
class SyntheticSource:
    """Synthesises clips on demand.

    Attributes:
        seed: the experiment's seed.
        clips: class name, source recording, index within the class and author of each clip [N].
    """

    seed: int
    clips: tuple[tuple[str, int, int, int], ...]

    def waveform(self, index: int, sample_rate: int) -> np.ndarray:
        """Clip `index` as float32 mono [samples], peak 0.19 to 0.95; synthesised at 16 kHz, then resampled."""
        name, group, place, author = self.clips[index]
        voice = rng(self.seed, "synthetic voice", name, group)
        stream = rng(self.seed, "synthetic clip", name, group, place)
        samples = _STEP * int(stream.integers(30, 101))
        sound = FAMILIES[name](voice, stream, samples)
        sound = sound / np.sqrt(np.mean(np.square(sound)) + 1e-12)
        background = shaped_noise(stream, samples, tilt=voice.uniform(0, 2), high=voice.uniform(1500, 8000))
        mixed = sound + 10 ** (-voice.uniform(*_SNR_DB) / 20) * background
        recorded = _microphone(mixed, rng(self.seed, "synthetic microphone", author))
        peak = 0.95 * 10 ** (-stream.uniform(0, 14) / 20)
        recorded *= np.float32(peak / np.abs(recorded).max())
        return resample(recorded, RATE, sample_rate)

    def content_hash(self, index: int) -> str:
        """SHA-256 of the recipe: its version, the seed and the clip."""
        return hashlib.sha256(repr(("fedsim.synthetic", _RECIPE, self.seed, self.clips[index])).encode()).hexdigest()


def _microphone(waveform: np.ndarray, room: np.random.Generator) -> np.ndarray:
    """Colour a waveform [samples] by an author's microphone: low and high cut, tilt, and one broad resonance."""
    frequency = np.fft.rfftfreq(len(waveform), 1 / RATE).astype(np.float32)
    frequency[0] = frequency[1]
    low, high, tilt = room.uniform(20, 150), room.uniform(5000, 8000), room.uniform(-0.2, 0.2)
    octaves = np.log2(frequency / np.float32(room.uniform(300, 4000)))
    gain = frequency**-tilt * (1 + room.uniform(0, 2) * np.exp(-(octaves**2)))
    gain /= np.sqrt((1 + (low / frequency) ** 4) * (1 + (frequency / high) ** 4))
    return np.fft.irfft(np.fft.rfft(waveform.astype(np.float32)) * gain, len(waveform)).astype(np.float32)
