"""Train and evaluate AGF on one set of the UEA / UCR archive of time series.

    python train_uea.py --dataset JapaneseVowels
    train_uea.AGFClassifier().fit(X, y).predict(X_new)        # on arrays (N, channels, time)

Protocol: a fixed number of epochs on the whole train split, then one pass over the test split.
`--protocol paper` adds what the field reports, the best epoch on the test split, and labels it.
train_lra.py uses the sections "options" and "a run and its folder" too.
"""

import argparse
import copy
import csv
import dataclasses
import difflib
import hashlib
import json
import math
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import agf

try:
    from aeon.classification import BaseClassifier
except ImportError:                   # train_lra.py does without aeon
    BaseClassifier = object

class Option(NamedTuple):             # each is declared once, in one of these tables
    default: object                   # or its type, where there is no default
    help: str
    limits: tuple = ()                # lowest and highest number, or the words to choose from

RUN = dict(
    out=Option(str, "run folder, a new one (default: runs/NAME-TIME)"),
    resume=Option(str, "go on with this interrupted run, same numbers"),
    data_dir=Option("data", "where data is looked for, and where downloads go"),
    device=Option("auto", "auto, cpu, cuda, cuda:1, mps"),
    seed=Option(0, "the first seed", (0, 2**31 - 1)),
    seeds=Option(1, "train so many times, report mean and standard deviation", (1, 1000)),
    compile=Option(False, "torch.compile: slow start, faster steps"))
MODEL = dict(
    mixer=Option("agf", "uv: Sigma = 1, usv: p(s) = s, none: no mixer", agf.MIXERS),
    basis=Option("jacobi", "polynomials of the filter", agf.BASES),
    order=Option(5, "degree K of the filter", (0, 100)),
    a=Option(1.0, "Jacobi parameter", (-10, 10)), b=Option(0.0, "Jacobi parameter", (-10, 10)),
    identity=Option(True, "theta_0 = 1, the filter starts as p = 1"),
    dim=Option(128, "width of a token", (1, 16384)), depth=Option(2, "blocks", (1, 1000)),
    heads=Option(4, "divides the width", (1, 16384)), hidden=Option(256, "of the MLP", (1, 65536)),
    dropout=Option(0.0, "share of values dropped", (0, 0.99)),
    norm=Option("pre", "LayerNorm before or after", ("pre", "post")),
    pool=Option("mean", "how tokens become one vector", ("mean", "flatten", "first")),
    lr=Option(1e-3, "peak learning rate", (1e-12, 100)),
    batch_size=Option(16, "samples in a step", (1, 10**6)),
    gamma=Option(1.0, "weight of the orthogonality loss: at 1 it falls, at 0.1 not", (0, 1e4)))
RECIPE = MODEL | dict(
    epochs=Option(int, "passes over the train split (default: 600 steps, at least 10)", (1, 10**6)),
    scale=Option(False, "multiply the embedding by sqrt(dim)"),
    kernel=Option(11, "time steps in one token: one step of a sensor says little", (1, 9999)),
    max_tokens=Option(64, "stride to have at most so many tokens, 0 = no stride", (0, 10**6)),
    zero_init=Option(True, "a mixer starts silent and is heard when it helps"),
    augment=Option(0.3, "warp time, scale channels, add noise: 120 series are few", (0, 2)),
    mixup=Option(0.4, "train on blends of two series and of their labels", (0, 100)),
    optimizer=Option("adamw", "adam and radam: without decay", ("adamw", "adam", "radam")),
    clip=Option(1.0, "largest norm of the gradient", (1e-6, 1e6)),
    schedule=Option("cosine", "of the learning rate", ("cosine", "constant")))
OPTIONS = RUN | RECIPE | dict(
    dataset=Option(str, "a set of the UEA or UCR archive"),
    list=Option(False, "name the sets usable now"),
    predict=Option(str, "classify this .ts file, CSV to standard out"),
    checkpoint=Option(str, "run folder for --predict"),
    preset=Option("compact", "paper: the published setting of the set", ("compact", "paper")),
    protocol=Option("honest", "paper: report the best TEST epoch too", ("honest", "paper")))
PAPER = dict(                         # the published setting: what all sets share,
    dim=512, depth=2, heads=8, hidden=2048, dropout=0.1, norm="post", pool="flatten", scale=True,
    kernel=1, max_tokens=0, zero_init=False, augment=0.0, mixup=0.0,
    optimizer="radam", lr=1e-3, schedule="constant", clip=4.0, batch_size=16, epochs=100)
