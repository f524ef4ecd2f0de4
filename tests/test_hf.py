"""linrnn.hf: what transformers does with a LanguageModel is what the model does."""

import copy
import json
import pickle
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from linrnn.models import LanguageModel, SequenceClassifier
from linrnn.models.migrations import FORMAT

transformers = pytest.importorskip("transformers")

from linrnn.hf import LinRNNConfig, LinRNNForCausalLM, RecurrentCache  # noqa: E402

V, PAD, EOS = 23, 0, 1
MODELS: dict[str, dict[str, Any]] = {
    "lru": {"mixer": "lru", "tie_embeddings": True},
    "attention": {"mixer": ["attention", "mamba"], "mixer_kwargs": {"attention": {"n_heads": 2}}},  # its state grows
    "rwkv": {"mixer": "rwkv4", "ffn": "channel_mix", "norm": "layer", "embed_norm": True, "logit_soft_cap": 5.0},
}


def make(name: str = "lru", **config: Any) -> LinRNNForCausalLM:
    """In float64, so that no two candidates are as good as one another."""
    model = LanguageModel(V, d_model=16, n_layers=2, **MODELS[name]).double().eval()
    with torch.no_grad():
        for p in model.head.parameters():
            p.mul_(4)  # decided enough for beams to differ
    return LinRNNForCausalLM.from_linrnn(model, **{"pad_token_id": PAD} | config)


