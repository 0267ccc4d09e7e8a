"""Training: gradient checkpointing, mixed precision, torch.compile, adapters, the Trainer."""

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from tests.helpers.comparing import (
    assert_far,
    assert_near,
    assert_same_gradients,
    assert_same_state,
    backward,
    run,
    transformers_log,
)
from tests.helpers.neural_models import (
    COMPACT_LAYERS,
    GPT2,
    LAYERS,
    VIT,
    Family,
    all_variants,
    both_families,
    eager_and_sdpa,
    every_model,
    one_and_all_layers,
    scorers,
    whole_and_compact,
)
from tests.helpers.versions import CHECKPOINTING


DROPOUT = {
    "GPT2": {"attn_pdrop": 0.2, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "ViT": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.1},
}
LORA_TARGETS = {"GPT2": ["c_attn"], "ViT": ["q_proj", "v_proj"]}


@every_model
@whole_and_compact
def test_gradient_checkpointing_of_an_old_config(family: Family, head: str, fields: dict):
    stock = family.stock(head, gradient_checkpointing=True)
    model = family.neural(head, gradient_checkpointing=True, **fields)
    expected = [layer.gradient_checkpointing for layer in stock.modules() if hasattr(layer, "gradient_checkpointing")]
    assert any(expected)
    assert [layer.gradient_checkpointing for layer in model.modules() if hasattr(layer, "gradient_checkpointing")] == expected
    assert not hasattr(model.config, "gradient_checkpointing"), "it is no field of a config any more"


@both_families
@eager_and_sdpa
@all_variants
@pytest.mark.parametrize("dropout", (False, True))
def test_gradient_checkpointing_changes_no_gradient(family: Family, implementation: str, fields: dict, dropout: bool):
    model = family.neural(attn_implementation=implementation, **fields, **(DROPOUT[family.stem] if dropout else {})).train()
    inputs = family.inputs()
    results, calls = [], []
    scorers(model)[0].register_forward_hook(lambda *arguments: calls.append(None))
    for reentrant in (None, False, True):
        if reentrant is not None:
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
            # satisfies the reentrant variant, which wants an input that requires a gradient
            model.enable_input_require_grads()
        torch.manual_seed(5)
        results.append(backward(model, **inputs))
        getattr(model, f"{CHECKPOINTING}_disable")()
    plain, *checkpointed = results
    has_weights = any("scorer" in name for name, _ in model.named_parameters())  # compact thin scorers have none
    assert any("scorer" in name for name in plain) == has_weights
    assert len(calls) == 1 + 2 + 2, "checkpointed layers run again in backward"
    for gradients in checkpointed:
        assert_same_gradients(gradients, plain)
    torch.manual_seed(6)
    embedding = next(iter(plain))
    other_seed = backward(model, **inputs)[embedding]
    assert torch.equal(other_seed, plain[embedding]) != dropout, "another seed drops other weights"


@both_families
@all_variants
def test_eager_and_sdpa_have_the_same_gradients(family: Family, fields: dict):
    sdpa = family.neural(**fields).train()
    eager = family.neural(attn_implementation="eager", **fields).train()
    eager.load_state_dict(sdpa.state_dict())
    inputs = family.inputs()
    assert_same_gradients(backward(sdpa, **inputs), backward(eager, **inputs), 1e-4)


@both_families
@whole_and_compact
def test_attention_dropout_drops_the_same_under_eager_and_sdpa(family: Family, fields: dict):
    name = "attn_pdrop" if family is GPT2 else "attention_probs_dropout_prob"
    sdpa = family.neural(**fields, **{name: 0.3}).train()
    eager = family.neural(attn_implementation="eager", **fields, **{name: 0.3}).train()
    eager.load_state_dict(sdpa.state_dict())
    inputs, outputs = family.inputs(labels=False), []
    for model, seed in ((sdpa, 1), (eager, 1), (sdpa, 2)):
        torch.manual_seed(seed)
        outputs.append(run(model, **inputs))
    assert_near(outputs[1], outputs[0])
    assert_far(outputs[2], outputs[0])
    assert_far(run(sdpa.eval(), **inputs), outputs[0])


