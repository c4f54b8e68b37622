"""Spectrograms of sounds whose spectrum is known, files of every kind, and where long sound is cut."""

import numpy as np
import pytest
from scipy.io import wavfile

from jattn.models.pretrained.log_mel import RATE, log_mel, mel_filters, read_sound, windows


def tone(hertz, seconds=1.0, rate=RATE):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def test_filters_have_area_one_and_overlap():
    filters = mel_filters(80)
    assert (filters >= 0).all()
    areas = filters.sum(axis=1) * (RATE / 400)
    np.testing.assert_allclose(areas[60:], 1.0, atol=0.01)  # narrower ones hold few points of the spectrum
    assert areas.mean() == pytest.approx(1.0, abs=1e-3)
    centers = np.linspace(0, RATE / 2, 201)[filters.argmax(axis=1)]
    assert (np.diff(centers) >= 0).all()


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 3000.0, 6000.0])
def test_a_tone_is_heard_in_its_band(hertz):
    spectrogram = log_mel(tone(hertz))
    assert spectrogram.shape == (3000, 80) and spectrogram.dtype == np.float32
    band = spectrogram[20:80].mean(axis=0).argmax()
    assert mel_filters(80)[:, round(hertz / (RATE / 400))].argmax() == pytest.approx(band, abs=1)
    np.testing.assert_allclose(spectrogram[200:], spectrogram.max() - 2.0, atol=1e-5)  # silence: 8 / 4 below


def test_loudness_shifts_and_does_not_change_the_shape():
    sound = tone(800.0) + 0.1 * tone(2500.0)
    loud, soft = log_mel(sound), log_mel(sound / 10)
    np.testing.assert_allclose(loud - soft, 2 / 4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.uint8])
def test_files_of_every_kind_give_the_same_sound(tmp_path, dtype):
    sound = 0.5 * tone(440.0, 0.25)
    if dtype == np.uint8:
        samples = np.round(sound * 128 + 128).astype(dtype)
    elif dtype == np.float32:
        samples = sound.astype(dtype)
    else:
        samples = np.round(sound * np.iinfo(dtype).max).astype(dtype)
    wavfile.write(tmp_path / "a.wav", RATE, samples)
    np.testing.assert_allclose(read_sound(tmp_path / "a.wav"), sound, atol=1e-2 if dtype == np.uint8 else 1e-4)


def test_channels_are_averaged_and_rates_changed(tmp_path):
    sound = 0.5 * tone(440.0, 0.5, 44_100)
    wavfile.write(tmp_path / "a.wav", 44_100, np.stack([sound, -sound / 2], axis=1).astype(np.float32))
    found = read_sound(tmp_path / "a.wav")
    assert len(found) == RATE // 2
    middle = slice(500, -500)
    np.testing.assert_allclose(found[middle], (0.25 * 0.5 * tone(440.0, 0.5))[middle], atol=2e-3)


def test_files_that_are_no_sound(tmp_path):
    (tmp_path / "a.mp3").write_bytes(b"ID3" + bytes(100))
    with pytest.raises(ValueError, match="cannot be read as a WAV file"):
        read_sound(tmp_path / "a.mp3")
    with pytest.raises(FileNotFoundError):
        read_sound(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="at most 480000 samples"):
        log_mel(np.zeros(31 * RATE))


def test_long_sound_is_cut_where_it_is_quiet():
    sound = np.ones(70 * RATE)
    sound[28 * RATE : 28 * RATE + RATE // 5] = 0
    parts = windows(sound)
    assert [round(start, 1) for start, _ in parts][:2] == [0.0, 28.1]
    assert all(len(part) <= 30 * RATE for _, part in parts)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), sound)
    assert [start for start, _ in parts] == [0.0, *(np.cumsum([len(p) for _, p in parts])[:-1] / RATE)]
