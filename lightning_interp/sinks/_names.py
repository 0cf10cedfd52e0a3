"""Tags as names that file systems and trackers accept."""

from __future__ import annotations

import re
import zlib

__all__ = ["portable_name"]

_MAX_PART = 60  # file systems allow 255 bytes, and a letter may take four


def portable_name(tag: str, allowed: str = r"\w.\-", max_length: int | None = None) -> str:
    r"""Return a tag as a relative path of portable names.

    Parts between slashes that are short, not empty and made of allowed characters stay as they are. Others are
    changed and end in a checksum of the original, so that two tags do not share a name.

    Args:
        tag: Any text.
        allowed: The allowed characters, as within the brackets of a regular expression.
        max_length: The maximum length of the whole name; None for no limit.

    Example:
        >>> portable_name("filters/layer1.0.conv1")
        'filters/layer1.0.conv1'
        >>> portable_name("../outside")
        'x-9608161c/outside'
    """
    name = "/".join(_portable_part(part, allowed) for part in tag.split("/"))
    if max_length is not None and len(name) > max_length:
        name = f"{name[: max_length - 9].rstrip('/')}-{_checksum(tag)}"
    return name


def _portable_part(part: str, allowed: str) -> str:
    name = re.sub(f"[^{allowed}]", "_", part)[:_MAX_PART].strip(". ")
    if name and name == part:
        return part
    # wandb hides names with an underscore in front.
    return f"{name[: _MAX_PART - 9].strip('_. ') or 'x'}-{_checksum(part)}"


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'backslashreplace')):08x}"
