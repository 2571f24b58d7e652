"""Pass@k of one or several models on one or several problem sets.

    python eval.py out/a-nsr-1 out/psr-1                          # held-out countdown problems
    python eval.py countdown out/a-nsr-1                          # ... beside the base policy
    python eval.py Qwen/Qwen2.5-Math-1.5B out/NAME --data math500 aime2025 -n 64
    python eval.py --rescore responses.jsonl                      # verify stored responses again

The code of rollout, verification and estimate is that of training, imported from nsr.py.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path

import torch

from nsr import (Config, UserError, command, encode_prompts, evaluate, extract_answer, load_model,
                 load_problems, parse_answer, pass_at_k, pass_table, pick_device, read_problems,
                 verify, verify_countdown)

SAMPLING = {  # what training samples with, and what the papers evaluate MATH with
    True: dict(temperature=1.0, top_p=1.0, max_new_tokens=Config.max_new_tokens),
    False: dict(temperature=0.6, top_p=0.95, max_new_tokens=3072),
}


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("models", nargs="*", metavar="MODEL", help="a directory, out/NAME of a run, a hub name, "
         "or countdown for the embedded base policy")
    flag("--data", nargs="+", default=["countdown"], metavar="NAME_OR_FILE",
         help="problem sets, named as for nsr.py --data [countdown: 100 held-out problems]")
    flag("-n", type=int, default=256, help="responses to each problem [256]")
    flag("--problems", type=int, help="only so many problems of each set [all]")
    flag("--temperature", type=float, help="[0.6; 1.0 on countdown]")
    flag("--top-p", type=float, help="mass of the likeliest tokens to draw from [0.95; 1.0 on "
         "countdown]")
    flag("--max-new-tokens", type=int, help="longest response in tokens [3072; 20 on countdown]")
    flag("--rollout-tokens", type=int, default=2**16, help="most tokens in the KV cache [65536]")
    flag("--seed", type=int, default=0, help="decides every random draw [0]")
    flag("--rescore", metavar="FILE", help="no sampling: verify the responses of a JSON Lines file "
         "again, samples.jsonl or {question_id, response, gold_answer, label} a line")
    flag("--device", default="", help="cpu, cuda, cuda:1, ... [cuda if there is one, else cpu]")

    def error(message):
        raise UserError(f"{message}; see --help")

    parser.error = error
    args = parser.parse_args()
    if bool(args.models) == bool(args.rescore):
        raise UserError("give models to evaluate, or a file to --rescore; see --help")
    for name in ("n", "problems", "temperature", "top_p", "max_new_tokens", "rollout_tokens"):
        if not (getattr(args, name) is None or getattr(args, name) > 0):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    return args


def rescore(path):
    """Verify the stored responses of a file again, and print what changes. Raises UserError."""
    changed, verdicts, unparsed = [], collections.defaultdict(list), 0
    try:
        for row in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
            gold = str(row["gold_answer"] if "gold_answer" in row else row["answer"])
            check = verify_countdown if re.fullmatch(r"[1-9 ]+ = \d+", gold) else verify
            correct, before = check(row["response"], gold), row.get("label", row.get("correct"))
            question = row["question_id"] if "question_id" in row else row["question"]
            verdicts[question].append(correct)
            answer = extract_answer(row["response"])
            unparsed += answer is not None and parse_answer(answer) is None
            if before is not None and bool(before) != correct:
                changed.append(f"  {'now' if correct else 'no longer'} correct: {answer!r} "
                               f"for {gold!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"--rescore {path}: cannot read it ({type(e).__name__}: {e}); a line needs "
                        "response, answer or gold_answer, and question or question_id") from e
    if not verdicts:
        raise UserError(f"--rescore {path}: it is empty")
    total = sum(map(len, verdicts.values()))
    print(f"{total} responses to {len(verdicts)} questions: {sum(map(sum, verdicts.values()))} "
          f"correct, {unparsed} with a box that does not parse, {len(changed)} changed")
    print(*changed, sep="\n", end="\n" * bool(changed))
    if "question_id" not in row:  # samples.jsonl: picked by verdict, so no estimate of Pass@k
        return 0
    n = min(map(len, verdicts.values()))
    scores = {k: sum(pass_at_k(len(v), sum(v), k) for v in verdicts.values()) / len(verdicts)
              for k in (2**i for i in range(n.bit_length()))}
    print(*pass_table([(path, scores)]), sep="\n")
    return 0


def main():
    """`python eval.py`: a table of Pass@k for every problem set; 130 when stopped."""
    args = parse_flags()
    if args.rescore:
        return rescore(args.rescore)
    device = pick_device(args.device)
    sets = {name: load_problems(Config())[1][: Config.eval_problems] if name == "countdown" else
            read_problems(name) for name in args.data}  # all, before the first is sampled from
    tables = {data: [] for data in sets}
    try:
        for name in args.models:
            model, tokenizer = load_model(name, device)
            for data, problems in sets.items():
                sampling = {knob: getattr(args, knob) or default
                            for knob, default in SAMPLING[data == "countdown"].items()}
                cfg = Config(max_new_tokens=sampling["max_new_tokens"])
                problems = encode_prompts(problems[: args.problems], model, tokenizer, cfg)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
                    tables[data].append((name, evaluate(
                        model, tokenizer, *problems, args.n, (args.seed, data), f"{name} on {data}",
                        rollout_tokens=args.rollout_tokens, **sampling)))
    finally:  # Ctrl-C keeps what is complete
        for data, rows in tables.items():
            if rows:
                sampling = ", ".join(f"{knob} {getattr(args, knob) or default:g}" for knob, default
                                     in SAMPLING[data == "countdown"].items())
                print(f"\nPass@k on {data}, {args.n} responses to each problem, {sampling}:")
                print(*pass_table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
