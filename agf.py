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
result; at K = 0 there is no map for s. Two gradients are written by hand, for speed and memory: of
the polynomial (`JacobiFilter.plain` is the printed form) and of U^T U. The numbers are the same.
Does not include: causal masks (notebook 09 does), key-value caches, encoder-decoder attention.
"""

import math
from dataclasses import dataclass
from functools import partial

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
        left = 2 * k * (k + a + b) * (c - 2)
        if abs(left) < 1e-9:
            raise ValueError(f"the Jacobi recurrence divides by 0 at {k=} for {a=}, {b=}")
        rows.append(((c - 1) * c * (c - 2) / left, (c - 1) * (a * a - b * b) / left,
                     2 * (k + a - 1) * (k + b - 1) * c / left))
    return rows

def three_terms(x, rows):
    """[T_0(x), ..., T_K(x)] from the rows of a recurrence, each of the shape of x."""
    T = [torch.ones_like(x)]
    for A, B, C in rows:
        T.append((A * x + B) * T[-1] - (C * T[-2] if C else 0))
    return T

def jacobi(x, order, a, b):
    """Jacobi polynomials P_0..P_order at x: x (any shape) -> (order+1, *x.shape). Orthogonal on
    [-1, 1] for a, b > -1. The method evaluates them at s in (0, 1), and some published settings
    have b <= -1: the recurrence still holds, the orthogonality does not."""
    return torch.stack(three_terms(x, recurrence(order, a, b)))

class JacobiFilter(nn.Module):
    """The filter p(s) = sum_k theta_k T_k(s), elementwise: s (any shape) -> the same shape.

    basis: "jacobi" with parameters a, b; "legendre" is a = b = 0; "chebyshev" is a = b = -1/2 as in
    the official code, so proportional to Chebyshev's polynomials, not equal; "monomial" is s^k.
    identity: theta_0 = 1 is constant and the filter starts as p = 1. Otherwise it starts as 0."""

    def __init__(self, order=5, basis="jacobi", a=1.0, b=0.0, identity=True):
        super().__init__()
        if basis not in BASES:
            raise ValueError(f"unknown basis {basis!r}; choose one of {', '.join(BASES)}")
        a, b = {"jacobi": (a, b), "chebyshev": (-0.5, -0.5)}.get(basis, (0.0, 0.0))
        self.order, self.basis, self.a, self.b, self.identity = order, basis, a, b, identity
        self.rows = recurrence(order, a, b)
        if basis == "monomial":
            self.rows = [(1.0, 0.0, 0.0)] * order            # T_k = s T_{k-1}
        self.theta = nn.Parameter(torch.zeros(order + 1))    # raw; coefficients() are the effective
        # Row k: T_k in powers of y = s - 1/2. Why y: |y| < 1/2, so float32 bears its powers.
        # Why lists: a constructor that computes with tensors fails on a meta device.
        self.powers = [[1.0] + [0.0] * order]
        for k, (A, B, C) in enumerate(self.rows, start=1):   # the recurrence, with s = y + 1/2
            last, older = self.powers[-1], self.powers[k - 2]
            self.powers.append([A * y_last + (A / 2 + B) * same - (C * old if C else 0)
                                for y_last, same, old in zip([0.0] + last, last, older)])

    def coefficients(self):
        """Effective theta, (order+1,): tanh keeps each in (-1, 1), its sign is free (Theorem 2)."""
        theta = torch.tanh(at_least_float32(self.theta))
        return torch.cat([torch.ones_like(theta[:1]), theta[1:]]) if self.identity else theta

    def plain(self, s):
        """The definition, word for word: build T_0..T_K, weight, sum."""
        theta = self.coefficients().to(s.dtype)
        return sum(theta_k * T_k for theta_k, T_k in zip(theta, three_terms(s, self.rows)))

    def forward(self, s):
        """The same numbers as plain(), faster and in the memory of one tensor instead of K."""
        s = at_least_float32(s)
        if not 1 <= self.order <= 12 or torch.compiler.is_compiling():
            return self.plain(s)         # above 12 powers cancel too much; a compiler needs no help
        M = torch.tensor(self.powers, dtype=s.dtype, device=s.device)       # (K+1, K+1)
        c = (self.coefficients()[:, None] * M).sum(0)                       # (K+1,)
        return Polynomial.apply(s, c)

class ByHand(torch.autograd.Function):
    """A function whose gradient is written by hand. torch.func may transform it."""
    generate_vmap_rule = True
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

class Polynomial(ByHand):
    """p(s) = sum_j c_j y^j at y = s - 1/2, elementwise. Autograd alone would store K tensors like
    s; here s is enough: the gradients are grad p'(y) for s and the sum of grad y^j for c_j."""
    @staticmethod
    def forward(s, c):
        return horner(s - 0.5, c)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        s, c = ctx.saved_tensors
        y = s - 0.5
        slope = c[1:] * torch.arange(1, len(c), device=c.device)            # of p'
        power = grad * y                                     # grad y^j, in one buffer
        sums = [grad.sum(), power.sum()] + [power.mul_(y).sum() for _ in c[2:]]
        return horner(y, slope).mul_(grad), torch.stack(sums)