def prompt(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random prompts behind padding, and their attention mask."""
    T = max(lengths)
    mask = torch.stack([torch.arange(T) >= T - n for n in lengths])
    return torch.randint(2, V, mask.shape).masked_fill(~mask, PAD), mask.long()


def greedy(model: LanguageModel, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[0][:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str) -> None:
    """Greedy search is the whole forward's; beams, samples and returned sequences are those without a cache."""
    hf = make(name)
    ids, _ = prompt(7, 7)
    expected = greedy(hf.model, ids, 12)
    assert torch.equal(hf.generate(ids, max_new_tokens=12, do_sample=False), expected)
    assert len(set(expected[0, 7:].tolist())) > 2
    for options in (
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_beams": 2},
    ):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(hf.generate(ids, max_new_tokens=12, use_cache=use_cache, **options))
        assert torch.equal(*results), options
        assert not torch.equal(results[0][:2], expected)


@pytest.mark.parametrize("name", MODELS)
def test_padded_prompts(name: str) -> None:
    """A row of a padded batch generates what it generates alone, also where its neighbour has ended."""
    hf = make(name)
    ids, mask = prompt(9, 1, 4)
    alone = [hf.generate(ids[i : i + 1, -n:], max_new_tokens=8, do_sample=False) for i, n in enumerate((9, 1, 4))]
    together = hf.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert all(torch.equal(together[i, -row.shape[1] :], row[0]) for i, row in enumerate(alone))
    end = int(alone[0][0, -6])  # what the first row says third is now the end
    ended = hf.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=end)
    for i, row in enumerate(alone):
        tokens = row[0, -8:].tolist()
        n = tokens.index(end) + 1 if end in tokens else 8
        assert ended[i, 9 : 9 + n].tolist() == tokens[:n] and set(ended[i, 9 + n :].tolist()) <= {PAD}


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_a_prompt_serves_many(name: str) -> None:
    hf = make(name)
    ids, _ = prompt(7, 7)
    expected = hf.generate(ids, max_new_tokens=6, do_sample=False)
    cache = RecurrentCache()
    with torch.no_grad():
        hf(ids[:, :5], past_key_values=cache)
    assert cache.get_seq_length() == 5 and cache.batch_size == 2
    for snapshot in (copy.copy, copy.deepcopy):
        past = snapshot(cache)
        out = hf.generate(ids, past_key_values=past, max_new_tokens=6, do_sample=False)
        assert torch.equal(out, expected) and past.get_seq_length() == 12
    assert cache.get_seq_length() == 5
    chunked = hf.generate(
        ids, past_key_values=RecurrentCache(), prefill_chunk_size=2, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(chunked, expected)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_the_cache(name: str) -> None:
    hf = make(name)
    ids, _ = prompt(5, 5)
    cache = hf(ids).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    nxt = torch.tensor([[4], [5]])
    whole = hf(torch.cat((ids.flip(0), nxt), 1)).logits[:, -1:]
    torch.testing.assert_close(hf(nxt, past_key_values=copy.copy(cache)).logits, whole, rtol=0, atol=1e-10)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    out = hf(nxt.flip(0), past_key_values=cache)
    torch.testing.assert_close(out.logits, whole.flip(0), rtol=0, atol=1e-10)
    cache.reset()
    assert cache.get_seq_length() == cache.batch_size == 0 and not cache.has_previous_state()
    assert torch.equal(hf(ids, past_key_values=cache).logits, hf(ids).logits)


def test_steps_follow_the_parameters() -> None:
    """Steps made for one call of generate are not those of the next."""
    hf = make()
    ids, _ = prompt(7)
    cache = RecurrentCache()
    hf.generate(ids, past_key_values=cache, max_new_tokens=4)
    hf.model.load_state_dict(make().model.state_dict())
    assert torch.equal(hf.generate(ids, max_new_tokens=8, do_sample=False), greedy(hf.model, ids, 8))
    # with gradients a step is that of the parameters as they are, and reaches them
    assert cache.frozen is not None
    logits, _ = hf.model.step(torch.tensor([3]), cache.state)
    stepped = hf(torch.tensor([[3]]), past_key_values=cache).logits[:, 0]
    assert torch.equal(stepped, logits)
    stepped.sum().backward()
    assert all(p.grad is not None for name, p in hf.named_parameters() if "ffn" in name)


@torch.no_grad()
@pytest.mark.parametrize("change", ["reset", "written", "assigned", "converted", "another model", "copy"])
def test_one_cache_and_other_weights(change: str) -> None:
    """Steps are those of the model that is called, with its weights of the moment."""
    hf, ids = make(), prompt(7)[0]
    cache, token = RecurrentCache(), ids[:, :1]
    hf(ids, past_key_values=cache)
    hf(token, past_key_values=cache)
    if change == "copy":  # which shares the step
        frozen, cache = cache.frozen, copy.copy(cache)
        hf(token, past_key_values=cache)
        assert cache.frozen is frozen
    other = make()
    if change == "assigned":
        hf.model.load_state_dict(other.model.state_dict(), assign=True)
    elif change == "converted":
        hf.float()
    elif change == "another model":
        hf = other
    else:
        hf.model.load_state_dict(other.model.state_dict())
    if change in ("reset", "converted"):
        cache.reset()
        assert cache.frozen is None
        hf(ids, past_key_values=cache)
    expected, _ = hf.model.step(token[:, 0], cache.state)
    torch.testing.assert_close(hf(token, past_key_values=cache).logits[:, 0], expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_cache_is_pickled() -> None:
    hf, ids = make("attention"), prompt(7, 7)[0]
    cache = RecurrentCache()
    hf(ids, past_key_values=cache)
    hf(ids[:, :1], past_key_values=cache)
    again = pickle.loads(pickle.dumps(cache))
    assert again.get_seq_length() == 8
    logits = [hf(ids[:, :1], past_key_values=past).logits for past in (cache, again)]
    assert torch.equal(*logits)


@torch.no_grad()
def test_bad_steps() -> None:
    hf, ids = make("attention"), prompt(7, 7)[0]
    cache = RecurrentCache()
    hf(ids, past_key_values=cache)
    hf(ids[:, :1], past_key_values=cache)
    for token in (V, -1):
        with pytest.raises(ValueError, match=f"input_ids: expected ids from 0 to 22, got {token}"):
            hf(torch.full((2, 1), token), past_key_values=cache)
    with pytest.raises(ValueError, match=r"state\[0\].*: expected shape \(1, any"):
        hf(ids[:1, :1], past_key_values=cache)
    short = RecurrentCache(cache.state[:1], 8)
    with pytest.raises(TypeError, match="state: expected a tuple of 2 block states or None, got 1 of them"):
        hf(ids[:, :1], past_key_values=short)


def test_generate_makes_its_cache() -> None:
    hf, ids = make("attention"), prompt(7, 7)[0]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = hf.generate(ids, **options)
    assert torch.equal(hf.generate(ids, prefill_chunk_size=3, **options), expected)
    result = hf.generate(ids, return_dict_in_generate=True, **options)
    assert isinstance(result.past_key_values, RecurrentCache) and torch.equal(result.sequences, expected)
    with pytest.raises(ValueError, match=r"cache_implementation: expected None, .*got 'static'"):
        hf.generate(ids, cache_implementation="static", **options)


def test_options_of_the_configuration() -> None:
    ids = prompt(7)[0]
    assert make(use_cache=False)(ids).past_key_values is None
    assert make(use_cache=False)(ids, use_cache=True).past_key_values is not None
    assert isinstance(make(return_dict=False)(ids), tuple)
    with pytest.raises(ValueError, match="output_hidden_states, output_attentions: expected False"):
        make(output_hidden_states=True)(ids)


def test_loss_and_logits() -> None:
    hf = make()
    ids, mask = prompt(9, 4)
    labels = ids.masked_fill(mask == 0, -100)
    out = hf(ids, attention_mask=mask, labels=labels)
    logits = hf.model(ids, mask=mask.bool())[0]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)  # theirs is taken in float32
    assert torch.equal(out.logits, logits)
    for keep, columns in ((0, slice(None)), (2, slice(-2, None)), (torch.tensor([0, 3]), [0, 3])):
        kept = hf(ids, attention_mask=mask, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, logits[:, columns], rtol=0, atol=1e-12)
    assert torch.equal(hf(ids, attention_mask=mask, return_dict=False)[0], logits)
    assert out.past_key_values is not None and hf(ids, use_cache=False).past_key_values is None
    assert hf.train()(ids).past_key_values is None


@pytest.mark.parametrize("name", MODELS)
def test_auto_classes(name: str, tmp_path: Path) -> None:
    """A folder written from either side is read from either side."""
    hf = make(name, eos_token_id=EOS).float()
    ids, _ = prompt(7, 7)
    logits = hf(ids).logits
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    hf.model.save_pretrained(tmp_path / "ours")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(again, LinRNNForCausalLM) and not again.training
        assert again.model.config == hf.model.config
        for (name, p), (other, q) in zip(again.named_parameters(), hf.named_parameters(), strict=True):
            assert name == other and torch.equal(p, q)
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-5)  # transformers aligns as it likes
        assert (again.model.head.weight is again.model.embed.weight) == hf.model.tie_embeddings
        ours = LanguageModel.from_pretrained(folder)
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), hf.parameters(), strict=True))
        low = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "theirs")
    assert (config.eos_token_id, config.vocab_size, config.hidden_size, config.num_hidden_layers) == (EOS, V, 16, 2)
    assert transformers.AutoModelForCausalLM.from_config(config).model.config == hf.model.config


