"""Digits: a stratified split without overlap, images as scikit-learn gives them."""

import numpy as np
import pytest

from jattn import tasks


def rows(split):
    task = tasks.get("digits")
    batch = task.batch(split, 0, task.num_examples(split)) if split != "train" else None
    if batch is None:
        batch = task.examples("train", np.arange(task.num_examples("train")))
    return batch["inputs"], batch["targets"]


def test_splits_share_no_image_and_lose_none():
    from sklearn.datasets import load_digits

    data = load_digits()
    known = sorted(
        (tuple(image.ravel() / 16), int(label)) for image, label in zip(data.images, data.target, strict=True)
    )
    found = sorted(
        (tuple(float(pixel) for pixel in image.ravel()), int(label))
        for split in ("train", "valid", "test")
        for image, label in zip(*rows(split), strict=True)
    )
    assert found == known


def test_every_split_holds_every_digit_in_its_share():
    counts = {split: np.bincount(rows(split)[1], minlength=10) for split in ("train", "valid", "test")}
    total = sum(counts.values())
    for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        assert np.abs(counts[split] - share * total).max() < 2


def test_images_are_pixels_between_zero_and_one():
    images, _ = rows("valid")
    assert images.shape[1:] == (8, 8, 1)
    assert images.dtype == np.float32
    assert images.min() == 0.0
    assert images.max() == 1.0


def test_training_sees_every_image_once_an_epoch():
    task = tasks.get("digits")
    size = task.num_examples("train") // 3 + 1
    seen = np.concatenate([task.batch("train", step, size)["targets"] for step in range(3)])
    assert len(seen) >= task.num_examples("train")
    np.testing.assert_array_equal(np.bincount(seen[: task.num_examples("train")]), np.bincount(rows("train")[1]))


@pytest.mark.parametrize(("patch_size", "length"), [(1, 64), (2, 16), (4, 4), (8, 1)])
def test_the_length_counts_patches(patch_size, length):
    assert tasks.get("digits", patch_size=patch_size).length == length


def test_patches_that_do_not_fill_the_image_are_refused():
    with pytest.raises(ValueError, match="patch_size must divide 8, got 3"):
        tasks.get("digits", patch_size=3)


def test_twice_chance_is_the_bar():
    task = tasks.get("digits")
    assert not task.learned(0.15)
    assert task.learned(0.21)
