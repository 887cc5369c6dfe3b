"""What came of the study: tables, claims, figures, and the page notebooks/results/README.md. It trains nothing.

    python notebooks/findings.py results      each setting: mean, half the range over seeds, number of seeds
    python notebooks/findings.py claims       every claim with its effect, interval and verdict
    python notebooks/findings.py validation   how the distortion score does on clips changed by known amounts
    python notebooks/findings.py agreement    do the score and the renderer's truth agree on what models made?
    python notebooks/findings.py alarms       which numbers warn early of ruined runs?
    python notebooks/findings.py figures      a figure for each question, in results/figures
    python notebooks/findings.py picture      the methods side by side, results/figures/methods.png
    python notebooks/findings.py page         results/README.md, by results/template.md; and verdicts.csv
    python notebooks/findings.py all          all of these                                                  (2 minutes)

A claim says that a measure of one model is above that of another. Differences are paired by training seed; intervals
are Student's t, 95 %. *Confirmed* and *refuted*: 0 is outside. *Cannot tell*: it is not; there may be a difference all
the same. The tables call a setting an "arm".
"""

import argparse
import dataclasses
import itertools
import math
import re
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

import study


QUESTIONS = {int(row["question"]): row for row in study.read_texts("questions.csv")}
LABELS = {}  # of measures: {kind: {name: label}}
for row in study.read_texts("labels.csv"):
    LABELS.setdefault(row["kind"], {})[row["name"]] = row["label"]
SHOWN, ALARM_NUMBERS = LABELS["model"], LABELS["warning"]

# ----------------------------------------------------------------------------------------------------------- the tables


def checkpoints():
    """A dict for each judged checkpoint, from the tables: what the runs' table says of it; for each measure of the
    clips the mean over the prompts of each set, such as score_concept and pose_iou_away; and the shares of captions
    away from the concept whose creature, colour, direction and ground are right, as far as `captions` has read them."""
    models = {study.checkpoint(row): dict(row) for row in study.read_table(study.table("runs"))}
    of_set = {}
    for kind in ("clips", "captions"):
        for row in study.read_table(study.table(kind)):
            of_set.setdefault((study.checkpoint(row), row.get("set", "")), []).append(row)
    for (at, where), rows in of_set.items():
        if at in models:  # else its run is not finished
            for name in rows[0].keys() - {"arm", "seed", "step", "blend", "set", "prompt"}:
                models[at][f"{name}_{where}".rstrip("_")] = statistics.fmean(row[name] for row in rows)
    return list(models.values())


def style_checkpoints():
    """Rows of results/study_style.csv, as `checkpoints` has those of the study."""
    return [{**row, "blend": 1.0} for row in study.read_table(study.table("style"))]


def each_once(made):
    """Without the ends of the arms whose blends go back to the base: their runs are those of another arm."""
    return [c for c in made if c["blend"] != 1 or not c["arm"].endswith("back")]


def by_model(made):
    """{(arm, step, blend): its checkpoints, one a seed}."""
    models = {}
    for c in made:
        models.setdefault((c["arm"], c["step"], c["blend"]), []).append(c)
    return models


def of_model(made, measure, arm, step=500, blend=1.0):
    """{seed: measure} of one model."""
    return {c["seed"]: c[measure] for c in by_model(made).get((arm, step, blend), ()) if measure in c}


def base_mean(made, measure):
    return statistics.fmean(of_model(made, measure, "base", 0).values())


@dataclasses.dataclass
class Series:
    """A measure along the steps of an arm: for each x its values, one a seed (the base has one)."""

    x: list
    values: list

    mean = property(lambda self: [statistics.fmean(v) for v in self.values])
    low = property(lambda self: [min(v) for v in self.values])
    high = property(lambda self: [max(v) for v in self.values])
    seeds = property(lambda self: len(self.values[-1]))


