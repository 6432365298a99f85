"""Train and evaluate AGF on a task of Long Range Arena, with the published settings.

    python train_lra.py --task listops                 (makes its own data: no network needed)
    python train_lra.py --task text --preset laptop    (within an hour on one CPU thread)
    torchrun --standalone --nproc_per_node=2 train_lra.py --task listops

Protocol: the checkpoint that is best on the dev split, then one pass over the test split.
The numbers in parentheses below give way to the settings of the task and of the preset.
"""

import hashlib
import math
import os
import pickle
import random
import re
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
PRESETS = dict(paper={}, laptop=dict(lr=1e-3, batch_size=32, steps=1500, warmup=0.1))
QUICK = dict(length=256, batch_size=8, steps=30)
OPTIONS = RUN | MODEL | dict(
    task=Option("", "one of " + ", ".join(TASKS), TASKS),
    preset=Option("paper", "laptop: a short schedule for a CPU", PRESETS),
    quick=Option(False, "end to end in under a minute, on toy data"),
    steps=Option(0, "training steps", (1, 10**8)),
    warmup=Option(0.1, "share of the steps in which the rate goes up", (0, 1)),
    length=Option(0, "longest input, in tokens; what is longer is cut", (1, 10**6)),
    micro_batch=Option(0, "samples in memory at once; 0: all of a step", (0, 10**6)))

# ------------------------------------------------------------------------- ListOps: making it

OPERATORS = dict(MIN=min, MAX=max, MED=lambda args: int(statistics.median(args)),
                 SM=lambda args: sum(args) % 10)
WORDS = [*"0123456789", *(f"[{name}" for name in OPERATORS), "]"]
CODE = {word.encode(): i for i, word in enumerate(WORDS, start=1)}   # 0 is padding
COUNTS = dict(train=96000, val=2000, test=2000)

def draw_tree(draw, words, depth=1):
    """Append a random tree, one entry a token -> its value. One argument in four is a tree."""
    if depth == 10 or depth > 1 and draw() >= 0.25:
        digit = int(10 * draw())
        words.append(f"{digit} )")
        return digit
    name, arguments = list(OPERATORS)[int(4 * draw())], 2 + int(9 * draw())
    words.append(f"{'( ' * (arguments + 1)}[{name}")
    values = [draw_tree(draw, words, depth + 1) for _ in range(arguments)]
    words.append("] ) )")
    return OPERATORS[name](values)

def listops_lines(seed=0, low=500, high=2000):
    """Lines "source, tab, target", low < tokens < high: so long that no two are the same."""
    draw = random.Random(seed).random
    while True:
        words = []
        value = draw_tree(draw, words)
        if low < len(words) < high:              # the root is nobody's argument: one ) less
            yield f"{' '.join(words).removesuffix(' )')}\t{value}\n"

