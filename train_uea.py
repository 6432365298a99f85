"""Train and evaluate AGF on one set of the UEA / UCR archive of time series.

    python train_uea.py --dataset JapaneseVowels
    train_uea.AGFClassifier().fit(X, y).predict(X_new)        # on arrays (N, channels, time)

Protocol: a fixed number of epochs on the whole train split, then one pass over the test split.
`--protocol paper` adds what the field reports, the best epoch on the test split, and labels it."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import agf

try:
    import aeon
    import pandas                     # which aeon brings
    from aeon.classification import BaseClassifier
    SHIPPED = Path(aeon.__file__).parent / "datasets" / "data"
except ImportError:                   # train_lra.py does without
    BaseClassifier, SHIPPED = object, Path()

# Each option is declared once, in one of these tables; "" and 0 with "default:" mean: not given.
Option = namedtuple("Option", "default help limits", defaults=[()])      # limits: or the choices
RUN = dict(
    out=Option("", "run folder, a new one; default: runs/NAME-TIME"),
    resume=Option("", "go on with this interrupted run, same numbers"),
    data_dir=Option("data", "where data is looked for, and where downloads go"),
    device=Option("auto", "auto, cpu, cuda, cuda:1, mps"), compile=Option(False, "torch.compile"),
    seed=Option(0, "the first seed", (0, 2**31 - 1000)), seeds=Option(1, "how many", (1, 1000)))
MODEL = {name: Option(default, "see agf.AGFConfig", (1, 10**6) if type(default) is int else ())
         for name, default in dict(
    a=1.0, b=0.0, identity=True, dim=128, depth=2, heads=4, hidden=256, dropout=0.0, norm="pre",
    pool="mean").items()} | dict(
    mixer=Option("agf", "agf, uv (Sigma = 1), usv (p(s) = s), softmax, or none", agf.MIXERS),
    basis=Option("jacobi", "of the filter: jacobi, legendre, chebyshev, monomial", agf.BASES),
    order=Option(5, "degree K", (0, 100)), batch_size=Option(16, "of a step", (1, 10**6)),
    lr=Option(1e-3, "peak rate", (1e-12, 100)), gamma=Option(1.0, "weight of ortho", (0, 1e4)))
RECIPE = MODEL | dict(
    epochs=Option(0, "passes over train; 0: 600 steps, at least --least-epochs", (0, 10**6)),
    least_epochs=Option(10, "see --epochs", (1, 10**6)),
    stem=Option(0, "convolutions of four widths first, with so many channels each", (0, 10**4)),
    kernel=Option(11, "steps of time in one token, odd", (1, 10**6)),
    clip=Option(1.0, "of gradients", (1e-6, 1e6)),
    max_tokens=Option(64, "stride to have at most so many tokens, 0 = no stride", (0, 10**6)),
    scale=Option(False, "see agf.AGFConfig"), zero_init=Option(True, "see agf.AGFConfig"),
    augment=Option(0.3, "warp time, scale channels, add noise: 120 series are few", (0, 2)),
    mixup=Option(0.4, "train on blends of two series and of their labels", (0, 100)),
    optimizer=Option("adamw", "adam, radam: no decay, constant rate", ("adamw", "adam", "radam")))
OPTIONS = RUN | RECIPE | dict(
    dataset=Option("", "a set of the UEA or UCR archive"), list=Option(False, "sets usable now"),
    predict=Option("", "a .ts file, CSV to standard out"), checkpoint=Option("", "run folder"),
    preset=Option("compact", "strong: notebook 12; paper: the published setting of the set",
                  ("compact", "strong", "paper")),
    protocol=Option("honest", "paper: report the best TEST epoch too", ("honest", "paper")))
STRONG = dict(stem=16, least_epochs=40)    # chosen by cross-validation on train splits, notebook 12
PAPER = dict(                         # the published setting: what all sets share, and of each
    dim=512, depth=2, heads=8, hidden=2048, dropout=0.1, norm="post", pool="flatten", scale=True,
    kernel=1, max_tokens=0, zero_init=False, augment=0.0, mixup=0.0, clip=4.0)
COLUMNS = ("basis", "order", "a", "b", "gamma", "identity", "epochs", "optimizer")
PAPER_SETS = {
    "EthanolConcentration": ("jacobi", 6, 1.5, -1.5, 0.1, True, 100, "radam"),
    "FaceDetection": ("jacobi", 9, 2.0, 0.5, 0.1, True, 100, "radam"),
    "Handwriting": ("jacobi", 3, 1.0, 0.2, 0.01, False, 100, "radam"),
    "Heartbeat": ("chebyshev", 6, 0.0, 0.0, 0.01, False, 100, "radam"),
    "JapaneseVowels": ("legendre", 4, 0.0, 0.0, 0.01, False, 100, "radam"),
    "PEMS-SF": ("jacobi", 5, 1.5, 2.0, 0.1, True, 400, "radam"),
    "SelfRegulationSCP1": ("jacobi", 9, 1.5, 1.0, 0.1, True, 100, "radam"),
    "SelfRegulationSCP2": ("jacobi", 7, 2.0, 1.5, 0.1, True, 100, "radam"),
    "SpokenArabicDigits": ("jacobi", 4, 1.0, 0.0, 0.5, True, 100, "adam"),
    "UWaveGestureLibrary": ("jacobi", 10, 2.0, 1.5, 0.1, True, 100, "radam")}

# -------------------------------------------------- options, and a run: train_lra.py uses these

class UserError(ValueError):
    """A mistake that the user can mend: told in one line, exit status 2."""

@contextmanager
def told(text, kinds=Exception):
    """An error inside is the user's to mend: it becomes one line, `text` and the reason."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{text} ({error})") from None

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")

