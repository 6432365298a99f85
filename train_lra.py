"""Train and evaluate AGF on a task of Long Range Arena, with the published settings.

    python train_lra.py --task listops                 (makes its own data: no network needed)
    python train_lra.py --task text --quick            (on toy data, in under a minute)
    python train_lra.py --task text --preset laptop    (within an hour on one CPU thread)
    torchrun --standalone --nproc_per_node=2 train_lra.py --task listops

Protocol: the checkpoint that is best on the dev split, then one pass over the test split.
The published settings name no gradient clipping; we clip the gradient norm at 1.
"""

import functools
import hashlib
import math
import os
import pickle
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

import agf
import train_uea
from train_uea import MODEL, RUN, Option, UserError

# The published settings: what all tasks share, then one row for each.
SHARED = dict(dim=64, depth=2, heads=2, hidden=128, dropout=0.1, lr=1e-4)
COLUMNS = ("length", "batch_size", "steps", "warmup", "order", "a", "b", "gamma")
TASKS = {
    "listops":    (2000, 32, 5000, 1000 / 5000, 5, 2.0, -1.0, 1e-2),
    "text":       (1024, 32, 20000, 8000 / 20000, 5, 2.0, -2.0, 1e-2),
    "retrieval":  (4000, 32, 30000, 800 / 30000, 5, 2.0, -1.5, 1e-4),
    "image":      (1024, 256, 35000, 175 / 35000, 6, 1.5, 2.0, 0.1),
    "pathfinder": (1024, 256, 62400, 312 / 62400, 4, 1.5, -1.0, 1e-4)}
CLASSES = dict(listops=10, text=2, retrieval=2, image=10, pathfinder=2)
LAPTOP = dict(lr=1e-3, batch_size=32, steps=1500, warmup=0.1)    # for all tasks, same models
QUICK = dict(length=256, batch_size=8, steps=30)
OPTIONS = RUN | MODEL | dict(
    task=Option("", "one of " + ", ".join(TASKS), TASKS),
    preset=Option("paper", "laptop: a short schedule for a CPU", ("paper", "laptop")),
    quick=Option(False, "end to end in under a minute, on toy data"),
    steps=Option(0, "training steps", (1, 10**8)),
    warmup=Option(0.1, "share of the steps in which the rate goes up", (0, 1)),
    length=Option(0, "longest input, in tokens; what is longer is cut", (1, 10**6)),
    micro_batch=Option(0, "samples in memory at once; 0: all of a step", (0, 10**6)))
BFLOAT16 = ("cuda",)                 # devices that compute in bfloat16 where it is safe

# ------------------------------------------------------------------------- ListOps: making it

OPERATORS = dict(MIN=min, MAX=max, MED=lambda args: int(statistics.median(args)),
                 SM=lambda args: sum(args) % 10)
WORDS = [*"0123456789", *(f"[{name}" for name in OPERATORS), "]"]
CODE = {word.encode(): i for i, word in enumerate(WORDS, start=1)}   # 0 is padding
COUNTS = dict(train=96000, val=2000, test=2000)

def draw_tree(draw, words, high, depth=1):
    """Append a random tree to `words`, one entry a token -> its value, None if it is too long.
    An argument is an operator with probability 1/4, else a digit; ten levels at most."""
    name, arguments = list(OPERATORS)[int(4 * draw())], 2 + int(9 * draw())
    words.append(f"{'( ' * (arguments + 1)}[{name}")
    values = []
    for _ in range(arguments):
        if depth < 9 and draw() < 0.25:
            values.append(draw_tree(draw, words, high, depth + 1))
        else:
            values.append(int(10 * draw()))
            words.append(f"{values[-1]} )")
        if len(words) >= high:
            return None
    words.append("] ) )")
    return OPERATORS[name](values)

def listops_lines(seed=0, low=500, high=2000):
    """Lines "source, tab, target" without end, no two the same, low < tokens < high."""
    draw, seen = random.Random(seed).random, set()
    while True:
        words = []
        value = draw_tree(draw, words, high)
        text = " ".join(words).removesuffix(" )")            # the root is nobody's argument
        if value is not None and low < len(words) < high and hash(text) not in seen:
            seen.add(hash(text))
            yield f"{text}\t{value}\n"