def make_listops(folder):
    """basic_{train,val,test}.tsv, all or none: made elsewhere, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lines = iter(tqdm(listops_lines(), "making listops", sum(COUNTS.values()), disable=None))
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".part") as part:
        whole = Path(part, "whole")
        whole.mkdir()
        for name, count in COUNTS.items():
            with open(whole / f"basic_{name}.tsv", "w", newline="") as file:
                file.write("Source\tTarget\n")
                file.writelines(next(lines) for _ in range(count))
        if not folder.exists():      # else another process was faster, with the same trees
            whole.rename(folder)

# ------------------------------- data: readers give (label, document, ...), then splits, batches

def find(home, pattern):
    """Files of the official release, wherever it was unpacked."""
    places = (home, home / "lra_release", home / "lra_release" / "lra_release")
    return next(filter(None, (sorted(place.glob(pattern)) for place in places)), [])

def read_release(home, pattern, parse):
    """parse(line, path) of each line of these files."""
    paths, folder = find(home, pattern), home / "lra_release"
    if not paths and folder.is_file():
        raise UserError(f"{folder} is a file, the archive without its .gz: rename it and untar it")
    if not paths:
        raise UserError(f"{folder / pattern} is missing: untar lra_release.gz (7.7 GB, linked at "
                        f"github.com/google-research/long-range-arena) in {home}")
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.split() != [b"Source", b"Target"]:       # the head of a ListOps file
                        yield parse(line.rstrip(b"\r\n"), path)
                except Exception as error:       # not of that form, in one of many ways
                    raise UserError(f"{path}, line {number}: not readable ({error!r})") from None

def parse_listops(line, _):
    """A tree, a tab, a digit. Parentheses carry nothing."""
    source, target = line.split(b"\t")
    return int(target), bytes([CODE[word] for word in source.translate(None, b"()").split()])

def parse_pair(line, _):
    """Label, two ids, two documents. A document stands there as Python prints bytes, b'...' with
    \\n spelled out. The official pipeline takes it as it stands, so do we."""
    label, _, _, one, two = line.split(b"\t")
    return {0.0: 0, 1.0: 1}[float(label)], one, two

def parse_image(line, path):
    """Folder, file, a number, label, and more."""
    from matplotlib.image import imread
    folder, file, _, label, *_ = line.decode().split()
    pixels = np.atleast_3d(imread(path.parents[1] / folder / file))[:, :, 0]
    if pixels.shape != (32, 32) or pixels.dtype == np.uint8:         # a PNG is read as 0 to 1
        raise ValueError(f"an image of shape {pixels.shape}, not a PNG of 32 x 32")
    return int(label), bytes(np.rint(255 * pixels).astype(np.uint8))

ARCHIVES = {                         # name: source, SHA-256
    "aclImdb_v1.tar.gz": ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                          "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"),
    "cifar-10-python.tar.gz": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                               "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")}

def members(path, pickles=False):
    """(name, bytes) of each file of an official archive: yours, else downloaded and checked."""
    url, digest = ARCHIVES[path.name]
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest, sys.stderr.isatty())
        official = hashlib.sha256(path.read_bytes()).hexdigest() == digest
        if pickles and not official:             # a pickle can run any code
            raise ValueError("its SHA-256 is not the official one")
        if not official:
            print(f"{path}: not the official archive (its SHA-256 differs), used all the same")
        with tarfile.open(path, "r:gz") as archive:
            for member in tqdm(archive, f"reading {path.name}", unit=" files", disable=None):
                if member.isfile():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    except Exception as error:       # no network, a damaged file: in many ways
        raise UserError(f"{path}: fetch {url} or web.archive.org/web/2023/{url} by hand ({error})")

def read_imdb(path):
    """-> train, test. Label 1 = pos. A Mac's tar adds ._NAME to each NAME: not a review."""
    splits = dict(train=[], test=[])
    for name, text in sorted(members(path)):     # the order in an archive is nobody's promise
        if found := re.fullmatch(r"aclImdb/(train|test)/(neg|pos)/\d+_\d+\.txt", name):
            splits[found[1]].append((found[2] == "pos", text))
    return splits.values()

def read_cifar(path):
    """-> train, test. Grey pixels, by ITU-R 601 luma weights."""
    splits = dict(data=[], test=[])
    for name, data in members(path, pickles=True):
        part = name.rpartition("/")[2].split("_batch")[0]
        if part in splits:
            arrays = pickle.loads(data, encoding="bytes")
            rgb = arrays[b"data"].reshape(-1, 3, 1024)
            grey = (np.array([299, 587, 114]) @ rgb + 500) // 1000
            splits[part] += zip(arrays[b"labels"], map(bytes, grey.astype(np.uint8)))
    return splits.values()

def read_grey(path):
    """A converted copy of CIFAR-10: train_x, test_x (N, 1024) bytes; train_y, test_y (N,)."""
    try:
        with np.load(path) as arrays:
            for part in ("train", "test"):           # other kinds of numbers are refused
                x = arrays[f"{part}_x"].astype(np.uint8, casting="safe").reshape(-1, 1024)
                y = arrays[f"{part}_y"].astype(np.int64, casting="safe").ravel().tolist()
                yield list(zip(y, map(bytes, x), strict=True))
    except Exception as error:       # a damaged file fails in many ways
        raise UserError(f"{path}: unreadable ({error})") from None