@both_families
@eager_and_sdpa
@one_and_all_layers
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("autocast", (False, True), ids=("whole model", "autocast"))
def test_low_precision(family: Family, implementation: str, fields: dict, dtype: torch.dtype, autocast: bool):
    model = family.neural(attn_implementation=implementation, **fields)
    inputs = family.inputs()
    expected = model(**inputs).loss
    model.to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        outputs = model(**inputs)
    assert_near(outputs.loss.float(), expected, 2e-2)
    assert outputs.logits.dtype == dtype
    model.train()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        gradients = backward(model, **inputs)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(gradient.dtype == (torch.float32 if autocast else dtype) for gradient in gradients.values())
    assert all(scorer.linear2.weight.grad.abs().max() > 0 for scorer in scorers(model))


@whole_and_compact
def test_half_and_float_keep_the_model_whole(fields: dict):
    model = GPT2.neural(**fields)
    batch = GPT2.inputs(labels=False)
    expected = run(model, **batch)
    half = model.half()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    back = half.float()
    assert back.dtype == torch.float32
    assert_near(run(back, **batch), expected, 1e-2)


@pytest.mark.slow
@both_families
@pytest.mark.parametrize(
    "fields",
    (LAYERS["one layer"], {"neural_layers": "all", "neural_mode": "residual"}, *(LAYERS[name] for name in COMPACT_LAYERS)),
    ids=("one layer", "residual", *COMPACT_LAYERS),
)
def test_compiled_forward_and_training_step(family: Family, fields: dict):
    torch.compiler.reset()
    model = family.neural(**fields)
    inputs = family.inputs()
    expected = run(model, **inputs)
    compiled = torch.compile(model, fullgraph=True)
    assert_near(run(compiled, **inputs), expected)
    model.train()
    plain = backward(model, **inputs)
    actual = {name.removeprefix("_orig_mod."): gradient for name, gradient in backward(compiled, **inputs).items()}
    assert_same_gradients(actual, plain, 1e-4)
    # takes a step, to see that the graph follows the weights
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    stepped = run(compiled, **inputs)
    assert_near(stepped, run(model, **inputs))
    assert_far(stepped, expected)


def padded_inputs() -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(3, 98, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.slow
@eager_and_sdpa
@whole_and_compact
def test_compiled_with_padding_and_dropout(implementation: str, fields: dict):
    torch.compiler.reset()
    model = GPT2.neural(attn_implementation=implementation, n_layer=1, **fields, **DROPOUT["GPT2"])
    inputs = padded_inputs()
    real = inputs["attention_mask"].bool()
    compiled = torch.compile(model, fullgraph=True)
    assert_near(run(compiled, **inputs)[real], run(model, **inputs)[real])
    gradients = backward(compiled.train(), **inputs, labels=inputs["input_ids"])
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.slow
@whole_and_compact
def test_compiled_generation_with_a_static_cache(fields: dict):
    torch.compiler.reset()
    model = GPT2.neural(n_layer=1, **fields)
    inputs, arguments = padded_inputs(), {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**inputs, **arguments)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(**inputs, **arguments), expected)


