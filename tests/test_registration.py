"""Registration with the Auto classes: complete, idempotent, quick, without a network, in any order of imports.

Nearly every test runs in a fresh interpreter, since this one has imported everything.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

# auto class -> (model type, class) pairs, with the stock ones beside them
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


def test_import_adds_next_to_nothing():
    code = """
import sys, time
start = time.perf_counter()
import transformers
middle = time.perf_counter()
before = set(sys.modules)
import hf_neural_attention
end = time.perf_counter()
new = {name for name in set(sys.modules) - before if name.startswith(("torch", "transformers.", "hf_neural_attention."))}
assert new == {"hf_neural_attention.registration"}, new
assert "torch" not in sys.modules
dir(hf_neural_attention)
assert "torch" not in sys.modules
print(end - middle, middle - start)
"""
    runs = [tuple(map(float, run_python(code).split())) for _ in range(3)]
    ours, transformers = (statistics.median(column) for column in zip(*runs, strict=True))
    assert ours < 0.2, f"adds {ours:.3f} s to the {transformers:.3f} s of `import transformers`"


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
    assert stock and transformers.IMAGE_PROCESSOR_MAPPING[hf_neural_attention.NeuralViTConfig] == stock

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
    from transformers.models.auto import modeling_auto

    from hf_neural_attention.registration import FAMILIES, lazy_tables

    for table in lazy_tables(modeling_auto):
        for model_type, stock_type in FAMILIES.items():
            stock = table._model_mapping.get(stock_type)
            assert table._model_mapping.get(model_type) == (stock and f"Neural{stock}")
    seen = {name for table in lazy_tables(modeling_auto) for name in table._model_mapping.values() if "Neural" in str(name)}
    assert {f"Neural{name}" for names in TABLES.values() for name in names.values()} <= seen


# each must leave both the stock and the neural classes where they belong
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
    assert {*hf_neural_attention.PUBLIC_NAMES, "__version__"} == set(hf_neural_attention.__all__)
    assert set(hf_neural_attention.__all__) <= set(dir(hf_neural_attention))
    for name in hf_neural_attention.PUBLIC_NAMES:
        value = getattr(hf_neural_attention, name)
        assert value.__name__ == name and value.__doc__
    with pytest.raises(AttributeError, match="module 'hf_neural_attention' has no attribute 'NeuralBert'"):
        _ = hf_neural_attention.NeuralBert
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
