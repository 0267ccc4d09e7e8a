"""What one visitor of the page looks at, and what becomes of it."""

from dataclasses import dataclass, replace

from matplotlib.cbook import get_sample_data

import looking
from hf_neural_attention import patch_status
from looking import Example, Look, Mistake, Opened


DOT_PRODUCT, BEFORE = "the dot product (same queries and keys)", "the model before the patch"


@dataclass(frozen=True)
class Visit:
    """Looks at one example."""

    looked: Look
    before: Look | None = None  # of the model before its patch
    beside: Look | None = None  # of another model


def visit_of(opened: Opened, text: str, path: str | None, beside: str = DOT_PRODUCT, earlier: Visit | None = None) -> Visit:
    """Looks at everything: the model, what it was before a patch, and what stands beside it.

    Args:
        text, path: of which the model takes one; without an image, it is a photograph that comes with matplotlib.
        beside: as in `look_beside`.
        earlier: a visit whose model beside need not be opened again.

    Raises:
        Mistake: if something of it cannot be looked at.
    """
    if opened.takes_images:
        example = looking.read_image(opened, path or str(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    else:
        example = looking.read_text(opened, text)
    before = looking.look(opened.unpatched, example) if opened.unpatched else None
    visit = Visit(looking.look(opened, example), before, earlier.beside if earlier else None)
    return look_beside(visit, beside)


def look_beside(visit: Visit, beside: str | None) -> Visit:
    """The visit with something else beside its model.

    Args:
        beside: `DOT_PRODUCT`, `BEFORE`, or a folder or name on the Hub.

    Raises:
        Mistake: if there is no such thing.
    """
    if beside in (None, "", DOT_PRODUCT):
        return replace(visit, beside=None)
    if beside == BEFORE:
        if visit.before is None:
            raise Mistake("There is nothing before a patch, since this model was not patched here. Patch a copy of it first.")
        return replace(visit, beside=visit.before)
    kept = visit.beside.opened if visit.beside and not visit.beside.opened.unpatched else None
    other = kept if kept and kept.name == beside else looking.open_model(str(beside))
    if other.takes_images != visit.looked.opened.takes_images:
        raise Mistake(f"{other.name} takes {'images' if other.takes_images else 'texts'}, unlike the model that is open.")
    return replace(visit, beside=looking.look(other, same_example(other, visit.looked.example)))


def same_example(opened: Opened, example: Example) -> Example:
    """The same text or image for another model."""
    return looking.read_text(opened, example.text) if example.image is None else looking.of_image(opened, example.image)


def status_of(look: Look) -> str:
    """The model in two sentences."""
    model, layers = look.opened.model, patch_status(look.opened.model)
    size = sum(parameter.numel() for parameter in model.parameters())
    what = (
        f"**{look.opened.name}**: {type(model).__name__}, {size:,} parameters, {len(look.maps)} layers of {look.heads} heads."
    )
    if not layers:
        return f"{what} All layers score by the dot product."
    neural = ", ".join(str(index) for index, scorer in enumerate(look.scorers) if scorer != "dot product")
    modes = ", ".join(sorted({f"`{layer.mode}`" for layer in layers}))
    patched = " This is a patched copy; the model itself is as it was." if look.opened.unpatched else ""
    scorers = f"mode {modes}, {layers.num_parameters:,} parameters"
    return f"{what} Neural: layer{'s' * (len(layers) > 1)} {neural} ({scorers}).{patched}"
