"""Each test is named after the claim it proves. Offline, on the CPU, under two minutes."""

import contextlib
import copy
import csv
import io
import json
import math
import os
import pickle
import pickletools
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn

import agf
import train_lra
import train_uea

HERE = Path(__file__).parent
# a, b of every published setting
PUBLISHED = [(1.5, -1.5), (2, 0.5), (1, 0.2), (1.5, 2), (1.5, 1), (2, 1.5), (1, 0), (0, 0), (-0.5, -0.5),
             (2, -1), (2, -2), (2, -1.5), (1.5, -1)]


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
    return ((c - 1) * (c * (c - 2) * x + a ** 2 - b ** 2) * printed_recurrence(k - 1, x, a, b)
            - 2 * (k + a - 1) * (k + b - 1) * c * printed_recurrence(k - 2, x, a, b)) / (2 * k * (k + a + b) * (c - 2))


@pytest.mark.parametrize("a, b", PUBLISHED)
def test_jacobi_is_the_printed_recurrence(a, b):
    x = torch.rand(2, 3, dtype=torch.float64)
    P = agf.jacobi(x, 6, a, b)
    assert P.shape == (7, 2, 3)
    slow = [[[printed_recurrence(k, v.item(), a, b) for v in row] for row in x] for k in range(7)]
    torch.testing.assert_close(P, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a, b", [p for p in PUBLISHED if min(p) > -1])
def test_jacobi_is_scipys(a, b):
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    theirs = np.stack([scipy.special.eval_jacobi(k, a, b, x.numpy()) for k in range(11)])
    np.testing.assert_allclose(agf.jacobi(x, 10, a, b).numpy(), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("a, b", [(1.0, 0.0), (0.0, 0.0), (2.0, 1.5), (-0.5, -0.5)])
def test_jacobi_is_orthogonal_under_its_weight(a, b):
    nodes, weights = scipy.special.roots_jacobi(30, a, b)          # Gauss quadrature, exact here
    P = agf.jacobi(torch.from_numpy(nodes), 8, a, b).numpy()
    gram = np.einsum("kx,jx,x->kj", P, P, weights)
    off = gram - np.diag(np.diag(gram))
    assert abs(off).max() < 1e-12 * np.diag(gram).max() and np.diag(gram).min() > 0


@pytest.mark.parametrize("order, a, b, words", [(-1, 1, 0, "-1"), (3, -1.5, -0.5, "a=-1.5, b=-0.5"),
                                                (4, -2, -2, "k=3"), (2.5, 1, 0, "2.5"), (3, math.nan, 0, "nan")])
def test_an_undefined_basis_is_refused_with_its_values(order, a, b, words):
    for build in (lambda: agf.jacobi(torch.zeros(2), order, a, b), lambda: agf.JacobiFilter(order, "jacobi", a, b)):
        with pytest.raises(ValueError, match=words):
            build()
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
        found.append([p, *torch.autograd.grad((p * weight).sum() + 0 * filter.theta.sum() + 0 * s.sum(), [s, filter.theta])])
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


def test_the_plain_forms_bear_torch_func_and_second_derivatives_and_the_fast_ones_refuse():
    filter = agf.JacobiFilter(4, "jacobi", 2, -1.5).double()
    nn.init.normal_(filter.theta)
    s = torch.rand(6, dtype=torch.float64, requires_grad=True)
    one = torch.func.vmap(torch.func.grad(filter.plain))(s)
    torch.testing.assert_close(one, torch.autograd.grad(filter(s).sum(), s)[0])
    assert torch.autograd.gradgradcheck(filter.plain, (s,))
    mixer, x = agf.AGFAttention(4, 2), torch.randn(1, 128, 4, requires_grad=True)      # long: not plain
    for call, at in ((filter, s), (lambda x: mixer(x)[0], x)):
        first, = torch.autograd.grad(call(at).square().sum(), at, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda at: call(at).sum())(at)


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
    torch.testing.assert_close(agf.orthogonality_loss(U, V), slow_loss(U, V, torch.ones(3, 9, dtype=torch.bool)))
    Q = torch.linalg.qr(torch.randn(1, 1, 9, 4, dtype=torch.float64)).Q
    assert agf.orthogonality_loss(Q, Q).item() < 1e-14


def slow_agf(mixer, x, keep):
    """The paper's formulas with an explicit n x n matrix for each sample and head."""
    D, h = x.shape[-1], mixer.heads
    d, outs, losses = D // h, [], []
    W, bias = mixer.in_proj.weight.view(4, h, d, D), mixer.in_proj.bias.view(4, h, d)
    for X, real in zip(x, keep):
        X = X[real]                                                  # only real tokens exist
        heads, loss = [], 0
        for i in range(h):
            z = [X @ W[j, i].T + bias[j, i] for j in range(4)]
            U = torch.exp(z[0]) / torch.exp(z[0]).sum(1, keepdim=True)
            s = 1 / (1 + torch.exp(-z[1]))
            V = torch.exp(z[2]) / torch.exp(z[2]).sum(0, keepdim=True)
            p = s if isinstance(mixer.filter, nn.Identity) else slow_filter(mixer.filter, s)
            heads.append((U * p) @ V.T @ z[3])                       # (n x n) first
            loss = loss + slow_loss(U[None, None], V[None, None], torch.ones(1, len(X), dtype=torch.bool))
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
    for out, ortho in (mixer(x, keep), slow_agf(mixer, x, random_keep(1, 10).expand(4, 10) if keep is None else keep)):
        total = (out * weight).sum() + ortho.sum()
        found.append([out, ortho, *torch.autograd.grad(total, [x, *mixer.parameters()], allow_unused=True)])
    for fast, slow in zip(*found):
        if slow is None:                                             # the fixed theta_0 of "uv"
            assert fast is None or not fast.any()
        else:
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_on_long_sequences_equals_plain_in_values_and_gradients(dtype, masked):
    amp, wide = dtype == torch.bfloat16, torch.float32 if dtype == torch.bfloat16 else dtype
    mixer, found, n = agf.AGFAttention(24, 3, order=6).to(wide), [], 150
    nn.init.normal_(mixer.filter.theta)
    x, keep = torch.randn(4, n, 24, dtype=wide, requires_grad=True), random_keep(4, n) if masked else None
    weight = torch.randn(4, n, 24)
    for call in (mixer, mixer.plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out, ortho = call(x, keep)
        assert out.dtype == dtype and ortho.dtype == wide
        total = (out * weight).sum() + ortho.sum()
        assert ("Products" in total.grad_fn.next_functions[1][0].next_functions[0][0].name()) == (call is mixer)
        found.append([out, ortho, *torch.autograd.grad(total, [x, *mixer.parameters()])])
    for fast, plain in zip(*found):
        assert (fast - plain).norm() < {8: 1e-13, 4: 1e-5, 2: 0.02}[dtype.itemsize] * plain.norm()


def test_gradcheck_of_the_mixer():
    mixer = agf.AGFAttention(6, 2, order=3).double()
    nn.init.normal_(mixer.filter.theta)
    x, keep = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True), random_keep(2, 4)
    params = dict(mixer.named_parameters())
    call = lambda x, *values: torch.func.functional_call(mixer, dict(zip(params, values)), (x, keep))
    values = [p.detach().clone().requires_grad_() for p in params.values()]
    assert torch.autograd.gradcheck(call, (x, *values), atol=1e-6)


def test_uv_is_row_stochastic_and_is_efficient_attention():
    mixer = agf.AGFAttention(16, 2, order=0).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    U, s, V, value = mixer.factors(x)
    assert U.shape == s.shape == V.shape == value.shape == (2, 2, 11, 8)
    torch.testing.assert_close(U.sum(-1), torch.ones(2, 2, 11, dtype=torch.float64))
    torch.testing.assert_close(V.sum(-2), torch.ones(2, 2, 8, dtype=torch.float64))
    torch.testing.assert_close(mixer.matrix(x).sum(-1), torch.ones(2, 2, 11, dtype=torch.float64))
    # Efficient Attention (Shen et al. 2021), written from its own formula: softmax(Q) (softmax(K)^T V)
    query, _, key, val = mixer.in_proj(x).chunk(4, -1)
    cut = lambda t: t.reshape(2, 11, 2, 8)
    context = torch.einsum("bnhd,bnhe->bhde", cut(key).softmax(1), cut(val))
    theirs = torch.einsum("bnhd,bhde->bnhe", cut(query).softmax(-1), context).reshape(2, 11, 16)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(theirs), rtol=1e-11, atol=1e-12)


def test_usv_is_the_filter_p_of_s_equals_s():
    usv = agf.MIXERS["usv"](8, 2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    U, s, V, _ = usv.factors(x)
    torch.testing.assert_close(usv.matrix(x), (U * s) @ V.mT)


def test_softmax_attention_is_torchs_multi_head_attention():
    mine, theirs = agf.SoftmaxAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.load_state_dict({"in_proj_weight": mine.in_proj.weight, "in_proj_bias": mine.in_proj.bias,
                            "out_proj.weight": mine.out_proj.weight, "out_proj.bias": mine.out_proj.bias})
    x, keep = torch.randn(3, 8, 12, dtype=torch.float64), random_keep(3, 8)
    expected = theirs(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
    torch.testing.assert_close(mine(x, keep)[0][keep], expected[keep])


def test_theorem_1_powers_of_a_softmax_matrix_are_low_pass_at_the_rate_of_lambda_2():
    A = agf.SoftmaxAttention(16, 1).double().matrix(3 * torch.randn(1, 12, 16, dtype=torch.float64))[0, 0]
    size = torch.linalg.eigvals(A).abs().sort(descending=True).values
    assert abs(size[0] - 1) < 1e-12 and size[1] < 1
    signal, ratios = torch.randn(1, 12, 4, dtype=torch.float64), []
    for _ in range(100):
        signal = A @ signal
        ratios.append(agf.high_frequency_ratio(signal).item())
    assert ratios[-1] < 1e-3 * ratios[0]
    assert abs((ratios[99] / ratios[49]) ** (1 / 50) / size[1].item() - 1) < 0.05


def test_theorem_2_signs_of_theta_choose_low_or_high_pass():
    s = torch.linspace(0, 1, 101)
    low, high = agf.JacobiFilter(4, "monomial"), agf.JacobiFilter(4, "monomial")
    low.theta.data = torch.atanh(torch.tensor([0.0, 0.5, 0.25, 0.125, 0.06]))
    high.theta.data = torch.atanh(torch.tensor([0.0, -0.5, 0.25, -0.125, 0.06]))     # (-alpha)^k
    assert (low(s).diff() > 0).all() and (high(s).diff() < 0).all()


# ------------------------------------------------------------------ padding, order, precision, memory

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
    torch.testing.assert_close(x_in.detach(), before, equal_nan=True)          # caller's tensor untouched


def small(**changes):
    return agf.AGFConfig(**dict(dict(classes=3, length=20, channels=2, dim=16, heads=2, hidden=32, dropout=0.0), **changes))


@pytest.mark.parametrize("mixer", list(agf.MIXERS))
@pytest.mark.parametrize("pool", ["mean", "flatten", "first"])
@pytest.mark.parametrize("shape", [{}, dict(kernel=5, stride=3, norm="post", zero_init=True), dict(vocab=9)])
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
    assert more.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", list(agf.MIXERS))
def test_mixers_are_permutation_equivariant(name):
    mixer, order = agf.MIXERS[name](12, 3).double(), torch.randperm(9)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x[:, order])[0], mixer(x)[0][:, order])


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
            assert U.dtype == s.dtype == V.dtype == mixer.filter(s).dtype == torch.float32
            assert value.dtype == torch.bfloat16
            theirs, mine = agf.orthogonality_loss(U, V), slow_loss(U.double(), V.double(), torch.ones(2, 5) > 0)
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


@pytest.mark.parametrize("name, n, amp", [(name, 20, False) for name in agf.MIXERS]
                         + [("agf", 150, False), ("agf", 150, True)])
def test_the_model_compiles_without_a_graph_break(name, n, amp):
    model = agf.AGFTransformer(small(mixer=name, depth=1, length=n))
    x, keep = torch.randn(2, n, 2), random_keep(2, n)
    torch.compiler.reset()
    fast, found = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for call in (fast, model):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = [*call(x), *call(x, keep)]
        sum(part.sum() for part in out).backward()
        found.append(out + [p.grad for p in model.parameters() if p.grad is not None])
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, **dict(rtol=0.05, atol=0.05) if amp else {})


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
    assert sum(saved.values()) <= 9 * n * 16 * 4                   # 8 n D floats and the weights, K = 10
    (out.sum() + ortho.sum()).backward()


