"""Each test is named after the claim it proves. Offline, on the CPU, under two minutes."""

from functools import partial
from pathlib import Path
import ast
import concurrent.futures
import contextlib
import copy
import csv
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
import socket
import subprocess
import sys
import time

from torch import nn
from torch.nn.utils import parametrizations, prune
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

import agf
import train_lra
import train_uea
from train_uea import AGFClassifier

HERE = Path(__file__).parent
# a, b of every published setting
PUBLISHED = [(1.5, -1.5), (2, 0.5), (1, 0.2), (1.5, 2), (1.5, 1), (2, 1.5), (1, 0), (0, 0),
             (-0.5, -0.5), (2, -1), (2, -2), (2, -1.5), (1.5, -1)]

def random_keep(B, n, generator=None):
    """Right padding, each row with at least one real token, row 0 full."""
    lengths = torch.randint(1, n + 1, (B,), generator=generator)
    lengths[0] = n
    return torch.arange(n) < lengths[:, None]

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

# ---------------------------------------------------------------------------- basis and filter

def printed_recurrence(k, x, a, b):
    """P_k exactly as printed in the paper, one number at a time, by recursion: slow and obvious."""
    if k == 0:
        return 1.0
    if k == 1:
        return (a - b) / 2 + (a + b + 2) / 2 * x
    c = 2 * k + a + b
    right = ((c - 1) * (c * (c - 2) * x + a ** 2 - b ** 2) * printed_recurrence(k - 1, x, a, b)
             - 2 * (k + a - 1) * (k + b - 1) * c * printed_recurrence(k - 2, x, a, b))
    return right / (2 * k * (k + a + b) * (c - 2))

@pytest.mark.parametrize("a, b", PUBLISHED)
def test_jacobi_is_the_printed_recurrence(a, b):
    x = torch.rand(2, 3, dtype=torch.float64)
    P = agf.jacobi(x, 6, a, b)
    assert P.shape == (7, 2, 3)
    slow = [[[printed_recurrence(k, v.item(), a, b) for v in row] for row in x] for k in range(7)]
    torch.testing.assert_close(P, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize("a, b", [(1.0, 0.0), (0.0, 0.0), (2.0, 1.5), (-0.5, -0.5)])
def test_jacobi_is_orthogonal_under_its_weight(a, b):
    nodes, weights = scipy.special.roots_jacobi(30, a, b)          # Gauss quadrature, exact here
    P = agf.jacobi(torch.from_numpy(nodes), 8, a, b).numpy()
    gram = np.einsum("kx,jx,x->kj", P, P, weights)
    off = gram - np.diag(np.diag(gram))
    assert abs(off).max() < 1e-12 * np.diag(gram).max() and np.diag(gram).min() > 0

@pytest.mark.parametrize("order, a, b, words", [
    (-1, 1, 0, "-1"), (3, -1.5, -0.5, "a=-1.5, b=-0.5"), (4, -2, -2, "k=3"), (2.5, 1, 0, "2.5"),
    (3, math.nan, 0, "nan")])
def test_an_undefined_basis_is_refused_with_its_values(order, a, b, words):
    with pytest.raises(ValueError, match=words):
        agf.jacobi(torch.zeros(2), order, a, b)
    with pytest.raises(ValueError, match=words):
        agf.JacobiFilter(order, "jacobi", a, b)
    with pytest.raises(ValueError, match="fourier"):
        agf.JacobiFilter(3, "fourier")

def slow_filter(filter, s):
    """sum_k theta_k T_k(s) from scipy-free, textbook pieces, independent of agf's evaluation."""
    a, b = {"legendre": (0, 0), "chebyshev": (-0.5, -0.5)}.get(filter.basis, (filter.a, filter.b))
    theta = torch.tanh(filter.theta)
    total = torch.zeros_like(s)
    for k in range(filter.order + 1):
        T = s ** k if filter.basis == "monomial" else printed_recurrence(k, s, a, b)
        total = total + (1.0 if k == 0 and filter.identity else theta[k]) * T
    return total

@pytest.mark.parametrize("basis", agf.BASES)
@pytest.mark.parametrize("order", [0, 1, 2, 5, 10, 14])
@pytest.mark.parametrize("identity", [True, False])
def test_the_fast_filter_is_the_definition_in_values_and_gradients(basis, order, identity):
    filter = agf.JacobiFilter(order, basis, 1.5, -1.5, identity).double()
    nn.init.normal_(filter.theta)
    s = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 7, dtype=torch.float64)
    found = []
    for p in (filter(s), filter.plain(s), slow_filter(filter, s)):
        assert p.shape == s.shape
        total = (p * weight).sum() + 0 * filter.theta.sum() + 0 * s.sum()
        found.append([p, *torch.autograd.grad(total, [s, filter.theta])])
    for other in found[:2]:
        for mine, slow in zip(other, found[2]):
            torch.testing.assert_close(mine, slow, rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize("a, b", PUBLISHED)
def test_float32_is_enough_for_every_published_setting_at_order_10(a, b):
    filter = agf.JacobiFilter(10, "jacobi", a, b)
    s = torch.rand(4096, dtype=torch.float64)
    for _ in range(5):
        nn.init.normal_(filter.theta)
        exact = copy.deepcopy(filter).double()
        exact.theta.data = filter.theta.data.double()
        p = exact.plain(s)
        assert (filter(s.float()) - p).abs().max() < 1e-5 * p.abs().max()

def test_the_plain_filter_bears_second_derivatives_and_the_fast_one_refuses():
    filter = agf.JacobiFilter(4, "jacobi", 2, -1.5).double()
    nn.init.normal_(filter.theta)
    s = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(filter.plain, (s,))
    first, = torch.autograd.grad(filter(s).square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

def test_the_gram_matrix_has_right_first_and_second_derivatives():
    U = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(agf.Gram.apply, (U,))
    assert torch.autograd.gradgradcheck(agf.Gram.apply, (U,))

def test_the_filter_starts_as_one_or_as_zero():
    s = torch.rand(5)
    assert torch.equal(agf.JacobiFilter(identity=True)(s), torch.ones(5))
    assert torch.equal(agf.JacobiFilter(identity=False)(s), torch.zeros(5))

# -------------------------------------------------------------------------------- loss and mixer

def slow_loss(U, V, keep):
    """The orthogonality loss, sample by sample and head by head, on the real tokens alone."""
    rows = []
    for u, v, k in zip(U, V, keep):
        heads = []
        for i in range(len(u)):
            uu, vv = u[i][k], v[i][k]
            eye = torch.eye(uu.shape[1], dtype=U.dtype)
            heads.append((uu.T @ uu - eye).abs().mean() + (vv.T @ vv - eye).abs().mean())
        rows.append(torch.stack(heads).mean())
    return torch.stack(rows)

def test_the_orthogonality_loss_is_its_formula_on_real_tokens():
    U, V = torch.randn(2, 3, 2, 9, 4, dtype=torch.float64)
    keep = random_keep(3, 9)
    torch.testing.assert_close(agf.orthogonality_loss(U, V, keep), slow_loss(U, V, keep))
    torch.testing.assert_close(agf.orthogonality_loss(U, V), slow_loss(U, V, torch.ones(3, 9) > 0))
    Q = torch.linalg.qr(torch.randn(1, 1, 9, 4, dtype=torch.float64)).Q
    assert agf.orthogonality_loss(Q, Q).item() < 1e-14

def slow_agf(mixer, x, keep):
    """The paper's formulas with an explicit n x n matrix for each sample and head."""
    h, d = mixer.heads, x.shape[-1] // mixer.heads
    outs, losses = [], []
    for X, real in zip(x, keep):
        X = X[real]                                          # only real tokens exist
        heads, loss = [], 0
        for i in range(h):
            def mapped(name):
                proj = getattr(mixer, name)
                return X @ proj.weight[i * d:(i + 1) * d].T + proj.bias[i * d:(i + 1) * d]
            U, V = torch.exp(mapped("U_proj")), torch.exp(mapped("V_proj"))
            U, V, p = U / U.sum(1, keepdim=True), V / V.sum(0, keepdim=True), 1.0
            if mixer.filter is not None:
                s = 1 / (1 + torch.exp(-mapped("s_proj")))
                p = s if isinstance(mixer.filter, nn.Identity) else slow_filter(mixer.filter, s)
            heads.append((U * p) @ V.T @ mapped("value_proj"))              # (n x n) first
            loss = loss + slow_loss(U[None, None], V[None, None], torch.ones(1, len(X)) > 0)
        out = torch.zeros_like(x[0])
        out[real] = mixer.out_proj(torch.cat(heads, 1))
        outs.append(out)
        losses.append(loss / h)
    return torch.stack(outs), torch.cat(losses)

@pytest.mark.parametrize("name", ["agf", "uv", "usv"])
@pytest.mark.parametrize("padded", [False, True])
def test_linear_form_equals_dense_form_in_values_and_gradients(name, padded):
    mixer = agf.MIXERS[name](12, 3).double()
    if name == "agf":
        nn.init.normal_(mixer.filter.theta)
    x = torch.randn(4, 10, 12, dtype=torch.float64, requires_grad=True)
    keep = random_keep(4, 10) if padded else None
    weight = torch.randn(4, 10, 12, dtype=torch.float64)
    found = []
    real = torch.ones(4, 10) > 0 if keep is None else keep
    for out, ortho in (mixer(x, keep), slow_agf(mixer, x, real)):
        total = (out * weight).sum() + ortho.sum()
        found.append([out, ortho, *torch.autograd.grad(total, [x, *mixer.parameters()])])
    for fast, slow in zip(*found):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize("name", ["agf", "uv", "usv", "softmax"])
def test_matrix_is_the_matrix_that_forward_never_builds(name):
    mixer = agf.MIXERS[name](12, 3).double()
    if name == "agf":
        nn.init.normal_(mixer.filter.theta)
    x, keep = torch.randn(2, 9, 12, dtype=torch.float64), random_keep(2, 9)
    for mask in (None, keep):
        A = mixer.matrix(x, mask)
        value = mixer.factors(x, mask)[2 if name == "softmax" else 3]
        assert A.shape == (2, 3, 9, 9)
        out = agf.hide_padding(mixer.out_proj((A @ value).transpose(1, 2).reshape(2, 9, 12)), mask)
        torch.testing.assert_close(out, mixer(x, mask)[0], rtol=1e-11, atol=1e-12)

def test_gradcheck_of_the_mixer():
    mixer = agf.AGFAttention(6, 2, order=3).double()
    nn.init.normal_(mixer.filter.theta)
    x, keep = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True), random_keep(2, 4)
    params = dict(mixer.named_parameters())
    def call(x, *values):
        return torch.func.functional_call(mixer, dict(zip(params, values)), (x, keep))
    values = [p.detach().clone().requires_grad_() for p in params.values()]
    assert torch.autograd.gradcheck(call, (x, *values), atol=1e-6)

def test_uv_is_row_stochastic_and_is_efficient_attention():
    mixer = agf.AGFAttention(16, 2, order=0).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    U, s, V, value = mixer.factors(x)
    assert U.shape == V.shape == value.shape == (2, 2, 11, 8)
    assert s is None and not hasattr(mixer, "s_proj")
    torch.testing.assert_close(U.sum(-1), torch.ones(2, 2, 11, dtype=torch.float64))
    torch.testing.assert_close(V.sum(-2), torch.ones(2, 2, 8, dtype=torch.float64))
    torch.testing.assert_close(mixer.matrix(x).sum(-1), torch.ones(2, 2, 11, dtype=torch.float64))
    # Efficient Attention (Shen et al. 2021), from its own formula: softmax(Q) (softmax(K)^T V)
    query, key, val = mixer.U_proj(x), mixer.V_proj(x), mixer.value_proj(x)
    cut = lambda t: t.reshape(2, 11, 2, 8)
    context = torch.einsum("bnhd,bnhe->bhde", cut(key).softmax(1), cut(val))
    theirs = torch.einsum("bnhd,bhde->bnhe", cut(query).softmax(-1), context).reshape(2, 11, 16)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(theirs), rtol=1e-11, atol=1e-12)

