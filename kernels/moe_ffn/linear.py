"""The public function moe_linear: moe_ffn's second layer alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..arguments import autocast_dtype, check_choice
from ..routing import ModalityRouting
from .api import Experts, check_inputs, check_vectors, dispatch
from .call import NORMS
from .op import MOE_LINEAR


def moe_linear(
    x: Tensor,  # [..., D]
    routing: ModalityRouting,
    weight: Sequence[Tensor],  # E x [O, D]
    bias: Sequence[Tensor] | None = None,  # E x [O]
    *,
    norm: str = "none",
    norm_weight: Sequence[Tensor] | None = None,  # E x [D]
    norm_bias: Sequence[Tensor] | None = None,  # E x [D]
    norm_eps: float = 1e-6,
    layer_scale: Tensor | None = None,  # [O]
    token_scale: Tensor | None = None,  # x.shape[:-1]
    residual: Tensor | None = None,  # [..., O]
    backend: str | None = None,
) -> Tensor:  # [..., O]
    """Linear layer that routes each token to the weights of its modality, in one operation.

    For a token t that ``routing`` sends to expert e::

        y_t = residual_t + token_scale_t * layer_scale * (weight_e norm_e(x_t) + bias_e)

    Everything except the product is optional. The order of the tokens is unchanged, and experts may
    have no tokens. It is for the projections of attention in models that have them per modality:
    query, key and value with the norm before them, and the output projection with the residual
    after it (BEiT-3, BAGEL, separate attention in VLMo's Table 1).

    Args:
        x: input, floating point; the last dimension is D.
        routing: the expert of each token of ``x.shape[:-1]``.
        weight: one matrix per expert, in the layout of the weight of :class:`torch.nn.Linear`; all
            have the same O.
        bias: one bias per expert, or None.
        norm, norm_weight, norm_bias, norm_eps, layer_scale, token_scale, residual: as for
            :func:`vlmo.kernels.moe_ffn`.
        backend: ``"triton"``, ``"composed"``, ``"cpu"`` or ``"reference"``; see
            :mod:`vlmo.kernels`. ``"composed"`` needs a routing with ``counts``.

    Returns:
        y; its dtype is that of ``residual`` if given, else that of ``weight``.

    Dtypes, autocast, derivatives: as for :func:`vlmo.kernels.moe_ffn`. The backward saves x; it
    computes the norm again, and the layer's output if ``layer_scale`` needs a gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the number of weights is
            not the routing's number of experts.
        NotImplementedError: the requested backend cannot run this call (with its reason).
    """
    check_inputs([x], routing)
    check_choice("norm", norm, NORMS)
    given = ((), weight, (), bias, norm_weight, norm_bias, (), ())
    experts = Experts(*[() if tensors is None else tensors for tensors in given])
    operand_dtype = autocast_dtype(x.device.type)
    experts = experts.autocast(operand_dtype)
    if operand_dtype is not None and norm == "none":
        x = x.to(operand_dtype)
    experts.check(x, routing.num_experts, None, norm, cast=operand_dtype is not None)
    token_scales, residuals = ([] if t is None else [t] for t in (token_scale, residual))
    vectors = (layer_scale, token_scales, residuals)
    check_vectors([x], experts.w2[0].shape[0], *vectors)
    # Nothing reads the eps of a sub-norm and the activation.
    options = (norm, norm_eps, 0.0, "gelu")
    return dispatch(MOE_LINEAR, [x], routing, experts, vectors, options, False, False, backend)[0]
