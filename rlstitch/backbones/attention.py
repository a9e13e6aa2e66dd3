"""Joint attention for CPUs: in bf16, where the CPU multiplies it itself, two matrix products beat torch's fused kernel on short sequences; everywhere else it is the fused one.

A denoiser of the miniature, forward and backward, takes 1.45 times as long in bf16 by the fused kernel where products of bf16 are the hardware's own, and .4 as long
where they are emulated; in float32 .97 to .99, in as much less memory as the attention matrix takes. That matrix, kept for the backward pass, grows with the square of
the sequence: beyond `LONGEST` tokens, as any picture of 512 pixels and more has, it would be most of the memory, and the fused kernel, which keeps none, runs in bf16, too.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F

from rlstitch.distributed import native_bf16

LONGEST = 512  # tokens; beyond it the attention matrix costs more than it saves
NATIVE = native_bf16("cpu")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v on [B, heads, L, d]. The kernel is chosen by machine, precision and length alone, so that rollout and training do the same."""
    if q.shape[-2] > LONGEST or v.dtype == torch.float32 or not NATIVE:
        return F.scaled_dot_product_attention(q, k, v)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.softmax(-1).to(v.dtype) @ v


class PlainJointAttention:
    """A diffusers attention processor for SD3's blocks (joint, and image-only where a block has dual attention); same maths as the stock one, which takes no backend of
    diffusers' and so cannot be told one."""

    _attention_backend = None  # as diffusers calls it; None for `attention` above

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **_
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("SD3's attention takes no mask")
        streams = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            streams.append((encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k))
        parts = []
        for x, to_q, to_k, to_v, norm_q, norm_k in streams:
            q, k, v = (to(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (to_q, to_k, to_v))
            parts.append((q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v))
        q, k, v = (torch.cat(same, 2) for same in zip(*parts))
        if self._attention_backend is None:
            out = attention(q, k, v).transpose(1, 2)
        else:
            out = dispatch_attention_fn(*(x.transpose(1, 2) for x in (q, k, v)), backend=self._attention_backend)
        out = out.flatten(2).to(q.dtype)
        image, text = out.split([hidden_states.shape[1], out.shape[1] - hidden_states.shape[1]], 1)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)
