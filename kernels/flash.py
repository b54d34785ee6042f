"""Attention on the device's own flash kernels (arXiv 2205.14135), each part giving its log-sum-exp so that parts can be merged.

B batches, S queries, N keys, T tokens of all documents one after the other, H query heads, G key/value heads, D head width.

| device | dtype | kernel |
| --- | --- | --- |
| CPU | any | torch's flash kernel for CPUs |
| GPU | bf16, fp16; D a multiple of 8, at most 256 | FlashAttention 4 or 3 where `choose_flash` found it, else FlashAttention 2 in torch |
| GPU | others | plain maths, [B, H, S, N] in fp32 |
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from megascale.kernels.precision import wide_dtype, widen

Pair = tuple[Tensor, Tensor]
IMPLEMENTATIONS = {9: (("FA3", "flash_attn_interface", 256),), 10: (("FA4", "flash_attn.cute.interface", 128),)}
"""What is faster than the FlashAttention 2 in torch, by major compute capability: torch's name for it, its module, and the widest head that
it takes. FlashAttention 3 (arXiv 2407.08608) is made for Hopper, 4 (arXiv 2603.05451) for Blackwell."""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def choose_flash(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Make torch's flash operators use the fastest kernels that are installed for a device; what attention of this dtype and head width
    runs on from now on, in words.
    """
    if device.type == "cpu":
        return "torch's flash kernel for CPUs"
    if not _fits(dtype, width):
        return f"plain maths: flash kernels take bf16 and fp16 and heads of 8 to 256 in steps of 8, not {dtype} and {width}"
    from torch.nn import attention

    major, minor = torch.cuda.get_device_capability(device)
    missing = []
    for name, module, widest in () if torch.version.hip else IMPLEMENTATIONS.get(major, ()):
        if width > widest:
            missing.append(f"{name}, for heads of at most {widest}")
        elif not _is_installed(module):
            missing.append(module)
        elif name not in attention.list_flash_attention_impls():
            missing.append(f"a torch that knows {name}")
        else:
            attention.activate_flash_attention_impl(name)
            return f"{name} ({module})"
    built_in = "FlashAttention 2 in torch"
    return f"{built_in}; faster on sm_{major}{minor} would be {' and '.join(missing)}" if missing else built_in


def _fits(dtype: torch.dtype, width: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def has_flash(q: Tensor) -> bool:
    """Whether a GPU's flash kernels take queries [..., D] like these."""
    return q.device.type == "cuda" and _fits(q.dtype, q.shape[-1])


def math_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Pair:
    """Plain attention of [B,H,S,D] with [B,G,N,D]; mask [S,N] is True where visible. Returns out and lse [B,H,S], fp32 or wider."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = widen(q) @ widen(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ widen(v)).to(q.dtype), lse


def math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `math_forward` for a given (out, lse), which may be those of a larger softmax. Like flash kernels it multiplies in the
    dtype of the inputs; scores alone are as wide as in the forward pass.
    """
    heads, groups, scale = q.shape[1], k.shape[1], q.shape[-1] ** -0.5
    keys, values = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = widen(q) @ widen(keys).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = (scores - lse[..., None]).exp()
    inner = widen(grad @ values.transpose(-1, -2)) - (widen(grad) * widen(out)).sum(-1, keepdim=True)
    grad_scores = (weights * inner * scale).to(q.dtype)
    grad_k, grad_v = grad_scores.transpose(-1, -2) @ q, weights.to(q.dtype).transpose(-1, -2) @ grad
    fold = (q.shape[0], groups, heads // groups, *grad_k.shape[2:])
    return grad_scores @ keys, grad_k.view(fold).sum(2), grad_v.view(fold).sum(2)


def _window_mask(rows: int, window: int, device: torch.device) -> Tensor:
    """[rows, rows], True where a query sees a key: itself and the window - 1 tokens before it."""
    distance = torch.arange(rows, device=device)[:, None] - torch.arange(rows, device=device)
    return (distance >= 0) & (distance < window)


def _limited_mask(q: Tensor, window: int) -> Tensor:
    """The window as the CPU kernel takes it: additive, fp32 or q's own width (an fp32 mask with fp64 q is misread in silence)."""
    mask = torch.zeros(q.shape[2], q.shape[2], dtype=wide_dtype(q))
    return mask.masked_fill_(~_window_mask(q.shape[2], window, q.device), float("-inf"))[None, None]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int = 0) -> Pair:
    """Attention of [B,H,S,D] with [B,G,N,D]. Returns out [B,H,S,D] and lse [B,H,S].

    Args:
        causal: query i sees the keys up to i; S = N.
        window: with `causal`, only the last this many of them; 0: all.
    """
    limited = causal and 0 < window < q.shape[2]
    if q.device.type == "cpu":
        mask = _limited_mask(q, window) if limited else None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal and not limited, attn_mask=mask)
    if has_flash(q):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *_by_token(q, k, v), None, None, q.shape[2], k.shape[2], 0.0, causal, False, **_window(window if limited else 0)
        )
        return out.transpose(1, 2), lse
    mask = _window_mask(q.shape[2], window if limited else q.shape[2], q.device) if causal else None
    return math_forward(q, k, v, mask)


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, window: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `flash_forward` for a given (out, lse), which may be those of a larger softmax."""
    limited = causal and 0 < window < q.shape[2]
    if q.device.type == "cpu":
        mask = _limited_mask(q, window) if limited else None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal and not limited, attn_mask=mask
        )
    if has_flash(q):
        grads = torch.ops.aten._flash_attention_backward(
            *_by_token(grad, q, k, v, out), lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal,
            *_no_dropout(q), **_window(window if limited else 0),
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in grads)
    mask = _window_mask(q.shape[2], window if limited else q.shape[2], q.device) if causal else None
    return math_backward(grad, q, k, v, out, lse, mask)


def _by_token(*tensors: Tensor) -> list[Tensor]:
    """[B,H,S,D] as the GPU kernels want it, [B,S,H,D]: views."""
    return [x.transpose(1, 2) for x in tensors]


def _window(window: int) -> dict[str, int | None]:
    return {"window_size_left": window - 1 if window else None, "window_size_right": 0 if window else None}


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The random state of a dropout that there is not."""
    return q.new_empty(0, dtype=torch.uint64), q.new_empty(0, dtype=torch.uint64)


def packed_flash_forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, window: int) -> Pair:
    """Causal attention inside each document, where `has_flash`: of [T,H,D] with [T,G,D]. Returns out [T,H,D] and lse [T,H].

    Args:
        borders: int32 [documents + 1], the first token of each, and T at the end.
        longest: no document is longer, tokens.
        window: as in `flash_forward`.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, 0.0, True, False, **_window(window)
    )
    return out, lse.transpose(0, 1).contiguous()


def packed_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor, longest: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `packed_flash_forward` for a given (out, lse)."""
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse.transpose(0, 1).contiguous(), borders, borders, longest, longest, 0.0, True,
        *_no_dropout(q), **_window(window),
    )  # fmt: skip
