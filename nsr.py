"""Negative sample reinforcement (NSR): train a reasoning model by penalising its wrong answers.

A policy samples G responses to every prompt and a verifier marks each correct or not. All the
methods here minimise one clipped policy-gradient loss and differ only in the advantage A that they
give to a response:

    method       A if correct  A if not       source
    reinforce    1             -1             arXiv:2506.01347
    psr          1             0              arXiv:2506.01347: learn from the correct ones only
    nsr          0             -1             arXiv:2506.01347: learn from the incorrect ones only
    w-reinforce  lam           -1             arXiv:2506.01347 Eq. 9, lam = 0.1
    a-nsr        lam(t)        -beta(t)       arXiv:2605.07137: the penalty is annealed
    cw-nsr       lam           -w(y)          arXiv:2605.07137: weighed by the confidence in y
    acw-nsr      lam(t)        -beta(t) w(y)  both at once: in neither paper
    grpo         (r - mean) / (std + eps) in the prompt's group, KL to the base  arXiv:2402.03300
    ppo          reward to come - value, by a learned critic, KL in the reward   arXiv:1707.06347

The file reads from top to bottom: config, data, verification, ranks, model, rollout, schedules,
loss, evaluation, checkpoint and log, train, main. Log-probabilities, entropies and confidences
come straight from the hidden states through kernels/linear_logprob.py. Left out, so that it can be
read in one sitting: models larger than a GPU, inference servers, learned rewards, tools.

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
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import operator
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import urllib.request
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import regex as re
import tokenizers
import torch
import transformers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification,
                          AutoTokenizer)
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.linear_logprob import linear_logprobs
from kernels.logprob import token_stats_from_logits

# --------------------------------------------------------------------------------------------------
# config

METHODS = ("reinforce", "psr", "nsr", "w-reinforce", "a-nsr", "cw-nsr", "acw-nsr", "grpo", "ppo")
SCHEDULES = ("exponential", "cosine", "accuracy")
STATES = ("float32", "bf16", "cpu")
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def flag(default, help, choices=None, above=None):
    """A field of Config and its flag: `help`, and what its value must be one of or above."""
    return field(default=default, metadata={"help": help, "choices": choices, "above": above})


@dataclass
class Config:
    """The settings of a run, each a flag of the command line: group_size is --group-size."""

    method: str = flag("a-nsr", "how a verdict becomes an advantage", METHODS)
    preset: str = flag("", "where settings start from: countdown, qwen-math (one GPU), "
                       "qwen-math-paper; default: qwen-math if --model or --data is not countdown")
    model: str = flag("countdown", "causal LM: a directory, out/NAME of a run, a hub name, "
                      "countdown, countdown-strong")
    data: str = flag("countdown", "problems: a JSON Lines file, hf://datasets/OWNER/NAME/FILE, "
                     "countdown, math-train, math-test, math500, amc23, aime2025")
    eval_data: str = flag("", "held-out problems, named likewise; default: some of --data")
    steps: int = flag(125, "training steps T, one batch each; the schedules end at T", above=0)
    prompts: int = flag(64, "prompts a step", above=0)
    group_size: int = flag(8, "responses a prompt, G", above=0)
    updates: int = flag(2, "optimizer updates a step: mini-batches of the batch", above=0)
    lr: float = flag(1e-4, "learning rate of AdamW, constant (weight decay 0.01)", above=0)
    seed: int = flag(0, "decides every random draw of the run")
    name: str = flag("", "write to out/NAME; default: METHOD-1, METHOD-2, ...")
    resume: str = flag("", "go on with the run in this directory, by its own settings")
    max_prompt_tokens: int = flag(1024, "problems with longer prompts are left out", above=0)
    max_new_tokens: int = flag(20, "longest response in tokens, stop token included", above=0)
    temperature: float = flag(1.0, "sampling temperature; log-probs are taken at it too", above=0)
    clip: float = flag(0.2, "pi / pi_old is clipped to 1 - CLIP .. 1 + CLIP", above=0)
    lam: float = flag(0.1, "advantage of a correct response in w-reinforce and cw-nsr")
    schedule: str = flag("exponential", "how beta(t) falls in a-nsr and acw-nsr", SCHEDULES)
    beta_max: float = flag(1.5, "where beta(t) of a-nsr starts")
    beta_min: float = flag(0.5, "what beta(t) falls towards")
    kappa: float = flag(0.03, "rate of the exponential schedule, per step", above=0)
    lam_min: float = flag(0.05, "lam(t) of a-nsr at t = 0")
    lam_max: float = flag(0.2, "lam(t) of a-nsr at t = T")
    entropy_coef: float = flag(0.0, "entropy bonus (1e-4 in the papers)")
    kl_coef: float = flag(None, "KL to the model before training, in the loss, of ppo in the "
                          "reward; default: 1e-3 in grpo and ppo, else 0")
    critic_lr: float = flag(1e-3, "learning rate of the critic in ppo", above=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient", above=0)
    drop_unused: bool = flag(False, "as the NSR authors' released code: responses with A = 0 are "
                             "dropped before mini-batches are cut, so that updates and "
                             "denominator follow the accuracy")
    eval_every: int = flag(0, "Pass@k every so many steps; 0: only before and after training")
    eval_problems: int = flag(100, "held-out problems to evaluate on", above=0)
    eval_samples: int = flag(256, "responses to each of them: n of Pass@k", above=0)
    save_every: int = flag(25, "steps between checkpoints", above=0)
    rollout_tokens: int = flag(2**16, "most tokens in the KV cache, prompts included", above=0)
    micro_tokens: int = flag(2**13, "most tokens in a training pass, pads included", above=0)
    bf16: bool = flag(False, "bf16 autocast over float32 weights; the presets' on a GPU only")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")
    optimizer_state: str = flag("float32", "AdamW's two numbers a weight: bf16 halves their memory "
                                "for some noise, cpu moves them over at every update", STATES)
    memory: bool = flag(False, "say what memory the run will need, by part, and stop")
    profile: bool = flag(False, "trace the second step: trace.json, and its costliest operations")
    device: str = flag("", "cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu")


QWEN_MATH = dict(
    model="Qwen/Qwen2.5-Math-1.5B", data="math-train", eval_data="math500", steps=100, lr=1e-6,
    prompts=128, updates=4, max_new_tokens=2048, eval_samples=4, save_every=5, bf16=True,
    critic_lr=1e-5, rollout_tokens=2**18, micro_tokens=2**14, gradient_checkpointing=True)
PRESETS = {
    "countdown": {},
    "qwen-math": QWEN_MATH,  # the paper's settings at 1/8 of its batch and 2/3 of its length
    "qwen-math-paper": QWEN_MATH | dict(prompts=1024, max_new_tokens=3072, entropy_coef=1e-4),
}
# what a resumed run may change: neither method, model nor data
RESUMABLE = ("steps", "eval_every", "save_every", "device", "rollout_tokens", "micro_tokens",
             "gradient_checkpointing", "optimizer_state", "profile")


class UserError(Exception):
    """What the user can mend: the commands print it as one line and exit with status 2."""


def resolve(given):
    """Config from the flags `given` (dict) over their preset's settings over the defaults.

    Raises UserError where they do not fit together.
    """
    own = any(given.get(knob, "countdown") not in BASES for knob in ("model", "data"))
    preset = given.get("preset") or ("qwen-math" if own else "countdown")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
    settings = PRESETS[preset] | given | {"preset": preset}
    if "eval_data" not in given and given.get("data") not in (None, PRESETS[preset].get("data")):
        settings["eval_data"] = ""  # the preset's goes with its own --data
    cfg = Config(**settings)
    if cfg.kl_coef is None:
        cfg.kl_coef = 1e-3 if cfg.method in ("grpo", "ppo") else 0.0
    check(cfg)
    model_path(cfg.model)  # before data is downloaded
    return cfg


def check(cfg):
    """Raises UserError where a setting is out of range or two do not fit together."""
    for knob in fields(Config):
        above, choices = knob.metadata["above"], knob.metadata["choices"]
        name, value = knob.name.replace("_", "-"), getattr(cfg, knob.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be finite")
        if above is not None and not above < value:
            raise UserError(f"--{name} {value}: must be above {above} and finite")
        if choices and value not in choices:
            raise UserError(f"--{name} {value}: choose from {', '.join(choices)}")
    if cfg.prompts % (cfg.updates * WORLD_SIZE):
        raise UserError(f"--prompts {cfg.prompts} does not divide into --updates {cfg.updates}"
                        + f" on {WORLD_SIZE} ranks" * (WORLD_SIZE > 1))
    if cfg.method == "grpo" and cfg.group_size < 2:
        raise UserError("--method grpo compares the responses of a group: --group-size 2 or more")
    if cfg.drop_unused and WORLD_SIZE > 1:
        raise UserError("--drop-unused: ranks would differ in their updates; use python nsr.py")


# --------------------------------------------------------------------------------------------------
# data


class Problem(NamedTuple):
    """A question, its answer, and how a response to it is checked."""

    question: str
    answer: str  # gold
    instruction: str  # follows the question in the prompt
    verify: Callable[[str, str], bool]  # (response, answer) -> is it correct
    tags: dict = {}  # level and subject, where the data has them


GITHUB = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data"
DOWNLOADS = {  # name: (address, git blob id; the hub has its own sums)
    "math-train": (f"{GITHUB}/math/train.jsonl", "47bc5462da8374bdcf53a7339bd48a7e28567676"),
    "math-test": (f"{GITHUB}/math/test.jsonl", "9ef3334841057f53caac5522332e38391d3fb33b"),
    "amc23": (f"{GITHUB}/amc23/test.jsonl", "6894ad7c49a0b3a64210af32954f4d049d934ea0"),
    "aime2025": ("hf://datasets/math-ai/aime25/test.jsonl", None),
    "math500": ("hf://datasets/HuggingFaceH4/MATH-500/test.jsonl", None),
}


def fetch(name):
    """Path of the problem file `name`, downloaded if need be. Raises UserError."""
    address, blob_id = DOWNLOADS.get(name, (name, None))
    path = Path("out/data", f"{name}.jsonl") if blob_id else Path(name)
    try:
        if address.startswith("hf://datasets/"):
            from huggingface_hub import hf_hub_download
            owner, repo, file = address.removeprefix("hf://datasets/").split("/", 2)
            path = Path(hf_hub_download(f"{owner}/{repo}", file, repo_type="dataset"))
        elif blob_id and not path.exists():
            content = urllib.request.urlopen(address, timeout=60).read()
            if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob_id:
                raise ValueError("the file there is not the one that it was")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
    except Exception as e:  # the hub's client raises dozens of types; all mean: no file
        raise UserError(f"cannot get {name} from {address} ({first_line(e)}); give a JSON Lines "
                        "file of your own") from e
    return path


def parse_problem(row):
    """Problem from one row (dict) of MATH, GSM8K, AIME, DAPO, verl and their like.

    >>> parse_problem({"question": "2 + 2 = ?", "answer": "Two and two.\\n#### 4"})[:2]
    ('2 + 2 = ?', '4')

    Raises ValueError that says what is missing.
    """
    keys = "problem", "question", "prompt", "content"
    question = next((row[key] for key in keys if row.get(key)), "")
    if isinstance(question, list) and isinstance(question[-1], dict):  # chat messages
        question = question[-1].get("content")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no text in problem, question, prompt or content")
    found = [row.get("answer"), row.get("final_answer"), row.get("Answer")]
    if isinstance(row.get("reward_model"), dict):
        found.append(row["reward_model"].get("ground_truth"))
    solution = row.get("solution") or ""
    found.append(extract_answer("\n".join(solution) if isinstance(solution, list) else solution))
    answer = next((a for a in found if a not in (None, "", [])), "")
    parts = [int(a) if isinstance(a, float) and a.is_integer() else str(a).split("####")[-1].strip()
             for a in (answer if isinstance(answer, list) else [answer])]
    answer = ", ".join(re.sub(r"^\$+([^$]+)\$+$", r"\1", str(a)).strip() for a in parts)
    (question + answer).encode()  # half a character raises
    if not answer:
        raise ValueError("no answer in answer, final_answer, Answer or reward_model.ground_truth, "
                         "and no \\boxed{} in solution")
    tags = {"level": row.get("level"), "subject": row.get("subject") or row.get("type")}
    return Problem(question, answer, "Please reason step by step, and put your final answer within "
                   "\\boxed{}.", verify, {key: str(tag) for key, tag in tags.items() if tag})


def read_problems(name):
    """[Problem] of a file or name; a repeated question counts once. Raises UserError."""
    if name == "countdown":
        return countdown_problems()
    path, problems = fetch(name), {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read problems from {name} ({first_line(e)}); give a JSON Lines "
                        f"file, or one of countdown, {', '.join(DOWNLOADS)}") from e
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                problem = parse_problem(row)
                problems.setdefault(problem.question, problem)
        except (ValueError, TypeError, RecursionError) as e:
            raise UserError(f"{name}, line {number}: {first_line(e)}") from e
    if not problems:
        raise UserError(f"{name} holds no problems")
    return list(problems.values())


def shuffled_problems(name):
    """read_problems(name) in an order that is the same in every run."""
    problems = read_problems(name)
    return random.Random(0).sample(problems, len(problems))


def load_problems(cfg):
    """(train, held_out): two lists of Problem that share no question. Raises UserError.

    A tenth of --data is held out where there is no --eval-data, the same in every run.
    """
    problems = shuffled_problems(cfg.data)
    held_out = (shuffled_problems(cfg.eval_data) if cfg.eval_data else
                problems[: len(problems) // 10])
    questions = {p.question for p in held_out}
    return [p for p in problems if p.question not in questions], held_out


def batch_indices(step, prompts, count, seed):
    """Which of `count` problems make the batch of `step` (from 0): a new order every epoch.

    It follows from the step alone, so a resumed run neither repeats nor skips a problem.

    >>> sorted(batch_indices(0, 2, 4, seed=0) + batch_indices(1, 2, 4, seed=0))
    [0, 1, 2, 3]
    """
    places = [divmod(i, count) for i in range(step * prompts, (step + 1) * prompts)]
    order = {epoch: random.Random(f"{seed} {epoch}").sample(range(count), count)
             for epoch in {epoch for epoch, _ in places}}
    return [order[epoch][i] for epoch, i in places]


# The embedded task, countdown: make a target of four numbers, each used exactly once.

COUNTDOWN = ("Use each of the four numbers exactly once, with + - * and parentheses, to make the "
             "number after the equals sign. Put the expression within \\boxed{}.")


def random_expression(rng, numbers):
    """(text, value) of a random tree over `numbers` in their order, inner nodes in parentheses."""
    if len(numbers) == 1:
        return str(numbers[0]), numbers[0]
    cut, op = rng.randrange(1, len(numbers)), rng.choice("+-*")
    (a, x), (b, y) = random_expression(rng, numbers[:cut]), random_expression(rng, numbers[cut:])
    a, b = (f"({text})" if len(text) > 1 else text for text in (a, b))
    return a + op + b, {"+": x + y, "-": x - y, "*": x * y}[op]


def countdown_example(rng):
    """(Problem, a random correct expression for it)."""
    target = 0
    while not 1 <= target <= 30:
        numbers = [rng.randrange(1, 10) for _ in range(4)]
        expression, target = random_expression(rng, numbers)
    text = f"{' '.join(map(str, sorted(numbers)))} = {target}"
    return Problem(text, text, COUNTDOWN, verify_countdown), expression


def countdown_problems(count=4000):
    """The first `count` different problems that a fixed seed draws.

    >>> countdown_problems(1)[0].question
    '2 2 6 8 = 6'
    """
    rng, problems = random.Random(0), {}
    while len(problems) < count:
        problem, _ = countdown_example(rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


# --------------------------------------------------------------------------------------------------
# verification: how an answer is checked
#
# extract the last box; rewrite its text and read that into tokens; parse them into a tree; compare
# the tree with that of the gold answer: expressions by their values at fixed points, sets of reals
# by their members, all else by structure. Nothing is executed, and all is bounded.

MAX_CHARS, MAX_SCAN, MAX_ITEMS, MAX_BITS = 500, 50_000, 30, 1 << 14
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([+-]?\d+(?:\.\d+)?|[A-Za-z]))"
                  r"|(?<!(?<!\\)\\)[{}]")


def extract_answer(response):
    r"""What the last closed \boxed{...} or \fbox{...} of a response (str) holds, or None.

    >>> extract_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text, answer, opened = response if isinstance(response, str) else "", None, []
    last = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    for m in _BOX.finditer(text, max(0, last - MAX_SCAN), max(0, last) + MAX_SCAN):
        if m[2]:
            answer = m[2]
        elif m[0] != "}":
            opened.append(m.end() if m[1] else None)
        elif opened and (start := opened.pop()) is not None:
            answer = text[start:m.start()].strip()
    return answer


