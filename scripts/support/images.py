"""Images on their way to a model: augmentation, normalisation, the processor."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets import DatasetDict
from PIL import Image
from transformers import (
    BaseImageProcessor,
    ConvNextImageProcessorPil,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from support.command_line import UsageError

SMALL = 64  # pixels up to which an image is small: another stem, another augmentation
LARGE_SIZE = 224
STATISTICS_IMAGES = 1000


class ImageExamples(torch.utils.data.Dataset):
    """The examples that a model takes: `pixel_values` and `labels`.

    The random draws of an augmentation depend on the seed, the epoch and the example alone. So they
    are the same whatever the number of processes and workers, and when a run is resumed: the data
    loader is then some batches ahead of the checkpoint, and so would be a common random stream.

    Args:
        data: A split of what `load_data` returns.
        image_size: Pixels of a side.
        mean: Of each channel, from 0 to 1.
        std: Of each channel.
        augment: Whether to draw crops and flips; the epoch then comes from `EpochCallback`.
        flip: Whether flips are among them.
        seed: Of the draws.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.data = data
        self.image_size = image_size
        self.mean = np.array(mean, dtype=np.float32)
        self.std = np.array(std, dtype=np.float32)
        self.augment = augment
        self.flip = flip
        self.seed = seed
        # Shared, because workers of a data loader may outlive an epoch. Negative: not yet known.
        self._epoch = torch.tensor(-1).share_memory_()

    def begin_epoch(self, epoch: int) -> None:
        """Let the draws be those of `epoch`.

        Not named `set_epoch`, which `accelerate` calls, but not with every data loader.
        """
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = read_example(self.data, index)
        if self.augment:
            epoch = self._epoch.item()
            if epoch < 0:
                raise RuntimeError("augmentation needs to know the epoch: add an EpochCallback")
            generator = np.random.default_rng((self.seed, epoch, index))
            image = augment_image(image, self.image_size, self.flip, generator)
        else:
            image = fit_image(image, self.image_size)
        pixels = (to_array(image) - self.mean) / self.std
        return {"pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "labels": label}


class EpochCallback(TrainerCallback):
    """Tells the training examples which epoch begins."""

    def __init__(self, examples: ImageExamples) -> None:
        self.examples = examples

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.examples.begin_epoch(int(state.epoch or 0))


def read_example(data: datasets.Dataset, index: int) -> tuple[Image.Image, int]:
    """Return an image and its label.

    Raises:
        UsageError: The image is broken.
    """
    try:
        row = data[int(index)]
        return row["image"].convert("RGB"), row["label"]
    except (OSError, SyntaxError) as error:  # what PIL raises, SyntaxError for a broken PNG
        undecoded = data.cast_column("image", datasets.Image(decode=False))[int(index)]["image"]
        where = undecoded["path"] or f"image {index} of the data"
        raise UsageError(f"{where} cannot be read: {error}") from error


def is_small(image: Image.Image) -> bool:
    """Return whether an image is one of those that the ResNet paper augments as CIFAR's."""
    return max(image.size) <= SMALL


def augment_image(
    image: Image.Image, image_size: int, flip: bool, generator: np.random.Generator
) -> Image.Image:
    """Return a random crop of an image, or of its mirror image if `flip`, for training."""
    if is_small(image):
        width, height = image.size
        left, top = (
            int(generator.integers(-(side // 8), side // 8 + 1)) for side in (width, height)
        )
        image = image.crop((left, top, left + width, top + height))  # zeros beyond the border
        image = _resize(image, (image_size, image_size))
    else:
        # 256 to 480 pixels for crops of 224.
        shorter = int(
            generator.integers(round(image_size * 8 / 7), round(image_size * 15 / 7), endpoint=True)
        )
        image = _resize_shorter(image, shorter)
        left, top = (int(generator.integers(side - image_size + 1)) for side in image.size)
        image = image.crop((left, top, left + image_size, top + image_size))
    if flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def fit_image(image: Image.Image, image_size: int) -> Image.Image:
    """Return an image in the model's size, for evaluation: the whole, or a large one's middle."""
    if is_small(image):
        return _resize(image, (image_size, image_size))
    image = _resize_shorter(image, round(image_size * 8 / 7))  # 256 for 224
    left, top = ((side - image_size) // 2 for side in image.size)
    return image.crop((left, top, left + image_size, top + image_size))


def _resize_shorter(image: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    return _resize(image, (width, height))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def to_array(image: Image.Image) -> np.ndarray:
    """Return height x width x channels, from 0 to 1."""
    return np.asarray(image, dtype=np.float32) / 255


def channel_statistics(data: datasets.Dataset, image_size: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of the first images in a random order."""
    rows = np.random.default_rng(0).permutation(len(data))[:STATISTICS_IMAGES]
    pixels = np.stack([to_array(fit_image(read_example(data, i)[0], image_size)) for i in rows])
    mean = pixels.mean((0, 1, 2), dtype=np.float64)
    std = pixels.std((0, 1, 2), dtype=np.float64)
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # images of one colour have none


def make_examples(
    data: DatasetDict, processor: BaseImageProcessor, flip: bool, seed: int
) -> tuple[ImageExamples, ImageExamples]:
    """Return the examples for training, augmented, and those for evaluation.

    Args:
        data: What `load_data` returns.
        processor: It has the size and the statistics.
        flip: Whether to mirror half of the training images.
        seed: Of the augmentation.
    """
    settings = (size_of(processor), processor.image_mean, processor.image_std)
    train = ImageExamples(data["train"], *settings, augment=True, flip=flip, seed=seed)
    return train, ImageExamples(data["validation"], *settings)


def make_processor(data: DatasetDict, image_size: int | None = None) -> BaseImageProcessor:
    """Return what turns images into a model's input, with the statistics of the training data.

    Args:
        data: What `load_data` returns.
        image_size: Pixels of a side; by default those of the first training image up to 64, else
            224.
    """
    if image_size is None:
        first, _ = read_example(data["train"], 0)
        image_size = max(8, *first.size) if is_small(first) else LARGE_SIZE
    mean, std = channel_statistics(data["train"], image_size)
    return ConvNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_pct=1.0 if image_size <= SMALL else 7 / 8,
        image_mean=mean,
        image_std=std,
    )


def size_of(processor: BaseImageProcessor) -> int:
    """Return the pixels of a side."""
    return processor.size["height"] or processor.size["shortest_edge"]
