"""The one error of a wrong setting, and the checks that all sections share."""

from __future__ import annotations

import math


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


def fraction(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")