# ---- rewrite: one spelling for what is written in many ways

_UNICODE = [  # before NFKC makes 2 of ², and 1⁄2 of ½, whose slash must be the only one
    ("[º˚∘]", "°"), ("ℝ", r"\\R "), ("[⁰¹²³⁴-⁹⁻⁺]+", r"^{\g<0>}"), ("[₀-₉]+", r"_{\g<0>}"),
    ("⁄", "/"), ("[¼-¾⅐-⅞]", r"\\frac{\g<0>}"),
    ("[Α-ω]", lambda m: rf"\{unicodedata.name(m[0], 'x').split()[-1].lower()} ")]
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_GAP = r"(?:\\[,!;:]|~|\s)*+"
_REWRITES = [(re.compile(pattern, re.DOTALL), new) for pattern, new in [
    # matrices: ⟦ & ⏎ ⟧; elsewhere \\ is a backslash written twice
    (r"(?<!(?<!\\)\\begin.*)\\\\", r"\\"), (r"\\\\\s*+(?:\[[\w.\s]+\])?", "⏎"),
    (r"\\(?:left|right|middle|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\\begin\s*\{[vV]\w+\*?\}", "|⟦"), (r"\\end\s*\{[vV]\w+\*?\}", "⟧|"),
    (r"\\begin\s*\{\w+\*?\}(?:\s*\{[clr|\s]*\}|\[[clr]\])?", "⟦"), (r"\\end\s*\{\w+\*?\}", "⟧"),
    (r"⏎\s*⟧", "⟧"), (r"\[\s*(⟦[^⟦⟧]*⟧)\s*\]", r"\1"), (r"&(?!.*⟧)", " "),
    # sets
    (r"(?i:no\s+(?:real\s+)?solutions?|empty\s+set)", "∅"),
    (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R\b)|\\R\b"
     r"|\b(?i:(?:(?:all|the)\s+)*+reals?(?:\s+numbers?)?)\b", "ℝ"),
    (r"\\\{\s*[A-Za-z]\s*(?:\\in\s*ℝ\s*)?(?:\\mid|\\vert|\\colon|[|:])", "⦃"),  # {x | x > 2}
    (r"(?<=[)\]}]\s*)U(?=\s*[(\[\\])", "∪"),
    # spaces, and those in numbers: 1 000, 1{,}000, 1,\!000, and 1,000 if in no brackets
    (r"\\\s", " "), (r"\\(?:[hv]space|(?:text)?color)\*?\s*\{\w*\}|m\s*\\angle", ""),
    (rf"(?<=\d){_GAP}(?:\{{\s*\\?,\s*\}}|\\text\{{,\}}|,(?=\s*\\!))?{_GAP}(?=\d{{3}}(?![\d/]))",
     ""),
    (r"(?<=(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})*),(?=\d{3}(?:,\d{3})*(?![\d,]))(?<![(\[⦃].*|\\\{.*)",
     ""),
    # words: \text{cm} becomes "cm" in quotes, and so do units that stand bare
    (r"(?<=(?<!\w)[\d.]+\s*)(?:\"|'+)", r"\\text{in}"), ('"', ""),
    (r"\\(?:text\w*|[mh]box|mathrm|operatorname)\s*\{((?:[^{}]|\^\{\d\})*)\}",
     lambda m: m[1] if re.search("[+=^]", m[1]) else _WORD.sub(r'"\g<0>"', m[1])),
    ('"([ie])"', r"\1"), (r"\{\s*\}", ""),
    (r'"?\b([apAP])"?\.\s?"?[mM]\b"?\.?', r'"\1m"'),  # a.m.
    (r'(?<![\\A-Za-z"])(?:[ckm]m|[km]g|ml|ft|lb|in|hr|mi|oz|yd|sq|no|[ap]m|[AP]M)(?![A-Za-z"])',
     r'"\g<0>"'),
    (r'^\s*(?:"[A-Za-z]+"\s*+|[A-Z]?[a-z]{2,}+\s*+)++:', ""),  # Vertex: (1, 2)
    (r'\\[dt]?frac\s*\{\s*("\w+")\s*\}\s*\{\s*("\w+")\s*\}', r"\1/\2"),  # \frac{m}{s}
    (r'(?<=")\s*/\s*"?([a-z]+)\b"?', r'"\1"'),  # km/h
    (r'("[a-z]+")[\s$.]*\^\s*\{?2\}?', r'\1"square"'),  # cm^2
    (r'("[a-z]+")[\s$.]*\^\s*\{?3\}?', r'\1"cubic"'),
    # numbers
    (r'(?<=\d)\s*+\^?\s*+(\{)?\s*+"?(?:st|nd|rd|th)\b"?\s*(?(1)\})', ""),  # 11^{th}
    (r'(?:\^\s*+(\{)?\s*+(?:\\circ|°|"?o\b"?)\s*(?(1)\})|\\circ|°)(?:\s*[CF]\b)?', "°"),  # 90^\circ
    (r"(\d*\.(\d*))\\(?:overline|bar|dot)\s*\{?(\d+)\}?",  # 0.1\overline{6} is 0.1 + 6/90
     lambda m: f"(0{m[1]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    (rf"(?<![\d.^_]\s*)(?P<n>\d+)(?:{_GAP}(\{{)?\\[dtc]?frac\s*"
     r"(?:\{\s*(?P<a>\d+)\s*\}|(?P<a>\d))\s*(?:\{\s*(?P<b>[1-9]\d*)\s*\}|(?P<b>[1-9])(?!\d))"
     r"(?(2)\})|\s+(?P<a>\d+)/(?P<b>[1-9]\d*))", r"(\g<n>+\g<a>/\g<b>)"),  # 3\frac18, 3 1/8
    (r"\\([dtc]?frac|[dt]?binom)\s*(\d)\s*(\d?)", r"\\\1 \2 \3 "),  # \frac12
    # separators at the ends, or twice: 1, 2, and 3
    (r'(?<!\\)[,;](?:\\[,;]|\s)*(?="?(?:and|or)\b)', " "),
    (r"^(?:[\s,=≈$]|\\approx)+|(?<![\s,;:$\\])(?:[\s,;:$\\]|\\!|(?<!\.)\.(?!\.))+$"
     r"|(?<!\(.*|\[.*)\)$", "")]]

# ---- read: tokens are signs (str) and leaves: ("num", value), ("sym", name), ("word", text)

_SIGNS = {spelling: [("num", int(s)) if s.isdecimal() else ("sym", s) if s in "π∞ℝ" else s
                     for s in signs.split()] for signs, spellings in {
    "": r"\displaystyle \textstyle \vec \hat \overline \underline \overrightarrow \boxed \fbox \bm"
        r" \text \textbf \textrm \mathrm \mathbf \mathit \mathsf \mathnormal \boldsymbol \bf \rm"
        r" \mbox \emph \angle \triangle \quad \qquad \thinspace \mathbin"
        r" \! \, \; \: \> \( \) \[ \] \$ \% \# \& \~ $ % # ~ ' ` . € £ ¢"
        r" percent percentage pct the answer is option choice usd",
    "*": r"\cdot \times × · ⋅ ∙", "/": r"\div ÷", "-": "− – —", "^": "**", ",": ";", "<": r"\lt",
    ">": r"\gt", "≤": r"\le \leq \leqslant <= ⩽", "≥": r"\ge \geq \geqslant >= ⩾", "≠": r"\ne \neq"
    " !=", "∈": r"\in", "≈": r"\approx", ":": r"\colon {:} to", "÷": r"\over", "C": r"\choose",
    "±": r"\pm +-", "∓": r"\mp", "°": r"\degree \textdegree degree degrees deg", "√": r"\sqrt sqrt",
    "∪": r"\cup \bigcup union", "∩": r"\cap", "∖": r"\setminus \backslash", "∧": r"\land and",
    "∨": r"\lor or", "⦃": r"\{ \lbrace", "⦄": r"\} \rbrace", "⦃ ⦄": r"\emptyset \varnothing ∅",
    "(": r"\langle ⟨", ")": r"\rangle \rfloor \rceil ⟩", "floor (": r"\lfloor", "ceil (": r"\lceil",
    "|": r"\vert \lvert \rvert \mid", "frac": r"\frac \dfrac \tfrac \cfrac", "π": r"\pi pi",
    "binom": r"\binom \dbinom \tbinom", "∞": r"\infty infinity infty inf ∞", "ℝ": "ℝ",
    "* 12": "dozen", "* 100": "hundred", "* 1000": "thousand", "* 1000000": "million",
    "* 1000000000": "billion"
    }.items() for spelling in spellings.split()} | {word: [f"? {word}"] for word in (
        "squared cubed plus minus times over through half halves thirds quarters tenths "
        "not wrong").split()}  # they are no units: no grammar has them
_UNITS = {*("mm cm m km g kg cents dollars seconds minutes hours days weeks months years inches "
            "feet yards miles am pm").split()}  # one spelling each: two of them are two units
_NUMERALS = {word: i for i, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty".split())}
_TOKEN = re.compile(r"""
    (\()?(?P<digits>(?=["A-F]*\d)["\dA-F]++(?:\.\d+)?)(?(1)\))(?:\\[,!;:]|\s)*   # 204_{five}
        (?P<base>_\s*(?:"?\w+"?|\{[^{}]*\})|\(?\s*"?base\b"?\s*"?\w+"?\s*\)?)
    | (?P<num>\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+)
    | (?P<name>[fghFGHPW]\(\w+\)|[A-Za-z]\((?:[\w=",\s]|\(\w+\))+\)(?=\s*=)    # f(x) is a name
        |[A-Za-z](?:_(?:\w|\{\w+\}))?'*(?![A-Za-z])) | "(?P<text>[A-Za-z]+)" | (?P<word>[A-Za-z]+)
    | (?P<sign>\\(?:[A-Za-z]+|.)|<=|>=|!=|\*\*|\+-|\.\.+|\{:\}|\S)""", re.VERBOSE | re.DOTALL)


def _tokens(text):
    """Yield the tokens of a rewritten text."""
    for m in _TOKEN.finditer(text):
        kind, found = m.lastgroup, m[m.lastgroup]
        low, bare = found.lower(), found.lower().lstrip("\\")
        if kind == "base":
            base = re.findall(r"[^\W_]+", found) or [""]
            digits = m["digits"].replace('"', "")
            yield "sym", f"{digits}_{_NUMERALS.get(base[-1], base[-1])}"
        elif kind == "num":
            yield "num", int(found) if found.isdecimal() else Fraction(found)
        elif found in _SIGNS or low in _SIGNS:
            yield from _SIGNS.get(found, _SIGNS.get(low))
        elif bare in _FUNCTIONS and low != "sec":  # a unit too
            yield bare
        elif kind == "name":
            yield "sym", re.sub(r'[\s{}"]', "", found)
        elif kind == "sign":
            yield ("sym", found[1:]) if found[1:].isalpha() else found
        elif kind == "word" and (found.isupper() or len(found) == 2):  # AB is one name, xy are two
            yield from [("sym", low)] if found.isupper() else (("sym", c) for c in found)
        else:
            yield "word", low if len(found) > 1 else found


@lru_cache(maxsize=1 << 12)
def _read(text):
    """Tuple of the tokens of an answer (str)."""
    if not text.isascii():
        for pattern, new in _UNICODE:
            text = re.sub(pattern, new, text)
        text = unicodedata.normalize("NFKC", text).replace("⁄", "}{")
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    tokens = [*_tokens(text)]
    if _TRIGONOMETRIC.isdisjoint(tokens):
        tokens = [("word", "degrees") if t == "°" else t for t in tokens]
    number = _NUMERALS.get(tokens[0][-1]) if len(tokens) == 1 else None
    return tuple(tokens) if number is None else (("num", number),)


# ---- parse: a tree is ("num", value), ("sym", name) or (what, *trees), where what is a function,
# a pair of brackets or a chain of operators: 1 + 2 - x is ("+-", 1, 2, x)
#
#   chain     operands of the next level joined by operators of one, down to products of factors
#   factor    sign* atom '°'? '!'? ('^' factor)? unit*
#   atom      number | symbol | words | bracket | frac binom √ | function

_LEVELS = ",∧∨", "⏎", "&", "=<>≤≥≠∈≈", "∪∩∖", ":÷C", "+-"  # the loosest first
_LISTS, _RELATIONS = tuple(_LEVELS[0]), tuple(_LEVELS[3])
_OPEN, _CLOSE = {*"([{⦃⟦"}, {*")]}⦄⟧"}
_INTERVALS, _FLIP = ("()", "[]", "(]", "[)"), str.maketrans("<>≤≥", "><≥≤")


def _chain(items):
    """Tree of a list of tokens and trees, split at the loosest operators."""
    signs = {t for t in items if isinstance(t, str)}
    for level in _LEVELS:
        if signs & {*level}:
            ops, parts = "", [[]]
            for t in items:
                if isinstance(t, str) and t in level:
                    ops += t
                    parts.append([])
                else:
                    parts[-1].append(t)
            parts = [*map(_chain, parts)]
            if {*ops} <= {*">≥"}:  # b > a is a < b
                ops, parts = ops[::-1].translate(_FLIP), parts[::-1]
            return (ops, *parts)
    for before, last, t in zip(["", *items], items, items[1:]):
        if last[0] == t[0] == "num" and before not in ("^", "_", "frac", "binom"):
            raise ValueError("5 7")
    items = ["$", *items[::-1]]  # a stack
    ops, parts = "", [_factor(items)]
    while items[-1] != "$":
        ops += items.pop() if items[-1] in ("*", "/") else "*"
        parts.append(_factor(items))
    return (ops, *parts) if ops else parts[0]


def _factor(items):
    """Take a factor off a stack of tokens and trees, and the units that follow it."""
    if items[-1] == "neg":
        items.pop()
        return "-", ("num", 0), _factor(items)
    tree = _atom(items)
    while items[-1] in ("!", "°"):
        degrees = "*/", tree, ("sym", "π"), ("num", 180)
        tree = ("factorial", tree) if items.pop() == "!" else degrees
    if items[-1] == "^":
        tree = items.pop(), tree, _factor(items)
    while items[-1][0] == "word":
        items.pop()
        if items[-1][0] == "num":
            raise ValueError("5 cm 7")
    return tree


def _atom(items):
    """Take what a factor's powers and signs apply to off a stack."""
    head = items.pop()
    if head in ("frac", "binom"):
        return "/" if head == "frac" else head, _atom(items), _atom(items)
    if head == "√":
        root = items.pop()[1] if items[-1][0] == "[]" else ("num", 2)
        return "^", _atom(items), ("/", ("num", 1), root)
    if isinstance(head, str):
        return _function(head, items)
    if head[0] == "word":
        words = [head[1]]
        while items[-1][0] in ("word", "num"):
            words.append(str(items.pop()[1]))
        return "sym", " ".join(words)
    return head[1] if head[0] in ("()", "{}") and len(head) == 2 else head


def _function(name, items):
    r"""Its power and base may come first, as in \log_2^3 x, and its argument without ()."""
    power, base = None, ()
    while items[-1] in ("^", "_"):
        power, base = (_atom(items), base) if items.pop() == "^" else (power, (_atom(items),))
    if power == ("-", ("num", 0), ("num", 1)) and "arc" + name in _FUNCTIONS:
        name, power = "arc" + name, None
    closed = items[-1][0] == "()"
    arg = _atom(items) if closed else _factor(items)
    while not closed and (items[-1][0] == "sym" or items[-1] in ("frac", "√")):
        arg = "*", arg, _factor(items)
    if name not in _FUNCTIONS:
        raise ValueError(f"no function: {name}")
    tree = name, arg, *base
    return ("^", tree, power) if power else tree


def _bracket(pair, items):
    """Tree of what stands in a pair of brackets."""
    if not items:
        return "⦃⦄",
    what, *parts = inside = _chain(items)
    if pair == "||":
        return "abs", inside
    if pair == "⟦⟧":  # a column is also written (1, 2)
        return ("()", *parts) if what[0] == "⏎" and parts[0][0][0] != "&" else inside
    listed = {*what} == {","}
    if pair not in (*_INTERVALS, "{}", "⦃⦄") or pair in ("(]", "[)") and not listed:
        raise ValueError("unbalanced")
    return ("⦃⦄" if pair == "{}" else pair, *parts) if listed else (pair, inside)


@lru_cache(maxsize=1 << 12)
def _parse(tokens):
    """Tree of a tuple of tokens, or None; 1 ± 2 is the list 1 + 2, 1 - 2."""
    if not {*"±∓"}.isdisjoint(tokens):
        plus, minus = (_parse(tuple(dict(zip("±∓", signs)).get(t, t) for t in tokens))
                       for signs in ("+-", "-+"))
        if not (plus and minus):
            return None
        many = plus[0][0] in ",⦃"
        pairs = zip(plus[1:], minus[1:]) if many else [(plus, minus)]
        return (plus[0] if many else ",", *dict.fromkeys(itertools.chain(*pairs)))
    stack = [["$"]]  # of what the brackets hold that are open
    try:
        for t in tokens:
            last = stack[-1][-1]
            if t in ("+", "-") and isinstance(last, str) and last not in ("!", "°"):
                stack[-1] += ["neg"] * (t == "-")
            elif t in _OPEN or t == "|" and stack[-1][0] != "|":
                stack.append([t])
            elif t in _CLOSE or t == "|":
                opening, *items = stack.pop()
                stack[-1].append(_bracket(opening + t, items))
            else:
                stack[-1].append(t)
        [[_, *items]] = stack
        return _chain(items)
    except (IndexError, RecursionError, TypeError, ValueError):  # unbalanced, or no such grammar
        return None


def parse_answer(text):
    """Return the tree of an answer (str), nested tuples, or None if the grammar lacks it."""
    return _parse(_read(text)) if isinstance(text, str) and len(text) <= MAX_CHARS else None


# ---- compare: expressions by their values, exact (int, Fraction) while they can be, else not

_INEXACT, _NO_VALUE = (float, complex), (ArithmeticError, LookupError, TypeError, ValueError)


def _power(x, y):
    """x^y, exact if it can be; an odd root of a negative number is negative."""
    if isinstance(y, _INEXACT):
        return complex(x) ** y
    if y.denominator == 1 and not isinstance(x, _INEXACT):
        if abs(y) > 1 and abs(y) * max(map(int.bit_length, x.as_integer_ratio())) > MAX_BITS:
            raise OverflowError("too many digits")
        return Fraction(x) ** int(y) if y < 0 else x ** int(y)
    if x.imag or x.real < 0 and y.denominator % 2 == 0:
        return complex(x) ** complex(y)
    return abs(x) ** float(y) * (-1 if x.real < 0 and y.numerator % 2 else 1)


def _factorial(x):
    """x!, between whole numbers by the gamma function."""
    if isinstance(x, _INEXACT) or x.denominator > 1:
        return math.gamma(float(x) + 1)
    if x > 2500:
        raise OverflowError("too many digits")
    return math.factorial(int(x))


_OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "^": _power,
        "C": lambda n, k: _factorial(n) * _power(_factorial(k) * _factorial(n - k), -1)}
_OPS |= dict.fromkeys("/:÷", lambda x, y: x * _power(y, -1))
_FUNCTIONS = {f: getattr(cmath, f) for f in "sin cos tan sinh cosh tanh exp".split()} | {
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "tg": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x), "ctg": lambda x: 1 / cmath.tan(x),
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "ln": cmath.log, "lg": cmath.log10, "log": lambda x, base=10: cmath.log(x) / cmath.log(base),
    "abs": abs, "floor": lambda x: math.floor(x.real), "ceil": lambda x: math.ceil(x.real),
    "factorial": _factorial, "binom": _OPS["C"]}
_TRIGONOMETRIC = {*"sin cos tan tg sec csc cot ctg".split()}
_CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "∞": math.inf, "ℝ": math.nan}


