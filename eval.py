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
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import nsr
from nsr import Config, UserError

# how responses are drawn, if not as a run draws them: as the papers evaluate on MATH
MATH = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 3072}
FIELDS = {"question_id", "generation_id", "response", "gold_answer", "label"}  # in every row
# in every row that is sampled here
SETTINGS = ("model", "weights", "data", "answer_pattern", "verifier", "n", *MATH)
# flags of nsr.py, which say how problems are read, asked and checked
PROMPT_FLAGS = (
    "question_key answer_key instruction system answer_pattern verifier max_prompt_tokens"
)
# Student's t at 97.5% by degrees of freedom; from 10 on it is 1.96 + 2.5 / n, to within 1%
STUDENT_T = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLORS = "#000000 #0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()  # of Okabe and Ito


def parse_flags():
    """The flags of the command line, checked. Raises UserError."""
    parser = nsr.flag_parser(__doc__)
    flag = parser.add_argument
    flag("models", nargs="*", help="directory, out/NAME, hub name, countdown[-hard]")
    flag("--data", nargs="+", help="problem sets [what a run held out; else MATH, AIME, AMC]")
    flag("-n", type=int, default=256, help="responses to each problem [256]")
    flag("-k", type=int, nargs="+", help="columns of the table [1 2 4 ... n]")
    flag("--problems", type=int, help="only so many of each set, drawn at random [all]")
    flag("--temperature", type=float, help="[0.6; on what a run held out, its own]")
    flag("--top-p", type=float, help="draw from the likeliest of this mass [0.95; 1 likewise]")
    flag("--max-new-tokens", type=int, help="longest response in tokens [3072; the run's likewise]")
    flag("--rollout-tokens", type=int, default=2**16, help="most tokens in the KV cache [65536]")
    flag("--seed", type=int, default=0, help="decides every random draw [0]")
    flag("--compare", action="store_true", help="also the paired differences to the first model")
    flag("--group", action="store_true", help="NAME-s0, NAME-s1, ... are seeds of one model")
    flag("--save", help="also write SAVE.md, SAVE.csv, SAVE.png and SAVE.svg")
    flag(
        "--log",
        nargs="+",
        metavar="X:Y",
        help="sample none; draw Y or Y,Z,... against X along the training of each model "
        "(out/NAME), keys of its metrics.jsonl; a table of last Y",
    )
    flag("--at", nargs="+", type=float, help="with --log X:Y: Y where X is first AT")
    flag("--out", default="out/eval", help="directory where responses are kept [out/eval]")
    flag("--rescore", nargs="+", type=Path, help="sample none; verify again what files hold")
    flag("--device", help="cpu, cuda, cuda:1, ... [cuda if there is one, else cpu]")
    nsr.add_flags(parser, PROMPT_FLAGS.split())
    args = parser.parse_args()
    nsr.check_pattern(getattr(args, "answer_pattern", ""))
    if args.top_p and args.top_p > 1:
        parser.error(f"--top-p {args.top_p}: is a share, 1 at most")
    if bool(args.models) == bool(args.rescore):
        parser.error("give models to evaluate, the runs (first) of --log, or files to --rescore")
    if args.at and not args.log:
        parser.error("--at goes with --log X:Y")
    for name in "-n -k --problems --temperature --top-p --max-new-tokens --rollout-tokens".split():
        value = getattr(args, name.strip("-").replace("-", "_"))
        if value is not None and np.min(value) <= 0:
            parser.error(f"{name} {value}: must be above 0")
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
    for name in args.models:
        nsr.model_config(name)  # before data is downloaded
    runs = {}  # {set: Config of the first run that held it out}
    for name in args.models:
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
        name, problems, cfg = problem_set(name, runs, args)
        sets[name] = problems[: args.problems], cfg
    begun, done = [], []
    try:
        for name in args.models:
            sample_sets(name, sets, args, begun, done)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return done or [path for path in begun if nsr.read_log(path)], 130
    return done, 0


