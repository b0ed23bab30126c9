"""Refusals that name the key, the value, what is allowed, and the nearest valid spelling."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


def nearest(name: object, allowed: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the closest allowed spelling, or ''."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_keys(key: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ValueError if a name is given that is not allowed."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise ValueError(f"{key} has no {name!r}; allowed: {', '.join(map(str, allowed))}{nearest(name, allowed)}")


def check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError if the value is not one of the allowed words."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{key}={value!r}: allowed are {', '.join(allowed)}{nearest(value, allowed)}")


def check_bool(key: str, value: object) -> None:
    """Raises ValueError unless the value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: must be true or false")


def check_int(key: str, value: object, minimum: int) -> None:
    """Raises ValueError if the value is no integer of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key}={value!r}: must be an integer >= {minimum}")


def check_between(key: str, value: object, low: float, high: float) -> None:
    """Raises ValueError unless low < value < high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise ValueError(f"{key}={value!r}: must be a number above {low} and below {high}")


def check_number(key: str, value: object, low: float, high: float) -> None:
    """Raises ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{key}={value!r}: must be a number from {low} to {high}")


def check_text(key: str, value: object) -> None:
    """Raises ValueError unless the value is a string."""
    if not isinstance(value, str):
        raise ValueError(f"{key}={value!r}: must be text; put it in quotes")


def check_list(key: str, value: object, example: str) -> None:
    """Raises ValueError unless the value is a list; a string is none."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{key}={value!r}: must be a list, as in {example}")


def check_mapping(key: str, value: object, example: str) -> None:
    """Raises ValueError unless the value is a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={value!r}: must be a mapping, as in {example}")


def check_exact_keys(key: str, given: Mapping[str, object], names: Iterable[str]) -> None:
    """Raises ValueError unless given is a mapping with exactly these keys."""
    names = list(names)
    if not isinstance(given, Mapping):
        raise ValueError(f"{key}={given!r}: must be a mapping with {', '.join(names)}")
    check_keys(key, given, names)
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"{key} lacks {', '.join(missing)}; it needs {', '.join(names)}")
