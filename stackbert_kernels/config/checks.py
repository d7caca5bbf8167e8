"""The one error of a wrong setting, and the checks that all sections share."""

from __future__ import annotations

import math

SMALLEST_EPS = 1e-30


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that says what was wanted and what was given."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


def positive(**values: float) -> None:
    for name, value in values.items():
        require(0 < value < math.inf, f"{name} must be > 0 and finite, got {value}")


def at_most(limit: float, **values: float) -> None:
    for name, value in values.items():
        require(value <= limit, f"{name} must be at most {limit}, got {value}")


def not_rounded_away(**values: float) -> None:
    """What is added to something that can be zero before it divides must be more than zero in float32 too."""
    for name, value in values.items():
        require(value >= SMALLEST_EPS, f"{name} must be >= {SMALLEST_EPS:g}, got {value}")


def fraction(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")