def series(made, arm, measure, along="step", long=False):
    """`measure` of the checkpoints of an arm without blends, over the mean of `along`, base first, and if asked for its
    long runs last; of the seeds that have all of them, so that a line does not bend where a seed ends. Raises KeyError
    where there is none."""
    names = arm, "base", f"{arm} long" * long
    mine = [c for c in made if c["arm"] in names and c["blend"] == 1 and isinstance(c.get(measure), float)]
    steps = sorted({c["step"] for c in mine})
    if not any(steps):
        raise KeyError(f"{arm}: no finished run in {study.table('runs').name}")
    of_all = set.intersection(*({c["seed"] for c in mine if c["step"] == step} for step in steps if step))
    at = [[c for c in mine if c["step"] == step and (c["seed"] in of_all or c["arm"] == "base")] for step in steps]
    return Series([statistics.fmean(c[along] for c in cs) for cs in at], [[c[measure] for c in cs] for cs in at])


def untrained_loss(made):
    """The base's loss on held-out clips of the concept. A model above it is called ruined."""
    return base_mean(made, "loss_concept")


def ended_worse(made, looks):
    """Of the arms in the alarm's table, without those of BENT: those of which a seed of the study is above the base's
    loss after 500 steps, and the others."""
    at_500, limit = [c for c in made if c["step"] == 500], untrained_loss(made)
    worse = {c["arm"] for c in at_500 if c.get("loss_concept", 0) > limit}
    arms = {row["arm"] for row in looks} - set(study.BENT)
    return arms & worse, arms - worse


def auc(distorted, clean):
    """Share of pairs in which the distorted clip scores higher; ties count half."""
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in distorted for b in clean]))


def alarm_aucs(made, looks):
    """{number of ALARM_NUMBERS: {(seed, step): AUC}}: how well it separates runs of the arms that end worse from the
    others at a look; 1 where all of the former are above all of the latter."""
    aucs, kinds = {}, ended_worse(made, looks)
    for name in ALARM_NUMBERS:
        for at in sorted({(r["seed"], r["step"]) for r in looks if r[name] != ""}):
            here = [r for r in looks if (r["seed"], r["step"]) == at]
            aucs.setdefault(name, {})[at] = auc(*([r[name] for r in here if r["arm"] in arms] for arms in kinds))
    return aucs


def stability_limit(rates, ratios, level=1.0):
    """The rate from which on a loss is above `level` times the untrained base's: where the logarithm of their ratio,
    drawn over that of the rate, first crosses it beyond its lowest point. None where it does not."""
    points = sorted(zip(rates, ratios))
    lowest = min(range(len(points)), key=lambda k: points[k][1])
    for (low, below), (high, above) in itertools.pairwise(points[lowest:]):
        if below < level <= above:
            share = 1.0 if math.isinf(above) else math.log(below / level) / math.log(below / above)
            return math.exp(math.log(low) + share * math.log(high / low))
    return None


LIMIT_LEVELS = {"concept": 1.0, "away": 2.0}  # the concept's clips are learned; what the base knew is lost at any rate


def width_ratios(where):
    """{width: {seed: {rate: loss over the untrained base's}}} of results/study_width.csv."""
    ratios = {}
    for row in study.read_table(study.table("width")):
        of_seed = ratios.setdefault(int(row["width"]), {}).setdefault(int(row["seed"]), {})
        of_seed[row["lr"]] = row[f"loss_{where}"] / row[f"untrained_{where}"]
    return dict(sorted(ratios.items()))


def width_differences(where="concept"):
    """{what is above: for each seed, a difference of logarithms}: the stability limit of the narrower base less that of
    the wider one, and what the rule of 1 / width says less that."""
    limits = {}
    for size, seeds in width_ratios(where).items():
        limits[size] = {seed: stability_limit(r, r.values(), LIMIT_LEVELS[where]) for seed, r in seeds.items()}
    if len(limits) != 2:
        return {}
    (narrow, low), (wide, high) = limits.items()
    times = [math.log(low[seed] / high[seed]) for seed in sorted(low) if low[seed] and high.get(seed)]
    return {str(narrow): times, "1 / width": [math.log(wide / narrow) - t for t in times]}


