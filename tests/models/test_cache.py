"""NeuralCache: the tokens of the stock caches from fewer numbers, through everything that `generate` does to a cache."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

from hf_neural_attention import NeuralCache, NeuralScorer, patch
from hf_neural_attention.models.neural_attention_cache import (
    GrowingNeuralCache,
    ProjectedKeys,
    SlidingProjectedKeyLayer,
    StaticSlidingProjectedKeyLayer,
    cache_nbytes,
)
from hf_neural_attention.models.neural_attention_interface import detach_scorer
from tests.helpers.comparing import assert_far, assert_near, run, use
from tests.helpers.generating import generate, neural, prompt, stock_model
from tests.helpers.neural_models import eager_and_sdpa
from tests.helpers.stock_models import latent_model
from tests.helpers.versions import CACHE, STATIC_CACHES_CROP


ALL = {"neural_layers": "all", "neural_proj_dim": 4}
NARROW = {"neural_layers": "all"}  # makes two float32 numbers per key, which take fewer bytes than a key of 8 bfloat16 numbers
VARIANTS = {
    "all layers": ALL,
    "one layer": {**ALL, "neural_layers": [0]},
    "layers between": {**ALL, "neural_layers": [1]},
    "per head": {**ALL, "neural_per_head": True},
    "other sizes": {"neural_layers": "all", "neural_proj_dim": 4, "neural_hidden_dims": [3, 5]},
}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampled beam": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
}
LENGTH = 40  # sizes caches of fixed size, in tokens: more than any test needs
growing_and_fixed = pytest.mark.parametrize("length", (None, LENGTH), ids=("growing", "fixed"))
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


def stock_cache(model: Any, length: int | None) -> Any:
    return DynamicCache(config=model.config) if length is None else StaticCache(model.config, length)


def one_prompt(length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 98, (1, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def is_projected(cache: Any) -> list[bool]:
    """Of each layer, after checking that it stores what its class says."""
    for layer in cache.layers:
        if isinstance(layer, ProjectedKeys):
            scorer = layer.source.scorer
            assert layer.keys.shape[-1] == scorer.hidden_dims[0] < layer.values.shape[-1] == scorer.head_dim
        else:
            assert layer.keys.shape == layer.values.shape
    return [isinstance(layer, ProjectedKeys) for layer in cache.layers]


def assert_same_tokens(model: Any, inputs: dict, length: int | None, **strategy) -> None:
    cache = NeuralCache(model, length)
    expected = generate(model, inputs, cache=stock_cache(model, length), **strategy)
    assert torch.equal(generate(model, inputs, cache=cache, **strategy), expected)
    neural_layers = [index in model.config.neural_layer_indices for index in range(len(cache))]
    assert is_projected(cache) == neural_layers
    for name in ("neural", "dynamic") if length is None else ("neural_static", "static"):
        assert torch.equal(generate(model, inputs, cache_implementation=name, **strategy), expected)


@eager_and_sdpa
@growing_and_fixed
@variants
def test_variants(implementation: str, length: int | None, fields: dict):
    assert_same_tokens(neural(attn_implementation=implementation, **fields), prompt(), length)


@eager_and_sdpa
@growing_and_fixed
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_strategies(implementation: str, length: int | None, strategy: dict):
    assert_same_tokens(neural(attn_implementation=implementation, **ALL), prompt(), length, **strategy)


@eager_and_sdpa
@growing_and_fixed
def test_logits_of_every_step(implementation: str, length: int | None):
    """Closer than tokens can tell; and a wrong key would show."""
    model = neural(attn_implementation=implementation, **ALL)
    inputs = prompt(padded=False)["input_ids"]
    whole = run(model, input_ids=inputs)
    cache = NeuralCache(model, length)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        assert_near(run(model, input_ids=inputs[:, start:end], cache=cache), whole[:, start:end])
        assert cache.get_seq_length() == end
    for layer in cache.layers:
        layer.keys.normal_()
    last = {"input_ids": inputs[:, -1:], "position_ids": torch.tensor([[9]])}
    assert_far(run(model, **last, cache=cache), whole[:, -1:])


@eager_and_sdpa
@growing_and_fixed
def test_a_prompt_in_chunks(implementation: str, length: int | None):
    model = neural(attn_implementation=implementation, **ALL)
    inputs = prompt()
    expected = generate(model, inputs)
    cache = NeuralCache(model, length)
    assert torch.equal(generate(model, inputs, cache=cache, prefill_chunk_size=4), expected)
    assert all(is_projected(cache))
    # lets `generate` make it, which here initializes the stock cache beforehand, and ours after it
    name = "neural" if length is None else "neural_static"
    assert torch.equal(generate(model, inputs, cache_implementation=name, prefill_chunk_size=4), expected)


@eager_and_sdpa
@growing_and_fixed
def test_a_filled_cache_serves_again(implementation: str, length: int | None):
    """A copy for each continuation of a prompt, and a reset."""
    model = neural(attn_implementation=implementation, **ALL)
    start = prompt(padded=False)
    filled = NeuralCache(model, length)
    run(model, **start, cache=filled)
    bytes_filled = filled.nbytes
    for seed in (1, 2):
        torch.manual_seed(seed)
        ids = torch.cat((start["input_ids"], torch.randint(3, 98, (2, 3))), dim=1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = copy.deepcopy(filled)
        assert type(cache) is type(filled) is (NeuralCache if length else GrowingNeuralCache)
        assert torch.equal(generate(model, more, cache=cache), generate(model, more, use_cache=False))
        assert cache.get_seq_length() > filled.get_seq_length() == 9
        # checks that the keys are copied and the model is not
        assert cache.layers[0].keys.data_ptr() != filled.layers[0].keys.data_ptr()
        assert cache.layers[0].source.scorer is model.transformer.h[0].attn.scorer
    assert filled.nbytes == bytes_filled
    filled.reset()
    assert filled.get_seq_length() == 0
    assert torch.equal(generate(model, start, cache=filled), generate(model, start))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(filled)


@eager_and_sdpa
def test_what_is_cropped_repeated_and_selected_goes_on(implementation: str):
    model = neural(attn_implementation=implementation, **ALL)
    ids = prompt(padded=False)["input_ids"]
    whole = run(model, input_ids=ids)
    cache = NeuralCache(model)
    model(input_ids=ids[:, :7], **{CACHE: cache})
    cache.crop(-2)
    assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape == (2, 4, 5, 4)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([0, 1, 4, 3, 2, 5]))
    cache.batch_select_indices(torch.tensor([2, 4]))  # takes the second prompt, then the first
    assert_near(run(model, input_ids=ids.flip(0)[:, 5:], cache=cache), whole.flip(0)[:, 5:])

    fixed = NeuralCache(model, LENGTH)
    model(input_ids=ids[:, :7], **{CACHE: fixed})
    missing = {"batch_repeat_interleave": 2, "batch_select_indices": torch.tensor([0])}
    if STATIC_CACHES_CROP:
        fixed.crop(-2)
        assert_near(run(model, input_ids=ids[:, 5:], cache=fixed), whole[:, 5:])
    else:
        missing["crop"] = -1
    for method, argument in missing.items():
        with pytest.raises(NotImplementedError, match=f"`{method}` is not there for caches of fixed size"):
            getattr(fixed, method)(argument)


@eager_and_sdpa
@variants
def test_prompt_lookup(implementation: str, fields: dict):
    """Assisted generation crops what it drafted wrongly. With an assistant: below."""
    model = neural(attn_implementation=implementation, **fields)
    inputs = {name: torch.cat((tensor, tensor), dim=1) for name, tensor in one_prompt().items()}
    expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3, cache=NeuralCache(model)), expected)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3, cache_implementation="neural"), expected)
    # asks for more room, since Transformers 5.24 drafts a token more than a cache made by it has room for, of stock models too
    static = {"prompt_lookup_num_tokens": 3, "cache_implementation": "neural_static", "max_cache_len": LENGTH}
    if STATIC_CACHES_CROP:
        assert torch.equal(generate(model, inputs, **static), expected)
    else:
        with pytest.raises(ValueError, match="not supported with Static cache"):
            generate(model, inputs, **static)


class TestAssistants:
    @pytest.fixture(autouse=True)
    def no_logged_deprecation(self):
        """Instead of conftest.py's: Transformers 5.23 calls the assistant in a way that it deprecates itself."""

    @eager_and_sdpa
    def test_assistants(self, implementation: str):
        model, inputs = neural(attn_implementation=implementation, **ALL), one_prompt()
        expected = generate(model, inputs)
        # includes a residual assistant, which could not have such a cache: the choice is not passed on
        residual = neural(n_layer=1, neural_mode="residual")
        for assistant in (neural(n_layer=1, **ALL), residual, stock_model(n_layer=1), use(model, implementation)):
            for arguments in ({"cache_implementation": "neural"}, {CACHE: NeuralCache(model)}):
                assert torch.equal(generate(model, inputs, assistant_model=assistant, **arguments), expected)