def _value(tree, at=None):
    """Value of a tree where a symbol has the value at(name). Raises one of _NO_VALUE if none."""
    what, *parts = tree
    if what == "num":
        return parts[0]
    if what == "sym":
        return _CONSTANTS.get(parts[0]) or at(parts[0])
    values = [_value(t, at) for t in parts]
    if what in _FUNCTIONS:
        return _FUNCTIONS[what](*values)
    total = values[0]
    for op, x in zip(what, values[1:]):
        total = _OPS[op](total, x)
        if not isinstance(total, _INEXACT) and max(
                map(int.bit_length, total.as_integer_ratio())) > MAX_BITS:
            raise OverflowError("too many digits")
    return total


def _residue(tree):
    """Value modulo a prime of a tree without symbols, for numbers of too many digits."""
    prime, (what, *parts) = 2 ** 127 - 1, tree
    if what == "^":
        return pow(_residue(parts[0]), operator.index(_value(parts[1])), prime)
    if what[0] not in "+-*/":
        return operator.index(_value(tree)) % prime
    total, *rest = map(_residue, parts)
    for op, x in zip(what, rest):
        total = total * pow(x, -1, prime) if op == "/" else _OPS[op](total, x)
    return total % prime


def _names(tree):
    """The symbols in a tree, without constants."""
    if tree[0] == "sym":
        return {tree[1]} - _CONSTANTS.keys()
    return set().union(*map(_names, tree[1:])) if tree[0] != "num" else set()


def _close(x, y, exact=True):
    """Whether two values are one; exact: a fraction with a large denominator is no sqrt(2)."""
    exacts = [v for v in (x, y) if not isinstance(v, _INEXACT)]
    if len(exacts) == 2 or exact and exacts and exacts[0].denominator > 10 ** 4:
        return x == y
    return abs(x - y) <= 1e-11 * max(abs(x), abs(y)) < math.inf


@lru_cache(maxsize=1 << 12)
def _point(name, k=0):
    """Where a symbol is evaluated: negative at point 1, positive at others."""
    x = Fraction(random.Random(f"{name}{k}").randint(10_000, 90_000), 1 << 15)
    return -x if k == 1 else x


def _equal(a, b):
    """Whether two expressions have one value where symbols are positive and, if real, negative."""
    names, seen = _names(a) | _names(b), False
    for k in (0, 1) if names else (0,):
        try:
            x, y = (_value(t, partial(_point, k=k)) for t in (a, b))
        except OverflowError:  # 10^{10^{10}}
            with contextlib.suppress(*_NO_VALUE):
                return _residue(a) == _residue(b)
            return False
        except _NO_VALUE:
            continue
        if k == 1 and (x.imag or y.imag):
            break  # sqrt(x^3) is x sqrt(x), if not where x is negative
        if not _close(x, y, exact=not names):
            return False
        seen = True
    return seen


# ---- compare: sets of reals by their members

_HOLDS = {-1: "<≤≠", 0: "≤=≥", 1: ">≥≠", None: ""}
_JOIN = {"∪": any, "∨": any, "∩": all, "∧": all, ",": all, "∖": lambda x: x == [True, False]}


def _order(x, y):
    """-1, 0 or 1: where x lies from y; None if one is not real."""
    if _close(x, y):
        return 0
    return None if abs(x.imag) + abs(y.imag) > 1e-9 else 1 if x.real > y.real else -1


def _is_region(tree):
    """Whether a tree gives a set of reals by conditions or as a union."""
    what, *parts = tree
    return tree == ("sym", "ℝ") or what[0] in "∪∩∖" or (
        what[0] in _RELATIONS and not {*what} <= {*"=≈∈"}) or (
        what[0] in _LISTS and any(map(_is_region, parts)))


def _region(tree):
    """(numbers at which membership may change, whether x is a member) of a set of reals.

    Such a number is None if it is unknown, as a condition is not linear.
    """
    what, *parts = tree
    if tree == ("sym", "ℝ"):
        return [], lambda x: True
    if what[0] in _RELATIONS:
        bounds, pairs = [], [*zip(what, parts, parts[1:])]
        for _, u, v in pairs:
            f, g, h = (_value(("-", u, v), lambda name: x) for x in range(3))
            bounds.append(Fraction(f) / (f - g) if f != g and _close(h - g, g - f) else None)
        return bounds, lambda x: all(op in _HOLDS[_order(
            *(_value(t, lambda name: x) for t in (u, v)))] for op, u, v in pairs)
    if what[0] in "∪∩∖,∧∨":
        (op,) = {*what}
        bounds, members = zip(*map(_region, parts))
        return sum(bounds, []), lambda x: _JOIN[op]([member(x) for member in members])
    values = [*map(_value, parts)]
    if what == "⦃⦄":
        return values, lambda x: any(_order(value, x) == 0 for value in values)
    if what not in _INTERVALS or any(
            side in "[]" and abs(end) == math.inf for side, end in zip(what, values)):
        raise ValueError("no set of numbers")
    low, high = values
    return values, lambda x: (_order(low, x) < (what[0] == "[")
                              and _order(x, high) < (what[1] == "]"))


def _same_region(a, b):
    """Whether two sets of reals have the same members: at every bound, around it, and far away."""
    regions = [_region(a), _region(b)]
    known = [bounds for bounds, _ in regions if None not in bounds]
    if not known or len(_names(a) | _names(b)) > 1:
        raise ValueError("not linear, or several unknowns")
    points = {-99.0, -9.0, -0.3, 0, 0.3, 9.0, 99.0}
    for x in {x.real for x in sum(known, []) if abs(x) < math.inf}:
        points |= {x, -x, float(x) * (1 + 1e-6) + 1e-6, float(x) * (1 - 1e-6) - 1e-6}
    return all(operator.eq(*(member(x) for _, member in regions)) for x in points)


# ---- compare: all the rest

def _proportional(a, b):
    """Whether two equations or inequalities say one thing: their differences are proportional."""
    if len(a[0] + b[0]) > 2 or {a[0], b[0]} & {*"∈≈"} or not _names(a):
        return False
    p, q = ("-", *a[1:]), ("-", *b[1:])
    x, y = (_value(t, partial(_point, k=2)) for t in (p, q))
    return (a[0] if (x / y).real > 0 else a[0].translate(_FLIP)) == b[0] and _equal(
        ("*", p, ("num", y)), ("*", q, ("num", x)))


def _is_label(tree):
    """Whether a tree names a quantity: x, f(x), (x, y), xy, |AB|, A/B, A^{-1}, not 2x or x + y."""
    what, *parts = tree
    if what == "sym":
        return parts[0] not in "π∞" and not parts[0][0].isdigit()
    if what in _FUNCTIONS or what == "^":
        return _is_label(parts[0])
    return what[0] in "*/:(" and all(map(_is_label, parts))


def _unlabel(tree):
    """(label or None, what it is): of x = 5, 5 = x, x = 10/2 = 5, x ≈ 5 and x in {5} it is 5."""
    what, *sides = tree
    if what == "*" and sides[0][0] == "sym" and sides[1][0] in (*_INTERVALS, "⏎", "∪"):
        return None, sides[1]  # P(1, 2)
    if not ({*what} <= {*"=≈"} or what == "∈" and _is_label(sides[0])):
        return None, tree
    label = next((side for side in (sides[0], sides[-1]) if _is_label(side)), None)
    if label:
        what, sides = what[label is sides[0]:], [side for side in sides if side is not label]
        label = ("sym", "y") if "(" in label[1] else label  # f(x) = x^2 is y = x^2
    elif _names(tree):
        return None, tree
    for op, x, y in zip(what, sides, sides[1:]):
        if op == "=" and not _same(x, y):
            return label, tree
        if op == "≈":  # 2/3 ≈ 0.67, but not 4 ≈ 5
            x, y = _value(x), _value(y)
            if isinstance(x, int) or abs(x - y) * Fraction(y).denominator >= 1:
                return label, tree
    return label, sides[0]


