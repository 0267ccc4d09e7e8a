"""A page that shows what a model attends to, how its scorers score, and what a patch changes.

    python recipes/demo/app.py
    python recipes/demo/app.py MODEL --port 7861

MODEL is a folder or a name on the Hub. Default: what `make quickstart` leaves in runs/, or GPT-2 from the Hub.
"""

import argparse
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

import drawing
import looking
from looking import Mistake
from visiting import BEFORE, DOT_PRODUCT, Visit, look_beside, status_of, visit_of


TITLE = "Neural Attention, looked at"
INTRODUCTION = f"""# {TITLE}
In [Neural Attention](https://arxiv.org/abs/2502.17206) a small network scores every query against every key, in place of the
dot product. Open a model and see what it attends to. Patch one that has no such network and see what changes."""
TEXT = "The import statement binds names. The import statement finds a module, and binds it to a name."
FROM_THE_HUB = "openai-community/gpt2"
MODES = ["replace", "residual", "thin"]
KEPT_FOR = 3600  # seconds that a visitor's models and files stay
NOT_PATCHED = "Patch a copy, and here is what changes. The model itself stays as it is."

# Loads nothing from a network
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = "#message { border-left: 4px solid #d62728; padding: 0.4em 0.9em; }"


class Page:
    """The page's components, and what they do.

    Args:
        model: that is in the page at first. Default: one that is in `runs/`, or GPT-2 from the Hub.
    """

    def __init__(self, model: str | None = None):
        local = looking.local_models()
        first = model or next(iter(local), FROM_THE_HUB)
        # deletes what visitors have uploaded, with what the page keeps of their visits
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, KEPT_FOR)) as self.blocks:
            self.visit = gr.State(time_to_live=KEPT_FOR)
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column(scale=1, min_width=320):
                    self.add_inputs(first, list(dict.fromkeys([first, *local])))
                with gr.Column(scale=3, min_width=600):
                    self.message = gr.Markdown(visible=False, elem_id="message")
                    self.status = gr.Markdown("Opening the model ...", elem_id="status")
                    self.add_choice(local)
                    self.add_views()
            self.connect()

    def add_inputs(self, first: str, models: list[str]) -> None:
        where = "A folder, or a name on the Hub."
        self.name = gr.Dropdown(models, value=first, allow_custom_value=True, label="Model", info=where, elem_id="model")
        self.open_button = gr.Button("Open", variant="primary", elem_id="open")
        self.text = gr.Textbox(TEXT, label="Text", lines=3, elem_id="text")
        self.image = gr.File(label="Image", height=120, visible=False, elem_id="image")
        self.look_button = gr.Button("Look", variant="primary", elem_id="look")
        self.predicted = gr.Label(num_top_classes=looking.TOP, show_heading=False, visible=False, elem_id="predicted")

    def add_patch(self) -> None:
        with gr.Row():
            self.layers = gr.Textbox("all", label="Layers", info="all, or 0, 2", scale=1, min_width=100, elem_id="layers")
            self.mode = gr.Dropdown(MODES, value="replace", label="Mode", info="of the scorers", scale=1, min_width=110)
            size = {"label": "Size", "info": "numbers per query and key"}
            self.proj_dim = gr.Slider(1, 64, 16, step=1, **size, scale=2, min_width=180)
            calibration = {"label": "Calibration", "info": "steps; none for residual"}
            self.steps = gr.Slider(0, 300, 100, step=50, **calibration, scale=2, min_width=180)
        with gr.Row(equal_height=True):
            self.per_head = gr.Checkbox(False, label="A network for each head", scale=2)
            self.patch_button = gr.Button("Patch a copy", variant="primary", scale=1, elem_id="patch")
            self.unpatch_button = gr.Button("Take it off", scale=1, elem_id="unpatch")

    def add_choice(self, local: list[str]) -> None:
        with gr.Row():
            self.layer = gr.Slider(0, 1, 0, step=1, label="Layer", scale=1, min_width=150, elem_id="layer")
            self.head = gr.Slider(0, 1, 0, step=1, label="Head", scale=1, min_width=150, elem_id="head")
            self.beside = gr.Dropdown(
                [DOT_PRODUCT, BEFORE, *local],
                value=DOT_PRODUCT,
                allow_custom_value=True,
                label="Beside it",
                info="Or another model: a folder, or a name on the Hub.",
                scale=2,
                min_width=340,
                elem_id="beside",
            )

    def add_views(self) -> None:
        with gr.Tabs():
            with gr.Tab("Attention"):
                self.attention = gr.Plot(show_label=False, elem_id="attention")
            with gr.Tab("All layers and heads"):
                self.everything = gr.Plot(show_label=False, elem_id="everything")
            with gr.Tab("Score surface"):
                self.surface = gr.Plot(show_label=False, elem_id="surface")
            with gr.Tab("Health of scorers"):
                self.health_words = gr.Markdown(elem_id="health-words")
                self.health_rows = gr.Dataframe(headers=drawing.HEALTH_HEADER, interactive=False, elem_id="health-rows")
                self.health = gr.Plot(show_label=False, elem_id="health")
            with gr.Tab("Patch it"):
                self.add_patch()
                self.changed_words = gr.Markdown(NOT_PATCHED, elem_id="changed-words")
                self.changed = gr.Plot(show_label=False, elem_id="changed")
                self.changed_rows = gr.Dataframe(headers=drawing.PREDICTION_HEADER, interactive=False, elem_id="changed-rows")

    def connect(self) -> None:
        seen: list[Any] = [self.visit, self.text, self.image, self.layer, self.head]
        patch = [self.layers, self.mode, self.proj_dim, self.per_head, self.steps]
        outputs = self.outputs()
        # takes turns, since a model looks at one thing at a time
        one: dict[str, Any] = {"outputs": outputs, "concurrency_limit": 1, "concurrency_id": "models"}
        gr.on([self.blocks.load, self.open_button.click], self.in_words(self.open), [*seen, self.name], **one)
        looks = [self.look_button.click, self.text.submit, self.image.upload]
        gr.on(looks, self.in_words(self.look), [*seen, self.beside], **one)
        self.patch_button.click(self.in_words(self.patch), [*seen, *patch], **one)
        self.unpatch_button.click(self.in_words(self.take_off), seen, **one)
        self.beside.input(self.in_words(self.put_beside), [*seen, self.beside], **one)
        slides = [self.layer.input, self.head.input]
        gr.on(slides, self.in_words(self.choose), seen, **one, trigger_mode="always_last", show_progress="hidden")

    def outputs(self) -> list[Any]:
        return [
            *(self.visit, self.message, self.status, self.text, self.image, self.predicted, self.layer, self.head),
            *(self.beside, self.attention, self.everything, self.surface, self.health_words, self.health_rows),
            *(self.health, self.changed_words, self.changed, self.changed_rows),
        ]

    def in_words(self, function: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
        """Says in a sentence what a visitor can mend, and leaves all else on the page as it was."""

        @wraps(function)
        def run(*values: Any) -> dict[Any, Any]:
            try:
                return {self.message: gr.Markdown(visible=False), **function(*values)}
            except Mistake as mistake:
                return {self.message: gr.Markdown(str(mistake), visible=True)}

        return run

    def open(self, visit: Visit | None, text: str, path: str | None, layer: int, head: int, name: str) -> dict[Any, Any]:
        opened = looking.open_model(name or "")
        return self.show(visit_of(opened, text, path), layer, head) | {self.beside: DOT_PRODUCT}

    def look(self, visit: Visit | None, text: str, path: str | None, layer: int, head: int, beside: str) -> dict[Any, Any]:
        return self.show(visit_of(current(visit).looked.opened, text, path, beside, visit), layer, head)

    def patch(self, visit: Visit | None, text: str, path: str | None, layer: int, head: int, *settings: Any) -> dict[Any, Any]:
        looked = current(visit).looked
        opened = looking.patch_copy(looked.opened, looked.example, *settings)
        return self.show(visit_of(opened, text, path, BEFORE), layer, head) | {self.beside: BEFORE}

    def take_off(self, visit: Visit | None, text: str, path: str | None, layer: int, head: int) -> dict[Any, Any]:
        unpatched = current(visit).looked.opened.unpatched
        if unpatched is None:
            raise Mistake("This model was not patched here, so there is nothing to take off.")
        return self.show(visit_of(unpatched, text, path), layer, head) | {self.beside: DOT_PRODUCT}

    def choose(self, visit: Visit | None, text: str, path: str | None, layer: int, head: int) -> dict[Any, Any]:
        return self.draw(current(visit), layer, head)

    def put_beside(
        self, visit: Visit | None, text: str, path: str | None, layer: int, head: int, beside: str
    ) -> dict[Any, Any]:
        new = look_beside(current(visit), beside)
        return {self.visit: new, **self.draw(new, layer, head)}

    def show(self, visit: Visit, layer: int, head: int) -> dict[Any, Any]:
        """Everything on the page."""
        look = visit.looked
        found = looking.predictions(look)
        layers, layer, head = len(look.maps), min(int(layer), len(look.maps) - 1), min(int(head), look.heads - 1)
        return {
            self.visit: visit,
            self.status: status_of(look),
            self.text: gr.Textbox(visible=not look.opened.takes_images),
            self.image: gr.File(visible=look.opened.takes_images),
            self.predicted: gr.Label(
                dict(found) or None, label="Next token" if look.opened.predicts == "token" else "Class", visible=bool(found)
            ),
            self.layer: gr.Slider(maximum=max(1, layers - 1), value=layer, interactive=layers > 1),
            self.head: gr.Slider(maximum=max(1, look.heads - 1), value=head, interactive=look.heads > 1),
            self.everything: drawing.draw_all(look),
            self.health_words: drawing.health_words(look),
            self.health_rows: gr.Dataframe(drawing.health_rows(look), visible=look.health is not None),
            self.health: drawing.draw_health(look),
            **self.draw(visit, layer, head),
        }

    def draw(self, visit: Visit, layer: int, head: int) -> dict[Any, Any]:
        """What one layer and head are chosen for."""
        look, before, layer, head = visit.looked, visit.before, int(layer), int(head)
        figures = {
            self.attention: drawing.draw_beside(look, visit.beside, layer, head),
            self.surface: drawing.draw_surfaces(look, layer, head),
        }
        if before is None:
            hidden = {self.changed: gr.Plot(visible=False), self.changed_rows: gr.Dataframe(visible=False)}
            return {**figures, **hidden, self.changed_words: NOT_PATCHED}
        change = looking.changes(before, look)
        rows = drawing.prediction_rows(change.before, change.after)
        return {
            **figures,
            self.changed_words: drawing.change_words(change, look),
            self.changed: gr.Plot(drawing.draw_changes(before, look, change, layer, head), visible=True),
            self.changed_rows: gr.Dataframe(rows, visible=bool(rows)),
        }


def current(visit: Visit | None) -> Visit:
    """Raises a Mistake if there is none."""
    if visit is None:
        raise Mistake("No model is open: choose one, and open it.")
    return visit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="A folder, or a name on the Hub.")
    parser.add_argument("--port", type=int, help="Default: the first one that is free from 7860.")
    arguments = parser.parse_args()
    Page(arguments.model).blocks.launch(server_port=arguments.port, theme=THEME, css=CSS, footer_links=["gradio", "settings"])


if __name__ == "__main__":
    main()