def test_a_hundred_thousand_tokens_fit():
    mixer, x = agf.AGFAttention(16, 2), torch.randn(1, 100_000, 16, requires_grad=True)
    out, ortho = mixer(x)                                          # n x n floats would be 40 GB
    (out.sum() + ortho.sum()).backward()
    assert x.grad.isfinite().all()


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
def test_models_copy_pickle_and_round_trip_their_state(mixer, tmp_path):
    model = agf.AGFTransformer(small(mixer=mixer)).eval()
    x, other = torch.randn(2, 20, 2), agf.AGFTransformer(small(mixer=mixer)).eval()
    agf.save(tmp_path / "m.pt", model=model.state_dict())
    other.load_state_dict(agf.load(tmp_path / "m.pt")["model"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(twin(x)[0], model(x)[0])
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("changes, words", [
    (dict(heads=3), "heads must divide"), (dict(norm="mid"), "mid"), (dict(mixer="agff"), "agff"),
    (dict(depth=0), "depth"), (dict(kernel=4), "kernel"), (dict(dropout=1.0), "dropout"), (dict(pool="max"), "max"), (dict(zero_init=True, identity=False), "identity")])
def test_an_impossible_configuration_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_an_input_longer_than_the_model_is_named():
    with pytest.raises(ValueError, match="21 steps"):
        agf.AGFTransformer(small())(torch.randn(1, 21, 2))


def test_diagnostics_are_their_formulas_and_ignore_padding():
    x, keep = torch.randn(3, 8, 5, dtype=torch.float64), random_keep(3, 8)
    keep[1] = torch.arange(8) < 5
    dirty = x.masked_fill(~keep[:, :, None], math.nan)
    keep[2] = torch.arange(8) < 2
    for i in range(3):
        real = x[i][keep[i]]
        cos = [torch.cosine_similarity(real[p], real[q], 0) for p in range(len(real)) for q in range(len(real)) if p != q]
        torch.testing.assert_close(agf.token_cosine(dirty.nan_to_num(9), keep)[i], torch.stack(cos).mean())
        low = real.mean(0).expand_as(real)
        torch.testing.assert_close(agf.high_frequency_ratio(dirty.nan_to_num(9), keep)[i], (real - low).norm() / low.norm())
        s = torch.linalg.svdvals(real)
        s = s / s.sum()
        torch.testing.assert_close(agf.effective_rank(dirty.nan_to_num(9), keep)[i], torch.exp(-(s * s.log()).sum()))
    assert agf.token_cosine(torch.ones(1, 4, 3)).item() == pytest.approx(1)
    assert agf.effective_rank(torch.eye(4)[None]).item() == pytest.approx(4)


# --------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("name", ["agf", "softmax"])
def test_one_batch_is_overfitted(name):
    model = agf.AGFTransformer(small(mixer=name))
    x, keep, y = torch.randn(12, 20, 2), random_keep(12, 20), torch.randint(3, (12,))
    optimizer = torch.optim.AdamW(model.parameters())
    agf.fit(model, optimizer, lambda step: (x, keep, y), 150, rate=lambda step: 3e-3)
    assert (agf.evaluate(model, [(x, keep)]).argmax(1) == y).all()


def test_a_restored_training_state_ends_at_the_same_numbers(tmp_path):
    data = [(torch.randn(4, 20, 2), None, torch.randint(3, (4,))) for _ in range(20)]

    def start():
        torch.manual_seed(1)
        model = agf.AGFTransformer(small(dropout=0.3))
        return model, torch.optim.AdamW(model.parameters())
    whole, optimizer = start()
    agf.fit(whole, optimizer, data.__getitem__, 20, rate=lambda step: 1e-3 * (step + 1))
    half, optimizer = start()
    agf.fit(half, optimizer, data.__getitem__, 8, rate=lambda step: 1e-3 * (step + 1))
    agf.save(tmp_path / "c.pt", **agf.training_state(half, optimizer))
    again, optimizer = start()
    torch.manual_seed(99)
    agf.restore(agf.load(tmp_path / "c.pt"), again, optimizer)
    agf.fit(again, optimizer, data.__getitem__, 20, rate=lambda step: 1e-3 * (step + 1), start=8)
    for p, q in zip(whole.parameters(), again.parameters()):
        assert torch.equal(p, q)


def test_agf_py_alone_in_an_empty_folder_trains_a_step(tmp_path):
    shutil.copy(HERE / "agf.py", tmp_path)
    code = ("import agf, torch\n"
            "model = agf.AGFTransformer(agf.AGFConfig(classes=2, length=9))\n"
            "agf.fit(model, torch.optim.AdamW(model.parameters()), lambda step: (torch.randn(4, 9, 1), None,"
            " torch.tensor([0, 1, 0, 1])), 1, rate=lambda step: 1e-3)\n"
            "print('trained')")
    roots = {line.split()[1].split(".")[0] for line in (HERE / "agf.py").read_text().splitlines()
             if line.startswith(("import ", "from "))}
    assert roots - {"torch"} <= set(sys.stdlib_module_names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr


# ------------------------------------------------------------------------------ python train_uea.py

def ts(name, lines, labels="a b", extra=""):
    head = f"@problemName {name}\n@timeStamps false\n@missing false\n@univariate false\n@equalLength false\n"
    return head + extra + (f"@classLabel true {labels}\n" if labels else "@classLabel false\n") + "@data\n" + "\n".join(lines) + "\n"


def write_toy(folder, name="Toy", n=24, generator=None):
    """Two classes that differ in frequency, two channels, unequal lengths 12 to 20."""
    rng = np.random.default_rng(0)
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in ("TRAIN", "TEST"):
        lines = []
        for i in range(n):
            t = np.arange(20 if i == 0 else rng.integers(12, 21))
            x = np.stack([np.sin((0.4, 1.1)[i % 2] * t + rng.uniform(0, 6)), rng.normal(size=len(t))])
            lines.append(":".join(",".join(f"{v:.4f}" for v in c) for c in x) + ":" + "ab"[i % 2])
        (folder / name / f"{name}_{split}.ts").write_text(ts(name, lines))
    return folder


def uea(*argv, script=train_uea):
    """Call a script in this process: -> (exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    train_uea.stop_asked.clear()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = script.main([str(a) for a in argv])
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return status, out.getvalue(), err.getvalue()


SMALL = ["--dim", 16, "--heads", 2, "--kernel", 3, "--epochs", 3]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert uea("--dataset", "Toy", "--data-dir", toy, "--out", out, "--seeds", 2, *SMALL)[0] == 0
    return out


def test_a_run_leaves_its_whole_folder(finished):
    assert sorted(os.listdir(finished)) == ["config.json", "curves.png", "filters.png", "metrics.jsonl", "model.pt", "result.json"]
    result = json.loads((finished / "result.json").read_text())
    assert result["dataset"] == "Toy" and result["mixer"] == "agf" and result["preset"] == "compact"
    assert result["protocol"] == "honest" and result["seeds"] == [0, 1] and len(result["train_seconds"]) == 2
    assert result["test_accuracy_mean"] == pytest.approx(np.mean(result["test_accuracy"]))
    assert result["test_accuracy_std"] == pytest.approx(np.std(result["test_accuracy"], ddof=1))
    assert all(a * 24 == pytest.approx(round(a * 24)) for a in result["test_accuracy"])
    assert {"parameters", "device", "versions", "command"} <= set(result) and "best_test_accuracy" not in result
    assert "torch" in result["versions"] and result["versions"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["epoch"]) for r in rows] == [(s, e) for s in (0, 1) for e in (1, 2, 3)]
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_test_split_cannot_reach_training(toy, finished, tmp_path):
    """Other test labels and values: the same trained weights to the last bit."""
    (tmp_path / "Toy").mkdir()
    shutil.copy(toy / "Toy" / "Toy_TRAIN.ts", tmp_path / "Toy")
    (tmp_path / "Toy" / "Toy_TEST.ts").write_text(ts("Toy", ["1000,2000,3000:4,5,6:b"] * 5))
    assert uea("--dataset", "Toy", "--data-dir", tmp_path, "--out", tmp_path / "r", "--seeds", 2, *SMALL)[0] == 0
    one, two = agf.load(finished / "model.pt"), agf.load(tmp_path / "r" / "model.pt")
    assert one["mean"] == two["mean"] and all(torch.equal(p, two["model"][k]) for k, p in one["model"].items())


def test_protocol_paper_reports_the_best_test_epoch_with_a_label(toy, tmp_path):
    status, out, _ = uea("--dataset", "Toy", "--data-dir", toy, "--out", tmp_path / "r", "--protocol", "paper", *SMALL)
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert status == 0 and result["best_test_accuracy"] == [max(r["test_accuracy"] for r in rows)]
    assert "optimistic" in result["best_test_accuracy_label"] and "optimistic" in out
    assert result["test_accuracy"] == [rows[-1]["test_accuracy"]]


@pytest.mark.parametrize("flags", [["--mixer", "none"], ["--mixer", "softmax", "--pool", "flatten"], ["--mixer", "usv"],
                                   ["--basis", "monomial", "--order", 2, "--augment", 0, "--kernel", 1], ["--seed", 7]])
def test_what_a_student_would_change_works(toy, tmp_path, flags):
    status, _, err = uea("--dataset", "Toy", "--data-dir", toy, "--out", tmp_path / "r", *SMALL, *flags)
    assert status == 0, err
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    for flag, value in zip(flags[::2], flags[1::2]):
        assert config["options"][flag[2:]] == value
    assert (tmp_path / "r" / "filters.png").exists() == ("none" not in flags and "softmax" not in flags)


def test_the_published_settings_are_those_of_the_paper():
    sets = {name: train_uea.resolve(train_uea.options(["--dataset", name, "--preset", "paper"])[0]) for name in train_uea.PAPER_SETS}
    assert len(sets) == 10 and all(s["dim"] == 512 and s["heads"] == 8 and s["norm"] == "post" for s in sets.values())
    pick = lambda name: tuple(sets[name][k] for k in ("basis", "order", "a", "b", "gamma", "identity", "epochs"))
    assert pick("JapaneseVowels")[:2] == ("legendre", 4) and pick("JapaneseVowels")[4:] == (0.01, False, 100)
    assert pick("PEMS-SF") == ("jacobi", 5, 1.5, 2.0, 0.1, True, 400)
    assert sets["SpokenArabicDigits"]["optimizer"] == "adam" and sets["Heartbeat"]["basis"] == "chebyshev"
    for name, setting in sets.items():               # each builds
        train_uea.build(setting, "agf", dict(classes=["a"] * 3, mean=[0.0] * 2), 8)


def test_resume_after_a_kill_ends_at_the_same_numbers(toy, finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass
    real, seen = agf.save, []

    def save(path, **parts):                         # the power goes after the second checkpoint
        real(path, **parts)
        if Path(path).name == "checkpoint.pt":
            seen.append(path)
            if len(seen) == 2:
                raise Killed
    monkeypatch.setattr(agf, "save", save)
    monkeypatch.setattr(train_uea, "SAVE_EVERY", 0)  # seconds: save after every step
    run = tmp_path / "r"
    with pytest.raises(Killed):
        uea("--dataset", "Toy", "--data-dir", toy, "--out", run, "--seeds", 2, *SMALL)
    assert not (run / "result.json").exists()
    monkeypatch.undo()
    status, _, err = uea("--resume", run, "--data-dir", toy)
    assert status == 0, err
    one, two = (json.loads((r / "result.json").read_text()) for r in (finished, run))
    assert one["test_accuracy"] == two["test_accuracy"]
    a, b = agf.load(finished / "model.pt")["model"], agf.load(run / "model.pt")["model"]
    assert all(torch.equal(a[k], b[k]) for k in a)
    drop = lambda r: (r / "metrics.jsonl").read_text()
    assert drop(finished) == drop(run)
    status, out, _ = uea("--resume", run)
    assert status == 0 and "finished" in out


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(toy, tmp_path):
    run = tmp_path / "r"
    command = [sys.executable, str(HERE / "train_uea.py")]
    process = subprocess.Popen(command + ["--dataset", "Toy", "--data-dir", str(toy), "--out", str(run), "--epochs", "2000",
                               "--dim", "16", "--heads", "2"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert "run folder" in process.stdout.readline() + process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {run}" in err and "Traceback" not in err
    assert 0 < agf.load(run / "checkpoint.pt")["training"]["step"] < 2000 * 2


def test_predict_writes_labels_and_probabilities(toy, finished):
    status, out, err = uea("--predict", toy / "Toy" / "Toy_TEST.ts", "--checkpoint", finished)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and len(rows) == 24 and list(rows[0]) == ["series", "label", "p(a)", "p(b)"], err
    assert all(float(r["p(a)"]) + float(r["p(b)"]) == pytest.approx(1, abs=1e-5) for r in rows)
    assert all(r["label"] == ("a" if float(r["p(a)"]) > float(r["p(b)"]) else "b") for r in rows)
    truth = "ab" * 12
    accuracy = np.mean([r["label"] == t for r, t in zip(rows, truth)])
    assert accuracy == json.loads((finished / "result.json").read_text())["test_accuracy"][0]


def test_predict_takes_series_without_labels(toy, finished, tmp_path):
    (tmp_path / "new.ts").write_text(ts("New", ["1,2,3:4,5,6", "1,2:4,5"], labels=""))
    status, out, err = uea("--predict", tmp_path / "new.ts", "--checkpoint", finished)
    assert status == 0 and out.count("\n") == 3, err


GOOD = ["1,2,3:4,5,6:a", "2,3,4:1,2,3:b", "1,2:4,5:a"]


@pytest.mark.parametrize("text, words", [
    ("", "empty"), ("nonsense", "not a .ts file"), (ts("Bad", GOOD[:2])[:-12], "Bad_TRAIN.ts"),
    (ts("Bad", ["1,2:3,4", "1,2:3,4"], labels=""), "labels are missing"), (ts("Bad", [])[:-1], "holds no series"),
    (ts("Bad", ["1,inf,3:4,5,6:a"]), "infinite"), (ts("Bad", [":" + ":a"]), "Bad_TRAIN.ts"),
    (ts("Bad", ["1,2,3:4,5,6:c"]), "'c'"), (ts("Bad", ["1,2,3:4,5,6:a", "1,2,3:a"]), "Bad_TRAIN.ts")])
def test_a_damaged_file_gets_one_clear_line(tmp_path, text, words):
    (tmp_path / "Bad").mkdir()
    (tmp_path / "Bad" / "Bad_TRAIN.ts").write_text(text)
    (tmp_path / "Bad" / "Bad_TEST.ts").write_text(ts("Bad", GOOD))
    one_line_error(uea("--dataset", "Bad", "--data-dir", tmp_path, "--out", tmp_path / "r"), words)
    assert not (tmp_path / "r").exists()


def one_line_error(result, *words):
    status, _, err = result
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err


def test_missing_values_are_interpolated_and_said(tmp_path, toy):
    (tmp_path / "Bad").mkdir()
    (tmp_path / "Bad" / "Bad_TRAIN.ts").write_text(ts("Bad", ["1,NaN,3,?:4,5,6,7:a"] + GOOD))
    (tmp_path / "Bad" / "Bad_TEST.ts").write_text(ts("Bad", GOOD))
    series, labels, classes = train_uea.read(tmp_path / "Bad" / "Bad_TRAIN.ts")
    assert series[0][:, 0].tolist() == [1, 2, 3, 3] and labels == list("aaba") and classes == ["a", "b"]
    status, _, err = uea("--dataset", "Bad", "--data-dir", tmp_path, "--out", tmp_path / "r", *SMALL)
    assert status == 0 and "2 missing values, interpolated" in err


@pytest.mark.parametrize("flags, words", [
    (["--order", -1], "-1"), (["--heads", 3], "heads must divide"), (["--order", "many"], "many"),
    (["--dim", 0], "dim"), (["--mixer", "agff"], "agff"), (["--epochs", 0], "--epochs"), (["--a", -2, "--b", -1], "a=-2"),
    (["--lr", "nan"], "--lr"), (["--seeds", 0], "--seeds"), (["--device", "warp"], "warp"), (["--preset", "paper"], "Toy"),
    (["--out", "/dev/null/run"], "/dev/null/run"), (["--dropout", 1.5], "dropout"), (["--lrr", 3], "--lrr")])
def test_a_mistaken_option_gets_one_clear_line(toy, tmp_path, flags, words):
    result = uea("--dataset", "Toy", "--data-dir", toy, "--out", tmp_path / "r", *flags)
    one_line_error(result, words)
    assert not (tmp_path / "r").exists()


def test_an_unknown_data_set_lists_near_names(tmp_path):
    one_line_error(uea("--dataset", "JapaneseVowel", "--data-dir", tmp_path / "d"), "JapaneseVowels")
    one_line_error(uea("--dataset", "xyzzy", "--data-dir", tmp_path / "d"), "--list")
    one_line_error(uea(), "--dataset JapaneseVowels")
    assert not (tmp_path / "d").exists()


def test_a_failed_download_says_which_file_to_put_where(tmp_path, monkeypatch):
    import aeon.datasets

    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(aeon.datasets, "load_classification", no_network)
    one_line_error(uea("--dataset", "Libras", "--data-dir", tmp_path / "d"), "Libras.zip", "Libras_TRAIN.ts", "no route")
    assert not any((tmp_path / "d").iterdir())


def test_a_wrong_or_corrupted_checkpoint_is_refused(toy, finished, tmp_path):
    file = toy / "Toy" / "Toy_TEST.ts"
    (tmp_path / "model.pt").write_bytes((finished / "model.pt").read_bytes()[:2000])
    one_line_error(uea("--predict", file, "--checkpoint", tmp_path), "not a readable checkpoint")
    torch.save({"a": 1}, tmp_path / "other.pt")
    one_line_error(uea("--predict", file, "--checkpoint", tmp_path / "other.pt"), "not a checkpoint of train_uea.py")
    one_line_error(uea("--predict", file, "--checkpoint", tmp_path / "none.pt"), "no such checkpoint")
    one_line_error(uea("--predict", file), "--checkpoint")
    (tmp_path / "three.ts").write_text(ts("Three", ["1,2:3,4:5,6:a"]))
    one_line_error(uea("--predict", tmp_path / "three.ts", "--checkpoint", finished), "3 channels", "Toy")
    one_line_error(uea("--predict", file, "--checkpoint", finished, "--dataset", "Other"), "Toy", "Other")
    one_line_error(uea("--resume", tmp_path / "nowhere"), "nowhere")


def test_a_run_folder_is_never_overwritten(toy, finished):
    before = (finished / "result.json").read_text()
    one_line_error(uea("--dataset", "Toy", "--data-dir", toy, "--out", finished, *SMALL), "already holds a run")
    assert (finished / "result.json").read_text() == before


def test_list_names_the_papers_ten_and_what_is_here(toy):
    status, out, _ = uea("--list", "--data-dir", toy)
    assert status == 0 and "Toy" in out and "BasicMotions" in out and all(name in out for name in train_uea.PAPER_SETS)


# ------------------------------------------------------------------------------ python train_lra.py

def literal_tree(rng, depth=1):
    """The official sampler as its paper tells it, node by node: -> nested tuple or digit, length."""
    if depth == 10 or rng.random() > 0.25:
        return rng.randrange(10), 1
    args, length = [], 2
    for _ in range(rng.randint(2, 10)):
        arg, n = literal_tree(rng, depth + 1)
        args.append(arg)
        length += n
    return (("MIN", "MAX", "MED", "SM")[rng.randrange(4)], *args), length


def official_text(tree):
    """Nested pairs: each argument, then the closing bracket, is joined to what stands before it."""
    if isinstance(tree, int):
        return str(tree)
    text = f"[{tree[0]}"
    for part in [*map(official_text, tree[1:]), "]"]:
        text = f"( {text} {part} )"
    return text


def evaluate_tree(tree):
    if isinstance(tree, int):
        return tree
    args = [evaluate_tree(arg) for arg in tree[1:]]
    return {"MIN": min, "MAX": max, "MED": lambda v: int(np.median(v)), "SM": lambda v: sum(v) % 10}[tree[0]](args)


def parse(text):
    """Tokens without parentheses -> nested tuple."""
    stack = [[]]
    for token in text.replace("(", "").replace(")", "").split():
        if token.startswith("["):
            stack.append([token[1:]])
        elif token == "]":
            done = tuple(stack.pop())
            stack[-1].append(done)
        else:
            stack[-1].append(int(token))
    (tree,), = stack
    return tree


def nodes(tree, depth=1):
    yield tree, depth
    if isinstance(tree, tuple):
        for arg in tree[1:]:
            yield from nodes(arg, depth + 1)


def lines_of(seed, count, low, high):
    return train_lra.draw_trees(np.random.default_rng(seed), count, low, high)


def test_listops_targets_are_an_independent_evaluators_and_the_text_is_the_official_form():
    found = lines_of(1, 300, 500, 2000)
    assert len(found) > 50 and lines_of(1, 300, 500, 2000) == found
    for line in found:
        text, target = line.rstrip("\n").split("\t")
        tree = parse(text)
        assert official_text(tree) == text and evaluate_tree(tree) == int(target)
        assert 500 < len(text.replace("(", "").replace(")", "").split()) < 2000
        assert max(depth for _, depth in nodes(tree)) <= 10


def test_listops_has_the_distribution_of_a_literal_sampler():
    rng, theirs = random.Random(2), []
    while len(theirs) < 600:
        tree, length = literal_tree(rng)
        if 30 < length < 300:
            theirs.append(tree)
    ours = [parse(line.split("\t")[0]) for line in lines_of(3, 5000, 30, 300)][:600]
    assert len(ours) == 600

    def measures(trees):
        every = [[(t[0], len(t) - 1) if isinstance(t, tuple) else (t, 0) for t, _ in nodes(tree)] for tree in trees]
        return dict(length=[sum(1 + (n > 0) for _, n in one) for one in every],
                    depth=[max(d for _, d in nodes(tree)) for tree in trees],
                    operators=[sum(n > 0 for _, n in one) for one in every],
                    target=[evaluate_tree(tree) for tree in trees],
                    arguments=[n for one in every for _, n in one if n][::7],        # thinned: one tree's
                    kind=[str(k) for one in every for k, n in one if n][::7],        # nodes go together
                    root=[tree[0] for tree in trees], digit=[k for one in every for k, n in one if not n][::7])
    a, b = measures(theirs), measures(ours)
    for name in a:
        if name in ("length", "operators"):
            p = scipy.stats.ks_2samp(a[name], b[name]).pvalue
        else:
            values = sorted({*a[name], *b[name]})
            table = np.array([[x[name].count(v) for v in values] for x in (a, b)])
            p = scipy.stats.chi2_contingency(table[:, table.sum(0) > 5]).pvalue
        assert p > 1e-3, (name, p)


def test_the_first_operator_alone_answers_a_third_of_listops():
    rows = [(line.split("[")[1].split()[0], line[-2]) for line in lines_of(4, 8000, 500, 2000)]
    train, test = rows[::2], rows[1::2]
    count = lambda op: max("0123456789", key=lambda digit: train.count((op, digit)))
    best = {op: count(op) for op, _ in train}
    assert len(test) > 700 and best["MIN"] == "0" and best["MAX"] == "9"
    assert 0.3 < np.mean([best[op] == target for op, target in test]) < 0.42


def test_listops_files_have_exact_counts_share_no_sample_and_depend_on_the_seed_only(tmp_path):
    how = dict(counts=dict(train=60, val=20, test=20), low=3, high=7)       # so short that draws repeat
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_lra.generate_listops(tmp_path / name, seed=seed, **how)
    read = lambda name: [(tmp_path / name / f"basic_{s}.tsv").read_text().splitlines() for s in train_lra.COUNTS]
    splits = read("a")
    assert [len(s) - 1 for s in splits] == [60, 20, 20] and all(s[0] == "Source\tTarget" for s in splits)
    assert len({line for s in splits for line in s[1:]}) == 100
    assert read("b") == splits != read("c")
    assert train_lra.COUNTS == dict(train=96000, val=2000, test=2000)


def test_two_generators_at_once_and_a_full_disk_leave_whole_files_or_none(tmp_path, monkeypatch):
    how = dict(counts=dict(train=30, val=5, test=5), low=3, high=30)
    threads = [threading.Thread(target=train_lra.generate_listops, args=(tmp_path / "l" / "x",), kwargs=how) for _ in "12"]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert os.listdir(tmp_path / "l") == ["x"]
    assert len((tmp_path / "l" / "x" / "basic_train.tsv").read_text().splitlines()) == 31

    def full_disk(**how):
        yield "( ( ( [MIN 1 ) 2 ) ] )\t1\n"
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_lra, "listops_lines", full_disk)
    one_line_error(lra("--task", "listops", "--data-dir", tmp_path / "d", "--out", tmp_path / "r"), "No space left")
    assert os.listdir(tmp_path / "d" / "lra_release") == [] and not (tmp_path / "r").exists()


def test_listops_tokens_come_back_from_the_official_files(tmp_path):
    found = lines_of(4, 200, 500, 2000)
    path = tmp_path / "basic_train.tsv"
    words = [*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]
    for end in ("\n", "\r\n"):
        path.write_bytes("".join(line.replace("\n", end) for line in ["Source\tTarget\n", *found]).encode())
        split = train_lra.unpack(train_lra.pack(train_lra.read_listops(path), 2000), 2000)
        assert len(split) == len(found) and split.y.tolist() == [int(l[-2]) for l in found]
        x, keep, y = train_lra.batch(split, torch.arange(len(split)), torch.device("cpu"))
        for row, real, line in zip(x, keep, found):
            assert [words[i - 1] for i in row[real]] == line.split("\t")[0].replace("(", "").replace(")", "").split()
    assert not x[~keep].any()
    assert train_lra.unpack(train_lra.pack(train_lra.read_listops(path), 600), 600).size.max() == 600


HEAD = "Source\tTarget\n"
FINE = "( ( ( [MIN 1 ) 2 ) ] )\t1\n"


@pytest.mark.parametrize("text, words", [
    ("", "first line"), (FINE, "first line"), (HEAD, "no samples"), (HEAD + FINE + "( [MIX 2 ) ] )\t1\n", "line 3: unknown token '[MIX'"),
    (HEAD + "( ( [MIN 12 ) ] )\t1\n", "line 2: unknown token '12'"), (HEAD + FINE + "1 2 x\t1\n", "'x'"),
    (HEAD + FINE * 2 + "( [MIN 1 ) ] )\t12\n", "line 4"), (HEAD + "( [MIN 1 ) ] )\t-1\n", "'-1'"),
    (HEAD + "( [MIN 1 ) ] )\n", "line 2"), (HEAD + FINE + "( [MIN 1", "line 3"), (HEAD + "\t1\n", "line 2"), (HEAD + FINE + "\n", "line 3")])
def test_a_damaged_listops_file_names_the_line(tmp_path, text, words):
    folder = tmp_path / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    for split in train_lra.COUNTS:
        (folder / f"basic_{split}.tsv").write_text(HEAD + FINE)
    (folder / "basic_val.tsv").write_text(text)
    one_line_error(lra("--task", "listops", "--data-dir", tmp_path, "--out", tmp_path / "r"), "basic_val.tsv", words)
    assert not (tmp_path / "r").exists()


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def arguments(task, folder, **more):
    return train_lra.options(["--task", task, "--data-dir", str(folder), *(f"--{k}={v}" for k, v in more.items())])[0]


def load(task, folder, **more):
    args = arguments(task, folder, **more)
    return train_lra.load_task(args, train_lra.resolve(args))


def test_text_reads_the_official_archive_and_keeps_dev_away_from_test(tmp_path):
    review = {f"aclImdb/{s}/{c}/{i}_7.txt": f"{s} {c} {'great' * i}".encode() for s in ("train", "test") for c in ("pos", "neg") for i in range(10)}
    files = review | {"aclImdb/train/unsup/1_0.txt": b"none", "aclImdb/README": b"x", "aclImdb/train/urls_pos.txt": b"x"}
    path = tar(tmp_path / "aclImdb_v1.tar.gz", files)
    for _ in range(2):                               # the second time from the cache
        splits = load("text", tmp_path, length=30)
        assert [len(s) for s in splits] == [18, 2, 20] and (tmp_path / "cache" / "aclImdb-train-30.npz").exists()
        read = lambda s: [bytes(x[k].tolist()) for x, k in zip(*train_lra.batch(s, torch.arange(len(s)), torch.device("cpu"))[:2])]
        texts = [dict(zip(read(s), s.y.tolist())) for s in splits]
        assert {**texts[0], **texts[1]} == {t[:30]: int(b" pos " in t) for n, t in review.items() if "/train/" in n}
        assert texts[2] == {t[:30]: int(b" pos " in t) for n, t in review.items() if "/test/" in n}
        assert int((splits[2].full > 30).sum()) == sum(len(t) > 30 for n, t in review.items() if "/test/" in n)
    path.write_bytes(path.read_bytes()[:300])        # a broken download, newer than the cache
    one_line_error(lra("--task", "text", "--data-dir", tmp_path, "--out", tmp_path / "r"), "aclImdb_v1.tar.gz", "not a complete")


def python_2(value):
    """A pickle with its bytes as strings of Python 2, as in the official archive."""
    data = bytearray(pickle.dumps(value, 3).replace(b"numpy._core", b"numpy.core").replace(b"\x80\x03", b"\x80\x02", 1))
    for op, _, at in pickletools.genops(bytes(data)):
        if op.name in ("BINBYTES", "SHORT_BINBYTES"):
            data[at] = ord("T" if op.name == "BINBYTES" else "U")
    return bytes(data)


def cifar(batch, **changes):
    """The six pickles of the official archive."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pickles = {f"cifar-10-batches-py/{n}": python_2(batch(i)) for i, n in enumerate(names)}
    return pickles | {"cifar-10-batches-py/batches.meta": b"junk"} | {f"cifar-10-batches-py/{n}": v for n, v in changes.items()}


def test_image_reads_the_official_archive_as_grey_and_runs_no_code_from_it(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3, 1024), dtype=np.uint8)
    batch = lambda i: {b"data": rgb[i].reshape(4, 3072), b"labels": [i, 1, 2, 9], b"filenames": [b"a"] * 4}
    tar(tmp_path / "cifar-10-python.tar.gz", cifar(batch))
    train, dev, test = load("image", tmp_path)
    assert (len(train), len(dev), len(test)) == (18, 2, 4) and test.y.tolist() == [5, 1, 2, 9]
    x, keep, _ = train_lra.batch(test, torch.arange(4), torch.device("cpu"))
    assert keep is None and np.abs(x.numpy() - np.einsum("ncp,c->np", rgb[5], [0.299, 0.587, 0.114])).max() <= 0.5 + 1e-9
    assert sorted(torch.cat([train.y, dev.y]).tolist()) == sorted([*range(5), *[1, 2, 9] * 5])

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    for i, (data, words) in enumerate([(pickle.dumps(Evil(), 2), "asks for"), (b"junk", "data_batch_2"), (pickle.dumps({}), "data_batch_2")]):
        (tmp_path / str(i)).mkdir()
        tar(tmp_path / str(i) / "cifar-10-python.tar.gz", cifar(batch, data_batch_2=data))
        one_line_error(lra("--task", "image", "--data-dir", tmp_path / str(i), "--out", tmp_path / "r"), "data_batch_2", words)
    assert not (tmp_path / "owned").exists()
    np.savez(tmp_path / "1" / "cifar10_gray.npz", train_x=x, train_y=test.y, test_x=x, test_y=test.y)     # a converted copy
    assert [len(s) for s in load("image", tmp_path / "1")] == [3, 1, 4]


def test_retrieval_reads_the_release_and_compares_two_documents_by_one_encoder(tmp_path):
    folder = tmp_path / "lra_release" / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for i, split in enumerate(("train", "eval", "test")):
        (folder / f"new_aan_pairs.{split}.tsv").write_text("".join(f"{j % 2}.0\tP{j}\tQ{j}\tfirst {split} {j}\tsecond\n" for j in range(i + 3)))
    splits = load("retrieval", tmp_path, length=9)
    assert [len(s) for s in splits] == [3, 4, 5] and splits[1].y.tolist() == [0, 1, 0, 1]
    x, keep, _ = train_lra.batch(splits[0], torch.tensor([2, 1]), torch.device("cpu"))
    assert bytes(x[0, 0].tolist()) == b"first tra" and bytes(x[0, 1][keep[0, 1]].tolist()) == b"second"
    setting = train_lra.resolve(arguments("retrieval", tmp_path, length=9))
    model = train_lra.build("retrieval", setting, "agf").eval()
    logits, ortho = model(x, keep)
    encoder = copy.deepcopy(model)
    one, two = (agf.AGFTransformer.forward(encoder, x[:, i], keep[:, i])[0] for i in (0, 1))
    torch.testing.assert_close(logits, model.compare(torch.cat([one, two, one * two, one - two], 1)))
    assert logits.shape == (2, 2) and ortho.shape == (2,)
    (folder / "new_aan_pairs.test.tsv").write_text("1.0\tP\tQ\tonly one\n")
    one_line_error(lra("--task", "retrieval", "--data-dir", tmp_path, "--out", tmp_path / "r"), "new_aan_pairs.test.tsv, line 1")


def test_pathfinder_reads_the_release(tmp_path):
    from PIL import Image                            # comes with matplotlib
    folder = tmp_path / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    rng = np.random.default_rng(0)
    (folder / "metadata").mkdir(parents=True)
    truth = {}
    for i in range(2):
        (folder / "imgs" / str(i)).mkdir(parents=True)
        for j in range(10):
            pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "imgs" / str(i) / f"sample_{j}.png")
            truth[pixels.tobytes()] = j % 2
        (folder / "metadata" / f"{i}.npy").write_text("".join(f"imgs/{i} sample_{j}.png {j} {j % 2} 1.8 6 2.0 5 1.5 14 1 1\n" for j in range(10)))
    splits = load("pathfinder", tmp_path)
    assert [len(s) for s in splits] == [16, 2, 2]
    found = {bytes(row.tolist()): int(y) for s in splits for row, y in zip(train_lra.batch(s, torch.arange(len(s)), torch.device("cpu"))[0], s.y)}
    assert found == truth
    (folder / "metadata" / "1.npy").write_text("imgs/0 sample_99.png 0 1\n")
    os.utime(folder / "metadata")
    one_line_error(lra("--task", "pathfinder", "--data-dir", tmp_path, "--out", tmp_path / "r"), "sample_99.png")


def test_synthetic_pathfinder_is_two_dots_on_one_curve_or_two():
    arrays, again = (train_lra.pack(train_lra.draw_images(0, 64), 1024) for _ in "12")
    images = arrays["tokens"].reshape(64, 32, 32)
    assert (again["tokens"] == arrays["tokens"]).all() and (arrays["full"] == 1024).all() and 16 < arrays["y"].sum() < 48
    assert (images.reshape(64, -1) == 255).sum(1).min() >= 6 and 0.05 < (images > 60).mean() < 0.5


@pytest.mark.parametrize("task, words", [
    ("retrieval", ("lra_release.gz", "7.7 GB", "new_aan_pairs.train.tsv", "tar -xzf")),
    ("pathfinder", ("lra_release.gz", "7.7 GB", "curv_contour_length_14", "tar -xzf")),
    ("text", ("aclImdb_v1.tar.gz", "no route", "ai.stanford.edu", "web.archive.org")),
    ("image", ("cifar-10-python.tar.gz", "no route", "www.cs.toronto.edu", "web.archive.org"))])
def test_missing_data_says_what_to_put_where(tmp_path, monkeypatch, task, words):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    one_line_error(lra("--task", task, "--data-dir", tmp_path / "d", "--out", tmp_path / "r"), str(tmp_path / "d"), *words)
    assert not (tmp_path / "r").exists()


def test_a_download_with_a_wrong_checksum_is_refused(tmp_path, monkeypatch):
    (tmp_path / "page").write_bytes(b"an error page")
    name, page = "aclImdb_v1.tar.gz", (tmp_path / "page").as_uri()
    monkeypatch.setitem(train_lra.ARCHIVES, name, (page, train_lra.ARCHIVES[name][1]))
    one_line_error(lra("--task", "text", "--data-dir", tmp_path / "d", "--out", tmp_path / "r"), name, "hash", "c40f74a18d3b61f9", page)
    assert os.listdir(tmp_path / "d") == []


def lra(*argv):
    return uea(*argv, script=train_lra)


QUICK = ["--quick", "--steps", 6, "--batch-size", 6, "--length", 64, "--dim", 16]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lra")
    status, out, err = lra("--task", "listops", "--data-dir", folder, "--out", folder / "run", "--seeds", 2, *QUICK)
    assert status == 0 and out.count("means nothing") == 2, err
    return folder


def test_a_quick_run_leaves_its_whole_folder_and_says_what_it_is_worth(quick):
    run = quick / "run"
    assert sorted(os.listdir(run)) == ["config.json", "curves.png", "filters.png", "metrics.jsonl", "model.pt", "result.json"]
    result = json.loads((run / "result.json").read_text())
    assert {"dataset", "task", "mixer", "preset", "protocol", "seeds", "epochs", "test_accuracy", "test_accuracy_mean", "test_accuracy_std",
            "test_accuracy_mixers_off", "train_seconds", "parameters", "device", "versions", "command", "date",
            "dev_accuracy", "tokens_per_second", "peak_memory_mb", "steps"} <= set(result)
    assert result["task"] == "listops" and result["steps"] == 6 and "means nothing" in result["notes"][0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["step"]) for r in rows] == [(s, i) for s in (0, 1) for i in range(1, 7)]
    assert {"loss", "ortho", "lr", "dev_accuracy", "tokens_per_second", "peak_memory_mb"} <= set(rows[0])
    assert result["dev_accuracy"] == [max(r["dev_accuracy"] for r in rows if r["seed"] == s) for s in (0, 1)]
    assert result["best_step"][0] == next(r["step"] for r in rows if r["dev_accuracy"] == result["dev_accuracy"][0])
    model, parts = train_lra.load_model(run)         # the accuracy again, by hand, from the saved model
    args, _ = train_lra.options(["--task", "listops", "--quick", "--data-dir", str(quick), "--length", "64"])
    test = train_lra.load_task(args, train_lra.resolve(args))[2]
    hits = [(model(*[t[:1] for t in train_lra.batch(test, torch.tensor([i]), torch.device("cpu"), 64)[:2]])[0].argmax() == test.y[i]).item()
            for i in range(len(test))]
    assert np.mean(hits) == pytest.approx(result["test_accuracy"][0])