def _distribute(tree):
    """A number times a matrix, as a matrix."""
    if tree[0] == "*":
        for x, m in (tree[1:], tree[:0:-1]):
            if (m[0] == "()" or m[0][0] in "⏎&") and x[0][0] not in "([⏎&":
                return m[0], *(_distribute(("*", x, t)) for t in m[1:])
    return tree


def _same(a, b):
    """Whether two trees are equal: in any order in lists and sets, else elementwise."""
    if a == b or a[0][0] in _RELATIONS and b[0][0] in _RELATIONS and _proportional(a, b):
        return True
    (label, a), (other, b) = _unlabel(a), _unlabel(b)
    if label and other and label != other:
        return False
    a, b = _distribute(a), _distribute(b)
    kinds = {a[0][0], b[0][0]}
    if _is_region(a) or _is_region(b):
        with contextlib.suppress(TypeError, ValueError):
            return _same_region(a, b)
    if kinds & {*_LISTS, "⦃"}:
        rest, items = ([*t[1:]] if t[0][0] in (*_LISTS, "⦃") else [t] for t in (a, b))
        if "⦃" in kinds or all(t[0] == "()" for t in items + rest):  # an element twice is once
            rest, items = [*dict.fromkeys(rest)], [*dict.fromkeys(items)]
        for t in [*items]:  # those that are written alike, before the many comparisons
            if t in rest:
                rest.remove(t)
                items.remove(t)
        if not len(items) == len(rest) <= MAX_ITEMS:
            return False
        while items and (found := next((y for y in rest if _same(items[-1], y)), None)):
            rest.remove(found)
            items.pop()
        return not items
    ratios = kinds <= {*":/"} and len(a) == len(b) == 3
    if (ratios or kinds.isdisjoint(":[")) and _equal(a, b):
        return True
    return a[0] == b[0] not in ("num", "sym") and len(a) == len(b) and all(map(_same, a[1:], b[1:]))


def verify(response, gold):
    r"""Whether the last box of a response equals the gold answer, mathematically: bool.

    response: str. gold: str as LaTeX or plain, or a number. Whatever they are, nothing is raised.

    >>> verify(r"thus \boxed{x = \frac{\sqrt8}{2}}", r"\sqrt{2}"), verify(r"\boxed{204_6}", "204_5")
    (True, False)
    """
    answer = extract_answer(response)
    if isinstance(gold, (int, float)):
        gold = str(gold) if abs(gold) < 10 ** MAX_CHARS else ""
    if answer is None or not isinstance(gold, str) or max(len(answer), len(gold)) > MAX_CHARS:
        return answer is not None and answer == gold
    a, b = _read(answer), _read(gold)
    if a == b:
        return a != ()
    for words in (_UNITS, {"square", "cubic"}):  # 15 cm^2 is 15, but neither 15 m^2 nor 15 cm^3
        units, others = ({t[1] for t in tokens if t[0] == "word"} & words for tokens in (a, b))
        if units and others and units != others:
            return False
    a, b = _parse(a), _parse(b)
    try:
        return a is not None and b is not None and _same(a, b)
    except (*_NO_VALUE, RecursionError):  # no number, too large, 1/0
        return False


_COUNTDOWN = re.compile(r"\d+|\S")


def verify_countdown(response, gold):
    """True if the last box of `response` solves `gold`: each number once, and the target's value.

    >>> verify_countdown("\\\\boxed{(2+1)*(9-1)}", "1 1 2 9 = 24")
    True
    >>> verify_countdown("\\\\boxed{3*8}", "1 1 2 9 = 24")
    False
    """
    numbers, target = gold.split(" = ")
    text = (extract_answer(response) or "").replace("\\times", "*").replace("\\cdot", "*")
    tokens = _COUNTDOWN.findall(text)
    if len(text) > 200 or sorted(t for t in tokens if t.isdecimal()) != sorted(numbers.split()):
        return False

    def terms():  # terms := product (("+" | "-") product)*
        value = product()
        while tokens and tokens[0] in "+-":
            value += product() if tokens.pop(0) == "+" else -product()
        return value

    def product():  # product := atom ("*" atom)*
        value = atom()
        while tokens and tokens[0] == "*":
            tokens.pop(0)
            value *= atom()
        return value

    def atom():  # atom := number | "(" terms ")"
        token = tokens.pop(0)
        if token != "(":
            return int(token)
        value = terms()
        if tokens.pop(0) != ")":
            raise ValueError("unbalanced")
        return value

    try:
        return terms() == int(target) and not tokens
    except (ValueError, IndexError):  # not an expression
        return False


# --------------------------------------------------------------------------------------------------
# ranks: the processes of torchrun; without it there is one


def on_first_rank(body):
    """What body() returns on rank 0, on every rank; likewise its UserError."""
    result = [None]
    if RANK == 0:
        try:
            result = [body()]
        except UserError as e:
            result = [e]
    if WORLD_SIZE > 1:
        torch.distributed.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def gather(values):
    """The lists of all ranks, one after the other."""
    lists = [values] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(lists, values)
    return sum(lists, [])


def over_ranks(*numbers):
    """The sum of each number over all ranks."""
    return [sum(column) for column in zip(*gather([numbers]))]


# --------------------------------------------------------------------------------------------------
# model


def model_path(name):
    """Where the files of a model are: in the checkpoint of a run, in a directory, on the hub.

    Raises UserError where the name can only be that of a directory, and there is none.
    """
    local, checkpoint = re.match(r"[./~]|out/|.*/.*/", str(name)), Path(name, "checkpoint")
    if local and not Path(name).is_dir():
        raise UserError(f"no model directory {name}; give one, or a hub name")
    return checkpoint if checkpoint.is_dir() else name


