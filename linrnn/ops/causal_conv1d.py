"""The short causal convolution along time, one filter per channel, with the last inputs as its state."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.ops import _inputs
from linrnn.ops._backend import BackendUnavailable, choose, unwatched

ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_reference(x, weight, bias, state, reset, mask):
    """The convolution as written, token by token: the oracle of the tests. Widened inputs, without activation."""
    outs = []
    for t in range(x.shape[1]):
        state = state if reset is None else torch.where(reset[:, t, None, None], 0, state)
        window = torch.cat((state, x[:, t : t + 1]), 1)  # (B, W, D)
        y = (window * weight.mT).sum(1)
        outs.append(y if bias is None else y + bias)
        state = window[:, 1:] if mask is None else torch.where(mask[:, t, None, None], window[:, 1:], state)
    return torch.stack(outs, 1), state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolves causally along time, channel by channel: y_t = act(bias + sum_j weight[:, W-1-j] * x_{t-j}), j < W.

    A T of 1 with a state is the step of decoding. All derivatives exist in torch; the kernels of the package
    causal-conv1d, used on CUDA tensors where it is installed and fits them, have first derivatives.

    Args:
        x: (B, T, D), real; any T, also 0.
        weight: (D, W); the last column meets the current token.
        bias: (D,).
        initial_state: the W-1 inputs before the first, (B, W-1, D), oldest first; zero if None.
        activation: None, "silu" or "swish" (the same).
        reset: (B, T) bool; where True the inputs before token t count as zero, as at the first token of a packed
            document.
        mask: (B, T) bool, True on real tokens. Padded tokens are passed over, wherever they stand: the inputs before a
            token are the real ones before it. Outputs there are 0.
        backend: "auto", "torch", "cuda" (the package causal-conv1d) or "reference".

    Returns:
        y, (B, T, D), in x's dtype; and the last W-1 real inputs, (B, W-1, D), in at least float32.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype, device or option that does not fit.
        BackendUnavailable: (a ValueError and a RuntimeError) a backend that cannot run here.
    """
    sizes = _check(x, weight, bias, initial_state, activation, reset, mask)
    chosen = "torch" if backend == "cuda" else choose(backend, x, ())
    T, W = sizes["T"], sizes["W"]
    wide = state_dtype(x.dtype)
    zero = x.new_zeros((), dtype=wide).expand(sizes["B"], W - 1, sizes["D"])
    state = zero if initial_state is None else initial_state.to(wide)

    if backend in ("auto", "cuda"):
        reason = _unfit(x, weight, initial_state, reset, mask)
        if reason is None:
            return _package_conv(x, weight, bias, initial_state, activation, reset, state)
        if backend == "cuda":
            raise BackendUnavailable(f"backend='cuda' cannot run here: {reason}; use backend='auto'")
    wide_x, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    with _inputs.full_precision(x.device.type):
        if T == 0:
            return x.clone(), state.clone()
        if chosen == "reference":
            y, last = causal_conv1d_reference(wide_x, weight, bias, state, reset, mask)
        elif mask is not None:
            y, last = _padded(wide_x, weight, bias, state, reset, mask)
        else:
            y, last = _whole(wide_x, weight, bias, state, None if reset is None else reset.cumsum(1))
    y = y if activation is None else F.silu(y)
    y = y if mask is None else torch.where(mask[..., None], y, 0)
    return y.to(x.dtype), last


