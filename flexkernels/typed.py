"""Decorators for functions that are called as another one is: type checkers, help() and editors see its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def as_typed(other: F) -> Callable[[Callable[..., Any]], F]:
    """The function has the type of ``other``: a reference that of its op. Nothing changes when it runs."""
    return lambda function: function  # type: ignore[return-value]


def called_as(other: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """The function takes the arguments of ``other``, which it passes on, and returns what it states itself."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        returned = inspect.signature(function).return_annotation
        # what inspect.signature gives
        function.__signature__ = inspect.signature(other).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return function

    return decorate
