"""AGF, the Attentive Graph Filter, in one file: torch and the standard library only.

Self-attention multiplies the value signal by a softmax matrix A. In graph signal processing A is
the weighted adjacency matrix of a directed graph on the tokens, and attention is a graph filter of
order one with a fixed coefficient. Such a filter is low-pass: it blurs the tokens together.
AGF learns a better filter without forming A: the three factors of a singular value decomposition,
with a learned polynomial p on the singular values. Its cost is linear in the number of tokens:

    AGF(X) = (U * p(s)) (V^T X_val),     p(s) = sum_k theta_k T_k(s)

Source: Wi, Choi, Park, "Learning Advanced Self-Attention for Linear Transformers in the Singular
Value Domain", IJCAI 2025, doi 10.24963/ijcai.2025/730 ("the paper" below).

Glossary
    B            batch size
    n            number of tokens in a sequence
    D   dim      width of a token
    h   heads    number of heads
    d            width of a head, d = D / h
    U            left factor, softmax over the d features of a token          (B, h, n, d)
    V            right factor, softmax over the n tokens of a feature         (B, h, n, d)
    s   Sigma    singular values, a sigmoid: each token has d of its own      (B, h, n, d)
    value        the signal that is filtered, X_val = X W_val                 (B, h, n, d)
    K   order    degree of the polynomial p
    T_k          its basis: Jacobi polynomials P_k^{(a,b)}, unless another is chosen
    theta_k      its coefficients, learned, one set for each layer
    gamma        weight of the orthogonality loss in the total loss
    keep         boolean mask, True = a real token, False = padding           (B, n)

Differs from the paper: in no equation. Where the paper is silent we follow the official code (tanh
on theta, theta_0 = 1, scale of the orthogonality loss).
Differs from the official code: padding is masked everywhere, so adding padded tokens changes no
result. The polynomial (Horner's rule) and the mixer's products have gradients written by hand, for
speed. `plain` of JacobiFilter and AGFAttention is the printed form, with the same numbers; only it
bears torch.func and second derivatives.
Does not include: causal masks, key-value caches, encoder-decoder attention.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# 1. The basis and the filter ----------------------------------------------------------------

BASES = ("jacobi", "legendre", "chebyshev", "monomial")

def recurrence(order, a, b):
    """The Jacobi recurrence as rows (A_k, B_k, C_k), k = 1..order:

        T_0 = 1,    T_k(x) = (A_k x + B_k) T_{k-1}(x) - C_k T_{k-2}(x)

    As printed, with c = 2k+a+b, before the division by the factor on the left:
    2k(k+a+b)(c-2) P_k = (c-1)(c(c-2) x + a^2 - b^2) P_{k-1} - 2(k+a-1)(k+b-1) c P_{k-2}.
    ValueError where that factor is 0, and for order < 0.
    """
    if not isinstance(order, int) or order < 0 or not math.isfinite(a + b):
        raise ValueError(f"order must be a whole number >= 0, a and b finite: {order=}, {a=}, {b=}")
    rows = [((a + b + 2) / 2, (a - b) / 2, 0.0)][:order]
    for k in range(2, order + 1):
        c = 2 * k + a + b
        if abs(k + a + b) < 1e-9 or abs(c - 2) < 1e-9:
            raise ValueError(f"the recurrence is undefined at {k=} for {a=}, {b=}: k+a+b = "
                             f"{k + a + b:g}, 2k+a+b-2 = {c - 2:g}, neither may be 0")
        left = 2 * k * (k + a + b) * (c - 2)
        rows.append(((c - 1) * c * (c - 2) / left, (c - 1) * (a * a - b * b) / left,
                     2 * (k + a - 1) * (k + b - 1) * c / left))
    return rows

def three_terms(x, rows):
    """T_0..T_K at x from the rows of a recurrence: x (any shape) -> (K+1, *x.shape)."""
    T = [torch.ones_like(x)]
    for A, B, C in rows:
        T.append((A * x + B) * T[-1] - (C * T[-2] if C else 0))
    return torch.stack(T)

def jacobi(x, order, a, b):
    """Jacobi polynomials P_0..P_order at x: x (any shape) -> (order+1, *x.shape).

    They are orthogonal on [-1, 1] for a, b > -1. The method evaluates them at s in (0, 1), and some
    published settings have b <= -1: the recurrence still holds, the orthogonality does not.
    """
    return three_terms(x, recurrence(order, a, b))

class JacobiFilter(nn.Module):
    """The filter p(s) = sum_k theta_k T_k(s), elementwise: s (any shape) -> the same shape.

    basis: "jacobi" with parameters a, b; "legendre" is a = b = 0; "chebyshev" is a = b = -1/2 as in
    the official code, so proportional to Chebyshev's polynomials, not equal; "monomial" is s^k.
    identity: theta_0 = 1 is constant and the filter starts as p = 1. Otherwise it starts as 0.
    """

    def __init__(self, order=5, basis="jacobi", a=1.0, b=0.0, identity=True):
        super().__init__()
        if basis not in BASES:
            raise ValueError(f"unknown basis {basis!r}; choose one of {', '.join(BASES)}")
        a, b = (a, b) if basis == "jacobi" else (-0.5, -0.5) if basis == "chebyshev" else (0.0, 0.0)
        self.order, self.basis, self.a, self.b, self.identity = order, basis, a, b, identity
        self.rows = recurrence(order, a, b)
        if basis == "monomial":
            self.rows = [(1.0, 0.0, 0.0)] * order            # T_k = s T_{k-1}
        self.theta = nn.Parameter(torch.zeros(order + 1))    # raw; coefficients() are the effective
        # The same T_k in powers of y = s - 1/2, which float32 bears since |y| < 1/2: row k of M
        # holds the coefficients of T_k, by the recurrence with s = y + 1/2.
        M = torch.zeros(order + 1, order + 1, dtype=torch.float64)
        M[0, 0] = 1
        for k, (A, B, C) in enumerate(self.rows, start=1):
            M[k] = (A / 2 + B) * M[k - 1] + A * M[k - 1].roll(1) - (C * M[k - 2] if C else 0)
        self.powers = M.tolist()

    def coefficients(self):
        """Effective theta, (order+1,): tanh keeps each in (-1, 1), its sign is free (Theorem 2)."""
        theta = torch.tanh(at_least_float32(self.theta))
        return torch.cat([torch.ones_like(theta[:1]), theta[1:]]) if self.identity else theta

    def plain(self, s):
        """The definition, word for word: build T_0..T_K, weight, sum."""
        return torch.tensordot(self.coefficients().to(s.dtype), three_terms(s, self.rows), 1)

    def forward(self, s):
        """The same numbers as plain(), faster and in the memory of one tensor instead of K."""
        s, theta = at_least_float32(s), self.coefficients()
        if self.order == 0:
            return theta[0].to(s.dtype).expand_as(s)
        if self.order > 12:                                  # large powers cancel too much
            return self.plain(s)
        M = torch.tensor(self.powers, dtype=s.dtype, device=s.device)
        return Polynomial.apply(s, (theta[:, None] * M).sum(0))

class Polynomial(torch.autograd.Function):
    """p(y) = sum_j c_j y^j at y = s - 1/2, elementwise. Autograd alone would store K tensors like
    s; here s is enough: the gradients are grad p'(y) for s and the sum of grad y^j for c_j."""

    @staticmethod
    def forward(ctx, s, c):
        ctx.save_for_backward(s, c)
        return horner(s - 0.5, c)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        s, c = ctx.saved_tensors
        y = s - 0.5
        slope = c[1:] * torch.arange(1, len(c), device=c.device)            # of p'
        into_s = horner(y, slope).mul_(grad)
        power = grad * y                                     # grad y^j, in one buffer
        sums = [grad.sum(), power.sum()] + [power.mul_(y).sum() for _ in c[2:]]
        return into_s, torch.stack(sums)

