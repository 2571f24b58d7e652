"""Pass@k of one or several models on one or several problem sets, as a paper quotes it.

    python eval.py countdown out/a-nsr-1                     # the problems that training held out
    python eval.py countdown out/*-s[0-9] --group --compare  # the seeds of a method as one
    python eval.py MODEL --data math500 -n 64 --save out/t   # also t.md, t.csv, t.png and t.svg
    python eval.py --rescore out/eval/*.jsonl                # verify stored responses again
    python eval.py out/*-s[0-9] --group --log Pass@1:Pass@256 step:beta --save out/t  # training

Every response is kept, a line of out/eval/MODEL--DATA.jsonl, and every number is taken from there;
what is there is not sampled again. Rows have the fields of the NSR authors' files, and more.
"""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import torch

import nsr
from nsr import Config, UserError, digits

SAMPLING = {  # on countdown: what training samples with; else what the papers evaluate MATH with
    True: dict(temperature=1.0, top_p=1.0, max_new_tokens=Config.max_new_tokens),
    False: dict(temperature=0.6, top_p=0.95, max_new_tokens=3072)}
SETTINGS = "model", "weights", "data", "n", *SAMPLING[True]  # in every row that is sampled here
FIELDS = {"question_id", "generation_id", "response", "gold_answer", "label"}  # in every row
# Student's t at 97.5% by degrees of freedom; from 10 on it is 1.96 + 2.5 / n, to within 1%
STUDENT_T = np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262
COLORS = "#000000 #0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()  # of Okabe and Ito


def parse_flags():
    """The flags of the command line, checked. Raises UserError."""
    parser = nsr.flag_parser(__doc__)
    flag = parser.add_argument
    flag("models", nargs="*", metavar="MODEL", help="a directory, out/NAME, a hub name, countdown, "
         "countdown-strong")
    flag("--data", nargs="+", metavar="SET", help="[countdown; else math-test aime2025 amc23]")
    flag("-n", type=int, default=256, help="responses to each problem [256]")
    flag("-k", type=int, nargs="+", metavar="K", help="columns of the table [1 2 4 ... n]")
    flag("--problems", type=int, help="only so many of each set, drawn at random [all]")
    flag("--temperature", type=float, help="[0.6; 1 on countdown]")
    flag("--top-p", type=float, help="draw from the likeliest of this mass [0.95; 1 on countdown]")
    flag("--max-new-tokens", type=int, help="longest response in tokens [3072; 20 on countdown]")
    flag("--rollout-tokens", type=int, default=2**16, help="most tokens in the KV cache [65536]")
    flag("--seed", type=int, default=0, help="decides every random draw [0]")
    flag("--compare", action="store_true", help="also the paired differences to the first model")
    flag("--group", action="store_true", help="NAME-s0, NAME-s1, ... are seeds of one model")
    flag("--save", metavar="NAME", help="also write NAME.md, NAME.csv, NAME.png and NAME.svg")
    flag("--log", nargs="+", metavar="X:Y", help="sample none; draw Y against X along the training "
         "of each MODEL (out/NAME), keys of its metrics.jsonl or Pass@1, ...; a table of last Y "
         "(flags of sampling do nothing)")
    flag("--at", nargs="+", type=float, metavar="X", help="with --log: Y where X is first reached")
    flag("--out", default="out/eval", metavar="DIR", help="where responses are kept [out/eval]")
    flag("--rescore", nargs="+", metavar="FILE", help="sample none; verify again what files hold")
    flag("--device", default="", help="cpu, cuda, cuda:1, ... [cuda if there is one, else cpu]")
    args = parser.parse_args()
    if bool(args.models) == bool(args.rescore) or args.log and not args.models:
        parser.error("give models to evaluate, the runs (first) of --log, or files to --rescore")
    for pair in args.log or ():
        if not re.fullmatch("[^:]+:[^:]+", pair):
            parser.error(f"--log {pair}: not X:Y, as step:entropy is")
    if args.at and not args.log:
        parser.error("--at goes with --log X:Y")
    if args.log and not args.at and len({p.partition(":")[2] for p in args.log}) < len(args.log):
        parser.error("--log: two X:Y with one Y, whose last value the table has once; ask twice")
    for name in "-n --problems --temperature --top-p --max-new-tokens --rollout-tokens".split():
        if (value := getattr(args, name.strip("-").replace("-", "_"))) is not None and value <= 0:
            parser.error(f"{name} {value}: must be above 0")
    if args.k and not (0 < min(args.k) and (args.rescore or max(args.k) <= args.n)):
        parser.error(f"-k {max(args.k)}: Pass@k takes k of the -n {args.n} responses")
    return args


