"""What the suites of whole models share: their batches, calls and accuracy check."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.contenders import (
    COMPILED,
    Case,
    Work,
    compiler_of,
    is_compiled,
    why_not_ours,
    without_fallback,
)
from harness.cost import Cost
from vlmo.kernels import BACKEND_NAMES, use_backend
from vlmo.model.beit3 import BEiT3Config
from vlmo.model.config import VLMoConfig
from vlmo.testing import Deviation, allowed_error

Batch = dict[str, Any]
Named = dict[str, Tensor]
# Computes a phase with a model and a batch: outputs, of which a step has "loss".
Form = Callable[[str, Any, Batch], Named]

OURS = (*(f"vlmo:{name}" for name in BACKEND_NAMES), f"vlmo:cpu{COMPILED}")


class Small(NamedTuple):
    """A smaller model with a batch, and its results in the case's dtype and in float64."""

    model: nn.Module
    batch: Batch
    eager: Named
    exact: Named


class WholeModel(abc.ABC):
    """A model that processes a batch in one phase; see :class:`harness.contenders.Problem`.

    Args:
        case: the case, whose phase is given to the forms.
        device: device of the model and the batch.
        trains: whether the phase is a step, forward and backward.

    Attributes:
        operations: those of this library that the model consists of.
    """

    operations: Sequence[str] = ("moe_ffn", "shared_attention")
    contenders: Sequence[str]
    cost: Cost
    samples: int
    batch: Batch

    def __init__(self, case: Case, device: torch.device, *, trains: bool) -> None:
        # Otherwise the shapes of earlier cases count towards Dynamo's recompilation limit.
        torch._dynamo.reset()
        self.case, self.phase, self.dtype, self.device = case, case.phase, case.dtype, device
        self.trains = trains

    @property
    @abc.abstractmethod
    def model(self) -> nn.Module:
        """The model, created when first needed because it may take gigabytes."""

    @property
    @abc.abstractmethod
    def small(self) -> Small:
        """Model and batch of the accuracy check; "eager" is the reference implementation."""

    @abc.abstractmethod
    def why_not(self, contender: str) -> str | None:
        """The reason if it cannot run on this machine, else None."""

    @abc.abstractmethod
    def ours(self) -> Form:
        """The computation of this library."""

    @abc.abstractmethod
    def official(self, compiler: str | None) -> Form:
        """That of the reference implementation; ``compiler`` is a backend of torch.compile."""

    def why_not_ours(self, contender: str) -> str | None:
        """The reason if one of this library's contenders cannot run on this machine, else None."""
        if contender == "vlmo:reference" and self.device.type == "cpu" and self.case.size != "tiny":
            return "the oracle of tests: on a CPU it would take a third of the time."
        backend = backend_of(contender)
        for operation in self._of_backend(backend):
            if reason := why_not_ours(operation, self.case, self.device, backend):
                return reason
        return None

    def _of_backend(self, backend: str) -> list[str]:
        """The operations that a backend computes; for the others, the first that can is chosen."""
        without = "shared_attention" if backend == "composed" else None
        return [operation for operation in self.operations if operation != without]

    def work(self, contender: str) -> Work:
        """A call of the contender: forward without gradients, or forward and backward."""
        model, batch, phase = self.model, self.batch, self.phase
        form = self.form(contender)

        def step() -> None:
            form(phase, model, batch)["loss"].backward()
            # Otherwise the next call would accumulate, and peak memory would include them.
            model.zero_grad(set_to_none=True)

        def forward() -> Named:
            with torch.no_grad():
                return form(phase, model, batch)

        return step if self.trains else forward

    def check(self, contender: str) -> Sequence[Deviation]:
        """Compare :attr:`small` with float64.

        Errors are L2 norms over the parameters of a layer, because the gradient of a bias alone may
        be dominated by cancellation; and over all scalars, such as losses, because the error of a
        single one may be small by chance.
        """
        model, batch, eager, exact = self.small
        actual = self.results(self.form(contender), model, batch)
        layers: dict[str, list[str]] = {}
        for name in exact:
            layers.setdefault(self.layer_of(name), []).append(name)

        def distance(found: Named, names: list[str]) -> float:
            return math.hypot(*(float((found[n].double() - exact[n]).norm()) for n in names))

        deviations = []
        for layer, names in layers.items():
            size = math.hypot(*(float(exact[name].norm()) for name in names))
            errors = distance(actual, names), distance(eager, names)
            allowed = allowed_error(errors[1], size, self.dtype)
            deviations.append(Deviation(layer, *errors, allowed))
        return deviations

    def results(self, form: Form, model: nn.Module, batch: Batch) -> Named:
        """Outputs, or what :meth:`compares` of a step's outputs and every gradient."""
        if not self.trains:
            with torch.no_grad():
                return form(self.phase, model, batch)
        output = form(self.phase, model, batch)
        output["loss"].backward()
        found = {name: v.detach() for name, v in output.items() if self.compares(name)}
        found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        scalars = [found.pop(name).double() for name in sorted(found) if not found[name].dim()]
        return found | ({"numbers": torch.stack(scalars)} if scalars else {})

    def layer_of(self, name: str) -> str:
        """The layer of a parameter; other tensors are compared alone."""
        return name.rpartition(".")[0] or name

    def compares(self, output: str) -> bool:
        """Whether a step's output is compared: by default all but the loss.

        The error of a single scalar may be small by chance in eager PyTorch, and the bound with it.
        """
        return output != "loss"

    def form(self, contender: str) -> Form:
        """The function by which a contender computes the phase."""
        compiler = compiler_of(self.case, self.device) if is_compiled(contender) else None
        if contender not in OURS:
            return self.official(compiler)
        form = self.ours() if compiler is None else compiled(self.ours(), compiler)
        backend = backend_of(contender)
        name = ",".join(f"{operation}={backend}" for operation in self._of_backend(backend))

        def on_backend(phase: str, model: nn.Module, batch: Batch) -> Named:
            with use_backend(name):
                return form(phase, model, batch)

        return on_backend


