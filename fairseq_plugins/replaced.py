"""Put functions of METRO in the place of fairseq's."""

import functools
import inspect
from collections.abc import Callable


def replaces(owner, name: str) -> Callable[[Callable], Callable]:
    """Put the decorated `function(original, *args, **kwargs)` in the place of `owner.name`."""

    def decorate(function: Callable) -> Callable:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            return function(original, *args, **kwargs)

        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)
        return function

    return decorate
