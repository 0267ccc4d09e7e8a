"""Hooks of MkDocs: the site has the layout of the repository, so that a relative link is right in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mathml import MathMLExtension, fenced_math


ROOT = Path(__file__).parents[1]

# Holds pages, and whatever they show or link to
CONTENT = (
    "*.md",
    "CITATION.cff",
    "LICENSE",
    "assets/*",
    "docs/**/*.css",
    "docs/**/*.md",
    "hf_neural_attention/ops/README.md",
    "model_cards/**/*.*",
    "recipes/README.md",
    "recipes/demo/README.md",
)


def on_config(config: MkDocsConfig) -> None:
    """Renders the formulas of GitHub's Markdown, $`...`$ and blocks of the language `math`."""
    config.markdown_extensions.append(MathMLExtension())
    fence = {"name": "math", "class": "math", "format": fenced_math}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Takes the files from the repository instead of the folder `docs`, at their own paths."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in CONTENT:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files
