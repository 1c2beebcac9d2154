"""Audio files: any format that libsndfile reads (wav, flac, ogg, mp3 ...), any rate, any number of channels."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import DataError

# Lossy decoders overshoot full scale a little; a float file far beyond it was scaled as integers.
_LARGEST_OVERSHOOT = 2.0
_LOWEST_RATE, _HIGHEST_RATE = 1000, 384_000
# A header may announce more samples than any memory holds; room is made for as many as come.
_AT_ONCE = 2**22


def resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample by the exact rational ratio with an anti-aliasing filter, and clip the filter's overshoot to [-1, 1].

    Args:
        waveform: float32 [samples].
        from_rate: its sample rate in Hz.
        to_rate: the wanted sample rate in Hz.

    Returns:
        float32 [ceil(samples * to_rate / from_rate)].

    Raises:
        DataError: a rate isn't positive.
    """
    if from_rate < 1 or to_rate < 1:
        raise DataError(f"sample rates must be positive, got {from_rate} Hz to {to_rate} Hz")
    if from_rate != to_rate:
        from scipy.signal import resample_poly

        divisor = math.gcd(from_rate, to_rate)
        waveform = resample_poly(waveform, to_rate // divisor, from_rate // divisor)
    return np.asarray(np.clip(waveform, -1.0, 1.0), dtype=np.float32)


def read_audio(path: str | Path, sample_rate: int) -> np.ndarray:
    """Decode one file to mono at the wanted rate.

    Args:
        path: the file.
        sample_rate: wanted rate in Hz.

    Returns:
        float32 [samples] in [-1, 1]: the mean over all channels.

    Raises:
        DataError: the file is missing, not audio, cut short, empty, or holds NaN, infinite or far too large samples.
    """
    samples, file_rate = _decode(Path(path))
    if samples.shape[0] == 0:
        raise DataError(f"can't read {path}: it holds no samples")
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise DataError(f"can't read {path}: it holds NaN or infinite samples")
    if peak > _LARGEST_OVERSHOOT:
        raise DataError(f"can't read {path}: samples reach {peak:.4g}, expected -1 to 1 (floats scaled as integers?)")
    return resample(samples.mean(axis=1), file_rate, sample_rate)


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """All channels of a file as float32 [samples, channels], and its sample rate in Hz."""
    import soundfile

    if not path.is_file():
        raise DataError(f"can't read {path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            if not _LOWEST_RATE <= file.samplerate <= _HIGHEST_RATE:
                raise DataError(
                    f"can't read {path}: its sample rate is {file.samplerate} Hz, read are {_LOWEST_RATE} to "
                    f"{_HIGHEST_RATE} Hz (a damaged header?)"
                )
            samples = _samples(file)
            missing = file.frames - len(samples)
            # The length of an MP3 is an estimate; everywhere else fewer samples than announced mean a damaged file.
            if missing > 0 and file.format != "MP3":
                raise DataError(f"can't read {path}: it is cut short, {missing} of {file.frames} samples are missing")
            return samples, int(file.samplerate)
    except (OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise DataError(f"can't read {path}: {cause}; wav, flac, ogg and mp3 files are read") from error


def _samples(file: Any) -> np.ndarray:
    """All samples of an open file, float32 [samples, channels]."""
    if file.frames <= _AT_ONCE:
        return np.asarray(file.read(dtype="float32", always_2d=True))
    parts: list[np.ndarray] = []
    while not parts or len(parts[-1]) == _AT_ONCE:
        parts.append(file.read(_AT_ONCE, dtype="float32", always_2d=True))
    return np.concatenate(parts)


@dataclass(frozen=True)
class FileSource:
    """Audio from files.

    Attributes:
        paths: file of each recording [N].
    """

    paths: tuple[str, ...]

    def waveform(self, index: int, sample_rate: int) -> np.ndarray:
        """Recording `index`, decoded by `read_audio`."""
        return read_audio(self.paths[index], sample_rate)

    def content_hash(self, index: int) -> str:
        """SHA-256 of the file's bytes.

        Raises:
            DataError: the file can't be read.
        """
        try:
            return hashlib.sha256(Path(self.paths[index]).read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"can't read {self.paths[index]}: {error.strerror}") from error
