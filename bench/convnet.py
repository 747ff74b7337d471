"""The convolutional network of the paper's experiment, as a function of one flat vector; needs PyTorch.

Five layers, three convolutions and two that are fully connected; strides of 2 where the paper is silent:

                                       MNIST, 28 × 28            CIFAR-10, 32 × 32
    conv 5 × 5, stride 2, 8 channels   8·(1·25 + 1)  =    208    8·(3·25 + 1)  =    608
    conv 5 × 5, stride 2, 16 channels  16·(8·25 + 1) =  3,216    16·(8·25 + 1) =  3,216
    conv 3 × 3, 32 channels            32·(16·9 + 1) =  4,640    32·(16·9 + 1) =  4,640
    fully connected, 56 or 24 units    56·(128 + 1)  =  7,224    24·(288 + 1)  =  6,936
    fully connected, 10 classes        10·(56 + 1)   =    570    10·(24 + 1)   =    250
                                                     = 15,858                  = 15,650
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bench.problems import CLASSES, training_set

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
FLAT, HIDDEN = {"mnist": 128, "cifar10": 288}, {"mnist": 56, "cifar10": 24}
CHUNK = 1024  # images whose loss is evaluated at once


def images(name: str, folder: str, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first so many training images, each channel with mean 0 and variance 1, and their labels."""
    pixels, labels = training_set(name, folder)
    if len(pixels) < samples:
        raise ValueError(f"samples must be at most {len(pixels)}, the images of {name} in {folder}; got {samples}")
    x = torch.from_numpy(pixels[:samples].astype(np.float32))
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    return (x - mean) / std, torch.from_numpy(labels[:samples].astype(np.int64))


class ConvNet:
    """Mean negative log-likelihood J(θ) over images, and its gradient, with θ a float32 tensor (n,)."""

    def __init__(self, name: str, activation: str, x: torch.Tensor, labels: torch.Tensor, seed: int):
        torch.manual_seed(seed)
        act, hidden = ACTIVATIONS[activation], HIDDEN[name]
        convolutions = (nn.Conv2d(x.shape[1], 8, 5, stride=2), nn.Conv2d(8, 16, 5, stride=2), nn.Conv2d(16, 32, 3))
        layers = [part for layer in convolutions for part in (layer, act())]
        layers += [nn.Flatten(), nn.Linear(FLAT[name], hidden), act(), nn.Linear(hidden, CLASSES)]
        self._net, self._x, self._labels = nn.Sequential(*layers), x, labels
        self._parameters = list(self._net.parameters())
        self.start = parameters_to_vector(self._parameters).detach().clone()

    def gradient(self, theta: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
        """∇J(θ) over the chosen images."""
        vector_to_parameters(theta, self._parameters)
        loss = cross_entropy(self._net(self._x[chosen]), self._labels[chosen])
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self._parameters)])

    def total_loss(self, theta: torch.Tensor, first: int, last: int) -> float:
        """Sum of the negative log-likelihood over the images first … last − 1."""
        vector_to_parameters(theta, self._parameters)
        with torch.no_grad():
            pieces = (slice(k, min(k + CHUNK, last)) for k in range(first, last, CHUNK))
            losses = (cross_entropy(self._net(self._x[k]), self._labels[k], reduction="sum") for k in pieces)
            return float(sum(float(loss) for loss in losses))
