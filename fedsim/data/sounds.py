"""Ten families of environmental sounds, synthesised from noise, harmonics and clicks.

Each family is a function (voice, stream, samples) -> waveform [samples] float32, at 16 kHz and any level. `voice` holds
what all clips of one source recording share (pitch, timbre, rates), `stream` what differs between its clips (timing).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

RATE = 16_000
"""Sample rate of all families in Hz."""

_TABLE = 4096  # samples of one period in a wave table


def shaped_noise(
    stream: np.random.Generator, samples: int, *, tilt: float = 0.0, low: float = 20.0, high: float = 8000.0
) -> np.ndarray:
    """Gaussian noise of unit power [samples], falling by `tilt` x 3 dB per octave between `low` and `high` Hz."""
    frequency = np.fft.rfftfreq(samples, 1 / RATE).astype(np.float32)
    frequency[0] = frequency[1]
    gain = frequency ** np.float32(-tilt / 2)
    gain /= np.sqrt((1 + (low / frequency) ** 4) * (1 + (frequency / high) ** 4))
    pairs = stream.standard_normal((len(frequency), 2), dtype=np.float32) * gain[:, None]
    noise = np.fft.irfft(pairs.view(np.complex64)[:, 0], samples)
    return _unit(noise)


def _unit(waveform: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = waveform / np.float32(np.sqrt(np.mean(np.square(waveform)) + 1e-12))
    return scaled


def _tone(pitch: np.ndarray, brightness: float, formant: float) -> np.ndarray:
    """Harmonic tone of a varying pitch in Hz [samples]: a wave table, so it costs one look-up per sample.

    Args:
        pitch: pitch of every sample in Hz.
        brightness: how slowly harmonics fall; harmonic h has weight brightness ** (h - 1).
        formant: harmonics near this frequency in Hz are stronger.
    """
    mean = float(pitch.mean())
    harmonic = np.arange(1, max(2, min(40, int(7000 / pitch.max())) + 1))
    weight = brightness ** (harmonic - 1.0) * (1 + 3 * np.exp(-(((harmonic * mean - formant) / (0.35 * formant)) ** 2)))
    spectrum = np.zeros(_TABLE // 2 + 1, dtype=np.complex64)
    spectrum[harmonic] = weight * np.exp(1j * harmonic**2)  # spread phases: no clicks
    table = np.fft.irfft(spectrum, _TABLE).astype(np.float32)
    phase = np.cumsum(pitch / RATE)
    return _unit(table[(phase * _TABLE).astype(np.int64) % _TABLE])


def _bump(samples: int, attack: float, decay: float) -> np.ndarray:
    """Envelope [samples] that rises over the share `attack` of its length and falls by exp(-decay)."""
    position = np.linspace(0, 1, samples, dtype=np.float32)
    fall = np.exp(-decay * np.maximum(position - attack, 0)) * (1 - position**8)
    return np.asarray(np.minimum(position / attack, 1) * fall, dtype=np.float32)


def _place(samples: int, events: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Add short events to silence [samples]; what would stick out is cut."""
    out = np.zeros(samples, dtype=np.float32)
    for start, event in events:
        part = event[: max(0, samples - start)]
        out[start : start + len(part)] += part
    return out


def _clicks(positions: np.ndarray, level: np.ndarray, samples: int, *, ring: float, decay: float) -> np.ndarray:
    """Clicks at sample `positions` [E] of given levels [E] that ring at `ring` Hz and fade in `decay` seconds."""
    impulses = np.zeros(samples, dtype=np.float32)
    np.add.at(impulses, np.minimum(positions, samples - 1), level.astype(np.float32))
    time = np.arange(int(10 * decay * RATE), dtype=np.float32) / RATE
    response = np.exp(-time / decay) * np.sin(2 * np.pi * ring * time)
    # Circular: the fading of the last clicks wraps to the beginning, which nobody hears.
    return np.fft.irfft(np.fft.rfft(impulses) * np.fft.rfft(response, samples), samples)


