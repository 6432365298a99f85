"""Each test is named after the claim it proves. Offline, on the CPU, under two minutes."""

from functools import partial
from pathlib import Path
import ast
import concurrent.futures
import contextlib
import copy
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

from scipy import special, stats
from torch import distributed, nn
from torch.distributed.run import main as torchrun
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
import matplotlib
import nbformat
import numpy as np
import pandas
import pytest
import torch

import agf
import train_lra
import train_uea
from train_uea import AGFClassifier

HERE = Path(__file__).parent
PUBLISHED = [(1.5, -1.5), (2, 0.5), (1, 0.2), (1.5, 2), (1.5, 1), (2, 1.5), (1, 0), (0, 0),
             (-0.5, -0.5), (2, -1), (2, -2), (2, -1.5), (1.5, -1)]             # a, b of each
torch.set_num_threads(1)                             # such small tensors make a second one wait
randn64 = partial(torch.randn, dtype=torch.float64)

@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A test begins in an empty folder. No pictures, a second each: `run` and `quick` have them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_uea, "draw", lambda *args: None)
    torch.manual_seed(0)

def random_keep(B, n):
    """Right padding, each row with at least one real token, row 0 full."""
    lengths = torch.randint(1, n + 1, (B,))
    lengths[0] = n
    return torch.arange(n) < lengths[:, None]

def make_mixer(name="agf", dim=16, heads=2):
    """A filter with coefficients gets random ones: it would start as p = 1."""
    mixer = agf.MIXERS[name](dim, heads)
    if name == "agf":
        nn.init.normal_(mixer.filter.theta)
    return mixer

def with_gradients(outputs, inputs):
    """The outputs, and the gradients of a sum that gives each entry of them its own weight."""
    total = sum(out.sin().sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs, materialize_grads=True)]

# ---------------------------------------------------------------------------- basis and filter

def printed_recurrence(k, x, a, b):
    """P_k exactly as printed in the paper, by recursion: slow and obvious."""
    if k == 0:
        return torch.ones_like(x)
    if k == 1:
        return (a - b) / 2 + (a + b + 2) / 2 * x
    c = 2 * k + a + b
    right = ((c - 1) * (c * (c - 2) * x + a ** 2 - b ** 2) * printed_recurrence(k - 1, x, a, b)
             - 2 * (k + a - 1) * (k + b - 1) * c * printed_recurrence(k - 2, x, a, b))
    return right / (2 * k * (k + a + b) * (c - 2))

@pytest.mark.parametrize("a, b", [(1.0, 0.0), (0.0, 0.0), (2.0, 1.5), (-0.5, -0.5)])
def test_jacobi_is_orthogonal_under_its_weight(a, b):
    nodes, weights = map(torch.from_numpy, special.roots_jacobi(30, a, b))   # exact here
    P = agf.jacobi(nodes, 8, a, b)                           # (9, 30)
    gram = (P * weights) @ P.T
    assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-12)
    assert gram.diag().min() > 0.01

def slow_filter(filter, s):
    """sum_k theta_k T_k(s) from textbook pieces, independent of agf's evaluation."""
    a, b = {"legendre": (0, 0), "chebyshev": (-0.5, -0.5)}.get(filter.basis, (filter.a, filter.b))
    theta, total = torch.tanh(filter.theta), 0 * s
    for k in range(filter.order + 1):
        T = s ** k if filter.basis == "monomial" else printed_recurrence(k, s, a, b)
        total = total + (1.0 if k == 0 and filter.identity else theta[k]) * T
    return total

@pytest.mark.parametrize("basis, a, b", [
    *(("jacobi", a, b) for a, b in PUBLISHED), *((basis, 1.5, -1.5) for basis in agf.BASES[1:])])
