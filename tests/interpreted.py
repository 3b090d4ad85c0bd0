"""Triton's interpreter, without what takes it a third of the time.

Triton 3.6 and 3.7 put its functions into the language at each launch, which the launch takes out again, and once more
at each call of a function in a kernel, although they are there by then.
"""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another release
        return
    language, patch = (interpreter.tl, interpreter.tl.core), interpreter._patch_lang
    launch: set[str] = set()  # the modules patched until the launch ends
    for_good: set[str] = set()

    def patched(function: Any) -> Any:
        found = {x.__name__ for x in function.__globals__.values() if any(x is module for module in language)}
        if not launch:
            launch.update(found)
            scope = patch(function)
            restore = scope.restore
            scope.restore = lambda: (restore(), launch.clear())
            return scope
        if found <= launch | for_good:
            return None
        for_good.update(found)
        return patch(function)

    interpreter._patch_lang = patched