@functools.cache
def compiled(form: Form, compiler: str) -> Form:
    """A form in graphs, of which there are several where it reads numbers from tensors.

    A single graph (``fullgraph=True``) is what Inductor may fail on (docs/compiling.md).
    """
    traced = torch.compile(form, dynamic=False, backend=compiler)

    def called(phase: str, model: nn.Module, batch: Batch) -> Named:
        with without_fallback():
            return traced(phase, model, batch)

    return called


def backend_of(contender: str) -> str:
    """The backend in the name of one of our contenders."""
    return contender.removeprefix("vlmo:").removesuffix(COMPILED)


def on_device(
    batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The batch on a device, with floating-point tensors in ``dtype``."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in batch.items()
    }


def widened(batch: Mapping[str, Any]) -> Batch:
    """The batch with floating-point tensors in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


class Exactly(TorchFunctionMode):
    """A context in which float64 takes the place of float32, in calls that name it.

    Reference implementations compute norms and softmaxes in float32 whatever the dtype; in this
    context, and with operands in float64, everything is in float64.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        wide = {torch.float32: torch.float64}
        args = [
            wide.get(value, value) if isinstance(value, torch.dtype) else value for value in args
        ]
        options = {
            name: wide.get(value, value) if isinstance(value, torch.dtype) else value
            for name, value in (kwargs or {}).items()
        }
        wider: Callable[..., Any] = Tensor.double if function is Tensor.float else function
        return wider(*args, **options)


def pair_batch(config: VLMoConfig | BEiT3Config, pairs: int) -> dict[str, Tensor]:
    """Texts of 12 tokens on average, like captions of COCO, and as many images.

    Args:
        config: determines the padded length, the vocabulary, the pixels and the answers of VQA.
        pairs: number of texts and of images.

    Returns:
        The tensors of a batch on the CPU, with the number of tokens of each text.
    """
    random = torch.Generator().manual_seed(0)
    lengths = 8 + 5 * torch.arange(pairs) % 9
    length, pixels = config.max_text_length, config.image_size
    masks = torch.arange(length) < lengths[:, None]
    ids = torch.randint(1, config.vocab_size, (pairs, length), generator=random) * masks
    image = torch.rand(pairs, 3, pixels, pixels, generator=random) * 2 - 1
    targets = torch.rand(pairs, config.vqa_labels, generator=random)
    return dict(
        text_ids=ids,
        text_masks=masks.long(),
        text_lengths=lengths,
        image=image,
        vqa_targets=targets,
    )