def test_every_layer() -> None:
    """Built without memory by transformers, filled from a folder: every causal layer steps, in beams and padded."""
    folder = Path(__file__).parent / "fixtures" / "checkpoints" / f"format-{FORMAT}" / "every_layer"
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = load_file(folder / "expected.safetensors")
    ids = expected["ids"]
    with torch.no_grad():
        torch.testing.assert_close(hf(ids).logits, expected["y"], rtol=1e-9, atol=1e-9)
    results = [
        hf.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = hf.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(padded[1:, 4:], hf.generate(ids[1:, 4:], max_new_tokens=4, do_sample=False))


class Louder(LanguageModel):
    """Computes what no folder of transformers would say."""

    def read_out(self, h: Tensor) -> Tensor:
        return 3 * super().read_out(h)


def test_from_linrnn_shares() -> None:
    model = LanguageModel(V, d_model=16, n_layers=1).train()
    hf = LinRNNForCausalLM.from_linrnn(model, eos_token_id=EOS)
    assert hf.model is model and hf.training and hf.generation_config.eos_token_id == EOS
    assert hf.dtype == torch.float32 and hf.device.type == "cpu" and hf.get_input_embeddings() is model.embed
    with pytest.raises(TypeError, match="model: expected a LanguageModel, got Louder"):
        LinRNNForCausalLM.from_linrnn(Louder(V, d_model=16, n_layers=1))
    for name, value in (("dtype", torch.bfloat16), ("arguments", {})):
        with pytest.raises(ValueError, match=f"config: expected fields that the model does not say, got {name}"):
            LinRNNForCausalLM.from_linrnn(model, **{name: value})
    with pytest.raises(TypeError, match="model: expected a LanguageModel, got SequenceClassifier"):
        LinRNNForCausalLM.from_linrnn(SequenceClassifier(2, vocab_size=3, d_model=16, n_layers=1))


@pytest.mark.parametrize("name", ["lru", "attention"])
def test_more_tokens(name: str, tmp_path: Path) -> None:
    hf = make(name)
    ids, _ = prompt(7)
    logits = hf(ids).logits
    hf.resize_token_embeddings(V + 4)
    torch.testing.assert_close(hf(ids).logits[..., :V], logits, rtol=0, atol=1e-12)
    assert hf(ids + 4).logits.shape[-1] == V + 4
    assert hf.model.vocab_size == hf.config.vocab_size == hf.model.config.vocab_size == V + 4
    assert (hf.model.head.weight is hf.model.embed.weight) == hf.model.tie_embeddings
    hf.save_pretrained(tmp_path)
    torch.testing.assert_close(LanguageModel.from_pretrained(tmp_path)(ids)[0], hf(ids).logits, rtol=0, atol=1e-12)


def test_pipeline() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(["<pad>", "<end>", "<unk>", *"abcdefghijklmnopqrst"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )
    hf = make()
    pipe = transformers.pipeline("text-generation", model=hf, tokenizer=tokenizer)
    texts = ["abcab", "q"]
    results = pipe(texts, batch_size=2, do_sample=False, max_new_tokens=6)
    for text, (result,) in zip(texts, results, strict=True):
        ids = greedy(hf.model, tokenizer(text, return_tensors="pt").input_ids, 6)[0].tolist()
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        said = tokenizer.decode(ids[len(text) :], skip_special_tokens=True)
        assert result["generated_text"].removeprefix(text).strip() == said


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    hf = make().float()
    sequence = torch.arange(20) % 5 + 2
    data = [{"input_ids": sequence, "labels": sequence, "attention_mask": torch.ones_like(sequence)}] * 8
    options = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(hf, options, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 * before
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-40")
    ids = sequence[None, :10]
    assert torch.equal(again.generate(ids, max_new_tokens=10, do_sample=False)[0], sequence)
    with pytest.raises(ValueError, match="does not support"):
        hf.activation_checkpointing_enable()


IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"input_ids": None}, TypeError, "input_ids: expected a tensor of shape"),
        ({"input_ids": IDS[0]}, TypeError, "input_ids: expected a tensor of shape"),
        ({"input_ids": IDS + V}, ValueError, "ids: expected ids from 0 to 22, got 24"),
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, ValueError, "inputs_embeds: expected None"),
        ({"output_hidden_states": True}, ValueError, "output_hidden_states, output_attentions: expected False"),
        ({"output_attentions": True}, ValueError, "output_hidden_states, output_attentions: expected False"),
        ({"attention_mask": IDS[:, :4]}, ValueError, r"attention_mask: expected shape \(2, at least 5\).*got \(2, 4\)"),
        ({"attention_mask": IDS[:1]}, ValueError, r"attention_mask: expected shape \(2, at least 5\).*got \(1, 5\)"),
        ({"past_key_values": ()}, TypeError, "past_key_values: expected a RecurrentCache or None, got tuple"),
        ({"past_key_values": RecurrentCache((1, 2, 3), 5)}, TypeError, "state: expected a tuple of 2"),
    ],
)
def test_bad_inputs(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(**{"input_ids": IDS} | given)


def test_what_takes_tokens_back_is_refused() -> None:
    hf = make()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        hf.generate(IDS[:1], assistant_model=make(), max_new_tokens=3)
    cache = hf(IDS).past_key_values
    cache.crop(0)
    with pytest.raises(NotImplementedError, match=r"cannot forget its last tokens.*linrnn\.decode\.speculative"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"class": "SequenceClassifier"}, "class: expected LanguageModel, got SequenceClassifier"),
        ({"format": 99}, "format: expected .*, got 99; update linrnn"),
        ({"format": 1}, r"format: expected .*, got 1; load it with LanguageModel\.from_pretrained"),
        ({"arguments": {"vocab_size": 3, "depth": 2}}, "arguments: expected keyword arguments of .*'depth'"),
        ({"arguments": {}}, "arguments: expected keyword arguments of .*'vocab_size'"),
    ],
)
def test_bad_configurations(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinRNNConfig(**{"arguments": {"vocab_size": 3}} | given)


def test_a_configuration_without_arguments_makes_no_model() -> None:
    with pytest.raises(ValueError, match=r"config\.arguments: expected keyword arguments of LanguageModel, got None"):
        LinRNNForCausalLM(LinRNNConfig())


def test_folders_that_are_refused(tmp_path: Path) -> None:
    model = LanguageModel(V, d_model=16, n_layers=1)
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    path, weights = tmp_path / "config.json", (tmp_path / "model.safetensors").read_bytes()
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "format"}))
    with pytest.raises(ValueError, match=r"format: expected 2, got 1; load it with LanguageModel\.from_pretrained"):
        load(tmp_path)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"device_map: expected one device for the whole model, got cpu, disk"):
        load(tmp_path, device_map={"model.embed": "cpu", "model.backbone": "disk", "model.head": "cpu"})
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(tmp_path)


def test_missing_tensors_are_an_error(tmp_path: Path) -> None:
    make("attention").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.other"] = tensors.pop("model.head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.head\.weight; unexpected: model\.other"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import linrnn.hf

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'linrnn\[hf\]'"):
        runpy.run_path(linrnn.hf.__file__)


def test_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/transformers.md").read_text(), re.S)
    assert len(blocks) == 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "transformers.md", "exec"), namespace)
    assert not torch.equal(namespace["model"].embed.weight, namespace["hf"].model.embed.weight)  # the last step counted
