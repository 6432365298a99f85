"""Train and evaluate AGF on one set of the UEA / UCR archive of time series.

    python train_uea.py --dataset JapaneseVowels

Protocol: a fixed number of epochs on the whole train split, then one pass over the test split.
`--protocol paper` adds what the field reports, the best epoch on the test split, and labels it.
"""

import argparse
import contextlib
import copy
import csv
import difflib
import functools
import json
import math
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import agf
from agf import UserError

# The default: one compact recipe for every data set. What goes beyond the paper, and why:
RECIPE = dict(
    basis="jacobi", order=5, a=1.0, b=0.0, identity=True,
    gamma=1.0,         # the orthogonality loss falls from here on; at 0.1 and below it rises
    dim=128, depth=2, heads=4, hidden=256, dropout=0.0, norm="pre", pool="mean", scale=False,
    kernel=11,         # embed 11 neighbouring steps: one step of a sensor says little     (1 = off)
    max_tokens=64,     # stride = ceil(length / 64): long series in seconds, not hours     (0 = off)
    zero_init=True,    # a mixer starts silent and is heard when it helps              (False = off)
    augment=0.3,       # warp time, scale channels, add noise: 120 series are few          (0 = off)
    mixup=0.4,         # train on blends of two series and of their labels                 (0 = off)
    optimizer="adamw", lr=1e-3, schedule="cosine", clip=1.0, batch_size=16,
    steps=600, epochs=None,      # epochs: as many as 600 steps need, at least 10
)
# The published setting: shared by all sets, then one row for each set.
PAPER = dict(
    dim=512, depth=2, heads=8, hidden=2048, dropout=0.1, norm="post", pool="flatten", scale=True,
    kernel=1, max_tokens=0, zero_init=False, augment=0.0, mixup=0.0,
    optimizer="radam", lr=1e-3, schedule="constant", clip=4.0, batch_size=16, steps=0, epochs=100,
)
PAPER_SETS = {   # basis, order, a, b, gamma, identity, and what else that set changes
    "EthanolConcentration": ("jacobi", 6, 1.5, -1.5, 0.1, True, {}),
    "FaceDetection": ("jacobi", 9, 2.0, 0.5, 0.1, True, {}),
    "Handwriting": ("jacobi", 3, 1.0, 0.2, 0.01, False, {}),
    "Heartbeat": ("chebyshev", 6, 0.0, 0.0, 0.01, False, {}),
    "JapaneseVowels": ("legendre", 4, 0.0, 0.0, 0.01, False, {}),
    "PEMS-SF": ("jacobi", 5, 1.5, 2.0, 0.1, True, {"epochs": 400}),
    "SelfRegulationSCP1": ("jacobi", 9, 1.5, 1.0, 0.1, True, {}),
    "SelfRegulationSCP2": ("jacobi", 7, 2.0, 1.5, 0.1, True, {}),
    "SpokenArabicDigits": ("jacobi", 4, 1.0, 0.0, 0.5, True, {"optimizer": "adam"}),
    "UWaveGestureLibrary": ("jacobi", 10, 2.0, 1.5, 0.1, True, {}),
}


# ------------------------------------------------------------------------------------- options

class Parser(argparse.ArgumentParser):
    def error(self, message):       # one line, no usage block above it
        raise UserError(f"{message} (see --help)")


def run_options(g):
    """What both scripts ask about a run."""
    g.add_argument("--out", metavar="DIR", help="run folder (default: runs/NAME-TIME)")
    g.add_argument("--resume", metavar="RUN", help="go on with an interrupted run, same numbers")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    g.add_argument("--seeds", type=int, default=1, metavar="N",
                   help="train N times, report mean and standard deviation (default: 1)")
    g.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed (default: 0)")
    g.add_argument("--compile", action="store_true", help="torch.compile: slow start, faster steps")