def test_softmax_attention_is_torchs_multi_head_attention():
    mine = agf.SoftmaxAttention(12, 3).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    maps = mine.query_proj, mine.key_proj, mine.value_proj
    theirs.load_state_dict({"in_proj_weight": torch.cat([m.weight for m in maps]),
                            "in_proj_bias": torch.cat([m.bias for m in maps]),
                            "out_proj.weight": mine.out_proj.weight,
                            "out_proj.bias": mine.out_proj.bias})
    x, keep = torch.randn(3, 8, 12, dtype=torch.float64), random_keep(3, 8)
    expected = theirs(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
    torch.testing.assert_close(mine(x, keep)[0][keep], expected[keep])

# ---------------------------------------------------------- padding, order, precision, memory

@pytest.mark.parametrize("name", list(agf.MIXERS))
@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_padding_changes_no_output_no_loss_and_no_gradient_of_a_mixer(name, garbage):
    mixer = agf.MIXERS[name](12, 3).double()
    x, keep = torch.randn(3, 7, 12, dtype=torch.float64), random_keep(3, 7)
    longer = torch.full((3, 11, 12), garbage, dtype=torch.float64)
    more = torch.zeros(3, 11, dtype=torch.bool)
    longer[:, :7][keep], more[:, :7] = x[keep], keep
    before, x_in = longer.clone(), longer.requires_grad_()
    short, padded = mixer(agf.hide_padding(x, keep), keep), mixer(x_in, more)
    assert (short[0] - padded[0][:, :7]).abs().max() < 1e-12 and not padded[0][:, 7:].any()
    assert (short[1] - padded[1]).abs().max() < 1e-12
    if name != "none":
        (padded[0].sum() + padded[1].sum()).backward()
        assert x_in.grad.isfinite().all() and not x_in.grad[~more].any()
    torch.testing.assert_close(x_in.detach(), before, equal_nan=True)     # the caller's

def small(**changes):
    setting = dict(classes=3, length=20, channels=2, dim=16, heads=2, hidden=32, dropout=0.0)
    return agf.AGFConfig(**setting | changes)

@pytest.mark.parametrize("mixer", list(agf.MIXERS))
@pytest.mark.parametrize("pool", ["mean", "flatten", "first"])
@pytest.mark.parametrize("shape", [
    {}, dict(kernel=5, stride=3, norm="post", zero_init=True), dict(vocab=9)])
def test_padding_changes_no_output_and_no_loss_of_the_transformer(mixer, pool, shape):
    config = small(mixer=mixer, pool=pool, **shape)
    model = agf.AGFTransformer(config).double().eval()
    n = 11
    x = torch.randint(9, (1, n)) if config.vocab else torch.randn(1, n, 2, dtype=torch.float64)
    logits, ortho = model(x)
    padded = torch.full((2, 20, *x.shape[2:]), -7 if config.vocab else math.nan, dtype=x.dtype)
    padded[0, :n] = x[0]
    keep = torch.zeros(2, 20, dtype=torch.bool)
    keep[0, :n] = True                                              # row 1 is padding only
    more, ortho2 = model(padded, keep)
    assert (more[0] - logits[0]).abs().max() < 1e-12 and abs(ortho2[0] - ortho[0]) < 1e-12
    (more.sum() + ortho2.sum()).backward()                          # the empty row included
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(tensor.isfinite().all() for tensor in [more, *gradients])

@pytest.mark.parametrize("name", list(agf.MIXERS))
def test_bfloat16_autocast_keeps_softmax_polynomial_and_loss_in_float32(name):
    model = agf.AGFTransformer(small(mixer=name)).eval()
    x, keep = torch.randn(2, 20, 2), random_keep(2, 20)
    exact, ortho = model(x, keep)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x, keep)
        mixer = model.blocks[0].mixer
        if isinstance(mixer, agf.AGFAttention):
            U, s, V, value = mixer.factors(torch.randn(2, 5, 16))
            assert U.dtype == V.dtype == torch.float32
            assert s is None or s.dtype == mixer.filter(s).dtype == torch.float32
            assert value.dtype == torch.bfloat16
            theirs = agf.orthogonality_loss(U, V)
            mine = slow_loss(U.double(), V.double(), torch.ones(2, 5) > 0)
            assert theirs.dtype == torch.float32 and (theirs - mine).abs().max() < 1e-6
    assert loss.dtype == torch.float32
    assert (logits.float() - exact).abs().max() < 0.1 and (loss - ortho).abs().max() < 0.02
    (logits.float().sum() + loss.sum()).backward()

@pytest.mark.parametrize("name", list(agf.MIXERS))
def test_models_work_in_pure_float64_and_bfloat16(name):
    for dtype in (torch.float64, torch.bfloat16):
        model = agf.AGFTransformer(small(mixer=name)).to(dtype)
        logits, ortho = model(torch.randn(2, 20, 2, dtype=dtype), random_keep(2, 20))
        assert logits.dtype == dtype and logits.isfinite().all() and ortho.isfinite().all()

@pytest.mark.parametrize("name, amp", [("agf", False), ("agf", True), ("softmax", False)])
def test_the_model_compiles_without_a_graph_break_also_when_n_changes(name, amp):
    model = agf.AGFTransformer(small(mixer=name, depth=1, length=400))
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (130, 200, 333):                                # a third n once broke the backward
        x, keep, found = torch.randn(2, n, 2), random_keep(2, n), []
        for call in (fast, model):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                out = [*call(x, keep)]
            sum(part.sum() for part in out).backward()
            found.append(out + [p.grad for p in model.parameters() if p.grad is not None])
        for compiled, eager in zip(*found, strict=True):
            tolerance = dict(rtol=0.05, atol=0.05) if amp else dict(rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled, eager, **tolerance)

# ------------------------------------------------ a mixer behaves like any other torch module

PROJECTIONS = ("U_proj", "s_proj", "V_proj", "value_proj", "out_proj")

