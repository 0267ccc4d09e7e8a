"""What this package uses of other libraries that they do not promise to keep, and why nothing public does.

`tests/test_private_interfaces.py` looks each of them up in the versions that are installed, and looks through the sources for
any that is missing here. `make test-versions` does so with the oldest and the newest versions.
"""

from typing import NamedTuple


class PrivateInterface(NamedTuple):
    """A name that belongs to another library, which does not promise to keep it: by its leading underscore, or since none of
    its documents says what that is for."""

    name: str  # as it stands in our sources
    place: str  # `module:attribute.attribute` where it can be looked up; "" where only an instance has it
    why: str
    seen: str  # versions that have it


TRANSFORMERS = "transformers 5.18 to 5.24"
TORCH = "torch 2.13"

PRIVATE_INTERFACES = (
    PrivateInterface(
        "_attn_implementation",
        "transformers:PreTrainedConfig._attn_implementation",
        "Attention modules fetch their function by this name in their config, and only it says which one runs. "
        "`set_attn_implementation` sets it for whole models, not for one layer.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_supports_sdpa",
        "transformers:PreTrainedModel._supports_sdpa",
        'Says whether a class runs under "sdpa". `set_attn_implementation` raises an error where it does not.',
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_check_and_adjust_attn_implementation",
        "transformers:PreTrainedModel._check_and_adjust_attn_implementation",
        "The one place that loading, construction and `set_attn_implementation` go through: implementations that a score "
        "network cannot serve are refused there before anything changes.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_model_mapping",
        "transformers:AutoModelForCausalLM._model_mapping",
        "Which Auto classes make models of a family: what an exported model's `auto_map` lists.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_init_weights",
        "transformers:PreTrainedModel._init_weights",
        "How every model says how its modules start. Transformers documents it for new models.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_initialize_weights",
        "transformers:PreTrainedModel._initialize_weights",
        "For models outside of Transformers it passes over modules without direct parameters, and with them the scaled start "
        "of GPT-2's `c_proj`. Nothing public switches that off.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_prepare_generation_config",
        "transformers:GenerationMixin._prepare_generation_config",
        'It checks the names of caches, of which `"neural"` is one here. Stock models with caches of their own override it.',
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_prepare_cache_for_generation",
        "transformers:GenerationMixin._prepare_cache_for_generation",
        "It makes the cache when its length is known. Stock models with caches of their own override it, too.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_experts_implementation",
        "transformers:PreTrainedConfig._experts_implementation",
        "Says whether a part of a model has experts. `set_experts_implementation` then sets it.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_hf_peft_config_loaded",
        "transformers.integrations.peft:PeftAdapterMixin._hf_peft_config_loaded",
        "Says whether `save_pretrained` will save adapters alone. `active_adapters` raises an error where there are none.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_is_hf_initialized",
        "",
        "Tells `init_weights`, should it run again, that a module has its weights. Transformers sets it while loading.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_hf_hook",
        "",
        "Accelerate's hook around a module's forward knows where offloaded weights go, and keeps them. Accelerate has public "
        "functions that use it, none that says it.",
        "accelerate 1.3 to 1.15",
    ),
    PrivateInterface("_old_forward", "", "A module's forward without accelerate's hook around it.", "accelerate 1.3 to 1.15"),
    PrivateInterface(
        "_forward_hooks",
        "torch.nn:Module()._forward_hooks",
        "A copy of a model that runs without numbers must not run its hooks, and `explain` names hooks that never run.",
        TORCH,
    ),
    PrivateInterface(
        "_forward_pre_hooks",
        "torch.nn:Module()._forward_pre_hooks",
        "As of `_forward_hooks`. Pruning, weight norm and spectral norm compute a layer's weight in one of them, of which "
        "`prune.is_pruned` sees the first kind only.",
        TORCH,
    ),
    PrivateInterface(
        "_backward_hooks",
        "torch.nn:Module()._backward_hooks",
        "A module that takes another's place would lose its hooks, so `compact` refuses a module that has some.",
        TORCH,
    ),
    PrivateInterface("_backward_pre_hooks", "torch.nn:Module()._backward_pre_hooks", "As of `_backward_hooks`.", TORCH),
    PrivateInterface(
        "_compiled_call_impl",
        "torch.nn:Module()._compiled_call_impl",
        "Says whether `module.compile()` was called. `is_compiled_module` knows `torch.compile(module)` only.",
        TORCH,
    ),
    PrivateInterface(
        "_saved_other",
        "",
        "What a product in the history of a tensor multiplies with: whether a model scales queries by a constant. Without it "
        "the layers of such models would be refused.",
        TORCH,
    ),
    PrivateInterface(
        "torch._subclasses.fake_tensor",
        "torch._subclasses.fake_tensor:FakeTensorMode",
        "Runs a model without numbers, to see what its layers ask of their attention at no cost.",
        TORCH,
    ),
    PrivateInterface(
        "torch.utils._pytree",
        "torch.utils._pytree:tree_map_only",
        "Goes through nested inputs of a model, as Transformers does.",
        TORCH,
    ),
    PrivateInterface(
        "_functorch",
        "torch._C._functorch:peek_interpreter_stack",
        "Says whether a transform of `torch.func` runs, under which operators with a backward of their own give wrong "
        "derivatives.",
        TORCH,
    ),
    PrivateInterface("_C", "torch:_C", "Where that is.", TORCH),
    PrivateInterface(
        "_current_level",
        "torch.autograd.forward_ad:_current_level",
        "Says whether forward-mode derivatives are taken outside `torch.func`. `unpack_dual` says it of a tensor alone.",
        TORCH,
    ),
    PrivateInterface(
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "`Trainer` looks up here whether to shift labels that it smooths, and serving what a model is for. Neither sees what "
        "is registered with the Auto classes.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "MODEL_MAPPING",
        "transformers:MODEL_MAPPING",
        "Tables of this type say which Auto classes make models of a family; each Auto class holds one.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "TRANSFORMERS_MODELS_TO_",
        "peft.utils:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "What peft adapts by default in a family. It has no call that enters another family.",
        "peft 0.20 to 0.21",
    ),
    PrivateInterface(
        "transformers.utils.output_capturing",
        "transformers.utils.output_capturing:_CAN_RECORD_REGISTRY",
        "Hooks of this module record a layer's outputs, and have to follow when a compact layer takes its place. Which "
        "outputs a model records it knows by the name of its class, which an instance of a patched one gets once it is made.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "_can_record_outputs", "transformers:PreTrainedModel._can_record_outputs", "What is entered there.", TRANSFORMERS
    ),
    PrivateInterface(
        "should_convert_module",
        "transformers.quantizers.quantizers_utils:should_convert_module",
        "Says whether a checkpoint's list of modules that are not quantised names one, by rules of its own.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        'sys.modules["transformers"]',
        "",
        "Clients look a model's class up as an attribute of `transformers`, where Auto classes do not put what is registered.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "IMAGE_PROCESSOR_MAPPING",
        "transformers.models.auto.image_processing_auto:IMAGE_PROCESSOR_MAPPING",
        "One of the tables of tokenizers and processors: the stock config's entry serves a patched model, too. `register` "
        "takes an entry, and no public call tells one.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "ForCausalLMLoss",
        "transformers.loss.loss_utils:ForCausalLMLoss",
        "The loss that a stock GPT-2 has by its class's name, which ours is not. Without it a compiled graph holds a warning.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "register_checkpoint_conversion_mapping",
        "transformers.conversion_mapping:register_checkpoint_conversion_mapping",
        "Stock ViT checkpoints name weights otherwise than the model does; this says so of a model type of ours.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "get_relative_import_files",
        "transformers.dynamic_module_utils:get_relative_import_files",
        "Finds the files that a model's code imports as Transformers will, when it copies them from the Hub.",
        TRANSFORMERS,
    ),
    PrivateInterface(
        "ds_",
        "",
        "DeepSpeed's ZeRO-3 leaves a parameter empty, and keeps its size, shape and owner in such attributes; "
        "`parameter.all_gather()` brings it together. `GatheredParameters`, which is public, needs to know what is empty.",
        "deepspeed 0.19",
    ),
    PrivateInterface(
        "_dynamo",
        "torch:_dynamo.mark_static_address",
        "CUDA graphs need to know that a cache of fixed size does not move; Transformers' own caches say it in this way.",
        TORCH,
    ),
)