def horner(y, c):
    """c_0 + y (c_1 + y (c_2 + ...)), in one buffer: a new tensor for each degree costs more. But not
    for a compiler, which fuses the loop, and which in torch 2.11 loses the gradient otherwise."""
    p = torch.empty_like(y).copy_(c[-1])
    for j in range(len(c) - 2, -1, -1):
        p = p * y + c[j] if torch.compiler.is_compiling() else p.mul_(y).add_(c[j])
    return p

def at_least_float32(x):
    """Half precision goes up to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

# 2. The orthogonality loss ------------------------------------------------------------------

def orthogonality_loss(U, V, keep=None):
    """How far U and V are from orthonormal columns: (B, h, n, d) twice -> (B,), one value a sample.

        mean |U^T U - I| + mean |V^T V - I|     over the d x d entries, averaged over heads

    Padded tokens (keep False) do not count. It cannot reach 0: entries of U and V are positive.
    U^T U grows with n, so the same gamma weighs more on longer sequences; but once every column of
    U has length 1 or more (n near d^2), the part of U has no gradient left (notebook 02).
    """
    with torch.autocast(U.device.type, enabled=False):       # float32, under autocast too
        if keep is not None:
            hide = ~keep[:, None, :, None]                   # (B, 1, n, 1)
            U, V = U.masked_fill(hide, 0), V.masked_fill(hide, 0)
        U, V = at_least_float32(U), at_least_float32(V)
        eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        gap = (U.mT @ U - eye).abs() + (V.mT @ V - eye).abs()               # (B, h, d, d)
        return gap.mean(dim=(1, 2, 3))                       # (B,)

# 3. The mixers: forward(x, keep=None) -> (out, ortho), that is (B, n, D) -> (B, n, D), (B,) -----

class AGFAttention(nn.Module):
    """The paper's mixer. `filter`: any elementwise module instead of the Jacobi polynomial."""

    def __init__(self, dim, heads, order=5, basis="jacobi", a=1.0, b=0.0, identity=True,
                 filter=None):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.in_proj = nn.Linear(dim, 4 * dim)               # rows: U, Sigma, V, value
        self.out_proj = nn.Linear(dim, dim)
        self.filter = filter or JacobiFilter(order, basis, a, b, identity)

    def factors(self, x, keep=None):
        """x (B, n, D) -> U, s, V, value, each (B, h, n, d). U and V are 0 at padded tokens."""
        x = hide_padding(x, keep)
        # Four maps, not one and a split: each result is contiguous, which saves copies later.
        maps = zip(self.in_proj.weight.chunk(4), self.in_proj.bias.chunk(4))
        U, s, V, value = (F.linear(x, W, b).view(*x.shape[:2], self.heads, -1) for W, b in maps)
        U = at_least_float32(U).softmax(-1)                  # over features: rows of U sum to 1
        s = at_least_float32(s).sigmoid()                    # in (0, 1)
        V = at_least_float32(V)                              # all of them (B, n, h, d)
        if keep is None:
            V = V.softmax(1)                                 # over tokens: columns of V sum to 1
        else:        # the lowest number, not -inf: a fully padded row must not be 0/0
            hide = ~keep[:, :, None, None]                   # (B, n, 1, 1)
            V = V.masked_fill(hide, torch.finfo(V.dtype).min).softmax(1).masked_fill(hide, 0)
            U = U.masked_fill(hide, 0)
        return tuple(part.transpose(1, 2) for part in (U, s, V, value))     # each (B, h, n, d)

    def plain(self, x, keep=None):
        """The definition, word for word."""
        U, s, V, value = self.factors(x, keep)
        left, right = (U * self.filter(s)).to(value.dtype), V.to(value.dtype)
        out = left @ (right.mT @ value)                      # V^T value is d x d: linear in n
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, h, n, d) -> (B, n, D)
        return hide_padding(out, keep), orthogonality_loss(U, V)

    def forward(self, x, keep=None):
        """The same numbers as plain(), faster on long sequences."""
        if x.shape[1] < 128:
            return self.plain(x, keep)
        U, s, V, value = self.factors(x, keep)
        with torch.autocast(x.device.type, enabled=False):   # Products chooses its types itself
            out, ortho = Products.apply(U, self.filter(s), V, value)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, h, n, d) -> (B, n, D)
        return hide_padding(out, keep), ortho

    def matrix(self, x, keep=None):
        """The attention matrix that forward() never builds: (U * p(s)) V^T, (B, h, n, n)."""
        U, s, V, _ = self.factors(x, keep)
        return (U * self.filter(s)) @ V.mT