# --------------------------------------------------------------------------------------------------------------- claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """A row of results/claims.csv: `measure` of the model `above` is higher than that of `below`. A model is an arm, a
    step and, of a blend, a share of the way. With `equal`, one group's models against those of another that have nearly
    as much of that measure."""

    key: str  # by which results/template.md quotes it; without one it stands in verdicts.csv only
    question: int
    claim: str
    measure: str
    above: str
    below: str
    equal: str = ""
    least: float = 0.0  # concept score of the models that `equal` compares
    put: str = "before"  # or after its seeds were seen
    seen: str = ""  # the seeds on a look at which it was put, or seeds were added


def claims():
    """What is said, or was expected, as differences that the tables can show."""
    rows = study.read_texts("claims.csv")
    return [Claim(**{**r, "question": int(r["question"]), "least": float(r["least"] or 0)}) for r in rows]


CLOSE = 0.05  # what counts as the same: a twentieth of the larger
FRESH = 5  # seeds from here up were run when every claim stood


def at_equal(made, by, measure, group, other, least=0.0):
    """How much more of `measure` one group's models have than the other's that have as much of `by`: each is paired
    with one other at most, nearly equal, so that they differ least in all; the mean over pairs, for each seed. Models
    up to step 500 with a concept score from `least` up, but ruined ones: damage lowers the concept too, so they would
    be paired with those that have hardly begun."""
    from scipy.optimize import linear_sum_assignment

    groups, limit = {arm.name: arm.group for arm in study.study_arms().values()}, untrained_loss(made)
    differences = []
    sound = [c for c in made if c["step"] <= 500 and c["blend"] == 1 and c.get("loss_concept", math.inf) < limit]
    sound = [c for c in sound if {by, measure} <= c.keys() and c["concept_concept"] >= least]
    for seed in sorted({c["seed"] for c in sound}):
        of_seed = [c for c in sound if c["seed"] == seed]
        one, two = ([c for c in of_seed if groups.get(c["arm"]) == name] for name in (group, other))
        apart = np.array([[abs(c[by] - d[by]) / max(c[by], d[by]) for d in two] for c in one])
        close = apart.reshape(len(one), len(two)) <= CLOSE
        # Those that are too far apart are paired last, and left out.
        pairs = zip(*linear_sum_assignment(np.where(close, apart, 1e3))) if close.size else ()
        of_pairs = [one[i][measure] - two[j][measure] for i, j in pairs if close[i, j]]
        differences += [statistics.fmean(of_pairs)] if of_pairs else []
    return differences


def differences(claim, made):
    """The differences, paired by seed, that are positive where a claim holds."""
    if claim.equal:
        return at_equal(made, claim.equal, claim.measure, claim.above, claim.below, claim.least)
    if claim.measure == "log_limit":
        return width_differences().get(claim.above, [])
    aucs = alarm_aucs(made, study.read_table(study.table("alarm"))) if claim.measure == "auc" else None

    def by_seed(model):
        name, step, *share = model.split(", ")
        if aucs is not None:
            return {seed: value for (seed, look), value in aucs.get(name, {}).items() if look == int(step)}
        return of_model(made, claim.measure, name, int(step), float(*share or [1.0]))

    high, low = by_seed(claim.above), by_seed(claim.below)
    return [a - low.get(seed, low.get(0)) for seed, a in sorted(high.items()) if seed in low or 0 in low]


def tried(values):
    """Mean, half of its 95 % interval and verdict of paired differences, as text. Student's t is wide for three seeds:
    "cannot tell" means that the interval has 0 in it, not that there is no difference."""
    from scipy.stats import t

    if len(values) < 3:
        return "", "", "too few seeds"
    mean, width = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * width
    verdict = "cannot tell" if abs(mean) <= half else "confirmed" if mean > 0 else "refuted"
    return f"{mean:+.6g}", f"{half:.6g}", verdict


def plus_minus(mean, half):
    return f"{float(mean):+.2g} ± {float(half):.2g}" if half else ""


ANSWER_COLUMNS = ("question", "claim", "measure", "effect", "n", "verdict", "put", "fresh seeds alone")


def verdict_rows(questions=None):
    """Rows, all text, of the claims under each question that have been tried. One that was put after a look at some
    seeds, or had seeds added after one, is tried again on the seeds from FRESH up alone."""
    made, rows = checkpoints() + style_checkpoints(), []
    fresh = [c for c in made if c["seed"] == 0 or c["seed"] >= FRESH]  # 0: the base
    labels = LABELS["model"] | LABELS["style"] | LABELS["other"]
    for claim in claims():
        values = differences(claim, made) if claim.question in (questions or QUESTIONS) else []
        if not values:
            continue
        mean, half, verdict = tried(values)
        again = tried(differences(claim, fresh) if claim.seen not in ("", "all seeds") else [])
        rows.append({
            "question": str(claim.question), "claim": claim.claim, "measure": labels[claim.measure],
            "effect": plus_minus(mean, half), "n": str(len(values)), "verdict": verdict, "put": claim.put,
            "fresh seeds alone": f"{plus_minus(*again[:2])}: {again[2]}" if again[1] else "", "seen": claim.seen,
            "of_each_seed": " ".join(f"{x:+.3g}" for x in values), "mean": mean, "half_interval": half,
            "fresh_mean": again[0], "fresh_half_interval": again[1], "key": claim.key,
        })  # fmt: skip
    return rows


# --------------------------------------------------------------------------------------------------------- other tables


def results(questions=None):
    """Each setting, step and share of the way: mean, half the range over seeds, number of seeds."""
    arms, rows = study.study_arms(), []
    for (arm, step, blend), of_seeds in by_model(checkpoints() + style_checkpoints()).items():
        if questions and not set(questions) & set(arms[arm].questions if arm in arms else ()):
            continue
        row = {"setting": arm, "step": f"{step:g}", "blend": f"{blend:g}", "seeds": len(of_seeds)}
        for name, label in (SHOWN | LABELS["style"]).items():
            values = [c[name] for c in of_seeds if isinstance(c.get(name), float)]
            row[label] = f"{statistics.fmean(values):.3g} ± {(max(values) - min(values)) / 2:.2g}" if values else ""
        rows.append(row)
    return rows


def alarms():
    """For each look, how many runs are above the base's loss, with the lowest or highest ratio: of the arms of question
    3 that are above it after 500 steps in the seeds of the study, of its others, and of each of BENT."""
    looks, rows = study.read_table(study.table("alarm")), []
    worse, others = ended_worse(checkpoints(), looks)
    for arms, extreme in [(worse, min), (others, max), *(({name}, max) for name in study.BENT)]:
        row = {"runs of": ", ".join(sorted(arms))}
        for look in study.ALARM_LOOKS:
            ratios = [r["ratio"] for r in looks if r["step"] == look and r["arm"] in arms] or [math.nan]
            above = sum(r > 1 for r in ratios)
            row[f"step {look}"] = f"{above} of {len(ratios)}, {extreme.__name__} {extreme(ratios):.2f}"
        rows.append(row)
    return rows


def validation():
    """For each world of changed clips: how well clean clips are separated from those distorted at the middle of five
    strengths, which medians rise with every strength, and how far harmless changes move the median, of the sum of the
    score's parts (the score itself hides under 0 what is less than usual). Allowed is a tenth of what the distortions
    do at the middle, in the median."""
    rows = []
    for name, kind in (("validation", "held out"), ("validation_fresh", "fresh")):
        totals = {}
        for r in study.read_table(study.RESULTS / f"{name}.csv"):
            of_change = totals.setdefault(r["world"], {}).setdefault((r["change"], int(r["strength"])), [])
            of_change.append(r["shape"] + r["motion"] + r["texture"])
        for where, of_world in totals.items():
            medians = {at: statistics.median(values) for at, values in of_world.items()}
            clean = medians["clean", 0]
            changes = [change for change, strength in medians if strength == 1]
            aucs = [auc(of_world[change, 3], of_world["clean", 0]) for change in changes]
            ways = [[clean, *(medians[change, k] for k in range(1, 6))] for change in changes]
            rises = sum(all(a < b for a, b in itertools.pairwise(way)) for way in ways)
            moves = [abs(medians[change, 0] - clean) for change in study.HARMLESS]
            allowed = statistics.median(way[3] - clean for way in ways) / 10
            rows.append({
                "clips of": f"{LABELS['world'][where]}, {kind}", "n": len(of_world["clean", 0]),
                "lowest AUC": f"{min(aucs):.2f}", "medians that rise": f"{rises} of {len(ways)}",
                "harmless, at most": f"{max(moves):.2f}", "allowed": f"{allowed:.2f}",
            })  # fmt: skip
    return rows


def agreement():
    """Spearman's coefficient of the distortion score and the truth, pose IoU, over what the study's models made, and of
    the score's parts; n is the number of models, of means of their seeds, or of clips."""
    from scipy.stats import spearmanr

    made = [c for c in each_once(checkpoints()) if "score_away" in c]
    number = Counter(where for where, _ in study.study_prompts())
    for c, name in itertools.product(made, ("score", "pose_iou", "shape", "motion", "texture")):
        c[name] = sum(number[w] * c[f"{name}_{w}"] for w in number) / number.total()  # the mean over all prompts

    def pair(rows, *names):
        return [[row[name] for row in rows] for name in names or ("score", "pose_iou")]

    pairs = {"all prompts": pair(made)} | {f"prompts {w}": pair(made, f"score_{w}", f"pose_iou_{w}") for w in number}
    pairs |= {f"{part} alone": pair(made, part, "pose_iou") for part in ("shape", "motion", "texture")}
    pairs["sound models"] = pair([c for c in made if c["loss_concept"] < untrained_loss(made)])
    means = [list(map(statistics.fmean, pair(of_seeds))) for of_seeds in by_model(made).values()]
    pairs["means of seeds"] = list(zip(*means))
    pairs["single clips"] = pair(each_once(study.read_table(study.table("clips"))))
    for method in ("full", "lora"):
        of_method = [c for c in made if c["arm"].split()[0] == method]
        pairs[f"change of the weights and distortion, {method}"] = pair(of_method, "weight_change", "score_away")
    return [{"of": of, "Spearman": f"{spearmanr(*xy).statistic:.2f}", "n": len(xy[0])} for of, xy in pairs.items()]


