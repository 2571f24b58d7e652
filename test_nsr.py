"""Tests of nsr.py, eval.py and kernels/: `pytest` runs them all on a CPU, in a few minutes.

The kernels run in Triton's interpreter where there is no GPU, and on the GPU where there is one.
"""

import collections
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these models are too small for more

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of transformers
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import transformers

import eval as evaluation_command
import kernels.linear_logprob as L
import kernels.logprob as K
import nsr

K.INTERPRET = False  # only the kernels' own tests ask for it: it is slow
ROOT = Path(__file__).parent
FEW = 40
COUNTDOWN_PROBLEMS = nsr.countdown_problems
TIMES = {"time"}  # the fields of a metrics row that measure the machine, not the run


# --------------------------------------------------------------------------------------------------
# fixtures


@pytest.fixture(scope="session")
def tokenizer():
    return nsr.countdown_tokenizer()


def tiny_model(tokenizer, seed=0, hidden=32):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """Directory of a policy that has half learnt one answer to each of FEW problems."""
    rng, answers = random.Random(0), {}
    while len(answers) < FEW:
        problem, expression = nsr.countdown_example(rng)
        answers.setdefault(problem.question, f"\\boxed{{{expression}}}<eos>")
    texts = [nsr.Response(tokenizer(q)["input_ids"], tokenizer(a)["input_ids"], [], True)
             for q, a in answers.items()]
    model = tiny_model(tokenizer, hidden=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        stats, mask = nsr.token_stats(model, texts, temperature=1.0)
        optimizer.zero_grad()
        (-stats.logprobs.sum() / mask.sum()).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@contextlib.contextmanager
def handlers_kept():
    before = [(s, signal.getsignal(s)) for s in nsr.STOPS]
    try:
        yield
    finally:
        for s, handler in before:
            signal.signal(s, handler)


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """cli(*flags) runs nsr.py's command in this process, in an empty folder: (status, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nsr, "countdown_problems", lambda: COUNTDOWN_PROBLEMS(FEW))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["nsr.py", *map(str, flags)])
        with handlers_kept():
            status = nsr.command(nsr.main)
        return status, *capsys.readouterr()

    return run


def short(base, **flags):
    """Flags of a run that takes seconds."""
    flags = dict(preset="countdown", model=base, data="countdown", steps=4, prompts=4, group_size=4,
                 eval_problems=4, eval_samples=4, save_every=2, lr=1e-3) | flags
    return [f"--{knob.replace('_', '-')}={value}" for knob, value in flags.items()]


def script(flags, cwd):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def hear():  # the tests may run where these are ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    return subprocess.Popen([sys.executable, ROOT / "nsr.py", *flags], cwd=cwd, text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear)


def state(run):
    """(weights, metrics without times) of a finished run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    rows = [{k: v for k, v in row.items() if k not in TIMES}
            for row in nsr.read_log(run / "metrics.jsonl")]
    return {k: v.clone() for k, v in model.state_dict().items()}, rows


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def a_batch(model, lengths=((3, 5), (6, 2), (4, 4), (6, 7), (2, 1), (5, 3)), adv=None, seed=0):
    """A Batch of random tokens with given (prompt, response) lengths, scored by `model`.

    Prompts of one length are one prompt.
    """
    rng, words = random.Random(seed), model.config.vocab_size
    prompt = {p: [rng.randrange(words) for _ in range(p)] for p, _ in lengths}
    responses = [nsr.Response(prompt[p], [rng.randrange(1, words) for _ in range(r - 1)] + [0],
                              [0.0] * r, True) for p, r in lengths]
    old_logp = nsr.score(model, responses, nsr.Config())[0]
    adv = torch.tensor(adv or [1.0, -1.0, 0.0, -0.5, 1.0, -1.0][: len(lengths)])
    return nsr.Batch(responses, old_logp, None, adv)


def logp_alone(model, response, temperature=1.0):
    """Log-probs of a response by plain transformers: alone, without padding."""
    ids = torch.tensor([response.prompt_ids + response.ids])
    rows = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)[len(response.prompt_ids) - 1 :]
    return rows[torch.arange(len(response.ids)), response.ids]


def close(a, b, atol=2e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=0)


def a_run(model, tokenizer=None, **settings):
    cfg = nsr.Config(**dict(kl_coef=0.0, prompts=3, group_size=2, updates=1) | settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr)
    return nsr.Run(cfg, Path("nowhere"), [], [], ([], []), model, tokenizer, None, optimizer)


# --------------------------------------------------------------------------------------------------
# config and data


