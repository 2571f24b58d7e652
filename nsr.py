"""Negative sample reinforcement (NSR): train a reasoning model mainly by penalising wrong answers.

A policy samples G responses to every prompt, and a verifier marks each one correct or incorrect.
All the methods minimise one clipped policy-gradient loss; they differ in the advantage A of a
response, which says how far its tokens are to become likelier (A > 0) or less likely (A < 0):

    method       A if correct  A if not       source
    reinforce    1             -1             arXiv:2506.01347
    psr          1             0              arXiv:2506.01347: learn from correct ones only
    nsr          0             -1             arXiv:2506.01347: learn from incorrect ones only
    w-reinforce  lam           -1             arXiv:2506.01347 Eq. 9, lam = 0.1
    a-nsr        lam(t)        -beta(t)       arXiv:2605.07137: the penalty is annealed
    cw-nsr       lam           -w(y)          arXiv:2605.07137: weighed by the confidence in y
    acw-nsr      lam(t)        -beta(t) w(y)  both at once: in neither paper
    grpo         (r - mean) / (std + eps) in the prompt's group, KL to the base   arXiv:2402.03300
    ppo          reward to come - value, by a learned critic, KL in the reward    arXiv:1707.06347

The file begins with the method and the loop; what they call follows: config, data, model and
sampling, evaluation, the run, main, and last the verifier, which a reader may skip. Left out, so
that this can be read in a sitting: models larger than a GPU, inference servers, learned rewards.

    python nsr.py                                # the embedded task: no GPU, no network, no data
    python nsr.py --method psr --seed 1          # another method
    python nsr.py --preset qwen-math             # Qwen2.5-Math-1.5B on MATH, one GPU
    python nsr.py --model DIR --data FILE.jsonl  # any causal LM, any problems
    python nsr.py --resume out/a-nsr-1           # go on with a run that was stopped or killed
    torchrun --nproc-per-node 2 nsr.py           # each rank samples its share of the prompts
    python eval.py out/a-nsr-1 out/psr-1         # Pass@k of several models side by side
"""

import argparse
import cmath
import collections
import contextlib
import csv
import datetime
import fcntl
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import pkgutil
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
import unicodedata
import urllib.request
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, get_args

import numpy as np
import regex as re
import tokenizers
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kernels.linear_logprob import linear_logprobs
from kernels.logprob import token_stats_from_logits

# --------------------------------------------------------------------------------------------------
# the method: a verdict becomes an advantage, an advantage becomes a loss


def schedules(cfg, t, accuracy):
    """(lam, beta) at step t of T: a correct response has A = lam, an incorrect one A = -beta.

    accuracy: share of correct responses in the batch. (None, None) in grpo and ppo.

    >>> schedules(Config(method="w-reinforce"), 0, accuracy=0.5)
    (0.1, 1.0)
    >>> [round(x, 3) for x in schedules(Config(method="a-nsr", steps=150), 75, accuracy=0.5)]
    [0.125, 0.605]
    """
    if cfg.method == "reinforce":
        return 1.0, 1.0
    if cfg.method == "psr":
        return 1.0, 0.0
    if cfg.method == "nsr":
        return 0.0, 1.0
    if cfg.method in ("w-reinforce", "cw-nsr"):
        return cfg.lam, 1.0
    if cfg.method in ("grpo", "ppo"):
        return None, None
    # A-NSR: the penalty falls from beta_max towards beta_min. arXiv:2605.07137
    if cfg.schedule == "exponential":
        falling = math.exp(-cfg.kappa * t)
    elif cfg.schedule == "cosine":
        falling = (1 + math.cos(math.pi * t / cfg.steps)) / 2
    else:
        falling = 1 - accuracy
    beta = cfg.beta_min + (cfg.beta_max - cfg.beta_min) * falling
    # A-NSR: lam(t) rises; the paper gives it with the exponential beta(t), here it goes with all
    lam = cfg.lam_min + (cfg.lam_max - cfg.lam_min) * t / cfg.steps
    return lam, beta


def advantages(method, reward, confidence, lam, beta, eps=1e-6):
    """Advantage A of every response, (P, G) float32.

    reward: (P, G) float32, 1 correct, -1 incorrect. confidence: (P, G) float32, c(y), the geometric
    mean of the probabilities of a response's tokens when it was sampled; no gradient flows into it.

    >>> reward, confidence = torch.tensor([[1., -1., -1.]]), torch.tensor([[.9, .6, .01]])
    >>> advantages("cw-nsr", reward, confidence, lam=0.1, beta=1.0)
    tensor([[ 0.1000, -0.6000, -0.0500]])
    """
    if method == "grpo":  # GRPO: beside the others of the prompt's group. arXiv:2402.03300
        mean = reward.mean(1, keepdim=True)
        std = reward.std(1, keepdim=True)
        return (reward - mean) / (std + eps)
    weight = torch.ones_like(reward)
    if method in ("cw-nsr", "acw-nsr"):  # CW-NSR: w(y) = clamp(c(y), 0.05, 1). arXiv:2605.07137
        weight = confidence.detach().clamp(0.05, 1.0)
    return torch.where(reward > 0, lam, -beta * weight)


def policy_loss(logp, old_logp, adv, loss_mask, denom, clip=0.2):
    """Clipped policy-gradient loss: -sum over tokens of min(rho A, clip(rho) A), over denom.

    logp, old_logp: (B, R) float32, log-probs of the sampled tokens at the sampling temperature,
    now and before the first update. adv: (B, 1), or (B, R) in ppo. loss_mask: (B, R) bool.
    denom: response tokens of the whole mini-batch, those with A = 0 too, so that its parts add up
    however it is cut, and w-reinforce is lam psr + nsr. arXiv:1707.06347 Eq. 7, per token.
    """
    rho = (logp - old_logp).exp()
    objective = torch.minimum(rho * adv, rho.clamp(1 - clip, 1 + clip) * adv)
    return -objective[loss_mask].sum() / denom


def kl_to_reference(logp, ref_logp):
    """Per-token estimate k3 of KL(pi || ref), never negative. arXiv:2402.03300 Eq. 4."""
    logratio = ref_logp - logp
    return logratio.exp() - 1 - logratio


def gae(reward, value):
    """(advantages, returns) of a response's tokens in ppo, by GAE with gamma = lambda = 1.

    reward, value: (tokens,) float32; value: what the critic expects to come, before each token.
    arXiv:1506.02438 Eq. 18: the sum of the rewards to come, and what it exceeds the value by.

    >>> gae(torch.tensor([0., 0., 1.]), torch.tensor([.5, .25, .75]))
    (tensor([0.5000, 0.7500, 0.2500]), tensor([1., 1., 1.]))
    """
    returns = reward.flip(0).cumsum(0).flip(0)
    return returns - value, returns


def value_loss(value, old_value, returns, loss_mask, denom, clip=0.2):
    """Clipped squared error of ppo's critic, all (B, R); denom as in policy_loss.

    The larger of two errors, in one of which the value has moved no further than clip.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    error = torch.maximum((value - returns) ** 2, (near - returns) ** 2)
    return 0.5 * error[loss_mask].sum() / denom


# --------------------------------------------------------------------------------------------------
# the loop


@dataclass
class Response:
    """What the policy drew after a prompt, and what the loop finds out about it.

    Tensors are on the CPU, and (tokens,) float32 if no other shape is given.
    """

    prompt_ids: list  # of int
    ids: list  # of int: the sampled tokens, the stop token included
    logp: list  # of float: log-prob of each under the distribution that it was drawn from
    stopped: bool  # False: cut at max_new_tokens
    problem: "Problem" = None  # what it is a response to
    text: str = ""
    answer: str = None  # what its last box holds, or --answer-pattern finds
    correct: bool = False
    old_logp: torch.Tensor = None  # by the training pass, before the first update
    entropy: torch.Tensor = None  # of the distribution before each token, in nats
    confidence: torch.Tensor = None  # (): c(y) = exp(mean of old_logp)
    ref_logp: torch.Tensor = None  # by the model before training; old_logp where no KL is asked for
    adv: torch.Tensor = None
    value: torch.Tensor = None  # ppo: by the critic, before its first update
    returns: torch.Tensor = None  # ppo: what the critic learns


def train(run):
    """Sample, verify, weigh, update: from run.step to cfg.steps. Raises Stopped and UserError."""
    cfg, first_step = run.cfg, run.step
    evaluate(run)
    started = time.time()
    while run.step < cfg.steps:
        responses, metrics = take_step(run)
        log_step(run, responses, metrics)
        prune_checkpoints(run)
        done = run.step - first_step
        left = time_left(started, done, cfg.steps - first_step)
        print_step(metrics, left, header=done % 20 == 1)
        if run.step % cfg.save_every == 0 or run.step == cfg.steps:
            save_checkpoint(run)
        evaluate(run)
        if any(sum_over_ranks(len(heard))):
            raise Stopped
    prune_checkpoints(run)


def take_step(run):
    """One step of training. Returns its responses and its metrics (dict)."""
    responses, metrics = collect(run)
    updating = time.time()
    metrics |= update(run, responses)
    run.step += 1
    metrics["update_s"] = time.time() - updating
    metrics["memory_gb"] = peak_memory(run.model.device)
    return responses, metrics


def collect(run):
    """The next step's responses, sampled, verified and with their advantages; and its metrics."""
    cfg, started = run.cfg, time.time()
    chosen = batch_indices(run.step, cfg.prompts, len(run.problems), cfg.seed)
    responses = sample(run, "rollout", [run.problems[i] for i in chosen], cfg.group_size)
    sampled = time.time()
    score(run, responses)
    # the schedules move with the step: once per batch, not per mini-batch or per call of the loss
    correct, count = sum_over_ranks(sum(r.correct for r in responses), len(responses))
    lam, beta = schedules(cfg, run.step, accuracy=correct / count)
    weigh(cfg, responses, lam, beta)
    metrics = measure(run, responses) | {"lam": lam, "beta": beta}
    metrics |= {"rollout_s": sampled - started, "score_s": time.time() - sampled}
    return responses, metrics


@torch.no_grad()
def score(run, responses):
    """Set old_logp, entropy, confidence, ref_logp and value of each response, before any update."""
    run.model.eval()
    for micro in micro_batches(responses, run.cfg.micro_tokens):
        with autocast(run):
            stats, _ = token_stats(run.model, micro, run.cfg.temperature)
            found = {"old_logp": stats.logprobs, "entropy": stats.entropy}
            found["ref_logp"] = stats.logprobs  # without a reference the KL is 0
            if run.reference:
                ref_stats, _ = token_stats(run.reference, micro, run.cfg.temperature)
                found["ref_logp"] = ref_stats.logprobs
            if run.critic:
                found["value"] = critic_values(run.critic, micro)
        for name, values in found.items():
            for response, row in zip(micro, values.cpu()):
                setattr(response, name, row[: len(response.ids)])
        for response, confidence in zip(micro, stats.confidence.cpu()):
            response.confidence = confidence


def weigh(cfg, responses, lam, beta):
    """Set the advantage of every token of responses, grouped by prompt; in ppo also returns."""
    reward = torch.tensor([1.0 if r.correct else -1.0 for r in responses])
    if cfg.method == "ppo":  # PPO: the verdict is the last token's reward, the KL every token's
        for response, verdict in zip(responses, reward):
            per_token = cfg.kl_coef * (response.ref_logp - response.old_logp)
            per_token[-1] += verdict
            response.adv, response.returns = gae(per_token, response.value)
        return
    reward = reward.view(-1, cfg.group_size)
    confidence = torch.stack([r.confidence for r in responses]).view_as(reward)
    adv = advantages(cfg.method, reward, confidence, lam, beta).flatten()
    for response, of_all_tokens in zip(responses, adv):
        response.adv = of_all_tokens.expand(len(response.ids))


