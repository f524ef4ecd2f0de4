"""The time-invariant diagonal state space model, one input and one output a channel: S4D's and MEGA's recurrence."""

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.ops import _inputs
from linrnn.ops._chunked_ssm import chunked_ssm, conj_pairs, exponential, lay_out, response, take, to_pairs
from linrnn.ops._recompute import recomputed
from linrnn.ops.diagonal_scan import diagonal_scan
from linrnn.ops.fft_conv import fft_conv

MODES = ("auto", "chunk", "conv", "scan", "reference")
SHORT, FEW = 8, 128  # tokens of a sequence, and of all; fewer do not pay for the matrices of a chunk
BATCH = 4  # sequences that share the transform of their two kernels; fewer do not pay for it
NOTHING = -1e4  # the least log_a: its exponential is zero in any precision
PIECE = 2**22  # numbers in the states that the form "scan" holds at once


def diagonal_ssm_reference(log_a, b, c, x, initial_state, reset, mask):
    """The recurrence as written, token by token: the oracle of the tests. Arguments as diagonal_ssm, checked."""
    h, ys = initial_state, []
    for t in range(x.shape[1]):
        h = h if reset is None else torch.where(reset[:, t, None, None], 0, h)
        new = log_a.exp() * h + b * x[:, t, :, None]
        h = new if mask is None else torch.where(mask[:, t, None, None], new, h)
        ys.append((c * h).real.sum(-1))
    return torch.stack(ys, 1), h


