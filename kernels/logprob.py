# Copy:    this file alone; it uses nothing else of the project.
# Needs:   torch >= 2.6; on a GPU (NVIDIA, AMD) triton >= 3.4; without triton or a GPU, torch alone.
# Run on:  torch 2.13.0, triton 3.7.1 and 3.9.0: interpreter, compilers, CPU. Not yet on a GPU.
# Licence: SPDX-License-Identifier: MIT. Copyright the nsr authors.
"""Log-probs, entropy and confidence straight from logits, forward and backward, no softmax held:

    logp, entropy, confidence = token_stats_from_logits(logits, labels, temperature=0.6, mask=mask)

`python kernels/logprob.py` checks this file on this machine and prints what it costs there."""
import collections, itertools, math, os, re, subprocess, tempfile
import torch, torch.utils.benchmark
from torch import Tensor
try:
    import triton
    import triton.language as tl
except ImportError:  # then the torch path serves every device
    triton = _forward_kernel = _backward_kernel = _confidence_kernel = None

INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # kernels on a CPU
LOG2E = math.log2(math.e)
CHUNK = 2**21  # bytes of logits that a thread of the torch path works on: they stay in its cache
TokenStats = collections.namedtuple("TokenStats", "logprobs entropy confidence")

# --- definition --------------------------------------------------------------------------------
# N V b bytes of logits: it reads 7 N V b, writes 5; the kernels read 1, backward read 1, write 1.
def naive_token_stats(logits, labels, temperature=1.0, mask=None):
    """`token_stats_from_logits`, same shapes and dtypes, except that dead rows are read."""
    live = labels != -100 if mask is None else (labels != -100) & mask
    x = logits if logits.dtype == torch.float64 else logits.float()
    t = torch.as_tensor(temperature, dtype=x.dtype, device=x.device)
    logq = (x / t[..., None]).log_softmax(-1)
    logp = logq.gather(-1, labels.long().where(live, 0)[..., None])[..., 0].where(live, 0)
    entropy = -(logq.exp() * logq.clamp(min=-1e30)).sum(-1).where(live, 0)  # 0 log 0 = 0
    n = live.sum(-1)
    mean = logp.detach().sum(-1) / n.clamp(min=1)
    return TokenStats(logp, entropy, mean.exp().where(n > 0, 0))

