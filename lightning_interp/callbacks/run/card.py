"""The text that explains a run's records: what each shows, how to read it, when it misleads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_interp.callbacks.contract import Monitor
from lightning_interp.sinks.records import Text

__all__ = ["run_card"]


def run_card(monitors: Sequence[Monitor], layers: Mapping[Monitor, Sequence[str]]) -> Text:
    """Describe the monitors of a run.

    Args:
        monitors: The monitors.
        layers: For each the names of the layers that were chosen, where it has any.

    Returns:
        One text, a paragraph a monitor.
    """
    paragraphs = []
    for monitor in monitors:
        if not (text := monitor.describe()):
            continue
        title = monitor.tag("").rstrip("/")
        chosen = ", ".join(f"`{name}`" for name in layers.get(monitor, ()))
        paragraphs.append(f"**{title}** ({type(monitor).__name__}). {text}" + (f" Layer: {chosen}." if chosen else ""))
    return Text("about/monitors", "\n\n".join(paragraphs))