@pytest.mark.parametrize("order", [0, 1, 2, 5, 10, 14])
@pytest.mark.parametrize("identity", [True, False])
def test_the_filter_starts_as_1_or_0_and_is_its_definition_and_float32_is_enough(
        basis, a, b, order, identity):
    filter = agf.JacobiFilter(order, basis, a, b, identity).double()
    s = torch.rand(50, 7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(filter(s), torch.full_like(s, identity))
    nn.init.normal_(filter.theta)
    slow = with_gradients([slow_filter(filter, s)], [s, filter.theta])
    for fast in (filter, filter.plain):
        found = with_gradients([fast(s)], [s, filter.theta])
        assert_close(found, slow, rtol=1e-10, atol=1e-10)
    gap = copy.deepcopy(filter).float()(s.float()) - slow[0]
    assert order > 10 or gap.abs().max() < 1e-5 * slow[0].abs().max()
    if basis == "jacobi":
        P = torch.stack([printed_recurrence(k, s, a, b) for k in range(order + 1)])
        assert_close(agf.jacobi(s, order, a, b), P, rtol=1e-12, atol=1e-12)

def test_first_and_second_derivatives_are_right_or_refused():
    filter, U = agf.JacobiFilter(4, "jacobi", 2, -1.5).double(), randn64(2, 5, 3).requires_grad_()
    nn.init.normal_(filter.theta)
    s = torch.rand(6, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(filter.plain, (s,)) and check(agf.Gram.apply, (U,))
    first, = torch.autograd.grad(filter(s).square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

# ---------------------------------------------- loss and mixers, padding, precision, compilation

def slow_loss(U, V):
    """The orthogonality loss of one sample, (h, n, d) twice, from its formula."""
    eye = torch.eye(U.shape[-1], dtype=U.dtype)
    return (U.mT @ U - eye).abs().mean() + (V.mT @ V - eye).abs().mean()

def test_the_orthogonality_loss_is_its_formula_on_real_tokens():
    (U, V), keep = randn64(2, 3, 2, 9, 4), random_keep(3, 9)
    slow = [slow_loss(u[:, real], v[:, real]) for u, v, real in zip(U, V, keep)]
    assert_close(agf.orthogonality_loss(U, V, keep), torch.stack(slow))

def slow_agf(mixer, x, keep):
    """The paper's formulas with explicit n x n matrices, a sample at a time."""
    out, losses = torch.zeros_like(x), []
    for i, real in enumerate(keep):                          # only real tokens exist
        def mapped(name):                                    # -> (h, real tokens, d)
            y = getattr(mixer, name)(x[i, real])
            return torch.stack(y.chunk(mixer.heads, dim=1))
        U, V, p = torch.exp(mapped("U_proj")), torch.exp(mapped("V_proj")), 1.0
        U, V = U / U.sum(2, keepdim=True), V / V.sum(1, keepdim=True)
        if mixer.filter is not None:
            s = 1 / (1 + torch.exp(-mapped("s_proj")))
            p = s if isinstance(mixer.filter, nn.Identity) else slow_filter(mixer.filter, s)
        heads = (U * p) @ V.mT @ mapped("value_proj")        # (n x n) first
        out[i, real] = mixer.out_proj(torch.cat([*heads], dim=1))
        losses.append(slow_loss(U, V))
    return out, torch.stack(losses)

@pytest.mark.parametrize("name", ["agf", "uv", "usv", "softmax"])
@pytest.mark.parametrize("padded", [False, True])
def test_forward_is_the_dense_form_with_its_gradients_and_never_builds_its_matrix(name, padded):
    mixer, x = make_mixer(name, 12, 3).double(), randn64(4, 10, 12, requires_grad=True)
    keep = random_keep(4, 10) if padded else None
    A, value = mixer.matrix(x, keep), mixer.factors(x, keep)[2 if name == "softmax" else 3]
    out = mixer.out_proj((A @ value).transpose(1, 2).flatten(2))
    assert_close(agf.hide_padding(out, keep), mixer(x, keep)[0], rtol=1e-11, atol=1e-12)
    assert A.shape == (4, 3, 10, 10) and hasattr(mixer, "s_proj") == (name in ("agf", "usv"))
    if name in ("uv", "softmax") and not padded:             # each token gets an average
        assert_close(A.sum(-1), torch.ones(4, 3, 10, dtype=torch.float64))
    if name != "softmax":
        slow = slow_agf(mixer, x, keep if padded else torch.ones(4, 10) > 0)
        outputs = mixer(x, keep), slow, checkpoint(mixer, x, keep, use_reentrant=False)
        fast, slow, again = (with_gradients(out, [x, *mixer.parameters()]) for out in outputs)
        assert_close(fast, slow, rtol=1e-9, atol=1e-11)
        assert_close(fast, again, rtol=0, atol=0)

def test_softmax_attention_is_torchs_multi_head_attention():
    mine = agf.SoftmaxAttention(12, 3).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    maps = mine.query_proj, mine.key_proj, mine.value_proj
    theirs.in_proj_weight.data = torch.cat([m.weight for m in maps])
    theirs.in_proj_bias.data = torch.cat([m.bias for m in maps])
    theirs.out_proj.load_state_dict(mine.out_proj.state_dict())
    x, keep = randn64(3, 8, 12), random_keep(3, 8)
    expected = theirs(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
    assert_close(mine(x, keep)[0][keep], expected[keep])

def small(**changes):
    setting = dict(classes=3, length=20, channels=2, dim=16, heads=2, hidden=32, dropout=0.0)
    return agf.AGFConfig(**setting | changes)

SHAPES = [dict(pool=pool, **shape) for pool in ("mean", "flatten", "first") for shape in (
    {}, dict(kernel=5, stride=3, norm="post", zero_init=True), dict(vocab=9))]

@pytest.mark.parametrize("name", list(agf.MIXERS))
@pytest.mark.parametrize("shape", [None, *SHAPES])           # None: the mixer alone
@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_padding_changes_no_output_no_loss_and_no_gradient(name, shape, garbage):
    model, size, keep = make_mixer(name), (3, 7, 16), random_keep(3, 7)
    if shape:
        model, size = agf.AGFTransformer(small(mixer=name, **shape)), (3, 7, 2)
    x, garbage = randn64(size), torch.tensor(garbage).double()
    if shape and "vocab" in shape:
        x, garbage = torch.randint(9, (3, 7)), torch.tensor(-7)
    keep[2] = False                                          # padding only
    more = nn.functional.pad(keep, (0, 4))
    longer = garbage.repeat(3, 11, *size[2:x.ndim])
    longer[more] = x[keep]
    before, model = longer.clone(), model.double().eval()
    longer.requires_grad_(longer.is_floating_point())
    short, padded = model(x, keep), model(longer, more)
    assert_close(padded[0][:, :7], short[0], rtol=0, atol=1e-12)     # logits: all three
    assert_close(padded[1], short[1], rtol=0, atol=1e-12)
    assert not padded[0][:, 7:].any()
    assert_close(longer.detach(), before, equal_nan=True)            # the caller's
    if padded[0].requires_grad:
        (padded[0].sum() + padded[1].sum()).backward()
    gradients = [p.grad for p in [longer, *model.parameters()] if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert longer.grad is None or not longer.grad[~more].any()

@pytest.mark.parametrize("name", list(agf.MIXERS))
def test_bfloat16_autocast_keeps_softmax_polynomial_and_loss_in_float32(name):
    model = agf.AGFTransformer(small(mixer=name)).eval()
    x, keep, mixer = torch.randn(2, 20, 2), random_keep(2, 20), model.blocks[0].mixer
    exact, ortho = model(x, keep)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x, keep)
        if isinstance(mixer, agf.AGFAttention):
            U, s, V, value = mixer.factors(torch.randn(2, 5, 16))
            theirs = agf.orthogonality_loss(U, V)
            assert U.dtype == V.dtype == theirs.dtype == torch.float32 != value.dtype
            assert s is None or s.dtype == mixer.filter(s).dtype == torch.float32
            assert (theirs - agf.orthogonality_loss(U.double(), V.double())).abs().max() < 1e-6
    assert loss.dtype == torch.float32
    assert (logits.float() - exact).abs().max() < 0.1 and (loss - ortho).abs().max() < 0.02
    (logits.float().sum() + loss.sum()).backward()
    logits, loss = model.bfloat16()(x.bfloat16(), keep)      # and without autocast
    assert logits.dtype == torch.bfloat16 and (logits - exact).abs().max() < 0.2
    assert loss.isfinite().all()

@pytest.mark.parametrize("name, amp", [("agf", False), ("agf", True), ("softmax", False)])
def test_the_model_compiles_without_a_graph_break_also_when_n_changes(name, amp):
    model = agf.AGFTransformer(small(mixer=name, depth=1, length=400))
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = dict(rtol=0.05, atol=0.05) if amp else dict(rtol=1e-4, atol=1e-5)
    for n in (130, 200, 333):                                # a third n once broke the backward
        x, keep = torch.randn(2, n, 2), random_keep(2, n)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            outputs = fast(x, keep), model(x, keep)
        compiled, eager = (with_gradients(out, [*model.parameters()]) for out in outputs)
        assert_close(compiled, eager, **tolerance)

# ----------------------------------------- mixers and models behave like any other torch module

PROJECTIONS = ("U_proj", "s_proj", "V_proj", "value_proj", "out_proj")

class LoRA(nn.Sequential):
    """A frozen linear map plus a trained map of low rank, as an adapter library wraps it."""
    def forward(self, x):
        base, down, up = self
        return base(x) + up(down(x))

@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooks_see_each_projection_once_and_an_adapter_around_it_learns(name):
    mixer, x, seen = make_mixer(), torch.randn(2, 9, 16), []
    linear = getattr(mixer, name)
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    before = mixer(x)[0]
    assert seen == [(2, 9, 16)]
    low_rank = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
    setattr(mixer, name, LoRA(linear.requires_grad_(False), *low_rank))
    out, ortho = mixer(x)
    (out.square().sum() + ortho.sum()).backward()
    assert (out - before).abs().max() > 1e-6
    assert all(one.weight.grad.abs().sum() > 0 for one in low_rank)

def twice_the_norm(linear):
    nn.utils.weight_norm(linear).weight_g.data.mul_(2)
    return linear

def quantised(linear):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})

@pytest.mark.parametrize("tool, least, most", [
    (nn.utils.weight_norm, 0, 1e-5), (twice_the_norm, 1e-3, math.inf),
    (nn.utils.spectral_norm, 1e-3, math.inf), (parametrizations.spectral_norm, 1e-3, math.inf),
    (partial(prune.l1_unstructured, name="weight", amount=0.9), 1e-3, math.inf),
    (quantised, 1e-6, 0.1)])
def test_reparametrised_pruned_and_quantised_projections_take_effect(tool, least, most):
    mixer, x = make_mixer(), torch.randn(2, 9, 16)
    before = mixer(x)[0]
    for name in PROJECTIONS:
        setattr(mixer, name, tool(getattr(mixer, name)))
    assert least <= (mixer(x)[0] - before).abs().max() < most

@pytest.mark.parametrize("name", list(agf.MIXERS))
def test_copies_pickles_states_and_exports_of_any_batch_and_length_are_the_same_model(name):
    config = small(mixer=name, length=64, order=6)
    model = agf.AGFTransformer(config).eval()
    model.load_state_dict({key: torch.randn_like(p) for key, p in model.state_dict().items()})
    torch.save(model.state_dict(), "state.pt")
    with torch.device("meta"):
        loaded = agf.AGFTransformer(config).eval()
    loaded.to_empty(device="cpu").load_state_dict(torch.load("state.pt", weights_only=True))
    dynamic = {0: torch.export.Dim("B"), 1: torch.export.Dim("n", max=64)},
    exported = torch.export.export(model, (torch.randn(2, 20, 2),), dynamic_shapes=dynamic)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, exported.module()]
    for shape in ((2, 20, 2), (5, 64, 2), (3, 7, 2)):
        x = torch.randn(shape)
        for twin in twins:
            assert_close([*twin(x)], [*model(x)], rtol=1e-5, atol=1e-5)

def test_fake_tensors_are_enough_and_none_is_float64_which_mps_lacks():
    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), function
            return out
    with torch._subclasses.FakeTensorMode(), Watch():
        model = agf.AGFTransformer(small(order=10))
        sum(part.sum() for part in model(torch.randn(2, 20, 2))).backward()

@pytest.mark.parametrize("name", list(agf.MIXERS))
@pytest.mark.parametrize("B, n", [(0, 5), (3, 0), (0, 0)])
def test_no_samples_or_no_tokens_give_an_empty_output(name, B, n):
    for keep in (None, torch.ones(B, n) > 0):
        out, ortho = agf.MIXERS[name](12, 3)(torch.randn(B, n, 12), keep)
        assert out.shape == (B, n, 12) and ortho.shape == (B,) and ortho.isfinite().all()
    logits, _ = agf.AGFTransformer(small(mixer=name, vocab=9))(torch.zeros(B, n, dtype=torch.long))
    assert logits.shape == (B, 3) and logits.isfinite().all()
    series = agf.AGFTransformer(small(mixer=name, kernel=3))
    assert series(torch.randn(0, 5, 2))[0].shape == (0, 3)

def test_torch_func_gives_the_gradient_of_each_sample():
    mixer, x = make_mixer(), torch.randn(3, 5, 16)
    params = dict(mixer.named_parameters())

    def loss(params, one):
        out, ortho = torch.func.functional_call(mixer, params, (one[None],))
        return out.square().sum() + ortho.sum()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i, one in enumerate(x):
        alone = torch.autograd.grad(loss(params, one), list(params.values()))
        assert_close([grad[i] for grad in each.values()], list(alone))