def _whole(x, weight, bias, state, document: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without padding; document (B, T) numbers the packed ones from 0, that of the state."""
    (B, T, D), W = x.shape, weight.shape[1]
    window = torch.cat((state, x), 1)
    last = window[:, T:]
    if document is None:
        if T == 1:
            y = (window * weight.mT).sum(1, keepdim=True)
            return (y if bias is None else y + bias), last.clone()
        # a convolution in two dimensions, since torch has fast ones that keep channels last
        image, filters = window.unsqueeze(2).permute(0, 3, 1, 2), weight[:, None, :, None]  # (B, D, T+W-1, 1)
        y = F.conv2d(image, filters, bias, groups=D).permute(0, 2, 3, 1).squeeze(2)
        return y, last.clone()  # not a view, which would keep the whole sequence alive
    documents = torch.cat((document.new_zeros(B, W - 1), document), 1)
    y = x.new_zeros(()) if bias is None else bias
    for j in range(W):
        same = documents[:, j : j + T] == document
        y = torch.addcmul(y, torch.where(same[..., None], window[:, j : j + T], 0), weight[:, j])
    return y, torch.where((documents[:, T:] == document[:, -1:])[..., None], last, 0)


def _padded(x, weight, bias, state, reset, mask) -> tuple[Tensor, Tensor]:
    """Moves the real tokens of each row to its front, and the outputs back to where they were."""
    B, T, D = x.shape
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    front = torch.where(mask[..., None], x, 0).gather(1, order[..., None].expand(B, T, D))
    document = torch.zeros_like(order) if reset is None else reset.cumsum(1)
    y, _ = _whole(front, weight, bias, state, None if reset is None else document.gather(1, order))
    place = (mask.cumsum(1) - 1).clamp(min=0)
    y = y.gather(1, place[..., None].expand(B, T, D))

    W = weight.shape[1]
    at = mask.sum(1, keepdim=True) + torch.arange(W - 1, device=x.device)  # the last W-1 before the end of the front
    last = torch.cat((state, front), 1).gather(1, at[..., None].expand(B, W - 1, D))
    if reset is not None:
        documents = torch.cat((document.new_zeros(B, W - 1), document.gather(1, order)), 1).gather(1, at)
        last = torch.where((documents == document[:, -1:])[..., None], last, 0)
    return y, last


@functools.cache
def _package():
    """The module causal_conv1d, or why it cannot be imported."""
    try:
        import causal_conv1d
    except Exception as error:  # a build without kernels, or for another torch, fails with more than ImportError
        return f"causal-conv1d cannot be imported ({error}); pip install --no-build-isolation 'linrnn[cuda]'"
    return causal_conv1d


def _unfit(x, weight, initial_state, reset, mask) -> str | None:
    """Why the package causal-conv1d cannot take this call; None if it can."""
    if x.device.type != "cuda":
        return f"causal-conv1d runs on CUDA tensors, got tensors on {x.device}"
    if torch.compiler.is_compiling() or not unwatched((x, weight)):
        return "causal-conv1d cannot be traced or transformed"
    _, T, D = x.shape
    if T < 2 or not 2 <= weight.shape[1] <= 4 or D % 8 or x.dtype == torch.float64:
        shown = f"{x.dtype} {tuple(x.shape)}"
        return f"causal-conv1d is used for T > 1, W of 2 to 4, D divisible by 8 and no float64, got {shown}"
    if mask is not None or (reset is not None and initial_state is not None):
        return "causal-conv1d takes no mask, and no reset beside a state"
    found = _package()
    return found if isinstance(found, str) else None


def _package_conv(x, weight, bias, initial_state, activation, reset, state) -> tuple[Tensor, Tensor]:
    """The kernels take (B, D, T), in memory with channels last as here, and a state in x's dtype."""
    T = x.shape[1]
    document = None if reset is None else reset.cumsum(1)
    y = _package().causal_conv1d_fn(
        x.contiguous().mT,
        weight.contiguous(),
        bias,
        seq_idx=None if document is None else document.to(torch.int32),
        initial_states=None if initial_state is None else initial_state.to(x.dtype).contiguous().mT,
        activation=activation,
    )
    last = torch.cat((state, x[:, max(0, T - weight.shape[1] + 1) :].to(state.dtype)), 1)[:, -state.shape[1] :]
    if document is not None:
        documents = torch.cat((document.new_zeros(state.shape[:2]), document), 1)[:, T:]
        last = torch.where((documents == document[:, -1:])[..., None], last, 0)
    return y.mT, last.clone()


def _check(x, weight, bias, initial_state, activation, reset, mask) -> dict[str, int]:
    """Shapes, dtypes and devices; returns the sizes of the dimensions."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    sizes: dict[str, int] = {}
    _inputs.check_shape("x", x, "BTD", sizes, real=True)
    _inputs.check_shape("weight", weight, "DW", sizes, real=True)
    if sizes["W"] < 1:
        raise ValueError(f"weight must be (D, W) with W of at least 1, got shape {tuple(weight.shape)}")
    if bias is not None:
        _inputs.check_shape("bias", bias, "D", sizes, real=True)
    if initial_state is not None:
        sizes["W-1"] = sizes["W"] - 1
        _inputs.check_shape("initial_state", initial_state, ("B", "W-1", "D"), sizes, real=True)
    for name, v in (("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        _inputs.check_device(name, v, x.device)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], x.device)
    return sizes