# --- kernels -----------------------------------------------------------------------------------
# One program a row, cut into vectors of 16 bytes (VEC elements); a tile is 4 vectors for each of
# 256 threads. Each thread has its own running max, D and S: no shuffle or barrier in the loop, one
# more exponential for 4 VEC elements. The label's vector and the ragged ends are the `edge`, done
# apart: so masks are whole vectors (else an odd V breaks wide loads up), and 1 - p of the label is
# a sum of other p, exact however near 1 p is. A column's lane depends on the column alone, not on
# the row's address: same bits wherever a row lies. 2^w = e^u, with w = (x - m) log2(e) / T.
# Why 4 x 256: 40 to 80 registers (gfx942: 104), no spill, 48 KiB of loads in flight an SM where an
# H100 needs about 20. 2 vectors: an eighth more exponentials in fp32. 8: up to 99 registers there.
if triton is not None:
    @triton.jit
    def _skew(ptr, VEC: tl.constexpr):  # elements from the last multiple of 16 bytes to ptr
        return (ptr.to(tl.int64) % 16 * VEC // 16).to(tl.int32)
    @triton.jit
    def _floor(w):  # 2^-2000 is 0 already: keeps -inf * 0 out, lets NaN through
        return tl.maximum(w, -2000.0, propagate_nan=tl.PropagateNan.ALL)
    @triton.jit
    def _load(x, skew, offsets, mask):
        if skew == 0:  # wide; otherwise the same elements into the same lanes, one by one
            tile = tl.load(tl.multiple_of(x - skew, 16) + offsets, mask=mask, other=float("-inf"))
        else:
            tile = tl.load(x + offsets, mask=mask, other=float("-inf"))
        return tile
    @triton.jit
    def _cut(y, head, V, VEC: tl.constexpr):
        n_vec, y_vec = (V - head) // VEC, tl.where(y < head, -1, (y - head) // VEC)
        part, j = tl.arange(0, 4 * VEC) // VEC, tl.arange(0, 4 * VEC) % VEC
        v = tl.where(part == 0, y_vec, n_vec)  # part 0: the label's vector, 1: head, 2: tail
        col = tl.where(part == 1, j, head + v * VEC + j)
        edge = (part == 0) & (v >= 0) & (v < n_vec) | (part == 1) & (j < head)
        edge = edge | (part == 2) & (col < V)
        vec = tl.arange(0, 4)[:, None, None] * 256 + tl.arange(0, 256)[None, :, None]
        return n_vec, y_vec, col, edge, vec, vec * VEC + tl.arange(0, VEC)[None, None, :]
    @triton.jit(do_not_specialize=["logits", "V", "L", "stride_b", "stride_l"])
    def _forward_kernel(logits, labels, temps, logp, entropy, stats, V, L, stride_b, stride_l):
        ACC: tl.constexpr = temps.dtype.element_ty
        VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
        row = tl.program_id(0).to(tl.int64)  # int64: N V passes 2^31
        y = tl.load(labels + row).to(tl.int64)
        if (y < 0) | (y >= V):  # dead, or no such label: the logits are not read
            tl.store(logp + row, tl.where(y == -100, 0.0, float("nan")))
            tl.store(entropy + row, tl.where(y == -100, 0.0, float("nan")))
            return
        x, t = logits + row // L * stride_b + row % L * stride_l, tl.load(temps + row)
        c = 1.4426950408889634 / t
        n_vec, y_vec, col, on_edge, vec, offsets = _cut(y.to(tl.int32), 0, V, VEC)
        edge = tl.load(x + col, mask=on_edge, other=float("-inf")).to(ACC)
        m, d, s = tl.full([256], float("-inf"), ACC), tl.zeros([256], ACC), tl.zeros([256], ACC)
        for start in range(0, n_vec, 1024):
            inside = (start + vec < n_vec) & (start + vec != y_vec)
            tile = _load(x, _skew(x, VEC), start * VEC + offsets, inside).to(ACC)
            m_new = tl.maximum(m, tl.max(tl.max(tile, 2), 0))
            ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing but -inf so far
            shift, w = _floor((m - ref) * c), (tile - ref[None, :, None]) * c
            e = tl.exp2(w)
            s = (s + shift * d) * tl.exp2(shift) + tl.sum(tl.sum(e * _floor(w), 2), 0)  # of w 2^w
            d = d * tl.exp2(shift) + tl.sum(tl.sum(e, 2), 0)  # of 2^w
            m = m_new
        top = tl.maximum(tl.max(m, 0), tl.max(edge, 0))
        ref = tl.where(top == float("-inf"), 0.0, top)
        shift, w, is_y = _floor((m - ref) * c), _floor((edge - ref) * c), on_edge & (col == y)
        e = tl.exp2(w)
        rest = tl.sum(d * tl.exp2(shift), 0) + tl.sum(tl.where(is_y, 0.0, e), 0)
        total = rest + tl.sum(tl.where(is_y, e, 0.0), 0)
        s_all = tl.sum((s + shift * d) * tl.exp2(shift), 0) + tl.sum(e * w, 0)
        mean = s_all / total * 0.6931471805599453
        log_d, most = tl.log(tl.where(total < 1, 1.0, total)), tl.log(V.to(ACC))
        tl.store(logp + row, (tl.sum(tl.where(is_y, edge, 0.0), 0) - top) / t - log_d)
        tl.store(entropy + row, tl.where(log_d - mean > most, most, log_d - mean))
        tl.store(stats + 4 * row, top)
        tl.store(stats + 4 * row + 1, log_d)
        tl.store(stats + 4 * row + 2, rest / total)
        tl.store(stats + 4 * row + 3, mean)
    @triton.jit
    def _slope(x, m, log2_d, c, gl, gh, mean, HAS_GH: tl.constexpr):
        # dx = [g_lp (1[i=y] - p) - g_H p (u - log D + entropy)] / T, with entropy = log D - S/D
        w = (x - m) * c
        if HAS_GH:
            gl = gl - gh * mean + gh * 0.6931471805599453 * _floor(w)
        return -gl * tl.exp2(w - log2_d)
    @triton.jit(do_not_specialize=[0, 6, 7, 8, 9, 10, 11, 12])  # logits, grad and what follows
    def _backward_kernel(logits, labels, temps, stats, g_logp, g_entropy, grad, V, L, stride_b,
                         stride_l, stride_gb, stride_gl):  # a gradient may be None
        ACC: tl.constexpr = temps.dtype.element_ty
        VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
        row = tl.program_id(0).to(tl.int64)
        y = tl.load(labels + row).to(tl.int64)
        live, fill = (y >= 0) & (y < V), tl.where(y == -100, 0.0, float("nan"))
        y, V_read = tl.where(live, y, -1).to(tl.int32), tl.where(live, V, 0)
        x = logits + row // L * stride_b + row % L * stride_l
        dx = grad + row // L * stride_gb + row % L * stride_gl
        head = tl.minimum((VEC - _skew(dx, VEC)) % VEC, V)  # from there on stores are wide
        n_vec, y_vec, col, on_edge, vec, offsets = _cut(y, head, V, VEC)
        t, m, log_d = tl.load(temps + row), tl.load(stats + 4 * row), tl.load(stats + 4 * row + 1)
        c, log2_d = 1.4426950408889634 / t, log_d * 1.4426950408889634
        gl = tl.load(g_logp + row) / t if g_logp is not None else tl.zeros([], ACC)
        gh = tl.load(g_entropy + row) / t if g_entropy is not None else tl.zeros([], ACC)
        mean = tl.load(stats + 4 * row + 3) if g_entropy is not None else tl.zeros([], ACC)
        edge = tl.load(x + col, mask=on_edge & (col < V_read), other=float("-inf")).to(ACC)
        g_edge = tl.where(col == y, 0.0, gl)
        edge = _slope(edge, m, log2_d, c, g_edge, gh, mean, g_entropy is not None)
        edge += tl.where(col == y, gl * tl.load(stats + 4 * row + 2), 0.0)
        tl.store(dx + col, tl.where(live, edge, fill), mask=on_edge)
        x, body = x + head, tl.multiple_of(dx + head, 16)
        for start in range(0, n_vec, 1024):
            inside = (start + vec < n_vec) & (start + vec != y_vec)
            read = inside & (start + vec < V_read)
            tile = _load(x, _skew(x, VEC), start * VEC + offsets, read).to(ACC)
            tile = _slope(tile, m, log2_d, c, gl, gh, mean, g_entropy is not None)
            tl.store(body + start * VEC + offsets, tl.where(live, tile, fill), mask=inside)
    @triton.jit
    def _confidence_kernel(logp, labels, confidence, L):
        row = tl.program_id(0).to(tl.int64)
        total, n = tl.zeros([1024], logp.dtype.element_ty), tl.zeros([1024], logp.dtype.element_ty)
        for start in range(0, L, 1024):
            col = start + tl.arange(0, 1024)
            y = tl.load(labels + row * L + col, mask=col < L, other=-100)
            total += tl.load(logp + row * L + col, mask=y != -100, other=0.0)
            n += tl.where(y != -100, 1.0, 0.0)
        mean, some = tl.sum(total, 0) / tl.maximum(tl.sum(n, 0), 1.0), tl.sum(n, 0) > 0
        tl.store(confidence + row, tl.where(some, tl.exp(mean), 0.0))

# --- the same in torch, for a CPU: chunks of rows that fit its cache, in place -----------------
# A row has the same bits in any batch: torch rounds 2^w otherwise at the end of a thread's share
# (of a call of 2^15 elements or more), and adds up a single row otherwise than two.
def _exp2(w, out):
    n, step = w.numel(), 64 * torch.get_num_threads()
    cut = n // step * step if n >= 512 * step else 0  # equal shares, multiples of 64
    for i in (slice(cut), *(slice(i, i + 2**14) for i in range(cut, n, 2**14))):
        torch.exp2(w.view(-1)[i], out=out.view(-1)[i])
def _row_sums(e):
    return (e if len(e) > 1 else e.repeat(2, 1)).sum(-1, keepdim=True)[: len(e)]
def _chunks(logits, y, T, clamp, tops=None):
    """Yield numbers of live rows in (N,) and (B, L), and their columns m, x_y, T, y, w, 2^w."""
    B, L, V = logits.shape
    rows = ((y >= 0) & (y < V)).nonzero()[:, 0]
    size = max(2, CHUNK * torch.get_num_threads() // (4 * V + 1))
    pads = torch.zeros(2, min(size, len(rows)), V + -V % 64, dtype=T.dtype)
    for i in range(0, len(rows), size):
        r = slice(i, min(i + size, L)) if B == 1 and len(rows) == L else rows[i : i + size]
        at = (0, r) if isinstance(r, slice) else (r // L, r % L)  # a slice is no copy
        x, t, col = logits[at], T[r], y[r]
        m = x.amax(-1, keepdim=True).to(T.dtype) if tops is None else tops[r]
        w, e = pads[:, : len(x), :V]
        torch.sub(x, m, out=w).mul_(LOG2E / t)
        w = w.clamp_(min=-2000.0) if clamp else w  # keeps -inf * 0 out
        _exp2(*pads[:, : len(x)])
        yield r, at, m, x.gather(1, col).to(T.dtype), t, col, w, e
def _forward_torch(logits, labels, temps, logp, entropy, stats, confidence):
    V, y, T = logits.shape[2], labels.view(-1, 1).long(), temps.view(-1, 1)
    logp, entropy, stats = logp.view(-1, 1), entropy.view(-1, 1), stats.view(-1, 4)
    logp.copy_(torch.where((y == -100) | (y >= 0) & (y < V), 0.0, math.nan))
    entropy.copy_(logp)
    for r, _, m, x_y, t, col, w, e in _chunks(logits, y, T, len(confidence)):
        w_y, e_y = w.gather(1, col), e.gather(1, col)
        rest = _row_sums(e.scatter_(1, col, 0.0))  # so that 1 - p of the label is exact
        log_d = torch.log1p(rest + (e_y - 1)).clamp_(min=0.0)
        logp[r] = (x_y - m) / t - log_d
        stats[r, :3] = torch.cat((m, log_d, rest / (rest + e_y)), 1)
        if len(confidence):
            mean = (_row_sums(e.mul_(w)) + w_y * e_y) / (rest + e_y) / LOG2E
            entropy[r], stats[r, 3:] = (log_d - mean).clamp_(max=math.log(V)), mean
    if len(confidence):  # dead log-probs are 0
        pair = torch.stack((logp, (y != -100).to(logp.dtype)))
        total, n = pair.view(2, len(confidence), -1).sum(-1)
        confidence.copy_((total / n.clamp(min=1)).exp().where(n > 0, 0))
def _backward_torch(logits, labels, temps, stats, g_logp, g_entropy, grad):
    L, stats, y, T = len(labels.T), stats.view(-1, 4), labels.view(-1, 1).long(), temps.view(-1, 1)
    i = ((y < 0) | (y >= logits.shape[2])).nonzero()[:, 0]
    fill = torch.where(y[i] == -100, 0.0, math.nan).to(grad.dtype)
    grad[i // L, i % L] = fill.expand(-1, logits.shape[2])
    for r, at, _, _, t, col, w, e in _chunks(logits, y, T, g_entropy is not None, stats[:, :1]):
        _, log_d, rest, mean = stats[r].split(1, 1)
        gl, d = 0 * t if g_logp is None else g_logp.view(-1, 1)[r] / t, log_d.neg().exp()
        dx, at_y, slope = grad[at], gl * rest, -gl * d
        if g_entropy is not None:
            gh, u_y = g_entropy.view(-1, 1)[r] / t, w.gather(1, col) / LOG2E
            at_y = at_y - gh * d * e.gather(1, col) * (u_y - mean)
            slope = w.mul_(-gh * d / LOG2E).add_((gh * mean - gl) * d)
        torch.mul(e, slope, out=dx).scatter_(1, col, at_y.to(dx.dtype))
        if not isinstance(r, slice):  # then dx is no view
            grad[at] = dx

# --- operators ---------------------------------------------------------------------------------
# logits (B, L, V), labels and temps (B, L), stats (B, L, 4): m, log D, 1 - p of the label, S/D.
def _launched(kernel, programs, tensor, *args):
    if triton is None or not (tensor.is_cuda or INTERPRET):
        return False
    with torch.cuda.device_of(tensor):  # 256 threads a program
        kernel[(programs,)](tensor, *args, num_warps=4 if torch.version.hip else 8)
    return True
def _run_forward(logits: Tensor, labels: Tensor, temps: Tensor, check: bool, sequences: int,
                 inplace: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if check and not ((temps > 0) & (temps < math.inf)).all():
        raise ValueError("every temperature must be positive and finite")
    out = _fake_forward(logits, labels, temps, check, sequences, inplace)
    logp, confidence, N = out[0], out[3], labels.numel()
    if _launched(_forward_kernel, N, logits, labels, temps, *out[:3], *logits.shape[:0:-1],
                 *logits.stride()[:2]):
        _launched(_confidence_kernel, sequences, logp, labels, confidence, N // max(sequences, 1))
    else:
        _forward_torch(logits, labels, temps, *out)
    return out
_forward = torch.library.custom_op("nsr::logprob_forward", _run_forward, mutates_args=())
@_forward.register_fake
def _fake_forward(logits, labels, temps, check, sequences, inplace):
    logp, stats = torch.empty_like(temps), temps.new_empty(*temps.shape, 4)
    return logp, torch.empty_like(temps), stats, temps.new_empty(sequences)  # 0: log-probs alone
def _run_backward(logits: Tensor, labels: Tensor, temps: Tensor, stats: Tensor,
                  g_logp: Tensor | None, g_entropy: Tensor | None, grad: Tensor) -> None:
    g = [None if i is None else i.contiguous() for i in (g_logp, g_entropy)]
    if not _launched(_backward_kernel, labels.numel(), logits, labels, temps, stats, *g, grad,
                     *logits.shape[:0:-1], *logits.stride()[:2], *grad.stride()[:2]):
        _backward_torch(logits, labels, temps, stats, *g, grad)
_backward = torch.library.custom_op("nsr::logprob_backward", _run_backward, mutates_args=("grad",))
def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[2])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.inplace = inputs[5]
def _differentiate(ctx, g_logp, g_entropy, *_):
    if g_logp is None and g_entropy is None:
        return (None,) * 6
    logits, *saved = ctx.saved_tensors  # raises if the logits have changed
    grad = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
    _backward(logits, *saved, g_logp, g_entropy, grad)  # mutates_args: increments grad's version
    return grad, None, None, None, None, None
_forward.register_autograd(_differentiate, setup_context=_setup_context)

# --- public functions --------------------------------------------------------------------------
def _rows(shape, dtype, labels, temperature, mask):
    """Labels, -100 where dead, and temperatures of rows (...) of `dtype`; ValueError if unfit."""
    if shape != labels.shape or shape != (labels if mask is None else mask).shape:
        raise ValueError(f"labels and mask must have the shape {tuple(shape)}")
    kinds = dtype, labels.dtype, torch.bool if mask is None else mask.dtype
    if not dtype.is_floating_point or kinds[1:] not in (
            (torch.int32, torch.bool), (torch.int64, torch.bool)):
        raise ValueError(f"need float logits, int32/int64 labels, a bool mask, not {kinds}")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    y = labels if mask is None else labels.where(mask, -100)
    if isinstance(temperature, Tensor):
        return y, temperature.detach().to(labels.device, acc).expand(shape)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    return y, torch.full(shape, temperature, dtype=acc, device=labels.device)
def _apply(logits, labels, temperature, mask, inplace, sequences):
    """The forward's outputs on (B, L, V) logits, with B = 1 where all rows are one stride apart."""
    y, temps = _rows(logits.shape[:-1], logits.dtype, labels, temperature, mask)
    x = logits if logits.stride(-1) == 1 else logits.contiguous()
    if x.dim() != 3 or x.stride(0) == x.shape[1] * x.stride(1):
        x = x.reshape(1, labels.numel(), x.shape[-1])
    B, L, V = x.shape
    y, temps = (i.reshape(B, L).contiguous() for i in (y, temps))
    inplace = inplace and x.stride(1) >= V and (B == 1 or x.stride(0) >= V)  # no row overlaps
    return _forward(x, y, temps, isinstance(temperature, Tensor), sequences, inplace)

def logprobs_from_logits(logits, labels, *, temperature=1.0, mask=None, inplace_backward=False):
    """Log-probability of each label under softmax(logits / temperature), differentiable.

    logits: (..., V) float32, bfloat16, float16, float64. labels: (...) int32 or int64; -100: dead.
    temperature: positive float, or tensor broadcast to (...) (to check it the host waits for the
      GPU). mask: (...) bool, False: dead. Dead logits are not read, outputs and gradients are 0.
    inplace_backward: write the gradient over the logits (unless copied or overlapping); autograd
      raises if they are needed again.
    Returns (...) float32 (float64 for float64 logits), in nats; NaN where a label is out of range.
    Raises ValueError on shapes, dtypes, temperatures that do not fit. Source: arXiv:1805.02867."""
    return _apply(logits, labels, temperature, mask, inplace_backward, 0)[0].view(labels.shape)

def token_stats_from_logits(logits, labels, *, temperature=1.0, mask=None, inplace_backward=False):
    """`logprobs_from_logits` with entropy and confidence, still in one read of the logits.

    Arguments, dtypes, errors as there. Returns TokenStats(logprobs, entropy, confidence):
    logprobs and entropy (of softmax(logits / temperature)): (...) in nats, differentiable.
    confidence: (...[:-1]) exp(mean of live logprobs along the last axis), 0 where nothing is live;
      no gradient. Source: arXiv:2605.07137."""
    s, rows = labels.shape, labels.shape[:-1].numel()
    logp, entropy, _, conf = _apply(logits, labels, temperature, mask, inplace_backward, rows)
    return TokenStats(logp.view(s), entropy.view(s), conf.view(s[:-1]))

# --- self-check and benchmark ------------------------------------------------------------------
def _measure(f, cuda):  # mean seconds of 3 calls, most bytes held beyond those before
    def held(key, line):  # from Linux, if not from torch.cuda
        text = "" if cuda else open("/proc/self/status").read()
        return torch.cuda.memory_stats()["allocated_bytes.all." + key] if cuda else 1024 * int(
            re.search(line + r":\s*(\d+)", text)[1])
    f()
    torch.cuda.reset_peak_memory_stats() if cuda else open("/proc/self/clear_refs", "w").write("5")
    before, n = held("current", "VmRSS"), torch.get_num_threads()
    seconds = torch.utils.benchmark.Timer("f()", globals=dict(f=f), num_threads=n).timeit(3).mean
    return seconds, held("peak", "VmHWM") - before
def _benchmark(V, cuda):
    x = torch.randn(2 ** (29 if cuda else 25) // V, V, device="cuda" if cuda else "cpu")
    x, y = x.bfloat16() if cuda else x, torch.randint(V, x.shape[:1], device=x.device)
    size, z = x.numel() * x.element_size(), x.clone()
    copy = 2 * size / _measure(lambda: z.copy_(x), cuda)[0]
    print(f"{tuple(x.shape)} {x.dtype}, forward + backward; a copy runs at {copy / 1e9:.1f} GB/s")
    naive = lambda x, y: x.float().log_softmax(-1).gather(-1, y[:, None])
    inplace = lambda x, y: logprobs_from_logits(x, y, inplace_backward=True)
    for name, f in zip(("naive", "compiled", "here", "in place"),
                       (naive, torch.compile(naive), logprobs_from_logits, inplace)):
        s, held = _measure(lambda: f(x.detach().requires_grad_(), y).sum().backward(), cuda)
        print(f"  {name:8} {s * 1e3:7.1f} ms, {3 * size / s / copy:4.0%} of the copy's bandwidth, "
              f"peak memory {held / size:4.0%} of the logits")
def _machine_code(kernel, ty, arch):  # what it compiles to; needs no GPU
    amd, x = arch == "gfx942", "*" + ty
    kind = dict(labels="*i64", V="i32", L="i32", logits=x, grad=x)
    sig = {n: kind.get(n, "i64" if "stride" in n else "*fp32") for n in kernel.arg_names}
    target = triton.backends.compiler.GPUTarget("hip" if amd else "cuda", arch, 64 if amd else 32)
    source, options = triton.compiler.ASTSource(kernel, sig), dict(num_warps=4 if amd else 8)
    asm = triton.compile(source, target=target, options=options).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as h:
        h.write(asm.get("cubin", b"")), h.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        text = asm["amdgcn"] if amd else subprocess.check_output(
            [tool, "-sass", "-res-usage", h.name], text=True, stderr=subprocess.DEVNULL)
    at, loops, lines = {}, [], text.splitlines()
    for i, line in enumerate(lines):  # a branch backwards closes a loop
        at.update({n: i for n in re.findall(r"^\s*(?:/\*0*|\.)(LBB\w+|[0-9a-f]+)(?:\*/|:)", line)})
        for n in re.findall(r"(?:BRA[^;]* 0x|s_c?branch\w* \.)(\w+)", line):
            loops.append(len(re.findall("MUFU.EX2|v_exp_f32", "".join(lines[at.get(n, i) : i]))))
    regs = re.search(r"(?:REG|\.vgpr_count): *(\d+)", text)[1]
    spills, loads, stores = (len(re.findall(i, text)) for i in (
        "LDL|STL|scratch_[ls]", r"LDG.*\.128|l_load_dwordx4", r"STG.*\.128|r_store_dwordx4"))
    exps = min(filter(None, loops)) / (16 if ty == "fp32" else 32)
    return (f"{regs} registers, {spills} spills, {loads} wide loads, {stores} wide stores, "
            f"{exps:.2f} exponentials an element")

if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    x = torch.randn(4, 16, 1003, device="cuda" if cuda else "cpu").mul_(4).requires_grad_()
    z, y = x.detach().double().requires_grad_(), torch.randint(1003, (4, 16), device=x.device)
    want, found = naive_token_stats(z, y, 0.6), token_stats_from_logits(x, y, temperature=0.6)
    (want[0] + want[1]).sum().backward(), (found[0] + found[1]).sum().backward()
    error = max((a - b).abs().max() for a, b in zip((*want, z.grad), (*found, x.grad))).item()
    assert error < 3e-5, error
    print(f"values and gradients are within {error:.0e} of float64")
    for job in () if INTERPRET or not triton else itertools.product(
            (_forward_kernel, _backward_kernel), ("fp32", "bf16", "fp16"), (80, 90, 100, "gfx942")):
        print(job[0].__name__, *job[1:], _machine_code(*job))
    for V in () if INTERPRET else (32_000, 151_936):
        _benchmark(V, cuda)
