"""Negative sample reinforcement (NSR): train a reasoning model by penalising its wrong answers.

A policy samples G responses to every prompt and a verifier marks each one right or wrong. All the
methods here minimise one clipped policy-gradient loss and differ only in the advantage A that they
give to a response:

    method       A if right   A if wrong     source
    reinforce    1            -1             arXiv:2506.01347
    psr          1            0              arXiv:2506.01347: learn from the right ones only
    nsr          0            -1             arXiv:2506.01347: learn from the wrong ones only
    w-reinforce  lam          -1             arXiv:2506.01347 Eq. 9, lam = 0.1
    a-nsr        lam(t)       -beta(t)       arXiv:2605.07137: the penalty is annealed
    cw-nsr       lam          -w(y)          arXiv:2605.07137: weighed by the confidence in y
    acw-nsr      lam(t)       -beta(t) w(y)  both at once: in neither paper
    grpo         (r - mean) / (std + eps) in the prompt's group, KL to the base  arXiv:2402.03300

The file reads in the order in which a step runs: config, data, verification, model, rollout,
schedules, loss, evaluation, checkpoint and log, train, main. Log-probabilities, entropies and
confidences come straight from the logits through kernels/logprob.py. Left out, so that it can be
read in one sitting: more than one GPU, inference servers, learned rewards, tools.

    python nsr.py                                # the embedded task: no GPU, no network, no data
    python nsr.py --method psr --seed 1          # another method
    python nsr.py --preset qwen-math             # Qwen2.5-Math-1.5B on MATH, one GPU
    python nsr.py --model DIR --data FILE.jsonl  # any causal LM, any problems
    python nsr.py --resume out/a-nsr-1           # go on with a run that was stopped or killed
    python eval.py out/a-nsr-1 out/psr-1         # Pass@k of several models side by side
"""

import argparse
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import regex as re
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kernels.logprob import TokenStats, token_stats_from_logits

# --------------------------------------------------------------------------------------------------
# config

METHODS = ("reinforce", "psr", "nsr", "w-reinforce", "a-nsr", "cw-nsr", "acw-nsr", "grpo")
SCHEDULES = ("exponential", "cosine", "accuracy")


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


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
    steps: int = flag(150, "training steps T, one batch of rollouts each")
    prompts: int = flag(64, "prompts a step")
    group_size: int = flag(8, "responses a prompt, G")
    updates: int = flag(2, "optimizer updates a step: mini-batches that the batch is cut into")
    lr: float = flag(1e-4, "learning rate of AdamW, constant")
    seed: int = flag(0, "decides every random draw of the run")
    name: str = flag("", "write to out/NAME; default: METHOD-1, METHOD-2, ...")
    resume: str = flag("", "go on with the run in this directory, by its own settings")
    max_new_tokens: int = flag(20, "longest response in tokens, stop token included")
    temperature: float = flag(1.0, "of the sampling; log-probs are taken at the same one")
    clip: float = flag(0.2, "pi / pi_old is clipped to 1 - CLIP .. 1 + CLIP")
    lam: float = flag(0.1, "advantage of a right response in w-reinforce and cw-nsr")
    schedule: str = flag("exponential", "how beta(t) falls in a-nsr and acw-nsr", SCHEDULES)
    beta_max: float = flag(1.5, "beta(t) falls from here ...")
    beta_min: float = flag(0.5, "... towards this")
    kappa: float = flag(0.03, "rate of the exponential schedule, per step")
    lam_min: float = flag(0.05, "lam(t) rises from here ...")
    lam_max: float = flag(0.2, "... to this")
    entropy_coef: float = flag(0.0, "entropy bonus (1e-4 in the papers)")
    kl_coef: float = flag(None, "KL to the model before training; default: 1e-3 in grpo, else 0")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    eval_every: int = flag(0, "Pass@k every so many steps; 0: only before and after training")
    eval_problems: int = flag(200, "held-out problems")
    eval_samples: int = flag(256, "responses to each held-out problem: n of Pass@k")
    save_every: int = flag(25, "steps between checkpoints")
    rollout_tokens: int = flag(2**16, "most tokens in the KV cache at once, prompts included")
    micro_tokens: int = flag(2**13, "most tokens in one forward and backward pass, pads included")
    bf16: bool = flag(False, "bf16 autocast over the float32 weights")
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
POSITIVE = ("steps", "prompts", "group_size", "updates", "lr", "max_new_tokens", "temperature",
            "grad_clip", "eval_problems", "eval_samples", "save_every", "rollout_tokens",
            "micro_tokens")


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
    split = {"eval_data": ""} if "data" in given else {}  # the preset's goes with its own --data
    cfg = Config(**PRESETS[preset] | split | given | {"preset": preset})
    if cfg.kl_coef is None:
        cfg.kl_coef = 1e-3 if cfg.method == "grpo" else 0.0
    for knob in POSITIVE:
        if not 0 < getattr(cfg, knob) < math.inf:
            raise UserError(f"--{knob.replace('_', '-')} {getattr(cfg, knob)}: must be above 0")
    if cfg.prompts % cfg.updates:
        raise UserError(f"--prompts {cfg.prompts} does not divide into --updates {cfg.updates}")
    if cfg.method == "grpo" and cfg.group_size < 2:
        raise UserError("--method grpo compares the responses of a group: --group-size 2 or more")
    return cfg