# -------------------------------------------------------------------------------------------------------------- figures

METHODS = {"full": "tab:red", "lora": "tab:blue", "qlora": "tab:green", "base": "0.4"}  # colours
ALONG = dict(zip(LABELS["along"], ("tab:red", "tab:pink", "tab:orange", "tab:blue", "0.4")))
COLOURS = ("tab:red", "tab:blue", "tab:cyan", "tab:purple", "tab:olive", "tab:orange", "0.3")  # of groups


def show_models(figure, made, question):
    """A row a model, a panel a measure: a dot for each seed, a line for their mean; dotted, the base's mean."""
    steps, measures = [0, *map(int, QUESTIONS[question]["steps"].split())], QUESTIONS[question]["panels"].split()
    wanted = ["base", *(name for name, arm in study.study_arms().items() if question in arm.questions)]
    models = [at for name in wanted for at in by_model(made) if at[0] == name and at[1] in steps]
    figure.set_figheight(max(2.2, 1.1 + 0.19 * len(models)))
    panels = figure.subplots(1, len(measures), sharey=True)
    for axes, measure in zip(panels, measures):
        for y, at in enumerate(models):
            if values := list(of_model(made, measure, *at).values()):
                colour, mean = METHODS[at[0].split()[0]], statistics.fmean(values)
                axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.6)
                axes.plot([mean, mean], [y - 0.35, y + 0.35], color=colour, linewidth=2)
        axes.axvline(base_mean(made, measure), color=METHODS["base"], linewidth=0.7, linestyle=":")
        axes.set_title(SHOWN[measure])
        axes.grid(axis="y")
    names = []
    for arm, step, share in models:
        name = arm.replace("as on record", "as reported") + (f", {step:g} steps" if len(steps) > 2 else "")
        names.append(name + (f", {share:g} of the way" if share != 1 or arm.endswith("back") else ""))
    panels[0].set_yticks(range(len(models)), names)
    panels[0].invert_yaxis()