@eager_and_sdpa
@growing_and_fixed
def test_sliding_windows(implementation: str, length: int | None):
    model = neural(attn_implementation=implementation, sliding_window=8, **ALL)
    inputs = prompt(padded=False)
    cache = NeuralCache(model, length)
    kind = SlidingProjectedKeyLayer if length is None else StaticSlidingProjectedKeyLayer
    assert [type(layer) for layer in cache.layers] == [kind] * 3
    expected = generate(model, inputs, cache=stock_cache(model, length))
    assert not torch.equal(expected, generate(model, inputs, use_cache=False)), "the window must matter"
    assert torch.equal(generate(model, inputs, cache=cache), expected)
    assert all(is_projected(cache)) and cache.layers[0].keys.shape[2] == (7 if length is None else 8)
    # says of each layer what the stock one says: one of fixed size can forget nothing where it goes beyond its window
    for size in (length, length and 8, length and 7):
        layers = zip(NeuralCache(model, size).layers, stock_cache(model, size).layers, strict=True)
        assert all(getattr(ours, "is_croppable", None) is getattr(stock, "is_croppable", None) for ours, stock in layers)


@growing_and_fixed
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("fields", ({}, {"neural_per_head": True}), ids=("shared", "per head"))
def test_half_precision(length: int | None, dtype: torch.dtype, fields: dict):
    """Projected keys are float32, as the stock cache's become where they are used; values keep their dtype."""
    model = neural(**NARROW, **fields).to(dtype)
    assert_same_tokens(model, prompt(), length)
    cache = NeuralCache(model, length)
    generate(model, prompt(), cache=cache)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}
    assert {layer.values.dtype for layer in cache.layers} == {dtype}