def update(run, responses):
    """cfg.updates optimizer steps, each on a mini-batch of whole groups. Returns metrics (dict)."""
    cfg, norms, clipped = run.cfg, [], 0
    for model in run.trained:
        model.train(cfg.gradient_checkpointing)  # only in train mode do layers look for it
    for mini in split(responses, len(responses) // cfg.updates):
        # A = 0 has no gradient, so it needs no forward pass; but its tokens count in the ONE
        # denominator, which is fixed before the mini-batch is cut into micro-batches
        used = [r for r in mini if r.adv.any() or cfg.entropy_coef or cfg.kl_coef]
        denom, busy = sum_over_ranks(sum(len(r.ids) for r in mini), len(used))
        if not busy:
            continue
        for micro in micro_batches(used, cfg.micro_tokens):
            clipped += backward(run, micro, denom)
        norms.append(step_optimizer(run))
    clipped, tokens = sum_over_ranks(int(clipped), sum(len(r.ids) for r in responses))
    grad_norm = sum(norms) / max(1, len(norms))
    return {"updates": len(norms), "grad_norm": grad_norm, "clip_frac": clipped / tokens}


def backward(run, micro, denom):
    """Add the gradient of a micro-batch's loss. Returns at how many tokens the clip stopped it."""
    cfg = run.cfg
    with autocast(run):
        stats, mask = token_stats(run.model, micro, cfg.temperature)
    logp = stats.logprobs
    old_logp, adv = padded_like(logp, micro, "old_logp"), padded_like(logp, micro, "adv")
    loss = policy_loss(logp, old_logp, adv, mask, denom, cfg.clip)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * stats.entropy[mask].sum() / denom
    if cfg.kl_coef and not run.critic:  # PPO has it in the reward
        kl = kl_to_reference(logp, padded_like(logp, micro, "ref_logp"))
        loss = loss + cfg.kl_coef * kl[mask].sum() / denom
    loss.backward()
    if run.critic:  # PPO: its weights are its own, so this gradient is apart from the policy's
        with autocast(run):
            value = critic_values(run.critic, micro)
        old_value = padded_like(value, micro, "value")
        returns = padded_like(value, micro, "returns")
        value_loss(value, old_value, returns, mask, denom, cfg.clip).backward()
    rho = (logp.detach() - old_logp).exp()
    clipped = rho * adv > rho.clamp(1 - cfg.clip, 1 + cfg.clip) * adv
    return clipped.sum()  # where there are pads adv is 0


def step_optimizer(run):
    """Clip the gradients, summed over the ranks, and step.

    Returns the norm of the policy's gradient before it is clipped. Raises UserError, before the
    step, where a norm is not finite, on all ranks alike.
    """
    cfg, norms = run.cfg, []
    for model in run.trained:
        if WORLD_SIZE > 1:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item())
    risen = min(1.0, (run.step + 1) / max(1, cfg.lr_warmup))  # share of the learning rate
    for group in run.optimizer.param_groups:  # one a model, or more where an optimizer splits them
        group["lr"] = risen * (cfg.critic_lr if group.get("critic") else cfg.lr)
    if not all(map(math.isfinite, norms)):
        raise UserError(
            f"step {run.step + 1}: the gradient is not finite; stopped before the update: start a "
            "new run with a lower --lr"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()  # the gradient makes room for the next rollout
    return norms[0]


def measure(run, responses):
    """Metrics of a step (dict), over the responses of all ranks."""
    rows = []
    for r in responses:
        checkable = r.answer is not None and r.problem.verify is verify
        gap = (r.old_logp - torch.tensor(r.logp)).abs()
        logp, adv = r.old_logp.mean().item(), r.adv.mean().item()
        rows.append(
            {
                "correct": r.correct,
                "boxed": r.answer is not None,
                "unparsed": checkable and parse_answer(r.answer) is None,
                "truncated": not r.stopped,
                "length": len(r.ids),
                "entropy": r.entropy.sum().item(),
                "rollout_gap": gap.sum().item(),
                "logp_correct": logp if r.correct else None,
                "adv_correct": adv if r.correct else None,
                "logp_incorrect": None if r.correct else logp,
                "adv_incorrect": None if r.correct else adv,
            }
        )
    rows = gather(rows)
    tokens = sum(row["length"] for row in rows)
    metrics = {"step": run.step + 1, "steps": run.cfg.steps, "tokens": tokens}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        count = tokens if name in ("entropy", "rollout_gap") else len(values)  # the mean of a token
        metrics[name] = np.sum(values) / count if values else None
    return metrics


# --------------------------------------------------------------------------------------------------
# config

METHODS = ("reinforce", "psr", "nsr", "w-reinforce", "a-nsr", "cw-nsr", "acw-nsr", "grpo", "ppo")
SCHEDULES = ("exponential", "cosine", "accuracy")
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Config:
    """The settings of a run, each a flag: group_size is --group-size; the comments are --help."""

    method: str = "a-nsr"  # how a verdict becomes an advantage
    preset: str = ""  # where settings start from: countdown[-hard], qwen-math[-paper]
    model: str = "countdown"  # causal LM: a directory, out/NAME, a hub name, countdown[-hard]
    data: str = "countdown"  # problems: JSON Lines, hf://datasets/OWNER/NAME/FILE, math-train, ...
    eval_data: str = ""  # held-out problems, named likewise; default: a tenth of --data
    steps: int = 125  # training steps T, one batch each; the schedules end at T
    prompts: int = 64  # prompts a step
    group_size: int = 8  # responses a prompt, G
    updates: int = 2  # optimizer updates a step: mini-batches of the batch
    lr: float = 1e-4  # learning rate, constant after --lr-warmup
    lr_warmup: int = 0  # steps over which the learning rate first rises to it
    optimizer: str = "torch.optim.AdamW"  # any class that is called as it is
    seed: int = 0  # decides every random draw of the run
    name: str = ""  # write to out/NAME; default: METHOD-1, METHOD-2, ...
    resume: str = ""  # go on with the run in this directory, by its own settings
    question_key: str = ""  # where rows of data have their question; default: the usual names
    answer_key: str = ""  # and its answer; both may be nested: extra_info.answer
    instruction: str = None  # follows the question in the prompt; default: the papers'; "": none
    system: str = None  # system message; default: the papers' for Qwen2.5-Math's base, else none
    answer_pattern: str = ""  # regex; its last match's first group is the answer, instead of a box
    verifier: str = ""  # FILE.py:FUNCTION, (response, answer) -> bool: checks instead of ours
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out
    max_new_tokens: int = 20  # longest response in tokens, stop token included
    temperature: float = 1.0  # sampling temperature; log-probs are taken at it too
    clip: float = 0.2  # pi / pi_old is clipped to 1 - CLIP .. 1 + CLIP
    lam: float = 0.1  # advantage of a correct response in w-reinforce and cw-nsr
    schedule: str = "exponential"  # how beta(t) falls in a-nsr and acw-nsr
    beta_max: float = 1.5  # where beta(t) of a-nsr starts
    beta_min: float = 0.5  # what beta(t) falls towards
    kappa: float = 0.03  # rate of the exponential schedule, per step
    lam_min: float = 0.05  # lam(t) of a-nsr at t = 0
    lam_max: float = 0.2  # lam(t) of a-nsr at t = T
    entropy_coef: float = 0.0  # entropy bonus (1e-4 in the papers)
    kl_coef: float = None  # KL to the model before training; default: 1e-3 in grpo and ppo, else 0
    critic_lr: float = 1e-3  # learning rate of the critic in ppo
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 0  # Pass@k every so many steps; 0: only before and after training
    eval_problems: int = 100  # held-out problems to evaluate on
    eval_samples: int = 256  # responses to each of them: n of Pass@k
    save_every: int = 25  # steps between checkpoints
    keep: int = 1  # newest checkpoints to keep; after a collapse also the last before it
    tensorboard: bool = False  # also write the metrics for TensorBoard
    rollout_tokens: int = 0  # most tokens in the KV cache; 0: what a GPU holds, 65,536 on a CPU
    gpu_memory_utilization: float = 0.9  # share of a GPU that the KV cache may fill with the rest
    micro_tokens: int = 2**13  # most tokens in a training pass, pads included
    bf16: bool = False  # bf16 autocast over float32 weights; the presets' on a GPU only
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    compile: bool = False  # torch.compile the layers in training passes
    dry_run: bool = False  # say what two steps cost, by random weights, and write nothing
    device: str = ""  # cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu


ABOVE_ZERO = (
    "steps prompts group_size updates lr max_prompt_tokens max_new_tokens temperature clip kappa "
    "critic_lr grad_clip eval_problems eval_samples save_every keep micro_tokens "
    "gpu_memory_utilization"
).split()
QWEN_MATH = (  # the paper's settings at 1/8 of its batch and 2/3 of its length
    "--model Qwen/Qwen2.5-Math-1.5B --data math-train --eval-data math500 --steps 100 "
    "--prompts 128 --updates 4 --lr 1e-6 --critic-lr 1e-5 --max-new-tokens 2048 --eval-samples 4 "
    "--save-every 5 --micro-tokens 16384 --bf16 --gradient-checkpointing"
)
PRESETS = {
    "countdown": "",
    "countdown-hard": "--model countdown-hard --data countdown-hard --max-new-tokens 24",
    "qwen-math": QWEN_MATH,
    "qwen-math-paper": f"{QWEN_MATH} --prompts 1024 --max-new-tokens 3072 --entropy-coef 1e-4",
}
CHOICES = {"method": METHODS, "schedule": SCHEDULES, "preset": [*PRESETS]}
# what a resumed run may change: neither method, model nor data
RESUMABLE = (
    "resume steps eval_every save_every keep tensorboard device rollout_tokens "
    "gpu_memory_utilization micro_tokens gradient_checkpointing compile"
)


QWEN_MATH_SHAPE = transformers.Qwen2Config(  # of the presets' model, for --dry-run: no download
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


class UserError(Exception):
    """What the user can mend: the commands print it as one line and exit with status 2."""


def resolve(given):
    """Config from the flags `given` (dict) over their preset's over the defaults.

    Raises UserError where a setting is out of range or two do not fit together.
    """
    before = config_of(given.get("model", "countdown"))  # whose model it begins with
    embedded = all(given.get(name, "countdown") in TASKS for name in ("model", "data"))
    if "preset" in given:
        preset = given["preset"]
    elif before:
        preset = before.preset
    elif embedded:
        preset = given.get("data") or given.get("model") or "countdown"
    else:
        preset = "qwen-math"
    usual = parse_flags(PRESETS[preset].split())
    if before:
        usual["system"] = before.system
    if given.get("data", usual.get("data")) != usual.get("data"):
        usual.pop("eval_data", None)  # it goes with the preset's own --data
    cfg = Config(**usual | given | {"preset": preset})
    if cfg.system is None:
        cfg.system = papers_system(cfg.model)
    if cfg.kl_coef is None:
        cfg.kl_coef = 1e-3 if cfg.method in ("grpo", "ppo") else 0.0
    if "bf16" not in given and (cfg.device == "cpu" or not torch.cuda.is_available()):
        cfg.bf16 = False  # a preset's is for a GPU
    check(cfg)
    cfg.model = str(model_path(cfg.model))  # of a run, the checkpoint that it has now
    return cfg


def papers_system(model):
    """The system message of the papers (str), for the base models that they train; else None."""
    if re.search(r"Qwen2\.5-Math-[\d.]+B/?$", model):
        return "You are a helpful assistant."
    return None


def check(cfg):
    """Raises UserError where a setting is out of range or two do not fit together."""
    for name, value in asdict(cfg).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in ABOVE_ZERO and not 0 < value < math.inf:
            raise UserError(f"{flag}: must be a number above 0")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"{flag}: must be a number, and not below 0")
    if cfg.gpu_memory_utilization > 1:
        raise UserError(f"--gpu-memory-utilization {cfg.gpu_memory_utilization}: is above 1")
    pattern = cfg.answer_pattern
    with explained(f"--answer-pattern {pattern}", "give a regex, and put the answer's part in ( )"):
        if pattern and not re.compile(pattern).groups:
            raise ValueError("it has no group")
    if cfg.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: pip install tensorboard")
    if cfg.prompts % (cfg.updates * WORLD_SIZE):
        raise UserError(
            f"--prompts {cfg.prompts} does not divide into --updates {cfg.updates} on "
            f"{WORLD_SIZE} rank(s)"
        )
    if cfg.method == "grpo" and cfg.group_size < 2:
        raise UserError("--method grpo compares the responses of a group: --group-size 2 or more")


# --------------------------------------------------------------------------------------------------
# data


@dataclass
class Problem:
    """A question, its answer, and how a response to it is checked."""

    question: str  # the text, or the chat messages as JSON
    answer: str  # gold
    instruction: str  # follows the question in the prompt
    verify: Callable  # (response, answer, answer pattern), three str -> bool: is it correct
    messages: list = None  # of dict: the chat that asks it, where it brings one
    tags: dict = field(default_factory=dict)  # level and subject, where the data has them
    prompt_ids: list = None  # by encode_prompts()


INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
QUESTION_KEYS = "problem question prompt content messages input".split()
ANSWER_KEYS = (
    "answer final_answer Answer reward_model.ground_truth ground_truth label target output"
).split()
GITHUB = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data"
DOWNLOADS = {  # name: (address, git blob id; the hub has its own sums)
    "math-train": (f"{GITHUB}/math/train.jsonl", "47bc5462da8374bdcf53a7339bd48a7e28567676"),
    "math-test": (f"{GITHUB}/math/test.jsonl", "9ef3334841057f53caac5522332e38391d3fb33b"),
    "amc23": (f"{GITHUB}/amc23/test.jsonl", "6894ad7c49a0b3a64210af32954f4d049d934ea0"),
    "aime2025": ("hf://datasets/math-ai/aime25/test.jsonl", None),
    "math500": ("hf://datasets/HuggingFaceH4/MATH-500/test.jsonl", None),
}


def fetch(name):
    """Path of the problem file `name`, downloaded if need be."""
    address, blob_id = DOWNLOADS.get(name, (name, None))
    if address.startswith("hf://datasets/"):
        from huggingface_hub import hf_hub_download

        _, _, _, owner, repo, file = address.split("/", 5)
        return Path(hf_hub_download(f"{owner}/{repo}", file, repo_type="dataset"))
    if address == name:
        return Path(name)
    path = Path("out/data", f"{name}.jsonl")
    if not path.exists():
        content = urllib.request.urlopen(address, timeout=60).read()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob_id:
            raise ValueError(f"{address} is not the file that it was")
        write_whole(path, content)
    return path


def read_rows(path):
    """The rows (dicts) of a JSON array, CSV or Parquet; the lines (str) of JSON Lines."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return csv.DictReader(io.StringIO(text))
    if text.lstrip().startswith("["):
        return json.loads(text)
    return text.split("\n")


def parse_problem(row, question_key="", answer_key="", as_is=False):
    """Problem from one row (dict) of MATH, GSM8K, AIME, DAPO, verl, TinyZero and their like.

    as_is: the answer is for a verifier of the user's. It is "" where the row has none. Raises
    ValueError that says what is wrong.

    >>> parse_problem({"question": "2 + 2 = ?", "answer": "Two and two.\\n#### 4"}).answer
    '4'
    """
    names = (question_key,) if question_key else QUESTION_KEYS
    question = first_of(row, names)
    problem = Problem(question, "", INSTRUCTION, verify)
    if isinstance(question, list):
        problem.messages = [chat_message(message) for message in question]
        problem.question = json.dumps(problem.messages, ensure_ascii=False)
    elif not isinstance(question, str) or not question.strip():
        keys = ", ".join(map(str, row))
        raise ValueError(
            f"no question in {', '.join(names)}; the row has {keys}: --question-key says which"
        )
    answer = first_of(row, (answer_key,) if answer_key else ANSWER_KEYS)
    if answer is None and not answer_key:
        solution = row.get("solution")
        answer = extract_answer("\n".join(solution) if isinstance(solution, list) else solution)
    if not as_is:
        set_answer(problem, answer)
    elif answer is not None:
        problem.answer = answer if isinstance(answer, str) else json.dumps(answer)
    if problem.messages:  # a chat brings its own instruction
        problem.instruction = ""
    (problem.question + problem.answer).encode()  # half a character raises
    tags = {"level": row.get("level"), "subject": first_of(row, ("subject", "type"))}
    problem.tags = {name: str(tag) for name, tag in tags.items() if tag}
    return problem


def set_answer(problem, answer):
    """Set what a Problem has of its gold answer, which may be of any type. Raises ValueError."""
    if isinstance(answer, str) and re.match(r'\s*[\[{]\s*"', answer):  # JSON in a string
        answer = json.loads(answer)
    if isinstance(answer, dict) and answer.keys() >= {"target", "numbers"}:
        numbers = " ".join(str(int(number)) for number in answer["numbers"])
        answer = f"{numbers} = {int(answer['target'])}"
        problem.instruction, problem.verify = COUNTDOWN, verify_countdown
    answers = answer if isinstance(answer, list) else [answer]
    problem.answer = ", ".join(map(clean_answer, answers))


def ends_begun(messages):
    """Whether the last turn of a chat is the assistant's, which a response then goes on with."""
    return messages[-1]["role"] == "assistant"


def first_of(row, names):
    """The first value of row (dict) under one of names, without what is empty; None if none.

    >>> first_of({"answer": "", "reward_model": {"ground_truth": 7}}, ANSWER_KEYS)
    7
    """
    for name in names:
        value = row
        for part in [name] if name in row else name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, "", []):
            return value
    return None