# --------------------------------------------------------------------------------------------------
# data


class Problem(NamedTuple):
    question: str
    answer: str  # gold
    instruction: str  # follows the question in the prompt
    verify: Callable[[str, str], bool]  # (response, answer) -> is it right


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
    answer = next((a for a in found if a not in (None, "", [])), None)
    if answer is None:
        raise ValueError("no answer in answer, final_answer, Answer or reward_model.ground_truth, "
                         "and no \\boxed{} in solution")
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    answer = str(answer).split("####")[-1].strip()
    if len(answer) > 2 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$").strip()
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


def load_problems(cfg):
    """(train, held_out): two lists of Problem that share no question. Raises UserError.

    The split has a seed of its own, so all runs are judged by the same problems.
    """
    problems = random.Random(0).sample(found := read_problems(cfg.data), len(found))
    if cfg.eval_data:
        held_out = random.Random(0).sample(found := read_problems(cfg.eval_data), len(found))
        held_out = held_out[: cfg.eval_problems]
    else:
        held_out = problems[: min(cfg.eval_problems, len(problems) // 5)]
    questions = {p.question for p in held_out}
    train = [p for p in problems if p.question not in questions]
    if len(train) < cfg.prompts or not held_out:
        raise UserError(f"{cfg.data} has {len(train)} problems to train on and {len(held_out)} to "
                        f"hold out: too few for --prompts {cfg.prompts}")
    return train, held_out


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
# verification


def extract_answer(response):
    """What the last closed \\boxed{...} of `response` holds, or None.

    >>> extract_answer("so \\\\boxed{1}, no: \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    answer, start, depth, inner = None, None, 0, 0
    for token in re.finditer(r"\\boxed\s*\{|[{}]", response):
        if token[0] == "}":
            depth = max(0, depth - 1)
            if start is not None and depth < inner:
                answer, start = response[start : token.start()], None
        else:
            depth += 1
            if len(token[0]) > 1:
                start, inner = token.end(), depth
    return answer


def verify(response, gold):
    """True if the last box of `response` (str) says what `gold` (str) says."""
    answer = extract_answer(response)
    return answer is not None and answer.strip() == gold.strip()


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
    if name == "countdown":
        torch.set_num_threads(1)  # so small a model gains nothing from more, and loses to waiting
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
    return model.to(device), tokenizer


def stop_tokens(model, tokenizer):
    """Sorted ids of all tokens that end a response: a model may have several."""
    ids = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None})


def encode_prompts(problems, model, tokenizer, max_new_tokens):
    """Token ids (a list of int) of the prompt of each problem, in the form that the model knows.

    Raises UserError where prompt and response exceed the model's context.
    """
    encoded, limit = [], getattr(model.config, "max_position_embeddings", None) or math.inf
    chat_ml = "qwen" in model.config.model_type and "<|im_start|>" in tokenizer.get_vocab()
    for problem in problems:
        text = f"{problem.question}\n{problem.instruction}"
        if chat_ml:
            text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        elif tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                 tokenize=False, add_generation_prompt=True)
        bare = not chat_ml and not tokenizer.chat_template  # a template writes its own bos
        ids = tokenizer(text, add_special_tokens=bare)["input_ids"]
        if len(ids) + max_new_tokens > limit:
            raise UserError(f"a prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens} "
                            f"exceed the model's context of {limit}: {problem.question[:60]!r}...")
        encoded.append(ids)
    return encoded


WARM_UP = dict(seed=0, steps=2500, batch=64, lr=4e-3)


def countdown_base():
    """Directory of the embedded base policy, made on first use: a minute or two on two cores.

    Supervised on random correct expressions of problems that are not held out, for few enough
    steps that it stays imperfect and diverse: what a base model is to reinforcement learning.
    """
    made_by = (countdown_problems, countdown_example, random_expression, load_problems,
               countdown_tokenizer, countdown_base, warm_up)
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
    rng, started = random.Random(seed), time.time()
    held_out = {p.question for p in load_problems(Config())[1]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.04)
    for step in range(steps):
        pairs = (countdown_example(rng) for _ in itertools.count())
        pairs = itertools.islice((p for p in pairs if p[0].question not in held_out), batch)
        questions, expressions = zip(*((p.question, f"\\boxed{{{e}}}<eos>") for p, e in pairs))
        texts = collate([Response(prompt, ids, [0.0] * len(ids), True) for prompt, ids in zip(
            tokenizer(questions)["input_ids"], tokenizer(expressions)["input_ids"])])
        logp = token_stats(model, texts, range(batch), temperature=1.0).logprobs
        optimizer.zero_grad()
        (-logp.sum() / texts.loss_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        left = (time.time() - started) / (step + 1) * (steps - step - 1)
        live(f"making the base policy (once): step {step + 1}/{steps}, {duration(left)} left",
             done=step + 1 == steps)


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


@dataclass
class Batch:
    """B responses: prompts padded on the left to P tokens, responses on the right to R tokens."""

    input_ids: torch.Tensor  # (B, P + R) int64
    attention_mask: torch.Tensor  # (B, P + R) int64
    loss_mask: torch.Tensor  # (B, R) bool: the response, its stop token included
    sampled_logp: torch.Tensor  # (B, R) float32: as drawn by the rollout
    old_logp: torch.Tensor = None  # (B, R) float32: by the training pass, before any update
    ref_logp: torch.Tensor = None  # (B, R) float32: by the model before training
    adv: torch.Tensor = None  # (B,) float32


def collate(responses, device="cpu"):
    """Batch of a list of Response."""
    p, r = (max(len(x[i]) for x in responses) for i in (0, 1))
    pads = [(p - len(x.prompt_ids), r - len(x.ids)) for x in responses]

    def tensor(rows, dtype):
        return torch.tensor(rows, dtype=dtype).to(device)

    return Batch(  # masks from lengths, not ids: pad may equal eos
        tensor([[0] * a + x.prompt_ids + x.ids + [0] * b for x, (a, b) in zip(responses, pads)],
               torch.long),
        tensor([[0] * a + [1] * (p + r - a - b) + [0] * b for a, b in pads], torch.long),
        tensor([[1] * (r - b) + [0] * b for _, b in pads], torch.bool),
        tensor([x.logp + [0.0] * b for x, (_, b) in zip(responses, pads)], torch.float32))


def micro_batches(batch, rows, micro_tokens):
    """Cut `rows` (row numbers) into lists of like length that fit the budget, padding included."""
    response = batch.loss_mask.sum(1)
    prompt = batch.attention_mask.sum(1) - response
    sizes, cut, p, r = list(zip(prompt.tolist(), response.tolist())), [], 0, 0
    for row in sorted(rows, key=lambda i: sum(sizes[i])):
        p, r = max(p, sizes[row][0]), max(r, sizes[row][1])
        if not cut or (len(cut[-1]) + 1) * (p + r) > micro_tokens:
            cut.append([])
            p, r = sizes[row]
        cut[-1].append(row)
    return cut


def token_stats(model, batch, rows, temperature):
    """TokenStats of the response tokens of some rows: (b, R), (b, R) and (b,), float32.

    Columns that are padding in all these rows stay out of the pass and come back as zeros.
    """
    rows = list(rows)
    loss_mask, mask = batch.loss_mask[rows], batch.attention_mask[rows]
    r = int(loss_mask.sum(1).max())
    skipped = loss_mask.shape[1] - r
    used = slice(int(mask.argmax(1).min()), mask.shape[1] - skipped)
    ids, mask = batch.input_ids[rows, used], mask[:, used]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
                   use_cache=False, logits_to_keep=r).logits
    stats = token_stats_from_logits(logits, ids[:, -r:], temperature=temperature,
                                    mask=loss_mask[:, :r])
    logp, entropy = (torch.nn.functional.pad(x, (0, skipped)) for x in stats[:2])
    return TokenStats(logp, entropy, stats.confidence)


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

    >>> [round(lam_schedule(Config(), t), 3) for t in (0, 75, 150)]
    [0.05, 0.125, 0.2]
    """
    return cfg.lam_min + (cfg.lam_max - cfg.lam_min) * t / cfg.steps


def method_weights(cfg, t, accuracy):
    """(lam, beta) of cfg.method at step t: a right response has A = lam, a wrong one A = -beta."""
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

    reward: (P, G) float32, 1 if right, -1 if wrong; confidence: (P, G) float32, c(y).

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
    """Unbiased Pass@k from n samples of which c are right: 1 - C(n - c, k) / C(n, k).

    >>> pass_at_k(4, 1, 2)
    0.5

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n. arXiv:2107.03374 Eq. 1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(model, tokenizer, problems, n, max_new_tokens, generator, title, **sampling):
    """{k: mean Pass@k over problems} for k = 1, 2, 4, ... n, from n responses to each problem."""
    started, correct = time.time(), []
    prompts = encode_prompts(problems, model, tokenizer, max_new_tokens)
    responses = rollout(model, prompts, n, max_new_tokens, stop_tokens(model, tokenizer), generator,
                        **sampling)
    for problem in problems:
        group = [r.ids for r in itertools.islice(responses, n)]
        texts = tokenizer.batch_decode(group, skip_special_tokens=True)
        correct.append(sum(problem.verify(text, problem.answer) for text in texts))
        left = (time.time() - started) / len(correct) * (len(problems) - len(correct))
        live(f"{title}: {len(correct)}/{len(problems)} problems, {duration(left)} left")
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
    held_out: list  # of Problem
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    reference: torch.nn.Module  # the model before training; None where nothing asks for its KL
    optimizer: torch.optim.Optimizer
    step: int = 0  # steps done
    warned: set = field(default_factory=set)


def first_line(error):
    """The first line of an error's message, fit to stand inside a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def duration(seconds):
    """
    >>> duration(75), duration(7500)
    ('1m15s', '2h05m')
    """
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


def live(text, done=False, shown=[time.time()]):
    """Show where a long phase stands: in place on a terminal, every half minute in a log."""
    terminal = sys.stdout.isatty()
    if done or time.time() - shown[0] > (0.2 if terminal else 30):
        shown[0] = time.time()
        print("\r\033[K" * terminal + text, end="\n" * (done or not terminal), flush=True)


def write_whole(path, content):
    """Write `content` (bytes) so that a reader finds all of it, or what was there before."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


@contextlib.contextmanager
def whole_directory(path):
    """Yields a new directory that takes the place of `path` once the block has ended well."""
    unfinished, old = Path(f"{path}.{os.getpid()}.tmp"), Path(f"{path}.old")
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
    for rest in path.glob("checkpoint.*"):
        shutil.rmtree(rest)
    if not checkpoint.exists():
        return None
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location=device, weights_only=True)
        return *load_model(checkpoint, device), state
    except Exception as e:  # damaged bytes raise anything
        raise UserError(f"{checkpoint} is damaged ({first_line(e)}); put a copy back, or remove it "
                        "to begin that run again") from e


def read_log(path):
    """The rows of a JSON Lines log, without a last line that was cut short by a kill."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def append_log(path, rows):
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def print_step(m, left):
    """One line of a step's metrics for a person, under a header every 20 lines."""
    if m["step"] % 20 == 1:
        print("   step    correct  length  cut  entropy  logp+  logp-   lam  beta   grad  clip   "
              "tokens/s rollout update memory   left")
    t, nan, step = m["time"], math.nan, f"{m['step']:>5}/{m['steps']:<5}"
    live(f"{step} {m['correct']:6.1%} {m['length']:7.1f} {m['truncated']:4.0%} "
         f"{m['entropy']:8.3f} {m['logp_right'] or nan:6.2f} {m['logp_wrong'] or nan:6.2f} "
         f"{m['lam']:5.2f} {m['beta']:5.2f} {m['grad_norm']:6.3f} {m['clip_frac']:5.1%} "
         f"{t['tokens_per_s']:10,.0f} {t['rollout']:6.2f}s {t['update']:5.2f}s "
         f"{t['memory_gb']:4.1f}GB {duration(left):>6}", done=True)


def plot(run):
    """Draw metrics.jsonl as curves.png."""
    from matplotlib.figure import Figure  # here: training needs it only once in a while
    rows = read_log(run.path / "metrics.jsonl")
    steps = [row for row in rows if "correct" in row]
    figure = Figure(figsize=(12, 6), layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    for axis, (title, keys) in zip(panels, {
            "share of right responses": ["correct"], "entropy, nats a token": ["entropy"],
            "length, tokens": ["length"], "mean log-prob a token": ["logp_right", "logp_wrong"],
            "weights": ["lam", "beta"]}.items()):
        for key in keys:
            axis.plot([row["step"] for row in steps],
                      [math.nan if row[key] is None else row[key] for row in steps], label=key)
        axis.set(title=title, xlabel="step")
        axis.legend()
    for row in rows:
        if "pass_at_k" in row:
            last.semilogx(*zip(*((int(k), p) for k, p in row["pass_at_k"].items())), ".-", base=2,
                          color=str(0.8 * (1 - row["step"] / run.cfg.steps)),
                          label=f"step {row['step']}")
    last.set(title=f"Pass@k, {len(run.held_out)} held-out problems", xlabel="k")
    last.legend()
    figure.suptitle(f"{run.path.name}: {run.cfg.method} on {run.cfg.data}")
    figure.savefig(run.path / "curves.png")


# --------------------------------------------------------------------------------------------------
# train


def generator(run, purpose):
    """A torch.Generator whose draws follow from the run's seed and the `purpose` (str) alone."""
    digest = hashlib.sha1(f"{run.cfg.seed} {purpose}".encode()).digest()
    return torch.Generator(run.model.device).manual_seed(int.from_bytes(digest[:7], "big"))


def autocast(run):
    return torch.autocast(run.model.device.type, torch.bfloat16, enabled=run.cfg.bf16)


@torch.no_grad()
def score(model, batch, cfg):
    """TokenStats of the whole batch, (B, R), (B, R) and (B,), without gradient."""
    model.eval()
    cut = micro_batches(batch, range(len(batch.input_ids)), cfg.micro_tokens)
    parts = [token_stats(model, batch, rows, cfg.temperature) for rows in cut]
    order = torch.tensor(list(itertools.chain(*cut))).argsort().to(batch.input_ids.device)
    return TokenStats(*(torch.cat(column)[order] for column in zip(*parts)))


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
            stop_tokens(run.model, run.tokenizer), generator(run, f"rollout {run.step}"),
            temperature=cfg.temperature, rollout_tokens=cfg.rollout_tokens, tick=tick))
    clock.append(time.time())
    texts = run.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
    asked = [run.problems[i] for i in chosen for _ in range(cfg.group_size)]
    right = torch.tensor([p.verify(text, p.answer) for p, text in zip(asked, texts)])
    clock.append(time.time())
    batch = collate(responses, run.model.device)
    with autocast(run):
        batch.old_logp, entropy, confidence = score(run.model, batch, cfg)
        if run.reference is not None:
            batch.ref_logp = score(run.reference, batch, cfg).logprobs

    # the schedules move with the step: once per batch of rollouts, not per mini-batch or loss call
    lam, beta = method_weights(cfg, run.step, accuracy=mean(right))
    reward = torch.where(right, 1.0, -1.0).to(confidence).view(cfg.prompts, cfg.group_size)
    adv = advantages(cfg.method, reward, confidence.view_as(reward), lam, beta)
    batch.adv = adv.flatten()
    clock.append(time.time())

    mask, logp = batch.loss_mask, confidence.log().cpu()
    metrics = {
        "step": run.step + 1, "steps": cfg.steps, "correct": mean(right),
        "boxed": mean(torch.tensor([extract_answer(text) is not None for text in texts])),
        "truncated": mean(torch.tensor([not r.stopped for r in responses])),
        "length": mean(mask.sum(1)), "entropy": mean(entropy[mask]),
        "logp_right": mean(logp[right]), "logp_wrong": mean(logp[~right]), "lam": lam, "beta": beta,
        "adv_wrong": mean(batch.adv.cpu()[~right]), "tokens": int(mask.sum()),
        "rollout_gap": mean((batch.old_logp - batch.sampled_logp).abs()[mask]),
        "time": {"rollout": clock[1] - clock[0], "verify": clock[2] - clock[1],
                 "score": clock[3] - clock[2]}}
    picked = torch.cat([right.nonzero()[:1, 0], (~right).nonzero()[:1, 0]]).tolist()
    samples = [{"step": run.step + 1, "right": bool(right[i]), "question": asked[i].question,
                "answer": asked[i].answer, "response": texts[i], "confidence": float(confidence[i])}
               for i in picked]
    return batch, metrics, samples


def mean(values):
    """Mean of a tensor as a float; None if it is empty."""
    return values.float().mean().item() if values.numel() else None


def warn(run, batch, metrics, samples):
    """Say once what keeps a run from learning while it looks healthy."""
    for key, found, text in (
            ("cut", metrics["truncated"] > 0.5,
             "most responses are cut at --max-new-tokens and count as wrong: raise it"),
            ("box", metrics["boxed"] == 0,
             "no response has a \\boxed{} answer, so all count as wrong: does the model know this "
             "form of prompt, and is --max-new-tokens enough?"),
            ("wrong", metrics["correct"] == 0 < metrics["boxed"],
             f"all responses are wrong; one ends {samples[0]['response'][-80:]!r} where the answer "
             f"is {samples[0]['answer']!r}"),
            ("nothing", not batch.adv.any(),
             f"{run.cfg.method} has nothing to learn from a batch with {metrics['correct']:.0%} "
             "right responses: every advantage is 0, and there was no update"),
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
    for mini in torch.arange(len(batch.adv)).chunk(cfg.updates):
        # ONE denominator, before the cut into micro-batches. A = 0 counts in it, so all methods
        # divide by the same number; but its gradient is 0, so it needs no forward pass.
        denom = int(batch.loss_mask[mini].sum())
        rows = mini[(batch.adv[mini] != 0).cpu() | bool(cfg.entropy_coef or cfg.kl_coef)].tolist()
        if not rows:
            continue
        run.optimizer.zero_grad()
        for micro in micro_batches(batch, rows, cfg.micro_tokens):
            with autocast(run):
                logp, entropy, _ = token_stats(model, batch, micro, cfg.temperature)
            old_logp, adv, mask = batch.old_logp[micro], batch.adv[micro], batch.loss_mask[micro]
            loss = policy_loss(logp, old_logp, adv, mask, denom, cfg.clip)
            if cfg.entropy_coef:
                loss = loss - cfg.entropy_coef * entropy[mask].sum() / denom
            if cfg.kl_coef:
                kl = kl_to_reference(logp, batch.ref_logp[micro])
                loss = loss + cfg.kl_coef * kl[mask].sum() / denom
            loss.backward()
            rho, adv = (logp.detach() - old_logp).exp(), adv[:, None]
            stopped = (adv > 0) & (rho > 1 + cfg.clip) | (adv < 0) & (rho < 1 - cfg.clip)
            clipped += int(stopped[mask].sum())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item())
        if not math.isfinite(norms[-1] + loss.item()):
            raise UserError(f"step {run.step + 1}: the loss or its gradient is not finite; stopped "
                            f"before the update, {run.path}/checkpoint is sound; try a lower --lr")
        run.optimizer.step()
    return {"updates": len(norms), "grad_norm": sum(norms) / max(1, len(norms)),
            "clip_frac": clipped / int(batch.loss_mask.sum())}


def train(run):
    """Train from run.step to cfg.steps. Returns {step: {k: Pass@k}} of its evaluations."""
    cfg, began, first_step, log = run.cfg, time.time(), run.step, run.path / "metrics.jsonl"
    scores = {row["step"]: {int(k): score for k, score in row["pass_at_k"].items()}
              for row in read_log(log) if "pass_at_k" in row}
    while True:
        due = run.step in (0, cfg.steps) or cfg.eval_every and run.step % cfg.eval_every == 0
        if due and run.step not in scores:
            with autocast(run):
                scores[run.step] = evaluate(
                    run.model, run.tokenizer, run.held_out, cfg.eval_samples, cfg.max_new_tokens,
                    generator(run, f"evaluation {run.step}"), f"Pass@k at step {run.step}",
                    temperature=cfg.temperature, rollout_tokens=cfg.rollout_tokens)
            append_log(log, [{"step": run.step, "pass_at_k": scores[run.step]}])
            live(f"step {run.step}: " + ", ".join(f"Pass@{k} {score:.3f}" for k, score in
                                                  scores[run.step].items()), done=True)
        if run.step == cfg.steps:
            return scores
        batch, metrics, samples = collect(run)
        warn(run, batch, metrics, samples)
        with uninterrupted():  # weights, step and log change together or not at all
            started = time.time()
            metrics |= update(run, batch)
            run.step += 1
            metrics["time"] |= {"update": time.time() - started, "memory_gb": peak_memory(),
                                "tokens_per_s": metrics["tokens"] / metrics["time"]["rollout"]}
            append_log(log, [metrics])
            append_log(run.path / "samples.jsonl", samples)
        pace = (time.time() - began) / (run.step - first_step)
        print_step(metrics, left=pace * (cfg.steps - run.step))
        if run.step % cfg.save_every == 0 or run.step == cfg.steps:
            save_checkpoint(run)
            plot(run)


def peak_memory():
    """Peak memory in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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


def new_directory(cfg):
    """out/NAME of a new run: the name asked for, or the first free METHOD-1, METHOD-2, ..."""
    if cfg.name:
        path = Path("out", cfg.name)
        if path.parent != Path("out") or (path / "config.json").exists():
            raise UserError(f"--name {cfg.name}: {path} holds a run already, or is no plain name; "
                            f"choose another, or go on with that run: --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        return path
    for number in itertools.count(1):
        path = Path("out", f"{cfg.method}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def open_run(given):
    """The Run that the flags `given` ask for, new or to go on with. Raises UserError."""
    path = Path(given["resume"]) if "resume" in given else None
    if path:
        try:
            stored = json.loads((path / "config.json").read_text())
            cfg = Config(**{knob.name: stored[knob.name] for knob in fields(Config)})
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"--resume {path}: no run to go on with ({first_line(e)})") from e
        for knob, value in given.items():
            if knob in ("steps", "eval_every", "save_every", "device"):
                setattr(cfg, knob, value)
            elif knob != "resume" and value != stored[knob]:
                raise UserError(f"--resume {path}: that run has --{knob.replace('_', '-')} "
                                f"{stored[knob]}; leave the flag out, or start a new run")
    else:
        cfg = resolve(given)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except Exception as e:  # torch raises three types for a device that is not there
        raise UserError(f"--device {device}: {first_line(e)}") from e
    problems, held_out = load_problems(cfg)
    sha1 = hashlib.sha1(repr([p[:2] for p in problems + held_out]).encode()).hexdigest()
    if path and stored["problems_sha1"] != sha1:
        raise UserError(f"--resume {path}: {cfg.data} no longer holds the problems that the run "
                        "began with; put them back, or start a new run")
    checkpoint = load_checkpoint(path, device) if path else None
    model, tokenizer, state = checkpoint or (*load_model(cfg.model, device), None)
    prompts = encode_prompts(problems, model, tokenizer, cfg.max_new_tokens)
    encode_prompts(held_out, model, tokenizer, cfg.max_new_tokens)  # too long is said now
    reference = load_model(cfg.model, device)[0].requires_grad_(False) if cfg.kl_coef else None
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    step = state["step"] if state else 0
    if path:
        for log in (path / "metrics.jsonl", path / "samples.jsonl"):
            rows = [row for row in read_log(log) if row["step"] <= step]
            write_whole(log, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        path = new_directory(cfg)
        about = {"problems_sha1": sha1, "commit": commit(), "versions": {
            "python": platform.python_version(), "numpy": np.__version__,
            "torch": torch.__version__, "transformers": transformers.__version__}}
        write_whole(path / "config.json", json.dumps(asdict(cfg) | about, indent=1).encode())
    return Run(cfg, path, problems, prompts, held_out, model, tokenizer, reference, optimizer, step)


def commit():
    """The git commit of this file, or None."""
    with contextlib.suppress(OSError):  # no git
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                               capture_output=True, text=True)
        return asked.stdout.strip() if asked.returncode == 0 else None


def command(body):
    """Run body() as a shell command: its exit status, or 2 and one line after a UserError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return body()
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def main():
    """`python nsr.py`: 0 when trained, 130 when stopped by Ctrl-C or SIGTERM."""
    run = None
    try:
        run = open_run(parse_flags(sys.argv[1:]))
        cfg, size = run.cfg, sum(p.numel() for p in run.model.parameters())
        print(f"{cfg.method}, {cfg.steps} steps of {cfg.prompts} x {cfg.group_size} responses: "
              f"{cfg.model} ({size:,} parameters, {run.model.device}) on {cfg.data} "
              f"({len(run.problems):,} problems, {len(run.held_out)} held out), into {run.path}")
        scores = train(run)
    except KeyboardInterrupt:
        if run is None:
            print("\nstopped before the first step: nothing to save", file=sys.stderr)
        else:
            with contextlib.suppress(KeyboardInterrupt):  # an impatient second Ctrl-C
                save_checkpoint(run)
            print(f"\nstopped after step {run.step} of {run.cfg.steps}, which is saved; go on with"
                  f"\n    python nsr.py --resume {run.path}", file=sys.stderr)
        return 130
    print(f"\nPass@k on {len(run.held_out)} held-out problems, {cfg.eval_samples} responses each, "
          f"temperature {cfg.temperature:g}; methods compare at equal steps and learning rate, not "
          "at equal Pass@1:")
    print(*pass_table([("base", scores[0]), (cfg.method, scores[cfg.steps])]), sep="\n")
    print(f"\nIn {run.path}: curves.png, metrics.jsonl, samples.jsonl, config.json, checkpoint/")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
