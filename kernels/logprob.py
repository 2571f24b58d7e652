"""Placeholder torch reference while the kernel is in the works."""
from typing import NamedTuple
import torch

class TokenStats(NamedTuple):
    logprobs: torch.Tensor
    entropy: torch.Tensor
    confidence: torch.Tensor

def token_stats_from_logits(logits, labels, *, temperature=1.0, mask=None, inplace_backward=False):
    live = (labels != -100) if mask is None else mask & (labels != -100)
    logp = (logits.float() / temperature).log_softmax(-1)
    ent = -(logp.exp() * logp).sum(-1) * live
    lp = logp.gather(-1, labels.clamp(min=0).long()[..., None])[..., 0] * live
    n = live.sum(-1)
    conf = torch.where(n > 0, (lp.detach().sum(-1) / n.clamp(min=1)).exp(), 0.0)
    return TokenStats(lp, ent, conf)

def logprobs_from_logits(logits, labels, **kw):
    return token_stats_from_logits(logits, labels, **kw).logprobs
