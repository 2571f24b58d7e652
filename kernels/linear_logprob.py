# Copy:    this file and logprob.py, side by side; they use nothing else of the project.
# Needs:   torch >= 2.8; on a GPU (NVIDIA, AMD) triton >= 3.4; without triton or a GPU, torch alone.
# Run on:  torch 2.13.0, triton 3.7.1: interpreter, CPU. Not yet on a GPU.
# Licence: SPDX-License-Identifier: MIT. Copyright the nsr authors.
"""Log-probs, entropy and confidence straight from hidden states and LM head, no logits held:

    logp, entropy, confidence = linear_logprobs(hidden, weight, labels, temperature=0.6, mask=mask)

Logits are there a few rows at a time: computed, reduced by the kernels of logprob.py (the two files
go together) and overwritten; backward computes them again and overwrites them with their gradient.
`python kernels/linear_logprob.py` checks this file on this machine and prints what it costs there.
"""
import torch
from torch.autograd.function import once_differentiable
if __package__:
    from . import logprob as K
else:
    import logprob as K

# --- definition --------------------------------------------------------------------------------
# N V b bytes of logits: it holds 3.5 N V b, and computes 3 products of N V H. Here, R = chunk_rows:
# R V b, and 4 products (3 for R of the rows).
def naive_linear_logprobs(hidden, weight, labels, *, bias=None, temperature=1.0, mask=None,
                          chunk_rows=None):
    """`linear_logprobs`, same shapes and dtypes, from all the logits at once, dead rows too."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return K.naive_token_stats(logits, labels, temperature, mask)

# --- chunks of live rows, all in one buffer (R, V) ---------------------------------------------
# Forward takes the first chunk last and leaves it in the buffer, where backward starts: R rows are
# not computed again, and where all fit, none. What else pays for the fourth product: backward knows
# m and log D of a row (stats), and a buffer used again costs no page faults.
# Why 256 MiB: R rows share one reading of weight, and one reading and writing of its gradient. For
# float32 and V = 151,936 that is 441 rows; fewer take longer (220: about 6%). A GPU does more
# operations in the time of a byte: 883 rows of bfloat16 are 220 for each byte of that gradient.
CHUNK = 2**28  # bytes of logits
def _logits(hidden, weight, bias, out):
    step = 2048 if out.device.type == "cpu" else len(weight)  # rows of weight that its cache holds
    for v in range(0, len(weight), step):
        W, x = weight[v : v + step].t(), out[:, v : v + step]
        if bias is None:
            torch.mm(hidden, W, out=x)
        else:
            torch.addmm(bias[v : v + step], hidden, W, out=x)
def _accumulate(total, a, b):  # total += a @ b
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and torch.version.cuda:  # of two bfloat16, in float32
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the product is rounded to bfloat16, the sum over chunks is not
        total += torch.mm(a, b)
class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temps, check, dtype, rows):
        at = (labels != -100).nonzero(as_tuple=True)  # on a GPU the host waits for this
        y, t, n = labels[at], temps[at], len(at[0])
        logp, entropy = temps.new_zeros(2, *labels.shape)
        ctx.dtype, ctx.R, stats = dtype, max(1, min(rows, n)), t.new_empty(n, 4)
        ctx.buffer = hidden.new_empty(ctx.R, len(weight), dtype=dtype)
        W, b = (None if i is None else i.to(dtype) for i in (weight, bias))
        for i in reversed(range(0, n, ctx.R)):
            r, place = slice(i, i + ctx.R), tuple(j[i : i + ctx.R] for j in at)
            x = ctx.buffer[: n - i]
            _logits(hidden[place].to(dtype), W, b, x)
            out = K._run_forward(x[None], y[None, r], t[None, r], check, 1, False)
            logp[place], entropy[place], stats[r] = (o[0] for o in out[:3])
        ctx.save_for_backward(hidden, weight, bias, y, t, stats, *at)
        ctx.set_materialize_grads(False)
        return logp, entropy
    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, bias, y, t, stats, *at = ctx.saved_tensors  # raises if one has changed
        kept, ctx.buffer = ctx.buffer, None  # gone where a retained graph comes here again
        buffer = hidden.new_empty(ctx.R, len(weight), dtype=ctx.dtype) if kept is None else kept
        W, b = (None if i is None else i.to(ctx.dtype) for i in (weight, bias))
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        g_hidden = torch.zeros_like(hidden) if to_hidden else None
        g_weight = t.new_zeros(weight.shape) if to_weight else None
        g_bias = t.new_zeros(bias.shape) if to_bias else None
        for i in range(0, len(y), ctx.R):
            r, place = slice(i, i + ctx.R), tuple(j[i : i + ctx.R] for j in at)
            h, x = hidden[place].to(ctx.dtype), buffer[: len(y) - i]
            if i or kept is None:
                _logits(h, W, b, x)
            g = [None if j is None else j[place] for j in grads]
            K._run_backward(x[None], y[None, r], t[None, r], stats[None, r], *g, x[None])
            with torch.autocast(x.device.type, enabled=False):
                if to_hidden:
                    g_hidden[place] = torch.mm(x, W).to(hidden.dtype)
                if to_weight:
                    _accumulate(g_weight, x.t(), h)
                if to_bias:
                    g_bias += x.sum(0, dtype=t.dtype)
        return (g_hidden, g_weight.to(weight.dtype) if to_weight else None,
                g_bias.to(bias.dtype) if to_bias else None, *[None] * 5)

# --- public function ---------------------------------------------------------------------------
def linear_logprobs(hidden, weight, labels, *, bias=None, temperature=1.0, mask=None,
                    chunk_rows=None):
    """`token_stats_from_logits` of hidden @ weight.T + bias, differentiable, a few rows at a time.

    hidden: (..., H), weight: (V, H), bias: (V) or None, of one dtype out of float32, bfloat16,
      float16, float64. Under torch.autocast they may differ: the product is in its dtype.
    labels: (...) int32 or int64; -100: dead. mask: (...) bool, False: dead. Dead hidden states are
      not read, outputs and gradients are 0.
    temperature: positive float, or tensor broadcast to (...) (to check it a host waits for a GPU).
    chunk_rows: the logits of that many live rows are held at once, also until backward; None: what
      256 MiB hold.
    Returns TokenStats: logprobs and entropy (...), confidence (...[:-1]), in float32 (float64 for
      float64 logits). The gradients of weight and bias are summed up over chunks in that dtype.
    Raises ValueError on shapes, dtypes, values that do not fit. Source of confidence:
      arXiv:2605.07137."""
    params = [weight] if bias is None else [weight, bias]
    dtype, device = hidden.dtype, hidden.device.type
    if (hidden.dim() < 2 or hidden.shape[-1:] != weight.shape[1:]
            or params[-1].shape[0] != weight.shape[0]):
        raise ValueError("hidden (..., H), weight (V, H) and bias (V) do not fit: "
                         f"{[tuple(i.shape) for i in (hidden, *params)]}")
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif any(i.dtype != dtype for i in params):
        raise ValueError(f"hidden, weight and bias must have one dtype outside autocast, not "
                         f"{[i.dtype for i in (hidden, *params)]}")
    if chunk_rows is not None and not chunk_rows >= 1:
        raise ValueError(f"chunk_rows must be a positive int, not {chunk_rows}")
    rows = chunk_rows or CHUNK // (dtype.itemsize * len(weight))
    y, temps = K._rows(hidden.shape[:-1], dtype, labels, temperature, mask)
    check = isinstance(temperature, torch.Tensor)
    logp, entropy = _LinearLogprobs.apply(hidden, weight, bias, y, temps, check, dtype, rows)
    n = (y != -100).sum(-1)
    mean = logp.detach().sum(-1) / n.clamp(min=1)
    return K.TokenStats(logp, entropy, mean.exp().where(n > 0, 0))

# --- self-check and benchmark ------------------------------------------------------------------
def _benchmark(N, H, V, cuda):
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    hidden, weight = (torch.randn(n, H, dtype=dtype, device=device) for n in (N, V))
    inputs, labels = (hidden.requires_grad_(), weight.mul_(0.03).requires_grad_()), torch.randint(
        V, (N,), device=device)
    logits, grads = N * V * dtype.itemsize, hidden.nbytes + weight.nbytes
    print(f"{N} x {H} hidden states, V = {V}, {dtype}, log-probs, forward + backward")
    plain = lambda h, w, y: ((h @ w.t()).float().log_softmax(-1).gather(-1, y[:, None]),)
    for name, f in (("naive", plain), ("here", linear_logprobs)):
        s, held = K._measure(lambda: torch.autograd.grad(f(*inputs, labels)[0].sum(), inputs), cuda)
        print(f"  {name:5} {s * 1e3:8.1f} ms, beyond inputs and gradients it holds "
              f"{(held - grads) / logits:4.0%} of the logits")

if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    h, w, b = (torch.randn(*i, device="cuda" if cuda else "cpu").requires_grad_()
               for i in ((4, 16, 64), (1003, 64), (1003,)))
    inputs, y = [i.detach().double().requires_grad_() for i in (h, w, b)], torch.randint(
        1003, (4, 16), device=h.device)
    want = naive_linear_logprobs(*inputs[:2], y, bias=inputs[2], temperature=6.0)
    found = linear_logprobs(h, w, y, bias=b, temperature=6.0, chunk_rows=13)
    (want[0] + want[1]).sum().backward(), (found[0] + found[1]).sum().backward()
    error = max((i - j).abs().max() / i.abs().max() for i, j in zip(
        (*want, *(i.grad for i in inputs)), (*found, h.grad, w.grad, b.grad))).item()
    assert error < 1e-5, error
    print(f"values and gradients are within {error:.0e} of float64, relative to the largest")
    if not K.INTERPRET:
        _benchmark(*(8192, 1536) if cuda else (1024, 896), 151_936, cuda)