def prompt_flags(args):
    """{field of Config: value} of the flags in PROMPT_FLAGS that were given."""
    return {name: value for name, value in vars(args).items() if name in PROMPT_FLAGS.split()}


def run_config(name, args):
    """Config of a model that is a run or an embedded base policy; None of another."""
    cfg, _ = nsr.config_of(name)
    if name in nsr.TASKS:
        cfg = nsr.resolve({"preset": name})
    return cfg and replace(cfg, **prompt_flags(args))


def problem_set(name, runs, args):
    """(name, problems, Config) of a set; the last is that of the run that held it out, or None.

    What a run was trained on stands for what it held out. Raises UserError.
    """
    cfg = runs.get(name)
    if name in nsr.TASKS and not cfg:
        cfg = replace(nsr.resolve({"preset": name}), **prompt_flags(args))
    for other in runs.values():
        if not cfg and Path(name).resolve() == Path(other.data).resolve():
            cfg = other
    if not cfg:
        return name, nsr.shuffled_problems(name, Config(**prompt_flags(args))), None
    if name == cfg.eval_data:
        return name, nsr.shuffled_problems(name, cfg), cfg
    _, problems = nsr.load_problems(cfg)
    if name not in nsr.TASKS:
        nsr.say(f"{name} was trained on: these are the problems that the run held out")
    return cfg.eval_data or name, problems, cfg


