"""Pass@k of one or several models on one or several problem sets.

    python eval.py out/a-nsr-1 out/psr-1                          # held-out countdown problems
    python eval.py countdown out/a-nsr-1                          # ... beside the base policy
    python eval.py Qwen/Qwen2.5-Math-1.5B out/NAME --data math500 aime2025 -n 64

Sampling, verification and the estimate are those of training, imported from nsr.py.
"""

import argparse
import sys

import torch

from nsr import (Config, UserError, command, evaluate, load_model, load_problems, pass_at_k,
                 pass_table, read_problems)

SAMPLING = {  # what training samples with, and what the papers evaluate MATH with
    True: dict(temperature=1.0, top_p=1.0, max_new_tokens=Config.max_new_tokens),
    False: dict(temperature=0.6, top_p=0.95, max_new_tokens=3072),
}


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("models", nargs="+", metavar="MODEL", help="a directory, out/NAME of a run, a hub name, "
         "or countdown for the embedded base policy")
    flag("--data", nargs="+", default=["countdown"], metavar="NAME_OR_FILE",
         help="problem sets, named as for nsr.py --data [countdown: its held-out problems]")
    flag("-n", type=int, default=256, help="responses to each problem [256]")
    flag("--problems", type=int, help="only so many problems of each set [all]")
    flag("--temperature", type=float, help="[0.6; 1.0 on countdown]")
    flag("--top-p", type=float, help="mass of the likeliest tokens to draw from [0.95; 1.0 on "
         "countdown]")
    flag("--max-new-tokens", type=int, help="longest response in tokens [3072; 20 on countdown]")
    flag("--rollout-tokens", type=int, default=2**16, help="most tokens in the KV cache [65536]")
    flag("--seed", type=int, default=0, help="decides every random draw [0]")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")

    def error(message):
        raise UserError(f"{message}; see --help")

    parser.error = error
    args = parser.parse_args()
    for name in ("n", "problems", "temperature", "top_p", "max_new_tokens", "rollout_tokens"):
        if not (getattr(args, name) is None or getattr(args, name) > 0):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    return args


def main():
    """`python eval.py`: a table of Pass@k for every problem set; 130 when stopped."""
    args = parse_flags()
    sets = {name: load_problems(Config())[1] if name == "countdown" else read_problems(name)
            for name in args.data}  # all are read before the first is sampled from
    loaded = [(name, *load_model(name, args.device)) for name in args.models]
    for data, problems in sets.items():
        problems, rows = problems[: args.problems], []
        sampling = {knob: getattr(args, knob) or default
                    for knob, default in SAMPLING[data == "countdown"].items()}
        try:
            for name, model, tokenizer in loaded:
                kind = model.device.type
                generator = torch.Generator(model.device).manual_seed(args.seed)
                with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
                    rows.append((name, evaluate(
                        model, tokenizer, problems, args.n, generator=generator, title=name,
                        rollout_tokens=args.rollout_tokens, **sampling)))
        except KeyboardInterrupt:
            print("\nstopped; what is complete:")
        if rows:
            print(f"\nPass@k on {len(problems)} problems of {data}, {args.n} responses each, "
                  + ", ".join(f"{knob} {value:g}" for knob, value in sampling.items()))
            print(*pass_table(rows), sep="\n")
        if len(rows) < len(loaded):
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
