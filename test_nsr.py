"""Tests of nsr.py, eval.py and kernels/: `pytest` runs them all on a CPU, in a few minutes.

The kernels run in Triton's interpreter where there is no GPU, and on the GPU where there is one.
"""

import collections
import contextlib
import copy
import csv
import dataclasses
import gc
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
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these models are too small for more

import numpy as np
import pytest
import tokenizers
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of transformers
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import transformers
from matplotlib.figure import Figure

import eval as evaluation_command
import kernels.linear_logprob as L
import kernels.logprob as K
import nsr

K.INTERPRET = False  # only the kernels' own tests ask for it: it is slow
ROOT = Path(__file__).parent
FEW = 40
FEW_PROBLEMS = nsr.countdown_problems()[:FEW]
TIMES = {
    "rollout_s",
    "score_s",
    "update_s",
    "memory_gb",
}  # of a metrics row: they measure the machine, not the run


# --------------------------------------------------------------------------------------------------
# fixtures


@pytest.fixture(scope="session")
def tokenizer():
    return nsr.countdown_tokenizer()


def tiny_model(tokenizer, seed=0, hidden=32):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
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
    texts = [
        nsr.Response(tokenizer(q)["input_ids"], tokenizer(a)["input_ids"], [], True)
        for q, a in answers.items()
    ]
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
    before = [(s, signal.getsignal(s)) for s in STOPS]
    try:
        yield
    finally:
        nsr.heard.clear()
        for s, handler in before:
            signal.signal(s, handler)


STOPS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """cli(*flags) runs nsr.py's command in this process, in an empty folder: (status, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nsr, "countdown_problems", lambda task: copy.deepcopy(FEW_PROBLEMS))
    # curves.png takes a second to draw; runs of the script do
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["nsr.py", *map(str, flags)])
        gc.collect()  # a run that has ended closes its lock
        with handlers_kept():
            status = nsr.command(nsr.main)
        return status, *capsys.readouterr()

    return run


def short(base, **flags):
    """Flags of a run that takes seconds."""
    flags = (
        dict(
            preset="countdown",
            model=base,
            data="countdown",
            steps=4,
            prompts=4,
            group_size=4,
            eval_problems=4,
            eval_samples=4,
            save_every=2,
            lr=1e-3,
        )
        | flags
    )
    return [f"--{knob.replace('_', '-')}={value}" for knob, value in flags.items()]


def script(flags, cwd):
    """nsr.py with these flags as a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def hear():  # the tests may run where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, ROOT / "nsr.py", *flags],
        cwd=cwd,
        text=True,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear,
    )


def checkpoint(run):
    """The directory of a run's only checkpoint."""
    (path,) = nsr.checkpoints(Path(run))
    return path


def state(run):
    """(weights, metrics without times) of a finished run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(run))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    rows = nsr.read_log(run / "metrics.jsonl")
    return weights, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


LENGTHS = ((3, 5), (6, 2), (4, 4), (6, 7), (2, 1), (5, 3))  # of prompts and responses


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def a_batch(model, lengths=LENGTHS, adv=(1.0, -1.0, 0.0, -0.5, 1.0, -1.0), seed=0):
    """Responses of random tokens, scored by `model`; prompts of one length are one prompt."""
    rng, words = random.Random(seed), model.config.vocab_size
    prompt = {p: [rng.randrange(words) for _ in range(p)] for p, _ in lengths}
    responses = []
    for (p, r), a in zip(lengths, adv):
        ids = [rng.randrange(1, words) for _ in range(r - 1)] + [0]
        responses.append(nsr.Response(prompt[p], ids, [0.0] * r, True, PROBLEM))
        responses[-1].adv = torch.tensor(a).expand(r)
    nsr.score(a_run(model), responses)
    return responses


PROBLEM = nsr.Problem("q", "1", "", nsr.verify)


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
    return nsr.Run(cfg, Path("nowhere"), [], [], model, tokenizer, optimizer)


def log_probs(model, responses, temperature=1.0):
    """[(tokens,)] log-probs of responses by the training pass, together."""
    nsr.score(a_run(model, temperature=temperature), responses)
    return [r.old_logp for r in responses]


# --------------------------------------------------------------------------------------------------
# config and data


def test_presets_and_flags_resolve():
    assert nsr.resolve({}).lr == 1e-4 and nsr.resolve({}).kl_coef == 0
    assert nsr.resolve({"method": "grpo"}).kl_coef == 1e-3
    assert nsr.resolve({"method": "grpo", "kl_coef": 0.0}).kl_coef == 0
    qwen = nsr.resolve({"preset": "qwen-math", "bf16": True})
    assert (qwen.model, qwen.lr, qwen.bf16) == ("Qwen/Qwen2.5-Math-1.5B", 1e-6, True)
    assert (qwen.rollout_tokens, qwen.micro_tokens) == (0, 2**14)
    assert qwen.gradient_checkpointing and qwen.eval_data == "math500"
    assert nsr.resolve({"preset": "qwen-math", "device": "cpu"}).bf16 is False
    paper = nsr.resolve({"preset": "qwen-math-paper"})
    assert (paper.prompts, paper.group_size, paper.prompts // paper.updates) == (1024, 8, 256)
    assert (paper.max_new_tokens, paper.temperature, paper.entropy_coef) == (3072, 1.0, 1e-4)
    own = nsr.resolve({"model": "x", "data": "y.jsonl", "lr": 3e-6})
    assert (own.preset, own.lr, own.eval_data) == ("qwen-math", 3e-6, "")
    assert nsr.resolve({"model": "x", "data": "countdown"}).preset == "qwen-math"
    hard = nsr.resolve({"model": "countdown-hard"})
    assert (hard.preset, hard.data, hard.max_new_tokens) == ("countdown-hard", "countdown-hard", 24)


def test_help_tells_every_flag_with_its_default(cli, capsys):
    with pytest.raises(SystemExit) as e:
        cli("--help")
    out = capsys.readouterr().out
    assert e.value.code == 0 and "[125]" in out and "[0.0001]" in out
    for knob in dataclasses.fields(nsr.Config):
        assert f"--{knob.name.replace('_', '-')}" in out


@pytest.mark.parametrize(
    "row, question, answer",
    [
        ({"problem": "p", "answer": "1"}, "p", "1"),
        ({"question": "p", "final_answer": ["2"]}, "p", "2"),
        ({"prompt": "p", "Answer": 27.0}, "p", "27"),
        ({"content": "p", "answer": 0}, "p", "0"),
        ({"problem": "p", "answer": 0.5}, "p", "0.5"),
        ({"input": "p", "output": "so\n#### 3"}, "p", "3"),
        ({"question": "p", "ground_truth": 3}, "p", "3"),
        ({"question": "p", "label": "3"}, "p", "3"),
        ({"question": "p", "target": 3.0}, "p", "3"),
        ({"question": "p", "answer": '["9"]'}, "p", "9"),
        ({"question": "p", "answer": ["9"]}, "p", "9"),
        ({"question": "p", "answer": "[9, 10)"}, "p", "[9, 10)"),
        ({"question": "p", "answer": "true"}, "p", "true"),
        ({"problem": "p"}, "p", ""),
        ({"problem": "p", "solution": "none"}, "p", ""),
        ({"problem": "p", "answer": " "}, "p", ""),
        (
            {"problem": "p", "solution": "so \\boxed{1} or \\boxed{\\frac{1}{2}}."},
            "p",
            "\\frac{1}{2}",
        ),
        ({"problem": "p", "solution": ["so", "\\boxed{4}"]}, "p", "4"),
        ({"question": "p", "answer": "9 + 9 = 18\n#### 18"}, "p", "18"),
        ({"problem": "p", "answer": "$5$"}, "p", "5"),
        ({"problem": "p", "answer": "", "solution": "\\boxed{6}"}, "p", "6"),
        ({"problem": "p", "final_answer": ["$2$", "$3$", 27.0]}, "p", "2, 3, 27"),
    ],
)
def test_problem_layouts(row, question, answer):
    problem = nsr.parse_problem(row)
    assert (problem.question, problem.answer) == (question, answer)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"problem": ""},
        {"answer": "1"},
        {"problem": 3, "answer": "1"},
        {"problem": "p", "answer": math.nan},
        {"problem": "p", "answer": math.inf},
        {"problem": "p", "answer": True},
        {"problem": "p", "answer": {"value": 3}},
        {"problem": "p", "answer": [{"value": 3}]},
        {"problem": "p", "answer": ["1", False]},
        {"prompt": [{"role": "user", "content": None}], "answer": "1"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
        {"prompt": ["p"], "answer": "1"},
    ],
)
def test_rows_that_cannot_be_right_are_refused(row):
    with pytest.raises(ValueError):
        nsr.parse_problem(row)


def test_a_row_of_tinyzero_is_a_countdown():
    row = {"prompt": [{"role": "user", "content": "make 98 of 44, 19 and 35"}]}
    for gold in (
        {"target": 98, "numbers": [44, 19, 35]},
        '{"target": 98, "numbers": [44, 19, 35]}',
    ):
        problem = nsr.parse_problem(row | {"reward_model": {"ground_truth": gold}})
        assert problem.instruction == ""  # the chat has its own
        assert problem.verify("\\boxed{44 + 19 + 35}", problem.answer)
        assert not problem.verify("\\boxed{98}", problem.answer)
        assert not problem.verify("\\boxed{44 + 19 + 36}", problem.answer)
    floats = {"target": 98.0, "numbers": [44.0, 19, 35]}
    assert nsr.parse_problem(row | {"answer": floats}).answer == "44 19 35 = 98"
    with pytest.raises((TypeError, ValueError)):
        nsr.parse_problem(row | {"answer": floats | {"target": None}})


def test_a_chat_is_kept_whole():
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"text": "1?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 1 more?"},
    ]
    for key in ("prompt", "messages"):
        problem = nsr.parse_problem({key: turns, "answer": "3"})
        assert [m["content"] for m in problem.messages] == [
            "be brief",
            "1 + 1?",
            "2",
            "and 1 more?",
        ]
        assert json.loads(problem.question) == problem.messages and problem.instruction == ""


def test_keys_may_be_named_and_nested():
    row = {"q": "p", "extra_info": {"answer": 7}, "problem": "other", "answer": "8"}
    problem = nsr.parse_problem(row, "q", "extra_info.answer")
    assert (problem.question, problem.answer) == ("p", "7")
    with pytest.raises(ValueError, match="no question in Q; the row has q, extra_info"):
        nsr.parse_problem(row, "Q")  # never one of the usual keys instead
    assert nsr.parse_problem(row, "q", "extra_info.gold").answer == ""
    row = {"Question Text": "p", "a.b": "9"}
    assert nsr.parse_problem(row, "Question Text", "a.b").answer == "9"


def test_a_verifier_of_ones_own_gets_the_answer_as_it_is(tmp_path):
    (tmp_path / "v.py").write_text("def right(response, answer):\n    return answer[0] == '['\n")
    golds = ['["assert f(1) == 2", "assert f(2) == 3"]', {"inputs": [1]}, 7, "", None]
    rows = [{"question": f"q{i}", "answer": gold} for i, gold in enumerate(golds)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = nsr.Config(verifier=f"{tmp_path}/v.py:right")
    problems = {p.question: p for p in nsr.shuffled_problems(str(tmp_path / "a.jsonl"), cfg)}
    assert [problems[f"q{i}"].answer for i in range(3)] == [golds[0], '{"inputs": [1]}', "7"]
    assert len(problems) == 3  # two have none
    assert problems["q0"].verify("", golds[0]) and not problems["q2"].verify("", "7")


def test_chats_that_end_with_the_assistants_turn_are_counted(tmp_path, capsys):
    rows = [{"messages": CHAT[: 3 + i % 2] + [], "answer": i} for i in range(4)]
    for i, row in enumerate(rows):
        row["messages"] = [{"role": "user", "content": str(i)}, *row["messages"]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    nsr.read_problems(str(tmp_path / "a.jsonl"))
    assert "2 chats end with the assistant's turn" in capsys.readouterr().out


def test_files_of_other_formats(tmp_path, monkeypatch):
    rows = [{"question": 'a,\n"b"', "answer": "1"}, {"question": "c", "answer": "2"}]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("array.json", "lines.json", "a.csv"):
        problems = nsr.read_problems(str(tmp_path / name))
        assert [(p.question, p.answer) for p in problems] == [
            (r["question"], r["answer"]) for r in rows
        ]
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(nsr.UserError, match="pip install pyarrow"):
        nsr.read_problems(str(tmp_path / "a.parquet"))


def test_parquet_as_verl_writes_it(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {
            "data_source": "math",
            "prompt": [{"role": "user", "content": f"1 + {i}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(1 + i)},
        }
        for i in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    problems = nsr.read_problems(str(tmp_path / "a.parquet"))
    assert [p.messages[0]["content"] for p in problems] == ["1 + 0?", "1 + 1?", "1 + 2?"]
    assert [p.answer for p in problems] == ["1", "2", "3"]


def test_rows_that_are_left_out_are_counted(tmp_path, capsys):
    chat = [{"role": "user", "content": "same"}]
    rows = [
        {"question": "a", "answer": "1"},
        {"question": "b", "answer": ""},
        {"question": "c", "answer": None},
        {"question": "a", "answer": "1"},
        {"question": "a", "answer": "2"},
        {"question": [{"role": "system", "content": "x"}] + chat, "answer": "3"},
        {"question": chat, "answer": "3"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = nsr.read_problems(str(tmp_path / "a.jsonl"))
    assert [p.answer for p in problems] == ["1", "3", "3"]
    out = capsys.readouterr().out
    assert "left out 2 rows without an answer" in out
    assert "2 rows that repeat a question, 1 of them with another answer" in out


def test_gold_answers_that_the_verifier_cannot_read_are_counted(capsys):
    golds = ["1", "\\frac{1}{2}", "the boundary of ))", "x" * 600]
    nsr.say_unread([nsr.parse_problem({"question": gold, "answer": gold}) for gold in golds])
    assert "2 of 4 gold answers are beyond the verifier, such as 'the b" in capsys.readouterr().out
    nsr.say_unread([nsr.parse_problem({"question": "q", "answer": "1"})])
    assert capsys.readouterr().out == ""


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

    def watched(model, responses, temperature):
        seen.update(tuple(r.prompt_ids) for r in responses)
        return stats(model, responses, temperature)

    monkeypatch.setattr(nsr, "token_stats", watched)
    nsr.warm_up(tiny_model(tokenizer), tokenizer, "countdown", steps=20)
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
y=2x+1  ==  2x+1 = y  -2x + y = 1  !=  x=x  y=y  2x+1=2x+1  y=2x-1
x>2  ==  2<x  !=  x<x  x>x  2>2
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
x=5, y=6  ==  y=6, x=5  x = 5, y = 12/2  (5,6)  !=  x=6, y=5  x=5  (6,5)
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
1\frac{2}{25}  ==  \frac{27}{25}  !=  \frac{2}{25}  1\cdot\frac{2}{25}
No  ==  \text{No}  no  \text{no}.  \textbf{No}  !=  Yes  n  N  o
\text{A circle}  ==  A circle  \text{a circle}  \mathrm{A\ circle}  !=  a square  circle of radius 2
\text{Not a function}  ==  not a function.  Not a function  !=  \text{a function}  function
\text{not prime}  ==  not prime  \text{not } prime  !=  prime  \text{not composite}
\text{two real roots}  ==  two real roots  !=  \text{no real roots}  2
\text{Newton's method}  ==  Newton's method  newton's method  !=  Euler's method
\text{none of the above}  ==  None of the above.  !=  \text{all of the above}
\alpha_1+1  ==  1+\alpha_{1}  α_1+1  !=  \alpha_2+1  \beta_1+1  \alpha+1
a_{n-1}+1  ==  1 + a_{n - 1}  !=  a_{n+1}+1  a_n+1
\lambda_{\text{red}}  ==  \lambda_{red}  \lambda_{\mathrm{red}}  !=  \lambda_{\text{blue}}  \lambda
m_{\max}=3n  ==  3n  m_{\text{max}} = 3n  !=  2n  m_{\min}=3n
\frac{m_1v_1}{m_1+m_2}  ==  v_{1}\frac{m_{1}}{m_{2}+m_{1}}  !=  \frac{m_2v_1}{m_1+m_2}
\sum_{k=1}^n k^2  ==  \sum_{k=1}^{n} k^{2}  !=  \sum_{k=0}^n k^2  \sum_{k=1}^n k^3
(1,2)  ==  x=1,y=2  (x,y)=(1,2)  \begin{cases}x=1\\y=2\end{cases}  x=1 \text{ and } y=2
  \left\{\begin{aligned}x&=1\\y&=2\end{aligned}\right.  !=  x=2,y=1  y=1,x=2
x=1,y=2  ==  (1,2)  y=2,x=1  [x=1,y=2]  !=  (2,1)  x=1  y=2  (y,x)=(1,2)
x=1,y=4;x=3,y=2  ==  (1,4),(3,2)  (x,y)=(3,2),(1,4)  x=1,y=4 \text{ or } x=3,y=2
x=1,y=4;x=3,y=2  ==  (x,y) \in \{(1,4),(3,2)\}  !=  (1,2),(3,4)  (4,1),(2,3)  (1,4)
\begin{cases} x & x>0 \\ 0 & x \le 0 \end{cases}
  ==  \begin{cases} x, & \text{if } x>0, \\ 0, & \text{if } x \le 0. \end{cases}
  !=  \begin{cases} x & x>0 \\ 1 & x \le 0 \end{cases}
5\text{ meters}  ==  5  5\text{ m}  5 m  5\ \mathrm{m}  5\,\text{metres}  !=  5\text{ cm}  5\text{ min}
\$18.90  ==  18.90  18.9\text{ dollars}  USD 18.90  18.90 \text{ USD}  !=  18.90\text{ cents}  1890
13\text{ ft/s}  ==  13  13\ \mathrm{ft}/\mathrm{s}  13\text{ feet per second}  !=  13\text{ m/s}  31
9.8\text{ m/s}^2  ==  9.8  9.8\ \mathrm{m\,s^{-2}}  9.8 \text{ m s}^{-2}  !=  8.9  9.8\text{ ft/s}^2
12\text{ N}\cdot\text{m}  ==  12  12\text{ N·m}  12\ \mathrm{N}-\mathrm{m}  !=  21
144\text{ in}^2  ==  144  144\text{ square inches}  144 sq in  !=  144\text{ in}^3  144\text{ cm}^2
2\text{ hours }15\text{ minutes}  ==  2 hr 15 min  2\text{ hours and }15\text{ minutes}
  !=  2\text{ hours }51\text{ minutes}  15\text{ hours }2\text{ minutes}
C  ==  C. 12  C) 12  (C)\ 12  \textbf{(C)}\ 12  C: it increases  \text{C. yes}  !=  D. 12  B  12  A, C
\text{(B)}  ==  B  B) none  \text{Option B}  !=  A) none  \text{A}  b
9\text{ (quarters)}  ==  9  9 quarters  !=  8
71\text{ times}  ==  71  71 times  !=  71\text{ squared}
15元  ==  15  15 元  !=  51
\frac{\pi}{4}+k\pi, k \in \mathbb{Z}  ==  \frac{\pi}{4}+k\pi  k\pi+\frac{\pi}{4}\ (k\in Z)
  \{\frac{\pi}{4}+k\pi : k\in\mathbb{Z}\}  \frac{\pi}{4}+k\pi \text{ where } k \in \mathbb{Z}
  !=  \frac{\pi}{4}+2k\pi, k\in\mathbb{Z}  \frac{\pi}{3}+k\pi
2:4:6  ==  1:2:3  3:6:9  !=  1:2:4  3:2:1  1:2
1,2,\ldots,n  ==  1, 2, \dots, n  1,2,...,n  1,2,\cdots,n  !=  1,2,\ldots,m  1,2,n
n \equiv 1 \pmod 3  ==  n \equiv 1 \mod 3  1 \pmod{3}  !=  n\equiv 2\pmod 3  1 \pmod 4
73  ==  **73**  !=  **37**
0.\dot{3}\dot{6}  ==  \frac{4}{11}  0.\overline{36}  !=  0.36
2\operatorname{cis}\frac{\pi}{3}  ==  1+i\sqrt{3}  !=  2\operatorname{cis}\frac{\pi}{6}
63^\circ 45'  ==  63^{\circ}45^{\prime}  63.75^\circ  !=  63^\circ 54'
[0,2\pi)  ==  [0,2\pi[  0 \le x < 2\pi  !=  ]0,2\pi[
5\text{ or }-3  ==  5or-3  -3, 5  !=  5  3,5
\begin{pmatrix} 1 \\\\ 2 \end{pmatrix}  ==  \begin{pmatrix} 1 \\ 2 \end{pmatrix}  !=  (2,1)
x \geq 2  ==  [2,\infty)  2\leqslant x  !=  x \gt 2  (2,\infty)
x \lt 2 \quad \text{or} \quad x \gt 5  ==  x<2 or x>5  (-\infty,2)\cup(5,\infty)  !=  x<2
e^{it}  ==  e^{i t}  !=  e^{is}
k \in \mathbb{Z}  ==  k \in \mathbb{Z}  !=  k
8  ==  2^3  2^{130}/2^{127}  !=  2^{130}  2^{129}
A:B=1:3  ==  1:3  A:B=2:6  !=  A:B=1:2  A:B=3:1
x=3,x>11  ==  x>11,x=3  \{x>11,x=3\}  !=  5=6  x=3,x<11
120  ==  5!  !=  !5
\frac23  ==  \frac23 \approx 0.6666666667  !=  0.6666666667
\sqrt2  ==  \sqrt2 \approx 1.41421356237  !=  1.41421356237""".replace(
    "\n  ", "  "
)  # an indented line goes on with a row
PAIRS = [
    (gold, answer, k == 0)
    for row in TABLE.strip().splitlines()
    for gold, rest in [row.split("  ==  ")]
    for k, answers in enumerate(rest.split("  !=  "))
    for answer in answers.split("  ")
]
PAIRS += [(rf"\{{{','.join(map(str, range(32)))}\}}", ",".join(map(str, range(31, -1, -1))), True)]
HOSTILE = [
    "1" + "!" * 498,
    "*".join(f"{n}!" for n in range(2400, 2460)),
    "9^{9^{9^{9}}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "99999999999!",
    "((((9!)!)!)!)!",
    "10^{1000000}",
    "9" * 100_000,
    "1/" * 500,
    "(" * 1000,
    "{" * 400 + "6" + "}" * 400,
    r"\frac{" * 300,
    "-" * 900,
    r"\sqrt{" * 300,
    "5!" * 100,
    "5" + "!" * 900,
    "x^" * 400,
    r"\sin " * 99 + "x",
    "|" * 999,
    "5," * 240,
    r"\pm " * 300 + "1",
    "1_" * 240,
    "(a+b+c+d+y+f+g+h)^{40}",
    "(x+y+z+w)^{39}" * 35,
    "\x00",
    "5\x00",
    '__import__("os").system("true")',
    'exec("5")',
    "NaN",
    "1e999",
    r"\infty",
    "1/0",
    "0/0",
    "0^0",
    r"\frac{1}{0}",
    r"\log 0",
    r"\binom{10^9}{5}",
    r"\begin{pmatrix}" * 30,
    "$" * 9999,
    r"\text{" * 80,
    "\\" * 99_999,
    "_" * 499,
    "^" * 499,
    "é" * 499,
    "\ud800",
    "①",
    "x" * 499,
    "2^{20000}+3^{10000}" * 20,
    "A" * 499,
    "+".join(rf"\frac{{1}}{{{k}}}" for k in range(2, 40)),
    r"\sin(" * 20 + "x" + ")" * 20,
    "(((((x+1)^{9}+1)^{9}+1)^{9}+1)^{9}+1)^{9}",
    "1:" * 200 + "1",
    "x<" * 200 + "1",
    r"[0,1)\cup" * 50 + "[0,1)",
    "7^{77}^{77}",
    r"\sqrt[0]{5}",
    "i^{i^i}",
    "i^{10^{50}}",
    "x^{10^{9}}",
    r"\arcsin 2",
    r"\log_{1}{5}",
    "=" * 499,
    r"\overline{" * 50,
    '"' * 499,
    r"\{x \in \mathbb{R}\le x < 2\}",
    r"4\pi \approx 12.56e",
    r"2+\sqrt{5} \approx 4.<2361",
    r"\mathbb{R}\in\mathbb{R}\in 5",
    "x" + "_{a}__" * 80,
    r"\sqrt{9}!",
    r"\binom{\sqrt{16}}{2}",
    "1" + " " * 480 + "x",
    "1" + " " * 480 + "base",
    "a1A1" * 90 + "(" * 99,
    "±" * 250 + "5",
    r"\frac{325}{4}≈\pi",
    r"\angle(\pm\}.",
    r"2+\sqrt{5}≈≈x",
    ",".join(f"{2999 - k}!" for k in range(60)),
    r"\text{" + "a_b" * 99 + "}",
    "7^{-5000}+3^{-5000}+" * 24 + "1",
    r"\max 3",
    r"\sin(1,2)",
    "1/2!",
    r"\binom{\frac12}{x}",
]