def parse(table, argv, about):
    """-> a dict of what the user gave, checked."""
    parser = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, (default, text, _) in table.items():
        how = dict(type=type(default))
        if type(default) is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + name.replace("_", "-"), help=f"{text} ({default})", **how)
    return check(table, vars(parser.parse_args(argv)))

def check(table, values):
    """-> the values, as Python's numbers and words. Refuse another type, and what limits forbid."""
    checked = {}
    for name, value in values.items():
        default, _, limits = table[name]
        kind, flag = type(default), f"--{name.replace('_', '-')} {value}"
        with told(f"{flag}: not of type {kind.__name__}"):
            checked[name] = kind(value)              # NumPy's numbers come from a grid search
            if checked[name] != value:
                raise ValueError(repr(value))
        allowed = (" or " if kind is str else " to ").join(map(str, limits))
        if limits and not (value in limits if kind is str else limits[0] <= value <= limits[1]):
            raise UserError(f"{flag}: not {allowed}")
    return checked

def settle(script, table, preset, given):
    """Defaults, over them a preset, over both what is given; with --resume, that run's settings."""
    if "resume" not in given:
        return argparse.Namespace(**{k: o.default for k, o in table.items()} | preset | given)
    run = given["resume"]
    with told(f"--resume {run}: no run of this version of {script} there"):
        config = json.loads(Path(run, "config.json").read_text())
        old = check(table, config["settings"] | dict(resume=run, out=run))
        if config["script"] != script or old.keys() != table.keys():
            raise ValueError("other options")
    for name, value in given.items():
        if name not in ("device", "data_dir") and value != old[name]:
            raise UserError(f"--resume keeps --{name.replace('_', '-')} {old[name]}: leave it out")
    return argparse.Namespace(**old | given, data=config.get("data"))