def test_presets_and_flags_resolve():
    assert nsr.resolve({}).lr == 1e-4 and nsr.resolve({}).kl_coef == 0
    assert nsr.resolve({"method": "grpo"}).kl_coef == 1e-3
    assert nsr.resolve({"method": "grpo", "kl_coef": 0.0}).kl_coef == 0
    qwen = nsr.resolve({"preset": "qwen-math"})
    assert (qwen.model, qwen.lr, qwen.bf16) == ("Qwen/Qwen2.5-Math-1.5B", 1e-6, True)
    paper = nsr.resolve({"preset": "qwen-math-paper"})
    assert (paper.prompts, paper.group_size, paper.prompts // paper.updates) == (1024, 8, 256)
    assert (paper.max_new_tokens, paper.temperature, paper.entropy_coef) == (3072, 1.0, 1e-4)
    own = nsr.resolve({"model": "x", "data": "y.jsonl", "lr": 3e-6})
    assert (own.preset, own.lr, own.eval_data) == ("qwen-math", 3e-6, "")
    assert nsr.resolve({"model": "x", "data": "countdown"}).preset == "qwen-math"
    assert nsr.resolve({"model": "countdown-strong"}).preset == "countdown"


def test_help_tells_every_flag_with_its_default(cli, capsys):
    with pytest.raises(SystemExit) as e:
        cli("--help")
    out = capsys.readouterr().out
    assert e.value.code == 0 and "[125]" in out and "[0.0001]" in out
    for knob in dataclasses.fields(nsr.Config):
        assert f"--{knob.name.replace('_', '-')}" in out


@pytest.mark.parametrize("row, question, answer", [
    ({"problem": "p", "answer": "1"}, "p", "1"),
    ({"question": "p", "final_answer": ["2"]}, "p", "2"),
    ({"prompt": "p", "Answer": 27.0}, "p", "27"),
    ({"content": "p", "answer": 0}, "p", "0"),
    ({"problem": "p", "answer": 0.5}, "p", "0.5"),
    ({"prompt": [{"content": "p"}], "reward_model": {"ground_truth": "3"}}, "p", "3"),
    ({"problem": "p", "solution": "so \\boxed{1} or \\boxed{\\frac{1}{2}}."}, "p", "\\frac{1}{2}"),
    ({"problem": "p", "solution": ["so", "\\boxed{4}"]}, "p", "4"),
    ({"question": "p", "answer": "9 + 9 = 18\n#### 18"}, "p", "18"),
    ({"problem": "p", "answer": "$5$"}, "p", "5"),
    ({"problem": "p", "answer": "", "solution": "\\boxed{6}"}, "p", "6"),
    ({"problem": "p", "final_answer": ["$2$", "$3$", 27.0]}, "p", "2, 3, 27"),
])
def test_problem_layouts(row, question, answer):
    assert nsr.parse_problem(row)[:2] == (question, answer)


@pytest.mark.parametrize("row", [
    {}, {"problem": ""}, {"problem": "p"}, {"answer": "1"}, {"problem": 3, "answer": "1"},
    {"problem": "p", "solution": "none"}, {"problem": "p", "answer": " "}])
def test_incomplete_problems_are_refused(row):
    with pytest.raises(ValueError):
        nsr.parse_problem(row)


def test_downloads_are_checked_and_written_whole(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    content = b'{"problem": "1 + 1?", "answer": "2"}\n'
    monkeypatch.setattr(nsr.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(content))
    with pytest.raises(nsr.UserError, match="math-test"):
        nsr.read_problems("math-test")  # not the bytes that the name stands for
    assert not list(tmp_path.rglob("*.jsonl*"))
    blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    monkeypatch.setitem(nsr.DOWNLOADS, "math-test", (nsr.DOWNLOADS["math-test"][0], blob_id))
    assert nsr.read_problems("math-test")[0].answer == "2"
    monkeypatch.setattr(nsr.urllib.request, "urlopen", None)  # from now on it comes from out/data
    assert nsr.read_problems("math-test")[0].question == "1 + 1?"


def test_held_out_problems_are_never_trained_on(tmp_path):
    for settings in ({}, {"eval_problems": 100}, {"eval_problems": 1000}):  # one split for all
        train, held_out = nsr.load_problems(nsr.Config(**settings))
        assert (len(train), len(held_out)) == (3600, 400)
        assert not {p.question for p in train} & {p.question for p in held_out}
    for name, count in (("a", 40), ("b", 10)):
        rows = [{"problem": f"q{i}", "answer": i} for i in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = nsr.Config(data=str(tmp_path / "a"), eval_data=str(tmp_path / "b"), eval_problems=1)
    train, held_out = nsr.load_problems(cfg)
    assert (len(train), len(held_out)) == (30, 10)


def test_warm_up_never_sees_held_out_problems(monkeypatch, tokenizer):
    seen, stats = set(), nsr.token_stats
    monkeypatch.setattr(nsr, "token_stats", lambda model, texts, **k: (
        seen.update(tuple(t.prompt_ids) for t in texts), stats(model, texts, **k))[1])
    nsr.warm_up(tiny_model(tokenizer), tokenizer, seed=0, steps=20, batch=64, lr=1e-3)
    held_out = nsr.load_problems(nsr.Config())[1]
    assert len(seen) > 500
    assert not seen & {tuple(tokenizer(p.question)["input_ids"]) for p in held_out}


def test_epochs_visit_every_problem_once():
    seen = [i for step in range(7) for i in nsr.batch_indices(step, 6, 14, seed=3)]
    for epoch in range(3):
        assert sorted(seen[14 * epoch : 14 * (epoch + 1)]) == list(range(14))
    assert seen[:14] != seen[14:28]
    assert nsr.batch_indices(0, 6, 14, seed=4) != nsr.batch_indices(0, 6, 14, seed=3)


# --------------------------------------------------------------------------------------------------
# verification

DATA = Path(__file__).parent / "../shared/data"
# a gold answer  ==  what equals it  !=  what does not; two spaces between two
TABLE = r"""
5  ==  5  5.0  +5  05  $5$  5.  \,5  {5}  (5)  !=  6  -5  50  .5  5.0001  5x  5 or 7  4 \approx 5
-5  ==  -5  −5  –5  - 5  -5.00  -\frac{5}{1}  2-7  !=  5  --5  5-  -1/5  −6
100000  ==  100,000  100{,}000  100,\!000  10^5  !=  100001  100,001  100.000  (100,000)  100000.01
\frac{1}{2}  ==  \dfrac{1}{2}  \tfrac12  \frac12  1/2  0.5  .5  ½  !=  2  0.05  50  50\%  -1/2  1,2
\frac{1}{3}  ==  1/3  0.\overline{3}  0.\bar{3}  \frac{2}{6}  !=  0.333  0.33333333333333333333  3
3\frac{1}{8}  ==  \frac{25}{8}  3.125  3\frac18  3 1/8  !=  \frac{3}{8}  3\cdot\frac{1}{8}  31/8
10^{10^{10}}  ==  10^{10000000000}  !=  10^{10^{11}}  10^{10^{10}+1}
12\text{ cm}  ==  12  12\ \mathrm{cm}  12 cm  12cm  12\mbox{ cm}  !=  13  12.1  cm  -12 cm  1.2 cm
\$2.50  ==  2.5  \$2.5  $2.50  \frac52  2.50\text{ dollars}  !=  250  2.05  25
90^\circ  ==  90  90°  90^{\circ}  90\text{ degrees}  90 degrees  x=90^\circ  !=  91  9  90^2
2\sqrt{2}  ==  \sqrt{8}  2\sqrt2  \sqrt2 \cdot 2  !=  2.828  2.8284271247461903  \sqrt{6}  2\sqrt{3}
2\pi  ==  \pi\cdot 2  2π  2pi  \frac{4\pi}{2}  \pi+\pi  !=  2  \pi^2  6.28  6.283185307179586  3\pi
3+4i  ==  4i+3  3+4\cdot i  3 + 4\mathrm{i}  z=3+4i  (2+i)^2  !=  3-4i  4+3i  3+4  -3-4i  7i
1+i\sqrt{3}  ==  2e^{i\pi/3}  2(\cos\frac{\pi}{3}+i\sin\frac{\pi}{3})  !=  2e^{i\pi/6}
\cos 13^\circ  ==  \sin 77^\circ  \cos(13^\circ)  !=  \cos 13  \sin 13^\circ  \cos 14^\circ
2\sin b\cos a  ==  2\cos(a)\sin(b)  \sin(a+b)-\sin(a-b)  !=  2\sin a\cos b  \sin b\cos a
120  ==  5!  \binom{10}{3}  \binom{16}{2}  !=  6!  5  5!!
x^2+2x+1  ==  (x+1)^2  1+2x+x^2  x^{2}+2x+1  x**2+2*x+1  !=  x^2+2x-1  x^2-2x+1  y^2+2y+1  x^2+2x
2^{n-1}  ==  \frac{2^n}{2}  2^n\cdot\frac12  !=  2^n-1  2^{n+1}  2^{1-n}
|x|  ==  \sqrt{x^2}  \left|x\right|  \lvert x\rvert  |-x|  !=  x  -x
x=5  ==  5  x = 5  5=x  x=10/2  !=  x=6  y=5  x>5
y=2x+3  ==  2x+3  y = 3+2x  2x-y+3=0  y-2x=3  2y=4x+6  !=  y=2x-3  y=3x+2  x=2y+3  2x-y+3
x^2+y^2=13  ==  y^2+x^2=13  13 = x^2 + y^2  !=  13  x^2+y^2=12  x^2-y^2=13
(-3,5)  ==  -3<x<5  5>x>-3  x \in (-3,5)  \left(-3,5\right)  !=  [-3,5]  (-3,5]  (5,-3)  -3 \le x<5
[2,\infty)  ==  x \ge 2  2 \leq x  x≥2  [2,+\infty)  !=  (2,\infty)  x>2  x \le 2  [-2,\infty)
(-\infty,-2)\cup(2,\infty)  ==  (2,\infty) \cup (-\infty,-2)  !=  (-\infty,-2]\cup(2,\infty)  (-2,2)
(-\infty,3)\cup(3,\infty)  ==  x \ne 3  \mathbb{R}\setminus\{3\}  x \neq 3  !=  \mathbb{R}  x=3  3
s^2 \le 8r^2  ==  8r^2 \ge s^2  2s^2 \le 16r^2  !=  s^2 \ge 8r^2  s^2 < 8r^2
(1,2)  ==  \left( 1, 2 \right)  (1,2).  (x,y)=(1,2)  \langle 1,2 \rangle  !=  (2,1)  [1,2]  (1,2,3)
(1,2),(3,4)  ==  (3,4),(1,2)  (1,2) \text{ and } (3,4)  \{(3,4),(1,2)\}  !=  (1,2),(4,3)  (1,2)
x=5, y=6  ==  y=6, x=5  x = 5, y = 12/2  !=  x=6, y=5  x=5  (5,6)
1,-2  ==  -2,1  \{1,-2\}  x=1,-2  x=1 \text{ or } x=-2  1 and -2  !=  1,2  1  1,-2,3  1,1,-2  (1,-2)
1 \pm \sqrt{19}  ==  1+\sqrt{19},1-\sqrt{19}  \{1-\sqrt{19},1+\sqrt{19}\}  !=  1+\sqrt{19}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ==  \begin{bmatrix}1&2\\3&4\end{bmatrix}  !=  1,2,3,4
204_5  ==  204_{5}  204_{\text{five}}  (204)_5  204₅  204 \text{ base } 5  !=  204_6  204  203_5  54
3:5  ==  3 : 5  6:10  !=  5:3  3:6  35  3,5
9\pi  ==  A=9\pi\text{ cm}^2  \pi \cdot 3^2 = 9\pi  9\pi \approx 28.27  !=  A = 8\pi = 9\pi  28.27
8\!:\!34 \text{ p.m.}  ==  8:34 \text{ p.m.}  8:34 PM  8:34 pm  !=  8:34\text{ a.m.}  8:35 pm  34:8
12:00  ==  12:00  !=  1:00  6:00  12
\text{Evelyn}  ==  Evelyn  \text{evelyn}  \mathrm{Evelyn}  \text{Evelyn}.  !=  \text{Carla}  E  5
\text{two lines}  ==  two lines  \textbf{two lines}  !=  \text{two points}  2  lines
\text{(C)}  ==  C  (C)  \text{C}  \textbf{(C)}  \mathrm{C}  (\text{C})  C.  !=  D  (B)  c  AC
\text{CBAD}  ==  CBAD  !=  ABCD  \text{CBDA}
\text{June 20}  ==  June 20  !=  20  June 21  July 20
30\sqrt{p^3}  ==  30p\sqrt{p}  30 p^{3/2}  !=  30p^2  30\sqrt{p}
\sqrt{x^2}  ==  |x|  !=  x  -x
\frac{\sqrt2}{2}  ==  \frac{1}{\sqrt2}  \sqrt{\frac12}  √2/2  2^{-1/2}  !=  \frac{\sqrt2}{4}
\frac{3}{5}  ==  3:5  {3 \over 5}  3/5  0.6  !=  5:3  \frac35 \text{ squared}
3:5  ==  3 \text{ to } 5  3{:}5  !=  3  5
|AB|=1  ==  1  |AB| = 1.0  !=  |AB|=2  |CD|=1  2
\frac{NO}{BO}=\frac12  ==  \frac12  1/2  !=  2  \frac{BO}{NO}=\frac12
m\angle A = 50^\circ  ==  50  50^{\circ}  50°  !=  \angle B = 50^\circ  60
f(x)=x^2  ==  y=x^2  x^2  f(x) = x\cdot x  !=  x  f(x)=2x
P(\text{win})=\frac23  ==  \frac23  P(win) = 2/3  !=  \frac13
i=3  ==  3  !=  i=4  3i
11  ==  x\approx 11  \approx 11  11th  11^{\text{th}}  11^{\mathrm{st}}
11  ==  \text{The answer is 11}  !=  12
1500000  ==  1.5\times 10^6  1.5e6  1.5 \text{ million}  15 \text{ hundred thousand}  !=  1.5  1.5e5
\frac{1}{6}  ==  0.1\overline{6}  0.1\overline6  ⅙  !=  0.16  0.1\overline{7}  \frac{1}{60}
\log_2 9  ==  2\log_2 3  \frac{\ln 9}{\ln 2}  \log_2(9)  !=  \log_3 8  \log 9
\sin^2 x  ==  (\sin x)^2  \sin(x)^2  1-\cos^2 x  sin(x)^2  !=  \sin x^2  \sin(x^2)
\arctan 2  ==  \tan^{-1} 2  \tan^{-1}(2)  !=  \cot 2  \frac{1}{\tan 2}
\cos x  ==  \sin(90^\circ - x)  cos(x)  \sin x \cot x  !=  \sin(90 - x)
\cos\alpha  ==  cos(α)  cos(alpha)  !=  \cos\beta  -\cos\alpha
\binom{n}{2}  ==  \frac{n(n-1)}{2}  {n \choose 2}  \frac{n!}{2!(n-2)!}  !=  \frac{n(n+1)}{2}
2004!  ==  2004\cdot 2003!  \frac{2005!}{2005}  !=  2005!  2004  (2003!)
9^{9^9}  ==  3^{2\cdot 9^9}  (9^{9^8})^9  !=  9^{9^8}  9^{9^9}+1  9^{9^{10}}
\frac{1}{10^{100000}}  ==  10^{-100000}  10\cdot 10^{-100001}  !=  10^{-99999}  0
-3<x<5  ==  x>-3 \text{ and } x<5  x>-3, x<5  |x-1|<4  !=  x>-3 \text{ or } x<5  x>-3
x \ge 2  ==  2x \ge 4  -x \le -2  x-2 \ge 0  2 \le x
x \ge 2  ==  \{x \mid x \ge 2\}  !=  2x>4  2x \ge 5  y \ge 2
x<-2 \text{ or } x>2  ==  |x|>2  x^2>4  (-\infty,-2) U (2,\infty)  !=  x<-2 \text{ and } x>2  |x|<2
[1,3]  ==  [1,2]\cup[2,3]  \{x \in \mathbb{R} : 1 \le x \le 3\}  !=  [1,2]\cup(2,3)  [1,2)\cup(2,3]
(-\infty,0)  ==  x<0  0>x  -x>0  !=  [-\infty,0)  (-\infty,0]  (0,\infty)
0<f(x)<1  ==  (0,1)  f(x) \in (0,1)  1>f(x)>0  !=  [0,1]  0<g(x)<2
f(2)<f(1)<f(4)  ==  f(4)>f(1)>f(2)  !=  f(1)<f(2)<f(4)  f(2)<f(1)
\mathbb{R}  ==  (-\infty,\infty)  \text{all real numbers}  x \in \mathbb{R}
\mathbb{R}  ==  ℝ  !=  (0,\infty)  \emptyset
\emptyset  ==  \varnothing  \{\}  \text{no solution}  No real solutions  !=  \{0\}  0
\{1,2,3\}  ==  \{1,2\}\cup\{3\}  \{3,2,1\}  \{1,2,2,3\}  1, 2, and 3  !=  \{1,2\}  (1,2,3)
3,3  ==  3, 3  3 and 3  !=  3  3,3,3
\{1\pm\sqrt5,-2\}  ==  \{-2, 1-\sqrt5, 1+\sqrt5\}  -2, 1 \mp \sqrt5  !=  \{1+\sqrt5,-2\}  1\pm\sqrt5
(1,2,3)  ==  P(1,2,3)  \text{Vertex: }(1,2,3)  \begin{bmatrix}1\\2\\3\end{bmatrix}  !=  (1,3,2)
\begin{pmatrix} 1/2 \\ 1 \end{pmatrix}  ==  \frac12\begin{pmatrix} 1 \\ 2 \end{pmatrix}  !=  (1, 2)
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ==  \begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \\ \end{pmatrix}
  !=  \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}  -2
15\text{ cm}^2  ==  15  15\text{ square cm}  15 cm²
15\text{ cm}^2  ==  15\,\mathrm{cm^2}  !=  15\text{ cm}^3  15\text{ m}^2
12\text{ m/s}  ==  12  12\ \frac{\text{m}}{\text{s}}  !=  12 km/h  \frac{12}{5}\text{ m/s}  5
5.4\text{ cents}  ==  5.4  5.4¢  !=  5.4\text{ dollars}  54
1.9  ==  1.90  \color{red}{1.9}  \textcolor{blue}{1.9}  !=  19  1.8999999999999999
7  ==  \text{seven}  \{7\}  \boldsymbol{7}  \emph{7}  7\\  \underline{7}  !=  [7]  (7,7)  7 \ne 8
\text{A5}_{11}  ==  A5_{11}  \mathrm{A5}_{11}  A5₁₁  !=  A5_{12}  A6_{11}  5_{11}
2516_8  ==  2516_{8}  2516_{\text{eight}}  2516 \text{ (base 8)}
2516_8  ==  2516 \text{ base eight}  !=  2516_9
5  ==  10/2  !=  4 \approx 5  5 = 6  5:1  5 \text{ thousand}  5 \text{ squared}  5!
  5 \text{ or } x  5 \pm 0
5\text{ squared}  ==  5 squared  !=  5\text{ cubed}  5  25  5\text{ minus}
5  ==  five  5th  !=  5\text{ is wrong}  \text{not }5  5...  5+\infty-\infty  5 \in x \in y  \max 5
4\pi  ==  4\pi \approx 12.57  !=  4\pi \approx 12.56e  4\pi \approx 14  4\pi ≈ \pi
\infty  ==  +\infty  \text{infinity}  !=  -\infty  10^{40}  \infty+1  2\infty
225  ==  15^2  !=  225 = 22_5  15^2 = 22_5  225_6
3,11,33  ==  33, 3 \text{ and } 11  !=  x>3,11,33  x>100,5  x>50,x<40  x=3,x>11
(-3,3)  ==  |x|<3  x^2<9  x>-3,x<3  !=  x^2<3  x^4<80  x^2<9,x>-1  x<3
[2,\infty)  ==  x \ge 2  2x \ge 4  !=  x^2 \ge 4  |x| \ge 2  x^3 \ge 2  2^x \ge 3  \sqrt{x} \ge 1.2
x \ne 3  ==  3 \ne x  !=  x^2 \ne 9  x \ne 3,4  x = 3
2^6 \cdot 3^5  ==  2^6 3^5  !=  2^6 + 3^5  2 6 3 5
-7  ==  -\;7  !=  -1 7  -1\text{ cm }7  -7 7  -7 1
1\frac{2}{25}  ==  1\text{ }\frac{2}{25}  1{\frac{2}{25}}
1\frac{2}{25}  ==  \frac{27}{25}  !=  \frac{2}{25}  1\cdot\frac{2}{25}""".replace(
    "\n  ", "  ")  # an indented line goes on with a row
PAIRS = [(gold, answer, k == 0) for row in TABLE.strip().splitlines()
         for gold, rest in [row.split("  ==  ")]
         for k, answers in enumerate(rest.split("  !=  ")) for answer in answers.split("  ")]
PAIRS += [(rf"\{{{','.join(map(str, range(32)))}\}}", ",".join(map(str, range(31, -1, -1))), True)]
HOSTILE = [
    "9^{9^{9^{9}}}", "2^{2^{2^{2^{2^{2}}}}}", "99999999999!", "((((9!)!)!)!)!", "10^{1000000}",
    "9" * 100_000, "1/" * 500, "(" * 1000, "{" * 400 + "6" + "}" * 400, r"\frac{" * 300, "-" * 900,
    r"\sqrt{" * 300, "5!" * 100, "5" + "!" * 900, "x^" * 400, r"\sin " * 99 + "x", "|" * 999,
    "5," * 240, r"\pm " * 300 + "1", "1_" * 240, "(a+b+c+d+y+f+g+h)^{40}", "(x+y+z+w)^{39}" * 35,
    "\x00", "5\x00", '__import__("os").system("true")', 'exec("5")', "NaN", "1e999", r"\infty",
    "1/0", "0/0", "0^0", r"\frac{1}{0}", r"\log 0", r"\binom{10^9}{5}", r"\begin{pmatrix}" * 30,
    "$" * 9999,
    r"\text{" * 80, "\\" * 99_999, "_" * 499, "^" * 499, "é" * 499, "\ud800", "①", "x" * 499,
    "2^{20000}+3^{10000}" * 20, "A" * 499, "+".join(rf"\frac{{1}}{{{k}}}" for k in range(2, 40)),
    r"\sin(" * 20 + "x" + ")" * 20, "(((((x+1)^{9}+1)^{9}+1)^{9}+1)^{9}+1)^{9}", "1:" * 200 + "1",
    "x<" * 200 + "1", r"[0,1)\cup" * 50 + "[0,1)", "7^{77}^{77}", r"\sqrt[0]{5}", "i^{i^i}",
    "i^{10^{50}}", "x^{10^{9}}", r"\arcsin 2", r"\log_{1}{5}", "=" * 499, r"\overline{" * 50,
    '"' * 499,
    r"\{x \in \mathbb{R}\le x < 2\}", r"4\pi \approx 12.56e", r"2+\sqrt{5} \approx 4.<2361",
    r"\mathbb{R}\in\mathbb{R}\in 5", "x" + "_{a}__" * 80, r"\sqrt{9}!", r"\binom{\sqrt{16}}{2}",
    "1" + " " * 480 + "x", "1" + " " * 480 + "base", "a1A1" * 90 + "(" * 99, "±" * 250 + "5",
    r"\frac{325}{4}≈\pi", r"\angle(\pm\}.", r"2+\sqrt{5}≈≈x",
    ",".join(f"{2999 - k}!" for k in range(60)),
    r"\text{" + "a_b" * 99 + "}", "7^{-5000}+3^{-5000}+" * 24 + "1", r"\max 3", r"\sin(1,2)",
    "1/2!", r"\binom{\frac12}{x}"]


def boxed(answer):
    return f"so the answer is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_verify_table(row):
    pairs = [pair for pair in PAIRS if pair[0] == row.split("  ==  ")[0]]
    assert pairs == [(gold, a, nsr.verify(boxed(a), gold)) for gold, a, _ in pairs]


@pytest.mark.parametrize("response, answer", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed 2", "2"), (r"\fbox{ 3 }", "3"), ("no box", None),
    (r"\boxed{\frac{1}{2}} and \boxed{3", r"\frac{1}{2}"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."), (r"\boxed{5", None), (None, None),
    (5, None),
    (r"\boxed{a \boxed{6}", "6"), (r"} \boxed{5} }", "5"), (r"\boxedfoo{5}", None), ("", None)])
def test_verify_extracts_the_last_closed_box(response, answer):
    assert nsr.extract_answer(response) == answer


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_verify_survives_hostile_text(text):
    for response, gold in ((boxed(text), "5"), (boxed("5"), text), (boxed(text), text),
                           (boxed(text + "+1"), text)):
        start = time.perf_counter()
        verdict = nsr.verify(response, gold)
        assert verdict is (response == boxed(text) and gold == text and verdict)
        assert time.perf_counter() - start < 0.5  # 50 ms, and room for a busy machine


@pytest.mark.parametrize("response, verdict", [
    ("{" * 1_000_000, False), ("}" * 1_000_000, False), (r"\boxed{" * 20_000, False),
    (r"\boxed{5}" * 20_000, True), ("{}" * 500_000 + r"\boxed{5}", True), (r"\boxed " * 999, False),
    ("x" * 5_000_000 + r"\boxed{5}", True), (r"\boxed{5}" + "{" * 999, True),
    (r"\boxed{5}" + " x" * 500_000, True), (r"\boxed{6} \fbox{5}" + "}" * 1_000_000, True)],
    ids=range(10))
def test_verify_survives_long_responses(response, verdict):
    assert nsr.verify(response, "5") is verdict


def test_verify_takes_numbers_as_gold():
    assert nsr.verify(boxed("5"), 5) and nsr.verify(boxed("5"), 5.0)
    assert not any(nsr.verify(boxed("5"), gold) for gold in (6, 10**5000, math.nan, math.inf, True))


@pytest.mark.parametrize("gold", [None, [], b"5"])
def test_verify_rejects_what_is_no_text(gold):
    assert nsr.verify(boxed("5"), gold) is False and nsr.verify(gold, "5") is False
    assert nsr.parse_answer(gold) is None


def test_verify_fuzz():
    """No exception and no hang on a soup of the tokens that answers are made of."""
    rng = random.Random(0)
    soup = (r"\frac \sqrt \pi \text{ \begin{pmatrix} \end{pmatrix} \\ & { } ( ) [ ] | ^ _ , ; : = "
            r"< \le \in \cup \pm + - * / ! . 0 1 2 10 999 x y i e A f \sin \log \infty \left "
            r"\right \{ \} \circ ^\circ \% $ \binom \ne \approx and cm base √ ² ∞ é "
            r"\mathbb{R} 12,345 \,").split()
    for _ in range(3000):
        a, b = ("".join(rng.choices(soup, k=rng.randint(1, 14))) for _ in range(2))
        assert nsr.verify(boxed(a), b) in (True, False)


def test_verify_fuzz_rationals():
    """Random fractions written in random ways are equal exactly when the numbers are."""
    rng = random.Random(1)

    def write(x):
        k = rng.randint(1, 9)
        n, d = x.numerator * k, x.denominator * k
        return rng.choice([rf"\frac{{{n}}}{{{d}}}", f"{n}/{d}", rf"\dfrac{{{-n}}}{{{-d}}}",
                           rf"{x + k} - {k}", rf"x = \frac{{{n}}}{{{d}}}", rf"{n} \cdot {d}^{{-1}}",
                           rf"\frac{{{n}\sqrt{{2}}}}{{{d}\sqrt2}}"])

    values = [Fraction(rng.randint(-30, 30), rng.randint(1, 12)) for _ in range(60)]
    for x in values:
        for y in rng.choices(values, k=10):
            assert nsr.verify(boxed(write(x)), write(y)) is (x == y)


def test_verify_is_thread_safe():
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda t: nsr.verify(boxed(t[1]), t[0]), PAIRS * 3))
    assert verdicts == [want for _, _, want in PAIRS] * 3


@pytest.mark.skipif(not DATA.is_dir(), reason="no problem sets beside the repository")
@pytest.mark.parametrize("name", ["math_test", "math_train", "aime2025", "amc23"])
def test_verify_every_gold_answer_equals_itself(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [str(json.loads(line)["answer"]) for line in lines]
    assert all(nsr.verify(boxed(g), g) for g in golds)
    parsed = sum(nsr.parse_answer(g) is not None for g in golds) / len(golds)
    print(f"{name}: {parsed:.2%} of {len(golds)} gold answers parse")
    assert parsed >= 0.995


@pytest.mark.parametrize("text, right", [
    ("\\boxed{(2+1)*(9-1)}", True), ("\\boxed{((2+1))*(9-1)}", True), ("\\boxed{9*2+1*1}", False),
    ("\\boxed{(9-1)*(1+2)} or \\boxed{1}", False), ("\\boxed{1} no: \\boxed{(9-1)*(1+2)}", True),
    ("(2+1)*(9-1)", False), ("\\boxed{(2+1)*(9-1)", False), ("\\boxed{3*8}", False),
    ("\\boxed{(2+1)*(9-1)+9-9}", False), ("\\boxed{(2+1)*(9-1}", False), ("\\boxed{}", False),
    ("\\boxed{(2+1)(9-1)}", False), ("\\boxed{+2+1*(9-1)}", False), ("\\boxed{2**1**9-1}", False),
    ("\\boxed{(2+1)\\times(9-1)}", True), ("\\boxed{__import__('os')}", False),
    ("\\boxed{" + "(" * 5000 + "}", False), ("\\boxed{1+1+2*11}", False),
])
def test_countdown_is_checked_by_parsing(text, right):
    assert nsr.verify_countdown(text, "1 1 2 9 = 24") is right


def test_countdown_examples_solve_their_problems():
    rng = random.Random(1)
    for _ in range(300):
        problem, expression = nsr.countdown_example(rng)
        assert problem.verify(f"\\boxed{{{expression}}}", problem.answer)
        target = int(problem.answer.split(" = ")[1])
        wrong = problem.answer.replace(f"= {target}", f"= {target + 1}")
        assert not problem.verify(f"\\boxed{{{expression}}}", wrong)


# --------------------------------------------------------------------------------------------------
# model


def test_tokenizer_round_trip_and_reload(tokenizer, tmp_path):
    ids = tokenizer("\\boxed{(2+1)*(9-1)}<eos>")["input_ids"]
    assert len(ids) == 14 and ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(ids, skip_special_tokens=True) == "\\boxed{(2+1)*(9-1)}"
    assert again("1 1 2 9 = 24")["input_ids"] == tokenizer("1129=24")["input_ids"]


class Words:
    """A tokenizer that shows the text it is given: one id a character."""

    chat_template = None

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return dict.fromkeys(self.words)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<{messages[0]['role']}>{messages[0]['content']}<assistant>"


def test_prompts_take_the_form_that_the_model_knows():
    problem = nsr.parse_problem({"problem": "1 + 1?", "answer": "2"})

    def prompt(tokenizer):
        _, prompts = nsr.encode_prompts([problem], Qwen, tokenizer, nsr.Config())
        return "".join(map(chr, prompts[0]))

    user = "1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert prompt(Words("<|im_start|>")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + user
        + "<|im_end|>\n<|im_start|>assistant\n")
    assert prompt(Words()) == "\x01" + user  # no template: the text alone, with its bos
    chat = Words()
    chat.chat_template = "some"
    assert prompt(chat) == f"<user>{user}<assistant>"  # a template writes its own bos


class Qwen:
    config = transformers.Qwen2Config(max_position_embeddings=2000)
    generation_config = type("Config", (), {"eos_token_id": [7, 3]})


def test_long_prompts_are_left_out_and_counted(capsys):
    problems = [nsr.parse_problem({"problem": "x" * n, "answer": "2"}) for n in (10, 500, 20)]
    cfg = nsr.Config(max_prompt_tokens=200)
    kept, prompts = nsr.encode_prompts(problems, Qwen, Words(), cfg)
    assert kept == [problems[0], problems[2]] and len(prompts) == 2
    assert "left out: 1 of 3 problems" in capsys.readouterr().out
    with pytest.raises(nsr.UserError, match="context of 2000"):
        nsr.encode_prompts(problems, Qwen, Words(), nsr.Config(max_new_tokens=1950))


def test_every_stop_token_is_known(tokenizer):
    assert nsr.stop_tokens(Qwen, tokenizer) == [0, 3, 7]
    words = Words("<|im_start|>", "<|im_end|>")
    words.eos_token_id, words.get_vocab = 7, lambda: {"<|im_start|>": 1, "<|im_end|>": 9}
    assert nsr.stop_tokens(Qwen, words) == [3, 7, 9]


def test_embedded_bases_by_name(base, monkeypatch):
    asked = []
    monkeypatch.setattr(nsr, "countdown_base", lambda steps: asked.append(steps) or base)
    for name in nsr.BASES:
        nsr.load_model(name, "cpu")
    assert asked == [2500, 12000]
    needs = [nsr.memory_needs(nsr.Config(model=name), torch.device("cpu")) for name in nsr.BASES]
    assert needs[0]["weights"] == needs[1]["weights"] == 4 * 108_416


def test_dropout_is_off(tmp_path, tokenizer):
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = nsr.load_model(tmp_path, "cpu")
    model.train()
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


# --------------------------------------------------------------------------------------------------
# rollout


def sample(model, prompts, seed=0, group_size=3, max_new_tokens=8, stop_ids=(0,), **options):
    seeds = [[nsr.seed_of(seed, i, j) for j in range(group_size)] for i in range(len(prompts))]
    return list(nsr.rollout(model, prompts, seeds, max_new_tokens, list(stop_ids), **options))


PROMPTS = [[3, 5, 7], [4, 4, 6, 8, 10, 11], [9], [12, 13, 14, 15]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rollout_logp_equals_recomputed(model, temperature):
    responses = sample(model, PROMPTS, temperature=temperature)
    logp, _, confidence = nsr.score(model, responses, nsr.Config(temperature=temperature))
    other = nsr.score(model, responses, nsr.Config(temperature=1.3))[0]
    for i, r in enumerate(responses):
        close(r.logp, logp[i])
        close(r.logp, logp_alone(model, r, temperature))
        close(confidence[i], math.exp(sum(r.logp) / len(r.logp)))
    assert (torch.cat(other) - torch.cat(logp)).abs().max() > 0.05  # another one would be seen


def test_rollout_scores_top_p_by_what_it_draws_from(model):
    for r in sample(model, PROMPTS, top_p=0.6):
        ids = torch.tensor([r.prompt_ids + r.ids])
        rows = model(ids).logits[0, len(r.prompt_ids) - 1 : -1]
        probs = nsr.sampling_probs(rows, 1.0, 0.6)
        drawn = probs[torch.arange(len(r.ids)), r.ids]
        assert (drawn > 0).all()
        torch.testing.assert_close(torch.tensor(r.logp), drawn.log(), atol=2e-5, rtol=0)


def test_top_p_keeps_the_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, [1.0]), (0.6, [0.625, 0.375]), (1.0, [0.5, 0.3, 0.15, 0.05])):
        expected = torch.tensor([kept + [0.0] * (4 - len(kept))])
        torch.testing.assert_close(nsr.sampling_probs(logits, 1.0, top_p), expected)
    cold = nsr.sampling_probs(logits, 0.5)
    torch.testing.assert_close(cold, logits.exp() ** 2 / (logits.exp() ** 2).sum())


def test_rollout_order_lengths_and_budget(model):
    responses = sample(model, PROMPTS, group_size=3)
    assert [r.prompt_ids for r in responses] == [p for p in PROMPTS for _ in range(3)]
    for r in responses:
        assert 1 <= len(r.ids) == len(r.logp) <= 8
        assert (r.ids[-1] == 0) == r.stopped and 0 not in r.ids[:-1]
    assert {r.stopped for r in responses} == {True, False}
    assert sample(model, PROMPTS, seed=1) != responses == sample(model, PROMPTS)


@pytest.mark.parametrize("max_new_tokens", [8, 40, 200])  # looks for ended rows at 1, 1, 4 tokens
def test_a_response_follows_from_its_seed_alone(model, max_new_tokens):
    """Whatever shares the batch: budgets of one row to all, other prompts, groups of any size."""
    seeds = [[5, 2**63 - 1, 0], [7], [], [11, 12, 13, 14, 15, 16, 17]]

    def ids(prompts, seeds, **options):
        heard = []
        responses = list(nsr.rollout(model, prompts, seeds, max_new_tokens, [0, 5, 7], **options,
                                     tick=heard.append))
        assert sum(heard) >= sum(len(r.ids) for r in responses)
        assert [r.prompt_ids for r in responses] == [
            p for p, group in zip(prompts, seeds) for _ in group]
        for r in responses:
            assert r.stopped == (r.ids[-1] in (0, 5, 7)) and len(r.ids) <= max_new_tokens
            close(r.logp, logp_alone(model, r))
        return [r.ids for r in responses]

    expected = ids(PROMPTS, seeds)
    assert len({len(x) for x in expected}) > 3
    for budget in (1, 3 * max_new_tokens, 6 * max_new_tokens):
        assert ids(PROMPTS, seeds, rollout_tokens=budget) == expected
    assert ids(PROMPTS[::-1], seeds[::-1]) == expected[4:] + expected[3:4] + expected[:3]
    assert ids(PROMPTS[:1], [[0]]) == expected[2:3]


def test_a_group_is_yielded_as_soon_as_it_is_complete(model):
    heard = []
    responses = nsr.rollout(model, PROMPTS * 5, [[i] for i in range(20)], 8, [0],
                            rollout_tokens=40, tick=heard.append)
    first = next(responses)
    assert len(heard) == len(first.ids)
    assert len(list(responses)) == 19 and sum(heard) > 3 * sum(heard[: len(first.ids)])


@pytest.mark.parametrize("budget", [40, 2**16])
@pytest.mark.parametrize("name, options", [
    ("Mistral", dict(sliding_window=4)), ("GPT2", dict(
        n_positions=18, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)), ("Llama", {}),
    ("Gemma2", dict(sliding_window=4, head_dim=16)), ("Gemma3Text", dict(sliding_window=4,
                                                                        head_dim=16)),
    ("Qwen2", dict(sliding_window=4, use_sliding_window=True, max_window_layers=1))])
def test_rollout_of_other_models(name, options, budget):
    """Sliding windows, learnt positions up to the last, grouped heads."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    responses = sample(model, PROMPTS, max_new_tokens=12, rollout_tokens=budget)
    alone = [logp_alone(model, r) for r in responses]
    for r, logp in zip(responses, alone):
        close(r.logp, logp)
    for step in ("no gradient", "gradient", "gradient checkpointing"):
        if step == "gradient checkpointing":
            nsr.checkpoint_activations(model)
            nsr.learning(model)
        with torch.set_grad_enabled(step != "no gradient"):
            stats, _ = nsr.token_stats(model, responses, 1.0)
        for row, logp in zip(stats.logprobs, alone):
            close(row[: len(logp)], logp)


SMALL = dict(vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3)


def loaded(kind, path, tokenizer, **settings):
    """What nsr.load_model makes of a small model of that kind, saved in `path`."""
    config = getattr(transformers, f"{kind}Config")(**SMALL | settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return nsr.load_model(str(path), "cpu")[0]


@pytest.mark.parametrize("kind, settings", [
    ("GPT2", dict(attn_pdrop=0.5, resid_pdrop=0.5)), ("BioGpt", dict(activation_dropout=0.5)),
    ("GPTBigCode", dict(attn_pdrop=0.5)), ("Bloom", dict(attention_dropout=0.5, n_layer=2)),
    ("Phimoe", dict(num_key_value_heads=2, router_jitter_noise=0.5))])
def test_training_pass_has_no_noise_whatever_its_name(kind, settings, tmp_path, tokenizer):
    torch.manual_seed(0)
    model = loaded(kind, tmp_path, tokenizer, **settings)
    responses = sample(model, PROMPTS)
    for checkpointing in (False, True):
        if checkpointing:
            nsr.checkpoint_activations(model)
        nsr.learning(model)
        stats, _ = nsr.token_stats(model, responses, 1.0)
        for row, r in zip(stats.logprobs, responses):
            close(row[: len(r.ids)], torch.tensor(r.logp))


@pytest.mark.parametrize("kind, said", [
    ("Mamba", "keys and values"), ("Bert", "differ by"), ("Bart", "differ by"),
    ("Mistral", None)])
def test_models_that_are_not_read_left_to_right_by_keys_and_values_are_refused(
        kind, said, tmp_path, tokenizer):
    torch.manual_seed(0)
    with pytest.raises(nsr.UserError, match=said) if said else contextlib.nullcontext():
        loaded(kind, tmp_path, tokenizer, encoder_ffn_dim=64, decoder_ffn_dim=64, d_model=32,
               init_std=0.3, num_key_value_heads=2)


def test_a_model_that_cannot_checkpoint_is_refused(tmp_path, tokenizer):
    with pytest.raises(nsr.UserError, match="--gradient-checkpointing"):
        nsr.checkpoint_activations(loaded("CTRL", tmp_path, tokenizer, n_embd=32, n_head=2, dff=64,
                                          n_layer=1))


def test_several_stop_tokens_end_a_response_and_are_kept(model):
    responses = sample(model, PROMPTS, group_size=16, stop_ids=(0, 5))
    assert {r.ids[-1] for r in responses if r.stopped} == {0, 5}
    assert all(not {0, 5} & set(r.ids[:-1]) for r in responses)


@pytest.mark.parametrize("sampler", ["rollout", "generate"])
def test_sampler_draws_from_the_policy(model, sampler):
    """Two tokens of many responses against their exact probabilities, and so does transformers."""
    n, prompt, options = 4000, PROMPTS[0], dict(temperature=0.8, top_p=0.9)

    def exact(ids):
        return nsr.sampling_probs(model(torch.tensor([ids])).logits[:, -1], **options)[0].tolist()

    expected = {(a, b): n * p * q for a, p in enumerate(exact(prompt)) if a
                for b, q in enumerate(exact(prompt + [a]))} | {(0, 0): n * exact(prompt)[0]}
    if sampler == "rollout":
        drawn = [r.ids for r in sample(model, [prompt], 0, n, 2, rollout_tokens=4000, **options)]
    else:
        torch.manual_seed(0)
        drawn = model.generate(torch.tensor([prompt]), do_sample=True, max_new_tokens=2, top_k=0,
                               num_return_sequences=n, **options)[:, len(prompt) :].tolist()
    counts = collections.Counter(tuple(ids + [0])[:2] for ids in drawn)
    assert set(counts) <= {pair for pair, count in expected.items() if count}
    big = [pair for pair, count in expected.items() if count > 5]
    chi2 = sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in big)
    assert len(big) > 20 and chi2 < len(big) + 5 * math.sqrt(2 * len(big))


def test_draw_at_a_large_vocabulary():
    """The middle of a token's interval draws it, be it as rare as 1e-9; p = 0 is never drawn."""
    logits = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, :5] = logits[:, -5:] = -math.inf
    cdf = np.cumsum(nsr.sampling_probs(logits, 1.0).double().numpy(), axis=1)
    likely = logits[1].argmax().item()
    u, tokens = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), [5, 151_930]
    for row, token in itertools.product(range(3), [5, 6, 70_000, likely, 151_930]):
        middle = (cdf[row, token - 1] + cdf[row, token]) / 2 / cdf[row, -1]
        assert nsr.draw(logits[[row]], torch.tensor([middle]), 1.0, 1.0)[0].tolist() == [token]
    assert nsr.draw(logits[:2], u, 1.0, 1.0)[0].tolist() == tokens
    many = torch.rand(3, dtype=torch.float64)
    alone = [nsr.draw(logits[[i]], many[[i]], 0.7, 0.9) for i in range(3)]
    for x, parts in zip(nsr.draw(logits, many, 0.7, 0.9), zip(*alone)):
        assert torch.equal(x, torch.cat(parts))


