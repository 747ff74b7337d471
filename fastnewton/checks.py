"""Check the numbers and words that a caller passes; errors name the argument."""

import math
import numbers
from typing import Any, TypeVar

Choice = TypeVar("Choice", bound=str | None)


def number(value: Any, name: str) -> float:
    """Convert a real number to a Python float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number; got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within the range of float64; got {type(value).__name__} beyond it") from None


def real(value: Any, name: str) -> float:
    """Convert a finite number ≥ 0 to a Python float."""
    result = number(value, name)
    if not (math.isfinite(result) and result >= 0):
        raise ValueError(f"{name} must be finite and at least 0; got {value!r}")
    return result


def fraction(value: Any, name: str) -> float:
    """Convert a number strictly between 0 and 1 to a Python float."""
    result = number(value, name)
    if not 0 < result < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {value!r}")
    return result


def count(value: Any, name: str) -> int | None:
    """Convert an integer ≥ 0 to a Python int; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer or None; got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0; got {value}")
    return int(value)


def choice(value: Any, name: str, allowed: tuple[Choice, ...]) -> Choice:
    """Return the one of the allowed words, or None where that is allowed, which the value equals."""
    if (value is None or isinstance(value, str)) and value in allowed:
        return allowed[allowed.index(value)]
    error, got = (ValueError, repr(value)) if isinstance(value, str) else (TypeError, type(value).__name__)
    raise error(f"{name} must be {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}; got {got}")