def model_options(g):
    """What both scripts ask about the recipe and the model; not given = the preset's value."""
    g.add_argument("--mixer", choices=list(agf.MIXERS), default="agf",
                   help="agf, its ablations uv (Sigma = 1) and usv (p(s) = s), softmax, or none")
    add_numbers(g, [("lr", float, "peak learning rate"),
                    ("dropout", float, "share of values dropped"),
                    ("gamma", float, "weight of the orthogonality loss"),
                    ("dim", int, "width of a token"), ("depth", int, "number of blocks"),
                    ("heads", int, "number of heads, divides the width"),
                    ("order", int, "degree K of the filter"), ("a", float, "Jacobi parameter"),
                    ("b", float, "Jacobi parameter")])
    g.add_argument("--basis", choices=agf.BASES)


def add_numbers(g, rows):
    for name, kind, text in rows:
        g.add_argument(f"--{name}", type=kind, help=text)


def check_lowest(setting, **lowest):
    """Refuse a number below its lowest value, and NaN. None = not given."""
    for name, low in lowest.items():
        value = setting[name]
        if value is not None and not (low <= value < math.inf):
            raise UserError(f"--{name.replace('_', '-')} must be at least {low:g}, got {value:g}")


def options(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what to run")
    g.add_argument("--dataset", metavar="NAME", help="a set of the UEA or UCR archive")
    g.add_argument("--list", action="store_true", help="name the sets usable now, and the paper's")
    g.add_argument("--data-dir", default="data", metavar="DIR",
                   help="first place for NAME/NAME_TRAIN.ts, downloads go there (default: data)")
    g.add_argument("--predict", metavar="FILE.ts", help="classify new series, CSV to standard out")
    g.add_argument("--checkpoint", metavar="RUN", help="the run folder (or model.pt) for --predict")
    run_options(g)
    g = p.add_argument_group("recipe (default: the chosen preset's)")
    g.add_argument("--preset", choices=["compact", "paper"], default="compact",
                   help="compact: one recipe for all sets; paper: the set's published setting")
    g.add_argument("--protocol", choices=["honest", "paper"], default="honest",
                   help="paper: also report the best epoch on the TEST split (optimistic)")
    add_numbers(g, [("epochs", int, "passes over the train split"),
                    ("batch-size", int, "series in a step"),
                    ("augment", float, "strength of time warp, scaling and noise; 0 = none"),
                    ("mixup", float, "blend pairs of series by Beta(m, m); 0 = none")])
    g = p.add_argument_group("recipe and model (default: the chosen preset's)")
    model_options(g)
    add_numbers(g, [("kernel", int, "time steps seen by one token; 1 = one"),
                    ("max-tokens", int, "stride to have at most so many tokens; 0 = no stride")])
    g.add_argument("--zero-init", type=int, choices=[0, 1], help="mixers start at zero output")
    g.add_argument("--pool", choices=["mean", "flatten", "first"])
    return p.parse_args(argv), p


def resolve(args):
    """Preset values, overridden by what the user gave: the full settings of a run."""
    setting = dict(RECIPE)
    if args.preset == "paper":
        if args.dataset not in PAPER_SETS:
            raise UserError(f"--preset paper has no published setting for {args.dataset}; "
                            f"it has: {', '.join(PAPER_SETS)}")
        *filter_setting, extra = PAPER_SETS[args.dataset]
        names = ("basis", "order", "a", "b", "gamma", "identity")
        setting = PAPER | dict(zip(names, filter_setting)) | extra
    setting |= {k: v for k, v in vars(args).items() if k in setting and v is not None}
    check_lowest(setting, epochs=1, batch_size=1, lr=1e-12, gamma=0, augment=0, mixup=0,
                 max_tokens=0)
    if args.seeds < 1 or args.seed < 0:
        raise UserError(f"--seeds must be at least 1, --seed at least 0: {args.seeds}, {args.seed}")
    return setting


# ---------------------------------------------------------------------------------------- data

def aeon_folder():
    import aeon
    return Path(aeon.__file__).parent / "datasets" / "data"


def find(name, data_dir):
    """Folder with NAME_TRAIN.ts and NAME_TEST.ts: yours, what aeon ships, else aeon's download."""
    for folder in (Path(data_dir) / name, Path(data_dir), aeon_folder() / name):
        files = [folder / f"{name}_{split}.ts" for split in ("TRAIN", "TEST")]
        if all(f.is_file() for f in files):
            return files
        if any(f.is_file() for f in files):
            missing = [f for f in files if not f.is_file()][0]
            raise UserError(f"{missing} is missing beside its other half")
    from aeon.datasets import load_classification
    from aeon.datasets.tsc_datasets import tsc_zenodo
    if name not in tsc_zenodo:
        near = {n.lower(): n for n in tsc_zenodo}
        near = [near[n] for n in difflib.get_close_matches(name.lower(), near, 3, 0.5)]
        raise UserError(f"unknown data set {name!r}; --list names those usable now"
                        + (f"; did you mean {' or '.join(near)}?" if near else ""))
    print(f"downloading {name} with aeon, which shows no progress (a few sets have hundreds of MB)")
    home = Path(data_dir)
    try:
        with whole(home / name) as part:
            load_classification(name, split="train", extract_path=str(part.parent),
                                load_equal_length=False, load_no_missing=False)
    except Exception as error:
        raise UserError(
            f"could not download {name} ({type(error).__name__}: {first_line(error)}). Fetch "
            f"https://timeseriesclassification.com/aeon-toolkit/{name}.zip by hand, or zenodo.org "
            f"record {tsc_zenodo[name]}, and unpack it so that {home / name / f'{name}_TRAIN.ts'} "
            f"and _TEST.ts exist") from None
    return [home / name / f"{name}_{split}.ts" for split in ("TRAIN", "TEST")]


@contextlib.contextmanager
def whole(path):
    """A place to write a file or folder that then goes to `path`: all of it, or nothing stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as folder:
        yield Path(folder, path.name)
        try:
            os.replace(Path(folder, path.name), path)
        except OSError:
            if not path.exists():    # else another process was faster
                raise


def first_line(error):
    return (str(error).splitlines() or [""])[0][:160]


def read(path, need_labels=True):
    """One .ts file -> list of float32 arrays (time, channels), labels, class names."""
    from aeon.datasets import load_from_ts_file
    try:
        X, y, meta = load_from_ts_file(str(path), return_meta_data=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:       # the reader meets a damaged file in many ways
        raise UserError(f"{path}: not a complete .ts file: {first_line(error)}") from None
    if len(X) == 0:
        raise UserError(f"{path}: holds no series: it is empty, or not a .ts file")
    if need_labels and not meta["classlabel"]:
        raise UserError(f"{path}: the labels are missing (no '@classLabel true ...' in its header)")
    series, missing = [], 0
    for i, x in enumerate(X):
        x = np.array(x.T, dtype=np.float64)                      # (time, channels)
        if x.size == 0:
            raise UserError(f"{path}: series {i + 1} has length 0")
        if np.isinf(x).any():
            raise UserError(f"{path}: series {i + 1} has an infinite value")
        bad = np.isnan(x)
        missing += int(bad.sum())
        for c in np.flatnonzero(bad.any(0)):                     # linear in time, flat at the ends
            good = np.flatnonzero(~bad[:, c])
            if len(good):
                x[:, c] = np.interp(np.arange(len(x)), good, x[good, c])
        series.append(x.astype(np.float32))
    if missing:
        print(f"{path}: {missing} missing values, interpolated along time", file=sys.stderr)
    return series, [str(label) for label in y], meta["class_values"]


def pad(series, length, mean, std):
    """Standardise, pad to a common length: -> x (N, length, channels), keep (N, length)."""
    x = torch.zeros(len(series), length, len(mean))
    keep = torch.zeros(len(series), length, dtype=torch.bool)
    for i, one in enumerate(series):
        one = (torch.from_numpy(one[:length]) - mean) / std
        x[i, :len(one)] = one.nan_to_num(0.0)        # a channel without any value: the mean
        keep[i, :len(one)] = True
    return x, keep


def load_dataset(name, data_dir):
    """Train and test split as tensors, scaled with statistics of the train split only."""
    files = find(name, data_dir)
    (train, train_y, classes), (test, test_y, _) = read(files[0]), read(files[1])
    classes = classes or sorted(set(train_y))
    for path, split, labels in ((files[0], train, train_y), (files[1], test, test_y)):
        if len({x.shape[1] for x in split} | {train[0].shape[1]}) > 1:
            raise UserError(f"{path}: not all series have {train[0].shape[1]} channels")
        if unknown := sorted(set(labels) - set(classes)):
            raise UserError(f"{path}: label {unknown[0]!r} is none of: {', '.join(classes)}")
    steps = torch.cat([torch.from_numpy(x) for x in train]).double()
    mean, std = steps.nanmean(0), ((steps - steps.nanmean(0)) ** 2).nanmean(0).sqrt()
    mean, std = mean.nan_to_num(0).float(), std.nan_to_num(1).clamp(min=1e-8).float()
    length = max(len(x) for x in train)
    if cut := sum(len(x) > length for x in test):
        print(f"{cut} test series are longer than any train series: cut to {length} steps")
    index = {label: i for i, label in enumerate(classes)}
    split = [(*pad(x, length, mean, std), torch.tensor([index[label] for label in y]))
             for x, y in ((train, train_y), (test, test_y))]
    data = dict(dataset=name, classes=classes, mean=mean.tolist(), std=std.tolist())
    return *split, data


def augment(x, keep, strength, rng):
    """Warp time smoothly (ends stay ends), scale each channel, add noise. x (B, n, channels)."""
    B, n, channels = x.shape
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32)).to(x.device)
    last = (keep.sum(1, keepdim=True) - 1).clamp(min=1)                      # (B, 1)
    harmonic = math.pi * torch.arange(1, 4, device=x.device)                 # three half waves
    size = strength * normal(B, 1, 3).clamp(-1, 1) / harmonic
    t = torch.arange(n, device=x.device) / last                              # (B, n), 1 at the end
    t = (t + (size * torch.sin(t[:, :, None] * harmonic)).sum(-1)).clamp(0, 1) * last
    left = t.long().clamp(max=n - 1)                                         # (B, n)
    right = torch.minimum(left + 1, last)
    at = lambda i: x.gather(1, i[:, :, None].expand(-1, -1, channels))
    x = torch.lerp(at(left), at(right), (t - left)[:, :, None])
    x = x * torch.exp(0.7 * strength * normal(B, 1, channels)) + strength / 3 * normal(*x.shape)
    return x.masked_fill(~keep[:, :, None], 0)


def blend(x, keep, y, strength, rng):
    """Mixup. A batch is in random order, so the next series is a random partner. y (B, classes)."""
    share = rng.beta(strength, strength)
    x, y = (share * t + (1 - share) * t.roll(1, 0) for t in (x, y))
    return x, keep | keep.roll(1, 0), y


# ------------------------------------------------------------------------------------- one run

class Stopped(Exception):
    """Ctrl-C or a polite kill: the state is saved, --resume goes on."""


def build(setting, mixer, data, length):
    """The model of a setting, before any training: what cannot be built is said now."""
    stride = -(-length // setting["max_tokens"]) if setting["max_tokens"] else 1
    names = ("dim", "depth", "heads", "hidden", "dropout", "norm", "pool", "scale", "kernel",
             "zero_init", "order", "basis", "a", "b", "identity")
    config = dict(classes=len(data["classes"]), length=length, channels=len(data["mean"]),
                  mixer=mixer, stride=stride, **{name: setting[name] for name in names})
    try:
        return agf.AGFTransformer(agf.AGFConfig(**config))
    except ValueError as error:      # a width that heads do not divide, an undefined basis
        raise UserError(str(error)) from None


def batches(split, size, device):
    """Whole split in order; each batch trimmed to its longest series (padding changes nothing)."""
    x, keep, _ = split
    for i in range(0, len(x), size):
        k = keep[i:i + size]
        n = int(k.sum(1).max())
        yield x[i:i + size, :n].to(device), k[:, :n].to(device)


def accuracy(model, split, device):
    found = agf.evaluate(model, batches(split, 128, device)).argmax(1)
    return (found == split[2]).double().mean().item()


def without_mixers(model):
    """A copy whose mixers output zero: how much of the accuracy is theirs?"""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mixer = agf.NoMixer()
    return model


def make_optimizer(model, kind, lr):
    """AdamW decays matrices only; Adam and RAdam are the official code's, without decay."""
    if kind != "adamw":
        kinds = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}
        return kinds[kind](model.parameters(), lr=lr)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def train(args, setting, config, splits, device, seed, state, save, log, bar):
    """One seed, from scratch or from `state`: -> (model, result of this seed)."""
    train_split, test_split = splits
    torch.manual_seed(seed)
    model = agf.AGFTransformer(config).to(device)
    optimizer = make_optimizer(model, setting["optimizer"], setting["lr"])
    x, keep, y = (t.to(device) for t in train_split)
    lengths, size = train_split[1].sum(1), setting["batch_size"]
    per_epoch = -(-len(y) // size)
    epochs = setting["epochs"] or max(10, -(-setting["steps"] // per_epoch))
    steps = epochs * per_epoch

    def batch_at(step):
        epoch, i = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch, len(y)]).permutation(len(y))
        pick = torch.from_numpy(order[i * size:(i + 1) * size])
        n = x.shape[1] if args.compile else int(lengths[pick].max())     # compile one shape
        pick = pick.to(device)
        series, real = x[pick, :n], keep[pick, :n]
        target = F.one_hot(y[pick], config.classes).float()
        rng = np.random.default_rng([seed, step])
        if setting["augment"]:
            series = augment(series, real, setting["augment"], rng)
        if setting["mixup"]:
            series, real, target = blend(series, real, target, setting["mixup"], rng)
        return series, real, target

    def rate(step):
        if setting["schedule"] == "constant":
            return setting["lr"]
        warmup = min(1, (step + 1) / (0.1 * steps))
        return setting["lr"] * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))

    start, sums, spent, tested = 0, [0.0, 0.0], 0.0, []
    if state:
        agf.restore(state, model, optimizer)
        start, sums, spent, tested = state["step"], state["sums"], state["seconds"], state["tested"]
    bar.reset(steps)
    bar.update(start)
    begin = saved = time.perf_counter()

    def after_step(done, loss, ortho):
        nonlocal saved
        sums[0] += loss.item()
        sums[1] += ortho.item()
        bar.update()
        if not math.isfinite(sums[0]):
            raise UserError(f"the loss is not finite after step {done} of seed {seed}: "
                            f"try a smaller --lr (now {setting['lr']:g})")
        now = time.perf_counter()
        if done % per_epoch == 0:
            row = dict(seed=seed, epoch=done // per_epoch, step=done, lr=rate(done - 1),
                       loss=sums[0] / per_epoch, ortho=sums[1] / per_epoch)
            sums[:] = [0.0, 0.0]
            if args.protocol == "paper":
                tested.append(accuracy(model, test_split, device))
                row["test_accuracy"] = tested[-1]
            log(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", ortho=f"{row['ortho']:.3f}")
        if stop_asked or now - saved > SAVE_EVERY:
            saved = now
            save(agf.training_state(model, optimizer)
                 | dict(step=done, sums=list(sums), seconds=spent + now - begin, tested=tested))
            if stop_asked:
                raise Stopped(args.out)

    agf.fit(model, optimizer, batch_at, steps, rate=rate, start=start, gamma=setting["gamma"],
            clip=setting["clip"], net=torch.compile(model) if args.compile else None,
            after_step=after_step)
    seconds = spent + time.perf_counter() - begin
    result = dict(seed=seed, epochs=epochs, train_seconds=round(seconds, 2),
                  test_accuracy=accuracy(model, test_split, device),
                  test_accuracy_mixers_off=accuracy(without_mixers(model), test_split, device))
    if args.protocol == "paper":
        result["best_test_accuracy"] = max(tested)
    return model, result


stop_asked = []                      # filled by the signal handler
SAVE_EVERY = 10                      # seconds between two checkpoints


def run(args):
    """Train all seeds of one setting, new or resumed; leaves the whole run folder."""
    args.out = args.out or time.strftime(f"runs/{args.dataset}-%Y%m%d-%H%M%S")
    out = Path(args.out)
    state = {}                       # of an interrupted run
    if args.resume and (out / "checkpoint.pt").exists():
        state = agf.load(out / "checkpoint.pt")
    begin = time.perf_counter()
    setting = resolve(args)
    device, reason = pick_device(args.device)
    train_split, test_split, data = load_dataset(args.dataset, args.data_dir)
    model = build(setting, args.mixer, data, train_split[0].shape[1])
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    if not args.resume:
        prepare(out, dict(command=command_line(), options=vars(args), setting=setting,
                          model=agf.asdict(config), versions=versions("aeon")))
    print(f"{args.dataset}: {len(train_split[2])} train, {len(test_split[2])} test series, "
          f"{config.channels} channels, length {config.length} -> {config.tokens} tokens, "
          f"{config.classes} classes")
    print(f"mixer {args.mixer}, {parameters:,} parameters, {device} ({reason}), run folder {out}",
          flush=True)

    train_one = functools.partial(train, args, setting, config, (train_split, test_split), device)
    results, rows = all_seeds(args, state, train_one, dict(config=agf.asdict(config), **data))
    facts = dict(dataset=args.dataset, mixer=args.mixer, preset=args.preset, protocol=args.protocol,
                 parameters=parameters, device=f"{device} ({reason})", versions=versions("aeon"))
    if args.protocol == "paper":
        facts["best_test_accuracy_label"] = "best epoch, chosen on the TEST split: optimistic"
        best = np.mean([r["best_test_accuracy"] for r in results])
        print(f"best epoch on the test split: {100 * best:.2f} % (optimistic: chosen on it)")
    model = load_model(out)[0].to(device)
    finish(out, results, rows, begin, model, next(batches(test_split, 64, device)), "epoch", facts)


def all_seeds(args, state, train_one, parts, first=True):
    """Train each seed, from the start or from an interrupted run's `state`: -> results, log rows.

    train_one(seed, its saved state or None, save, log, bar) -> (model, result of this seed).
    parts: what model.pt holds beside the weights. Only the `first` of several processes writes.
    """
    out, results, rows = Path(args.out), state.get("results", []), state.get("rows", [])

    def save(training=None):
        if first:
            agf.save(out / "checkpoint.pt", results=results, rows=rows, training=training)
            write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop_asked.append(True))
    from tqdm import tqdm
    for seed in range(args.seed + len(results), args.seed + args.seeds):
        with tqdm(desc=f"seed {seed}", unit="step", disable=None if first else True,
                  leave=False) as bar:
            model, result = train_one(seed, state.pop("training", None), save, rows.append, bar)
        if first and not results:    # model.pt is the first seed's: the best would be cheating
            agf.save(out / "model.pt", model=model.state_dict(), **parts)
        results.append(result)
        save()
        if first:
            dev = f"dev {100 * result['dev_accuracy']:.2f} %, " if "dev_accuracy" in result else ""
            print(f"seed {seed}: test accuracy {100 * result['test_accuracy']:.2f} % "
                  f"({100 * result['test_accuracy_mixers_off']:.2f} with the mixers off), {dev}"
                  f"{result['epochs']} epochs, {result['train_seconds']:.1f} s", flush=True)
    return results, rows