def test_masks_come_from_lengths_when_pad_is_eos(model):
    """Token 0 is pad, eos and stop token: in the middle, at the end and beyond."""
    responses = [nsr.Response([0, 3, 0], [4, 0], [], True), nsr.Response([5], [0], [], True),
                 nsr.Response([6, 7], [8, 0, 9, 1], [], False)]
    ids, mask = nsr.padded([r.prompt_ids for r in responses], "cpu", left=True)
    assert ids.tolist() == [[0, 3, 0], [0, 0, 5], [0, 6, 7]]
    assert mask.int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    ids, mask = nsr.padded([r.ids for r in responses], "cpu")
    assert ids.tolist() == [[4, 0, 0, 0], [0, 0, 0, 0], [8, 0, 9, 1]]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    stats, _ = nsr.token_stats(model, responses, 1.0)
    for i, r in enumerate(responses):
        close(stats.logprobs[i, : len(r.ids)], logp_alone(model, r))
        assert (stats.logprobs[i, len(r.ids) :] == 0).all()


def test_prompts_and_padding_never_reach_the_head(model, monkeypatch):
    responses, rows, logits = a_batch(model).responses, [], L._logits
    monkeypatch.setattr(L, "_logits", lambda h, *a: rows.append(len(h)) or logits(h, *a))
    nsr.token_stats(model, responses, temperature=1.0)
    assert rows == [sum(len(r.ids) for r in responses)]


