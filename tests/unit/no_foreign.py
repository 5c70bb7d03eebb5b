"""For acts on devices that nobody else has programs on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from bpf.foreign import Own

NO_FOREIGN: Any = SimpleNamespace(
    note=lambda target: None,
    note_anew=lambda target: None,
    put_back=lambda target: None,
    forget=lambda target: None,
    own=lambda device: Own(),
)