def chat_message(message):
    """A chat message (dict) whose content is one text; it may be a list of parts."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a chat message needs content that is text")
    return {"role": "user"} | message | {"content": "".join(texts)}


def clean_answer(answer):
    """
    >>> clean_answer("so it is\\n#### 18"), clean_answer(27.0), clean_answer("$x^2$")
    ('18', '27', 'x^2')

    Raises ValueError where an answer is neither text nor a number.
    """
    if answer is None:
        return ""
    finite = isinstance(answer, float) and math.isfinite(answer)
    if type(answer) not in (str, int) and not finite:  # a bool is neither
        raise ValueError(f"the answer {answer!r} is neither text nor a number")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    answer = str(answer).split("####")[-1].strip()
    return re.sub(r"^\$+([^$]+)\$+$", r"\1", answer).strip()


def read_problems(name, cfg=Config()):
    """[Problem] of a file or name; a repeated question counts once. Raises UserError."""
    if name in TASKS:
        return countdown_problems(name)
    keys = ("", "") if name in DOWNLOADS else (cfg.question_key, cfg.answer_key)
    problems, place = {}, ""
    unanswered = repeated = other = 0
    try:
        for number, row in enumerate(read_rows(fetch(name)), 1):
            place = f", row {number}"
            if isinstance(row, str):
                place = f", line {number}"
                if not row.strip():
                    continue
                row = json.loads(row)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            problem = parse_problem(row, *keys, as_is=bool(cfg.verifier))
            if not problem.answer:
                unanswered += 1
                continue
            first = problems.setdefault(problem.question, problem)
            repeated += first is not problem
            other += first.answer != problem.answer
    except Exception as e:  # of files, formats and the hub's client, which raise dozens of types
        raise UserError(
            f"{name}{place}: {first_line(e)}; --data takes JSON Lines, a JSON array, CSV, Parquet "
            f"(pip install pyarrow), or one of countdown, {', '.join(DOWNLOADS)}"
        )
    if unanswered:
        say(
            f"{name}: left out {unanswered} rows without an answer in "
            f"{keys[1] or ', '.join(ANSWER_KEYS)}"
        )
    if repeated:
        say(
            f"{name}: left out {repeated} rows that repeat a question, {other} of them with "
            "another answer"
        )
    begun = sum(ends_begun(p.messages) for p in problems.values() if p.messages)
    if begun:
        say(f"{name}: {begun} chats end with the assistant's turn, which the response goes on with")
    if not problems:
        raise UserError(f"{name} holds no problems with an answer; --answer-key says where it is")
    return list(problems.values())


def shuffled_problems(name, cfg):
    """[Problem] of a file or name, in an order that is the same in every run. Raises UserError."""
    problems = read_problems(name, cfg)
    if cfg.verifier:
        verifier = load_verifier(cfg.verifier)
        for problem in problems:
            problem.verify = verifier
    return random.Random(0).sample(problems, len(problems))


def load_problems(cfg):
    """(train, held_out): two lists of Problem that share no question. Raises UserError.

    A tenth of --data is held out where there is no --eval-data, the same in every run.
    """
    problems = shuffled_problems(cfg.data, cfg)
    if cfg.eval_data:
        held_out = shuffled_problems(cfg.eval_data, cfg)
    else:
        held_out = problems[: len(problems) // 10]
    questions = {p.question for p in held_out}
    return [p for p in problems if p.question not in questions], held_out


def load_verifier(name):
    """The function of FILE.py:FUNCTION as a Problem's verify. Raises UserError."""
    file, _, function = name.rpartition(":")
    with explained(f"--verifier {name}", "give FILE.py:FUNCTION"):
        body = runpy.run_path(file)[function]

    def checked(response, answer, pattern=""):
        try:
            verdict = body(response, answer)
            sound = verdict in (True, False)  # of an array this raises
        except (Exception, SystemExit) as e:
            line = traceback.extract_tb(e.__traceback__)[-1].lineno
            raise UserError(
                f"--verifier {name} raised {type(e).__name__} in line {line}: {first_line(e)}, for "
                f"the response {response!r}"
            )
        if not sound:
            raise UserError(
                f"--verifier {name} returned {verdict!r}, neither True nor False, for the response "
                f"{response!r}"
            )
        return bool(verdict)

    return checked


def say_unread(problems):
    """Say how many gold answers the verifier can only compare letter by letter."""
    checked = [p.answer for p in problems if p.verify is verify]
    unread = [answer for answer in checked if parse_answer(answer) is None]
    if unread:
        say(
            f"{len(unread)} of {len(problems)} gold answers are beyond the verifier, such as "
            f"{unread[0][:80]!r}: only a response that is written just so can be correct"
        )


def batch_indices(step, prompts, count, seed):
    """Which of `count` problems make the batch of `step` (from 0): a new order every epoch.

    It follows from the step alone, so a resumed run neither repeats nor skips a problem.

    >>> sorted(batch_indices(0, 2, 4, seed=0) + batch_indices(1, 2, 4, seed=0))
    [0, 1, 2, 3]
    """
    epoch, first = divmod(step * prompts, count)
    indices = []
    while len(indices) < first + prompts:
        indices += random.Random(f"{seed} {epoch}").sample(range(count), count)
        epoch += 1
    return indices[first : first + prompts]


# The embedded tasks: make a target of a few numbers, each used exactly once.

COUNTDOWN = (
    "Use each of the numbers exactly once, with + - * / and parentheses, to make the number after "
    "the equals sign. Put the expression within \\boxed{}."
)
BASE_VERSION = 1  # raise it when what makes a base policy changes: those on disk are made anew


@dataclass
class Task:
    """An embedded task: its problems, and how long its base policy is warmed up."""

    counts: range  # how many numbers a problem may have
    targets: range
    problems: int
    warm_up_steps: int


TASKS = {
    "countdown": Task(range(4, 5), range(1, 31), 4000, 2500),
    "countdown-hard": Task(range(4, 7), range(1, 101), 10_000, 2000),
}


def random_expression(rng, numbers):
    """(text, value) of a random tree over `numbers` in their order, each node in parentheses.

    >>> random_expression(random.Random(1), [2, 3, 4])
    ('(2*(3-4))', -2)
    """
    if len(numbers) == 1:
        return str(numbers[0]), numbers[0]
    cut, op = rng.randrange(1, len(numbers)), rng.choice("+-*")
    left, a = random_expression(rng, numbers[:cut])
    right, b = random_expression(rng, numbers[cut:])
    return f"({left}{op}{right})", {"+": a + b, "-": a - b, "*": a * b}[op]


def countdown_example(rng, task="countdown"):
    """(Problem, a random correct expression for it) of one of TASKS."""
    counts, target = TASKS[task].counts, 0
    while target not in TASKS[task].targets:
        count = counts[0]
        if len(counts) > 1:  # else it would take a number from rng, and change every problem
            count = rng.choice(counts)
        numbers = [rng.randrange(1, 10) for _ in range(count)]
        expression, target = random_expression(rng, numbers)
    text = f"{' '.join(map(str, sorted(numbers)))} = {target}"
    bare = expression[1:-1]  # without the outermost parentheses
    return Problem(text, text, COUNTDOWN, verify_countdown), bare


def countdown_problems(task="countdown"):
    """The first different problems of one of TASKS that a fixed seed draws.

    >>> countdown_problems()[0].question
    '2 2 6 8 = 6'
    """
    rng, problems = random.Random(0), {}
    while len(problems) < TASKS[task].problems:
        problem, _ = countdown_example(rng, task)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def countdown_config():
    """The shape of the embedded base policy: 108,416 parameters."""
    return transformers.Qwen2Config(
        vocab_size=19,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def countdown_tokenizer():
    """One token a character and one for `\\boxed{`; pad and end of text are the same token."""
    words = ["<eos>", "\\boxed{", "}", *"0123456789+-*()="]
    vocab = {word: i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<eos>"))
    core.normalizer = tokenizers.normalizers.Replace(" ", "")
    core.decoder = tokenizers.decoders.Fuse()
    core.add_tokens(words[:2])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>"
    )
    # it has no words for the instruction in the second line: the question is the prompt
    tokenizer.chat_template = "{{ messages[0]['content'].split('\n')[0] }}"
    return tokenizer


def countdown_base(task):
    """Directory of the base policy of one of TASKS, made on first use, in a minute or two.

    Supervised on random correct expressions, for few enough steps that it stays imperfect and
    diverse: what a base model is to reinforcement learning.
    """
    torch.set_num_threads(1)  # so small a model that more would only wait for each other
    path = Path("out", f"base-{task}-v{BASE_VERSION}")
    if not path.exists():
        steps = TASKS[task].warm_up_steps
        say(f"making the base policy, once: {steps} steps of supervised warm-up")
        tokenizer = countdown_tokenizer()
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(countdown_config())
        warm_up(model, tokenizer, task, steps)
        with whole_directory(path) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return path


def warm_up(model, tokenizer, task, steps, batch=64, lr=4e-3):
    """Supervised training on random correct expressions of problems that are not held out."""
    rng, started = random.Random(0), time.time()
    held_out = {p.question for p in load_problems(Config(data=task))[1]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.04)
    for step in range(steps):
        texts = []
        while len(texts) < 2 * batch:
            problem, expression = countdown_example(rng, task)
            if problem.question not in held_out:
                texts += [problem.question, f"\\boxed{{{expression}}}<eos>"]
        pairs = split(tokenizer(texts)["input_ids"], 2)
        responses = [Response(prompt, ids, logp=[], stopped=True) for prompt, ids in pairs]
        stats, mask = token_stats(model, responses, temperature=1.0)
        optimizer.zero_grad()
        (-stats.logprobs.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        left = time_left(started, step + 1, steps)
        live(f"base policy: step {step + 1} of {steps}, {left} left")


# --------------------------------------------------------------------------------------------------
# model


def model_path(name):
    """Where a model's files are: in the newest checkpoint of a run, in a directory, on the hub.

    Raises UserError where the name can only be that of a directory, and there is none.
    """
    if re.match(r"[./~]|out/|.*/.*/", str(name)) and not Path(name).is_dir():
        raise UserError(f"no model directory {name}; give one, or a hub name")
    return (checkpoints(Path(name)) or [name])[-1]


def pretrained(kind, path, **options):
    """kind.from_pretrained(path, ...) of a class of transformers. Raises UserError."""
    advice = "give a model directory, or a hub name and the network that it takes"
    with explained(f"cannot load the model {path}", advice):
        return kind.from_pretrained(path, **options)


def model_config(name):
    """The config of a model. Raises UserError where there is none, or only an adapter to one."""
    if name in TASKS:
        return countdown_config()
    path = model_path(name)
    if Path(path, "adapter_config.json").exists():
        raise UserError(
            f"{path} is an adapter (LoRA): merge it into its base model first, by peft's "
            "merge_and_unload(), and give the directory of the whole"
        )
    return pretrained(transformers.AutoConfig, path)


def load_model(name, device, kind=transformers.AutoModelForCausalLM, shape_only=False, **options):
    """(model, tokenizer) from a directory, a run's out/NAME, a hub name, or one of TASKS.

    The model is in float32, without dropout: rollout and training pass see one policy.
    shape_only: with random weights, and with the tokenizer of countdown. Raises UserError.
    """
    if shape_only:
        tokenizer = countdown_tokenizer()
        config = QWEN_MATH_SHAPE if name in QWEN_MATH.split() else model_config(name)
        config.update(options)
        model = kind.from_config(config, dtype=torch.float32)
    else:
        path = model_path(name)
        if name in TASKS:
            path = on_first_rank(partial(countdown_base, name))
        tokenizer = pretrained(transformers.AutoTokenizer, path)
        model, found = pretrained(
            kind, path, dtype=torch.float32, output_loading_info=True, **options
        )
        missing = sorted(found["missing_keys"])  # they would be random; of a critic its head is
        if missing and kind is transformers.AutoModelForCausalLM:
            raise UserError(
                f"the files of the model {path} lack {len(missing)} weights, such as {missing[0]}"
            )
    frozen = not any(p.requires_grad for p in model.parameters())  # as beside an adapter
    if frozen or getattr(model.config, "quantization_config", None):
        raise UserError(f"the model {name} is quantized or frozen; give one in whole weights")
    if model.num_parameters() < 1e6:
        torch.set_num_threads(1)  # as in countdown_base()
    for module in model.modules():
        for key in vars(module):  # dropout and router noise have many names
            if isinstance(getattr(module, key), float) and re.search("drop|jitter|^p$", key):
                setattr(module, key, 0.0)
    model.to(device).eval()
    if kind is transformers.AutoModelForCausalLM:
        usual = model.generation_config  # its other settings may fail to save
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=usual.eos_token_id, pad_token_id=usual.pad_token_id
        )
        check_reading(model, name)
    return model, tokenizer


@torch.no_grad()
def check_reading(model, name):
    """Raises UserError unless the rollout, token by token, reads a text as one whole pass does.

    Recurrent layers keep a state and no keys and values; models that are not causal look ahead.
    """
    try:
        for response in rollout(model, [[4, 5, 6, 7, 8], [2, 3]], [0, 1], 4, []):
            stats, _ = token_stats(model, [response], temperature=1.0)
            gap = (stats.logprobs[0].cpu() - torch.tensor(response.logp)).abs().max()
            if gap > 0.01:
                raise ValueError(f"log-probs differ by {gap:.2g}")
    except (TypeError, AttributeError, LookupError, ValueError) as e:  # there is no such cache
        raise UserError(
            f"the model {name} cannot be read token by token ({first_line(e)}); take a causal"
            " language model whose layers keep keys and values, and no other state"
        )


def stop_tokens(model, tokenizer):
    """Sorted ids of all tokens that end a response: a model may have several."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
    if "<|im_end|>" in str(tokenizer.chat_template):  # Qwen's base models name another only
        ids.add(tokenizer.get_vocab().get("<|im_end|>"))
    return sorted(ids - {None})


def prompt_text(problem, tokenizer, cfg):
    """A problem's prompt (str): by the model's chat template, or the text alone where it has none.

    Raises UserError where the template does not take it, or is needed and absent.
    """
    messages = problem.messages or [{"role": "user", "content": problem.question}]
    instruction = problem.instruction if cfg.instruction is None else cfg.instruction
    if instruction:
        messages = [dict(message) for message in messages]
        asked = [m for m in messages if m["role"] == "user"] or messages
        asked[-1]["content"] += f"\n{instruction}"
    if cfg.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": cfg.system}, *messages]
    if not tokenizer.chat_template:
        if problem.messages or cfg.system:
            raise UserError(
                "chat messages and --system need a chat template, and the model's tokenizer has "
                'none: give problems as text, with --system "", or another model'
            )
        return messages[0]["content"]
    unfinished = ends_begun(messages)
    with explained(
        f"the model's chat template does not take the prompt {problem.question[:80]!r}",
        "change --system or the messages in the data",
    ):
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not unfinished,
            continue_final_message=unfinished,
        )


def encode_prompts(problems, model, tokenizer, cfg):
    """Those problems that fit, with the token ids of their prompts.

    Prompts over cfg.max_prompt_tokens are left out, and this is said. Raises UserError where none
    is left, or where prompt and response exceed the model's context.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    words = model.get_input_embeddings().num_embeddings
    for problem in problems:
        text = prompt_text(problem, tokenizer, cfg)
        bare = not tokenizer.chat_template  # a template writes the bos itself
        problem.prompt_ids = tokenizer(text, add_special_tokens=bare)["input_ids"]
        if max(problem.prompt_ids, default=words) >= words:
            raise UserError(
                f"the model has {words} tokens, and its tokenizer makes others, or none, of the "
                f"prompt {text[:80]!r}: do the two belong together?"
            )
    kept = [p for p in problems if len(p.prompt_ids) <= cfg.max_prompt_tokens]
    if not kept:
        raise UserError(f"no prompt is within --max-prompt-tokens {cfg.max_prompt_tokens}")
    if len(kept) < len(problems):
        say(
            f"left out: {len(problems) - len(kept)} of {len(problems)} problems, with prompts of "
            f"more than {cfg.max_prompt_tokens} tokens"
        )
    repeated = len(kept) - len({tuple(p.prompt_ids) for p in kept})
    if repeated:
        say(f"{repeated} of {len(kept)} problems have the prompt of another: does it hold them?")
    longest = max(len(p.prompt_ids) for p in kept)
    if longest + cfg.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and --max-new-tokens {cfg.max_new_tokens} exceed the "
            f"model's context of {limit}; lower --max-new-tokens or --max-prompt-tokens"
        )
    return kept


# --------------------------------------------------------------------------------------------------
# sampling


def seed_of(*parts):
    """The seed (int below 2**56) that follows from `parts`: run's seed, purpose, step, sample, ...

    >>> seed_of(0, "rollout", 1, 2, 3) == seed_of(0, "rollout", 1, 2, 3) != seed_of(0, "rollout")
    True
    """
    return int.from_bytes(hashlib.sha1(repr(parts).encode()).digest()[:7], "big")