class LoRA(nn.Module):
    """A frozen linear map plus a trained map of low rank, as an adapter library wraps it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_adapter_around_any_projection_changes_the_output_and_learns(name):
    mixer, x = agf.AGFAttention(16, 2), torch.randn(2, 9, 16)
    nn.init.normal_(mixer.filter.theta)
    before = mixer(x)[0]
    adapter = LoRA(getattr(mixer, name))
    setattr(mixer, name, adapter)
    out, ortho = mixer(x)
    (out.square().sum() + ortho.sum()).backward()
    assert (out - before).abs().max() > 1e-6
    assert all(p.grad.abs().sum() > 0 for p in (adapter.up.weight, adapter.down.weight))

def test_hooks_see_each_projection_called_once():
    mixer, seen = agf.AGFAttention(16, 2), []
    for name in PROJECTIONS:
        getattr(mixer, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.append((name, output.shape)))
    mixer(torch.randn(2, 9, 16))
    assert sorted(seen) == sorted((name, (2, 9, 16)) for name in PROJECTIONS)

def test_reparametrised_pruned_and_quantised_projections_take_effect():
    def changed(change):
        torch.manual_seed(0)
        mixer, x = agf.AGFAttention(16, 2), torch.randn(2, 9, 16)
        nn.init.normal_(mixer.filter.theta)
        before = mixer(x)[0]
        return (change(mixer)(x)[0] - before).abs().max()

    def each(tool):
        def change(mixer):
            for name in PROJECTIONS:
                tool(getattr(mixer, name))
            return mixer
        return change
    double = each(lambda linear: linear.weight_g.data.mul_(2) if hasattr(linear, "weight_g")
                  else nn.utils.weight_norm(linear).weight_g.data.mul_(2))
    assert changed(each(nn.utils.weight_norm)) < 1e-5 < changed(double)
    assert changed(each(nn.utils.spectral_norm)) > 1e-3
    assert changed(each(parametrizations.spectral_norm)) > 1e-3
    assert changed(each(partial(prune.l1_unstructured, name="weight", amount=0.9))) > 1e-3
    quantised = changed(lambda mixer: torch.ao.quantization.quantize_dynamic(mixer, {nn.Linear}))
    assert 0 < quantised < 0.1

def test_construction_on_a_meta_device_and_in_a_fake_tensor_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with torch.device("meta"):
        model = agf.AGFTransformer(small())
    real = agf.AGFTransformer(small()).eval()
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(2, 20, 2)
    assert torch.equal(model.eval()(x)[0], real(x)[0])
    with FakeTensorMode():
        fake = agf.AGFTransformer(small())
        fake(torch.randn(2, 20, 2))[0].sum().backward()

def test_no_constructor_makes_a_float64_tensor_which_mps_lacks():
    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), function
            return out
    with Watch():
        model = agf.AGFTransformer(small(order=10))
        sum(part.sum() for part in model(torch.randn(2, 20, 2))).backward()

@pytest.mark.parametrize("name", list(agf.MIXERS))
@pytest.mark.parametrize("B, n", [(0, 5), (3, 0), (0, 0)])
def test_no_samples_or_no_tokens_give_an_empty_output(name, B, n):
    mixer = agf.MIXERS[name](12, 3)
    for keep in (None, torch.ones(B, n) > 0):
        out, ortho = mixer(torch.randn(B, n, 12), keep)
        assert out.shape == (B, n, 12) and ortho.shape == (B,) and ortho.isfinite().all()
    ids = agf.AGFTransformer(small(mixer=name, vocab=9))
    logits, ortho = ids(torch.zeros(B, n, dtype=torch.long))
    assert logits.shape == (B, 3) and logits.isfinite().all()
    series = agf.AGFTransformer(small(mixer=name, kernel=3))
    assert series(torch.randn(0, 5, 2))[0].shape == (0, 3)

def test_torch_func_gives_the_gradient_of_each_sample():
    mixer, x = agf.AGFAttention(8, 2), torch.randn(3, 5, 8)
    nn.init.normal_(mixer.filter.theta)
    params = dict(mixer.named_parameters())

    def loss(params, one):
        out, ortho = torch.func.functional_call(mixer, params, (one[None],))
        return out.square().sum() + ortho.sum()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i, one in enumerate(x):
        alone = torch.autograd.grad(loss(params, one), list(params.values()))
        for found, expected in zip(each.values(), alone):
            torch.testing.assert_close(found[i], expected)

def test_gradient_checkpointing_has_the_same_gradients():
    from torch.utils.checkpoint import checkpoint
    mixer, x = agf.AGFAttention(16, 2), torch.randn(2, 9, 16, requires_grad=True)
    found = []
    for call in (mixer, partial(checkpoint, mixer, use_reentrant=False)):
        out, ortho = call(x)
        found.append(torch.autograd.grad(out.sum() + ortho.sum(), [x, *mixer.parameters()]))
    assert all(torch.equal(p, q) for p, q in zip(*found))

def test_float16_with_a_gradient_scaler_trains():
    model, y = agf.AGFTransformer(small()), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler, x, losses = torch.amp.GradScaler("cpu"), torch.randn(2, 20, 2), []
    for _ in range(20):
        with torch.autocast("cpu", torch.float16):
            logits, ortho = model(x)
        loss = nn.functional.cross_entropy(logits.float(), y) + 0.01 * ortho.mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

def test_fsdp_by_linear_and_by_block_has_the_outputs_of_one_process(tmp_path):
    code = f"""if True:
        import sys; sys.path.insert(0, {str(HERE)!r})
        import agf, torch
        from torch import distributed, nn
        from torch.distributed.fsdp import fully_shard
        distributed.init_process_group("gloo", init_method="file://{tmp_path.as_posix()}/meet",
                                       rank=0, world_size=1)
        torch.manual_seed(0)
        make = lambda: agf.AGFTransformer(agf.AGFConfig(classes=3, length=9, dim=16, heads=2))
        for kind in (nn.Linear, agf.Block):
            plain, sharded = make().eval(), make().eval()
            sharded.load_state_dict(plain.state_dict())
            for part in [m for m in sharded.modules() if isinstance(m, kind)]:
                fully_shard(part)
            fully_shard(sharded)
            x = torch.randn(2, 9, 1)
            (logits, ortho), want = sharded(x), plain(x)[0]
            (logits.sum() + ortho.sum()).backward()
            assert (logits - want).abs().max() < 1e-6
            assert all(p.grad is not None for p in sharded.parameters())
        print("same")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "same" in done.stdout, done.stderr

def test_export_takes_any_batch_and_length():
    model = agf.AGFTransformer(small(length=64, order=6)).eval()
    nn.init.normal_(model.blocks[0].mixer.filter.theta)
    B, n = torch.export.Dim("B"), torch.export.Dim("n", max=64)
    x = torch.randn(2, 20, 2)
    whole = torch.export.export(model, (x,), dynamic_shapes=({0: B, 1: n},)).module()
    for shape in ((2, 20, 2), (5, 64, 2), (3, 7, 2)):
        x = torch.randn(shape)
        for ours, theirs in zip(whole(x), model(x)):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

def test_no_tensor_grows_with_n_squared_and_little_is_saved_for_backward():
    n, mixer = 600, agf.AGFAttention(16, 2, order=10)
    saved = {}

    def pack(t):
        assert t.numel() < n * n
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    x = torch.randn(1, n, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, ortho = mixer(x)
    assert sum(saved.values()) <= 9 * n * 16 * 4             # 8 n D floats and the weights, K = 10
    (out.sum() + ortho.sum()).backward()

def test_a_training_step_costs_at_most_2_5_times_one_with_five_bare_linear_maps():
    class Floor(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.first, self.last = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)

        def forward(self, x, keep=None):
            return self.last(sum(self.first(x).chunk(4, -1))), x.new_zeros(len(x))

    config = agf.AGFConfig(classes=2, length=1024, vocab=256, dim=64, heads=2, hidden=128, head=128)
    x, times = torch.randint(256, (8, 1024)), {}
    models = dict(agf=agf.AGFTransformer(config), floor=agf.AGFTransformer(config, Floor))
    for _ in range(5):                                              # in turn: noise hits both
        for name, model in models.items():
            begin = time.process_time()
            logits, ortho = model(x)
            (logits.sum() + ortho.sum()).backward()
            times.setdefault(name, []).append(time.process_time() - begin)
    assert min(times["agf"]) < 2.5 * min(times["floor"])

# ------------------------------------------------------------------------------------ Transformer

def test_hidden_states_are_all_layers_and_forward_uses_them():
    model = agf.AGFTransformer(small(depth=3, kernel=3, stride=2)).eval()
    x, keep = torch.randn(2, 20, 2), random_keep(2, 20)
    states, mask, ortho = model.hidden_states(x, keep)
    assert [s.shape for s in states] == [(2, 10, 16)] * 4 and mask.shape == (2, 10)
    torch.testing.assert_close(states[2], model.blocks[1](states[1], mask)[0])
    each = [block.mixer(block.norm1(s), mask)[1] for block, s in zip(model.blocks, states)]
    torch.testing.assert_close(ortho, torch.stack(each).mean(0))
    torch.testing.assert_close(model(x, keep)[1], ortho)

def test_a_users_own_mixer_plugs_in():
    class Shift(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(dim))

        def forward(self, x, keep=None):
            return self.gain * x.roll(1, 1), x.new_zeros(len(x))
    model = agf.AGFTransformer(small(depth=3), mixer=Shift)
    assert sum(isinstance(m, Shift) for m in model.modules()) == 3
    assert model(torch.randn(2, 20, 2))[0].shape == (2, 3)

@pytest.mark.parametrize("mixer", list(agf.MIXERS))
def test_models_copy_pickle_and_round_trip_their_state(mixer):
    model = agf.AGFTransformer(small(mixer=mixer)).eval()
    x, file = torch.randn(2, 20, 2), io.BytesIO()
    other = agf.AGFTransformer(small(mixer=mixer)).eval()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(twin(x)[0], model(x)[0])

@pytest.mark.parametrize("changes, words", [
    (dict(heads=3), "heads must divide"), (dict(norm="mid"), "mid"), (dict(mixer="agff"), "agff"),
    (dict(depth=0), "depth"), (dict(kernel=4), "kernel"), (dict(dropout=1.0), "dropout"),
    (dict(pool="max"), "max"), (dict(zero_init=True, identity=False), "identity")])
def test_an_impossible_configuration_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)