def finish(out, results, rows, begin, model, batch, time_axis, facts, panels=()):
    """Write result.json and the pictures. Numbers of each seed go side by side in lists."""
    column = {key: [r[key] for r in results] for key in results[0]}
    score = torch.tensor(column["test_accuracy"], dtype=torch.float64)
    deviation = score.std().item() if len(score) > 1 else None
    summary = facts | column | dict(
        seeds=column["seed"], epochs=results[0]["epochs"], test_accuracy_mean=score.mean().item(),
        test_accuracy_std=deviation, date=time.strftime("%Y-%m-%d"),
        command=json.loads((out / "config.json").read_text())["command"])
    del summary["seed"]
    curves(out, rows, time_axis, summary, panels)
    filters(out, model, batch)
    write(out / "result.json", json.dumps(summary, indent=2) + "\n")
    (out / "checkpoint.pt").unlink()
    spread = "" if deviation is None else f" +- {100 * deviation:.2f} (std, n = {len(score)})"
    print(f"test accuracy {100 * score.mean():.2f} %{spread}; "
          f"{time.perf_counter() - begin:.0f} s in all; see {out}")


def pick_device(name):
    try:
        device, reason = agf.choose_device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise UserError(f"--device {name}: not usable here ({first_line(error)})") from None
    return device, reason