def boxed(answer):
    return f"so the answer is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_verify_table(row):
    pairs = [pair for pair in PAIRS if pair[0] == row.split("  ==  ")[0]]
    assert pairs == [(gold, a, nsr.verify(boxed(a), gold)) for gold, a, _ in pairs]


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed 2", "2"),
        (r"\fbox{ 3 }", "3"),
        ("no box", None),
        (r"\boxed{\frac{1}{2}} and \boxed{3", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{5", None),
        (None, None),
        (5, None),
        (r"\boxed{a \boxed{6}", "6"),
        (r"} \boxed{5} }", "5"),
        (r"\boxedfoo{5}", None),
        ("", None),
    ],
)
def test_verify_extracts_the_last_closed_box(response, answer):
    assert nsr.extract_answer(response) == answer


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_verify_survives_hostile_text(text):
    for response, gold in (
        (boxed(text), "5"),
        (boxed("5"), text),
        (boxed(text), text),
        (boxed(text + "+1"), text),
    ):
        start = time.perf_counter()
        verdict = nsr.verify(response, gold)
        assert verdict is (response == boxed(text) and gold == text and verdict)
        assert time.perf_counter() - start < 0.5  # 50 ms, and room for a busy machine


@pytest.mark.parametrize(
    "response, verdict",
    [
        ("{" * 1_000_000, False),
        ("}" * 1_000_000, False),
        (r"\boxed{" * 20_000, False),
        (r"\boxed{5}" * 20_000, True),
        ("{}" * 500_000 + r"\boxed{5}", True),
        (r"\boxed " * 999, False),
        ("x" * 5_000_000 + r"\boxed{5}", True),
        (r"\boxed{5}" + "{" * 999, True),
        (r"\boxed{5}" + " x" * 500_000, True),
        (r"\boxed{6} \fbox{5}" + "}" * 1_000_000, True),
    ],
    ids=range(10),
)
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
    soup = (
        r"\frac \sqrt \pi \text{ \begin{pmatrix} \end{pmatrix} \\ & { } ( ) [ ] | ^ _ , ; : = "
        r"< \le \in \cup \pm + - * / ! . 0 1 2 10 999 x y i e A f \sin \log \infty \left "
        r"\right \{ \} \circ ^\circ \% $ \binom \ne \approx and cm base √ ² ∞ é "
        r"\mathbb{R} 12,345 \,"
    ).split()
    for _ in range(3000):
        a, b = ("".join(rng.choices(soup, k=rng.randint(1, 14))) for _ in range(2))
        assert nsr.verify(boxed(a), b) in (True, False)


def test_verify_fuzz_rationals():
    """Random fractions written in random ways are equal exactly when the numbers are."""
    rng = random.Random(1)

    def write(x):
        k = rng.randint(1, 9)
        n, d = x.numerator * k, x.denominator * k
        return rng.choice(
            [
                rf"\frac{{{n}}}{{{d}}}",
                f"{n}/{d}",
                rf"\dfrac{{{-n}}}{{{-d}}}",
                rf"{x + k} - {k}",
                rf"x = \frac{{{n}}}{{{d}}}",
                rf"{n} \cdot {d}^{{-1}}",
                rf"\frac{{{n}\sqrt{{2}}}}{{{d}\sqrt2}}",
            ]
        )

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