@pytest.mark.parametrize("task, flags", [("text", ["--mixer", "softmax"]), ("retrieval", ["--mixer", "usv"]), ("pathfinder", ["--mixer", "none"]),
                                         ("image", ["--micro-batch", 4])])
def test_the_other_tasks_run_end_to_end(tmp_path, task, flags):
    status, out, err = lra("--task", task, "--data-dir", tmp_path, "--out", tmp_path / "r", *QUICK, "--steps", 2, *flags)
    assert status == 0, err
    assert ("not comparable" in out) == ("not comparable" in (tmp_path / "r" / "result.json").read_text()) == (task == "pathfinder")


def test_a_resumed_lra_run_ends_at_the_same_numbers(quick, tmp_path, monkeypatch):
    real, seen = agf.save, []

    def save(path, **parts):                         # Ctrl-C in the middle of the second seed
        real(path, **parts)
        seen.append(path)
        if len(seen) == 11:
            train_uea.stop_asked.append(True)
    monkeypatch.setattr(agf, "save", save)
    monkeypatch.setattr(train_uea, "SAVE_EVERY", 0)
    run = tmp_path / "r"
    status, _, err = lra("--task", "listops", "--data-dir", quick, "--out", run, "--seeds", 2, *QUICK)
    assert status == 130 and f"train_lra.py --resume {run}" in err and not (run / "result.json").exists()
    monkeypatch.undo()
    status, _, err = lra("--resume", run, "--data-dir", quick)
    assert status == 0, err
    one, two = (json.loads((r / "result.json").read_text()) for r in (quick / "run", run))
    assert all(one[k] == two[k] for k in ("test_accuracy", "dev_accuracy", "best_step", "epochs"))
    rows = [[{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "peak_memory_mb")}
             for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (quick / "run", run)]
    assert rows[0] == rows[1]
    a, b = agf.load(quick / "run" / "model.pt")["model"], agf.load(run / "model.pt")["model"]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "finished" in lra("--resume", run)[1]


