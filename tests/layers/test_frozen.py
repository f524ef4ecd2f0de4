"""frozen_step is step, in every layer, block and model; and the compiled one is had where it can be and only there."""

import pytest
import torch
from torch import nn

from linrnn import layers
from linrnn.decode.state import leaves
from linrnn.layers import frozen
from linrnn.layers.channel_mix import ChannelMix
from linrnn.models import LanguageModel, SequenceBackbone
from linrnn.ops import step_program
from linrnn.ops._backend import choose

CAUSAL = [name for name in layers.available() if layers.build(name, 16).causal]
COMPILED = {
    "lru": {},
    "lru without D": {"use_D": False, "d_state": 33},
    "slru": {"use_D": True},
    "mamba": {},
    "mamba with norms": {"bcdt_norm": True, "bias": True, "conv_bias": False, "d_state": 13, "dt_rank": 3},
    "rglru": {},
    "griffin": {},
    "mamba2": {},
    "mamba2 with groups": {"n_groups": 2, "d_head": 4, "d_state": 5, "bias": True, "dt_limit": (0.01, 0.5)},
    "rwkv4": {},
    "token_mix": {"d_state": 21},
}
MODELS = {
    "mamba": {"mixer": "mamba", "ffn": None, "tie_embeddings": True},
    "post-norm, layer norms": {"mixer": "lru", "prenorm": False, "norm": "layer", "ffn": "geglu"},
    "post-norm, no ffn": {"mixer": "slru", "prenorm": False, "ffn": None},
    "biases": {"mixer": ["lru", "rglru"], "ffn_kwargs": {"bias": True, "d_hidden": 21}, "norm_eps": 1e-3},
    "channel mix": {"mixer": ["griffin", "mamba"], "ffn": "channel_mix", "embed_norm": True, "logit_soft_cap": 2.0},
    "hybrid with attention": {"mixer": ["lru", "attention"], "embed_scale": 3.0},
    "rwkv4": {"mixer": "rwkv4", "ffn": "channel_mix"},
}
compiled_kernels = pytest.mark.skipif(
    choose("auto", torch.zeros(1), ("cpu",)) != "cpu", reason="needs the compiled kernels"
)