@pytest.mark.parametrize(
    "text, right",
    [
        ("\\boxed{(2+1)*(9-1)}", True),
        ("\\boxed{((2+1))*(9-1)}", True),
        ("\\boxed{9*2+1*1}", False),
        ("\\boxed{(9-1)*(1+2)} or \\boxed{1}", False),
        ("\\boxed{1} no: \\boxed{(9-1)*(1+2)}", True),
        ("(2+1)*(9-1)", False),
        ("\\boxed{(2+1)*(9-1)", False),
        ("\\boxed{3*8}", False),
        ("\\boxed{(2+1)*(9-1)+9-9}", False),
        ("\\boxed{(2+1)*(9-1}", False),
        ("\\boxed{}", False),
        ("\\boxed{(2+1)(9-1)}", False),
        ("\\boxed{+2+1*(9-1)}", False),
        ("\\boxed{2**1**9-1}", False),
        ("\\boxed{(2+1)\\times(9-1)}", True),
        ("\\boxed{__import__('os')}", False),
        ("\\boxed{" + "(" * 5000 + "}", False),
        ("\\boxed{1+1+2*11}", False),
    ],
)
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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def words(template):
    """A tokenizer of one id a character, with a chat template."""
    vocab = {chr(i): i for i in range(128)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    core.decoder = tokenizers.decoders.Fuse()
    core.post_processor = tokenizers.processors.TemplateProcessing("\x01 $A", None, [("\x01", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="\x01")
    made.chat_template = template
    return made


def prompt_of(template, problem, **settings):
    (kept,) = nsr.encode_prompts([problem], Qwen, words(template), nsr.Config(**settings))
    return "".join(map(chr, kept.prompt_ids))


ASKED = "1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]


def test_prompts_take_the_form_that_the_model_knows():
    problem = nsr.parse_problem({"problem": "1 + 1?", "answer": "2"})
    papers = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{ASKED}<|im_end|>\n<|im_start|>assistant\n"
    )
    for name in ("Qwen/Qwen2.5-Math-1.5B", "models/Qwen2.5-Math-7B/"):
        system = nsr.papers_system(name)
        assert prompt_of(CHATML, problem, system=system) == papers
    for name in ("Qwen/Qwen2.5-Math-1.5B-Instruct", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-4B", "my/r1"):
        assert nsr.papers_system(name) is None
    # a template of one's own, with its own bos, and whatever the model's type
    assert prompt_of(R1, problem) == f"\x01<|user|>{ASKED}<|assistant|><think>\n"
    assert prompt_of(None, problem) == "\x01" + ASKED  # no template: the text alone, with its bos
    assert prompt_of(R1, problem, instruction="") == "\x01<|user|>1 + 1?<|assistant|><think>\n"
    assert "<|user|>1 + 1?\nBriefly.<" in prompt_of(R1, problem, instruction="Briefly.")
    assert prompt_of(R1, problem, system="Y").startswith("\x01<|system|>Y<|user|>1 + 1?")


def test_a_chat_goes_through_the_template_as_it_is():
    def prompt(messages, template=R1, **settings):
        problem = nsr.parse_problem({"prompt": messages, "answer": "2"})
        return prompt_of(template, problem, **settings)

    asked = "\x01<|system|>S<|user|>A<|assistant|>B<|user|>C"
    assert prompt(CHAT) == prompt(CHAT, system="Y") == f"{asked}<|assistant|><think>\n"
    assert prompt(CHAT, instruction="I") == f"{asked}\nI<|assistant|><think>\n"
    begun = CHAT + [{"role": "assistant", "content": "So"}]
    assert prompt(begun) == f"{asked}<|assistant|>So"  # the response goes on from there
    assert prompt(begun, CHATML).endswith("<|im_start|>assistant\nSo")
    with pytest.raises(nsr.UserError, match="has\\s+none"):
        prompt(CHAT, None)
    with pytest.raises(nsr.UserError, match="does not take the prompt"):
        prompt(CHAT, "{{ raise_exception('no system message, please') }}")


class Qwen:
    config = transformers.Qwen2Config(max_position_embeddings=2000)
    get_input_embeddings = staticmethod(lambda: torch.nn.Embedding(128, 1))
    generation_config = type("Config", (), {"eos_token_id": [7, 3]})


def test_long_prompts_are_left_out_and_counted(capsys):
    problems = [nsr.parse_problem({"problem": "x" * n, "answer": "2"}) for n in (10, 500, 20)]
    cfg = nsr.Config(max_prompt_tokens=200)
    kept = nsr.encode_prompts(problems, Qwen, words(None), cfg)
    assert kept == [problems[0], problems[2]] and all(p.prompt_ids for p in kept)
    assert "left out: 1 of 3 problems" in capsys.readouterr().out
    with pytest.raises(nsr.UserError, match="context of 2000"):
        nsr.encode_prompts(problems, Qwen, words(None), nsr.Config(max_new_tokens=1950))


def test_every_stop_token_is_known(tokenizer):
    assert nsr.stop_tokens(Qwen, tokenizer) == [0, 3, 7]
    chat = words(CHATML)
    chat.eos_token = "\x07"
    chat.add_tokens(["<|im_end|>"], special_tokens=True)
    assert nsr.stop_tokens(Qwen, chat) == [3, 7, 128]
    chat.chat_template = R1
    assert nsr.stop_tokens(Qwen, chat) == [3, 7]


def test_embedded_bases_by_name(base, monkeypatch):
    asked = []
    monkeypatch.setattr(nsr, "countdown_base", lambda task: asked.append(task) or base)
    for name in nsr.TASKS:
        nsr.load_model(name, "cpu")
    assert asked == ["countdown", "countdown-hard"]
    model = transformers.AutoModelForCausalLM.from_config(nsr.countdown_config())
    assert model.num_parameters() == 108_416


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
    """group_size responses to each of prompts."""
    seeds = [nsr.seed_of(seed, i, j) for i in range(len(prompts)) for j in range(group_size)]
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    return nsr.rollout(model, prompts, seeds, max_new_tokens, list(stop_ids), **options)


PROMPTS = [[3, 5, 7], [4, 4, 6, 8, 10, 11], [9], [12, 13, 14, 15]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rollout_logp_equals_recomputed(model, temperature):
    responses = sample(model, PROMPTS, temperature=temperature)
    other = log_probs(model, responses, temperature=1.3)
    logp = log_probs(model, responses, temperature)
    for i, r in enumerate(responses):
        close(r.logp, logp[i])
        close(r.logp, logp_alone(model, r, temperature))
        close(r.confidence, math.exp(sum(r.logp) / len(r.logp)))
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
    """Whatever shares the batch: budgets of one row to all, other prompts, in any order."""
    seeds = [5, 2**63 - 1, 0, 7, 11, 12, 13, 14, 15, 16, 17]
    prompts = [PROMPTS[i] for i in (0, 0, 0, 1, 3, 3, 3, 3, 3, 3, 3)]

    def ids(prompts, seeds, **options):
        responses = nsr.rollout(model, prompts, seeds, max_new_tokens, [0, 5, 7], **options)
        assert [r.prompt_ids for r in responses] == prompts
        for r in responses:
            assert r.stopped == (r.ids[-1] in (0, 5, 7)) and len(r.ids) <= max_new_tokens
            close(r.logp, logp_alone(model, r))
        return [r.ids for r in responses]

    expected = ids(prompts, seeds)
    assert len({len(x) for x in expected}) > 3
    for budget in (1, 3 * max_new_tokens, 6 * max_new_tokens):
        assert ids(prompts, seeds, rollout_tokens=budget) == expected
    assert ids(prompts[::-1], seeds[::-1]) == expected[::-1]
    assert ids(prompts[2:3], seeds[2:3]) == expected[2:3]


def test_attention_reads_the_columns_that_are_used():
    """And few more, in few sizes; what a window leaves out changes nothing."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **SMALL | dict(max_position_embeddings=900), num_key_value_heads=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    windows, step = [], nsr.Rows.step

    def watched(self, *args):
        windows.append(self.window)
        step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nsr.Rows, "step", watched)
        responses = sample(model, PROMPTS, group_size=1, max_new_tokens=600, stop_ids=())
    assert windows == sorted(windows) and windows[-1] == 606 and len(set(windows)) < 30
    for step, window in enumerate(windows):  # a prompt of 6 tokens, and looks 10 steps apart
        longest = 6 + step + 11
        assert 6 + step <= window <= min(606, longest + max(16, longest / 8))
    for r in responses:
        close(r.logp, logp_alone(model, r), atol=1e-4)


def test_rollout_shows_its_progress_and_stops_where_it_is_asked_to(model, monkeypatch, capsys):
    monkeypatch.setattr(nsr.live, "shown", 0.0)
    sample(model, PROMPTS, title="step 1/9")
    shown = r"step 1/9: \d+/12 responses, [\d,]+ tokens/s, \S+ left"
    assert re.search(shown, capsys.readouterr().out)
    monkeypatch.setattr(nsr, "heard", [signal.SIGTERM])
    with pytest.raises(nsr.Stopped):
        sample(model, PROMPTS)


def test_logits_that_are_not_finite_are_said(model):
    damaged = copy.deepcopy(model)
    damaged.model.norm.weight.data[0] = math.nan
    with pytest.raises(nsr.UserError, match="not finite"):
        sample(damaged, PROMPTS)


@pytest.mark.parametrize("budget", [40, 2**16])
@pytest.mark.parametrize(
    "name, options",
    [
        ("Mistral", dict(sliding_window=4)),
        ("GPT2", dict(n_positions=18, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)),
        ("Llama", {}),
        ("Gemma2", dict(sliding_window=4, head_dim=16)),
        ("Gemma3Text", dict(sliding_window=4, head_dim=16)),
        ("Qwen2", dict(sliding_window=4, use_sliding_window=True, max_window_layers=1)),
    ],
)
def test_rollout_of_other_models(name, options, budget):
    """Sliding windows, learnt positions up to the last, grouped heads."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        **options,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    responses = sample(model, PROMPTS, max_new_tokens=12, rollout_tokens=budget)
    alone = [logp_alone(model, r) for r in responses]
    for r, logp in zip(responses, alone):
        close(r.logp, logp)
    for step in ("no gradient", "gradient", "gradient checkpointing"):
        if step == "gradient checkpointing":
            nsr.prepare_training(model, nsr.Config(gradient_checkpointing=True))
            model.train()
        with torch.set_grad_enabled(step != "no gradient"):
            stats, _ = nsr.token_stats(model, responses, 1.0)
        for row, logp in zip(stats.logprobs, alone):
            close(row[: len(logp)], logp)


SMALL = dict(
    vocab_size=20,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)


def loaded(kind, path, tokenizer, **settings):
    """What nsr.load_model makes of a small model of that kind, saved in `path`."""
    config = getattr(transformers, f"{kind}Config")(**SMALL | settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return nsr.load_model(str(path), "cpu")[0]


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("GPT2", dict(attn_pdrop=0.5, resid_pdrop=0.5)),
        ("BioGpt", dict(activation_dropout=0.5)),
        ("GPTBigCode", dict(attn_pdrop=0.5)),
        ("Bloom", dict(attention_dropout=0.5, n_layer=2)),
        ("Phimoe", dict(num_key_value_heads=2, router_jitter_noise=0.5)),
    ],
)
def test_training_pass_has_no_noise_whatever_its_name(kind, settings, tmp_path, tokenizer):
    torch.manual_seed(0)
    model = loaded(kind, tmp_path, tokenizer, **settings)
    responses = sample(model, PROMPTS)
    for checkpointing in (False, True):
        if checkpointing:
            nsr.prepare_training(model, nsr.Config(gradient_checkpointing=True))
        model.train(checkpointing)
        stats, _ = nsr.token_stats(model, responses, 1.0)
        for row, r in zip(stats.logprobs, responses):
            close(row[: len(r.ids)], torch.tensor(r.logp))


@pytest.mark.parametrize("kind", ["Mamba", "Bert", "Bart", "Mistral"])
def test_models_that_are_not_read_left_to_right_by_keys_and_values_are_refused(
    kind, tmp_path, tokenizer
):
    torch.manual_seed(0)
    settings = dict(
        encoder_ffn_dim=64, decoder_ffn_dim=64, d_model=32, init_std=0.3, num_key_value_heads=2
    )
    if kind == "Mistral":
        loaded(kind, tmp_path, tokenizer, **settings)
        return
    with pytest.raises(nsr.UserError, match="cannot be read token by token"):
        loaded(kind, tmp_path, tokenizer, **settings)


def test_a_gap_between_rollout_and_training_pass_is_refused(model, monkeypatch):
    monkeypatch.setattr(nsr, "draw", lambda logits, *_: (logits.argmax(1), logits.amax(1) * 0))
    with pytest.raises(nsr.UserError, match="log-probs differ by"):
        nsr.check_reading(model, "it")


def test_other_errors_of_a_model_keep_their_message(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("tensors on two devices")

    monkeypatch.setattr(model.base_model, "forward", broken)
    with pytest.raises(RuntimeError, match="two devices"):
        nsr.check_reading(model, "it")


def test_a_model_that_cannot_checkpoint_is_refused(tmp_path, tokenizer):
    with pytest.raises(nsr.UserError, match="--gradient-checkpointing"):
        model = loaded("CTRL", tmp_path, tokenizer, n_embd=32, n_head=2, dff=64, n_layer=1)
        nsr.prepare_training(model, nsr.Config(gradient_checkpointing=True))


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

    expected = {
        (a, b): n * p * q
        for a, p in enumerate(exact(prompt))
        if a
        for b, q in enumerate(exact(prompt + [a]))
    } | {(0, 0): n * exact(prompt)[0]}
    if sampler == "rollout":
        drawn = [r.ids for r in sample(model, [prompt], 0, n, 2, rollout_tokens=4000, **options)]
    else:
        torch.manual_seed(0)
        drawn = model.generate(
            torch.tensor([prompt]),
            do_sample=True,
            max_new_tokens=2,
            top_k=0,
            num_return_sequences=n,
            **options,
        )[:, len(prompt) :].tolist()
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
    responses = [
        nsr.Response([0, 3, 0], [4, 0], [], True),
        nsr.Response([5], [0], [], True),
        nsr.Response([6, 7], [8, 0, 9, 1], [], False),
    ]
    _, ids, mask = nsr.read_responses(model, responses)
    assert ids.tolist() == [[4, 0, 0, 0], [0, 0, 0, 0], [8, 0, 9, 1]]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    stats, _ = nsr.token_stats(model, responses, 1.0)
    for i, r in enumerate(responses):
        close(stats.logprobs[i, : len(r.ids)], logp_alone(model, r))
        assert (stats.logprobs[i, len(r.ids) :] == 0).all()


def test_prompts_and_padding_never_reach_the_head(model, monkeypatch):
    responses, rows, logits = a_batch(model), [], L._logits

    def watched(hidden, *args):
        rows.append(len(hidden))
        return logits(hidden, *args)

    monkeypatch.setattr(L, "_logits", watched)
    nsr.token_stats(model, responses, temperature=1.0)
    assert rows == [sum(len(r.ids) for r in responses)]


def test_the_training_pass_is_one_causal_pass_without_a_mask(monkeypatch):
    """What torch asks of flash attention on a GPU: bf16, no mask, causal, keys not repeated."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SMALL, num_key_value_heads=1, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config)
    run, asked = a_run(model, bf16=True), []
    responses, attention = a_batch(model), torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, **options):
        asked.append((attn_mask, is_causal, enable_gqa, query.shape[1], key.shape[1]))
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled(
            "cpu"
        )
        options = options | dict(attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    nsr.linear_head(model)
    asked.clear()
    with nsr.autocast(run):
        nsr.token_stats(model, responses, temperature=1.0)
    assert asked == [(None, True, True, 2, 1)] * 2  # two layers


def test_a_step_of_the_rollout_has_no_shape_that_depends_on_data(model):
    """It traces with tensors that have a shape and no values: so it can become a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = nsr.Rows(4, 20, 8, [0, 5], "cpu")
    with torch.inference_mode():
        batch.fill(model, [0, 1, 2, 3], PROMPTS, [1, 2, 3, 4])
    names = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        for name in names:
            value = getattr(batch, name)
            setattr(batch, name, torch.empty(value.shape, dtype=value.dtype))
        batch.kv = [torch.empty(x.shape, dtype=x.dtype) for x in batch.kv]
        for top_p in (1.0, 0.9):
            batch.step(model, 0.7, top_p)  # raises where a value would be read
        with pytest.raises(Exception, match="[Dd]ata-dependent|_local_scalar_dense"):
            batch.set_window(1)  # this one reads


def compilers():
    return shutil.which("g++") or shutil.which("clang++")


def test_dry_run_says_what_steps_cost_and_writes_nothing(cli, base, tmp_path):
    flags = [
        "--preset=countdown",
        f"--model={base}",
        "--data=countdown",
        "--prompts=4",
        "--dry-run",
    ]
    for method in ("a-nsr", "grpo", "ppo"):
        status, out, err = cli(*flags, f"--method={method}")
        assert (status, err) == (0, "") and "KV cache of 65,536 tokens" in out
        said = r"rollout [\d.]+ s \([\d,]+ tokens/s\), score [\d.]+ s, update [\d.]+ s; peak"
        assert len(re.findall(said, out)) == 2
    assert cli("--dry-run", "--prompts=4")[0] == 0  # makes no base policy
    assert not list(tmp_path.iterdir())
    shape = nsr.QWEN_MATH_SHAPE
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    assert 1.5e9 < model.num_parameters() < 1.6e9


def test_the_cache_takes_what_a_gpu_has_free(tokenizer, monkeypatch):
    model = tiny_model(tokenizer)  # 2 layers x 2 (keys, values) x 2 heads x 16 numbers a token
    run = a_run(model, gpu_memory_utilization=0.5)
    assert nsr.cache_tokens(run) == 2**16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70_000_000, 80_000_000))
    for bf16, size in ((False, 4), (True, 2)):
        run.cfg.bf16 = bf16
        model_on_gpu = monkeypatch.context()
        with model_on_gpu as patch:
            patch.setattr(type(model), "device", property(lambda self: FakeGpu()))
            patch.setattr(torch, "zeros", lambda *shape, dtype, device: torch.ones(1, 1).long())
            found = nsr.cache_tokens(run)
        expected = (70e6 - 40e6 - 14 * model.num_parameters()) / (2 * 2 * 2 * 16 * size)
        assert found == int(expected)


class FakeGpu:
    type = "cuda"


@pytest.mark.parametrize(
    "kind, linear, settings",
    [
        ("Llama", True, {}),
        ("Gemma2", False, dict(final_logit_softcapping=5.0, head_dim=16)),
        ("Granite", False, dict(logits_scaling=3.0)),
        ("Cohere", False, dict(logit_scale=0.5)),
        ("Phi", True, {}),
        ("OPT", True, dict(word_embed_proj_dim=16, ffn_dim=64)),
    ],
)
def test_heads_that_do_more_than_a_product(kind, linear, settings, capsys):
    """Phi has a bias; OPT's embeddings are narrower than its decoder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
        **settings,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(p, std=0.3)
    responses = a_batch(model)
    assert (nsr.linear_head(model) is not None) == linear
    assert capsys.readouterr().out.count("held whole") == (not linear)  # said once
    stats, _ = nsr.token_stats(model, responses, temperature=0.7)
    for row, response in zip(stats.logprobs, responses):
        close(row[: len(response.ids)], logp_alone(model, response, 0.7))


def test_micro_batches_hold_every_row_within_the_budget(model):
    responses = a_batch(model)
    total = {id(r): len(r.prompt_ids) + len(r.ids) for r in responses}
    for budget in (1, 12, 30, 1000):
        cut = nsr.micro_batches(responses, budget)
        assert sorted(total[id(r)] for micro in cut for r in micro) == sorted(total.values())
        for micro in cut:
            longest = max(total[id(r)] for r in micro)
            assert len(micro) == 1 or len(micro) * longest <= budget


def test_at_most_a_quarter_of_a_micro_batch_is_padding():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 1, 512), 3072).astype(int)
    responses = [nsr.Response([1] * int(rng.integers(60, 300)), [1] * n, [], True) for n in lengths]
    tokens = pads = 0
    for micro in nsr.micro_batches(responses, 2**14):
        real = [len(r.prompt_ids) + len(r.ids) for r in micro]
        tokens += sum(real)
        pads += len(real) * max(real) - sum(real)
        assert len(real) * max(real) - sum(real) <= 0.25 * len(real) * max(real)
    assert pads / (tokens + pads) < 0.15


# --------------------------------------------------------------------------------------------------
# schedules and advantages


def test_schedules_at_their_ends_and_middle():
    def at(schedule, t, accuracy=0.25):
        return nsr.schedules(nsr.Config(schedule=schedule, steps=200), t, accuracy)

    for schedule in nsr.SCHEDULES:
        lam = [at(schedule, t)[0] for t in (0, 100, 200)]
        assert lam == pytest.approx([0.05, 0.125, 0.2])
    assert [at("exponential", t)[1] for t in (0, 100, 200)] == pytest.approx(
        [1.5, 0.5 + math.exp(-3), 0.5 + math.exp(-6)]
    )
    assert [at("cosine", t)[1] for t in (0, 100, 200)] == pytest.approx([1.5, 1.0, 0.5])
    assert [at("accuracy", 7, p)[1] for p in (0.0, 0.25, 1.0)] == pytest.approx([1.5, 1.25, 0.5])
    for method in ("grpo", "ppo"):
        assert nsr.schedules(nsr.Config(method=method), 0, 0.5) == (None, None)


ADVANTAGES = {  # of one group at t = T / 2: right; wrong with c = 0.6; wrong with c = 0.01
    "reinforce": [1, -1, -1],
    "psr": [1, 0, 0],
    "nsr": [0, -1, -1],
    "w-reinforce": [0.1, -1, -1],
    "a-nsr": [0.125, -1.0, -1.0],
    "cw-nsr": [0.1, -0.6, -0.05],
    "acw-nsr": [0.125, -0.6, -0.05],
    "grpo": [
        (1 + 1 / 3) / math.sqrt(4 / 3),
        (-1 + 1 / 3) / math.sqrt(4 / 3),
        (-1 + 1 / 3) / math.sqrt(4 / 3),
    ],
}


@pytest.mark.parametrize("method", ADVANTAGES)
def test_advantage_table(method):
    cfg = nsr.Config(method=method, schedule="cosine", steps=150)
    lam, beta = nsr.schedules(cfg, cfg.steps // 2, accuracy=1 / 3)
    reward, confidence = torch.tensor([[1.0, -1, -1]]), torch.tensor([[0.9, 0.6, 0.01]])
    adv = nsr.advantages(method, reward, confidence, lam, beta)
    torch.testing.assert_close(adv, torch.tensor([ADVANTAGES[method]]).float(), atol=2e-6, rtol=0)


def test_grpo_gives_nothing_where_a_group_agrees():
    adv = nsr.advantages("grpo", torch.ones(2, 4), torch.ones(2, 4), 1, 1)
    assert (adv == 0).all()


def test_confidence_weight_is_clamped_and_constant():
    c = torch.tensor([[0.0, 0.03, 0.5, 1.0]], requires_grad=True)
    adv = nsr.advantages("cw-nsr", -torch.ones(1, 4), c, lam=0.1, beta=2.0)
    torch.testing.assert_close(adv, torch.tensor([[-0.1, -0.1, -1.0, -2.0]]))
    assert not adv.requires_grad


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
    adv = torch.tensor(ADVANTAGES[method]).float()[:, None]
    stats = nsr.token_stats_from_logits(logits, labels, temperature=temperature, mask=mask)
    nsr.policy_loss(stats.logprobs, stats.logprobs.detach(), adv, mask, denom=9).backward()
    pi = (logits.detach() / temperature).softmax(-1)
    for b, t, v in itertools.product(range(3), range(4), range(5)):
        sign = -(1 - pi[b, t, v]) if v == labels[b, t] else pi[b, t, v]
        expected = adv[b, 0] * sign / 9 / temperature * mask[b, t]
        assert logits.grad[b, t, v] == pytest.approx(expected.item(), abs=1e-6)


def test_nsr_moves_mass_from_the_sampled_token_to_the_others_in_proportion():
    z = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]], requires_grad=True)
    pi = z.detach().softmax(-1)[0, 0]
    stats = nsr.token_stats_from_logits(z, torch.tensor([[0]]))
    mask = torch.ones(1, 1, dtype=torch.bool)
    old = stats.logprobs.detach()
    nsr.policy_loss(stats.logprobs, old, torch.tensor([[-1.0]]), mask, 1).backward()
    step = -z.grad[0, 0]  # gradient descent
    assert step[0] < 0 and (step[1:] > 0).all()
    torch.testing.assert_close(step[1:] / step[1], pi[1:] / pi[1])
    assert step[0].item() == pytest.approx(-(1 - pi[0].item()))


def test_clip_by_hand():
    old = torch.zeros(1, 6)
    logp = torch.tensor([[0.5, 0.9, 1.1, 1.3, 0.7, 1.0]]).log().requires_grad_()
    mask = torch.ones(1, 6, dtype=torch.bool)
    for adv, objective, live in (
        (1.0, [0.5, 0.9, 1.1, 1.2, 0.7, 1.0], [1, 1, 1, 0, 1, 1]),
        (-2.0, [-1.6, -1.8, -2.2, -2.6, -1.6, -2.0], [0, 1, 1, 1, 0, 1]),
    ):
        loss = nsr.policy_loss(logp, old, torch.tensor([[adv]]), mask, denom=12, clip=0.2)
        assert loss.item() == pytest.approx(-sum(objective) / 12)
        (grad,) = torch.autograd.grad(loss, logp)
        assert grad[0].tolist() == pytest.approx(
            [-adv * math.exp(x) * on / 12 for x, on in zip(logp[0].tolist(), live)]
        )


def test_k3_by_hand():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = nsr.kl_to_reference(logp, torch.tensor([-1.0, -1.5]))
    assert kl.tolist() == pytest.approx([0.0, math.exp(0.5) - 1.5])
    (grad,) = torch.autograd.grad(kl.sum(), logp)
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
    run.problems = nsr.encode_prompts(copy.deepcopy(FEW_PROBLEMS[:4]), model, tokenizer, run.cfg)
    run.reference, run.critic = tiny_model(tokenizer, seed=2), critic
    responses, metrics = nsr.collect(run)
    for r in responses:
        kl = r.old_logp - r.ref_logp
        close(r.ref_logp, logp_alone(run.reference, r))
        close(r.returns[:-1] - r.returns[1:], -0.1 * kl[:-1])
        close(r.returns[-1], -1.0 - 0.1 * kl[-1])  # no response of this model is correct
        close(r.adv, r.returns - r.value)
        ids = torch.tensor([r.prompt_ids + r.ids])
        close(r.value, critic(ids[:, :-1]).logits[0, -len(r.ids) :, 0])  # before each token
    assert metrics["correct"] == 0 and len(responses) == 12


def test_w_reinforce_is_lam_psr_plus_nsr_to_the_bit():
    torch.manual_seed(0)
    logp, old = -torch.rand(6, 5), -torch.rand(6, 5)
    mask = torch.rand(6, 5) > 0.2
    reward, c = torch.tensor([[1.0, -1, -1, 1, -1, 1]]), torch.ones(1, 6)

    def adv_of(method):
        lam, beta = nsr.schedules(nsr.Config(method=method, lam=0.125), 0, 0.5)
        return nsr.advantages(method, reward, c, lam, beta).view(6, 1)

    right = reward[0] > 0
    alone = nsr.policy_loss(logp[right], old[right], torch.ones(3, 1), mask[right], 32)
    whole = nsr.policy_loss(logp, old, adv_of("psr"), mask, denom=32)
    assert whole.item() == pytest.approx(alone.item())  # A = 0 is in the denominator alone
    for row in range(6):  # row by row no sum is reordered: equal to the bit

        def one(method):
            rows = slice(row, row + 1)
            return nsr.policy_loss(logp[rows], old[rows], adv_of(method)[rows], mask[rows], 32)

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
        lam, beta = nsr.schedules(nsr.Config(method=method), t, accuracy=0.5)
        total = torch.zeros_like(z)
        for ids in responses():
            rows = torch.stack([z[i, ids[i - 1] if i else 0] for i in range(len(ids))])[None]
            stats = nsr.token_stats_from_logits(rows, torch.tensor([ids]))
            old, mask = stats.logprobs.detach(), torch.ones(1, len(ids), dtype=torch.bool)
            reward = torch.tensor([[1.0 if right(ids) else -1.0]])
            adv = nsr.advantages(method, reward, stats.confidence[None], lam, beta)
            loss = nsr.policy_loss(stats.logprobs, old, adv, mask, denom=T)
            total += old.sum().exp() * torch.autograd.grad(loss, z)[0]
        return total

    psr = expected_gradient("psr")
    assert psr.norm() > 1e-3
    for method, scale in (("nsr", 1), ("reinforce", 2), ("w-reinforce", 1.1)):
        torch.testing.assert_close(expected_gradient(method), scale * psr, atol=1e-7, rtol=1e-5)
    lam, beta = nsr.schedules(nsr.Config(method="a-nsr"), 30, 0.5)
    torch.testing.assert_close(expected_gradient("a-nsr"), (lam + beta) * psr, atol=1e-7, rtol=1e-5)
    other = expected_gradient("cw-nsr")
    assert torch.nn.functional.cosine_similarity(other.flatten(), psr.flatten(), 0) < 0.999
    # where all are wrong nsr asks for nothing, cw-nsr for more entropy
    entropy = torch.zeros(())
    for ids in responses():
        logp = sum(z[i, ids[i - 1] if i else 0].log_softmax(-1)[v] for i, v in enumerate(ids))
        entropy = entropy - logp.exp() * logp
    (upwards,) = torch.autograd.grad(entropy, z)
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
    tokenizer, micro_tokens, updates, coefs
):
    """update() against one plain sum a mini-batch, over its responses alone, without padding."""
    model = tiny_model(tokenizer)
    batch = a_batch(model)
    for r in batch:
        r.old_logp = r.old_logp + 0.1 * torch.randn_like(r.old_logp)
        r.ref_logp = r.old_logp + 0.3
    run = a_run(model, micro_tokens=micro_tokens, updates=updates, grad_clip=1e9, **coefs)
    run.optimizer = Recorder(model.parameters(), lr=0.0)
    metrics, norms = nsr.update(run, batch), []
    for mini, found in zip(nsr.split(batch, 6 // updates), run.optimizer.seen, strict=True):
        total, denom = 0, sum(len(r.ids) for r in mini)
        for r in mini:
            ids = torch.tensor([r.prompt_ids + r.ids])
            rows = model(ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
            logp = rows[torch.arange(len(r.ids)), r.ids]
            rho, A = (logp - r.old_logp).exp(), r.adv
            total = total - torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A).sum() / denom
            if coefs:
                entropy, d = -(rows.exp() * rows).sum(-1), r.ref_logp - logp
                total = total + (0.05 * (d.exp() - 1 - d) - 0.02 * entropy).sum() / denom
        expected = torch.autograd.grad(total, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in expected)))
        error = sum((a - b).square().sum().item() for a, b in zip(found, expected))
        assert math.sqrt(error) / norms[-1] < 1e-5
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / updates, rel=1e-4)


def test_update_counts_the_clip_and_cuts_mini_batches(tokenizer):
    model = tiny_model(tokenizer)
    batch = a_batch(model, adv=(1.0, 1.0, -1.0, -1.0, 0.0, 0.0))
    for r in batch:
        r.old_logp = r.old_logp - math.log(1.5)  # rho = 1.5 everywhere
    metrics = nsr.update(a_run(model, lr=0.0, updates=3), batch)
    assert metrics["updates"] == 2  # the last mini-batch has no advantage: no evidence, no update
    assert metrics["clip_frac"] == pytest.approx((5 + 2) / (5 + 2 + 4 + 7 + 1 + 3))


def test_gradient_checkpointing_changes_nothing(tokenizer):
    grads, passes = [], []
    for on in (False, True):
        model = tiny_model(tokenizer)
        if on:
            nsr.prepare_training(model, nsr.Config(gradient_checkpointing=True))
        batch = a_batch(model)
        count = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: count.append(1))
        run = a_run(model, gradient_checkpointing=on)
        run.optimizer = Recorder(model.parameters(), lr=0.0)
        nsr.update(run, batch)
        grads.append(run.optimizer.seen[0])
        passes.append(len(count))
    assert passes[1] == 2 * passes[0]  # forward, and again for backward
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not compilers(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_change_nothing(tokenizer, checkpointing):
    grads = []
    for compiled in (False, True):
        model = tiny_model(tokenizer)
        run = a_run(model, compile=compiled, gradient_checkpointing=checkpointing, micro_tokens=30)
        nsr.prepare_training(model, run.cfg)
        assert (model.model.layers[0].forward.__name__ == "forward") != compiled or compiled
        batch = a_batch(model)
        run.optimizer = Recorder(model.parameters(), lr=0.0)
        nsr.update(run, batch)
        grads.append(run.optimizer.seen[0])
    assert hasattr(model.model.layers[0].forward, "_torchdynamo_orig_callable")
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


class NoOptimizer:
    """What can be called as an optimizer is, and is none."""

    def __init__(self, params, lr):
        self.param_groups = [*params]


class Halves(torch.optim.SGD):
    """An optimizer that makes groups of its own, as some do for weight decay."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in [*self.param_groups]:
            first, *others = group["params"]
            group["params"] = [first]
            self.add_param_group(group | {"params": others})


def test_each_group_of_an_optimizer_has_its_models_learning_rate(tokenizer):
    run = a_run(tiny_model(tokenizer), optimizer=f"{__name__}.Halves", lr=0.1, critic_lr=0.2)
    run.critic = tiny_model(tokenizer)
    run.optimizer = nsr.make_optimizer(run)
    nsr.step_optimizer(run)
    rates = {p: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert len(run.optimizer.param_groups) == 4
    for model, lr in ((run.model, 0.1), (run.critic, 0.2)):
        assert {rates[p] for p in model.parameters()} == {lr}


def test_what_has_a_line_of_its_own_is_not_explained_again():
    for error in (nsr.UserError("mine"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error), match=f"^{error}$"), nsr.explained("what", "advice"):
            raise error
    with (
        pytest.raises(nsr.UserError, match=r"^what \(1\); advice$"),
        nsr.explained("what", "advice"),
    ):
        raise KeyError(1)


class Momentum(torch.optim.SGD):
    """An optimizer as --optimizer takes it: called with parameters and lr."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=0.9)


def test_any_importable_optimizer(cli, base):
    flags = dict(optimizer=f"{__name__}.Momentum", method="nsr")
    assert cli(*short(base, **flags, name="whole"))[0] == 0
    assert cli(*short(base, **flags, name="half", steps=2))[0] == 0
    assert cli("--resume=out/half", "--steps=4")[0] == 0
    saved = torch.load(checkpoint("out/whole") / "trainer.pt")["optimizer"]
    assert saved["state"][0].keys() == {"momentum_buffer"}
    (weights, _), (others, _) = (state(Path("out", name)) for name in ("whole", "half"))
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    status, _, err = cli(*short(base, optimizer="torch.optim.Adamw"))
    assert status == 2 and "torch.optim.Adamw" in err and len(err.splitlines()) == 1


def test_non_finite_gradient_stops_before_the_update(tokenizer):
    model = tiny_model(tokenizer)
    batch = a_batch(model)
    for r in batch:
        r.old_logp = r.old_logp - 1000  # rho overflows
        r.adv = -r.adv.abs()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(nsr.UserError, match="not finite"):
        nsr.update(a_run(model), batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_bf16_autocast_leaves_the_weights_in_float32(tokenizer):
    model = tiny_model(tokenizer)
    batch, run = a_batch(model), a_run(model, bf16=True)
    exact = torch.cat([r.old_logp for r in batch])
    nsr.score(run, batch)
    rough = torch.cat([r.old_logp for r in batch])
    assert 1e-4 < (rough - exact).abs().max() < 0.3
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
    answers = ["1+2", "1 + 2", "2+1", "4", "5", None]
    tally = nsr.tally([True, True, True, False, False, False], answers)
    assert (tally["distinct"], tally["distinct correct"], tally["Pass@1"]) == (4, 2, 0.5)
    assert (tally["maj@n"], tally["no box"]) == (True, 1 / 6)


@pytest.fixture
def evaluation(monkeypatch, tmp_path, capsys):
    """evaluation(*flags) runs eval.py's command in this process: (status, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nsr.live, "shown", math.inf)  # no line of progress, however slow it is

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        with handlers_kept():
            status = nsr.command(evaluation_command.main)
        return status, *capsys.readouterr()

    return run


def saved(name):
    """{(model, measure): (value, low, high)} of the csv that --save writes."""
    rows = csv.DictReader(Path(f"{name}.csv").open())
    return {
        (row["model"], row["measure"]): tuple(float(row[k]) for k in ("value", "low", "high"))
        for row in rows
    }


def test_eval_numbers_equal_those_recomputed_from_the_file(evaluation, base):
    flags = base, "--data", "countdown", "-n", 6, "--problems", 5, "--rollout-tokens", 100
    status, out, err = evaluation(*flags, "--save", "t")
    assert (status, err) == (0, "") and {p.suffix for p in Path().glob("t.*")} == {
        ".csv",
        ".md",
        ".png",
        ".svg",
    }
    (path,) = Path("out/eval").glob("*.jsonl")
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
        value = (
            sum(
                1
                - math.prod(
                    1 - k / i
                    for i in range(
                        len(group) - sum(row["label"] for row in group) + 1, len(group) + 1
                    )
                )
                for group in groups
            )
            / 5
        )
        assert abs(numbers[str(base), f"Pass@{k}"][0] - value) < 1e-12
    for measure, value in (
        ("length", [row["length"] for group in groups for row in group]),
        ("distinct", [len({row["pred_answer"] for row in group} - {None, ""}) for group in groups]),
        ("greedy", [row["label"] for row in greedy]),
    ):
        value_, low, high = numbers[str(base), measure]
        assert abs(value_ - sum(value) / len(value)) < 1e-12 and low <= value_ <= high
    assert evaluation(*flags)[1] == out  # nothing is sampled again
    with nsr.lock(path.with_suffix(".lock")):
        status, _, err = evaluation(*flags)
    assert status == 2 and "another process" in err and len(err.splitlines()) == 1


def test_eval_goes_on_after_a_kill_with_the_same_bytes(evaluation, base):
    flags = base, "--data", "countdown", "-n", 8, "--problems", 10, "--rollout-tokens", 150
    assert evaluation(*flags)[0] == 0  # chunks of 2 problems
    (path,) = Path("out/eval").glob("*.jsonl")
    whole, table = path.read_bytes(), evaluation(*flags)[1]
    for size in random.Random(0).sample(range(len(whole)), 5):  # what a kill at any moment leaves
        path.write_bytes(whole[:size])
        status, out, _ = evaluation(*flags)
        assert status == 0 and path.read_bytes() == whole and out.endswith(table)
        assert out.count("cut short") == (whole[size - 1] != b"\n"[0])
    status, out, _ = evaluation(*flags[:-4], "--problems", 4, *flags[-2:])
    assert status == 0 and "countdown, 4 problems" in out
    assert path.read_bytes() == whole


def test_eval_stopped_by_ctrl_c_prints_what_is_complete(evaluation, base, monkeypatch):
    append, count = nsr.append_log, itertools.count()

    def interrupted(path, *rows):
        append(path, *rows)
        if next(count) == 7:  # after 4 greedy ones
            raise KeyboardInterrupt

    monkeypatch.setattr(nsr, "append_log", interrupted)
    flags = base, "--data", "countdown", "-n", 2, "--problems", 4
    flags += "--rollout-tokens", 8  # chunks of one problem
    status, out, err = evaluation(*flags)
    assert (status, err) == (130, "") and "stopped" in out and "countdown, 4 problems" in out
    assert "countdown, 4 problems" in evaluation(*flags)[1]


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "give models"),
        (["x", "-n", "0"], "-n"),
        (["x", "-n", "4", "-k", "8"], "-k 8"),
        (["POLICY", "--device", "quantum", "--data", "countdown"], "--device"),
        (["no/such-model", "--data", "countdown"], "no/such-model"),
        (["./none"], "no model directory"),
        (["POLICY", "--data", "missing.jsonl"], "missing.jsonl"),
        (["x", "--problems", "0"], "--problems"),
        (["--rescore", "missing.jsonl"], "missing.jsonl"),
        (["--rescore", "bad.jsonl"], "bad.jsonl"),
        (["--rescore", "empty.jsonl"], "empty.jsonl"),
        (["--rescore", "mixed.jsonl"], "mixed models"),
        (["--rescore", "good.jsonl", "-k", "2"], "Pass@2"),
        (["POLICY", "--data", "empty.jsonl"], "empty"),
        (["POLICY", "--top-p", "1.5"], "--top-p 1.5"),
        (["POLICY", "--answer-pattern", "x"], "put the answer's part in ( )"),
    ],
)
def test_eval_refuses_bad_input_in_one_line(evaluation, base, tmp_path, flags, said):
    row = dict(question_id=0, generation_id=0, response="", gold_answer="1", label=0, model="a")
    for name, rows in (
        ("bad", [{"response": 1}]),
        ("empty", []),
        ("good", [row]),
        ("mixed", [row, row | {"generation_id": 1, "model": "b"}]),
    ):
        nsr.write_log(tmp_path / f"{name}.jsonl", rows)
    flags = [base if flag == "POLICY" else flag for flag in flags]
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


