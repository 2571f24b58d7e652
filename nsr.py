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

The file reads from top to bottom: config, data, verification, model, rollout,
schedules, loss, evaluation, checkpoint and log, train, main. Log-probabilities, entropies and
confidences come straight from the hidden states through kernels/linear_logprob.py. Left out, so
that it can be read in one sitting: more than one GPU, inference servers, learned rewards, tools.

    python nsr.py                                # the embedded task: no GPU, no network, no data
    python nsr.py --method psr --seed 1          # another method
    python nsr.py --preset qwen-math             # Qwen2.5-Math-1.5B on MATH, one GPU
    python nsr.py --model DIR --data FILE.jsonl  # any causal LM, any problems
    python nsr.py --resume out/a-nsr-1           # go on with a run that was stopped or killed
    python eval.py out/a-nsr-1 out/psr-1         # Pass@k of several models side by side
"""

import argparse
import cmath
import contextlib
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import regex as re
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kernels.linear_logprob import linear_logprobs
from kernels.logprob import TokenStats, token_stats_from_logits

# --------------------------------------------------------------------------------------------------
# config

METHODS = ("reinforce", "psr", "nsr", "w-reinforce", "a-nsr", "cw-nsr", "acw-nsr", "grpo")
SCHEDULES = ("exponential", "cosine", "accuracy")


def flag(default, help, choices=None, above=None):
    """A field of Config and its flag: `help`, and what its value must be one of or above."""
    return field(default=default, metadata={"help": help, "choices": choices, "above": above})


@dataclass
class Config:
    """The settings of a run, each a flag of the command line: group_size is --group-size."""

    method: str = flag("a-nsr", "how a verdict becomes an advantage", METHODS)
    preset: str = flag("", "where settings start from: countdown, qwen-math (one GPU), "
                       "qwen-math-paper; default: qwen-math if --model or --data is not countdown")
    model: str = flag("countdown", "causal LM: a directory, out/NAME of a run, a hub name")
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
    kappa: float = flag(0.03, "rate of the exponential schedule, per step")
    lam_min: float = flag(0.05, "lam(t) of a-nsr at t = 0")
    lam_max: float = flag(0.2, "lam(t) of a-nsr at t = T")
    entropy_coef: float = flag(0.0, "entropy bonus (1e-4 in the papers)")
    kl_coef: float = flag(None, "KL to the model before training; default: 1e-3 in grpo, else 0")
    grad_clip: float = flag(1.0, "largest norm of the gradient", above=0)
    eval_every: int = flag(0, "Pass@k every so many steps; 0: only before and after training")
    eval_problems: int = flag(100, "held-out problems to evaluate on", above=0)
    eval_samples: int = flag(256, "responses to each of them: n of Pass@k", above=0)
    save_every: int = flag(25, "steps between checkpoints", above=0)
    rollout_tokens: int = flag(2**16, "most tokens in the KV cache, prompts included", above=0)
    micro_tokens: int = flag(2**13, "most tokens in a training pass, pads included", above=0)
    bf16: bool = flag(False, "bf16 autocast over float32 weights; the presets' on a GPU only")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")
    device: str = flag("", "cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu")


QWEN_MATH = dict(
    model="Qwen/Qwen2.5-Math-1.5B", data="math-train", eval_data="math500", steps=100, lr=1e-6,
    prompts=128, updates=4, max_new_tokens=2048, eval_samples=4, save_every=5, bf16=True,
    rollout_tokens=2**18, micro_tokens=2**14, gradient_checkpointing=True)
PRESETS = {
    "countdown": {},
    "qwen-math": QWEN_MATH,  # the paper's settings at 1/8 of its batch and 2/3 of its length
    "qwen-math-paper": QWEN_MATH | dict(prompts=1024, max_new_tokens=3072, entropy_coef=1e-4),
}
# what a resumed run may change: neither method, model nor data
RESUMABLE = ("steps", "eval_every", "save_every", "device", "rollout_tokens", "micro_tokens",
             "gradient_checkpointing")


class UserError(Exception):
    """What the user can mend: the commands print it as one line and exit with status 2."""


def resolve(given):
    """Config from the flags `given` (dict) over their preset's settings over the defaults.

    Raises UserError where they do not fit together.
    """
    own = any(given.get(knob, "countdown") != "countdown" for knob in ("model", "data"))
    preset = given.get("preset") or ("qwen-math" if own else "countdown")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
    settings = PRESETS[preset] | given | {"preset": preset}
    if "eval_data" not in given and given.get("data") not in (None, PRESETS[preset].get("data")):
        settings["eval_data"] = ""  # the preset's goes with its own --data
    cfg = Config(**settings)
    if cfg.kl_coef is None:
        cfg.kl_coef = 1e-3 if cfg.method == "grpo" else 0.0
    check(cfg)
    return cfg


def check(cfg):
    """Raises UserError where a setting is out of range or two do not fit together."""
    for knob in fields(Config):
        above, value = knob.metadata["above"], getattr(cfg, knob.name)
        if above is not None and not above < value < math.inf:
            name = knob.name.replace("_", "-")
            raise UserError(f"--{name} {value}: must be above {above} and finite")
    if cfg.prompts % cfg.updates:
        raise UserError(f"--prompts {cfg.prompts} does not divide into --updates {cfg.updates}")
    if cfg.method == "grpo" and cfg.group_size < 2:
        raise UserError("--method grpo compares the responses of a group: --group-size 2 or more")


# --------------------------------------------------------------------------------------------------
# data


class Problem(NamedTuple):
    question: str
    answer: str  # gold
    instruction: str  # follows the question in the prompt
    verify: Callable[[str, str], bool]  # (response, answer) -> is it correct


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
    return Problem(question, answer, "Please reason step by step, and put your final answer within "
                   "\\boxed{}.", verify)


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
# Take the last box, undo the typesetting, parse the rest into a tree, and compare: expressions by
# their values at fixed points, all else by structure. Nothing is executed, and all is bounded.

MAX_CHARS, MAX_DEPTH, MAX_ITEMS, MAX_BITS = 500, 25, 30, 1 << 15
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([+-]?\d+(?:\.\d+)?|[A-Za-z]))"
                  r"|(?<!(?<!\\)\\)[{}]")


def extract_answer(response):
    r"""What the last closed \boxed{...} or \fbox{...} of a response (str) holds, or None.

    >>> extract_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text, answer, opened = response[-30_000:] if isinstance(response, str) else "", None, []
    for m in _BOX.finditer(text):
        if m[2]:
            answer = m[2]
        elif m[0] != "}":
            opened.append(m.end() if m[1] else None)
        elif opened and (start := opened.pop()) is not None:
            answer = text[start:m.start()].strip()
    return answer


# ---- clean: LaTeX, unicode and plain text become one alphabet, by rules (needle, pattern, new)