def make_listops(folder, counts=COUNTS, **how):
    """basic_{train,val,test}.tsv, all or none: made elsewhere, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lines = iter(tqdm(listops_lines(**how), "making listops", sum(counts.values()), disable=None))
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".part") as part:
        whole = Path(part, "whole")
        whole.mkdir()
        for name, count in counts.items():
            with open(whole / f"basic_{name}.tsv", "w", newline="") as file:
                file.write("Source\tTarget\n")
                file.writelines(next(lines) for _ in range(count))
        if not folder.exists():      # else another process was faster, with the same trees
            whole.rename(folder)

# --------------------------------------------- reading: (label, document, ...) of each sample

def read_lines(paths, parse, form):
    """parse() of each line; one that is not of that form is named."""
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.split() != [b"Source", b"Target"]:       # the head of a ListOps file
                        yield parse(line.rstrip(b"\r\n"))
                except Exception as error:       # not of that form, in one of many ways
                    raise UserError(f"{path}, line {number}: not {form} ({error!r})") from None

def parse_listops(line):
    """A tree, a tab, a digit. Parentheses carry nothing."""
    source, target = line.split(b"\t")
    words = source.translate(None, b"()").split()
    return range(10)[CODE[target] - 1], bytes([CODE[word] for word in words])

def parse_pair(line):
    """Label, two ids, two documents. A document stands there as Python prints bytes, b'...' with
    \\n spelled out. The official pipeline takes it as it stands, so do we."""
    label, _, _, one, two = line.split(b"\t")
    return int(float(label)), one, two

def parse_image(line, folder):
    """Folder, file, a number, label, and more."""
    from matplotlib.image import imread
    place, file, _, label, *_ = line.decode().split()
    pixels = np.atleast_3d(imread(folder / place / file))[:, :, 0]
    if pixels.shape != (32, 32):
        raise ValueError(f"an image of shape {pixels.shape}")
    return int(label), bytes(np.rint(255 * pixels).astype(np.uint8))

ARCHIVES = {                         # name: source, SHA-256
    "aclImdb_v1.tar.gz": ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                          "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"),
    "cifar-10-python.tar.gz": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                               "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")}

def members(path, pickles=False):
    """(name, bytes) of each file of an official archive: yours, else downloaded and checked."""
    url, digest = ARCHIVES[path.name]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest, sys.stderr.isatty())
        except Exception as error:   # no network fails in many ways
            raise UserError(f"{path} is missing: fetch {url} by hand, or web.archive.org/web/2023/"
                            f"{url} (the download failed: {error})") from None
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            if pickles:              # which can run any code
                raise UserError(f"{path}: its SHA-256 is not the official one. Delete it")
            print(f"{path}: not the official archive (its SHA-256 differs), used all the same")
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in tqdm(archive, f"reading {path.name}", unit=" files", disable=None):
                if member.isfile():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    except Exception as error:       # a damaged file too
        raise UserError(f"{path}: not a whole .tar.gz ({error}): fetch it again") from None

def read_imdb(path):
    """-> train, test. Label 1 = pos. A Mac's tar adds ._NAME to each NAME: not a review."""
    reviews = {name: text for name, text in members(path) if "/._" not in name}
    return [[(name.split("/")[2] == "pos", reviews[name])
             for name in sorted(reviews)         # the order inside an archive is nobody's promise
             if name.startswith((f"aclImdb/{part}/neg/", f"aclImdb/{part}/pos/"))]
            for part in ("train", "test")]

def read_cifar(path):
    """-> train, test. Grey pixels, by ITU-R 601 luma weights."""
    splits = dict(data=[], test=[])
    for name, data in members(path, pickles=True):
        part, _, rest = name.rpartition("/")[2].partition("_batch")
        if part in splits:
            batch = pickle.loads(data, encoding="bytes")
            rgb = batch[b"data"].reshape(-1, 3, 1024)
            grey = (np.array([299, 587, 114]) @ rgb + 500) // 1000
            splits[part] += zip(batch[b"labels"], map(bytes, grey.astype(np.uint8)))
    return splits.values()