def sample_sets(name, sets, args, begun, done):
    """Sample from a model what its files lack; their paths are appended to begun, then to done.

    sets: {name: (problems, Config of the run that held them out, or None)}. Raises UserError.
    """
    model, tokenizer = nsr.load_model(name, nsr.pick_device(args.device))
    bits = sum(int(p.data.view(torch.int32).sum()) for p in model.parameters())
    given = prompt_flags(args)
    for data, (problems, held_by) in sets.items():
        papers = replace(Config(system=nsr.papers_system(name)), **given)
        cfg = run_config(name, args) or held_by or papers  # of the prompts
        settings = {
            "model": name,
            "weights": f"{bits % 2**64:x}",
            "data": data,
            "n": args.n,
            "answer_pattern": cfg.answer_pattern,
            "verifier": (held_by or papers).verifier,  # the one that the problems were read with
        }
        usual = MATH
        if held_by:
            usual = {"temperature": held_by.temperature, "top_p": 1.0}
            usual["max_new_tokens"] = held_by.max_new_tokens
        for knob, value in usual.items():
            settings[knob] = getattr(args, knob) or value
        cfg = replace(cfg, max_new_tokens=settings["max_new_tokens"])
        kept = nsr.encode_prompts(problems, model, tokenizer, cfg)
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
        for i in range(n):
            asked.append(problem)
            planned.append(settings | row_of(problem, i, args.seed))
    rows = nsr.read_log(path)
    check_rows(path, rows, planned)
    sampling = {knob: settings[knob] for knob in MATH}
    if not sampling["temperature"]:
        sampling |= {"temperature": 1.0, "top_p": 1e-9}  # greedy: a nucleus of one token

    # Rounding depends on the batch, so problems are sampled in chunks that are always the same, and
    # a chunk that a kill left unfinished is sampled again: the file ends the same, byte for byte.
    longest = max(len(p.prompt_ids) for p in problems) + sampling["max_new_tokens"]
    chunk = n * max(1, 4 * args.rollout_tokens // (n * longest))
    if len(rows) < len(asked):
        rows = rows[: len(rows) - len(rows) % chunk]
        nsr.write_log(path, rows)
    first, started = len(rows), time.time()
    for done in range(first, len(asked), chunk):
        some = slice(done, done + chunk)
        title = (
            f"{settings['model']} on {settings['data']}, problem {done // n + 1}/{len(problems)}"
        )
        if done > first:
            left = (time.time() - started) / (done - first) * (len(asked) - done)
            score = np.mean([row["label"] for row in rows])
            title += f", {nsr.duration(left)} left in all, Pass@1 {score:.3f}"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
            responses = nsr.sample_verified(
                model,
                tokenizer,
                asked[some],
                [row["seed"] for row in planned[some]],
                pattern=settings["answer_pattern"],
                rollout_tokens=args.rollout_tokens,
                title=title,
                **sampling,
            )
        for row, response in zip(planned[some], responses):
            row |= fields_of(response)
        nsr.append_log(path, *planned[some])
        rows += planned[some]


def row_of(problem, i, seed):
    """The i-th row of a problem, None where its response will say."""
    return {
        "question_id": problem.question,
        "generation_id": i,
        "prompt_sha1": hashlib.sha1(repr(problem.prompt_ids).encode()).hexdigest()[:10],
        "seed": nsr.seed_of(seed, problem.question, i),
        "response": None,
        "pred_answer": None,
        "gold_answer": problem.answer,
    }


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

    path: Path
    model: str
    data: str
    sampling: str  # n and how they were drawn
    tallies: dict  # {question_id: {measure: value}}, of the problems that have all n responses


def load(path, args, ks=None, problems=None):
    """Found of a file of responses, of its first `problems` (None: all).

    With --rescore verdicts are made anew, and those that change are printed. ks: the k of Pass@k.
    Raises UserError.
    """
    rows = nsr.read_log(path)
    if not rows or not all(FIELDS <= row.keys() for row in rows):
        raise UserError(f"{path}: no such file, or a line lacks one of {', '.join(sorted(FIELDS))}")
    if args.rescore:
        verify_again(path, rows, args)
    settings = {key: rows[0].get(key) for key in SETTINGS}
    check_rows(path, rows, [settings] * len(rows))
    groups = {}
    for row in rows:
        groups.setdefault(row["question_id"], {})[row["generation_id"]] = row
    n = settings["n"] or min(map(len, groups.values()))
    if ks and max(ks) > n:
        raise UserError(f"{path}: Pass@{max(ks)} takes more than its {n} responses to a problem")
    tallies = {}
    for question, group in [*groups.items()][:problems]:
        if len(group) >= n:
            tallies[question] = tally([*group.values()][:n], ks)
    greedy = path.parent / "greedy" / path.name
    if greedy.exists():
        for question, measures in load(greedy, args).tallies.items():
            if question in tallies:
                tallies[question]["greedy"] = measures["Pass@1"]
    sampling = ", ".join(f"{key} {settings[key]}" for key in ("n", *MATH) if settings[key])
    model, data = settings["model"] or str(path), settings["data"] or path.stem
    return Found(path, model, data, sampling, tallies)


def verify_again(path, rows, args):
    """Set label and pred_answer of rows anew; print which verdicts change. Raises UserError."""
    given, changes = prompt_flags(args), []
    wanted, custom = rows[0].get("verifier"), None
    if "verifier" in given:
        custom = nsr.load_verifier(given["verifier"])
    elif wanted:  # a file of responses does not say what is executed
        raise UserError(
            f"{path}: its rows were checked by --verifier {wanted}; give it, or another"
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
    labels: list  # the models, then differences between them
    measures: list
    numbers: np.ndarray  # (labels, measures, 3) float64: value, low and high


def report(found, args):
    """Print the tables of a list of Found, and write what --save asks for. Raises UserError."""
    tables, panels = [], []
    for data in dict.fromkeys(one.data for one in found):
        table = compute([one for one in found if one.data == data], args)
        tables.append(table)
        ks = [int(name.removeprefix("Pass@")) for name in table.measures if "Pass@" in name]
        curves = []
        for label, numbers in zip(table.models, table.numbers):
            curves.append((label, np.column_stack([ks, numbers[: len(ks), 0]])))
        axis = {
            "xscale": "log",
            "xticks": ks,
            "xticklabels": ks,
            "xlabel": "k",
            "ylabel": "Pass@k",
            "title": data,
        }
        panels.append((axis, curves))
    publish(tables, panels, args)


def compute(found, args):
    """Table of a list of Found with one data, over the problems that all have. Raises UserError."""
    questions = found[0].tallies
    for one in found:
        questions = [question for question in questions if question in one.tallies]
    if not questions:
        raise UserError(f"{one.data}: no problem to which all models have all their responses")
    measures, groups, names = {}, {}, set()
    for one in found:
        for question in questions:
            measures |= one.tallies[question]
    # Pass@k first, levels and subjects last and by name
    measures = sorted(measures, key=lambda m: ("Pass@" not in m, m if ":" in m else ""))
    for one in found:
        scores = []
        for question in questions:
            scores.append([one.tallies[question].get(name, np.nan) for name in measures])
        name = str(one.path) if one.model in names else one.model
        names.add(name)
        groups.setdefault(label_of(name, args), []).append(scores)
    means = bootstrap([np.array(group, float) for group in groups.values()])
    models = [*groups]
    labels = models
    caption = f"{one.data}, {len(questions)} problems, "
    caption += " or ".join(dict.fromkeys(one.sampling for one in found))
    caption += "; below each its 95% interval, by bootstrap over problems and seeds"
    if args.compare:
        labels = models + [f"{label} - {models[0]}" for label in models[1:]]
        means = np.concatenate([means, means[:, 1:] - means[:, :1]], axis=1)
        caption += "; * excludes 0"
    intervals = np.nanpercentile(means[1:], [2.5, 97.5], axis=0)
    numbers = np.stack([means[0], *intervals], axis=-1)
    return Table(one.data, caption, models, labels, measures, numbers)


def label_of(name, args):
    """What tables and pictures call a model: with --group, NAME of DIR/NAME-s0, else all of it."""
    return re.sub(r"^.*/|-s\d+$", "", name) if args.group else name


@np.errstate(invalid="ignore")  # where none of the problems counts, a mean is 0 / 0: nan
def bootstrap(groups, resamples=10_000):
    """(1 + resamples, groups, measures) float64: means over problems and seeds, and resampled ones.

    groups: of (seeds, P, measures), nan where a problem does not count. Problems and seeds are
    drawn with replacement, the same problems for all groups, so that differences are paired.
    """
    rng, count = np.random.default_rng(0), groups[0].shape[1]
    # of each group the scores, and which of them count: (2, seeds, P, measures)
    parts = [np.array([np.nan_to_num(group), ~np.isnan(group)]) for group in groups]
    means = [[np.divide(*part.sum(2)).mean(0) for part in parts]]
    for _ in range(resamples):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)
        row = []
        for part in parts:
            by_seed = np.divide(*(weights @ part))
            seeds = rng.integers(len(by_seed), size=len(by_seed))
            row.append(by_seed[seeds].mean(0))
        means.append(row)
    return np.array(means)


def markdown(table):
    """A Table as text, nine measures side by side: values, and below them their intervals."""
    page = f"{table.caption}:\n\n"
    for at in range(0, len(table.measures), 9):
        rows = [["", *table.measures[at : at + 9]]]
        for label, numbers in zip(table.labels, table.numbers):
            values, intervals = [label], [""]
            for value, low, high in numbers[at : at + 9]:
                text = digits(value)
                if label not in table.models:
                    text = digits(value, "+") + ("*" if low * high > 0 else "")
                values.append(text)
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


def publish(tables, panels, args):
    """Print the tables, and write them and the panels if --save asks for it."""
    page = "".join(map(markdown, tables))
    nsr.say(page.rstrip())
    if not args.save:
        return
    Path(args.save).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.save}.md").write_text(page)
    with open(f"{args.save}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "model", "measure", "value", "low", "high"])
        for table in tables:
            for label, numbers in zip(table.labels, table.numbers):
                for name, number in zip(table.measures, numbers):
                    writer.writerow([table.data, label, name, *number])
    picture(panels, args.save)


def picture(panels, name):
    """Draw panels side by side as NAME.png and NAME.svg.

    A panel is (settings of its axis, curves), a curve (label, points (points, 2): x and y).
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    labels = []  # in each panel one has the same color
    for axis, (settings, curves) in zip(axes, panels):
        for label, points in curves:
            if label not in labels:
                labels.append(label)
            turn, place = divmod(labels.index(label), len(COLORS))
            style = ("-", "--", "-.", ":")[turn % 4]
            axis.plot(*points.T, style, color=COLORS[place], marker=".", label=label)
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
    runs, panels, columns = {}, [], {}
    for run in args.models:
        runs.setdefault(label_of(run, args), []).append(run)
    for pair in args.log:
        x, _, keys = pair.partition(":")
        curves = []
        for y in keys.split(","):
            for label, names in runs.items():
                seeds = read_seeds(names, x, y)
                curves.append((f"{label}, {y}" if "," in keys else label, seeds.mean(0)))
                for at in args.at or [None]:
                    column = y if at is None else f"{y} at {x} {at:g}"
                    values = np.array([reached(points, at)[1] for points in seeds])
                    columns.setdefault(column, []).append(values)
        panels.append(({"xlabel": x, "ylabel": keys}, curves))
    if any(len(values) > len(runs) for values in columns.values()):
        raise UserError("--log: two X:Y with one Y, whose value the table has once; ask twice")
    caption = "Last values"
    if args.at:
        caption = "Where X first crosses a value, linear between points (-: some seed never does)"
    if args.group:
        caption += (
            ", mean over seeds; below, 95% interval by Student's t, one variance for all rows"
        )
    numbers = np.stack([student_intervals(values) for values in columns.values()], axis=1)
    models = [*runs]
    publish([Table("log", caption, models, models, [*columns], numbers)], panels, args)


def read_seeds(runs, x, y):
    """(seeds, steps, 2) float64: X and Y at the steps that all runs have. Raises UserError."""
    found = [read_points(run, x, y) for run in runs]
    steps = sorted(set.intersection(*map(set, found)))
    if not steps:
        raise UserError(f"{x} and {y} of {', '.join(runs)} have no step in common")
    return np.array([[*map(points.get, steps)] for points in found])


def read_points(run, x, y):
    """{step: (X, Y)} of a run's metrics.jsonl. Raises UserError."""
    log = Path(run, "metrics.jsonl")
    rows = nsr.read_log(log)
    keys = {}
    for row in rows:
        keys |= row
    found = [row for row in rows if None not in (row.get(x), row.get(y))]
    if not found:
        raise UserError(
            f"--log X:Y: no line of {log} has both {x} and {y}; the keys there are "
            f"{', '.join(keys) or 'none: is it the directory of a run?'}"
        )
    found = [row for row in found if "steps" in row] or found  # of a key of both, training's
    return {row["step"]: (row[x], row[y]) for row in found}


def reached(points, x):
    """The point (2,) of points (steps, 2) where X is first x, linear between them; else nan.

    x None: the last point.

    >>> reached(np.array([[0.0, 10], [2, 30], [1, 50]]), 1.5)
    array([ 1.5, 25. ])
    """
    if x is None:
        return points[-1]
    for before, after in zip([points[0], *points], points):
        start, end = before[0], after[0]
        if min(start, end) <= x <= max(start, end):
            return before + (x - start) / (end - start or 1) * (after - before)
    return points[0] * np.nan


def student_intervals(labels):
    """[(mean, low, high)] of [(seeds,)], one a label; nan where it cannot be told.

    All have one variance: two or three seeds say little of their own.
    """
    squares = np.nansum([len(values) * values.var() for values in labels])
    freedom = sum(len(values) - 1 for values in labels if not np.isnan(values).any())
    t = STUDENT_T[freedom] if freedom < 10 else 1.96 + 2.5 / freedom
    intervals = []
    for values in labels:
        half = t * (squares / max(1, freedom) / len(values)) ** 0.5
        intervals.append(values.mean() + np.array([0, -half, half]))
    return intervals


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
        problems = None if args.rescore else args.problems
        report([load(path, args, args.k, problems) for path in files], args)
    return status


if __name__ == "__main__":
    sys.exit(nsr.command(main))