def test_an_input_longer_than_the_model_is_named():
    with pytest.raises(ValueError, match="21 steps"):
        agf.AGFTransformer(small())(torch.randn(1, 21, 2))

def test_diagnostics_are_their_formulas_and_ignore_padding():
    x, keep = torch.randn(3, 8, 5, dtype=torch.float64), random_keep(3, 8)
    keep[1] = torch.arange(8) < 5
    keep[2] = torch.arange(8) < 2
    dirty = x.masked_fill(~keep[:, :, None], 9)
    for i in range(3):
        real = x[i][keep[i]]
        pairs = [(p, q) for p in range(len(real)) for q in range(len(real)) if p != q]
        cos = [torch.cosine_similarity(real[p], real[q], 0) for p, q in pairs]
        low = real.mean(0).expand_as(real)
        share = torch.linalg.svdvals(real) / torch.linalg.svdvals(real).sum()
        for measure, slow in ((agf.token_cosine, torch.stack(cos).mean()),
                              (agf.high_frequency_ratio, (real - low).norm() / low.norm()),
                              (agf.effective_rank, torch.exp(-(share * share.log()).sum()))):
            torch.testing.assert_close(measure(dirty, keep)[i], slow)
    assert agf.token_cosine(torch.ones(1, 4, 3)).item() == pytest.approx(1)
    assert agf.effective_rank(torch.eye(4)[None]).item() == pytest.approx(4)