def test_a_batch_that_does_not_fit_is_halved_and_said(quick, tmp_path, monkeypatch):
    real, sizes = agf.AGFTransformer.forward, []

    def forward(self, x, keep=None):
        if self.training:
            sizes.append(len(x))
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, x, keep)
    monkeypatch.setattr(agf.AGFTransformer, "forward", forward)
    status, out, err = lra("--task", "listops", "--data-dir", quick, "--out", tmp_path / "r", *QUICK, "--dropout", 0, "--seeds", 1)
    assert status == 0 and "3 samples at once" in out + err and "2 samples at once" in out + err
    assert sizes == [6, 3] + [2] * 18
    monkeypatch.undo()
    lra("--task", "listops", "--data-dir", quick, "--out", tmp_path / "whole", *QUICK, "--dropout", 0)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / r / "metrics.jsonl").read_text().splitlines()] for r in ("r", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Runs train_lra.py, writes down the gradients of each step before they are clipped, kills a process.
SPY = """
import os, sys, torch, train_lra, agf
seen, real = [], agf.nn.utils.clip_grad_norm_
def spy(parameters, *rest):
    parameters = list(parameters)
    seen.append([p.grad.clone() for p in parameters])
    torch.save(seen, f"{sys.argv[1]}-{train_lra.RANK}.pt")
    if train_lra.RANK == 1 and len(seen) == 7:
        os.kill(os.getpid(), 9)
    return real(parameters, *rest)
agf.nn.utils.clip_grad_norm_ = spy
sys.exit(train_lra.main(sys.argv[2:]))
"""


def test_two_processes_have_the_gradients_of_one_and_a_killed_one_ends_the_job(quick, tmp_path, monkeypatch):
    """Batches of 7: processes of 4 and 3 samples, in parts of at most 3. Killed in the second seed."""
    flags = ["--task", "listops", "--data-dir", quick, *QUICK, "--steps", 4, "--batch-size", 7, "--dropout", 0, "--seeds", 2]
    (tmp_path / "spy.py").write_text(SPY)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "spy.py", tmp_path / "two"]
    done = subprocess.run([str(c) for c in [*launcher, *flags, "--out", tmp_path / "two", "--micro-batch", 3]], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1"), timeout=200)
    assert done.returncode != 0 and "process 0: another process was lost" in done.stderr and "--resume" in done.stderr, done.stderr
    one, real = [], nn.utils.clip_grad_norm_

    def spy(parameters, *rest):
        parameters = list(parameters)
        one.append([p.grad.clone() for p in parameters])
        return real(parameters, *rest)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    assert lra(*flags, "--out", tmp_path / "one")[0] == 0
    two, other = (torch.load(tmp_path / f"two-{rank}.pt") for rank in (0, 1))
    assert len(one) == 8 and len(two) >= len(other) == 7
    for step in (0, 4):                              # the first of each seed: equal weights, so equal gradients
        for a, b, c in zip(one[step], two[step], other[step]):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9 and torch.equal(b, c)
    status, _, err = lra("--resume", tmp_path / "two")
    assert status == 0, err
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two")]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("flags, words", [
    (["--task", "listop"], "listop"), ([], "which task"), (["--task", "text", "--synthetic"], "--synthetic"), (["--steps", 0], "--steps"),
    (["--heads", 3], "heads must divide"), (["--a", -2, "--b", -1], "a=-2"), (["--lr", "nan"], "--lr"), (["--length", 0], "--length"),
    (["--micro-batch", 0], "--micro-batch"), (["--seeds", 0], "--seeds"), (["--device", "warp"], "warp"), (["--dropout", 2], "dropout"),
    (["--out", "/dev/null/run"], "/dev/null/run"), (["--resume", "nowhere"], "nowhere"), (["--mixer", "agff"], "agff")])