def show_along(figure, panels, ticks=()):
    """A panel for each (title, height of the base, {label: (x, lists of values, look)}), along the steps of `ticks` or
    along learning rates: lines through means, bands from the least to the most."""
    for axes, (title, base, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        axes.axhline(base, color=METHODS["base"], linewidth=0.8, linestyle=":", label="base")
        for label, (x, values, look) in lines.items():
            (line,) = axes.plot(x, list(map(statistics.fmean, values)), marker="o", label=label, **look)
            low, high = list(map(min, values)), list(map(max, values))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.14, linewidth=0)
        axes.set_xscale("symlog" if ticks else "log", **({"linthresh": 125} if ticks else {}))
        if ticks:
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks], rotation=60)
        scale = "log" if "held-out loss" in title and not ticks else "linear"
        axes.set(title=title, xlabel="step" if ticks else "learning rate", yscale=scale)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def show_styles(figure):
    """Question 2: how much of a style the clips show along the steps, where it is asked for and where not."""
    made, panels = style_checkpoints(), []
    for measure in ("style_{}asked", "pose_iou_{}asked", "loss_style"):
        lines = {}
        for arm, kind in itertools.product(study.STYLE_ARMS, ("", "un")):
            s = series(made, f"style {arm}", measure.format(kind))
            look = {"color": ALONG[arm], "linestyle": ":" if kind else "-"}
            lines[f"{arm}, where {'not ' * bool(kind)}asked"] = s.x, s.values, look
        panels.append((LABELS["style"][measure.format("")].removesuffix(" where asked"), s.mean[0], lines))
    show_along(figure, panels, study.STYLE_AT)