class Products(torch.autograd.Function):
    """U, p, V, value, each (B, h, n, d) -> (U * p) (V^T value), the same shape, and ortho (B,).

    With M = V^T value, L = U * p and G the gradient of the output, the gradients are

        dL = G M^T,   dp = dL * U,   dU = dL * p + w U sign(U^T U - I),
        dM = L^T G,   dvalue = V dM,   dV = value dM^T + w V sign(V^T V - I),

    w = 2 / (h d^2) times the gradient of ortho. Why by hand: the heads of a token lie side by side
    in memory. Autograd would copy them apart and together; here each product is written in place.
    """

    @staticmethod
    def forward(ctx, U, p, V, value):
        h, d = value.shape[1], value.shape[3]
        eye, ortho, small = torch.eye(d, dtype=U.dtype, device=U.device), 0, []
        for i in range(h):                                   # the loss in float32, as U and V are
            gaps = [T[:, i].mT @ T[:, i] - eye for T in (U, V)]             # (B, d, d) each
            ortho = ortho + sum(gap.abs().mean((1, 2)) for gap in gaps) / h
            small += [gap.sign_() for gap in gaps]
        U, p, V = (T.to(value.dtype) for T in (U, p, V))
        left, out = U * p, torch.empty_like(value)
        for i in range(h):
            small.append(V[:, i].mT @ value[:, i])           # (B, d, d)
            put(out, i, left, small[-1])
        ctx.save_for_backward(U, p, V, value, *small)
        return out, ortho

    @staticmethod
    @once_differentiable
    def backward(ctx, G, dortho):
        U, p, V, value, *small = ctx.saved_tensors
        h, d = value.shape[1], value.shape[3]
        left, w = U * p, (2 / (h * d * d) * dortho).to(U.dtype)[:, None, None]
        dleft, dU, dV, dvalue = (torch.empty_like(value) for _ in range(4))
        for i in range(h):
            signU, signV, M = small[2 * i], small[2 * i + 1], small[2 * h + i]
            dM = left[:, i].mT @ G[:, i]                     # (B, d, d)
            put(dleft, i, G, M.mT)
            put(dvalue, i, V, dM)
            put(dV, i, value, dM.mT)
            put(dV, i, V, w * signV.to(w.dtype), add=True)
            put(dU, i, U, w * signU.to(w.dtype))
        return dU.addcmul_(dleft, p), dleft.mul_(U), dV, dvalue

