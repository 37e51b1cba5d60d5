"""Finds the layers of a model by class name, and replaces their methods until told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn

from vlmo.kernels.wrappers import is_plain

Layers = Sequence[tuple[str, Any]]  # names in the model, and modules
Check = Callable[[Any], str | None]


def find_layers(model: nn.Module, kind: str, why_not: Check) -> Layers:
    """All layers of the class that is named ``kind``, which may be in more than one library.

    Args:
        model: is searched, itself included.
        kind: name of the layers' class or of a base class; FSDP2 makes a subclass.
        why_not: the reason why a layer cannot be computed by our operation, or None.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no such layer, or one of them has a reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [
        (name or type(model).__name__, module)
        for name, module in model.named_modules()
        if any(base.__name__ == kind for base in type(module).__mro__)
    ]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no layer of class {kind}")
    for name, module in found:
        reason = why_not(module)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
    return found


def why_not_plain(modules: Iterable[tuple[Any, str | type[nn.Module]]]) -> str | None:
    """Why reading the parameters of modules is not equivalent to calling them, or None.

    Args:
        modules: modules, and the classes that they must have: PyTorch's own, or the names of
            others. The next module is only looked at if the last one has its class.
    """
    for module, kind in modules:
        found, name = type(module), kind if isinstance(kind, str) else kind.__name__
        if found.__name__ != name:
            return f"expected a {name}, got {found.__name__}"
        # Adapters and quantised layers are often named as what they wrap.
        if not isinstance(kind, str) and found is not kind:
            return f"expected torch's {name}, got that of {found.__module__}"
        if not is_plain(module, found):
            return f"a {name} with hooks or a replaced forward"
    return None


class Handle:
    """Replaced methods of the layers of one model.

    A method is set on the layer object, so classes and other models stay as they are. A deep copy
    of the model has the replaced methods as well; a pickled one has the original ones
    again. ``torch.nn.DataParallel`` is not supported: its replicas would use the parameters
    of the first device.

    Args:
        layers: names and modules.
        methods: the functions that replace methods, by name; the first argument is the layer.

    Raises:
        ValueError: a layer already has such a method of its own, from this library or another.
    """

    def __init__(self, layers: Layers, methods: Mapping[str, Callable[..., Any]]):
        for name, layer in layers:
            for method in methods:
                # A layer that was pickled has its class's method as its own.
                own = vars(layer).get(method)
                if own and getattr(own, "__func__", None) is not getattr(type(layer), method):
                    raise ValueError(
                        f"{name}: its method {method!r} is already replaced, by an earlier call "
                        "or by another library"
                    )
        self._replaced = [
            (name, layer, method, MethodType(function, layer))
            for name, layer in layers
            for method, function in methods.items()
        ]
        for _, layer, method, bound in self._replaced:
            setattr(layer, method, bound)

    def remove(self) -> None:
        """Restore the original methods; a second call does nothing.

        Raises:
            RuntimeError: another library has replaced a method since. Nothing is restored.
        """
        for name, layer, method, bound in self._replaced:
            if vars(layer).get(method) is not bound:
                raise RuntimeError(
                    f"{name}: its method {method!r} was replaced again since; undo that first"
                )
        for _, layer, method, _ in self._replaced:
            delattr(layer, method)
        self._replaced = []