def show_steps(figure, made, question):
    """Question 2: measures along the steps, mean and range over seeds."""
    figure.set_figheight(5.6)
    above, below = figure.subfigures(2, 1)
    panels = []
    for measure in ("score_away", "colour", "concept_concept"):
        of_arms = {arm: series(made, arm, measure, long=True) for arm in ALONG}
        lines = {LABELS["along"][arm]: (s.x, s.values, {"color": ALONG[arm]}) for arm, s in of_arms.items()}
        panels.append((SHOWN[measure], base_mean(made, measure), lines))
    show_along(above, panels, [0, *study.EVERY, *study.LONG[1:]])  # for the first of LONG there is no room
    show_styles(below)


def show_rates(figure, made, question):
    """Question 3: measures along the learning rate after 500 steps, and the held-out loss of two bases of other widths
    over that before training; mean and range over seeds."""
    figure.set_size_inches(12, 3.2)
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1.3))
    panels, widths = [], {}
    for measure in ("score_away", "loss_concept", "concept_concept"):
        lines = {}
        for method in ("full", "lora"):
            arms = sorted((a for a in study.study_arms().values() if a.group == method), key=lambda a: a.fields["lr"])
            values = [of_model(made, measure, arm.name).values() for arm in arms]
            lines[method] = [arm.fields["lr"] for arm in arms], values, {"color": METHODS[method]}
        panels.append((f"{SHOWN[measure]}, after 500 steps", base_mean(made, measure), lines))
    for size, seeds in width_ratios("concept").items():
        rates = sorted(set().union(*seeds.values()))
        widths[f"full, width {size}"] = rates, [[s[rate] for s in seeds.values() if rate in s] for rate in rates], {}
    show_along(left, panels)
    show_along(right, [("held-out loss / the base's", 1, widths)])
    (axes,) = right.axes
    axes.minorticks_off()
    axes.set_xticks((5e-4, 1e-3, 2e-3), ("5e-4", "1e-3", "2e-3"))
    axes.set_yticks((1, 2, 5), ("1", "2", "5"))