def command_line():
    return shlex.join(["python", *sys.argv])


def versions(*more):
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                **{name: metadata.version(name) for name in more})


def write(path, text):
    part = Path(f"{path}.part")
    part.write_text(text)
    os.replace(part, path)


def prepare(out, config):
    """A new run folder with its config.json, or a plain refusal."""
    try:
        if (out / "config.json").exists():
            raise UserError(f"{out} already holds a run: take another --out, or --resume {out}")
        out.mkdir(parents=True, exist_ok=True)
        write(out / "config.json", json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the run folder {out}: {error.strerror}") from None


# ------------------------------------------------------------------------------------ pictures

def pyplot():
    import matplotlib
    matplotlib.use("Agg")                         # files, no window
    import matplotlib.pyplot as plt
    return plt


def curves(out, rows, time, summary, more=()):
    """curves.png: losses against rows[..][time], and `more` panels as (key, label)."""
    panels = [("loss", "train cross-entropy (nats)"), ("ortho", "orthogonality loss"), *more]
    colours = ("#0072B2", "#D55E00", "#009E73")
    fig, axes = pyplot().subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2),
                                  layout="constrained")
    for ax, (key, label), colour in zip(axes, panels, colours):
        for seed in summary["seeds"]:
            mine = [r for r in rows if r["seed"] == seed]
            ax.plot([r[time] for r in mine], [r[key] for r in mine], color=colour, alpha=0.7)
        ax.set(xlabel=time, ylabel=label, yscale="log" if key == "loss" else "linear")
    fig.suptitle(f"{summary['dataset']}, {summary['mixer']}: test accuracy "
                 f"{100 * summary['test_accuracy_mean']:.1f} %, {len(summary['seeds'])} seed(s)")
    save_figure(fig, out / "curves.png")