def load_model(name, device, kind=AutoModelForCausalLM, **options):
    """(model, tokenizer) from a directory, a run's out/NAME, a hub name, or one of BASES.

    The model is in float32, without dropout: rollout and training pass see one policy.
    Raises UserError.
    """
    path = (on_first_rank(partial(countdown_base, BASES[name])) if name in BASES else
            model_path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = kind.from_pretrained(path, dtype=torch.float32, **options)
    except Exception as e:  # files, formats and hub have no common error; all mean: no model
        raise UserError(f"cannot load the model {name} ({first_line(e)}); give a model directory, "
                        "or a hub name and the network that it takes") from e
    if model.num_parameters() < 1e6:
        torch.set_num_threads(1)  # as in countdown_base()
    for module in model.modules():
        for key, value in [*vars(module).items()]:  # dropout has many names
            if isinstance(value, float) and ("drop" in key or isinstance(module, torch.nn.Dropout)):
                setattr(module, key, 0.0)
    if model.can_generate():
        tokens = {k: getattr(model.generation_config, k) for k in ("eos_token_id", "pad_token_id")}
        model.generation_config = transformers.GenerationConfig(**tokens)  # others may fail to save
    model.to(device)
    if kind is AutoModelForCausalLM:
        check_reading(model, name)
    return model, tokenizer


def checkpoint_activations(model):
    """Let backward compute the activations of each layer again rather than keep them.

    Raises UserError where the model cannot.
    """
    try:
        model.activation_checkpointing_enable()
    except ValueError as e:
        raise UserError(f"--gradient-checkpointing: {first_line(e)}") from e
    for module in model.modules():  # else prompts lose their keys: Prompts bears to run again
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True
        else:
            module.gradient_checkpointing = False  # some models drop the cache by it


def learning(model):
    """Put the layers that may be checkpointed in train mode, where they look for it, no others."""
    for module in model.modules():  # in train mode some routers add noise
        module.training = isinstance(module, GradientCheckpointingLayer)


def speaks_chat_ml(model, tokenizer):
    """Whether the prompt of the papers, with <|im_start|>, is the model's own: Qwen's."""
    return "qwen" in model.config.model_type and "<|im_start|>" in tokenizer.get_vocab()


def stop_tokens(model, tokenizer):
    """Sorted ids of all tokens that end a response: a model may have several."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
    if speaks_chat_ml(model, tokenizer):  # its base models name the end of text only
        ids.add(tokenizer.get_vocab().get("<|im_end|>"))
    return sorted(ids - {None})


def encode_prompts(problems, model, tokenizer, cfg):
    """(problems, prompts): those that fit, and their token ids in the form that the model knows.

    Prompts over cfg.max_prompt_tokens are left out, and this is said. Raises UserError where none
    is left, or where prompt and response exceed the model's context.
    """
    kept, left_out = [], 0
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    for problem in problems:
        text, bare = f"{problem.question}\n{problem.instruction}", False
        if speaks_chat_ml(model, tokenizer):
            text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        elif tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                 tokenize=False, add_generation_prompt=True)
        else:
            bare = True  # a template would write its own bos
        ids = tokenizer(text, add_special_tokens=bare)["input_ids"]
        if len(ids) > cfg.max_prompt_tokens:
            left_out += 1
        elif len(ids) + cfg.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {len(ids)} tokens and --max-new-tokens {cfg.max_new_tokens} exceed "
                f"the model's context of {limit}; lower --max-new-tokens or --max-prompt-tokens")
        else:
            kept.append((problem, ids))
    if not kept:
        raise UserError(f"no prompt is within --max-prompt-tokens {cfg.max_prompt_tokens}")
    if left_out:
        live(f"left out: {left_out} of {len(problems)} problems, with prompts of more than "
             f"{cfg.max_prompt_tokens} tokens", done=True)
    return map(list, zip(*kept))


WARM_UP = dict(seed=0, batch=64, lr=4e-3)
BASES = {"countdown": 2500, "countdown-strong": 12000}  # name: steps of warm-up


def countdown_base(steps):
    """Directory of an embedded base policy, made on first use: 2,500 steps take a minute or two.

    Supervised on random correct expressions of problems that are not held out, for few enough
    steps that it stays imperfect and diverse: what a base model is to reinforcement learning.
    """
    made_by = (countdown_problems, countdown_example, random_expression, shuffled_problems,
               load_problems, countdown_tokenizer, countdown_config, countdown_base, warm_up)
    key = repr((WARM_UP, steps, torch.__version__, transformers.__version__,
                *map(inspect.getsource, made_by)))
    path = Path("out", f"base-{hashlib.sha1(key.encode()).hexdigest()[:10]}")
    torch.set_num_threads(1)  # so small a model that more would only wait for each other
    if not path.exists():
        tokenizer = countdown_tokenizer()
        torch.manual_seed(WARM_UP["seed"])
        model = AutoModelForCausalLM.from_config(countdown_config())
        warm_up(model, tokenizer, steps, **WARM_UP)
        with whole_directory(path) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return path


def countdown_config():
    """The shape of the embedded base policy: 108,416 parameters."""
    return transformers.Qwen2Config(
        vocab_size=19, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0)


def countdown_tokenizer():
    """One token a character and one for `\\boxed{`; pad and end of text are the same token."""
    vocab = {token: i for i, token in enumerate(["<eos>", "\\boxed{", "}", *"0123456789+-*()="])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<eos>"))
    core.normalizer = tokenizers.normalizers.Replace(" ", "")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"<eos>|\\boxed\{|."), behavior="isolated")
    core.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    # it has no words for the instruction in the second line: the question is the prompt
    tokenizer.chat_template = "{{ messages[0]['content'].split('\n')[0] }}"
    return tokenizer


def warm_up(model, tokenizer, steps, seed, batch, lr):
    """Supervised training of the base policy on `steps` batches of random correct expressions."""
    live(f"making the base policy, once: {steps} steps of supervised warm-up", done=True)
    rng, started = random.Random(seed), time.time()
    held_out = {p.question for p in load_problems(Config())[1]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.04)
    for step in range(steps):
        pairs = (countdown_example(rng) for _ in itertools.count())
        pairs = itertools.islice((p for p in pairs if p[0].question not in held_out), batch)
        questions, expressions = zip(*((p.question, f"\\boxed{{{e}}}<eos>") for p, e in pairs))
        texts = [Response(prompt, ids, [], True) for prompt, ids in zip(
            tokenizer(questions)["input_ids"], tokenizer(expressions)["input_ids"])]
        stats, loss_mask = token_stats(model, texts, temperature=1.0)
        optimizer.zero_grad()
        (-stats.logprobs.sum() / loss_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        left = (time.time() - started) / (step + 1) * (steps - step - 1)
        live(f"base policy: step {step + 1}/{steps}, {duration(left)} left")


# --------------------------------------------------------------------------------------------------
# rollout


class Response(NamedTuple):
    """What the policy drew after a prompt."""

    prompt_ids: list  # of int
    ids: list  # of int: the sampled tokens, the stop token included
    logp: list  # of float: log-probability of each under the distribution that it was drawn from
    stopped: bool  # False: cut at max_new_tokens


def sampling_probs(logits, temperature, top_p=1.0):
    """What tokens are drawn from: (B, V) logits -> (B, V) float32 probabilities.

    top_p keeps the likeliest tokens up to that mass, the one that crosses it included.
    """
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        probs /= probs.sum(-1, keepdim=True)
    return probs


def seed_of(*parts):
    """The seed (int below 2**56) that follows from `parts`: run's seed, purpose, step, sample, ...

    >>> seed_of(0, "rollout", 1, 2, 3) == seed_of(0, "rollout", 1, 2, 3) != seed_of(0, "rollout")
    True
    """
    return int.from_bytes(hashlib.sha1(repr(parts).encode()).digest()[:7], "big")


def draw(logits, u, temperature, top_p):
    """A token a row: the one in whose interval of the cumulative distribution `u` lies.

    logits: (B, V); u: (B,) float64 in [0, 1). Returns tokens (B,) int64 and logp (B,) float32, of
    sampling_probs.
    """
    tokens, logp, some = [], [], 1 + 2**19 // logits.shape[1]  # rows: float64 is large
    for logits, u in zip(logits.split(some), u[:, None].split(some)):
        probs = sampling_probs(logits, temperature, top_p)
        cdf = probs.cumsum(-1, dtype=torch.float64)  # float32 would blur a vocabulary of 151,936
        tokens.append(torch.searchsorted(cdf, u * cdf[:, -1:], right=True))  # never where p = 0
        logp.append(probs.gather(1, tokens[-1]).log())
    return torch.cat(tokens)[:, 0], torch.cat(logp)[:, 0]


def padded(rows, device, left=False):
    """(ids, mask) (B, T) int64 and bool: lists of token ids, with pads up to the longest."""
    lengths, column = torch.tensor([[len(row)] for row in rows]), torch.arange(max(map(len, rows)))
    pads = [[0] * (len(column) - len(row)) for row in rows]
    ids = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads)]
    # mask from lengths, not ids: pad may equal eos
    mask = column >= len(column) - lengths if left else column < lengths
    return torch.tensor(ids, device=device), mask.to(device)


class Prompts(transformers.Cache):
    """Keys and values of prompts: kept while they are read, then put before their responses' own.

    update() returns keys and values (B, heads, P + R, head_dim) in the dtypes that the layer gave.
    A layer that runs again changes nothing, as gradient checkpointing asks.
    """

    def __init__(self, kv=(), owner=None):
        super().__init__(layers=[])
        self.kv = [*kv]  # of each layer in turn, (prompts, heads, P, head_dim)
        self.owner = owner  # (B,) the prompt of each response; None while prompts are read

    def update(self, keys, values, layer_idx, *args, **kwargs):
        place = slice(2 * layer_idx, 2 * layer_idx + 2)
        if self.owner is None:
            self.kv[place] = keys, values
            return keys, values
        # index_select, for its backward adds rows, where that of x[owner] sorts them first
        return [torch.cat([x.index_select(0, self.owner), new], dim=2)
                for x, new in zip(self.kv[place], (keys, values))]

    def get_seq_length(self, layer_idx=0):
        return 0 if self.owner is None else self.kv[0].shape[2]

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length() + query_length, 0


def read_prompts(model, prompts, **options):
    """(what model gives at the last token of prompts (B, 1, ...), mask (B, P) bool, kv).

    model: of logits, hidden states or values; kv: as in Prompts, padded on the left.
    """
    ids, mask = padded(prompts, model.device, left=True)
    cache, seen = Prompts(), mask.long()
    found = model(ids, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0),
                  cache=cache, use_cache=True, **options)[0]
    return found[:, -1:], mask, cache.kv


def prefill(model, prompts):
    """(logits (B, V) of the first tokens, kv as in Prompts) of B prompts. Raises UserError."""
    logits, _, kv = read_prompts(model, prompts, logits_to_keep=1)
    if logits.softmax(-1).isnan().any():
        raise UserError("the model's logits are not finite: it has diverged, or its weights are "
                        "damaged; start again with a lower --lr, or another model")
    return logits[:, 0], kv


class Rows(transformers.Cache):
    """The responses in the making, one a row, and their KV cache: allocated once.

    Rows 0 .. n - 1 are in use, columns `first` .. `column` hold what they attend to. All write
    `column`, the next in turn, wherever their prompts begin: so masks and sliding windows are
    those of any batch that is padded on the left.
    """

    is_compileable = True  # so that transformers builds masks without asking the GPU about them

    def __init__(self, size, columns, max_new_tokens, column, kv):
        super().__init__(layers=[])
        self.n, self.first, self.column = 0, column, column
        # zeros: what is masked must be finite, as 0 x NaN is NaN
        kind, dtype = kv[0].device.type, kv[0].dtype
        if torch.is_autocast_enabled(kind):  # attention reads them in it; keys come in float32
            dtype = torch.get_autocast_dtype(kind)
        self.kv = [x.new_zeros(size, x.shape[1], columns, x.shape[3], dtype=dtype) for x in kv]
        # one column to spare: an ended row runs on for a while
        self.u = kv[0].new_zeros(size, max_new_tokens + 1, dtype=torch.float64)
        self.ids, self.logp = self.u.long(), self.u.float()
        self.t, self.begin = torch.zeros_like(self.ids[:, :2]).unbind(1)
        self.going = self.t.bool()

    def update(self, keys, values, layer_idx, *args, **kwargs):
        kv = [x[: self.n] for x in self.kv[2 * layer_idx : 2 * layer_idx + 2]]
        for x, new in zip(kv, (keys, values)):
            x[:, :, self.column] = new[:, :, 0]
        return [x[:, :, self.first : self.column + 1] for x in kv]

    def get_seq_length(self, layer_idx=0):
        return self.column - self.first

    def get_mask_sizes(self, query_length, layer_idx):
        return self.column - self.first + query_length, 0

    def add(self, kv, owner, lengths, seeds):
        """Rows for responses to the prompts owner (rows of `kv`) of these lengths."""
        new, width = slice(self.n, self.n + len(seeds)), kv[0].shape[2]
        for x, y in zip(self.kv, kv):
            x[new, :, self.column - width : self.column] = y[owner]
        u = np.stack([np.random.default_rng(s).random(self.u.shape[1]) for s in seeds])
        self.u[new], self.t[new], self.going[new] = torch.from_numpy(u).to(self.u), 0, True
        self.begin[new] = self.column - torch.tensor(lengths).to(self.begin)
        self.n, self.first = new.stop, min(self.first, self.column - width)

    def draw(self, logits, stops, max_new_tokens, temperature, top_p):
        """A token more for every row. logits: (n, V)."""
        row, t = torch.arange(self.n, device=stops.device), self.t[: self.n]
        going = self.going[: self.n]
        token, self.logp[row, t] = draw(logits, self.u[row, t], temperature, top_p)
        self.ids[row, t] = token
        t += going
        going &= ~torch.isin(token, stops) & (t < max_new_tokens)

    def forward(self, model, longest, max_new_tokens):
        """Logits (n, V) of what follows the last token of each row."""
        if self.column == self.kv[0].shape[2]:
            self.slide(longest)
        seen = torch.arange(self.first, self.column + 1, device=model.device)
        begin = self.begin[: self.n, None]
        position = (self.column - begin).clamp(max=longest + max_new_tokens - 1)
        logits = model(self.ids[: self.n].gather(1, self.t[: self.n, None] - 1),
                       attention_mask=seen >= begin, position_ids=position, cache=self,
                       use_cache=True).logits[:, -1]
        self.column += 1
        return logits

    def drop(self, done):
        """Free the rows `done`: the last ones move into their places. Returns [(to, from)]."""
        self.n -= len(done)
        moves = list(zip(done, sorted({*range(self.n, self.n + len(done))}.difference(done))))
        to, source = torch.tensor(moves, dtype=torch.long, device=self.t.device).view(-1, 2).T
        for x in (self.u, self.ids, self.logp, self.t, self.begin, self.going, *self.kv):
            x[to] = x[source]
        self.first = int(self.begin[: self.n].min()) if self.n else self.column
        return moves

    def slide(self, room):
        """Move what is in use to the left, but leave `room` columns for the longest prompt."""
        end = max(room, self.column - self.first)
        by, self.column = self.column - end, end
        for x in self.kv:
            x[: self.n, :, :end] = x[: self.n, :, by : by + end].clone()
        self.begin -= by
        self.first -= by


def large_linears(model):
    """The linear layers that packed_linears() copies: smaller ones stay in the cache anyway."""
    return [m for m in model.modules()
            if type(m) is torch.nn.Linear and m.weight.numel() > 2**16]


def packed_linears(model, rows):
    """[(module, forward)]: linear layers with their weights copied into oneDNN's blocked order.

    Worth the copy on a CPU, where a batch of a few dozen rows takes half the time; else [].
    """
    if (model.device.type != "cpu" or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.is_available()):
        return []

    def packed(module):
        weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, "none", [], "")

    return [(m, packed(m)) for m in large_linears(model)]


@contextlib.contextmanager
def swapped(forwards):
    """Inside, each of the modules has the forward beside it."""
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


@torch.inference_mode()
def rollout(model, prompts, seeds, max_new_tokens, stop_ids, *, temperature=1.0, top_p=1.0,
            rollout_tokens=2**16, tick=lambda tokens: None):
    """Sample a response to prompts[i] for each seed in seeds[i]; yields Response in that order.

    prompts: lists of token ids. seeds: lists of int in [0, 2**63): a response follows from its own,
    whatever else is in the batch. A group is yielded when it and all before it are complete.
    rollout_tokens: most tokens in the KV cache, prompts and what is unused included. tick(n) hears
    of n rows that have drawn a token. Raises UserError where the logits are not finite.
    """
    model.eval()
    longest = max(map(len, prompts))
    columns = (longest + max_new_tokens) * 9 // 8 + 1  # the more, the less often they slide
    size = rollout_tokens // (columns + longest // 8 + 1)  # an eighth for prompts without a row
    size = max(1, min(size, sum(map(len, seeds))))
    pause = 1 + max_new_tokens // 64  # tokens between two waits for the device: what has ended?
    stops = torch.tensor(stop_ids, dtype=torch.long, device=model.device)
    linears = packed_linears(model, size)
    groups = [[None] * len(group) for group in seeds]
    waiting = collections.deque(i for i, group in enumerate(seeds) if group)
    ready, live = [], []  # (prompt, sample, row of kv) of responses without and with a row
    batch, step, complete = None, 0, 0

    while live or ready or waiting:
        free = size - len(live)
        if waiting and not ready and 8 * free >= size:  # prompts for an eighth of the rows or more
            some = []
            while waiting and len(ready) < free and len(some) < max(1, size // 8):
                i = waiting.popleft()
                ready += [(i, j, len(some)) for j in range(len(seeds[i]))]
                some.append(prompts[i])
            first, kv = prefill(model, some)
            if batch is None:
                batch, logits = Rows(size, columns, max_new_tokens, longest, kv), first
        if ready and free:  # ended rows are replaced at once
            new, ready = ready[:free], ready[free:]
            owner = torch.tensor([k for _, _, k in new], device=model.device)
            logits = torch.cat([logits[: len(live)], first[owner]])
            batch.add(kv, owner, [len(prompts[i]) for i, _, _ in new],
                      [seeds[i][j] for i, j, _ in new])
            live += new

        batch.draw(logits, stops, max_new_tokens, temperature, top_p)
        tick(batch.n)
        step += 1
        done = [] if step % pause else (~batch.going[: batch.n]).nonzero()[:, 0].tolist()
        if done:
            for r, length, ids, logp in zip(done, *(x[done].tolist() for x in (
                    batch.t, batch.ids, batch.logp))):
                i, j, _ = live[r]
                groups[i][j] = Response(prompts[i], ids[:length], logp[:length],
                                        ids[length - 1] in stop_ids)
            for hole, r in batch.drop(done):
                live[hole] = live[r]
            del live[batch.n :]
            while complete < len(groups) and all(groups[complete]):
                yield from groups[complete]
                groups[complete], complete = None, complete + 1

        if live:
            with swapped(linears):
                logits = batch.forward(model, longest, max_new_tokens)


def read_responses(model, responses, **options):
    """What model gives before each response token (B, R, ...), the tokens (B, R), loss mask.

    The loss mask is (B, R) bool: the tokens of the response, its stop token included. A prompt is
    read once, however many of the responses are to it; options go to the pass over prompts.
    """
    row = {}
    owner = torch.tensor([row.setdefault(tuple(x.prompt_ids), len(row)) for x in responses],
                         device=model.device)
    first, seen, kv = read_prompts(model, [*row], **options)
    first, seen = first.index_select(0, owner), seen[owner]
    ids, loss_mask = padded([x.ids for x in responses], model.device)
    if ids.shape[1] == 1:
        return first, ids, loss_mask
    seen = torch.cat([seen, loss_mask[:, :-1]], dim=1).long()
    later = model(ids[:, :-1], attention_mask=seen, use_cache=True, cache=Prompts(kv, owner),
                  position_ids=(seen.cumsum(-1) - 1)[:, 1 - ids.shape[1] :])[0]
    return torch.cat([first, later], dim=1), ids, loss_mask


@torch.no_grad()
def check_reading(model, name):
    """Raises UserError unless rollout and training pass read a text as the model does at once.

    They keep keys and values from one pass to the next. Recurrent layers keep a state instead, and
    models that are not causal look ahead.
    """
    gaps = []
    try:
        ids = [i % model.get_input_embeddings().num_embeddings for i in range(4, 12)]
        found = list(rollout(model, [ids[:5], ids[:2]], [[0, 1], [2]], 4, []))
        logits, drawn, _ = read_responses(model, found, logits_to_keep=1)
        for r, row in zip(found, token_stats_from_logits(logits, drawn).logprobs.cpu()):
            text = torch.tensor([r.prompt_ids + r.ids], device=model.device)
            whole = model(text, use_cache=False).logits[:, len(r.prompt_ids) - 1 : -1]
            logp = token_stats_from_logits(whole, text[:, -len(r.ids) :]).logprobs.cpu()
            gaps += [(x - logp).abs().max().item() for x in (row, torch.tensor(r.logp))]
        wrong = "" if max(gaps) < 0.01 else f"log-probs differ by {max(gaps):.2g}"
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # a model without such a cache fails in its own way
        wrong = first_line(e)
    if wrong:
        raise UserError(f"the model {name} cannot be read a part at a time ({wrong}); take a causal"
                        " language model whose layers keep keys and values, and no other state")


@lru_cache(maxsize=2)  # the policy and its reference
@torch.no_grad()
def linear_head(model):
    """The model's torch.nn.Linear from last hidden states to logits; None if it does more to them.

    Found by comparison, for soft-capping, scaling and adapters go by many names.
    """
    head, ids = model.get_output_embeddings(), torch.arange(4, device=model.device)[None]
    hidden = model.base_model(ids, use_cache=False)[0]
    same = (type(head) is torch.nn.Linear and hidden.shape[-1] == head.in_features
            and torch.equal(head(hidden), model(ids).logits))
    return head if same else None


def token_stats(model, responses, temperature):
    """(TokenStats, loss mask) of the tokens of responses: (B, R), (B, R), (B,) float32; (B, R)."""
    head = linear_head(model)
    if head is None:
        logits, ids, mask = read_responses(model, responses, logits_to_keep=1)
        stats = token_stats_from_logits(logits, ids, temperature=temperature, mask=mask)
    else:  # prompts and padding never reach the head
        hidden, ids, mask = read_responses(model.base_model, responses)
        stats = linear_logprobs(hidden, head.weight, ids, bias=head.bias, temperature=temperature,
                                mask=mask)
    return stats, mask


def micro_batches(responses, rows, micro_tokens):
    """Cut `rows` (row numbers) into lists of like length that fit the budget.

    It counts what read_responses() passes: each prompt of a list once, and padding.
    """
    cut, p, r, prompts = [], 0, 0, set()
    for i in sorted(rows, key=lambda i: len(responses[i].prompt_ids) + len(responses[i].ids)):
        prompt, n = tuple(responses[i].prompt_ids), len(responses[i].ids)
        p, r, prompts = max(p, len(prompt)), max(r, n), prompts | {prompt}
        if not cut or len(prompts) * p + (len(cut[-1]) + 1) * r > micro_tokens:
            cut.append([])
            p, r, prompts = len(prompt), n, {prompt}
        cut[-1].append(i)
    return cut


def critic_values(critic, responses):
    """(values, loss mask) (B, R): what the critic expects to come before each response token."""
    values, _, loss_mask = read_responses(critic, responses)
    return values[..., 0].float(), loss_mask


@torch.no_grad()
def without_gradient(forward, responses, cfg):
    """Lists of what forward(some responses) gives of each response, (tokens,) or (), in order."""
    found = [None] * len(responses)
    for rows in micro_batches(responses, range(len(responses)), cfg.micro_tokens):
        for i, *row in zip(rows, *forward([responses[i] for i in rows])):
            found[i] = [x[: len(responses[i].ids)] if x.dim() else x for x in row]
    return map(list, zip(*found))


def score(model, responses, cfg):
    """(log-probs, entropies, confidences) without gradient: lists of B tensors (tokens,), and (B,).

    By the training pass, at the sampling temperature.
    """
    model.eval()
    logp, entropy, confidence = without_gradient(
        lambda some: token_stats(model, some, cfg.temperature)[0], responses, cfg)
    return logp, entropy, torch.stack(confidence)


# --------------------------------------------------------------------------------------------------
# schedules


def beta_schedule(cfg, t, accuracy):
    """Penalty beta(t) of A-NSR at step t of T, from beta_max towards beta_min. arXiv:2605.07137.

    accuracy: share of correct responses in the current batch.

    >>> [round(beta_schedule(Config(), t, accuracy=0.5), 3) for t in (0, 75, 150)]
    [1.5, 0.605, 0.511]
    """
    falling = {"exponential": math.exp(-cfg.kappa * t),
               "cosine": (1 + math.cos(math.pi * t / cfg.steps)) / 2,
               "accuracy": 1 - accuracy}[cfg.schedule]
    return cfg.beta_min + (cfg.beta_max - cfg.beta_min) * falling


def lam_schedule(cfg, t):
    """Weight lam(t) of correct responses in A-NSR at step t of T.

    arXiv:2605.07137 gives it with the exponential beta(t) only; here it goes with all three.

    >>> [round(lam_schedule(Config(steps=150), t), 3) for t in (0, 75, 150)]
    [0.05, 0.125, 0.2]
    """
    return cfg.lam_min + (cfg.lam_max - cfg.lam_min) * t / cfg.steps


def method_weights(cfg, t, accuracy):
    """(lam, beta) of cfg.method at step t: a correct response has A = lam, another A = -beta.

    None in grpo and ppo, whose advantages are others.
    """
    if cfg.method in ("a-nsr", "acw-nsr"):  # A-NSR
        return lam_schedule(cfg, t), beta_schedule(cfg, t, accuracy)
    return {"reinforce": (1.0, 1.0), "psr": (1.0, 0.0), "nsr": (0.0, 1.0), "w-reinforce":
            (cfg.lam, 1.0), "cw-nsr": (cfg.lam, 1.0)}.get(cfg.method, (None, None))


# --------------------------------------------------------------------------------------------------
# loss


def confidence_weight(confidence):
    """w(y) = clamp(c(y), 0.05, 1) of CW-NSR, a constant of the loss. arXiv:2605.07137.

    confidence: c(y) = exp(mean_t log pi_old(y_t)), the geometric mean of the token probabilities.
    """
    return confidence.detach().clamp(0.05, 1.0)


def advantages(method, reward, confidence, lam, beta, eps=1e-6):
    """Advantage A of every response, (P, G) float32.

    reward: (P, G) float32, 1 correct, -1 incorrect; confidence: (P, G) float32, c(y).

    >>> reward, confidence = torch.tensor([[1., -1., -1.]]), torch.tensor([[.9, .6, .01]])
    >>> advantages("cw-nsr", reward, confidence, lam=0.1, beta=1.0)
    tensor([[ 0.1000, -0.6000, -0.0500]])
    """
    if method == "grpo":  # arXiv:2402.03300
        return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + eps)
    w = confidence_weight(confidence) if method in ("cw-nsr", "acw-nsr") else 1.0  # CW-NSR
    return torch.where(reward > 0, lam, -beta * w)


def policy_loss(logp, old_logp, adv, loss_mask, denom, clip=0.2):
    """Clipped policy-gradient loss: -sum over tokens of min(rho A, clip(rho) A), over denom.

    logp, old_logp: (B, R) float32, of the sampled tokens at the sampling temperature; adv: (B,),
    or (B, R) in ppo; loss_mask: (B, R) bool. denom: response tokens of the whole mini-batch, those
    with A = 0 too, so that its parts add up however it is cut, and w-reinforce is lam psr + nsr.
    arXiv:1707.06347 Eq. 7 per token, with the advantages of arXiv:2506.01347.
    """
    rho, adv = (logp - old_logp).exp(), adv.view(len(adv), -1)
    objective = torch.minimum(rho * adv, rho.clamp(1 - clip, 1 + clip) * adv)
    return -objective[loss_mask].sum() / denom


def kl_to_reference(logp, ref_logp):
    """Per-token estimate k3 of KL(pi || ref), never negative. arXiv:2402.03300 Eq. 4."""
    logratio = ref_logp - logp
    return logratio.exp() - 1 - logratio


def gae(reward, value):
    """(advantages, returns) of the tokens of a response in ppo, by GAE with gamma = lambda = 1.

    reward, value: (tokens,) float32; value: what the critic expects to come, before each token.
    arXiv:1506.02438 Eq. 18: the sum of the rewards to come, and what it exceeds the value by.

    >>> gae(torch.tensor([0., 0., 1.]), torch.tensor([.5, .25, .75]))
    (tensor([0.5000, 0.7500, 0.2500]), tensor([1., 1., 1.]))
    """
    returns = reward.flip(0).cumsum(0).flip(0)
    return returns - value, returns


def value_loss(value, old_value, returns, loss_mask, denom, clip=0.2):
    """Clipped squared error of the critic: the larger of two, value not far from old_value in one.

    All (B, R), denom as in policy_loss.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    error = torch.maximum((value - returns) ** 2, (near - returns) ** 2)
    return 0.5 * error[loss_mask].sum() / denom


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


def sample_groups(model, tokenizer, problems, prompts, seeds, title, *, chunk=None, done=0,
                  correct=0, **sampling):
    """Sample and verify: yields, problem by problem, a list of rows (dict), one a response.

    prompts, seeds: of each problem, its token ids and a seed a response. sampling: what rollout()
    takes, for `chunk` problems at a time (default: all). The first `done` problems are passed over;
    they had `correct` correct responses. The fields of a row have the names of the evaluation that
    arXiv:2506.01347 released; length is in tokens, finish_reason stop or length (cut), logp the
    mean log-probability of the tokens drawn.
    """
    if not problems:  # a rank without a share
        return
    started, tokens, first, n = time.time(), 0, done, len(seeds[0])

    def tick(count):
        nonlocal tokens
        tokens += count
        spent, new = time.time() - started, done - first
        live(f"{title}: {done}/{len(problems)} problems, {tokens / spent:,.0f} tokens/s" + (
            f", {new * n / spent:,.0f} samples/s, Pass@1 {correct / done / n:.3f}, "
            f"{duration(spent / new * (len(problems) - done))} left" if new else ""))

    chunk = chunk or len(problems)
    for at in range(done, len(problems), chunk):
        responses = rollout(model, prompts[at : at + chunk], seeds[at : at + chunk],
                            stop_ids=stop_tokens(model, tokenizer), tick=tick, **sampling)
        for problem, group_seeds in zip(problems[at : at + chunk], seeds[at : at + chunk]):
            group = list(itertools.islice(responses, n))
            texts = tokenizer.batch_decode([r.ids for r in group], skip_special_tokens=True)
            rows = [{"question_id": problem.question, "generation_id": i, "seed": seed,
                     "response": text, "pred_answer": extract_answer(text), "gold_answer":
                     problem.answer, "label": problem.verify(text, problem.answer),
                     "length": len(r.ids), "finish_reason": "stop" if r.stopped else "length",
                     "logp": sum(r.logp) / len(r.ids)} | problem.tags
                    for i, (r, text, seed) in enumerate(zip(group, texts, group_seeds))]
            done, correct = done + 1, correct + sum(row["label"] for row in rows)
            yield rows


def tally(rows, ks=None):
    """{measure: value} of the responses (rows) to one problem; ks of Pass@k: 1, 2, 4, ... and n."""
    n, c = len(rows), sum(row["label"] for row in rows)
    answers = ["".join((row["pred_answer"] or "").split()) for row in rows]
    votes = collections.Counter(filter(None, answers))  # answers are equal if written the same
    measures = {f"Pass@{k}": pass_at_k(n, c, k)
                for k in ks or sorted({2**i for i in range(n.bit_length())} | {n})}
    measures["maj@n"] = bool(votes) and rows[answers.index(max(votes, key=votes.get))]["label"]
    measures |= {"distinct": len(votes), "distinct correct": len(
                     {a for a, row in zip(answers, rows) if a and row["label"]}),
                 "no box": sum(row["pred_answer"] is None for row in rows) / n}
    if "finish_reason" in rows[0]:  # the files of others may not say
        measures |= {"truncated": sum(row["finish_reason"] == "length" for row in rows) / n,
                     "length": sum(row["length"] for row in rows) / n}
    return measures | {f"{tag}: {rows[0][tag]}": c / n
                       for tag in ("level", "subject") if tag in rows[0]}


def evaluate(model, tokenizer, problems, prompts, n, seed, title, **sampling):
    """{measure: mean over problems} of tally(), from n responses to each problem.

    prompts: the token ids of problems. seed: what seed_of() takes. sampling: what rollout() takes.
    """
    share = range(len(prompts))[RANK::WORLD_SIZE]
    tallies = gather([tally(rows) for rows in sample_groups(
        model, tokenizer, [problems[i] for i in share], [prompts[i] for i in share],
        [[seed_of(*seed, i, j) for j in range(n)] for i in share], title, **sampling)])
    return {key: sum(t[key] for t in tallies) / len(tallies)
            for key in tallies[0] if ":" not in key}


def digits(x, sign=""):
    """
    >>> digits(0.1234), digits(-0.5), digits(0.5, "+"), digits(10)
    ('.123', '-.500', '+.500', '10.000')
    """
    return "-" if math.isnan(x) else re.sub(r"^([+-]?)0\.", r"\1.", f"{x:{sign}.3f}")


def table(rows):
    """Lines of a Markdown table of strings, aligned; the first row is its heading."""
    wide = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join([row[0].ljust(wide[0]), *(
        cell.rjust(width) for cell, width in zip(row[1:], wide[1:]))]) + " |" for row in rows]
    return [lines[0], re.sub(r"[^|]", "-", lines[0]), *lines[1:]]