def show_frontier(figure, made, question):
    """Question 4: every model of the sweeps, its distortion and what it lost against what it learned and how far its
    weights went. Above all of them, below those that are not ruined."""
    figure.set_figheight(5.6)
    arms = study.study_arms()
    sweeps = [c for c in made if c["arm"] in arms and 4 in arms[c["arm"]].questions and "score_away" in c]
    models = by_model(c for c in sweeps if c["step"] <= 500 and c["blend"] == 1)
    panels = (("concept_concept", "score_away"), ("concept_concept", "loss_away"), ("weight_change", "score_away"))
    for row, limit in zip(figure.subplots(2, 3), (math.inf, untrained_loss(made))):
        for axes, (x, y) in zip(row, panels):
            for marker, colour, (group, label) in zip("osv<>D*", COLOURS, LABELS["group"].items()):
                of_group = [of_seeds for (arm, *_), of_seeds in models.items() if arms[arm].group == group]
                means = [[statistics.fmean(c[m] for c in cs) for m in (x, y, "loss_concept")] for cs in of_group]
                points = [(mean_x, mean_y) for mean_x, mean_y, loss in means if loss < limit]
                axes.plot(*zip(*points), marker, color=colour, markersize=4, alpha=0.8, label=label)
            axes.axhline(base_mean(made, y), color=METHODS["base"], linewidth=0.8, linestyle=":")
            axes.set(xlabel=SHOWN[x], ylabel=SHOWN[y] + (", sound models" if limit < math.inf else ""))
            axes.set_xscale("log" if x == "weight_change" else "linear")
            axes.set_yscale("log" if y == "loss_away" and limit == math.inf else "linear")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def show_alarm(figure, made, question):
    """Question 10: the loss on a few held-out clips over the base's in the first steps; red where the study's other
    seeds end ruined. And how well each number separates these from the others."""
    figure.set_size_inches(12, 4.2)
    looks = study.read_table(study.table("alarm"))
    worse, others = ended_worse(made, looks)
    kinds = {"above it at step 500, other seeds": worse, "near or below it, but bent": study.BENT, "below it": others}
    *panels, last = figure.subplots(1, 3)
    titles = {"ratio": "loss on four held-out clips / the base's", "update_ratio": "size of a step / what is trained"}
    for axes, (measure, title) in zip(panels, titles.items()):
        for colour, (label, arms) in zip(("tab:red", "tab:orange", "tab:blue"), kinds.items()):
            for arm, seed in sorted({(r["arm"], r["seed"]) for r in looks if r["arm"] in arms}):
                way = [(r["step"], r[measure]) for r in looks if (r["arm"], r["seed"]) == (arm, seed)]
                axes.plot(*zip(*way), "-" if arm.startswith("full") else "--", color=colour, linewidth=0.9, alpha=0.7)
            axes.plot([], [], color=colour, label=f"settings {label}")
        axes.set(title=title, xlabel="step", yscale="log")
    panels[0].plot([], [], "--", color="0.3", label="dashed: LoRA")
    panels[0].axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    for name, aucs in alarm_aucs(made, looks).items():
        steps = sorted({step for _, step in aucs})
        means = [statistics.fmean(v for (_, step), v in aucs.items() if step == look) for look in steps]
        last.plot(steps, means, "o-" if len(steps) > 1 else "*", label=ALARM_NUMBERS[name])
    last.set(title="red from blue: AUC of each number", xlabel="step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower right", ncols=2)