def filters(out, model, batch):
    """filters.png: p(s) of each layer, and the singular values s at the real tokens of a batch."""
    mixers = [block.mixer for block in model.blocks if hasattr(block.mixer, "filter")]
    if not mixers:
        return
    seen = []                                     # s at the real tokens, layer by layer

    def look(mixer, inputs):
        s = mixer.factors(*inputs)[1]             # (B, h, n, d)
        real = slice(None) if inputs[1] is None else inputs[1]
        seen.append(s.transpose(1, 2)[real].flatten().cpu().numpy())
    hooks = [mixer.register_forward_pre_hook(look) for mixer in mixers]
    agf.evaluate(model, [batch])
    for hook in hooks:
        hook.remove()
    fig, axes = pyplot().subplots(1, len(mixers), figsize=(4.5 * len(mixers), 3.2), sharey=True,
                                  layout="constrained", squeeze=False)
    grid = torch.linspace(0, 1, 201, device=batch[0].device)
    for i, (ax, mixer, s) in enumerate(zip(axes[0], mixers, seen)):
        ax.axhline(0, color="0.8", lw=0.8)
        ax.plot(grid.cpu(), mixer.filter(grid).detach().cpu(), color="black", label="learned p(s)")
        bins = ax.twinx()
        bins.hist(s, bins=60, range=(0, 1), color="#56B4E9", alpha=0.5)
        bins.set_yticks([])
        ax.set(title=f"layer {i + 1}", xlabel="singular value s")
        ax.set_zorder(bins.get_zorder() + 1)
        ax.patch.set_visible(False)
    axes[0][0].set_ylabel("filter response p(s)")
    axes[0][0].plot([], [], color="#56B4E9", lw=6, alpha=0.5, label="s on test data")
    axes[0][0].legend(loc="best", frameon=False)
    save_figure(fig, out / "filters.png")


