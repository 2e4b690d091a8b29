"""Unknown keywords of a public function: the error says what was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


def names_what_was_meant(meant: Mapping[str, str]) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """A decorator: a keyword that a function has not is a ``TypeError`` that names the one meant.

    ``meant`` holds what other libraries say for it; else it is the keyword that is spelled most alike.
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        known = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except TypeError:
                for name in kwargs:
                    if name not in known:
                        raise TypeError(describe_unknown(function.__qualname__, name, known, meant)) from None
                raise

        return checked

    return decorate


def describe_unknown(function: str, name: str, known: tuple[str, ...], meant: Mapping[str, str]) -> str:
    """The text of the error about a keyword that a function has not, in Python's own words first."""
    near = [meant[name]] if name in meant else difflib.get_close_matches(name, known, n=1)
    hint = f"; say {near[0]}" if near else ""
    return f"{function}() got an unexpected keyword argument {name!r}{hint}."
