"""Triton's interpreter, made faster, and the same on every CPU."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


class _Everything:
    """Stands for a function whose module sees all of Triton's language."""

    __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012


class _Once:
    """A change of the language that lasts until the outermost function returns.

    The interpreter looks through the language and changes each of its functions when a kernel, or a
    function that it calls, is called, and changes them back at the end. Inside a kernel they have
    been changed already.
    """

    def __init__(self, patch) -> None:
        self._patch = patch
        self._inside = False

    def __call__(self, function):
        if self._inside:
            return interpreter._LangPatchScope()
        scope = self._patch(_Everything)
        self._inside, restore = True, scope.restore

        def end() -> None:
            self._inside = False
            restore()

        scope.restore = end
        return scope


def _rounded_once(create):
    """An operation of float32 computed in float64: NumPy and its BLAS round otherwise on every CPU.

    Products of float16, for which NumPy has no fast code, become faster, too.
    """

    def wide(argument):
        if isinstance(argument, TensorHandle) and argument.data.dtype in (np.float16, np.float32):
            return TensorHandle(argument.data.astype(np.float64), tl.float64)
        return argument

    def created(self, *arguments):
        # The last operand of a product is what it is added to: in the type of the result.
        last = [a for a in arguments if isinstance(a, TensorHandle)][-1]
        if last.data.dtype != np.float32:
            return create(self, *arguments)
        result = create(self, *map(wide, arguments))
        return TensorHandle(result.data.astype(np.float32), tl.float32)

    return created


def _with_index(patch_tensor):
    """With NumPy 2.4 an array of one number is no index; before 3.7 Triton makes one of it."""

    def patched(tensor, *scope) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patched


def improve(patch) -> None:
    """Change Triton for as long as ``patch``, a ``pytest.MonkeyPatch``, lasts."""
    change = interpreter._patch_lang
    if hasattr(interpreter, "_LangPatchScope"):  # from Triton 3.6 on
        patch.setattr(interpreter, "_patch_lang", _Once(change))
    else:  # which asks for the language in the module of every function, also of one without need
        patch.setattr(interpreter, "_patch_lang", lambda function: change(_Everything))
    patch.setattr(interpreter, "_patch_lang_tensor", _with_index(interpreter._patch_lang_tensor))
    builder = interpreter.InterpreterBuilder
    for name in ("dot", "exp", "exp2", "log2"):
        patch.setattr(builder, f"create_{name}", _rounded_once(getattr(builder, f"create_{name}")))