@pytest.mark.parametrize("kind, linear, settings", [
    ("Llama", True, {}), ("Gemma2", False, dict(final_logit_softcapping=5.0, head_dim=16)),
    ("Granite", False, dict(logits_scaling=3.0)), ("Cohere", False, dict(logit_scale=0.5)),
    ("Phi", True, {}), ("OPT", True, dict(word_embed_proj_dim=16, ffn_dim=64))])
def test_heads_that_do_more_than_a_product(kind, linear, settings):
    """Phi has a bias; OPT's embeddings are narrower than its decoder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        initializer_range=0.3, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(p, std=0.3)
    responses = a_batch(model).responses
    assert (nsr.linear_head(model) is not None) == linear
    stats, _ = nsr.token_stats(model, responses, temperature=0.7)
    for row, response in zip(stats.logprobs, responses):
        close(row[: len(response.ids)], logp_alone(model, response, 0.7))


def test_micro_batches_hold_every_row_within_the_budget(model):
    responses = a_batch(model).responses
    for budget in (1, 12, 30, 1000):
        cut = nsr.micro_batches(responses, range(6), budget)
        assert sorted(itertools.chain(*cut)) == list(range(6))
        for rows in cut:
            p, r = (max(len(responses[i][part]) for i in rows) for part in (0, 1))
            prompts = {tuple(responses[i].prompt_ids) for i in rows}
            assert len(rows) == 1 or len(prompts) * p + len(rows) * r <= budget
    assert len(nsr.micro_batches(responses, range(6), 5 * 6 + 6 * 7)) == 1  # two share a prompt
    assert len(nsr.micro_batches(responses, range(6), 5 * 6 + 6 * 7 - 1)) == 2


# --------------------------------------------------------------------------------------------------
# schedules and advantages


def test_schedules_at_their_ends_and_middle():
    def at(schedule, t, accuracy=0.25):
        return nsr.beta_schedule(nsr.Config(schedule=schedule, steps=200), t, accuracy)

    assert [at("exponential", t) for t in (0, 100, 200)] == pytest.approx(
        [1.5, 0.5 + math.exp(-3), 0.5 + math.exp(-6)])
    assert [at("cosine", t) for t in (0, 100, 200)] == pytest.approx([1.5, 1.0, 0.5])
    assert [at("accuracy", 7, p) for p in (0.0, 0.25, 1.0)] == pytest.approx([1.5, 1.25, 0.5])
    lam = [nsr.lam_schedule(nsr.Config(steps=200), t) for t in (0, 100, 200)]
    assert lam == pytest.approx([0.05, 0.125, 0.2])


ADVANTAGES = {  # of one group at t = T / 2: right; wrong with c = 0.6; wrong with c = 0.01
    "reinforce": [1, -1, -1], "psr": [1, 0, 0], "nsr": [0, -1, -1], "w-reinforce": [0.1, -1, -1],
    "a-nsr": [0.125, -1.0, -1.0], "cw-nsr": [0.1, -0.6, -0.05], "acw-nsr": [0.125, -0.6, -0.05],
    "grpo": [(1 + 1 / 3) / math.sqrt(4 / 3), (-1 + 1 / 3) / math.sqrt(4 / 3),
             (-1 + 1 / 3) / math.sqrt(4 / 3)],
}


@pytest.mark.parametrize("method", ADVANTAGES)
def test_advantage_table(method):
    cfg = nsr.Config(method=method, schedule="cosine", steps=150)
    lam, beta = nsr.method_weights(cfg, cfg.steps // 2, accuracy=1 / 3)
    reward, confidence = torch.tensor([[1.0, -1, -1]]), torch.tensor([[0.9, 0.6, 0.01]])
    adv = nsr.advantages(method, reward, confidence, lam, beta)
    torch.testing.assert_close(adv, torch.tensor([ADVANTAGES[method]]).float(), atol=2e-6, rtol=0)


def test_grpo_gives_nothing_where_a_group_agrees():
    adv = nsr.advantages("grpo", torch.ones(2, 4), torch.ones(2, 4), 1, 1)
    assert (adv == 0).all()


def test_confidence_weight_is_clamped_and_constant():
    c = torch.tensor([0.0, 0.03, 0.5, 1.0], requires_grad=True)
    w = nsr.confidence_weight(c)
    torch.testing.assert_close(w, torch.tensor([0.05, 0.05, 0.5, 1.0]))
    assert not w.requires_grad


# --------------------------------------------------------------------------------------------------
# loss


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("method", ADVANTAGES)
def test_token_gradient_by_hand(method, temperature):
    """d loss / d z_v = A pi_v / denom / T, but -A (1 - pi_y) / denom / T for the sampled y."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, requires_grad=True)
    labels = torch.randint(5, (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    adv = torch.tensor(ADVANTAGES[method]).float()
    stats = nsr.token_stats_from_logits(logits, labels, temperature=temperature, mask=mask)
    nsr.policy_loss(stats.logprobs, stats.logprobs.detach(), adv, mask, denom=9).backward()
    pi = (logits.detach() / temperature).softmax(-1)
    for b, t, v in itertools.product(range(3), range(4), range(5)):
        sign = -(1 - pi[b, t, v]) if v == labels[b, t] else pi[b, t, v]
        expected = adv[b] * sign / 9 / temperature * mask[b, t]
        assert logits.grad[b, t, v] == pytest.approx(expected.item(), abs=1e-6)


def test_nsr_moves_mass_from_the_sampled_token_to_the_others_in_proportion():
    z = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]], requires_grad=True)
    pi = z.detach().softmax(-1)[0, 0]
    stats = nsr.token_stats_from_logits(z, torch.tensor([[0]]))
    mask = torch.ones(1, 1, dtype=torch.bool)
    old = stats.logprobs.detach()
    nsr.policy_loss(stats.logprobs, old, torch.tensor([-1.0]), mask, 1).backward()
    step = -z.grad[0, 0]  # gradient descent
    assert step[0] < 0 and (step[1:] > 0).all()
    torch.testing.assert_close(step[1:] / step[1], pi[1:] / pi[1])
    assert step[0].item() == pytest.approx(-(1 - pi[0].item()))


def test_clip_by_hand():
    old = torch.zeros(1, 6)
    logp = torch.tensor([[0.5, 0.9, 1.1, 1.3, 0.7, 1.0]]).log().requires_grad_()
    mask = torch.ones(1, 6, dtype=torch.bool)
    for adv, objective, live in ((1.0, [0.5, 0.9, 1.1, 1.2, 0.7, 1.0], [1, 1, 1, 0, 1, 1]),
                                 (-2.0, [-1.6, -1.8, -2.2, -2.6, -1.6, -2.0], [0, 1, 1, 1, 0, 1])):
        loss = nsr.policy_loss(logp, old, torch.tensor([adv]), mask, denom=12, clip=0.2)
        assert loss.item() == pytest.approx(-sum(objective) / 12)
        grad, = torch.autograd.grad(loss, logp)
        assert grad[0].tolist() == pytest.approx(
            [-adv * math.exp(x) * on / 12 for x, on in zip(logp[0].tolist(), live)])


def test_k3_by_hand():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = nsr.kl_to_reference(logp, torch.tensor([-1.0, -1.5]))
    assert kl.tolist() == pytest.approx([0.0, math.exp(0.5) - 1.5])
    grad, = torch.autograd.grad(kl.sum(), logp)
    assert grad.tolist() == pytest.approx([0.0, 1 - math.exp(0.5)])


def test_ppo_by_hand():
    adv, returns = nsr.gae(torch.tensor([-0.1, 0.0, 0.2, 1.0]), torch.tensor([0.5, 0.0, 1.0, -1.0]))
    close(returns, [1.1, 1.2, 1.2, 1.0])
    close(adv, [0.6, 1.2, 0.2, 2.0])
    mask = torch.tensor([[True, True, True, False]])
    value = torch.tensor([[0.5, 0.5, 0.05, 9.0]], requires_grad=True)
    loss = nsr.value_loss(value, torch.zeros(1, 4), torch.tensor([[1.0, 0.1, 0.0, 0.0]]), mask, 3)
    # (0.2 - 1)^2: the clip is worse; (0.5 - 0.1)^2: it is better and not taken; within: 0.05^2
    close(loss, (0.64 + 0.16 + 0.0025) / 6)
    loss.backward()
    close(value.grad, [[0.0, 0.4 / 3, 0.05 / 3, 0.0]])


def test_ppo_puts_the_kl_in_the_reward_and_the_verdict_at_the_end(tokenizer):
    model, critic = tiny_model(tokenizer), tiny_model(tokenizer, seed=1)
    critic.lm_head = torch.nn.Linear(32, 1)
    run = a_run(model, tokenizer, method="ppo", kl_coef=0.1, prompts=4, group_size=3)
    run.problems = COUNTDOWN_PROBLEMS(4)
    run.prompts = [tokenizer(p.question)["input_ids"] for p in run.problems]
    run.reference, run.critic = tiny_model(tokenizer, seed=2), critic
    batch, metrics, _ = nsr.collect(run)
    for i, (returns, values) in enumerate(zip(batch.returns, batch.values)):
        kl = batch.old_logp[i] - batch.ref_logp[i]
        close(returns[:-1] - returns[1:], -0.1 * kl[:-1])
        close(returns[-1], -1.0 - 0.1 * kl[-1])  # no response of this model is correct
        close(batch.adv[i, : len(values)], returns - values)
        ids = torch.tensor([batch.responses[i].prompt_ids + batch.responses[i].ids])
        close(values, critic(ids[:, :-1]).logits[0, -len(values) :, 0])  # before each token
    assert metrics["correct"] == 0 and len(batch.returns) == 12


def test_w_reinforce_is_lam_psr_plus_nsr_to_the_bit():
    torch.manual_seed(0)
    logp, old = -torch.rand(6, 5), -torch.rand(6, 5)
    mask = torch.rand(6, 5) > 0.2
    reward, c = torch.tensor([[1.0, -1, -1, 1, -1, 1]]), torch.ones(1, 6)

    def loss(method, part=slice(None)):
        lam, beta = nsr.method_weights(nsr.Config(method=method, lam=0.125), 0, 0.5)
        adv = nsr.advantages(method, reward, c, lam, beta)[0]
        return nsr.policy_loss(logp, old, adv, mask, denom=32)

    right = reward[0] > 0
    alone = nsr.policy_loss(logp[right], old[right], torch.ones(3), mask[right], 32)
    assert loss("psr").item() == pytest.approx(alone.item())  # A = 0 is in the denominator alone
    for row in range(6):  # row by row no sum is reordered: equal to the bit
        def one(method):
            lam, beta = nsr.method_weights(nsr.Config(method=method, lam=0.125), 0, 0.5)
            adv = nsr.advantages(method, reward, c, lam, beta)[0, row, None]
            return nsr.policy_loss(logp[row, None], old[row, None], adv, mask[row, None], 32)
        assert one("w-reinforce") == 0.125 * one("psr") + one("nsr")


