"""Progress bars of other libraries, which belong neither in a log nor through a line of our own."""

from __future__ import annotations

import os

VARIABLES = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def hide_library_bars() -> None:
    """In this process and its children, as far as these libraries are not imported yet; what a user has set stays."""
    for name in VARIABLES:
        os.environ.setdefault(name, "1")