_SIGNS = {name: sign for sign, names in {
    "": "left right middle big Big bigl bigr Bigl Bigr displaystyle textstyle phantom vec overline"
        " overrightarrow boxed fbox rm bf angle triangle ! ( )",
    " ": "quad qquad space , ; : > n", "*": "cdot times ast", "/": "div", ":": "colon", "<": "lt",
    ">": "gt", "≤": "le leq leqslant <=", "≥": "ge geq geqslant >=", "≠": "ne neq !=", "∈": "in",
    "≈": "approx", "∪": "cup", "∖": "setminus backslash", "±": "pm", "∓": "mp", "°": "circ degree",
    "∞": "infty infinity", "π": "pi", "⦃⦄": "emptyset varnothing", "(": "langle", "⏎": "\\",
    ")": "rangle rfloor rceil", "⦃": "{ lbrace", "⦄": "} rbrace", "|": "vert lvert rvert |",
    r"\floor(": "lfloor", r"\ceil(": "lceil", "^": "**", r"\frac": "dfrac tfrac cfrac",
    r"\binom": "dbinom tbinom"}.items() for name in names.split()} | {" ": " "}
_UNICODE = dict(zip("−–—×·⋅÷⁄⟨⟩º⩽⩾\u00a0\u202f", "---***//()°≤≥  "))
_UNICODE |= {"√": "sqrt ", "½": r"\frac12"} | {c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_UNICODE = str.maketrans(_UNICODE | {c: f"_{i}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")})
_NUMERALS = dict(zip("two three four five six seven eight nine".split(), "23456789"))
_TEXT = r"\\(?:text|mbox|hbox|mathrm|(?:text|math)(?:rm|bf|it|normal)|operatorname)\s*"
_RULES = [(sign, re.compile(pattern), new) for sign, pattern, new in (
    ("", r"\\?[$%~]", " "),
    ("\\", r"\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?",  # 0.1\overline{6} is 0.10 + 6/90
     lambda m: f".{m[1]}0+{m[2]}/{'9' * len(m[2])}{'0' * len(m[1])}"),
    (",", r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,)(?=\d{3}(?!\d))", ""),  # 1{,}000
    ("\\", r"\\mathbb\s*\{?R\}?|\\text\{all real numbers\}", "(-∞,∞)"),
    ("", r"\\([A-Za-z]+|.)|[<>!]=|\*\*", lambda m: _SIGNS.get(m[1] or m[0], m[0])),
    ("", r"(?<=\d)(?:\s|\\\w+\{)*([apAP])\.?[mM]\b\.?\}?", lambda m: f' "{m[1].lower()}m"'),
    ("\\", rf"(?<=[\d)}}°π]\s*){_TEXT}\{{(?![^{{}}]*(?:\d|\b(?:and|or|[ap]m|[ei])\b))([^{{}}]*)\}}",
     r' "\1" '),
    ("\\", rf"{_TEXT}\{{([^{{}}]*)\}}", r" \1 "),
    ("\\", r"\\begin\s*\{\w+\}(?:\s*\{[clr|\s]*\})?", "⟦"),
    ("\\", r"(?:⏎\s*)?\\end\s*\{\w+\}", "⟧"),
    ("", r"(?:\s*(?:,|;|\b(?:and|or)\b))+", ","),
    ("≈", r"(?<=\S)\s*≈.*|≈", ""),  # 2/3 ≈ 0.67 is 2/3
    ("", r"\^\s*(?:°|\{\s*°\s*\})|\"degrees?\"|(?<=\d) *degrees", "°"),
    ("base", r"[\s\"]*\bbase[\s\"]*(\w+)", r"_\1"),  # 12 base 5
    ("_", r"_[{\s]*([a-z]{3,5})[}\s]*", lambda m: "_" + _NUMERALS.get(m[1], m[1])),
    ("_", r"\(([\w.]+)\)\s*_", r"\1_"),  # (12)_5
    ("\\", r"\\(frac|binom|sqrt)\s*(\d)(?!\s*\d?/)", r"\\\1{\2}"),
    ("\\", r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    ("", r"(?<![\\A-Za-z\"])(sqrt|(?:arc)?(?:sin|cos|tan)|log|ln|theta)(?![a-z]{2})", r"\\\1 "),
    ("pi", r"(?<![\\A-Za-z])pi(?![A-Za-z])", "π"),
    ("", r"\"[^\"]*\"|(?<![\\A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])|(?<=[\d}°)π]\s*)(?:"
     r"[ckm]m|k?g|ft|lb)(?![A-Za-z])", lambda m: '"' + m[0].strip('"').lower() + '"'),
    ("", r"(?<![\d.^_])(\d+)(?:\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s+(\d+)/(\d+))",
     lambda m: f"({m[1]}+{m[2] or m[4]}/{m[3] or m[5]})"),  # 1\frac12
    ("°", r"(\\(?:sin|cos|tan|sec|csc|cot)\s*(?:\^\s*\w|\^\{[^{}]*\})?\s*[({]?\s*)([\d.]+)\s*°",
     r"\1(\2π/180)"),
    ("°", r"°", ""),
    (" ", r"(?<![\d.,])(\d{1,3}) (\d{3})(?![\d/])", r"\1\2"),  # 1 000
    ("|", r"\|([^|]+)\|", r"\\abs(\1)"),
    ("∖", r"\(-∞,∞\)\s*∖\s*⦃([^⦃⦄,]*)⦄", r"x≠\1"),
    ("", r"(?<![^,⦃⦄])[^,⦃⦄±∓]*+[±∓][^,⦃⦄]*", lambda m: ",".join(  # 1 ± 2 is 1 + 2, 1 - 2
        m[0].translate({ord("±"): p, ord("∓"): q}) for p, q in ("+-", "-+"))))]
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_UNIT = re.compile(r'(?<=[\w)}π]\s*)(?:"(?![ap]m")[^"]*"\s*(?:\^\s*\{?\s*(\d)\s*\}?)?[\s/]*)+')
_LABEL = re.compile(r"""(?:^|(?<=,))\s*(?:[A-Za-z("\\](?:[^=,<>≤≥≠\d^-]|_\{?\w+\}?)*
    |\([A-Za-z][^()=\d]*\)\s*)[=∈]|=\s*[A-Za-z]$|^\s*(?:"\w+"\s*)+is\b""", re.VERBOSE)


@lru_cache(maxsize=1 << 12)
def _clean(text):
    """Rewrite an answer in the alphabet of the parser."""
    plain = re.fullmatch(r"-?(?:[\d.]+|\\frac\{\d+\}\{\d+\})", text)
    text = text.translate(_UNICODE).replace(r"\\", "⏎" if r"\begin" in text else "\\")
    for sign, pattern, new in () if plain else _RULES:
        text = pattern.sub(new, text) if sign in text else text
    if not re.search(r"[([⦃]", text):  # (100,101) is a point
        text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    text = text.strip(" \n\t,:≈")
    text = text if text.endswith("..") else text.rstrip(".,: ")  # 0.333... is no number
    return _NUMERALS.get(text.strip('"'), text)


# ---- parse: a node is ("num", value), ("sym", name) or (kind, detail, parts)

_LEVELS = ",", "⏎", "&", "=<>≤≥≠∈", "∪", ":", "+-", "*/"  # operators, the loosest first
_TOKEN = re.compile(r""""[^"]*" | \\[A-Za-z]+
    | (?=[A-F]*\d)[0-9A-F]++(?:\.[0-9A-F]+)?\s*_\s*(?:\{\s*\d+\s*\}|\d+)  # 1A2_{11}
    | \d+(?:\.\d*)? | \.\d+ | [A-Za-z]\([A-Za-z](?:,\s*[A-Za-z])*\)(?=\s*[=<≤])  # f(x) =
    | [A-Z]{2,}(?![a-z]) | [A-Za-z](?:_(?:\w|\{\w+\}))? | \S""", re.VERBOSE)
_CLOSE = {"(": ")]", "[": ")]", "{": "}", "⦃": "⦄", "⟦": "⟧"}
_ZERO, _ONE, _INF = ("num", 0), ("num", 1), ("sym", "∞")
_LOW = ("+", "-", (_ZERO, _INF))


class _Parser:
    r"""chain: operands of the next level, joined by operators of one; the tightest are powers.

    power    sign* atom '!'? ('^' sign? atom)?
    atom     number | symbol | word | bracket | \frac \sqrt \binom | function
    """

    def __init__(self, text):
        self.tokens, self.at = [*_TOKEN.findall(text), ""], 0
        self.levels = [w for w in _LEVELS if w == "*/" or not {*w}.isdisjoint(self.tokens)]

    def take(self, wanted):
        """Step over the next token and return it, if it is wanted; else return ''."""
        token = self.tokens[self.at]
        self.at += (found := token != "" and token in wanted)
        return token if found else ""

    def chain(self, level=0):
        if level == len(self.levels):
            return self.power()
        ops, parts, wanted = "", [self.chain(level + 1)], self.levels[level]
        while op := self.take(wanted) or wanted == "*/" and self.juxtaposed():
            ops += op
            parts.append(self.chain(level + 1))
        return (wanted[0], ops, tuple(parts)) if ops else parts[0]

    def juxtaposed(self):
        """Return '*' if the next token is a factor, as in 2x, but not in 5 7."""
        last, token = self.tokens[self.at - 1], self.tokens[self.at] or ")"
        factor = token[0].isalnum() or token[0] in '"\\.([{∞'
        return "*" if factor and not (last[-1].isdecimal() and token[0].isdecimal()) else ""

    def power(self):
        signs = [*iter(lambda: self.take("+-"), "")]
        tree = self.atom()
        tree = ("fn", "!", (tree,)) if self.take("!") else tree
        if self.take("^"):
            tree = "^", "^", (tree, self.power() if self.tokens[self.at] in "+-" else self.atom())
        return ("+", "-", (_ZERO, tree)) if signs.count("-") % 2 else tree

    def atom(self):
        token = self.tokens[self.at]
        self.at += 1
        if token in _CLOSE:
            return self.bracket(token)
        if "_" not in token and re.match(r"\.?\d", token):
            return "num", int(token) if token.isdecimal() else Fraction(token)
        if token in (r"\frac", r"\binom"):
            parts = self.atom(), self.atom()
            return ("*", "*/", (_ONE, *parts)) if token == r"\frac" else ("fn", "binom", parts)
        if token == r"\sqrt":
            root = self.bracket("[") if self.take("[") else ("num", 2)
            return "^", "^", (self.atom(), ("*", "/", (_ONE, root)))
        if token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        if token.strip('"\\')[:1].isalnum() or token == "∞":
            return "sym", re.sub(r'[{}\s"]', "", token)
        raise ValueError(f"no atom: {token}")

    def bracket(self, token):
        if self.take(_CLOSE[token]):
            return "⦃⦄", "", ()
        inside, pair = self.chain(), token + self.take(_CLOSE[token])
        if pair == token or pair in ("(]", "[)") and inside[0] != ",":
            raise ValueError("unbalanced")
        if pair == "⟦⟧":  # a column is also written (1, 2)
            return ("()", "", inside[2]) if inside[0] == "⏎" and inside[2][0][0] != "&" else inside
        if inside[0] == ",":
            return "⦃⦄" if pair == "{}" else pair, "", inside[2]
        return (pair, "", (inside,)) if pair == "⦃⦄" else inside

    def function(self, name):
        power, base, wanted = None, (), r"\w|\\frac|\\sqrt|\("
        while op := self.take("^_"):
            power, base = (self.power(), base) if op == "^" else (power, (self.power(),))
        arg = self.power()
        while self.tokens[self.at - 1] != ")" and re.match(wanted, self.tokens[self.at]):
            arg = "*", "*", (arg, self.power())
        tree = "fn", name, (arg, *base) if name == "log" else (arg,)
        return ("^", "^", (tree, power)) if power else tree


def _meaning(tree):
    """Inequalities become intervals, x < 1 or x > 2 a union; of 1/3 = 2/6 only 1/3 is left."""
    kind, ops, sides, *_ = *tree, ()
    if kind in (",", "⦃⦄"):
        parts = [_meaning(t) for t in sides]
        union = parts and all(t[:2] == ("∈", parts[0][1]) for t in parts)
        return ("∈", parts[0][1], (("∪", "", tuple(t[2][0] for t in parts)),)) if union else (
            "⦃⦄", "", sides)
    if kind != "=" or not _names(tree):
        same = kind == "=" and {*ops} == {"="} and all(_equal(sides[0], t) for t in sides[1:])
        return sides[0] if same else tree
    if ops == "≠":
        gaps = ("()", "", (_LOW, sides[1])), ("()", "", (sides[1], _INF))
        return "∈", sides[0][1], (("∪", "", gaps),)
    if {*ops} <= {*">≥"}:
        ops, sides = ops[::-1].translate(_FLIP), sides[::-1]
    if {*ops} <= {*"<≤"} and len(sides) == 2:
        left = sides[0][0] == "sym"
        ops, sides = "<" * left + ops + "<", (_LOW, *sides) if left else (*sides, _INF)
    if {*ops} <= {*"<≤"} and len(sides) == 3 and sides[1][0] == "sym":
        return "∈", sides[1][1], (("(["[ops[0] == "≤"] + ")]"[ops[1] == "≤"], "", sides[::2]),)
    return tree


@lru_cache(maxsize=1 << 12)
def _parse(text):
    """Tree of a clean text, or None."""
    many = sum(map(text.count, _CLOSE)) > MAX_DEPTH
    depths = itertools.accumulate((c in _CLOSE) - (c in ")]}⦄⟧") for c in text * many)
    try:
        parser = _Parser(_UNIT.sub(" ", text) if '"' in text else text)
        tree = parser.chain() if max(depths, default=0) <= MAX_DEPTH else None
        return tree if parser.at == len(parser.tokens) - 1 else None
    except (ValueError, IndexError, RecursionError):  # RecursionError: a long \sin \sin \sin ...
        return None


def parse_answer(text):
    """Return the tree of an answer (str), nested tuples, or None if the grammar lacks it."""
    return _parse(_clean(text)) if isinstance(text, str) and len(text) <= MAX_CHARS else None


# ---- compare: expressions at fixed points, exact (int, Fraction) while they can be, else complex

def _power(x, y):
    """x^y, exact if x is and y is whole; an odd root of a negative number is negative."""
    exact, whole = not isinstance(x, complex), not isinstance(y, complex) and y.denominator == 1
    if exact and whole:
        if abs(y) > 1 and abs(y) * max(map(int.bit_length, x.as_integer_ratio())) > MAX_BITS:
            raise OverflowError("too many digits")
        return Fraction(x) ** int(y) if y < 0 else x ** int(y)
    if not whole and not isinstance(y, complex) and y.denominator % 2 and x.imag == 0 > x.real:
        return (-1) ** y.numerator * complex(-x) ** float(y)
    return complex(x) ** (int(y) if whole else complex(y))


_OPS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "^": _power,
        "/": lambda x, y: x * _power(y, -1), ":": lambda x, y: x * _power(y, -1)}
