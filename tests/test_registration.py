"""Registration with the Auto classes: complete, idempotent, without a network, in any order of imports.

Nearly every test runs in a fresh interpreter, since this one has imported everything.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

# Maps auto class -> model type -> stock class, beside which there is one with "Neural" before its name
TABLES = {
    "AutoModel": {"gpt2": "GPT2Model", "vit": "ViTModel"},
    "AutoModelForPreTraining": {"gpt2": "GPT2LMHeadModel"},
    "AutoModelForCausalLM": {"gpt2": "GPT2LMHeadModel"},
    "AutoModelForSequenceClassification": {"gpt2": "GPT2ForSequenceClassification"},
    "AutoModelForTokenClassification": {"gpt2": "GPT2ForTokenClassification"},
    "AutoModelForQuestionAnswering": {"gpt2": "GPT2ForQuestionAnswering"},
    "AutoModelForImageClassification": {"vit": "ViTForImageClassification"},
    "AutoModelForMaskedImageModeling": {"vit": "ViTForMaskedImageModeling"},
}


def run_python(code: str) -> str:
    """Output of a fresh interpreter outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_nothing_that_not_everyone_needs_and_clients_find_our_classes():
    code = """
import sys
import transformers as first
from transformers import AutoModel, AutoTokenizer, GPT2LMHeadModel, ViTModel
before = set(sys.modules)
from transformers import processing_utils  # makes a second module `transformers`, which does not replace what others hold
import transformers as second
import hf_neural_attention
new = {name.split(".")[0] for name in set(sys.modules) - before}
# peft and what it imports takes longer than all the rest, matplotlib and evaluate are for pictures and recipes
assert not new & {"peft", "bitsandbytes", "matplotlib", "evaluate", "datasets", "triton"}, new
assert "hf_neural_attention.ops.native" not in sys.modules
for module in (first, second):
    assert module.NeuralGPT2LMHeadModel is hf_neural_attention.NeuralGPT2LMHeadModel
    assert module.NeuralViTForImageClassification is hf_neural_attention.NeuralViTForImageClassification
assert first is not second
print("done")
"""
    assert run_python(code) == "done"


@pytest.mark.slow
def test_everything_is_registered_without_a_network_and_again_without_harm():
    code = f"""
import importlib, socket

class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("a socket was opened")

socket.socket = NoSocket
import hf_neural_attention
import transformers
from hf_neural_attention.registration import register_auto_classes

TABLES = {TABLES!r}

def check():
    for auto_name, names in TABLES.items():
        auto = getattr(transformers, auto_name)
        for model_type, name in names.items():
            config_name = "GPT2Config" if model_type == "gpt2" else "ViTConfig"
            stock_config = getattr(transformers, config_name)
            config = getattr(hf_neural_attention, "Neural" + config_name)
            assert transformers.AutoConfig.for_model(model_type).__class__ is stock_config
            assert transformers.AutoConfig.for_model("neural_" + model_type).__class__ is config
            assert auto._model_mapping[stock_config] is getattr(transformers, name)
            assert auto._model_mapping[config] is getattr(hf_neural_attention, "Neural" + name)
    for config in (transformers.GPT2Config, hf_neural_attention.NeuralGPT2Config):
        assert transformers.TOKENIZER_MAPPING[config] in (transformers.GPT2Tokenizer, transformers.GPT2TokenizerFast)
    stock = transformers.IMAGE_PROCESSOR_MAPPING[transformers.ViTConfig]
    ours = transformers.IMAGE_PROCESSOR_MAPPING[hf_neural_attention.NeuralViTConfig]
    assert ours and all(stock[backend] is processor for backend, processor in ours.items())

sizes = lambda: [len(getattr(transformers, name)._model_mapping) for name in TABLES]
check()
before = sizes()
register_auto_classes()
register_auto_classes()
check()
importlib.reload(hf_neural_attention)
check()
assert sizes() == before
small = dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("neural_gpt2", **small))
assert type(model) is hf_neural_attention.NeuralGPT2LMHeadModel
assert type(transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**small))) is transformers.GPT2LMHeadModel
print("done")
"""
    assert run_python(code) == "done"


