"""A model whose forward pass leaves every kind of trace, and how to see them."""

import random

import numpy as np
import torch
from torch import nn


class Noisy(nn.Module):
    """Draws from every random stream and moves buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 1))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("quantised", torch.arange(5000))  # too large to be a counter

    def forward(self, x):
        self.replaced = self.replaced + 1  # a new tensor, not an update in place
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return (self.layers(x) + self.spectral(x) + self.replaced.sum()).square().mean() * noise


def streams():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        random.getstate(),
    )


def clones(named):
    return {name: tensor.clone() for name, tensor in named}