def guard(script, work, argv):
    """work(argv) -> exit status. What the user can mend is told in one line."""
    sys.stderr = sys.stderr or open(os.devnull, "w")         # closed: else print takes stdout
    if hasattr(sys.stdout, "reconfigure"):           # a label that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work(argv)
        print(end="", flush=True)     # a full disk or a closed pipe shows here
        return 0
    except (UserError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "tried to allocate" not in str(error).lower():
            raise                     # not a full memory, of whatever device: a bug
        line = " ".join(str(error).split())[:400] or repr(error)
        print(f"{script}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        try:
            print(end="", flush=True)
        except OSError:               # else Python tries it again at its end
            sys.stdout = None

def open_run(script, s, name, data):
    """-> a new run folder with its config.json, or the one to resume. data: its fingerprint()."""
    if s.resume and s.data != data:
        raise UserError(f"--resume {s.resume}: the data changed since this run began")
    if s.resume:
        return Path(s.resume)
    date = time.strftime("%Y%m%d-%H%M%S")
    out = Path(s.out or f"runs/{name}-{date}-{time.time_ns() % 10**9:09d}")
    with told(f"{out} is there already: another --out, or --resume {out}", FileExistsError):
        out.mkdir(parents=True)       # of two runs at once, only one can make it
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    write(out / "config.json", json.dumps(dict(
        script=script, command=" ".join(["python", *sys.argv]), date=date, versions=versions,
        data=data, settings=vars(s)), indent=2))
    print(f"run folder {out}; should it stop, --resume {out} goes on", flush=True)
    return out

def fingerprint(*parts):
    """A short mark of exactly these arrays, tensors, lists of numbers or labels."""
    digest = hashlib.sha256()
    for part in map(np.ascontiguousarray, parts):
        digest.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
    return digest.hexdigest()[:16]

def write(path, what):
    """A text, a picture or a checkpoint: the whole file or none, so a crash leaves the old one."""
    part = Path(f"{path}.part")
    with told(f"cannot write {path}: disk full, folder gone or read-only?"):
        if isinstance(what, str):
            part.write_text(what)
        elif hasattr(what, "savefig"):
            what.savefig(part, dpi=150, format="png")
        else:
            torch.save(what, part)
        part.replace(path)

def load(path):
    """weights_only: a file from a stranger brings numbers, never code."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:        # torch's own text advises to run the code in it
        reason = error.strerror if isinstance(error, OSError) else "damaged, or no checkpoint"
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None

def pick_device(name, compile=False):
    """-> (torch.device with its number, the reason for it), both tried out, and torch.compile."""
    with told(f"--device {name}{' --compile' if compile else ''}: not usable here"):
        device, reason = agf.choose_device(name)
        probe = torch.compile(nn.Softsign()) if compile else nn.Softsign()
        found = probe(torch.zeros(2, device=device))
        found.tolist()                # "meta" has no numbers
        return found.device, reason

def build(make, **settings):
    """make(AGFConfig) from the settings that are its fields. What cannot be built is one line."""
    names = {field.name for field in dataclasses.fields(agf.AGFConfig)}
    with told("this model cannot be built", (ValueError, RuntimeError)):  # or memory is too small
        return make(agf.AGFConfig(**{k: v for k, v in settings.items() if k in names}))

def finish(out, states, model, facts):
    """metrics.jsonl (the `history` of each seed's state), result.json (`result`), the pictures."""
    results, histories = ([state[key] for state in states] for key in ("result", "history"))
    columns = {key.replace("seed", "seeds"): [r[key] for r in results] for key in results[0]}
    score = np.array(columns["test_accuracy"])
    spread = score.std(ddof=1).item() if len(score) > 1 else None
    text = f"test accuracy {100 * score.mean():.2f} %"
    text += f" +- {100 * spread:.2f} (std, n = {len(score)})" if len(score) > 1 else ""
    rows = [json.dumps(row) + "\n" for history in histories for row in history]
    write(out / "metrics.jsonl", "".join(rows))
    draw(out, histories, model, f"{facts['mixer']}: {text}")
    config = json.loads((out / "config.json").read_text())
    write(out / "result.json", json.dumps(config | facts | columns | dict(
        test_accuracy_mean=score.mean().item(), test_accuracy_std=spread), indent=2))
    print(f"{text}; see {out}")

def draw(out, histories, model, title):
    """curves.png: what was logged, one line a seed. filters.png: p(s), one line a layer."""
    with told("matplotlib does not start: is MPLBACKEND right?", ValueError):
        from matplotlib.figure import Figure         # no pyplot: a notebook's settings stay
    names = [name for name in histories[0][0] if name in ("loss", "ortho") or "accuracy" in name]
    figure = Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names)), names):
        for rows in histories:
            ax.plot([row["step"] for row in rows], [row[name] for row in rows], "k", alpha=0.6)
        ax.set(xlabel="step", ylabel=name)
        ax.set_ylim(bottom=0)         # not zoomed in
    figure.suptitle(title)
    write(out / "curves.png", figure)
    filters = [b.mixer.filter for b in model.cpu().blocks if getattr(b.mixer, "filter", None)]
    if filters:
        figure, s = Figure(figsize=(4.5, 3.2), layout="constrained"), torch.linspace(0, 1, 201)
        ax = figure.subplots()
        for i, p in enumerate(filters):              # deeper is lighter
            ax.plot(s, p(s).detach(), color=str(0.8 * i / len(filters)), label=f"layer {i + 1}")
        ax.axhline(0, color="0.8")
        ax.legend()
        ax.set(xlabel="s", ylabel="learned filter p(s)")
        write(out / "filters.png", figure)