def test_expected_gradients_by_enumeration():
    """Every response of a tiny policy, weighed by its probability: with a fixed denominator psr,
    nsr, reinforce, w-reinforce have one expected gradient, as 1 : 1 : 2 : 1.1; cw-nsr another."""
    torch.manual_seed(0)
    V, T, stop = 3, 3, 0
    z = torch.randn(T, V, V, dtype=torch.float64, requires_grad=True)  # step, previous token, next

    def responses(prefix=()):
        for v in range(V):
            ids = prefix + (v,)
            yield from [ids] if v == stop or len(ids) == T else responses(ids)

    def odd(ids):
        return sum(ids) % 2 == 1

    def expected_gradient(method, right=odd, t=30):
        lam, beta = nsr.method_weights(nsr.Config(method=method), t, accuracy=0.5)
        total = torch.zeros_like(z)
        for ids in responses():
            rows = torch.stack([z[i, ids[i - 1] if i else 0] for i in range(len(ids))])[None]
            stats = nsr.token_stats_from_logits(rows, torch.tensor([ids]))
            old, mask = stats.logprobs.detach(), torch.ones(1, len(ids), dtype=torch.bool)
            reward = torch.tensor([[1.0 if right(ids) else -1.0]])
            adv = nsr.advantages(method, reward, stats.confidence[None], lam, beta)[0]
            loss = nsr.policy_loss(stats.logprobs, old, adv, mask, denom=T)
            total += old.sum().exp() * torch.autograd.grad(loss, z)[0]
        return total

    psr = expected_gradient("psr")
    assert psr.norm() > 1e-3
    for method, scale in (("nsr", 1), ("reinforce", 2), ("w-reinforce", 1.1)):
        torch.testing.assert_close(expected_gradient(method), scale * psr, atol=1e-7, rtol=1e-5)
    lam, beta = nsr.method_weights(nsr.Config(method="a-nsr"), 30, 0.5)
    torch.testing.assert_close(expected_gradient("a-nsr"), (lam + beta) * psr, atol=1e-7, rtol=1e-5)
    other = expected_gradient("cw-nsr")
    assert torch.nn.functional.cosine_similarity(other.flatten(), psr.flatten(), 0) < 0.999
    # where all are wrong nsr asks for nothing, cw-nsr for more entropy
    entropy = torch.zeros(())
    for ids in responses():
        logp = sum(z[i, ids[i - 1] if i else 0].log_softmax(-1)[v] for i, v in enumerate(ids))
        entropy = entropy - logp.exp() * logp
    upwards, = torch.autograd.grad(entropy, z)
    assert expected_gradient("nsr", right=lambda ids: False).norm() < 1e-7
    flatter = -expected_gradient("cw-nsr", right=lambda ids: False)  # the way of a descent
    assert torch.nn.functional.cosine_similarity(flatter.flatten(), upwards.flatten(), 0) > 0.5


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients of each step and changes nothing."""

    def step(self):
        self.seen = getattr(self, "seen", [])
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("micro_tokens", [1, 20, 40, 10**6])
@pytest.mark.parametrize("coefs", [{}, dict(entropy_coef=0.02, kl_coef=0.05)], ids=["", "regular"])
def test_gradient_does_not_depend_on_micro_batches_or_padding(
        tokenizer, micro_tokens, updates, coefs):
    """update() against one plain sum a mini-batch, over its responses alone, without padding."""
    model = tiny_model(tokenizer)
    batch = a_batch(model)
    batch.old_logp = [x + 0.1 * torch.randn_like(x) for x in batch.old_logp]
    batch.ref_logp = [x + 0.3 for x in batch.old_logp]
    run = a_run(model, micro_tokens=micro_tokens, updates=updates, grad_clip=1e9, **coefs)
    run.optimizer = Recorder(model.parameters(), lr=0.0)
    metrics, norms = nsr.update(run, batch), []
    for mini, found in zip(torch.arange(6).chunk(updates), run.optimizer.seen, strict=True):
        total, denom = 0, sum(len(batch.responses[i].ids) for i in mini)
        for i in mini:
            r = batch.responses[i]
            ids = torch.tensor([r.prompt_ids + r.ids])
            rows = model(ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
            logp = rows[torch.arange(len(r.ids)), r.ids]
            rho, A = (logp - batch.old_logp[i]).exp(), batch.adv[i]
            total = total - torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A).sum() / denom
            if coefs:
                entropy, d = -(rows.exp() * rows).sum(-1), batch.ref_logp[i] - logp
                total = total + (0.05 * (d.exp() - 1 - d) - 0.02 * entropy).sum() / denom
        expected = torch.autograd.grad(total, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in expected)))
        error = sum((a - b).square().sum().item() for a, b in zip(found, expected))
        assert math.sqrt(error) / norms[-1] < 1e-5
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / updates, rel=1e-4)


def test_update_counts_the_clip_and_cuts_mini_batches(tokenizer):
    model = tiny_model(tokenizer)
    batch = a_batch(model, adv=[1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    batch.old_logp = [x - math.log(1.5) for x in batch.old_logp]  # rho = 1.5 everywhere
    metrics = nsr.update(a_run(model, lr=0.0, updates=3), batch)
    assert metrics["updates"] == 2  # the last mini-batch has no advantage: no evidence, no update
    assert metrics["clip_frac"] == pytest.approx((5 + 2) / (5 + 2 + 4 + 7 + 1 + 3))


def test_drop_unused_by_hand(tokenizer, monkeypatch):
    model, seen = tiny_model(tokenizer), []
    batch = a_batch(model, adv=[0.0, -1.0, -1.0, 0.0, -1.0, 0.0])  # of 5, 2, 4, 7, 1, 3 tokens
    loss = nsr.policy_loss
    monkeypatch.setattr(nsr, "policy_loss", lambda logp, *args: (
        seen.append((len(logp), args[3])), loss(logp, *args))[1])
    for dropped, expected in ((False, [(1, 7), (1, 11), (1, 4)]), (True, [(2, 6), (1, 1)])):
        metrics = nsr.update(a_run(model, updates=3, drop_unused=dropped, kl_coef=0.0), batch)
        assert seen == expected and metrics["updates"] == len(expected)  # (responses, denominator)
        seen.clear()
    batch.adv[:] = 0
    assert nsr.update(a_run(model, updates=3, drop_unused=True), batch)["updates"] == 0
    monkeypatch.setattr(nsr, "WORLD_SIZE", 2)
    with pytest.raises(nsr.UserError, match="--drop-unused"):
        nsr.check(nsr.Config(drop_unused=True, kl_coef=0.0))


def test_bf16_state_is_rounded_alike_in_every_process():
    code = ("import nsr, torch; torch.manual_seed(0); x = torch.full((9,), 1.003);"
            "state = dict(exp_avg=x, exp_avg_sq=x); nsr.put_away(state, 'bf16'); print(state)")
    said = {subprocess.check_output([sys.executable, "-c", code], cwd=ROOT,
                                    env=os.environ | {"PYTHONHASHSEED": seed}) for seed in "01"}
    assert len(said) == 1 and b"1.0078" in said.pop()


def test_gradient_checkpointing_changes_nothing(tokenizer):
    grads, passes = [], []
    for on in (False, True):
        model = tiny_model(tokenizer)
        if on:
            nsr.checkpoint_activations(model)
        batch = a_batch(model)
        count = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: count.append(1))
        run = a_run(model)
        run.optimizer = Recorder(model.parameters(), lr=0.0)
        nsr.update(run, batch)
        grads.append(run.optimizer.seen[0])
        passes.append(len(count))
    assert passes == [2, 4]  # prompts and responses, twice
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_optimizer_state_on_the_cpu_is_exact_and_in_bf16_unbiased(tokenizer):
    after = {}
    for where in nsr.STATES:
        model = tiny_model(tokenizer)
        run = a_run(model, optimizer_state=where, lr=1e-2)
        run.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            nsr.update(run, a_batch(model))
        after[where] = torch.cat([p.flatten() for p in model.parameters()])
        kept = run.optimizer.state[next(model.parameters())]["exp_avg_sq"]
        assert kept.dtype == (torch.bfloat16 if where == "bf16" else torch.float32)
    assert torch.equal(after["cpu"], after["float32"])
    close(after["bf16"], after["float32"], atol=3e-3)
    assert not torch.equal(after["bf16"], after["float32"])
    x = torch.full((200_000,), 1 + 1 / 1024)  # an eighth of the way between two bf16 numbers
    assert abs(nsr.to_bf16(x).double().mean() - x[0]) < 2e-5 and nsr.to_bf16(-x).min() >= -1.0079


def test_non_finite_gradient_stops_before_the_update(tokenizer):
    model = tiny_model(tokenizer)
    batch = a_batch(model)
    batch.old_logp = [x - 1000 for x in batch.old_logp]  # rho overflows
    batch.adv = -batch.adv.abs()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(nsr.UserError, match="not finite"):
        nsr.update(a_run(model), batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_bf16_autocast_leaves_the_weights_in_float32(tokenizer):
    model = tiny_model(tokenizer)
    batch, run = a_batch(model), a_run(model, bf16=True)
    with nsr.autocast(run):
        rough = torch.cat(nsr.score(model, batch.responses, run.cfg)[0])
    assert 1e-4 < (rough - torch.cat(batch.old_logp)).abs().max() < 0.3
    assert rough.dtype == torch.float32
    nsr.update(run, batch)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# evaluation


def test_pass_at_k_is_exact():
    for n in range(1, 13):
        for k in range(1, n + 1):
            worst = [min(draw) for draw in itertools.combinations(range(n), k)]
            for c in range(n + 1):  # 0 .. c - 1 are right
                share = sum(first < c for first in worst) / len(worst)
                assert nsr.pass_at_k(n, c, k) == share
    for c, k in itertools.product(range(257), (1, 2, 17, 128, 255, 256)):
        exact = 1 - Fraction(math.comb(256 - c, k), math.comb(256, k))
        assert nsr.pass_at_k(256, c, k) == float(exact)
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError):
            nsr.pass_at_k(n, c, k)


def test_tally_counts_distinct_answers_by_hand():
    rows = [{"pred_answer": answer, "label": label} for answer, label in (
        ("1+2", True), ("1 + 2", True), ("2+1", True), ("4", False), ("5", False), (None, False))]
    tally = nsr.tally(rows)
    assert (tally["distinct"], tally["distinct correct"], tally["Pass@1"]) == (4, 2, 0.5)


@pytest.fixture
def evaluation(monkeypatch, tmp_path, capsys):
    """evaluation(*flags) runs eval.py's command in this process: (status, out, err)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        with handlers_kept():
            status = nsr.command(evaluation_command.main)
        return status, *capsys.readouterr()

    return run


def saved(name):
    """{(model, measure): (value, low, high)} of the csv that --save writes."""
    rows = csv.DictReader(Path(f"{name}.csv").open())
    return {(row["model"], row["measure"]): tuple(float(row[k]) for k in ("value", "low", "high"))
            for row in rows}


def test_eval_numbers_equal_those_recomputed_from_the_file(evaluation, base):
    flags = base, "--data", "countdown", "-n", 6, "--problems", 5, "--rollout-tokens", 100
    status, out, err = evaluation(*flags, "--save", "t")
    assert (status, err) == (0, "") and {p.suffix for p in Path().glob("t.*")} == {
        ".csv", ".md", ".png", ".svg"}
    path, = Path("out/eval").glob("*.jsonl")
    groups, greedy = {}, nsr.read_log(path.parent / "greedy" / path.name)
    for row in nsr.read_log(path):
        groups.setdefault(row["question_id"], []).append(row)
        assert row["label"] == nsr.verify_countdown(row["response"], row["gold_answer"])
        assert row["pred_answer"] == nsr.extract_answer(row["response"])
        assert row["length"] <= 20 and row["finish_reason"] == "stop" or row["length"] == 20
    groups = list(groups.values())
    assert [[row["generation_id"] for row in group] for group in groups] == [[*range(6)]] * 5
    assert len({row["seed"] for group in groups for row in group}) == 30
    numbers = saved("t")
    for k in (1, 2, 4, 6):
        value = sum(1 - math.prod(1 - k / i for i in range(len(group) - sum(
            row["label"] for row in group) + 1, len(group) + 1)) for group in groups) / 5
        assert abs(numbers[str(base), f"Pass@{k}"][0] - value) < 1e-12
    for measure, value in (("length", [row["length"] for group in groups for row in group]),
                           ("distinct", [len({row["pred_answer"] for row in group} - {None, ""})
                                         for group in groups]),
                           ("greedy", [row["label"] for row in greedy])):
        value_, low, high = numbers[str(base), measure]
        assert abs(value_ - sum(value) / len(value)) < 1e-12 and low <= value_ <= high
    assert evaluation(*flags)[1] == out  # nothing is sampled again


def test_eval_goes_on_after_a_kill_with_the_same_bytes(evaluation, base):
    flags = base, "--data", "countdown", "-n", 8, "--problems", 10, "--rollout-tokens", 150
    assert evaluation(*flags)[0] == 0  # chunks of 2 problems
    path, = Path("out/eval").glob("*.jsonl")
    whole, table = path.read_bytes(), evaluation(*flags)[1]
    for size in random.Random(0).sample(range(len(whole)), 5):  # what a kill at any moment leaves
        path.write_bytes(whole[:size])
        status, out, _ = evaluation(*flags)
        assert status == 0 and path.read_bytes() == whole and out.endswith(table)
        assert out.count("cut short") == (whole[size - 1] != b"\n"[0])
    assert evaluation(*flags[:-4], "--problems", 4, *flags[-2:])[0] == 0
    assert path.read_bytes() == whole


def test_eval_stopped_by_ctrl_c_prints_what_is_complete(evaluation, base, monkeypatch):
    append, count = nsr.append_log, itertools.count()

    def interrupted(path, rows):
        append(path, rows)
        if next(count) == 7:  # after 4 greedy ones
            raise KeyboardInterrupt

    monkeypatch.setattr(nsr, "append_log", interrupted)
    flags = base, "--data", "countdown", "-n", 2, "--problems", 4
    status, out, err = evaluation(*flags)
    assert (status, err) == (130, "") and "stopped" in out and "countdown, 4 problems" in out
    assert "countdown, 4 problems" in evaluation(*flags)[1]


@pytest.mark.parametrize("flags, said", [
    ([], "give models"), (["x", "-n", "0"], "-n"), (["x", "-n", "4", "-k", "8"], "-k 8"),
    (["x", "--device", "quantum", "--data", "countdown"], "--device"),
    (["no/such-model", "--data", "countdown"], "no/such-model"), (["./none"], "no model directory"),
    (["x", "--data", "missing.jsonl"], "missing.jsonl"), (["x", "--problems", "0"], "--problems"),
    (["--rescore", "missing.jsonl"], "missing.jsonl"), (["--rescore", "bad.jsonl"], "bad.jsonl"),
    (["--rescore", "empty.jsonl"], "empty.jsonl"), (["--rescore", "mixed.jsonl"], "mixed models"),
    (["--rescore", "good.jsonl", "-k", "2"], "Pass@2"), (["x", "--data", "empty.jsonl"], "empty")])
def test_eval_refuses_bad_input_in_one_line(evaluation, tmp_path, flags, said):
    row = dict(question_id=0, generation_id=0, response="", gold_answer="1", label=0, model="a")
    for name, rows in (("bad", [{"response": 1}]), ("empty", []), ("good", [row]),
                       ("mixed", [row, row | {"generation_id": 1, "model": "b"}])):
        nsr.write_log(tmp_path / f"{name}.jsonl", rows)
    status, _, err = evaluation(*flags)
    assert status == 2 and said in err and len(err.splitlines()) == 1


def test_eval_refuses_to_mix_models_or_settings_in_a_file(evaluation, base, tokenizer):
    policy = shutil.copytree(base, "policy")
    flags = policy, "--data", "countdown", "-n", 2, "--problems", 2
    assert evaluation(*flags)[0] == 0
    for more, said in (("--temperature=2", "temperature"), ("--seed=1", "seed"), ("-n4", "n is")):
        status, _, err = evaluation(*flags, more)
        assert status == 2 and said in err and len(err.splitlines()) == 1
    tiny_model(tokenizer, seed=1, hidden=64).save_pretrained(policy)  # it was trained on
    status, _, err = evaluation(*flags)
    assert status == 2 and "weights" in err and len(err.splitlines()) == 1


def test_eval_compares_and_groups_by_hand(evaluation):
    answers = {"out/a": [1, 2, 0, 1], "out/b-s0": [2, 3, 1, 2], "out/b-s1": [3, 4, 2, 3],
               "out/c": [2, 1, 1, 0]}  # of 4 to each question these many are right
    for model, counts in answers.items():
        nsr.write_log(Path(f"{model}.jsonl"), [
            {"model": model, "data": "set", "question_id": i, "generation_id": j, "label": j < c,
             "response": f"\\boxed{{{1 if j < c else 2 + j}}}", "gold_answer": "1"}
            for i, c in enumerate(counts) for j in range(4)])
    flags = "--rescore", *(f"{model}.jsonl" for model in answers), "--compare", "--save", "t"
    status, out, _ = evaluation(*flags)
    numbers = saved("t")
    assert numbers["out/a", "Pass@1"][0] == 0.25
    assert abs(numbers["out/a", "Pass@2"][0] - 11 / 24) < 1e-12
    assert numbers["out/b-s0 - out/a", "Pass@1"] == (0.25, 0.25, 0.25)  # in every problem
    value, low, high = numbers["out/c - out/a", "Pass@1"]
    assert value == 0 and low < 0 < high and out.count("+.250*") == 1 and " +.000 " in out
    assert numbers["out/a", "maj@n"][0] == 0.75  # of a tie the first written wins
    evaluation(*flags, "--group")
    value, low, high = saved("t")["b - a", "Pass@1"]
    assert (value, low, high) == (0.375, 0.25, 0.5)  # the seeds are drawn too


def test_eval_rescores_both_layouts(evaluation, base):
    rows = [{"question_id": 1, "generation_id": i, "response": f"\\boxed{{{a}}}", "label": label,
             "gold_answer": "\\frac12"} for i, (a, label) in enumerate([("0.5", 0), ("2", 0)])]
    nsr.write_log(Path("theirs.jsonl"), rows)
    status, out, _ = evaluation("--rescore", "theirs.jsonl")
    assert status == 0 and "2 responses, 1 verdicts changed\n  True: '0.5' /" in out
    assert ".500" in out and "1.000" in out
    flags = base, "--data", "countdown", "-n", 4, "--problems", 3
    ours, (path,) = evaluation(*flags)[1], Path("out/eval").glob("*.jsonl")
    status, out, _ = evaluation("--rescore", path)
    assert status == 0 and out.endswith(ours) and "12 responses, 0 verdicts changed" in out
    path.write_text(path.read_text().replace('"label": false', '"label": true', 1))
    assert "12 responses, 1 verdicts changed" in evaluation("--rescore", path)[1]