def sampling_probs(logits, temperature, top_p=1.0):
    """What tokens are drawn from: (B, V) logits -> (B, V) float32 probabilities.

    top_p keeps the likeliest tokens up to that mass, the one that crosses it included.
    """
    logits = logits.float() / temperature
    if top_p < 1:
        logits = transformers.TopPLogitsWarper(top_p)(None, logits)
    return logits.softmax(-1)


def draw(logits, u, temperature, top_p):
    """A token a row: the one in whose interval of the cumulative distribution `u` lies.

    logits: (B, V); u: (B,) float64 in [0, 1). Returns tokens (B,) int64 and logp (B,) float32, of
    sampling_probs.
    """
    probs = sampling_probs(logits, temperature, top_p)
    cdf = probs.cumsum(-1, dtype=torch.float64)  # float32 would blur a vocabulary of 151,936
    tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # never where p = 0
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # beyond, where logits are not finite
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def padded(rows, device):
    """Lists of int or tensors as one (B, T) of their dtype, padded on the right with 0."""
    rows = [torch.as_tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True).to(device)


def padded_like(stats, responses, name):
    """The tensors of that name of responses as one (B, R), on the device of stats (B, R)."""
    return padded([getattr(response, name) for response in responses], stats.device)


def split(items, size):
    """
    >>> split([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [items[i : i + size] for i in range(0, len(items), size)]


def mask_by_row(*, kv_length, q_offset, mask_function, device, config, **_):
    """A mask of transformers, of whatever kind (causal, sliding), where rows differ in length.

    q_offset: (B,) int64, the column where each row's query stands. Returns (B, 1, 1, kv_length).
    """
    columns = torch.arange(kv_length, device=device)
    seen = mask_function(None, None, q_offset.view(-1, 1, 1, 1), columns)
    if config._attn_implementation == "eager":  # it adds the mask, the others take bool
        seen = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    return seen


class Rows(transformers.Cache):
    """The responses in the making, one a row, with their keys and values.

    A row never moves: each has its own length and writes its next key and value at its own column,
    and a row that has ended is filled again in place. So all steps have the same shapes, whatever
    the rows hold, and nothing in a step waits for the GPU.
    """

    is_compileable = True  # so that transformers builds every mask without a look at the GPU

    def __init__(self, size, columns, max_new_tokens, stop_ids, device):
        super().__init__(layers=[])
        self.kv = []  # of each layer keys and values, each (size, heads, columns, head_dim)
        self.columns = columns
        self.window = columns  # those that attention reads
        self.most = max_new_tokens
        self.stop_ids = stop_ids
        self.row = torch.arange(size, device=device)
        # the last token, which is read next; its column; how many tokens are drawn
        self.last, self.at, self.t = self.row.new_zeros(3, size)
        self.going = self.row < 0
        # one column to spare: rows that have ended draw on, and write beyond what they drew
        self.u = torch.zeros(size, max_new_tokens + 1, dtype=torch.float64, device=device)
        self.ids = self.u.long()
        self.logp = self.u.float()

    # what transformers asks of a cache

    def update(self, keys, values, layer_idx, *args, **kwargs):
        kept = self.kv[2 * layer_idx : 2 * layer_idx + 2]
        for x, new in zip(kept, (keys, values)):
            x[self.row, :, self.at] = new[:, :, 0].to(x.dtype)
        return [x[:, :, : self.window] for x in kept]

    def get_query_offset(self, layer_idx=0):
        return self.at

    def get_seq_length(self, layer_idx=0):
        return self.window - 1

    def get_mask_sizes(self, query_length, layer_idx):
        return self.window, 0

    def fill(self, model, rows, prompts, seeds):
        """Put a response to each of prompts, drawn from the seed beside it, into these rows."""
        device, numbers = self.row.device, {}  # of the prompts, each of which is read once
        number = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
        rows, number = torch.tensor([rows, number], device=device)
        ids = padded(numbers, device)
        cache = transformers.DynamicCache()
        model.base_model(ids, cache=cache, use_cache=True)
        read = []
        for layer in cache.layers:
            read += [layer.keys, layer.values]
        self.kv = self.kv or [self.room_for(x) for x in read]
        for kept, new in zip(self.kv, read):
            kept[rows, :, : ids.shape[1]] = new[number].to(kept.dtype)
        u = np.stack([np.random.default_rng(seed).random(self.most + 1) for seed in seeds])
        self.u[rows] = torch.from_numpy(u).to(device)
        # the first step reads the prompt's last token again; what pads left in later columns is
        # overwritten before a row sees it
        end = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.at[rows] = end
        self.last[rows] = ids[number, end]
        self.t[rows] = 0
        self.going[rows] = True

    def room_for(self, read):
        """Zeros for keys or values like those read of a layer: what is masked must be finite.

        In the dtype in which attention reads them: autocast's, where they come in float32.
        """
        dtype, kind = read.dtype, read.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        _, heads, _, head_dim = read.shape
        return read.new_zeros(len(self.row), heads, self.columns, head_dim, dtype=dtype)

    def set_window(self, steps):
        """Have attention read the columns that the next steps may use, and few more.

        There are few windows, so few shapes: a kernel may be prepared for each.
        """
        longest = int((self.at * self.going).max()) + steps + 1
        by = max(16, 2 ** (longest.bit_length() - 4))
        self.window = min(self.columns, -(-longest // by) * by)

    def step(self, model, temperature, top_p):
        """A token more for every row. Its shapes depend on the window alone."""
        ids, position_ids = self.last[:, None], self.at[:, None]
        kind = model.config._attn_implementation
        ALL_MASK_ATTENTION_FUNCTIONS[kind] = mask_by_row  # here only: all else has the usual ones
        try:
            out = model(ids, position_ids=position_ids, cache=self, use_cache=True)
        finally:
            del ALL_MASK_ATTENTION_FUNCTIONS[kind]
        u = self.u[self.row, self.t]
        token, self.logp[self.row, self.t] = draw(out.logits[:, -1], u, temperature, top_p)
        self.ids[self.row, self.t] = token
        self.last.copy_(token)
        self.at += self.going
        self.t += self.going
        self.going &= self.t < self.most
        for stop in self.stop_ids:
            self.going &= token != stop


@torch.inference_mode()
def rollout(
    model,
    prompts,
    seeds,
    max_new_tokens,
    stop_ids,
    *,
    temperature=1.0,
    top_p=1.0,
    rollout_tokens=2**16,
    title="",
):
    """[Response]: one to each of prompts, drawn from the seed beside it.

    prompts: lists of token ids. seeds: ints in [0, 2**63); a response follows from its own,
    whatever else is in the batch. rollout_tokens: most tokens in the KV cache, unused ones too.
    title: of the line of progress, "": none. Raises Stopped, and UserError at logits not finite.
    """
    model.eval()
    columns = max(map(len, prompts), default=0) + max_new_tokens
    size = max(1, min(rollout_tokens // columns, len(prompts)))
    batch = Rows(size, columns, max_new_tokens, stop_ids, model.device)
    pause = 1 + max_new_tokens // 64  # steps between two looks at which rows have ended
    owner = {}  # {row: the response that it is for}
    responses = [None] * len(prompts)
    begun = ended = tokens = 0
    started = time.time()
    while ended < len(prompts):
        if heard and WORLD_SIZE == 1:  # ranks stop after a step, together
            raise Stopped
        free = [row for row in range(size) if row not in owner]
        if begun < len(prompts) and 8 * len(free) >= size:
            for rows in split(free[: len(prompts) - begun], 1 + size // 2):
                end = begun + len(rows)
                batch.fill(model, rows, prompts[begun:end], seeds[begun:end])
                owner.update(zip(rows, range(begun, end)))
                begun = end
        batch.set_window(pause)
        before = batch.t.sum()
        for _ in range(pause):
            batch.step(model, temperature, top_p)
        tokens += batch.t.sum() - before
        if batch.logp.isnan().any():
            raise UserError(
                "the model's logits are not finite: start again with a lower --lr, or another model"
            )
        going = batch.going.tolist()
        done = [row for row in owner if not going[row]]
        drawn = (x[done].tolist() for x in (batch.t, batch.ids, batch.logp))
        for row, n, ids, logp in zip(done, *drawn):
            i = owner.pop(row)
            responses[i] = Response(prompts[i], ids[:n], logp[:n], ids[n - 1] in stop_ids)
        ended += len(done)
        if title and 8 * ended >= len(prompts):  # the first to end say little of the rest
            left = time_left(started, ended, len(prompts))
            rate = f"{tokens / (time.time() - started):,.0f} tokens/s"
            live(f"{title}: {ended}/{len(prompts)} responses, {rate}, {left} left")
    return responses


# --------------------------------------------------------------------------------------------------
# training pass


def micro_batches(responses, micro_tokens):
    """Cut responses into lists of like length, each within the budget of tokens, pads included.

    In none are more than a quarter pads.
    """
    cut, tokens = [], 0
    for response in sorted(responses, key=lambda r: len(r.prompt_ids) + len(r.ids)):
        longest = len(response.prompt_ids) + len(response.ids)
        tokens += longest
        with_pads = (len(cut[-1]) + 1) * longest if cut else math.inf
        if with_pads > micro_tokens or tokens < 0.75 * with_pads:
            cut.append([])
            tokens = longest
        cut[-1].append(response)
    return cut


def read_responses(model, responses):
    """(what model gives where each response token is predicted (B, R, ...), tokens, loss mask).

    model: of hidden states, logits or values. Tokens and mask are (B, R) int64 and bool; the mask
    is on the tokens of the response, its stop token included. It is one causal pass over prompt
    and response, padded on the right, where no token looks: so it needs no mask of attention, and
    a GPU may take its fastest kernel.
    """
    texts = padded([r.prompt_ids + r.ids[:-1] for r in responses], model.device)
    ids = padded([r.ids for r in responses], model.device)
    # where each token stands in its text, 0 for a pad (no prompt is empty): from lengths, not ids,
    # for pad may equal eos
    places = [torch.arange(len(r.ids)) + len(r.prompt_ids) for r in responses]
    places = padded(places, model.device)
    before = (places - 1).clamp(min=0)
    found = model(texts, use_cache=False)[0]
    return found.take_along_dim(before[..., None], dim=1), ids, places > 0


@torch.no_grad()
def linear_head(model):
    """The model's torch.nn.Linear from last hidden states to logits; None if it does more to them.

    Found once, by comparison, for soft-capping, scaling and adapters go by many names.
    """
    head = model.get_output_embeddings()
    if not hasattr(model, "head_is_linear"):
        ids = torch.arange(4, device=model.device)[None]
        with torch.autocast(model.device.type, enabled=False):
            hidden = model.base_model(ids, use_cache=False)[0]
            logits = model(ids, use_cache=False).logits
            model.head_is_linear = (
                type(head) is torch.nn.Linear
                and hidden.shape[-1] == head.in_features
                and torch.allclose(head(hidden), logits, rtol=1e-5, atol=1e-5)
            )
        if not model.head_is_linear:
            say("this model does more than a product to get its logits: they are held whole")
    return head if model.head_is_linear else None


def token_stats(model, responses, temperature):
    """(TokenStats, loss mask) of the tokens of responses: (B, R), (B, R), (B,) float32; (B, R)."""
    head = linear_head(model)
    if head is None:
        logits, ids, mask = read_responses(model, responses)
        stats = token_stats_from_logits(logits, ids, temperature=temperature, mask=mask)
        return stats, mask
    hidden, ids, mask = read_responses(model.base_model, responses)
    stats = linear_logprobs(
        hidden, head.weight, ids, bias=head.bias, temperature=temperature, mask=mask
    )
    return stats, mask


def critic_values(critic, responses):
    """(B, R) float32: what the critic expects to come before each response token."""
    values, _, _ = read_responses(critic, responses)
    return values[..., 0].float()


def autocast(run):
    """Where it is on, matrix products are in bf16; weights and log-probs stay in float32."""
    return torch.autocast(run.model.device.type, torch.bfloat16, enabled=run.cfg.bf16)


def prepare_training(model, cfg):
    """Checkpoint and compile the layers as cfg says. Raises UserError where that cannot be."""
    if cfg.gradient_checkpointing:
        with explained("--gradient-checkpointing", "leave it out"):
            model.activation_checkpointing_enable()
    for layer in model.modules() if cfg.compile else ():
        if isinstance(layer, transformers.modeling_layers.GradientCheckpointingLayer):
            layer.forward = torch.compile(layer.forward, dynamic=True)


@torch.no_grad()
def cache_tokens(run):
    """How many tokens of keys and values a GPU has room for; 2**16 on a CPU.

    Beside what is there, and what training adds: AdamW's moments, gradients, weights in bf16.
    """
    device = run.model.device
    if device.type == "cpu":
        return 2**16
    free, total = torch.cuda.mem_get_info(device)
    free -= (1 - run.cfg.gpu_memory_utilization) * total
    for model in run.trained:
        free -= (8 + 4 + 2) * model.num_parameters()
    cache = transformers.DynamicCache()
    run.model.base_model(torch.zeros(1, 1, dtype=torch.int64, device=device), cache=cache)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    return max(1, int(free / numbers / (2 if run.cfg.bf16 else 4)))


# --------------------------------------------------------------------------------------------------
# evaluation


def pass_at_k(n, c, k):
    """Unbiased Pass@k from n samples of which c are correct: 1 - C(n - c, k) / C(n, k).

    >>> pass_at_k(4, 1, 2)
    0.5

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n. arXiv:2107.03374 Eq. 1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)  # rounded once


def tally(correct, answers, ks=None):
    """{measure: value} of the responses to one problem: verdicts (bool), and answers (str or None).

    ks: the k of Pass@k; default 1, 2, 4, ... and n. Answers are the same if they are written so.

    >>> tally([True, True, False, False], ["1", " 1", "2", None], ks=[1])
    {'Pass@1': 0.5, 'maj@n': True, 'distinct': 2, 'distinct correct': 1, 'no box': 0.25}
    """
    n, c = len(correct), sum(correct)
    written = ["".join((answer or "").split()) for answer in answers]
    votes = collections.Counter(filter(None, written))
    ks = ks or sorted({2**i for i in range(n.bit_length())} | {n})
    measures = {f"Pass@{k}": pass_at_k(n, c, k) for k in ks}
    measures["maj@n"] = bool(votes) and correct[written.index(max(votes, key=votes.get))]
    measures["distinct"] = len(votes)
    measures["distinct correct"] = len({a for a, right in zip(written, correct) if a and right})
    measures["no box"] = answers.count(None) / n
    return measures


def sample_verified(model, tokenizer, problems, seeds, pattern="", **sampling):
    """[Response]: one to each of problems, drawn from the seed beside it; text, answer and verdict.

    pattern: cfg.answer_pattern. sampling: what rollout() takes.
    """
    prompts, stops = [p.prompt_ids for p in problems], stop_tokens(model, tokenizer)
    responses = rollout(model, prompts, seeds, stop_ids=stops, **sampling)
    texts = tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
    for response, problem, text in zip(responses, problems, texts):
        response.problem = problem
        response.text = text
        response.answer = extract_answer(text, pattern)
        response.correct = problem.verify(text, problem.answer, pattern)
    return responses