def diagonal_ssm(
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs h_t = exp(log_a) h_{t-1} + b x_t, y_t = Re(sum_n c_n h_t[n]) along time, for D channels of N states each.

    The recurrence of S4D (Gu et al. 2022, arXiv:2206.11893) after its discretisation. The forms are one function, with
    all derivatives with respect to log_a, b, c, x and the initial state, from both results:

    - "chunk": chunks of up to 64 tokens; matrices that a, b and c give once for all sequences read, write and answer
      inside a chunk, and `diagonal_scan` carries the state across. Memory is a few times x, whatever N is. With `reset`
      every document begins a chunk: how many there are depends on the data, and a GPU is waited for.
    - "conv": the FFT convolution with the response c a^t b. With `reset` the form is "chunk".
    - "scan": `diagonal_scan` over all D N states, in pieces of time; a backward pass recomputes the pieces. Compiled
      code takes it for every `reset`.
    - "auto": "scan" for fewer than 8 tokens a sequence or 128 in all, and for documents shorter than 8 tokens;
      otherwise "chunk". Never "conv": where it is faster at all, from 128 complex states a channel on, it is so by a
      tenth, and its rounding errors reach earlier tokens. (One core of an EPYC 9005, float32, forward and backward,
      B, T, D = 4, 2048, 256: "chunk" takes 0.55 of the time of "conv" at 32 complex states and 1.05 at 128, where the
      final state alone costs "conv" as much as all the rest; "scan" takes 30 times as long as "chunk".)

    Args:
        log_a: (D, N), real or complex, real parts at most 0. Powers of exp(log_a) are taken in its dtype, so float64
            beside float32 sequences keeps phases exact; states and products have x's precision.
        b, c: (D, N), real or complex.
        x: (B, T, D), real; any T, also 0. Half precision is a storage format, computed in float32.
        initial_state: (B, D, N); zero if None.
        reset: (B, T) bool; where True the state is zeroed before token t.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged; x there must be finite, and
            y there means nothing.
        mode: "auto", or a form ("reference" is the loop).

    Returns:
        y (B, T, D) in x's dtype, and the final state (B, D, N) in at least float32 (complex64 if log_a, b or c is
        complex).

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype, device, range or mode that does not fit.
    """
    sizes = _check(log_a, b, c, x, initial_state, reset, mask, mode)
    B, T, D, N = (sizes[letter] for letter in "BTDN")
    real, wide = _dtypes(x, log_a, b, c)
    log_a, b, c = bounded(log_a), b.to(wide), c.to(wide)
    if initial_state is not None:
        initial_state = _inputs.widen("initial_state", initial_state, wide)
    if T == 0 or B == 0:
        h = x.new_zeros((B, D, N), dtype=wide) if initial_state is None else initial_state.clone()
        return x.clone(), h
    mode, length = _form(mode, B, T, reset)
    x_wide = x.to(real)
    with _inputs.full_precision(x.device.type):
        if mode == "reference":
            h = x.new_zeros((B, D, N), dtype=wide) if initial_state is None else initial_state
            y, h = diagonal_ssm_reference(log_a, b, c, x_wide, h, reset, mask)
        elif mode == "scan":
            y, h = _scan(log_a, b, c, x_wide, initial_state, reset, mask)
        else:
            y, h = chunked_ssm(log_a, b, c, x_wide, initial_state, reset, mask, length, mode == "conv")
    return y.to(x.dtype), h.to(wide)


def diagonal_ssm_bidirectional(
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    c_reverse: Tensor,
    x: Tensor,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "auto",
) -> Tensor:
    """Sums the outputs y of diagonal_ssm over x, and over x from its end to its start with c_reverse in place of c.

    Both directions see the current token. No state goes in or out, so that "conv" is one convolution, with a kernel
    that looks both ways: "auto" takes it for 4 sequences or more without `reset`. (At 32 complex states a channel it
    takes 0.8 of the time of "chunk" for B, T, D = 4, 2048, 256 and 0.55 for 16, 1024, 128, but 1.8 for 1, 16384, 128,
    where one sequence pays for the transforms of both kernels.)

    Args:
        c_reverse: (D, N), real or complex.
        reset: (B, T) bool; where True a document begins at token t: neither direction looks across.

    The other arguments, and the errors, are those of diagonal_ssm. Returns y (B, T, D) in x's dtype.
    """
    sizes = _check(log_a, b, c, x, None, reset, mask, mode)
    _inputs.check_shape("c_reverse", c_reverse, "DN", sizes)
    _inputs.check_device("c_reverse", c_reverse, x.device)
    B, T = sizes["B"], sizes["T"]
    if mode == "auto" and B >= BATCH and B * T >= FEW and reset is None:
        mode = "conv"
    if mode != "conv" or reset is not None or T == 0 or B == 0:
        y, _ = diagonal_ssm(log_a, b, c, x, reset=reset, mask=mask, mode=mode)
        reset = None if reset is None else reset.roll(-1, 1).flip(1)  # a document is entered at its last token
        mask = None if mask is None else mask.flip(1)
        y_reverse, _ = diagonal_ssm(log_a, b, c_reverse, x.flip(1), reset=reset, mask=mask, mode=mode)
        return y + y_reverse.flip(1)
    real, wide = _dtypes(x, log_a, b, c, c_reverse)
    log_a = bounded(log_a)
    with _inputs.full_precision(x.device.type):
        kernels = [response(log_a, b.to(wide), v.to(wide), T) for v in (c, c_reverse)]
        if mask is None:
            return fft_conv(x.to(real), *kernels).to(x.dtype)
        layout = lay_out(None, mask, B, T, 1, x.device)
        with_blank = torch.cat((x, x.new_zeros(B, 1, sizes["D"])), 1)
        return take(fft_conv(take(with_blank, layout.source).to(real), *kernels), layout.place).to(x.dtype)


def _form(mode: str, B: int, T: int, reset: Tensor | None) -> tuple[str, int]:
    """The form that runs, and for chunks how many tokens a document has on average."""
    auto = mode == "auto"
    if auto:
        mode = "scan" if T < SHORT or B * T < FEW else "chunk"
    if reset is None or mode not in ("chunk", "conv"):
        return mode, T
    if torch.compiler.is_compiling():  # cannot count documents
        return "scan", T
    length = max(1, T // (1 + int(reset.sum(1).max())))
    return ("scan" if auto and length < SHORT else "chunk"), length


def _scan(log_a, b, c, x, h, reset, mask):
    """The form "scan": the states of a piece of time at once."""
    B, T, _ = x.shape
    a = exponential(log_a).to(b.dtype).flatten()  # (D N)
    length = max(1, PIECE // (B * a.numel()))
    h = None if h is None else h.flatten(1)
    if T <= length:
        y, h = _scan_piece(a, b, c, x, h, reset, mask)
        return y, h.unflatten(1, b.shape)
    ys = []
    for start in range(0, T, length):
        piece = slice(start, start + length)
        flags = (None if reset is None else reset[:, piece], None if mask is None else mask[:, piece])
        y, h = recomputed(_scan_piece, a, b, c, x[:, piece], h, *flags, preserve_rng_state=False)
        ys.append(y)
    return torch.cat(ys, 1), h.unflatten(1, b.shape)


def _scan_piece(a, b, c, x, h, reset, mask):
    u = (b * x[..., None]).flatten(2)  # (B, T, D N)
    hs, h = diagonal_scan(a, u, h, reset=reset, mask=mask)
    return (to_pairs(hs.unflatten(2, b.shape)) * conj_pairs(c)).sum(-1), h


def bounded(log_a: Tensor) -> Tensor:
    """log_a whose multiples exist: -inf, which forgets all, becomes a number whose exponential is zero all the same."""
    if log_a.is_complex():
        return torch.complex(log_a.real.clamp(min=NOTHING), torch.where(log_a.real.isneginf(), 0, log_a.imag))
    return log_a.clamp(min=NOTHING)


def _dtypes(x: Tensor, *coefficients: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of sums over real numbers, and of states."""
    real = state_dtype(x.dtype)
    is_complex = any(v.is_complex() for v in coefficients)
    return real, torch.promote_types(real, torch.complex64) if is_complex else real


def _check(log_a, b, c, x, initial_state, reset, mask, mode) -> dict[str, int]:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    sizes: dict[str, int] = {}
    _inputs.check_shape("x", x, "BTD", sizes, real=True)
    _inputs.check_log_decay(log_a, ("DN",), sizes, x.device, name="log_a")
    for name, v, letters in (("b", b, "DN"), ("c", c, "DN"), ("initial_state", initial_state, "BDN")):
        if v is not None:
            _inputs.check_shape(name, v, letters, sizes)
            _inputs.check_device(name, v, x.device)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], x.device)
    return sizes