def save_figure(fig, path):
    fig.savefig(f"{path}.part", format="png", dpi=120)
    os.replace(f"{path}.part", path)
    pyplot().close(fig)


# ------------------------------------------------------------------------------ predict, list, main

def load_model(run):
    """RUN (folder or model.pt) -> (model in eval mode, dict with dataset, classes, mean, std)."""
    path = Path(run) / "model.pt" if Path(run).is_dir() else Path(run)
    parts = agf.load(path)
    try:
        model = agf.AGFTransformer(agf.AGFConfig(**parts.pop("config")))
        model.load_state_dict(parts.pop("model"))
        return model.eval(), {k: parts[k] for k in ("dataset", "classes", "mean", "std")}
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(f"{path}: not a checkpoint of train_uea.py") from None


def predict(args):
    if not args.checkpoint:
        raise UserError("--predict needs --checkpoint RUN, the folder of a finished run")
    model, data = load_model(args.checkpoint)
    if args.dataset and args.dataset != data["dataset"]:
        raise UserError(f"{args.checkpoint} is a run on {data['dataset']}, not on {args.dataset}")
    series, _, _ = read(args.predict, need_labels=False)
    for i, one in enumerate(series):
        if one.shape[1] != len(data["mean"]):
            raise UserError(f"{args.predict}: series {i + 1} has {one.shape[1]} channels, but the "
                            f"checkpoint, of {data['dataset']}, takes {len(data['mean'])}")
    device, _ = pick_device(args.device)
    length = model.config.length
    if cut := sum(len(one) > length for one in series):
        print(f"{cut} series are too long for the model: cut to {length} steps", file=sys.stderr)
    x, keep = pad(series, length, torch.tensor(data["mean"]), torch.tensor(data["std"]))
    share = agf.evaluate(model.to(device), batches((x, keep, None), 128, device)).softmax(1)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["series", "label", *(f"p({name})" for name in data["classes"])])
    for i, row in enumerate(share.tolist()):
        table.writerow([i + 1, data["classes"][max(range(len(row)), key=row.__getitem__)],
                        *(f"{p:.6f}" for p in row)])


