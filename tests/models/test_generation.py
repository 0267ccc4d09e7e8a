"""`generate`: every strategy and every cache gives, token by token, what generating without a cache gives."""

from typing import Any

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    QuantizedCache,
    StaticCache,
    cache_utils,
    pipeline,
)
from transformers.utils import is_optimum_quanto_available

from hf_neural_attention import patch
from hf_neural_attention.models.neural_attention_interface import neural_attention_forward
from hf_neural_attention.models.neural_attention_pages import as_value
from tests.helpers.comparing import assert_near, run, transformers_log
from tests.helpers.generating import NEW_TOKENS, generate, neural, prompt, stock_model
from tests.helpers.neural_models import (
    ALL,
    GPT2,
    all_variants,
    eager_and_sdpa,
    liven,
    one_and_all_layers,
    whole_and_compact,
)
from tests.helpers.stock_models import FAMILIES
from tests.helpers.versions import CACHE


RESIDUAL = {"neural_layers": "all", "neural_mode": "residual"}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampled beam": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "penalized": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
strategies = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())


def assert_caches_agree(model, **strategy) -> None:
    inputs = prompt()
    expected = generate(model, inputs, use_cache=False, **strategy)
    assert torch.equal(generate(model, inputs, **strategy), expected)
    assert torch.equal(generate(model, inputs, cache_implementation="static", **strategy), expected)


@eager_and_sdpa
@all_variants
def test_with_and_without_a_cache(implementation: str, fields: dict):
    assert_caches_agree(neural(attn_implementation=implementation, **fields))


@eager_and_sdpa
@strategies
@one_and_all_layers
def test_strategies_with_and_without_a_cache(implementation: str, strategy: dict, fields: dict):
    assert_caches_agree(neural(attn_implementation=implementation, **fields), **strategy)


@eager_and_sdpa
@all_variants
def test_left_padding_changes_no_token(implementation: str, fields: dict):
    model = neural(attn_implementation=implementation, **fields)
    inputs = prompt()
    together = generate(model, inputs)
    alone = {"input_ids": inputs["input_ids"][1:, 4:], "attention_mask": inputs["attention_mask"][1:, 4:]}
    assert torch.equal(generate(model, alone), together[1:])
    # checks that the padding is masked, and not just harmless
    assert not torch.equal(generate(model, {**inputs, "attention_mask": torch.ones(2, 9, dtype=torch.long)})[1], together[1])


@eager_and_sdpa
@pytest.mark.parametrize("arguments", ({}, {"cache_implementation": "static"}, {"use_cache": False}), ids=str)
@whole_and_compact
def test_what_is_generated_is_what_the_logits_say(implementation: str, arguments: dict, fields: dict):
    model = neural(attn_implementation=implementation, **fields)
    inputs = prompt(padded=False)
    tokens = generate(model, inputs, **arguments)
    whole = torch.cat((inputs["input_ids"], tokens), dim=1)
    assert torch.equal(run(model, input_ids=whole)[:, 8:-1].argmax(dim=-1), tokens)


@eager_and_sdpa
@strategies
@whole_and_compact
def test_residual_at_birth_generates_what_the_stock_model_does(implementation: str, strategy: dict, fields: dict):
    stock = stock_model(attn_implementation=implementation)
    inputs = prompt()
    expected = generate(stock, inputs, **strategy)
    assert torch.equal(generate(GPT2.twin(stock, **RESIDUAL), inputs, **strategy), expected)
    assert not torch.equal(generate(GPT2.twin(stock, **fields), inputs, **strategy), expected)


@eager_and_sdpa
@pytest.mark.parametrize("static", (False, True))
@whole_and_compact
def test_caches_that_outlive_a_call(implementation: str, static: bool, fields: dict):
    model = neural(attn_implementation=implementation, **fields)
    inputs = prompt(padded=False)
    cache = StaticCache(model.config, 40) if static else DynamicCache(config=model.config)
    first = torch.cat((inputs["input_ids"], generate(model, inputs, cache=cache)), dim=1)
    longer = torch.cat((first, torch.randint(3, 98, (2, 3))), dim=1)
    more = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert torch.equal(generate(model, more, cache=cache), generate(model, more, use_cache=False))