def test_float16_with_a_gradient_scaler_trains():
    model, x, y = agf.AGFTransformer(small()), torch.randn(2, 20, 2), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler, losses = torch.amp.GradScaler("cpu"), []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            logits, ortho = model(x)
        losses.append(nn.functional.cross_entropy(logits.float(), y) + 0.01 * ortho.mean())
        scaler.scale(losses[-1]).backward()
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.5 * losses[0]

def test_fsdp_by_linear_and_by_block_has_the_outputs_of_one_process(tmp_path):
    from torch.distributed.fsdp import fully_shard
    distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    for kind in (nn.Linear, agf.Block):
        plain, sharded = (agf.AGFTransformer(small()).eval() for _ in range(2))
        sharded.load_state_dict(plain.state_dict())
        for part in [m for m in sharded.modules() if isinstance(m, kind)]:
            fully_shard(part)
        fully_shard(sharded)
        x = torch.randn(2, 20, 2)
        (logits, ortho), want = sharded(x), plain(x)[0]
        (logits.sum() + ortho.sum()).backward()
        assert (logits - want).abs().max() < 1e-6
        assert all(p.grad is not None for p in sharded.parameters())
    distributed.destroy_process_group()

def test_no_tensor_grows_with_n_squared_and_little_is_saved_for_backward():
    n, mixer, saved = 600, agf.AGFAttention(16, 2, order=10), {}

    def pack(t):
        assert t.numel() < n * n
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mixer(torch.randn(1, n, 16, requires_grad=True))
    assert 0 < sum(saved.values()) <= 9 * n * 16 * 4         # 8 n D floats and the weights, K = 10

class Floor(nn.Module):                      # five bare linear maps
    def __init__(self, dim, heads):
        super().__init__()
        self.first, self.last = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)

    def forward(self, x, keep=None):
        return self.last(sum(self.first(x).chunk(4, -1))), x.new_zeros(len(x))

def test_a_users_own_mixer_plugs_in_and_agf_costs_at_most_2_5_times_five_linear_maps():
    config = agf.AGFConfig(classes=2, length=1024, vocab=256, dim=64, heads=2, hidden=128, head=128)
    models, times = [agf.AGFTransformer(config), agf.AGFTransformer(config, Floor)], [[], []]
    assert sum(isinstance(m, Floor) for m in models[1].modules()) == 2
    x = torch.randint(256, (8, 1024))
    for _ in range(5):                                              # in turn: noise hits both
        for model, seconds in zip(models, times):
            begin = time.process_time()
            logits, ortho = model(x)
            (logits.sum() + ortho.sum()).backward()
            seconds.append(time.process_time() - begin)
    assert min(times[0]) < 2.5 * min(times[1])

# -------------------------------------- the Transformer, its training, the README and a notebook

def test_hidden_states_are_all_layers_and_forward_uses_them():
    model = agf.AGFTransformer(small(depth=3, kernel=3, stride=2)).eval()
    x, keep = torch.randn(2, 20, 2), random_keep(2, 20)
    states, mask, ortho = model.hidden_states(x, keep)
    assert [s.shape for s in states] == [(2, 10, 16)] * 4 and mask.shape == (2, 10)
    assert_close(states[2], model.blocks[1](states[1], mask)[0])
    each = [block.mixer(block.norm1(s), mask)[1] for block, s in zip(model.blocks, states)]
    assert_close(ortho, torch.stack(each).mean(0))
    assert_close(model(x, keep)[1], ortho)

@pytest.mark.parametrize("changes, words", [
    (dict(heads=3), "heads must divide"), (dict(norm="mid"), "mid"), (dict(mixer="agff"), "agff"),
    (dict(depth=0), "depth"), (dict(kernel=4), "kernel"), (dict(dropout=1.0), "dropout"),
    (dict(pool="max"), "max"), (dict(zero_init=True, identity=False), "identity"),
    (dict(basis="fourier"), "fourier"), (dict(order=-1), "-1"), (dict(order=2.5), "2.5"),
    (dict(a=-1.5, b=-0.5), "a=-1.5, b=-0.5"), (dict(a=-2, b=-2), "k=3"), (dict(a=math.nan), "nan"),
    ({}, "21 steps")])                                       # an input that is too long
def test_an_impossible_configuration_or_input_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        agf.AGFTransformer(small(**changes))(torch.randn(1, 21, 2))

def test_diagnostics_are_their_formulas_and_ignore_padding():
    x, keep = randn64(3, 8, 5), torch.arange(8) < torch.tensor([[8], [5], [2]])
    dirty = x.masked_fill(~keep[:, :, None], 9)
    for i in range(3):
        real = x[i][keep[i]]
        rows = real.unbind()
        cos = [torch.cosine_similarity(p, q, 0) for p in rows for q in rows if p is not q]
        low = real.mean(0).expand_as(real)
        share = torch.linalg.svdvals(real) / torch.linalg.svdvals(real).sum()
        for measure, slow in ((agf.token_cosine, torch.stack(cos).mean()),
                              (agf.high_frequency_ratio, (real - low).norm() / low.norm()),
                              (agf.effective_rank, torch.exp(-(share * share.log()).sum()))):
            assert_close(measure(dirty, keep)[i], slow)

