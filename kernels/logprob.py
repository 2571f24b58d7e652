# Copy:    this file alone; it uses nothing else of the project.
# Needs:   torch >= 2.6; on a GPU (NVIDIA, AMD) triton >= 3.4; without triton or a GPU, torch alone.
# Run on:  torch 2.13.0, triton 3.7.1 and 3.9.0: interpreter, compilers, CPU. Not yet on a GPU.
# Licence: SPDX-License-Identifier: MIT. Copyright the nsr authors.
"""Log-probs, entropy and confidence straight from logits, forward and backward, no softmax held:

    logp, entropy, confidence = token_stats_from_logits(logits, labels, temperature=0.6, mask=mask)

`python kernels/logprob.py` checks this file on this machine and prints what it costs there.
"""

import math
import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import torch
import torch.utils.benchmark
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # then the torch path serves every device
    triton = None

INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # kernels on a CPU
NUM_WARPS = 4 if torch.version.hip else 8  # 256 threads a program
CHUNK = 2**21  # bytes of logits that a thread of the torch path works on: they stay in its cache
LOG2E = math.log2(math.e)


class TokenStats(NamedTuple):
    """What `token_stats_from_logits` returns: its docstring says of which shapes and units."""

    logprobs: Tensor
    entropy: Tensor
    confidence: Tensor


# --- definition --------------------------------------------------------------------------------
# N V b bytes of logits: it reads 7 N V b, writes 5; the kernels read 1, backward read 1, write 1.


def naive_token_stats(logits, labels, temperature=1.0, mask=None):
    """`token_stats_from_logits`, same shapes and dtypes, except that dead rows are read."""
    live = labels != -100
    if mask is not None:
        live = live & mask
    if logits.dtype != torch.float64:
        logits = logits.float()
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    logq = (logits / temperature[..., None]).log_softmax(-1)
    index = labels.long().where(live, 0)[..., None]
    logp = logq.gather(-1, index)[..., 0]
    logp = logp.where(live, 0)
    terms = logq.exp() * logq.clamp(min=-1e30)  # 0 log 0 = 0
    entropy = -terms.sum(-1).where(live, 0)
    return TokenStats(logp, entropy, _confidence(logp, live))


def _confidence(logp, live):
    """exp(mean of live log-probs along the last axis), 0 where none is live; dead ones are 0."""
    n_live = live.sum(-1)
    total = logp.detach().sum(-1)
    mean = total / n_live.clamp(min=1)
    return mean.exp().where(n_live > 0, 0)


# --- kernels -----------------------------------------------------------------------------------
# One program a row, cut into vectors of 16 bytes (VEC elements); a tile is 4 vectors for each of
# 256 threads. Each thread has its own running max, D and S: no shuffle or barrier in the loop, one
# more exponential for 4 VEC elements. The label's vector and the ragged ends are the `edge`, done
# apart: so masks are whole vectors (else an odd V breaks wide loads up), and 1 - p of the label is
# a sum of other p, exact however near 1 p is. A column's lane depends on the column alone, not on
# the row's address: same bits wherever a row lies. 2^w = e^u, with w = (x - max) log2(e) / T;
# D is the sum of 2^w, S of w 2^w.
# Why 4 x 256: 40 to 80 registers (gfx942: 104), no spill, 48 KiB of loads in flight an SM where an
# H100 needs about 20. 2 vectors: an eighth more exponentials in fp32. 8: up to 99 registers there.

if triton is None:
    _forward_kernel = _backward_kernel = _confidence_kernel = None