@growing_and_fixed
def test_half_precision_by_the_reference(length: int | None):
    """ "eager" computes in bfloat16, and rounds projected keys at another place: near, but not the same."""
    model = neural(attn_implementation="eager", **NARROW).to(torch.bfloat16)
    ids = prompt()["input_ids"]
    caches = stock_cache(model, length), NeuralCache(model, length)
    for start, end in ((0, 8), (8, 9)):
        expected, actual = (run(model, input_ids=ids[:, start:end], cache=cache) for cache in caches)
        assert_near(actual.float(), expected.float(), 3e-2)


@growing_and_fixed
def test_autocast(length: int | None):
    model = neural(**NARROW)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_tokens(model, prompt(), length)


def test_numbers_and_bytes_at_the_sizes_of_the_paper():
    """head_dim 64 -> 2 numbers per key, as those of the stock cache."""
    model = neural(n_embd=128, n_head=2, n_layer=2, neural_layers="all")
    inputs = {"input_ids": torch.randint(3, 98, (3, 10))}
    for length, tokens in ((None, 10), (LENGTH, LENGTH)):
        stock, small = stock_cache(model, length), NeuralCache(model, length)
        for cache in (stock, small):
            model(**inputs, **{CACHE: cache})
        for ours, theirs in zip(small.layers, stock.layers, strict=True):
            assert ours.keys.shape == (3, 2, tokens, 2) and 32 * ours.keys.numel() == theirs.keys.numel()
            assert ours.values.shape == theirs.values.shape == (3, 2, tokens, 64)
        per_token = 2 * 3 * 2 * 4  # layers, batch, heads, bytes
        assert cache_nbytes(stock) == tokens * per_token * (64 + 64)
        assert small.nbytes == cache_nbytes(small) == tokens * per_token * (2 + 64)
        both = EncoderDecoderCache(small, stock)
        assert cache_nbytes(both) == small.nbytes + cache_nbytes(stock)
    assert NeuralCache(model).nbytes == 0