# --------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("name", ["agf", "softmax"])
def test_one_batch_is_overfitted(name):
    model = agf.AGFTransformer(small(mixer=name))
    x, keep, y = torch.randn(12, 20, 2), random_keep(12, 20), torch.randint(3, (12,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss, ortho = agf.train_step(model, optimizer, x, keep, y)
    assert (agf.evaluate(model, [(x, keep)]).argmax(1) == y).all() and model.training
    assert not loss.requires_grad and loss.ndim == ortho.ndim == 0

def test_agf_py_alone_in_an_empty_folder_trains_a_step(tmp_path):
    shutil.copy(HERE / "agf.py", tmp_path)
    code = """if True:
        import agf, torch
        model = agf.AGFTransformer(agf.AGFConfig(classes=2, length=9))
        optimizer = torch.optim.AdamW(model.parameters())
        agf.train_step(model, optimizer, torch.randn(4, 9, 1), None, torch.tensor([0, 1, 0, 1]))
        print("trained")"""
    roots = {line.split()[1].split(".")[0] for line in (HERE / "agf.py").read_text().splitlines()
             if line.startswith(("import ", "from "))}
    assert roots - {"torch"} <= set(sys.stdlib_module_names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr

# -------------------------------------------------------------------------- README and notebooks

def test_the_python_examples_of_the_readme_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    """The function of notebook 10, forward and backward."""
    notebook = json.loads((HERE / "notebooks" / "10_a_billion_tokens.ipynb").read_text("utf-8"))
    parts = ["".join(cell["source"]) for cell in notebook["cells"]]
    parts = [part.split("\n", 1)[1] for part in parts if part.startswith("%%module")]
    (tmp_path / "in_pieces.py").write_text("\n\n".join(parts), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    in_pieces = importlib.import_module("in_pieces")
    torch.multiprocessing.spawn(in_pieces.worker, (2, tmp_path, [37]), nprocs=2)
    ranks = [torch.load(tmp_path / f"result_2_{rank}.pt")[37] for rank in range(2)]
    mixer, x, weight = in_pieces.problem(37)                 # parts of 19 and 18 tokens
    out, _ = mixer(x.requires_grad_())
    (out * weight).sum().backward()
    torch.testing.assert_close(torch.cat([r["out"] for r in ranks], 1), out)
    torch.testing.assert_close(torch.cat([r["grad"] for r in ranks], 1), x.grad)
    for name, p in mixer.named_parameters():
        torch.testing.assert_close(ranks[0]["parameters"][name], p.grad, atol=1e-10, rtol=1e-7)

# -------------------------------------------------------------- python train_uea.py, AGFClassifier

def ts(name, lines, labels="true a b", more="@missing false"):
    head = [f"@problemName {name}", "@timeStamps false", more, f"@classLabel {labels}", "@data"]
    return "\n".join([*head, *lines, ""])

def waves(count, rng, shift=0.0):
    """Lines of two channels: label a is a slow wave, label b a fast one."""
    lines = []
    for i in range(count):
        wave = np.sin(np.arange(rng.integers(12, 20)) * (0.5 + i % 2) + rng.uniform(0, 6))
        channels = (wave + 0.1 * rng.standard_normal((2, len(wave))) + shift).round(4)
        lines.append(":".join(",".join(map(str, c)) for c in channels.tolist()) + ":" + "ab"[i % 2])
    return lines

def write_set(folder, name, train, test, labels="true a b"):
    (folder / name).mkdir(parents=True)
    for split, lines in (("TRAIN", train), ("TEST", test)):
        (folder / name / f"{name}_{split}.ts").write_bytes(ts(name, lines, labels).encode())
    return folder

def uea(*argv):
    """Call the script in this process: -> (exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train_uea.main([str(a) for a in argv])
    return status, out.getvalue(), err.getvalue()

def one_line_error(result, *words):
    status, _, err = result
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err

def result_of(run):
    return json.loads((run / "result.json").read_text())

def another_process(*argv, **environment):
    return subprocess.run([sys.executable, HERE / "train_uea.py", *map(str, argv)], text=True,
                          capture_output=True, env={**os.environ, **environment})

SMALL = ["--dim", 16, "--heads", 2, "--kernel", 3, "--depth", 1, "--epochs", 3]
TINY = dict(dim=8, heads=2, depth=1, kernel=3, epochs=2)

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    rng = np.random.default_rng(0)
    return write_set(tmp_path_factory.mktemp("data"), "Toy", waves(32, rng), waves(24, rng))

@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    flags = ["--dataset", "Toy", "--data-dir", toy, "--out", out, "--seeds", 2, *SMALL]
    assert uea(*flags)[0] == 0
    return out

def test_a_run_leaves_its_whole_folder_and_every_seed(toy, run):
    assert sorted(os.listdir(run)) == ["config.json", "curves.png", "filters.png", "metrics.jsonl",
                                       "result.json", "seed-0.pt", "seed-1.pt"]
    result = result_of(run)
    assert (result["dataset"], result["protocol"], result["seeds"]) == ("Toy", "honest", [0, 1])
    assert result["test_accuracy_mean"] == pytest.approx(np.mean(result["test_accuracy"]))
    assert result["test_accuracy_std"] == pytest.approx(np.std(result["test_accuracy"], ddof=1))
    assert {"train_seconds", "parameters", "device", "command", "date", "versions"} <= set(result)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["epoch"]) for r in rows] == [(s, e) for s in (0, 1) for e in (1, 2, 3)]
    X, y = train_uea.read(toy / "Toy" / "Toy_TEST.ts")           # the averaged probabilities
    shares = sum(AGFClassifier.load(run / f"seed-{seed}.pt").predict_proba(X) for seed in (0, 1))
    assert result["ensemble_accuracy"] == np.mean(np.array(["a", "b"])[shares.argmax(1)] == y)

def test_the_test_split_cannot_reach_training_but_protocol_paper_reports_it(toy, run, tmp_path):
    """Other test values and labels, looked at each epoch: the same weights to the last bit."""
    write_set(tmp_path, "Toy", [], ["10,20,30:4,5,6:b", "1,2,3:0,-5,9:a"] * 3)
    shutil.copy(toy / "Toy" / "Toy_TRAIN.ts", tmp_path / "Toy")
    status, out, _ = uea("--dataset", "Toy", "--data-dir", tmp_path, "--out", tmp_path / "r",
                         "--protocol", "paper", *SMALL)
    one, two = (train_uea.load(r / "seed-0.pt") for r in (run, tmp_path / "r"))
    assert status == 0 and all(torch.equal(p, two["model"][k]) for k, p in one["model"].items())
    result, seen = result_of(tmp_path / "r"), [row["test_accuracy"] for row in two["history"]]
    assert result["best_test_accuracy"] == [max(seen)] and result["test_accuracy"] == [seen[-1]]
    assert "optimistic" in result["best_test_accuracy_label"] and "optimistic" in out

@pytest.mark.parametrize("flags", [
    ["--mixer", "none", "--optimizer", "adam"], ["--mixer", "softmax", "--pool", "flatten"],
    ["--basis", "monomial", "--order", 2, "--augment", 0, "--mixup", 0, "--kernel", 1]])
def test_what_a_student_would_change_works(toy, tmp_path, flags):
    flags = [*SMALL, "--epochs", 1, *flags]
    assert uea("--dataset", "Toy", "--data-dir", toy, "--out", tmp_path / "r", *flags)[0] == 0
    settings = json.loads((tmp_path / "r" / "config.json").read_text())["settings"]
    assert all(settings[name[2:]] == value for name, value in zip(flags[-4::2], flags[-3::2]))

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
    assert len(found) > 20 and {k: v for k, v in found.items() if v != "PASSED"} == {}

def test_arrays_in_labels_out_also_of_unequal_lengths_and_in_cross_validation():
    from sklearn.model_selection import cross_val_score
    rng = np.random.default_rng(0)
    X = [np.sin(np.arange(n) * (0.5 + i % 2))[None] for i, n in enumerate(rng.integers(9, 16, 24))]
    X[3][0, 4] = np.nan
    y = np.array([7, -2] * 12)
    state = torch.random.get_rng_state()
    model = AGFClassifier(**TINY | dict(epochs=12), mixup=0, lr=1e-2).fit(X, y)
    assert torch.equal(torch.random.get_rng_state(), state)        # the caller's own stays
    assert model.predict(X).tolist() == y.tolist()
    assert model.predict_proba(X).shape == (24, 2) and model.classes_.tolist() == [-2, 7]
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    scores = cross_val_score(AGFClassifier(**TINY), X, np.array(["x", "y"] * 12), cv=2)
    assert scores.shape == (2,) and all(0 <= score <= 1 for score in scores)
    for wrong in (dict(augment=50), dict(optimizer="sgd"), dict(heads=3), dict(mixer="agff")):
        with pytest.raises(ValueError, match=min(wrong)):
            AGFClassifier(**TINY | wrong).fit(X, y)
    X[3][0, 4] = np.inf
    with pytest.raises(ValueError, match="series 4"):
        AGFClassifier(**TINY).fit(X, y)

def test_after_ctrl_c_resume_goes_on_to_the_same_numbers(toy, tmp_path, monkeypatch):
    flags = ["--dataset", "Toy", "--data-dir", toy, "--seeds", 2, "--dropout", 0.3, *SMALL]
    run, out = tmp_path / "whole", tmp_path / "r"
    assert uea(*flags, "--out", run)[0] == 0
    real, saved = train_uea.save, []

    def save(path, state):                           # Ctrl-C in the second seed
        real(path, state)
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(train_uea, "save", save)
    status, text, err = uea(*flags, "--out", out)
    assert status == 130 and f"--resume {out}" in text and not (out / "result.json").exists()
    shutil.copytree(toy, tmp_path / "moved")
    for _ in range(2):                               # a finished run only evaluates again
        assert uea("--resume", out, "--data-dir", tmp_path / "moved", "--dim", 16)[0] == 0
        one, two = result_of(run), result_of(out)
        assert all(one[k] == two[k] for k in ("test_accuracy", "ensemble_accuracy", "seeds"))
        assert (run / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()

def test_ctrl_c_stops_a_real_process_at_once(toy, tmp_path):
    flags = ["--dataset", "Toy", "--data-dir", toy, "--epochs", 5000, "--out", tmp_path / "r"]
    process = subprocess.Popen([sys.executable, HERE / "train_uea.py", *map(str, flags)], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (tmp_path / "r" / "seed-0.pt").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)       # five seconds, on a machine that is not busy
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err
    assert 0 < len(train_uea.load(tmp_path / "r" / "seed-0.pt")["history"]) < 5000

def test_resume_refuses_other_options_also_defaults_and_other_data(toy, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "r")
    good = json.loads((copy / "config.json").read_text())
    settings = good["settings"] | dict(mixer="softmax", seed=3)
    (copy / "config.json").write_text(json.dumps(good | dict(settings=settings)))
    for flags in (["--mixer", "agf"], ["--seed", 0], ["--epochs", 9], ["--compile"]):
        one_line_error(uea("--resume", copy, *flags), flags[0][2:])
    (copy / "config.json").write_text(json.dumps(good))
    for split, old, new in [("TRAIN", ":a", ":b"), ("TEST", ":a", ":b"), ("TRAIN", "0.1", "0.2")]:
        data = shutil.copytree(toy, tmp_path / f"{split}{new[-1]}")
        file = data / "Toy" / f"Toy_{split}.ts"
        file.write_text(file.read_text().replace(old, new, 3))
        one_line_error(uea("--resume", copy, "--data-dir", data), "data changed")

def test_resume_meets_odd_folders_and_files_with_one_line(toy, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "r")
    good = json.loads((copy / "config.json").read_text())
    for odd in ([], {}, {"settings": 3}, good | dict(script="train_lra.py"),
                good | dict(settings=dict(dim=3)),
                good | dict(settings=good["settings"] | dict(seed="many"))):
        (copy / "config.json").write_text(json.dumps(odd))
        one_line_error(uea("--resume", copy), "--resume")
    (copy / "config.json").write_text(json.dumps(good))
    for odd in ([1, 2], {"a": 1}, {}, "text", {"history": [], "seconds": 0, "model": 3}):
        torch.save(odd, copy / "seed-0.pt")
        one_line_error(uea("--resume", copy), "seed-0.pt")
    shutil.copy(run / "seed-0.pt", copy)
    for odd in ("", "[]", "\x00"):                   # an odd result is written anew
        (copy / "result.json").write_text(odd)
        assert uea("--resume", copy)[0] == 0 and result_of(copy)["seeds"] == [0, 1]
    for odd in (tmp_path / "nowhere", toy, run / "config.json"):
        one_line_error(uea("--resume", odd), str(odd))

def test_a_full_disk_or_a_removed_folder_is_one_line(toy, run, tmp_path, monkeypatch):
    real, flags = torch.save, ["--dataset", "Toy", "--data-dir", toy, *SMALL, "--out"]

    def full(state, path):
        if len(state["history"]) == 2:
            raise RuntimeError("unexpected pos 64 vs 0")
        real(state, path)

    def gone(state, path):
        shutil.rmtree(tmp_path / "s")
        real(state, path)
    for save, out, word in ((full, tmp_path / "r", "disk"), (gone, tmp_path / "s", "folder")):
        monkeypatch.setattr(torch, "save", save)
        one_line_error(uea(*flags, out), "seed-0.pt", word)
    monkeypatch.setattr(torch, "save", real)
    assert uea("--resume", tmp_path / "r")[0] == 0
    assert result_of(tmp_path / "r")["test_accuracy"] == result_of(run)["test_accuracy"][:1]

def test_two_runs_never_share_a_folder(toy, run, tmp_path, monkeypatch):
    one_line_error(uea("--dataset", "Toy", "--data-dir", toy, *SMALL, "--out", run), "is there")
    monkeypatch.chdir(tmp_path)
    settings = train_uea.settle("", train_uea.OPTIONS, {}, {})
    made = [train_uea.open_run("train_uea.py", settings, "100%d", "x") for _ in range(20)]
    assert len(set(made)) == 20 and all("100%d" in str(folder) for folder in made)
    settings.out, wins = str(tmp_path / "one"), []

    def race(_):
        with contextlib.suppress(train_uea.UserError):
            wins.append(train_uea.open_run("train_uea.py", settings, "Toy", "x"))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(race, range(8)))
    assert len(wins) == 1

def test_predict_writes_labels_and_probabilities(toy, run, tmp_path):
    _, out, _ = uea("--predict", toy / "Toy" / "Toy_TEST.ts", "--checkpoint", run)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["series", "label", "p(a)", "p(b)"]
    for row in rows:
        assert row["label"] == ("a" if float(row["p(a)"]) > float(row["p(b)"]) else "b")
    accuracy = np.mean([r["label"] == "ab"[i % 2] for i, r in enumerate(rows)])
    assert len(rows) == 24 and accuracy == result_of(run)["test_accuracy"][0]
    lines = ["1,2,3:4,5,6", "1,2:4,5", "", "7:8", "  ", "1,NaN,3,?:4,5,6,7", "?,?:1,nan"]
    for name in ("new.ts", "new", "new.data.csv"):   # without labels, values missing, any name
        (tmp_path / name).write_text(ts("New", lines, labels="false"))
        status, out, err = uea("--predict", tmp_path / name, "--checkpoint", run)
        assert status == 0 and out.count("\n") == 6 and "nan" not in out, err

def test_a_wrong_checkpoint_is_refused(toy, run, tmp_path):
    file = toy / "Toy" / "Toy_TEST.ts"
    (tmp_path / "seed-0.pt").write_bytes((run / "seed-0.pt").read_bytes()[:2000])
    one_line_error(uea("--predict", file, "--checkpoint", tmp_path), "not a readable checkpoint")
    for odd in ({"a": 1}, {"recipe": dict(mixer="agf")}, [1], torch.zeros(2), {"recipe": 1}):
        torch.save(odd, tmp_path / "other.pt")
        one_line_error(uea("--predict", file, "--checkpoint", tmp_path / "other.pt"), "other.pt")
    one_line_error(uea("--predict", file, "--checkpoint", tmp_path / "no.pt"), "no.pt", "No such")
    one_line_error(uea("--predict", file, "--checkpoint", toy), str(toy))
    one_line_error(uea("--predict", file), "--checkpoint")
    with pytest.MonkeyPatch.context() as patch:      # a mixer of one's own, gone in a new process
        patch.setitem(agf.MIXERS, "mine", agf.MIXERS["none"])
        flags = ["--out", tmp_path / "r", *SMALL, "--mixer", "mine"]
        assert uea("--dataset", "Toy", "--data-dir", toy, *flags)[0] == 0
    one_line_error(uea("--predict", file, "--checkpoint", tmp_path / "r"), "'mine'", "unknown")

GOOD = ["1,2,3:4,5,6:a", "2,3,4:1,2,3:b", "1,2:4,5:a"]

STAMPS = ts("Bad", ["(0,-1.5),(1,2e-3):(0,1),(1,2):a", "(2020-01-01,1):(2020-01-02,2):b"])

def bad(*lines, more=""):
    return ts("Bad", [*GOOD, *lines], more=more)

@pytest.mark.parametrize("text, word", [
    ("", "@classLabel"), ("nonsense", "@data"), (b"\xff\xfe@\0d\0a\0t\0a\0", "@data"),
    (bad()[:-3], "series 3"), (ts("Bad", []), "no series"), (ts("Bad", GOOD[:1] * 3), "same label"),
    (ts("Bad", ["1,2:3,4"] * 2, labels="false"), "@classLabel"),
    (bad().replace("@classLabel true a b\n", ""), "@classLabel"),
    (bad("1,2,3:4,5,6:c"), "'c'"), (bad("1,2,3:4,5,6:A"), "'A'"), (bad("1,2,3:4,5,6:"), "''"),
    (bad("1,inf,3:4,5,6:a"), "series 4"), (bad("1e39,2:3,4:a"), "series 4"),
    (bad("::a"), "series 4"), (bad("1,2:-1e999,4:b"), "series 4"), (bad("1,2:3:a"), "differ"),
    (bad("1,x:3,4:a"), "'x'"), (ts("Bad", ["a", *GOOD]), "series 1"),
    (bad("1,2,3:a"), "1 channels"), (bad("1,2:3,4:5,6:a"), "3 channels"),
    (bad(more="@dimensions 3"), "2 channels"), (bad(more="@targetLabel true"), "regression"),
    (STAMPS, "series 1"), *((STAMPS.replace("@timeStamps false", line), "timestamps") for line in
        ["@timeStamps true", "@TIMESTAMPS TRUE", "@timestamps\ttrue", "@timeStamps"])])
def test_a_damaged_file_gets_one_clear_line_and_no_run_folder(tmp_path, text, word):
    write_set(tmp_path, "Bad", GOOD, GOOD)
    file = tmp_path / "Bad" / "Bad_TRAIN.ts"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = uea("--dataset", "Bad", "--data-dir", tmp_path, "--out", tmp_path / "r", *SMALL)
    one_line_error(result, word, "" if word == "same label" else str(file))
    assert not (tmp_path / "r").exists()

def fitted(tmp_path, train, test, *flags, labels="true a b"):
    write_set(tmp_path / "d", "Odd", train, test, labels)
    flags = [*SMALL, "--epochs", 15, "--mixup", 0, "--lr", 0.01, "--out", tmp_path / "r", *flags]
    assert uea("--dataset", "Odd", "--data-dir", tmp_path / "d", *flags)[0] == 0
    return result_of(tmp_path / "r")["test_accuracy"][0]

def test_a_large_offset_loses_no_signal_and_series_of_one_time_step_are_no_exception(tmp_path):
    rng = np.random.default_rng(1)                   # and of one time step, below
    assert fitted(tmp_path, waves(32, rng, -3e9), waves(16, rng, -3e9)) > 0.9
    train = [f"{(-1) ** i + i / 100}:{i / 50}:" + "ab"[i % 2] for i in range(20)] + [""]
    assert fitted(tmp_path / "one", train, train) == 1.0
    series, _ = train_uea.read(tmp_path / "one" / "d" / "Odd" / "Odd_TRAIN.ts")
    assert len(AGFClassifier.load(tmp_path / "one" / "r").predict(series)) == 20   # no blank one

def test_a_channel_that_is_constant_in_train_is_not_blown_up():
    X = [np.stack([np.arange(5.0) * (i + 1), np.full(5, 0.1)]) for i in range(4)]
    data = train_uea.describe(X, list("abab"))
    assert data["std"][1] == 1 and data["std"][0] > 1
    moved, _, _ = train_uea.encode([X[0] + 0.01], data, "X")
    assert abs(moved[0, :, 1] - 0.01).max() < 1e-6

def test_missing_values_are_filled_along_time_and_a_channel_without_any_by_its_mean():
    data = dict(classes=["a"], length=4, mean=[1.0, 2.0], std=[2.0, 1.0])
    nan = math.nan
    x, keep, _ = train_uea.encode([np.array([[1, nan, nan, 7], [nan] * 4])], data, "X")
    assert torch.equal(x[0, :, 0], torch.tensor([0.0, 1.0, 2.0, 3.0])) and not x[0, :, 1].any()

def test_what_predict_cannot_use_is_refused_with_file_and_series_never_nan(run, tmp_path):
    texts = [ts("New", [GOOD[0], f"1,{value},3:4,5,6:b"])
             for value in ("1e30", "-1e20", "3.4e38", "1e39", "inf", "-Infinity", "1e400")]
    texts.append(ts("New", ["1,2:3,4", "1,2:3,4:7,7"]).replace("@classLabel true a b\n", ""))
    for text in texts:
        (tmp_path / "new.ts").write_text(text)
        result = uea("--predict", tmp_path / "new.ts", "--checkpoint", run)
        one_line_error(result, "new.ts", "series 2")
        assert result[1] == ""

def test_labels_come_back_as_written_also_where_the_output_cannot_encode_them(tmp_path):
    names = ["Standing", "banana", "NaN", "A", "a", "?", "gehört", "日本"]
    lines = enumerate(waves(24, np.random.default_rng(0)))
    train = [line.rsplit(":", 1)[0] + ":" + names[i % 8] for i, line in lines]
    fitted(tmp_path, train, train[:8], "--epochs", 1, labels=f"true {' '.join(names)}")
    predict = "--predict", tmp_path / "d" / "Odd" / "Odd_TEST.ts", "--checkpoint", tmp_path / "r"
    out = uea(*predict)[1]
    assert set(out.split("\n")[0].split(",")) >= {f"p({name})" for name in names}
    assert AGFClassifier.load(tmp_path / "r").classes_.tolist() == sorted(names)
    done = another_process(*predict, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and done.stdout.count("\n") == 9

def test_a_set_that_is_not_here_is_told_truly(tmp_path, monkeypatch):
    import aeon.datasets

    def no_network(name, split, extract_path):
        raise OSError("no route to host")
    monkeypatch.setattr(aeon.datasets, "load_classification", no_network)
    one_line_error(uea("--dataset", "Libras", "--data-dir", tmp_path), "Libras.zip", "no route")
    for name in ("xyzzy", "../Toy"):
        one_line_error(uea("--dataset", name, "--data-dir", tmp_path), name, "--list")
    one_line_error(uea(), "--dataset JapaneseVowels")
    assert not any(tmp_path.iterdir())
    (tmp_path / "Libras").mkdir()                    # and is not downloaded over what is there
    (tmp_path / "Libras" / "Libras_TRAIN.arff").write_text("@relation")
    one_line_error(uea("--dataset", "Libras", "--data-dir", tmp_path), "Libras_TRAIN.ts", "No such")
    write_set(tmp_path, "Odd", GOOD, ["1,2:3,4:c"], labels="true a b c")
    one_line_error(uea("--dataset", "Odd", "--data-dir", tmp_path), "Odd_TEST.ts", "'c'")

def test_list_names_exactly_what_dataset_finds(tmp_path):
    write_set(tmp_path, "100%d", GOOD, GOOD)
    write_set(tmp_path, "Long", GOOD, GOOD)
    with open(tmp_path / "Long" / "Long_TRAIN.ts", "r+b") as file:
        file.truncate(2**32)                         # a sparse file of 4 GB: never read whole
    write_set(tmp_path, "Half", GOOD, GOOD)
    (tmp_path / "Half" / "Half_TEST.ts").unlink()
    (tmp_path / "Dir" / "Dir_TRAIN.ts").mkdir(parents=True)
    os.symlink(tmp_path / "nowhere", tmp_path / "Gone")
    status, out, _ = uea("--list", "--data-dir", tmp_path)
    assert status == 0 and set(out.split()) >= {"BasicMotions", "JapaneseVowels", "100%d", "Long"}
    assert not set(out.split()) & {"Half", "Dir", "Gone"}
    flags = ["--dataset", "100%d", "--data-dir", tmp_path, "--out", tmp_path / "r", *SMALL]
    assert uea(*flags)[0] == 0

@pytest.mark.parametrize("flags, word", [
    (["--order", -1], "order"), (["--heads", 3], "heads must"), (["--order", "many"], "many"),
    (["--dim", 0], "dim"), (["--mixer", "agff"], "agff"), (["--epochs", -1], "epochs"),
    (["--a", -2, "--b", -1], "a=-2"), (["--lr", "nan"], "lr"), (["--seeds", 0], "seeds"),
    (["--device", "warp"], "--device warp"), (["--preset", "paper"], "Heartbeat"),
    (["--lrr", 3], "--lrr"), (["--seed", "1e23"], "--seed"), (["--seed", 10**23], "seed"),
    (["--augment", 50], "augment"), (["--pool", "max"], "pool"),
    (["--dropout", 1.5], "dropout"), (["--mixup", "inf"], "mixup"), (["--dim", 10**9], "built"),
    (["--kernel", 4], "kernel"), (["--batch-size", 0], "size"), (["--out", "/dev/null/r"], "dev")])
def test_a_mistaken_option_gets_one_clear_line_that_blames_it(toy, tmp_path, flags, word):
    result = uea("--dataset", "Toy", "--data-dir", toy, "--out", tmp_path / "r", *flags)
    one_line_error(result, word)
    assert not (tmp_path / "r").exists()

def test_compile_without_a_compiler_is_one_line(toy, tmp_path):
    flags = ["--dataset", "Toy", "--data-dir", toy, "--compile", "--out", tmp_path / "r"]
    done = another_process(*flags, CXX="no-such-one", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"))
    one_line_error((done.returncode, done.stdout, done.stderr), "--compile")
    assert not (tmp_path / "r").exists()

def test_hundreds_of_mutated_files_give_a_user_error_or_a_finite_result(run, tmp_path):
    rng, path, good = random.Random(0), tmp_path / "mutant.ts", 0
    classifier = AGFClassifier.load(run)
    whole = ts("Toy", waves(6, np.random.default_rng(0)), more="@dimensions 2")
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
            assert str(error).count("\n") == 0 and "mutant.ts" in str(error)
    assert 20 < good < 380                           # both ends were reached

# ---------------------------------------------------------------------------- python train_lra.py
QUICK = ["--quick", "--steps", 4, "--batch-size", 7, "--length", 48, "--dim", 16]
CPU = torch.device("cpu")

def lra(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_uea, "main", train_lra.main)
        return uea(*argv)

def options(*argv):
    return train_lra.settings([str(a) for a in argv])

def load(task, folder, length=1024):
    return train_lra.load_task(options("--task", task, "--data-dir", folder, "--length", length))

def lra_error(task, folder, *words):
    """A run on this data ends with one line that has these words, and without a run folder."""
    one_line_error(lra("--task", task, "--data-dir", folder, "--out", folder / "run"), *words)
    assert not (folder / "run").exists()

def texts(*splits):
    """Document -> label, cut to the length."""
    return {bytes(row[0, :size[0]].tolist()): int(label)
            for split in splits for row, size, label in zip(*split)}

def rows_of(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

def tar(path, files):
    for name, data in files.items():
        (path.parent / "tar" / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "tar" / name).write_bytes(data)
    shutil.make_archive(str(path).removesuffix(".tar.gz"), "gztar", path.parent / "tar")
    return path

def words_of(text):
    return text.replace("(", "").replace(")", "").split()

def tree_of(text):
    """[MAX 1 [MIN 2 3 ] ] -> ("MAX", 1, ("MIN", 2, 3)), by Python's own parser."""
    words = [f'("{word[1:]}"' if word[0] == "[" else word for word in words_of(text)]
    return ast.literal_eval(",".join(words).replace("]", ")"))

def retold(tree):
    """-> its official text, its value. An argument or ] makes a pair with all that is before it."""
    if isinstance(tree, int):
        return str(tree), tree
    text, values = f"[{tree[0]}", []
    for part, value in [*map(retold, tree[1:]), ("]", None)]:
        text = f"( {text} {part} )"
        values.append(value)
    v = values[:-1]
    return text, dict(MIN=min(v), MAX=max(v), MED=int(np.median(v)), SM=sum(v) % 10)[tree[0]]

def nodes(tree, depth=1):
    yield tree, depth
    for argument in tree[1:] if isinstance(tree, tuple) else ():
        yield from nodes(argument, depth + 1)

def test_listops_has_the_official_form_and_odds_and_an_independent_evaluators_targets():
    lines, again, other = map(train_lra.listops_lines, (1, 1, 2))
    assert next(lines) == next(again) != next(other)
    for text, target in (next(lines).split("\t") for _ in range(60)):
        assert retold(tree_of(text)) == (text, int(target)) and 500 < len(words_of(text)) < 2000
    draw, inner = random.Random(3).random, []
    for _ in range(200):                             # of any length: each choice has its odds
        words = []
        train_lra.draw_tree(draw, words)
        inner += nodes(tree_of(" ".join(words)))
    operators = [tree for tree, _ in inner if isinstance(tree, tuple)]
    digits = [tree for tree, _ in inner if isinstance(tree, int)]
    free = [isinstance(tree, tuple) for tree, depth in inner if 1 < depth < 10]
    assert max(depth for _, depth in inner) == 10
    for values, odds in [([tree[0] for tree in operators], [1 / 4] * 4), (free, [3 / 4, 1 / 4]),
                         ([len(tree) for tree in operators], [1 / 9] * 9), (digits, [1 / 10] * 10)]:
        counts = np.unique(values, return_counts=True)[1]
        assert scipy.stats.chisquare(counts, len(values) * np.array(odds)).pvalue > 1e-3

def test_listops_files_are_all_there_or_none_and_come_back_as_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lra, "COUNTS", dict(train=30, val=10, test=10))
    with pytest.raises(KeyError), monkeypatch.context() as patch:
        patch.setattr(train_lra, "draw_tree", lambda *a: {}["a crash, a full disk"])
        load("listops", tmp_path)
    assert os.listdir(tmp_path / "lra_release") == []
    splits = load("listops", tmp_path, length=2000)
    folder, = (tmp_path / "lra_release").iterdir()
    for split, (part, count) in zip(splits, train_lra.COUNTS.items()):
        _, *lines = (folder / f"basic_{part}.tsv").read_text().splitlines()
        assert len(set(lines)) == len(split[0]) == count
        for (x, sizes, y), line in zip(zip(*split), lines):
            words = [train_lra.WORDS[i - 1] for i in x[0, :sizes[0]].tolist()]
            assert words == words_of(line.split("\t")[0]) and y == int(line[-1])
    path, first = folder / "basic_test.tsv", "Source\tTarget\n1\t1\n2\t2\n"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))      # a Windows copy
    assert texts(load("listops", tmp_path, length=2000)[2]) == texts(splits[2])
    for line in ("( [MIX 1 ) 2 ) ] )\t1", "( [MIN 1 ) ]", "", "]\t]"):
        path.write_text(f"{first}{line}\n4\t4\n")
        lra_error("listops", tmp_path, "basic_test.tsv, line 4")
    for text in ("Source\tTarget\n", f"{first}1\t12\n", f"{first}1\t-1\n"):
        path.write_text(text)
        lra_error("listops", tmp_path, "no listops samples", "label", str(tmp_path))

def test_text_reads_the_archive_without_a_macs_files_and_takes_dev_from_train(tmp_path, capsys):
    review = {f"aclImdb/{part}/{name}/{i}_7.txt": f"{part} {name} {'great' * i}".encode()
              for part in ("train", "test") for name in ("pos", "neg") for i in range(10)}
    other = ("train/unsup/1_0.txt", "README", "train/urls_pos.txt", "train/pos/._1_7.txt")
    path = tar(tmp_path / "aclImdb_v1.tar.gz", review | {f"aclImdb/{name}": b"x" for name in other})
    train, dev, test = load("text", tmp_path, length=30)
    assert "not the official archive" in capsys.readouterr().out
    assert [len(split[0]) for split in (train, dev, test)] == [18, 2, 20]
    for part, found in (("train", texts(train, dev)), ("test", texts(test))):
        assert found == {text[:30]: int("/pos/" in name) for name, text in review.items()
                         if f"/{part}/" in name}
    path.write_bytes(path.read_bytes()[:300])        # a broken download
    lra_error("text", tmp_path, "aclImdb_v1.tar.gz: fetch")

def test_image_reads_grey_pixels_and_opens_pickles_of_the_official_archive_only(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3, 1024), dtype=np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    files = [*(pickle.dumps({b"data": x.reshape(4, 3072), b"labels": [i, 1, 2, 9]}, 2)
               for i, x in enumerate(rgb)), b"junk"]
    path = tar(tmp_path / "cifar-10-python.tar.gz",
               {f"cifar-10-batches-py/{name}": data for name, data in zip(names, files)})
    lra_error("image", tmp_path, "cifar-10-python.tar.gz", "SHA-256")
    with pytest.MonkeyPatch.context() as patch:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        patch.setitem(train_lra.ARCHIVES, path.name, ("", digest))
        train, dev, test = load("image", tmp_path)
    assert sorted([*train[2].tolist(), *dev[2].tolist()]) == sorted([*range(5), *[1, 2, 9] * 5])
    x, y = test[0][:, 0].numpy(), test[2].numpy()
    assert len(dev[0]) == 2 and y.tolist() == [5, 1, 2, 9]
    assert np.abs(x - np.einsum("ncp,c->np", rgb[5], [0.299, 0.587, 0.114])).max() <= 0.5 + 1e-9
    grey = dict(train_x=x, train_y=y, test_x=x, test_y=y)
    np.savez(tmp_path / "cifar10_gray.npz", **grey)
    assert texts(load("image", tmp_path)[2]) == texts(test)
    for damage, words in ((dict(test_x=x[:2]), "cifar10_gray.npz"), (dict(test_y=y + 9), "label")):
        np.savez(tmp_path / "cifar10_gray.npz", **grey | damage)
        lra_error("image", tmp_path, words)

def test_retrieval_keeps_pythons_wrapper_and_compares_two_documents_by_one_encoder(tmp_path):
    folder = tmp_path / "lra_release" / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for i, part in enumerate(("train", "eval", "test")):
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(
            f"{j % 2}.0\tP{j}\tQ{j}\tb'first {part}'\tb'a\\n'\n" for j in range(i + 3)))
    splits = load("retrieval", tmp_path, length=9)
    assert [len(split[0]) for split in splits] == [3, 4, 5] and splits[1][2].tolist() == [0, 1] * 2
    x, keep, _ = train_lra.batch(splits[0], torch.tensor([2, 1]), CPU)
    assert bytes(x[0, 0].tolist()) == b"b'first t"
    assert bytes(x[0, 1][keep[0, 1]].tolist()) == b"b'a\\n'"
    model = train_lra.make_model(options("--task", "retrieval", "--length", 9)).eval()
    logits, ortho = model(x, keep)
    one, two = (agf.AGFTransformer.forward(model, x[:, i], keep[:, i])[0] for i in (0, 1))
    both = torch.cat([one, two, one * two, one - two], 1)
    torch.testing.assert_close(logits, model.compare(both))
    assert logits.shape == (2, 2) and ortho.shape == (2,)
    (folder / "new_aan_pairs.test.tsv").write_text("1.0\tP\tQ\tonly one\n")
    lra_error("retrieval", tmp_path, "new_aan_pairs.test.tsv, line 1")