def read_grey(path):
    """A converted copy of CIFAR-10: train_x, test_x (N, 1024) bytes; train_y, test_y (N,)."""
    try:
        with np.load(path) as arrays:
            return [list(zip(arrays[f"{part}_y"].tolist(), map(bytes, arrays[f"{part}_x"]),
                             strict=True)) for part in ("train", "test")]
    except Exception as error:       # a damaged file fails in many ways
        raise UserError(f"{path}: unreadable ({error})") from None

def draw_toy(s, seed, count):
    """Random bytes whose mix leans towards the class: for --quick, without an archive."""
    rng, documents = np.random.default_rng(seed), 2 if s.task == "retrieval" else 1
    for label in rng.integers(CLASSES[s.task], size=count).tolist():
        yield label, *(bytes(rng.integers(1, 6 + label, size=n).astype(np.uint8))
                       for n in rng.integers(s.length // 2, s.length + 1, size=documents))

def release(home, name, needed=True):
    """A path of the official release; where it is needed and not there, how to get it."""
    folder = home / "lra_release"
    for place in (home, folder, folder / "lra_release"):
        if (place / name).exists():
            return place / name
    if folder.is_file():
        raise UserError(f"{folder} is a file, the archive without its .gz: rename it and untar it")
    if needed:
        raise UserError(f"{folder / name} is missing. It is part of lra_release.gz (7.7 GB, storage"
                        f".googleapis.com/long-range-arena/lra_release.gz, linked at github.com/"
                        f"google-research/long-range-arena): tar -xzf lra_release.gz -C {home}")
    return folder / name

# ------------------------------------------------------------------------------------ splits

def read_task(s):
    """-> the samples of each file: train, dev, test, or what of these there is."""
    home = Path(s.data_dir)
    if s.quick:
        return [draw_toy(s, seed, count) for seed, count in enumerate((400, 100, 100))]
    if s.task == "listops":
        folder = release(home, "listops-1000", needed=False)
        if not folder.exists():
            make_listops(folder)
        return [read_lines([folder / f"basic_{part}.tsv"], parse_listops, "a tree, a tab, a digit")
                for part in COUNTS]
    if s.task == "retrieval":
        paths = [release(home, f"tsv_data/new_aan_pairs.{part}.tsv")
                 for part in ("train", "eval", "test")]
        return [read_lines([path], parse_pair, "a label, two ids, two texts") for path in paths]
    if s.task == "pathfinder":
        folder = release(home, "pathfinder32/curv_contour_length_14")
        parse = functools.partial(parse_image, folder=folder)
        return [read_lines(sorted(folder.glob("metadata/*.npy")),    # text, in spite of their name
                           parse, "the path of a 32 x 32 image, and a label")]
    if s.task == "text":
        return read_imdb(home / "aclImdb_v1.tar.gz")
    if (home / "cifar10_gray.npz").is_file():
        return read_grey(home / "cifar10_gray.npz")
    return read_cifar(home / "cifar-10-python.tar.gz")

def pack(samples, s):
    """-> x (N, documents, length) bytes, cut or filled up with 0; the sizes before that; labels."""
    flat, sizes, labels = bytearray(), [], []
    for label, *documents in samples:
        labels.append(int(label))
        sizes.append([len(text) for text in documents])
        for text in documents:
            flat += text[:s.length].ljust(s.length, b"\0")
    if not labels or not all(map(all, sizes)) or not set(labels) <= set(range(CLASSES[s.task])):
        raise UserError(f"{s.task}: the data in {s.data_dir} has no samples, an empty one, or a "
                        f"label that is not from 0 to {CLASSES[s.task] - 1}")
    x = torch.frombuffer(flat, dtype=torch.uint8).view(len(labels), -1, s.length)
    return x, torch.tensor(sizes), torch.tensor(labels)

def split_off(first, *rest, share):
    """[the first split without the last share of a fixed shuffle, that share, the rest]."""
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(first[0])))
    count = max(1, round(share * len(rows)))
    return [[t[rows[:-count]] for t in first], [t[rows[-count:]] for t in first], *rest]

