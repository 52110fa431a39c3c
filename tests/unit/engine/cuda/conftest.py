"""Kernels in triton's interpreter, without what it does again and again."""

import inspect
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="package")
def remembered_names() -> Iterator[None]:
    """Look for what the interpreter replaces in triton's language once, not at each call.

    It is always the same, and looking for it takes a quarter of the time.
    """
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @cache
    def names_of(package: Any) -> list[str]:
        members = inspect.getmembers(package)
        return [name for name, member in members if is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names_of(package):
            member = getattr(package, name)
            if is_builtin(member):  # not replaced yet
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield
