"""Tests of nsr.py and eval.py: `pytest` runs them all on a CPU, in a few minutes."""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers

import eval as pass_at_k_command
import nsr

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
    texts = nsr.collate([nsr.Response(tokenizer(q)["input_ids"], tokenizer(a)["input_ids"],
                                      [0.0] * 14, True) for q, a in answers.items()])
    model = tiny_model(tokenizer, hidden=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        logp = nsr.token_stats(model, texts, range(FEW), temperature=1.0).logprobs
        optimizer.zero_grad()
        (-logp.sum() / texts.loss_mask.sum()).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """cli(*flags) runs nsr.py's command in this process, in an empty folder: (status, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nsr, "countdown_problems", lambda: COUNTDOWN_PROBLEMS(FEW))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["nsr.py", *map(str, flags)])
        try:
            status = nsr.command(nsr.main)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def short(base, **flags):
    """Flags of a run that takes seconds."""
    flags = dict(preset="countdown", model=base, data="countdown", steps=4, prompts=4, group_size=4,
                 eval_problems=4, eval_samples=4, save_every=2, lr=1e-3) | flags
    return [f"--{knob.replace('_', '-')}={value}" for knob, value in flags.items()]


def script(flags, cwd, **options):
    return subprocess.Popen([sys.executable, ROOT / "nsr.py", *flags], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def state(run):
    """(weights, metrics without times) of a finished run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    rows = [{k: v for k, v in row.items() if k not in TIMES}
            for row in nsr.read_log(run / "metrics.jsonl")]
    return {k: v.clone() for k, v in model.state_dict().items()}, rows


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def a_batch(model, lengths=((3, 5), (6, 2), (4, 4), (6, 7), (2, 1), (5, 3)), adv=None, seed=0):
    """A Batch of random tokens with given (prompt, response) lengths, scored by `model`."""
    rng = random.Random(seed)
    words = model.config.vocab_size
    responses = [nsr.Response([rng.randrange(words) for _ in range(p)],
                              [rng.randrange(1, words) for _ in range(r - 1)] + [0],
                              [0.0] * r, True) for p, r in lengths]
    batch = nsr.collate(responses)
    batch.adv = torch.tensor(adv or [1.0, -1.0, 0.0, -0.5, 1.0, -1.0][: len(lengths)])
    batch.old_logp = nsr.score(model, batch, nsr.Config()).logprobs
    return batch, responses


def a_run(model, tokenizer=None, **settings):
    cfg = nsr.Config(**dict(kl_coef=0.0, prompts=3, group_size=2, updates=1) | settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr)
    return nsr.Run(cfg, Path("nowhere"), [], [], [], model, tokenizer, None, optimizer)


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


def test_help_tells_every_flag_with_its_default(cli):
    with pytest.raises(SystemExit) as e:
        cli("--help")
    assert e.value.code == 0


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
])
def test_problem_layouts(row, question, answer):
    assert nsr.parse_problem(row)[:2] == (question, answer)


