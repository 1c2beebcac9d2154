"""Decoding and resampling: what goes in as a sine comes out as the same sine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import soundfile

from fedsim.data.audio import FileSource, read_audio, resample
from fedsim.errors import DataError

PITCH = 440.0


def sine(rate, seconds=0.5, level=0.5):
    return (level * np.sin(2 * np.pi * PITCH * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def pitch_and_level(waveform, rate):
    """Frequency and amplitude of the strongest component, away from the edges."""
    middle = waveform[len(waveform) // 8 : -len(waveform) // 8] * 1.0
    window = np.hanning(len(middle))
    spectrum = np.abs(np.fft.rfft(middle * window, 1 << 17))
    peak = int(spectrum.argmax())
    return peak * rate / (1 << 17), 2 * spectrum[peak] / window.sum()


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (22050, 2), (44100, 1), (48000, 2)])
def test_a_sine_survives_every_format_and_rate(tmp_path, suffix, rate, channels):
    path = tmp_path / f"sine.{suffix}"
    soundfile.write(path, np.repeat(sine(rate)[:, None], channels, axis=1), rate)
    waveform = read_audio(path, 16_000)
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert np.abs(waveform).max() <= 1
    # mp3 frames are padded by at most a few; the others keep their length
    assert 8000 <= len(waveform) <= (9500 if suffix == "mp3" else 8001)
    pitch, level = pitch_and_level(waveform[:8000], 16_000)
    assert pitch == pytest.approx(PITCH, abs=1)
    assert level == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6])
def test_channels_are_averaged(tmp_path, channels):
    path = tmp_path / "many.wav"
    one = sine(16_000)
    weights = np.arange(1, channels + 1) / channels
    soundfile.write(path, one[:, None] * weights, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path, 16_000), one * weights.mean(), atol=1e-6)


def test_tones_above_the_new_band_are_removed(tmp_path):
    path = tmp_path / "high.wav"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 15_000 * np.arange(24_000) / 48_000), 48_000)
    assert np.abs(read_audio(path, 16_000)[200:-200]).max() < 0.01  # it would alias to 1 kHz


def test_resampling_clips_overshoot_and_keeps_the_exact_length():
    square = np.sign(sine(44_100, seconds=1.0))
    resampled = resample(square, 44_100, 16_000)
    assert len(resampled) == 16_000
    assert np.abs(resampled).max() == 1
    with pytest.raises(DataError, match="positive, got 44100 Hz to 0 Hz"):
        resample(square, 44_100, 0)


def test_lossy_overshoot_is_clipped_but_integer_scaled_floats_are_refused(tmp_path):
    path = tmp_path / "loud.wav"
    soundfile.write(path, sine(16_000, level=1.3), 16_000, subtype="FLOAT")
    assert np.abs(read_audio(path, 16_000)).max() == 1
    soundfile.write(path, sine(16_000, level=20_000), 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"loud\.wav: samples reach 2e\+04, expected -1 to 1"):
        read_audio(path, 16_000)


def write_bad(path, kind):
    if kind == "text":
        path.write_text("not audio")
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0, np.float32), 16_000)
    elif kind in ("nan", "infinite"):
        bad = sine(16_000)
        bad[100] = np.nan if kind == "nan" else np.inf
        soundfile.write(path, bad, 16_000, subtype="FLOAT")
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("text", "wav, flac, ogg and mp3"),
        ("zero bytes", "wav, flac, ogg and mp3"),
        ("no samples", "no samples"),
        ("nan", "NaN or infinite"),
        ("infinite", "NaN or infinite"),
        ("folder", "no such file"),
        ("missing", "no such file"),
    ],
)
def test_bad_files_are_named_with_the_cause(tmp_path, kind, cause):
    path = tmp_path / "bad.wav"
    write_bad(path, kind)
    with pytest.raises(DataError) as error:
        read_audio(path, 16_000)
    assert str(path) in str(error.value)
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_flac_is_an_error(tmp_path):
    path = tmp_path / "cut.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000)
    soundfile.write(path, noise, 16_000)
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(DataError, match=r"cut\.flac"):
        read_audio(path, 16_000)


def test_file_source_reads_and_hashes_by_index(tmp_path):
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for level, path in zip((0.2, 0.4), paths, strict=True):
        soundfile.write(path, sine(16_000, level=level), 16_000)
    source = FileSource(tuple(map(str, paths)))
    assert np.abs(source.waveform(1, 16_000)).max() == pytest.approx(0.4, abs=1e-3)
    assert source.content_hash(0) == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert source.content_hash(0) != source.content_hash(1)
    paths[0].unlink()
    with pytest.raises(DataError, match=r"a\.wav: No such file"):
        source.content_hash(0)