PAPER_SETS = {                        # and of each: basis, order, a, b, gamma, identity
    "EthanolConcentration": ("jacobi", 6, 1.5, -1.5, 0.1, True),
    "FaceDetection": ("jacobi", 9, 2.0, 0.5, 0.1, True),
    "Handwriting": ("jacobi", 3, 1.0, 0.2, 0.01, False),
    "Heartbeat": ("chebyshev", 6, 0.0, 0.0, 0.01, False),
    "JapaneseVowels": ("legendre", 4, 0.0, 0.0, 0.01, False),
    "PEMS-SF": ("jacobi", 5, 1.5, 2.0, 0.1, True),
    "SelfRegulationSCP1": ("jacobi", 9, 1.5, 1.0, 0.1, True),
    "SelfRegulationSCP2": ("jacobi", 7, 2.0, 1.5, 0.1, True),
    "SpokenArabicDigits": ("jacobi", 4, 1.0, 0.0, 0.5, True),
    "UWaveGestureLibrary": ("jacobi", 10, 2.0, 1.5, 0.1, True)}
EXCEPTIONS = {"PEMS-SF": dict(epochs=400), "SpokenArabicDigits": dict(optimizer="adam")}

# ------------------------------------------------------------------------------------- options

class UserError(ValueError):
    """A mistake that the user can mend: told in one line, exit status 2."""

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")

def flag(name):
    return "--" + name.replace("_", "-")

def parse(table, argv, about):
    """-> a dict of what the user gave, checked."""
    parser = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, (default, text, _) in table.items():
        kind = default if isinstance(default, type) else type(default)
        note = "" if kind is default else f" (default: {default})"
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        parser.add_argument(flag(name), help=text + note, **how)
    given = vars(parser.parse_args(argv))
    check(table, given)
    return given

def check(table, values):
    """Refuse an unknown word, and a number out of its limits."""
    for name, value in values.items():
        limits = table[name].limits
        if limits and isinstance(value, str) and value not in limits:
            raise UserError(f"{flag(name)} {value}: not one of {', '.join(limits)}")
        if limits and isinstance(value, (int, float)) and not limits[0] <= value <= limits[1]:
            raise UserError(f"{flag(name)} {value}: not from {limits[0]} to {limits[1]}")

def settle(table, preset, given):
    """All settings of a run: the defaults, over them a preset, over both what the user gave."""
    defaults = {name: None if isinstance(option.default, type) else option.default
                for name, option in table.items()}
    return SimpleNamespace(**defaults | preset | given)