@pytest.mark.parametrize("row", [
    {}, {"problem": ""}, {"problem": "p"}, {"answer": "1"}, {"problem": 3, "answer": "1"},
    {"problem": "p", "solution": "none"}])
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
    train, held_out = nsr.load_problems(nsr.Config())
    assert len(held_out) == 200 and len(train) == 3800
    assert not {p.question for p in train} & {p.question for p in held_out}
    for name in ("a", "b"):
        rows = [{"problem": f"q{i}", "answer": i} for i in range(40 if name == "a" else 10)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = nsr.Config(data=str(tmp_path / "a"), eval_data=str(tmp_path / "b"), prompts=4)
    train, held_out = nsr.load_problems(cfg)
    assert (len(train), len(held_out)) == (30, 10)


def test_epochs_visit_every_problem_once():
    seen = [i for step in range(7) for i in nsr.batch_indices(step, 6, 14, seed=3)]
    for epoch in range(3):
        assert sorted(seen[14 * epoch : 14 * (epoch + 1)]) == list(range(14))
    assert seen[:14] != seen[14:28]
    assert nsr.batch_indices(0, 6, 14, seed=4) != nsr.batch_indices(0, 6, 14, seed=3)


# --------------------------------------------------------------------------------------------------
# verification


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


def test_prompts_take_the_form_that_the_model_knows(model):
    problem = nsr.parse_problem({"problem": "1 + 1?", "answer": "2"})

    def prompt(tokenizer):
        encoded = nsr.encode_prompts([problem], config_of(model, 10**6), tokenizer, 10)[0]
        return "".join(map(chr, encoded))

    user = ("1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert prompt(Words("<|im_start|>")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + user
        + "<|im_end|>\n<|im_start|>assistant\n")
    assert prompt(Words()) == "\x01" + user  # no template: the text alone, with its bos
    chat = Words()
    chat.chat_template = "some"
    assert prompt(chat) == f"<user>{user}<assistant>"  # a template writes its own bos


def config_of(model, context):
    config = transformers.Qwen2Config(max_position_embeddings=context)
    return type("Model", (), {"config": config})


def test_every_stop_token_is_known(model, tokenizer):
    config = type("Config", (), {"eos_token_id": [7, 3]})
    assert nsr.stop_tokens(type("Model", (), {"generation_config": config}), tokenizer) == [0, 3, 7]


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
    generator = torch.Generator().manual_seed(seed)
    return list(nsr.rollout(model, prompts, group_size, max_new_tokens, list(stop_ids), generator,
                            **options))


PROMPTS = [[3, 5, 7], [4, 4, 6, 8, 10, 11], [9], [12, 13, 14, 15]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rollout_logp_equals_recomputed(model, temperature):
    responses = sample(model, PROMPTS, temperature=temperature)
    batch = nsr.collate(responses)
    logp = nsr.score(model, batch, nsr.Config(temperature=temperature)).logprobs
    torch.testing.assert_close(batch.sampled_logp, logp, atol=2e-5, rtol=0)
    other = nsr.score(model, batch, nsr.Config(temperature=1.3)).logprobs
    assert (other - batch.sampled_logp).abs().max() > 0.05  # another temperature would be seen
    for r in responses:  # alone, unpadded, by plain transformers
        ids = torch.tensor([r.prompt_ids + r.ids])
        alone = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
        alone = alone[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(r.prompt_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(r.logp), alone, atol=2e-5, rtol=0)


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


def test_rollout_batched_equals_single(model):
    together = nsr.collate(sample(model, PROMPTS, group_size=1))
    for i, r in enumerate(sample(model, PROMPTS, group_size=1)):
        alone = nsr.score(model, nsr.collate([r]), nsr.Config()).logprobs[0]
        torch.testing.assert_close(together.sampled_logp[i, : len(r.ids)], alone, atol=2e-5, rtol=0)


def test_rollout_order_lengths_and_budget(model):
    responses = sample(model, PROMPTS, group_size=3)
    assert [r.prompt_ids for r in responses] == [p for p in PROMPTS for _ in range(3)]
    for r in responses:
        assert 1 <= len(r.ids) == len(r.logp) <= 8
        assert (r.ids[-1] == 0) == r.stopped and 0 not in r.ids[:-1]
    assert {r.stopped for r in responses} == {True, False}
    assert sample(model, PROMPTS, seed=1) != responses == sample(model, PROMPTS)
    for budget in (1, 40, 60):  # 1, 2 or 4 rows at once, groups cut or not
        cut = sample(model, PROMPTS, group_size=3, rollout_tokens=budget)
        assert [r.prompt_ids for r in cut] == [r.prompt_ids for r in responses]


def test_several_stop_tokens_end_a_response_and_are_kept(model):
    responses = sample(model, PROMPTS, group_size=16, stop_ids=(0, 5))
    assert {r.ids[-1] for r in responses if r.stopped} == {0, 5}
    assert all(not {0, 5} & set(r.ids[:-1]) for r in responses)


def test_sampler_draws_from_the_policy(model):
    """First tokens of many responses against the model's probabilities: a chi-square test."""
    drawn = [r.ids[0] for r in sample(model, PROMPTS[:1], group_size=4000, max_new_tokens=1)]
    p = model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1)
    counts, expected = torch.tensor(drawn).bincount(minlength=len(p)), 4000 * p
    big = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[big].sum().item()
    degrees = int(big.sum())
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def test_masks_come_from_lengths_when_pad_is_eos(model):
    """Token 0 is pad, eos and stop token: in the middle, at the end and beyond."""
    responses = [nsr.Response([0, 3, 0], [4, 0], [0.0] * 2, True),
                 nsr.Response([5], [0], [0.0], True),
                 nsr.Response([6, 7], [8, 0, 9, 1], [0.0] * 4, False)]
    batch = nsr.collate(responses)
    assert batch.loss_mask.tolist() == [[True, True, False, False], [True, False, False, False],
                                        [True] * 4]
    assert batch.attention_mask.sum(1).tolist() == [5, 2, 6]
    logp = nsr.score(model, batch, nsr.Config()).logprobs
    for i, r in enumerate(responses):
        ids = torch.tensor([r.prompt_ids + r.ids])
        alone = model(ids).logits[0, :-1].log_softmax(-1)[len(r.prompt_ids) - 1 :]
        alone = alone[torch.arange(len(r.ids)), r.ids]
        torch.testing.assert_close(logp[i, : len(r.ids)], alone, atol=2e-5, rtol=0)
        assert (logp[i, len(r.ids) :] == 0).all()


def test_micro_batches_hold_every_row_within_the_budget(model):
    batch, responses = a_batch(model)
    for budget in (1, 12, 30, 1000):
        cut = nsr.micro_batches(batch, range(6), budget)
        assert sorted(itertools.chain(*cut)) == list(range(6))
        for rows in cut:
            wide = sum(max(len(responses[i][part]) for i in rows) for part in (0, 1))
            assert len(rows) == 1 or len(rows) * wide <= budget
    assert len(nsr.micro_batches(batch, range(6), 1000)) == 1


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


TABLE = {  # advantages of one group: right; wrong with c = 0.6; wrong with c = 0.01, at t = T / 2
    "reinforce": [1, -1, -1], "psr": [1, 0, 0], "nsr": [0, -1, -1], "w-reinforce": [0.1, -1, -1],
    "a-nsr": [0.125, -1.0, -1.0], "cw-nsr": [0.1, -0.6, -0.05], "acw-nsr": [0.125, -0.6, -0.05],
    "grpo": [(1 + 1 / 3) / math.sqrt(4 / 3), (-1 + 1 / 3) / math.sqrt(4 / 3),
             (-1 + 1 / 3) / math.sqrt(4 / 3)],
}


@pytest.mark.parametrize("method", nsr.METHODS)
def test_advantage_table(method):
    cfg = nsr.Config(method=method, schedule="cosine")
    lam, beta = nsr.method_weights(cfg, cfg.steps // 2, accuracy=1 / 3)
    reward, confidence = torch.tensor([[1.0, -1, -1]]), torch.tensor([[0.9, 0.6, 0.01]])
    adv = nsr.advantages(method, reward, confidence, lam, beta)
    torch.testing.assert_close(adv, torch.tensor([TABLE[method]]).float(), atol=2e-6, rtol=0)


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
@pytest.mark.parametrize("method", nsr.METHODS)
def test_token_gradient_by_hand(method, temperature):
    """d loss / d z_v = A pi_v / denom / T, but -A (1 - pi_y) / denom / T for the sampled y."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, requires_grad=True)
    labels = torch.randint(5, (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    adv = torch.tensor(TABLE[method]).float()
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

    def right(ids):
        return sum(ids) % 2 == 1

    def expected_gradient(method, t=30):
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


@pytest.mark.parametrize("micro_tokens", [1, 20, 40, 10**6])
@pytest.mark.parametrize("regularised", [False, True])
def test_gradient_does_not_depend_on_micro_batches_or_padding(tokenizer, micro_tokens, regularised):
    """update() against one plain sum over the responses alone, without any padding."""
    model = tiny_model(tokenizer)
    batch, responses = a_batch(model)
    batch.old_logp = batch.old_logp + 0.1 * torch.randn_like(batch.old_logp) * batch.loss_mask
    batch.ref_logp = batch.old_logp + 0.3 * batch.loss_mask
    coefs = dict(entropy_coef=0.02, kl_coef=0.05) if regularised else {}
    denom, total = sum(len(r.ids) for r in responses), 0
    for i, r in enumerate(responses):
        ids, n = torch.tensor([r.prompt_ids + r.ids]), len(r.ids)
        rows = model(ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        logp = rows[torch.arange(n), r.ids]
        rho, A = (logp - batch.old_logp[i, :n]).exp(), batch.adv[i]
        total = total - torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A).sum() / denom
        if regularised:
            entropy, d = -(rows.exp() * rows).sum(-1), batch.ref_logp[i, :n] - logp
            total = total - 0.02 * entropy.sum() / denom + 0.05 * (d.exp() - 1 - d).sum() / denom
    expected = torch.autograd.grad(total, list(model.parameters()))
    run = a_run(model, micro_tokens=micro_tokens, grad_clip=1e9, lr=0.5, **coefs)
    before = [p.detach().clone() for p in model.parameters()]
    metrics = nsr.update(run, batch)
    norm = math.sqrt(sum(g.square().sum().item() for g in expected))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for p, old, g in zip(model.parameters(), before, expected):
        torch.testing.assert_close((old - p) / 0.5, g, atol=1e-5 * norm, rtol=1e-4)


def test_update_counts_the_clip_and_cuts_mini_batches(tokenizer):
    model = tiny_model(tokenizer)
    batch, _ = a_batch(model, adv=[1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    batch.old_logp = batch.old_logp - math.log(1.5) * batch.loss_mask  # rho = 1.5 everywhere
    metrics = nsr.update(a_run(model, lr=0.0, updates=3), batch)
    assert metrics["updates"] == 2  # the last mini-batch has no advantage: no evidence, no update
    assert metrics["clip_frac"] == pytest.approx((5 + 2) / (5 + 2 + 4 + 7 + 1 + 3))


def test_gradient_checkpointing_changes_nothing(tokenizer):
    grads = []
    for on in (False, True):
        model = tiny_model(tokenizer)
        if on:
            model.activation_checkpointing_enable()
        batch, _ = a_batch(model)
        nsr.update(a_run(model, lr=0.0), batch)
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_non_finite_gradient_stops_before_the_update(tokenizer):
    model = tiny_model(tokenizer)
    batch, _ = a_batch(model)
    batch.old_logp = batch.old_logp - 1000 * batch.loss_mask  # rho overflows
    batch.adv = -batch.adv.abs()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(nsr.UserError, match="not finite"):
        nsr.update(a_run(model), batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_bf16_autocast_leaves_the_weights_in_float32(tokenizer):
    model = tiny_model(tokenizer)
    batch, _ = a_batch(model)
    exact = nsr.score(model, batch, nsr.Config()).logprobs
    run = a_run(model, bf16=True)
    with nsr.autocast(run):
        rough = nsr.score(model, batch, run.cfg).logprobs
    assert 1e-4 < (rough - exact).abs().max() < 0.2 and rough.dtype == torch.float32
    nsr.update(run, batch)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# evaluation


def test_pass_at_k_equals_brute_force():
    for n in range(1, 11):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            share = sum(min(draw) < c for draw in draws) / len(draws)  # 0 .. c - 1 are right
            assert nsr.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-15)
    for c, k in ((1, 128), (3, 17), (250, 2), (0, 256), (256, 1)):
        exact = 1 - Fraction(math.comb(256 - c, k), math.comb(256, k))
        assert nsr.pass_at_k(256, c, k) == pytest.approx(float(exact), abs=1e-15)
    assert pass_at_k_command.pass_at_k is nsr.pass_at_k
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError):
            nsr.pass_at_k(n, c, k)


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
    samples = nsr.read_log(Path("out/a-nsr-1/samples.jsonl"))
    assert 0 < len(samples) <= 10
    for s in samples:
        assert nsr.verify_countdown(s["response"], s["answer"]) is s["right"]
    assert out.count("are cut at --max-new-tokens") == 1  # said once, not every step


def test_entropy_is_the_entropy(tokenizer):
    model = tiny_model(tokenizer)
    for p in model.parameters():
        torch.nn.init.zeros_(p)  # every token is as likely as any other
    batch, _ = a_batch(model)
    entropy = nsr.score(model, batch, nsr.Config()).entropy
    torch.testing.assert_close(entropy[batch.loss_mask],
                               torch.full((22,), math.log(len(tokenizer))))


def test_silent_failures_are_said_once(cli, base, tmp_path):
    rows = [{"problem": f"{i} 2 3 4 = 9", "answer": "none"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = cli(*short(base, data="data.jsonl", method="psr", steps=3))
    assert out.count("all responses are wrong") == 1 and out.count("nothing to learn") == 1
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
    (["--name=a/b"], "--name a/b"),
    (["--device=cuda:99"], "--device cuda:99"),
    (["--device=quantum"], "--device quantum"),
    (["--resume=out/none"], "out/none"),
])
def test_bad_input_is_one_line_and_status_2(cli, base, tmp_path, monkeypatch, flags, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = json.dumps({"problem": "1 2 3 4 = 9", "answer": "9"}) + "\n"
    (tmp_path / "bad.jsonl").write_text(good + "{\n")
    (tmp_path / "half.jsonl").write_text('{"problem": "p"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
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
    assert "Pass@k on 4 held-out problems" in out
    return cwd / "out/a-nsr-1"


def test_checkpoint_loads_anywhere(finished):
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "checkpoint")
    ids = tokenizer("1 2 3 4 = 10", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize("signum, after", [
    (signal.SIGKILL, 1), (signal.SIGKILL, 3), (signal.SIGKILL, 5), (signal.SIGTERM, 3),
    (signal.SIGINT, 2)])
def test_stopped_and_resumed_run_is_bit_identical(base, finished, tmp_path, signum, after):
    process = script(short(base, steps=6, eval_every=3, updates=2, name="run"), tmp_path)
    run, deadline = tmp_path / "out/run", time.time() + 120
    while len(nsr.read_log(run / "metrics.jsonl")) <= after and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    if signum != signal.SIGKILL:
        assert process.returncode == 130 and "--resume out/run" in err
        saved = torch.load(run / "checkpoint/trainer.pt")["step"]
        assert saved == max(row["step"] for row in nsr.read_log(run / "metrics.jsonl"))
    resumed = script(["--resume=out/run"], tmp_path)
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and not err, err
    assert same(state(run), state(finished))
    assert (run / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


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


def test_signal_is_held_back_while_weights_change():
    seen = []
    with pytest.raises(KeyboardInterrupt):
        with nsr.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("whole")
    assert seen == ["whole"]


# --------------------------------------------------------------------------------------------------
# the examples in the docstrings


def test_docstrings():
    import doctest
    assert doctest.testmod(nsr).failed == 0