def figure(question):
    """A matplotlib figure for a question, or for "style", from the tables as they stand."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=study.HERE / "results/figures.mplstyle"):
        picture = Figure(figsize=(10, 2.8), layout="constrained")
        if question == "style":
            show_styles(picture)
        else:
            show = {2: show_steps, 3: show_rates, 4: show_frontier, 10: show_alarm}.get(question, show_models)
            picture.suptitle(f"{question}. {QUESTIONS[question]['words']}")
            show(picture, checkpoints(), question)
    return picture


# Column header: arm, seed, step. Prompts: one of the concept, then three from what is kept to what is bent by all.
METHODS_SHOWN = {
    "base": ("base", 0, 0), "full fine-tuning, 2e-3": ("full 2e-3", 1, 500),
    "full fine-tuning, 1e-4": ("full 1e-4", 1, 500), "LoRA, 2e-3": ("lora 2e-3", 1, 500),
}  # fmt: skip
PROMPTS_SHOWN, FRAMES_SHOWN, ZOOM = (0, 10, 9, 7), (0, 2), 3  # frames of four of a clip; pixels a pixel


def save_picture():
    """Save results/figures/methods.png: the same prompts and seeds by each method, from the contact sheets."""
    from PIL import Image, ImageDraw, ImageFont

    prompts, font, side = study.study_prompts(), ImageFont.load_default(32), study.world.SIZE * ZOOM
    top, left, gap, width = 56, 220, 16, side * len(FRAMES_SHOWN)
    size = left + len(METHODS_SHOWN) * (width + gap) - gap, top + len(PROMPTS_SHOWN) * (side + gap) - gap
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, (header, (arm, seed, step)) in enumerate(METHODS_SHOWN.items()):
        x = left + column * (width + gap)
        draw.text((x + width // 2, top // 2), header, "black", font, "mm")
        clips = study.on_sheet(study.picture_of({"arm": arm, "seed": seed, "step": step, "blend": 1}), len(prompts))
        for row, k in enumerate(PROMPTS_SHOWN):
            y = top + row * (side + gap)
            label = re.sub(" (named|moving|over)", r"\n\1", prompts[k][1])
            draw.multiline_text((8, y + side // 2), label, "black", font, "lm", spacing=8)
            for number, frame in enumerate(FRAMES_SHOWN):
                pixels = Image.fromarray((255 * clips[k][frame]).byte().permute(1, 2, 0).numpy())
                picture.paste(pixels.resize((side, side), Image.NEAREST), (x + number * side, y))
    picture.quantize(256, dither=Image.Dither.NONE).save(study.RESULTS / "figures/methods.png", optimize=True)


# ------------------------------------------------------------------------------------------------------------- the page


def markdown(rows, columns=None):
    """Rows as a Markdown table."""
    head = columns or list(rows[0])
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *([r[k] for k in head] for r in rows))]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def save_page(folder):
    """Write verdicts.csv, all claims that were tried, and README.md: results/template.md with numbers filled in. There
    {KEY} stands for what was found of the claim with that key, {table_3} for the claims of question 3."""
    import judges  # which needs this file for its tables

    rows, agreed = verdict_rows(), agreement()
    (folder / "verdicts.csv").unlink(missing_ok=True)
    study.append_rows(folder / "verdicts.csv", rows)
    on_page = [row for row in rows if row["key"]]
    numbers = {row["key"]: f"{row['effect']}, n = {row['n']}" for row in on_page}
    numbers |= {"claims": len(rows), "shown": len(on_page), "settings": len(study.study_arms())}
    numbers |= {"models": agreed[0]["n"], "rho": {row["of"]: row["Spearman"] for row in agreed}}
    numbers |= {f"{kind}_30": row["step 30"].split(",")[0] for kind, row in zip(("ruined", "sound"), alarms())}
    numbers |= {"validation": markdown(validation()), "verdicts": Counter(row["verdict"] for row in rows)}
    numbers |= judges.page_numbers()
    for question in QUESTIONS:
        of_question = [row for row in on_page if row["question"] == str(question)]
        numbers[f"table_{question}"] = markdown(of_question, ["claim", "effect", "n", "verdict", "put"])
    for name, template in (("README.md", "template.md"), ("judges.md", "template_judges.md")):
        page = (study.HERE / "results" / template).read_text("utf-8").format_map(numbers)
        (folder / name).write_text(page, "utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"results": results, "claims": verdict_rows, "validation": validation, "agreement": agreement}
    tables["alarms"] = alarms
    commands = [*tables, "figures", "picture", "page"]
    parser.add_argument("command", choices=[*commands, "all"], metavar="COMMAND", help="one of those above")
    parser.add_argument("--questions", nargs="+", type=int, choices=QUESTIONS, help="of results, claims, figures [all]")
    parser.add_argument("--to", type=Path, default=study.RESULTS, help="folder of README.md and verdicts.csv [results]")
    args = parser.parse_args(argv)
    for command in commands if args.command == "all" else [args.command]:
        if command in tables:
            rows = tables[command](*[args.questions] * (command in ("results", "claims")))
            print(f"\n{markdown(rows, ANSWER_COLUMNS if command == 'claims' else None)}")
        elif command == "figures":
            for question in args.questions or QUESTIONS:
                figure(question).savefig(study.RESULTS / f"figures/question_{question}.png", dpi=110)
        elif command == "picture":
            save_picture()
        else:
            save_page(args.to)


if __name__ == "__main__":
    main()