def test_wherever_a_stock_model_stands_ours_does():
    import transformers

    import hf_neural_attention
    from hf_neural_attention.registration import FAMILIES, MODELS_OF_AUTO_CLASSES

    stock_configs = {"gpt2": transformers.GPT2Config, "vit": transformers.ViTConfig}
    expected: dict[str, set[str]] = {}
    for name in vars(transformers.models.auto.modeling_auto):
        if name.startswith("MODEL_") and name.endswith("_MAPPING"):
            mapping = getattr(transformers.models.auto.modeling_auto, name)
            for config in stock_configs.values():
                if config in mapping:
                    expected.setdefault(name, set()).add(f"Neural{mapping[config].__name__}")
    found: dict[str, set[str]] = {}
    for name in expected:
        mapping = getattr(transformers.models.auto.modeling_auto, name)
        ours = (transformers.CONFIG_MAPPING[model_type] for model_type in FAMILIES)
        found[name] = {mapping[config].__name__ for config in ours if config in mapping}
    assert found == expected and len(expected) == len(MODELS_OF_AUTO_CLASSES) + 1  # images without a head have no Auto class
    registered = {auto.__name__: {model.__name__ for model in models} for auto, models in MODELS_OF_AUTO_CLASSES.items()}
    assert registered == {auto: {f"Neural{name}" for name in names.values()} for auto, names in TABLES.items()}
    assert hf_neural_attention.NeuralGPT2LMHeadModel in MODELS_OF_AUTO_CLASSES[transformers.AutoModelForCausalLM]


def test_pipelines_and_trainer_know_the_language_model_by_its_name():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import hf_neural_attention

    assert hf_neural_attention.NeuralGPT2LMHeadModel.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


PEFT = {
    "peft first": "import peft, hf_neural_attention",
    "peft last": "import hf_neural_attention\n{model}\nimport peft",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", PEFT.values(), ids=PEFT.keys())
def test_peft_adapts_what_it_adapts_in_the_stock_family(imports: str):
    pytest.importorskip("peft")
    make = """
from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel
small = dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
model = NeuralGPT2LMHeadModel(NeuralGPT2Config(**small))
"""
    code = f"""
{imports.format(model=make)}
{make}
adapted = peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=True))
print({{name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}})
"""
    assert run_python(code) == "{'base_model.model.transformer.h.0.attn.c_attn'}"


# must leave both the stock and the neural classes where they belong, in each order
ORDERS = {
    "Auto classes first": """
from transformers import AutoConfig, AutoTokenizer, AutoImageProcessor, AutoModel, pipeline
import hf_neural_attention""",
    "our models first": "from hf_neural_attention import NeuralGPT2LMHeadModel, NeuralViTModel",
    "a submodule of ours first": "import hf_neural_attention.models.modeling_neural_vit",
    "stock model after ours": """
from hf_neural_attention import NeuralGPT2LMHeadModel
from transformers import GPT2LMHeadModel""",
    "Trainer after ours": "import hf_neural_attention; from transformers import Trainer, TrainingArguments",
    "modules of Transformers directly": """
import hf_neural_attention
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig""",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_every_order_of_imports_works(imports: str):
    code = f"""
{imports}
import transformers, hf_neural_attention
small = dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
for model_type, library in (("neural_gpt2", hf_neural_attention), ("gpt2", transformers)):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **small))
    name = "NeuralGPT2LMHeadModel" if library is hf_neural_attention else "GPT2LMHeadModel"
    assert type(model) is getattr(library, name), type(model)
assert transformers.AutoModel._model_mapping[hf_neural_attention.NeuralViTConfig] is hf_neural_attention.NeuralViTModel
assert transformers.IMAGE_PROCESSOR_MAPPING[hf_neural_attention.NeuralViTConfig]
assert transformers.TOKENIZER_MAPPING[hf_neural_attention.NeuralGPT2Config]
print("done")
"""
    assert run_python(code) == "done"


def test_public_names():
    import hf_neural_attention

    assert hf_neural_attention.__all__ == sorted(hf_neural_attention.__all__)
    for name in set(hf_neural_attention.__all__) - {"__version__"}:
        value = getattr(hf_neural_attention, name)
        assert value.__name__ == name and value.__doc__
    with pytest.raises(ImportError):
        exec("from hf_neural_attention import NeuralBert")


def test_every_stock_name_of_both_families_has_ours():
    import transformers
    from transformers.models.gpt2 import modeling_gpt2
    from transformers.models.vit import modeling_vit

    import hf_neural_attention

    for module in (modeling_gpt2, modeling_vit):
        for name in module.__all__:
            ours = getattr(hf_neural_attention, f"Neural{name}")
            assert issubclass(ours, getattr(transformers, name))
