"""Train and evaluate AGF on a task of Long Range Arena, with the published settings.

    python train_lra.py --task listops           (makes its own data: no network needed)
    python train_lra.py --task listops --quick   (the same on toy data, in under a minute)
    torchrun --standalone --nproc_per_node=2 train_lra.py --task listops

Protocol: the checkpoint that is best on the dev split, then one pass over the test split.
The published settings name no gradient clipping; we clip the gradient norm at 1.
"""

import argparse
import contextlib
import datetime
import functools
import io
import itertools
import math
import os
import pickle
import resource
import signal
import statistics
import sys
import tarfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from tqdm import tqdm

import agf
import train_uea
from agf import UserError
from train_uea import Parser, Stopped, first_line, stop_asked, whole

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
QUICK_LISTOPS = dict(counts=dict(train=400, val=100, test=100), low=20, high=250)
QUICK_NOTE = "--quick: toy data and a few steps, this number means nothing"
SYNTHETIC_NOTE = "synthetic images of our own, not comparable with published numbers"
EVALUATIONS = 20                     # passes over the dev split during a run, if 50 steps apart
RANK, SIZE, LOCAL = (int(os.environ.get(name, default)) for name, default in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))      # set by torchrun


# ------------------------------------------------------------------------------------- options

def options(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what to run")
    g.add_argument("--task", choices=list(TASKS))
    g.add_argument("--quick", action="store_true", help="end to end in under a minute, toy data")
    g.add_argument("--synthetic", action="store_true", help="pathfinder: draw images of our own")
    g.add_argument("--data-dir", default="data", metavar="DIR",
                   help="holds the official archives or lra_release (default: data)")
    train_uea.run_options(g)
    g = p.add_argument_group("recipe and model (default: the published setting of the task)")
    train_uea.add_numbers(g, [("steps", int, "training steps"),
                              ("batch-size", int, "samples in a step, in all"),
                              ("micro-batch", int, "samples in memory at once; gradients add up"),
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
    train_uea.check_lowest(vars(args) | setting, steps=1, batch_size=SIZE, length=1, lr=1e-12,
                           gamma=0, micro_batch=1, seeds=1, seed=0)      # a sample for each process
    if args.synthetic and args.task != "pathfinder":
        raise UserError(f"--synthetic is for pathfinder only, not for {args.task}")
    # A shorter run keeps the published shape of the schedule.
    setting["warmup"] = max(1, round(setting["warmup"] * setting["steps"] / published))
    return setting


# ------------------------------------------------------------------------- ListOps: making it

OPERATORS = (("MIN", min), ("MAX", max), ("MED", lambda args: int(statistics.median(args))),
             ("SM", lambda args: sum(args) % 10))
COUNTS = dict(train=96000, val=2000, test=2000)


def draw_trees(rng, count, low, high, depth=10):
    """Text lines of those of `count` random trees that have low < length < high.

    Most draws are too short or too long. So all trees are drawn at once, level by level, and only
    the good ones are written. The root is an operator: a single digit is too short in any case.
    The official code, like this one, leaves both ends of the range out, and counts no parentheses.
    """
    levels, length, tree = [], np.zeros(count, np.int64), np.arange(count)
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
    nodes = [zip(kind[good[tree]].tolist(), args[good[tree]].tolist())
             for tree, kind, args in levels]

    def write(level=0):
        """The next node of this level with all below -> value, "( ( ( [MAX 2 ) 9 ) ] )"."""
        kind, m = next(nodes[level])
        if not m:
            return kind, str(kind)
        values, texts = zip(*[write(level + 1) for _ in range(m)])
        name, rule = OPERATORS[kind - 10]
        return rule(values), f"{'( ' * (m + 1)}[{name} {' ) '.join(texts)} ) ] )"

    return [f"{text}\t{value}\n" for value, text in (write() for _ in range(good.sum()))]


def listops_lines(seed=0, low=500, high=2000):
    """Lines of the official form without end, no two the same."""
    seen = set()
    for batch in itertools.count():
        for line in draw_trees(np.random.default_rng([seed, batch]), 2000, low, high):
            if hash(line) not in seen:
                seen.add(hash(line))
                yield line


def generate_listops(folder, counts=COUNTS, **how):
    """Write basic_{train,val,test}.tsv, all or nothing."""
    lines = iter(tqdm(listops_lines(**how), "generating listops", sum(counts.values()),
                      unit=" trees", disable=None))
    with whole(folder) as part:
        part.mkdir()
        for name, count in counts.items():
            with open(part / f"basic_{name}.tsv", "w", newline="") as f:
                f.write("Source\tTarget\n")
                f.writelines(itertools.islice(lines, count))


# --------------------------------------------------------------------------- samples and splits

@dataclass
class Split:
    """Sequences side by side in one row of bytes. Retrieval has two documents in a sample."""
    tokens: torch.Tensor             # (all tokens,), uint8
    start: torch.Tensor              # (N, documents), where each begins
    size: torch.Tensor               # (N, documents), how long it is, at most --length
    full: torch.Tensor               # (N, documents), how long it was
    y: torch.Tensor                  # (N,)

    def __len__(self):
        return len(self.y)

    def rows(self, which):
        return replace(self, start=self.start[which], size=self.size[which],
                       full=self.full[which], y=self.y[which])


def pack(samples, length):
    """(label, document, ...) of each sample -> the Split's arrays. Documents are cut here."""
    tokens, full, labels = bytearray(), [], []
    for label, *documents in samples:
        labels.append(label)
        full.append([len(document) for document in documents])
        for document in documents:
            tokens += document[:length]
    return dict(tokens=np.frombuffer(tokens, np.uint8), full=np.array(full, np.int64),
                y=np.array(labels, np.int64))


def unpack(arrays, length):
    tokens, full, y = (torch.from_numpy(arrays[key]) for key in ("tokens", "full", "y"))
    size = full.clamp(max=length)
    return Split(tokens, size.flatten().cumsum(0).view_as(size) - size, size, full, y)


def read_npz(path, *keys):
    try:
        with np.load(path) as arrays:
            return {key: arrays[key] for key in keys}
    except Exception as error:       # a damaged file fails in many ways
        raise UserError(f"{path}: unreadable ({first_line(error)})") from None


def cached(data_dir, name, length, source, samples):
    """The samples, packed, and kept as cache/NAME-LENGTH.npz until their source file changes."""
    home = Path(data_dir)
    if home.exists() and not home.stat().st_mode & 0o200:    # read-only: left alone, even by root
        home = Path("data")
    path = home / "cache" / f"{name}-{length}.npz"
    stamp = f"{source.stat().st_size} {source.stat().st_mtime_ns}" if source else ""
    with contextlib.suppress(UserError):         # not there yet, or damaged: make it again
        arrays = read_npz(path, "stamp", "tokens", "full", "y")
        if arrays["stamp"] == stamp:
            return arrays
    arrays = pack(samples, length)
    if not len(arrays["y"]):
        raise UserError(f"{source}: holds no samples")
    try:
        with whole(path) as part:
            np.savez(part, stamp=stamp, **arrays)
    except OSError as error:         # a full disk costs time, not the run
        print(f"{path} cannot be kept ({error.strerror}): the next run converts again")
    return arrays


def dev_from(train, share):
    """Split the last share of a fixed shuffle off the train split: the same in every run."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
    dev = max(1, round(share * len(train)))
    return train.rows(order[:-dev]), train.rows(order[-dev:])


# ------------------------------------------------- where data comes from, and (label, document, ..)

def release(data_dir, name, needed=True):
    """A path of the official release, or one paragraph on how to get it."""
    for middle in ("", "lra_release", "lra_release/lra_release"):
        if (path := Path(data_dir, middle, name)).exists():
            return path
    if needed:
        raise UserError(
            f"{Path(data_dir, 'lra_release', name)} is missing. It is part of the Long Range Arena "
            f"release: fetch lra_release.gz (about 7.7 GB; the link is in the README of "
            f"github.com/google-research/long-range-arena, or take storage.googleapis.com/"
            f"long-range-arena/lra_release.gz), then: tar -xzf lra_release.gz -C {data_dir}")


ARCHIVES = {                         # file name: first source, SHA-256
    "aclImdb_v1.tar.gz": ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                          "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"),
    "cifar-10-python.tar.gz": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                               "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
}


def fetch(data_dir, name):
    """An official archive: the user's, else downloaded and checked, else where to get it."""
    path, (url, digest) = Path(data_dir, name), ARCHIVES[name]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest, sys.stderr.isatty())
        except Exception as error:   # no network fails in many ways
            raise UserError(
                f"could not download {name} ({type(error).__name__}: {first_line(error)}). Fetch "
                f"{url} by hand, or web.archive.org/web/2023/{url}, and save it as {path}"
            ) from None
    return path


def members(path):
    """(name, bytes) of each file of a .tar.gz. Nothing is unpacked to disk."""
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in tqdm(archive, f"reading {path.name}", unit=" files", disable=None):
                if member.isfile():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: not a complete .tar.gz ({first_line(error)}): "
                        f"delete it and fetch it again") from None


def read_listops(path):
    """A tsv of the official form. Tokens are 1-15, 0 is padding; parentheses carry nothing."""
    words = [*"0123456789", *(f"[{name}" for name, _ in OPERATORS), "]"]
    code = {word.encode(): i for i, word in enumerate(words, start=1)}
    digits = list(code)[:10]
    with open(path, "rb") as f:
        if f.readline().split() != [b"Source", b"Target"]:
            raise UserError(f"{path}: the first line must be Source, a tab, Target")
        for number, line in enumerate(f, start=2):
            source, _, target = line.rstrip(b"\r\n").partition(b"\t")
            found = source.translate(None, b"()").split()
            try:
                tokens = bytes(map(code.__getitem__, found))
            except KeyError as unknown:
                word = unknown.args[0][:40].decode("ascii", "replace")
                raise UserError(f"{path}, line {number}: unknown token {word!r}") from None
            if not tokens or target not in digits:
                target = target[:40].decode("ascii", "replace")
                raise UserError(f"{path}, line {number}: the target must be one digit after a tab, "
                                f"with a source before it, not {target!r}")
            yield int(target), tokens


def read_imdb(path, split):
    """aclImdb/{train,test}/{pos,neg}/*.txt of the archive; label 1 = pos."""
    reviews = {}
    for name, text in members(path):
        folder, _, file = name.rpartition("/")
        if folder in (f"aclImdb/{split}/pos", f"aclImdb/{split}/neg") and file.endswith(".txt"):
            reviews[name] = folder.endswith("pos"), text
    if len({label for label, _ in reviews.values()}) < 2:
        raise UserError(f"{path}: no reviews in aclImdb/{split}/pos or aclImdb/{split}/neg")
    for name in sorted(reviews):     # the order inside an archive is nobody's promise
        yield reviews[name]


class ArraysOnly(pickle.Unpickler):
    """Reads the official pickles; a tampered one can build arrays and nothing else."""

    def find_class(self, module, name):
        allowed = {"ndarray": np.ndarray, "dtype": np.dtype,
                   "_reconstruct": np.empty(0).__reduce__()[0]}
        if module.split(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar(path, split):
    """Grey pixels from cifar-10-python.tar.gz, by ITU-R 601 luma weights."""
    found = dict.fromkeys([f"data_batch_{i}" for i in range(1, 6)] if split == "train"
                          else ["test_batch"])
    for name, data in members(path):
        if (part := name.removeprefix("cifar-10-batches-py/")) in found:
            try:
                batch = ArraysOnly(io.BytesIO(data), encoding="bytes").load()
                rgb = batch[b"data"].reshape(-1, 3, 1024)
                grey = (np.array([299, 587, 114]) @ rgb + 500) // 1000
                found[part] = [(int(label), row.tobytes()) for label, row in
                               zip(batch[b"labels"], grey.astype(np.uint8), strict=True)]
            except Exception as error:       # a damaged or tampered pickle fails in many ways
                raise UserError(f"{path}: {name} is not an official CIFAR-10 batch "
                                f"({first_line(error)})") from None
    for part, samples in found.items():
        if samples is None:
            raise UserError(f"{path}: cifar-10-batches-py/{part} is missing")
        yield from samples


def read_pairs(path):
    """label, two ids, two documents, tab-separated."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != 5 or fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise UserError(f"{path}, line {number}: must be a label 0 or 1, two ids and two "
                                f"documents, with tabs between")
            yield fields[0][:1] == b"1", fields[3], fields[4]


def read_pathfinder(metadata):
    """metadata/*.npy, text in spite of their name: image folder, image file, _, label, ..."""
    from matplotlib.image import imread
    for path in tqdm(sorted(metadata.glob("*.npy")), "reading images", disable=None):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise UserError(f"{path}, line {number}: must be folder, file, number, and a "
                                f"label 0 or 1")
            image = metadata.parent / fields[0] / fields[1]
            try:
                pixels = np.rint(255 * imread(image)).astype(np.uint8).reshape(32, 32, -1)[..., 0]
            except Exception as error:           # missing, empty, of another size
                raise UserError(f"{image}: not a 32 x 32 image ({first_line(error)})") from None
            yield int(fields[3]), pixels.tobytes()


def draw_curve(rng, dashes):
    """A dashed curve that bends smoothly and stays inside: points x + iy, five to a dash."""
    while True:
        way = np.exp(1j * (rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.25, dashes).cumsum()))
        points = (2.2 * way.cumsum()[:, None] + np.linspace(0, 1, 5) * way[:, None]).ravel()
        wide, high = np.ptp(points.real), np.ptp(points.imag)
        if max(wide, high) < 27:
            corner = complex(points.real.min(), points.imag.min())
            return points - corner + complex(rng.uniform(2, 30 - wide), rng.uniform(2, 30 - high))


def draw_images(seed, count):
    """Our own Pathfinder: do the two dots lie on the same one of two dashed curves?"""
    rng = np.random.default_rng(seed)
    apart = lambda one, two: np.abs(one[::2, None] - two[::2]).min() > 2
    for _ in tqdm(range(count), "drawing images", unit=" images", disable=None):
        one, two = draw_curve(rng, 14), draw_curve(rng, 14)
        while not apart(one, two):
            one, two = two, draw_curve(rng, 14)
        both = np.concatenate([one, two])
        others = [curve for curve in (draw_curve(rng, 4) for _ in range(5)) if apart(curve, both)]
        points = np.concatenate([both, *others])
        pixels = np.bincount(32 * points.imag.astype(int) + points.real.astype(int), minlength=1024)
        pixels = np.minimum(50 * pixels, 150).reshape(32, 32)
        label = int(rng.integers(2))
        # The farther end of the other curve, so that the distance of the dots tells little.
        end = one[-1] if label else max(two[0], two[-1], key=lambda dot: abs(dot - one[0]))
        for x, y in ((round(dot.real), round(dot.imag)) for dot in (one[0], end)):
            pixels[y - 1:y + 2, x - 1:x + 2] = 255
        yield label, pixels.astype(np.uint8).tobytes()


def draw_toy(task, length, seed, count):
    """Random bytes whose mix leans towards the class: for --quick without an archive."""
    rng, documents = np.random.default_rng(seed), 2 if task == "retrieval" else 1
    for label in rng.integers(TASKS[task][2], size=count):
        yield label, *(rng.integers(97, 107 + label, size=n).astype(np.uint8).tobytes()
                       for n in rng.integers(length // 2, length + 1, size=documents))


def load_task(args, setting):
    """-> the splits train, dev, test of a task."""
    task, data, length, halves = args.task, args.data_dir, setting["length"], ("train", "test")
    keep = lambda name, source, samples: cached(data, name, length, source, samples)
    if args.quick and task in ("text", "image", "retrieval"):
        arrays = [pack(draw_toy(task, length, seed, count), length)
                  for seed, count in enumerate((400, 100, 100))]
    elif task == "listops":
        name = "listops-quick" if args.quick else "listops-1000"
        folder = release(data, name, needed=False) or Path(data, "lra_release", name)
        if not folder.exists():
            generate_listops(folder, **QUICK_LISTOPS if args.quick else {})
        paths = [folder / f"basic_{part}.tsv" for part in COUNTS]
        arrays = [keep(f"{name}-{path.stem}", path, read_listops(path)) for path in paths]
    elif task == "text":
        path = fetch(data, "aclImdb_v1.tar.gz")
        arrays = [keep(f"aclImdb-{part}", path, read_imdb(path, part)) for part in halves]
    elif task == "image" and (path := Path(data, "cifar10_gray.npz")).is_file():
        found = read_npz(path, "train_y", "train_x", "test_y", "test_x")     # a converted copy
        arrays = [pack(zip(found[f"{part}_y"], map(bytes, found[f"{part}_x"])), length)
                  for part in halves]
    elif task == "image":
        path = fetch(data, "cifar-10-python.tar.gz")
        arrays = [keep(f"cifar10-{part}", path, read_cifar(path, part)) for part in halves]
    elif task == "retrieval":
        paths = [release(data, f"tsv_data/new_aan_pairs.{part}.tsv")
                 for part in ("train", "eval", "test")]
        arrays = [keep(path.stem, path, read_pairs(path)) for path in paths]
    elif args.synthetic or args.quick:
        count = 600 if args.quick else 200000
        arrays = [keep(f"pathfinder-drawn-{count}", None, draw_images(0, count))]
    else:
        path = release(data, "pathfinder32/curv_contour_length_14/metadata")
        arrays = [keep("pathfinder32", path, read_pathfinder(path))]

    splits, share = [unpack(one, length) for one in arrays], 0.1
    if len(splits) == 1:             # pathfinder is one heap: 80, 10, 10 %
        splits, share = dev_from(*splits, 0.1), 1 / 9
    if len(splits) == 2:             # dev is a part of train, never of test
        splits = *dev_from(splits[0], share), splits[1]
    for split in splits:
        if int(split.y.min()) < 0 or int(split.y.max()) >= setting["classes"]:
            raise UserError(f"{task}: a label is out of range 0 to {setting['classes'] - 1}")
    return splits


# ------------------------------------------------------------------------- batches and the model

def batch(split, rows, device, length=None):
    """-> x (B, n), keep (B, n) or None where all are of one length, y (B,). Retrieval: (B, 2, n).

    n is that of the longest in the batch, rounded up, padding changes nothing; or `length`, for
    torch.compile.
    """
    where = split.tokens.device
    start, size = split.start[rows].to(where), split.size[rows].to(where)            # (B, docs)
    n = -(-int(split.size[rows].max()) // 32) * 32       # few different n: memory is used again
    n = length or max(1, min(n, int(split.size.max())))
    at = torch.arange(n, device=where)                                               # (n,)
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


# ------------------------------------------------------------------------------------- one run

def schedule(setting):
    """The one-cycle rule: up from lr / 25 in a straight line, then down to nearly 0."""
    lr, steps, warmup = setting["lr"], setting["steps"], setting["warmup"]
    knots = [0, warmup, max(steps, warmup + 1)], [lr / 25, lr, lr / 25e4]
    return lambda step: float(np.interp(step, *knots))


def total(*numbers):
    """Sums over all processes."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if SIZE > 1:
        distributed.all_reduce(numbers)
    return numbers.tolist()


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


def train(args, setting, splits, device, seed, state, save, log, bar):
    """One seed, from scratch or from `state`: -> (best model, result of this seed)."""
    train_split, dev_split, test_split = splits
    torch.manual_seed(seed)
    model = net = build(args.task, setting, args.mixer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"], eps=1e-6, weight_decay=0,
                                  fused=device.type != "mps")
    steps, rate, amp = setting["steps"], schedule(setting), device.type == "cuda"
    size = min(setting["batch_size"], len(train_split))
    mine = len(range(RANK, size, SIZE))                  # this process's share of a batch
    per_epoch = len(train_split) // size
    # A short trial is not all evaluation.
    every = max(1 if args.quick else min(50, steps), steps // EVALUATIONS)
    lengths = train_split.size.amax(1).numpy()
    s = dict(step=0, loss=0.0, ortho=0.0, seconds=0.0, tokens=0, best=-1.0, best_step=0,
             best_model=None, micro=min(args.micro_batch or mine, mine))
    if state:
        agf.restore(state, model, optimizer)
        s = {key: state[key] for key in s}
    if SIZE > 1:                     # "none" leaves parameters without a gradient
        net = nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=args.mixer == "none")
    if args.compile:
        net = torch.compile(net)

    @functools.lru_cache(1)
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
        rows = order(step // per_epoch)[step % per_epoch]
        s["tokens"] += int(train_split.size[rows].sum())             # padding not counted
        length = setting["length"] if args.compile else None         # compile one shape
        return [batch(train_split, part, device, length)
                for part in rows[RANK::SIZE].split(s["micro"])]

    def after_step(done, loss, ortho):
        nonlocal begin, saved
        s.update(step=done, loss=s["loss"] + loss, ortho=s["ortho"] + ortho)
        bar.update()
        evaluate = done % every == 0 or done == steps
        if evaluate:
            count = done - (done - 1) // every * every
            mean = [x / SIZE / count for x in total(float(s["loss"]), float(s["ortho"]))]
            if not math.isfinite(sum(mean)):
                raise UserError(f"the loss is not finite before step {done} of seed {seed}: "
                                f"try a smaller --lr (now {setting['lr']:g})")
        s["seconds"] += time.perf_counter() - begin      # what follows is not counted
        if evaluate:
            dev = accuracy(model, dev_split, device, size)
            if dev > s["best"]:
                s.update(best=dev, best_step=done, best_model={
                    k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
            log(dict(seed=seed, epoch=round(done / per_epoch, 3), step=done, lr=rate(done - 1),
                     loss=mean[0], ortho=mean[1], dev_accuracy=dev,
                     tokens_per_second=round(s["tokens"] / s["seconds"]),
                     peak_memory_mb=peak_memory_mb(device)))
            bar.set_postfix(loss=f"{mean[0]:.3f}", dev=f"{100 * dev:.1f} %")
            s.update(loss=0.0, ortho=0.0)
        stop = total(bool(stop_asked))[0] > 0            # all processes stop at the same step
        if stop or time.perf_counter() - saved > train_uea.SAVE_EVERY:
            saved = time.perf_counter()
            save(agf.training_state(model, optimizer)
                 | s | dict(loss=float(s["loss"]), ortho=float(s["ortho"])))
        if stop:
            raise Stopped(args.out)
        begin = time.perf_counter()

    bar.reset(steps)
    bar.update(s["step"])
    begin = saved = time.perf_counter()
    while s["step"] < steps:
        try:
            agf.fit(model, optimizer, batch_at, steps, rate=rate, start=s["step"],
                    gamma=setting["gamma"], clip=1.0, amp=amp, net=net, share=mine * SIZE / size,
                    after_step=after_step)
        except torch.cuda.OutOfMemoryError:
            if s["micro"] == 1 or SIZE > 1:              # processes cannot repeat a step alone
                raise UserError(f"the GPU's memory is too small for {s['micro']} samples at once: "
                                f"try a smaller --micro-batch or --length") from None
            s["micro"] = -(-s["micro"] // 2)
        else:
            break
        optimizer.zero_grad()        # here, outside `except`, the failed step's memory is free
        torch.cuda.empty_cache()
        bar.write(f"step {s['step'] + 1} does not fit: {s['micro']} samples at once from here on")
    model.load_state_dict(s["best_model"])
    test, off = (accuracy(m, test_split, device, size)
                 for m in (model, train_uea.without_mixers(model)))
    return model, dict(seed=seed, epochs=round(steps / per_epoch, 3), test_accuracy=test,
                       test_accuracy_mixers_off=off, dev_accuracy=s["best"],
                       best_step=s["best_step"], train_seconds=round(s["seconds"], 2),
                       tokens_per_second=round(s["tokens"] / s["seconds"]),
                       peak_memory_mb=peak_memory_mb(device))


def run(args):
    """Train all seeds of one setting, new or resumed; process 0 leaves the whole run folder."""
    begin = time.perf_counter()
    args.out = args.out or time.strftime(f"runs/{args.task}-%Y%m%d-%H%M%S")
    out, first, setting = Path(args.out), RANK == 0, resolve(args)
    own_gpu = SIZE > 1 and args.device == "auto" and torch.cuda.is_available()
    device, reason = train_uea.pick_device(f"cuda:{LOCAL}" if own_gpu else args.device)
    parameters = sum(p.numel() for p in build(args.task, setting, args.mixer).parameters())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if SIZE > 1:     # Patience: one process makes the data. A dead one is noticed at once.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                       timeout=datetime.timedelta(hours=3))
    for turn in (LOCAL == 0, LOCAL > 0):         # the first one makes what the others then find
        if turn:
            splits = load_task(args, setting)
        total()
    state, notes = {}, [QUICK_NOTE] * args.quick
    if args.task == "pathfinder" and (args.synthetic or args.quick):
        notes.append(SYNTHETIC_NOTE)
    if args.resume and first and (out / "checkpoint.pt").exists():
        state = agf.load(out / "checkpoint.pt")
    if SIZE > 1:                     # the machines of the others need no checkpoint
        box = [state]
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
        state = box[0]
    if first and not args.resume:
        train_uea.prepare(out, dict(command=train_uea.command_line(), options=vars(args),
                                    setting=setting, notes=notes, versions=train_uea.versions()))
    if device.type == "cuda":        # small next to a GPU, and then batches need no copies
        for split in splits:
            split.tokens = split.tokens.to(device) if len(split.tokens) < 4e9 else split.tokens
    name = args.task + "-synthetic" * args.synthetic
    if first:
        for part, split in zip(("train", "dev", "test"), splits):
            print(f"{name}, {part}: {len(split)} samples")
            if cut := int((split.full > setting["length"]).sum()):
                print(f"{part}: {cut} inputs are longer than --length: cut to {setting['length']}")
        for note in notes:
            print(note)
        print(f"length {setting['length']}, {setting['steps']} steps of "
              f"{setting['batch_size']}, mixer {args.mixer}, {parameters:,} parameters, {SIZE} "
              f"process(es), {device} ({reason}), run folder {out}", flush=True)

    results, rows = train_uea.all_seeds(
        args, state, functools.partial(train, args, setting, splits, device),
        dict(task=args.task, setting=setting, mixer=args.mixer), first)
    if SIZE > 1:
        distributed.destroy_process_group()
    if first:
        sample = torch.arange(min(64, len(splits[2])))
        train_uea.finish(
            out, results, rows, begin, load_model(out)[0].to(device),
            batch(splits[2], sample, device)[:2], "step",
            dict(dataset=name, task=args.task, mixer=args.mixer, preset="paper",
                 protocol="best dev checkpoint, one pass over test", notes=notes,
                 steps=setting["steps"], parameters=parameters, device=f"{device} ({reason})",
                 processes=SIZE, versions=train_uea.versions()),
            [("dev_accuracy", "dev accuracy")])
        for note in notes:
            print(note)


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


def start(argv):
    args, parser = options(argv)
    if args.resume:
        args = train_uea.resumed(args, parser)
        if train_uea.finished(args.resume):
            return
    if not args.task:
        raise UserError(f"which task? --task {', '.join(TASKS)}")
    run(args)


def main(argv=None):
    process = f", process {RANK}" if SIZE > 1 else ""
    signal.signal(signal.SIGTERM, signal.default_int_handler)        # clean up, then end
    try:
        return train_uea.guard("train_lra.py", start, argv, process)
    except RuntimeError as error:
        lost = ("peer", "gloo", "nccl", "socket", "connection")
        if SIZE == 1 or not any(word in str(error).lower() for word in lost):
            raise
        print(f"train_lra.py{process}: another process was lost, so this one ends "
              f"({first_line(error)}). Start again with --resume RUN", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