@eager_and_sdpa
@pytest.mark.parametrize("static", (False, True))
@one_and_all_layers
def test_sliding_window_caches(implementation: str, static: bool, fields: dict):
    # sets a window that stock GPT-2 ignores, but from which its caches make one
    stock = stock_model(attn_implementation=implementation, sliding_window=8)
    inputs = prompt(padded=False)

    def with_cache(model) -> torch.Tensor:
        cache = StaticCache(model.config, 40) if static else DynamicCache(config=model.config)
        assert all(layer.is_sliding for layer in cache.layers)
        return generate(model, inputs, cache=cache)

    expected = with_cache(stock)
    assert not torch.equal(expected, generate(stock, inputs, use_cache=False)), "the window must matter"
    assert torch.equal(with_cache(GPT2.twin(stock, **RESIDUAL)), expected)
    neural = GPT2.twin(stock, **fields)
    assert not torch.equal(with_cache(neural), expected)
    # checks that a window that holds everything changes nothing
    neural.config.sliding_window = 40
    assert torch.equal(with_cache(neural), generate(neural, inputs, use_cache=False))


QUANTIZED = {
    "quanto": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4},
    "fp8": {"backend": "fp8"},
}


@eager_and_sdpa
# Marks quanto's as slow, since its first use compiles C++
@pytest.mark.parametrize("backend", (pytest.param("quanto", marks=pytest.mark.slow), "fp8"))
@one_and_all_layers
def test_quantized_caches(implementation: str, backend: str, fields: dict):
    if backend == "quanto" and not is_optimum_quanto_available():
        pytest.skip("optimum-quanto is not installed")
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("Transformers has this cache from 5.21 on")
    stock = stock_model(attn_implementation=implementation)
    inputs = prompt(padded=False)

    def generated(model) -> torch.Tensor:
        # copies the dict, since Transformers 5.18 takes entries out of it
        return generate(model, inputs, cache_implementation="quantized", cache_config=dict(QUANTIZED[backend]))

    expected, neural_model = generated(stock), GPT2.twin(stock, **fields)
    assert torch.equal(generated(GPT2.twin(stock, **RESIDUAL)), expected)
    assert not torch.equal(generated(neural_model), expected)

    for model in (stock, neural_model):
        cache, plain = QuantizedCache(config=model.config, **QUANTIZED[backend]), DynamicCache(config=model.config)
        for each in (cache, plain):
            model(input_ids=inputs["input_ids"][:, :8], **{CACHE: each})
        lossy, exact = (run(model, input_ids=inputs["input_ids"][:, 8:], cache=each) for each in (cache, plain))
        assert 1e-4 < (lossy - exact).abs().max() / exact.abs().max() < 0.5, "something is lost, but little"