def test_eval_shows_levels_and_subjects(evaluation, base):
    rows = [{"problem": q, "answer": "1", "level": level, "type": "Algebra"}
            for q, level in (("1 2 3 4 = 10", "Level 2"), ("1 2 3 5 = 11", 1))]
    nsr.write_log(Path("set.jsonl"), rows)
    status, out, _ = evaluation(base, "--data", "set.jsonl", "-n", 2, "--max-new-tokens", 9)
    assert status == 0 and "| level" in out and "Level 2 |" in out and "Algebra |" in out


def write_runs():
    """Logs of two seeds of a and one of b: Pass@1 and Pass@4 every other step, more at each."""
    for run, ones, fours in (("a-s0", (0.1, 0.2, 0.4), (0.9, 0.8, 0.6)),
                             ("a-s1", (0.1, 0.3, 0.2), (0.7, 0.5, 0.6)),
                             ("b-s0", (0.2, 0.2, 0.2), (0.5, 0.4, 0.3))):
        rows = []
        for step in range(5):
            if step:
                rows.append({"step": step, "steps": 4, "length": 10 * step, "time": {"update": 2.0},
                             "spread": None if step == 2 else [step, step + 1, step + 2]})
            if step % 2 == 0:
                rows.append({"step": step, "length": 99, "distinct": 5 - step / 4,
                             "pass_at_k": {"1": ones[step // 2], "4": fours[step // 2]}})
        nsr.write_log(Path("out", run, "metrics.jsonl"), rows)
    return [Path("out", run) for run in ("a-s0", "a-s1", "b-s0")]


def test_eval_log_by_hand(evaluation):
    runs = write_runs()
    flags = *runs, "--log", "Pass@1:Pass@4", "step:length", "step:spread", "distinct:update"
    assert evaluation(*flags)[0] == 2  # no line has both
    status, out, err = evaluation(*flags[:-1], "--save", "t")
    assert (status, err) == (0, "") and {p.suffix for p in Path().glob("t.*")} == {
        ".csv", ".md", ".png", ".svg"}
    assert evaluation(*runs, "--log", "step:length", "distinct:length")[0] == 2  # one Y twice
    assert "| out/b-s0 |   .300 | 40.000 |     4.000 |     5.000 |     6.000 |" in out
    assert saved("t")["out/a-s1", "Pass@4"][0] == 0.6
    evaluation(*flags[:-1], "--save", "t", "--group")
    value, low, high = saved("t")["a", "Pass@4"]  # two seeds that agree
    assert value == low == high == pytest.approx(0.6)
    assert saved("t")["b", "spread[2]"][0] == 6


def test_eval_log_at_equal_x_by_hand(evaluation):
    status, out, _ = evaluation(*write_runs(), "--group", "--log", "Pass@1:Pass@4", "--at", 0.15,
                                0.2, 0.35, "--save", "t")
    numbers = saved("t")
    value, low, high = numbers["a", "Pass@4 at Pass@1 0.15"]  # .85 and .65, at the first crossing
    assert value == pytest.approx(0.75)
    assert high - value == pytest.approx(value - low) == pytest.approx(12.706 * 0.1)  # t, 1 d.o.f.
    assert numbers["a", "Pass@4 at Pass@1 0.2"][0] == pytest.approx((0.8 + 0.6) / 2)
    assert numbers["b", "Pass@4 at Pass@1 0.2"][0] == 0.5  # where it first is there
    assert math.isnan(numbers["a", "Pass@4 at Pass@1 0.35"][0])  # one seed never gets there
    # the spread between seeds is that of all rows: .8 and .6 of a, none of b
    assert numbers["b", "Pass@4 at Pass@1 0.2"][2] == pytest.approx(0.5 + 12.706 * 0.1 * 2**0.5)
    assert status == 0 and re.search(r"\| b +\| +- \| +\.500 \(-1\.297 2\.297\) \| +- \|", out)


@pytest.mark.parametrize("flags, said", [
    (["--log", "step:length"], "give models"), (["out/a-s0", "--at", "1"], "--log X:Y"),
    (["out/a-s0", "--log", "step:lenth"], "distinct, Pass@1, Pass@4, steps, spread, update"),
    (["out/a-s0", "--log", "spread:length"], "X a number"), (["out/a-s0", "--log", "step"], "X:Y"),
    (["out/a-s0", "--log", "step:"], "X:Y"),
    (["out/none", "--log", "step:length"], "directory of a run"),
    (["out/a-s0", "--log", "step:length", "--rescore", "f"], "give models")])
def test_eval_log_refuses_in_one_line(evaluation, flags, said):
    write_runs()
    status, _, err = evaluation(*flags)
    assert status == 2 and said in err and len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# runs


@pytest.mark.parametrize("method", nsr.METHODS)
def test_every_method_trains(cli, base, method):
    status, out, err = cli(*short(base, method=method, steps=2, prompts=16, group_size=8))
    assert (status, err) == (0, "")
    path = Path("out") / f"{method}-1"
    before = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    after, rows = state(path)
    assert 0 < rows[1]["correct"] < 1
    assert any(not torch.equal(before[k], after[k]) for k in after)
    assert {p.name for p in path.iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl",
                                                "curves.png", "checkpoint"}
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    own = method in ("grpo", "ppo")  # advantages without lam and beta
    assert (rows[1]["lam"] is None) == own == bool(re.search(r"1/2 .* -     - ", out))
    assert list(rows[0]["pass_at_k"]) == ["1", "2", "4"]
    assert "k=4" in out and "base" in out and str(path) in out


def test_metrics_say_what_happened(cli, base):
    status, out, _ = cli(*short(base, method="a-nsr", steps=5, updates=4, max_new_tokens=12))
    rows = [row for row in nsr.read_log(Path("out/a-nsr-1/metrics.jsonl")) if "correct" in row]
    for t, row in enumerate(rows):  # the schedule moves once a step, whatever --updates
        assert row["beta"] == pytest.approx(0.5 + math.exp(-0.03 * t))
        assert row["lam"] == pytest.approx(0.05 + 0.15 * t / 5)
        assert row["rollout_gap"] < 1e-5 and row["time"]["rollout"] > 0
        assert 0 < row["entropy"] < math.log(20) and row["tokens"] == round(16 * row["length"])
        assert row["truncated"] > 0
        for kind, any_ in (("correct", row["correct"] > 0), ("incorrect", row["correct"] < 1)):
            spread = row[f"confidence_{kind}"]
            assert (spread is not None) == any_ and (spread or []) == sorted(spread or [])
    samples = nsr.read_log(Path("out/a-nsr-1/samples.jsonl"))
    assert 0 < len(samples) <= 10
    for s in samples:
        assert nsr.verify_countdown(s["response"], s["answer"]) is s["correct"]
    assert out.count("are cut at --max-new-tokens") == 1  # said once, not every step


@pytest.mark.parametrize("ppo", [False, True])
def test_measures_of_a_step_by_hand(model, tokenizer, ppo):
    batch, problem = a_batch(model, ((2, 2), (3, 1))), nsr.Problem("q", "1", "", nsr.verify)
    batch.old_logp = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]  # the sampler's: 0
    batch.adv = torch.tensor([[-1.0, -3.0], [-4.0, 0.0]]) if ppo else torch.tensor([-2.0, -4.0])
    texts, correct = ["\\boxed{2}", ""], torch.tensor([False, False])
    m, _ = nsr.measure(a_run(model), batch, [problem] * 2, texts, correct,
                       [torch.tensor([0.5, 1.0]), torch.tensor([3.0])], torch.tensor([0.5, 0.25]))
    assert (m["tokens"], m["length"], m["rollout_gap"], m["entropy"]) == (3, 1.5, 2.0, 1.5)
    assert (m["adv_incorrect"], m["boxed"], m["correct"], m["logp_correct"]) == (-3, 0.5, 0, None)
    assert m["logp_incorrect"] == pytest.approx(math.log(0.5 * 0.25) / 2)


def test_measure_gives_quantiles_of_the_confidence(model, tokenizer):
    problem = nsr.Problem("q", "1", "", nsr.verify_countdown)
    for correct, expected in (([False] * 6, (None, [0.15, 0.35, 0.55])),
                              ([True, False] * 3, ([0.14, 0.3, 0.46], [0.24, 0.4, 0.56]))):
        batch, entropy = a_batch(model), [torch.zeros(1)] * 6
        metrics, _ = nsr.measure(a_run(model), batch, [problem] * 6, [""] * 6,
                                 torch.tensor(correct), entropy, torch.arange(1, 7) / 10)
        for kind, quantiles in zip(("correct", "incorrect"), expected):
            assert metrics[f"confidence_{kind}"] == (quantiles and pytest.approx(quantiles))


def test_entropy_is_the_entropy(tokenizer):
    model = tiny_model(tokenizer)
    for p in model.parameters():
        torch.nn.init.zeros_(p)  # every token is as likely as any other
    entropy = nsr.score(model, a_batch(model).responses, nsr.Config())[1]
    close(torch.cat(entropy), torch.full((22,), math.log(len(tokenizer))))


def test_memory_is_said_before_anything_is_loaded(cli, base, tmp_path):
    flags = short(base, steps=3, prompts=16, group_size=8, max_prompt_tokens=20)
    process = script([*flags, "--memory"], tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and not (tmp_path / "out").exists()
    said = float(re.search(r"together +([\d.]+) GiB", out)[1])
    process = script(flags, tmp_path)
    process.communicate(timeout=120)
    rows = nsr.read_log(tmp_path / "out/a-nsr-1/metrics.jsonl")
    measured = max(row["time"]["memory_gb"] for row in rows if "time" in row) * 1e9 / 2**30
    assert 0.8 < said / measured < 1.2
    process = script(["--resume", "out/a-nsr-1", "--memory"], tmp_path)
    assert "together" in process.communicate(timeout=60)[0] and process.returncode == 0
    cfg = nsr.Config(model=str(base))
    half = nsr.memory_needs(dataclasses.replace(cfg, rollout_tokens=1), torch.device("cpu"))
    assert half["gradient"] * 2 == half["optimizer"] and half["weights"] == half["gradient"]


def test_profile_prints_the_costliest_operations(cli, base):
    status, out, _ = cli(*short(base, steps=2), "--profile")
    assert status == 0 and "Self CPU" in out
    assert json.loads(Path("out/a-nsr-1/trace.json").read_text())


def test_silent_failures_are_said_once(cli, base, tmp_path):
    rows = [{"problem": f"{i} 2 3 4 = 9", "answer": "none"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = cli(*short(base, data="data.jsonl", method="psr", steps=3))
    assert out.count("all responses are incorrect") == 1 and out.count("nothing to learn") == 1
    _, out, _ = cli(*short(base, max_new_tokens=1, steps=3))
    assert out.count("no response has a \\boxed{}") == 1 and out.count("are cut at") == 1


def test_default_names_are_fresh_and_a_taken_name_is_refused(cli, base):
    for number in (1, 2):
        assert cli(*short(base, steps=1))[0] == 0 and Path(f"out/a-nsr-{number}").is_dir()
    assert cli(*short(base, steps=1, name="mine"))[0] == 0
    before = {p: p.read_bytes() for p in Path("out/mine").rglob("*") if p.is_file()}
    status, _, err = cli(*short(base, steps=1, name="mine"))
    assert status == 2 and "--resume out/mine" in err
    assert before == {p: p.read_bytes() for p in Path("out/mine").rglob("*") if p.is_file()}


@pytest.mark.parametrize("flags, said", [
    (["--method=best"], "--method"),
    (["--preset=best"], "qwen-math"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--steps=many"], "--steps"),
    (["--steps=0"], "--steps"),
    (["--lr=nan"], "--lr"),
    (["--temperature=0"], "--temperature"),
    (["--prompts=5", "--updates=2"], "does not divide"),
    (["--method=grpo", "--group-size=1"], "--group-size"),
    (["--data=missing.jsonl"], "missing.jsonl"),
    (["--data=bad.jsonl"], "bad.jsonl, line 2"),
    (["--data=half.jsonl"], "half.jsonl, line 1: no answer"),
    (["--data=list.jsonl"], "list.jsonl, line 1: not a JSON object"),
    (["--data=binary.jsonl"], "binary.jsonl"),
    (["--data=empty.jsonl"], "holds no problems"),
    (["--data=few.jsonl", "--prompts=64"], "few.jsonl"),
    (["--data=hf://datasets/nobody"], "nobody"),
    (["--model=no/such-model"], "no/such-model"),
    (["--model=missing-folder"], "missing-folder"),
    (["--max-new-tokens=60"], "context of 64"),
    (["--name=a/b"], "--name 'a/b'"),
    (["--name=.."], "--name '..'"),
    (["--name=" + "x" * 300], "too long"),
    (["--data=half_character.jsonl"], "half_character.jsonl, line 1"),
    (["--device=cuda:99"], "--device cuda:99"),
    (["--device=quantum"], "--device quantum"),
    (["--model=./none", "--data=math-train"], "no model directory ./none"),
    (["--model=some/where/else"], "no model directory some/where/else"),
    (["--resume=out/none"], "out/none"),
])
def test_bad_input_is_one_line_and_status_2(cli, base, tmp_path, flags, said):
    good = json.dumps({"problem": "1 2 3 4 = 9", "answer": "9"}) + "\n"
    (tmp_path / "bad.jsonl").write_text(good + "{\n")
    (tmp_path / "half.jsonl").write_text('{"problem": "p"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "half_character.jsonl").write_text('{"problem": "\\ud800", "answer": 1}\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "few.jsonl").write_text(good)
    known = {f.split("=")[0] for f in flags}
    others = [] if "--resume" in known else short(base)
    status, _, err = cli(*(f for f in others if f.split("=")[0] not in known), *flags)
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("out/*/config.json"))


# --------------------------------------------------------------------------------------------------
# checkpoint and resume


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """An uninterrupted run of the real script, for others to be compared with."""
    cwd = tmp_path_factory.mktemp("finished")
    process = script(short(base, steps=6, eval_every=3, updates=2), cwd)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    assert "Pass@k of 4 held-out problems" in out
    return cwd / "out/a-nsr-1"


def test_checkpoint_loads_anywhere(finished):
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "checkpoint")
    ids = tokenizer("1 2 3 4 = 10", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize("signum, after", [
    (signal.SIGKILL, 1), (signal.SIGKILL, 3), (signal.SIGKILL, 5), (signal.SIGTERM, 3),
    (signal.SIGINT, 2), (signal.SIGHUP, 1), (signal.SIGPIPE, 2)])
def test_stopped_and_resumed_run_is_bit_identical(base, finished, tmp_path, signum, after):
    process = script(short(base, steps=6, eval_every=3, updates=2, name="run"), tmp_path)
    run, deadline = tmp_path / "out/run", time.time() + 120
    while len(nsr.read_log(run / "metrics.jsonl")) <= after and time.time() < deadline:
        time.sleep(0.002)
    if signum == signal.SIGPIPE:  # nobody reads on, as after `| head`
        process.stdout.close()
        process.stdout = None
    else:
        process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 130)
    if signum != signal.SIGKILL:
        assert "--resume out/run" in err
        saved = torch.load(run / "checkpoint/trainer.pt")["step"]
        assert saved == max(row["step"] for row in nsr.read_log(run / "metrics.jsonl"))
    resumed = script(["--resume=out/run"], tmp_path)
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and not err, err
    assert same(state(run), state(finished))
    assert (run / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


@pytest.mark.parametrize("flags", [dict(method="ppo"), dict(method="nsr", optimizer_state="bf16")])
def test_a_run_resumed_half_way_is_bit_identical(cli, base, flags):
    assert cli(*short(base, name="whole", **flags))[0] == 0
    assert cli(*short(base, name="half", **flags | dict(steps=2)))[0] == 0
    assert cli("--resume=out/half", "--steps=4")[0] == 0
    (weights, rows), (others, more) = (state(Path("out", name)) for name in ("whole", "half"))
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    assert [r["adv_incorrect"] for r in rows if "adv_incorrect" in r] == [
        r["adv_incorrect"] for r in more if "adv_incorrect" in r]


def ranks(flags, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         ROOT / "nsr.py", *flags], cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})


@pytest.mark.parametrize("method", ["a-nsr", "ppo"])
def test_two_ranks_equal_one_process(cli, base, tmp_path, method):
    flags = short(base, steps=3, prompts=8, updates=2, schedule="accuracy", method=method,
                  lr=1e-4)
    alone = script([*flags, "--name=one"], tmp_path)
    process = ranks([*flags, "--name=two"], tmp_path)
    assert alone.wait(timeout=120) == 0
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.count("Pass@k of 4") == 1, err
    (one, rows), (two, others) = (state(Path("out", name)) for name in ("one", "two"))
    for k in one:
        close(one[k], two[k], atol=1e-5)
    for row, other in zip(rows, others, strict=True):  # the same responses, counted once
        assert row.keys() == other.keys()
        assert all(row.get(k) == other.get(k) for k in ("step", "correct", "tokens", "beta", "k"))
    status, _, err = cli("--resume=out/two")
    assert status == 2 and "--nproc-per-node 2" in err


def test_a_lost_rank_ends_the_run_with_a_message(base, tmp_path):
    process = ranks(short(base, steps=500, prompts=8, name="run"), tmp_path)
    log, deadline = tmp_path / "out/run/metrics.jsonl", time.time() + 120
    while len(nsr.read_log(log)) <= 3 and time.time() < deadline:
        time.sleep(0.05)
    children = [int(pid) for pid in subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
    os.kill(children[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "--resume" in err
    saved = torch.load(tmp_path / "out/run/checkpoint/trainer.pt")["step"]
    assert 2 <= saved <= max(row["step"] for row in nsr.read_log(log))


def test_divergence_and_damaged_logs_end_in_one_line(cli, base):
    status, _, err = cli(*short(base, lr=1e30, name="run"))
    assert status == 2 and "--lr" in err and len(err.splitlines()) == 1
    with open("out/run/metrics.jsonl", "a") as log:
        log.write("{garbage\n")
    status, _, err = cli("--resume=out/run")
    assert status == 2 and "metrics.jsonl" in err and len(err.splitlines()) == 1


def test_resume_refuses_what_differs(cli, base, tmp_path):
    rows = [{"problem": f"{i} 2 3 4 = 9", "answer": str(i)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli(*short(base, data="data.jsonl", name="run", steps=2))[0] == 0
    for flag in ("--method=psr", "--model=elsewhere", "--data=countdown", "--seed=5", "--lr=1"):
        status, _, err = cli("--resume=out/run", flag)
        assert status == 2 and flag.split("=")[0] in err and len(err.splitlines()) == 1
    assert cli("--resume=out/run", "--method=a-nsr", "--steps=3")[0] == 0
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    status, _, err = cli("--resume=out/run")
    assert status == 2 and "data.jsonl" in err


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors", "config.json"])
def test_damaged_checkpoint_is_refused(cli, base, name):
    assert cli(*short(base, name="run", steps=2))[0] == 0
    file = Path("out/run/checkpoint") / name
    file.write_bytes(file.read_bytes()[:100])
    log = Path("out/run/metrics.jsonl").read_text()
    status, _, err = cli("--resume=out/run")
    assert status == 2 and "damaged" in err and len(err.splitlines()) == 1
    assert Path("out/run/metrics.jsonl").read_text() == log


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(cli, base):
    assert cli(*short(base, name="run", steps=2))[0] == 0
    expected = state(Path("out/run"))
    os.rename("out/run/checkpoint", "out/run/checkpoint.old")  # the first of the two renames
    Path("out/run/checkpoint.1.tmp").mkdir()
    with open("out/run/metrics.jsonl", "a") as log:
        log.write('{"step": 3, "corr')
    assert cli("--resume=out/run")[0] == 0
    assert same(state(Path("out/run")), expected)
    assert not list(Path("out/run").glob("checkpoint.*"))


@pytest.mark.parametrize("signum", nsr.STOPS)
@pytest.mark.parametrize("ignored", [False, True])
def test_signal_is_held_back_while_weights_change(signum, ignored):
    seen = []
    with handlers_kept():
        signal.signal(signum, signal.SIG_IGN if ignored else signal.default_int_handler)
        with contextlib.nullcontext() if ignored else pytest.raises(KeyboardInterrupt):
            with nsr.uninterrupted():
                os.kill(os.getpid(), signum)
                seen.append("whole")
    assert seen == ["whole"]


# --------------------------------------------------------------------------------------------------
# kernels/logprob.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", "torch"])
def kernel_path(request, monkeypatch):
    """Run a test with the kernels (on a CPU in Triton's interpreter), and with the torch path."""
    if request.param == "torch":
        monkeypatch.setattr(K, "triton", None)
    elif K.triton is None:
        pytest.skip("needs triton")
    else:
        monkeypatch.setattr(K, "INTERPRET", DEVICE == "cpu")
    return request.param


def kernel_case(shape, V, dtype=torch.float32, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, V, generator=g, dtype=torch.float64) * 4 + offset).to(dtype).to(DEVICE)
    return x, torch.randint(V, shape, generator=g).to(DEVICE)


def kernel_compare(x, y, temperature=1.0, mask=None, inplace=False, atol=3e-5):
    """Check values and gradients of token_stats_from_logits against the definition in float64."""
    z = x.detach().double().requires_grad_()
    T = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    ref = K.naive_token_stats(z, y, T, mask)
    g = torch.Generator().manual_seed(1)
    w = torch.randn(2, *y.shape, generator=g, dtype=torch.float64).to(x.device)
    (ref.logprobs * w[0] + ref.entropy * w[1]).sum().backward()
    x = x.clone().requires_grad_()
    out = K.token_stats_from_logits(
        x, y, temperature=temperature, mask=mask, inplace_backward=inplace
    )
    want = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert all(o.dtype == want for o in out)
    for o, r in zip(out, ref):
        torch.testing.assert_close(
            o.double(), r, rtol=1e-6, atol=1e-12 if x.dtype == torch.float64 else atol
        )
    limit = math.log(x.shape[-1]) * (1 + 1e-6)
    assert (out.logprobs <= 0).all() and (out.entropy >= 0).all() and (out.entropy <= limit).all()
    (out.logprobs * w[0] + out.entropy * w[1]).sum().backward()
    scale = z.grad.abs().amax(-1, keepdim=True)
    # one rounding; the interpreter truncates a bfloat16, which is twice as far
    eps = {torch.float64: 1e-12, torch.float32: 2e-5}.get(x.dtype, torch.finfo(x.dtype).eps)
    tiny = 1e-12 if x.dtype == torch.float64 else 1e-7  # float16 has subnormals below 6e-8
    assert ((x.grad.double() - z.grad).abs() <= eps * scale + tiny).all()
    if x.dtype in (torch.float64, torch.float32):
        assert (x.grad.double().sum(-1).abs() <= 1e-4 * scale[..., 0] + 1e-12).all()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 31, 1000, 2053])
def test_kernel_matches_float64(kernel_path, V, dtype):
    for T, offset in ((0.3, 0.0), (0.6, 100.0), (1.0, -1e4), (2.0, 1e4)):
        x, y = kernel_case((2, 3), V, dtype, 0.0 if dtype == torch.float16 else offset)
        kernel_compare(x, y, T)


def test_kernel_large_offset_low_temperature(kernel_path):
    x, y = kernel_case((2, 3), 1000, offset=1e4)
    kernel_compare(x, y, 0.3)  # far within the 2e-3 of the issue: the max is subtracted first


def test_kernel_large_vocabulary(kernel_path):
    x, y = kernel_case((1, 2), 151_936, torch.bfloat16)
    kernel_compare(x, y, 0.6)


def test_kernel_several_chunks_and_tiles(kernel_path, monkeypatch):
    monkeypatch.setattr(K, "CHUNK", 1)  # two rows at a time
    x, y = kernel_case((7,), 5003)
    kernel_compare(x, y)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "both"])
def test_kernel_gradcheck(kernel_path, name):
    x, y = kernel_case((1, 3), 7, torch.float64)
    mask = torch.tensor([[True, False, True]], device=DEVICE)
    T = torch.tensor([[0.7, 1.0, 1.3]], device=DEVICE, dtype=torch.float64)

    def f(x):
        s = K.token_stats_from_logits(x, y, temperature=T, mask=mask)
        return {"logprobs": s.logprobs, "entropy": s.entropy, "both": s.logprobs * s.entropy}[name]

    assert torch.autograd.gradcheck(f, x.requires_grad_())
    g = torch.autograd.grad(K.logprobs_from_logits(x, y, temperature=T, mask=mask).sum(), x)[0]
    h = torch.autograd.grad(f(x).sum(), x)[0]
    assert name != "logprobs" or torch.equal(g, h)  # one public function says what the other does


def test_kernel_hand_gradient(kernel_path):
    """softmax(log 1, log 2, log 5) = (1, 2, 5)/8; d logp_1 / d z = (-1, 6, -5)/8, over T."""
    x = torch.tensor([[1.0, 2.0, 5.0]], device=DEVICE).log().mul(2).requires_grad_()
    out = K.token_stats_from_logits(x, torch.tensor([1], device=DEVICE), temperature=2.0)
    out.logprobs.backward()
    torch.testing.assert_close(out.logprobs.detach().cpu(), torch.tensor([math.log(2 / 8)]))
    torch.testing.assert_close(x.grad.cpu(), torch.tensor([[-1.0, 6.0, -5.0]]) / 16)
    p = np.array([1, 2, 5]) / 8
    assert abs(out.entropy.item() + (p * np.log(p)).sum()) < 1e-6


def test_kernel_confident_token(kernel_path):
    """1 - p of the label does not cancel: p = 1 - 3e-9 still has the right gradient in float32."""
    x = torch.zeros(1, 40, device=DEVICE)
    x[0, 7] = 23.3
    kernel_compare(x, torch.tensor([7], device=DEVICE))
    x.requires_grad_()
    K.logprobs_from_logits(x, torch.tensor([7], device=DEVICE)).backward()
    exact = 39 * math.exp(-23.3) / (1 + 39 * math.exp(-23.3))
    assert abs(x.grad[0, 7].item() / exact - 1) < 2e-5


def test_kernel_infinities_and_nan(kernel_path):
    x, y = kernel_case((4,), 3000)
    x[0, :2500] = -math.inf  # whole leading tiles
    x[1, 1::2] = -math.inf
    x[2, :] = -math.inf
    x[2, 5] = 1.0
    y[:3] = torch.tensor([2700, 4, 5])
    kernel_compare(x, y)
    y[1] = 3  # a label that cannot be: log 0
    assert K.logprobs_from_logits(x, y)[1] == -math.inf
    for bad in (math.nan, math.inf):
        x[3, 2] = bad
        out = K.token_stats_from_logits(x, y)
        assert (
            out.logprobs[3].isnan() and out.entropy[3].isnan() and not out.entropy[:3].isnan().any()
        )
    x[3] = -math.inf
    assert K.logprobs_from_logits(x, y)[3].isnan()  # as log_softmax has it


@pytest.mark.parametrize("inplace", [False, True])
def test_kernel_dead_rows(kernel_path, inplace):
    x, y = kernel_case((3, 4), 100)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)).to(DEVICE) > 0.4
    mask[2] = False
    y[0, 0] = -100
    live = mask & (y != -100)
    x[~live] = math.nan
    x = x.requires_grad_()
    out = K.token_stats_from_logits(x, y, mask=mask, inplace_backward=inplace)
    clean = x.detach().nan_to_num(0.0)
    ref = K.naive_token_stats(clean, y, 1.0, mask)
    for o, r in zip(out, ref):
        torch.testing.assert_close(o, r)
    assert (out.logprobs[~live] == 0).all() and (out.entropy[~live] == 0).all()
    assert out.confidence[2] == 0 and not out.confidence.requires_grad
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert (x.grad[~live] == 0).all() and x.grad[live].isfinite().all() and x.grad[live].any()


def test_kernel_label_out_of_range(kernel_path):
    x, y = kernel_case((5,), 33)
    y = torch.tensor([0, 33, -1, 2**31 + 5, -100], device=DEVICE)
    x = x.requires_grad_()
    out = K.token_stats_from_logits(x, y)
    assert (
        out.logprobs.isnan().tolist()
        == out.entropy.isnan().tolist()
        == [False, True, True, True, False]
    )
    out.logprobs.sum().backward()
    assert x.grad.isnan().all(-1).tolist() == [False, True, True, True, False]
    assert not x.grad[[0, 4]].isnan().any()


def test_kernel_shapes_and_strides(kernel_path):
    x, y = kernel_case((2, 5), 37)
    ref = K.naive_token_stats(x.double(), y)
    for z in (
        x,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.nn.functional.pad(x, (0, 5))[..., :37],
        torch.nn.functional.pad(x, (3, 0))[..., 3:],
        x.mT.contiguous().mT,
    ):
        kernel_compare(z, y.int())
        assert z.shape == x.shape
    assert torch.equal(
        K.logprobs_from_logits(x[:, :-1], y[:, 1:]),
        K.logprobs_from_logits(x[:, :-1].clone(), y[:, 1:]),
    )
    full = x.clone().requires_grad_()
    K.logprobs_from_logits(full[:, :-1], y[:, 1:]).sum().backward()
    assert (full.grad[:, -1] == 0).all() and full.grad[:, :-1].any(-1).all()
    kernel_compare(x[:, ::2], y[:, ::2])
    torch.testing.assert_close(
        K.logprobs_from_logits(x[0, 0], y[0, 0]).double(), ref.logprobs[0, 0], atol=3e-5, rtol=0
    )
    four = K.token_stats_from_logits(x.view(2, 1, 5, 37), y.view(2, 1, 5))
    assert four.logprobs.shape == (2, 1, 5) and four.confidence.shape == (2, 1)
    torch.testing.assert_close(four.confidence[:, 0].double(), ref.confidence)
    empty = K.token_stats_from_logits(x[:0].requires_grad_(), y[:0])
    assert empty.logprobs.shape == (0, 5) and empty.confidence.shape == (0,)
    empty.logprobs.sum().backward()
    assert K.token_stats_from_logits(x[:, :0], y[:, :0]).confidence.tolist() == [0, 0]


def test_kernel_sliced_logits_are_not_copied(kernel_path, monkeypatch):
    x, y = kernel_case((2, 5), 37)
    seen, forward = [], K._forward
    monkeypatch.setattr(
        K, "_forward", lambda logits, *a: seen.append(logits.data_ptr()) or forward(logits, *a)
    )
    K.logprobs_from_logits(x[:, 1:], y[:, 1:])
    assert seen == [x[:, 1:].data_ptr()]


def test_kernel_temperature(kernel_path):
    x, y = kernel_case((2, 3), 50)
    kernel_compare(x, y, torch.tensor([[0.5, 1.0, 2.0], [0.3, 0.7, 3.0]], device=DEVICE))
    kernel_compare(x, y, torch.tensor([[0.5], [2.0]], device=DEVICE))
    for bad in (
        0,
        0.0,
        -1.0,
        math.nan,
        math.inf,
        torch.tensor(0.0),
        torch.tensor([[1.0], [math.nan]]),
    ):
        with pytest.raises(ValueError, match="temperature must be positive"):
            K.logprobs_from_logits(x, y, temperature=bad)
    for call in (
        lambda: K.logprobs_from_logits(x, y[0]),
        lambda: K.logprobs_from_logits(x, y.float()),
        lambda: K.logprobs_from_logits(x.long(), y),
        lambda: K.logprobs_from_logits(x, y, mask=torch.ones_like(y)),
        lambda: K.logprobs_from_logits(x[0], y[0, 0]),
        lambda: K.logprobs_from_logits(x, y, mask=torch.ones(3, dtype=torch.bool, device=DEVICE)),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("V", [5, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_same_bits_alone_and_in_a_batch(kernel_path, dtype, V):
    x, y = kernel_case((2, 6), V, dtype)  # odd V: rows lie at every alignment
    batch = K.token_stats_from_logits(x, y, temperature=0.7)
    again = K.token_stats_from_logits(x, y, temperature=0.7)
    for a, b in zip(batch, again):
        assert torch.equal(a, b)
    for b in range(2):
        one = K.token_stats_from_logits(x[b : b + 1].clone(), y[b : b + 1], temperature=0.7)
        assert torch.equal(one.confidence, batch.confidence[b : b + 1])
        for t in range(6):
            row = K.token_stats_from_logits(
                x[b, t : t + 1].clone(), y[b, t : t + 1], temperature=0.7
            )
            assert torch.equal(row.logprobs[0], batch.logprobs[b, t]) and torch.equal(
                row.entropy[0], batch.entropy[b, t]
            )


def test_kernel_same_bits_of_a_large_row(monkeypatch):
    monkeypatch.setattr(K, "triton", None)  # torch splits one long sum over threads
    x, y = kernel_case((5,), 70_001)
    assert torch.equal(K.logprobs_from_logits(x, y)[3:4], K.logprobs_from_logits(x[3:4], y[3:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_inplace_backward(kernel_path, dtype):
    x, y = kernel_case((2, 5), 1003, dtype)
    kernel_compare(x, y, 0.6, inplace=True)
    leaf = x.clone().requires_grad_()
    h = leaf * 1
    out = K.token_stats_from_logits(h[:, :-1], y[:, 1:], inplace_backward=True)
    other = (h.float() ** 2).sum() if dtype == torch.float32 else (h**2).sum()  # saves h as well
    version, where = h._version, h.data_ptr()
    (g,) = torch.autograd.grad(out.logprobs.sum(), h, retain_graph=True)
    torch.testing.assert_close(h.detach()[:, :-1], g[:, :-1], rtol=0, atol=0)  # over the logits
    assert h._version > version and h.data_ptr() == where
    assert torch.equal(h.detach()[:, -1], x[:, -1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.logprobs.sum(), h, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    flat = x[:1, :1].clone().requires_grad_()  # overlapping rows must not be overwritten
    K.logprobs_from_logits(flat.expand(2, 5, -1), y, inplace_backward=True).sum().backward()
    want = x[:1, :1].clone().requires_grad_()
    K.logprobs_from_logits(want.expand(2, 5, -1), y).sum().backward()
    assert torch.equal(flat.grad, want.grad) and torch.equal(flat.detach(), x[:1, :1])


def test_kernel_absent_gradients_cost_nothing(kernel_path, monkeypatch):
    x, y = kernel_case((2, 3), 50)
    calls, backward = [], K._backward
    monkeypatch.setattr(
        K, "_backward", lambda *a: calls.append([i is None for i in a[4:6]]) or backward(*a)
    )
    s = K.token_stats_from_logits(x.requires_grad_(), y)
    s.logprobs.sum().backward()
    s = K.token_stats_from_logits(x, y)
    s.entropy.sum().backward()
    assert calls == [[False, True], [True, False]]
    with torch.no_grad():
        assert not K.logprobs_from_logits(x, y).requires_grad


def test_kernel_opcheck(kernel_path):
    x, y = kernel_case((2, 3), 50)
    t = torch.ones(2, 3, device=DEVICE)
    torch.library.opcheck(K._forward, (x.requires_grad_(), y, t, True, 2, False))
    logp, _, stats, _ = K._forward(x.detach(), y, t, False, 2, False)
    torch.library.opcheck(K._backward, (x.detach(), y, t, stats, logp, None, torch.empty_like(x)))


@pytest.mark.parametrize("inplace", [False, True])
def test_kernel_compiles_fullgraph(kernel_path, inplace):
    x, y = kernel_case((2, 5), 50)

    def loss(x, T):
        h = x * 2
        s = K.token_stats_from_logits(h[:, :-1], y[:, 1:], temperature=T, inplace_backward=inplace)
        return (s.logprobs * s.confidence[:, None] + s.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for T in (0.7, torch.tensor([[0.5], [2.0]], device=DEVICE)):
        grads = []
        for f in (loss, compiled):
            z = x.clone().requires_grad_()
            f(z, T).backward()
            grads.append(z.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.skipif(DEVICE != "cpu" or K.triton is None, reason="counts in Triton's interpreter")
@pytest.mark.parametrize("V", [1000, 2053])
def test_kernel_bytes_moved(monkeypatch, V):
    """Bytes of unmasked lanes in a tensor, over N V itemsize: 1 read forward, 1 + 1 backward."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(K, "INTERPRET", True)
    moved = {}

    def counted(name):
        original = getattr(InterpreterBuilder, name)

        def f(self, ptrs, *args, **kwargs):
            mask = args[0] if "load" in name else args[1]
            at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            for key, t in watched.items():
                low = t.data_ptr()
                inside = ((at >= low) & (at < low + t.untyped_storage().nbytes())).sum()
                moved[key, name] = moved.get((key, name), 0) + int(inside) * size / (
                    t.numel() * t.element_size()
                )
            return original(self, ptrs, *args, **kwargs)

        monkeypatch.setattr(InterpreterBuilder, name, f)

    counted("create_masked_load")
    counted("create_masked_store")
    read, write = ("x", "create_masked_load"), ("x", "create_masked_store")
    for mask, share in ((None, 1.0), (torch.arange(6).view(2, 3) % 2 == 0, 0.5)):
        x, y = kernel_case((2, 3), V)
        h = x.requires_grad_() * 1
        watched = {"x": h}
        moved.clear()
        out = K.token_stats_from_logits(h, y, mask=mask, inplace_backward=True)
        assert moved[read] == pytest.approx(share) and write not in moved or moved[write] == 0
        moved.clear()
        (out.logprobs.sum() + out.entropy.sum()).backward()
        assert moved[read] == pytest.approx(share) and moved[write] == pytest.approx(1.0)


def test_kernel_row_offsets_are_64_bit(monkeypatch):
    """Rows 2^31 elements apart, without touching the memory between."""
    if K.triton is None:
        pytest.skip("needs triton")
    monkeypatch.setattr(K, "INTERPRET", DEVICE == "cpu")
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 50), (2**31, 1))
    small, y = kernel_case((2,), 50, torch.bfloat16)
    x.copy_(small)
    assert torch.equal(K.logprobs_from_logits(x, y), K.logprobs_from_logits(small, y))


def test_kernel_machine_code():
    """No spills, wide accesses, at most 1.1 exponentials: compiled without the interpreter."""
    if K.triton is None:
        pytest.skip("needs triton")
    code = (
        "import triton, kernels.logprob as K\n"
        "kind = dict(labels='*i64', L='i32')\n"  # a check that the interpreter does not make
        "sig = {n: kind.get(n, '*fp32') for n in K._confidence_kernel.arg_names}\n"
        "triton.compile(triton.compiler.ASTSource(K._confidence_kernel, sig),\n"
        "               target=triton.backends.compiler.GPUTarget('cuda', 90, 32))\n"
        "for a in (80, 'gfx942'):\n"
        "    for k in (K._forward_kernel, K._backward_kernel): print(K._machine_code(k, 'bf16', a))"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    folder = os.path.dirname(os.path.dirname(os.path.abspath(K.__file__)))
    lines = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(lines) == 4
    for i, line in enumerate(lines):
        assert (
            " 0 spills" in line and " 4 wide loads" in line and float(line.split()[-4]) <= 1.1
        ), line
        assert i % 2 == 0 or " 4 wide stores" in line


def test_kernel_alone_in_an_empty_folder(tmp_path):
    """The file copied alone works, without triton too, and states its licence."""
    text = open(K.__file__).read()
    (tmp_path / "logprob.py").write_text(text)
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "import logprob\nx = torch.zeros(2, 3, 4, requires_grad=True)\n"
        "s = logprob.token_stats_from_logits(x, torch.ones(2, 3, dtype=torch.int32))\n"
        "s.logprobs.sum().backward()\n"
        "print(round(s.confidence[0].item(), 6), round(x.grad.sum().item(), 6))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[0] == "0.25"
    assert "SPDX-License-Identifier: MIT" in "".join(text.splitlines()[:4])


# --------------------------------------------------------------------------------------------------
# kernels/linear_logprob.py


def linear_case(dtype=torch.float64, H=6, V=33):
    """(hidden, weight, bias), labels, mask: 15 rows, 11 of them live, a view into 21, H apart."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64).to(DEVICE, dtype)
                            for s in ((3, H, 7), (V, H), (V,)))
    hidden = hidden.transpose(1, 2)[:, 2:]
    labels = torch.randint(V, (3, 5), generator=g).to(DEVICE)
    mask = torch.arange(15, device=DEVICE).view(3, 5) % 5 != 1
    labels[2, 4] = -100
    hidden[~mask] = hidden[2, 4] = math.nan
    return (hidden, weight, bias), labels, mask


def linear_grads(f, inputs, *args, entropy_weight=0.7, **options):
    """The stats, and the gradients of inputs for weights that differ from row to row."""
    hidden, weight, bias = inputs = [i.detach().requires_grad_() for i in inputs]
    stats = f(hidden, weight, *args, bias=bias, **options)
    w = torch.arange(1.0, 16, dtype=torch.float64, device=DEVICE).view(3, 5).cos()
    loss = (stats.logprobs * w + entropy_weight * stats.entropy * w.flip(0)).sum()
    return [*stats, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 4, 10, 11, None])  # one row left, whole chunks, all
def test_linear_matches_the_definition(kernel_path, chunk_rows, dtype):
    inputs, labels, mask = linear_case(dtype)
    for T in (0.6, torch.tensor([[0.5], [1.0], [2.0]], dtype=dtype, device=DEVICE)):
        found = linear_grads(L.linear_logprobs, inputs, labels, temperature=T, mask=mask,
                             chunk_rows=chunk_rows)
        exact = [i.double().nan_to_num() for i in inputs]
        want = linear_grads(L.naive_linear_logprobs, exact, labels, temperature=T, mask=mask)
        for a, b in zip(found, want):
            assert a.dtype == dtype
            torch.testing.assert_close(
                a.double(), b, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


def test_linear_gradcheck(kernel_path):
    inputs, labels, mask = linear_case(H=2, V=3)
    inputs = [i.nan_to_num().requires_grad_() for i in inputs]

    def f(hidden, weight, bias):
        s = L.linear_logprobs(hidden[:1], weight, labels[:1] % 3, bias=bias, mask=mask[:1],
                              chunk_rows=3)
        return s.logprobs * s.entropy

    assert torch.autograd.gradcheck(f, inputs)
    for i in inputs:  # alone: nothing else is computed
        others = [j if j is i else j.detach() for j in inputs]
        assert torch.equal(torch.autograd.grad(f(*others).sum(), i)[0],
                           torch.autograd.grad(f(*inputs).sum(), i)[0])


def test_linear_computes_live_rows_once_and_all_but_a_chunk_again(monkeypatch):
    inputs, labels, mask = linear_case()
    rows, logits = [], L._logits
    monkeypatch.setattr(L, "_logits", lambda h, *a: rows.append(len(h)) or logits(h, *a))
    linear_grads(L.linear_logprobs, inputs, labels, mask=mask, chunk_rows=4)
    assert rows == [3, 4, 4, 4, 3]
    rows.clear()
    linear_grads(L.linear_logprobs, inputs, labels, mask=mask)
    assert rows == [11]
    (hidden, weight, _), none = inputs, torch.zeros_like(mask)
    stats = L.linear_logprobs(hidden.requires_grad_(), weight, labels, mask=none)
    stats.logprobs.sum().backward()
    assert rows == [11] and not hidden.grad.any() and not stats.confidence.any()


@pytest.mark.parametrize("during", [False, True])
def test_linear_under_autocast(during):
    """The product is in bfloat16, all else in float32, wherever backward is called."""
    (hidden, weight, bias), labels, mask = linear_case(torch.float32)
    hidden, weight, bias = (i.nan_to_num().requires_grad_() for i in (hidden, weight, bias))

    def grads(f, forward, backward):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=forward):
            stats = f(hidden, weight, labels, bias=bias, mask=mask, chunk_rows=4)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=backward):
            loss = stats.logprobs.sum() + stats.entropy.sum()
            return [*stats, *torch.autograd.grad(loss, (hidden, weight, bias))]

    found = grads(L.linear_logprobs, True, during)
    assert {i.dtype for i in found} == {torch.float32}
    for a, b, c in zip(found, grads(L.naive_linear_logprobs, True, False),
                       grads(L.naive_linear_logprobs, False, False)):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()  # gradients are rounded on their way
        assert 5e-4 < (a - c).abs().max() / c.abs().max()
    for a, b in zip(grads(L.linear_logprobs, False, during),
                    grads(L.naive_linear_logprobs, False, False)):
        close(a, b)


def test_linear_sums_the_gradients_of_weights_in_float32():
    """1,024 rows of gradient (1/2, -1/2): a sum in bfloat16 would stay at 128."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16, device=DEVICE)
    weight, bias = (torch.zeros(*s, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
                    for s in ((2, 1), (2,)))
    labels = torch.zeros(1024, dtype=torch.int32, device=DEVICE)
    L.linear_logprobs(hidden, weight, labels, bias=bias, chunk_rows=1).logprobs.sum().backward()
    assert weight.grad.tolist() == [[512], [-512]] and bias.grad.tolist() == [512, -512]
    assert weight.grad.dtype == torch.bfloat16


def test_linear_retained_graph_and_changed_weight():
    (hidden, weight, _), labels, mask = linear_case()
    weight.requires_grad_()
    loss = L.linear_logprobs(hidden, weight, labels, mask=mask, chunk_rows=4).logprobs.sum()
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linear_under_compile():
    (hidden, weight, _), labels, mask = linear_case()

    def loss(weight):
        s = L.linear_logprobs(hidden, weight * 2, labels, mask=mask, chunk_rows=4)
        return (s.logprobs * s.confidence[:, None] + s.entropy).sum()

    weight.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(f(weight), weight)[0] for f in (loss, compiled)))


@pytest.mark.parametrize("change, said", [
    (dict(hidden=torch.zeros(3, 7)), "do not fit"), (dict(hidden=torch.zeros(6)), "do not fit"),
    (dict(bias=torch.zeros(5)), "do not fit"), (dict(weight=torch.zeros(4, 6).half()), "one dtype"),
    (dict(labels=torch.zeros(2, dtype=torch.long)), "must have the shape"),
    (dict(labels=torch.zeros(3)), "int32/int64 labels"), (dict(mask=torch.ones(3)), "a bool mask"),
    (dict(temperature=0.0), "positive and finite"), (dict(chunk_rows=0), "chunk_rows"),
    (dict(temperature=torch.tensor([1.0, 2.0, -1.0])), "positive and finite")])
def test_linear_refuses_in_plain_words(change, said):
    arguments = dict(hidden=torch.zeros(3, 6), weight=torch.zeros(4, 6),
                     labels=torch.zeros(3, dtype=torch.long)) | change
    with pytest.raises(ValueError, match=said):
        L.linear_logprobs(**arguments)


def test_linear_peak_memory(tmp_path):
    """In a process of its own, with the two files alone in its folder, without triton."""
    for name in ("logprob.py", "linear_logprob.py"):
        (tmp_path / name).write_text((ROOT / "kernels" / name).read_text())
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from linear_logprob import *\n"
        "N, H, V = 1024, 16, 40_000\n"  # resident memory jumps by 5 MB at times: 1.5% of this
        "h, w, y = torch.randn(N, H), torch.randn(V, H), torch.randint(V, (N,))\n"
        "h, w = h.requires_grad_(), w.requires_grad_()\n"
        "for f in linear_logprobs, naive_linear_logprobs:\n"
        "    _, held = K._measure(lambda: torch.autograd.grad(\n"
        "        f(h, w, y, chunk_rows=64).logprobs.sum(), (h, w)), cuda=False)\n"
        "    print((held - h.nbytes - w.nbytes) / (2 * 4 * N * V))")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True,
                         text=True, check=True)
    here, naive = map(float, run.stdout.split())  # of all logits and their gradient
    assert here < 0.06 and naive > 1


# --------------------------------------------------------------------------------------------------
# the examples in the docstrings


def test_docstrings():
    import doctest
    assert doctest.testmod(nsr).failed == doctest.testmod(evaluation_command).failed == 0
