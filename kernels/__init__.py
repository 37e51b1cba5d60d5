"""Fused kernels for multiway transformers: one set of operations, several backends.

Shape letters, used in every file of this package:

    B batch   L sequence   T tokens (B * L)   D model     F hidden
    E experts H heads      K head dim         N attention length

Every operation takes ``backend="cuda" | "triton" | "cpu" | "reference"``, and :func:`moe_ffn` and
:func:`moe_linear` also ``"composed"``; without one, :func:`use_backend`, then the environment
variable ``VLMO_KERNELS``, then the first backend that can run decides. A backend requested by name
never falls back: it runs or raises its reason. A name may be for one operation, as in
``"moe_ffn=composed"``; the others are then chosen as if there were no name.
"""

if __name__ == "vlmo.kernels":
    from .attention.api import shared_attention
    from .attention.bias import RelativePositionBias, RelativePositionIndex
    from .constants import Constants
    from .decompositions import decompositions
    from .dispatch import BACKEND_NAMES, use_backend
    from .moe_ffn.api import moe_ffn
    from .moe_ffn.linear import moe_linear
    from .routing import ModalityRouting
    from .support import why_not
else:
    # In a clone this folder can be imported as `kernels`, the name of a package that other
    # libraries (such as transformers) try to import. The import succeeds, but provides nothing.
    __path__ = []

    def _refuse(name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"this package is vlmo.kernels, not {__name__!r}: imported under two names, every "
            "operation would be registered twice. Use `from vlmo.kernels import ...`."
        )

    globals()["__getattr__"] = _refuse

__all__ = [
    "BACKEND_NAMES",
    "Constants",
    "ModalityRouting",
    "RelativePositionBias",
    "RelativePositionIndex",
    "decompositions",
    "moe_ffn",
    "moe_linear",
    "shared_attention",
    "use_backend",
    "why_not",
]