def test_eval_of_a_run_takes_what_it_held_out(cli, evaluation, base, monkeypatch):
    monkeypatch.setattr(nsr.urllib.request, "urlopen", None)  # nothing is downloaded
    flags = dict(data=own_data("data.jsonl"), steps=1, temperature=0.7, prompts=36)
    assert cli(*short(base, **flags, name="run"))[0] == 0
    status, out, _ = evaluation("out/run", "-n", 2)
    assert status == 0 and "4 problems, n 2, temperature 0.7, top_p 1.0, max_new_tokens 20" in out
    _, held_out = nsr.load_problems(nsr.Config(data="data.jsonl"))
    rows = nsr.read_log(Path("out/eval/out-run--data.jsonl.jsonl"))
    assert {row["question_id"] for row in rows} == {p.question for p in held_out}
    for name in ("data.jsonl", "./data.jsonl", Path("data.jsonl").resolve()):
        status, out, _ = evaluation(base, "out/run", "-n", 2, "--data", name)
        assert status == 0 and "was trained on: these are the problems that the run held" in out
        assert ", 4 problems" in out
    flags |= dict(eval_data=own_data("other.jsonl", 50, first=40), answer_pattern="=(.*)")
    assert cli(*short(base, **flags, name="two"))[0] == 0
    for more in ((), ("--data", "data.jsonl")):
        status, out, _ = evaluation("out/two", "-n", 2, *more)
        assert status == 0 and "50 problems, n 2, temperature 0.7" in out
    assert nsr.read_log(Path("out/eval/out-two--other.jsonl.jsonl"))[0]["answer_pattern"] == "=(.*)"