def _dog(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    pitch, length, brightness = voice.uniform(180, 500), voice.uniform(0.08, 0.25), voice.uniform(0.6, 0.85)
    formant, hoarse, gap = voice.uniform(500, 1300), voice.uniform(0.05, 0.4), voice.uniform(0.25, 1.0)
    events, start = [], stream.uniform(0, 0.5)
    while start < samples / RATE - 0.1:
        size = int(RATE * length * stream.uniform(0.8, 1.25))
        contour = pitch * stream.uniform(0.9, 1.1) * (1.15 - 0.45 * np.linspace(-0.3, 1, size) ** 2)
        bark = _tone(contour, brightness, formant) + hoarse * shaped_noise(stream, size, low=400, high=4000)
        events.append((int(start * RATE), bark * _bump(size, 0.08, 3) * stream.uniform(0.5, 1)))
        start += length + gap * stream.exponential(0.8) + 0.05
    return _place(samples, events)


def _rooster(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    pitch, brightness, formant = voice.uniform(480, 900), voice.uniform(0.75, 0.93), voice.uniform(1600, 3200)
    lengths = [*voice.uniform(0.1, 0.3, 3).tolist(), voice.uniform(0.5, 1.1)]
    heights, hoarse = [0.8, 1.0, 1.1, voice.uniform(1.05, 1.35)], voice.uniform(0.05, 0.5)
    events, start = [], stream.uniform(0, 0.4)
    for length, height in zip(lengths, heights, strict=True):
        size = int(RATE * length * stream.uniform(0.9, 1.1))
        contour = pitch * height * (1 + 0.12 * np.sin(np.linspace(0, np.pi, size)) - 0.1 * np.linspace(0, 1, size))
        crow = _tone(contour, brightness, formant) + hoarse * shaped_noise(stream, size, low=1000, high=6000)
        events.append((int(start * RATE), crow * _bump(size, 0.15, 0.8)))
        start += length * stream.uniform(1.0, 1.3)
    return _place(samples, events)


def _rain(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    tilt, high, drops = voice.uniform(-0.4, 1.0), voice.uniform(2500, 8000), voice.uniform(20, 300)
    noise = shaped_noise(stream, samples, tilt=tilt, low=voice.uniform(50, 600), high=high)
    number = stream.poisson(drops * samples / RATE)
    level = stream.exponential(voice.uniform(0.1, 1.2), number)
    ring, decay = voice.uniform(1500, 5000), voice.uniform(0.001, 0.006)
    clicks = _clicks(stream.integers(0, samples, number), level, samples, ring=ring, decay=decay)
    return np.asarray(noise + clicks, dtype=np.float32)


def _sea_waves(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    tilt, high, period = voice.uniform(0.3, 1.6), voice.uniform(1000, 6000), voice.uniform(1.5, 6)
    angle = 2 * np.pi * (np.arange(samples, dtype=np.float32) / RATE / period + stream.uniform())
    swell = np.exp(voice.uniform(0.4, 1.4) * np.sin(angle))
    rumble = shaped_noise(stream, samples, tilt=tilt, low=30, high=high)
    hiss = shaped_noise(stream, samples, low=1000, high=6000)
    return np.asarray(swell * (rumble + voice.uniform(0.05, 0.6) * swell * hiss), dtype=np.float32)


def _crackling_fire(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    rumble = shaped_noise(stream, samples, tilt=voice.uniform(0.8, 2), low=30, high=voice.uniform(500, 3000))
    number = stream.poisson(voice.uniform(8, 60) * samples / RATE)
    level = stream.exponential(voice.uniform(2, 7), number) ** 1.1
    ring, decay = voice.uniform(1000, 5000), voice.uniform(0.0008, 0.008)
    clicks = _clicks(stream.integers(0, samples, number), level, samples, ring=ring, decay=decay)
    return np.asarray(rumble + clicks, dtype=np.float32)


def _crying_baby(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    pitch, brightness, formant = voice.uniform(300, 560), voice.uniform(0.65, 0.9), voice.uniform(900, 2400)
    length, gap, vibrato = voice.uniform(0.4, 1.3), voice.uniform(0.1, 0.6), voice.uniform(0.005, 0.05)
    hoarse, wobble = voice.uniform(0.02, 0.5), voice.uniform(4, 9)
    events, start = [], stream.uniform(0, 0.5)
    while start < samples / RATE - 0.1:
        size = int(RATE * length * stream.uniform(0.7, 1.3))
        time = np.arange(size) / RATE
        contour = pitch * stream.uniform(0.9, 1.1) * (0.85 + 0.3 * np.sin(np.pi * np.linspace(0, 1, size)))
        contour *= 1 + vibrato * np.sin(2 * np.pi * wobble * time)
        cry = _tone(contour, brightness, formant) + hoarse * shaped_noise(stream, size, low=800, high=5000)
        events.append((int(start * RATE), cry * _bump(size, 0.2, 1) * stream.uniform(0.6, 1)))
        start += length + gap * stream.uniform(0.5, 1.5)
    return _place(samples, events)


def _sneezing(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    breath, burst = int(RATE * voice.uniform(0.2, 0.8)), int(RATE * voice.uniform(0.15, 0.45))
    pitch, voiced = voice.uniform(120, 350), voice.uniform(0.0, 0.6)
    low, high, formant = voice.uniform(600, 2000), voice.uniform(4000, 8000), voice.uniform(500, 1500)
    events, start = [], int(RATE * stream.uniform(0, 0.6))
    for _ in range(int(voice.integers(1, 3))):
        inhale = shaped_noise(stream, breath, low=600, high=3500) * np.linspace(0, 1, breath, dtype=np.float32) ** 2
        blow = shaped_noise(stream, burst, low=low, high=high)
        blow = blow + voiced * _tone(pitch * np.linspace(1.2, 0.7, burst), 0.8, formant)
        events += [(start, 0.15 * inhale), (start + breath, blow * _bump(burst, 0.05, 3))]
        start += breath + burst + int(RATE * stream.uniform(0.2, 1))
    return _place(samples, events)


def _clock_tick(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    rate, ring, decay = voice.uniform(0.9, 5), voice.uniform(1800, 5500), voice.uniform(0.002, 0.012)
    ticks = np.arange(stream.uniform(0, 1), samples / RATE * rate, 1.0) / rate
    level = np.where(np.arange(len(ticks)) % 2, voice.uniform(0.3, 1), 1.0) * stream.uniform(0.9, 1.1, len(ticks))
    jitter = stream.normal(0, 0.003, len(ticks))
    position = (np.clip(ticks + jitter, 0, None) * RATE).astype(np.int64)
    tick = _clicks(position, level, samples, ring=ring, decay=decay)
    second = _clicks(position + int(RATE * 0.012), level, samples, ring=ring * voice.uniform(0.4, 0.8), decay=decay)
    return np.asarray(tick + voice.uniform(0, 0.8) * second, dtype=np.float32)


def _helicopter(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    rate, sharp, depth = voice.uniform(9, 26), voice.uniform(1, 5), voice.uniform(0.4, 1)
    time = np.arange(samples, dtype=np.float32) / RATE
    angle = 2 * np.pi * rate * time * (1 + 0.02 * np.sin(2 * np.pi * 0.3 * time + stream.uniform(0, 6)))
    chop = 1 - depth + depth * np.exp(sharp * (np.sin(angle) - 1))
    body = shaped_noise(stream, samples, tilt=voice.uniform(0.6, 2), low=30, high=voice.uniform(600, 4000))
    turbine = _tone(np.full(samples, voice.uniform(300, 1500)), 0.4, 1000)
    return np.asarray(chop * body + voice.uniform(0, 0.25) * turbine, dtype=np.float32)


def _chainsaw(voice: np.random.Generator, stream: np.random.Generator, samples: int) -> np.ndarray:
    pitch, brightness, formant = voice.uniform(60, 180), voice.uniform(0.85, 0.96), voice.uniform(800, 3000)
    time = np.arange(samples, dtype=np.float32) / RATE
    revs = 1 + voice.uniform(0, 0.35) * np.sin(2 * np.pi * voice.uniform(0.1, 0.7) * time + stream.uniform(0, 6))
    buzz = _tone(pitch * revs, brightness, formant)
    rattle = 1 + 0.5 * np.sin(2 * np.pi * np.cumsum(pitch * revs / 2) / RATE)
    noise = shaped_noise(stream, samples, tilt=voice.uniform(0, 1.5), low=100, high=voice.uniform(2000, 7000))
    return np.asarray(rattle * (buzz + voice.uniform(0.1, 0.8) * noise), dtype=np.float32)


FAMILIES: Mapping[str, Callable[[np.random.Generator, np.random.Generator, int], np.ndarray]] = {
    "dog": _dog,
    "rooster": _rooster,
    "rain": _rain,
    "sea_waves": _sea_waves,
    "crackling_fire": _crackling_fire,
    "crying_baby": _crying_baby,
    "sneezing": _sneezing,
    "clock_tick": _clock_tick,
    "helicopter": _helicopter,
    "chainsaw": _chainsaw,
}
"""Class name -> how it sounds; the names and their order are ESC-10's."""