def test_keys_that_are_needed_whole_stay_whole():
    model = neural(**ALL)
    model.transformer.h[1].attn.scorer = NeuralScorer(8, mode="residual")
    model.transformer.h[2].attn.scorer = NeuralScorer(8, hidden_dims=(8, 4))
    inputs, cache = prompt(), NeuralCache(model)
    assert torch.equal(generate(model, inputs, cache=cache), generate(model, inputs, use_cache=False))
    assert is_projected(cache) == [True, False, False]


NOTHING_TO_SAVE = {
    "residual": lambda: neural(neural_layers="all", neural_mode="residual"),
    "as wide as a key": lambda: neural(neural_layers="all", neural_hidden_dims=[8, 4]),
    "wider than a key": lambda: neural(neural_layers="all", neural_hidden_dims=[9, 4]),
    "as many bytes as a key": lambda: neural(**ALL).to(torch.bfloat16),
    "no neural layer": lambda: neural(neural_layers=[]),
    "stock": stock_model,
}


@growing_and_fixed
@pytest.mark.parametrize("make", NOTHING_TO_SAVE.values(), ids=NOTHING_TO_SAVE.keys())
def test_models_for_which_it_would_do_nothing(length: int | None, make):
    model = make()
    with pytest.raises(ValueError, match="NeuralCache would save nothing with this"):
        NeuralCache(model, length)


def test_latent_attention_caches_no_keys():
    model = patch(latent_model(), "all", mode="replace")
    with pytest.raises(ValueError, match="latent attention caches no keys"):
        NeuralCache(model)


def test_models_whose_layers_may_share_keys():
    """Gemma 3n and 4 have a list of who shares them, also where nobody does."""
    model = neural(**ALL)
    model.config.kv_sharing_modes = [None] * 3
    assert type(NeuralCache(model).layers[2]) is type(NeuralCache(neural(**ALL)).layers[2])
    model.config.kv_sharing_modes = [None, None, "shared"]
    with pytest.raises(ValueError, match="some of its layers reuse keys of others"):
        NeuralCache(model)


def test_settings_that_do_not_fit():
    model, inputs = neural(**ALL), prompt()
    with pytest.raises(TypeError, match="not a NeuralGPT2Config"):
        NeuralCache(model.config)
    with pytest.raises(ValueError, match="`max_cache_len` is 0"):
        NeuralCache(model, 0)
    for name in ("neural", "neural_static"):
        with pytest.raises(ValueError, match="would save nothing"):
            generate(neural(neural_mode="residual"), inputs, cache_implementation=name)
        with pytest.raises(ValueError, match="lease use only one of the two"):
            generate(model, inputs, cache_implementation=name, cache=NeuralCache(model))
        # checks that only `generate` of our models knows the name, and nothing that is saved does
        with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
            generate(stock_model(), inputs, cache_implementation=name)
        with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
            GenerationConfig(cache_implementation=name)
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        generate(model, inputs, cache_implementation="small")
    assert torch.equal(
        generate(model, inputs, cache_implementation="neural", use_cache=False), generate(model, inputs, use_cache=False)
    )


