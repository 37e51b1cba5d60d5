"""Registers the forward and backward of an operation in torch.library, and adds a direct path.

One schema, one fake and one autograd formula serve all backends: the backend is an argument. The
backend ``"reference"`` is not registered, because autograd differentiates its PyTorch operations.

The dispatch through torch.library takes longer on the host than a kernel takes on a GPU. Only
callers that intercept operations need it: torch.compile, dispatch modes, tensor subclasses. Every
other call bypasses it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .arguments import without_autocast
from .dispatch import runs_eagerly
from .flops import register_formulas

_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    Sequence[int]: "SymInt[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}
_Flags = Sequence[bool]


class Operation:
    """The operations ``vlmo::<registered>_fwd`` and ``vlmo::<registered>_bwd`` of torch.library.

    A backend is a module with two functions::

        forward(call) -> (output, saved)
        backward(grad, *saved, call, needs) -> gradients of the leaves

    The leaves are the tensors of ``call`` that may get a gradient, with lists flattened and None
    left out. ``needs`` flags the gradients to compute; the others are ignored.
    """

    def __init__(
        self,
        name: str,
        registered: str,
        call: Any,
        backends: Mapping[str, Any],
        empty_outputs: Callable[[Any, str], tuple[Tensor, Tensor]],
        *,
        leaves: Sequence[str],
        added: str | None = None,
        added_parts: str | None = None,
        keeps_output: bool = False,
    ) -> None:
        """Register both operations.

        Args:
            name: name used in error messages.
            registered: name in torch.library, without suffix.
            call: the NamedTuple of the arguments; its fields define the schema.
            backends: implementations by name.
            empty_outputs: allocates the output and the saved tensor of a call on a backend.
            leaves: fields whose gradients the backward computes.
            added: field whose gradient equals that of the output (the residual), if any.
            added_parts: a list of tensors whose gradients are successive rows of the output's.
            keeps_output: whether the first tensor in ``saved`` of a backward is the output.
        """
        self.name, self._call, self._backends = name, call, backends
        self._empty_outputs, self._keeps_output = empty_outputs, keeps_output
        self._kinds = [_KINDS[kind] for kind in get_type_hints(call).values()]
        self._is_list = [kind == "Tensor[]" for kind in self._kinds]
        self._leaf_places = [call._fields.index(field) for field in leaves]
        self._added = None if added is None else call._fields.index(added)
        self._parts = None if added_parts is None else call._fields.index(added_parts)
        self._tensor_places = [i for i, kind in enumerate(self._kinds) if kind[:6] == "Tensor"]

        pairs = zip(self._kinds, call._fields, strict=True)
        fields = ", ".join(f"{kind} {field}" for kind, field in pairs)
        self.forward = torch.library.custom_op(
            f"vlmo::{registered}_fwd",
            self._forward,
            mutates_args=(),
            schema=f"({fields}, str backend) -> (Tensor, Tensor)",
        )
        self.forward.register_fake(lambda *inputs: empty_outputs(call(*inputs[:-1]), inputs[-1]))
        self.forward.register_autograd(self._registered_gradients, setup_context=self._setup)
        self.backward = torch.library.custom_op(
            f"vlmo::{registered}_bwd",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor grad, Tensor[] saved, {fields}, bool[] needs, str backend)"
            " -> Tensor[]",
        )
        self.backward.register_fake(self._fake_backward)
        self.backward.register_autograd(self._refuse)

    def run(self, call: Any, backend: str) -> Tensor:
        """Run a call on a backend that supports it; the output is differentiable."""
        if not runs_eagerly(self._tensors(call, self._tensor_places)):
            register_formulas()
            return self.forward(*call, backend)[0]
        if torch.is_grad_enabled():
            leaves = self._tensors(call, self._leaf_places)
            added = None if self._added is None else call[self._added]
            parts = () if self._parts is None else call[self._parts]
            if recorded((added, *parts, *leaves)):
                return _Direct.apply(self, call, backend, added, *parts, *leaves)
        return self._outputs(call, backend)[0]

    def decompose(self, reference: Callable[[Any], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        """The registered forward in terms of the reference; its saved tensor is uninitialised."""

        def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
            call = self._call(*inputs[:-1])
            return reference(call), self._empty_outputs(call, inputs[-1])[1]

        return forward

    def _tensors(self, call: Any, places: Iterable[int]) -> list[Tensor | None]:
        """The tensors in the given fields of a call, with lists flattened."""
        found: list[Tensor | None] = []
        for place in places:
            if self._is_list[place]:
                found += call[place]
            else:
                found.append(call[place])
        return found

    def _outputs(self, call: Any, backend: str) -> tuple[Tensor, Tensor]:
        with without_autocast(call[0].device):
            return self._backends[backend].forward(call)

    def _forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self._outputs(self._call(*inputs[:-1]), inputs[-1])

    def _differentiate(
        self, grad: Tensor, saved: Sequence[Tensor], call: Any, needs: _Flags, backend: str
    ) -> Sequence[Tensor | None]:
        with without_autocast(grad.device):
            return self._backends[backend].backward(grad, *saved, call, needs)

    def _backward(self, grad: Tensor, saved: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
        """Gradients of all leaves; those that are not needed are empty, of shape (0,)."""
        *fields, needs, backend = inputs
        call = self._call(*fields)
        found = self._differentiate(grad, saved, call, needs, backend)
        return [
            leaf.new_empty(0) if gradient is None or not need else _owned(gradient)
            for leaf, gradient, need in zip(self._given_leaves(call), found, needs, strict=True)
        ]

    def _fake_backward(self, grad: Tensor, saved: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
        *fields, needs, _ = inputs
        leaves = self._given_leaves(self._call(*fields))
        return [
            leaf.new_empty(leaf.shape if need else (0,))
            for leaf, need in zip(leaves, needs, strict=True)
        ]

    def _given_leaves(self, call: Any) -> list[Tensor]:
        return [leaf for leaf in self._tensors(call, self._leaf_places) if leaf is not None]

    def _save(self, ctx: Any, call: Any, outputs: Sequence[Tensor], backend: str) -> None:
        """Store in ``ctx`` what :meth:`_gradients` needs."""
        tensors: list[Tensor | None] = []
        rest: list[Any] = []  # per field: the length of a list of tensors, or a constant
        ctx.part_sizes = []
        for place, (kind, value) in enumerate(zip(self._kinds, call, strict=True)):
            if place == self._parts:
                ctx.part_sizes = [len(part) for part in value]
                rest.append(0)
            elif kind == "Tensor[]":
                tensors.extend(value)
                rest.append(len(value))
            elif kind[:6] == "Tensor":
                tensors.append(None if place == self._added else value)
                rest.append(None)
            else:
                rest.append(value)
        ctx.operation, ctx.rest, ctx.backend = self, rest, backend
        ctx.save_for_backward(*(outputs if self._keeps_output else outputs[1:]), *tensors)
        ctx.set_materialize_grads(False)  # else autograd allocates zeros for the saved output

    def _gradients(self, ctx: Any, grad: Tensor | None, wanted: _Flags) -> list[Tensor | None]:
        """Gradients of the leaves; None for those that are absent or not ``wanted``."""
        if grad is None or not any(wanted):  # grad is None if the output was not used
            return [None] * len(wanted)
        tensors = ctx.saved_tensors
        count = 2 if self._keeps_output else 1
        saved, others = list(tensors[:count]), iter(tensors[count:])
        fields: list[Any] = []
        for kind, value in zip(self._kinds, ctx.rest, strict=True):
            if kind == "Tensor[]":
                fields.append(list(itertools.islice(others, value)))
            else:
                fields.append(next(others) if kind[:6] == "Tensor" else value)
        call = self._call(*fields)
        leaves = self._tensors(call, self._leaf_places)
        given = [leaf is not None for leaf in leaves]
        needs = list(itertools.compress(wanted, given))
        grad = grad.contiguous()
        register_formulas()
        found: Iterable[Tensor | None]
        # With create_graph the registered operation is needed: autograd refuses to differentiate it
        if not torch.is_grad_enabled() and runs_eagerly((grad, *tensors)):
            found = self._differentiate(grad, saved, call, needs, ctx.backend)
        else:
            found = self.backward(grad, saved, *call, needs, ctx.backend)
        rest = iter([g if need else None for g, need in zip(found, needs, strict=True)])
        return [next(rest) if there else None for there in given]

    def _setup(self, ctx: Any, inputs: Any, output: Any) -> None:
        self._save(ctx, inputs[:-1], output, inputs[-1])
        ctx.mark_non_differentiable(output[1])

    def _registered_gradients(self, ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        """One gradient per argument of the schema; a list of gradients for a list."""
        flags: list[bool] = []
        for place in self._leaf_places:
            wanted = ctx.needs_input_grad[place]
            if self._kinds[place] == "Tensor[]":
                flags.extend(wanted or ())
            else:
                flags.append(wanted)
        found = iter(self._gradients(ctx, grad, flags))
        # torch.library mistakes an empty list of integers for an empty list of tensors.
        result: list[Any] = [[] if value == [] else None for value in ctx.rest]
        for place, is_list in enumerate(self._is_list):
            if is_list:
                result[place] = [None] * len(ctx.needs_input_grad[place] or ())
        for place in self._leaf_places:
            if self._kinds[place] == "Tensor[]":
                result[place] = list(itertools.islice(found, ctx.rest[place]))
            else:
                result[place] = next(found)
        if self._added is not None and ctx.needs_input_grad[self._added]:
            result[self._added] = grad  # the output has the dtype of this field
        if self._parts is not None and ctx.part_sizes:
            wanted = ctx.needs_input_grad[self._parts]
            result[self._parts] = _parts_of(grad, ctx.part_sizes, wanted)
        return *result, None

    def _refuse(self, *_: Any) -> None:
        raise NotImplementedError(f"{self.name}: second derivatives are not available.")


class _Direct(torch.autograd.Function):
    """An operation that bypasses torch.library. Autograd tracks ``tensors``, but not ``call``."""

    @staticmethod
    def forward(ctx, operation: Operation, call: Any, backend: str, added, *tensors):
        outputs = operation._outputs(call, backend)
        operation._save(ctx, call, outputs, backend)
        return outputs[0]

    @staticmethod
    def backward(ctx, grad):
        _, _, _, wants_added, *rest = ctx.needs_input_grad
        count = len(ctx.part_sizes)
        gradients = ctx.operation._gradients(ctx, grad, rest[count:])
        parts = _parts_of(grad, ctx.part_sizes, rest[:count])
        return None, None, None, grad if wants_added else None, *parts, *gradients


def _owned(tensor: Tensor) -> Tensor:
    """Contiguous, with a storage of its own, as results of a registered operation must be."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def _parts_of(
    grad: Tensor | None, sizes: Sequence[int], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Successive rows of the gradient, None where they are not wanted."""
    if grad is None or not any(wanted):
        return [None] * len(sizes)
    parts = grad.split(list(sizes))
    return [part if want else None for part, want in zip(parts, wanted, strict=True)]


def recorded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
