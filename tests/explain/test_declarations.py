"""What the explainers declare, and the lists that derive from it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from lightning_interp import explain
from lightning_interp.callbacks.monitors import cam as cam_module
from lightning_interp.callbacks.monitors import saliency as saliency_module
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import Explainer
from lightning_interp.explain._explainer import FAMILIES, Family, explainer
from lightning_interp.model.trace import Trace

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    """Run a file once more, as a module that nothing else sees."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_again", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(monkeypatch: pytest.MonkeyPatch, family: Family) -> Explainer:
    """An explainer of a family that does not exist yet."""

    @explainer(family=family, perturbed=True, signed=True)
    def shuffled(trace: Trace) -> Tensor:
        """Shuffled: the images' means.

        Reference:
            Doe, Shuffling Pixels
            for Fun, 2020.
        """
        return trace.images.mean(1)

    monkeypatch.setattr(explain, "shuffled", shuffled, raising=False)
    monkeypatch.setattr(explain, "__all__", [*explain.__all__, "shuffled"])
    return shuffled


def test_explainers_are_the_exports_in_order_of_definition() -> None:
    everything = explain.explainers()
    assert all(value is getattr(explain, name) for name, value in everything.items())
    assert {name for name in explain.__all__ if isinstance(getattr(explain, name), Explainer)} == set(everything)
    assert list(everything)[:3] == ["cam", "gradcam", "gradcam_plus_plus"]
    assert list(explain.explainers("gradients"))[:2] == ["saliency", "input_x_gradient"]


def test_every_explainer_is_in_one_family() -> None:
    by_family = {family: explain.explainers(family) for family in FAMILIES}
    assert all(by_family.values())
    assert sum(map(len, by_family.values())) == len(explain.explainers())
    assert all(method.family == family for family, methods in by_family.items() for method in methods.values())


def test_the_result_can_be_changed() -> None:
    explain.explainers().clear()
    assert explain.explainers()


def test_families_that_do_not_exist() -> None:
    with pytest.raises(ConfigurationError, match=r"family takes 'class_activation', .*did you mean 'gradients'"):
        explain.explainers("gradient")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"family takes .*, got 'saliency'"):
        explainer(family="saliency")(lambda trace: trace.images)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_explainer_is_in_every_list(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = export(monkeypatch, family)
    assert explain.explainers()["shuffled"] is shuffled
    assert [name for name in FAMILIES if "shuffled" in explain.explainers(name)] == [family]
    assert list(explain.explainers())[-1] == "shuffled"
    assert ("shuffled" in load(Path(cam_module.__file__)).CAMMonitor.methods) is (family != "gradients")
    assert ("shuffled" in load(Path(saliency_module.__file__)).SaliencyMonitor.methods) is (family == "gradients")
    assert shuffled in load(ROOT / "tests" / "explain" / "test_contract.py").EXPLAINERS
    assert "shuffled" in load(ROOT / "benchmarks" / "explainers.py").parse_args([]).methods
    docs = load(ROOT / "docs" / "explainers.py")
    assert "`shuffled`" in docs.readme_table(explain.explainers())
    (row,) = (line for line in docs.page(explain.explainers()).splitlines() if "`shuffled`" in line)
    needs = {"gradients": "input gradients, ", "attention": "attention weights, "}.get(family, "")
    name = family.replace("_", " ")
    assert row == f"| `shuffled` | {name} | {needs}perturbed passes | signed | Doe, Shuffling Pixels for Fun, 2020. |"


def test_the_example_shows_every_explainer_of_a_convolutional_network() -> None:
    example = load(ROOT / "examples" / "compare_explainers.py")
    assert {*example.COARSE, *example.FINE} == set(explain.explainers()) - set(explain.explainers("attention"))


def test_monitors_take_the_methods_whose_maps_they_can_show() -> None:
    heat, pixels = cam_module.CAMMonitor.methods, saliency_module.SaliencyMonitor.methods
    assert {**heat, **pixels} == explain.explainers()
    assert {"occlusion", "rise", "attention_rollout"} < set(heat)
    assert "guided_gradcam" in pixels


def test_the_documentation_is_what_is_generated() -> None:
    docs = load(ROOT / "docs" / "explainers.py")
    readme = docs.README.read_text(encoding="utf-8")
    hint = "run: python docs/explainers.py"
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(explain.explainers()), hint
    assert readme == docs.with_table(readme, explain.explainers()), hint
    assert all(f"`{name}`" in docs.readme_table(explain.explainers()) for name in explain.explainers())


def test_the_generator_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = load(ROOT / "docs" / "explainers.py")
    monkeypatch.setattr(docs, "README", tmp_path / "README.md")
    monkeypatch.setattr(docs, "PAGE", tmp_path / "explainers.md")
    docs.README.write_text(f"before\n\n{docs.BEGIN}\n| old |\n{docs.END}\n\nafter\n", encoding="utf-8")
    docs.main()
    readme = docs.README.read_text(encoding="utf-8")
    assert readme.startswith(f"before\n\n{docs.BEGIN}\n\n| Class activation |")
    assert readme.endswith(f"{docs.END}\n\nafter\n")
    assert "old" not in readme
    assert "| `gradcam` | class activation | layer activations, layer gradients | signed | Selvaraju" in (
        docs.PAGE.read_text(encoding="utf-8")
    )