def horner(y, c):
    """c_0 + y (c_1 + y (c_2 + ...)), in one buffer: a new tensor for each degree costs more."""
    p = y * c[-1] if len(c) > 1 else torch.zeros_like(y)
    for c_j in c[1:-1].flip(0):
        p.add_(c_j).mul_(y)
    return p.add_(c[0])

def at_least_float32(x):
    """Half precision goes up to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

# 2. The orthogonality loss ------------------------------------------------------------------

class Gram(ByHand):
    """U^T U, (..., n, d) -> (..., d, d). Autograd would make two gradients, one of them transposed
    in memory, and add them. U (G + G^T) is their sum at once: 10 % of a step at D = 64."""
    @staticmethod
    def forward(U):
        return U.mT @ U

    @staticmethod
    def backward(ctx, G):
        U, = ctx.saved_tensors
        return U @ (G + G.mT)

def orthogonality_loss(U, V, keep=None):
    """How far U and V are from orthonormal columns: (B, h, n, d) twice -> (B,), one value a sample.

        mean |U^T U - I| + mean |V^T V - I|     over the d x d entries, averaged over heads

    Padded tokens do not count. It cannot reach 0: entries of U and V are positive. U^T U grows with
    n, and the loss with it; from n near d^2 on, its part of U has no gradient left (notebook 02).
    """
    with torch.autocast(U.device.type, enabled=False):       # float32, under autocast too
        if keep is not None:
            hide = ~keep[:, None, :, None]                   # (B, 1, n, 1)
            U, V = U.masked_fill(hide, 0), V.masked_fill(hide, 0)
        eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        gap = (Gram.apply(U) - eye).abs() + (Gram.apply(V) - eye).abs()    # (B, h, d, d)
        return gap.mean(dim=(1, 2, 3))                       # (B,)

# 3. The mixers: forward(x, keep=None) -> (out, ortho), that is (B, n, D) -> (B, n, D), (B,) -----

class AGFAttention(nn.Module):
    """The paper's mixer. `filter`: any elementwise module instead of the Jacobi polynomial.

    order = 0: p is a constant, which value_proj can take over: Sigma = 1, without s and theta."""

    def __init__(self, dim, heads, order=5, basis="jacobi", a=1.0, b=0.0, identity=True,
                 filter=None):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.U_proj, self.V_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.filter = filter
        if order != 0 and filter is None:
            self.filter = JacobiFilter(order, basis, a, b, identity)
        if self.filter is not None:
            self.s_proj = nn.Linear(dim, dim)

    def factors(self, x, keep=None):
        """x (B, n, D) -> U, s (None: p = 1), V, value, each (B, h, n, d); U = V = 0 at padding."""
        x, h, s = hide_padding(x, keep), self.heads, None
        U = at_least_float32(split_heads(self.U_proj(x), h)).softmax(-1)    # over features
        if self.filter is not None:
            s = at_least_float32(split_heads(self.s_proj(x), h)).sigmoid()  # in (0, 1)
        V = at_least_float32(split_heads(self.V_proj(x), h))
        if keep is None:
            V = V.softmax(-2)                                # over tokens: columns of V sum to 1
        else:        # the lowest number, not -inf: a fully padded row must not be 0/0
            hide = ~keep[:, None, :, None]                   # (B, 1, n, 1)
            V = V.masked_fill(hide, torch.finfo(V.dtype).min).softmax(-2).masked_fill(hide, 0)
            U = U.masked_fill(hide, 0)
        return U, s, V, split_heads(self.value_proj(x), h)

    def forward(self, x, keep=None):
        U, s, V, value = self.factors(x, keep)
        left = U if s is None else U * self.filter(s)        # (B, h, n, d)
        small = (value.mT @ V.to(value.dtype)).mT    # V^T value, (B, h, d, d), in the faster order
        out = (left.to(value.dtype) @ small).transpose(1, 2).flatten(2)     # (B, n, D)
        return hide_padding(self.out_proj(out), keep), orthogonality_loss(U, V)

    def matrix(self, x, keep=None):
        """The attention matrix that forward() never builds: (U * p(s)) V^T, (B, h, n, n)."""
        U, s, V, _ = self.factors(x, keep)
        return (U if s is None else U * self.filter(s)) @ V.mT

class SoftmaxAttention(nn.Module):
    """Ordinary multi-head self-attention, the baseline. Its cost is quadratic in n."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.query_proj, self.key_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def factors(self, x, keep=None):
        """x (B, n, D) -> query, key, value, each (B, h, n, d), and a mask (B, 1, 1, n) or None."""
        x = hide_padding(x, keep)
        maps = self.query_proj, self.key_proj, self.value_proj
        # A fully padded row attends to its own zeros: a softmax over nothing would be NaN.
        mask = None if keep is None else (keep | ~keep.any(1, keepdim=True))[:, None, None, :]
        return *(split_heads(proj(x), self.heads) for proj in maps), mask

    def forward(self, x, keep=None):
        out = F.scaled_dot_product_attention(*self.factors(x, keep))        # (B, h, n, d)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, n, D)
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