def resumed(script, table, given):
    """The settings of the run that --resume names. What is given beside it must be the same."""
    run = given["resume"]
    try:
        config = json.loads(Path(run, "config.json").read_text(encoding="utf-8"))
        settings = config["settings"] | dict(resume=run, out=run)
        check(table, settings)
        if config["script"] != script or settings.keys() != table.keys():
            raise ValueError
        s = SimpleNamespace(**settings, data=config["data"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--resume {run}: no run of this version of {script} there") from None
    for name, value in given.items():
        if name not in ("device", "data_dir") and value != settings[name]:
            raise UserError(f"--resume keeps the run's {flag(name)} {settings[name]}: leave it out")
    vars(s).update(given)
    return s

def guard(script, work, argv):
    """work(argv) -> exit status. What the user can mend is told in one line."""
    for stream in (sys.stdout, sys.stderr):          # a label that the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        work(argv)
        return 0
    except (UserError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{script}: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:                # it brings the run folder, if there is one
        hint = f"; python {script} --resume {stop} goes on" if stop.args else ""
        print(f"stopped{hint}", file=sys.stderr)
        return 130

def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:400]

# --------------------------------------------------------------------------- a run and its folder

def open_run(script, s, name, data):
    """-> a new run folder with its config.json, or the one to resume. data: its fingerprint()."""
    if s.resume:
        if s.data != data:
            raise UserError(f"--resume {s.resume}: the data changed since this run began")
        return Path(s.resume)
    now = time.time_ns()
    date = time.strftime("%Y%m%d-%H%M%S", time.localtime(now // 10**9))
    out = Path(s.out or f"runs/{name}-{date}-{now % 10**9:09d}")
    try:
        out.mkdir(parents=True)       # of two runs at once, only one can make it
    except FileExistsError:
        raise UserError(f"{out} is there already: another --out, or --resume {out}") from None
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    write(out / "config.json", json.dumps(dict(
        script=script, command=shlex.join(["python", *sys.argv]), date=time.strftime("%Y-%m-%d"),
        versions=versions, data=data, settings=vars(s)), indent=2))
    return out

def finished(run):
    """Is there nothing left to resume? Then say so."""
    path = Path(run, "result.json")
    if path.exists():
        try:
            score = 100 * json.loads(path.read_text(encoding="utf-8"))["test_accuracy_mean"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}: damaged; remove it, and --resume makes it anew") from None
        print(f"{run} is finished: test accuracy {score:.2f} %, see {path}")
    return path.exists()

def fingerprint(*parts):
    """A short mark of exactly these arrays, tensors, lists of numbers or labels."""
    digest = hashlib.sha256()
    for part in map(np.ascontiguousarray, parts):
        digest.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
    return digest.hexdigest()[:16]

def write(path, text):
    """The whole file or none: a crash leaves the old one."""
    Path(f"{path}.part").write_text(text, encoding="utf-8")
    os.replace(f"{path}.part", path)

def save(path, state):
    """A checkpoint, the whole file or none."""
    try:
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:         # torch's own for a full disk: RuntimeError
        raise UserError(f"cannot write {path}: disk full, folder gone? ({error})") from None

def load(path):
    """weights_only: a file from a stranger brings numbers, never code."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:                       # a damaged file fails in many ways
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None

def pick_device(name):
    """-> (torch.device that works here, the reason for it)."""
    try:
        device, reason = agf.choose_device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())      # with its number
        torch.zeros(1, device=device)
    except Exception as error:
        raise UserError(f"--device {name}: not usable here ({first_line(error)})") from None
    return device, reason

def check_compiler(device):
    """torch.compile once, before the run: where no C++ compiler is, it fails in 100 lines."""
    try:
        torch.compile(torch.nn.Softsign())(torch.zeros(2, device=device))
    except Exception as error:
        raise UserError(f"--compile: not usable here ({first_line(error)})") from None

def build(make, **settings):
    """make(AGFConfig) from the settings that are its fields. What cannot be built is one line."""
    names = {field.name for field in dataclasses.fields(agf.AGFConfig)}
    try:
        return make(agf.AGFConfig(**{k: v for k, v in settings.items() if k in names}))
    except (ValueError, RuntimeError) as error:      # RuntimeError: more than the memory holds
        raise UserError(first_line(error)) from None

def without_mixers(model):
    """A copy whose mixers output zero: how much of the accuracy is theirs?"""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mixer = agf.NoMixer()
    return model

def finish(out, states, model, batch, facts):
    """metrics.jsonl, the pictures, result.json. states: one a seed, each with its `history` (rows
    of metrics.jsonl) and `result`; model, batch: for filters.png; facts: more for result.json."""
    results = [state["result"] for state in states]
    columns = {key.replace("seed", "seeds"): [r[key] for r in results] for key in results[0]}
    score = np.array(columns["test_accuracy"])
    spread = score.std(ddof=1).item() if len(score) > 1 else None
    text = f"test accuracy {100 * score.mean():.2f} %"
    text += f" +- {100 * spread:.2f} (std, n = {len(score)})" if len(score) > 1 else ""
    rows = [row for state in states for row in state["history"]]
    write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(out, [state["history"] for state in states], facts["mixer"], text)
    draw_filters(out, copy.deepcopy(model), batch)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write(out / "result.json", json.dumps(facts | columns | dict(
        test_accuracy_mean=score.mean().item(), test_accuracy_std=spread,
        **{key: config[key] for key in ("command", "date", "versions")}), indent=2))
    print(f"{text}; see {out}")

COLOURS = dict(agf="#0072B2", uv="#009E73", usv="#CC79A7", softmax="#D55E00", none="0.45")
LABELS = dict(loss="cross-entropy (nats)", ortho="orthogonality loss",
              dev_accuracy="accuracy on dev", test_accuracy="accuracy on TEST")

def panels(count):
    """Without pyplot: figures and settings of a notebook stay as they are."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.5 * count, 3.2), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]

def draw_curves(out, histories, mixer, title):
    """curves.png: what was logged, one line a seed."""
    keys = [key for key in LABELS if key in histories[0][0]]
    time_axis = "epoch" if "epoch" in histories[0][0] else "step"
    figure, axes = panels(len(keys))
    for ax, key in zip(axes, keys):
        for rows in histories:
            ax.plot([row[time_axis] for row in rows], [row[key] for row in rows],
                    color=COLOURS.get(mixer, "black"), alpha=0.7)
        ax.set(xlabel=time_axis, ylabel=LABELS[key], yscale="log" if key == "loss" else "linear")
        if key != "loss":             # from 0: a small change looks small
            ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    figure.suptitle(f"{mixer}: {title}")
    figure.savefig(out / "curves.png", dpi=120)

def draw_filters(out, model, batch):
    """filters.png: p(s) of each layer, over the values of s at the real tokens of a batch."""
    def look(mixer, inputs):
        s, keep = mixer.factors(*inputs)[1].transpose(1, 2), inputs[1]       # (B, n, h, d)
        seen[mixer] = (s if keep is None else s[keep]).flatten().cpu().numpy()
    seen = {}
    mixers = [block.mixer for block in model.blocks if getattr(block.mixer, "filter", None)]
    for mixer in mixers:
        mixer.register_forward_pre_hook(look)
    agf.evaluate(model, [batch])
    figure, axes = panels(max(1, len(mixers)))
    grid = torch.linspace(0, 1, 201, device=batch[0].device)
    for ax, mixer in zip(axes, mixers):
        bars = ax.twinx()
        bars.hist(seen[mixer], 60, range=(0, 1), color="0.85", label="where s lies")
        bars.plot([], color=COLOURS["agf"], label="p(s)")
        bars.set_yticks([])
        bars.legend()
        ax.plot(grid.cpu(), mixer.filter(grid).detach().cpu(), color=COLOURS["agf"])
        ax.set(title=f"layer {mixers.index(mixer) + 1}", xlabel="singular value s", ylabel="p(s)",
               facecolor="none", zorder=1)           # the line over the bars
    if mixers:
        figure.savefig(out / "filters.png", dpi=120)

# ---------------------------------------------------------------------------------------- data

def folders(data_dir):
    """Where data sets lie: yours, and what aeon ships."""
    import aeon
    return Path(data_dir), Path(aeon.__file__).parent / "datasets" / "data"

def find(name, data_dir):
    """-> [NAME_TRAIN.ts, NAME_TEST.ts] on this machine, or None."""
    home, shipped = folders(data_dir)
    if Path(name).name != name:
        raise UserError(f"--dataset {name}: give the name of a set, not a path")
    for folder in (home / name, home, shipped / name):
        files = [folder / f"{name}_{split}.ts" for split in ("TRAIN", "TEST")]
        missing = [file for file in files if not file.is_file()]
        if not missing:
            return files
        if len(missing) == 1:
            raise UserError(f"{missing[0]} is missing beside its other half")
    if (home / name).exists():
        raise UserError(f"{home / name} is there without {name}_TRAIN.ts and {name}_TEST.ts (only "
                        f".ts files are read): add them, or remove it to download the set")
    return None

def download(name, data_dir):
    """aeon's download, into data_dir/NAME."""
    import aeon.datasets
    from aeon.datasets.tsc_datasets import tsc_zenodo
    if name not in tsc_zenodo:
        near = difflib.get_close_matches(name, tsc_zenodo, 3, 0.5)
        raise UserError(f"unknown data set {name!r}; {' or '.join([*near, '--list'])}?")
    print(f"downloading {name} with aeon, which shows no progress (a few sets have hundreds of MB)")
    try:
        aeon.datasets.load_classification(name, split="train", extract_path=str(data_dir))
    except Exception as error:        # no network, a damaged archive, a full disk
        raise UserError(f"could not download {name} ({first_line(error)}). By hand: unpack https://"
                        f"timeseriesclassification.com/aeon-toolkit/{name}.zip so that "
                        f"{Path(data_dir, name, name)}_TRAIN.ts is there") from None
    return find(name, data_dir)

def read_header(file, path):
    """The lines down to @data -> ({key: value}, all in lower case; names of the classes)."""
    header, classes, left = {}, [], 10_000_000       # characters: no header is longer
    while line := file.readline(left):
        left -= len(line)
        key, *words = line.split() or [""]
        key, value = key.lower(), " ".join(words).lower()
        if key == "@data":
            break
        if key.startswith("@timestamp") and value != "false":
            raise UserError(f"{path}: {line.strip()}: values with timestamps are not read")
        if key == "@targetlabel" and value != "false":
            raise UserError(f"{path}: a set for regression ({line.strip()})")
        if key == "@classlabel":
            classes = words[1:] if value.startswith("true") else []
        header[key] = value
    else:
        raise UserError(f"{path}: empty, or not a .ts file: it has no line @data")
    return header, classes

def read_line(line, classes):
    """A line of a .ts file -> array (channels, time) and its label. ValueError: what is wrong."""
    fields = line.strip().split(":")
    label = fields.pop().strip() if classes else None
    if classes and label not in classes:
        raise ValueError(f"label {label!r} is none of: {', '.join(classes)}")
    rows = [[float(word) for word in field.replace("?", "nan").split(",")] for field in fields]
    if len({len(row) for row in rows}) != 1:
        raise ValueError("its channels are missing or differ in length")
    if (np.abs(rows) > np.finfo(np.float32).max).any():
        raise ValueError("a value is infinite, or too large for float32")
    return np.array(rows), label

def read(path, need_labels=True, header_only=False):
    """A .ts file -> list of float64 arrays (channels, time), list of labels or None.

    aeon's reader lower-cases labels, drops signs of values with timestamps and, without a line
    @classLabel, takes the last channel for a label: so a reader of our own.
    """
    series, labels = [], []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        header, classes = read_header(file, path)
        if need_labels and not classes:
            raise UserError(f"{path}: the labels are missing (no '@classLabel true ...')")
        if header_only:
            return None
        channels = header.get("@dimensions") or header.get("@dimension")
        channels = "1" if header.get("@univariate") == "true" else channels
        for line in file:
            if not line.strip() or line.startswith("#"):
                continue
            try:
                values, label = read_line(line, classes)
                channels = channels or str(len(values))
                if str(len(values)) != channels:
                    raise ValueError(f"{len(values)} channels, not {channels}")
                same = not series or values.shape == series[0].shape
                if header.get("@equallength") == "true" and not same:
                    raise ValueError("not as long as series 1 (@equalLength)")
            except ValueError as error:
                raise UserError(f"{path}: series {len(series) + 1}: {error}") from None
            series.append(values)
            labels.append(label)
    if not series:
        raise UserError(f"{path}: holds no series")
    if missing := sum(np.isnan(x).sum() for x in series):
        print(f"{path}: {missing} missing values, interpolated along time", file=sys.stderr)
    return series, labels

def read_both(name, data_dir):
    """-> (X, y) of the train split, (X, y) of the test split, as read."""
    files = find(name, data_dir) or download(name, data_dir)
    train, test = read(files[0]), read(files[1])
    if len(set(train[1])) < 2:
        raise UserError(f"{files[0]}: all series have the same label")
    if unknown := set(test[1]) - set(train[1]):
        print(f"{files[1]}: no train series has the label {min(unknown)!r}", file=sys.stderr)
    return train, test

def filled(x):
    """Missing values of (channels, time), linear in time; a channel without values stays NaN."""
    x = np.array(x, dtype=np.float64)
    for channel in x:
        known = np.flatnonzero(~np.isnan(channel))
        if 0 < len(known) < len(channel):
            channel[:] = np.interp(np.arange(len(channel)), known, channel[known])
    return x

def describe(X, y):
    """What the model must know of the train split: classes, length, and the channels' scale."""
    steps = np.concatenate([filled(x) for x in X], axis=1)                   # (channels, all steps)
    steps[np.isnan(steps).all(1)] = 0
    size, std = np.nanmax(abs(steps), 1), np.nanstd(steps, 1)
    std[std <= 1e-13 * size] = 1      # constant, but for rounding: a later change stays as it is
    return dict(classes=np.unique(y).tolist(), length=max(x.shape[1] for x in X),
                mean=np.nanmean(steps, 1).tolist(), std=std.tolist())

def encode(X, y, data, source):
    """-> x (N, n, channels), keep (N, n), y (N,): -1 for a label that no train series has.
    Standardised in float64, then float32: the offset of a channel may be large."""
    mean, std = np.array(data["mean"])[:, None], np.array(data["std"])[:, None]
    series = []
    for i, x in enumerate(X):
        if len(x) != len(mean):
            raise UserError(f"{source}: series {i + 1} has {len(x)} channels, not {len(mean)}")
        x = (filled(x[:, :data["length"]]) - mean) / std
        if (abs(x) > 1e12).any():     # the model squares it, in float32
            raise UserError(f"{source}: series {i + 1} is far out of the range of the train split")
        series.append(torch.tensor(np.nan_to_num(x.T), dtype=torch.float32))
    if cut := sum(x.shape[1] > data["length"] for x in X):
        print(f"{source}: {cut} series cut to the longest of the train split", file=sys.stderr)
    sizes = torch.tensor([len(x) for x in series])
    number = {label: i for i, label in enumerate(data["classes"])}
    return (pad_sequence(series, batch_first=True), torch.arange(max(sizes)) < sizes[:, None],
            torch.tensor([number.get(label, -1) for label in y]))

def load_dataset(name, data_dir):
    """-> train (x, keep, y), test (x, keep, y), and describe() of the train split."""
    train, test = read_both(name, data_dir)
    data = describe(*train)
    return encode(*train, data, "train"), encode(*test, data, "test"), data | dict(dataset=name)

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
    x, keep, y = split
    found = agf.evaluate(model, batches(x, keep, 128, device)).argmax(1)
    return (found == y).double().mean().item()

def make_model(recipe, data):
    tokens = recipe["max_tokens"] or data["length"]
    return build(agf.AGFTransformer, classes=len(data["classes"]), length=data["length"],
                 channels=len(data["mean"]), stride=math.ceil(data["length"] / tokens), **recipe)

def make_optimizer(model, kind, lr):
    """AdamW decays matrices only; Adam and RAdam are the official code's, without decay."""
    if kind != "adamw":
        return dict(adam=torch.optim.Adam, radam=torch.optim.RAdam)[kind](model.parameters(), lr=lr)
    groups = [dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=0.05),
              dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)

D = settle(OPTIONS, {}, {})           # the defaults

class AGFClassifier(BaseClassifier):
    """X: (N, channels, time), or a list of (channels, time_i), NaN allowed; y: any labels.

    Its parameters are the options of the command line. save_to: a file for a checkpoint after
    each epoch; where it is there already, fit goes on from it, to the same numbers.
    """
    _tags = {"capability:multivariate": True, "capability:unequal_length": True,
             "capability:missing_values": True, "X_inner_type": ["np-list", "numpy3D"],
             "algorithm_type": "deeplearning"}

    def __init__(self, mixer=D.mixer, basis=D.basis, order=D.order, a=D.a, b=D.b, dim=D.dim,
                 identity=D.identity, depth=D.depth, heads=D.heads, hidden=D.hidden, norm=D.norm,
                 dropout=D.dropout, pool=D.pool, lr=D.lr, gamma=D.gamma, batch_size=D.batch_size,
                 epochs=D.epochs, scale=D.scale, kernel=D.kernel, max_tokens=D.max_tokens,
                 zero_init=D.zero_init, augment=D.augment, mixup=D.mixup, optimizer=D.optimizer,
                 clip=D.clip, schedule=D.schedule, compile=D.compile, random_state=D.seed,
                 device=D.device, save_to=None):
        vars(self).update({name: value for name, value in locals().items() if name != "self"})
        BaseClassifier.__init__(self)

    @torch.random.fork_rng(devices=[])               # the caller's random numbers stay as they are
    def _fit(self, X, y):
        recipe, seed = {name: getattr(self, name) for name in RECIPE}, self.random_state or 0
        check(OPTIONS, recipe | dict(seed=seed))
        device, _ = pick_device(self.device)
        self.data_ = describe(X, y)
        x, keep, y = encode(X, y.tolist(), self.data_, "X")
        about = dict(recipe=recipe, seed=seed, data=self.data_, mark=fingerprint(x, keep, y))
        x, keep, y = x.to(device), keep.to(device), F.one_hot(y).float().to(device)
        per_epoch = math.ceil(len(x) / self.batch_size)
        epochs = self.epochs or max(10, math.ceil(600 / per_epoch))
        steps = epochs * per_epoch
        torch.manual_seed(seed)
        self.model_ = make_model(recipe, self.data_).to(device)
        net = torch.compile(self.model_) if self.compile else self.model_
        optimizer = make_optimizer(self.model_, self.optimizer, self.lr)
        self.history_, self.seconds_ = [], 0.0
        if self.save_to and Path(self.save_to).exists():
            state = load(self.save_to)
            if {key: state.get(key) for key in about} != about:
                raise UserError(f"{self.save_to}: a checkpoint of other data or options")
            self.model_.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.history_, self.seconds_ = state["history"], state["seconds"]
        left = range(len(self.history_), epochs)
        for epoch in tqdm(left, f"seed {seed}", leave=False, disable=None):
            begin, sums = time.perf_counter(), np.zeros(2)
            torch.manual_seed(10_007 * (seed + 1) + epoch)         # dropout: as if never stopped
            order = np.random.default_rng([seed, epoch, len(x)]).permutation(len(x))
            for i, pick in enumerate(torch.from_numpy(order).to(device).split(self.batch_size)):
                step = epoch * per_epoch + i
                rng = np.random.default_rng([seed, step])
                n = x.shape[1] if self.compile else int(keep[pick].sum(1).max())
                batch = x[pick, :n], keep[pick, :n], y[pick]
                if self.augment:
                    batch = augment(*batch[:2], self.augment, rng), *batch[1:]
                if self.mixup:
                    batch = mixup(*batch, self.mixup, rng)
                rate = self.lr
                if self.schedule == "cosine":
                    warmup = min(1, (step + 1) / (0.1 * steps))
                    rate = self.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses = agf.train_step(net.train(), optimizer, *batch, self.gamma, self.clip)
                sums += [loss.item() for loss in losses]
            loss, ortho = (sums / per_epoch).tolist()
            if not math.isfinite(loss + ortho):
                raise UserError(f"the loss is not finite in epoch {epoch + 1} of seed {seed}: "
                                f"try a smaller --lr (now {self.lr:g})")
            row = dict(seed=seed, epoch=epoch + 1, step=step + 1, lr=rate, loss=loss, ortho=ortho)
            self.history_.append(self._look(row))
            self.seconds_ += time.perf_counter() - begin
            if self.save_to:
                save(self.save_to, about | dict(
                    config=dataclasses.asdict(self.model_.config), model=self.model_.state_dict(),
                    optimizer=optimizer.state_dict(), history=self.history_, seconds=self.seconds_))

    def _look(self, row):
        """After each epoch: what is logged."""
        return row

    def shares(self, X, source="X"):
        """-> probabilities, float64 (N, classes)."""
        x, keep, _ = encode(X, [], self.data_, source)
        device = next(self.model_.parameters()).device
        shares = agf.evaluate(self.model_, batches(x, keep, 128, device)).double().softmax(1)
        if shares.isnan().any():
            number = int(shares.isnan().any(1).nonzero()[0]) + 1
            raise UserError(f"{source}: series {number}: the model's output is not finite")
        return shares.numpy()

    def _predict_proba(self, X):
        return self.shares(X)

    def _predict(self, X):
        return self.classes_[self.shares(X).argmax(1)]

    @classmethod
    def load(cls, run, device=D.device):
        """A run folder (its first seed), or one of its .pt files -> a fitted classifier."""
        files = sorted(Path(run).glob("seed-*.pt"), key=lambda file: (len(file.name), file.name))
        path = files[0] if files else Path(run)
        state = load(path)
        try:
            mixer = state["recipe"]["mixer"]
            found = cls(**state["recipe"], random_state=state["seed"], device=device)
            found.data_, found.classes_ = state["data"], np.array(state["data"]["classes"])
            if mixer in agf.MIXERS:
                found.model_ = agf.AGFTransformer(agf.AGFConfig(**state["config"]))
                found.model_.load_state_dict(state["model"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{path}: not a checkpoint of train_uea.py") from None
        if mixer not in agf.MIXERS:
            raise UserError(f"{path}: its mixer {mixer!r} is unknown here: put it into agf.MIXERS")
        found.model_.to(pick_device(device)[0])
        found.n_classes_, found.is_fitted = len(found.classes_), True
        return found

    @classmethod
    def _get_test_params(cls, parameter_set="default"):
        return dict(dim=8, heads=2, kernel=3, epochs=1)

# -------------------------------------------------------------------------------- command line

def published(name):
    """The paper's setting of a set."""
    if name not in PAPER_SETS:
        raise UserError(f"--preset paper has no setting for {name}, only {', '.join(PAPER_SETS)}")
    names = ("basis", "order", "a", "b", "gamma", "identity")
    return PAPER | dict(zip(names, PAPER_SETS[name])) | EXCEPTIONS.get(name, {})

def predict(path, run, device):
    """CSV: number, label and probabilities of each series."""
    classifier = AGFClassifier.load(run, device)
    series, _ = read(path, need_labels=False)
    classes, table = classifier.data_["classes"], csv.writer(sys.stdout, lineterminator="\n")
    shares = classifier.shares(series, path)
    table.writerow(["series", "label", *(f"p({name})" for name in classes)])
    for i, row in enumerate(shares):
        table.writerow([i + 1, classes[row.argmax()], *(f"{share:.6f}" for share in row)])

def list_sets(data_dir):
    """Exactly the sets that --dataset takes without a download."""
    names = {file.name.removesuffix("_TRAIN.ts") for folder in folders(data_dir)
             for file in [*folder.glob("*_TRAIN.ts"), *folder.glob("*/*_TRAIN.ts")]}
    print("usable now, without a download:")
    for name in sorted(names):
        try:
            files = find(name, data_dir) or []
            for file in files:
                read(file, header_only=True)
            print(*(f"  {name:28s} {file.parent}\n" for file in files[:1]), end="")
        except (UserError, OSError):
            pass
    print("the ten of the paper, for --preset paper:", *PAPER_SETS, sep="\n  ")

def run(s):
    """Train all seeds of one setting, new or resumed; leaves the whole run folder."""
    warnings.filterwarnings("ignore", module="aeon")      # on series that hardly vary
    device, reason = pick_device(s.device)
    if s.compile:
        check_compiler(device)
    (X, y), (test_X, test_y) = read_both(s.dataset, s.data_dir)
    data, recipe = describe(X, y), {name: getattr(s, name) for name in RECIPE}
    test = encode(test_X, test_y, data, f"{s.dataset}_TEST.ts")
    model = make_model(recipe, data)  # what cannot be built is said before there is a folder
    size, config = sum(p.numel() for p in model.parameters()), model.config
    out = open_run("train_uea.py", s, s.dataset, fingerprint(*X, y, *test_X, test_y))
    print(f"{s.dataset}: {len(y)} train, {len(test_y)} test series, {config.channels} channels, "
          f"length {config.length} -> {len(model.position)} tokens, {config.classes} classes")
    print(f"mixer {s.mixer}, {size:,} parameters, {device} ({reason})\nrun folder {out}",
          flush=True)

    class Watched(AGFClassifier):     # --protocol paper looks at the test split, never trains on it
        def _look(self, row):
            seen = dict(test_accuracy=accuracy(self.model_, test, device))
            return row | seen if s.protocol == "paper" else row
    states, models, shares = [], [], 0
    for seed in range(s.seed, s.seed + s.seeds):
        one = Watched(**recipe, random_state=seed, device=s.device, compile=s.compile,
                      save_to=str(out / f"seed-{seed}.pt"))
        try:
            one.fit(X, np.array(y))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(out) from None
        models.append(one.model_)
        logits = agf.evaluate(one.model_, batches(*test[:2], 128, device))
        shares = shares + logits.softmax(1)
        score = (logits.argmax(1) == test[2]).double().mean().item()
        off = accuracy(without_mixers(one.model_), test, device)
        result = dict(seed=seed, train_seconds=round(one.seconds_, 2), test_accuracy=score,
                      test_accuracy_mixers_off=off)
        if s.protocol == "paper":
            result["best_test_accuracy"] = max(row["test_accuracy"] for row in one.history_)
        states.append(dict(history=one.history_, result=result))
        print(f"seed {seed}: test accuracy {100 * score:.2f} % ({100 * off:.2f} with the mixers "
              f"off), {len(one.history_)} epochs, {one.seconds_:.1f} s", flush=True)
    facts = dict(dataset=s.dataset, mixer=s.mixer, preset=s.preset, protocol=s.protocol,
                 parameters=size, device=f"{device} ({reason})", epochs=len(one.history_))
    if s.seeds > 1:
        facts["ensemble_accuracy"] = (shares.argmax(1) == test[2]).double().mean().item()
        print(f"their averaged probabilities: {100 * facts['ensemble_accuracy']:.2f} %")
    if s.protocol == "paper":
        best = np.mean([state["result"]["best_test_accuracy"] for state in states])
        facts["best_test_accuracy_label"] = "best epoch, chosen on the TEST split: optimistic"
        print(f"best epoch on the test split: {100 * best:.2f} % (optimistic: chosen on it)")
    finish(out, states, models[0], next(batches(*test[:2], 64, device)), facts)

def start(argv):
    given = parse(OPTIONS, argv, __doc__)
    if given.get("list"):
        return list_sets(given.get("data_dir", D.data_dir))
    if "predict" in given or "checkpoint" in given:
        if given.keys() - {"device"} != {"predict", "checkpoint"}:
            raise UserError("--predict FILE.ts needs --checkpoint RUN, beside them only --device")
        return predict(given["predict"], given["checkpoint"], given.get("device", D.device))
    if "resume" in given:
        s = resumed("train_uea.py", OPTIONS, given)
        if finished(s.resume):
            return
    else:
        preset = published(given.get("dataset")) if given.get("preset") == "paper" else {}
        s = settle(OPTIONS, preset, given)
    if not s.dataset:
        raise UserError("which data set? Try --dataset JapaneseVowels, or --list")
    run(s)

def main(argv=None):
    return guard("train_uea.py", start, argv)

if __name__ == "__main__":
    sys.exit(main())