def test_eval_asks_as_the_run_was_asked_or_as_its_flags_say(cli, evaluation, base):
    policy = Path(shutil.copytree(base, "policy"))
    (policy / "chat_template.jinja").unlink()  # it shows the model no instruction
    flags = dict(data=own_data("data.jsonl"), steps=1, instruction="12", name="run")
    assert cli(*short(policy, **flags))[0] == 0
    flags = "out/run", "-n", 1, "--problems", 2
    assert evaluation(*flags)[0] == evaluation(*flags, "--instruction", "12")[0] == 0
    status, _, err = evaluation(*flags, "--instruction", "34")
    assert status == 2 and "prompt_sha1" in err and len(err.splitlines()) == 1
    status, _, err = evaluation(*flags, "--max-prompt-tokens", 1)
    assert status == 2 and "--max-prompt-tokens 1" in err
    status, _, err = evaluation(policy, *flags[1:], "--data", "data.jsonl", "--system", "S")
    assert status == 2 and "chat template" in err and len(err.splitlines()) == 1


def test_rescoring_keeps_to_the_verifier_of_the_rows(evaluation, base):
    Path("mine.py").write_text("def right(response, answer):\n    return True\n")
    data = own_data("data.jsonl")
    flags = base, "--data", data, "-n", 1, "--problems", 2, "--verifier", "mine.py:right"
    assert evaluation(*flags, "--max-new-tokens", 9)[0] == 0
    (file,) = Path("out/eval").glob("*.jsonl")
    status, out, _ = evaluation("--rescore", file, "--verifier", "mine.py:right")
    assert status == 0 and "2 responses, 0 verdicts changed" in out
    status, _, err = evaluation("--rescore", file)  # a file does not say what is executed
    assert status == 2 and "--verifier mine.py:right" in err and len(err.splitlines()) == 1


def test_eval_of_fewer_problems_shows_fewer(evaluation, base):
    flags = base, "--data", "countdown", "-n", 1, "--problems"
    for count in (8, 3):
        status, out, _ = evaluation(*flags, count)
        assert status == 0 and f"countdown, {count} problems" in out


def test_eval_compares_and_groups_by_hand(evaluation):
    answers = {
        "out/a": [1, 2, 0, 1],
        "out/b-s0": [2, 3, 1, 2],
        "out/b-s1": [3, 4, 2, 3],
        "out/c": [2, 1, 1, 0],
    }  # of 4 to each question these many are right
    for model, counts in answers.items():
        nsr.write_log(
            Path(f"{model}.jsonl"),
            [
                {
                    "model": model,
                    "data": "set",
                    "question_id": i,
                    "generation_id": j,
                    "label": j < c,
                    "response": f"\\boxed{{{1 if j < c else 2 + j}}}",
                    "gold_answer": "1",
                }
                for i, c in enumerate(counts)
                for j in range(4)
            ],
        )
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
    rows = [
        {
            "question_id": 1,
            "generation_id": i,
            "response": f"\\boxed{{{a}}}",
            "label": label,
            "gold_answer": "\\frac12",
        }
        for i, (a, label) in enumerate([("0.5", 0), ("2", 0)])
    ]
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
    rows = [
        {"problem": q, "answer": "1", "level": level, "type": "Algebra"}
        for q, level in (("1 2 3 4 = 10", "Level 2"), ("1 2 3 5 = 11", 1))
    ]
    nsr.write_log(Path("set.jsonl"), rows)
    status, out, _ = evaluation(base, "--data", "set.jsonl", "-n", 2, "--max-new-tokens", 9)
    assert status == 0 and "| level" in out and "Level 2 |" in out and "Algebra |" in out


def write_runs():
    """Logs of two seeds of a and one of b: Pass@1 and Pass@4 every other step, more at each."""
    for run, ones, fours in (
        ("a-s0", (0.1, 0.2, 0.4), (0.9, 0.8, 0.6)),
        ("a-s1", (0.1, 0.3, 0.2), (0.7, 0.5, 0.6)),
        ("b-s0", (0.2, 0.2, 0.2), (0.5, 0.4, 0.3)),
    ):
        rows = []
        for step in range(5):
            if step:
                rows.append(
                    {
                        "step": step,
                        "steps": 4,
                        "length": 10 * step,
                        "update_s": 2.0,
                        "beta": None if step == 2 else step + 1,
                    }
                )
            if step % 2 == 0:
                rows.append(
                    {
                        "step": step,
                        "length": 99,
                        "distinct": 5 - step / 4,
                        "Pass@1": ones[step // 2],
                        "Pass@4": fours[step // 2],
                    }
                )
        nsr.write_log(Path("out", run, "metrics.jsonl"), rows)
    return [Path("out", run) for run in ("a-s0", "a-s1", "b-s0")]


def test_eval_log_by_hand(evaluation):
    runs = write_runs()
    flags = *runs, "--log", "Pass@1:Pass@4", "step:length,beta", "distinct:update_s"
    assert evaluation(*flags)[0] == 2  # no line has both
    status, out, err = evaluation(*flags[:-1], "--save", "t")
    assert (status, err) == (0, "") and {p.suffix for p in Path().glob("t.*")} == {
        ".csv",
        ".md",
        ".png",
        ".svg",
    }
    assert evaluation(*runs, "--log", "step:length", "distinct:length")[0] == 2  # one Y twice
    assert "| out/b-s0 |   .300 | 40.000 | 5.000 |" in out
    drawn = Path("t.svg").read_text()
    assert all(f"<!--   {label} -->" in drawn for label in ("out/a-s1", "out/a-s1, beta"))
    assert saved("t")["out/a-s1", "Pass@4"][0] == 0.6
    evaluation(*flags[:-1], "--save", "t", "--group")
    value, low, high = saved("t")["a", "Pass@4"]  # two seeds that agree
    assert value == low == high == pytest.approx(0.6)
    assert saved("t")["b", "beta"][0] == 5


def test_eval_log_at_equal_x_by_hand(evaluation):
    status, out, _ = evaluation(
        *write_runs(), "--group", "--log", "Pass@1:Pass@4", "--at", 0.15, 0.2, 0.35, "--save", "t"
    )
    numbers = saved("t")
    value, low, high = numbers["a", "Pass@4 at Pass@1 0.15"]  # .85 and .65, at the first crossing
    assert value == pytest.approx(0.75)
    assert high - value == pytest.approx(value - low) == pytest.approx(12.706 * 0.1)  # t, 1 d.o.f.
    assert numbers["a", "Pass@4 at Pass@1 0.2"][0] == pytest.approx((0.8 + 0.6) / 2)
    assert numbers["b", "Pass@4 at Pass@1 0.2"][0] == 0.5  # where it first is there
    assert math.isnan(numbers["a", "Pass@4 at Pass@1 0.35"][0])  # one seed never gets there
    # the spread between seeds is that of all rows: .8 and .6 of a, none of b
    assert numbers["b", "Pass@4 at Pass@1 0.2"][2] == pytest.approx(0.5 + 12.706 * 0.1 * 2**0.5)
    assert status == 0
    assert re.search(r"\| b +\| +- \| +\.500 \| +- \|\n\| +\| +\| +-1\.297 2\.297 \| +\|", out)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--log", "step:length"], "give models"),
        (["out/a-s0", "--at", "1"], "--log X:Y"),
        (["out/a-s0", "--log", "step:lenth"], "distinct, Pass@1, Pass@4, steps"),
        (["out/a-s0", "--log", "step:length,lenth"], "both step and lenth"),
        (["out/a-s0", "--log", "step"], "X:Y"),
        (["out/a-s0", "--log", "step:"], "X:Y"),
        (["out/none", "--log", "step:length"], "directory of a run"),
        (["out/a-s0", "--log", "step:length", "--rescore", "f"], "give models"),
    ],
)
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
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        "step-00002",
        "run.lock",
    }
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    own = method in ("grpo", "ppo")  # advantages without lam and beta
    assert (rows[1]["lam"] is None) == own == bool(re.search(r"1/2 .* -     - ", out))
    assert list(rows[0])[:4] == ["step", "Pass@1", "Pass@2", "Pass@4"]
    assert "Pass@4" in out and "base" in out and str(path) in out


def test_metrics_say_what_happened(cli, base):
    status, out, _ = cli(*short(base, method="a-nsr", steps=5, updates=4, max_new_tokens=12))
    rows = [row for row in nsr.read_log(Path("out/a-nsr-1/metrics.jsonl")) if "correct" in row]
    for t, row in enumerate(rows):  # the schedule moves once a step, whatever --updates
        assert row["beta"] == pytest.approx(0.5 + math.exp(-0.03 * t))
        assert row["lam"] == pytest.approx(0.05 + 0.15 * t / 5)
        assert row["rollout_gap"] < 1e-5 and row["rollout_s"] > 0
        assert 0 < row["entropy"] < math.log(20) and row["tokens"] == round(16 * row["length"])
        assert row["truncated"] > 0 and row["memory_gb"] > 0
        for kind, some in (("correct", row["correct"] > 0), ("incorrect", row["correct"] < 1)):
            assert (row[f"logp_{kind}"] is not None) == some
    samples = nsr.read_log(Path("out/a-nsr-1/samples.jsonl"))
    assert 0 < len(samples) <= 10
    for s in samples:
        assert nsr.verify_countdown(s["response"], s["answer"]) is s["correct"]
    assert out.count("are cut at --max-new-tokens") == 1  # said once, not every step


@pytest.mark.parametrize("ppo", [False, True])
def test_measures_of_a_step_by_hand(model, tokenizer, ppo):
    batch = a_batch(model, ((2, 2), (3, 1)), adv=(-2.0, -4.0))
    values = (([-1.0, -2.0], [0.5, 1.0]), ([-3.0], [3.0]))  # the sampler's logp: 0
    for r, (old_logp, entropy) in zip(batch, values):
        r.old_logp, r.entropy = torch.tensor(old_logp), torch.tensor(entropy)
    batch[0].answer = "\\unreadable{"
    if ppo:
        batch[0].adv = torch.tensor([-1.0, -3.0])
    m = nsr.measure(a_run(model), batch)
    assert (m["tokens"], m["length"], m["rollout_gap"], m["entropy"]) == (3, 1.5, 2.0, 1.5)
    assert (m["adv_incorrect"], m["boxed"], m["correct"], m["logp_correct"]) == (-3, 0.5, 0, None)
    assert m["unparsed"] == 0.5 and m["truncated"] == 0
    assert m["logp_incorrect"] == pytest.approx((-1.5 - 3.0) / 2)
    batch[1].correct = True
    m = nsr.measure(a_run(model), batch)
    assert (m["logp_correct"], m["logp_incorrect"], m["adv_correct"]) == (-3.0, -1.5, -4.0)


def test_entropy_is_the_entropy(tokenizer):
    model = tiny_model(tokenizer)
    for p in model.parameters():
        torch.nn.init.zeros_(p)  # every token is as likely as any other
    entropy = torch.cat([r.entropy for r in a_batch(model)])
    close(entropy, torch.full((22,), math.log(len(tokenizer))))


