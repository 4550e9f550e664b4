"""Linear attention, causal by carried states or full: forward, backward and decoding.

    out_i = sum_{j visible} c_ij v_j / max(norm_i, eps),    c_ij = scale q_i . k_j
    norm_i = sum_{j visible} c_ij

in time and memory linear in the tokens. q and k are features, ready made. With g_i = d_out_i /
max(norm_i, eps) and delta_i = g_i . out_i, or 0 where norm_i < eps:

    dq_i = scale sum_j (g_i . v_j - delta_i) k_j      dv_j = scale sum_i (q_i . k_j) g_i
    dk_j = scale sum_i (g_i . v_j - delta_i) q_i

Sums over whole chunks of keys or queries are carried as states sum k v^T and sum q g^T, kept in
bfloat16 for bfloat16 tensors, whose products would round them to it anyway, and float32 otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnvariants_kernels.launch import Launch, addressable
from attnvariants_kernels.linear_plan import Call, State, backward_steps, forward_steps, run


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: bool = False, **call: Any
) -> tuple[Tensor, ...]:
    """Output and norm, and the state behind the last key if `return_state`.

    Args:
        q: `[batch, heads, q_len, features]`, float32, bfloat16 or float16, any strides.
        k: `[batch, kv_heads, kv_len, features]`; kv_heads divides heads.
        v: `[batch, kv_heads, kv_len, value_dim]`.
        return_state: also return a `State`, from which `decode_step` goes on.
        call: the fields of `Call`.

    Returns:
        out `[batch, heads, q_len, value_dim]` in v's dtype; norm `[batch, heads, q_len]`, float32,
        not clamped; `State` if asked for.
    """
    call = Call(**call)
    q, k, v = (addressable(tensor) for tensor in (q, k, v))
    out, norm, state = _results(q, k, v, call, return_state)
    run(forward_steps(q, k, v, out, norm, state, call))
    return (out, norm, state) if state else (out, norm)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, **call: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) from those of `out`; `call` as it was in `forward`.

    Bitwise the same each time: nothing is added atomically, and the query heads of a key head are
    summed in order.
    """
    call = Call(**call)
    grad_out, q, k, v, out = (addressable(tensor) for tensor in (grad_out, q, k, v, out))
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    run(backward_steps(grad_out, q, k, v, out, norm.contiguous(), *grads, call))
    return grads


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, eps: float, scale: float
) -> tuple[Tensor, State]:
    """One more token: the output of its query and the state behind its key.

    Args:
        q: `[batch, heads, 1, features]`.
        k: `[batch, kv_heads, 1, features]`.
        v: `[batch, kv_heads, 1, value_dim]`.
        state: behind all earlier keys; left as it is.
        eps: as in `forward`.
        scale: as in `forward`.

    Raises:
        ValueError: q, k and v do not hold one token.
    """
    if not q.shape[2] == k.shape[2] == v.shape[2] == 1:
        raise ValueError(
            "decode_step takes one token at a time, got "
            f"{q.shape[2]} queries, {k.shape[2]} keys and {v.shape[2]} values; pass longer input "
            "to forward(..., return_state=True)."
        )
    state = State(
        torch.addcmul(state.memory, k.float().transpose(2, 3), v.float()),
        state.total + k[:, :, 0].float(),
    )
    grouped = scale * q[:, :, 0].float().unflatten(1, (k.shape[1], -1))
    norm = grouped @ state.total.unsqueeze(3)
    out = (grouped @ state.memory) / norm.clamp(min=eps)
    return out.flatten(1, 2).unsqueeze(2).to(v.dtype), state


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_state: bool = False,
    architecture: str | None = None,
    **call: Any,
) -> dict[str, Launch]:
    """The launches of `forward`, by name and in order; tensors may be on the meta device.

    Args:
        q: as in `forward`, likewise k and v.
        return_state: as in `forward`.
        architecture: such as "sm_90", whose configurations to take; None for that of q's device.
        call: the fields of `Call`.
    """
    call = Call(**call)
    out, norm, state = _results(q, k, v, call, return_state)
    steps = forward_steps(q, k, v, out, norm, state, call, architecture)
    return {name: step.make(step.configs[0]) for name, step in steps.items()}


def plan_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norm: Tensor,
    *,
    architecture: str | None = None,
    **call: Any,
) -> dict[str, Launch]:
    """The launches of `backward`, by name and in order; as `plan_forward`."""
    grads = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    steps = backward_steps(grad_out, q, k, v, out, norm, *grads, Call(**call), architecture)
    return {name: step.make(step.configs[0]) for name, step in steps.items()}


def _results(
    q: Tensor, k: Tensor, v: Tensor, call: Call, return_state: bool
) -> tuple[Tensor, Tensor, State | None]:
    """Room for what the forward returns."""
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype, device=v.device)
    norm = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not return_state:
        return out, norm, None
    sequences = k.shape[0] if call.cu_k is None else len(call.cu_k) - 1
    shape = (sequences, k.shape[1], k.shape[3])
    memory = torch.empty((*shape, v.shape[3]), dtype=torch.float32, device=k.device)
    total = torch.empty(shape, dtype=torch.float32, device=k.device)
    return out, norm, State(memory, total)