# ---------------------------------------------------------------------------------------- data

def sets_here(data_dir):
    """-> {name: folder} of the sets that need no download: what aeon ships, and over it yours."""
    found = {}
    for folder in [*SHIPPED.glob("*"), *Path(data_dir).glob("*")]:
        found.pop(folder.name, None)  # yours hides aeon's, also when yours is damaged
        train, test = (folder / f"{folder.name}_{split}.ts" for split in ("TRAIN", "TEST"))
        if all(os.path.isfile(file) and os.access(file, os.R_OK) for file in (train, test)):
            with open(train, errors="replace") as file:      # not those for regression
                if "@classlabel true" in " ".join(file.read(10**6).lower().split()):
                    found[folder.name] = folder
    return found

def read_both(name, data_dir):
    """-> (X, y) of the train split, (X, y) of the test split, as read; downloaded, if need be."""
    from aeon.datasets import load_classification, tsc_datasets
    folder = sets_here(data_dir).get(name, Path(data_dir, name))
    if not folder.exists():
        if name not in tsc_datasets.tsc_zenodo:
            near = difflib.get_close_matches(name, tsc_datasets.tsc_zenodo, 3, 0.5)
            raise UserError(f"unknown data set {name!r}: {' or '.join([*near, '--list'])}?")
        print(f"downloading {name} with aeon, which shows no progress")
        url = f"https://timeseriesclassification.com/aeon-toolkit/{name}.zip"
        with told(f"could not download {name}: unpack {url} into {folder} by hand"):
            load_classification(name, split="train", extract_path=str(data_dir))
    return read(folder / f"{name}_TRAIN.ts"), read(folder / f"{name}_TEST.ts")

def read(path, need_labels=True):
    """A .ts file -> arrays (channels, time), labels. aeon's reader would lower-case the labels."""
    series, labels, channels, classes = [], [], "", []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:             # the header
            key, *words = line.split() or [""]
            key, value = key.lower(), " ".join(words).lower()
            if key.startswith(("@timestamp", "@targetlabel")) and value != "false":
                raise UserError(f"{path}: {key} {value}: timestamps and regression are not read")
            if key.startswith("@dimension"):
                channels = value
            if key == "@classlabel" and value.startswith("true"):
                classes = words[1:]
            if key == "@data" and not words:
                break
        if need_labels and not classes:
            raise UserError(f"{path}: no line '@classLabel true ...' above a line @data")
        for line in file:
            fields = line.strip().split(":")
            if fields == [""] or line.startswith("#"):
                continue
            labels.append(fields.pop() if classes else None)
            channels = channels or str(len(fields) or 1)
            with told(f"{path}: series {len(labels)}", ValueError):
                if not fields or str(len(fields)) != channels:
                    raise ValueError(f"{len(fields)} channels, not {channels}")
                if classes and labels[-1] not in classes:
                    raise ValueError(f"label {labels[-1]!r} is none of: {', '.join(classes)}")
                if len({field.count(",") for field in fields}) > 1:
                    raise ValueError("its channels differ in length")
                rows = [field.replace("?", "nan").split(",") for field in fields]
                series.append(np.array(rows, dtype=np.float64))
                if (abs(series[-1]) > np.finfo(np.float32).max).any():
                    raise ValueError("a value is infinite, or too large for float32")
    if not series:
        raise UserError(f"{path}: holds no series below a line @data")
    return series, labels