def test_silent_failures_are_said_once(cli, base, tmp_path):
    rows = [{"problem": f"{i} 2 3 4 = 9", "answer": "none"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = cli(*short(base, data="data.jsonl", method="psr", steps=3))
    assert out.count("all responses are incorrect") == 1 and out.count("nothing to learn") == 1
    _, out, _ = cli(*short(base, max_new_tokens=1, steps=3))
    assert out.count("has an answer in \\boxed{}") == 1 and out.count("are cut at") == 1


def own_data(path, count=40, first=0):
    """A file of problems with questions that the small policies can read."""
    rows = [{"problem": f"{i} 2 3 4 = 9", "answer": str(i)} for i in range(first, first + count)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_says_its_form_of_prompt_and_shows_the_first(cli, base, tokenizer):
    _, out, _ = cli(*short(base, steps=1, name="chat"))
    first = nsr.load_problems(nsr.Config())[0][0]
    shown = tokenizer.decode(tokenizer(first.question)["input_ids"])
    assert out.count("in the model's chat template") == 1 and f"tokens: {shown!r}" in out
    plain = Path(shutil.copytree(base, "plain"))
    (plain / "chat_template.jinja").unlink()
    _, out, _ = cli(*short(plain, steps=1, instruction=""))
    assert out.count("as plain text") == 1


def test_an_answer_pattern_takes_the_place_of_the_box(cli, base):
    text = "Answer: 7. No.\nAnswer: \\frac{1}{2}"
    pattern = r"(?i)answer:\s*([^\n]+)"
    assert nsr.extract_answer(text, pattern) == "\\frac{1}{2}"
    assert nsr.verify(text, "0.5", pattern) and not nsr.verify(text, "0.5")
    assert not nsr.verify(text, "7", pattern) and not nsr.verify("\\boxed{7}", "7", pattern)
    assert nsr.verify_countdown("so 1+2", "1 2 = 3", r"so (.*)")
    with pytest.raises(nsr.UserError, match="takes too long"):
        nsr.extract_answer("a" * 3000 + "!", r"(\w*)(\w*)(\w*)(\w*)(\w*)$")
    assert cli(*short(base, answer_pattern="=(.*)", steps=1, name="run"))[0] == 0
    assert nsr.read_log(Path("out/run/metrics.jsonl"))[1]["boxed"] == 0


@pytest.mark.parametrize(
    "body, said",
    [
        ("return response.startswith('\\\\boxed{(')", ""),
        (
            "return 1 / 0",
            "raised ZeroDivisionError in line 4: division by zero, for the response '",
        ),
        ("return None", "returned None, neither True nor False"),
        ("raise SystemExit(0)", "raised SystemExit in line 4"),
        ("return 0.5", "returned 0.5"),
        ("return __import__('numpy').ones(2)", "raised ValueError in line"),
    ],
)
def test_a_verifier_of_ones_own(cli, base, body, said):
    Path("mine.py").write_text(f"import math\n\ndef right(response, answer):\n    {body}\n")
    flags = short(base, verifier="mine.py:right", data=own_data("data.jsonl"), steps=2, name="run")
    status, _, err = cli(*flags)
    if said:
        assert status == 2 and said in err and len(err.splitlines()) == 1
        assert not Path("out/run").exists()
    else:
        assert status == 0
        samples = nsr.read_log(Path("out/run/samples.jsonl"))
        assert {row["correct"] for row in samples} == {True, False}
        for row in samples:
            assert row["correct"] == row["response"].startswith("\\boxed{(")


def test_models_checked_by_two_verifiers_are_refused(cli, evaluation, base):
    data = own_data("data.jsonl")
    Path("mine.py").write_text("def right(response, answer):\n    return True\n")
    assert cli(*short(base, steps=1, data=data, name="ours"))[0] == 0
    assert cli(*short(base, steps=1, data=data, verifier="mine.py:right", name="mine"))[0] == 0
    for pair in (("out/ours", "out/mine"), ("out/mine", "out/ours")):
        status, _, err = evaluation(*pair, "-n", 1)
        assert status == 2 and "another --verifier" in err and len(err.splitlines()) == 1
        status, out, _ = evaluation(*pair, "-n", 1, "--verifier", "mine.py:right", "-k", 1)
        assert status == 0 and out.count("1.000") >= 2


def test_missing_weights_are_refused(base, tmp_path):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(nsr.UserError, match="lack 1 weights, such as model.layers.1.mlp.up_proj"):
        nsr.load_model(model, "cpu")


def test_equal_prompts_are_counted(capsys):
    problems = [nsr.parse_problem({"problem": f"q{i}", "answer": "1"}) for i in range(4)]
    nsr.encode_prompts(problems, Qwen, words("{{ 'always this' }}"), nsr.Config())
    assert "3 of 4 problems have the prompt of another" in capsys.readouterr().out
    nsr.encode_prompts(problems, Qwen, words(R1), nsr.Config())
    assert capsys.readouterr().out == ""


def test_an_error_in_mid_run_says_how_to_go_on(cli, base):
    Path("late.py").write_text(
        "calls = []\n\ndef right(response, answer):\n    calls.append(1)\n"
        "    assert len(calls) < 40\n    return True\n"
    )
    status, out, err = cli(
        *short(base, data=own_data("data.jsonl"), verifier="late.py:right", name="run")
    )
    assert status == 2 and "AssertionError in line 5" in err and len(err.splitlines()) == 1
    assert "--resume out/run goes on from what was saved" in out and Path("out/run").is_dir()


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_of_which_nothing_learns_is_refused(base, monkeypatch, quantized):
    kind = transformers.AutoModelForCausalLM
    load = kind.from_pretrained

    def changed(*args, **options):
        model, info = load(*args, **options)
        if quantized:
            model.config.quantization_config = {"quant_method": "some"}
            return model, info
        return model.requires_grad_(False), info

    monkeypatch.setattr(kind, "from_pretrained", changed)
    with pytest.raises(nsr.UserError, match="quantized or frozen"):
        nsr.load_model(base, "cpu")


def test_a_gradient_of_zero_is_said(cli, base, monkeypatch):
    loss = nsr.policy_loss
    monkeypatch.setattr(nsr, "policy_loss", lambda *a: 0.0 * loss(*a))
    _, out, _ = cli(*short(base, method="nsr", steps=2))
    assert out.count("the gradient is exactly 0") == 1


class Rates(torch.optim.SGD):
    """It notes the learning rate of each step."""

    seen = []

    def step(self):
        self.seen.append(self.param_groups[0]["lr"])
        super().step()


def test_the_learning_rate_rises_over_the_warm_up(cli, base):
    flags = dict(lr=0.1, lr_warmup=4, steps=5, updates=2, optimizer=f"{__name__}.Rates")
    flags |= dict(method="reinforce", name="run")
    assert cli(*short(base, **flags | {"steps": 3}))[0] == 0
    assert cli("--resume=out/run", "--steps=5")[0] == 0
    close(Rates.seen, [0.025, 0.025, 0.05, 0.05, 0.075, 0.075] + [0.1] * 4)


def test_some_checkpoints_are_kept_and_a_run_is_known_by_each(cli, base):
    assert cli(*short(base, steps=8, keep=3, name="run"))[0] == 0
    assert [p.name for p in nsr.checkpoints(Path("out/run"))] == [
        "step-00004",
        "step-00006",
        "step-00008",
    ]
    status, _, err = cli("--resume=out/run/step-00006", "--steps=10")
    assert (
        status == 2
        and "--resume out/run" in err.partition(": a run goes on")[2]
        and len(err.splitlines()) == 1
    )
    assert cli("--resume=out/run/step-00008", "--steps=10", "--keep=1")[0] == 0
    assert [p.name for p in nsr.checkpoints(Path("out/run"))] == ["step-00010"]


def test_tensorboard_gets_each_metric(cli, base, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            assert purge_step == 0
            written.append(path)

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

    status, _, err = cli(*short(base), "--tensorboard")
    if not nsr.importlib.util.find_spec("tensorboard"):
        assert status == 2 and "pip install tensorboard" in err
    monkeypatch.setattr(nsr.importlib.util, "find_spec", lambda name: True)
    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert cli(*short(base, steps=1, name="run"), "--tensorboard")[0] == 0
    assert written.pop(0) == Path("out/run")
    scalars = {(name, step): value for name, value, step in written}
    before, step, after = nsr.read_log(Path("out/run/metrics.jsonl"))
    assert scalars["Pass@1", 0] == before["Pass@1"]
    assert scalars["correct", 1] == step["correct"] and scalars["update_s", 1] > 0
    assert scalars["Pass@4", 1] == after["Pass@4"]


def test_a_run_that_ends_before_its_first_step_leaves_nothing(cli, base, monkeypatch):
    flags = short(base, steps=1, name="run")
    for error in (RuntimeError("a bug"), torch.OutOfMemoryError(), OSError("no space")):
        with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
            patch.setattr(nsr, "collect", lambda run: (_ for _ in ()).throw(error))
            cli(*flags)
        assert not Path("out/run").exists()
    model = Path(shutil.copytree(base, "model"))
    template = model / "chat_template.jinja"
    text = template.read_text()
    template.write_text("{{ raise_exception('not this') }}")
    status, _, err = cli(*short(model, steps=1, name="run"))
    assert status == 2 and "not this" in err and not Path("out/run").exists()
    template.write_text(text)
    small = transformers.AutoModelForCausalLM.from_pretrained(model)
    small.resize_token_embeddings(10)
    small.save_pretrained(model)
    status, _, err = cli(*short(model, steps=1, name="run"))
    assert status == 2 and "belong together" in err and len(err.splitlines()) == 1
    assert not Path("out/run").exists()
    assert cli(*flags)[0] == 0


@pytest.mark.parametrize("step", [5, 6])  # in the update before a checkpoint, too
def test_a_collapse_is_said_and_the_last_sound_checkpoint_kept(cli, base, monkeypatch, step):
    weigh = nsr.weigh

    def destroy(cfg, responses, lam, beta):
        weigh(cfg, responses, lam, beta)
        if destroy.run.step == step - 1:
            torch.nn.init.zeros_(destroy.run.model.lm_head.weight)

    def train(run, body=nsr.train):
        destroy.run = run
        body(run)

    monkeypatch.setattr(nsr, "weigh", destroy)
    monkeypatch.setattr(nsr, "train", train)
    flags = dict(steps=10, method="psr", name="run", max_new_tokens=40, prompts=16)
    _, out, _ = cli(*short(base, **flags))
    assert out.count("the policy has collapsed: 0.0% correct, entropy") == 1
    assert "with --model out/run/step-00004" in out
    assert "are cut at --max-new-tokens" not in out
    kept = [path.name for path in nsr.checkpoints(Path("out/run"))]
    assert kept == ["step-00004", "step-00010"]
    run = a_run(destroy.run.model, prompts=16, group_size=4)
    run.path = Path("out/run")
    assert nsr.collapsed_steps(run) == {*range(step + 1, 11)}


def test_one_hard_batch_is_no_collapse(base, tmp_path):
    run = a_run(nsr.load_model(base, "cpu")[0], prompts=8, group_size=4)
    run.path = tmp_path
    m = dict(entropy=0.5, truncated=0.0, boxed=1.0, grad_norm=1.0, rollout_gap=0.0)
    said = {}
    for step, share in enumerate((0.8, 0.05, 0.8, 0.05, 0.05), 1):
        m["step"] = run.step = step
        m["correct"] = share
        nsr.append_log(tmp_path / "metrics.jsonl", m)
        said[step] = [name for name, _ in nsr.warnings_of(run, m, None)]
    assert said == {1: [], 2: [], 3: [], 4: [], 5: ["collapsed"]}
    assert nsr.collapsed_steps(run) == {2, 4, 5}


def test_a_run_hands_its_preset_and_system_message_on(cli, base):
    assert cli(*short(base, steps=1, name="run"))[0] == 0
    for name in ("out/run", "out/run/step-00001"):
        assert nsr.resolve({"model": name}).preset == "countdown"
    assert nsr.resolve({"model": "elsewhere"}).preset == "qwen-math"
    stored = json.loads(Path("out/run/config.json").read_text())
    Path("out/run/config.json").write_text(json.dumps(stored | {"system": "S"}))
    assert nsr.resolve({"model": "out/run"}).system == "S"
    assert nsr.resolve({"preset": "qwen-math"}).system == "You are a helpful assistant."


ARCHITECTURES = [
    ("Llama", {}),
    ("Mistral", {"sliding_window": 6}),
    ("Gemma3Text", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    ("GPTNeoX", {}),
    ("Qwen3", {"head_dim": 8}),
    ("Falcon", {}),
    ("Mixtral", {"num_local_experts": 2}),
]


@pytest.mark.parametrize("name, options", ARCHITECTURES)
def test_other_architectures_train(name, options, cli, tokenizer):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SMALL | {"num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0} | options
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    status, out, err = cli(*short("model", steps=2, method="reinforce", name="run"))
    assert (status, err) == (0, "") and "rollout and training pass differ" not in out
    assert [row["step"] for row in nsr.read_log(Path("out/run/metrics.jsonl"))] == [0, 1, 2, 2]


def test_default_names_are_fresh_and_a_taken_name_is_refused(cli, base):
    for number in (1, 2):
        assert cli(*short(base, steps=1))[0] == 0 and Path(f"out/a-nsr-{number}").is_dir()
    assert cli(*short(base, steps=1, name="mine"))[0] == 0
    before = {p: p.read_bytes() for p in Path("out/mine").rglob("*") if p.is_file()}
    status, _, err = cli(*short(base, steps=1, name="mine"))
    assert status == 2 and "--resume out/mine" in err
    assert before == {p: p.read_bytes() for p in Path("out/mine").rglob("*") if p.is_file()}


def test_two_processes_on_one_run_are_refused(cli, base):
    assert cli(*short(base, steps=2, name="run"))[0] == 0
    gc.collect()  # the run has ended, and with it goes its lock
    held = nsr.lock(Path("out/run/run.lock"))
    log = Path("out/run/metrics.jsonl").read_text()
    status, _, err = cli("--resume=out/run", "--steps=3")
    assert status == 2 and "another process" in err and len(err.splitlines()) == 1
    assert Path("out/run/metrics.jsonl").read_text() == log
    held.close()
    assert cli("--resume=out/run", "--steps=3")[0] == 0


@pytest.mark.parametrize(
    "flags, said",
    [
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
        (["--data=half.jsonl"], "half.jsonl holds no problems with an answer"),
        (["--lam=-3"], "--lam"),
        (["--kl-coef=-1"], "--kl-coef"),
        (["--entropy-coef=-1"], "--entropy-coef"),
        (["--eval-every=-2"], "--eval-every"),
        (["--beta-max=-2"], "--beta-max"),
        (["--keep=0"], "--keep"),
        (["--gpu-memory-utilization=1.5"], "--gpu-memory-utilization"),
        (["--answer-pattern=("], "--answer-pattern"),
        (["--answer-pattern=x"], "put the answer's part in ( )"),
        (["--verifier=none.py:f"], "--verifier none.py:f"),
        (["--verifier=verifier.py:f"], "--verifier verifier.py:f"),
        (["--model=Qwen/Qwen2.5-Mth-1.5B", "--data=math-train"], "Qwen2.5-Mth"),
        (["--model=adapter"], "adapter is an adapter (LoRA): merge it into its base model"),
        (["--data=list.jsonl"], "list.jsonl, line 2: not a JSON object"),
        (["--data=array.json"], "array.json, row 1: not a JSON object"),
        (["--data=binary.jsonl"], "binary.jsonl"),
        (["--data=empty.jsonl"], "holds no problems"),
        (["--data=few.jsonl", "--prompts=64"], "few.jsonl"),
        (["--data=hf://datasets/nobody"], "nobody"),
        (["--model=no/such-model"], "no/such-model"),
        (["--model=missing-folder"], "missing-folder"),
        (["--max-new-tokens=60"], "context of 64"),
        (["--name=a/b"], "--name a/b: not a plain name"),
        (["--name=.."], "--name ..: not a plain name"),
        (["--name=" + "x" * 300], "too long"),
        (["--data=half_character.jsonl"], "half_character.jsonl, line 1"),
        (["--device=cuda:99"], "--device cuda:99"),
        (["--device=quantum"], "--device quantum"),
        (["--device=meta"], "--device meta"),
        (["--optimizer=test_nsr.NoOptimizer"], "it makes no torch.optim.Optimizer"),
        (["--model=./none", "--data=math-train"], "no model directory ./none"),
        (["--model=some/where/else"], "no model directory some/where/else"),
        (["--resume=out/none"], "out/none"),
    ],
)
def test_bad_input_is_one_line_and_status_2(cli, base, tmp_path, flags, said):
    good = json.dumps({"problem": "1 2 3 4 = 9", "answer": "9"}) + "\n"
    (tmp_path / "bad.jsonl").write_text(good + "{\n")
    (tmp_path / "half.jsonl").write_text('{"problem": "p"}\n')
    (tmp_path / "list.jsonl").write_text(good + "[1]\n")
    (tmp_path / "array.json").write_text("[1]\n")
    (tmp_path / "half_character.jsonl").write_text('{"problem": "\\ud800", "answer": 1}\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "few.jsonl").write_text(good)
    (tmp_path / "verifier.py").write_text("g = 1")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
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
    assert "On 4 held-out problems" in out
    path = cwd / "out/a-nsr-1"
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    return path


def test_checkpoint_loads_anywhere(finished):
    path = checkpoint(finished)
    assert path.name == "step-00006"
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer("1 2 3 4 = 10", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize(
    "signum, after",
    [
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 3),
        (signal.SIGKILL, 5),
        (signal.SIGTERM, 3),
        (signal.SIGINT, 2),
    ],
)
def test_stopped_and_resumed_run_is_bit_identical(base, finished, tmp_path, signum, after):
    process = script(short(base, steps=6, eval_every=3, updates=2, name="run"), tmp_path)
    run, deadline = tmp_path / "out/run", time.time() + 120
    while len(nsr.read_log(run / "metrics.jsonl")) <= after and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 130)
    if signum != signal.SIGKILL:
        assert "--resume out/run" in out
        saved = torch.load(checkpoint(run) / "trainer.pt")["step"]
        assert saved == max(row["step"] for row in nsr.read_log(run / "metrics.jsonl"))
    resumed = script(["--resume=out/run"], tmp_path)
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and not err, err
    assert same(state(run), state(finished))
    assert (run / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


def test_a_second_signal_ends_the_process_at_once():
    code = "import nsr, os, signal, time; signal.signal(signal.SIGINT, nsr.hear);"
    code += "os.kill(os.getpid(), signal.SIGINT); assert nsr.heard == [2];"
    code += "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGINT


@pytest.mark.parametrize("flags", [dict(method="ppo"), dict(method="nsr", entropy_coef=0.01)])
def test_a_run_resumed_half_way_is_bit_identical(cli, base, flags):
    assert cli(*short(base, name="whole", **flags))[0] == 0
    assert cli(*short(base, name="half", **flags | dict(steps=2)))[0] == 0
    assert cli("--resume=out/half", "--steps=4")[0] == 0
    (weights, rows), (others, more) = (state(Path("out", name)) for name in ("whole", "half"))
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    advs = [[r["adv_incorrect"] for r in log if "adv_incorrect" in r] for log in (rows, more)]
    assert advs[0] == advs[1]


def ranks(flags, cwd):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            ROOT / "nsr.py",
            *flags,
        ],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )


@pytest.mark.parametrize("method", ["a-nsr", "ppo"])
def test_two_ranks_equal_one_process(cli, base, tmp_path, method):
    flags = short(base, steps=3, prompts=8, updates=2, schedule="accuracy", method=method, lr=1e-4)
    alone = script([*flags, "--name=one"], tmp_path)
    process = ranks([*flags, "--name=two"], tmp_path)
    assert alone.wait(timeout=120) == 0
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.count("On 4 held-out problems") == 1, err
    (one, rows), (two, others) = (state(Path("out", name)) for name in ("one", "two"))
    for k in one:
        close(one[k], two[k], atol=1e-5)
    for row, other in zip(rows, others, strict=True):  # the same responses, counted once
        assert row.keys() == other.keys()
        assert all(row.get(k) == other.get(k) for k in ("step", "correct", "tokens", "beta", "k"))
    resumed = script(["--resume=out/two", "--steps=4"], tmp_path)
    resumed.communicate(timeout=120)
    assert resumed.returncode == 0  # its draws do not depend on the ranks


def test_a_lost_rank_ends_the_run_with_a_message(base, tmp_path):
    process = ranks(short(base, steps=500, prompts=8, name="run"), tmp_path)
    log, deadline = tmp_path / "out/run/metrics.jsonl", time.time() + 120
    while len(nsr.read_log(log)) <= 3 and time.time() < deadline:
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "--resume" in err
    saved = torch.load(checkpoint(tmp_path / "out/run") / "trainer.pt")["step"]
    assert 2 <= saved <= max(row["step"] for row in nsr.read_log(log))


def test_ranks_stop_together_and_save(base, tmp_path):
    """A signal that one rank hears, as when the other is slower, ends the step for both."""
    process = ranks(short(base, steps=500, prompts=8, name="run", save_every=400), tmp_path)
    log, deadline = tmp_path / "out/run/metrics.jsonl", time.time() + 120
    while len(nsr.read_log(log)) <= 3 and time.time() < deadline:
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "lost the others" not in err and "which is saved" in out
    saved = torch.load(checkpoint(tmp_path / "out/run") / "trainer.pt")["step"]
    assert saved == max(row["step"] for row in nsr.read_log(log)) >= 3


def test_divergence_and_damaged_logs_end_in_one_line(cli, base):
    status, _, err = cli(*short(base, lr=1e30, name="run"))
    assert status == 2 and "--lr" in err and len(err.splitlines()) == 1
    assert cli(*short(base, name="run"))[0] == 0  # nothing was left in its way
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
    file = checkpoint("out/run") / name
    file.write_bytes(file.read_bytes()[:100])
    log = Path("out/run/metrics.jsonl").read_text()
    status, _, err = cli("--resume=out/run")
    assert status == 2 and "step-00002" in err and len(err.splitlines()) == 1
    assert Path("out/run/metrics.jsonl").read_text() == log


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(cli, base):
    assert cli(*short(base, name="run", steps=4))[0] == 0
    expected = state(Path("out/run"))
    shutil.copytree(checkpoint("out/run"), "out/run/step-00002")  # not yet removed
    Path("out/run/step-00006.99.tmp").mkdir()  # not yet renamed
    with open("out/run/metrics.jsonl", "a") as log:
        log.write('{"step": 5, "corr')
    assert cli("--resume=out/run", "--steps=5")[0] == 0
    weights, rows = state(Path("out/run"))
    assert rows[: len(expected[1]) - 1] == expected[1][:-1] and rows[-1]["step"] == 5
    assert [p.name for p in Path("out/run").glob("step-*")] == ["step-00005"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("short")])
def test_a_full_disk_leaves_the_checkpoint_before(cli, base, monkeypatch, error):
    save = torch.save

    def full(state, path):
        if state["step"] > 2:
            Path(path).write_bytes(b"half")
            raise type(error)(*error.args)
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    status, _, err = cli(*short(base, name="run"))
    assert status == 2 and "--resume out/run" in err and len(err.splitlines()) == 1
    monkeypatch.setattr(torch, "save", save)
    assert checkpoint("out/run").name == "step-00002"
    assert cli("--resume=out/run")[0] == 0
    assert cli(*short(base, name="whole"))[0] == 0
    assert same(state(Path("out/run")), state(Path("out/whole")))


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
    """Logits (*shape, V) and labels (*shape)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, V, generator=generator, dtype=torch.float64)
    logits = logits * 4 + offset
    labels = torch.randint(V, shape, generator=generator)
    return logits.to(dtype).to(DEVICE), labels.to(DEVICE)


def kernel_loss(stats, weights):
    return (stats.logprobs * weights[0] + stats.entropy * weights[1]).sum()


def kernel_compare(x, y, temperature=1.0, mask=None, inplace=False, atol=3e-5):
    """Check values and gradients of token_stats_from_logits against the definition in float64."""
    is_double = x.dtype == torch.float64
    exact = x.detach().double().requires_grad_()
    exact_temperature = temperature
    if isinstance(temperature, torch.Tensor):
        exact_temperature = temperature.double()
    want = K.naive_token_stats(exact, y, exact_temperature, mask)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *y.shape, generator=generator, dtype=torch.float64)
    weights = weights.to(x.device)
    kernel_loss(want, weights).backward()
    x = x.clone().requires_grad_()
    found = K.token_stats_from_logits(
        x, y, temperature=temperature, mask=mask, inplace_backward=inplace
    )
    for a, b in zip(found, want):
        assert a.dtype == (torch.float64 if is_double else torch.float32)
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-12 if is_double else atol)
    assert (found.logprobs <= 0).all()
    assert (found.entropy >= 0).all()
    assert (found.entropy <= math.log(x.shape[-1]) * (1 + 1e-6)).all()
    kernel_loss(found, weights).backward()
    kernel_compare_gradients(x.grad, exact.grad)
    return found


def kernel_compare_gradients(found, want):
    scale = want.abs().amax(-1, keepdim=True)
    # one rounding; the interpreter truncates a bfloat16, which is twice as far
    eps = torch.finfo(found.dtype).eps
    tiny = 1e-7  # float16 has subnormals below 6e-8
    if found.dtype == torch.float32:
        eps = 2e-5
    if found.dtype == torch.float64:
        eps = 1e-12
        tiny = 1e-12
    difference = (found.double() - want).abs()
    assert (difference <= eps * scale + tiny).all()
    if found.dtype in (torch.float64, torch.float32):
        sums = found.double().sum(-1)
        assert (sums.abs() <= 1e-4 * scale[..., 0] + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 31, 1000, 2053])
def test_kernel_matches_float64(kernel_path, V, dtype):
    for temperature, offset in ((0.3, 0.0), (0.6, 100.0), (1.0, -1e4), (2.0, 1e4)):
        if dtype == torch.float16:
            offset = 0.0
        x, y = kernel_case((2, 3), V, dtype, offset)
        kernel_compare(x, y, temperature)


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
    x.requires_grad_()
    mask = torch.tensor([[True, False, True]], device=DEVICE)
    temperature = torch.tensor([[0.7, 1.0, 1.3]], device=DEVICE, dtype=torch.float64)

    def value(x):
        stats = K.token_stats_from_logits(x, y, temperature=temperature, mask=mask)
        if name == "both":
            return stats.logprobs * stats.entropy
        return getattr(stats, name)

    assert torch.autograd.gradcheck(value, x)
    if name == "logprobs":  # one public function says what the other does
        logp = K.logprobs_from_logits(x, y, temperature=temperature, mask=mask)
        (alone,) = torch.autograd.grad(logp.sum(), x)
        (with_others,) = torch.autograd.grad(value(x).sum(), x)
        assert torch.equal(alone, with_others)


def test_kernel_hand_gradient(kernel_path):
    """softmax(log 1, log 2, log 5) = (1, 2, 5)/8; d logp_1 / d z = (-1, 6, -5)/8, over T."""
    x = torch.tensor([[1.0, 2.0, 5.0]], device=DEVICE).log() * 2
    x.requires_grad_()
    y = torch.tensor([1], device=DEVICE)
    out = K.token_stats_from_logits(x, y, temperature=2.0)
    out.logprobs.backward()
    logp = out.logprobs.detach().cpu()
    torch.testing.assert_close(logp, torch.tensor([math.log(2 / 8)]))
    torch.testing.assert_close(x.grad.cpu(), torch.tensor([[-1.0, 6.0, -5.0]]) / 16)
    p = np.array([1, 2, 5]) / 8
    entropy = -(p * np.log(p)).sum()
    assert abs(out.entropy.item() - entropy) < 1e-6


def test_kernel_confident_token(kernel_path):
    """1 - p of the label does not cancel: p = 1 - 3e-9 still has the right gradient in float32."""
    x = torch.zeros(1, 40, device=DEVICE)
    x[0, 7] = 23.3
    y = torch.tensor([7], device=DEVICE)
    kernel_compare(x, y)
    x.requires_grad_()
    K.logprobs_from_logits(x, y).backward()
    others = 39 * math.exp(-23.3)
    exact = others / (1 + others)
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
        assert out.logprobs[3].isnan()
        assert out.entropy[3].isnan()
        assert not out.entropy[:3].isnan().any()
    x[3] = -math.inf
    assert K.logprobs_from_logits(x, y)[3].isnan()  # as log_softmax has it


@pytest.mark.parametrize("inplace", [False, True])
def test_kernel_dead_rows(kernel_path, inplace):
    x, y = kernel_case((3, 4), 100)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 4, generator=generator).to(DEVICE) > 0.4
    mask[2] = False
    y[0, 0] = -100
    live = mask & (y != -100)
    x[~live] = math.nan
    x.requires_grad_()
    found = K.token_stats_from_logits(x, y, mask=mask, inplace_backward=inplace)
    clean = x.detach().nan_to_num(0.0)
    want = K.naive_token_stats(clean, y, 1.0, mask)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b)
    assert (found.logprobs[~live] == 0).all()
    assert (found.entropy[~live] == 0).all()
    assert found.confidence[2] == 0
    assert not found.confidence.requires_grad
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert (x.grad[~live] == 0).all()
    assert x.grad[live].isfinite().all()
    assert x.grad[live].any()


def test_kernel_label_out_of_range(kernel_path):
    x, y = kernel_case((5,), 33)
    y = torch.tensor([0, 33, -1, 2**31 + 5, -100], device=DEVICE)
    out_of_range = [False, True, True, True, False]
    x.requires_grad_()
    out = K.token_stats_from_logits(x, y)
    assert out.logprobs.isnan().tolist() == out_of_range
    assert out.entropy.isnan().tolist() == out_of_range
    out.logprobs.sum().backward()
    assert x.grad.isnan().all(-1).tolist() == out_of_range
    assert not x.grad[[0, 4]].isnan().any()


def test_kernel_shapes_and_strides(kernel_path):
    x, y = kernel_case((2, 5), 37)
    layouts = (
        x,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.nn.functional.pad(x, (0, 5))[..., :37],
        torch.nn.functional.pad(x, (3, 0))[..., 3:],
        x.mT.contiguous().mT,
    )
    for z in layouts:
        kernel_compare(z, y.int())
        assert z.shape == x.shape
    kernel_compare(x[:, ::2], y[:, ::2])


def test_kernel_slices(kernel_path):
    x, y = kernel_case((2, 5), 37)
    view = x[:, :-1]
    of_view = K.logprobs_from_logits(view, y[:, 1:])
    of_copy = K.logprobs_from_logits(view.clone(), y[:, 1:])
    assert torch.equal(of_view, of_copy)
    full = x.clone().requires_grad_()
    K.logprobs_from_logits(full[:, :-1], y[:, 1:]).sum().backward()
    assert (full.grad[:, -1] == 0).all()
    assert full.grad[:, :-1].any(-1).all()


def test_kernel_numbers_of_dimensions(kernel_path):
    x, y = kernel_case((2, 5), 37)
    ref = K.naive_token_stats(x.double(), y)
    one = K.logprobs_from_logits(x[0, 0], y[0, 0])
    torch.testing.assert_close(one.double(), ref.logprobs[0, 0], atol=3e-5, rtol=0)
    four = K.token_stats_from_logits(x.view(2, 1, 5, 37), y.view(2, 1, 5))
    assert four.logprobs.shape == (2, 1, 5)
    assert four.confidence.shape == (2, 1)
    torch.testing.assert_close(four.confidence[:, 0].double(), ref.confidence)
    empty = K.token_stats_from_logits(x[:0].requires_grad_(), y[:0])
    assert empty.logprobs.shape == (0, 5)
    assert empty.confidence.shape == (0,)
    empty.logprobs.sum().backward()
    no_tokens = K.token_stats_from_logits(x[:, :0], y[:, :0])
    assert no_tokens.confidence.tolist() == [0, 0]


def test_kernel_sliced_logits_are_not_copied(kernel_path, monkeypatch):
    x, y = kernel_case((2, 5), 37)
    forward = K._forward
    seen = []

    def spy(logits, *others):
        seen.append(logits.data_ptr())
        return forward(logits, *others)

    monkeypatch.setattr(K, "_forward", spy)
    K.logprobs_from_logits(x[:, 1:], y[:, 1:])
    assert seen == [x[:, 1:].data_ptr()]


def test_kernel_temperature(kernel_path):
    x, y = kernel_case((2, 3), 50)
    each = torch.tensor([[0.5, 1.0, 2.0], [0.3, 0.7, 3.0]], device=DEVICE)
    kernel_compare(x, y, each)
    by_sequence = torch.tensor([[0.5], [2.0]], device=DEVICE)
    kernel_compare(x, y, by_sequence)


@pytest.mark.parametrize(
    "bad",
    [
        0,
        0.0,
        -1.0,
        math.nan,
        math.inf,
        torch.tensor(0.0),
        torch.tensor([[1.0], [math.nan]]),
    ],
)
def test_kernel_refuses_temperature(kernel_path, bad):
    x, y = kernel_case((2, 3), 50)
    with pytest.raises(ValueError, match="temperature must be positive"):
        K.logprobs_from_logits(x, y, temperature=bad)


def test_kernel_refuses_shapes_and_dtypes(kernel_path):
    x, y = kernel_case((2, 3), 50)
    short_mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError):
        K.logprobs_from_logits(x, y[0])
    with pytest.raises(ValueError):
        K.logprobs_from_logits(x, y.float())
    with pytest.raises(ValueError):
        K.logprobs_from_logits(x.long(), y)
    with pytest.raises(ValueError):
        K.logprobs_from_logits(x, y, mask=torch.ones_like(y))
    with pytest.raises(ValueError):
        K.logprobs_from_logits(x[0], y[0, 0])
    with pytest.raises(ValueError):
        K.logprobs_from_logits(x, y, mask=short_mask)


@pytest.mark.parametrize("V", [5, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_same_bits_alone_and_in_a_batch(kernel_path, dtype, V):
    x, y = kernel_case((2, 6), V, dtype)  # odd V: rows lie at every alignment
    batch = K.token_stats_from_logits(x, y, temperature=0.7)
    again = K.token_stats_from_logits(x, y, temperature=0.7)
    for a, b in zip(batch, again):
        assert torch.equal(a, b)
    for b in range(2):
        sequence = slice(b, b + 1)
        one = K.token_stats_from_logits(x[sequence].clone(), y[sequence], temperature=0.7)
        assert torch.equal(one.confidence, batch.confidence[sequence])
        for t in range(6):
            token = slice(t, t + 1)
            row = K.token_stats_from_logits(x[b, token].clone(), y[b, token], temperature=0.7)
            assert torch.equal(row.logprobs[0], batch.logprobs[b, t])
            assert torch.equal(row.entropy[0], batch.entropy[b, t])


def test_kernel_same_bits_of_a_large_row(monkeypatch):
    monkeypatch.setattr(K, "triton", None)  # torch splits one long sum over threads
    x, y = kernel_case((5,), 70_001)
    batch = K.logprobs_from_logits(x, y)
    alone = K.logprobs_from_logits(x[3:4], y[3:4])
    assert torch.equal(batch[3:4], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_inplace_backward(kernel_path, dtype):
    x, y = kernel_case((2, 5), 1003, dtype)
    kernel_compare(x, y, 0.6, inplace=True)
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    out = K.token_stats_from_logits(logits[:, :-1], y[:, 1:], inplace_backward=True)
    other = (logits**2).sum()  # saves the logits as well
    version = logits._version
    where = logits.data_ptr()
    (grad,) = torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
    now = logits.detach()
    torch.testing.assert_close(now[:, :-1], grad[:, :-1], rtol=0, atol=0)  # over the logits
    assert logits._version > version
    assert logits.data_ptr() == where
    assert torch.equal(now[:, -1], x[:, -1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_overlapping_rows_are_not_overwritten(kernel_path, dtype):
    x, y = kernel_case((2, 5), 1003, dtype)
    row = x[:1, :1]
    found = row.clone().requires_grad_()
    rows = found.expand(2, 5, -1)
    K.logprobs_from_logits(rows, y, inplace_backward=True).sum().backward()
    want = row.clone().requires_grad_()
    rows = want.expand(2, 5, -1)
    K.logprobs_from_logits(rows, y).sum().backward()
    assert torch.equal(found.grad, want.grad)
    assert torch.equal(found.detach(), row)


def test_kernel_absent_gradients_cost_nothing(kernel_path, monkeypatch):
    x, y = kernel_case((2, 3), 50)
    backward = K._backward
    calls = []

    def spy(logits, labels, temps, stats, g_logp, g_entropy, grad):
        calls.append((g_logp is None, g_entropy is None))
        backward(logits, labels, temps, stats, g_logp, g_entropy, grad)

    monkeypatch.setattr(K, "_backward", spy)
    x.requires_grad_()
    K.token_stats_from_logits(x, y).logprobs.sum().backward()
    K.token_stats_from_logits(x, y).entropy.sum().backward()
    assert calls == [(False, True), (True, False)]
    with torch.no_grad():
        assert not K.logprobs_from_logits(x, y).requires_grad


def test_kernel_opcheck(kernel_path):
    x, y = kernel_case((2, 3), 50)
    temps = torch.ones(2, 3, device=DEVICE)
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(K._forward, (leaf, y, temps, True, 2, False))
    logp, _, stats, _ = K._forward(x, y, temps, False, 2, False)
    grad = torch.empty_like(x)
    torch.library.opcheck(K._backward, (x, y, temps, stats, logp, None, grad))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_kernel_compiles_fullgraph(kernel_path, by_sequence, inplace):
    x, y = kernel_case((2, 5), 50)
    temperature = 0.7
    if by_sequence:
        temperature = torch.tensor([[0.5], [2.0]], device=DEVICE)

    def loss(x, temperature):
        logits = x * 2
        stats = K.token_stats_from_logits(
            logits[:, :-1], y[:, 1:], temperature=temperature, inplace_backward=inplace
        )
        return (stats.logprobs * stats.confidence[:, None] + stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        leaf = x.clone().requires_grad_()
        function(leaf, temperature).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def count_bytes(monkeypatch, tensor_of):
    """{"load": bytes, "store": bytes} of unmasked lanes in the tensor that tensor_of() returns."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = {"load": 0, "store": 0}
    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def count(kind, pointers, mask):
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[lanes]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        tensor = tensor_of()
        first = tensor.data_ptr()
        end = first + tensor.untyped_storage().nbytes()
        inside = (addresses >= first) & (addresses < end)
        moved[kind] += int(inside.sum()) * size

    def counted_load(self, pointers, mask, *args, **kwargs):
        count("load", pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def counted_store(self, pointers, value, mask, *args, **kwargs):
        count("store", pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return moved


@pytest.mark.skipif(DEVICE != "cpu" or K.triton is None, reason="counts in Triton's interpreter")
@pytest.mark.parametrize("V", [1000, 2053])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_kernel_bytes_moved(monkeypatch, share, V):
    """Over N V itemsize: 1 read forward, 1 + 1 backward; dead rows are written, not read."""
    monkeypatch.setattr(K, "INTERPRET", True)
    x, y = kernel_case((2, 3), V)
    logits = x.requires_grad_() * 1
    moved = count_bytes(monkeypatch, lambda: logits)
    mask = None
    if share == 0.5:
        mask = torch.arange(6).view(2, 3) % 2 == 0
    out = K.token_stats_from_logits(logits, y, mask=mask, inplace_backward=True)
    assert moved["load"] / logits.nbytes == pytest.approx(share)
    assert moved["store"] == 0
    moved.update(load=0, store=0)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert moved["load"] / logits.nbytes == pytest.approx(share)
    assert moved["store"] / logits.nbytes == pytest.approx(1.0)


def test_kernel_row_offsets_are_64_bit(monkeypatch):
    """Rows 2^31 elements apart, without touching the memory between."""
    if K.triton is None:
        pytest.skip("needs triton")
    monkeypatch.setattr(K, "INTERPRET", DEVICE == "cpu")
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    apart = storage.as_strided((2, 50), (2**31, 1))
    small, y = kernel_case((2,), 50, torch.bfloat16)
    apart.copy_(small)
    of_apart = K.logprobs_from_logits(apart, y)
    of_small = K.logprobs_from_logits(small, y)
    assert torch.equal(of_apart, of_small)


def run_python(code, folder, **environment):
    """What Python code prints in a process of its own, in `folder`, without the tests' settings."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=env | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_kernel_machine_code():
    """No spills, wide accesses, at most 1.1 exponentials: compiled without the interpreter."""
    if K.triton is None:
        pytest.skip("needs triton")
    code = """if True:
        import triton
        import kernels.logprob as K
        kind = {"labels": "*i64", "L": "i32"}  # a check that the interpreter does not make
        signature = {name: kind.get(name, "*fp32") for name in K._confidence_kernel.arg_names}
        source = triton.compiler.ASTSource(K._confidence_kernel, signature)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        triton.compile(source, target=target)
        for arch in (80, "gfx942"):
            print(K._machine_code(K._forward_kernel, "bf16", arch))
            print(K._machine_code(K._backward_kernel, "bf16", arch))
    """
    folder = Path(K.__file__).parent.parent
    lines = run_python(code, folder, TRITON_INTERPRET="0").splitlines()
    assert len(lines) == 4
    for line in lines:
        exponentials = float(line.split()[-4])
        assert " 0 spills" in line, line
        assert " 4 wide loads" in line, line
        assert exponentials <= 1.1, line
    for line in lines[1::2]:  # of the backward kernel
        assert " 4 wide stores" in line, line


def test_kernel_alone_in_an_empty_folder(tmp_path):
    """The file copied alone works, without triton too, and states its licence."""
    text = Path(K.__file__).read_text()
    (tmp_path / "logprob.py").write_text(text)
    code = """if True:
        import sys
        import torch
        sys.modules["triton"] = None
        import logprob
        x = torch.zeros(2, 3, 4, requires_grad=True)
        labels = torch.ones(2, 3, dtype=torch.int32)
        stats = logprob.token_stats_from_logits(x, labels)
        stats.logprobs.sum().backward()
        print(round(stats.confidence[0].item(), 6))
    """
    assert run_python(code, tmp_path) == "0.25\n"
    header = text.splitlines()[:4]
    assert "SPDX-License-Identifier: MIT" in "".join(header)


# --------------------------------------------------------------------------------------------------
# kernels/linear_logprob.py


def linear_case(dtype=torch.float64, H=6, V=33):
    """(hidden, weight, bias), labels, mask: 15 rows, 11 of them live, a view into 21, H apart."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for shape in ((3, H, 7), (V, H), (V,)):
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64)
        inputs.append(tensor.to(DEVICE, dtype))
    hidden, weight, bias = inputs
    hidden = hidden.transpose(1, 2)[:, 2:]
    labels = torch.randint(V, (3, 5), generator=generator).to(DEVICE)
    position = torch.arange(15, device=DEVICE).view(3, 5)
    mask = position % 5 != 1
    labels[2, 4] = -100
    hidden[~mask] = math.nan
    hidden[2, 4] = math.nan
    return (hidden, weight, bias), labels, mask


def linear_grads(f, inputs, *args, entropy_weight=0.7, **options):
    """The stats, and the gradients of inputs for weights that differ from row to row."""
    leaves = []
    for tensor in inputs:
        leaves.append(tensor.detach().requires_grad_())
    hidden, weight, bias = leaves
    stats = f(hidden, weight, *args, bias=bias, **options)
    w = torch.arange(1.0, 16, dtype=torch.float64, device=DEVICE)
    w = w.view(3, 5).cos()
    loss = stats.logprobs * w + entropy_weight * stats.entropy * w.flip(0)
    return [*stats, *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 4, 10, 11, None])  # one row left, whole chunks, all
def test_linear_matches_the_definition(kernel_path, chunk_rows, dtype):
    inputs, labels, mask = linear_case(dtype)
    exact = [tensor.double().nan_to_num() for tensor in inputs]
    by_sequence = torch.tensor([[0.5], [1.0], [2.0]], dtype=dtype, device=DEVICE)
    atol = 1e-12 if dtype == torch.float64 else 2e-5
    for temperature in (0.6, by_sequence):
        options = {"temperature": temperature, "mask": mask}
        found = linear_grads(L.linear_logprobs, inputs, labels, chunk_rows=chunk_rows, **options)
        want = linear_grads(L.naive_linear_logprobs, exact, labels, **options)
        for a, b in zip(found, want):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


def test_linear_gradcheck(kernel_path):
    inputs, labels, mask = linear_case(H=2, V=3)
    inputs = [tensor.nan_to_num().requires_grad_() for tensor in inputs]
    labels = labels[:1] % 3
    mask = mask[:1]

    def f(hidden, weight, bias):
        stats = L.linear_logprobs(hidden[:1], weight, labels, bias=bias, mask=mask, chunk_rows=3)
        return stats.logprobs * stats.entropy

    assert torch.autograd.gradcheck(f, inputs)
    with_others = torch.autograd.grad(f(*inputs).sum(), inputs)
    for i, tensor in enumerate(inputs):  # alone: nothing else is computed
        arguments = [other.detach() for other in inputs]
        arguments[i] = tensor
        (alone,) = torch.autograd.grad(f(*arguments).sum(), tensor)
        assert torch.equal(alone, with_others[i])


def test_linear_computes_live_rows_once_and_all_but_a_chunk_again(monkeypatch):
    inputs, labels, mask = linear_case()
    logits = L._logits
    rows = []

    def spy(hidden, *others):
        rows.append(len(hidden))
        logits(hidden, *others)

    monkeypatch.setattr(L, "_logits", spy)
    linear_grads(L.linear_logprobs, inputs, labels, mask=mask, chunk_rows=4)
    assert rows == [3, 4, 4, 4, 3]
    rows.clear()
    linear_grads(L.linear_logprobs, inputs, labels, mask=mask)
    assert rows == [11]
    rows.clear()
    hidden, weight, _ = inputs
    hidden.requires_grad_()
    none = torch.zeros_like(mask)
    stats = L.linear_logprobs(hidden, weight, labels, mask=none)
    stats.logprobs.sum().backward()
    assert rows == []
    assert not hidden.grad.any()
    assert not stats.confidence.any()


def autocast_grads(f, inputs, labels, mask, forward, backward):
    """The stats and gradients of f, forward and backward each under autocast or not."""
    hidden, weight, bias = inputs
    with torch.autocast(DEVICE, torch.bfloat16, enabled=forward):
        stats = f(hidden, weight, labels, bias=bias, mask=mask, chunk_rows=4)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=backward):
        loss = stats.logprobs.sum() + stats.entropy.sum()
        return [*stats, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("during", [False, True])
def test_linear_under_autocast(during):
    """The product is in bfloat16, all else in float32, wherever backward is called."""
    inputs, labels, mask = linear_case(torch.float32)
    inputs = [tensor.nan_to_num().requires_grad_() for tensor in inputs]
    case = (inputs, labels, mask)
    found = autocast_grads(L.linear_logprobs, *case, True, during)
    rounded = autocast_grads(L.naive_linear_logprobs, *case, True, False)
    exact = autocast_grads(L.naive_linear_logprobs, *case, False, False)
    for a, b, c in zip(found, rounded, exact):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 0.02 * b.abs().max()  # gradients are rounded on their way
        assert (a - c).abs().max() > 5e-4 * c.abs().max()
    outside = autocast_grads(L.linear_logprobs, *case, False, during)
    for a, b in zip(outside, exact):
        close(a, b)


def test_linear_sums_the_gradients_of_weights_in_float32():
    """1,024 rows of gradient (1/2, -1/2): a sum in bfloat16 would stay at 128."""
    kind = {"dtype": torch.bfloat16, "device": DEVICE}
    hidden = torch.ones(1024, 1, **kind)
    weight = torch.zeros(2, 1, **kind, requires_grad=True)
    bias = torch.zeros(2, **kind, requires_grad=True)
    labels = torch.zeros(1024, dtype=torch.int32, device=DEVICE)
    stats = L.linear_logprobs(hidden, weight, labels, bias=bias, chunk_rows=1)
    stats.logprobs.sum().backward()
    assert weight.grad.tolist() == [[512], [-512]]
    assert bias.grad.tolist() == [512, -512]
    assert weight.grad.dtype == torch.bfloat16


def test_linear_says_once_that_float32_sums_are_refused(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "addmm", refuse)
    device = torch.device(DEVICE)
    L._adds_in_float32.cache_clear()
    with pytest.warns(UserWarning, match="refused here .not here.: .* rounded to torch.bfloat16"):
        assert not L._adds_in_float32(torch.bfloat16, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not L._adds_in_float32(torch.bfloat16, device)
    L._adds_in_float32.cache_clear()


def test_linear_retained_graph_and_changed_weight():
    (hidden, weight, _), labels, mask = linear_case()
    weight.requires_grad_()
    stats = L.linear_logprobs(hidden, weight, labels, mask=mask, chunk_rows=4)
    loss = stats.logprobs.sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(first, second)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linear_under_compile():
    (hidden, weight, _), labels, mask = linear_case()
    weight.requires_grad_()

    def loss(weight):
        stats = L.linear_logprobs(hidden, weight * 2, labels, mask=mask, chunk_rows=4)
        return (stats.logprobs * stats.confidence[:, None] + stats.entropy).sum()

    compiled = torch.compile(loss, backend="aot_eager")
    (plain_grad,) = torch.autograd.grad(loss(weight), weight)
    (compiled_grad,) = torch.autograd.grad(compiled(weight), weight)
    assert torch.equal(plain_grad, compiled_grad)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("hidden", torch.zeros(3, 7), "do not fit"),
        ("hidden", torch.zeros(6), "do not fit"),
        ("bias", torch.zeros(5), "do not fit"),
        ("weight", torch.zeros(4, 6).half(), "one dtype"),
        ("labels", torch.zeros(2, dtype=torch.long), "must have the shape"),
        ("labels", torch.zeros(3), "int32/int64 labels"),
        ("mask", torch.ones(3), "a bool mask"),
        ("temperature", 0.0, "positive and finite"),
        ("temperature", torch.tensor([1.0, 2.0, -1.0]), "positive and finite"),
        ("chunk_rows", 0, "chunk_rows"),
    ],
)
def test_linear_refuses_in_plain_words(name, value, said):
    arguments = {
        "hidden": torch.zeros(3, 6),
        "weight": torch.zeros(4, 6),
        "labels": torch.zeros(3, dtype=torch.long),
    }
    arguments[name] = value
    with pytest.raises(ValueError, match=said):
        L.linear_logprobs(**arguments)


def test_linear_peak_memory(tmp_path):
    """In a process of its own, with the two files alone in its folder, without triton."""
    for name in ("logprob.py", "linear_logprob.py"):
        text = (ROOT / "kernels" / name).read_text()
        (tmp_path / name).write_text(text)
    code = """if True:
        import sys
        import torch
        sys.modules["triton"] = None
        from linear_logprob import *
        N, H, V = 1024, 16, 40_000  # resident memory jumps by 5 MB at times: 1.5% of this
        hidden = torch.randn(N, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        labels = torch.randint(V, (N,))

        def step():
            stats = function(hidden, weight, labels, chunk_rows=64)
            return torch.autograd.grad(stats.logprobs.sum(), (hidden, weight))

        for function in (linear_logprobs, naive_linear_logprobs):
            _, held = K._measure(step, cuda=False)
            print((held - hidden.nbytes - weight.nbytes) / (2 * 4 * N * V))
    """
    here, naive = run_python(code, tmp_path).split()  # of all logits and their gradient
    assert float(here) < 0.06
    assert float(naive) > 1


# --------------------------------------------------------------------------------------------------
# the examples in the docstrings


def test_docstrings():
    import doctest

    assert doctest.testmod(nsr).failed == doctest.testmod(evaluation_command).failed == 0