_FUNCTIONS = {f: getattr(cmath, f) for f in "sin cos tan sinh cosh tanh exp".split()} | {
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log,
    "log": lambda x, base=10: cmath.log(x) / cmath.log(base), "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x), "abs": abs,
    "floor": lambda x: math.floor(x.real), "ceil": lambda x: math.ceil(x.real),
    "!": lambda n: math.factorial(int(n)), "binom": lambda n, k: math.comb(int(n), int(k))}
_CONSTANTS = {"π": complex(math.pi), "e": complex(math.e), "i": 1j}
_VALUED, _FLIP = {"num", "sym", "fn", "+", "*", "^"}, str.maketrans("<>≤≥", "><≥≤")


@lru_cache(maxsize=1 << 12)
def _point(name, k):
    """Where a symbol is evaluated: a positive number of its own at point 0, a negative at 1."""
    return Fraction((-1) ** k * random.Random(f"{name}{k}").randint(10_000, 90_000), 1 << 15)


def _value(tree, k):
    """Value at point k; raises ArithmeticError at a pole or if too large, else ValueError."""
    kind, detail, *parts = tree
    if kind in ("num", "sym"):
        return detail if kind == "num" else _CONSTANTS.get(detail) or _point(detail, k)
    if kind not in _VALUED | {":"}:
        raise ValueError(f"{kind} is no number")
    total, *rest = values = [_value(t, k) for t in parts[0]]
    if kind == "fn":
        if detail in ("!", "binom") and not all(v in range(3000) for v in values):
            raise ValueError("no small whole number")
        total = _FUNCTIONS[detail](*values)
        return complex(total) if isinstance(total, float) else total
    for op, x in zip(detail, rest):
        total = _OPS[op](total, x)
        if not isinstance(total, complex) and (
                abs(total.numerator) >> MAX_BITS or total.denominator >> MAX_BITS // 2):
            raise OverflowError("too many digits")
    noise = isinstance(total, complex) and abs(total) < 1e-13 * sum(map(abs, values))
    return 0 if noise and kind == "+" else total


def _names(tree):
    """The symbols in a tree, without constants."""
    if tree[0] == "sym":
        return {tree[1]} - _CONSTANTS.keys()
    return set().union(*map(_names, tree[2])) if tree[2:] else set()


def _equal(a, b):
    """Whether two expressions have one value wherever both have; raises OverflowError."""
    names, seen = _names(a) | _names(b), False
    for k in range(2 if names else 1):
        try:
            x, y = _value(a, k), _value(b, k)
        except (ZeroDivisionError, ValueError):
            continue
        exact, seen = [v for v in (x, y) if not isinstance(v, complex)], True
        if len(exact) == 2 or exact and not names and exact[0].denominator > 10 ** 6:
            same = x == y  # a long decimal is no sqrt(2), however near
        else:
            same = abs(complex(x) - y) <= 1e-11 * max(abs(x), abs(y)) < math.inf
        if not same:
            return False
    return seen


def _same(a, b):
    """Whether two trees are equal: in any order in sets and unions, else elementwise."""
    if a[0] == b[0] == "=" and len(a[1] + b[1]) == 2 and _names(a) and all(
            t[0] in _VALUED for t in a[2] + b[2]):  # are their differences proportional?
        p, q = (("+", "-", t[2]) for t in (a, b))
        x, y = _value(p, 0), _value(q, 0)
        return (a[1] if (x / y).real > 0 else a[1].translate(_FLIP)) == b[1] and _equal(
            ("*", "*", (p, ("num", y))), ("*", "*", (q, ("num", x))))
    a, b = _meaning(a), _meaning(b)
    if (a[0] == "∈") != (b[0] == "∈"):  # x < 5 is the interval
        return _same(*(t[2][0] if t[0] == "∈" else t for t in (a, b)))
    kinds = {a[0], b[0]}
    if kinds & {"⦃⦄", "∪"}:
        rest, items = ([*t[2]] if t[0] in ("⦃⦄", "∪") else [t] for t in (a, b))
        if all(t[0] == "()" for t in items + rest):  # a point twice is once
            rest, items = [*dict.fromkeys(rest)], [*dict.fromkeys(items)]
        if len(kinds & {"⦃⦄", "∪"}) > 1 or not len(items) == len(rest) <= MAX_ITEMS:
            return False
        while items and (found := next((y for y in rest if _same(items[-1], y)), None)):
            rest.remove(found)
            items.pop()
        return not items
    if kinds <= _VALUED or kinds == {":"} and len(a[1] + b[1]) == 2:
        try:
            return _equal(a, b)
        except OverflowError:  # 10^{10^{10}}
            pass
    return a[:2] == b[:2] and len(a) > 2 and len(a[2]) == len(b[2]) and all(map(_same, a[2], b[2]))


def verify(response, gold):
    r"""Whether the last box of a response equals the gold answer, mathematically: bool.

    response: str. gold: str as LaTeX or plain, or a number. Whatever they are, nothing is raised.

    >>> verify(r"thus \boxed{x = \frac{\sqrt8}{2}}", r"\sqrt{2}"), verify(r"\boxed{204_6}", "204_5")
    (True, False)
    """
    answer, gold = extract_answer(response), str(gold) if isinstance(gold, (int, float)) else gold
    if answer is None or not isinstance(gold, str) or max(len(answer), len(gold)) > MAX_CHARS:
        return answer is not None and answer == gold
    a, b = _clean(answer), _clean(gold)
    if a == b:
        return a != ""
    units = [[m[1] for m in _UNIT.finditer(t) if m[1]] for t in (a, b)]
    if all(units) and units[0] != units[1]:  # units say nothing, but cm^2 is not cm^3
        return False
    labels = [[re.sub(r"\s", "", s) for s in _LABEL.findall(t)] for t in (a, b)]
    readings = [(a, b)]
    if len({*labels[0], *labels[1]}) == 1 or any(labels) != all(labels):  # x = 5 is 5
        readings.append((_LABEL.sub("", a), _LABEL.sub(lambda m: m[0] * ("+" in m[0]), b)))
    try:
        return any(x and y and _same(x, y) for x, y in (map(_parse, pair) for pair in readings))
    except (ArithmeticError, ValueError, RecursionError):  # no number, too large, 1/0
        return False


def verify_countdown(response, gold):
    """True if the last box of `response` solves `gold`: each number once, and the target's value.

    >>> verify_countdown("\\\\boxed{(2+1)*(9-1)}", "1 1 2 9 = 24")
    True
    >>> verify_countdown("\\\\boxed{3*8}", "1 1 2 9 = 24")
    False
    """
    numbers, target = gold.split(" = ")
    text = (extract_answer(response) or "").replace("\\times", "*").replace("\\cdot", "*")
    tokens = re.findall(r"\d+|\S", text)
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
# model


def load_model(name, device):
    """(model, tokenizer) from a directory, a run's out/NAME, a hub name, or countdown.

    The model is in float32, without dropout: rollout and training pass see one policy.
    Raises UserError.
    """
    path = countdown_base() if name == "countdown" else name
    path = Path(path, "checkpoint") if Path(path, "checkpoint").is_dir() else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as e:  # files, formats and hub have no common error; all mean: no model
        raise UserError(f"cannot load the model {name} ({first_line(e)}); give a model directory, "
                        "or a hub name and the network that it takes") from e
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    tokens = {k: getattr(model.generation_config, k) for k in ("eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**tokens)  # others may fail to save
    return model.to(device), tokenizer


def speaks_chat_ml(model, tokenizer):
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


WARM_UP = dict(seed=0, steps=2500, batch=64, lr=4e-3)


def countdown_base():
    """Directory of the embedded base policy, made on first use: a minute or two on two cores.

    Supervised on random correct expressions of problems that are not held out, for few enough
    steps that it stays imperfect and diverse: what a base model is to reinforcement learning.
    """
    made_by = (countdown_problems, countdown_example, random_expression, shuffled_problems,
               load_problems, countdown_tokenizer, countdown_base, warm_up)
    key = repr((WARM_UP, torch.__version__, transformers.__version__,
                *map(inspect.getsource, made_by)))
    path = Path("out", f"base-{hashlib.sha1(key.encode()).hexdigest()[:10]}")
    if not path.exists():
        tokenizer = countdown_tokenizer()
        config = transformers.Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)
        torch.manual_seed(WARM_UP["seed"])
        model = AutoModelForCausalLM.from_config(config)
        warm_up(model, tokenizer, **WARM_UP)
        with whole_directory(path) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return path


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


def warm_up(model, tokenizer, seed, steps, batch, lr):
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


def rollout(model, prompts, group_size, max_new_tokens, stop_ids, generator, *, temperature=1.0,
            top_p=1.0, rollout_tokens=2**16, tick=lambda tokens: None):
    """Sample `group_size` responses to each prompt; yields Response, grouped by prompt.

    prompts: lists of token ids. generator: on the model's device, the only source of randomness.
    At most `rollout_tokens` tokens are in the KV cache at once; tick(n) hears of n new tokens.
    """
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    at_once = max(1, rollout_tokens // (max(map(len, prompts)) + max_new_tokens))
    for i in range(0, len(rows), at_once):
        yield from _rollout(model, rows[i : i + at_once], max_new_tokens, stop_ids, generator,
                            temperature, top_p, tick)


@torch.no_grad()
def _rollout(model, rows, max_new_tokens, stop_ids, generator, temperature, top_p, tick):
    model.eval()
    device, prompts, owner = model.device, [], []
    for row in rows:  # neighbours with one prompt share its prefill
        if not prompts or row is not prompts[-1]:
            prompts.append(row)
        owner.append(len(prompts) - 1)
    width = max(map(len, prompts))
    pads = [width - len(p) for p in prompts]  # on the left: every row goes on at column `width`
    ids = torch.tensor([[0] * n + p for n, p in zip(pads, prompts)], device=device)
    # mask from lengths, not ids: pad may equal eos
    mask = torch.arange(width + max_new_tokens) >= torch.tensor(pads)[:, None]
    mask = mask.long().to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # padded or not, a prompt starts at position 0
    cache = DynamicCache(config=model.config)
    logits = model(ids, attention_mask=mask[:, :width], position_ids=positions[:, :width],
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    owner = torch.tensor(owner, device=device)
    cache.batch_select_indices(owner)
    logits, mask, positions = logits[owner], mask[owner], positions[owner]

    ids = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logp = torch.zeros(len(rows), max_new_tokens, device=device)
    length = torch.full((len(rows),), max_new_tokens, device=device)
    stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
    stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
    alive = torch.arange(len(rows), device=device)  # the row of each line of the cache
    for t in range(max_new_tokens):
        probs = sampling_probs(logits, temperature, top_p)
        if t == 0 and not probs.isfinite().all():
            raise UserError("the model's logits are not finite: it has diverged, or its weights "
                            "are damaged; start again with a lower --lr, or another model")
        token = torch.multinomial(probs, 1, generator=generator)
        ids[alive, t], logp[alive, t] = token[:, 0], probs.gather(1, token)[:, 0].log()
        tick(len(alive))
        ended = torch.isin(token[:, 0], stop_ids)
        if ended.any():  # finished rows leave the batch
            length[alive[ended]], stopped[alive[ended]] = t + 1, True
            going = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(going)
            alive, token, mask, positions = (x[going] for x in (alive, token, mask, positions))
        if not len(alive) or t + 1 == max_new_tokens:
            break
        column = width + t
        logits = model(token, attention_mask=mask[:, : column + 1],
                       position_ids=positions[:, column : column + 1], past_key_values=cache,
                       use_cache=True).logits[:, -1]
    return [Response(row, ids[:n], logp[:n], end) for row, ids, logp, n, end in zip(
        rows, ids.tolist(), logp.tolist(), length.tolist(), stopped.tolist())]


def collate(responses, device):
    """Responses as tensors: prompts padded on the left to P tokens, responses on the right to R.

    Returns ids (B, P + R) int64, attention mask (B, P + R) int64, loss mask (B, R) bool: the
    tokens of the response, its stop token included.
    """
    p, r = max(len(x.prompt_ids) for x in responses), max(len(x.ids) for x in responses)
    pads = [(p - len(x.prompt_ids), r - len(x.ids)) for x in responses]
    ids = [[0] * a + x.prompt_ids + x.ids + [0] * b for x, (a, b) in zip(responses, pads)]
    left, right = torch.tensor(pads).T[..., None]
    column = torch.arange(p + r)
    mask = (column >= left) & (column < p + r - right)  # from lengths, not ids: pad may equal eos
    return torch.tensor(ids, device=device), mask.long().to(device), mask[:, p:].to(device)


@lru_cache(maxsize=2)  # the policy and its reference
@torch.no_grad()
def linear_head(model):
    """The model's torch.nn.Linear from last hidden states to logits; None if it does more to them.

    Found by comparison, for soft-capping, scaling and adapters go by many names.
    """
    head, ids = model.get_output_embeddings(), torch.arange(4, device=model.device)[None]
    hidden = model.base_model(ids, use_cache=False)[0]
    same = type(head) is torch.nn.Linear and torch.equal(head(hidden), model(ids).logits)
    return head if same else None


def token_stats(model, responses, temperature):
    """(TokenStats, loss mask) of the tokens of responses: (B, R), (B, R), (B,) float32; (B, R)."""
    ids, mask, loss_mask = collate(responses, model.device)
    r, positions = loss_mask.shape[1], (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = dict(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False,
                  position_ids=positions[:, :-1])
    head, scored = linear_head(model), dict(temperature=temperature, mask=loss_mask)
    if head is None:
        logits = model(**inputs, logits_to_keep=r).logits
        return token_stats_from_logits(logits, ids[:, -r:], **scored), loss_mask
    hidden = model.base_model(**inputs)[0][:, -r:]  # prompts and padding never reach the head
    return linear_logprobs(hidden, head.weight, ids[:, -r:], bias=head.bias, **scored), loss_mask


def micro_batches(responses, rows, micro_tokens):
    """Cut `rows` (row numbers) into lists of like length that fit the budget, padding included."""
    cut, p, r = [], 0, 0
    for i in sorted(rows, key=lambda i: len(responses[i].prompt_ids) + len(responses[i].ids)):
        p, r = max(p, len(responses[i].prompt_ids)), max(r, len(responses[i].ids))
        if not cut or (len(cut[-1]) + 1) * (p + r) > micro_tokens:
            cut.append([])
            p, r = len(responses[i].prompt_ids), len(responses[i].ids)
        cut[-1].append(i)
    return cut


@torch.no_grad()
def score(model, responses, cfg):
    """(log-probs, entropies, confidences) without gradient: lists of B tensors (tokens,), and (B,).

    By the training pass, at the sampling temperature.
    """
    model.eval()
    logp, entropy, confidence = ([None] * len(responses) for _ in range(3))
    for rows in micro_batches(responses, range(len(responses)), cfg.micro_tokens):
        stats, _ = token_stats(model, [responses[i] for i in rows], cfg.temperature)
        for i, *row in zip(rows, *stats):
            n = len(responses[i].ids)
            logp[i], entropy[i], confidence[i] = row[0][:n], row[1][:n], row[2]
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
    """(lam, beta) of cfg.method at step t: a correct response has A = lam, another A = -beta."""
    if cfg.method in ("a-nsr", "acw-nsr"):  # A-NSR
        return lam_schedule(cfg, t), beta_schedule(cfg, t, accuracy)
    return {"psr": (1.0, 0.0), "nsr": (0.0, 1.0), "w-reinforce": (cfg.lam, 1.0),
            "cw-nsr": (cfg.lam, 1.0)}.get(cfg.method, (1.0, 1.0))


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

    logp, old_logp: (B, R) float32, of the sampled tokens at the sampling temperature; adv: (B,);
    loss_mask: (B, R) bool. denom: response tokens of the whole mini-batch, those with A = 0 too,
    so that its parts add up however it is cut, and w-reinforce is lam psr + nsr.
    arXiv:1707.06347 Eq. 7 per token, with the advantages of arXiv:2506.01347.
    """
    rho, adv = (logp - old_logp).exp(), adv[:, None]
    objective = torch.minimum(rho * adv, rho.clamp(1 - clip, 1 + clip) * adv)
    return -objective[loss_mask].sum() / denom


def kl_to_reference(logp, ref_logp):
    """Per-token estimate k3 of KL(pi || ref), never negative. arXiv:2402.03300 Eq. 4."""
    logratio = ref_logp - logp
    return logratio.exp() - 1 - logratio


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
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(model, tokenizer, problems, prompts, n, generator, title, **sampling):
    """{k: mean Pass@k over problems} for k = 1, 2, 4, ... n, from n responses to each problem.

    prompts: the token ids of problems. sampling: what rollout() takes.
    """
    started, correct, tokens = time.time(), [], 0

    def tick(count):
        nonlocal tokens
        tokens += count
        left = (time.time() - started) * (len(problems) / max(1, len(correct)) - 1)
        live(f"{title}: {len(correct)}/{len(problems)} problems, {tokens:,} tokens"
             + f", {duration(left)} left" * bool(correct))

    responses = rollout(model, prompts, n, stop_ids=stop_tokens(model, tokenizer),
                        generator=generator, tick=tick, **sampling)
    for problem in problems:
        group = [r.ids for r in itertools.islice(responses, n)]
        texts = tokenizer.batch_decode(group, skip_special_tokens=True)
        correct.append(sum(problem.verify(text, problem.answer) for text in texts))
    return {k: sum(pass_at_k(n, c, k) for c in correct) / len(correct)
            for k in (2**i for i in range(n.bit_length()))}


def pass_table(rows):
    """Lines of a table of Pass@k from rows of (name, {k: Pass@k})."""
    wide = max(len(name) for name, _ in rows)
    yield " " * wide + "".join(f"{f'k={k}':>8}" for k in rows[0][1])
    for name, scores in rows:
        yield name.ljust(wide) + "".join(f"{score:8.3f}" for score in scores.values())


# --------------------------------------------------------------------------------------------------
# checkpoint and log


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


@contextlib.contextmanager
def uninterrupted():
    """Hold SIGINT and SIGTERM back until the block has ended, then raise KeyboardInterrupt."""
    held = []
    handlers = {s: signal.signal(s, lambda *_: held.append(True))
                for s in (signal.SIGINT, signal.SIGTERM)}
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
    with uninterrupted(), whole_directory(run.path / "checkpoint") as unfinished:
        run.model.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
        state = {"step": run.step, "optimizer": run.optimizer.state_dict()}
        torch.save(state, unfinished / "trainer.pt")


def load_checkpoint(path, device):
    """(model, tokenizer, trainer state) of the run in `path`; None if it was killed before any.

    Raises UserError where it is damaged.
    """
    checkpoint, old = path / "checkpoint", path / "checkpoint.old"
    if old.exists() and not checkpoint.exists():
        os.rename(old, checkpoint)
    for rest in (old, *path.glob("checkpoint.*.tmp")):
        shutil.rmtree(rest, ignore_errors=True)
    if not checkpoint.exists():
        return None
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        return *load_model(checkpoint, device), state
    except Exception as e:  # damaged bytes raise anything
        raise UserError(f"{checkpoint} is damaged ({first_line(e)}); put a copy back, or remove it "
                        "to begin that run again") from e


def read_log(path):
    """The rows of a JSON Lines log, without a last line that was cut short by a kill."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as e:
        raise UserError(f"{path} is damaged ({first_line(e)}); mend it, or start a new run") from e


def append_log(path, rows):
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def print_step(m, left, header):
    """A step's metrics (dict) as one line for a person; logp+ and logp-: of correct, incorrect."""
    if header:
        live("   step    correct  length  cut  entropy  logp+  logp-   lam  beta   grad  clip   "
             "tokens/s rollout update memory   left", done=True)
    t, step = m["time"], f"{m['step']:>5}/{m['steps']:<5}"
    logp = [math.nan if m[k] is None else m[k] for k in ("logp_correct", "logp_incorrect")]
    live(f"{step} {m['correct']:6.1%} {m['length']:7.1f} {m['truncated']:4.0%} "
         f"{m['entropy']:8.3f} {logp[0]:6.2f} {logp[1]:6.2f} "
         f"{m['lam']:5.2f} {m['beta']:5.2f} {m['grad_norm']:6.3f} {m['clip_frac']:5.1%} "
         f"{t['tokens_per_s']:10,.0f} {t['rollout']:6.2f}s {t['update']:5.2f}s "
         f"{t['memory_gb']:4.1f}GB {duration(left):>6}", done=True)


def plot(run):
    """Draw metrics.jsonl as curves.png."""
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


def mean(values):
    """Mean of a tensor as a float; None if it is empty."""
    return values.float().mean().item() if values.numel() else None


def peak_memory(device):
    """Peak memory in GB: of the GPU if the run is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --------------------------------------------------------------------------------------------------
# train


@dataclass
class Batch:
    """What the updates of a step learn from: B = prompts x group_size responses."""

    responses: list  # of Response, grouped by prompt
    old_logp: list  # of B tensors (tokens,) float32: by the training pass, before any update
    ref_logp: list  # the same by the model before training, or None
    adv: torch.Tensor  # (B,) float32


def seeded(run, purpose):
    """A torch.Generator whose draws follow from the run's seed and the `purpose` (str) alone."""
    digest = hashlib.sha1(f"{run.cfg.seed} {purpose}".encode()).digest()
    return torch.Generator(run.model.device).manual_seed(int.from_bytes(digest[:7], "big"))


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
    with autocast(run):
        responses = list(rollout(
            run.model, [run.prompts[i] for i in chosen], cfg.group_size, cfg.max_new_tokens,
            stop_tokens(run.model, run.tokenizer), seeded(run, f"rollout {run.step}"),
            temperature=cfg.temperature, rollout_tokens=cfg.rollout_tokens, tick=tick))
    clock.append(time.time())
    texts = run.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
    answers = [extract_answer(text) for text in texts]
    asked = [run.problems[i] for i in chosen for _ in range(cfg.group_size)]
    correct = torch.tensor([p.verify(text, p.answer) for p, text in zip(asked, texts)])
    clock.append(time.time())
    with autocast(run):
        old_logp, entropy, confidence = score(run.model, responses, cfg)
        ref_logp = score(run.reference, responses, cfg)[0] if run.reference is not None else None

    # the schedules move with the step: once per batch of rollouts, not per mini-batch or loss call
    lam, beta = method_weights(cfg, run.step, accuracy=mean(correct))
    reward = torch.where(correct, 1.0, -1.0).to(confidence).view(cfg.prompts, cfg.group_size)
    adv = advantages(cfg.method, reward, confidence.view_as(reward), lam, beta)
    batch = Batch(responses, old_logp, ref_logp, adv.flatten())
    clock.append(time.time())

    logp, sampled_logp = confidence.log().cpu(), torch.tensor(sum((r.logp for r in responses), []))
    metrics = {
        "step": run.step + 1, "steps": cfg.steps, "correct": mean(correct),
        "boxed": mean(torch.tensor([answer is not None for answer in answers])),
        "unparsed": mean(torch.tensor([parse_answer(answer) is None for answer, p in zip(
            answers, asked) if answer is not None and p.verify is verify])),
        "truncated": mean(torch.tensor([not r.stopped for r in responses])),
        "length": len(sampled_logp) / len(responses), "tokens": len(sampled_logp),
        "entropy": mean(torch.cat(entropy)), "logp_correct": mean(logp[correct]),
        "logp_incorrect": mean(logp[~correct]), "lam": lam, "beta": beta,
        "adv_incorrect": mean(batch.adv.cpu()[~correct]),
        "rollout_gap": mean((torch.cat(old_logp).cpu() - sampled_logp).abs()),
        "time": {"rollout": clock[1] - clock[0], "verify": clock[2] - clock[1],
                 "score": clock[3] - clock[2]}}
    picked = torch.cat([correct.nonzero()[:1, 0], (~correct).nonzero()[:1, 0]]).tolist()
    samples = [{"step": run.step + 1, "correct": bool(correct[i]), "question": asked[i].question,
                "answer": asked[i].answer, "response": texts[i], "confidence": float(confidence[i])}
               for i in picked]
    return batch, metrics, samples


def warn(run, batch, metrics, samples):
    """Say once what keeps a run from learning while it looks healthy."""
    idle = not batch.adv.any() and not run.cfg.kl_coef and not run.cfg.entropy_coef
    for key, found, text in (
            ("cut", metrics["truncated"] > 0.5,
             "most responses are cut at --max-new-tokens, often before their answer: raise it"),
            ("box", metrics["boxed"] == 0,
             "no response has a \\boxed{} answer, so all count as incorrect: does the model know "
             "this form of prompt, and is --max-new-tokens enough?"),
            ("wrong", metrics["correct"] == 0 < metrics["boxed"],
             f"all responses are incorrect; one ends {samples[0]['response'][-80:]!r} where the "
             f"answer is {samples[0]['answer']!r}"),
            ("idle", idle,
             f"{run.cfg.method} has nothing to learn from a batch with {metrics['correct']:.0%} "
             "correct responses: every advantage is 0, and there was no update"),
            ("gap", metrics["rollout_gap"] > 0.1,
             f"log-probs of rollout and training pass differ by {metrics['rollout_gap']:.2f}")):
        if found and key not in run.warned:
            run.warned.add(key)
            live(f"warning, step {metrics['step']}: {text}", done=True)


def update(run, batch):
    """cfg.updates optimizer steps, each on a mini-batch of whole groups. Returns metrics (dict).

    Raises UserError, before the optimizer's step, where loss or gradient is not finite.
    """
    cfg, model, norms, clipped = run.cfg, run.model, [], 0
    model.train()  # gradient checkpointing asks for it; there is no dropout
    pad, adv_of = torch.nn.utils.rnn.pad_sequence, batch.adv.tolist()
    for mini in torch.arange(len(adv_of)).chunk(cfg.updates):
        # ONE denominator, before the cut into micro-batches. A = 0 counts in it, so all methods
        # divide by the same number; but its gradient is 0, so it needs no forward pass.
        denom = sum(len(batch.responses[i].ids) for i in mini)
        rows = [i for i in mini.tolist() if adv_of[i] or cfg.entropy_coef or cfg.kl_coef]
        if not rows:
            continue
        run.optimizer.zero_grad()
        total = 0.0
        for micro in micro_batches(batch.responses, rows, cfg.micro_tokens):
            with autocast(run):
                stats, mask = token_stats(model, [batch.responses[i] for i in micro],
                                          cfg.temperature)
            logp, adv = stats.logprobs, batch.adv[micro]
            old_logp = pad([batch.old_logp[i] for i in micro], batch_first=True)
            loss = policy_loss(logp, old_logp, adv, mask, denom, cfg.clip)
            if cfg.entropy_coef:
                loss = loss - cfg.entropy_coef * stats.entropy[mask].sum() / denom
            if cfg.kl_coef:
                ref_logp = pad([batch.ref_logp[i] for i in micro], batch_first=True)
                loss = loss + cfg.kl_coef * kl_to_reference(logp, ref_logp)[mask].sum() / denom
            loss.backward()
            total += loss.item()
            rho, adv = (logp.detach() - old_logp).exp(), adv[:, None]
            stopped = (adv > 0) & (rho > 1 + cfg.clip) | (adv < 0) & (rho < 1 - cfg.clip)
            clipped += int(stopped[mask].sum())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item())
        if not math.isfinite(norms[-1] + total):
            raise UserError(f"step {run.step + 1}: the loss or its gradient is not finite; stopped "
                            f"before the update, what {run.path} holds is sound; start a new run "
                            "with a lower --lr")
        run.optimizer.step()
    return {"updates": len(norms), "grad_norm": sum(norms) / max(1, len(norms)),
            "clip_frac": clipped / sum(len(r.ids) for r in batch.responses)}


def train(run):
    """Train from run.step to cfg.steps. Returns {step: {k: Pass@k}} of its evaluations."""
    cfg, log, first_step, spent = run.cfg, run.path / "metrics.jsonl", run.step, 0.0
    scores = {row["step"]: {int(k): score for k, score in row["pass_at_k"].items()}
              for row in read_log(log) if "pass_at_k" in row}
    while True:
        due = run.step in (0, cfg.steps) or cfg.eval_every and run.step % cfg.eval_every == 0
        if due and run.step not in scores:
            with autocast(run):
                scores[run.step] = evaluate(
                    run.model, run.tokenizer, *run.held_out, cfg.eval_samples,
                    seeded(run, f"evaluation {run.step}"), f"Pass@k at step {run.step}",
                    max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                    rollout_tokens=cfg.rollout_tokens)
            append_log(log, [{"step": run.step, "pass_at_k": scores[run.step]}])
            live(f"step {run.step}: " + ", ".join(f"Pass@{k} {score:.3f}" for k, score in
                                                  scores[run.step].items()), done=True)
            plot(run)
        if run.step >= cfg.steps:
            return scores
        started = time.time()
        batch, metrics, samples = collect(run)
        warn(run, batch, metrics, samples)
        with uninterrupted():  # weights, step and log change together or not at all
            updating = time.time()
            metrics |= update(run, batch)
            run.step += 1
            metrics["time"] |= {"update": time.time() - updating,
                                "memory_gb": peak_memory(run.model.device),
                                "tokens_per_s": metrics["tokens"] / metrics["time"]["rollout"]}
            append_log(log, [metrics])
            append_log(run.path / "samples.jsonl", samples)
        spent += time.time() - started
        print_step(metrics, left=spent / (run.step - first_step) * (cfg.steps - run.step),
                   header=(run.step - first_step) % 20 == 1)
        if run.step % cfg.save_every == 0 or run.step == cfg.steps:
            save_checkpoint(run)
            plot(run)


# --------------------------------------------------------------------------------------------------
# main


def parse_flags(argv):
    """The flags that were given, {field of Config: value}. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for knob in fields(Config):
        help, choices = knob.metadata["help"], knob.metadata["choices"]
        if knob.default not in ("", None, False):
            help += f" [{knob.default}]"
        kind = ({"action": argparse.BooleanOptionalAction} if knob.type is bool else
                {"type": knob.type, "choices": choices,
                 "metavar": None if choices else knob.type.__name__.upper()})
        parser.add_argument(f"--{knob.name.replace('_', '-')}", help=help,
                            default=argparse.SUPPRESS, **kind)

    def error(message):
        raise UserError(f"{message}; see --help")

    parser.error = error
    return vars(parser.parse_args(argv))


def pick_device(name):
    """torch.device of that name, or the best that there is. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is not None:
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
    raise UserError(f"--name {cfg.name}: {path} exists; choose another, or --resume {path}")


def resumed_config(path, given):
    """(Config, content of config.json) of the run in `path`, with the flags that may change.

    Raises UserError where there is no run, or the flags would make it another.
    """
    try:
        stored = json.loads((path / "config.json").read_text())
        cfg = Config(**{knob.name: stored[knob.name] for knob in fields(Config)})
        stored["problems_sha1"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--resume {path}: no run to go on with ({first_line(e)})") from e
    for knob, value in given.items():
        if knob in RESUMABLE:
            setattr(cfg, knob, value)
        elif knob != "resume" and value != stored[knob]:
            raise UserError(f"--resume {path}: that run has --{knob.replace('_', '-')} "
                            f"{stored[knob]!r}; leave the flag out, or start a new run")
    check(cfg)
    return cfg, stored


def open_run(given):
    """The Run that the flags `given` ask for, new or to go on with. Raises UserError."""
    path, stored, state = Path(given["resume"]) if "resume" in given else None, {}, {"step": 0}
    if path:
        cfg, stored = resumed_config(path, given)
    else:
        cfg = resolve(given)
        if Path(cfg.name).name != cfg.name or cfg.name == ".." or not cfg.name.isprintable():
            raise UserError(f"--name {cfg.name!r}: not a plain name for a directory in out/")
        if cfg.name and Path("out", cfg.name).exists():
            raise UserError(f"--name {cfg.name}: out/{cfg.name} exists; choose another, or go on "
                            f"with that run: --resume out/{cfg.name}")
        Path("out").mkdir(exist_ok=True)
    device = pick_device(cfg.device)
    if device.type == "cpu" and "bf16" not in given:  # a preset's is for a GPU: slow on a CPU
        cfg.bf16 = False
    if cfg.model == "countdown":  # so small that more threads only wait for each other
        torch.set_num_threads(1)
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
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    if path:
        for log in (path / "metrics.jsonl", path / "samples.jsonl"):
            rows = [row for row in read_log(log) if row["step"] <= state["step"]]
            write_whole(log, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        path, versions = new_directory(cfg), ("torch", "transformers", "numpy")
        stored = {"problems_sha1": sha1, "commit": commit(), "python": sys.version.split()[0],
                  **{package: importlib.metadata.version(package) for package in versions}}
    write_whole(path / "config.json", json.dumps(stored | asdict(cfg), indent=1).encode())
    return Run(cfg, path, problems, prompts, held_out, model, tokenizer, reference, optimizer,
               state["step"])


def commit():
    """The git commit of this file, or None."""
    with contextlib.suppress(OSError):  # no git
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                               capture_output=True, text=True)
        return asked.stdout.strip() if asked.returncode == 0 else None


def command(body):
    """Run body() as a shell command: its exit status, or 2 and one line after a user's error."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return body()
    except UserError as e:
        message = str(e)
    except torch.OutOfMemoryError:
        message = "out of memory; lower --micro-tokens or --rollout-tokens, also with --resume"
    except OSError as e:  # no space, no permission, a name that the file system does not take
        message = str(e)
    except KeyboardInterrupt:
        return 130
    print("\r\033[K" * sys.stderr.isatty() + f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main():
    """`python nsr.py`: 0 when trained, 130 when stopped by Ctrl-C or SIGTERM."""
    run = None
    try:
        run = open_run(parse_flags(sys.argv[1:]))
        cfg, size = run.cfg, sum(p.numel() for p in run.model.parameters())
        live(f"{cfg.method}, {cfg.steps} steps of {cfg.prompts} x {cfg.group_size} responses: "
             f"{cfg.model} ({size:,} parameters, {run.model.device}) on {cfg.data} "
             f"({len(run.problems):,} problems), into {run.path}", done=True)
        scores = train(run)
    except KeyboardInterrupt:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # an impatient second Ctrl-C
        if run is None:
            print("\nstopped before training began: nothing to save", file=sys.stderr)
        else:
            save_checkpoint(run)
            print(f"\nstopped after step {run.step} of {run.cfg.steps}, which is saved; go on with"
                  f"\n    python nsr.py --resume {run.path}", file=sys.stderr)
        return 130
    print(f"\nPass@k of {len(run.held_out[0])} held-out problems, {cfg.eval_samples} responses "
          f"each, temperature {cfg.temperature:g}; methods compare at equal steps and learning "
          "rate, not at equal Pass@1:")
    rows = [("base", scores.get(0)), (cfg.method, scores[cfg.steps])]  # a log may have lost step 0
    print(*pass_table([row for row in rows if row[1]]), sep="\n")
    print(f"\nIn {run.path}: curves.png, metrics.jsonl, samples.jsonl, config.json, checkpoint/")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