def draw_toy(s, seed, count):
    """Random bytes whose mix leans towards the class: for --quick, without an archive."""
    rng, documents = np.random.default_rng(seed), 2 if s.task == "retrieval" else 1
    for label in rng.integers(CLASSES[s.task], size=count).tolist():
        yield label, *(bytes(rng.integers(1, 6 + label, size=n).astype(np.uint8))
                       for n in rng.integers(s.length // 2 or 1, s.length + 1, size=documents))

def read_task(s):
    """-> the samples of each file: train, dev, test, or what of these there is."""
    home = Path(s.data_dir)
    if s.quick:
        return [draw_toy(s, seed, count) for seed, count in enumerate((400, 100, 100))]
    if s.task == "listops":
        if not find(home, "listops-1000"):
            make_listops(home / "lra_release" / "listops-1000")
        return [read_release(home, f"listops-1000/basic_{part}.tsv", parse_listops)
                for part in COUNTS]
    if s.task == "retrieval":
        return [read_release(home, f"tsv_data/new_aan_pairs.{part}.tsv", parse_pair)
                for part in ("train", "eval", "test")]
    if s.task == "pathfinder":       # its metadata is text, in spite of the name
        files = "pathfinder32/curv_contour_length_14/metadata/*.npy"
        return [read_release(home, files, parse_image)]
    if s.task == "text":
        return read_imdb(home / "aclImdb_v1.tar.gz")
    grey = home / "cifar10_gray.npz"
    return read_grey(grey) if grey.is_file() else read_cifar(home / "cifar-10-python.tar.gz")

def pack(samples, s):
    """-> x (N, documents, length) bytes, cut or filled up with 0; sizes (N, documents); y (N,)."""
    flat, sizes, labels = bytearray(), [], []
    for label, *documents in samples:
        labels.append(int(label))
        sizes.append([min(len(text), s.length) for text in documents])
        for text in documents:
            flat += text[:s.length].ljust(s.length, b"\0")
    if len(labels) < 3 or min(map(min, sizes)) == 0 or set(labels) - set(range(CLASSES[s.task])):
        raise UserError(f"{s.data_dir}: no {s.task} samples, an empty one, or an unknown label")
    x = torch.frombuffer(flat, dtype=torch.uint8).view(len(labels), -1, s.length)
    return x, torch.tensor(sizes), torch.tensor(labels)

def load_task(s):
    """-> train, dev, test. A dev split that is missing is a part of train, never of test."""
    splits = [pack(samples, s) for samples in read_task(s)]
    tenth = max(1, len(splits[0][0]) // 10)
    while len(splits) < 3:           # pathfinder is one heap: 80, 10, 10 %
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(splits[0][0])))
        splits[:1] = [[t[part] for t in splits[0]] for part in (rows[:-tenth], rows[-tenth:])]
    return splits

def batch(split, rows, device, n=None):
    """-> x (B, n), keep (B, n) or None if nothing is padded, y (B,). Retrieval: (B, 2, n).
    n: tokens of the longest sample, in steps of 32, so that memory is used again."""
    x, sizes, y = (t[rows] for t in split)
    longest = max(sizes.flatten().tolist(), default=1)       # a process may have nothing to do
    n = n or min(math.ceil(longest / 32) * 32, x.shape[-1])
    keep = torch.arange(n) < sizes[:, :, None]
    x, y = x[:, :, :n].to(device).long().squeeze(1), y.to(device)
    return x, None if keep.all() else keep.squeeze(1).to(device), y

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
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    given = {name: os.environ[name] for name in names if name in os.environ}
    numbers = [int(given[name]) if given.get(name, "").isdecimal() else -1 for name in names[:4]]
    rank, processes, local, port = numbers
    if all(map(given.get, names)) and min(numbers) >= 0 and rank < processes and port < 2**16:
        return rank, processes, local
    if given:
        print(f"one process: {given} is not what torchrun sets", file=sys.stderr)
    return 0, 1, 0

def total(numbers):
    """Sums over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(numbers)
    return numbers

# ------------------------------------------------------------------------------------ training

def accuracy(model, split, many, world, device):
    """Share of right answers; a process takes every so many-th sample, short ones first."""
    rank, processes, _ = world
    rows = torch.argsort(split[1].amax(1), stable=True)[rank::processes]
    found = agf.evaluate(model, (batch(split, part, device)[:2] for part in rows.split(many)))
    return total((found.argmax(1) == split[2][rows]).sum()).item() / len(split[2])

def epoch_rows(split, batch_size, seed, epoch):
    """(batches, batch_size): an epoch's rows. Like lengths go together: less is padded."""
    rng, longest = np.random.default_rng([seed, epoch]), split[1].amax(1).numpy()
    rows = rng.permutation(len(longest))[:len(longest) // batch_size * batch_size]
    for window in np.split(rows, range(16 * batch_size, len(rows), 16 * batch_size)):
        window[:] = window[np.argsort(longest[window], kind="stable")]   # only here: stays random
    return torch.from_numpy(rng.permutation(rows.reshape(-1, batch_size)))

def train(s, splits, world, device, seed, path):
    """One seed, new or from where `path` left off -> its state, as `path` holds it, its model."""
    (train_split, dev_split, test_split), (rank, processes, _) = splits, world
    torch.manual_seed(seed)                      # the same weights in every process
    model = net = make_model(s).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, eps=1e-6, weight_decay=0, fused=True)
    batch_size = min(s.batch_size, len(train_split[0]))
    share = math.ceil(batch_size / processes)    # samples of a process, at most
    micro = min(s.micro_batch or share, share)
    per_epoch = len(train_split[0]) // batch_size
    every = max(1 if s.quick else 50, s.steps // 20)         # steps between two evaluations
    state = dict(step=0, best=-1.0, seconds=0.0, history=[], settings=vars(s))
    if rank == 0 and path.exists():
        state = train_uea.load(path)
    if processes > 1:                # "none" leaves the LayerNorm before it without a gradient
        net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=s.mixer == "none")
        box = [state]                # other machines do not have the file
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
        state = box[0]
    with train_uea.told(f"{path}: not a checkpoint of this run"):
        if state["step"]:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    if s.compile:                    # for one shape: each costs half a minute
        net = torch.compile(net, dynamic=False)
    rows, sums, begin = None, torch.zeros(2, device=device), time.perf_counter()
    bar = tqdm(range(state["step"], s.steps), f"seed {seed}", s.steps, initial=state["step"],
               leave=False, disable=None if rank == 0 else True)
    for step in bar:
        epoch, i = divmod(step, per_epoch)
        if rows is None or i == 0:
            rows = epoch_rows(train_split, batch_size, seed, epoch)
        rate = float(np.interp(step / s.steps, [0, s.warmup, 1], [s.lr / 25, s.lr, s.lr / 25e4]))
        optimizer.param_groups[0]["lr"] = rate   # one cycle: up, then down to nearly 0
        while True:
            # Dropout is fixed by seed, step and process, so that a resumed run draws the same.
            torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
            optimizer.zero_grad()
            parts = rows[i][rank::processes].tensor_split(math.ceil(share / micro))
            found = torch.zeros(2, device=device)
            try:
                for part in parts:
                    x, keep, y = batch(train_split, part, device, s.length if s.compile else None)
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        logits, ortho = net(x, keep)
                    loss, ortho = F.cross_entropy(logits.float(), y, reduction="sum"), ortho.sum()
                    # Sums, so that unlike parts are exact; over processes, DDP takes the mean.
                    ((loss + s.gamma * ortho) * processes / batch_size).backward()
                    found += torch.stack([loss, ortho]).detach()
                break
            except torch.OutOfMemoryError:
                if micro == 1 or processes > 1:      # which must do the same number
                    raise UserError(f"no memory: lower --micro-batch (now {micro}) or --length")
            x = keep = logits = loss = ortho = None  # outside `except`: nothing holds the memory
            torch.cuda.empty_cache()
            micro = math.ceil(micro / 2)
            bar.write(f"step {step + 1} does not fit: {micro} samples at once")
        sums += found                # on the device: to read a number is to wait for the GPU
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)    # the published settings name none
        optimizer.step()
        if (step + 1) % every and step + 1 < s.steps:
            continue

        loss, ortho = (total(sums.cpu()) / batch_size / (step + 1 - state["step"])).tolist()
        if not math.isfinite(loss + ortho):
            raise UserError(f"seed {seed}, step {step + 1}: the loss is not finite, lower --lr")
        seconds = state["seconds"] + time.perf_counter() - begin     # evaluations do not count
        dev = accuracy(model, dev_split, micro, world, device)
        row = dict(seed=seed, step=step + 1, lr=rate, loss=loss, ortho=ortho,
                   dev_accuracy=dev, seconds=round(seconds, 2))
        state |= dict(step=step + 1, seconds=seconds, history=[*state["history"], row],
                      model=model.state_dict(), optimizer=optimizer.state_dict())
        if dev > state["best"]:
            best = {name: value.cpu().clone() for name, value in model.state_dict().items()}
            state |= dict(best=dev, best_step=step + 1, best_model=best)
        if rank == 0:
            train_uea.write(path, state)
            bar.write(f"seed {seed}, step {step + 1}: loss {loss:.4f}, dev {100 * dev:.2f} %")
        sums, begin = torch.zeros_like(sums), time.perf_counter()

    model.load_state_dict(state["best_model"])
    test = accuracy(model, test_split, micro, world, device)
    state["result"] = dict(
        seed=seed, test_accuracy=test, dev_accuracy=state["best"], best_step=state["best_step"],
        train_seconds=round(state["seconds"]), peak_cuda_mb=torch.cuda.max_memory_allocated() >> 20)
    return state, model