# --------------------------------------------------------------------------------------------------
# checkpoint and log


def memory_needs(cfg, device):
    """{part: bytes} at the fullest moment of a run, from shapes alone: nothing is loaded.

    Responses count with their full length. What a layer keeps for its gradient is counted for a
    decoder with gated MLP: its inputs, norms, queries, keys, values and the MLP's four tensors.
    """
    try:
        config = (countdown_config() if cfg.model in BASES else
                  AutoConfig.from_pretrained(model_path(cfg.model)))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as e:  # as in load_model
        raise UserError(f"cannot tell the shape of {cfg.model} ({first_line(e)})") from e
    bf16 = cfg.bf16 and device.type != "cpu"  # as in open_run()
    on_cpu, n = device.type == "cpu", sum(p.numel() for p in model.parameters())
    layers, width, heads = (
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    kv = (getattr(config, "num_key_value_heads", None) or heads) * (
        getattr(config, "head_dim", None) or width // heads)
    size = 2 if bf16 else 4
    models = 1 + bool(cfg.kl_coef) + (cfg.method == "ppo")
    trained = 1 + (cfg.method == "ppo")
    longest = cfg.max_prompt_tokens + cfg.max_new_tokens
    cached = min(cfg.rollout_tokens, cfg.prompts * cfg.group_size // WORLD_SIZE * longest * 9 // 8)
    layer = 8 * width + 3 * kv + 4 * inner  # numbers a token
    kept = layers * width + layer if cfg.gradient_checkpointing else layers * layer
    prompts = cfg.prompts // (cfg.updates * WORLD_SIZE) * (cfg.group_size if cfg.drop_unused else 1)
    rows = cfg.prompts * cfg.group_size // (cfg.updates * WORLD_SIZE)
    micro = min(max(cfg.micro_tokens, longest),
                prompts * cfg.max_prompt_tokens + rows * cfg.max_new_tokens)
    # each response has a copy of its prompt's keys and values
    copies = min(rows, micro // cfg.max_new_tokens) * cfg.max_prompt_tokens * 2 * width * (
        1 if cfg.gradient_checkpointing else layers)
    parts = {"weights": 4 * n * models + 2 * n * bf16, "optimizer": n * trained * {
        "float32": 8, "bf16": 4, "cpu": 8 * on_cpu}[cfg.optimizer_state]}
    rollout = {"KV cache": cached * 2 * layers * kv * size,
               "weights in the order of the CPU": on_cpu * 4 * sum(
                   m.weight.numel() for m in large_linears(model))}
    update = {"gradient": 4 * n, "activations": (micro * kept + copies) * size,
              "chunk of logits": min(2**28, micro * config.vocab_size * size)}
    parts |= max(rollout, update, key=lambda part: sum(part.values()))
    # by measurement: a quarter more for temporaries and what the allocator cannot use again
    parts["temporaries"] = sum(parts.values()) // 4
    if on_cpu:
        parts["torch and this program"] = int(peak_memory(device) * 1e9) + 2**27
    return parts


@dataclass
class Run:
    """The state of a run: what a checkpoint holds (model, optimizer, step) and what it needs."""

    cfg: Config
    path: Path  # out/NAME
    problems: list  # of Problem, to train on
    prompts: list  # their token ids
    held_out: tuple  # (problems, prompts) to evaluate on
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    reference: torch.nn.Module  # the model before training; None where nothing asks for its KL
    optimizer: torch.optim.Optimizer
    critic: torch.nn.Module = None  # of ppo
    critic_optimizer: torch.optim.Optimizer = None
    step: int = 0  # steps done
    warned: set = field(default_factory=set)


def first_line(error):
    """The beginning of an error's message, fit to stand inside a line of ours."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def duration(seconds):
    """
    >>> duration(75), duration(7500)
    ('1m15s', '2h05m')
    """
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


def live(text, done=False):
    """Show where a long phase stands: in place on a terminal, every half minute in a log."""
    if RANK:
        return
    terminal, now = sys.stdout.isatty(), time.time()
    if done or now - live.shown > (0.2 if terminal else 30):
        live.shown = now
        print("\r\033[K" * terminal + text, end="\n" * (done or not terminal), flush=True)


live.shown = time.time()


def write_whole(path, content):
    """Write `content` (bytes) so that a reader finds all of it, or what was there before."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


@contextlib.contextmanager
def whole_directory(path):
    """Yields a new directory that takes the place of `path` once the block has ended well."""
    unfinished, old = Path(f"{path}.{os.getpid()}.tmp"), Path(f"{path}.old")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)  # if it is killed here, load_checkpoint() finds the old one
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # Ctrl-C, kill, a terminal that is gone


def on_stops(handler):
    """Have handler called on STOPS, but for those that are ignored (nohup). Returns {s: before}."""
    return {s: signal.signal(s, handler) for s in STOPS if signal.getsignal(s) != signal.SIG_IGN}


@contextlib.contextmanager
def uninterrupted():
    """Hold STOPS back until the block has ended, then raise KeyboardInterrupt."""
    held = []
    handlers = on_stops(lambda *_: held.append(True))
    try:
        yield
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if held:
        raise KeyboardInterrupt


def save_checkpoint(run):
    """Write out/NAME/checkpoint: a model directory that loads anywhere, and the trainer's state.

    No generator's state is in it: the draws of a step follow from the seed and the step.
    """
    if RANK:
        return
    with uninterrupted(), whole_directory(run.path / "checkpoint") as unfinished:
        run.model.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
        state = {"step": run.step, "optimizer": run.optimizer.state_dict()}
        if run.critic is not None:
            state |= {"critic": run.critic.state_dict(),
                      "critic_optimizer": run.critic_optimizer.state_dict()}
        torch.save(state, unfinished / "trainer.pt")


def load_checkpoint(path, device):
    """(model, tokenizer, trainer state) of the run in `path`; None if it was killed before any.

    Raises UserError where it is damaged.
    """
    checkpoint, old = path / "checkpoint", path / "checkpoint.old"

    def recover():
        """Undo a save that was cut short, and say whether there is a checkpoint."""
        if old.exists() and not checkpoint.exists():
            os.rename(old, checkpoint)
        for rest in (old, *path.glob("checkpoint.*.tmp")):
            shutil.rmtree(rest, ignore_errors=True)
        return checkpoint.exists()

    if not on_first_rank(recover):
        return None
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        return *load_model(checkpoint, device), state
    except Exception as e:  # damaged bytes raise anything
        raise UserError(f"{checkpoint} is damaged ({first_line(e)}); put a copy back, or remove it "
                        "to begin that run again") from e


def read_log(path):
    """The rows of a JSON Lines file, without a last line that was cut short by a kill."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
    except ValueError as e:
        raise UserError(f"{path} is damaged ({first_line(e)}); mend it, or move it away") from e
    try:
        return [*rows, dict(json.loads(last))] if last else rows
    except (ValueError, TypeError):
        live(f"{path}: its last line was cut short, and is dropped", done=True)
        return rows


def write_log(path, rows):
    """Write a JSON Lines file anew, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_log(path, rows):
    """Add rows (dicts) to a JSON Lines file; rank 0 does."""
    if RANK:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def print_step(m, left, header):
    """A step's metrics (dict) as one line for a person; logp+ and logp-: of correct, incorrect."""
    if header:
        live("   step    correct  length  cut  entropy  logp+  logp-   lam  beta   grad  clip   "
             "tokens/s rollout update memory   left", done=True)
    t, step = m["time"], f"{m['step']:>5}/{m['steps']:<5}"
    right, wrong, lam, beta = ("-" if m[key] is None else f"{m[key]:.2f}" for key in (
        "logp_correct", "logp_incorrect", "lam", "beta"))
    live(f"{step} {m['correct']:6.1%} {m['length']:7.1f} {m['truncated']:4.0%} "
         f"{m['entropy']:8.3f} {right:>6} {wrong:>6} {lam:>5} {beta:>5} "
         f"{m['grad_norm']:6.3f} {m['clip_frac']:5.1%} "
         f"{t['tokens_per_s']:10,.0f} {t['rollout']:6.2f}s {t['update']:5.2f}s "
         f"{t['memory_gb']:4.1f}GB {duration(left):>6}", done=True)


def plot(run):
    """Draw metrics.jsonl as curves.png."""
    if RANK:
        return
    from matplotlib.figure import Figure  # slow to import
    rows = read_log(run.path / "metrics.jsonl")
    steps = [row for row in rows if "correct" in row]
    figure = Figure(figsize=(12, 6), layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    for axis, keys in zip(panels, (["correct"], ["entropy"], ["length"],
                                   ["logp_correct", "logp_incorrect"], ["lam", "beta"])):
        for key in keys:
            axis.plot([row["step"] for row in steps], np.array([row[key] for row in steps], float),
                      label=key)
        axis.set(title=", ".join(keys), xlabel="step")
    panels[3].legend()
    panels[4].legend()
    for row in rows:
        if "pass_at_k" in row:
            last.semilogx(*zip(*((int(k), p) for k, p in row["pass_at_k"].items())), ".-", base=2,
                          color=str(0.8 * (1 - row["step"] / run.cfg.steps)),
                          label=f"step {row['step']}")
    last.set(title=f"Pass@k of {len(run.held_out[0])} held-out problems", xlabel="k")
    last.legend()
    figure.suptitle(f"{run.path.name}: {run.cfg.method} on {run.cfg.data}")
    figure.savefig(run.path / "curves.png")


def peak_memory(device):
    """Peak memory in GB: of the GPU if the run is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError):  # Linux; its ru_maxrss may be that of the parent
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS


# --------------------------------------------------------------------------------------------------
# train


@dataclass
class Batch:
    """What the updates of a step learn from: B responses, this rank's share of the step's."""

    responses: list  # of Response, grouped by prompt; the prompts of a mini-batch stand together
    old_logp: list  # of B tensors (tokens,) float32: by the training pass, before any update
    ref_logp: list  # the same by the model before training, or None
    adv: torch.Tensor  # (B,) float32; in ppo (B, R)
    values: list = None  # of B tensors (tokens,): the critic's before any update, in ppo
    returns: list = None  # of B tensors (tokens,): what it learns


pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)


def autocast(run):
    """Where it is on, matrix products are in bf16; weights and log-probs stay in float32."""
    return torch.autocast(run.model.device.type, torch.bfloat16, enabled=run.cfg.bf16)


def collect(run):
    """Rollout, verification and advantages of the next step: (Batch, metrics, samples)."""
    cfg, clock, sampled = run.cfg, [time.time()], 0

    def tick(tokens):
        nonlocal sampled
        sampled += tokens
        live(f"step {run.step + 1}/{cfg.steps}: rollout, {sampled:,} tokens, "
             f"{sampled / (time.time() - clock[0]):,.0f} a second")

    chosen = batch_indices(run.step, cfg.prompts, len(run.problems), cfg.seed)
    places = np.arange(cfg.prompts).reshape(cfg.updates, -1)  # a row a mini-batch
    places = places[:, RANK::WORLD_SIZE].ravel().tolist()  # this rank's share of each
    asked = [run.problems[chosen[i]] for i in places for _ in range(cfg.group_size)]
    seeds = [[seed_of(cfg.seed, "rollout", run.step, i, j) for j in range(cfg.group_size)]
             for i in places]
    with autocast(run):
        responses = list(rollout(
            run.model, [run.prompts[chosen[i]] for i in places], seeds, cfg.max_new_tokens,
            stop_tokens(run.model, run.tokenizer), temperature=cfg.temperature,
            rollout_tokens=cfg.rollout_tokens, tick=tick))
    clock.append(time.time())
    texts = run.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
    correct = torch.tensor([p.verify(text, p.answer) for p, text in zip(asked, texts)])
    clock.append(time.time())
    with autocast(run):
        old_logp, entropy, confidence = score(run.model, responses, cfg)
        ref_logp = score(run.reference, responses, cfg)[0] if run.reference is not None else None

    # the schedules move with the step: once per batch of rollouts, not per mini-batch or loss call
    everywhere = gather(correct.tolist())
    lam, beta = method_weights(cfg, run.step, accuracy=sum(everywhere) / len(everywhere))
    reward = torch.where(correct, 1.0, -1.0).to(confidence)
    batch = Batch(responses, old_logp, ref_logp, None)
    if cfg.method == "ppo":  # PPO: the KL is in the reward of each token, the verdict in the last's
        rewards = [cfg.kl_coef * (ref - old) for ref, old in zip(ref_logp or old_logp, old_logp)]
        for tokens, verdict in zip(rewards, reward):
            tokens[-1] += verdict
        with autocast(run):
            batch.values, _ = without_gradient(partial(critic_values, run.critic), responses, cfg)
        adv, batch.returns = zip(*map(gae, rewards, batch.values))
        batch.adv = pad(adv)
    else:
        groups = reward.view(-1, cfg.group_size)
        batch.adv = advantages(cfg.method, groups, confidence.view_as(groups), lam, beta).flatten()
    clock.append(time.time())
    metrics, samples = measure(run, batch, asked, texts, correct, entropy, confidence)
    metrics |= {"lam": lam, "beta": beta, "time": {
        name: b - a for name, a, b in zip(("rollout", "verify", "score"), clock, clock[1:])}}
    return batch, metrics, samples


def measure(run, batch, asked, texts, correct, entropy, confidence):
    """(metrics, a correct and an incorrect sample) of a step, over the responses of all ranks."""
    rows, tokens = [], torch.tensor([len(r.ids) for r in batch.responses])
    gap = pad(batch.old_logp).cpu() - pad([torch.tensor(r.logp) for r in batch.responses])
    adv = batch.adv.cpu() if batch.adv.dim() == 1 else batch.adv.cpu().sum(1) / tokens
    columns = (tokens, correct, pad(entropy).sum(1), confidence, adv, gap.abs().sum(1))
    for r, problem, text, n, ok, nats, c, a, off in zip(
            batch.responses, asked, texts, *(column.tolist() for column in columns)):
        answer = extract_answer(text)
        rows.append({
            "responses": 1, "tokens": n, "correct": ok, "boxed": answer is not None,
            "unparsed": (answer is not None and problem.verify is verify
                         and parse_answer(answer) is None),
            "truncated": not r.stopped, "entropy": nats, "confidence": c,
            "logp": math.log(max(c, 1e-30)), "adv": a, "gap": off, "question": problem.question,
            "answer": problem.answer, "response": text})
    rows = gather(rows)
    right, wrong = ([row for row in rows if row["correct"] is ok] for ok in (True, False))

    def mean(key, rows=rows, over="responses"):
        total = sum(row[key] for row in rows)
        return total / max(1, sum(row[over] for row in rows)) if rows else None

    def quantiles(rows):
        confidences = [row["confidence"] for row in rows]
        return np.quantile(confidences, [0.1, 0.5, 0.9]).tolist() if rows else None

    samples = [{"step": run.step + 1} | {key: row[key] for key in (
        "correct", "question", "answer", "response", "confidence")}
        for row in right[:1] + wrong[:1]]
    return {"step": run.step + 1, "steps": run.cfg.steps, "correct": mean("correct"),
            "boxed": mean("boxed"), "unparsed": mean("unparsed", over="boxed"),
            "truncated": mean("truncated"), "length": mean("tokens"),
            "tokens": sum(row["tokens"] for row in rows), "entropy": mean("entropy", over="tokens"),
            "logp_correct": mean("logp", right), "logp_incorrect": mean("logp", wrong),
            "confidence_correct": quantiles(right), "confidence_incorrect": quantiles(wrong),
            "adv_incorrect": mean("adv", wrong), "rollout_gap": mean("gap", over="tokens")}, samples


def warn(run, metrics, samples):
    """Say once what keeps a run from learning while it looks healthy."""
    for key, found, text in (
            ("cut", metrics["truncated"] > 0.5,
             "most responses are cut at --max-new-tokens, often before their answer: raise it"),
            ("box", metrics["boxed"] == 0,
             "no response has a \\boxed{} answer, so all count as incorrect: does the model know "
             "this form of prompt, and is --max-new-tokens enough?"),
            ("wrong", metrics["correct"] == 0 < metrics["boxed"],
             f"all responses are incorrect; one ends {samples[0]['response'][-80:]!r} where the "
             f"answer is {samples[0]['answer']!r}"),
            ("idle", metrics["updates"] == 0,
             f"{run.cfg.method} has nothing to learn from a batch with {metrics['correct']:.0%} "
             "correct responses: every advantage is 0, and there was no update"),
            ("gap", metrics["rollout_gap"] > 0.1,
             f"log-probs of rollout and training pass differ by {metrics['rollout_gap']:.2f}")):
        if found and key not in run.warned:
            run.warned.add(key)
            live(f"warning, step {metrics['step']}: {text}", done=True)


def step_optimizer(run, model, optimizer):
    """Clip the gradient, summed over the ranks, and step. Returns its norm before clipping.

    Raises UserError, before the step, where it is not finite, on all ranks alike.
    """
    params = list(model.parameters())
    if WORLD_SIZE > 1:
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(params, run.cfg.grad_clip).item()
    if not math.isfinite(norm):
        raise UserError(f"step {run.step + 1}: the gradient is not finite; stopped "
                        f"before the update, what {run.path} holds is sound; start a new run "
                        "with a lower --lr")
    if run.cfg.optimizer_state == "float32":
        optimizer.step()
    else:
        step_one_by_one(optimizer, params, run.cfg.optimizer_state)
    optimizer.zero_grad()  # the gradient makes room for the next rollout
    return norm


MOMENTS = {"exp_avg", "exp_avg_sq"}  # of AdamW; taken in one order, as to_bf16() draws


def step_one_by_one(optimizer, params, where):
    """optimizer.step(), with the state of one parameter at a time in float32 on its device."""
    for p in params:
        optimizer.param_groups[0]["params"] = [p]
        state = optimizer.state[p]
        for key in sorted(MOMENTS & state.keys()):
            state[key] = state[key].to(p.device, torch.float32)
        optimizer.step()
        put_away(state, where)
    optimizer.param_groups[0]["params"] = params


def put_away(state, where):
    """Store AdamW's state of a parameter (dict) as --optimizer-state says."""
    for key in sorted(MOMENTS & state.keys()):
        state[key] = state[key].cpu() if where == "cpu" else to_bf16(state[key])


def to_bf16(x):
    """x in bfloat16, rounded up or down at random: to the nearest, small changes would be lost."""
    bits = x.view(torch.int32)
    return (bits + torch.randint_like(bits, 1 << 16) & -(1 << 16)).view(torch.float32).bfloat16()


def update(run, batch):
    """cfg.updates optimizer steps, each on a mini-batch of whole groups. Returns metrics (dict).

    With drop_unused a mini-batch is as many responses with A != 0, so that there are fewer of them.
    Raises UserError, before the optimizer's step, where the gradient is not finite.
    """
    cfg, model, norms, clipped = run.cfg, run.model, [], 0
    kl_coef = cfg.kl_coef if cfg.method != "ppo" else 0.0
    learning(model)
    torch.manual_seed(seed_of(cfg.seed, "update", run.step))  # of to_bf16
    used = batch.adv.view(len(batch.responses), -1).any(1).cpu()  # A != 0
    kept = used.nonzero()[:, 0] if cfg.drop_unused else torch.arange(len(used))
    for mini in kept.split(len(used) // cfg.updates):
        rows = [i for i in mini.tolist() if used[i] or cfg.entropy_coef or kl_coef]
        # ONE denominator, before the cut into micro-batches. A = 0 counts in it, so all methods
        # divide by the same number; but its gradient is 0, so it needs no forward pass.
        denom, busy = over_ranks(sum(len(batch.responses[i].ids) for i in mini), len(rows))
        if not busy:
            continue
        for micro in micro_batches(batch.responses, rows, cfg.micro_tokens):
            responses = [batch.responses[i] for i in micro]
            with autocast(run):
                stats, mask = token_stats(model, responses, cfg.temperature)
            logp = stats.logprobs
            adv = batch.adv[micro].view(len(micro), -1)[:, : mask.shape[1]]
            old_logp = pad([batch.old_logp[i] for i in micro])
            loss = policy_loss(logp, old_logp, adv, mask, denom, cfg.clip)
            if cfg.entropy_coef:
                loss = loss - cfg.entropy_coef * stats.entropy[mask].sum() / denom
            if kl_coef:
                ref_logp = pad([batch.ref_logp[i] for i in micro])
                loss = loss + kl_coef * kl_to_reference(logp, ref_logp)[mask].sum() / denom
            loss.backward()
            rho = (logp.detach() - old_logp).exp()
            stopped = (adv > 0) & (rho > 1 + cfg.clip) | (adv < 0) & (rho < 1 - cfg.clip)
            clipped += int(stopped[mask].sum())
        norms.append(step_optimizer(run, model, run.optimizer))
        if run.critic is not None:
            update_critic(run, batch, mini.tolist(), denom)
    clipped, tokens = over_ranks(clipped, sum(len(r.ids) for r in batch.responses))
    return {"updates": len(norms), "grad_norm": sum(norms) / max(1, len(norms)),
            "clip_frac": clipped / tokens}


def update_critic(run, batch, rows, denom):
    """One optimizer step of the critic, on the responses `rows` of a mini-batch."""
    learning(run.critic)
    for micro in micro_batches(batch.responses, rows, run.cfg.micro_tokens):
        with autocast(run):
            value, mask = critic_values(run.critic, [batch.responses[i] for i in micro])
        old, returns = (pad([column[i] for i in micro]) for column in (batch.values, batch.returns))
        value_loss(value, old, returns, mask, denom, run.cfg.clip).backward()
    step_optimizer(run, run.critic, run.critic_optimizer)


def train(run):
    """Train from run.step to cfg.steps. Returns {step: {k: Pass@k}} of its evaluations."""
    cfg, log, first_step, spent = run.cfg, run.path / "metrics.jsonl", run.step, 0.0
    scores = {row["step"]: {int(k): score for k, score in row["pass_at_k"].items()}
              for row in read_log(log) if "pass_at_k" in row}
    while True:
        due = run.step in (0, cfg.steps) or cfg.eval_every and run.step % cfg.eval_every == 0
        if due and run.step not in scores:
            with autocast(run):
                measures = evaluate(
                    run.model, run.tokenizer, *run.held_out, cfg.eval_samples,
                    (cfg.seed, "evaluation", run.step), f"Pass@k at step {run.step}",
                    max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                    rollout_tokens=cfg.rollout_tokens)
            scores[run.step] = {int(key.removeprefix("Pass@")): measures.pop(key)
                                for key in [*measures] if key.startswith("Pass@")}
            append_log(log, [{"step": run.step, "pass_at_k": scores[run.step]} | measures])
            live(f"step {run.step}: " + ", ".join(f"Pass@{k} {score:.3f}" for k, score in
                                                  scores[run.step].items()), done=True)
            plot(run)
        if run.step >= cfg.steps:
            return scores
        started = time.time()
        traced = cfg.profile and run.step == first_step + 1  # the first step is not typical
        with torch.profiler.profile() if traced else contextlib.nullcontext() as profiler:
            batch, metrics, samples = collect(run)
            with uninterrupted():  # weights, step and log change together or not at all
                updating = time.time()
                metrics |= update(run, batch)
                run.step += 1
                metrics["time"] |= {"update": time.time() - updating,
                                    "memory_gb": peak_memory(run.model.device),
                                    "tokens_per_s": metrics["tokens"] / metrics["time"]["rollout"]}
                append_log(log, [metrics])
                append_log(run.path / "samples.jsonl", samples)
        if traced and not RANK:
            profiler.export_chrome_trace(str(run.path / "trace.json"))
            by = "cuda" if run.model.device.type == "cuda" else "cpu"
            live(profiler.key_averages().table(sort_by=f"self_{by}_time_total", row_limit=10)
                 + f"\nthe whole trace: {run.path / 'trace.json'}", done=True)
        warn(run, metrics, samples)
        spent += time.time() - started
        print_step(metrics, left=spent / (run.step - first_step) * (cfg.steps - run.step),
                   header=(run.step - first_step) % 20 == 1)
        if run.step % cfg.save_every == 0 or run.step == cfg.steps:
            save_checkpoint(run)
            plot(run)


# --------------------------------------------------------------------------------------------------
# main


def flag_parser(description):
    """An ArgumentParser that raises UserError."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):
        raise UserError(f"{message}; see --help")

    parser.error = error
    return parser


def parse_flags(argv):
    """The flags that were given, {field of Config: value}. Raises UserError."""
    parser = flag_parser(__doc__)
    for knob in fields(Config):
        help, choices = knob.metadata["help"], knob.metadata["choices"]
        if knob.default not in ("", None, False):
            help += f" [{knob.default}]"
        kind = ({"action": argparse.BooleanOptionalAction} if knob.type is bool else
                {"type": knob.type, "choices": choices,
                 "metavar": None if choices else knob.type.__name__.upper()})
        parser.add_argument(f"--{knob.name.replace('_', '-')}", help=help,
                            default=argparse.SUPPRESS, **kind)
    return vars(parser.parse_args(argv))


def pick_device(name):
    """torch.device of that name, or the best that there is. Raises UserError."""
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name or best)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no GPU that this torch can use")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched on the current one
        torch.zeros(1, device=device)
    except Exception as e:  # torch raises three types for a device that is not there
        raise UserError(f"--device {name}: {first_line(e)}") from e
    return device


def new_directory(cfg):
    """out/NAME of a new run: the name asked for, or the first free METHOD-1, METHOD-2, ..."""
    names = [cfg.name] if cfg.name else (f"{cfg.method}-{i}" for i in itertools.count(1))
    for path in (Path("out", name) for name in names):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    check_name(cfg.name)  # another process was faster


def check_name(name):
    """Raises UserError where out/NAME is taken, or is no directory in out/."""
    if Path(name).name != name or name == ".." or not name.isprintable():
        raise UserError(f"--name {name!r}: not a plain name for a directory in out/")
    if name and Path("out", name).exists():
        raise UserError(f"--name {name}: out/{name} exists; choose another, or go on with that "
                        f"run: --resume out/{name}")


def launcher(ranks):
    """The command of a run with so many ranks."""
    return "python nsr.py" if ranks == 1 else f"torchrun --nproc-per-node {ranks} nsr.py"


def resumed_config(path, given):
    """(Config, content of config.json) of the run in `path`, with the flags that may change.

    Raises UserError where there is no run, or the flags would make it another.
    """
    try:
        stored = json.loads((path / "config.json").read_text())
        cfg = Config(**{knob.name: stored[knob.name] for knob in fields(Config)})
        check(cfg)
        ranks, _ = stored["ranks"], stored["problems_sha1"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--resume {path}: no run to go on with ({first_line(e)})") from e
    if ranks != WORLD_SIZE:
        raise UserError(f"--resume {path}: that run has {ranks} ranks, not {WORLD_SIZE}; go on "
                        f"with {launcher(ranks)} --resume {path}")
    for knob, value in given.items():
        if knob in RESUMABLE:
            setattr(cfg, knob, value)
        elif knob not in ("resume", "memory") and value != stored[knob]:
            raise UserError(f"--resume {path}: that run has --{knob.replace('_', '-')} "
                            f"{stored[knob]!r}; leave the flag out, or start a new run")
    check(cfg)
    return cfg, stored


def settings(given):
    """(Config, content of config.json) of the flags `given`; the second is {} of a new run."""
    if "resume" in given:
        return resumed_config(Path(given["resume"]), given)
    return resolve(given), {}


def open_run(given):
    """The Run that the flags `given` ask for, new or to go on with. Raises UserError."""
    cfg, stored = settings(given)
    path, state = Path(given["resume"]) if "resume" in given else None, {"step": 0}
    if not path:
        check_name(cfg.name)
        Path("out").mkdir(exist_ok=True)
    device = pick_device(cfg.device)
    if not path and device.type == "cpu" and "bf16" not in given:  # a preset's is for a GPU
        cfg.bf16 = False
    train, held_out = load_problems(cfg)
    sha1 = hashlib.sha1(repr([p[:2] for p in train + held_out]).encode()).hexdigest()
    if path and stored["problems_sha1"] != sha1:
        raise UserError(f"--resume {path}: {cfg.data} no longer holds the problems that the run "
                        "began with; put them back, or start a new run")
    checkpoint = load_checkpoint(path, device) if path else None
    model, tokenizer, state = checkpoint or (*load_model(cfg.model, device), state)
    if state["step"] > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: that run has done {state['step']} already")
    if len(train) < cfg.prompts or not held_out:
        raise UserError(f"{cfg.data} has {len(train)} problems to train on and {len(held_out)} to "
                        f"hold out: too few for --prompts {cfg.prompts}; or --eval-data has all")
    problems, prompts = encode_prompts(train, model, tokenizer, cfg)
    held_out = tuple(encode_prompts(held_out[: cfg.eval_problems], model, tokenizer, cfg))
    reference = load_model(cfg.model, device)[0].requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    critic = critic_optimizer = None
    if cfg.method == "ppo":  # the model's own layers, with a new head of one number a token
        torch.manual_seed(cfg.seed)
        critic = load_model(cfg.model, device, AutoModelForTokenClassification, num_labels=1)[0]
        critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=cfg.critic_lr)
    for part in filter(None, (model, critic)) if cfg.gradient_checkpointing else ():
        checkpoint_activations(part)
    for name, part in (("critic", critic), ("optimizer", optimizer),
                       ("critic_optimizer", critic_optimizer)):
        if name in state:
            part.load_state_dict(state[name])
    if cfg.optimizer_state != "float32":  # it was loaded in float32, onto the device
        for part in filter(None, (optimizer, critic_optimizer)):
            for of_parameter in part.state.values():
                put_away(of_parameter, cfg.optimizer_state)

    def begin():
        """Logs without what came after the checkpoint; or a new directory."""
        if path:
            for log in (path / "metrics.jsonl", path / "samples.jsonl"):
                write_log(log, [row for row in read_log(log) if row["step"] <= state["step"]])
            return path
        stored.update(problems_sha1=sha1, ranks=WORLD_SIZE, commit=commit(), **{
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "numpy")}, python=sys.version.split()[0])
        return new_directory(cfg)

    path = on_first_rank(begin)
    if not RANK:
        write_whole(path / "config.json", json.dumps(stored | asdict(cfg), indent=1).encode())
    return Run(cfg, path, problems, prompts, held_out, model, tokenizer, reference, optimizer,
               critic, critic_optimizer, state["step"])


def commit():
    """The git commit of this file, or None."""
    with contextlib.suppress(OSError):  # no git
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                               capture_output=True, text=True)
        return asked.stdout.strip() if asked.returncode == 0 else None


def command(body):
    """Run body() as a shell command: its exit status, 130 when stopped, 2 after a user's error."""
    on_stops(signal.default_int_handler)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return body()
    except UserError as e:
        message = "" if RANK else str(e)  # rank 0 says it for all
    except torch.OutOfMemoryError:
        message = "out of memory; lower --micro-tokens or --rollout-tokens, also with --resume"
    except BrokenPipeError:  # of `| head`; what is printed at exit would raise it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except OSError as e:  # no space, no permission, a name that the file system does not take
        message = str(e)
    except RuntimeError as e:
        if WORLD_SIZE == 1 or not (isinstance(e, torch.distributed.DistError) or "gloo" in str(e)):
            raise
        message = (f"rank {RANK} lost the others ({first_line(e)}); what is saved is sound: go on "
                   "with --resume and as many ranks")
    except KeyboardInterrupt:
        return 130
    if message:
        print("\r\033[K" * sys.stderr.isatty() + f"error: {' '.join(message.split())}",
              file=sys.stderr)
    return 2


def main():
    """`python nsr.py`: 0 when trained; where it is stopped, it saves the run and raises again."""
    run = None
    try:
        given = parse_flags(sys.argv[1:])
        cfg, _ = settings(given)  # errors before the ranks wait for each other
        if WORLD_SIZE > 1:
            if "MASTER_ADDR" not in os.environ:
                raise UserError("WORLD_SIZE is set, MASTER_ADDR is not: start with torchrun")
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if given.get("memory"):
            device = pick_device(cfg.device)
            needs = memory_needs(cfg, device)
            live(f"{cfg.method} of {cfg.model} on {device}", done=True)
            live("\n".join(f"{part:32}{need / 2**30:8.2f} GiB" for part, need in (
                *needs.items(), ("together", sum(needs.values())))), done=True)
            return 0
        run = open_run(given)
        cfg, size = run.cfg, sum(p.numel() for p in run.model.parameters())
        live(f"{cfg.method}, {cfg.steps} steps of {cfg.prompts} x {cfg.group_size} responses: "
             f"{cfg.model} ({size:,} parameters, {run.model.device}) on {cfg.data} "
             f"({len(run.problems):,} problems), into {run.path}", done=True)
        scores = train(run)
        if WORLD_SIZE > 1:  # else a rank that ends while another still listens is aborted
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if RANK:
            return 0
    except (KeyboardInterrupt, BrokenPipeError):
        on_stops(signal.SIG_IGN)  # an impatient second Ctrl-C
        if RANK:
            raise
        if run is None:
            print("\nstopped before training began: nothing to save", file=sys.stderr)
        else:
            save_checkpoint(run)
            print(f"\nstopped after step {run.step} of {run.cfg.steps}, which is saved; go on with"
                  f"\n    {launcher(WORLD_SIZE)} --resume {run.path}", file=sys.stderr)
        raise
    print(f"\nPass@k of {len(run.held_out[0])} held-out problems, {cfg.eval_samples} responses "
          f"each, temperature {cfg.temperature:g}; methods compare at equal steps and learning "
          "rate, not at equal Pass@1:")
    rows = [("base", scores.get(0)), (cfg.method, scores[cfg.steps])]  # a log may have lost step 0
    print(*table([["", *(f"k={k}" for k in scores[cfg.steps])]] + [
        [name, *map(digits, row.values())] for name, row in rows if row]), sep="\n")
    print(f"\nIn {run.path}: curves.png, metrics.jsonl, samples.jsonl, config.json, checkpoint/")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
