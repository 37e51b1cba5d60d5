"""Makes Triton's interpreter faster, and its results equal on every CPU."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


class _Everything:
    """A substitute for a function whose module has all of Triton's language."""

    __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012


class _Once:
    """A patch of the language that remains until the outermost function returns.

    For every call of a kernel, or of a function that it calls, the interpreter patches all
    functions of the language and restores them at the end. Inside a kernel they are already
    patched.
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
    """Compute a float32 operation in float64, because NumPy and BLAS round differently per CPU.

    This also makes float16 products faster, for which NumPy has no fast code.
    """

    def wide(argument):
        if isinstance(argument, TensorHandle) and argument.data.dtype in (np.float16, np.float32):
            return TensorHandle(argument.data.astype(np.float64), tl.float64)
        return argument

    def created(self, *arguments):
        # The last operand of a product is the accumulator, which has the type of the result.
        last = [a for a in arguments if isinstance(a, TensorHandle)][-1]
        if last.data.dtype != np.float32:
            return create(self, *arguments)
        result = create(self, *map(wide, arguments))
        return TensorHandle(result.data.astype(np.float32), tl.float32)

    return created


def _with_index(patch_tensor):
    """Allow one-element arrays as indices: Triton before 3.7 uses them, NumPy 2.4 rejects them."""

    def patched(tensor, *scope) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patched


def improve(patch) -> None:
    """Patch Triton until ``patch``, a ``pytest.MonkeyPatch``, is undone."""
    change = interpreter._patch_lang
    if hasattr(interpreter, "_LangPatchScope"):  # from Triton 3.6 on
        patch.setattr(interpreter, "_patch_lang", _Once(change))
    else:  # which requires the language in the module of every function
        patch.setattr(interpreter, "_patch_lang", lambda function: change(_Everything))
    patch.setattr(interpreter, "_patch_lang_tensor", _with_index(interpreter._patch_lang_tensor))
    builder = interpreter.InterpreterBuilder
    for name in ("dot", "exp", "exp2", "log2"):
        patch.setattr(builder, f"create_{name}", _rounded_once(getattr(builder, f"create_{name}")))
