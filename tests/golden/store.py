"""Values under names in one file, long ones as a digest with samples: enough to tell how large a change is."""

import hashlib
from pathlib import Path

import numpy as np

WHOLE = 160  # elements up to which an array is kept as it is
SAMPLES = 16


def encode(value):
    """A value as a line that says its kind, and bytes."""
    if not hasattr(value, "dtype"):
        if isinstance(value, float):
            value = np.float64(value)
        else:
            return "text", str(value).encode()
    array = np.array(value)
    if array.dtype.name in ("float16", "bfloat16", "float32", "float64"):
        array = np.where(np.isnan(array), array.dtype.type("nan"), array)  # sign and payload of NaN mean nothing
    shape = ",".join(map(str, array.shape))
    if array.size <= WHOLE:
        return f"{array.dtype.name} ({shape})", array.tobytes()
    flat = array.reshape(-1)
    samples = flat[np.linspace(0, flat.size - 1, SAMPLES).astype(np.int64)]
    return f"sha256 {array.dtype.name} ({shape})", hashlib.sha256(array.tobytes()).digest() + samples.tobytes()


def numbers(kind, data):
    """The elements of an entry, or samples of them, as float64; None of a text."""
    if kind == "text":
        return None
    hashed, name = kind.startswith("sha256"), kind.split()[-2]
    data = data[32:] if hashed else data
    if name == "bfloat16":
        words = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return words.view(np.float32).astype(np.float64)
    return np.frombuffer(data, name).astype(np.float64)


def save(path, entries):
    """Write {name: (kind, bytes)}."""
    packed = {
        "names": "\n".join(entries).encode(),
        "kinds": "\n".join(kind for kind, _ in entries.values()).encode(),
        "data": b"".join(data for _, data in entries.values()),
    }
    arrays = {name: np.frombuffer(text, np.uint8) for name, text in packed.items()}
    partial = Path(f"{path}.partial.npz")
    np.savez_compressed(partial, ends=np.cumsum([len(data) for _, data in entries.values()]), **arrays)
    partial.replace(path)


def load(path):
    """What `save` wrote."""
    with np.load(path) as file:
        data, ends = file["data"].tobytes(), file["ends"].tolist()
        names, kinds = (file[name].tobytes().decode().split("\n") for name in ("names", "kinds"))
    bounds = zip([0, *ends], ends, strict=False)
    return {name: (kind, data[slice(*pair)]) for name, kind, pair in zip(names, kinds, bounds, strict=True)}