@pytest.mark.parametrize("name", ["agf", "softmax"])
def test_one_batch_is_overfitted(name):
    model = agf.AGFTransformer(small(mixer=name))
    x, keep, y = torch.randn(12, 20, 2), random_keep(12, 20), torch.randint(3, (12,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss, ortho = agf.train_step(model, optimizer, x, keep, y)
    assert (agf.evaluate(model, [(x, keep)]).argmax(1) == y).all() and model.training
    assert not loss.requires_grad and loss.ndim == ortho.ndim == 0

def python(*argv, **environment):
    return subprocess.run([sys.executable, *map(str, argv)], text=True, capture_output=True,
                          env=os.environ | environment)

def test_agf_py_alone_in_an_empty_folder_trains_a_step():
    shutil.copy(HERE / "agf.py", ".")
    done = python("-c", """if True:
        import agf, torch
        model = agf.AGFTransformer(agf.AGFConfig(classes=2, length=9))
        optimizer = torch.optim.AdamW(model.parameters())
        agf.train_step(model, optimizer, torch.randn(4, 9, 1), None, torch.tensor([0, 1, 0, 1]))
        print("trained")""")
    assert "trained" in done.stdout, done.stderr
    roots = {line.split()[1].split(".")[0] for line in Path("agf.py").read_text().splitlines()
             if line.startswith(("import ", "from "))}
    assert roots - {"torch"} <= set(sys.stdlib_module_names)

def test_the_python_examples_of_the_readme_run_as_printed():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names = dict(X=np.random.rand(9, 2, 20), X_new=np.random.rand(4, 2, 30))
    names["y"] = np.array(["a", "b", "c"] * 3)
    for block in blocks:                                     # as printed, but for a short training
        exec(block.replace("AGFClassifier()", "AGFClassifier(epochs=1)"), names)
    assert len(blocks) == 2 and names["shares"].shape == (4, 3)
    assert set(names["labels"]) <= set("abc")
    assert names["out"].shape == (8, 100, 64) and names["logits"].shape == (8, 9)

def test_one_sequence_on_two_processes_equals_one(tmp_path, monkeypatch):
    notebook = json.loads((HERE / "notebooks" / "10_a_billion_tokens.ipynb").read_text("utf-8"))
    parts = ["".join(cell["source"]) for cell in notebook["cells"]]
    parts = [part.split("\n", 1)[1] for part in parts if part.startswith("%%module")]
    Path("in_pieces.py").write_text("\n\n".join(parts), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    in_pieces = importlib.import_module("in_pieces")
    torch.multiprocessing.spawn(in_pieces.worker, (2, tmp_path, [37]), nprocs=2)
    ranks = [torch.load(f"result_2_{rank}.pt")[37] for rank in range(2)]
    mixer, x, weight = in_pieces.problem(37)                 # parts of 19 and 18 tokens
    out, _ = mixer(x.requires_grad_())
    (out * weight).sum().backward()
    for name, whole in (("out", out), ("grad", x.grad)):
        assert_close(torch.cat([rank[name] for rank in ranks], 1), whole)
    for name, p in mixer.named_parameters():
        assert_close(ranks[0]["parameters"][name], p.grad, atol=1e-10, rtol=1e-7)

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))

def said(code, names):                       # without IPython's % lines
    lines = [line for line in code.splitlines() if not line.startswith("%")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec("\n".join(lines), names)
    return out.getvalue()

@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_exercises_accept_their_solutions_and_reject_wrong_answers(path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    cells, names = nbformat.read(path, as_version=4).cells, {}
    assert all(cell.source.count("\n") < 30 for cell in cells if cell.cell_type == "code")
    tags = [cell.metadata.get("tags", []) for cell in cells]
    exercises = [i for i, tag in enumerate(tags) if "exercise" in tag]
    assert len(exercises) >= (3 if path.name < "05" else 2)
    with matplotlib.rc_context():                            # a notebook's style stays there
        for cell, tag in zip(cells, tags):
            if "setup" in tag:
                said(cell.source, names)
        for i in exercises:
            exercise, check, solution = cells[i:i + 3]
            assert "check" in tags[i + 1] and "solution" in tags[i + 2]
            right, = [part.split("```")[0] for part in solution.source.split("```python\n")[1:]]
            answers = [(exercise.source, "Not answered yet"), (right, "Right")]
            answers += [(wrong, "Wrong: ") for wrong in exercise.metadata["wrong"]]
            assert len(answers) >= 4
            for answer, verdict in answers:                  # each from a fresh start
                line = said(answer + "\n" + check.source, dict(names))
                assert line.startswith(verdict) and line.count("\n") == 1, (answer, line)

# ------------------------------------ AGFClassifier, python train_uea.py, helpers for both scripts

def call(main, *argv):                       # -> exit status, standard output, standard error
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(a) for a in argv])
    return status, out.getvalue(), err.getvalue()

uea, lra = partial(call, train_uea.main), partial(call, train_lra.main)

def one_line_error(result, *words):
    status, _, err = result
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(str(word) in err for word in words), err

def result_of(run):
    return json.loads(Path(run, "result.json").read_text())

def rows_of(run):
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

def ts(*lines, labels="true a b", more="@missing false"):
    head = ["@problemName Any", "@timeStamps false", more, f"@classLabel {labels}", "@data"]
    return "\n".join([*head, *lines, ""])

GOOD = ["1,2,3:4,5,6:a", "2,3,4:1,2,3:b", "1,2:4,5:a"]
bad = partial(ts, *GOOD)                             # a good file, and what else is in it

def waves(count, rng, shift=0.0):
    """Lines of two channels: label a is a slow wave, label b a fast one."""
    lines = []
    for i in range(count):
        wave = np.sin(np.arange(rng.integers(12, 20)) * (0.5 + i % 2) + rng.uniform(0, 6))
        channels = (wave + 0.1 * rng.standard_normal((2, len(wave))) + shift).round(4)
        lines.append(":".join(",".join(map(str, c)) for c in channels.tolist()) + ":" + "ab"[i % 2])
    return lines

def write_set(folder, name, train, test, labels="true a b"):
    Path(folder, name).mkdir(parents=True)
    for split, lines in (("TRAIN", train), ("TEST", test)):
        Path(folder, name, f"{name}_{split}.ts").write_bytes(ts(*lines, labels=labels).encode())
    return folder

FILES = ["config.json", "curves.png", "filters.png", "metrics.jsonl", "result.json", "seed-0.pt",
         "seed-1.pt"]
QUICK = ["--quick", "--steps", 4, "--batch-size", 7, "--length", 48, "--dim", 16]
SMALL = ["--dim", 16, "--heads", 2, "--kernel", 3, "--depth", 1, "--epochs", 3, "--dropout", 0.2]
TINY = dict(dim=8, heads=2, depth=1, kernel=3, epochs=2)

def fit_set(data, name, out, *flags):
    return uea("--dataset", name, "--data-dir", data, "--out", out, *SMALL, *flags)

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    rng = np.random.default_rng(0)
    return write_set(tmp_path_factory.mktemp("data"), "Toy", waves(32, rng), waves(24, rng))

@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert fit_set(toy, "Toy", out, "--seeds", 2)[0] == 0
    return out

def test_a_run_leaves_its_whole_folder_and_every_seed(toy, run):
    assert sorted(os.listdir(run)) == FILES
    result = result_of(run)
    assert (result["dataset"], result["protocol"], result["seeds"]) == ("Toy", "honest", [0, 1])
    assert result["test_accuracy_mean"] == pytest.approx(np.mean(result["test_accuracy"]))
    assert result["test_accuracy_std"] == pytest.approx(np.std(result["test_accuracy"], ddof=1))
    assert {"train_seconds", "parameters", "device", "command", "date", "versions"} <= set(result)
    assert [10 * row["seed"] + row["epoch"] for row in rows_of(run)] == [1, 2, 3, 11, 12, 13]
    X, y = train_uea.read(toy / "Toy" / "Toy_TEST.ts")           # the averaged probabilities
    shares = sum(AGFClassifier.load(run / f"seed-{seed}.pt").predict_proba(X) for seed in (0, 1))
    assert result["ensemble_accuracy"] == np.mean(np.array(["a", "b"])[shares.argmax(1)] == y)

def test_the_test_split_cannot_reach_training_but_protocol_paper_reports_it(toy, run):
    """Other test values and labels, looked at each epoch: the same weights to the last bit."""
    write_set("data", "Toy", [], ["10,20,30:4,5,6:b", "1,2,3:0,-5,9:a"] * 3)
    shutil.copy(toy / "Toy" / "Toy_TRAIN.ts", "data/Toy")
    status, out, _ = fit_set("data", "Toy", "r", "--protocol", "paper")
    one, two = (train_uea.load(Path(r, "seed-0.pt")) for r in (run, "r"))
    assert status == 0 and all(torch.equal(p, two["model"][k]) for k, p in one["model"].items())
    result, seen = result_of("r"), [row["test_accuracy"] for row in two["history"]]
    assert result["best_test_accuracy"] == [max(seen)] and result["test_accuracy"] == [seen[-1]]
    assert "optimistic" in result["best_test_accuracy_label"] and "optimistic" in out

@pytest.mark.parametrize("flags", [
    ["--mixer", "none", "--optimizer", "adam"], ["--mixer", "softmax", "--pool", "flatten"],
    ["--basis", "monomial", "--order", 2, "--augment", 0, "--mixup", 0, "--kernel", 1]])
def test_what_a_student_would_change_works(toy, flags):
    assert fit_set(toy, "Toy", "r", "--epochs", 1, *flags)[0] == 0
    settings = json.loads(Path("r/config.json").read_text())["settings"]
    assert all(settings[name[2:]] == value for name, value in zip(flags[::2], flags[1::2]))

def test_the_published_settings_are_those_of_the_paper(monkeypatch):
    sets = {}
    monkeypatch.setattr(train_uea, "run", lambda s: sets.update({s.dataset: s}))
    for name in train_uea.PAPER_SETS:
        assert uea("--preset", "paper", "--dataset", name, "--batch-size", 8)[0] == 0
        assert (sets[name].dim, sets[name].norm, sets[name].batch_size) == (512, "post", 8)
        recipe = vars(sets[name]) | dict(dim=16, hidden=16)        # each builds
        train_uea.make_model(recipe, dict(classes=["a", "b"], mean=[0.0], length=8))
    vowels = sets["JapaneseVowels"]
    assert (vowels.basis, vowels.order, vowels.optimizer) == ("legendre", 4, "radam")
    assert (vowels.identity, vowels.epochs, sets["PEMS-SF"].epochs) == (False, 100, 400)

def test_all_of_aeons_checks_of_an_estimator_pass():
    from aeon.testing.estimator_checking import check_estimator
    found = check_estimator(AGFClassifier, raise_exceptions=False, verbose=False)
    assert any("pickle" in name for name in found)
    assert len(found) > 20 and {k: v for k, v in found.items() if v != "PASSED"} == {}

@pytest.mark.parametrize("recipe", [{}, train_uea.STRONG])
def test_arrays_in_labels_out_also_of_unequal_lengths_and_in_cross_validation(recipe):
    from sklearn.model_selection import cross_val_score
    rng = np.random.default_rng(0)
    X = [np.sin(np.arange(n) * (0.5 + i % 2))[None] for i, n in enumerate(rng.integers(9, 16, 24))]
    X[3][0, 4] = np.nan
    y, state = np.array([7, -2] * 12), torch.random.get_rng_state()
    model = AGFClassifier(**TINY | dict(epochs=12, mixup=0, lr=1e-2) | recipe).fit(X, y)
    assert torch.equal(torch.random.get_rng_state(), state)        # the caller's own stays
    assert model.predict(X).tolist() == y.tolist()
    shares = model.predict_proba(X)
    assert shares.shape == (24, 2) and model.classes_.tolist() == [-2, 7]
    assert_close(np.concatenate([model.predict_proba([x]) for x in X]), shares)    # no padding
    one = AGFClassifier(**TINY | dict(batch_size=np.int64(8)))     # as a grid search gives it
    assert len(cross_val_score(one, X, np.array(["x", "y"] * 12), cv=2, error_score="raise")) == 2
    for wrong in (dict(augment=9), dict(optimizer="sgd"), dict(heads=3), dict(mixer=1), dict(a="")):
        with pytest.raises(ValueError, match=min(wrong)):
            AGFClassifier(**TINY | wrong).fit(X, y)
    for value in (np.inf, -1.7e308):                 # the second would make the deviation infinite
        X[3][0, 4] = value
        with pytest.raises(ValueError, match="series 4"):
            AGFClassifier(**TINY).fit(X, y)

def test_ctrl_c_stops_a_real_process_at_once(toy):
    flags = ["--dataset", "Toy", "--data-dir", toy, "--epochs", "5000", "--out", "r"]
    process = subprocess.Popen([sys.executable, HERE / "train_uea.py", *flags], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not Path("r/seed-0.pt").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)       # five seconds, on a machine that is not busy
    assert process.returncode == 130 and "--resume r" in out and "Traceback" not in err
    assert " of 5000 epochs" in uea("--predict", toy / "Toy/Toy_TEST.ts", "--checkpoint", "r")[2]

def test_two_runs_never_share_a_folder():
    def race(out):
        settings = train_uea.settle("", train_uea.OPTIONS, {}, dict(out=out))
        return train_uea.open_run("train_uea.py", settings, "100%d", "x")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(race, out) for out in ["one"] * 8 + [""] * 20]
    lost = [str(job.exception()) for job in jobs if job.exception()]
    assert len(lost) == 7 and all("one is there already" in error for error in lost)
    made = [str(job.result()) for job in jobs if not job.exception()]
    assert len(set(made)) == 21 and sum("100%d" in folder for folder in made) == 20

