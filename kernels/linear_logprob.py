# Copy:    this file and logprob.py, side by side; they use nothing else of the project.
# Needs:   torch >= 2.8; on a GPU (NVIDIA, AMD) triton >= 3.4; without triton or a GPU, torch alone.
# Run on:  torch 2.13.0, triton 3.7.1 and 3.9.0: interpreter, CPU. Not yet on a GPU.
# Licence: SPDX-License-Identifier: MIT. Copyright the nsr authors.
"""Log-probs, entropy and confidence straight from hidden states and LM head, no logits held:

    logp, entropy, confidence = linear_logprobs(hidden, weight, labels, temperature=0.6, mask=mask)

Logits are there a few rows at a time: computed, reduced by the kernels of logprob.py (the two files
go together) and overwritten; backward computes them again and overwrites them with their gradient.
`python kernels/linear_logprob.py` checks this file on this machine and prints what it costs there.
"""

import functools
import warnings

import torch
from torch.autograd.function import once_differentiable

if __package__:
    from . import logprob as K
else:
    import logprob as K

CHUNK = 2**28  # bytes of logits held at once, unless the caller says how many rows


# --- definition --------------------------------------------------------------------------------
# N V b bytes of logits: it holds 3.5 N V b, and computes 3 products of N V H. Here, R = chunk_rows:
# R V b, and 4 products (3 for R of the rows).