def test_a_mistaken_option_of_train_lra_gets_one_clear_line(quick, tmp_path, flags, words):
    task = [] if words == "which task" or "--resume" in flags else ["--task", "listops", *QUICK]
    one_line_error(lra(*task, "--data-dir", quick, "--out", tmp_path / "r", *flags), words)
    assert not (tmp_path / "r").exists()


def test_the_lra_settings_and_schedule_are_the_published_ones():
    setting = {task: train_lra.resolve(arguments(task, "data")) for task in train_lra.TASKS}
    assert [setting[t]["length"] for t in train_lra.TASKS] == [2000, 1024, 4000, 1024, 1024]
    assert [(s["order"], s["a"], s["b"], s["gamma"]) for s in setting.values()] == [
        (5, 2, -1, 1e-2), (5, 2, -2, 1e-2), (5, 2, -1.5, 1e-4), (6, 1.5, 2, 0.1), (4, 1.5, -1, 1e-4)]
    assert [(s["steps"], s["warmup"], s["batch_size"]) for s in setting.values()] == [
        (5000, 1000, 32), (20000, 8000, 32), (30000, 800, 32), (35000, 175, 256), (62400, 312, 256)]
    for task, s in setting.items():
        model = train_lra.build(task, s, "agf")
        assert model.config.dim == 64 and model.config.heads == 2 and model.config.identity and s["lr"] == 1e-4
        mine, optimizer = train_lra.schedule(s), torch.optim.SGD(model.parameters(), lr=1)
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, s["lr"], s["steps"] + 1, pct_start=(s["warmup"] + 1) / (s["steps"] + 1),
                                                     anneal_strategy="linear", cycle_momentum=False)
        for step in range(200):
            assert theirs.get_last_lr()[0] == pytest.approx(mine(step), rel=0.02)
            optimizer.step()
            theirs.step()


def test_the_python_examples_of_the_readme_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                     # they write runs/
    monkeypatch.setattr(agf, "MIXERS", dict(agf.MIXERS))
    text = (Path(__file__).parent / "README.md").read_text()
    examples = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(examples) >= 2
    for example in examples:
        exec(example, names := {})
    assert len(json.loads((tmp_path / "runs/linear/result.json").read_text())["test_accuracy"]) == 1
    mixer, x = names["LinearAttention"](8, 2), torch.randn(1, 6, 8)
    junk = torch.full((1, 3, 8), math.nan)
    keep = torch.arange(9)[None] < 6
    torch.testing.assert_close(mixer(torch.cat([x, junk], 1), keep)[0][:, :6], mixer(x)[0])