def test_predict_writes_labels_and_probabilities_or_refuses_file_and_series_never_nan(toy, run):
    _, out, _ = uea("--predict", toy / "Toy" / "Toy_TEST.ts", "--checkpoint", run)
    table = pandas.read_csv(io.StringIO(out))
    assert list(table) == ["series", "label", "p(a)", "p(b)"] and len(table) == 24
    assert table["label"].tolist() == np.where(table["p(a)"] > 0.5, "a", "b").tolist()
    assert np.mean(table["label"] == ["a", "b"] * 12) == result_of(run)["test_accuracy"][0]
    lines = ["1,2,3:4,5,6", "1,2:4,5", "", "7:8", "  ", "1,NaN,3,?:4,5,6,7", "?,?:1,nan"]
    for name in ("new.ts", "new", "new.data.csv"):   # without labels, values missing, any name
        Path(name).write_text(ts(*lines, labels="false"))
        status, out, err = uea("--predict", name, "--checkpoint", run)
        assert status == 0 and out.count("\n") == 6 and "nan" not in out, err
    values = "1e30", "-1e20", "3.4e38", "1e39", "inf", "-Infinity", "1e400"
    for line in (*(f"1,{value},3:4,5,6" for value in values), "1,2:3,4:7,7"):
        Path("new.ts").write_text(ts("1,2:3,4", line, labels="false"))
        result = uea("--predict", "new.ts", "--checkpoint", run)
        one_line_error(result, "new.ts", "series 2")
        assert result[1] == ""

def test_a_wrong_checkpoint_is_refused(toy, run, monkeypatch):
    predict = partial(uea, "--predict", toy / "Toy" / "Toy_TEST.ts")
    Path("seed-0.pt").write_bytes((run / "seed-0.pt").read_bytes()[:2000])
    one_line_error(predict("--checkpoint", "."), "not a readable checkpoint")
    nan = train_uea.load(run / "seed-0.pt")
    nan["model"]["position"] *= math.nan
    for odd in ({"a": 1}, {"recipe": dict(mixer="agf")}, [1], torch.zeros(2), {"recipe": 1}, nan):
        torch.save(odd, "other.pt")
        one_line_error(predict("--checkpoint", "other.pt"), "other.pt")
    one_line_error(predict("--checkpoint", "no.pt"), "no.pt", "No such")
    class Evil:                                      # a pickle that would make a folder
        def __reduce__(self):
            return os.mkdir, ("made",)
    torch.save(Evil(), "evil.pt")
    one_line_error(predict("--checkpoint", "evil.pt"), "not a readable checkpoint")
    assert not Path("made").exists()
    one_line_error(predict("--checkpoint", toy), toy)
    fit_set(toy, "Toy", "nine", "--seed", 9, "--seeds", 2, "--epochs", 1)
    assert AGFClassifier.load("nine").random_state == 9      # the first seed: 9 before 10
    with monkeypatch.context() as patch:             # a mixer of one's own, gone in a new process
        patch.setitem(agf.MIXERS, "mine", agf.MIXERS["none"])
        assert fit_set(toy, "Toy", "r", "--mixer", "mine")[0] == 0
    one_line_error(predict("--checkpoint", "r"), "'mine'", "unknown")

@pytest.mark.parametrize("text, word", [
    ("", "@classLabel"), ("nonsense", "@data"), ("\xff\xfe@\0d\0a\0t\0a\0", "@data"),
    (bad()[:-3], "series 3"), (ts(), "no series"), (ts(*GOOD[:1] * 3), "same label"),
    (ts("1,2:3,4", labels="false"), "@classLabel"), (ts("a", *GOOD), "series 1"),
    (ts("@data 1,2:3,4:a").replace("@data\n", ""), "no series"),
    (bad().replace("@classLabel true a b\n", ""), "@classLabel"), (bad("1,x:3,4:a"), "'x'"),
    (bad("1,2,3:4,5,6:c"), "'c'"), (bad("1,2,3:4,5,6:A"), "'A'"), (bad("1,2,3:4,5,6:"), "''"),
    (bad("1,inf,3:4,5,6:a"), "series 4"), (bad("1e39,2:3,4:a"), "series 4"),
    (bad("::a"), "series 4"), (bad("1,2:-1e999,4:b"), "series 4"), (bad("1,2:3:a"), "differ"),
    (bad("1,2,3:a"), "1 channels"), (bad("1,2:3,4:5,6:a"), "3 channels"),
    (bad(more="@dimensions 3"), "2 channels"), (bad(more="@targetLabel true"), "regression"),
    (ts("(0,-1.5),(1,2e-3):(0,1),(1,2):a"), "series 1"),
    *((bad(more=f"@{stamps}"), "timestamps") for stamps in (
        "timeStamps true", "TIMESTAMPS TRUE", "timestamps\ttrue", "timeStamps"))])
def test_a_damaged_file_gets_one_clear_line_and_no_run_folder(text, word):
    write_set("data", "Bad", GOOD, GOOD)
    file = Path("data/Bad/Bad_TRAIN.ts")
    file.write_bytes(text.encode("latin-1"))
    one_line_error(fit_set("data", "Bad", "r"), word, "" if word == "same label" else file)
    assert not Path("r").exists()

def fitted(folder, train, test, *flags, labels="true a b"):
    """The test accuracy of a longer run on these lines, FOLDER/r."""
    write_set(folder, "Odd", train, test, labels)
    flags = ["--epochs", 15, "--dropout", 0, "--mixup", 0, "--lr", 0.01, *flags]
    assert fit_set(folder, "Odd", f"{folder}/r", *flags)[0] == 0
    return result_of(f"{folder}/r")["test_accuracy"][0]

def test_a_large_offset_loses_no_signal_and_series_of_one_time_step_are_no_exception():
    rng = np.random.default_rng(1)
    assert fitted("far", waves(32, rng, -3e9), waves(16, rng, -3e9)) > 0.9
    train = [f"{(-1) ** i + i / 100}:{i / 50}:" + "ab"[i % 2] for i in range(20)] + [""]
    assert fitted("one", train, train) == 1.0        # the blank line is no series

def test_a_constant_channel_is_not_blown_up_and_missing_values_are_filled_along_time():
    X = [np.stack([np.arange(5.0) * (i + 1), np.full(5, 0.1)]) for i in range(4)]
    data = train_uea.describe(X, list("abab"))
    assert data["std"][1] == 1 and data["std"][0] > 1
    moved, _, _ = train_uea.encode([X[0] + 0.01], data, "X")
    assert abs(moved[0, :, 1] - 0.01).max() < 1e-6
    data, nan = dict(classes=["a"], length=4, mean=[1.0, 2.0], std=[2.0, 1.0]), math.nan
    x, _, _ = train_uea.encode([np.array([[nan, 3, nan, 7], [nan] * 4])], data, "X")
    assert x[0].T.tolist() == [[1, 1, 2, 3], [0] * 4]              # all missing: the mean