def naive_linear_logprobs(
    hidden, weight, labels, *, bias=None, temperature=1.0, mask=None, chunk_rows=None
):
    """`linear_logprobs`, same shapes and dtypes, from all the logits at once, dead rows too."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return K.naive_token_stats(logits, labels, temperature, mask)


# --- chunks of live rows, all in one buffer (R, V) ---------------------------------------------
# Forward takes the first chunk last and leaves it in the buffer, where backward starts: R rows are
# not computed again, and where all fit, none. What else pays for the fourth product: backward knows
# max and log D of a row (stats), and a buffer used again costs no page faults.
# Why 256 MiB: R rows share one reading of weight, and one reading and writing of its gradient. For
# float32 and V = 151,936 that is 441 rows; fewer take longer (220: about 6%). A GPU does more
# operations in the time of a byte: 883 rows of bfloat16 are 220 for each byte of that gradient.


def _logits(hidden, weight, bias, out):
    """Write hidden (R, H) @ weight.T (H, V) + bias (V) into out (R, V)."""
    V = len(weight)
    step = 2048 if out.device.type == "cpu" else V  # rows of weight that a CPU's cache holds
    for start in range(0, V, step):
        rows = slice(start, start + step)
        part = weight[rows].t()
        if bias is None:
            torch.mm(hidden, part, out=out[:, rows])
        else:
            torch.addmm(bias[rows], hidden, part, out=out[:, rows])


@functools.cache
def _adds_in_float32(dtype, device):
    """Whether torch.addmm adds a product of two `dtype` to a float32 sum there, tried once."""
    factor = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except RuntimeError as error:
        reason = str(error)[:100]
        warnings.warn(
            f"torch.addmm with out_dtype=float32 is refused here ({reason}): each chunk's part of "
            f"the weight's gradient is rounded to {dtype} before it is added to the float32 sum"
        )
        return False
    return True


def _accumulate(total, a, b):
    """total += a @ b, where total is float32 and a and b may be of 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and torch.version.cuda and _adds_in_float32(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the product is rounded to 16 bits, the sum over chunks is not
        total += torch.mm(a, b)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temps, check, dtype, chunk_rows):
        live = (labels != -100).nonzero(as_tuple=True)  # on a GPU the host waits for this
        n_live = len(live[0])
        live_labels = labels[live]
        live_temps = temps[live]
        stats = live_temps.new_empty(n_live, 4)
        logp = temps.new_zeros(labels.shape)
        entropy = temps.new_zeros(labels.shape)
        ctx.dtype = dtype
        ctx.chunk_rows = max(1, min(chunk_rows, n_live))
        ctx.buffer = hidden.new_empty(ctx.chunk_rows, len(weight), dtype=dtype)
        cast_weight = weight.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        for start in reversed(range(0, n_live, ctx.chunk_rows)):
            rows = slice(start, start + ctx.chunk_rows)
            place = tuple(index[rows] for index in live)
            logits = ctx.buffer[: n_live - start]
            _logits(hidden[place].to(dtype), cast_weight, cast_bias, logits)
            outputs = K._run_forward(
                logits[None],
                live_labels[None, rows],
                live_temps[None, rows],
                check=check,
                sequences=1,
                inplace=False,
            )
            logp[place] = outputs[0][0]
            entropy[place] = outputs[1][0]
            stats[rows] = outputs[2][0]
        ctx.save_for_backward(hidden, weight, bias, live_labels, live_temps, stats, *live)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):
        saved = ctx.saved_tensors  # raises if one has changed
        hidden, weight, bias, live_labels, live_temps, stats, *live = saved
        n_live = len(live_labels)
        first_is_there = ctx.buffer is not None
        if first_is_there:
            buffer = ctx.buffer
        else:  # a retained graph comes here again
            buffer = hidden.new_empty(ctx.chunk_rows, len(weight), dtype=ctx.dtype)
        ctx.buffer = None
        cast_weight = weight.to(ctx.dtype)
        cast_bias = None if bias is None else bias.to(ctx.dtype)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        g_hidden = torch.zeros_like(hidden) if to_hidden else None
        g_weight = live_temps.new_zeros(weight.shape) if to_weight else None
        g_bias = live_temps.new_zeros(bias.shape) if to_bias else None
        for start in range(0, n_live, ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            place = tuple(index[rows] for index in live)
            h = hidden[place].to(ctx.dtype)
            logits = buffer[: n_live - start]
            if start > 0 or not first_is_there:
                _logits(h, cast_weight, cast_bias, logits)
            K._run_backward(
                logits[None],
                live_labels[None, rows],
                live_temps[None, rows],
                stats[None, rows],
                None if g_logp is None else g_logp[place],
                None if g_entropy is None else g_entropy[place],
                grad=logits[None],
            )
            g_logits = logits  # by now their gradient stands in their place
            with torch.autocast(logits.device.type, enabled=False):
                if to_hidden:
                    g_hidden[place] = torch.mm(g_logits, cast_weight).to(hidden.dtype)
                if to_weight:
                    _accumulate(g_weight, g_logits.t(), h)
                if to_bias:
                    g_bias += g_logits.sum(0, dtype=g_bias.dtype)
        if to_weight:
            g_weight = g_weight.to(weight.dtype)
        if to_bias:
            g_bias = g_bias.to(bias.dtype)
        return g_hidden, g_weight, g_bias, None, None, None, None, None


# --- public function ---------------------------------------------------------------------------


def _logits_dtype(hidden, weight, bias):
    """The dtype of the logits; ValueError where shapes or dtypes do not fit."""
    inputs = [hidden, weight]
    fit = hidden.dim() >= 2 and hidden.shape[-1:] == weight.shape[1:]
    if bias is not None:
        inputs.append(bias)
        fit = fit and bias.shape == weight.shape[:1]
    if not fit:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        raise ValueError(f"hidden (..., H), weight (V, H) and bias (V) do not fit: {shapes}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    dtypes = [tensor.dtype for tensor in inputs]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"hidden, weight and bias must have one dtype outside autocast, not {dtypes}"
        )
    return hidden.dtype


def linear_logprobs(
    hidden, weight, labels, *, bias=None, temperature=1.0, mask=None, chunk_rows=None
):
    """`token_stats_from_logits` of hidden @ weight.T + bias, differentiable, a few rows at a time.

    hidden: (..., H), weight: (V, H), bias: (V) or None, of one dtype out of float32, bfloat16,
      float16, float64. Under torch.autocast they may differ: the product is in its dtype.
    labels: (...) int32 or int64; -100: dead.
    mask: (...) bool, False: dead. Dead hidden states are not read, outputs and gradients are 0.
    temperature: positive float, or tensor broadcast to (...) (to check it a host waits for a GPU).
    chunk_rows: the logits of that many live rows are held at once, also until backward; None: what
      256 MiB hold.
    Returns TokenStats: logprobs and entropy (...), confidence (...[:-1]), in float32 (float64 for
      float64 logits). The gradients of weight and bias are summed up over chunks in that dtype.
    Raises ValueError on shapes, dtypes, values that do not fit. Source of confidence:
      arXiv:2605.07137.
    """
    dtype = _logits_dtype(hidden, weight, bias)
    if chunk_rows is None:
        chunk_rows = CHUNK // (dtype.itemsize * len(weight))
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows must be a positive int, not {chunk_rows}")
    rows = hidden.shape[:-1]
    labels, temps = K._prepare_rows(rows, dtype, labels, temperature, mask)
    check = isinstance(temperature, torch.Tensor)
    logp, entropy = _LinearLogprobs.apply(
        hidden, weight, bias, labels, temps, check, dtype, chunk_rows
    )
    return K.TokenStats(logp, entropy, K._confidence(logp, labels != -100))


# --- self-check --------------------------------------------------------------------------------


def _check(device):
    """Values and gradients against the definition in float64."""
    labels = torch.randint(1003, (4, 16), device=device)
    inputs = []
    for shape in ((4, 16, 64), (1003, 64), (1003,)):
        tensor = torch.randn(*shape, device=device)
        inputs.append(tensor.requires_grad_())
    exact = []
    for tensor in inputs:
        exact.append(tensor.detach().double().requires_grad_())
    hidden, weight, bias = exact
    want = naive_linear_logprobs(hidden, weight, labels, bias=bias, temperature=6.0)
    (want.logprobs + want.entropy).sum().backward()
    hidden, weight, bias = inputs
    found = linear_logprobs(
        hidden, weight, labels, bias=bias, temperature=6.0, chunk_rows=13
    )
    (found.logprobs + found.entropy).sum().backward()
    pairs = list(zip(found, want))
    for a, b in zip(inputs, exact):
        pairs.append((a.grad, b.grad))
    error = 0.0
    for a, b in pairs:
        difference = (a - b).abs().max() / b.abs().max()
        error = max(error, difference.item())
    assert error < 1e-5, error
    print(f"values and gradients are within {error:.0e} of float64, relative to the largest")


def _check_accumulate(device):
    """The float32 sum of 16-bit products that a GPU makes, chunk by chunk as backward does."""
    for dtype in (torch.bfloat16, torch.float16):
        total = torch.zeros(1000, 64, device=device)
        exact = total.double()
        for _ in range(8):
            g_logits = torch.rand(256, 1000, device=device).to(dtype)
            hidden = torch.rand(256, 64, device=device).to(dtype)
            _accumulate(total, g_logits.t(), hidden)
            exact += g_logits.t().double() @ hidden.double()
        error = (total / exact - 1).abs().max().item()
        in_float32 = torch.version.cuda and _adds_in_float32(dtype, total.device)
        how = "added in float32" if in_float32 else f"rounded to {dtype} first"
        limit = 2e-5 if in_float32 else 2 * torch.finfo(dtype).eps
        assert error < limit, (dtype, how, error)
        print(f"sums of {dtype} products, {how}, are within {error:.0e} of float64 (< {limit:.0e})")


# --- benchmark ---------------------------------------------------------------------------------


def _benchmark(N, H, V, device):
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(N, H, dtype=dtype, device=device).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype, device=device).mul_(0.03).requires_grad_()
    labels = torch.randint(V, (N,), device=device)
    print(f"{N} x {H} hidden states, V = {V}, {dtype}, log-probs, forward + backward")

    def naive():
        logits = hidden @ weight.t()
        logq = logits.float().log_softmax(-1)
        return logq.gather(-1, labels[:, None])

    def here():
        return linear_logprobs(hidden, weight, labels).logprobs

    def step(function):
        return torch.autograd.grad(function().sum(), (hidden, weight))

    for function in (naive, here):
        seconds, held = K._measure(lambda: step(function), cuda)
        beyond = held - hidden.nbytes - weight.nbytes
        share = beyond / (N * V * dtype.itemsize)
        print(
            f"  {function.__name__:5} {seconds * 1e3:8.1f} ms, beyond inputs and gradients it "
            f"holds {share:4.0%} of the logits"
        )


def _main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check(device)
    if device == "cuda":
        _check_accumulate(device)
    if K.INTERPRET:
        return
    if device == "cuda":
        _benchmark(N=8192, H=1536, V=151_936, device=device)
    else:
        _benchmark(N=1024, H=896, V=151_936, device=device)


if __name__ == "__main__":
    _main()
