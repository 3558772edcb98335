"""Image classification: a network with batch normalization, images augmented as they are read."""

import torch
from tiny import train_and_evaluate
from torch.utils.data import Dataset
from transformers import HfArgumentParser, ResNetConfig, ResNetForImageClassification, set_seed

from transformers import Trainer, TrainingArguments  # isort: skip


class Colours(Dataset):
    def __init__(self, count, flip):
        self.images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        self.flip = flip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, label = self.images[i].clone(), i % 2
        image[label] += 1
        return {"image": image.flip(-1) if self.flip and torch.rand(()) < 0.5 else image} | {
            "label": label
        }


def collate_fn(examples):
    pixel_values = torch.stack([example["image"] for example in examples])
    labels = torch.tensor([example["label"] for example in examples])
    return {"pixel_values": pixel_values, "labels": labels}


def main():
    (training_args,) = HfArgumentParser((TrainingArguments,)).parse_args_into_dataclasses()
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    trainer = Trainer(
        model=ResNetForImageClassification(config),
        args=training_args,
        train_dataset=Colours(32, flip=True),
        eval_dataset=Colours(16, flip=False),
        data_collator=collate_fn,
    )
    train_and_evaluate(trainer, training_args, tasks="image-classification")


if __name__ == "__main__":
    main()
