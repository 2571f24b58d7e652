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
import hashlib
import itertools
import re
import sys
import time
from argparse import ArgumentTypeError
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import nsr
from nsr import Config, UserError

FIELDS = {"question_id", "generation_id", "response", "gold_answer", "label"}  # in every row
# in every row that is sampled here; the last four say how
SETTINGS = "model weights data answer_pattern verifier n temperature top_p max_new_tokens".split()
# flags of nsr.py; all but the last two say how problems are read, asked and checked
NSR_FLAGS = (
    "question_key answer_key instruction system answer_pattern verifier max_prompt_tokens seed "
    "device"
).split()
# Student's t at 97.5% by degrees of freedom; from 10 on it is 1.96 + 2.5 / n, to within 1%
STUDENT_T = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLORS = "#000000 #0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()  # of Okabe and Ito


def above_zero(text):
    """int(text), refused by argparse where it is not above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


@dataclass
class Flags:
    """What is asked for, each field a flag: top_p is --top-p; the comments are --help.

    A field's type is what reads its text, as argparse's `type` is.
    """

    data: list[str] = None  # problem sets [what a run held out; else MATH, AIME, AMC]
    n: above_zero = 256  # responses to each problem
    k: list[above_zero] = None  # columns of the table [1 2 4 ... n]
    problems: above_zero = None  # only so many of each set, drawn at random [all]
    temperature: float = None  # [0.6; on what a run held out, its own]
    top_p: float = None  # draw from the likeliest of this mass [0.95; 1 likewise]
    max_new_tokens: int = None  # longest response in tokens [3072; the run's likewise]
    rollout_tokens: above_zero = 2**16  # most tokens in the KV cache
    compare: bool = False  # also the paired differences to the first model
    group: bool = False  # NAME-s0, NAME-s1, ... are seeds of one model
    save: str = ""  # also write SAVE.md, SAVE.csv, SAVE.png and SAVE.svg
    log: list[str] = None  # X:Y or X:Y,Z: draw Y against X of metrics.jsonl; a table of last Y
    at: list[float] = None  # with --log X:Y: Y where X is first AT
    out: str = "out/eval"  # directory where responses are kept
    rescore: list[Path] = None  # sample none; verify again what files hold


def parse_flags():
    """The flags of the command line, checked. Raises UserError."""
    parser = nsr.flag_parser(__doc__)
    parser.add_argument("models", nargs="*", help="directory, out/NAME, hub name, countdown[-hard]")
    nsr.add_flags(parser, Flags)
    nsr.add_flags(parser, Config, NSR_FLAGS)
    args = parser.parse_args(namespace=Flags())
    args.given = {  # fields of Config: they go before a run's settings and the papers'
        name: value
        for name, value in vars(args).items()
        if name in (*NSR_FLAGS, "temperature", "max_new_tokens") and value is not None
    }
    # the other settings are a run's; here there is no batch to divide among ranks
    nsr.check(Config(**args.given, prompts=nsr.WORLD_SIZE, updates=1))
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: is a share, above 0 and 1 at most")
    if bool(args.models) == bool(args.rescore):
        parser.error("give models to evaluate, the runs (first) of --log, or files to --rescore")
    if args.at and not args.log:
        parser.error("--at goes with --log X:Y")
    if args.k and max(args.k) > args.n and not args.rescore:
        parser.error(f"-k {max(args.k)}: Pass@k takes k of the -n {args.n} responses")
    args.models = [*dict.fromkeys(name.rstrip("/") for name in args.models)]
    return args


# --------------------------------------------------------------------------------------------------
# sampling


def sample_models(args):
    """Sample what the files of responses lack: (files to report, exit status 0 or 130).

    Where Ctrl-C stops it the files are those that are complete, else what there is of the first.
    Raises UserError.
    """
    runs = {}  # {set: Config of the first run that held it out}
    for name in args.models:
        nsr.model_config(name)  # before data is downloaded
        cfg = run_config(name, args)
        if not cfg:
            continue
        first = runs.setdefault(cfg.eval_data or cfg.data, cfg)
        if cfg.verifier != first.verifier:
            raise UserError(
                f"{name} has another --verifier ({cfg.verifier or 'ours'}) than the models before "
                f"it ({first.verifier or 'ours'}): give one for all"
            )
    sets = {}  # {name: (problems, Config or None)}, all before the first is sampled
    for name in args.data or runs or ["math-test", "aime2025", "amc23"]:
        sets |= problem_set(name, runs, args)
    begun, done = [], []
    try:
        for name in args.models:
            sample_sets(name, sets, args, begun, done)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return done or [path for path in begun if nsr.read_log(path)], 130
    return done, 0


def run_config(name, args):
    """Config of a model that is a run or an embedded base policy; None of another."""
    cfg = nsr.config_of(name)
    if name in nsr.TASKS:
        cfg = nsr.resolve({"preset": name})
    return cfg and replace(cfg, **args.given)


def problem_set(name, runs, args):
    """{name: (problems, Config)} of a set; the Config of the run that held it out, or None.

    What a run was trained on stands for what it held out. Raises UserError.
    """
    cfg = runs.get(name)
    if name in nsr.TASKS and not cfg:
        cfg = run_config(name, args)
    for other in runs.values():
        if not cfg and Path(name).resolve() == Path(other.data).resolve():
            cfg = other
    if not cfg or name == cfg.eval_data:
        return {name: (nsr.shuffled_problems(name, cfg or Config(**args.given)), cfg)}
    if name not in nsr.TASKS:
        nsr.say(f"{name} was trained on: these are the problems that the run held out")
    _, problems = nsr.load_problems(cfg)
    return {cfg.eval_data or name: (problems, cfg)}


def sample_sets(name, sets, args, begun, done):
    """Sample from a model what its files lack; their paths are appended to begun, then to done.

    sets: {name: (problems, Config of the run that held them out, or None)}. Raises UserError.
    """
    model, tokenizer = nsr.load_model(name, nsr.pick_device(args.given.get("device")))
    bits = sum(int(p.data.view(torch.int32).sum()) for p in model.parameters())
    # how the papers ask, and draw on MATH
    papers = {"system": nsr.papers_system(name), "temperature": 0.6, "max_new_tokens": 3072}
    for data, (problems, held_by) in sets.items():
        drawn = held_by or Config(**papers | args.given)
        asked = replace(run_config(name, args) or drawn, max_new_tokens=drawn.max_new_tokens)
        settings = {
            "model": name,
            "weights": f"{bits % 2**64:x}",
            "data": data,
            "n": args.n,
            "answer_pattern": asked.answer_pattern,
            "verifier": drawn.verifier,  # the one that the problems were read with
            "temperature": drawn.temperature,
            "top_p": args.top_p or (1.0 if held_by else 0.95),
            "max_new_tokens": drawn.max_new_tokens,
        }
        kept = nsr.encode_prompts(problems[: args.problems], model, tokenizer, asked)
        file = re.sub(r"[^\w.-]+", "-", f"{name}--{data}").strip("-.")[-200:]
        path = Path(args.out, f"{file}.jsonl")
        greedy = settings | {"n": 1, "temperature": 0.0, "top_p": 1.0}
        with nsr.lock(path.with_suffix(".lock")):
            sample(path.parent / "greedy" / path.name, model, tokenizer, kept, greedy, args)
            begun.append(path)
            sample(path, model, tokenizer, kept, settings, args)
        done.append(path)


def sample(path, model, tokenizer, problems, settings, args):
    """Append to `path` the responses that it lacks, settings["n"] to each problem.

    settings: the first fields of every row. Raises UserError where the file holds responses of
    another model, or by other settings.
    """
    n, asked, planned = settings["n"], [], []
    for problem in problems:
        sha1 = hashlib.sha1(repr(problem.prompt_ids).encode()).hexdigest()[:10]
        for i in range(n):
            asked.append(problem)
            row = {
                "question_id": problem.question,
                "generation_id": i,
                "prompt_sha1": sha1,
                "seed": nsr.seed_of(args.given.get("seed", 0), problem.question, i),
                "response": None,  # None: the response will say
                "pred_answer": None,
                "gold_answer": problem.answer,
            }
            planned.append(settings | row)
    rows = nsr.read_log(path)
    check_rows(path, rows, planned)
    # Rounding depends on the batch, so problems are sampled in chunks that are always the same, and
    # a chunk that a kill left unfinished is sampled again: the file ends the same, byte for byte.
    longest = max(len(p.prompt_ids) for p in problems) + settings["max_new_tokens"]
    chunk = n * max(1, 4 * args.rollout_tokens // (n * longest))
    if len(rows) < len(asked):
        rows = rows[: len(rows) // chunk * chunk]
        nsr.write_log(path, rows)
    first, started = len(rows), time.time()
    for done in range(first, len(asked), chunk):
        new = planned[done : done + chunk]
        title = (
            f"{settings['model']} on {settings['data']}, problem {done // n + 1}/{len(problems)}"
        )
        if done > first:
            left = nsr.time_left(started, done - first, len(asked) - first)
            score = np.mean([row["label"] for row in rows])
            title += f", {left} left in all, Pass@1 {score:.3f}"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
            responses = nsr.sample_verified(
                model,
                tokenizer,
                asked[done : done + chunk],
                [row["seed"] for row in new],
                pattern=settings["answer_pattern"],
                max_new_tokens=settings["max_new_tokens"],
                temperature=settings["temperature"] or 1.0,
                top_p=settings["top_p"] if settings["temperature"] else 1e-9,  # greedy: one token
                rollout_tokens=args.rollout_tokens,
                title=title,
            )
        for row, response in zip(new, responses):
            row |= fields_of(response)
        nsr.append_log(path, *new)
        rows += new


def fields_of(response):
    """What a row says of a response; length: its tokens; logp: the mean of their log-probs."""
    return {
        "response": response.text,
        "pred_answer": response.answer,
        "label": response.correct,
        "length": len(response.ids),
        "finish_reason": "stop" if response.stopped else "length",
        "logp": sum(response.logp) / len(response.ids),
    } | response.problem.tags


def check_rows(path, rows, planned):
    """Raises UserError unless the rows of a file have the values that are planned, or None."""
    for number, (row, wanted) in enumerate(zip(rows, planned), 1):
        for key, value in wanted.items():
            if value not in (None, row.get(key)):
                raise UserError(
                    f"{path}, line {number}: {key} is {row.get(key)!r}, not {value!r}: "
                    "no mixed models, prompts or settings in a file; move it, or give --out DIR"
                )


# --------------------------------------------------------------------------------------------------
# from responses to measures


@dataclass
class Found:
    """What a file of responses holds."""

    model: str
    data: str
    sampling: str  # n and how they were drawn
    tallies: dict  # {question_id: {measure: value}}, of the problems that have all n responses


def load(path, args):
    """Found of a file of responses. Raises UserError."""
    rows, groups, tallies = read_rows(path, args), {}, {}
    for row in rows:
        groups.setdefault(row["question_id"], {})[row["generation_id"]] = row
    first = rows[0]  # its settings are those of all
    n = first.get("n") or min(map(len, groups.values()))
    if args.k and max(args.k) > n:
        raise UserError(
            f"{path}: Pass@{max(args.k)} takes more than its {n} responses to a problem"
        )
    count = None if args.rescore else args.problems
    for question, group in [*groups.items()][:count]:
        if len(group) >= n:
            tallies[question] = tally([*group.values()][:n], args.k)
    greedy = path.parent / "greedy" / path.name
    if greedy.exists():
        for row in read_rows(greedy, args):
            if row["question_id"] in tallies:
                tallies[row["question_id"]]["greedy"] = bool(row["label"])
    sampling = ", ".join(f"{key} {first[key]}" for key in SETTINGS[-4:] if first.get(key))
    return Found(first.get("model") or str(path), first.get("data") or path.stem, sampling, tallies)


def read_rows(path, args):
    """The rows (dicts) of a file of responses. Raises UserError.

    With --rescore their label and pred_answer are made anew, and verdicts that change are printed.
    """
    rows, given = nsr.read_log(path), args.given
    if not rows or not all(FIELDS <= row.keys() for row in rows):
        raise UserError(f"{path}: no such file, or a line lacks one of {', '.join(sorted(FIELDS))}")
    check_rows(path, rows, [{key: rows[0].get(key) for key in SETTINGS}] * len(rows))
    if not args.rescore:
        return rows
    changes, custom = [], None
    if "verifier" in given:
        custom = nsr.load_verifier(given["verifier"])
    elif rows[0].get("verifier"):  # a file of responses does not say what is executed
        raise UserError(
            f"{path}: its rows were checked by --verifier {rows[0]['verifier']}; give it, or "
            "another"
        )
    for row in rows:
        countdown = re.fullmatch(r"\d+( \d+)+ = \d+", str(row["gold_answer"]))
        verify = custom or (nsr.verify_countdown if countdown else nsr.verify)
        pattern = given.get("answer_pattern", row.get("answer_pattern"))
        before = row["label"]
        row["label"] = verify(row["response"], row["gold_answer"], pattern)
        row["pred_answer"] = nsr.extract_answer(row["response"], pattern)
        if row["label"] != bool(before):
            changes.append(f"  {row['label']}: {row['pred_answer']!r} / {row['gold_answer']!r}")
    print(f"{path}: {len(rows)} responses, {len(changes)} verdicts changed", *changes, sep="\n")
    return rows


def tally(rows, ks):
    """{measure: value} of the rows of one problem; ks: the k of Pass@k, None for 1, 2, 4, ... n."""
    correct = [bool(row["label"]) for row in rows]
    measures = nsr.tally(correct, [row["pred_answer"] for row in rows], ks)
    if "finish_reason" in rows[0]:  # the files of others may not say
        measures["truncated"] = np.mean([row["finish_reason"] == "length" for row in rows])
        measures["length"] = np.mean([row["length"] for row in rows])
    for tag in ("level", "subject"):
        if tag in rows[0]:
            measures[f"{tag}: {rows[0][tag]}"] = np.mean(correct)
    return measures


# --------------------------------------------------------------------------------------------------
# from measures to tables


@dataclass
class Table:
    """Numbers to print, to save and to draw."""

    data: str
    caption: str
    models: list
    numbers: dict  # {model, or difference of two: {measure: (value, low, high)}}


def report(files, args):
    """Print the tables of files of responses, and write what --save asks for. Raises UserError."""
    sets, tables, panels = defaultdict(dict), [], []  # sets: {set: {model: Found}}
    for path in files:
        found = load(path, args)
        name = found.model
        if name in sets[found.data]:
            name = str(path)
        sets[found.data][name] = found
    for data, models in sets.items():
        table = compute(data, models, args)
        tables.append(table)
        curves = {}
        for label in table.models:
            numbers = table.numbers[label]
            ks = [int(name.removeprefix("Pass@")) for name in numbers if "Pass@" in name]
            curves[label] = ks, [numbers[f"Pass@{k}"][0] for k in ks]
        axis = {
            "xscale": "log",
            "xticks": ks,
            "xticklabels": ks,
            "xlabel": "k",
            "ylabel": "Pass@k",
            "title": data,
        }
        panels.append((axis, curves))
    publish(tables, panels, args.save)


def compute(data, models, args):
    """Table of {model: Found} of one set, over the problems that all have. Raises UserError."""
    questions = next(iter(models.values())).tallies
    for found in models.values():
        questions = [question for question in questions if question in found.tallies]
    if not questions:
        raise UserError(f"{data}: no problem to which all models have all their responses")
    measures, samplings, groups, numbers = {}, {}, {}, {}
    for found in models.values():
        samplings[found.sampling] = True
        for question in questions:
            measures |= found.tallies[question]
    # Pass@k first, levels and subjects last and by name
    measures = sorted(measures, key=lambda m: ("Pass@" not in m, m if ":" in m else ""))
    for name, found in models.items():
        scores = []
        for question in questions:
            values = found.tallies[question]
            scores.append([values.get(measure) for measure in measures])
        groups.setdefault(label_of(name, args), []).append(scores)
    caption = (
        f"{data}, {len(questions)} problems, {' or '.join(samplings)}; below each its 95% "
        "interval, by bootstrap over problems and seeds"
    )
    means = dict(zip(groups, bootstrap(groups.values())))
    if args.compare:
        first, *others = groups
        for label in others:
            means[f"{label} - {first}"] = means[label] - means[first]
        caption += "; * excludes 0"
    for label, (value, *resampled) in means.items():
        interval = np.nanpercentile(resampled, [2.5, 97.5], axis=0)
        numbers[label] = dict(zip(measures, zip(value, *interval)))
    return Table(data, caption, [*groups], numbers)


@np.errstate(invalid="ignore")  # where none of the problems counts, a mean is 0 / 0: nan
def bootstrap(groups, resamples=10_000):
    """(groups, 1 + resamples, measures) float64: means over problems and seeds, and resampled ones.

    groups: of (seeds, P, measures), None where a problem does not count. Problems and seeds are
    drawn with replacement, the same problems for all groups, so that differences are paired.
    """
    rng, parts = np.random.default_rng(0), []
    for group in groups:
        scores = np.array(group, float)
        # scores, and which of them count: (2, seeds, P, measures)
        parts.append(np.array([np.nan_to_num(scores), ~np.isnan(scores)]))
    means = [[np.divide(*part.sum(2)).mean(0)] for part in parts]
    count = parts[0].shape[2]
    for _ in range(resamples):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)
        for part, rows in zip(parts, means):
            by_seed = np.divide(*(weights @ part))
            seeds = rng.integers(len(by_seed), size=len(by_seed))
            rows.append(by_seed[seeds].mean(0))
    return np.array(means)


def label_of(name, args):
    """What tables and pictures call a model: with --group, NAME of DIR/NAME-s0, else all of it."""
    return re.sub(r"^.*/|-s\d+$", "", name) if args.group else name


def markdown(table):
    """A Table as text, nine measures side by side: values, and below them their intervals."""
    page = f"{table.caption}:\n\n"
    for names in nsr.split([*table.numbers[table.models[0]]], 9):
        rows = [["", *names]]
        for label, numbers in table.numbers.items():
            sign = "" if label in table.models else "+"
            values, intervals = [label], [""]
            for value, low, high in map(numbers.get, names):
                star = "*" if sign and low * high > 0 else ""
                values.append(digits(value, sign) + star)
                intervals.append("" if np.isnan(low) else f"{digits(low)} {digits(high)}")
            rows += [values, intervals] if any(intervals) else [values]
        widths = [max(map(len, column)) for column in zip(*rows)]
        rows.insert(1, ["-" * width for width in widths])
        for label, *cells in rows:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
            page += f"| {' | '.join([label.ljust(widths[0]), *cells])} |\n"
        page += "\n"
    return page


def digits(x, sign=""):
    """
    >>> digits(0.1234), digits(-0.5), digits(0.5, "+"), digits(10), digits(np.nan)
    ('.123', '-.500', '+.500', '10.000', '-')
    """
    return "-" if np.isnan(x) else re.sub(r"^([+-]?)0\.", r"\1.", f"{x:{sign}.3f}")


def publish(tables, panels, save):
    """Print the tables, and write them and the panels as SAVE.md and so on if there is a name."""
    page = "".join(map(markdown, tables))
    nsr.say(page.rstrip())
    if not save:
        return
    nsr.write_whole(Path(f"{save}.md"), page.encode())
    with open(f"{save}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("data model measure value low high".split())
        for table in tables:
            for label, numbers in table.numbers.items():
                for name, number in numbers.items():
                    writer.writerow([table.data, label, name, *number])
    picture(panels, save)


def picture(panels, name):
    """Draw panels side by side as NAME.png and NAME.svg.

    A panel is (settings of its axis, {label: (x, y), two sequences of numbers}).
    """
    from matplotlib import cycler  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    styles = itertools.cycle(cycler(linestyle=["-", "--", "-.", ":"]) * cycler(color=COLORS))
    style_of = {}  # in each panel a label has the same
    for axis, (settings, curves) in zip(axes, panels):
        for label, points in curves.items():
            if label not in style_of:
                style_of[label] = next(styles)
            axis.plot(*points, marker=".", label=label, **style_of[label])
        axis.set(**settings)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        label_ends(axis)
    for kind in ("png", "svg"):
        figure.savefig(f"{name}.{kind}", dpi=150)


def label_ends(axis):
    """Write each curve's label beside its last point, the labels one above the other."""
    low, high = axis.get_ylim()
    free = low
    for line in sorted(axis.lines, key=lambda line: line.get_ydata()[-1]):
        x, y = line.get_xydata()[-1]
        height = max(y, free)
        axis.text(x, height, f"  {line.get_label()}", color=line.get_color(), va="center")
        free = height + (high - low) / 20


