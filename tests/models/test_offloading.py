"""Layers that accelerate keeps on the CPU or on disk until they run."""

import pytest
import torch
from accelerate import cpu_offload

from tests.helpers.comparing import assert_near, run
from tests.helpers.neural_models import GPT2


FIELDS = {"neural_layers": "all"}
FORMS = {"shared": FIELDS, "per head": {**FIELDS, "neural_per_head": True}, "compact": {**FIELDS, "neural_compact": True}}
every_form = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_on_disk(tmp_path, fields, implementation):
    model = GPT2.neural(**fields)
    inputs = GPT2.inputs(labels=False)
    expected = run(model, **inputs)
    model.save_pretrained(tmp_path / "model")
    parts = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    parts |= {f"transformer.h.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    offloaded = GPT2.neural_class().from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "disk", attn_implementation=implementation
    )
    assert offloaded.transformer.h[1].attn.scorer.linear2.weight.is_meta
    assert_near(run(offloaded, **inputs), expected)
    assert offloaded.transformer.h[1].attn.scorer.linear2.weight.is_meta  # checks that the weights are gone again


@every_form
def test_weights_brought_in_from_the_cpu(fields: dict):
    model = GPT2.neural(**fields)
    inputs = GPT2.inputs(labels=False)
    expected = run(model, **inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer.h[0].attn.scorer.linear2.weight.is_meta
    assert_near(run(model, **inputs), expected)


@every_form
def test_a_model_on_the_meta_device_gives_shapes(fields: dict):
    with torch.device("meta"):
        model = GPT2.neural_class()(GPT2.config(**fields, pad_token_id=None))
        logits = model(input_ids=torch.ones(2, 8, dtype=torch.long)).logits
    assert logits.is_meta and logits.shape == (2, 8, 99)
