"""What the benchmarks train on: images in their original binary formats, and logistic regression on digits.

The digits are scikit-learn's bundled set, or MNIST in IDX format, averaged to the same 8 × 8 pixels.
"""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, log_softmax, softmax

CLASSES = 10
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, and the pixels of an image
_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


@dataclass(frozen=True)
class Digits:
    """Images (samples, 64) with values from 0 to 1, and labels (samples,) from 0 to 9."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    def only(self, *classes: int) -> "Digits":
        """The images of some classes."""
        chosen = np.isin(self.labels, classes)
        return Digits(self.name, self.images[chosen], self.labels[chosen])


def digits(folder: str | Path | None = None, samples: int | None = None) -> Digits:
    """MNIST's training images from this folder or its sub-folder mnist/, or scikit-learn's digits if None.

    With `samples`, only the first so many.
    """
    found = _bundled() if folder is None else _mnist(Path(folder))
    return Digits(found.name, found.images[:samples], found.labels[:samples])


class MissingData(FileNotFoundError):
    """A file of a data set that is not there."""


def default_folder() -> str:
    """Where MNIST is looked for if only `--data` is said."""
    return os.environ.get("FASTNEWTON_DATA", "data")


def _bundled() -> Digits:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Digits("scikit-learn digits", images / 16, labels)


def _mnist(folder: Path) -> Digits:
    images, labels = training_set("mnist", folder)
    square = np.pad(images[:, 0], ((0, 0), (2, 2), (2, 2))).reshape(len(images), 8, 4, 8, 4)
    return Digits("MNIST, 8 × 8", square.mean((2, 4)).reshape(-1, 64) / 255, labels.astype(np.int64))


def training_set(name: str, folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, channels, height, width) and labels (samples,) of "mnist" or "cifar10", all uint8.

    The files lie in this folder or its sub-folder of that name, gzipped or not.
    """
    files = training_files(name, folder)
    if name == "mnist":
        images, labels = map(read_idx, files)
        return images[:, None], labels
    images, labels = (np.concatenate(parts) for parts in zip(*map(read_cifar, files), strict=True))
    return images, labels


def training_files(name: str, folder: str | Path) -> list[Path]:
    """What `training_set` reads; MissingData where there is not all of it."""
    names = [f"data_batch_{k}.bin" for k in range(1, 6)]
    if name == "mnist":
        names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    return [_find((Path(folder), Path(folder) / name), each) for each in names]


def _find(places: tuple[Path, ...], name: str) -> Path:
    for path in (place / (name + suffix) for place in places for suffix in ("", ".gz")):
        if path.exists():
            return path
    where = " or ".join(map(str, places))
    raise MissingData(f"no {name} or {name}.gz in {where}; --data PATH or FASTNEWTON_DATA tells where the files are")


def _read(path: str | Path) -> bytes:
    data = Path(path).read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def read_cifar(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, 3, 32, 32) and labels (samples,) from a file in CIFAR-10's binary format, gzipped or not."""
    data = np.frombuffer(_read(path), np.uint8)
    if data.size == 0 or data.size % CIFAR_RECORD or data[::CIFAR_RECORD].max() >= CLASSES:
        raise ValueError(f"{path} is not a file of CIFAR-10's binary format: records of {CIFAR_RECORD} bytes")
    records = data.reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_idx(path: str | Path) -> np.ndarray:
    """An array in IDX format, gzipped or not."""
    data = _read(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(f"{path} is not an IDX file")
    kind, header = np.dtype(_IDX_TYPES[data[2]]), 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:header], ">u4").tolist())
    if len(data) != header + kind.itemsize * int(np.prod(shape)):
        raise ValueError(f"{path} does not hold an array of shape {shape}")
    return np.frombuffer(data, kind, offset=header).reshape(shape)