def test_the_choice_holds_for_one_call():
    model, inputs = neural(**ALL), prompt()

    def cache_of(**arguments) -> Any:
        return getattr(model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, **arguments), CACHE)

    assert type(cache_of(cache_implementation="neural")) is GrowingNeuralCache
    fixed = cache_of(cache_implementation="neural_static", max_cache_len=30)
    assert type(fixed) is NeuralCache and fixed.get_max_length() == 30
    assert type(cache_of(cache_implementation="static")) is StaticCache
    assert type(cache_of()) is DynamicCache

    settings = GenerationConfig(max_new_tokens=2, return_dict_in_generate=True, cache_implementation="static")

    def cache_by(**arguments) -> Any:
        return getattr(model.generate(**inputs, generation_config=settings, **arguments), CACHE)

    assert type(cache_by()) is StaticCache
    assert type(cache_by(cache_implementation="neural")) is GrowingNeuralCache
    assert cache_by(cache_implementation="neural").get_max_length() == -1
    assert cache_by(cache_implementation="neural_static").get_max_length() == 30  # keeps the length of the longest call
    # changes what the model prefers when a call does not choose
    model.generation_config.cache_implementation = "static"
    assert cache_of(cache_implementation="neural").get_max_length() == -1
    assert type(cache_of()) is StaticCache and type(cache_of(cache_implementation=None)) is DynamicCache


def test_caches_of_other_models():
    model, inputs = neural(**ALL), prompt()
    for other in (neural(**ALL), neural(**{**ALL, "neural_layers": [0]}), stock_model(), copy.deepcopy(model)):
        if other.config.model_type == "neural_gpt2":
            with pytest.raises(ValueError, match="made for another model than this NeuralGPT2LMHeadModel"):
                generate(other, inputs, cache=NeuralCache(model))
        else:
            with pytest.raises(RuntimeError):  # meets sizes that do not fit, since a stock model knows nothing of scorers
                generate(other, inputs, cache=NeuralCache(model))
    # checks outside `generate` too, where sizes tell
    with pytest.raises(ValueError, match="got keys of size 16, but the layer that it was made for has keys of size 8"):
        run(neural(n_head=2, **ALL), **inputs, cache=NeuralCache(model))
    with pytest.raises(ValueError, match="made for a model of 3 layers; it was given to one with a layer 3"):
        NeuralCache(model).update(*torch.zeros(2, 1, 4, 1, 8), 3)
    # and where they do not, as between copies
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="got keys from a NeuralCache made for another model"):
        run(twin, **inputs, cache=NeuralCache(model))
    cache = NeuralCache(model)
    detach_scorer(model.transformer.h[1].attn)
    with pytest.raises(ValueError, match="has lost its scorer"):
        run(model, **inputs, cache=cache)


@eager_and_sdpa
@variants
def test_early_initialization(implementation: str, fields: dict):
    """It knows one size of keys and values, that of the model's keys."""
    model = neural(attn_implementation=implementation, **fields)
    inputs = prompt()
    for length in (None, LENGTH):
        cache, lazy = NeuralCache(model, length), NeuralCache(model, length)
        cache.early_initialization(2, num_heads=4, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0
        assert torch.equal(generate(model, inputs, cache=cache), generate(model, inputs))
        generate(model, inputs, cache=lazy)
        for early_layer, lazy_layer in zip(cache.layers, lazy.layers, strict=True):
            assert early_layer.keys.shape == lazy_layer.keys.shape and early_layer.values.shape == lazy_layer.values.shape