def test_labels_come_back_as_written_also_where_the_output_cannot_encode_them():
    names = ["Standing", "banana", "NaN", "A", "a", "?", "gehört", "日本"]
    lines = enumerate(waves(24, np.random.default_rng(0)))
    train = [line.rsplit(":", 1)[0] + ":" + names[i % 8] for i, line in lines]
    fitted("d", train, train[:8], "--epochs", 1, labels=f"true {' '.join(names)}")
    predict = "--predict", "d/Odd/Odd_TEST.ts", "--checkpoint", "d/r"
    assert set(uea(*predict)[1].split("\n")[0].split(",")) >= {f"p({name})" for name in names}
    assert AGFClassifier.load("d/r").classes_.tolist() == sorted(names)
    done = python(HERE / "train_uea.py", *predict, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and done.stdout.count("\n") == 9

def test_list_names_exactly_what_dataset_finds_and_what_is_not_here_is_told_truly(monkeypatch):
    def no_network(name, split, extract_path):
        raise OSError("no route to host")
    monkeypatch.setattr("aeon.datasets.load_classification", no_network)
    one_line_error(uea("--dataset", "Libras"), "Libras.zip", "no route")
    for name in ("xyzzy", "../Toy"):
        one_line_error(uea("--dataset", name), name, "--list")
    assert os.listdir() == []
    for name in ("100%d", "Long", "Half", "BasicMotions"):
        write_set("data", name, GOOD, GOOD)
    with open("data/Long/Long_TRAIN.ts", "r+b") as file:
        file.truncate(2**32)                         # a sparse file of 4 GB: never read whole
    for name in ("Half", "BasicMotions"):            # yours hides aeon's, also when it is damaged
        Path(f"data/{name}/{name}_TEST.ts").unlink()
    Path("data/Dir/Dir_TRAIN.ts").mkdir(parents=True)
    os.symlink("nowhere", "data/Gone")
    status, out, _ = uea("--list")
    assert status == 0 and set(out.split()) >= {"JapaneseVowels", "ArrowHead", "100%d", "Long"}
    assert not set(out.split()) & {"Half", "Dir", "Gone", "BasicMotions"}
    assert fit_set("data", "100%d", "r")[0] == 0
    Path("data/Libras").mkdir()                      # is not downloaded over what is there
    one_line_error(uea("--dataset", "Libras"), "Libras_TRAIN.ts", "No such")
    one_line_error(uea("--dataset", "BasicMotions"), "BasicMotions_TEST.ts", "No such")
    write_set("data", "Odd", GOOD, ["1,2:3,4:c"], labels="true a b c")
    one_line_error(uea("--dataset", "Odd"), "Odd_TEST.ts", "'c'")

def test_an_output_that_cannot_be_written_is_one_line():
    command = f"env -u PYTHONUNBUFFERED {sys.executable} {HERE / 'train_uea.py'} --list > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    one_line_error((done.returncode, "", done.stderr), "No space left")

def test_compile_without_a_compiler_is_one_line(toy):
    done = python(HERE / "train_uea.py", "--dataset", "Toy", "--data-dir", toy, "--compile",
                  "--out", "r", CXX="no-such-one", TORCHINDUCTOR_CACHE_DIR="cache")
    one_line_error((done.returncode, done.stdout, done.stderr), "--compile")
    assert not Path("r").exists()

def test_hundreds_of_mutated_files_give_a_user_error_or_a_finite_result(run):
    rng, path, good = random.Random(0), Path("mutant.ts"), 0
    classifier = AGFClassifier.load(run)
    whole = ts(*waves(6, np.random.default_rng(0)), more="@dimensions 2")
    pieces = ["NaN", "?", "1e400", "1e38", "-1e-320", "\n", "true", "false", "\0", "é", "\udcff",
              "@data\n", "@classLabel true a b\n", "0x1", "--1", *":,@#( a0123456789"]
    for _ in range(400):
        i = rng.randrange(len(whole))
        j = i + rng.choice([0, 1, 1, 3, 40])
        text = whole[:i] + rng.choice([*pieces, whole[j:j + 30], ""]) + whole[j:]
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            series, _ = train_uea.read(path, need_labels=False)
            assert np.isfinite(classifier._predict_proba(series, path)).all()
            good += 1
        except train_uea.UserError as error:
            assert "\n" not in str(error) and "mutant.ts" in str(error)
    assert 20 < good < 380                           # both ends were reached

# ------------------ python train_lra.py; at the end: mistakes, stops and resumes of both scripts

def options(task, *argv):
    return train_lra.settings([str(a) for a in ("--task", task, *argv)])

def load(task, length=1024):
    return train_lra.load_task(options(task, "--length", length))

def lra_error(task, *words):
    one_line_error(lra("--task", task, "--out", "run", "--steps", 1), *words)
    assert not Path("run").exists()

def texts(*splits):
    return {bytes(row[0, :size[0]].tolist()): int(label)
            for split in splits for row, size, label in zip(*split)}

def tar(name, files):
    for file, data in files.items():
        Path("tar", file).parent.mkdir(parents=True, exist_ok=True)
        Path("tar", file).write_bytes(data)
    return Path(shutil.make_archive(f"data/{name}", "gztar", "tar"))

def words_of(text):
    return text.replace("(", "").replace(")", "").split()

def tree_of(text):
    """[MAX 1 [MIN 2 3 ] ] -> ("MAX", 1, ("MIN", 2, 3)), by Python's own parser."""
    words = [f'("{word[1:]}"' if word[0] == "[" else word for word in words_of(text)]
    return ast.literal_eval(",".join(words).replace("]", ")"))

def retold(tree, nodes, depth=1):
    """-> its official text, its value. An argument or ] makes a pair with all that is before it."""
    nodes.append((tree, depth))
    if isinstance(tree, int):
        return str(tree), tree
    text, v = f"[{tree[0]}", []
    for argument in tree[1:]:
        part, value = retold(argument, nodes, depth + 1)
        text, v = f"( {text} {part} )", [*v, value]
    value = dict(MIN=min(v), MAX=max(v), MED=int(np.median(v)), SM=sum(v) % 10)[tree[0]]
    return f"( {text} ] )", value

def test_listops_has_the_official_form_and_odds_and_an_independent_evaluators_targets():
    lines, again, other = map(train_lra.listops_lines, (1, 1, 2))
    assert next(lines) == next(again) != next(other)
    for text, target in (next(lines).split("\t") for _ in range(60)):
        assert retold(tree_of(text), []) == (text, int(target))
        assert 500 < len(words_of(text)) < 2000
    draw, nodes = random.Random(3).random, []
    for _ in range(200):                             # of any length: each choice has its odds
        words = []
        train_lra.draw_tree(draw, words)
        retold(tree_of(" ".join(words)), nodes)
    operators = [tree for tree, _ in nodes if isinstance(tree, tuple)]
    digits = [tree for tree, _ in nodes if isinstance(tree, int)]
    free = [isinstance(tree, tuple) for tree, depth in nodes if 1 < depth < 10]
    assert max(depth for _, depth in nodes) == 10
    for values, odds in [([tree[0] for tree in operators], [1 / 4] * 4), (free, [3 / 4, 1 / 4]),
                         ([len(tree) for tree in operators], [1 / 9] * 9), (digits, [1 / 10] * 10)]:
        counts = np.unique(values, return_counts=True)[1]
        assert stats.chisquare(counts, len(values) * np.array(odds)).pvalue > 1e-3

def test_listops_files_are_all_there_or_none_and_come_back_as_tokens(monkeypatch):
    monkeypatch.setattr(train_lra, "COUNTS", dict(train=30, val=10, test=10))
    with pytest.raises(KeyError), monkeypatch.context() as patch:
        patch.setattr(train_lra, "draw_tree", lambda *a: {}["a crash, a full disk"])
        load("listops")
    assert os.listdir("data/lra_release") == []
    splits = load("listops", 2000)
    folder, = Path("data/lra_release").iterdir()
    for split, (part, count) in zip(splits, train_lra.COUNTS.items()):
        _, *lines = (folder / f"basic_{part}.tsv").read_text().splitlines()
        assert len(set(lines)) == len(split[0]) == count
        for (x, sizes, y), line in zip(zip(*split), lines):
            words = [train_lra.WORDS[i - 1] for i in x[0, :sizes[0]].tolist()]
            assert words == words_of(line.split("\t")[0]) and y == int(line[-1])
    path, first = folder / "basic_test.tsv", "Source\tTarget\n1\t1\n2\t2\n"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))      # a Windows copy
    assert texts(load("listops", 2000)[2]) == texts(splits[2])
    for line in ("( [MIX 1 ) 2 ) ] )\t1", "( [MIN 1 ) ]", "", "]\t]"):
        path.write_text(f"{first}{line}\n4\t4\n")
        lra_error("listops", "basic_test.tsv, line 4")
    for text in ("Source\tTarget\n", f"{first}1\t12\n", f"{first}1\t-1\n"):
        path.write_text(text)
        lra_error("listops", "no listops samples", "label", "data")