def load_task(s):
    """-> train, dev, test. A dev split that is missing is a part of train, never of test."""
    splits = [pack(samples, s) for samples in read_task(s)]
    if len(splits) == 1:             # pathfinder is one heap: 80, 10, 10 %
        return split_off(*split_off(*splits, share=0.1), share=1 / 9)
    return split_off(*splits, share=0.1) if len(splits) == 2 else splits

class Split:
    """Samples on the device, where batches are made of them: a step copies and waits for nothing.
    Sizes are on the CPU too: they fix the shapes of batches."""

    def __init__(self, x, sizes, y, device):
        self.sizes, self.y = sizes.clamp(max=x.shape[-1]), y
        self.longest = self.sizes.amax(1)                    # (N,)
        self.full = bool((self.sizes == x.shape[-1]).all())
        self.tensors = [t.to(device) for t in (x, self.sizes, y)]
        self.device = device

    def length(self, rows):
        """Tokens of a batch: those of its longest sample, in steps of 32, to use memory again."""
        return min(math.ceil(int(self.longest[rows].max()) / 32) * 32, self.tensors[0].shape[-1])

    def batch(self, rows, n):
        """-> x (B, n), keep (B, n) or None if nothing is padded, y (B,). Retrieval: (B, 2, n)."""
        x, sizes, y = self.tensors
        x, keep = x[:, :, :n][rows], torch.arange(n, device=self.device) < sizes[rows, :, None]
        return x.long().squeeze(1), None if self.full else keep.squeeze(1), y[rows]

# ------------------------------------------------------------------------- model and processes

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

def make_model(s):
    return train_uea.build(PairTransformer if s.task == "retrieval" else agf.AGFTransformer,
                           classes=CLASSES[s.task], vocab=512, head=128, **vars(s))

def find_processes():
    """-> rank, processes, rank on this machine. One process, unless torchrun set all of these."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    numbers = [int(given[name]) if given.get(name, "").isdecimal() else -1 for name in names[:3]]
    if all(map(given.get, names)) and min(numbers) >= 0 and numbers[0] < numbers[1]:
        return numbers
    if given:
        print(f"one process: {given} is not what torchrun sets", file=sys.stderr)
    return 0, 1, 0

def total(*numbers):
    """Sums over all processes."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if distributed.is_initialized():
        distributed.all_reduce(numbers)
    return numbers.tolist()

# ------------------------------------------------------------------------------------ training

def accuracy(model, split, many, world):
    """Share of right answers; a process takes every so many-th sample, short ones first."""
    rank, processes, _ = world
    mine, kind = torch.argsort(split.longest, stable=True)[rank::processes], split.device.type
    many *= 4 if kind == "cuda" else 1           # no memory goes to gradients
    with torch.autocast(kind, torch.bfloat16, enabled=kind in BFLOAT16):
        found = agf.evaluate(model, (split.batch(rows.to(split.device), split.length(rows))[:2]
                                     for rows in mine.split(many)))
    return total(int((found.argmax(1) == split.y[mine]).sum()))[0] / len(split.y)

def epoch_rows(split, batch_size, seed, epoch):
    """(batches, batch_size): an epoch's rows. Like lengths go together: less is padded."""
    rng, longest = np.random.default_rng([seed, epoch]), split.longest.numpy()
    rows = rng.permutation(len(longest))[:len(longest) // batch_size * batch_size]
    for window in np.split(rows, range(16 * batch_size, len(rows), 16 * batch_size)):
        window[:] = window[np.argsort(longest[window], kind="stable")]   # only here: stays random
    return torch.from_numpy(rng.permutation(rows.reshape(-1, batch_size)))

def add_gradients(net, batches, scale, gamma, device):
    """Add up the gradients of a step's parts -> its loss and ortho, a tensor (2,). scale: processes
    / batch size, since DistributedDataParallel takes the mean over processes. So gradients are
    exact, also where these have different numbers of samples."""
    sums = torch.zeros(2, device=device)
    for x, keep, y in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type in BFLOAT16):
            logits, ortho = net(x, keep)
        loss = scale * F.cross_entropy(logits.float(), y, reduction="sum")
        ortho = scale * ortho.sum()
        (loss + gamma * ortho).backward()
        sums += torch.stack([loss.detach(), ortho.detach()])
    return sums