# -------------------------------------------------------------------------------- command line

def settings(argv):
    """Command line -> all settings of a run."""
    given = train_uea.parse(OPTIONS, argv, __doc__)
    if "resume" in given:
        return train_uea.settle("train_lra.py", OPTIONS, {}, given)
    if "task" not in given:
        raise UserError(f"which task? --task {', '.join(TASKS)}")
    base = SHARED | dict(zip(COLUMNS, TASKS[given["task"]])) | PRESETS[given.get("preset", "paper")]
    if (given["task"], given.get("preset")) == ("listops", "laptop"):
        base["steps"] = 2000         # a long plateau comes first: notebook 11
    base |= QUICK if given.get("quick") else {}
    return train_uea.settle("train_lra.py", OPTIONS, base, given)

def start(argv):
    s, world = settings(argv), find_processes()
    rank, processes, local = world
    own_gpu = processes > 1 and s.device == "auto" and torch.cuda.is_available()
    device, reason = train_uea.pick_device(f"cuda:{local}" if own_gpu else s.device, s.compile)
    parameters = sum(p.numel() for p in make_model(s).parameters())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes > 1:
        # Before the group: imported later, it keeps the group, whose threads may abort the exit.
        import torch.distributed.nn as _
        distributed.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo")
    splits = load_task(s)
    facts = dict(task=s.task, mixer=s.mixer, preset=s.preset, steps=s.steps, processes=processes,
                 parameters=parameters, samples=[len(y) for *_, y in splits],
                 protocol="best on dev, one pass over test", device=f"{device} ({reason})",
                 notes=["--quick: toy data, a few steps: this number means nothing"] * s.quick)
    out = Path()
    if rank == 0:
        mark = train_uea.fingerprint(*(t for split in splits for t in split))
        out = train_uea.open_run("train_lra.py", s, f"{s.task}-{s.mixer}", mark)
        print(facts, flush=True)
    done = [train(s, splits, world, device, seed, out / f"seed-{seed}.pt")
            for seed in range(s.seed, s.seed + s.seeds)]
    if processes > 1:
        distributed.destroy_process_group()
    if rank == 0:
        train_uea.finish(out, [state for state, _ in done], done[0][1], facts)
        print(*facts["notes"], sep="\n")

def main(argv=None):
    return train_uea.guard("train_lra.py", start, argv)

if __name__ == "__main__":
    sys.exit(main())