else:

    @triton.jit
    def _skew(ptr, VEC: tl.constexpr):
        """Elements from the last multiple of 16 bytes to ptr."""
        skew = ptr.to(tl.int64) % 16 * VEC // 16
        return skew.to(tl.int32)

    @triton.jit
    def _floor(w):
        """2^-2000 is 0 already: keeps -inf * 0 out, lets NaN through."""
        return tl.maximum(w, -2000.0, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _row_of(ptr, row, L, stride_b, stride_l):
        sequence = row // L
        position = row % L
        return ptr + sequence * stride_b + position * stride_l

    @triton.jit
    def _edge(label, head, V, VEC: tl.constexpr):
        """Number of whole vectors, which has the label, the edge's columns, which of these exist.

        head: columns before the first whole vector. The last two: (4 VEC).
        """
        n_vec = (V - head) // VEC
        label_vec = tl.where(label < head, -1, (label - head) // VEC)
        part = tl.arange(0, 4 * VEC) // VEC  # 0: the label's vector, 1: head, 2: tail
        lane = tl.arange(0, 4 * VEC) % VEC
        vec = tl.where(part == 0, label_vec, n_vec)
        columns = tl.where(part == 1, lane, head + vec * VEC + lane)
        in_label_vec = (part == 0) & (vec >= 0) & (vec < n_vec)
        in_head = (part == 1) & (lane < head)
        in_tail = (part == 2) & (columns < V)
        return n_vec, label_vec, columns, in_label_vec | in_head | in_tail

    @triton.jit
    def _tile_offsets(VEC: tl.constexpr):
        """Offsets of the vectors (4, 256, 1) and of the elements (4, 256, VEC) of a tile."""
        fourth = tl.arange(0, 4)[:, None, None]
        thread = tl.arange(0, 256)[None, :, None]
        lane = tl.arange(0, VEC)[None, None, :]
        vecs = fourth * 256 + thread
        return vecs, vecs * VEC + lane

    @triton.jit
    def _load_tile(x, skew, offsets, mask):
        if skew == 0:  # wide; otherwise the same elements into the same lanes, one by one
            aligned = tl.multiple_of(x - skew, 16)
            tile = tl.load(aligned + offsets, mask=mask, other=float("-inf"))
        else:
            tile = tl.load(x + offsets, mask=mask, other=float("-inf"))
        return tile

    @triton.jit
    def _sum_tile(tile):
        return tl.sum(tl.sum(tile, 2), 0)

    @triton.jit
    def _reference(top):
        """What is subtracted: the maximum, unless there is nothing but -inf so far."""
        return tl.where(top == float("-inf"), 0.0, top)

    @triton.jit
    def _add_tile(tile, lane_max, lane_d, lane_s, scale):
        """The running maximum, D and S of each thread (256) with a tile added."""
        tile_max = tl.max(tl.max(tile, 2), 0)
        new_max = tl.maximum(lane_max, tile_max)
        ref = _reference(new_max)
        shift = _floor((lane_max - ref) * scale)
        w = (tile - ref[None, :, None]) * scale
        e = tl.exp2(w)
        new_s = (lane_s + shift * lane_d) * tl.exp2(shift)
        new_s += _sum_tile(e * _floor(w))
        new_d = lane_d * tl.exp2(shift)
        new_d += _sum_tile(e)
        return new_max, new_d, new_s

    @triton.jit
    def _add_lanes(edge, is_label, lane_max, lane_d, lane_s, scale):
        """Maximum, D without the label, D and S of the row, from its edge and its threads."""
        top = tl.maximum(tl.max(lane_max, 0), tl.max(edge, 0))
        ref = _reference(top)
        shift = _floor((lane_max - ref) * scale)
        w = _floor((edge - ref) * scale)
        e = tl.exp2(w)
        others = tl.sum(lane_d * tl.exp2(shift), 0)
        others += tl.sum(tl.where(is_label, 0.0, e), 0)
        total = others + tl.sum(tl.where(is_label, e, 0.0), 0)
        lane_s = (lane_s + shift * lane_d) * tl.exp2(shift)
        total_s = tl.sum(lane_s, 0) + tl.sum(e * w, 0)
        return top, others, total, total_s

    @triton.jit(do_not_specialize=["logits", "V", "L", "stride_b", "stride_l"])
    def _forward_kernel(
        # pointers, inputs
        logits,
        labels,
        temps,
        # pointers, outputs
        logp,
        entropy,
        stats,
        # shapes
        V,
        L,
        # strides of logits
        stride_b,
        stride_l,
    ):
        LOG2E: tl.constexpr = 1.4426950408889634
        LN2: tl.constexpr = 0.6931471805599453
        ACC: tl.constexpr = temps.dtype.element_ty
        VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
        row = tl.program_id(0).to(tl.int64)  # int64: N V passes 2^31
        label = tl.load(labels + row).to(tl.int64)
        if (label < 0) | (label >= V):  # dead, or no such label: the logits are not read
            fill = tl.where(label == -100, 0.0, float("nan"))
            tl.store(logp + row, fill)
            tl.store(entropy + row, fill)
            return
        x = _row_of(logits, row, L, stride_b, stride_l)
        temp = tl.load(temps + row)
        scale = LOG2E / temp
        n_vec, label_vec, columns, on_edge = _edge(label.to(tl.int32), 0, V, VEC)
        vecs, offsets = _tile_offsets(VEC)
        edge = tl.load(x + columns, mask=on_edge, other=float("-inf"))
        edge = edge.to(ACC)
        lane_max = tl.full([256], float("-inf"), ACC)
        lane_d = tl.zeros([256], ACC)
        lane_s = tl.zeros([256], ACC)
        for start in range(0, n_vec, 1024):
            inside = (start + vecs < n_vec) & (start + vecs != label_vec)
            tile = _load_tile(x, _skew(x, VEC), start * VEC + offsets, inside)
            tile = tile.to(ACC)
            lane_max, lane_d, lane_s = _add_tile(tile, lane_max, lane_d, lane_s, scale)
        is_label = on_edge & (columns == label)
        top, others, total, total_s = _add_lanes(edge, is_label, lane_max, lane_d, lane_s, scale)
        mean_u = total_s / total * LN2
        log_d = tl.log(tl.where(total < 1, 1.0, total))
        most = tl.log(V.to(ACC))  # the entropy cannot be more
        logit = tl.sum(tl.where(is_label, edge, 0.0), 0)
        tl.store(logp + row, (logit - top) / temp - log_d)
        h = log_d - mean_u
        tl.store(entropy + row, tl.where(h > most, most, h))
        tl.store(stats + 4 * row, top)
        tl.store(stats + 4 * row + 1, log_d)
        tl.store(stats + 4 * row + 2, others / total)
        tl.store(stats + 4 * row + 3, mean_u)

    @triton.jit
    def _slope(x, top, log2_d, scale, g_logp, g_entropy, mean_u, HAS_ENTROPY: tl.constexpr):
        """The gradient at logits x that are not the label's; the g are over T already.

        dx = [g_lp (1[i=y] - p) - g_H p (u - log D + entropy)] / T, with entropy = log D - S/D
        """
        LN2: tl.constexpr = 0.6931471805599453
        w = (x - top) * scale
        if HAS_ENTROPY:
            g_logp = g_logp - g_entropy * mean_u + g_entropy * LN2 * _floor(w)
        return -g_logp * tl.exp2(w - log2_d)

    @triton.jit
    def _row_gradients(g_logp, g_entropy, stats, row, temp):
        """The gradients of a row's log-prob and entropy over T, 0 where None, and S/D."""
        gl = tl.zeros([], temp.dtype)
        gh = tl.zeros([], temp.dtype)
        mean_u = tl.zeros([], temp.dtype)
        if g_logp is not None:
            gl = tl.load(g_logp + row) / temp
        if g_entropy is not None:
            gh = tl.load(g_entropy + row) / temp
            mean_u = tl.load(stats + 4 * row + 3)
        return gl, gh, mean_u

    @triton.jit(
        do_not_specialize=[
            "logits",
            "grad",
            "V",
            "L",
            "stride_b",
            "stride_l",
            "stride_gb",
            "stride_gl",
        ]
    )
    def _backward_kernel(
        # pointers, inputs
        logits,
        labels,
        temps,
        stats,
        g_logp,  # or None
        g_entropy,  # or None
        # pointers, output: may be logits
        grad,
        # shapes
        V,
        L,
        # strides of logits
        stride_b,
        stride_l,
        # strides of grad
        stride_gb,
        stride_gl,
    ):
        LOG2E: tl.constexpr = 1.4426950408889634
        ACC: tl.constexpr = temps.dtype.element_ty
        VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
        HAS_ENTROPY: tl.constexpr = g_entropy is not None
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row).to(tl.int64)
        live = (label >= 0) & (label < V)
        fill = tl.where(label == -100, 0.0, float("nan"))
        label = tl.where(live, label, -1).to(tl.int32)
        V_read = tl.where(live, V, 0)
        x = _row_of(logits, row, L, stride_b, stride_l)
        dx = _row_of(grad, row, L, stride_gb, stride_gl)
        head = tl.minimum((VEC - _skew(dx, VEC)) % VEC, V)  # from there on stores are wide
        n_vec, label_vec, columns, on_edge = _edge(label, head, V, VEC)
        vecs, offsets = _tile_offsets(VEC)
        temp = tl.load(temps + row)
        top = tl.load(stats + 4 * row)
        log_d = tl.load(stats + 4 * row + 1)
        scale = LOG2E / temp
        log2_d = log_d * LOG2E
        gl, gh, mean_u = _row_gradients(g_logp, g_entropy, stats, row, temp)
        read_edge = on_edge & (columns < V_read)
        edge = tl.load(x + columns, mask=read_edge, other=float("-inf"))
        edge = edge.to(ACC)
        gl_others = tl.where(columns == label, 0.0, gl)
        edge = _slope(edge, top, log2_d, scale, gl_others, gh, mean_u, HAS_ENTROPY)
        p_others = tl.load(stats + 4 * row + 2)
        edge += tl.where(columns == label, gl * p_others, 0.0)
        tl.store(dx + columns, tl.where(live, edge, fill), mask=on_edge)
        x = x + head
        body = tl.multiple_of(dx + head, 16)
        for start in range(0, n_vec, 1024):
            inside = (start + vecs < n_vec) & (start + vecs != label_vec)
            read = inside & (start + vecs < V_read)
            tile = _load_tile(x, _skew(x, VEC), start * VEC + offsets, read)
            tile = tile.to(ACC)
            tile = _slope(tile, top, log2_d, scale, gl, gh, mean_u, HAS_ENTROPY)
            tile = tl.where(live, tile, fill)
            tl.store(body + start * VEC + offsets, tile, mask=inside)

    @triton.jit
    def _confidence_kernel(
        # pointers
        logp,
        labels,
        confidence,
        # shape
        L,
    ):
        ACC: tl.constexpr = logp.dtype.element_ty
        sequence = tl.program_id(0).to(tl.int64)
        lane_total = tl.zeros([1024], ACC)
        lane_n = tl.zeros([1024], ACC)
        for start in range(0, L, 1024):
            position = start + tl.arange(0, 1024)
            label = tl.load(labels + sequence * L + position, mask=position < L, other=-100)
            lane_total += tl.load(logp + sequence * L + position, mask=label != -100, other=0.0)
            lane_n += tl.where(label != -100, 1.0, 0.0)
        n_live = tl.sum(lane_n, 0)
        mean = tl.sum(lane_total, 0) / tl.maximum(n_live, 1.0)
        value = tl.where(n_live > 0, tl.exp(mean), 0.0)
        tl.store(confidence + sequence, value)


# --- the same in torch, for a CPU: chunks of rows that fit its cache, in place -----------------
# A row has the same bits in any batch: torch rounds 2^w otherwise at the end of a thread's share
# (of a call of 2^15 elements or more), and adds up a single row otherwise than two.


class _Chunk(NamedTuple):
    rows: Tensor | slice  # their numbers in (B L), all of live rows
    place: tuple  # the same as an index into (B, L)
    labels: Tensor  # (rows, 1), and so the next three
    temps: Tensor
    top: Tensor  # the largest logit
    logit: Tensor  # of the label
    w: Tensor  # (rows, V), (logits - top) log2(e) / temps
    e: Tensor  # (rows, V), 2^w


def _exp2(w, out):
    """Write 2^w into out, both contiguous: equal shares, multiples of 64, then 2^14 at a time."""
    w = w.view(-1)
    out = out.view(-1)
    n = w.numel()
    step = 64 * torch.get_num_threads()
    cut = n // step * step if n >= 512 * step else 0
    torch.exp2(w[:cut], out=out[:cut])
    for start in range(cut, n, 2**14):
        part = slice(start, start + 2**14)
        torch.exp2(w[part], out=out[part])


def _row_sums(e):
    if len(e) > 1:
        return e.sum(-1, keepdim=True)
    return e.repeat(2, 1).sum(-1, keepdim=True)[:1]


def _in_range(labels, V):
    return (labels >= 0) & (labels < V)


def _chunks(logits, labels, temps, with_entropy, tops=None):
    """Yield a _Chunk for all live rows of logits (B, L, V); labels, temps, tops: (B L, 1)."""
    B, L, V = logits.shape
    live = _in_range(labels, V).nonzero()[:, 0]
    size = max(2, CHUNK * torch.get_num_threads() // (4 * V + 1))
    padded = V + -V % 64  # columns
    pads = temps.new_zeros(2, min(size, len(live)), padded)
    for start in range(0, len(live), size):
        rows = live[start : start + size]
        place = (rows // L, rows % L)
        if B == 1 and len(live) == L:  # a slice is no copy
            rows = slice(start, min(start + size, L))
            place = (0, rows)
        x = logits[place]
        row_labels = labels[rows]
        row_temps = temps[rows]
        if tops is None:
            top = x.amax(-1, keepdim=True).to(temps.dtype)
        else:
            top = tops[rows]
        w_pad, e_pad = pads[:, : len(x)]
        w = w_pad[:, :V]
        torch.sub(x, top, out=w).mul_(LOG2E / row_temps)
        if with_entropy:
            w.clamp_(min=-2000.0)  # keeps -inf * 0 out
        _exp2(w_pad, e_pad)
        logit = x.gather(1, row_labels).to(temps.dtype)
        yield _Chunk(
            rows=rows,
            place=place,
            labels=row_labels,
            temps=row_temps,
            top=top,
            logit=logit,
            w=w,
            e=e_pad[:, :V],
        )


def _forward_torch(logits, labels, temps, logp, entropy, stats, confidence):
    V = logits.shape[2]
    with_entropy = len(confidence) > 0
    labels = labels.view(-1, 1).long()
    temps = temps.view(-1, 1)
    logp = logp.view(-1, 1)
    entropy = entropy.view(-1, 1)
    stats = stats.view(-1, 4)
    valid = (labels == -100) | _in_range(labels, V)
    logp.copy_(torch.where(valid, 0.0, math.nan))
    entropy.copy_(logp)
    for chunk in _chunks(logits, labels, temps, with_entropy):
        w_label = chunk.w.gather(1, chunk.labels)
        e_label = chunk.e.gather(1, chunk.labels)
        chunk.e.scatter_(1, chunk.labels, 0.0)  # so that 1 - p of the label is exact
        others = _row_sums(chunk.e)
        total = others + e_label
        log_d = torch.log1p(others + (e_label - 1)).clamp_(min=0.0)
        u_label = (chunk.logit - chunk.top) / chunk.temps
        logp[chunk.rows] = u_label - log_d
        row_stats = torch.cat((chunk.top, log_d, others / total), 1)
        stats[chunk.rows, :3] = row_stats
        if with_entropy:
            others_s = _row_sums(chunk.e.mul_(chunk.w))
            mean_w = (others_s + w_label * e_label) / total
            mean_u = mean_w / LOG2E
            row_entropy = log_d - mean_u
            entropy[chunk.rows] = row_entropy.clamp_(max=math.log(V))
            stats[chunk.rows, 3:] = mean_u
    if with_entropy:  # dead log-probs are 0
        is_live = (labels != -100).to(logp.dtype)
        pair = torch.stack((logp, is_live))
        total, n_live = pair.view(2, len(confidence), -1).sum(-1)
        mean = total / n_live.clamp(min=1)
        confidence.copy_(mean.exp().where(n_live > 0, 0))


def _backward_torch(logits, labels, temps, stats, g_logp, g_entropy, grad):
    B, L, V = logits.shape
    stats = stats.view(-1, 4)
    labels = labels.view(-1, 1).long()
    temps = temps.view(-1, 1)
    unread = (~_in_range(labels, V)).nonzero()[:, 0]
    fill = torch.where(labels[unread] == -100, 0.0, math.nan)
    fill = fill.to(grad.dtype)
    grad[unread // L, unread % L] = fill.expand(-1, V)
    with_entropy = g_entropy is not None
    tops = stats[:, :1]
    for chunk in _chunks(logits, labels, temps, with_entropy, tops):
        _, log_d, p_others, mean_u = stats[chunk.rows].split(1, 1)
        inverse_d = log_d.neg().exp()
        if g_logp is None:
            gl = torch.zeros_like(chunk.temps)
        else:
            gl = g_logp.view(-1, 1)[chunk.rows] / chunk.temps
        at_label = gl * p_others
        if not with_entropy:
            slope = -gl * inverse_d
        else:
            gh = g_entropy.view(-1, 1)[chunk.rows] / chunk.temps
            u_label = chunk.w.gather(1, chunk.labels) / LOG2E
            e_label = chunk.e.gather(1, chunk.labels)
            p_label = gh * inverse_d * e_label
            at_label = at_label - p_label * (u_label - mean_u)
            slope = chunk.w.mul_(-gh * inverse_d / LOG2E)
            slope.add_((gh * mean_u - gl) * inverse_d)
        dx = grad[chunk.place]
        torch.mul(chunk.e, slope, out=dx)
        dx.scatter_(1, chunk.labels, at_label.to(dx.dtype))
        if not isinstance(chunk.rows, slice):  # then dx is no view
            grad[chunk.place] = dx


# --- operators ---------------------------------------------------------------------------------
# logits (B, L, V), labels and temps (B, L), stats (B, L, 4): max, log D, 1 - p of the label, S/D.


def _use_kernels(logits):
    return triton is not None and (logits.is_cuda or INTERPRET)


def _run_forward(
    logits: Tensor,
    labels: Tensor,
    temps: Tensor,
    check: bool,
    sequences: int,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if check:
        fit = (temps > 0) & (temps < math.inf)
        if not fit.all():
            raise ValueError("every temperature must be positive and finite")
    outputs = _fake_forward(logits, labels, temps, check, sequences, inplace)
    if not _use_kernels(logits):
        _forward_torch(logits, labels, temps, *outputs)
        return outputs
    logp, entropy, stats, confidence = outputs
    B, L, V = logits.shape
    stride_b, stride_l, _ = logits.stride()
    with torch.cuda.device_of(logits):
        _forward_kernel[(B * L,)](
            logits,
            labels,
            temps,
            logp,
            entropy,
            stats,
            V,
            L,
            stride_b,
            stride_l,
            num_warps=NUM_WARPS,
        )
        if sequences > 0:
            length = B * L // sequences
            _confidence_kernel[(sequences,)](
                logp, labels, confidence, length, num_warps=NUM_WARPS
            )
    return outputs


_forward = torch.library.custom_op("nsr::logprob_forward", _run_forward, mutates_args=())


@_forward.register_fake
def _fake_forward(logits, labels, temps, check, sequences, inplace):
    logp = torch.empty_like(temps)
    entropy = torch.empty_like(temps)
    stats = temps.new_empty(*temps.shape, 4)
    confidence = temps.new_empty(sequences)  # 0: log-probs alone
    return logp, entropy, stats, confidence


def _run_backward(
    logits: Tensor,
    labels: Tensor,
    temps: Tensor,
    stats: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    grad: Tensor,
) -> None:
    if g_logp is not None:
        g_logp = g_logp.contiguous()
    if g_entropy is not None:
        g_entropy = g_entropy.contiguous()
    if not _use_kernels(logits):
        _backward_torch(logits, labels, temps, stats, g_logp, g_entropy, grad)
        return
    B, L, V = logits.shape
    stride_b, stride_l, _ = logits.stride()
    stride_gb, stride_gl, _ = grad.stride()
    with torch.cuda.device_of(logits):
        _backward_kernel[(B * L,)](
            logits,
            labels,
            temps,
            stats,
            g_logp,
            g_entropy,
            grad,
            V,
            L,
            stride_b,
            stride_l,
            stride_gb,
            stride_gl,
            num_warps=NUM_WARPS,
        )


_backward = torch.library.custom_op("nsr::logprob_backward", _run_backward, mutates_args=("grad",))


def _setup_context(ctx, inputs, output):
    logits, labels, temps, check, sequences, inplace = inputs
    logp, entropy, stats, confidence = output
    ctx.save_for_backward(logits, labels, temps, stats)
    ctx.mark_non_differentiable(stats, confidence)
    ctx.set_materialize_grads(False)
    ctx.inplace = inplace


def _differentiate(ctx, g_logp, g_entropy, *_):
    if g_logp is None and g_entropy is None:
        return (None,) * 6
    logits, labels, temps, stats = ctx.saved_tensors  # raises if the logits have changed
    if ctx.inplace:
        grad = logits.detach()
    else:
        grad = logits.new_empty(logits.shape)
    # mutates_args: increments grad's version
    _backward(logits, labels, temps, stats, g_logp, g_entropy, grad)
    return grad, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


# --- public functions --------------------------------------------------------------------------


def _prepare_rows(shape, dtype, labels, temperature, mask):
    """Labels, -100 where masked, and temperatures of rows (...) of `dtype`; ValueError if unfit."""
    mask_shape = shape if mask is None else mask.shape
    mask_dtype = torch.bool if mask is None else mask.dtype
    if labels.shape != shape or mask_shape != shape:
        raise ValueError(f"labels and mask must have the shape {tuple(shape)}")
    labels_fit = labels.dtype in (torch.int32, torch.int64)
    if not dtype.is_floating_point or not labels_fit or mask_dtype != torch.bool:
        dtypes = (dtype, labels.dtype, mask_dtype)
        raise ValueError(f"need float logits, int32/int64 labels, a bool mask, not {dtypes}")
    if mask is not None:
        labels = labels.where(mask, -100)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        temps = temperature.detach().to(labels.device, out_dtype)
        return labels, temps.expand(shape)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    return labels, torch.full(shape, temperature, dtype=out_dtype, device=labels.device)


def _apply(logits, labels, temperature, mask, inplace, sequences):
    """The forward's outputs on (B, L, V) logits, with B = 1 where all rows are one stride apart."""
    rows = logits.shape[:-1]
    labels, temps = _prepare_rows(rows, logits.dtype, labels, temperature, mask)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() != 3 or logits.stride(0) == logits.shape[1] * logits.stride(1):
        logits = logits.reshape(1, labels.numel(), logits.shape[-1])
    B, L, V = logits.shape
    stride_b, stride_l, _ = logits.stride()
    labels = labels.reshape(B, L).contiguous()
    temps = temps.reshape(B, L).contiguous()
    overlap = stride_l < V or (B > 1 and stride_b < V)
    check = isinstance(temperature, Tensor)
    return _forward(logits, labels, temps, check, sequences, inplace and not overlap)


def logprobs_from_logits(logits, labels, *, temperature=1.0, mask=None, inplace_backward=False):
    """Log-probability of each label under softmax(logits / temperature), differentiable.

    logits: (..., V) float32, bfloat16, float16, float64.
    labels: (...) int32 or int64; -100: dead.
    temperature: positive float, or tensor broadcast to (...) (to check it the host waits for the
      GPU).
    mask: (...) bool, False: dead. Dead logits are not read, outputs and gradients are 0.
    inplace_backward: write the gradient over the logits (unless copied or overlapping); autograd
      raises if they are needed again.
    Returns (...) float32 (float64 for float64 logits), in nats; NaN where a label is out of range.
    Raises ValueError on shapes, dtypes, temperatures that do not fit. Source: arXiv:1805.02867.
    """
    outputs = _apply(logits, labels, temperature, mask, inplace_backward, sequences=0)
    return outputs[0].view(labels.shape)


def token_stats_from_logits(logits, labels, *, temperature=1.0, mask=None, inplace_backward=False):
    """`logprobs_from_logits` with entropy and confidence, still in one read of the logits.

    Arguments, dtypes, errors as there. Returns TokenStats(logprobs, entropy, confidence):
    logprobs and entropy (of softmax(logits / temperature)): (...) in nats, differentiable.
    confidence: (...[:-1]) exp(mean of live logprobs along the last axis), 0 where nothing is live;
      no gradient. Source: arXiv:2605.07137.
    """
    shape = labels.shape
    sequences = shape[:-1].numel()
    outputs = _apply(logits, labels, temperature, mask, inplace_backward, sequences)
    logp, entropy, _, confidence = outputs
    return TokenStats(
        logprobs=logp.view(shape),
        entropy=entropy.view(shape),
        confidence=confidence.view(shape[:-1]),
    )


# --- self-check --------------------------------------------------------------------------------


def _check(device):
    """Values and gradients against the definition in float64."""
    labels = torch.randint(1003, (4, 16), device=device)
    logits = 4 * torch.randn(4, 16, 1003, device=device)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    want = naive_token_stats(exact, labels, 0.6)
    found = token_stats_from_logits(logits, labels, temperature=0.6)
    (want.logprobs + want.entropy).sum().backward()
    (found.logprobs + found.entropy).sum().backward()
    error = 0.0
    for a, b in ((logits.grad, exact.grad), *zip(found, want)):
        difference = (a - b).abs().max()
        error = max(error, difference.item())
    assert error < 3e-5, error
    print(f"values and gradients are within {error:.0e} of float64")


# --- what the kernels compile to; needs no GPU -------------------------------------------------


def _assembly(kernel, dtype, arch):
    """What `kernel` compiles to. dtype: "fp32", "bf16", "fp16"; arch: 90 (sm_90), "gfx942", ..."""
    types = {
        "logits": "*" + dtype,
        "grad": "*" + dtype,
        "labels": "*i64",
        "V": "i32",
        "L": "i32",
    }
    signature = {}
    for name in kernel.arg_names:
        usual = "i64" if "stride" in name else "*fp32"
        signature[name] = types.get(name, usual)
    source = triton.compiler.ASTSource(kernel, signature)
    GPUTarget = triton.backends.compiler.GPUTarget
    if arch == "gfx942":
        target = GPUTarget("hip", arch, warp_size=64)
        compiled = triton.compile(source, target=target, options={"num_warps": 4})
        return compiled.asm["amdgcn"]
    target = GPUTarget("cuda", arch, warp_size=32)
    compiled = triton.compile(source, target=target, options={"num_warps": 8})
    folder = os.path.dirname(triton.__file__)
    tool = os.path.join(folder, "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def _exponentials(assembly):
    """In the loop that has the fewest, but some: a branch backwards closes a loop."""
    lines = assembly.splitlines()
    line_of = {}  # label or address
    fewest = math.inf
    for i, line in enumerate(lines):
        label = re.search(r"^\s*(?:/\*0*|\.)(LBB\w+|[0-9a-f]+)(?:\*/|:)", line)
        if label:
            line_of[label[1]] = i
        branch = re.search(r"(?:BRA[^;]* 0x|s_c?branch\w* \.)(\w+)", line)
        if branch and branch[1] in line_of:
            loop = "".join(lines[line_of[branch[1]] : i])
            count = len(re.findall("MUFU.EX2|v_exp_f32", loop))
            if count > 0:
                fewest = min(fewest, count)
    return fewest


def _machine_code(kernel, dtype, arch):
    """One line that says what `_assembly` holds; the loop does 16 bytes for each of 4 vectors."""
    assembly = _assembly(kernel, dtype, arch)
    registers = re.search(r"(?:REG|\.vgpr_count): *(\d+)", assembly)[1]
    spills = len(re.findall("LDL|STL|scratch_[ls]", assembly))
    loads = len(re.findall(r"LDG.*\.128|l_load_dwordx4", assembly))
    stores = len(re.findall(r"STG.*\.128|r_store_dwordx4", assembly))
    elements = 16 if dtype == "fp32" else 32
    exponentials = _exponentials(assembly) / elements
    return (
        f"{registers} registers, {spills} spills, {loads} wide loads, {stores} wide stores, "
        f"{exponentials:.2f} exponentials an element"
    )


# --- benchmark ---------------------------------------------------------------------------------


def _resident(field):
    """Bytes of this process, as Linux has them under VmRSS (now) or VmHWM (the most)."""
    with open("/proc/self/status") as file:
        kilobytes = re.search(field + r":\s*(\d+)", file.read())[1]
    return 1024 * int(kilobytes)


def _measure(f, cuda):
    """Mean seconds of 3 calls of f, and the most bytes held beyond those before."""
    f()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM
        before = _resident("VmRSS")
    timer = torch.utils.benchmark.Timer(
        "f()",
        globals={"f": f},
        num_threads=torch.get_num_threads(),
    )
    seconds = timer.timeit(3).mean
    most = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return seconds, most - before


def _benchmark(V, device):
    cuda = device == "cuda"
    elements = 2**29 if cuda else 2**25
    dtype = torch.bfloat16 if cuda else torch.float32
    logits = torch.randn(elements // V, V, device=device).to(dtype)
    labels = torch.randint(V, logits.shape[:1], device=device)
    other = logits.clone()
    seconds, _ = _measure(lambda: other.copy_(logits), cuda)
    bandwidth = 2 * logits.nbytes / seconds
    print(
        f"{tuple(logits.shape)} {dtype}, forward + backward; "
        f"a copy runs at {bandwidth / 1e9:.1f} GB/s"
    )

    def naive(logits, labels):
        logp = logits.float().log_softmax(-1)
        return logp.gather(-1, labels[:, None])

    def inplace(logits, labels):
        return logprobs_from_logits(logits, labels, inplace_backward=True)

    def step(function):
        leaf = logits.detach().requires_grad_()
        function(leaf, labels).sum().backward()

    functions = {
        "naive": naive,
        "compiled": torch.compile(naive),
        "here": logprobs_from_logits,
        "in place": inplace,
    }
    for name, function in functions.items():
        seconds, held = _measure(lambda: step(function), cuda)
        share = 3 * logits.nbytes / seconds / bandwidth
        print(
            f"  {name:8} {seconds * 1e3:7.1f} ms, {share:4.0%} of the copy's bandwidth, "
            f"peak memory {held / logits.nbytes:4.0%} of the logits"
        )


def _main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check(device)
    if INTERPRET:
        return
    if triton is not None:
        for kernel in (_forward_kernel, _backward_kernel):
            for dtype in ("fp32", "bf16", "fp16"):
                for arch in (80, 90, 100, "gfx942"):
                    print(kernel.__name__, dtype, arch, _machine_code(kernel, dtype, arch))
    for V in (32_000, 151_936):
        _benchmark(V, device)


if __name__ == "__main__":
    _main()