def sample(run, purpose, problems, n):
    """[Response]: n verified ones to each of this rank's share of problems, by run's settings."""
    cfg, asked, seeds = run.cfg, [], []
    # the size of a mini-batch divides by the ranks, so each has its share of every one
    for place in range(RANK, len(problems), WORLD_SIZE):
        asked += [problems[place]] * n
        seeds += [seed_of(cfg.seed, purpose, run.step, place, i) for i in range(n)]
    with autocast(run), torch.compiler.set_stance("force_eager"):  # --compile is for training
        return sample_verified(
            run.model,
            run.tokenizer,
            asked,
            seeds,
            pattern=cfg.answer_pattern,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            rollout_tokens=run.rollout_tokens,
            title=f"{purpose} after step {run.step} of {cfg.steps}",
        )


def evaluate(run):
    """Log and print Pass@k on held-out problems, if it is due at this step and not yet done."""
    cfg, step = run.cfg, run.step
    due = step in (0, cfg.steps) or cfg.eval_every and step % cfg.eval_every == 0
    if not due or step in evaluations(run.path / "metrics.jsonl"):
        return
    responses = sample(run, "evaluation", run.held_out, cfg.eval_samples)
    tallies = []
    for group in split(responses, cfg.eval_samples):
        tallies.append(tally([r.correct for r in group], [r.answer for r in group]))
    tallies = gather(tallies)
    row = {"step": step}
    for name in tallies[0]:
        row[name] = sum(t[name] for t in tallies) / len(tallies)
    log_metrics(run, row)
    say(f"step {step}: {listed(row)}")
    plot(run)


def listed(row):
    """
    >>> listed({"step": 0, "Pass@1": 0.25, "Pass@2": 0.5})
    'Pass@1 0.250, Pass@2 0.500'
    """
    return ", ".join(f"{name} {row[name]:.3f}" for name in row if name.startswith("Pass@"))


# --------------------------------------------------------------------------------------------------
# the run: its ranks, what it writes and prints, how it stops


@dataclass
class Run:
    """The state of a run: what a checkpoint holds (model, optimizer, step) and what it needs."""

    cfg: Config
    path: Path  # out/NAME
    problems: list  # of Problem, to train on
    held_out: list  # of Problem, to evaluate on
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer  # of the model's weights; in a second group, the critic's
    reference: torch.nn.Module = None  # the model before training, where something asks for its KL
    critic: torch.nn.Module = None  # of ppo
    rollout_tokens: int = 2**16  # what the KV cache may hold
    writer: object = None  # of TensorBoard's file
    lock: object = None  # while it is open no other process goes on with this run
    step: int = 0  # steps done
    warned: set = field(default_factory=set)

    @property
    def trained(self):
        """The models that learn."""
        return [self.model, self.critic] if self.critic else [self.model]


def on_first_rank(body):
    """What body() returns on rank 0, on every rank; torchrun ends the others where it raises."""
    values = [body()] if RANK == 0 else []
    return gather(values)[0]


def gather(values):
    """The lists of all ranks, one after the other."""
    lists = [values] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(lists, values)
    return sum(lists, [])


def sum_over_ranks(*numbers):
    """The sum of each number over all ranks."""
    return [sum(column) for column in zip(*gather([numbers]))]


class Stopped(Exception):
    """Ctrl-C or SIGTERM was heard, and the run is as after its last whole step."""


heard = []  # signals


def hear(signum, frame):
    """Note a signal; a second one like it ends the process at once."""
    heard.append(signum)
    signal.signal(signum, signal.SIG_DFL)


@contextlib.contextmanager
def explained(what, advice):
    """Turn an error in the block into one line for the user: WHAT (the error); ADVICE.

    Whatever its type: files, formats, the hub and programs of the user's raise dozens.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # these have lines of their own
        raise
    except (Exception, SystemExit) as e:
        raise UserError(f"{what} ({first_line(e)}); {advice}")


def first_line(error):
    """The beginning of an error's message, fit to stand inside a line of ours."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def time_left(started, done, total):
    """How long the rest takes at the pace since `started` (s), as text.

    >>> time_left(time.time() - 75.3, done=1, total=2)
    '0:01:15'
    """
    seconds = (time.time() - started) / done * (total - done)
    return str(datetime.timedelta(seconds=int(seconds)))


def say(text, end="\n"):
    """Print a line, on rank 0; on a terminal over what live() has left there."""
    if RANK == 0:
        start = "\r\033[K" if sys.stdout.isatty() else ""
        print(start + text, end=end, flush=True)


def live(text):
    """Show where a long phase stands: in place on a terminal, every half minute in a log."""
    terminal, now = sys.stdout.isatty(), time.time()
    if now - live.shown > (0.2 if terminal else 30):
        live.shown = now
        say(text, end="" if terminal else "\n")


live.shown = time.time()


def write_whole(path, content):
    """Write `content` (bytes) so that a reader finds all of it, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def lock(path):
    """A file that is this process's own while it is open. Raises UserError if it is another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work there, and holds {path}; wait for it to end")
    return file


@contextlib.contextmanager
def whole_directory(path):
    """Yields a new directory that becomes `path` once the block has ended well."""
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if not path.exists():  # else another process was faster
            os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def step_of(checkpoint):
    """After how many steps a checkpoint, such as step-00025, was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(path):
    """The checkpoints of the run in `path`, the newest last."""
    found = [file for file in path.glob("step-*") if re.fullmatch(r"step-\d+", file.name)]
    return sorted(found, key=step_of)


def config_of(name):
    """Config of a run, or of a checkpoint's run; None of none."""
    path = Path(name)
    if re.fullmatch(r"step-\d+", path.name):
        path = path.parent
    try:
        stored = json.loads((path / "config.json").read_text())
        return Config(**{knob.name: stored[knob.name] for knob in fields(Config)})
    except (OSError, ValueError, LookupError, TypeError):  # as where it is a model's
        return None


def collapsed_steps(run):
    """The steps (int) whose batch had less than a tenth of the best share correct before them.

    None where the best is but a few responses, of which there may be none by chance. One such step
    may be chance, too: warnings_of() waits for a second, sound_checkpoints() does not.
    """
    best, steps = 0.0, set()
    for row in read_log(run.path / "metrics.jsonl"):
        if "correct" in row:
            best = max(best, row["correct"])
            expected = best * run.cfg.prompts * run.cfg.group_size
            if expected > 20 and row["correct"] < best / 10:
                steps.add(row["step"])
    return steps


def sound_checkpoints(run):
    """The checkpoints of policies that have not collapsed, as far as it is known, oldest first."""
    collapsed = collapsed_steps(run)
    # the policy of step-00025 is the one that samples the batch of step 26
    collapsed |= {step - 1 for step in collapsed}
    return [path for path in checkpoints(run.path) if step_of(path) not in collapsed]


def prune_checkpoints(run):
    """Remove what is not to be kept, and what a kill has left unfinished."""
    if RANK:
        return
    kept = checkpoints(run.path)[-run.cfg.keep :] + sound_checkpoints(run)[-1:]
    for other in run.path.glob("step-*"):
        if other not in kept:
            shutil.rmtree(other)


def save_checkpoint(run):
    """Write out/NAME/step-00025: a model directory that loads anywhere, and the trainer's state.

    No generator's state is in it: the draws of a step follow from the seed and the step.
    """
    path = run.path / f"step-{run.step:05}"
    if RANK or path.exists():
        return
    state = {"step": run.step}
    for name in ("optimizer", "critic"):
        if part := getattr(run, name):
            state[name] = part.state_dict()
    advice = f"what was saved before is whole: make room, and go on with --resume {run.path}"
    with explained(f"cannot write {path}", advice), whole_directory(path) as unfinished:
        run.model.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
        torch.save(state, unfinished / "trainer.pt")
    plot(run)


def read_log(path):
    """The rows of a JSON Lines file, without a last line that was cut short by a kill."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if last:
        say(f"{path}: its last line was cut short, and is dropped")
    with explained(f"{path} is damaged", "mend it, or move it away"):
        return [dict(json.loads(line)) for line in lines]


def write_log(path, rows):
    """Write a JSON Lines file anew, whole."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_log(path, *rows):
    """Add rows (dicts) to a JSON Lines file; rank 0 does."""
    if RANK == 0:
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def log_metrics(run, row):
    """Add a row to the run's metrics.jsonl, and to TensorBoard's file if cfg says so."""
    append_log(run.path / "metrics.jsonl", row)
    if run.cfg.tensorboard and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter

        # steps that a resumed run takes again are not shown twice
        run.writer = run.writer or SummaryWriter(run.path, purge_step=row["step"])
        for name, value in row.items():
            if value is not None:
                run.writer.add_scalar(name, value, row["step"])
        run.writer.flush()


def evaluations(log):
    """{step: row} of a run's metrics.jsonl, without the rows of training steps."""
    return {row["step"]: row for row in read_log(log) if "Pass@1" in row}


def log_step(run, responses, metrics):
    """Log a step and two of its responses; say once what keeps the run from learning."""
    log_metrics(run, metrics)
    samples = {}
    for r in responses:
        samples[r.correct] = {
            "step": run.step,
            "correct": r.correct,
            "question": r.problem.question,
            "answer": r.problem.answer,
            "response": r.text,
            "confidence": r.confidence.item(),
        }
    append_log(run.path / "samples.jsonl", *samples.values())
    for name, text in warnings_of(run, metrics, responses[-1]):
        if name not in run.warned:
            run.warned.add(name)
            say(f"warning, step {run.step}: {text}")


def warnings_of(run, m, last):
    """Yields (name, text) of each thing that keeps a run from learning.

    m: metrics of a step (dict). last: one of its responses.
    """
    low = collapsed_steps(run)
    if run.step in low and run.step - 1 in low:  # one batch may be hard by chance
        text = (
            f"the policy has collapsed: {m['correct']:.1%} correct, entropy {m['entropy']:.3f}; "
            "start anew with a lower --lr"
        )
        for sound in sound_checkpoints(run)[-1:]:
            text += f", or from before it, with --model {sound}"
        yield "collapsed", text
    if m["truncated"] > 0.5 and run.step not in low:
        yield (
            "cut",
            "most responses are cut at --max-new-tokens, often before their answer: raise it",
        )
    if m["boxed"] == 0 and not run.cfg.verifier:
        place = run.cfg.answer_pattern or r"\boxed{}"
        yield (
            "box",
            f"no response has an answer in {place}, so all count as incorrect: does the model "
            "know this form of prompt, and is --max-new-tokens enough?",
        )
    elif m["correct"] == 0:
        yield (
            "wrong",
            f"all responses are incorrect; one ends {last.text[-80:]!r} where the answer is "
            f"{last.problem.answer!r}",
        )
    if m["grad_norm"] == 0:
        yield (
            "idle",
            f"the gradient is exactly 0: {run.cfg.method} has nothing to learn from a batch with "
            f"{m['correct']:.0%} correct responses, or the loss does not reach the weights",
        )
    if m["rollout_gap"] > 0.1:
        yield "gap", f"log-probs of rollout and training pass differ by {m['rollout_gap']:.2f}"


def print_step(m, left, header):
    """A step's metrics (dict) as one line for a person; logp+ and logp-: of correct, incorrect."""
    if header:
        say(
            "   step    correct  length  cut  entropy  logp+  logp-   lam  beta   grad  clip   "
            "tokens/s rollout update memory     left"
        )
    step = f"{m['step']:>5}/{m['steps']:<5}"
    right, wrong, lam, beta = (
        "-" if m[name] is None else f"{m[name]:.2f}"
        for name in ("logp_correct", "logp_incorrect", "lam", "beta")
    )
    say(
        f"{step} {m['correct']:6.1%} {m['length']:7.1f} {m['truncated']:4.0%} "
        f"{m['entropy']:8.3f} {right:>6} {wrong:>6} {lam:>5} {beta:>5} "
        f"{m['grad_norm']:6.3f} {m['clip_frac']:5.1%} "
        f"{m['tokens'] / m['rollout_s']:10,.0f} {m['rollout_s']:6.2f}s {m['update_s']:5.2f}s "
        f"{m['memory_gb']:4.1f}GB {left:>8}"
    )


def plot(run):
    """Draw metrics.jsonl as curves.png."""
    if RANK:
        return
    from matplotlib.figure import Figure  # slow to import

    log = run.path / "metrics.jsonl"
    steps = [row for row in read_log(log) if "correct" in row]
    names = "correct entropy length logp_correct logp_incorrect lam beta".split()
    figure = Figure(figsize=(14, 6), layout="constrained")
    *panels, last = figure.subplots(2, 4).flat
    for axis, name in zip(panels, names):
        values = np.array([row[name] for row in steps], float)  # None becomes nan
        axis.plot([row["step"] for row in steps], values)
        axis.set(title=name, xlabel="step")
    for step, row in evaluations(log).items():
        ks = [int(name.removeprefix("Pass@")) for name in row if name.startswith("Pass@")]
        scores = [row[f"Pass@{k}"] for k in ks]
        last.semilogx(ks, scores, ".-", base=2, label=f"step {step}")
        last.legend()
    last.set(title="Pass@k", xlabel="k")
    figure.suptitle(f"{run.path.name}: {run.cfg.method} on {run.cfg.data}")
    figure.savefig(run.path / "curves.png")


def peak_memory(device):
    """Peak memory in GB: of the GPU if the run is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --------------------------------------------------------------------------------------------------
# main


def flag_parser(description):
    """An ArgumentParser that raises UserError."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def error(message):
        raise UserError(f"{message}; see --help")

    parser.error = error
    return parser


def add_flags(parser, settings, names=None):
    """Add the flags of the fields of a dataclass; the parser's result has those that are given.

    names: the fields to take; None: all. One that is a list takes several values.
    """
    source = inspect.getsource(settings)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for knob in fields(settings):
        if names and knob.name not in names:
            continue
        text = comments[knob.name]
        if knob.default not in ("", None, False):
            text += f" [{knob.default}]"
        flag = f"--{knob.name.replace('_', '-')}"
        if len(knob.name) == 1:
            flag = f"-{knob.name}"
        kind = {"type": knob.type, "choices": CHOICES.get(knob.name)}
        if knob.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        items = get_args(knob.type)
        if items:
            kind = {"type": items[0], "nargs": "+"}
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **kind)


def parse_flags(argv):
    """The flags that were given, {field of Config: value}. Raises UserError."""
    parser = flag_parser(__doc__)
    add_flags(parser, Config)
    return vars(parser.parse_args(argv))


def pick_device(name):
    """torch.device of that name, or the best that there is. Raises UserError."""
    with explained(f"--device {name}", "give another, or leave the flag out"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("this torch finds no GPU")
            if WORLD_SIZE > 1 or device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)  # kernels are launched on the current one
            torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares a plan for every shape
        torch.zeros(1, device=device).item()  # raises on meta, which has no memory
    return device