MIXERS = {                        # name: made as mixer(dim, heads)
    "agf": AGFAttention,
    "uv": partial(AGFAttention, order=0),                    # Sigma = 1
    "usv": partial(AGFAttention, filter=nn.Identity()),      # p(s) = s
    "softmax": SoftmaxAttention,
    "none": lambda dim, heads: NoMixer(),
}

def split_heads(x, heads):
    """(B, n, D) -> (B, h, n, d). Contiguous: the softmaxes and products that follow like it."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2).contiguous()

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
        known = dict(norm=("pre", "post"), pool=("mean", "flatten", "first"), mixer=tuple(MIXERS))
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: one of {choices}")
        for name in ("classes", "length", "channels", "depth", "hidden", "kernel", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel % 2 == 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"odd kernel, dropout in [0, 1): not {self.kernel}, {self.dropout}")
        if self.zero_init and not self.identity:
            raise ValueError("zero_init needs identity: p = 0 and a zero out_proj never learn")

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
        mixer = mixer or MIXERS[config.mixer]
        if mixer is AGFAttention:
            mixer = partial(AGFAttention, order=config.order, basis=config.basis, a=config.a,
                            b=config.b, identity=config.identity)
        if config.vocab:
            self.embed = nn.Embedding(config.vocab, D)
            nn.init.normal_(self.embed.weight, std=0.02)
        else:                     # kernel = stride = 1 is a linear map of each time step
            self.embed = nn.Conv1d(config.channels, D, config.kernel, config.stride,
                                   padding=config.kernel // 2)
        tokens = math.ceil(config.length / config.stride)    # of an input of full length
        self.position = nn.Parameter(0.02 * torch.randn(tokens, D))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, mixer(D, config.heads))
                                    for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        width = D * tokens if config.pool == "flatten" else D
        self.classifier = nn.Linear(width, config.classes) if not config.head else nn.Sequential(
            nn.Linear(width, config.head), nn.ReLU(), nn.Linear(config.head, config.classes))

    def hidden_states(self, x, keep=None):
        """Input -> [embedding, after block 1, ..., after the last], each (B, n', D), where
        n' = ceil(n / stride), their mask (B, n') or None, and ortho (B,)."""
        c = self.config
        if x.shape[1] > c.length:
            raise ValueError(f"the input has {x.shape[1]} steps, this model takes {c.length}")
        if c.vocab:
            x = self.embed(x if keep is None else x.masked_fill(~keep, 0))
        else:
            x = self.embed(hide_padding(x, keep).mT).mT      # (B, n, channels) -> (B, n', D)
            keep = None if keep is None else keep[:, ::c.stride]
        x = x * math.sqrt(c.dim) if c.scale else x
        x = self.drop(x + self.position[:x.shape[1]])
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
            n = max(1, x.shape[1]) if keep is None else keep.sum(1, keepdim=True).clamp(min=1)
            x = x.sum(1) / n                                 # (B, D)
        else:                     # GELU and dropout before the classifier, as the official code
            x = hide_padding(self.drop(F.gelu(x)), keep)
            x = F.pad(x, (0, 0, 0, len(self.position) - x.shape[1])).flatten(1)     # (B, n' D)
        return self.classifier(x), ortho

# 5. Diagnostics of oversmoothing: tokens (B, n, D), keep (B, n) -> one number a sample, (B,) -----

def token_cosine(x, keep=None):
    """Mean over token pairs i != j of cos(x_i, x_j). 1 = all tokens point the same way."""
    z = F.normalize(hide_padding(x, keep), dim=-1)           # (B, n, D), unit rows
    n = x.shape[1] if keep is None else keep.sum(1)
    return (z.sum(1).square().sum(-1) - z.square().sum((1, 2))) / (n * (n - 1))

def high_frequency_ratio(x, keep=None):
    """||HFC|| / ||LFC|| of Theorem 1. LFC: the mean token, repeated. HFC: the rest. 0 = smooth."""
    n, x = x.shape[1] if keep is None else keep.sum(1)[:, None, None], hide_padding(x, keep)
    low = hide_padding((x.sum(1, keepdim=True) / n).expand_as(x), keep)     # (B, n, D)
    return (x - low).flatten(1).norm(dim=1) / low.flatten(1).norm(dim=1)

def effective_rank(x, keep=None):
    """exp(entropy) of the singular values scaled to sum 1 (Roy, Vetterli 2007): 1 to min(n, D)."""
    share = torch.linalg.svdvals(hide_padding(x, keep).detach().cpu().double())  # exact
    return torch.special.entr(share / share.sum(-1, keepdim=True)).sum(-1).exp()

# 6. Training --------------------------------------------------------------------------------

def train_step(model, optimizer, x, keep, y, gamma=0.01, clip=1.0):
    """One step on cross-entropy + gamma * ortho: -> the two, as scalar tensors without gradient.
    y: class numbers (B,) or shares of classes (B, classes). clip: largest norm of the gradient."""
    logits, ortho = model(x, keep)
    loss, ortho = F.cross_entropy(at_least_float32(logits), y), ortho.mean()
    (loss + gamma * ortho).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), ortho.detach()

@torch.no_grad()
def evaluate(model, batches):
    """Logits for all batches (x, keep or None), on the CPU: (N, classes). Train mode is kept."""
    training = model.training
    model.eval()
    logits = [at_least_float32(model(x, keep)[0]).cpu() for x, keep in batches]
    model.train(training)
    return torch.cat(logits)

def choose_device(name="auto"):
    """-> (torch.device, the reason in words). auto: cuda before mps before cpu."""
    if name != "auto":
        return torch.device(name), "as asked"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), f"no GPU found, {torch.get_num_threads()} threads"