def agree(module, inputs, tolerance, frozen_step=None):
    """Runs both steps over inputs from the state behind the first ones."""
    frozen_step = module.frozen_step() if frozen_step is None else frozen_step
    with torch.no_grad():
        state = other = module.init_state(inputs[0].shape[0])
        for x in inputs:
            y, state = module.step(x, state)
            z, other = frozen_step(x, other)
            assert type(other) is type(state)
            for ours, theirs in zip((z, *leaves(other)), (y, *leaves(state)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_every_layer(name, dtype):
    layer = layers.build(name, d_model=16).to(dtype).eval()
    agree(layer, torch.randn(5, 3, 16, dtype=dtype), 1e-12 if dtype is torch.float64 else 1e-5)


@compiled_kernels
@pytest.mark.parametrize("d_model", (16, 48))
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers(name, d_model):
    layer = layers.build(name.split()[0], d_model=d_model, **COMPILED[name])
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no bias stays zero
    step = frozen.compiled_step(layer, d_model, layer.init_state)
    assert step is not None
    agree(layer, torch.randn(7, 3, d_model), 1e-5, step)


@compiled_kernels
def test_compiled_channel_mix():
    layer = ChannelMix(48)
    step = frozen.compiled_step(layer, 48, layer.init_state)
    assert step is not None
    agree(layer, torch.randn(7, 3, 48), 1e-5, step)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_models(name, dtype):
    model = LanguageModel(31, d_model=32, n_layers=3, **MODELS[name]).to(dtype).eval()
    for norm in (m for m in model.modules() if isinstance(m, (nn.RMSNorm, nn.LayerNorm))):
        nn.init.normal_(norm.weight)
    agree(model, torch.randint(0, 31, (6, 3)), 1e-12 if dtype is torch.float64 else 2e-5)


@compiled_kernels
@pytest.mark.parametrize("threads", (1, 2))
def test_rows_of_a_model_do_not_see_each_other(threads, monkeypatch):
    """Bit for bit: decoding in a batch is decoding alone."""
    monkeypatch.setattr(step_program, "MIN_WEIGHTS", 0)
    model = LanguageModel(31, d_model=48, n_layers=3, mixer=["mamba", "lru", "griffin"]).eval()
    ids, step = torch.randint(0, 31, (5, 7)), model.frozen_step()

    def run(rows):
        state, seen = model.init_state(rows.shape[1]), []
        for ids_t in rows:
            logits, state = step(ids_t, state)
            seen.append(logits)
        return torch.stack(seen)

    torch.set_num_threads(threads)
    try:
        together = run(ids)
        for b in range(7):
            assert torch.equal(run(ids[:, b : b + 1]), together[:, b : b + 1])
    finally:
        torch.set_num_threads(1)


def test_ids_outside_the_vocabulary_are_refused():
    model = LanguageModel(31, d_model=16, n_layers=1)
    with pytest.raises(IndexError, match="out of range"):
        model.frozen_step()(torch.tensor([31]), model.init_state(1))


def test_no_dropout_is_lost():
    """In training a block drops outputs, which no program does; in eval mode it does not."""
    backbone = SequenceBackbone("lru", 16, 1, dropout=0.5)
    x, state = torch.ones(64, 16), backbone.init_state(64)
    y, _ = backbone.frozen_step()(x, state)
    assert not torch.equal(y[0], y[1])
    y, _ = backbone.eval().frozen_step()(x, state)
    assert torch.equal(y[0], y[1])


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(module, args, output):
    """A hook, for modules that return a tensor or a tensor and a state."""
    return (2 * output[0], output[1]) if isinstance(output, tuple) else 2 * output


def replaced(model):
    ffn = model.backbone.blocks[1].ffn
    ffn.out = Doubled(ffn.out.in_features, ffn.out.out_features, bias=False)


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(doubled)


def patch(path, name="forward"):
    """Puts another method on one object, as accelerate does."""

    def change(model):
        module = model.get_submodule(path)
        own = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: doubled(module, args, own(*args, **kwargs)))

    return change


def override(path, name="forward"):
    """Makes it an object of a subclass with another method."""

    def change(model):
        module = model.get_submodule(path)
        cls = type(module)
        method = lambda self, *args, **kwargs: doubled(self, args, getattr(cls, name)(self, *args, **kwargs))  # noqa: E731
        module.__class__ = type("Sub", (cls,), {name: method})

    return change


CHANGES = {
    "an adapter": replaced,
    **{f"hook {path}": hook(path) for path in ("", "backbone", "backbone.blocks.0", "backbone.norm", "head", "embed")},
    **{
        f"hook in a block: {path}": hook(f"backbone.blocks.0.{path}") for path in ("mixer", "dropout", "ffn", "ffn.out")
    },
    **{f"hook in Mamba: {path}": hook(f"backbone.blocks.0.mixer.{path}") for path in ("in_proj", "conv1d")},
    **{
        f"patch {path}": patch(path)
        for path in ("", "backbone", "backbone.blocks.0.mixer", "backbone.blocks.1.ffn.out")
    },
    **{f"override {path}": override(path) for path in ("", "backbone", "backbone.blocks.0", "backbone.blocks.1.mixer")},
    "override read_out": override("", "read_out"),
    "override finish": override("backbone.blocks.0", "finish"),
    "override capped": override("", "capped"),
    "override scan": override("backbone.blocks.1.mixer", "scan"),
    "override conv1d": override("backbone.blocks.0.mixer.conv1d"),
}


@pytest.mark.parametrize("backend", ("auto", "torch"))
@pytest.mark.parametrize("change", CHANGES)
def test_what_stands_in_for_a_part_is_called(change, backend, monkeypatch):
    """Adapters, hooks, overridden and patched methods: the step runs them rather than what was there before."""
    if backend == "torch":
        monkeypatch.setattr(step_program, "choose", lambda *_: "torch")
    model = LanguageModel(31, d_model=16, n_layers=2, mixer=["mamba", "lru"]).eval()
    ids = torch.randint(0, 31, (4, 2))
    before = model(ids)[0]
    CHANGES[change](model)
    assert not torch.allclose(model(ids)[0], before)
    agree(model, ids, 1e-5)


@pytest.mark.parametrize("change", (hook(""), patch(""), override(""), hook("x_proj")))
def test_a_step_of_mamba_is_its_forward(change):
    layer, x = layers.build("mamba", 16), torch.randn(2, 16)
    change(layer)
    wanted = layer(x[:, None])[0]
    torch.testing.assert_close(layer.step(x, layer.init_state(2))[0], wanted[:, 0])


def test_hooks_on_all_modules_are_called():
    model = LanguageModel(31, d_model=16, n_layers=1, mixer="lru").eval()
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        agree(model, torch.randint(0, 31, (4, 2)), 1e-5)
    finally:
        handle.remove()


def test_without_the_compiled_kernels(monkeypatch):
    monkeypatch.setattr(step_program, "choose", lambda *_: "torch")
    model = LanguageModel(31, d_model=16, n_layers=2, mixer=["mamba", "lru"]).eval()
    assert frozen.compiled_step(model, 16, model.init_state, 31) is None
    agree(model, torch.randint(0, 31, (4, 2)), 1e-5)


@compiled_kernels
def test_a_program_that_leaves_out_a_state_is_noticed(monkeypatch):
    monkeypatch.setattr(layers.LRU, "emit_step", lambda self, program, x, out, add: program.gate(x, out=out))
    with pytest.raises(RuntimeError, match=r"LRU\.emit_step: state"):
        layers.build("lru", 16).frozen_step()


def test_a_bidirectional_layer_still_cannot_step():
    layer = layers.build("lru", 16, bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional"):
        layer.frozen_step()(torch.zeros(1, 16), None)