# ignores peft's correction: one setting serves all targets, which are Conv1D in GPT-2 and Linear in scorers
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@both_families
@one_and_all_layers
@pytest.mark.parametrize("scorer_too", (False, True), ids=("attention", "scorer"))
def test_lora(family: Family, fields: dict, scorer_too: bool, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = family.neural(**fields)
    base.save_pretrained(tmp_path / "base")
    inputs = family.inputs()
    before = run(base, **inputs)
    # names targets with their module, since a scorer has a `.q_proj` too
    attention = LORA_TARGETS[family.stem]
    inner = "linear2" if fields.get("neural_compact") else "linear1"
    targets = [*attention, inner] if scorer_too else rf".*\.{family.attention_name}\.({'|'.join(attention)})"
    config = LoraConfig(target_modules=targets, r=4, fan_in_fan_out=family is GPT2)
    model = get_peft_model(base, config)
    assert torch.equal(run(model, **inputs), before)
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    adapted = {
        name.rsplit(".lora_B", 1)[0] for name, each in model.named_parameters() if "lora_B" in name and each.abs().max() > 0
    }
    assert any(name.endswith(f"scorer.{inner}") for name in adapted) == scorer_too
    assert sum(name.endswith(tuple(f"{family.attention_name}.{each}" for each in attention)) for name in adapted) > 0
    trained = run(model.eval(), **inputs)
    assert_far(trained, before)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(family.neural_class().from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert_near(run(again.eval(), **inputs), trained)
    merged = model.merge_and_unload()
    assert type(merged) is family.neural_class()
    assert_near(run(merged, **inputs), trained, 1e-4)


def rows_of(family: Family, count: int = 8) -> list[dict]:
    return [{name: tensor[0] for name, tensor in family.inputs(batch=1).items()} for _ in range(count)]


@both_families
@pytest.mark.parametrize("checkpointing", (False, True))
@whole_and_compact
def test_trainer(family: Family, checkpointing: bool, tmp_path, fields: dict):
    model = family.neural(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        **{CHECKPOINTING: checkpointing},
    )
    trainer = Trainer(model, arguments, train_dataset=rows_of(family), eval_dataset=rows_of(family, 2))
    result = trainer.train()
    assert result.global_step == 2 and torch.isfinite(torch.tensor(result.training_loss))
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    for name, parameter in model.named_parameters():
        # expects everything to learn but the bias that the softmax does not see
        assert torch.equal(parameter, before[name]) == name.endswith("scorer.linear3.bias"), name
    assert_same_state(family.neural_class().from_pretrained(tmp_path / "checkpoint-2"), model)


@both_families
@whole_and_compact
def test_trainer_resumes_with_all_weights(family: Family, tmp_path, fields: dict):
    """Also where a checkpoint names them otherwise than the model does, as a ViT's."""
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, learning_rate=0.0, use_cpu=True, report_to="none", disable_tqdm=True
    )
    model, other = family.neural(**fields), family.neural(**fields)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    Trainer(model, arguments, train_dataset=rows_of(family)).train()
    Trainer(other, arguments, train_dataset=rows_of(family)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_state(other, model)


@both_families
@pytest.mark.parametrize("smoothing", (0.0, 0.2), ids=("labels as they are", "smoothed labels"))
def test_trainer_takes_the_loss_as_it_takes_the_stock_model_s(family: Family, smoothing: float, tmp_path):
    """By the same count of tokens, over accumulated batches too, smoothed labels shifted: what is left to differ is the
    attention."""
    stock, rows = family.stock(), rows_of(family)
    histories = []
    for model in (stock, family.twin(stock, neural_layers="all", neural_mode="residual")):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.0,
            label_smoothing_factor=smoothing,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        histories.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry])
    for (loss, norm), (other_loss, other_norm) in zip(*histories, strict=True):
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
        assert float(other_norm) > float(norm)  # counts the gradient of the scorers as well


@both_families
@whole_and_compact
def test_a_neural_model_learns(family: Family, fields: dict):
    model = family.neural(**fields).train()
    inputs = family.inputs(batch=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@whole_and_compact
def test_image_classification_pipeline(tmp_path, fields: dict):
    from PIL import Image
    from transformers import ViTImageProcessorPil

    names = {index: f"class {index}" for index in range(5)}
    VIT.neural(**fields, id2label=names, label2id={name: index for index, name in names.items()}).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with transformers_log() as log:
        classifier = pipeline("image-classification", model=str(tmp_path))
        red, blue = classifier([Image.new("RGB", (40, 30), color) for color in ("red", "blue")], top_k=5)
    assert not any("not supported" in message for message in log)
    assert type(classifier.model) is VIT.neural_class()
    assert {each["label"] for each in red} == set(names.values()) and abs(sum(each["score"] for each in red) - 1) < 1e-5
    assert red != blue