def test_pathfinder_reads_32_x_32_images_only_and_sees_changed_metadata(tmp_path):
    from PIL import Image                            # comes with matplotlib
    folder = tmp_path / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    for j in range(20):
        Image.fromarray(pixels[j]).save(folder / f"{j}.png")
    lines = [f". {j}.png {j} {j % 2} 1.8 6 2.0 5 1.5 14 1 1\n" for j in range(20)]
    for count, sizes in ((20, [16, 2, 2]), (10, [8, 1, 1])):
        (folder / "metadata" / "0.npy").write_text("".join(lines[:count]))
        splits = load("pathfinder", tmp_path)
        assert [len(split[0]) for split in splits] == sizes
        assert texts(*splits) == {pixels[j].tobytes(): j % 2 for j in range(count)}
    Image.fromarray(np.zeros((64, 16), np.uint8)).save(folder / "3.png")
    for image, words in ((3, "32 x 32"), (99, "No such file")):
        (folder / "metadata" / "0.npy").write_text(f"{lines[0]}. {image}.png 0 1\n")
        lra_error("pathfinder", tmp_path, "0.npy, line 2", words)

def test_missing_data_says_what_to_put_where_and_a_wrong_checksum_is_refused(tmp_path, monkeypatch):
    page = tmp_path / "page"
    page.write_bytes(b"an error page")
    for task, name in (("text", "aclImdb_v1.tar.gz"), ("image", "cifar-10-python.tar.gz")):
        digest = train_lra.ARCHIVES[name][1]
        monkeypatch.setitem(train_lra.ARCHIVES, name, (page.as_uri(), digest))
        lra_error(task, tmp_path, str(tmp_path / name), "invalid hash", page.as_uri(), "web.arch")
    for task, name in (("retrieval", "new_aan_pairs.train.tsv"), ("pathfinder", "length_14")):
        lra_error(task, tmp_path, name, "lra_release.gz", "7.7 GB", str(tmp_path))
    assert os.listdir(tmp_path) == ["page"]
    (tmp_path / "lra_release").write_bytes(b"the archive, unzipped")
    for task, words in (("retrieval", "untar"), ("pathfinder", "untar"), ("listops", "exists")):
        lra_error(task, tmp_path, "lra_release", words)

