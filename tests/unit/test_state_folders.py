"""The agent's own folders on a node, whoever made them."""

from __future__ import annotations

import stat
import tempfile

from driver.assembly import make_folders
from driver.settings import parse


def test_state_is_roots_alone_also_where_kubelet_made_the_folders() -> None:
    # A path of its own: those that pytest makes are too long for sockets.
    with tempfile.TemporaryDirectory() as root:
        settings = parse(["--node-name=node-a", f"--root={root}"])
        folders = (settings.paths.state, settings.paths.run)
        settings.paths.state.mkdir(mode=0o755, parents=True)
        make_folders(settings)
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700, 0o700]
