"""Train and evaluate AGF on a task of Long Range Arena, with the published settings.

    python train_lra.py --task listops           (makes its own data: no network needed)
    python train_lra.py --task listops --quick   (the same on toy data, in under a minute)
    torchrun --standalone --nproc_per_node=2 train_lra.py --task listops

Protocol: the checkpoint that is best on the dev split, then one pass over the test split.
The published settings name no gradient clipping; we clip the gradient norm at 1.
"""

import argparse
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import resource
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

import agf
import train_uea
from agf import UserError
from train_uea import Parser, Stopped, first_line, stop_asked, write

# The published settings. What is the same for all tasks:
SETTING = dict(dim=64, depth=2, heads=2, hidden=128, head=128, dropout=0.1, norm="pre", pool="mean",
               basis="jacobi", identity=True, lr=1e-4)
COLUMNS = ("length", "vocab", "classes", "batch_size", "steps", "warmup",
           "order", "a", "b", "gamma")
TASKS = {
    "listops":    (2000, 32, 10, 32, 5000, 1000, 5, 2.0, -1.0, 1e-2),
    "text":       (1024, 512, 2, 32, 20000, 8000, 5, 2.0, -2.0, 1e-2),
    "retrieval":  (4000, 512, 2, 32, 30000, 800, 5, 2.0, -1.5, 1e-4),
    "image":      (1024, 512, 10, 256, 35000, 175, 6, 1.5, 2.0, 0.1),
    "pathfinder": (1024, 512, 2, 256, 62400, 312, 4, 1.5, -1.0, 1e-4),
}
QUICK = dict(length=256, batch_size=8, steps=30)
QUICK_NOTE = "--quick: toy data and a few steps, this number means nothing"
SYNTHETIC_NOTE = "synthetic images of our own, not comparable with published numbers"
EVALUATIONS = 20                     # passes over the dev split during a run, if 50 steps apart


# ------------------------------------------------------------------------------------- options