def sample(path, title, model, tokenizer, problems, prompts, settings, args, **sampling):
    """Append to `path` the responses that it lacks, drawn as `sampling` says."""
    n = settings["n"]
    seeds = [[nsr.seed_of(args.seed, p.question, j) for j in range(n)] for p in problems]
    expected = (settings | {"question_id": p.question, "gold_answer": p.answer, "seed": seed}
                for p, group in zip(problems, seeds) for seed in group)
    rows = nsr.read_log(path)
    for number, (row, wanted) in enumerate(zip(rows, expected), 1):
        for key in (key for key, value in wanted.items() if row.get(key) != value):
            raise UserError(f"{path}, line {number}: {key} is {row.get(key)!r}, not {wanted[key]!r}"
                            ": no mixed models or settings in a file; move it, or give --out DIR")
    # Rounding depends on the batch, so problems are sampled in chunks that are always the same, and
    # a chunk that a kill left unfinished is sampled again: the file ends the same, byte for byte.
    longest, done = max(map(len, prompts)) + sampling["max_new_tokens"], len(rows) // n
    chunk = max(1, 4 * args.rollout_tokens // (n * longest))
    if done < len(problems):
        done -= done % chunk
        nsr.write_log(path, rows[: done * n])
    for group in nsr.sample_groups(
            model, tokenizer, problems, prompts, seeds, title, chunk=chunk, done=done,
            correct=sum(row["label"] for row in rows[: done * n]),
            rollout_tokens=args.rollout_tokens, **sampling):
        nsr.append_log(path, [settings | row for row in group])


def evaluate(name, sets, args, started, done):
    """Sample from a model what its files lack; their paths are appended to started, then done."""
    model, tokenizer = nsr.load_model(name, nsr.pick_device(args.device))
    bits = f"{sum(int(p.detach().view(torch.int32).sum()) for p in model.parameters()) % 2**64:x}"
    for data, problems in sets.items():
        sampling = {knob: getattr(args, knob) or default
                    for knob, default in SAMPLING[data == "countdown"].items()}
        settings = {"model": name, "weights": bits, "data": data, "n": args.n, **sampling}
        what = model, tokenizer, *nsr.encode_prompts(
            problems, model, tokenizer, Config(max_new_tokens=sampling["max_new_tokens"]))
        file = "--".join(re.sub(r"[^\w.-]+", "-", part).strip("-.")[-99:] for part in (name, data))
        path, title = Path(args.out, f"{file}.jsonl"), f"{name} on {data}"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
            sample(path.parent / "greedy" / path.name, f"{title}, greedy", *what,
                   settings | {"n": 1, "temperature": 0.0, "top_p": 1.0}, args,
                   **sampling | {"temperature": 1.0, "top_p": 1e-9})  # a nucleus of one token
            started.append(path)
            sample(path, title, *what, settings, args, **sampling)
            done.append(path)


def load(path, again, ks=None):
    """(settings, {question_id: tally}) of a file of responses, of the problems that have all.

    again: verdicts are made anew, and those that change are printed. Raises UserError.
    """
    groups, rows, changed = {}, nsr.read_log(path), []
    if not rows or not all(row.keys() >= FIELDS for row in rows):
        raise UserError(f"{path}: no such file, or a line lacks one of {', '.join(sorted(FIELDS))}")
    settings = {key: rows[0].get(key) for key in SETTINGS}
    for row in rows:
        if again:
            check = nsr.verify_countdown if row.get("data") == "countdown" else nsr.verify
            before, row["label"] = row["label"], check(row["response"], row["gold_answer"])
            row["pred_answer"] = nsr.extract_answer(row["response"])
            if row["label"] != bool(before):
                changed.append(f"  {row['label']}: {row['pred_answer']!r} / {row['gold_answer']!r}")
        group = groups.setdefault(str(row["question_id"]), {})
        if str(row["generation_id"]) in group or any(row.get(k) != v for k, v in settings.items()):
            raise UserError(f"{path}: mixed models in one file, or one twice, at question "
                            f"{row['question_id']!r}, generation {row['generation_id']}")
        group[str(row["generation_id"])] = row
    if again:
        print(f"{path}: {len(rows)} responses, {len(changed)} verdicts changed", *changed, sep="\n")
    n = settings["n"] or min(map(len, groups.values()))
    if ks and max(ks) > n:
        raise UserError(f"{path}: Pass@{max(ks)} takes more than its {n} responses to a problem")
    greedy = path.parent / "greedy" / path.name
    greedy = load(greedy, again)[1] if greedy.exists() else {}
    return settings | {"path": str(path), "model": settings["model"] or str(path),
                       "data": settings["data"] or path.stem}, {
        i: nsr.tally([*group.values()][:n], ks) | (
            {"greedy": greedy[i]["Pass@1"]} if i in greedy else {})
        for i, group in groups.items() if len(group) >= n}


@np.errstate(invalid="ignore")  # where none of the problems counts, a mean is 0 / 0: nan
def bootstrap(groups, resamples=10_000):
    """(values, resampled values): (groups, columns), (resamples, groups, columns) float64.

    groups: of (seeds, P, columns), nan where a problem does not count. Problems and seeds are drawn
    with replacement, the same problems for all groups, so that differences are paired.
    """
    parts = [(np.nan_to_num(group), ~np.isnan(group) + 0.0) for group in groups]
    rng, count, means = np.random.default_rng(0), groups[0].shape[1], []
    for r in range(resamples + 1):  # the first: all once
        share = np.bincount(rng.integers(count, size=count) if r else range(count), minlength=count)
        by_seed = [(share @ score) / (share @ known) for score, known in parts]
        means.append([m[rng.integers(len(m), size=len(m)) if r else ...].mean(0) for m in by_seed])
    return np.array(means[0]), np.array(means[1:])


def label_of(name, args):
    """What tables and pictures call a model: with --group, NAME of DIR/NAME-s0, else all of it."""
    return re.sub(r"^.*/|-s\d+$", "", name) if args.group else name


def report(found, args):
    """Print the tables of `found`, pairs (settings, tallies), and write what --save asks for."""
    page, panels, records = "", [], []
    for data in dict.fromkeys(settings["data"] for settings, _ in found):
        of, models, about = {}, {}, {}
        for settings, tallies in found:
            if settings["data"] == data:
                name = settings["path" if settings["model"] in of else "model"]
                of[name] = tallies
                models.setdefault(label_of(name, args), []).append(name)
                about |= {", ".join(f"{k} {settings[k]}" for k in SETTINGS[3:] if settings[k]): 0}
        ids = [i for i in [*of.values()][0] if all(i in tallies for tallies in of.values())]
        if not ids:
            raise UserError(f"{data}: no problem to which all models have all their responses")
        columns = sorted({c: 0 for tallies in of.values() for i in ids for c in tallies[i]},
                         key=lambda c: c * (":" in c))  # level and subject by name
        groups = [np.array([[[of[name][i].get(c, np.nan) for c in columns] for i in ids]
                            for name in names], float) for names in models.values()]
        (values, means), labels, count = bootstrap(groups), [*models], len(models)
        if args.compare:
            labels += [f"{label} - {labels[0]}" for label in labels[1:]]
            values = np.concatenate([values, values[1:] - values[0]])
            means = np.concatenate([means, means[:, 1:] - means[:, :1]], axis=1)
        numbers = np.array([values, *np.nanpercentile(means, [2.5, 97.5], axis=0)])
        records += [(data, label, *row) for g, label in enumerate(labels)
                    for row in zip(columns, *numbers[:, g])]
        page += (f"{data}, {len(ids)} problems, {' or '.join(about)}; below each its 95% interval, "
                 f"by bootstrap over problems and seeds{'; * excludes 0' * args.compare}:\n\n")
        kinds = [re.match("Pass@|level: |subject: |", column)[0] for column in columns]
        for kind in dict.fromkeys(kinds):
            part = [j for j, other in enumerate(kinds) if other == kind]
            rows = [[kind.rstrip(": "), *(columns[j].removeprefix(kind) for j in part)]]
            for g, label in enumerate(labels):
                rows, gap = rows + [[label], [""]], g >= count
                for j, (value, low, high) in zip(part, numbers[:, g, part].T):
                    best = kind == "Pass@" and value == values[:count, j].max() and count > 1
                    bold, star = "**" * bool(best and not gap), "*" * bool(gap and low * high > 0)
                    rows[-2].append(bold + digits(value, "+" * gap) + star + bold)
                    rows[-1].append(f"{digits(low)} {digits(high)}")
            page += "\n".join([*nsr.table(rows), "", ""])
            if kind == "Pass@":
                ks = [int(k) for k in rows[0][1:]]
                panels.append((dict(title=f"{data}, {len(ids)} problems", xlabel="k",
                                    ylabel="Pass@k", xticks=ks, xticklabels=ks),
                               [(label, ks, numbers[0, g, part], numbers[1:, g, part], ())
                                for g, label in enumerate(models)]))
    publish(page, panels, records, args)


def crossing(points, x):
    """What the other columns are where the first is first x, linear between points; else nan.

    >>> crossing(np.array([[0.0, 10], [2, 30], [1, 50]]), 1.5)
    array([25.])
    """
    for (x0, *y0), (x1, *y1) in zip(points, [*points[1:], points[-1]]):
        if min(x0, x1) <= x <= max(x0, x1):
            return np.array(y0) + (x - x0) / (x1 - x0 or 1) * np.subtract(y1, y0)
    return np.full(points.shape[1] - 1, np.nan)


def read_points(run, x, y):
    """{step: (x, y) or (x, y0, y1, ...)} of a run's metrics.jsonl. Raises UserError."""
    rows = nsr.read_log(log := Path(run, "metrics.jsonl"))
    for row in rows:
        row |= row.pop("time", {}) | {
            f"Pass@{k}": score for k, score in row.pop("pass_at_k", {}).items()}
    found = [row for row in rows
             if None not in (row.get(x), row.get(y)) and not isinstance(row[x], list)]
    if not found:
        keys = ", ".join(dict.fromkeys(key for row in rows for key in row))
        raise UserError(f"--log {x}:{y}: no line of {log} has both, X a number; the keys there are "
                        f"{keys or 'none: is it the directory of a run?'}")
    found = [row for row in found if "steps" in row] or found  # of a key of both, training's
    return {row["step"]: np.append(row[x], row[y]) for row in found}


def report_log(args):
    """Print the table that --log asks for, and write what --save asks for."""
    runs, panels, cells = {}, [], {}
    for run in dict.fromkeys(name.rstrip("/") for name in args.models):
        runs.setdefault(label_of(run, args), []).append(run)
    for x, y in (pair.partition(":")[::2] for pair in args.log):
        panels.append((dict(xlabel=x, ylabel=y), []))
        for label, names in runs.items():
            found = [read_points(name, x, y) for name in names]
            steps = sorted(set.intersection(*map(set, found)))
            if not steps:
                raise UserError(f"{label}: {x} and {y} of its seeds have no step in common")
            seeds = np.array([[points[step] for step in steps] for points in found])
            mean = seeds.mean(0)
            panels[-1][1].append((label, mean[:, 0], mean[:, 1:], (), seeds))
            named = {f"{y} at {x} {at:g}": [crossing(points, at) for points in seeds]
                     for at in args.at or ()} or {y: seeds[:, -1, 1:]}
            for name, values in named.items():
                for j, ends in enumerate(np.transpose(values)):  # of a column, (seeds,)
                    column = f"{name}[{j}]" if mean.shape[1] > 2 else name
                    cells.setdefault(column, {})[label] = ends
    rows, records = [["", *cells], *([label] for label in runs)], []
    for column, ends_of in cells.items():  # one variance: two or three seeds say little of it
        errors = [ends - ends.mean() for ends in ends_of.values() if not np.isnan(ends).any()]
        freedom = sum(len(error) - 1 for error in errors)
        t = STUDENT_T[freedom] if freedom < 10 else 1.96 + 2.5 / freedom
        spread = (sum(error @ error for error in errors) / max(1, freedom)) ** 0.5
        for row, (label, ends) in zip(rows[1:], ends_of.items()):
            half, value = t * spread / len(ends) ** 0.5, ends.mean()
            low, high = value - half, value + half
            records.append(("log", label, column, value, low, high))
            row.append(digits(value) + f" ({digits(low)} {digits(high)})" * bool(low <= high))
    page = ("Where X first crosses a value, linear between points (-: some seed never does)"
            if args.at else "Last values")
    if args.group:
        page += ", mean over seeds, 95% interval by Student's t with one variance for all rows"
    publish("\n".join([f"{page}:\n", *nsr.table(rows), ""]), panels, records, args)


def publish(page, panels, records, args):
    """Print the page, and write it, the panels and the records if --save asks for it."""
    style = "  \033[1m\\1\033[0m  " if sys.stdout.isatty() else r"  \1  "
    print("\r\033[K" * sys.stdout.isatty() + re.sub(r"\*\*(\S+)\*\*", style, page), end="")
    if args.save and panels:
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        picture(panels, args.save)
        Path(f"{args.save}.md").write_text(page)
        with open(f"{args.save}.csv", "w", newline="") as file:
            csv.writer(file).writerows(["data,model,measure,value,low,high".split(","), *records])


def picture(panels, name):
    """Draw panels side by side as NAME.png and NAME.svg, with one legend.

    A panel is (settings of its axis, curves), a curve (label, x, y, band, seeds): band is () or the
    interval (low, high), seeds are arrays (points, columns) of x and y, drawn faintly.
    """
    from matplotlib.figure import Figure  # slow to import
    labels = [*dict.fromkeys(label for _, curves in panels for label, *_ in curves)]
    beside, lines = 1 + len(labels) // 20, {}
    figure = Figure(figsize=(5.5 * len(panels) + 2 * beside, 4.2), layout="constrained")
    for axis, (settings, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        if settings["xlabel"] == "k":
            axis.set_xscale("log", base=2)
        for label, x, y, band, seeds in curves:
            turn, i = divmod(labels.index(label), 7)
            color, ls = COLORS[i], ("-", "--", "-.", ":")[turn % 4]
            if len(band):
                axis.fill_between(x, *band, color=color, alpha=0.15, lw=0)
            for points in seeds:
                axis.plot(points[:, 0], points[:, 1:], color=color, alpha=0.3, lw=0.7)
            marker = "osD^vPX"[i] if len(x) < 50 else ""
            line, *_ = axis.plot(x, y, color=color, ls=ls, ms=5, marker=marker)
            lines.setdefault(label, line)
        axis.set(**settings)
        axis.grid(alpha=0.3)
    figure.legend(lines.values(), lines, loc="outside right upper", ncols=beside)
    for kind in ("png", "svg"):
        figure.savefig(f"{name}.{kind}", dpi=200)


def main():
    """`python eval.py`: 0 when all is sampled, 130 when stopped; both print what is complete."""
    args, status, started, done = parse_flags(), 0, [], []
    if args.log:
        report_log(args)
        return 0
    for name in args.models:
        nsr.model_path(name)  # before data is downloaded
    runs = [Path(name, "config.json") for name in args.models if name not in nsr.BASES]
    own = all('"data": "countdown"' in run.read_text() if run.exists() else run.parts[0] == "out"
              for run in runs)
    sets = {} if args.rescore else {  # all, before the first is sampled
        data: (nsr.load_problems(Config())[1] if data == "countdown" else
               nsr.shuffled_problems(data))[: args.problems]
        for data in args.data or (["countdown"] if own else ["math-test", "aime2025", "amc23"])}
    try:
        for name in dict.fromkeys(name.rstrip("/") for name in args.models):
            evaluate(name, sets, args, started, done)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        status = 130
    files = done or [path for path in started if path.exists() and path.stat().st_size]
    report([load(path, args.rescore, args.k)
            for path in files or map(Path, args.rescore or ())], args)
    return status


if __name__ == "__main__":
    sys.exit(nsr.command(main))