@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):                   # a second a run; `quick` is made before, with
    monkeypatch.setattr(train_uea, "draw", lambda *args: None)

@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    run = tmp_path_factory.mktemp("lra") / "run"
    status, out, err = lra("--task", "listops", "--out", run, "--seeds", 2, *QUICK)
    assert status == 0 and out.count("means nothing") == 2, err
    return run

def test_a_quick_run_leaves_its_folder_and_the_test_accuracy_of_the_best_dev_model(quick):
    assert sorted(os.listdir(quick)) == ["config.json", "curves.png", "filters.png",
                                         "metrics.jsonl", "result.json", "seed-0.pt", "seed-1.pt"]
    result, rows, s = result_of(quick), rows_of(quick), options("--task", "listops", *QUICK)
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
def test_every_task_runs_in_bfloat16_compiled_once(tmp_path, monkeypatch, task, flags, shape):
    seen, autocast = set(), torch.autocast

    def compile(net, **how):
        def look(x, *args):
            return seen.add((*x.shape[1:], net(x, *args)[0].dtype)) or net(x, *args)
        return look
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "autocast", lambda kind, *dtype, enabled: autocast(
        kind, *dtype, enabled=bool(dtype)))
    run = ["--task", task, "--out", tmp_path / "r", *QUICK, "--steps", 2, "--compile", *flags]
    status, _, err = lra(*run)
    # The first is the trial of check_compiler, before the run.
    assert status == 0 and seen == {(torch.float32,), (*shape, torch.bfloat16)}, err