def options(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what to run")
    g.add_argument("--task", choices=list(TASKS))
    g.add_argument("--quick", action="store_true", help="end to end in under a minute, toy data")
    g.add_argument("--synthetic", action="store_true", help="pathfinder: draw images of our own")
    g.add_argument("--data-dir", default="data", metavar="DIR",
                   help="holds the official archives or lra_release (default: data)")
    g.add_argument("--out", metavar="DIR", help="run folder (default: runs/TASK-TIME)")
    train_uea.run_options(g)
    g.add_argument("--micro-batch", type=int, metavar="N",
                   help="samples in memory at once; their gradients add up (default: all)")
    g = p.add_argument_group("recipe and model (default: the published setting of the task)")
    train_uea.add_numbers(g, [("steps", int, "training steps"),
                              ("batch-size", int, "samples in a step, in all"),
                              ("length", int, "longest input, in tokens")])
    train_uea.model_options(g)
    return p.parse_args(argv), p


def resolve(args):
    """Published values, overridden by what the user gave: the full settings of a run."""
    setting = SETTING | dict(zip(COLUMNS, TASKS[args.task]))
    published = setting["steps"]
    if args.quick:
        setting |= QUICK
    setting |= {k: v for k, v in vars(args).items() if k in setting and v is not None}
    train_uea.check_lowest(setting | dict(micro_batch=args.micro_batch), steps=1, batch_size=1,
                           length=1, lr=1e-12, gamma=0, micro_batch=1)
    if args.seeds < 1 or args.seed < 0:
        raise UserError(f"--seeds must be at least 1, --seed at least 0: {args.seeds}, {args.seed}")
    if args.synthetic and args.task != "pathfinder":
        raise UserError(f"--synthetic is for pathfinder only, not for {args.task}")
    if setting["batch_size"] < SIZE:
        raise UserError(f"--batch-size {setting['batch_size']} is less than one sample for each "
                        f"of {SIZE} processes")
    # A shorter run keeps the published shape of the schedule.
    setting["warmup"] = max(1, round(setting["warmup"] * setting["steps"] / published))
    return setting


# ------------------------------------------------------------------------- ListOps: making it

OPERATORS = ("MIN", "MAX", "MED", "SM")
COUNTS = dict(train=96000, val=2000, test=2000)
# What a node writes. Codes: a digit, 10 + 9 operator + (arguments - 2), an inner "]", and the
# root's "]" with the target. The official form nests pairs: "( ( ( [MAX 2 ) 9 ) ] )".
PIECES = np.array([f"{d} ) " for d in range(10)]
                  + ["( " * (m + 1) + f"[{op} " for op in OPERATORS for m in range(2, 11)]
                  + ["] ) ) "] + [f"] )\t{v}\n" for v in range(10)], dtype=object)
INNER, ROOT = 46, 47


def draw_trees(rng, count, low, high, depth=10):
    """Text lines of those of `count` random trees that have low < length < high.

    All trees grow at once, level by level; the children of a node are neighbours in their level.
    The root is an operator: the other trees, single digits, are too short in any case. The official
    code, like this one, leaves both ends of the range out, and does not count parentheses.
    """
    levels, length = [], np.zeros(count, np.int64)
    tree = np.arange(count)
    for level in range(depth):
        n = len(tree)
        operator = rng.random(n, np.float32) < (1 if level == 0 else 0.25 * (level < depth - 1))
        kind = np.where(operator, rng.integers(10, 14, n, np.uint8),
                        rng.integers(0, 10, n, np.uint8))
        args = rng.integers(2, 11, n, np.uint8) * operator
        length += np.bincount(tree, minlength=count) + np.bincount(tree[operator], minlength=count)
        levels.append((tree, kind, args))
        # A tree that is already too long is dropped at the end: no more children for it.
        tree = np.repeat(tree, args * (length < high)[tree])
    good = (length > low) & (length < high)
    if not good.any():
        return []

    # Bottom-up over the good trees: value and length of each node.
    above = []                                   # value, size: of the children's level
    for tree, kind, args in reversed(levels):
        kind, args = kind[good[tree]], args[good[tree]]
        nodes = np.flatnonzero(args)
        m, op = args[nodes].astype(np.int64), kind[nodes] - 10
        here, length = kind.astype(np.int64), np.ones(len(kind), np.int64)
        if len(nodes):
            group = np.repeat(np.arange(len(nodes)), m)
            count = np.bincount(10 * group + value, minlength=10 * len(nodes)).reshape(-1, 10)
            below = count.cumsum(1)
            ranked = lambda r: (below <= r[:, None]).sum(1)          # r-th smallest argument
            here[nodes] = np.choose(op, [ranked(0 * m), ranked(m - 1),
                                         (ranked((m - 1) // 2) + ranked(m // 2)) // 2,
                                         count @ np.arange(10) % 10])
            length[nodes] = 2 + np.add.reduceat(size, np.cumsum(m) - m)
        value, size = here, length
        above.append((kind, args, value, size))

    # Top-down: the place of each node in the text, and its code there.
    codes = np.empty(size.sum(), np.uint8)
    place = np.cumsum(size) - size
    for level, (kind, args, value, size) in enumerate(reversed(above)):
        if level:
            before = np.cumsum(size) - size
            first = np.repeat(before[np.cumsum(m) - m], m)           # of the eldest sibling
            place = np.repeat(place[nodes], m) + 1 + before - first
        nodes = np.flatnonzero(args)
        m = args[nodes].astype(np.int64)
        codes[place] = kind
        codes[place[nodes]] = 10 + 9 * (kind[nodes] - 10) + m - 2
        codes[place[nodes] + size[nodes] - 1] = INNER if level else ROOT + value[nodes]
    return "".join(PIECES[codes].tolist()).splitlines(keepends=True)


def listops_lines(seed=0, low=500, high=2000):
    """Lines of the official form without end, no two the same."""
    seen = set()
    for batch in itertools.count():
        for line in draw_trees(np.random.default_rng([seed, batch]), 2000, low, high):
            key = hashlib.blake2b(line.encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                yield line


def generate_listops(folder, counts=COUNTS, **how):
    """Write basic_{train,val,test}.tsv, all or nothing: a folder is filled, then renamed."""
    from tqdm import tqdm
    folder.parent.mkdir(parents=True, exist_ok=True)
    lines = iter(tqdm(listops_lines(**how), "generating listops", sum(counts.values()),
                      unit=" trees", disable=None))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as part:
        part = Path(part) / folder.name
        part.mkdir()
        for name, count in counts.items():
            with open(part / f"basic_{name}.tsv", "w", newline="") as f:
                f.write("Source\tTarget\n")
                f.writelines(itertools.islice(lines, count))
        try:
            os.rename(part, folder)
        except OSError:
            if not (folder / "basic_test.tsv").exists():     # else another process was faster
                raise


# ---------------------------------------------------------------------- reading the five tasks

@dataclass
class Split:
    """Sequences side by side in one row of bytes. Retrieval has two documents in a sample."""
    tokens: torch.Tensor             # (all tokens,), uint8
    start: torch.Tensor              # (N, documents), where each begins
    size: torch.Tensor               # (N, documents), how long it is, at most --length
    full: torch.Tensor               # (N, documents), how long it was
    y: torch.Tensor                  # (N,)
    name: str = ""

    def __len__(self):
        return len(self.y)

    def rows(self, which):
        return replace(self, start=self.start[which], size=self.size[which],
                       full=self.full[which], y=self.y[which])


def pack(rows, labels, limit=None):
    """List of bytes -> arrays for the cache; `full` remembers the lengths before the limit."""
    limit = limit or max(map(len, rows), default=1)
    return dict(tokens=np.frombuffer(b"".join(row[:limit] for row in rows), np.uint8),
                full=np.array([len(row) for row in rows]), y=np.array(labels), limit=limit)


def unpack(arrays, length, documents=1):
    stored = np.minimum(arrays["full"], arrays["limit"])
    tensor = lambda x: torch.from_numpy(x.astype(np.int64)).view(-1, documents)
    return Split(torch.from_numpy(np.array(arrays["tokens"])), tensor(np.cumsum(stored) - stored),
                 tensor(np.minimum(stored, length)), tensor(arrays["full"]),
                 torch.from_numpy(arrays["y"].astype(np.int64)))


def even(x, y):
    """(N, n) bytes of one length -> arrays for the cache."""
    return dict(tokens=x.reshape(-1), full=np.full(len(x), x.shape[1]), y=y, limit=x.shape[1])


def writable(folder):
    """Can new files go there? A folder marked read-only is left alone, even by an administrator."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o200)


def home(data_dir):
    """Where new files go: the data folder, or ./data where that is read-only."""
    return Path(data_dir) if writable(Path(data_dir)) else Path("data")


def cached(name, source, data_dir, make):
    """make() once, its arrays kept as cache/NAME.npz until the source file changes."""
    path = home(data_dir) / "cache" / f"{name}.npz"
    stamp = f"{source.stat().st_size} {source.stat().st_mtime_ns}" if source else ""
    try:
        with np.load(path) as arrays:
            if str(arrays["stamp"]) == stamp:
                return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass                         # not there yet, or damaged: make it again
    arrays = make()
    part = path.with_name(f"{name}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            np.savez(f, stamp=stamp, **arrays)
        os.replace(part, path)
    except OSError as error:         # a full disk costs time, not the run
        part.unlink(missing_ok=True)
        print(f"{path} cannot be kept ({error.strerror}): the next run converts again")
    return arrays


def locate(data_dir, name):
    """A file of the official release: under the data folder, or under its lra_release."""
    places = [Path(data_dir, *middle, name) for middle in
              ((), ("lra_release",), ("lra_release", "lra_release"))]
    return next((path for path in places if path.exists()), None)


def release(data_dir, name):
    """The same, or one paragraph on how to get it."""
    if path := locate(data_dir, name):
        return path
    raise UserError(
        f"{Path(data_dir) / 'lra_release' / name} is missing. It is part of the Long Range Arena "
        f"release: fetch lra_release.gz (about 7.7 GB; the link is in the README of "
        f"github.com/google-research/long-range-arena, or take storage.googleapis.com/"
        f"long-range-arena/lra_release.gz), then: tar -xzf lra_release.gz -C {data_dir}")


def read_listops(path):
    """A tsv of the official form -> arrays, 16 MB at a time. Parentheses carry nothing: dropped."""
    table = bytearray(b"\xff" * 256)             # digits 1-10, operators 11-14, "]" 15, ends 16 17
    for code, byte in enumerate(b"0123456789\1\2\3\4]\t\n", start=1):
        table[byte] = code
    tokens, full, labels, line = [], [], [], 2
    with open(path, "rb") as f:
        if f.readline().split() != [b"Source", b"Target"]:
            raise UserError(f"{path}: the first line must be Source, a tab, Target")
        while chunk := f.read(1 << 24):
            chunk = (chunk + f.readline()).replace(b"\r\n", b"\n")
            chunk += b"" if chunk.endswith(b"\n") else b"\n"
            text = chunk
            for i, op in enumerate(OPERATORS, start=1):
                text = text.replace(f"[{op}".encode(), bytes([i]))
            # Each token is one byte now; two side by side are something else, such as "12".
            raw = np.frombuffer(text, np.uint8)
            word = (raw != 32) & (raw != 9) & (raw != 10)
            code = np.frombuffer(text.translate(bytes(table), b" ()"), np.uint8).copy()
            tab, end = np.flatnonzero(code == 16), np.flatnonzero(code == 17)
            good = (len(tab) == len(end) and not (word[1:] & word[:-1]).any()
                    and (code < 18).all() and (end - tab == 2).all() and (code[tab + 1] < 11).all())
            size = tab - np.append(0, end[:-1] + 1) if good else np.zeros(1)
            if not size.all():
                complain(path, line, chunk.decode("ascii", "replace").splitlines())
            labels.append(code[tab + 1] - 1)
            code[tab + 1] = 16
            tokens.append(code[code < 16])
            full.append(size)
            line += len(end)
    if not full:
        raise UserError(f"{path}: holds no samples")
    full = np.concatenate(full)
    return dict(tokens=np.concatenate(tokens), full=full, y=np.concatenate(labels),
                limit=full.max())


def complain(path, first, lines):
    """The slow way through a part that cannot be right: name the line and what is wrong there."""
    legal = {*"0123456789()]", *(f"[{op}" for op in OPERATORS)}
    for number, line in enumerate(lines, first):
        source, _, label = line.partition("\t")
        if unknown := [token for token in source.split(" ") if token and token not in legal]:
            raise UserError(f"{path}, line {number}: unknown token {unknown[0][:40]!r}")
        if label not in [*"0123456789"] or not source.strip("() "):
            raise UserError(f"{path}, line {number}: the target must be one digit after a tab, "
                            f"with a source before it, not {label[:40]!r}")
    raise UserError(f"{path}: unreadable between lines {first} and {first + len(lines)}")


def load_listops(args, length):
    name, how = "listops-1000", {}
    if args.quick:
        name = "listops-quick"
        how = dict(counts=dict(train=400, val=100, test=100), low=20, high=250)
    found = locate(args.data_dir, name)
    folder = found or home(args.data_dir) / "lra_release" / name
    if not found and not folder.exists():
        generate_listops(folder, **how)
    splits = []
    for part in COUNTS:
        path = folder / f"basic_{part}.tsv"
        if not path.is_file():
            raise UserError(f"{path} is missing beside its sisters; an empty or no {name} folder "
                            f"is filled anew")
        splits.append(unpack(cached(f"{name}-{part}", path, args.data_dir,
                                    functools.partial(read_listops, path)), length))
    return splits


def fetch(name, url, kind, digest, second, data_dir):
    """An official archive: the user's, else downloaded and checked, else where to get it."""
    for folder in (Path(data_dir), home(data_dir)):
        if (folder / name).is_file():
            return folder / name
    path = home(data_dir) / name
    part = path.with_name(f"{name}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        with open(part, "rb") as f:
            if (found := hashlib.file_digest(f, kind).hexdigest()) != digest:
                raise ValueError(f"{kind} {found} instead of {digest}")
        os.replace(part, path)
    except Exception as error:       # no network fails in many ways
        raise UserError(f"could not download {name} ({type(error).__name__}: {first_line(error)}). "
                        f"Fetch {url} by hand, or {second}, and save it as {path}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def members(path):
    """(name, bytes) of each file of a .tar.gz. Nothing is unpacked to disk."""
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: not a complete .tar.gz ({first_line(error)}): "
                        f"delete it and fetch it again") from None


def read_imdb(path):
    """aclImdb/{train,test}/{pos,neg}/*.txt -> the train and test arrays, prefixed."""
    from tqdm import tqdm
    found = {"train": [], "test": []}
    for name, text in tqdm(members(path), "reading reviews", unit=" files", disable=None):
        match name.split("/"):
            case ["aclImdb", "train" | "test" as split, "pos" | "neg" as label, file] \
                    if file.endswith(".txt"):
                found[split].append((name, label == "pos", text))
    arrays = {}
    for split, reviews in found.items():
        if len({label for _, label, _ in reviews}) < 2:
            raise UserError(f"{path}: no reviews in aclImdb/{split}/pos or aclImdb/{split}/neg")
        reviews.sort()               # the order inside an archive is nobody's promise
        made = pack([text for *_, text in reviews], [label for _, label, _ in reviews])
        arrays |= {f"{split}_{key}": value for key, value in made.items()}
    return arrays


def dev_from(train, share):
    """Split the last share of a fixed shuffle off the train split: the same in every run."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
    dev = max(1, round(share * len(train)))
    return train.rows(order[:-dev]), train.rows(order[-dev:])


def load_text(args, length):
    path = fetch("aclImdb_v1.tar.gz",
                 "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                 "md5", "7c2ac02c03563afcf9b574c7e56c153a",
                 "web.archive.org/web/2023/https://ai.stanford.edu/~amaas/data/sentiment/"
                 "aclImdb_v1.tar.gz", args.data_dir)
    arrays = cached("aclImdb", path, args.data_dir, functools.partial(read_imdb, path))
    keys = ("tokens", "full", "y", "limit")
    train, test = (unpack({key: arrays[f"{split}_{key}"] for key in keys}, length)
                   for split in ("train", "test"))
    return *dev_from(train, 0.1), test


class ArraysOnly(pickle.Unpickler):
    """Reads the official pickles; a tampered one can build arrays and nothing else."""

    def find_class(self, module, name):
        allowed = {"ndarray": np.ndarray, "dtype": np.dtype,
                   "_reconstruct": np.empty(0).__reduce__()[0], "encode": _encode}
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode(text, encoding):
    """How pickles of protocol 2 spell bytes."""
    return text.encode("latin1")


def read_cifar(path):
    """cifar-10-python.tar.gz -> grey pixels (N, 1024) and labels, by ITU-R 601 luma weights."""
    found = {}
    for name, data in members(path):
        part = name.removeprefix("cifar-10-batches-py/")
        if part.startswith("data_batch_") or part == "test_batch":
            try:
                batch = ArraysOnly(io.BytesIO(data), encoding="bytes").load()
                pixels = batch[b"data"].reshape(-1, 3, 1024).astype(np.uint32)
                red, green, blue = pixels.swapaxes(0, 1)
                grey = (299 * red + 587 * green + 114 * blue + 500) // 1000
                found[part] = grey.astype(np.uint8), np.array(batch[b"labels"])
            except Exception as error:       # a damaged or tampered pickle fails in many ways
                raise UserError(f"{path}: {name} is not an official CIFAR-10 batch "
                                f"({first_line(error)})") from None
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    if missing := [name for name in (*batches, "test_batch") if name not in found]:
        raise UserError(f"{path}: cifar-10-batches-py/{missing[0]} is missing")
    x, y = (np.concatenate(column) for column in zip(*(found[name] for name in batches)))
    return dict(train_x=x, train_y=y, test_x=found["test_batch"][0], test_y=found["test_batch"][1])


def load_image(args, length):
    converted = Path(args.data_dir) / "cifar10_gray.npz"
    if converted.is_file():
        try:
            with np.load(converted) as f:
                arrays = {key: f[key] for key in ("train_x", "train_y", "test_x", "test_y")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{converted}: unreadable ({first_line(error)})") from None
    else:
        path = fetch("cifar-10-python.tar.gz",
                     "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "sha256",
                     "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                     "web.archive.org/web/2023/https://www.cs.toronto.edu/~kriz/"
                     "cifar-10-python.tar.gz", args.data_dir)
        arrays = cached("cifar10_gray", path, args.data_dir, functools.partial(read_cifar, path))
    train, test = (unpack(even(arrays[f"{split}_x"], arrays[f"{split}_y"]), length)
                   for split in ("train", "test"))
    return *dev_from(train, 0.1), test


def read_pairs(path, length):
    """label, two ids, two documents, tab-separated -> arrays of 2 N documents, cut."""
    documents, labels, full = [], [], []
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != 5 or fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise UserError(f"{path}, line {number}: must be a label 0 or 1, two ids and two "
                                f"documents, with tabs between")
            labels.append(fields[0][:1] == b"1")
            full += [len(fields[3]), len(fields[4])]
            documents += [fields[3][:length], fields[4][:length]]
    if not labels:
        raise UserError(f"{path}: holds no pairs")
    return pack(documents, labels, length) | dict(full=np.array(full))


def load_retrieval(args, length):
    splits = []
    for part in ("train", "eval", "test"):
        path = release(args.data_dir, f"tsv_data/new_aan_pairs.{part}.tsv")
        splits.append(unpack(cached(f"aan-{part}-{length}", path, args.data_dir,
                                    functools.partial(read_pairs, path, length)), length, 2))
    return splits


def read_pathfinder(folder):
    """metadata/*.npy, text in spite of their name: image folder, image file, _, label, ..."""
    from matplotlib.image import imread
    from tqdm import tqdm
    images, labels = [], []
    for path in tqdm(sorted((folder / "metadata").glob("*.npy")), "reading images", disable=None):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise UserError(f"{path}, line {number}: must be folder, file, number, and a "
                                f"label 0 or 1")
            image = folder / fields[0] / fields[1]
            try:
                pixels = np.rint(255 * imread(image)).astype(np.uint8).reshape(32, 32, -1)[..., 0]
            except Exception as error:           # missing, empty, of another size
                raise UserError(f"{image}: not a 32 x 32 image ({first_line(error)})") from None
            images.append(pixels.reshape(-1))
            labels.append(int(fields[3]))
    if not images:
        raise UserError(f"{folder}: no images are named in metadata/*.npy")
    return even(np.stack(images), np.array(labels))


def snakes(rng, count, dashes):
    """Points on dashed curves that bend smoothly and stay inside: (count, dashes, 5, 2)."""
    found = np.empty((0, dashes, 5, 2), np.float32)
    while len(found) < count:
        bend = rng.normal(0, 0.25, (count, dashes)).cumsum(1)
        angle = rng.uniform(0, 2 * np.pi, (count, 1)) + bend
        way = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)    # (.., dashes, 2)
        points = 2.4 * way.cumsum(1)[:, :, None] \
            + np.linspace(0, 1, 5, dtype=np.float32)[:, None] * way[:, :, None]
        low, high = points.min((1, 2), keepdims=True), points.max((1, 2), keepdims=True)
        fits = (high - low < 26).all((1, 2, 3))
        place = 2 + rng.random((count, 1, 1, 2), np.float32) * (27 - high + low) - low
        found = np.concatenate([found, (points + place)[fits]])
    return found[:count]


def apart(a, b):
    """Distance of two sets of points, a (n, p, 2) and b (n, q, 2) -> (n,)."""
    dx, dy = (np.abs(a[:, :, None, i] - b[:, None, :, i]) for i in (0, 1))
    return np.maximum(dx, dy).min((1, 2))


def draw_images(seed, count):
    """Our own Pathfinder: do the two dots lie on the same dashed curve? -> arrays."""
    from tqdm import tqdm
    rng, images, labels = np.random.default_rng(seed), [], []
    bar = tqdm(desc="drawing images", total=count, unit=" images", disable=None)
    while sum(map(len, images)) < count:
        one, two = snakes(rng, 2000, 14).reshape(2, 1000, 70, 2)
        partner = np.full(1000, -1)                                  # a second curve far from it
        for turn in range(12):
            free = np.flatnonzero(partner < 0)
            near = (free + turn) % 1000
            good = apart(one[free, ::2], two[near, ::2]) > 2
            partner[free[good]] = near[good]
        pair = np.stack([one, two[partner]], 1)[partner >= 0]        # (n, 2, 70, 2)
        n = len(pair)
        other = snakes(rng, 5 * n, 4).reshape(5 * n, 20, 2)          # five distractors each
        curves = pair.reshape(n, 140, 2)[:, ::4].repeat(5, 0)
        other[apart(other, curves) < 2] = 0                          # too near: into the corner
        other = other.reshape(n, 100, 2)
        y = rng.integers(2, size=n)
        # The second dot: the other end of the same curve, or the farther end of the other curve, so
        # that the distance of the dots tells little.
        ends = np.stack([pair[:, 0, [-1, -1]], pair[:, 1, [0, -1]]], 1)      # (n, 2, 2, 2)
        farther = np.square(ends - pair[:, None, :1, 0]).sum(-1).argmax(2)   # (n, 2)
        row, which = np.arange(n), 1 - y
        dots = np.stack([pair[:, 0, 0], ends[row, which, farther[row, which]]], 1)
        disc = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 5)]), -1).reshape(-1, 2)
        dots = (dots[:, :, None] + 1.2 * disc).reshape(n, 50, 2)
        points = np.concatenate([pair.reshape(n, 140, 2), other, dots], 1)
        corner = np.floor(points).astype(int)
        image = np.zeros(n * 1024)
        for dx, dy in itertools.product((0, 1), (0, 1)):             # shared among four pixels
            share = np.abs(1 - dx - points[..., 0] + corner[..., 0]) \
                * np.abs(1 - dy - points[..., 1] + corner[..., 1])
            at = 1024 * np.arange(n)[:, None] + 32 * (corner[..., 1] + dy) + corner[..., 0] + dx
            image += np.bincount(at.ravel(), share.ravel(), n * 1024)
        image = image.reshape(n, 32, 32)
        image[:, :2, :2] = 0                                         # what was too near
        images.append((255 * np.minimum(0.6 * image, 1)).astype(np.uint8).reshape(n, 1024))
        labels.append(y)
        bar.update(n)
    bar.close()
    return even(np.concatenate(images)[:count], np.concatenate(labels)[:count])


def load_pathfinder(args, length):
    count = 600 if args.quick else 200000
    if args.synthetic or args.quick:
        arrays = cached(f"pathfinder-synthetic-{count}", None, args.data_dir,
                        functools.partial(draw_images, 0, count))
    else:
        meta = release(args.data_dir, "pathfinder32/curv_contour_length_14/metadata")
        arrays = cached("pathfinder32", meta, args.data_dir,
                        functools.partial(read_pathfinder, meta.parent))
    train, test = dev_from(unpack(arrays, length), 0.1)
    return *dev_from(train, 1 / 9), test


def load_toy(args, length):
    """Random bytes whose mix leans towards the class: for --quick without an archive."""
    documents = 2 if args.task == "retrieval" else 1
    classes, splits = TASKS[args.task][2], []
    for count, rng in zip((400, 100, 100), map(np.random.default_rng, range(3))):
        y = rng.integers(classes, size=count)
        rows = [rng.integers(97, 107 + label, size=n).astype(np.uint8).tobytes()
                for label in y for n in rng.integers(length // 2, length + 1, size=documents)]
        splits.append(unpack(pack(rows, y), length, documents))
    return splits


def load_task(args, setting):
    """-> train, dev, test."""
    loader = dict(listops=load_listops, pathfinder=load_pathfinder)
    if not args.quick:
        loader |= dict(text=load_text, image=load_image, retrieval=load_retrieval)
    splits = loader.get(args.task, load_toy)(args, setting["length"])
    for split, name in zip(splits, ("train", "dev", "test")):
        split.name = name
        if not len(split) or int(split.y.max()) >= setting["classes"] or int(split.y.min()) < 0:
            raise UserError(f"{args.task}: the {name} split is empty, or a label is out of range")
    return splits


# ------------------------------------------------------------------------- batches and the model

def batch(split, rows, device, length=None):
    """-> x (B, n), keep (B, n) or None where all are of one length, y (B,). Retrieval: (B, 2, n).

    n is that of the longest in the batch, padding changes nothing; or `length`, for torch.compile.
    """
    where = split.tokens.device
    start, size = split.start[rows].to(where), split.size[rows].to(where)            # (B, docs)
    at = torch.arange(max(1, length or int(split.size[rows].max())), device=where)   # (n,)
    x = split.tokens[(start[..., None] + at).clamp(max=len(split.tokens) - 1)].long()
    keep = at < size[..., None]
    x, keep = (t.squeeze(1).to(device) for t in (x.masked_fill(~keep, 0), keep))
    return x, None if split.size.min() == len(at) else keep, split.y[rows].to(device)


class PairTransformer(agf.AGFTransformer):
    """Retrieval: the same encoder reads both documents, an MLP compares [x, y, x*y, x-y]."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Identity()          # the encoder gives the pooled document
        self.compare = nn.Sequential(nn.Linear(4 * config.dim, config.head), nn.ReLU(),
                                     nn.Linear(config.head, config.classes))

    def forward(self, x, keep=None):
        keep = None if keep is None else keep.flatten(0, 1)
        pooled, ortho = super().forward(x.flatten(0, 1), keep)       # (2B, D), (2B,)
        x, y = pooled.unflatten(0, (-1, 2)).unbind(1)
        return self.compare(torch.cat([x, y, x * y, x - y], 1)), ortho.view(-1, 2).mean(1)


def build(task, setting, mixer):
    names = ("classes", "length", "vocab", "dim", "depth", "heads", "hidden", "dropout", "norm",
             "pool", "head", "order", "basis", "a", "b", "identity")
    try:
        config = agf.AGFConfig(mixer=mixer, **{name: setting[name] for name in names})
        return (PairTransformer if task == "retrieval" else agf.AGFTransformer)(config)
    except ValueError as error:      # a width that heads do not divide, an undefined basis
        raise UserError(str(error)) from None


# -------------------------------------------------------------------------- several processes

RANK, SIZE, LOCAL = (int(os.environ.get(name, default)) for name, default in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))      # set by torchrun


def total(*numbers):
    """Sums over all processes."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if SIZE > 1:
        distributed.all_reduce(numbers)
    return numbers.tolist()


def start_processes(device):
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Patience: one process makes the data while the others wait. A dead one is noticed at once.
    distributed.init_process_group(backend, timeout=datetime.timedelta(hours=3))


# ------------------------------------------------------------------------------------- one run

def schedule(setting):
    """The one-cycle rule: up from lr / 25 in a straight line, then down to nearly 0."""
    lr, steps, warmup = setting["lr"], setting["steps"], setting["warmup"]
    knots = [0, warmup, max(steps, warmup + 1)], [lr / 25, lr, lr / 25e4]
    return lambda step: float(np.interp(step, *knots))


def accuracy(model, split, device, size):
    """Share of right answers; each process takes every SIZE-th sample, short ones first."""
    rows = torch.argsort(split.size.amax(1), stable=True)[RANK::SIZE]
    hits = 0
    if len(rows):
        stream = (batch(split, part, device)[:2] for part in rows.split(size))
        found = agf.evaluate(model, stream, amp=device.type == "cuda").argmax(1)
        hits = int((found == split.y[rows]).sum())
    return total(hits)[0] / len(split)


def peak_memory_mb(device):
    """Of this process: what torch had on the GPU, else all of the process, Python included."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20, 1)
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10          # bytes there, KB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def train(seed, args, setting, splits, device, state, save, log, bar):
    """One seed, from scratch or from `state`: -> (best model, result of this seed)."""
    train_split, dev_split, test_split = splits
    torch.manual_seed(seed)
    model = build(args.task, setting, args.mixer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"], eps=1e-6, weight_decay=0,
                                  fused=device.type != "mps")
    steps, size, rate = setting["steps"], setting["batch_size"], schedule(setting)
    size = min(size, len(train_split))
    per_epoch, every = len(train_split) // size, max(1, steps // EVALUATIONS)
    if not args.quick:
        every = max(every, min(50, steps))       # a short trial is not all evaluation
    lengths = train_split.size.amax(1).numpy()
    mine = len(range(RANK, size, SIZE))                  # this process's share of a batch
    s = dict(step=0, loss=0.0, ortho=0.0, seconds=0.0, tokens=0, best=-1.0, best_step=0,
             best_model=None, micro=min(args.micro_batch or mine, mine))
    if state:
        agf.restore(state, model, optimizer)
        s = {key: state[key] for key in s}
    net = model
    if SIZE > 1:                     # "none" leaves parameters without a gradient
        net = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=args.mixer == "none")
    if args.compile:
        net = torch.compile(net)

    @functools.lru_cache(2)
    def order(epoch):
        """Rows of each batch of an epoch. Like lengths go together: less padding."""
        rng = np.random.default_rng([seed, epoch])
        rows = rng.permutation(len(train_split))[:per_epoch * size]
        for i in range(0, len(rows), 16 * size):         # only within 16 batches, to stay random
            window = rows[i:i + 16 * size]
            window = window[np.argsort(lengths[window], kind="stable")].reshape(-1, size)
            rows[i:i + 16 * size] = rng.permutation(window).reshape(-1)
        return torch.from_numpy(rows.reshape(-1, size))

    def batch_at(step):
        # Dropout too is fixed by seed, step and process, so that a resumed run repeats it.
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + RANK)
        rows = order(step // per_epoch)[step % per_epoch][RANK::SIZE]
        length = setting["length"] if args.compile else None         # compile one shape
        return [batch(train_split, part, device, length) for part in rows.split(s["micro"])]

    def after_step(done, loss, ortho):
        nonlocal begin, saved
        s["loss"], s["ortho"] = s["loss"] + loss, s["ortho"] + ortho
        rows = order((done - 1) // per_epoch)[(done - 1) % per_epoch]
        s["tokens"] += int(train_split.size[rows].sum())             # padding not counted
        s["step"] = done
        bar.update()
        if done % every == 0 or done == steps:
            sums = [x / SIZE for x in total(float(s["loss"]), float(s["ortho"]))]
            if not math.isfinite(sum(sums)):
                raise UserError(f"the loss is not finite before step {done} of seed {seed}: "
                                f"try a smaller --lr (now {setting['lr']:g})")
            s["seconds"] += time.perf_counter() - begin
            dev = accuracy(model, dev_split, device, size)
            begin = time.perf_counter()                              # evaluation is not counted
            if dev > s["best"]:
                s.update(best=dev, best_step=done, best_model={
                    k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
            count = done - (done - 1) // every * every
            log(dict(seed=seed, epoch=round(done / per_epoch, 3), step=done, lr=rate(done - 1),
                     loss=sums[0] / count, ortho=sums[1] / count, dev_accuracy=dev,
                     tokens_per_second=round(s["tokens"] / s["seconds"]),
                     peak_memory_mb=peak_memory_mb(device)))
            bar.set_postfix(loss=f"{sums[0] / count:.3f}", dev=f"{100 * dev:.1f} %")
            s["loss"] = s["ortho"] = 0.0
        stop = total(bool(stop_asked))[0] > 0            # all processes stop at the same step
        now = time.perf_counter()
        if stop or now - saved > train_uea.SAVE_EVERY:
            s["seconds"], begin, saved = s["seconds"] + now - begin, now, now
            save(agf.training_state(model, optimizer)
                 | s | dict(loss=float(s["loss"]), ortho=float(s["ortho"])))
            if stop:
                raise Stopped(args.out)

    bar.reset(steps)
    bar.update(s["step"])
    begin = saved = time.perf_counter()
    while s["step"] < steps:
        try:
            agf.fit(model, optimizer, batch_at, steps, rate=rate, start=s["step"],
                    gamma=setting["gamma"], clip=1.0, amp=device.type == "cuda", net=net,
                    share=mine * SIZE / size, after_step=after_step)
        except torch.cuda.OutOfMemoryError:
            if s["micro"] == 1 or SIZE > 1:              # processes cannot repeat a step alone
                raise UserError(f"the GPU's memory is too small for {s['micro']} samples at once: "
                                f"try a smaller --micro-batch or --length") from None
            s["micro"] = -(-s["micro"] // 2)
        else:
            break
        optimizer.zero_grad()                            # the failed step's memory is free now
        torch.cuda.empty_cache()
        bar.write(f"step {s['step'] + 1} does not fit: {s['micro']} samples at once from here on")
    s["seconds"] += time.perf_counter() - begin
    model.load_state_dict(s["best_model"])
    test = accuracy(model, test_split, device, size)
    off = accuracy(train_uea.without_mixers(model), test_split, device, size)
    return model, dict(seed=seed, epochs=round(steps / per_epoch, 3), test_accuracy=test,
                       test_accuracy_mixers_off=off, dev_accuracy=s["best"],
                       best_step=s["best_step"], train_seconds=round(s["seconds"], 2),
                       tokens_per_second=round(s["tokens"] / s["seconds"]),
                       peak_memory_mb=peak_memory_mb(device))


def run(args):
    """Train all seeds of one setting, new or resumed; process 0 leaves the whole run folder."""
    args.out = args.out or time.strftime(f"runs/{args.task}-%Y%m%d-%H%M%S")
    out, first = Path(args.out), RANK == 0
    begin = time.perf_counter()
    setting = resolve(args)
    notes = [QUICK_NOTE] * args.quick + \
        [SYNTHETIC_NOTE] * (args.task == "pathfinder" and (args.synthetic or args.quick))
    name = args.task + "-synthetic" * args.synthetic
    one_each = SIZE > 1 and args.device == "auto" and torch.cuda.is_available()
    device, reason = train_uea.pick_device(f"cuda:{LOCAL}" if one_each else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    parameters = sum(p.numel() for p in build(args.task, setting, args.mixer).parameters())
    state = {}
    if SIZE > 1:
        start_processes(device)
    if LOCAL == 0:                   # one process of a machine makes what the others then find
        splits = load_task(args, setting)
    total()
    if LOCAL != 0:
        splits = load_task(args, setting)
    if first and args.resume and (out / "checkpoint.pt").exists():
        state = agf.load(out / "checkpoint.pt")
    if SIZE > 1:                     # only process 0 needs to see the run folder
        box = [state]
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
        state = box[0]
    if first and not args.resume:
        train_uea.prepare(out, dict(command=train_uea.command_line(), options=vars(args),
                                    setting=setting, notes=notes, versions=train_uea.versions()))
    if device.type == "cuda":        # small next to a GPU, and then batches need no copies
        for split in splits:
            split.tokens = split.tokens.to(device) if len(split.tokens) < 4e9 else split.tokens
    say = functools.partial(print, flush=True) if first else lambda *_: None
    for note in notes:
        say(note)
    for split in splits:
        if cut := int((split.full > setting["length"]).sum()):
            say(f"{split.name}: {cut} inputs are longer than --length: cut to "
                f"{setting['length']} tokens")
    say(f"{name}: {', '.join(f'{len(split)} {split.name}' for split in splits)}, length "
        f"{setting['length']}, {setting['steps']} steps of {setting['batch_size']}")
    say(f"mixer {args.mixer}, {parameters:,} parameters, {SIZE} process(es), {device} ({reason}), "
        f"run folder {out}")

    results, rows = state.get("results", []), state.get("rows", [])

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
            model, result = train(seed, args, setting, splits, device, state.get("training"),
                                  save, rows.append, bar)
        state = {}
        if first and not results:    # model.pt is the first seed's: the best would be cheating
            agf.save(out / "model.pt", model=model.state_dict(), task=args.task, setting=setting,
                     mixer=args.mixer)
        results.append(result)
        save()
        say(f"seed {seed}: test accuracy {100 * result['test_accuracy']:.2f} % "
            f"({100 * result['test_accuracy_mixers_off']:.2f} with the mixers off), dev "
            f"{100 * result['dev_accuracy']:.2f} % at step {result['best_step']}, "
            f"{result['train_seconds']:.1f} s, {result['tokens_per_second']:,} tokens/s")
    if SIZE > 1:
        distributed.destroy_process_group()
    if not first:
        return

    column = lambda key: [r[key] for r in results]
    score = torch.tensor(column("test_accuracy"), dtype=torch.float64)
    deviation = score.std().item() if len(score) > 1 else None
    summary = dict(
        dataset=name, task=args.task, mixer=args.mixer, preset="paper",
        protocol="best dev checkpoint, one pass over test", notes=notes, seeds=column("seed"),
        steps=setting["steps"], epochs=results[0]["epochs"], test_accuracy=score.tolist(),
        test_accuracy_mean=score.mean().item(), test_accuracy_std=deviation,
        test_accuracy_mixers_off=column("test_accuracy_mixers_off"),
        dev_accuracy=column("dev_accuracy"), best_step=column("best_step"),
        train_seconds=column("train_seconds"), tokens_per_second=column("tokens_per_second"),
        peak_memory_mb=column("peak_memory_mb"), parameters=parameters,
        device=f"{device} ({reason})", processes=SIZE, versions=train_uea.versions(),
        command=json.loads((out / "config.json").read_text())["command"],
        date=time.strftime("%Y-%m-%d"))
    model = load_model(out)[0].to(device)
    train_uea.curves(out, rows, "step", summary, [("dev_accuracy", "dev accuracy")])
    sample = torch.arange(min(64, len(splits[2])))
    train_uea.filters(out, model, batch(splits[2], sample, device)[:2])
    write(out / "result.json", json.dumps(summary, indent=2) + "\n")
    (out / "checkpoint.pt").unlink()
    spread = "" if deviation is None else f" +- {100 * deviation:.2f} (std, n = {len(score)})"
    say(f"test accuracy {100 * score.mean():.2f} %{spread}; "
        f"{time.perf_counter() - begin:.0f} s in all; see {out}")
    for note in notes:
        say(note)


def load_model(run):
    """RUN (folder or model.pt) -> (model in eval mode, dict with task, setting, mixer)."""
    path = Path(run) / "model.pt" if Path(run).is_dir() else Path(run)
    parts = agf.load(path)
    try:
        weights = parts.pop("model")
        model = build(parts["task"], parts["setting"], parts["mixer"])
        model.load_state_dict(weights)
        return model.eval(), parts
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(f"{path}: not a checkpoint of train_lra.py") from None


def main(argv=None):
    who = "train_lra.py" if SIZE == 1 else f"train_lra.py, process {RANK}"
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)     # clean up, then end
    try:
        args, parser = options(argv)
        if args.resume:
            args = train_uea.resumed(args, parser)
            if (result := Path(args.resume) / "result.json").exists():
                mean = json.loads(result.read_text())["test_accuracy_mean"]
                print(f"{args.resume} is finished: test accuracy {100 * mean:.2f} %, see {result}")
                return 0
        if not args.task:
            raise UserError(f"which task? --task {', '.join(TASKS)}")
        run(args)
    except (UserError, OSError) as error:        # OSError: a full disk, a folder taken away
        print(f"{who}: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if RANK == 0:
            print(f"stopped; go on with: python train_lra.py --resume {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:        # before the first step: nothing to keep
        print("stopped", file=sys.stderr)
        return 130
    except RuntimeError as error:
        lost = ("peer", "gloo", "nccl", "socket", "connection")
        if SIZE == 1 or not any(word in str(error).lower() for word in lost):
            raise
        print(f"{who}: another process was lost, so this one ends ({first_line(error)}). Start "
              f"again with --resume RUN", file=sys.stderr)
        return 1
    finally:
        if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
            signal.signal(signal.SIGTERM, previous)
    return 0


if __name__ == "__main__":
    sys.exit(main())