def put(out, i, x, small, add=False):
    """out_i = x_i small for head i, without a temporary: (B, h, n, d), small (B, d, d)."""
    out[:, i].baddbmm_(x[:, i], small, beta=int(add))

class SoftmaxAttention(nn.Module):
    """Ordinary multi-head self-attention, the baseline. Its cost is quadratic in n."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.in_proj = nn.Linear(dim, 3 * dim)               # rows: query, key, value
        self.out_proj = nn.Linear(dim, dim)

    def factors(self, x, keep=None):
        """x (B, n, D) -> query, key, value, each (B, h, n, d), and a mask (B, 1, 1, n) or None."""
        B, n, D = x.shape
        proj = self.in_proj(hide_padding(x, keep)).view(B, n, 3, self.heads, -1)
        # A fully padded row attends to its own zeros: a softmax over nothing would be NaN.
        mask = None if keep is None else (keep | ~keep.any(1, keepdim=True))[:, None, None, :]
        return *(part.transpose(1, 2) for part in proj.unbind(2)), mask

    def forward(self, x, keep=None):
        out = F.scaled_dot_product_attention(*self.factors(x, keep))        # (B, h, n, d)
        out = self.out_proj(out.transpose(1, 2).reshape(x.shape))           # (B, n, D)
        return hide_padding(out, keep), x.new_zeros(x.shape[0])

    def matrix(self, x, keep=None):
        """The attention matrix, (B, h, n, n). Its rows sum to 1."""
        query, key, _, mask = self.factors(x, keep)
        logits = at_least_float32(query @ key.mT) / math.sqrt(query.shape[-1])
        return (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(-1)

class NoMixer(nn.Module):
    """The control: tokens never see each other. It shows what a task asks of attention."""

    def forward(self, x, keep=None):
        return torch.zeros_like(x), x.new_zeros(x.shape[0])

MIXERS = {
    "agf": AGFAttention,
    "uv": lambda dim, heads: AGFAttention(dim, heads, order=0),                 # Sigma = 1
    "usv": lambda dim, heads: AGFAttention(dim, heads, filter=nn.Identity()),   # p(s) = s
    "softmax": SoftmaxAttention,
    "none": lambda dim, heads: NoMixer(),
}

def check_heads(dim, heads):
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"heads must divide the width: dim={dim}, heads={heads}")
    return heads

def hide_padding(x, keep):
    """0 at padded tokens, whatever stands there (NaN and inf too). x itself stays as it is."""
    return x if keep is None else x.masked_fill(~keep[:, :, None], 0)

# 4. The compact Transformer -----------------------------------------------------------------

@dataclass(frozen=True)
class AGFConfig:
    """All that fixes the shape of an AGFTransformer. ValueError for what cannot work."""
    classes: int
    length: int               # longest input, in time steps or token ids
    channels: int = 1         # continuous series: x is (B, n, channels), float
    vocab: int = 0            # > 0: token ids instead, x is (B, n), integer
    dim: int = 128            # width of a token
    depth: int = 2            # number of blocks
    heads: int = 4
    hidden: int = 256         # width inside the feed-forward part of a block
    dropout: float = 0.1
    norm: str = "pre"         # LayerNorm "pre" (before) or "post" (after) mixer and feed-forward
    pool: str = "mean"        # "mean", "flatten" (all tokens side by side) or "first" token
    head: int = 0             # > 0: a hidden ReLU layer of this width in the classifier
    kernel: int = 1           # > 1: a token is embedded from this many neighbouring time steps
    stride: int = 1           # > 1: one token for this many time steps
    scale: bool = False       # multiply the embedding by sqrt(dim), as the official UEA code does
    zero_init: bool = False   # mixers with an out_proj start at zero output
    mixer: str = "agf"        # a name in MIXERS
    order: int = 5            # order, basis, a, b, identity: see JacobiFilter; for "agf" only
    basis: str = "jacobi"
    a: float = 1.0
    b: float = 0.0
    identity: bool = True

    def __post_init__(self):
        check_heads(self.dim, self.heads)
        for name, known in dict(norm=("pre", "post"), pool=("mean", "flatten", "first"),
                                mixer=tuple(MIXERS)).items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: one of {known}")
        for name in ("classes", "length", "channels", "depth", "hidden", "kernel", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.zero_init and not self.identity:
            raise ValueError("zero_init needs identity: p = 0 and a zero out_proj never learn")
        if self.kernel % 2 == 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"kernel must be odd and dropout in [0, 1), got {self.kernel} and "
                             f"{self.dropout}")

    @property
    def tokens(self):
        """Number of tokens of an input of full length."""
        return -(-self.length // self.stride)

class Block(nn.Module):
    """Mixer, then feed-forward, each on a residual path with a LayerNorm before or after."""

    def __init__(self, config, mixer):
        super().__init__()
        D, self.pre, self.mixer = config.dim, config.norm == "pre", mixer
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, config.hidden), nn.GELU(), nn.Dropout(config.dropout),
                                 nn.Linear(config.hidden, D))
        self.drop = nn.Dropout(config.dropout)
        if config.zero_init and hasattr(mixer, "out_proj"):
            nn.init.zeros_(mixer.out_proj.weight)
            nn.init.zeros_(mixer.out_proj.bias)

    def forward(self, x, keep=None):
        out, ortho = self.mixer(self.norm1(x) if self.pre else x, keep)
        x = x + self.drop(out)
        if self.pre:
            return x + self.drop(self.mlp(self.norm2(x))), ortho
        x = self.norm1(x)
        return self.norm2(x + self.drop(self.mlp(x))), ortho

class AGFTransformer(nn.Module):
    """A classifier of sequences: forward(x, keep=None) -> (logits (B, classes), ortho (B,)).

    x: (B, n, channels) series or (B, n) token ids, n <= config.length. keep: (B, n), True = real.
    ortho is the orthogonality loss, mean over the blocks. Train on cross-entropy + gamma * ortho.
    mixer: your own class instead of config.mixer, called as mixer(dim, heads) for each block.
    """

    def __init__(self, config, mixer=None):
        super().__init__()
        self.config, D = config, config.dim
        if mixer is None and config.mixer == "agf":
            mixer = lambda dim, heads: AGFAttention(dim, heads, config.order, config.basis,
                                                    config.a, config.b, config.identity)
        mixer = mixer or MIXERS[config.mixer]
        if config.vocab:
            self.embed = nn.Embedding(config.vocab, D)
            nn.init.normal_(self.embed.weight, std=0.02)
        else:                     # kernel = stride = 1 is a linear map of each time step
            self.embed = nn.Conv1d(config.channels, D, config.kernel, config.stride,
                                   padding=config.kernel // 2)
        self.position = nn.Parameter(0.02 * torch.randn(config.tokens, D))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, mixer(D, config.heads))
                                    for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        width = D * config.tokens if config.pool == "flatten" else D
        self.classifier = nn.Linear(width, config.classes) if not config.head else nn.Sequential(
            nn.Linear(width, config.head), nn.ReLU(), nn.Linear(config.head, config.classes))

    def tokens(self, x, keep=None):
        """Input -> embedded tokens (B, n', D) and their mask, n' = ceil(n / stride)."""
        c = self.config
        if x.shape[1] > c.length:
            raise ValueError(f"the input has {x.shape[1]} steps, this model takes {c.length}")
        if c.vocab:
            x = self.embed(x if keep is None else x.masked_fill(~keep, 0))
        else:
            x = self.embed(hide_padding(x, keep).mT).mT      # (B, n, channels) -> (B, n', D)
            keep = None if keep is None else keep[:, ::c.stride]
        x = x * math.sqrt(c.dim) if c.scale else x
        return self.drop(x + self.position[:x.shape[1]]), keep

    def hidden_states(self, x, keep=None):
        """Input -> [embedding, after block 1, ..., after the last], each (B, n', D), their mask
        (B, n') or None, and ortho (B,)."""
        x, keep = self.tokens(x, keep)
        states, ortho = [x], 0
        for block in self.blocks:
            x, loss = block(x, keep)
            states.append(x)
            ortho = ortho + loss / len(self.blocks)
        return states, keep, ortho

    def forward(self, x, keep=None):
        states, keep, ortho = self.hidden_states(x, keep)
        x = hide_padding(self.norm(states[-1]), keep)        # (B, n', D)
        if self.config.pool == "first":
            x = x[:, 0]                                      # (B, D)
        elif self.config.pool == "mean":
            real = x.shape[1] if keep is None else keep.sum(1, keepdim=True).clamp(min=1)
            x = x.sum(1) / real                              # (B, D)
        else:                     # GELU and dropout before the classifier, as the official code
            x = hide_padding(self.drop(F.gelu(x)), keep)
            x = F.pad(x, (0, 0, 0, self.config.tokens - x.shape[1])).flatten(1)     # (B, n' D)
        return self.classifier(x), ortho

# 5. Diagnostics of oversmoothing: tokens (B, n, D), keep (B, n) -> one number a sample, (B,) -----

def token_cosine(x, keep=None):
    """Mean over token pairs i != j of cos(x_i, x_j). 1 = all tokens point the same way."""
    z = F.normalize(hide_padding(x, keep), dim=-1)           # (B, n, D), unit rows
    n = x.shape[1] if keep is None else keep.sum(1)
    return (z.sum(1).square().sum(-1) - z.square().sum((1, 2))) / (n * (n - 1))

def high_frequency_ratio(x, keep=None):
    """||HFC|| / ||LFC|| of Theorem 1. LFC: the mean token, repeated. HFC: the rest. 0 = smooth."""
    keep = torch.ones_like(x[..., 0], dtype=torch.bool) if keep is None else keep
    x = hide_padding(x, keep)
    mean = x.sum(1, keepdim=True) / keep.sum(1)[:, None, None]              # (B, 1, D)
    low = hide_padding(mean.expand_as(x), keep)
    return (x - low).flatten(1).norm(dim=1) / low.flatten(1).norm(dim=1)

def effective_rank(x, keep=None):
    """exp(entropy) of the singular values, scaled to sum 1 (Roy, Vetterli 2007): from 1 to
    min(n, D). On the CPU in float64, where small singular values are exact."""
    share = torch.linalg.svdvals(hide_padding(x, keep).detach().cpu().double())
    return torch.special.entr(share / share.sum(-1, keepdim=True)).sum(-1).exp()

# 6. A small trainer -------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend. The scripts print it as one line, exit status 2."""

def choose_device(name="auto"):
    """-> (torch.device, the reason in words). auto: cuda before mps before cpu."""
    if name != "auto":
        return torch.device(name), "as asked"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), f"no GPU found, {torch.get_num_threads()} threads"

def fit(model, optimizer, batch_at, steps, *, rate, start=0, gamma=0.01, clip=1.0, amp=False,
        net=None, share=1.0, after_step=None):
    """Train `model` from step `start` to `steps` on cross-entropy + gamma * ortho.

    batch_at(step) -> (x, keep or None, y): fixed by the step, so that a resumed run sees the same.
    A list of such parts is one batch in little memory: their gradients add up to the batch's.
    rate(step) -> learning rate. clip: largest gradient norm. amp: bfloat16 autocast.
    net: a compiled or distributed wrapper of the model. share: this process's samples over the
    mean of all processes, which DistributedDataParallel averages.
    after_step(number of finished steps, loss, ortho): called with two scalar tensors.
    """
    net, device = model if net is None else net, next(model.parameters()).device
    model.train()
    for step in range(start, steps):
        parts, sums = batch_at(step), [0, 0]
        parts = parts if isinstance(parts, list) else [parts]
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for i, (x, keep, y) in enumerate(parts):
            wait = i + 1 < len(parts) and hasattr(net, "no_sync")     # processes meet at the last
            with net.no_sync() if wait else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits, ortho = net(x, keep)
                weight = share * len(y) / sum(len(part[2]) for part in parts)
                loss, ortho = F.cross_entropy(at_least_float32(logits), y), ortho.mean()
                (weight * (loss + gamma * ortho)).backward()
            sums = [sums[0] + weight * loss.detach(), sums[1] + weight * ortho.detach()]
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if after_step:
            after_step(step + 1, *sums)

@torch.no_grad()
def evaluate(model, batches, amp=False):
    """Logits for all batches (x, keep or None), on the CPU: (N, classes). Train mode is kept."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        logits = [at_least_float32(model(x, keep)[0]).cpu() for x, keep in batches]
    model.train(training)
    return torch.cat(logits)

def save(path, **parts):
    """Write a checkpoint under a temporary name, then rename: a crash leaves the old one whole."""
    torch.save(parts, f"{path}.part")
    os.replace(f"{path}.part", path)

def load(path):
    """Read a checkpoint. weights_only: a file from a stranger brings numbers, never code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:   # a damaged file fails in many ways
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None

def training_state(model, optimizer):
    """What a resumed run needs to end at the same numbers, the step aside."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "config": asdict(model.config), "rng": torch.get_rng_state(), "rng_cuda": cuda}

def restore(state, model, optimizer):
    """Undo training_state: put everything back."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"]:
        torch.cuda.set_rng_state_all(state["rng_cuda"])