def batched(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of continuous batching."""
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(max_batch_tokens=64, num_blocks=8, page_size=16)
    arguments = {"generation_config": settings, "continuous_batching_config": small, "warmup": False}
    return [each.generated_tokens for each in model.generate_batch(prompts, **arguments).values()]


PAGED = {
    "replace": lambda: neural(**ALL),
    "residual": lambda: neural(**RESIDUAL),
    "one layer, per head": lambda: neural(**{**ALL, "neural_layers": [1], "neural_per_head": True}),
    "compact": lambda: neural(neural_compact=True, **ALL),
    "compact, per head": lambda: neural(neural_compact=True, neural_per_head=True, **ALL),
    "patched, grouped heads": lambda: liven(patch(FAMILIES["llama"].model(), "all", proj_dim=4)),
    "patched, sliding window": lambda: liven(patch(FAMILIES["mistral"].model(), "all", mode="replace", proj_dim=4)),
    "patched, per head": lambda: liven(patch(FAMILIES["mistral"].model(), "all", mode="replace", proj_dim=4, per_head=True)),
}


@pytest.mark.parametrize("implementation", ("sdpa", "paged|eager"))
@pytest.mark.parametrize("make", PAGED.values(), ids=PAGED)
def test_continuous_batching(make: Any, implementation: str):
    model = make()
    prompts = [torch.randint(3, 98, (length,)).tolist() for length in (9, 5, 14)]
    expected = [generate(model, {"input_ids": torch.tensor([ids])}, eos_token_id=None)[0].tolist() for ids in prompts]
    model.set_attn_implementation(implementation)
    assert batched(model, prompts) == expected


def test_pages_are_for_continuous_batching_alone():
    model = neural(**ALL)
    model.set_attn_implementation("paged|eager")
    attention = model.transformer.h[0].attn
    with pytest.raises(ValueError, match=r"`attn_implementation='paged\|eager'` is for continuous batching"):
        neural_attention_forward(attention, *torch.randn(3, 1, 4, 5, 8), None)


def test_keys_that_have_no_room_in_a_page():
    key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"room for 16 numbers of a key.*layer have 32 \(4 heads of 8\)"):
        as_value(key, value)
    narrow = torch.randn(1, 4, 3, 2)
    assert torch.equal(as_value(narrow, value).transpose(1, 2).flatten(2)[..., :8], narrow.transpose(1, 2).flatten(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need an accelerator, with stock models too")
@pytest.mark.parametrize("cache", ("offloaded", "offloaded_static"))
@one_and_all_layers
def test_offloaded_caches(cache: str, fields: dict):
    model = neural(**fields).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompt().items()}
    assert torch.equal(generate(model, inputs, cache_implementation=cache), generate(model, inputs, use_cache=False))


@whole_and_compact
def test_inputs_embeds(fields: dict):
    model = neural(**fields)
    inputs = prompt(padded=False)
    embeds = {"inputs_embeds": model.transformer.wte(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    tokens = model.generate(**embeds, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens, generate(model, inputs))


@whole_and_compact
def test_scores_and_attentions_are_returned(fields: dict):
    model = neural(attn_implementation="eager", **fields)
    outputs = model.generate(
        **prompt(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True, output_attentions=True
    )
    assert len(outputs.scores) == len(outputs.attentions) == 3
    assert [[weights.shape for weights in step] for step in outputs.attentions] == [
        [(2, 4, 9, 9)] * 3,
        [(2, 4, 1, 10)] * 3,
        [(2, 4, 1, 11)] * 3,
    ]
    last = outputs.attentions[-1][0]
    assert (last.sum(dim=-1) - 1).abs().max() < 1e-5 and last[1, ..., :4].abs().max() == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@one_and_all_layers
def test_low_precision(dtype: torch.dtype, fields: dict):
    model = neural(**fields).to(dtype)
    inputs = prompt()
    cached, whole = (
        model.generate(
            **inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True, use_cache=use_cache
        ).logits[0]
        for use_cache in (True, False)
    )
    assert torch.isfinite(cached).all()
    assert_near(cached.float(), whole.float(), 1e-2)
    generate(model, inputs, cache_implementation="static")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 98)}, "</s>": 98}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@whole_and_compact
def test_text_generation_pipeline(tokenizer, tmp_path, fields: dict):
    neural(**fields).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with transformers_log() as log:
        generator = pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path))
        (first,), (second,) = generator(["w5 w6 w7", "w8"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert not any("not supported" in message for message in log)
    assert type(generator.model) is GPT2.neural_class()
    assert first["generated_text"].startswith("w5 w6 w7") and first["generated_text"].count("w") > 3
    assert second["generated_text"].startswith("w8") and second["generated_text"].count("w") > 1
    assert generator("w8", max_new_tokens=6, do_sample=False)[0] == second