def train(s, splits, world, device, seed, path):
    """One seed, new or from where `path` left off -> its state, as `path` holds it."""
    (train_split, dev_split, test_split), (rank, processes, _) = splits, world
    torch.manual_seed(seed)                      # the same weights in every process
    model = net = make_model(s).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, eps=1e-6, weight_decay=0,
                                  fused=device.type != "mps")
    batch_size = min(s.batch_size, len(train_split.y))
    share = math.ceil(batch_size / processes)    # samples of a process, at most
    per_epoch = len(train_split.y) // batch_size
    every = max(1 if s.quick else 50, s.steps // 20)         # steps between two evaluations
    state = dict(step=0, best=-1.0, seconds=0.0, tokens=0, history=[], settings=vars(s),
                 micro=min(s.micro_batch or share, share))
    if rank == 0 and path.exists():
        state = train_uea.load(path)
    if processes > 1:                # "none" leaves the LayerNorm before it without a gradient
        net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=s.mixer == "none")
        box = [state]                # other machines do not have the file
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
        state, = box
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if s.compile:                                # for one shape: each costs half a minute
        net = torch.compile(net, dynamic=False)

    rows, sums, begin = None, torch.zeros(2, device=device), time.perf_counter()
    bar = tqdm(range(state["step"], s.steps), f"seed {seed}", s.steps, initial=state["step"],
               leave=False, disable=None if rank == 0 else True)
    for step in bar:
        epoch, i = divmod(step, per_epoch)
        if rows is None or i == 0:
            rows = epoch_rows(train_split, batch_size, seed, epoch)
            lengths = [s.length if s.compile else train_split.length(pick) for pick in rows]
            tokens = train_split.sizes[rows].sum((1, 2)).tolist()    # padding does not count
            rows = rows.to(device)
        for group in optimizer.param_groups:     # one cycle: from lr / 25 up, then to nearly 0
            group["lr"] = float(np.interp(step / s.steps, [0, s.warmup, 1],
                                          [s.lr / 25, s.lr, s.lr / 25e4]))
        done = None
        while done is None:
            # Dropout is fixed by seed, step and process, so that a resumed run draws the same.
            torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
            parts = rows[i][rank::processes].tensor_split(math.ceil(share / state["micro"]))
            batches = (train_split.batch(part, lengths[i]) for part in parts)
            try:
                done = add_gradients(net, batches, processes / batch_size, s.gamma, device)
            except torch.cuda.OutOfMemoryError:
                if state["micro"] == 1 or processes > 1:     # which must do the same number
                    raise UserError(f"the GPU's memory is too small for {state['micro']} samples "
                                    f"at once: try a smaller --micro-batch or --length") from None
                state["micro"] = math.ceil(state["micro"] / 2)
            if done is None:         # here, outside `except`, the failed step's memory is free
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                bar.write(f"step {step + 1} does not fit: {state['micro']} samples at once")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["tokens"] += tokens[i]
        sums += done                 # on the device: to read a number is to wait for the GPU
        if (step + 1) % every and step + 1 < s.steps:
            continue

        loss, ortho = (x / processes / (step + 1 - state["step"]) for x in total(*sums.tolist()))
        if not math.isfinite(loss + ortho):
            raise UserError(f"the loss is not finite before step {step + 1} of seed {seed}: try a "
                            f"smaller --lr (now {s.lr:g})")
        seconds = state["seconds"] + time.perf_counter() - begin     # evaluations do not count
        dev = accuracy(model, dev_split, state["micro"], world)
        row = dict(seed=seed, step=step + 1, lr=group["lr"], loss=loss, ortho=ortho,
                   dev_accuracy=dev, seconds=round(seconds, 2))
        state |= dict(step=step + 1, seconds=seconds, history=[*state["history"], row],
                      model=model.state_dict(), optimizer=optimizer.state_dict())
        if dev > state["best"]:
            state |= dict(best=dev, best_step=step + 1, best_model={
                name: value.cpu().clone() for name, value in model.state_dict().items()})
        if rank == 0:
            train_uea.save(path, state)
            bar.write(f"seed {seed}, step {step + 1}: loss {loss:.4f}, dev {100 * dev:.2f} %")
        sums, begin = torch.zeros_like(sums), time.perf_counter()

    model.load_state_dict(state["best_model"])
    test, off = (accuracy(each, test_split, state["micro"], world)
                 for each in (model, train_uea.without_mixers(model)))
    state["result"] = dict(
        seed=seed, test_accuracy=test, test_accuracy_mixers_off=off, dev_accuracy=state["best"],
        best_step=state["best_step"], train_seconds=round(state["seconds"], 2),
        tokens_per_second=round(state["tokens"] / state["seconds"]))
    if device.type == "cuda":
        state["result"]["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) >> 20
    return state, model

# -------------------------------------------------------------------------------- command line

def settings(argv):
    """Command line -> all settings of a run."""
    given = train_uea.parse(OPTIONS, argv, __doc__)
    if "resume" in given:
        return train_uea.settle("train_lra.py", OPTIONS, {}, given)
    if "task" not in given:
        raise UserError(f"which task? --task {', '.join(TASKS)}")
    preset = SHARED | dict(zip(COLUMNS, TASKS[given["task"]]))
    preset |= LAPTOP if given.get("preset") == "laptop" else {}
    preset |= QUICK if given.get("quick") else {}
    return train_uea.settle("train_lra.py", OPTIONS, preset, given)

def start(argv):
    s, world = settings(argv), find_processes()
    rank, processes, local = world
    if s.batch_size < processes:
        raise UserError(f"--batch-size must be at least {processes}, one for each process")
    own_gpu = processes > 1 and s.device == "auto" and torch.cuda.is_available()
    device, reason = train_uea.pick_device(f"cuda:{local}" if own_gpu else s.device, s.compile)
    parameters = sum(p.numel() for p in make_model(s).parameters())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes > 1:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo")
    for turn in (local == 0, local > 0):
        if turn:                     # the first one makes or fetches what the others then find
            splits = load_task(s)
        total()
    notes = ["--quick: toy data and a few steps, this number means nothing"] * s.quick
    facts = dict(dataset=s.task, task=s.task, mixer=s.mixer, preset=s.preset, steps=s.steps,
                 protocol="best dev checkpoint, one pass over test", parameters=parameters,
                 processes=processes, device=f"{device} ({reason})", notes=notes)
    out = Path()
    if rank == 0:
        mark = train_uea.fingerprint(*(t for split in splits for t in split))
        out = train_uea.open_run("train_lra.py", s, f"{s.task}-{s.mixer}", mark)
        for part, (_, sizes, _) in zip(("train", "dev", "test"), splits):
            cut = int((sizes > s.length).sum())
            print(f"{part}: {len(sizes)} samples, {cut} documents cut to --length {s.length}")
        print(facts, flush=True)
    splits = [Split(*split, device) for split in splits]
    try:
        done = [train(s, splits, world, device, seed, out / f"seed-{seed}.pt")
                for seed in range(s.seed, s.seed + s.seeds)]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(out) from None
    if processes > 1:
        distributed.destroy_process_group()
    if rank == 0:
        train_uea.finish(out, [state for state, _ in done], done[0][1], facts)
        print(*notes, sep="\n")

def main(argv=None):
    return train_uea.guard("train_lra.py", start, argv)

if __name__ == "__main__":
    sys.exit(main())