# --------------------------------------------------------------------------------------------------
# along training


def report_log(args):
    """Print the table that --log asks for, and write what --save asks for. Raises UserError."""
    runs, panels, numbers = defaultdict(list), [], defaultdict(dict)
    for run in args.models:
        runs[label_of(run, args)].append(run)
    for pair in args.log:
        x, _, keys = pair.partition(":")
        curves = {}
        for y in keys.split(","):
            groups = {label: read_seeds(names, x, y) for label, names in runs.items()}
            for label, seeds in groups.items():
                curves[f"{label}, {y}" if "," in keys else label] = seeds.mean(0).T
            for at in args.at or [None]:
                column = y if at is None else f"{y} at {x} {at:g}"
                for label, interval in zip(groups, student_intervals(groups.values(), at)):
                    if column in numbers[label]:
                        raise UserError(
                            "--log: two X:Y with one Y, whose value the table has once; ask twice"
                        )
                    numbers[label][column] = interval
        panels.append(({"xlabel": x, "ylabel": keys}, curves))
    caption = "Last values"
    if args.at:
        caption = "Where X first crosses a value, linear between points (-: some seed never does)"
    if args.group:
        caption += (
            ", mean over seeds; below, 95% interval by Student's t, one variance for all rows"
        )
    publish([Table("log", caption, [*runs], numbers)], panels, args.save)