def list_sets(data_dir):
    have = {}
    for folder, where in ((aeon_folder(), "shipped with aeon"), (Path(data_dir), f"in {data_dir}")):
        for f in [*folder.glob("*_TRAIN.ts"), *folder.glob("*/*_TRAIN.ts")]:
            name = f.name.removesuffix("_TRAIN.ts")
            labels = "@classlabel true" in f.read_text(errors="replace")[:5000].lower()
            if f.with_name(f"{name}_TEST.ts").exists() and labels and not name.endswith("_eq"):
                have[name] = where
    print("Usable now, without a download:")
    print("\n".join(f"  {name:28s} {where}" for name, where in sorted(have.items())))
    print("The ten of the paper (--preset paper knows their published settings):")
    for name in PAPER_SETS:
        print(f"  {name:28s} {have.get(name, 'is downloaded at first use')}")


def resumed(args, parser):
    """The options of the interrupted run, from its config.json."""
    free = ("device", "data_dir")    # these may differ: another machine
    given = {k for k, v in vars(args).items() if v != parser.get_default(k)}
    path = Path(args.resume) / "config.json"
    try:
        saved = json.loads(path.read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume {args.resume}: no run there, {path} is unreadable") from None
    for name in given - {"resume", *free}:
        if vars(args)[name] != saved.get(name):
            raise UserError(f"--resume keeps the settings of the run: leave --"
                            f"{name.replace('_', '-')} out (it was {saved.get(name)})")
    changed = {name: vars(args)[name] for name in free if name in given}
    return argparse.Namespace(**saved | changed | dict(resume=args.resume, out=args.resume))


def finished(run):
    """Is there nothing left to resume? Then say so."""
    result = Path(run) / "result.json"
    if result.exists():
        mean = json.loads(result.read_text())["test_accuracy_mean"]
        print(f"{run} is finished: test accuracy {100 * mean:.2f} %, see {result}")
    return result.exists()


def guard(script, work, argv, process=""):
    """work(argv) -> exit status. A mistake that the user can mend is told in one line."""
    try:
        work(argv)
    except (UserError, OSError) as error:        # OSError: a full disk, a folder taken away
        print(f"{script}{process}: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped; go on with: python {script} --resume {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:        # before the first step: nothing to keep
        print("stopped", file=sys.stderr)
        return 130
    return 0


def start(argv):
    args, parser = options(argv)
    if args.list:
        return list_sets(args.data_dir)
    if args.predict:
        return predict(args)
    if args.resume:
        args = resumed(args, parser)
        if finished(args.resume):
            return
    if not args.dataset:
        raise UserError("which data set? Try --dataset JapaneseVowels, or --list")
    run(args)


def main(argv=None):
    return guard("train_uea.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