def describe(X, y):
    """What the model must know of the train split: classes, length, and the channels' scale."""
    if len(set(y)) < 2:
        raise UserError(f"all train series have the same label: {y[0]}")
    steps = np.concatenate(X, axis=1, dtype=np.float64)      # (channels, all steps)
    steps[np.isnan(steps).all(1)] = 0
    size, std = np.nanmax(abs(steps), 1), np.nanstd(steps, 1)
    std[std <= 1e-13 * size] = 1      # constant, but for rounding: a later change stays as it is
    return dict(classes=np.unique(y).tolist(), length=max(x.shape[1] for x in X),
                mean=np.nanmean(steps, 1).tolist(), std=std.tolist())

def encode(X, data, source, y=()):
    """-> x (N, n, channels), keep (N, n), and y (N,), the numbers of the labels."""
    mean, std = np.array(data["mean"])[:, None], np.array(data["std"])[:, None]
    series = []
    for i, x in enumerate(X, start=1):
        if len(x) != len(mean):
            raise UserError(f"{source}: series {i} has {len(x)} channels, not {len(mean)}")
        x = x[:, :data["length"]].astype(np.float64)         # for large means
        if np.isnan(x).any():         # missing: along time; a channel without any value: its mean
            x = pandas.DataFrame(x).interpolate(axis=1, limit_direction="both").to_numpy()
        if (abs(x) > 1e150).any() or (abs(x - mean) > 1e9 * std).any():     # squares must fit
            raise UserError(f"{source}: series {i} is far out of the range of the train split")
        series.append(torch.tensor(np.nan_to_num((x - mean) / std).T, dtype=torch.float32))
    if cut := sum(x.shape[1] > data["length"] for x in X):
        print(f"{source}: {cut} series cut to the longest of the train split", file=sys.stderr)
    sizes = torch.tensor([len(x) for x in series])
    keep = torch.arange(max(sizes)) < sizes[:, None]
    with told(f"{source}: a label that no train series has", ValueError):
        y = torch.tensor([data["classes"].index(label) for label in np.array(y).tolist()])
    return pad_sequence(series, batch_first=True), keep, y

def load_dataset(name, data_dir):
    """-> train (x, keep, y), test (x, keep, y), and describe() of the train split."""
    (X, y), (test_X, test_y) = read_both(name, data_dir)
    data = describe(X, y) | dict(dataset=name)
    return encode(X, data, "train", y), encode(test_X, data, "test", test_y), data

def augment(x, keep, strength, rng):
    """Warp time smoothly (ends stay ends), scale each channel, add noise. x (B, n, channels)."""
    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(x.device)
    B, n, channels = x.shape
    last = (keep.sum(1, keepdim=True) - 1).clamp(min=1)                      # (B, 1)
    harmonic = math.pi * torch.arange(1, 4, device=x.device)                 # three half waves
    size = strength * normal(B, 1, 3).clamp(-1, 1) / harmonic
    t = torch.arange(n, device=x.device) / last                              # (B, n), 1 at the end
    t = (t + (size * torch.sin(t[:, :, None] * harmonic)).sum(-1)).clamp(0, 1) * last
    left = t.long().clamp(max=n - 1)                                         # (B, n)
    right = torch.minimum(left + 1, last).clamp(max=n - 1)
    before, after = (x.gather(1, i[:, :, None].expand(-1, -1, channels)) for i in (left, right))
    x = torch.lerp(before, after, (t - left)[:, :, None])
    x = x * torch.exp(0.7 * strength * normal(B, 1, channels)) + strength / 3 * normal(*x.shape)
    return x.masked_fill(~keep[:, :, None], 0)

def mixup(x, keep, y, strength, rng):
    """Blend with the next series: a batch is in random order, so it is a random one."""
    share = rng.beta(strength, strength)
    x, y = (share * t + (1 - share) * t.roll(1, 0) for t in (x, y))
    return x, keep | keep.roll(1, 0), y

