"""Augmentation and normalisation."""

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from PIL import Image, ImageOps
from running import colour
from support import images, images_data
from torch.utils.data import DataLoader


def numbered(side):
    """An image whose pixels all differ, none of them black."""
    pixels = np.arange(1, side * side + 1)
    return Image.fromarray(
        np.stack([pixels % 256, pixels // 256, np.full_like(pixels, 9)], -1)
        .reshape(side, side, 3)
        .astype(np.uint8)
    )


@pytest.mark.parametrize(("side", "padding"), [(8, 1), (32, 4)])
@pytest.mark.parametrize("flip", [False, True], ids=["no flip", "flip"])
def test_small_images_are_shifted(side, padding, flip):
    image = numbered(side)
    padded = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)))
    crops = {}
    for left in range(2 * padding + 1):
        for top in range(2 * padding + 1):
            crop = padded[top : top + side, left : left + side]
            crops[crop.tobytes()] = (left, top, False)
            crops[crop[:, ::-1].tobytes()] = (left, top, True)
    generator = np.random.default_rng(0)
    drawn = [
        crops[images.augment_image(image, side, flip, generator).tobytes()] for _ in range(800)
    ]
    for axis in (0, 1):
        assert {draw[axis] for draw in drawn} == set(range(2 * padding + 1))
    assert np.mean([draw[2] for draw in drawn]) == pytest.approx(0.5 if flip else 0, abs=0.06)


def test_small_images_for_a_large_model():
    image = numbered(32)
    fitted = images.fit_image(image, 224)
    assert np.array_equal(fitted, image.resize((224, 224), Image.Resampling.BICUBIC))
    assert images.augment_image(image, 224, True, np.random.default_rng(0)).size == (224, 224)


def test_large_images_are_scaled_and_cropped(monkeypatch):
    image = colour(99, 9, (400, 300))
    sizes = []
    resize = images._resize
    monkeypatch.setattr(
        images, "_resize", lambda image, size: sizes.append(size) or resize(image, size)
    )
    generator = np.random.default_rng(0)
    crops = [images.augment_image(image, 28, True, generator) for _ in range(300)]
    assert {crop.size for crop in crops} == {(28, 28)}
    assert {min(size) for size in sizes} == set(range(32, 61))  # 256 to 480 for 224
    assert all(size[0] / size[1] == pytest.approx(4 / 3, rel=0.02) for size in sizes)
    assert len({crop.tobytes() for crop in crops}) > 290

    sizes.clear()
    fitted = images.fit_image(image, 224)
    assert sizes == [(341, 256)]
    middle = ImageOps.fit(resize(image, (341, 256)), (224, 224))
    assert np.asarray(fitted).shape == np.asarray(middle).shape
    expected = np.asarray(resize(image, (341, 256)))[16:240, 58:282]
    assert np.array_equal(fitted, expected)


def examples(augment, seed=0, flip=False):
    data = images_data.load_embedded_data()["train"].select(range(8))
    return images.ImageExamples(data, 8, [0.3] * 3, [0.4] * 3, augment, flip, seed)


def pixels_of(dataset):
    return torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])


def test_evaluation_is_deterministic_and_normalised():
    dataset = examples(augment=False)
    pixels = pixels_of(dataset)
    assert torch.equal(pixels, pixels_of(dataset))
    assert pixels.shape == (8, 3, 8, 8)
    image = np.asarray(dataset.data[3]["image"], dtype=np.float64) / 255
    assert pixels[3, 1].numpy() == pytest.approx((image - 0.3) / 0.4, abs=1e-6)
    assert dataset[3]["labels"] == dataset.data[3]["label"]


def test_statistics_are_those_of_the_training_images(image_dir):
    data = images_data.load_image_folder(image_dir)
    processor = images.make_processor(data)
    _, dataset = images.make_examples(
        DatasetDict(train=data["train"], validation=data["train"]), processor, flip=False, seed=0
    )
    pixels = pixels_of(dataset)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert pixels.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-4)
    assert processor.image_mean[0] > processor.image_mean[1]  # red before green


@pytest.mark.slow
def test_draws_depend_on_seed_epoch_and_example_alone():
    dataset = examples(augment=True)
    with pytest.raises(RuntimeError, match="add an EpochCallback"):
        dataset[0]
    draws = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            dataset = examples(augment=True, seed=seed)
            dataset.begin_epoch(epoch)
            draws[seed, epoch] = pixels_of(dataset)
            torch.rand(3)
            assert torch.equal(dataset[5]["pixel_values"], draws[seed, epoch][5])
    for key, pixels in draws.items():
        others = [other for other_key, other in draws.items() if other_key != key]
        assert not any(torch.equal(pixels, other) for other in others)


def test_workers_that_outlive_an_epoch_draw_anew():
    dataset = examples(augment=True)
    loader = DataLoader(dataset, batch_size=8, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.begin_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch["pixel_values"], pixels_of(dataset))
