"""Makes the models known to Transformers' Auto classes, and to peft.

Their `register` methods want classes, and importing ours imports torch: seconds that a script which only parses its
arguments should not pay. Transformers' own models are registered by name and imported on first use. So are these, in the
same tables, as soon as Transformers has imported them: nothing is imported here at any time, so no import can go round in
a circle.
"""

import sys

from wrapt import when_imported


# model type -> the stock model type whose places in the tables it takes as well
FAMILIES = {"neural_gpt2": "gpt2", "neural_vit": "vit"}


def register_auto_classes() -> None:
    """Registers everything, now or when Transformers imports the table in question. Doing it again changes nothing."""
    when_imported("transformers.models.auto.configuration_auto")(register_configs)
    when_imported("transformers.models.auto.modeling_auto")(register_models)
    when_imported("transformers.models.auto.tokenization_auto")(register_processors)
    when_imported("transformers.models.auto.image_processing_auto")(register_processors)
    when_imported("peft.utils.constants")(register_targets)


def register_configs(auto) -> None:
    for model_type, stock_type in FAMILIES.items():
        auto.CONFIG_MAPPING_NAMES[model_type] = f"Neural{auto.CONFIG_MAPPING_NAMES[stock_type]}"
        auto.CONFIG_MAPPING._modules[model_type] = sys.modules[__package__]


def register_models(auto) -> None:
    """Wherever a stock model of the family stands, the model of that name with `Neural` before it."""
    for table in lazy_tables(auto):
        for model_type, stock_type in FAMILIES.items():
            if stock_type in table._model_mapping:
                add_to_table(table, model_type, f"Neural{table._model_mapping[stock_type]}")


def register_processors(auto) -> None:
    """The stock family's own tokenizer or image processor."""
    for table in lazy_tables(auto):
        for model_type, stock_type in FAMILIES.items():
            if stock_type in table._model_mapping:
                add_to_table(table, model_type, table._model_mapping[stock_type])


def register_targets(constants) -> None:
    """What peft adapts where nothing is said, as in the stock family."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for model_type, stock_type in FAMILIES.items():
                if stock_type in table:
                    table[model_type] = table[stock_type]


def lazy_tables(auto) -> list:
    return [value for value in vars(auto).values() if isinstance(value, auto._LazyAutoMapping)]


def add_to_table(table, model_type: str, names) -> None:
    table._model_mapping[model_type] = names
    # read when the table was made, which may have been before `register_configs`
    table._reverse_config_mapping[table._config_mapping[model_type]] = model_type
    # where the names are looked up, then in transformers
    table._modules[model_type] = sys.modules[__package__]
