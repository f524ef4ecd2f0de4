"""The running softmax: attention of one query a head to all tokens so far, as a recurrence over (m, z, y)."""

from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.ops import _inputs
from linrnn.ops._running_max import nothing
from linrnn.ops._softmax_scan import scan
from linrnn.ops._softmax_torch import flipped
from linrnn.ops.diagonal_scan import flags_of


class SoftmaxState(NamedTuple):
    """Sums over the past in units of e^m: z (B, H) of e^l and y (B, H, V) of e^l v; m (B, H) is the largest logit l."""

    m: Tensor
    z: Tensor
    y: Tensor


def softmax_merge(earlier: SoftmaxState, later: SoftmaxState) -> SoftmaxState:
    """The state of two stretches of time from the states of each: associative, so stretches may be merged in any order.

    The operator of Feng et al. (2024, arXiv:2405.13956, section 3.2). Fields may have any shapes that broadcast, y one
    dimension more than m and z. At most one of the two m may be infinite.
    """
    m = torch.where(later.m > earlier.m, later.m, earlier.m)
    before, after = (earlier.m - m).exp(), (later.m - m).exp()
    return SoftmaxState(
        m, before * earlier.z + after * later.z, before[..., None] * earlier.y + after[..., None] * later.y
    )


def softmax_scan_reference(logits, v, state, reset, mask):
    """The recurrence as written, token by token: the oracle of the tests. Widened inputs."""
    os, empty = [], _no_past(logits, v)
    for t in range(logits.shape[1]):
        if reset is not None:
            state = _where(reset[:, t], empty, state)
        new = softmax_merge(state, SoftmaxState(logits[:, t], torch.ones_like(logits[:, t]), v[:, t]))
        state = new if mask is None else _where(mask[:, t], new, state)
        z = torch.where(state.z == 0, torch.inf, state.z)  # of nothing the mean is zero
        os.append(state.y / z[..., None])
    return torch.stack(os, 1), state


def softmax_scan(
    logits: Tensor,
    v: Tensor,
    initial_state: SoftmaxState | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SoftmaxState]:
    """The mean of all values so far, weighted by the exponentials of their logits, for every token.

        o_t = sum_{j<=t} e^{l_j} v_j / sum_{j<=t} e^{l_j}

    Softmax attention as an RNN (Feng et al. 2024, arXiv:2405.13956, section 3.1): l_j = q . k_j / sqrt(K) of a query
    that all tokens share. Logits of any size are right, since sums are kept in units of the largest one; those of -inf
    have no weight. Where nothing has any weight yet, o is 0 and has no gradient. All derivatives exist, from o and from
    the state, with respect to logits, v and the initial state. Where two logits are the largest, the final m has the
    gradient of the one that came first.

    Args:
        logits: (B, T, H), real, below +inf; any T, also 0.
        v: (B, T, H, V), real.
        initial_state: SoftmaxState(m, z, y); None for no past.
        reset: (B, T) bool; where True the past is forgotten before token t is processed.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged, whatever stands there, and
            its output is 0.
        reverse: scans from T-1 down to 0; the final state is then the one after token 0.
        backend: "auto", "reference", "torch", "cpu" or "cuda". "torch" runs in pieces of time, so that its memory is
            bounded.

    Returns:
        o, (B, T, H, V), in the dtype of v (float64 if the logits are); and the final state, in at least float32. Sums
        are in at least float32 too.

    Raises:
        TypeError: an argument that is no tensor, or an initial state that is no SoftmaxState.
        ValueError: a shape, dtype or device that does not fit, or an unknown backend.
        BackendUnavailable: (a ValueError and a RuntimeError) a known backend that cannot run here.
    """
    sizes: dict[str, int] = {}
    _inputs.check_shape("logits", logits, "BTH", sizes, real=True)
    _inputs.check_shape("v", v, "BTHV", sizes, real=True)
    _inputs.check_device("v", v, logits.device)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], logits.device)
    out_dtype, wide = _inputs.dtypes((v,), logits)
    state = _state(initial_state, logits.device, wide, sizes)
    logits, v = logits.to(wide), v.to(out_dtype)
    if backend != "reference":
        o, m, z, y = scan(logits, v, state, flags_of(reset, mask), reverse, backend)
        return o, SoftmaxState(m, z, y)
    if mask is not None:  # what stands at padded tokens must reach no gradient
        logits, v = (torch.where(_inputs.expand_flags(mask, x), x, 0) for x in (logits, v))
    wide_v = v.to(wide)
    state = _no_past(logits, wide_v) if state is None else state
    if sizes["T"] == 0:
        return v, SoftmaxState(*(x.clone() for x in state))
    in_order = (logits, wide_v, reset, mask)
    logits, wide_v, reset, real = flipped(*in_order) if reverse else in_order
    o, state = softmax_scan_reference(logits, wide_v, state, reset, real)
    o = o.flip(1) if reverse else o
    o = o if mask is None else torch.where(mask[..., None, None], o, 0)
    return o.to(out_dtype), state


def _no_past(logits: Tensor, v: Tensor) -> SoftmaxState:
    """The state before the first token; widened inputs."""
    z = logits.new_zeros((logits.shape[0], logits.shape[2]))
    return SoftmaxState(torch.full_like(z, nothing(z.dtype)), z, v.new_zeros((v.shape[0], *v.shape[2:])))


def _where(rows: Tensor, yes: SoftmaxState, no: SoftmaxState) -> SoftmaxState:
    """One state in the rows (B) of the batch that are True, the other elsewhere."""
    return SoftmaxState(*(torch.where(_inputs.expand_flags(rows, x), x, y) for x, y in zip(yes, no, strict=True)))


def _state(
    state: SoftmaxState | None, device: torch.device, wide: torch.dtype, sizes: dict[str, int]
) -> SoftmaxState | None:
    """The initial state, checked and in the dtype of states."""
    if state is None:
        return None
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(f"initial_state must be a SoftmaxState (m, z, y), got {type(state).__name__}")
    for name, x, letters in zip("mzy", state, ("BH", "BH", "BHV"), strict=True):
        _inputs.check_shape(f"initial_state.{name}", x, letters, sizes, real=True)
        _inputs.check_device(f"initial_state.{name}", x, device)
    return SoftmaxState(*(x.to(wide) for x in state))
