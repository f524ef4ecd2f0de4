"""One decoding step as a CUDA graph: a step of a model is hundreds of short kernels, and launching them takes longer
than they do. Replaying a graph launches all of them at once."""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode.sampling import at_least
from linrnn.layers.base import State, StepFn
from linrnn.models.language import LanguageModel
from linrnn.ops import FallbackWarning

WARM_UPS = 3  # what compiles, allocates or chooses a kernel does so in the first calls, which no graph may hold
PATIENCE = 32  # steps at one size before it is captured: about as long as a capture takes, so it costs no text much


class GraphedStep:
    """A model's step for batches of up to `batch_size` sequences, captured once and replayed for each token.

    ```python
    step = GraphedStep(model, batch_size=8)
    _, state = model(prompt)
    for _ in range(100):
        logits, state = step(ids_t, state)
    ```

    It does what `model.frozen_step()` does, with two differences: logits and state are buffers of the graph, which the
    next call overwrites (`clone` what is to be kept); and a state that is not the one returned last is copied in first.
    Smaller batches take as long as a full one. Parameters are read where they are: a change of them in place is seen,
    but what `frozen_step` computes from them is computed once. Make it again after either.

    Args:
        model: a LanguageModel on a GPU whose state does not grow with T.
        batch_size: the most sequences.
        step: the model's frozen step, where there is one already.

    Raises:
        ValueError: the model is not on a GPU, or its state grows with T (no two steps then have the same kernels).
    """

    def __init__(self, model: LanguageModel, batch_size: int, *, step: StepFn | None = None):
        if model.state_size is None:
            raise ValueError("model: its state grows with every token; a graph needs one of fixed size (a window)")
        self.batch_size = at_least(1, "batch_size", batch_size)
        self._ids = torch.zeros(batch_size, dtype=torch.int64, device=model.embed.weight.device)
        self._step: StepFn = model.frozen_step() if step is None else step
        with torch.inference_mode():
            self._state: State = states.clone(model.init_state(batch_size))
            self._before: State = states.clone(self._state)
            self._replay, self._logits = capture(self._run, self._ids.device)
        self._returned: State = None

    def __call__(self, ids_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Maps one token ids_t (B,) and a state to logits (B, V) and the next state, both buffers of the graph."""
        B = len(ids_t)
        if ids_t.ndim != 1 or not 1 <= B <= self.batch_size:
            raise ValueError(f"ids_t: expected shape (1 to {self.batch_size},), got {tuple(ids_t.shape)}")
        with torch.inference_mode():
            if state is not self._returned or states.batch_size(state) != B:
                rows = states.map_leaves(lambda leaf: leaf[:B], self._state)
                copy_(rows, state)
                self._returned = rows
            self._ids[:B].copy_(ids_t)
            self._replay()
        return self._logits[:B], self._returned

    def undo(self) -> None:
        """Makes the state what it was before the last call."""
        with torch.inference_mode():
            copy_(self._state, self._before)

    def _run(self) -> Tensor:
        copy_(self._before, self._state)
        logits, after = self._step(self._ids, self._state)
        copy_(self._state, after)
        return logits


class GraphedSteps:
    """`GraphedStep` for batches of any size: one graph for each power of two that is needed for long.

    That is for more than PATIENCE steps; until then a step runs in the smallest graph there is that holds the batch, or
    as it is. Where a step cannot be captured it warns once, and runs as it is.
    """

    def __init__(self, model: LanguageModel):
        self.model, self._step = model, model.frozen_step()
        self._graphs: dict[int, GraphedStep] = {}
        self._needed: Counter[int] = Counter()
        self._last: GraphedStep | None = None
        self._capturing = True

    def __call__(self, ids_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Maps ids_t (B,) and a state to logits (B, V) and the next state, both buffers that the next call writes."""
        size = 1 << (len(ids_t) - 1).bit_length()
        self._needed[size] += 1
        if size not in self._graphs and self._capturing and self._needed[size] > PATIENCE:
            try:
                self._graphs[size] = GraphedStep(self.model, size, step=self._step)
            except RuntimeError as error:
                self._capturing = False
                warnings.warn(
                    f"decoding: a step of this model cannot be captured in a CUDA graph ({error}); it runs kernel by "
                    "kernel. graphs=False asks for that",
                    FallbackWarning,
                    stacklevel=2,
                )
        self._last = self._graphs.get(min((n for n in self._graphs if n >= size), default=0))
        return self._step(ids_t, state) if self._last is None else self._last(ids_t, state)

    def undo(self) -> None:
        """Makes the state what it was before the last call; without a graph it still is."""
        if self._last is not None:
            self._last.undo()


def fast_step(model: LanguageModel, graphs: bool) -> StepFn:
    """Returns the model's frozen step, as CUDA graphs if that can be and is wanted."""
    return GraphedSteps(model) if graphs and can_graph(model) else model.frozen_step()


def can_graph(model: LanguageModel) -> bool:
    """Whether a graph can hold this model's step: it is on an NVIDIA GPU and its state has a fixed size."""
    return model.embed.weight.device.type == "cuda" and torch.version.hip is None and model.state_size is not None


def copy_(to: State, source: State) -> None:
    """Writes a state over another of the same structure and shapes, in one launch per dtype."""
    targets, sources = list(states.leaves(to)), list(states.leaves(source))
    shapes = [leaf.shape for leaf in sources]
    if [leaf.shape for leaf in targets] != shapes:
        raise ValueError(f"state: expected shapes {[tuple(leaf.shape) for leaf in targets]}, got {shapes}")
    if targets:
        torch._foreach_copy_(targets, sources)


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Runs `run` a few times, captures it, and returns what replays it and the tensor it writes its result to."""
    if device.type != "cuda":
        raise ValueError(f"model: CUDA graphs need a model on an NVIDIA GPU, this one is on {device.type}")
    with torch.cuda.device(device):  # the current one may be another
        stream = torch.cuda.Stream(device)  # capture demands a stream of its own, also for the calls before
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with calls that a capture of their own would not allow, such as to allocate memory
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result