def test_text_reads_the_archive_without_a_macs_files_and_takes_dev_from_train(capsys):
    review = {f"aclImdb/{part}/{name}/{i}_7.txt": f"{part} {name} {'great' * i}".encode()
              for part in ("train", "test") for name in ("pos", "neg") for i in range(10)}
    other = ("train/unsup/1_0.txt", "README", "train/urls_pos.txt", "train/pos/._1_7.txt")
    path = tar("aclImdb_v1", review | {f"aclImdb/{name}": b"x" for name in other})
    train, dev, test = load("text", 30)
    assert "not the official archive" in capsys.readouterr().out
    assert [len(split[0]) for split in (train, dev, test)] == [18, 2, 20]
    for part, found in (("train", texts(train, dev)), ("test", texts(test))):
        assert found == {text[:30]: int("/pos/" in name) for name, text in review.items()
                         if f"/{part}/" in name}
    path.write_bytes(path.read_bytes()[:300])        # a broken download
    lra_error("text", "aclImdb_v1.tar.gz: fetch")

def test_image_reads_grey_pixels_and_opens_pickles_of_the_official_archive_only(monkeypatch):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3, 1024), dtype=np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {f"cifar-10-batches-py/{name}": pickle.dumps(
                {b"data": x.reshape(4, 3072), b"labels": [i, 1, 2, 9]}, 2)
             for i, (name, x) in enumerate(zip(names, rgb))}
    path = tar("cifar-10-python", files | {"cifar-10-batches-py/batches.meta": b"junk"})
    lra_error("image", "cifar-10-python.tar.gz", "SHA-256")
    with monkeypatch.context() as patch:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        patch.setitem(train_lra.ARCHIVES, path.name, ("", digest))
        train, dev, test = load("image")
    assert sorted([*train[2].tolist(), *dev[2].tolist()]) == sorted([*range(5), *[1, 2, 9] * 5])
    x, y = test[0][:, 0].numpy(), test[2].numpy()
    assert len(dev[0]) == 2 and y.tolist() == [5, 1, 2, 9]
    assert np.abs(x - np.einsum("ncp,c->np", rgb[5], [0.299, 0.587, 0.114])).max() <= 0.5 + 1e-9
    grey = dict(train_x=x, train_y=y, test_x=x, test_y=y)
    np.savez("data/cifar10_gray.npz", **grey)
    assert texts(load("image")[2]) == texts(test)
    for damage, words in ((dict(test_x=x[:2]), "cifar10_gray.npz"), (dict(test_y=y + 9), "label"),
                          (dict(test_x=x / 255), "float64"), (dict(train_y=np.eye(4)), "float64")):
        np.savez("data/cifar10_gray.npz", **grey | damage)
        lra_error("image", words)

def test_retrieval_keeps_pythons_wrapper_and_compares_two_documents_by_one_encoder():
    folder = Path("data/lra_release/lra_release/tsv_data")
    folder.mkdir(parents=True)
    for i, part in enumerate(("train", "eval", "test")):
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(
            f"{j % 2}.0\tP{j}\tQ{j}\tb'first {part}'\tb'a\\n'\n" for j in range(i + 3)))
    splits = load("retrieval", 9)
    assert [len(split[0]) for split in splits] == [3, 4, 5] and splits[1][2].tolist() == [0, 1] * 2
    x, keep, _ = train_lra.batch(splits[0], torch.tensor([2, 1]), torch.device("cpu"))
    assert bytes(x[0, 0].tolist()) == b"b'first t"
    assert bytes(x[0, 1][keep[0, 1]].tolist()) == b"b'a\\n'"
    model = train_lra.make_model(options("retrieval", "--length", 9)).eval()
    logits, ortho = model(x, keep)
    one, two = (agf.AGFTransformer.forward(model, x[:, i], keep[:, i])[0] for i in (0, 1))
    assert_close(logits, model.compare(torch.cat([one, two, one * two, one - two], 1)))
    assert logits.shape == (2, 2) and ortho.shape == (2,)
    (folder / "new_aan_pairs.test.tsv").write_text("1.0\tP\tQ\tonly one\n")
    lra_error("retrieval", "new_aan_pairs.test.tsv, line 1")

def test_pathfinder_reads_32_x_32_images_only_and_sees_changed_metadata():
    from PIL import Image                            # comes with matplotlib
    folder = Path("data/lra_release/pathfinder32/curv_contour_length_14")
    (folder / "metadata").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    for j in range(20):
        Image.fromarray(pixels[j]).save(folder / f"{j}.png")
    lines = [f". {j}.png {j} {j % 2} 1.8 6 2.0 5 1.5 14 1 1\n" for j in range(20)]
    for count, sizes in ((20, [16, 2, 2]), (10, [8, 1, 1])):
        (folder / "metadata" / "0.npy").write_text("".join(lines[:count]))
        splits = load("pathfinder")
        assert [len(split[0]) for split in splits] == sizes
        assert texts(*splits) == {pixels[j].tobytes(): j % 2 for j in range(count)}
    Image.fromarray(np.zeros((64, 16), np.uint8)).save(folder / "3.png")
    for image, words in ((3, "32 x 32"), (99, "No such file")):
        (folder / "metadata" / "0.npy").write_text(f"{lines[0]}. {image}.png 0 1\n")
        lra_error("pathfinder", "0.npy, line 2", words)

def test_missing_data_says_what_to_put_where_and_a_wrong_checksum_is_refused(monkeypatch):
    page = Path("page").absolute()
    page.write_bytes(b"an error page")
    for task, name in (("text", "aclImdb_v1.tar.gz"), ("image", "cifar-10-python.tar.gz")):
        digest = train_lra.ARCHIVES[name][1]
        monkeypatch.setitem(train_lra.ARCHIVES, name, (page.as_uri(), digest))
        lra_error(task, Path("data", name), "invalid hash", page.as_uri(), "web.arch")
    for task, name in (("retrieval", "new_aan_pairs.train.tsv"), ("pathfinder", "length_14")):
        lra_error(task, name, "lra_release.gz", "7.7 GB", "in data")
    assert os.listdir("data") == []
    Path("data/lra_release").write_bytes(b"the archive, unzipped")
    for task, words in (("retrieval", "untar"), ("pathfinder", "untar"), ("listops", "exists")):
        lra_error(task, "lra_release", words)

def quick_run(task, out, *flags):
    return lra("--task", task, "--out", out, *QUICK, *flags)

@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    run = tmp_path_factory.mktemp("lra") / "run"
    status, out, err = quick_run("listops", run, "--seeds", 2)
    assert status == 0 and out.count("means nothing") == 2, err
    return run

def test_a_quick_run_leaves_its_folder_and_the_test_accuracy_of_the_best_dev_model(quick):
    assert sorted(os.listdir(quick)) == FILES
    result, rows, s = result_of(quick), rows_of(quick), options("listops", *QUICK)
    assert {"task", "mixer", "preset", "seeds", "test_accuracy_std", "command"} <= set(result)
    assert [10 * row["seed"] + row["step"] for row in rows] == [1, 2, 3, 4, 11, 12, 13, 14]
    model, splits = train_lra.make_model(s).eval(), train_lra.load_task(s)
    for seed in (0, 1):
        state = torch.load(quick / f"seed-{seed}.pt")
        dev = [row["dev_accuracy"] for row in rows if row["seed"] == seed]
        assert result["dev_accuracy"][seed] == max(dev)
        assert result["best_step"][seed] == 1 + dev.index(max(dev)) == state["best_step"]
        model.load_state_dict(state["best_model"])
        for name, split in zip(("dev_accuracy", "test_accuracy"), splits[1:]):
            hits = [model(row[:, :size].long())[0].argmax() == label     # one by one, by hand
                    for row, size, label in zip(*split)]
            assert np.mean(hits) == pytest.approx(result[name][seed])

@pytest.mark.parametrize("task, flags, shape", [
    ("text", ["--mixer", "softmax"], (48,)), ("pathfinder", ["--mixer", "none"], (48,)),
    ("retrieval", ["--mixer", "usv", "--micro-batch", 3], (2, 48)),
    ("image", ["--preset", "laptop"], (48,))])
def test_every_task_runs_in_bfloat16_compiled_once(monkeypatch, task, flags, shape):
    seen, autocast = set(), torch.autocast
    def compile(net, **how):
        return lambda x, *args: seen.add((*x.shape[1:], net(x, *args)[0].dtype)) or net(x, *args)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "autocast", lambda kind, *dtype, enabled: autocast(
        kind, *dtype, enabled=bool(dtype)))
    status, _, err = quick_run(task, "r", "--steps", 2, "--compile", *flags)   # a trial, the run
    assert status == 0 and seen == {(torch.float32,), (*shape, torch.bfloat16)}, err

def test_a_batch_that_does_not_fit_is_halved_and_said_with_the_same_losses(monkeypatch):
    assert quick_run("text", "whole", "--dropout", 0)[0] == 0
    real, sizes = agf.AGFTransformer.forward, []

    def forward(self, x, keep=None):
        sizes.append(len(x))
        if self.training and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, x, keep)
    monkeypatch.setattr(agf.AGFTransformer, "forward", forward)
    status, out, err = quick_run("text", "r", "--dropout", 0)
    assert status == 0 and "4 samples at once" in out and "2 samples at once" in out, err
    assert sizes[:6] == [7, 4, 2, 2, 2, 1] and 7 not in sizes[1:]
    one, two = ([row["loss"] for row in rows_of(run)] for run in ("r", "whole"))
    assert one == pytest.approx(two, rel=1e-5)

