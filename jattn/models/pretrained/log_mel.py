"""Sound as Whisper hears it: logarithms of power in 80 bands of the mel scale, one column every 10 ms.

P[f, t] = |FFT(hann * frame_t)|^2;   E = log10 max(M P, 1e-10);   x = (max(E, max E - 8) + 4) / 4
"""

from __future__ import annotations

import math
import pathlib

import numpy as np

RATE = 16_000
"""Samples a second."""
WINDOW = 30
"""Seconds that the model hears at once."""
HOP = 160
_FRAME = 400


def mel_filters(bands: int) -> np.ndarray:
    """Triangles on the mel scale of Slaney, each of area 1: float64 `[bands, 201]`, over 0 .. 8 kHz.

    The scale is linear up to 1 kHz (3 mel in 200 Hz), and logarithmic above (27 mel in a factor of 6.4).

    Example:
        >>> mel_filters(80).shape
        (80, 201)
    """
    top = 15 + 27 * math.log(RATE / 2 / 1000) / math.log(6.4)
    mels = np.linspace(0, top, bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * math.log(6.4) / 27))
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    places = np.linspace(0, RATE / 2, _FRAME // 2 + 1)
    rising, falling = (places - low) / (middle - low), (high - places) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


def log_mel(sound: np.ndarray, bands: int = 80) -> np.ndarray:
    """The spectrogram of a window of sound.

    Args:
        sound: float samples in [-1, 1], at 16 kHz, at most 30 seconds; silence fills the window.
        bands: of the mel scale.

    Returns:
        float32 `[3000, bands]`.

    Raises:
        ValueError: more than 30 seconds, or no single row of samples.

    Example:
        >>> log_mel(np.zeros(16000)).shape
        (3000, 80)

    Source: Robust Speech Recognition via Large-Scale Weak Supervision (arXiv 2212.04356).
    """
    sound = np.asarray(sound, np.float64)
    if sound.ndim != 1 or len(sound) > RATE * WINDOW:
        raise ValueError(f"sound must be one row of at most {RATE * WINDOW} samples, got {list(sound.shape)}")
    filled = np.pad(sound, (0, RATE * WINDOW - len(sound)))
    padded = np.pad(filled, _FRAME // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::HOP][:-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FRAME) / _FRAME)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    energy = np.log10(np.maximum(power @ mel_filters(bands).T, 1e-10))
    return ((np.maximum(energy, energy.max() - 8) + 4) / 4).astype(np.float32)


def read_sound(path: str | pathlib.Path) -> np.ndarray:
    """Read a WAV file: channels averaged, resampled to 16 kHz.

    Args:
        path: of the file.

    Returns:
        float32 samples in [-1, 1].

    Raises:
        ValueError: the file is no WAV file that can be read.
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        rate, samples = wavfile.read(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # The library raises whatever its parsing ends in.
        raise ValueError(
            f"{path} cannot be read as a WAV file ({error}); convert it first, for example with "
            f"`ffmpeg -i {pathlib.Path(path).name} sound.wav`"
        ) from error
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float32) / 128 - 1
    elif np.issubdtype(samples.dtype, np.integer):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    sound = samples.astype(np.float32).reshape(len(samples), -1).mean(axis=1)
    if rate != RATE:
        shared = math.gcd(rate, RATE)
        sound = resample_poly(sound, RATE // shared, rate // shared).astype(np.float32)
    return sound


def windows(sound: np.ndarray, search: float = 5.0) -> list[tuple[float, np.ndarray]]:
    """Cut long sound into windows of at most 30 seconds, each at the quietest place of its last seconds.

    Args:
        sound: samples at 16 kHz.
        search: seconds at the end of a full window within which a quiet place is looked for.

    Returns:
        (start in seconds, samples) of each window.

    Example:
        >>> [(start, len(part)) for start, part in windows(np.zeros(16000))]
        [(0.0, 16000)]
    """
    parts, start, frame = [], 0, RATE // 10
    while len(sound) - start > RATE * WINDOW:
        first = start + int(RATE * (WINDOW - search))
        tail = sound[first : start + RATE * WINDOW]
        loudness = (tail[: len(tail) // frame * frame].reshape(-1, frame) ** 2).sum(axis=1)
        end = first + int(loudness.argmin()) * frame + frame // 2
        parts.append((start / RATE, sound[start:end]))
        start = end
    return [*parts, (start / RATE, sound[start:])]
