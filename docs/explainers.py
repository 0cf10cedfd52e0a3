"""Writes docs/explainers.md, and the table of explainers in README.md, from what the explainers declare.

python docs/explainers.py
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from lightning_interp import explain
from lightning_interp.explain import Explainer
from lightning_interp.explain._explainer import FAMILIES

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "explainers.md"
BEGIN, END = "<!-- explainers:begin -->", "<!-- explainers:end -->"


def page(explainers: Mapping[str, Explainer]) -> str:
    """Return the text of docs/explainers.md."""
    rows = [explainer for family in FAMILIES for explainer in explainers.values() if explainer.family == family]
    table = "\n".join(
        f"| `{explainer.name}` | {title(explainer.family).lower()} | {needs(explainer)} | {values(explainer)} "
        f"| {paper(explainer)} |"
        for explainer in rows
    )
    return f"""# Explainers

All methods of `lightning_interp.explain`. The layer is the one that `layer=` names; perturbed passes are further
forward passes with changed images or activations. The range of the map is that of the default options and, for the
methods of a layer, of activations that are not negative. In a map without a zero only differences between positions
have a meaning.

Made by `python docs/explainers.py`.

| name | family | needs | map | paper |
|---|---|---|---|---|
{table}
"""


def readme_table(explainers: Mapping[str, Explainer]) -> str:
    """Return the text between the markers in README.md: a table with a column for each family."""
    families = {
        family: [f"`{explainer.name}`" for explainer in explainers.values() if explainer.family == family]
        for family in FAMILIES
    }
    return "\n".join(
        [
            f"| {' | '.join(map(title, families))} |",
            f"|{'---|' * len(families)}",
            f"| {' | '.join(', '.join(names) for names in families.values())} |",
            "",
            "What each of them needs, the range of its maps and its paper: [docs/explainers.md](docs/explainers.md).",
        ]
    )


def with_table(readme: str, explainers: Mapping[str, Explainer]) -> str:
    """Return the text of README.md with a new table."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{readme_table(explainers)}\n\n{END}{after}"


def title(family: str) -> str:
    return family.replace("_", " ").capitalize()


def needs(explainer: Explainer) -> str:
    named = {
        "layer activations": explainer.layer is not None,
        "layer gradients": explainer.layer == "gradients",
        "input gradients": explainer.family == "gradients",
        "attention weights": explainer.family == "attention",
        "perturbed passes": explainer.perturbed,
    }
    return ", ".join(name for name, is_needed in named.items() if is_needed)


def values(explainer: Explainer) -> str:
    if not explainer.has_zero:
        return "without a zero"
    return "signed" if explainer.signed else "not negative"


def paper(explainer: Explainer) -> str:
    """Return the section "Reference:" of the docstring as one line."""
    _, _, reference = inspect.cleandoc(explainer.__doc__ or "").partition("\nReference:\n")
    return " ".join(reference.split())


def main() -> None:
    explainers = explain.explainers()
    PAGE.write_text(page(explainers), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), explainers), encoding="utf-8")


if __name__ == "__main__":
    main()