@pytest.mark.parametrize("mixer", ["agf", "none"])
def test_torchrun_with_two_processes_ends_where_one_does(mixer, monkeypatch):
    """Of 7 the second process has 3 and an empty part. A thread left over can abort an exit."""
    flags = ["--mixer", mixer, "--dropout", 0, "--micro-batch", 1]
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    Path("worker.py").write_text(
        "import glob, sys, train_lra; status, names = train_lra.main(), '/proc/self/task/*/comm'\n"
        "sys.exit(status or 'gloo' in str([open(name).read() for name in glob.glob(names)]))")
    script = ["worker.py", "--task", "text", "--out", "two", *QUICK, *flags]
    torchrun(["--standalone", "--nproc-per-node=2", *map(str, script)])
    assert quick_run("text", "one", *flags)[0] == 0
    for one, two in zip(rows_of("one"), rows_of("two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    one, two = (torch.load(f"{run}/seed-0.pt")["model"] for run in ("one", "two"))
    assert_close(one, two, rtol=0, atol=1e-5)
    assert result_of("one")["test_accuracy"] == result_of("two")["test_accuracy"]
    assert result_of("two")["processes"] == 2

@pytest.mark.parametrize("given", [
    dict(RANK="1"), dict(RANK=""), dict(WORLD_SIZE="2"), dict(RANK="one", WORLD_SIZE="2"),
    dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1"), {}])
def test_without_torchruns_variables_it_is_one_process_and_says_so(given, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert train_lra.find_processes() == (0, 1, 0)
    err = capsys.readouterr().err
    assert err.count("\n") == bool(given) and all(name in err for name in given)

def test_the_lra_settings_and_schedule_are_the_published_ones():
    found = {task: options(task) for task in train_lra.TASKS}
    names = ("length", "batch_size", "steps", "order", "a", "b", "gamma")
    assert {task: tuple(getattr(s, name) for name in names) for task, s in found.items()} == dict(
        listops=(2000, 32, 5000, 5, 2, -1, 1e-2), text=(1024, 32, 20000, 5, 2, -2, 1e-2),
        retrieval=(4000, 32, 30000, 5, 2, -1.5, 1e-4), image=(1024, 256, 35000, 6, 1.5, 2, 0.1),
        pathfinder=(1024, 256, 62400, 4, 1.5, -1, 1e-4))
    assert [round(s.warmup * s.steps) for s in found.values()] == [1000, 8000, 800, 175, 312]
    for s in found.values():
        c = train_lra.make_model(s).config
        assert (c.dim, c.depth, c.heads, c.hidden, c.head) == (64, 2, 2, 128, 128)
        assert c.identity and c.norm == "pre" and c.pool == "mean" and s.lr == 1e-4
    assert quick_run("image", "r", "--steps", 20, "--warmup", 0.25)[0] == 0
    rates = [*np.linspace(4e-6, 1e-4, 6)[:-1], *np.linspace(1e-4, 4e-10, 16)[:-1]]
    assert [row["lr"] for row in rows_of("r")] == pytest.approx(rates)

@pytest.mark.parametrize("script, flags, word", [
    *((uea, ["--dataset", "Toy", *flags], word) for flags, word in [
        (["--order", -1], "order"), (["--heads", 3], "heads must"), (["--order", "many"], "many"),
        (["--dim", 0], "dim"), (["--mixer", "agff"], "agff"), (["--epochs", -1], "epochs"),
        (["--a", -2, "--b", -1], "a=-2"), (["--lr", "nan"], "lr"), (["--seeds", 0], "seeds"),
        (["--device", "warp"], "--device warp"), (["--preset", "paper"], "Heartbeat"),
        (["--lrr", 3], "--lrr"), (["--seed", "1e23"], "--seed"), (["--seed", 10**23], "seed"),
        (["--augment", 50], "augment"), (["--pool", "max"], "pool"), (["--device", "meta"], "meta"),
        (["--dropout", 1.5], "dropout"), (["--mixup", "inf"], "mixup"), (["--dim", 10**6], "built"),
        (["--kernel", 4], "kernel"), (["--batch-size", 0], "size"), (["--dim", 10**22], "dim"),
        (["--checkpoint", "r"], "--predict"), (["--out", "/dev/null/r"], "dev")]),
    (uea, [], "--dataset Jap"), (lra, [], "which task"), (lra, ["--task", "listop"], "listop"),
    (uea, ["--predict", 1], "--checkpoint"), (lra, ["--task", "text", "--heads", 3], "heads must"),
    (lra, ["--task", "text", "--warmup", 2], "warmup 2")])
def test_a_mistaken_option_gets_one_clear_line_that_blames_it(toy, script, flags, word):
    one_line_error(script("--data-dir", toy, "--out", "r", *flags), word)
    assert not Path("r").exists()

@pytest.mark.parametrize("script", [uea, lra])
def test_a_full_disk_is_one_line_and_resume_goes_on_to_the_same_numbers_also_after_ctrl_c(
        script, toy, run, quick, monkeypatch):
    whole, begin = (run, partial(fit_set, toy, "Toy")) if script is uea else (
        quick, partial(quick_run, "listops"))
    real, saved = torch.save, []

    def save(state, path):
        saved.append(path)
        if len(saved) == 1:
            shutil.rmtree("r")
        if len(saved) == 7:                          # in the second seed
            raise RuntimeError("PytorchStreamWriter failed writing file")
        if len(saved) == 8:
            raise KeyboardInterrupt
        real(state, path)
    monkeypatch.setattr(torch, "save", save)
    one_line_error(begin("r", "--seeds", 2), "seed-0.pt", "folder gone")
    one_line_error(begin("r", "--seeds", 2), "seed-1.pt", "disk full")
    shutil.copytree(toy, "moved")
    resume = partial(script, "--resume", "r", "--data-dir", "moved", "--dim", 16)
    assert resume()[0] == 130 and not Path("r/result.json").exists()
    for _ in range(2):                               # a finished run only evaluates again
        assert resume()[0] == 0 and rows_of("r") == rows_of(whole)
        for key in {"seeds", "test_accuracy", "dev_accuracy", "best_step", "ensemble_accuracy"}:
            assert result_of("r").get(key) == result_of(whole).get(key)
        Path("r/result.json").write_text("\x00")     # an odd one is written anew
    one, two = (train_uea.load(Path(folder, "seed-1.pt"))["model"] for folder in ("r", whole))
    assert_close(one, two, rtol=0, atol=0)

def test_resume_refuses_odd_folders_other_options_also_defaults_and_other_data(
        toy, run, quick, monkeypatch):
    for odd in ("nowhere", toy, run / "config.json"):
        one_line_error(uea("--resume", odd), odd)
    config = shutil.copytree(run, "r") / Path("config.json")
    good = json.loads(config.read_text())
    settings = good["settings"]
    for odd in ([], {}, {"settings": 3}, good | dict(script="train_lra.py"),
                good | dict(settings=dict(dim=3)), good | dict(settings=settings | dict(seed="x")),
                good | dict(settings=settings | dict(dim=16.5))):
        config.write_text(json.dumps(odd))
        one_line_error(uea("--resume", "r"), "--resume")
    config.write_text(json.dumps(good | dict(settings=settings | dict(mixer="softmax", seed=3))))
    for flags in (["--mixer", "agf"], ["--seed", 0], ["--epochs", 9], ["--compile"]):
        one_line_error(uea("--resume", "r", *flags), flags[0][2:])
    for flags in (["--mixer", "softmax"], ["--steps", 5], ["--task", "text"]):
        one_line_error(lra("--resume", quick, *flags), flags[0][2:])
    config.write_text(json.dumps(good))
    other = train_uea.load("r/seed-1.pt")
    shutil.copytree(quick, "q")
    for odd in ([1, 2], {"a": 1}, {}, "text", {"history": [], "seconds": 0, "model": 3}, other):
        for script, folder in ((uea, "r"), (lra, "q")):
            torch.save(odd, f"{folder}/seed-0.pt")
            one_line_error(script("--resume", folder), "seed-0.pt")
    for split, old, new in [("TRAIN", ":a", ":b"), ("TEST", ":a", ":b"), ("TRAIN", "0.1", "0.2")]:
        file = shutil.copytree(toy, f"{split}{new[-1]}") / Path("Toy", f"Toy_{split}.ts")
        file.write_text(file.read_text().replace(old, new, 3))
        one_line_error(uea("--resume", "r", "--data-dir", file.parents[1]), "data changed")
    monkeypatch.setitem(train_lra.CLASSES, "listops", 9)     # other labels
    one_line_error(lra("--resume", quick), "data changed")