# ----------------------------------------------------------------------------------- estimator

def batches(x, keep, size, device):
    """In order; each trimmed to its longest series (padding changes nothing)."""
    for x, keep in zip(x.split(size), keep.split(size)):
        n = int(keep.sum(1).max())
        yield x[:, :n].to(device), keep[:, :n].to(device)

def accuracy(model, split, device):
    logits = agf.evaluate(model, batches(*split[:2], 128, device))
    return (logits.argmax(1) == split[2]).double().mean().item()

class StemTransformer(agf.AGFTransformer):
    """Beside the series, `stem` channels from each of four convolutions: shapes of four sizes."""

    def __init__(self, stem, config):
        super().__init__(dataclasses.replace(config, channels=config.channels + 4 * stem))
        self.scales = nn.ModuleList(nn.Conv1d(config.channels, stem, width, padding=width // 2)
                                    for width in (7, 15, 31, 63))

    def hidden_states(self, x, keep=None):
        x = agf.hide_padding(x, keep).mT                                     # (B, channels, n)
        x = torch.cat([x, *(F.gelu(scale(x)) for scale in self.scales)], 1)
        return super().hidden_states(x.mT, keep)             # (B, n, channels + 4 stem)

def make_model(recipe, data):
    tokens = recipe["max_tokens"] or data["length"]
    kind = partial(StemTransformer, recipe["stem"]) if recipe["stem"] else agf.AGFTransformer
    return build(kind, classes=len(data["classes"]), length=data["length"],
                 channels=len(data["mean"]), stride=math.ceil(data["length"] / tokens), **recipe)

def is_finite(model):
    return all(p.isfinite().all() for p in model.parameters())

def make_optimizer(model, kind, lr):
    """AdamW decays matrices only; Adam and RAdam are the official code's, without decay."""
    if kind != "adamw":
        return dict(adam=torch.optim.Adam, radam=torch.optim.RAdam)[kind](model.parameters(), lr=lr)
    groups = [dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=0.05),
              dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)

D = settle("", OPTIONS, {}, {})           # the defaults