def new_directory(cfg):
    """out/NAME of a new run: the name asked for, or the first free METHOD-1, METHOD-2, ..."""
    for i in itertools.count(1):
        path = Path("out", cfg.name or f"{cfg.method}-{i}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            if cfg.name:  # another process was faster
                raise UserError(f"--name {cfg.name}: {path} exists; choose another")


def settings(given):
    """Config of the flags `given`, of a new run or of one to go on with: then resume is its path.

    Raises UserError where there is no run to go on with, or the flags would make it another.
    """
    if "resume" not in given:
        cfg = resolve(given)
        path = Path("out", cfg.name)
        if "/" in cfg.name or cfg.name in (".", ".."):
            raise UserError(f"--name {cfg.name}: not a plain name for a directory in out/")
        if cfg.name and path.exists():
            raise UserError(
                f"--name {cfg.name}: {path} exists; choose another, or go on with that run: "
                f"--resume {path}"
            )
        return cfg
    path = Path(given["resume"])
    saved = checkpoints(path.parent)
    if path in saved[:-1]:
        raise UserError(
            f"--resume {path}: a run goes on from its newest checkpoint: --resume {path.parent}"
        )
    if path in saved:
        path = path.parent
    cfg = config_of(path)
    if not cfg:
        raise UserError(f"--resume {path}: no run to go on with: no sound config.json of one there")
    given["resume"] = str(path)
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in RESUMABLE.split() and value != getattr(cfg, name):
            raise UserError(
                f"--resume {path}: that run has {flag} {getattr(cfg, name)!r}; leave the flag out, "
                "or start a new run"
            )
        setattr(cfg, name, value)
    check(cfg)
    return cfg


def make_optimizer(run):
    """cfg.optimizer of the weights that learn, a group for each model. Raises UserError."""
    cfg, options = run.cfg, {}
    if cfg.optimizer == "torch.optim.AdamW" and run.model.device.type == "cuda":
        options["fused"] = True  # else it makes temporaries of the model's size
    groups = [{"params": m.parameters(), "critic": m is run.critic} for m in run.trained]
    with explained(f"--optimizer {cfg.optimizer}", "give a class, such as torch.optim.AdamW"):
        optimizer = pkgutil.resolve_name(cfg.optimizer)(groups, lr=cfg.lr, **options)
        if not isinstance(optimizer, torch.optim.Optimizer):  # its state could not be saved
            raise TypeError("it makes no torch.optim.Optimizer")
    return optimizer


def build_run(cfg, name):
    """A Run with the model `name`, and what cfg asks for beside it; without problems and directory.

    Raises UserError.
    """
    device = pick_device(cfg.device)
    model, tokenizer = load_model(name, device, shape_only=cfg.dry_run)
    run = Run(
        cfg,
        path=None,
        problems=[],
        held_out=[],
        model=model,
        tokenizer=tokenizer,
        optimizer=None,
    )
    if cfg.kl_coef:
        reference, _ = load_model(cfg.model, device, shape_only=cfg.dry_run)
        run.reference = reference.requires_grad_(False)
    if cfg.method == "ppo":  # the model's own layers, with a new head of one number a token
        torch.manual_seed(cfg.seed)
        kind = transformers.AutoModelForTokenClassification
        run.critic, _ = load_model(cfg.model, device, kind, cfg.dry_run, num_labels=1)
    run.optimizer = make_optimizer(run)
    for part in run.trained:
        prepare_training(part, cfg)
    run.rollout_tokens = cfg.rollout_tokens or cache_tokens(run)
    return run


def dry_run(cfg):
    """Say what two steps at full size cost, by random weights on made-up prompts of 150 tokens."""
    cfg.steps, rng = 2, random.Random(0)
    run = build_run(cfg, cfg.model)
    for _ in range(cfg.prompts):
        problem = Problem("", "", "", lambda *_: rng.random() < 0.5)
        problem.prompt_ids = rng.choices(range(1, 19), k=min(150, cfg.max_prompt_tokens))
        run.problems.append(problem)
    say(
        f"dry run of {cfg.model}'s shape on {run.model.device}: responses are as long as they may "
        f"be; KV cache of {run.rollout_tokens:,} tokens"
    )
    while run.step < cfg.steps:
        _, m = take_step(run)
        say(
            f"step {run.step}: rollout {m['rollout_s']:.1f} s "
            f"({m['tokens'] / m['rollout_s']:,.0f} tokens/s), score {m['score_s']:.1f} s, "
            f"update {m['update_s']:.1f} s; peak memory {m['memory_gb']:.1f} GB"
        )


def restore(run, checkpoint):
    """Set the trainer's state as a checkpoint has it. Raises UserError where that fails."""
    advice = f"if it is damaged put a copy back; else start a new run, with --model {checkpoint}"
    with explained(f"cannot go on from {checkpoint}", advice):
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        run.step = state.pop("step")
        for name, part in state.items():
            getattr(run, name).load_state_dict(part)
    if run.step > run.cfg.steps:
        raise UserError(f"--steps {run.cfg.steps}: that run has done {run.step} already")


def open_run(cfg):
    """The Run of these settings, new or to go on with. Raises UserError."""
    Path("out").mkdir(exist_ok=True)  # where that fails, before any work is done
    saved, held = [], None
    if cfg.resume:
        if RANK == 0:  # before its checkpoints are looked at
            held = lock(Path(cfg.resume, "run.lock"))
        saved = checkpoints(Path(cfg.resume))
        if not saved:
            say(f"{cfg.resume} has no checkpoint: the run begins again")
    name = saved[-1] if saved else cfg.model
    model_config(name)  # before data is downloaded
    problems, held_out = load_problems(cfg)
    if len(problems) < cfg.prompts or not held_out:
        raise UserError(
            f"{cfg.data} has {len(problems)} problems to train on and {len(held_out)} to hold out: "
            f"too few for --prompts {cfg.prompts}; or --eval-data has all"
        )
    say_unread(problems + held_out)
    texts = [(p.question, p.answer) for p in problems + held_out]
    sha1 = hashlib.sha1(repr(texts).encode()).hexdigest()
    begun = json.loads(Path(cfg.resume, "config.json").read_text()) if cfg.resume else {}
    if begun.get("problems_sha1", sha1) != sha1:
        raise UserError(
            f"{cfg.data} no longer holds the problems that the run began with; put them back, or "
            "start a new run"
        )
    run = build_run(cfg, name)
    run.problems = encode_prompts(problems, run.model, run.tokenizer, cfg)
    run.held_out = encode_prompts(held_out[: cfg.eval_problems], run.model, run.tokenizer, cfg)
    if saved:
        restore(run, saved[-1])

    def begin():
        """A new directory; or that of the run, its logs without what came after the checkpoint."""
        if not cfg.resume:
            cfg.resume = str(new_directory(cfg))
        path = Path(cfg.resume)
        run.lock = held or lock(path / "run.lock")
        for log in (path / "metrics.jsonl", path / "samples.jsonl"):
            write_log(log, [row for row in read_log(log) if row["step"] <= run.step])
        versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
        content = json.dumps(asdict(cfg) | versions | {"problems_sha1": sha1}, indent=1)
        write_whole(path / "config.json", content.encode())
        return path

    run.path = on_first_rank(begin)
    return run


def command(body):
    """Run body() as a shell command: its exit status, 130 when stopped, 2 after a user's error."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
    try:
        return body()
    except (UserError, OSError) as e:  # the latter: no space, no permission, a name too long
        message = str(e)
    except torch.OutOfMemoryError:
        message = (
            "out of memory; lower --micro-tokens or --rollout-tokens (a run that has begun goes on "
            "with --resume)"
        )
    except RuntimeError as e:
        if WORLD_SIZE == 1 or not (isinstance(e, torch.distributed.DistError) or "gloo" in str(e)):
            raise
        message = (
            f"rank {RANK} lost the others ({first_line(e)}); what is saved is sound: go on "
            "with --resume"
        )
    except KeyboardInterrupt:
        print("\nstopped; nothing is lost that was saved", file=sys.stderr)
        return 130
    # each rank says its own: it may be the only one that has one
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def describe(run):
    """Say what a run is about to do, and what the model will read first."""
    cfg = run.cfg
    say(
        f"{cfg.method}, preset {cfg.preset}: {cfg.steps} steps of {cfg.prompts} x "
        f"{cfg.group_size} responses: {cfg.model} ({run.model.num_parameters():,} parameters, "
        f"{run.model.device}) on {cfg.data} ({len(run.problems):,} problems), into {run.path}"
    )
    prompt = run.tokenizer.decode(run.problems[0].prompt_ids)
    form = "in the model's chat template" if run.tokenizer.chat_template else "as plain text"
    say(f"prompts are put {form}; the first, with special tokens: {prompt!r}")


def main():
    """`python nsr.py`: 0 when trained, 130 where it is stopped: the run is then saved."""
    given = parse_flags(sys.argv[1:])
    cfg = settings(given)  # errors before the ranks wait for each other
    if WORLD_SIZE > 1:
        if "MASTER_ADDR" not in os.environ:
            raise UserError("WORLD_SIZE is set, MASTER_ADDR is not: start with torchrun")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend)
    if cfg.dry_run:
        dry_run(cfg)
        return 0
    run = open_run(cfg)
    describe(run)
    for s in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(s) != signal.SIG_IGN:  # as under nohup
            signal.signal(s, hear)
    try:
        train(run)
    except Stopped:
        save_checkpoint(run)
        prune_checkpoints(run)
        say(
            f"stopped after step {run.step} of {cfg.steps}, which is saved; --resume {run.path} "
            "goes on from there"
        )
        return 130
    except BaseException:
        if run.step == 0 and "resume" not in given:  # the same command may be given again
            shutil.rmtree(run.path, ignore_errors=True)
        else:
            say(f"an error after step {run.step}; --resume {run.path} goes on from what was saved")
        raise
    if WORLD_SIZE > 1:  # else a rank that ends while another still listens is aborted
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    say(
        f"\nOn {len(run.held_out)} held-out problems, {cfg.eval_samples} responses to each, at "
        f"temperature {cfg.temperature:g}:"
    )
    rows = evaluations(run.path / "metrics.jsonl")
    for name, step in (("base", 0), (cfg.method, cfg.steps)):
        if step in rows:  # a log may have lost step 0
            say(f"{name:12}{listed(rows[step])}")
    say(
        f"\nIn {run.path}: curves.png, metrics.jsonl, samples.jsonl, config.json, and the model in "
        f"step-{cfg.steps:05}"
    )
    return 0


# --------------------------------------------------------------------------------------------------
# verification: how an answer is checked
#
# extract the last box; rewrite its text and read that into tokens; parse them into a tree; compare
# the tree with that of the gold answer: rational expressions modulo a prime, others by their values
# at fixed points, sets of reals by their members, all else by structure. Nothing is executed, and
# all is bounded.

MAX_CHARS = 500  # of an answer
MAX_SCAN = 50_000  # characters before and after the last box that are looked at
MAX_ITEMS = 32  # of a list whose items are compared each with each
PRIME = 60125655007602874511562706186750756763  # 2q + 1, q prime: 2, 4, 8 ... first repeat at 2^q
_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([+-]?\d+(?:\.\d+)?|[A-Za-z]))"
    r"|\\[\\{}](*SKIP)(*FAIL)|[{}]"  # \\, \{ and \} open and close nothing
)


def extract_answer(response, pattern=""):
    r"""What the last closed \boxed{...} or \fbox{...} of a response (str) holds, or None.

    pattern: a regex instead, whose last match's first group it is. Raises UserError where that
    takes more than a second.

    >>> extract_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("Answer: 1. No. Answer: 2.", r"Answer: (\d+)")
    '2'
    """
    text = response if isinstance(response, str) else ""
    answer, opened = None, []
    if pattern:
        try:
            for m in re.finditer(pattern, text, timeout=1):
                answer = m[1]
        except TimeoutError:
            raise UserError(f"--answer-pattern {pattern}: takes too long on {text!r}")
        return answer
    last = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"), 0)
    for m in _BOX.finditer(text, max(0, last - MAX_SCAN), last + MAX_SCAN):
        if m[2]:
            answer = m[2]
        elif m[0] != "}":
            opened.append(m)
        elif opened:
            start = opened.pop()
            if start[1]:
                answer = text[start.end() : m.start()].strip()
    return answer


# ---- rewrite: one spelling for what is written in many ways

_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_GAP = r"(?:\\[,!;:]|~|\s)*+"
# fmt: off
_REWRITES = {re.compile(pattern): new for pattern, new in {
    r"\s+": " ",
    r"^ | $": "",
    # Unicode: NFKC makes 2 of ², and 1⁄2 of ½, whose slash must be the only one
    "[º˚∘]": "°",
    "ℝ": r"\\R ",
    "[⁰¹²³⁴-⁹⁻⁺]+": r"^{\g<0>}",
    "[₀-₉]+": r"_{\g<0>}",
    "⁄": "/",
    "[¼-¾⅐-⅞]": r"\\frac{\g<0>}",
    "[Α-ω]": lambda m: rf"\{unicodedata.name(m[0], 'x').split()[-1].lower()} ",
    r"^(?!\p{ASCII}*$).*": lambda m: unicodedata.normalize("NFKC", m[0]),
    rf"^(.{{{2 * MAX_CHARS}}}).*": r"\1",  # cut again: NFKC makes 18 letters of ﷺ
    r"(?<=\d)⁄": "}{",
    # a matrix is a tuple of rows: \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, (1 & 2, 3 & 4)
    r"(?<!\\)[,.;]\s*(?=\\\\|\\end)|(?:\\\\)+(?:\[[\w.\s]+\])?\s*(?=\\end)": "",  # 4 \\ \end
    r"(?:\\\\)+\s*+(?:\[[\w.\s]+\])?": " , ",  # \\[2pt]
    r"\\left\s*\\\{(?=\s*\\begin)|\\right\s*\.": "",  # \left\{\begin{array}
    r"\\(?:left|right|middle|[bB]igg?[lr]?)(?![A-Za-z])": "",  # \left(
    r"&\s*(?==)": "",  # x &= 3
    r"(?:(?<!\\),\s*)?&\s*(?:\\text\s*\{\s*(?:if|for)\s*\}\s*&?)?": "&",  # x, & \text{if} & x > 0
    # sets, and families of numbers
    r"[,\s]*(?:\\text\s*\{[\s,]*)?\b(?:where|for all)\b.*$": "",  # where k is an integer
    r"(?<=[^\s$])[,(\s]*+(?:\\mid|[|:])?\s*\b[a-z]\s*\\in\s*(?:\\mathbb\s*)?\{?Z\}?+"
     r"(?!\s*[\^_])\s*\)?": "",  # (k \in Z)
    r"(?i:no\s+(?:real\s+)?solutions?|empty\s+set)": "∅",  # no real solutions
    r"\\mathbb\s*(?:\{R\}|R\b)|\\R\b": "ℝ",  # \mathbb{R}
    r"\b(?i:(?:(?:all|the)\s+)*+(?:reals|real\s+numbers?))\b": "ℝ",  # all real numbers
    r"\\\{\s*[A-Za-z]\s*(?:\\in\s*ℝ\s*)?(?:\\mid|\\vert|\\colon|[|:])": "⦃",  # \{x : x > 2\}
    r"([)\]}]\s*)U(?=\s*[(\[\\])": r"\1∪",  # (1, 2) U (3, 4)
    # spaces, and those in numbers
    r"\\\s": " ",  # 5\ \text{cm}
    r"\\(?:[hv]space|(?:text)?color)\*?\s*\{\w*\}": "",  # \color{red}
    rf"(?<=\d){_GAP}(?:\{{\s*\\?,\s*\}}|\\text\{{,\}}|,(?=\s*\\!))?{_GAP}(?=\d{{3}}(?![\d/]))":
     "",  # 1 000, 1{,}000, 1,\!000
    r"(?<![\d.,])([1-9]\d{0,2}),(\d{3})(?:,(\d{3}))?(?:,(\d{3}))?(?![\d,])"
     r"(?![^(\[⦃{]*[)\]⦄}])": r"\1\2\3\4",  # 1,000,000, but not (1,000)
    r"\\begin\s*\{(?!v)\w+\*?\}(?:\s*\{[clr|\s]*\})?": "(",  # \begin{array}{cc}; vmatrix is none
    r"\\end\s*\{\w+\*?\}": ")",  # \end{array}
    r"\[\s*-?\s*(?:\\infty|∞)|(?:\\infty|∞)\s*\]": "?",  # [-\infty, 0) is no interval
    # words: \text{cm} becomes "cm" in quotes, and so do units that stand bare
    '"': "",  # 5"
    r"(?<=[a-z]{2})'s\b": "s",  # Newton's
    r"\\(?:text\w*|[mh]box|mathrm|operatorname)\s*\{((?:[^{}]|\^\{-?\d\})*)\}":
     lambda m: re.sub(r"(?<!\\)\b[A-Za-z]+", r'"\g<0>"', m[1]),  # \text{two lines}
    '"([ie])"': r"\1",  # \mathrm{i}
    r'\\mu\s*"': '"micro',  # \mu\mathrm{m}
    r"(?:\\\$|\bUSD\b)\s*([\d.,]*\d)": r'\1"dollar"',  # \$2.50
    r'(?<=\d)\s*\(\s*"?([a-z]{2,})"?\.?\s*\)': r'"\1"',  # 9 (quarters)
    r'(?<=[\di] |\\[;,])(?:m|\\Omega)(?=[\^{23}]*[\s$.]*$)': r'"\g<0>"',  # 12 m^2
    r'("hours?"|"feet"|"dollars")\s*"and"': r"\1",  # 2 hours and 30 minutes
    r'"?\b([apAP])"?\.\s?"?[mM]\b"?\.?': r'"\1m"',  # a.m.
    r'(?<![\\A-Za-z"])(?:[ckm]m|[km]g|ml|ft|lb|in|hr|mi|oz|yd|sq|no|[ap]m|[AP]M)(?![A-Za-z"])':
     r'"\g<0>"',  # 5 cm
    r'^\s*(?:"[A-Za-z]+"\s*+|[A-Z]?[a-z]{2,}+\s*+)++:': "",  # Vertex: (1, 2)
    r'\\[dt]?frac\s*\{\s*("\w+")\s*\}\s*\{\s*("\w+")\s*\}': r"\1/\2",  # \frac{m}{s}
    r'(?<=")\s*(?:/\s*"?|(?:[-·⋅]|\\cdot)\s*")([A-Za-z]+)\b"?': r'"\1"',  # km/h, N·m
    r'(?<=")[\s$.]*\^\s*\{?(-?\d)\}?': r'"^\1"',  # cm^2, s^{-1}
    r"(?:\||\\[lr]?vert\b|\\mid\b)(.*?)(?:\||\\[lr]?vert\b|\\mid\b)": r"\\abs(\1)",  # |x|
    # numbers
    r'(?<=\d)\s*\^?\s*(\{)?\s*"?(?:st|nd|rd|th)\b"?\s*(?(1)\})': "",  # 11^{th}
    r'(?:\^\s*(\{)?\s*(?:\\circ|°|"?o\b"?)\s*(?(1)\})|\\circ|°|\\?"?\bdegrees?\b"?)'
     r"(?:\s*[CF]\b)?": "°",  # 90^{\circ}, 90 degrees, 20 °C
    r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?": r"\\overline{\1\2\3}",  # 0.\dot3\dot6
    r"(\d*\.(\d*))\\(?:overline|bar|dot)\s*\{?(\d+)\}?":
     lambda m: f"(0{m[1]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})",  # 0.1\overline{6}
    rf"(?<![\d.^_])(?P<n>\d+)(?:{_GAP}(\{{)?\\[dtc]?frac\s*"
     r"(?:\{\s*(?P<a>\d+)\s*\}|(?P<a>\d))\s*(?:\{\s*(?P<b>[1-9]\d*)\s*\}|(?P<b>[1-9])(?!\d))"
     r"(?(2)\})|\s+(?P<a>\d+)/(?P<b>[1-9]\d*))": r"(\g<n>+\g<a>/\g<b>)",  # 3\frac18, 3 1/8
    r"(?:\\?sqrt|√)\s*\[([^\[\]]*)\]": r"√_{\1}",  # \sqrt[3]{x}
    r"\\[dtc]?(frac|binom)\s*(\d?)\s*(\d?)": r"\\\1 \2 \3 ",  # \dfrac12
    r"\\?\b(sin|cos|tan)\s*\^\s*(?:\{\s*-\s*1\s*\}|-1)": r"\\arc\1 ",  # \tan^{-1} 2
    r"(\d+)°\s*(\d+)(?:'|\^\s*\{?\\prime\s*\}?)(?:\s*(\d+)(?:''|\^\s*\{?(?:\\prime\s*)+\}?))?":
     r"(\1+\2/60+0\3/3600)°",  # 63° 45' 12''
    r"\bC\((\d+),\s*(\d+)\)": r"\\binom{\1}{\2}",  # C(10, 3)
    r"(?<![\\\w])[A-Z](?:_\{?\w+\}?|')?\s*(?=\([^()]*,[^()]*\)(?!\s*=))": "",  # P(1, 2)
    r"\+\s*(?=\\infty|∞)": "",  # +\infty
    # separators that separate nothing
    r"^\*\*(.*)\*\*$": r"\1",  # **73**
    r'"?\b[aA]\b"?\s+(?="?(?!sin|cos|tan|log)[a-z]{3})': '"a"',  # a circle
    r"^\]": "(",  # ]0, 1[
    r"\[$": ")",  # [0, 1[
    r"(?<=[\d)}])or(?=[A-Z(\\\d])": " or ",  # W=1orW=-1
    r'(?<![\s,;])(?:[,;]|\\[,;\s]|\s)++(?="?(?:and|or)\b)': " ",  # 1, 2, and 3
    r"^(?:[\s,=≈$]|\\approx)+": "",  # \approx 5
    r"(?<![\s,;:$\\])(?:[\s,;:$\\]|(?<!\.)\.(?!\.))++$": "",  # 5. but not 5...
    r"^(?:\[|(\())(((?:[^()\[\]=]|\([^()=]*\))*+)(?:=(?3)){2,})(?(1)\)|\])$":
     r"\2",  # [x = 1, y = 2]
    rf'(?i)(?:(?<=(?:_\s*\{{?|\bbase"?)\s*)|^(?="?[a-z]+"?$))"?({"|".join(_NUMERALS)})(?![a-z])"?':
     lambda m: str(_NUMERALS.index(m[1].lower())),  # seven, 204_{five}
    r'(\()?((?=["A-F]*\d)["\dA-F]++(?:\.\d+)?)(?(1)\))(?:\\[,!;:]|\s)*'
     r'(?|_\s*"?([^\W_]+)"?|_\s*\{[^{}]*?([^\W_]+)[^\w{}]*\}|\(?\s*"?base\b"?\s*"?(\w+)"?\s*\)?)':
     r"\2_\3 ",  # 204_{5}, 204 (base 5)
    r"(?:^|=)\s*\[[^\[\],;&=<>≤≥≠]*\]$": r"\g<0>?",  # [7] is no 7
}.items()}
# fmt: on

# ---- read: tokens are signs (str) and leaves: ("num", value), ("sym", name), ("word", text)

_SPELLINGS = {}
for _line in r"""~ \displaystyle \overline \underline \overrightarrow \vec \hat \boxed \text \textbf
    ~ \mathrm \mathbf \mathit \mathsf \boldsymbol \bm \bf \rm \emph \angle \triangle \quad \qquad
    ~ \! \, \; \: \> \( \) \[ \] \$ \% \# \& $ % # ' ` . \ € £
    ~ percent percentage the there are answer is of option choice if
    * \cdot \times × · ⋅ ∙
    / \div
    - − – —
    ^ **
    , ; ∧ \land and
    < \lt
    > \gt
    ≤ \le \leq \leqslant <=
    ≥ \ge \geq \geqslant >=
    ≠ \ne \neq !=
    ≈ \approx
    = \in \equiv
    \mod \pmod \bmod
    .. \ldots \dots \cdots ...
    : \colon {:} to
    ÷ \over
    ∁ \choose
    ± \pm +-
    ∓ \mp
    √ \sqrt sqrt
    ∪ \cup \bigcup union
    ∩ \cap
    ∖ \setminus \backslash
    ∨ \lor or
    ⦃ \{ \lbrace
    ⦄ \} \rbrace
    (-∞,∞) ℝ
    ⦃⦄ \emptyset \varnothing ∅
    ( \langle ⟨
    ) \rangle ⟩ \rfloor ⌋ \rceil ⌉
    asin \arcsin arcsin
    acos \arccos arccos
    atan \arctan arctan
    \floor( \lfloor ⌊
    \ceil( \lceil ⌈
    π \pi pi
    ∞ \infty infinity inf
    *100 hundred
    *1000 thousand
    *1000000 million
    *1000000000 billion
    \tan tg \tg
    \cot ctg \ctg
    \log lg \lg
    "am" a.m.
    "pm" p.m.
    "^2" square sq
    "^3" cubic
    "mm" millimeters millimeter
    "cm" centimeters centimeter
    "m" meters meter metres metre
    "km" kilometers kilometer
    "g" grams gram
    "kg" kilograms kilogram
    "inch" inches in
    "foot" feet ft
    "yard" yards yd
    "mile" miles mi
    "s" seconds second sec
    "minute" minutes min
    "h" hours hour hr
    "day" days
    "week" weeks
    "month" months
    "year" years
    "cent" cents ¢
    "dollar" dollars
    "angstrom" \aa""".splitlines():  # ~ is a space, and so says nothing
    _sign, *_others = _line.split()
    _SPELLINGS |= dict.fromkeys(_others, _sign)
_NO_UNITS = {*"squared cubed plus minus over through half halves thirds not wrong".split()}
_UNITS = {("word", sign.strip('"')) for sign in _SPELLINGS.values() if '"' in sign}
_TOKEN = re.compile(
    r"""
    (?P<name>(?=["A-F]*\d)["\dA-F]++(?:\.\d+)?_[^\W_]+    # 204_5
        |[fghFGHPW]\(\w+\)|[A-Za-z]\((?:[\w=",\s]|\(\w+\))+\)(?=\s*=)    # f(x) is a name
        |(?:\\(?!log_)[A-Za-z]+|"[A-Za-z]+"|[A-Za-z])\s*_\s*(?:\w|\\[A-Za-z]+   # \lambda_{red}
            |\{(?:[^{}]|\{[^{}]*\})*\})'*|\\[A-Za-z]+|[A-Za-z]'*(?![A-Za-z])|[π∞])
    | (?P<num>\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+)
    | "(?P<text>[^"]+)" | (?P<word>[A-Za-z]+(?!_)|\p{Han}+)
    | (?P<sign>\\.|<=|>=|!=|\*\*|\+-|\.\.+|\{:\}|[^\s~])""",
    re.VERBOSE | re.DOTALL,
)


def _tokens(text):
    """Yield the tokens of a rewritten text."""
    for m in _TOKEN.finditer(text):
        kind, found = m.lastgroup, m[m.lastgroup]
        low = found.lower()
        spelled = _SPELLINGS.get(low)
        name = low.lstrip("\\")
        if kind == "num":
            yield "num", Fraction(found)
        elif spelled:
            yield from _tokens(spelled)
        elif name in _FUNCTIONS:
            yield name
        elif kind == "name":
            yield "sym", re.sub(r'[\s{}"\\]', "", found)
        elif kind == "sign":
            yield found
        elif kind == "word" and found.isupper():  # AB is one name, xy are two
            yield "sym", low
        elif kind == "word" and len(found) == 2 and found.islower():
            yield from _tokens(" ".join(found))
        else:
            yield "word", low if len(found) > 1 else found


@lru_cache(4096)
def _read(text):
    """Tuple of the tokens of an answer (str)."""
    if text.isdecimal():  # as most are
        return (("num", Fraction(text)),)
    if r"\begin" not in text:  # a backslash written twice, and no end of a row
        text = text.replace(r"\\", "\\")
    for pattern, new in _REWRITES.items():
        text = pattern.sub(new, text)
    if not re.search("sin|cos|tan|sec|csc|cot|cis", text):
        text = text.replace("°", "")
    return tuple(_tokens(text))


# ---- parse: a tree is ("num", value), ("sym", name) or (what, *trees), where what is a function,
# a pair of brackets or a chain of operators: 1 + 2 - x is ("+-", 1, 2, x)
#
#   chain     operands joined by operators of one level, down to products of factors
#   factor    sign* atom '°'? '!'? ('^' factor)? unit*
#   atom      number | symbol | words | bracket | frac binom | function

# no such grammar, too deep, no value, no number
_FAILURES = ArithmeticError, LookupError, RecursionError, TypeError, ValueError
_LEVELS = [{*signs} for signs in ("*/", "+-", ":÷∁", "∪∩∖", "=<>≤≥≠≈", "&", ",∨")]
_OPEN, _CLOSE = {*"([{⦃"}, {*")]}⦄"}
_ENDS = {"$", *_CLOSE}.union(*_LEVELS)  # what ends a factor
_RELATIONS = {*"=<>≤≥≠"}
_INTERVALS = {"()": "<<", "[]": "≤≤", "(]": "<≤", "[)": "≤<"}
_FLIP = str.maketrans("<>≤≥", "><≥≤")


def _chain(stack, levels=_LEVELS):
    """Take operands and the operators between them, of these levels, off a stack of tokens."""
    tree = _factor(stack)
    for tighter, signs in enumerate(levels):
        ops, parts = "", [tree]
        while stack[-1] in signs or tighter == 0 and stack[-1] not in _ENDS:
            ops += stack.pop() if stack[-1] in _ENDS else "*"  # 2x is 2 * x
            parts.append(_chain(stack, levels[:tighter]))
        if ops and {*ops} <= {">", "≥"}:  # b > a is a < b
            tree = ops[::-1].translate(_FLIP), *parts[::-1]
        elif ops:
            tree = ops, *parts
    return tree


def _factor(stack):
    """Take a factor off a stack, and the units that follow it."""
    if stack[-1] in ("+", "-"):
        return stack.pop(), ("num", 0), _factor(stack)
    phrase = stack[-1][0] == "word"  # its words are multiplied
    tree = _atom(stack)
    for sign in "°!":
        if stack[-1] == sign:
            tree = stack.pop(), tree
    if stack[-1] == "^":
        tree = stack.pop(), tree, _atom(stack) if stack[-1][0] == "num" else _factor(stack)
    while stack[-1][0] == "word" and not phrase and stack[-1][1] not in _NO_UNITS:
        stack.pop()
    if tree[0] == "num" and stack[-1][0] == "num":
        raise ValueError("5 7, or 5 cm 7")
    return tree


def _atom(stack):
    """Take what a factor's powers and signs apply to off a stack."""
    head = stack.pop()
    if head in _OPEN:
        return _bracket(head, stack)
    if head in ("frac", "binom"):
        return "/" if head == "frac" else head, _atom(stack), _atom(stack)
    if head in _FUNCTIONS:
        return _function(head, stack)
    if head[0] == "word":
        return "sym", head[1]
    if isinstance(head, str):
        raise ValueError("no such operand")
    return head


def _function(name, stack):
    r"""Its base and power may come first, as in \log_2^3 x, and its argument without ()."""
    base, power = [], None
    if stack[-1] == "_":
        stack.pop()
        base = [_atom(stack)]
    if stack[-1] == "^":
        stack.pop()
        power = _atom(stack)
    closed = name == "√" or stack[-1] == "("
    argument = _atom(stack) if closed else _factor(stack)
    while not closed and (stack[-1][0] == "sym" or stack[-1] in ("frac", "√")):
        argument = "*", argument, _factor(stack)
    tree = name, argument, *base
    return ("^", tree, power) if power else tree


def _bracket(opening, stack):
    """Take the rest of a pair of brackets off a stack."""
    if stack[-1] in _CLOSE:
        stack.pop()
        return ("⦃⦄",)
    what, *parts = inside = _chain(stack)
    pair = opening + stack.pop()
    if what[0] == "," and pair in _INTERVALS:
        return pair, *parts
    if pair == "⦃⦄" and what[0] not in "<>≤≥≠=" or pair == "{}" and what[0] == ",":
        return "⦃⦄", *_items(inside)
    if pair in ("()", "{}", "[]", "⦃⦄"):
        return inside
    raise ValueError("unbalanced")


def _items(tree):
    """The items of a list or a set; anything else is its own and only item."""
    return [*tree[1:]] if tree[0][0] in ",∨⦃" else [tree]


@lru_cache(4096)
def _parse(tokens):
    """Tree of a tuple of tokens; 1 ± 2 is the list 1 + 2, 1 - 2. Raises one of _FAILURES."""
    if "±" in tokens or "∓" in tokens:
        items = []
        for plus, minus in ("+-", "-+"):
            signs = {"±": plus, "∓": minus}
            items += _items(_parse(tuple(signs.get(token, token) for token in tokens)))
        return ",", *dict.fromkeys(items)
    stack = ["$", *tokens[::-1]]
    tree = _chain(stack)
    if stack != ["$"]:
        raise ValueError("unbalanced")
    return tree


def parse_answer(text):
    """Return the tree of an answer (str), nested tuples, or None if the grammar lacks it."""
    if isinstance(text, str) and len(text) <= MAX_CHARS:
        with contextlib.suppress(*_FAILURES):
            return _parse(_read(text))
    return None


# ---- compare: rational expressions modulo a prime, exactly; others by their values


def _power(x, y):
    """x^y; an odd root of a negative number is negative."""
    if isinstance(y, Fraction) and y.denominator % 2 and x.real < 0 and x.imag == 0:
        return (-1) ** y.numerator * _power(-x, y)
    return complex(x) ** complex(y)


def _factorial(x):
    return math.gamma(x + 1)


def _choose(n, k):
    return _factorial(n) / (_factorial(k) * _factorial(n - k))


_CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "∞": math.inf}
_FUNCTIONS = {
    **{name: getattr(cmath, name) for name in "sin cos tan asin acos atan exp".split()},
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x),
    "cis": lambda x: cmath.exp(1j * x),
    "ln": cmath.log,
    "log": lambda x, base=10: cmath.log(x, base),
    "abs": abs,
    "floor": lambda x: math.floor(x.real),
    "ceil": lambda x: math.ceil(x.real),
    "√": lambda x, n=2: _power(x, 1 / n),
    "frac": operator.truediv,  # for its name alone: _atom() makes "/" of it
    "binom": _choose,
}
_RING = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_NUMBERS = {  # what the kinds of trees mean in the complex numbers
    "num": lambda x: x,
    "sym": _CONSTANTS.__getitem__,
    **_RING,
    **_FUNCTIONS,
    **dict.fromkeys("/:÷", operator.truediv),
    "^": _power,
    "∁": _choose,
    "!": _factorial,
    "°": math.radians,
}
_count = range(2501).index  # raises ValueError for other numbers
_RESIDUES = {  # and modulo a prime
    "num": lambda x: x.numerator * pow(x.denominator, -1, PRIME),
    "sym": lambda name: int(_point(0, name) * 2**99),  # raises for i and ∞
    **_RING,
    **dict.fromkeys("/:÷", lambda x, y: x * pow(y, -1, PRIME) % PRIME),
    # None, on which the next operation raises, as pow does if y is no whole number
    "^": lambda x, y: pow(x, y, PRIME) if abs(y) < 10**15 else None,
    "!": lambda n: math.factorial(_count(n)) % PRIME,
    **dict.fromkeys(("binom", "∁"), lambda n, k: math.comb(_count(n), _count(k))),
}


def _value(tree, meaning=_NUMBERS):
    """Value of a tree by the meaning of its parts. Raises one of _FAILURES if it has none."""
    what, *values = tree
    if what not in ("num", "sym"):
        values = [_value(part, meaning) for part in values]
    if what in meaning:
        return meaning[what](*values)
    total, *others = values
    for op, x in zip(what, others, strict=True):
        total = meaning[op](total, x)
    return total


def _names(tree):
    """The symbols in a tree, without constants."""
    what, *parts = tree
    if what == "sym":
        return {*parts} - _CONSTANTS.keys()
    if what == "num":
        return set()
    return set().union(*map(_names, parts))


def _close(x, y):
    """Whether two values are one."""
    return abs(x - y) <= 1e-11 * max(abs(x), abs(y)) < math.inf


@lru_cache(4096)
def _point(k, name):
    """Value of a symbol at a point: of an unknown negative at point 1, positive at others."""
    x = random.Random(f"{name}{k}").uniform(0.3, 3)
    return _CONSTANTS.get(name, -x if k == 1 else x)


def _moved(x):
    """A long decimal, moved a little so that it equals no root: 1.41421356237 is not sqrt(2)."""
    return x if x.denominator < 10**9 else x * (1 + 1e-9)


_POINTS = [_NUMBERS | {"num": _moved, "sym": partial(_point, k)} for k in range(3)]


def _equal(a, b):
    """Whether two expressions are equal where symbols are positive and, if real, negative.

    None if they have no values.
    """
    with contextlib.suppress(*_FAILURES):
        return (_value(a, _RESIDUES) - _value(b, _RESIDUES)) % PRIME == 0
    verdict = None
    for point in _POINTS[:2]:
        with contextlib.suppress(*_FAILURES):
            x, y = _value(a, point), _value(b, point)
            if verdict and (x.imag or y.imag):
                break  # sqrt(x^3) is x sqrt(x), if not where x is negative
            if not _close(x, y):
                return False
            verdict = True
    return verdict


# ---- compare: sets of reals by their members

_JOINS = {"∪": any, "∨": any, "∩": all, ",": all, "∖": lambda x: x == [True, False]}


def _holds(relation, x, y):
    """Whether a relation holds between two values; one that is not real is neither < nor >."""
    if _close(x, y):
        return relation in "≤=≥"
    if abs((x - y).imag) > 1e-9:
        return relation == "≠"
    return relation in (">≥≠" if x.real > y.real else "<≤≠")


def _member(tree, x):
    """Whether a number is in a set of reals, or fulfils a condition."""
    what, *parts = tree
    if what[0] in _JOINS:
        return _JOINS[what[0]]([_member(part, x) for part in parts])
    meaning = _NUMBERS | {"sym": lambda name: _CONSTANTS.get(name, x)}
    values = [_value(part, meaning) for part in parts]
    if what == "⦃⦄":
        return any(_close(value, x) for value in values)
    if what in _INTERVALS:
        what = _INTERVALS[what]
        values.insert(1, x)
    elif not {*what} <= _RELATIONS or not _names(tree):
        raise TypeError("no condition")
    return all(map(_holds, what, values, values[1:]))


def _bounds(tree):
    """The numbers in a set of reals. Raises LookupError if it may begin or end elsewhere."""
    what, *parts = tree
    if what == "sym" and parts[0] not in _CONSTANTS:
        return []
    if len(parts) > MAX_ITEMS // 2:
        raise ValueError("too long")
    if what[0] in "∪∩∖∨,=<>≤≥≠([⦃":
        return sum(map(_bounds, parts), [])
    return [_value(tree).real]  # a LookupError where an unknown is in it, as in 2x < 3


def _same_region(a, b):
    """Whether two sets of reals have the same members: at every bound, around it, and far away."""
    if len(_names(a) | _names(b)) > 1:
        raise ValueError("several unknowns")
    known = []
    for tree in (a, b):
        with contextlib.suppress(LookupError):
            known.append(_bounds(tree))
    if not known:
        raise ValueError("not linear")
    points = {-99.0, -9.0, -0.3, 0, 0.3, 9.0, 99.0}
    for x in sum(known, []):
        step = 1e-6 * (1 + abs(x))
        points |= {x, -x, x + step, x - step}
    return all(_member(a, x) == _member(b, x) for x in points if abs(x) < math.inf)


# ---- compare: all the rest


def _proportional(a, b):
    """Whether two equations or inequalities say one thing: their differences are proportional."""
    if a[0] != b[0] or a[0] not in _RELATIONS or not _names(a):
        return False
    quotient = "/", ("-", *a[1:]), ("-", *b[1:])
    with contextlib.suppress(*_FAILURES):
        ratio, *others = [_value(quotient, point) for point in _POINTS]
        if ratio == 0 or ratio.real < 0 and a[0] in "<≤":  # 0 is that of x = x, which says nothing
            return False
        return all(_close(ratio, other) for other in others)
    return False


def _is_label(tree):
    """Whether a tree names a quantity: x, f(x), (x, y), xy, |AB|, A/B, A^{-1}, not 2x or x + y."""
    what, *parts = tree
    if what == "sym":
        return parts[0] not in "π∞" and not parts[0][0].isdigit()
    if what in _FUNCTIONS or what in "^!":
        return _is_label(parts[0])
    return what[0] in "*/:(" and all(map(_is_label, parts))


def _near(x, y):
    """Whether y is x rounded: 2/3 and 0.67, but not 4 and 5."""
    rounded = Fraction(_value(y))
    return abs(_value(x) - rounded) * rounded.denominator < 1


def _unlabel(tree):
    """(label or None, what it is): of x = 5, 5 = x, x = 10/2 = 5, x ≈ 5 and x in {5} it is 5."""
    what, *sides = tree
    if not {*what} <= {"=", "≈"}:
        return None, tree
    label = None
    if _is_label(sides[0]):
        label = sides.pop(0)
    elif _is_label(sides[-1]):
        label = sides.pop()
    elif _names(tree):
        return None, tree
    if label and "(" in label[1]:
        label = "sym", "y"  # f(x) = x^2 is y = x^2
    for x, y in zip(sides, sides[1:]):
        if not _same(x, y) and not ("≈" in what and _near(x, y)):
            return label, tree
    return label, sides[0]


def _solutions(items, label):
    """Of x = 1, y = 2, x = 3, y = 4 the points (x, y) = (1, 2), (3, 4); of others themselves."""
    if not all(item[0] == "=" and _is_label(item[1]) for item in items):
        return [("=", label, item) for item in items] if label else items
    size = len({name for _, name, _ in items})
    points = []
    for start in range(0, len(items), size):
        _, names, values = zip(*sorted(items[start : start + size], key=str))
        points.append(("=", ("()", *names), ("()", *values)))
    return points


def _distribute(tree):
    """A number times a matrix as a matrix, and 2:4:6 as the ratios 2:4 and 2:6."""
    if tree[0][:2] == "::":
        return "()", *((":", tree[1], part) for part in tree[2:])
    if tree[0] == "*" and tree[2][0][0] in "(&":
        factor, matrix = tree[1:]
        return matrix[0], *(_distribute(("*", factor, entry)) for entry in matrix[1:])
    return tree


def _same(a, b):
    """Whether two trees are equal: in any order in lists and sets, else elementwise."""
    if a == b or _proportional(a, b):
        return True
    label, a = _unlabel(a)
    other_label, b = _unlabel(b)
    if label and other_label and label != other_label:
        return False
    a, b = _distribute(a), _distribute(b)
    if re.search("[∪∩∖<≤≠>≥]", f"{a}{b}"):  # one of them is a set of reals, or a condition
        with contextlib.suppress(*_FAILURES):
            return _same_region(a, b)
    items, others = _items(a), _items(b)
    if items != [a] or others != [b]:
        if len(items) != len(others):
            items, others = _solutions(items, label), _solutions(others, other_label)
        if "⦃" in a[0] + b[0]:  # an element twice is once
            items, others = {*items}, {*others}
        if not len(items) == len(others) <= MAX_ITEMS:
            return False
        for item in items:
            found = next((other for other in others if _same(item, other)), None)
            if found is None:
                return False
            others.remove(found)
        return True
    kinds = {a[0], b[0]}
    if kinds <= {":", "/"} or ":" not in kinds:  # 3:1 is no 3
        verdict = _equal(a, b)
        if verdict is not None:
            return verdict
    return a[0] == b[0] and len(a) == len(b) and all(map(_same, a[1:], b[1:]))


# the letter of a choice, with what it stands for or without: C, \text{(C)}, C) 12
_CHOICE = re.compile(
    r"(?:\\(?:text|math)\w*\s*\{|[\s${(])*([A-J])[\s}]*(?:[.)]|:(?!\s*[A-Z]\s*[:=])|[\s$}]*$)"
)


def verify(response, gold, pattern=""):
    r"""Whether the last box of a response equals the gold answer, mathematically: bool.

    response: str. gold: str as LaTeX or plain, or a number. Whatever they are, nothing is raised.
    pattern: as in extract_answer(), which may raise UserError.

    >>> verify(r"thus \boxed{x = \frac{\sqrt8}{2}}", r"\sqrt{2}"), verify(r"\boxed{204_6}", "204_5")
    (True, False)
    """
    answer = extract_answer(response, pattern)
    if answer is None or not isinstance(gold, (str, int, float)):
        return False
    if isinstance(gold, (int, float)):
        gold = str(gold) if abs(gold) < 10**MAX_CHARS else ""
    if max(len(answer), len(gold)) > MAX_CHARS:
        return answer == gold
    chosen, choice = _CHOICE.match(answer), _CHOICE.match(gold)
    if chosen and choice:
        return chosen[1] == choice[1]
    a, b = _read(answer), _read(gold)
    if a == b:
        return a != ()
    ours, others = _UNITS.intersection(a), _UNITS.intersection(b)
    if ours - others and others - ours:  # 15 cm^2 is 15, but neither 15 m^2 nor 15 cm^3
        return False
    with contextlib.suppress(*_FAILURES):
        return _same(_parse(a), _parse(b))
    return False


# signs stand between two operands: not +3, 3**4 or (3)(4)
_SUM = re.compile(r"[(\s]*\d+[)\s]*(?:(?:[-+*/]|\\times|\\cdot|\\div)[(\s]*\d+[)\s]*)*")


def verify_countdown(response, gold, pattern=""):
    """True if the last box of `response` solves `gold`: each number once, and the target's value.

    >>> verify_countdown("\\\\boxed{(2+1)*(9-1)}", "1 1 2 9 = 24")
    True
    >>> verify_countdown("\\\\boxed{3*8}", "1 1 2 9 = 24")
    False
    """
    numbers, target = gold.split(" = ")
    text = extract_answer(response, pattern) or ""
    if sorted(re.findall(r"\d+", text)) != sorted(numbers.split()) or not _SUM.fullmatch(text):
        return False
    with contextlib.suppress(*_FAILURES):  # it needs none of the rewrites of _read()
        return _value(_parse(tuple(_tokens(text)))) == int(target)
    return False


if __name__ == "__main__":
    sys.exit(command(main))