class Multinomial:
    """Ten classes, an L2 term: J(W) = mean −log softmax(xW)_y + ½ l2 ‖W‖², with W (65, 10) as a vector."""

    def __init__(self, data: Digits, l2: float):
        self.features = np.column_stack([data.images, np.ones(len(data.images))])
        self.targets = np.eye(CLASSES)[data.labels]
        self.l2 = l2
        self.n = self.features.shape[1] * CLASSES
        self.samples = len(self.features)

    def scores(self, features: np.ndarray, w: np.ndarray) -> np.ndarray:
        return features @ w.reshape(*w.shape[:-1], -1, CLASSES)

    def value(self, w: np.ndarray) -> np.ndarray:
        """J of one vector, or of each along the last axis."""
        told = (log_softmax(self.scores(self.features, w), axis=-1) * self.targets).sum((-2, -1))
        return 0.5 * self.l2 * (w * w).sum(-1) - told / self.samples

    def gradient(self, w: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """∇J(w), from all samples or from the chosen ones; leading axes of both are broadcast."""
        features, targets = self.features, self.targets
        if chosen is not None:
            features, targets = features[chosen], targets[chosen]
        wrong = softmax(self.scores(features, w), axis=-1) - targets
        return self.pulled_back(features, wrong / features.shape[-2], w) + self.l2 * w

    def pulled_back(self, features: np.ndarray, wrong: np.ndarray, w: np.ndarray) -> np.ndarray:
        """What derivatives by the scores are by w."""
        return _flat(features.swapaxes(-1, -2) @ wrong)

    def accuracy(self, w: np.ndarray) -> float:
        """Share of the training samples that are told right."""
        found = self.scores(self.features, w).argmax(1)
        return float((self.targets[np.arange(self.samples), found]).mean())


class TanhNetwork(Multinomial):
    """Ten classes through one hidden layer: scores tanh(xW)U, with W (65, hidden) and U (hidden, 10) as one vector."""

    def __init__(self, data: Digits, l2: float, hidden: int):
        super().__init__(data, l2)
        self.hidden, self.n = hidden, (self.features.shape[1] + CLASSES) * hidden

    def scores(self, features: np.ndarray, w: np.ndarray) -> np.ndarray:
        first, second = self._layers(w)
        return np.tanh(features @ first) @ second

    def pulled_back(self, features: np.ndarray, wrong: np.ndarray, w: np.ndarray) -> np.ndarray:
        first, second = self._layers(w)
        active = np.tanh(features @ first)
        inner = (wrong @ second.swapaxes(-1, -2)) * (1 - active**2)
        of_first, of_second = (_flat(of.swapaxes(-1, -2) @ to) for of, to in ((features, inner), (active, wrong)))
        return np.concatenate([of_first, of_second], axis=-1)

    def _layers(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = np.split(w, [self.n - CLASSES * self.hidden], axis=-1)
        shape = w.shape[:-1]
        return first.reshape(*shape, -1, self.hidden), second.reshape(*shape, self.hidden, CLASSES)


class Quadratic:
    """J(w) = ½ Σ h_i w_i², along the Hessian's own axes; its gradients take noise that is added."""

    def __init__(self, curvatures: np.ndarray):
        self.curvatures, self.n = curvatures, curvatures.size

    def value(self, w: np.ndarray) -> np.ndarray:
        return 0.5 * (self.curvatures * w**2).sum(-1)

    def gradient(self, w: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        return self.curvatures * w + (0.0 if noise is None else noise)


class TwoClasses:
    """Two classes, principal components and an intercept: J(w) = mean log(1 + exp(−y x·w)) + ½ l2 ‖w‖²."""

    def __init__(self, data: Digits, l2: float, *, classes: tuple[int, int] = (3, 8), components: int = 19):
        data = data.only(*classes)
        centred = data.images - data.images.mean(0)
        _, _, directions = np.linalg.svd(centred, full_matrices=False)
        scores = centred @ directions[:components].T
        features = np.column_stack([scores / scores.std(), np.ones(len(scores))])
        self.signed = features * np.where(data.labels == classes[1], 1.0, -1.0)[:, None]
        self.l2 = l2
        self.n = components + 1
        self.samples = len(features)

    def value(self, w: np.ndarray) -> float:
        return float(np.logaddexp(0, -self.signed @ w).mean() + 0.5 * self.l2 * (w @ w))

    def gradient(self, w: np.ndarray) -> np.ndarray:
        return -(expit(-self.signed @ w) @ self.signed) / self.samples + self.l2 * w


def _flat(matrices: np.ndarray) -> np.ndarray:
    return matrices.reshape(*matrices.shape[:-2], -1)


def spread(rng: np.random.Generator, w: np.ndarray, length: float, workers: int = 1) -> np.ndarray:
    """(workers, n): points at random around w, about `length` away."""
    return w + length / np.sqrt(w.size) * rng.standard_normal((workers, w.size))