class AGFClassifier(BaseClassifier):
    """X: (N, channels, time), or a list of (channels, time_i), NaN allowed; y: any labels."""
    _tags = {"capability:multivariate": True, "capability:unequal_length": True,
             "capability:missing_values": True, "X_inner_type": ["np-list", "numpy3D"],
             "algorithm_type": "deeplearning"}
    save_to = None                    # a checkpoint, new each epoch; fit goes on from it
    watch = None                      # a test split for --protocol paper: looked at each epoch

    def __init__(self, mixer=D.mixer, basis=D.basis, order=D.order, a=D.a, b=D.b, dim=D.dim,
                 identity=D.identity, depth=D.depth, heads=D.heads, hidden=D.hidden, norm=D.norm,
                 dropout=D.dropout, pool=D.pool, lr=D.lr, gamma=D.gamma, batch_size=D.batch_size,
                 epochs=D.epochs, least_epochs=D.least_epochs, stem=D.stem, kernel=D.kernel,
                 max_tokens=D.max_tokens, scale=D.scale, zero_init=D.zero_init, augment=D.augment,
                 mixup=D.mixup, optimizer=D.optimizer, clip=D.clip, compile=D.compile,
                 random_state=D.seed, device=D.device):
        vars(self).update({name: value for name, value in locals().items() if name != "self"})
        BaseClassifier.__init__(self)

    @torch.random.fork_rng(devices=[])               # the caller's random numbers stay as they are
    def _fit(self, X, y):
        recipe = check(OPTIONS, {name: getattr(self, name) for name in RECIPE})
        seed = 0 if self.random_state is None else self.random_state
        s, seed = argparse.Namespace(**recipe), check(OPTIONS, dict(seed=seed))["seed"]
        device, _ = pick_device(self.device)
        self.data_, self.history_, self.seconds_ = describe(X, y), [], 0.0
        x, keep, y = encode(X, self.data_, "X", y)
        x, keep, y = x.to(device), keep.to(device), torch.eye(len(self.classes_))[y].to(device)
        per_epoch = math.ceil(len(x) / s.batch_size)
        epochs = s.epochs or max(s.least_epochs, math.ceil(600 / per_epoch))
        steps = epochs * per_epoch
        torch.manual_seed(seed)
        self.model_ = make_model(recipe, self.data_).to(device)
        net = torch.compile(self.model_) if self.compile else self.model_
        optimizer = make_optimizer(self.model_, s.optimizer, s.lr)
        if self.save_to and self.save_to.exists():
            state = load(self.save_to)
            with told(f"{self.save_to}: not a checkpoint of this run"):
                if (state["recipe"], state["seed"], state["data"]) != (recipe, seed, self.data_):
                    raise ValueError("other settings or data")
                self.history_, self.seconds_ = state["history"], state["seconds"]
                self.model_.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
        for epoch in tqdm(range(len(self.history_), epochs), f"{seed=}", leave=False, disable=None):
            begin, sums = time.perf_counter(), np.zeros(2)
            torch.manual_seed(10_007 * (seed + 1) + epoch)         # dropout: as if never stopped
            order = np.random.default_rng([seed, epoch, len(x)]).permutation(len(x))
            for i, pick in enumerate(torch.from_numpy(order).to(device).split(s.batch_size)):
                step = epoch * per_epoch + i
                rng = np.random.default_rng([seed, step])
                n = x.shape[1] if self.compile else int(keep[pick].sum(1).max())
                batch = x[pick, :n], keep[pick, :n], y[pick]
                if s.augment:
                    batch = augment(*batch[:2], s.augment, rng), *batch[1:]
                if s.mixup:
                    batch = mixup(*batch, s.mixup, rng)
                rate = s.lr
                if s.optimizer == "adamw":           # a warmup, then a cosine
                    warmup = min(1, (step + 1) / (0.1 * steps))
                    rate = s.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses = agf.train_step(net.train(), optimizer, *batch, s.gamma, s.clip)
                sums += [loss.item() for loss in losses]
            loss, ortho = (sums / per_epoch).tolist()
            if not (is_finite(self.model_) and math.isfinite(loss + ortho)):
                raise UserError(f"the loss is not finite in epoch {epoch + 1}: a smaller --lr?")
            row = dict(seed=seed, epoch=epoch + 1, step=step + 1, lr=rate, loss=loss, ortho=ortho)
            if self.watch:
                row["test_accuracy"] = accuracy(self.model_, self.watch, device)
            self.history_.append(row)
            self.seconds_ += time.perf_counter() - begin
            if self.save_to:
                write(self.save_to, dict(
                    recipe=recipe, seed=seed, data=self.data_, epochs=epochs, seconds=self.seconds_,
                    model=self.model_.state_dict(), optimizer=optimizer.state_dict(),
                    history=self.history_))

    def _predict_proba(self, X, source="X"):
        x, keep, _ = encode(X, self.data_, source)
        device = next(self.model_.parameters()).device
        return agf.evaluate(self.model_, batches(x, keep, 128, device)).double().softmax(1).numpy()

    def _predict(self, X):
        return self.classes_[self._predict_proba(X).argmax(1)]

    @classmethod
    def load(cls, run, device=D.device):
        """A run folder (its first seed), or one of its .pt files -> a fitted classifier."""
        path = min(Path(run).glob("seed-*.pt"), key=lambda p: (len(p.name), p.name), default=run)
        state = load(path)
        with told(f"{path}: not a checkpoint that this train_uea.py can use"):
            found = cls(**state["recipe"], random_state=state["seed"], device=device)
            found.data_, found.classes_ = state["data"], np.array(state["data"]["classes"])
            found.model_ = make_model(state["recipe"], state["data"])
            found.model_.load_state_dict(state["model"])
            if not is_finite(found.model_):
                raise ValueError("weights that are not finite")
            if (done := len(state["history"])) < state["epochs"]:
                print(f"{path}: a model after {done} of {state['epochs']} epochs", file=sys.stderr)
        found.model_.to(pick_device(device)[0])
        found.n_classes_, found.is_fitted = len(found.classes_), True
        return found

    @classmethod
    def _get_test_params(cls, parameter_set="default"):
        return dict(dim=8, heads=2, kernel=3, epochs=1)