def test_a_resumed_run_ends_at_the_same_numbers_after_a_full_disk(quick, tmp_path, monkeypatch):
    run, real, seen = tmp_path / "r", torch.save, []

    def full_disk(state, path):                      # in the middle of the second seed
        seen.append(path)
        if len(seen) == 7:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        real(state, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        one_line_error(lra("--task", "listops", "--out", run, "--seeds", 2, *QUICK), "disk full")
        patch.setattr(agf, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert lra("--resume", run)[0] == 130 and not (run / "result.json").exists()
    for _ in range(2):                               # the second time, all is done already
        assert lra("--resume", run)[0] == 0 and rows_of(quick) == rows_of(run)
        for key in ("test_accuracy", "test_accuracy_mixers_off", "dev_accuracy", "best_step"):
            assert result_of(quick)[key] == result_of(run)[key]
    a, b = (torch.load(folder / "seed-1.pt")["model"] for folder in (quick, run))
    assert all(torch.equal(a[name], b[name]) for name in a)

def test_lra_refuses_mistaken_options_and_to_resume_with_others(quick, tmp_path, monkeypatch):
    for flags, words in [([], "which task"), (["--task", "listop"], "listop"),
                         (["--task", "text", "--heads", 3], "heads must divide"),
                         (["--task", "text", "--warmup", 2], "warmup 2")]:
        one_line_error(lra("--quick", "--out", tmp_path / "r", *flags), words)
    assert not (tmp_path / "r").exists()
    for flags in (["--mixer", "softmax"], ["--steps", 5], ["--task", "text"]):
        one_line_error(lra("--resume", quick, *flags), flags[0][2:])
    toy = train_lra.draw_toy
    monkeypatch.setattr(train_lra, "draw_toy", lambda s, seed, count: toy(s, seed + 1, count))
    one_line_error(lra("--resume", quick), "data changed")

def test_a_batch_that_does_not_fit_is_halved_and_said_with_the_same_losses(tmp_path, monkeypatch):
    command = ["--task", "text", *QUICK, "--dropout", 0, "--out"]
    assert lra(*command, tmp_path / "whole")[0] == 0
    real, sizes = agf.AGFTransformer.forward, []

    def forward(self, x, keep=None):
        sizes.append(len(x))
        if self.training and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, x, keep)
    monkeypatch.setattr(agf.AGFTransformer, "forward", forward)
    status, out, err = lra(*command, tmp_path / "r")
    assert status == 0 and "4 samples at once" in out and "2 samples at once" in out, err
    assert sizes[:6] == [7, 4, 2, 2, 2, 1] and 7 not in sizes[1:]
    one, two = ([row["loss"] for row in rows_of(tmp_path / run)] for run in ("r", "whole"))
    assert one == pytest.approx(two, rel=1e-5)

TWO = """
import os, sys, train_lra
for mixer in ("agf", "none"):
    assert train_lra.main([*sys.argv[2:], mixer, "--out", sys.argv[1] + mixer]) == 0
    os.environ["MASTER_PORT"] = os.environ["NEXT_PORT"]
"""

def test_two_processes_end_where_one_does(tmp_path):
    """Batches of 7: 4 and 3 samples, in parts of one, so the second process has an empty part."""
    command = [*map(str, QUICK), *"--task text --dropout 0 --micro-batch 1 --mixer".split()]
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [str(free.getsockname()[1]) for free in (a, b)]
    how = dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1", WORLD_SIZE="2",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[0], NEXT_PORT=ports[1])
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(tmp_path / "two-"), *command],
                             env=how | dict(RANK=rank, LOCAL_RANK=rank)) for rank in "01"]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    for mixer in ("agf", "none"):
        one, two = tmp_path / mixer, tmp_path / f"two-{mixer}"
        assert lra(*command, mixer, "--out", one)[0] == 0
        for a, b in zip(rows_of(one), rows_of(two), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        a, b = (torch.load(run / "seed-0.pt")["model"] for run in (one, two))
        assert all((a[name] - b[name]).abs().max() <= 1e-5 for name in a)
        assert result_of(one)["test_accuracy"] == result_of(two)["test_accuracy"]
        assert result_of(two)["processes"] == 2

@pytest.mark.parametrize("given", [
    dict(RANK="1"), dict(RANK=""), dict(WORLD_SIZE="2"), dict(RANK="one", WORLD_SIZE="2"),
    dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1"), {}])
def test_without_torchruns_variables_it_is_one_process_and_says_so(given, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert train_lra.find_processes() == (0, 1, 0)
    err = capsys.readouterr().err
    assert err.count("\n") == bool(given) and all(name in err for name in given)

def test_the_lra_settings_and_schedule_are_the_published_ones(tmp_path):
    found = {task: options("--task", task) for task in train_lra.TASKS}
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
    run = ["--task", "image", *QUICK, "--steps", 20, "--warmup", 0.25, "--out", tmp_path / "r"]
    assert lra(*run)[0] == 0
    rates = [*np.linspace(4e-6, 1e-4, 6)[:-1], *np.linspace(1e-4, 4e-10, 16)[:-1]]
    assert [row["lr"] for row in rows_of(tmp_path / "r")] == pytest.approx(rates)