def read_seeds(runs, x, y):
    """(seeds, steps, 2) float64: X and Y in the metrics.jsonl of runs, at the steps that all have.

    Raises UserError.
    """
    found = []
    for run in runs:
        log, keys, points = Path(run, "metrics.jsonl"), {}, {}
        for row in nsr.read_log(log):
            keys |= row
            if None not in (row.get(x), row.get(y)):  # of a key of both the first row is training's
                points.setdefault(row["step"], (row[x], row[y]))
        if not points:
            raise UserError(
                f"--log X:Y: no line of {log} has both {x} and {y}; the keys there are "
                f"{', '.join(keys) or 'none: is it the directory of a run?'}"
            )
        found.append(points)
    steps = sorted(set.intersection(*map(set, found)))
    if not steps:
        raise UserError(f"{x} and {y} of {', '.join(runs)} have no step in common")
    return np.array([[*map(points.get, steps)] for points in found])


def reached(points, x):
    """Y of points (steps, 2) where X is first x, linear between them, else nan; x None: the last.

    >>> print(reached(np.array([[0.0, 10], [2, 30], [1, 50]]), 1.5))
    25.0
    """
    if x is None:
        return points[-1, 1]
    for (start, y), (end, next_y) in zip([points[0], *points], points):
        if min(start, end) <= x <= max(start, end):
            return y + (x - start) / (end - start or 1) * (next_y - y)
    return np.nan


def student_intervals(groups, x):
    """Yields (mean, low, high) of Y where X is first x, for each of groups (seeds, steps, 2).

    nan where a seed never gets there; low and high also where no group has a second seed.
    All have one variance: two or three seeds say little of their own.
    """
    labels = []
    for seeds in groups:
        labels.append(np.array([reached(points, x) for points in seeds]))
    squares = np.nansum([len(values) * values.var() for values in labels])
    freedom = sum(len(values) - 1 for values in labels if not np.isnan(values).any())
    t = STUDENT_T[freedom] if freedom < 10 else 1.96 + 2.5 / freedom
    for values in labels:
        half = t * (squares / max(1, freedom) / len(values)) ** 0.5
        yield values.mean() + np.array([0, -half, half])


def main():
    """`python eval.py`: 0 when all is sampled, 130 when stopped; both print what is complete."""
    args = parse_flags()
    if args.log:
        report_log(args)
        return 0
    files, status = args.rescore, 0
    if not files:
        files, status = sample_models(args)
    if files:
        report(files, args)
    return status


if __name__ == "__main__":
    sys.exit(nsr.command(main))