# -------------------------------------------------------------------------------- command line

def predict(path, run, device):
    """CSV: number, label and probabilities of each series."""
    one = AGFClassifier.load(run, device)
    shares = one._predict_proba(read(path, need_labels=False)[0], path)
    table = pandas.DataFrame(shares, range(1, len(shares) + 1), [f"p({c})" for c in one.classes_])
    table.insert(0, "label", one.classes_[shares.argmax(1)])
    print(table.to_csv(index_label="series", float_format="%.6f"), end="")

def run(s):
    """Train all seeds of one setting, new or resumed; leaves the whole run folder."""
    device, reason = pick_device(s.device, s.compile)
    (X, y), (test_X, test_y) = read_both(s.dataset, s.data_dir)
    data, recipe = describe(X, y), {name: getattr(s, name) for name in RECIPE}
    test = encode(test_X, data, f"{s.dataset}_TEST.ts", test_y)
    model = make_model(recipe, data)  # what cannot be built is said before there is a folder
    size = sum(p.numel() for p in model.parameters())
    facts = dict(dataset=s.dataset, mixer=s.mixer, preset=s.preset, protocol=s.protocol,
                 parameters=size, device=f"{device} ({reason})")
    out = open_run("train_uea.py", s, s.dataset, fingerprint(*X, y, *test_X, test_y))
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n", flush=True)
    states, shares = [], 0
    for seed in range(s.seed, s.seed + s.seeds):
        one = AGFClassifier(**recipe, random_state=seed, device=s.device, compile=s.compile)
        one.save_to, one.watch = out / f"seed-{seed}.pt", test if s.protocol == "paper" else None
        one.fit(X, np.array(y))
        logits = agf.evaluate(one.model_, batches(*test[:2], 128, device))
        shares = shares + logits.softmax(1).numpy()
        result = dict(seed=seed, epochs=len(one.history_), train_seconds=round(one.seconds_, 2),
                      test_accuracy=(logits.argmax(1) == test[2]).double().mean().item())
        if s.protocol == "paper":
            result["best_test_accuracy"] = max(row["test_accuracy"] for row in one.history_)
            facts["best_test_accuracy_label"] = "best epoch, chosen on the TEST split: optimistic"
        print(*(f"{key} {round(value, 4)}" for key, value in result.items()), sep=", ", end="  ")
        print(facts.get("best_test_accuracy_label", ""), flush=True)
        states.append(dict(history=one.history_, result=result))
    if s.seeds > 1:
        facts["ensemble_accuracy"] = np.mean(one.classes_[shares.argmax(1)] == test_y).item()
    finish(out, states, one.model_, facts)

def start(argv):
    given = parse(OPTIONS, argv, __doc__)
    preset = STRONG if given.get("preset") == "strong" else {}
    if given.get("preset") == "paper" and "resume" not in given:
        with told(f"--preset paper is for {', '.join(PAPER_SETS)}", KeyError):
            preset = PAPER | dict(zip(COLUMNS, PAPER_SETS[given.get("dataset")]))
    s = settle("train_uea.py", OPTIONS, preset, given)
    if s.list:
        print(*sorted(sets_here(s.data_dir)), sep="\n")
    elif s.predict and s.checkpoint:
        if other := given.keys() - {"predict", "checkpoint", "device"}:
            raise UserError(f"--predict keeps its run's settings: leave out {', '.join(other)}")
        predict(s.predict, s.checkpoint, s.device)
    elif s.dataset and not s.predict and not s.checkpoint:
        run(s)
    else:
        raise UserError("--dataset JapaneseVowels? --predict FILE.ts --checkpoint RUN? --list?")

def main(argv=None):
    return guard("train_uea.py", start, argv)

if __name__ == "__main__":
    sys.exit(main())
