"""NeuralCache beyond GPT-2 by itself: other architectures, adapters, offloading, torch.compile, code from the Hub."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache, StaticCache

from hf_neural_attention import NeuralCache, NeuralScorer
from hf_neural_attention.models.neural_attention_cache import ProjectedKeys, StaticProjectedKeyLayer, replace_cache
from hf_neural_attention.models.neural_attention_interface import attach_scorer
from tests.helpers.comparing import assert_near, run
from tests.helpers.generating import generate, neural, prompt
from tests.helpers.neural_models import eager_and_sdpa
from tests.helpers.versions import CACHE


ALL = {"neural_layers": "all", "neural_proj_dim": 4}
LENGTH = 40
SIZES = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2}
DECODER_SIZES = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BART_SIZES = {
    **SIZES,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "tie_word_embeddings": False,
}
growing_and_fixed = pytest.mark.parametrize("length", (None, LENGTH), ids=("growing", "fixed"))


def patched(model: Any, attentions: list, head_dim: int, **arguments) -> Any:
    """A stock model with scorers on some of its attention modules."""
    for attention in attentions:
        attach_scorer(attention, NeuralScorer(head_dim, **arguments))
    return model.eval()


def decoder(name: str, implementation: str, layers: list[int], per_head: bool) -> Any:
    windows = {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 6,
    }
    config = getattr(transformers, f"{name}Config")(**DECODER_SIZES, **(windows if name == "Qwen3" else {}))
    config._attn_implementation = implementation
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return patched(model, [model.model.layers[i].self_attn for i in layers], 16, num_heads=4 if per_head else None)


@eager_and_sdpa
@growing_and_fixed
@pytest.mark.parametrize("name", ("Llama", "Qwen3"))
@pytest.mark.parametrize("per_head", (False, True), ids=("shared", "per head"))
def test_grouped_queries_rotary_keys_and_windows(implementation: str, length: int | None, name: str, per_head: bool):
    """Keys come to the cache rotated; two query heads share each; Qwen3 has a layer with a window."""
    model = decoder(name, implementation, [0, 1], per_head)
    inputs = prompt()
    stock = DynamicCache(config=model.config) if length is None else StaticCache(model.config, length)
    cache = NeuralCache(model, length)
    expected = generate(model, inputs, cache=stock)
    assert torch.equal(generate(model, inputs, cache=cache), expected)
    assert [isinstance(layer, ProjectedKeys) for layer in cache.layers] == [True, True, False]
    assert [layer.is_sliding for layer in cache.layers] == [layer.is_sliding for layer in stock.layers]
    assert any(layer.is_sliding for layer in cache.layers) == (name == "Qwen3")
    assert [layer.keys.shape[1::2] for layer in cache.layers] == [(4 if per_head else 2, 2)] * 2 + [(2, 16)]
    assert {layer.values.shape[1::2] for layer in cache.layers} == {(2, 16)}


@eager_and_sdpa
@growing_and_fixed
def test_encoder_and_decoder(implementation: str, length: int | None):
    """Cross-attention has a cache of its own, with whole keys, even where it has a scorer; encoders have none."""
    config = transformers.BartConfig(**BART_SIZES)
    config._attn_implementation = implementation
    model = transformers.BartForConditionalGeneration(config)
    layers = model.model.decoder.layers
    modules = [layers[0].self_attn, layers[1].self_attn, layers[1].encoder_attn, model.model.encoder.layers[0].self_attn]
    patched(model, modules, 8)
    inputs = prompt()

    def tokens(cache: Any, **arguments) -> torch.Tensor:
        arguments = {"max_new_tokens": 8, "do_sample": False, CACHE: cache, **arguments}
        return model.generate(**inputs, **arguments)

    for arguments in ({}, {"num_beams": 3}):
        expected = tokens(None, **arguments)
        assert len(expected.unique()) > 3
        cross = DynamicCache(config=config)
        made = replace_cache(EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)), model)
        for cache in (EncoderDecoderCache(NeuralCache(model, length), cross), made):
            assert torch.equal(tokens(cache, **arguments), expected)
            assert isinstance(cache.self_attention_cache, NeuralCache)
            assert [layer.keys.shape[-1] for layer in cache.self_attention_cache.layers] == [2, 2]
            assert [layer.keys.shape[-1] for layer in cache.cross_attention_cache.layers] == [8, 8]


def test_gpt2_with_cross_attention():
    """The model itself puts the cache beside one for cross-attention."""
    model = neural(add_cross_attention=True, **ALL)
    ids, states = prompt()["input_ids"], torch.randn(2, 5, 32)
    whole = run(model, input_ids=ids, encoder_hidden_states=states)
    cache: Any = NeuralCache(model)
    run(model, input_ids=ids[:, :6], encoder_hidden_states=states, cache=cache)
    assert cache.get_seq_length() == 6 and cache.layers[0].keys.shape[-1] == 4
    both = EncoderDecoderCache(NeuralCache(model), DynamicCache(config=model.config))
    for start, end in ((0, 6), (6, 9)):
        step = run(model, input_ids=ids[:, start:end], encoder_hidden_states=states, cache=both)
        assert_near(step, whole[:, start:end])


def test_two_modules_of_one_layer():
    model = neural(**ALL)
    model.transformer.h[1].attn.layer_idx = 0
    with pytest.raises(
        ValueError, match="Two neural attention modules of this NeuralGPT2LMHeadModel say that they are layer 0"
    ):
        NeuralCache(model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@growing_and_fixed
@pytest.mark.parametrize("whole", (False, True), ids=("low rank", "whole scorer"))
def test_adapters_of_the_scorer(length: int | None, whole: bool):
    from peft import LoraConfig, get_peft_model

    base = neural(**ALL)
    inputs = prompt()
    settings = {"target_modules": ["c_attn"], "modules_to_save": ["scorer"]} if whole else {"target_modules": ["k_proj"]}
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
            assert "lora" in name or "modules_to_save" in name
    cache = NeuralCache(model, length)
    adapted = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, cache=cache), adapted)
    assert cache.layers[0].keys.shape[-1] == 4
    with model.disable_adapter():
        cache.reset()
        plain = generate(model, inputs, use_cache=False)
        assert torch.equal(generate(model, inputs, cache=cache), plain)
    assert not torch.equal(plain, adapted)


@pytest.mark.parametrize("fields", ({}, {"neural_per_head": True}), ids=("shared", "per head"))
def test_weights_that_are_kept_elsewhere(fields: dict):
    model = neural(**ALL, **fields)
    inputs = prompt()
    expected = generate(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer.h[0].attn.scorer.linear1.weight.is_meta
    cache = NeuralCache(model)
    for _ in range(2):
        assert torch.equal(generate(model, inputs, cache=cache), expected)
        assert cache.layers[0].keys.device.type == "cpu" and cache.layers[0].keys.shape[-1] == 4
        cache.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need an accelerator, with stock models too")
@growing_and_fixed
def test_offloaded_caches(length: int | None):
    model = neural(**ALL).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompt().items()}
    cache = NeuralCache(model, length, offloading=True)
    assert torch.equal(generate(model, inputs, cache=cache), generate(model, inputs, use_cache=False))
    assert "cpu" in {layer.keys.device.type for layer in cache.layers}


def test_layers_go_and_come_back():
    """As much of offloading as a CPU shows."""
    model = neural(**ALL)
    inputs, cache = prompt(), NeuralCache(model)
    expected = run(model, **inputs)
    run(model, input_ids=inputs["input_ids"][:, :8], attention_mask=inputs["attention_mask"][:, :8], cache=cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    last = {**inputs, "input_ids": inputs["input_ids"][:, 8:], "position_ids": torch.tensor([[8], [8]])}
    assert_near(run(model, **last, cache=cache), expected[:, 8:])


def test_gradients_go_through_a_cache():
    model = neural(**ALL)
    ids = prompt()["input_ids"]
    weight = model.transformer.h[0].attn.scorer.k_proj.weight
    gradients = []
    for cache in (DynamicCache(config=model.config), NeuralCache(model)):
        model(input_ids=ids[:, :6], **{CACHE: cache})
        logits = model(input_ids=ids[:, 6:], **{CACHE: cache}).logits
        gradients.append(torch.autograd.grad(logits.square().mean(), weight)[0])
    assert_near(gradients[1], gradients[0], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fields", (ALL, {**ALL, "neural_layers": [0], "neural_per_head": True}), ids=("all", "per head"))
def test_compiled_decoding(fields: dict):
    """`fullgraph`: no step falls back to Python; and no step compiles the graph anew."""
    torch.compiler.reset()
    model = neural(n_layer=2, **fields)
    inputs = prompt()
    expected = generate(model, inputs, use_cache=False)
    forward = model.forward
    model.forward = torch.compile(forward, fullgraph=True)
    for cache in (NeuralCache(model, LENGTH), NeuralCache(model, LENGTH)):
        assert torch.equal(generate(model, inputs, cache=cache), expected)
        assert type(cache.layers[0]) is StaticProjectedKeyLayer and cache.layers[0].keys.shape == (2, 4, LENGTH, 4)
    model.forward = forward
    # compiles on the CPU as `generate` itself does on a GPU
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    for arguments in ({"cache_implementation": "neural_static"}, {CACHE: NeuralCache(model, LENGTH)}):
        vars(model).pop("_compiled_call", None)
        assert torch.equal(generate(model, inputs, compile_config=compile_config, **arguments), expected)
        assert "_compiled_call" in vars(model)


def test_memory_that_stays_where_it_is():
    """CUDA graphs need it marked; chunked prefill needs it before the first step, and so initializes the stock cache."""
    model = neural(**ALL)
    stock = StaticCache(model.config, LENGTH)
    assert not replace_cache(stock, model).is_initialized
    stock.early_initialization(2, num_heads=4, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
    cache = replace_cache(stock, model)
    assert cache.is_initialized and cache.get_max_length() == LENGTH
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        assert ours.keys.shape == (2, 4, LENGTH, 4) and ours.values.shape == theirs.values.shape == (2, 4, LENGTH, 8)
        for name in ("keys", "values", "cumulative_length"):
            marks = [getattr(layer, name)._dynamo_static_input_type for layer in (ours, theirs)]
            assert marks[0] == marks[1] is not None


@pytest.mark.slow
def test_steps_are_compiled_once():
    torch.compiler.reset()
    model = neural(n_layer=1, **ALL)
    ids = prompt()["input_ids"]
    cache = NeuralCache(model, LENGTH)
    whole = run(model, input_ids=ids)
    run(model, input_ids=ids[:, :5], cache=cache)
    keys = cache.layers[0].keys
    graphs = 0

    def backend(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    step = torch.compile(model, fullgraph=True, backend=backend)
    for position in range(5, 9):
        # prepares a mask of all positions of the cache, as `generate` does
        mask = (torch.arange(LENGTH) <= position).expand(2, 1, 1, LENGTH).contiguous()
        arguments = {"attention_mask": mask, "position_ids": torch.full((2, 1), position), CACHE: cache}
        logits = run(step, input_ids=ids[:, position : position + 1].contiguous(), **arguments)
        assert_near(logits, whole[:, position : position + 1])
    assert graphs == 1
    assert cache.layers[0].keys is keys, "the memory stays where it is"


SAVE = """
import torch
from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel

NeuralGPT2Config.register_for_auto_class()
NeuralGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
sizes = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
model = NeuralGPT2LMHeadModel(NeuralGPT2Config(neural_layers="all", tie_word_embeddings=False, **sizes)).eval()
model.save_pretrained("saved")
ids = torch.arange(3, 12)[None]
torch.save(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None), "tokens.pt")
"""

LOAD = """
import sys
{block}
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
ids, expected = torch.arange(3, 12)[None], torch.load("tokens.pt")
CACHE = "{cache}"
arguments = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
for name, kind in {{"neural": "GrowingNeuralCache", "neural_static": "NeuralCache"}}.items():
    output = model.generate(ids, cache_implementation=name, **arguments)
    assert torch.equal(output.sequences, expected)
    cache = getattr(output, CACHE)
    assert type(cache).__name__ == kind and type(cache).__module__.startswith("transformers_modules.")
    assert cache.layers[0].keys.shape[-1] == 2
"""

LOAD_BESIDE = (
    LOAD.format(block="", cache=CACHE)
    + """
# the installed package's serves a model that brought its own code
from hf_neural_attention import NeuralCache

for length in (None, 30):
    cache = NeuralCache(model, length)
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **arguments).sequences, expected)
    assert type(cache) is not type(getattr(output, CACHE)) and cache.layers[0].keys.shape[-1] == 2
try:
    model.generate(ids, **{CACHE: NeuralCache(AutoModelForCausalLM.from_pretrained("saved"))}, **arguments)
except ValueError as error:
    assert "made for another model" in str(error)
else:
    raise AssertionError
"""
)


@pytest.mark.slow
def test_a_model_that_brings_its_code_brings_the_cache(tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for script in (SAVE, LOAD.format(block='sys.modules["hf_neural_attention"] = None', cache=CACHE), LOAD_BESIDE):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", padding_side="left")
    generator = transformers.pipeline("text-generation", model=neural(**ALL), tokenizer=tokenizer)
    stock, small = (
        generator(["w5 w6 w7", "w8"], max_new_tokens=6, do_sample=False, batch_size=2, **arguments)
        for arguments in ({}, {"cache_implementation": "neural"})
    )
    assert small == stock and stock[0][0]["generated_text"].count("w") > 3
