"""torch.func.vmap over the streaming operators: the mapped dimension joins the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnvariants.ops import streaming_backward, streaming_forward

_SHARED = "mask", "bias", "slopes", "visible"


def _fold(
    tensor: Tensor, dim: int | None, size: int, batch: int, axis: int = 0, whole: bool = True
) -> Tensor:
    """`tensor` with the mapped dimension in front of the batch at `axis` and both made one.

    A tensor that is not mapped is repeated; but not if it broadcasts along the batch, unless
    `whole`.
    """
    if dim is None:
        if not whole and tensor.shape[axis] == 1:
            return tensor
        tensor = tensor.unsqueeze(axis)
    else:
        tensor = tensor.movedim(dim, axis)
    sizes = list(tensor.shape)
    sizes[axis : axis + 2] = size, batch
    return tensor.expand(sizes).flatten(axis, axis + 1)


def _fold_shared(
    tensors: tuple[Any, ...], dims: tuple[Any, ...], size: int, batch: int, whole: set[str]
) -> list[Any]:
    """Mask, bias, slopes, visible, boundaries and seed."""
    if any(tensor is not None for tensor in tensors[4:6]):
        raise ValueError("vmap cannot map packed sequences; pack the mapped ones too.")
    if dims[6] is not None:
        raise ValueError("vmap takes dropout with randomness='same' only.")
    folded = [
        None if tensor is None else _fold(tensor, dim, size, batch, whole=name in whole)
        for name, tensor, dim in zip(_SHARED, tensors, dims, strict=False)
    ]
    return [*folded, *tensors[4:]]


def _batch(query: Tensor, dim: int | None) -> int:
    return query.shape[_batch_axis(dim)]


@streaming_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size, batch = info.batch_size, _batch(args[0], in_dims[0])
    out, saved = streaming_forward(
        *(_fold(t, d, size, batch) for t, d in zip(args[:3], in_dims, strict=False)),
        *_fold_shared(args[3:10], in_dims[3:10], size, batch, set()),
        *args[10:],
    )
    return (out.unflatten(0, (size, batch)), saved.unflatten(1, (size, batch))), (0, 1)


@streaming_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size, batch = info.batch_size, _batch(args[1], in_dims[1])
    shared, dims, wants = args[6:13], in_dims[6:13], args[13:15]
    wanted = {name for name, wants_it in zip(("bias", "slopes"), wants, strict=True) if wants_it}
    grads = streaming_backward(
        *(_fold(t, d, size, batch) for t, d in zip(args[:5], in_dims, strict=False)),
        _fold(args[5], in_dims[5], size, batch, axis=1),
        *_fold_shared(shared, dims, size, batch, wanted),
        *args[13:],
    )
    unfolded = [grad.unflatten(0, (size, batch)) for grad in grads[:3]]
    for index, name in ((1, "bias"), (2, "slopes")):
        grad = grads[index + 2]
        if name not in wanted:
            unfolded.append(grad.expand(size, 0))
            continue
        tensor, dim = shared[index], dims[index]
        grad = grad.unflatten(0, (size, batch))
        one = tensor.shape[_batch_axis(dim)] == 1
        unfolded.append(grad.sum(1, keepdim=True) if one else grad)
    return tuple(unfolded), (0,) * 5


def _batch_axis(dim: int | None) -> int:
    return 0 if dim is None or dim > 0 else 1
