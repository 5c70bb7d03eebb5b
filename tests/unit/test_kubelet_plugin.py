"""Registration, and the sockets' coming and going."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from driver.errors import DriverError
from driver.paths import SUN_PATH_MAX, Paths
from driver.pb.dra.v1 import api_pb2 as v1
from driver.pb.pluginregistration.v1 import api_pb2 as registration
from tests.conftest import WaitUntilAsync
from tests.unit.kubelet_fakes import (
    ScriptedHandler,
    Seen,
    claim,
    kubelet_ends,
    plugin_at,
)


@contextmanager
def foreign_socket(path: Path, *, in_place_of_another: bool = False) -> Iterator[socket.socket]:
    """A live server of somebody else's at path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if in_place_of_another:
        path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield server


def stale_socket(path: Path) -> None:
    with foreign_socket(path):
        pass


def test_get_info_names_the_driver_its_endpoint_and_v1_first(short_tmp: Path) -> None:
    seen = Seen()

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler(), seen), kubelet_ends(short_tmp) as ends:
            info = await ends.registration.GetInfo(registration.InfoRequest(), timeout=1)
        assert info.type == "DRAPlugin"
        assert info.name == "knd.internal"
        assert Path(info.endpoint).is_absolute()
        assert info.endpoint == str(Paths(root=short_tmp).dra_socket)
        assert list(info.supported_versions) == [
            "v1.DRAPlugin",
            "v1beta1.DRAPlugin",
            "v1.DRAResourceHealth",
            "v1alpha1.DRAResourceHealth",
        ]

    asyncio.run(run())
    assert seen.calls == [("GetInfo", "ok")]


def test_the_endpoint_is_absolute_even_below_a_relative_root(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_tmp)

    async def run() -> None:
        root = Path("node")
        plugin = plugin_at(root, ScriptedHandler())
        async with plugin, kubelet_ends(short_tmp / "node") as ends:
            info = await ends.registration.GetInfo(registration.InfoRequest(), timeout=1)
        assert info.endpoint == str(short_tmp / "node/var/lib/kubelet/plugins/knd.internal/dra.sock")

    asyncio.run(run())


def test_get_info_is_answered_at_once_while_50_prepares_run(
    short_tmp: Path, wait_until_async: WaitUntilAsync
) -> None:
    async def run() -> None:
        handler = ScriptedHandler(gate=asyncio.Event())
        plugin = plugin_at(short_tmp, handler)
        async with plugin, kubelet_ends(short_tmp) as ends:
            calls = [
                asyncio.ensure_future(
                    ends.v1.NodePrepareResources(
                        v1.NodePrepareResourcesRequest(claims=[claim(f"u{n}")]), timeout=40
                    )
                )
                for n in range(50)
            ]
            await wait_until_async(lambda: handler.running == 50)
            info = await ends.registration.GetInfo(registration.InfoRequest(), timeout=1)
            assert info.name == "knd.internal"
            assert plugin.busy == 50
            assert handler.gate is not None
            handler.gate.set()
            responses = await asyncio.gather(*calls)
        assert all(len(response.claims) == 1 for response in responses)

    asyncio.run(run())


def test_the_registration_socket_is_never_there_without_an_answering_dra_socket(short_tmp: Path) -> None:
    paths = Paths(root=short_tmp)
    problems: list[str] = []
    sightings: list[float] = []
    done = threading.Event()

    def spy() -> None:
        while not done.is_set():
            if paths.registration_socket.exists():
                sightings.append(time.monotonic())
                with socket.socket(socket.AF_UNIX) as client:
                    try:
                        client.connect(str(paths.dra_socket))
                    except OSError as error:
                        problems.append(str(error))
                return

    async def run() -> None:
        watcher = threading.Thread(target=spy)
        watcher.start()
        try:
            async with plugin_at(short_tmp, ScriptedHandler()):
                await asyncio.to_thread(watcher.join, 10)
        finally:
            done.set()
            watcher.join()

    asyncio.run(run())
    assert sightings
    assert problems == []


def test_a_socket_is_never_seen_before_its_server_runs(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Paths(root=short_tmp)
    seen_at_start: list[set[str]] = []
    make_server = grpc.aio.server

    def spied_server() -> grpc.aio.Server:
        server = make_server()
        start = server.start

        async def spied_start() -> None:
            folders = (paths.plugin_dir, paths.kubelet_registry)
            names = {path.name for folder in folders for path in folder.iterdir()}
            seen_at_start.append({name for name in names if not name.startswith(".")})
            await start()

        monkeypatch.setattr(server, "start", spied_start)
        return server

    monkeypatch.setattr(grpc.aio, "server", spied_server)

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler()):
            pass

    asyncio.run(run())
    assert seen_at_start == [set(), {"dra.sock"}]


def test_a_refused_registration_is_not_ready_until_kubelet_takes_it(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        plugin = plugin_at(short_tmp, ScriptedHandler())
        assert not plugin.registered
        async with plugin, kubelet_ends(short_tmp) as ends:
            notify = ends.registration.NotifyRegistrationStatus
            assert (plugin.registered, plugin.registration_error) == (
                False,
                "kubelet has not confirmed the registration yet",
            )
            await notify(
                registration.RegistrationStatus(plugin_registered=False, error="bad\nversion"), timeout=5
            )
            assert (plugin.registered, plugin.registration_error) == (False, "bad version")
            await notify(registration.RegistrationStatus(plugin_registered=True), timeout=5)
            assert (plugin.registered, plugin.registration_error) == (True, "")
            await notify(registration.RegistrationStatus(plugin_registered=False), timeout=5)
            assert not plugin.registered
            await notify(registration.RegistrationStatus(plugin_registered=True), timeout=5)
        assert not plugin.registered

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == [
        "kubelet refuses to register knd.internal: bad version",
        "kubelet refuses to register knd.internal: kubelet gave no reason",
    ]


def test_stale_sockets_are_replaced_and_other_drivers_ones_left_alone(short_tmp: Path) -> None:
    paths = Paths(root=short_tmp)
    stale_socket(paths.dra_socket)
    stale_socket(paths.registration_socket)
    other = paths.kubelet_registry / "knd.internal-0f8fad5b-reg.sock"

    async def run() -> None:
        with foreign_socket(other):
            async with plugin_at(short_tmp, ScriptedHandler()), kubelet_ends(short_tmp) as ends:
                await ends.registration.GetInfo(registration.InfoRequest(), timeout=1)
                await ends.v1.NodePrepareResources(v1.NodePrepareResourcesRequest(), timeout=1)
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(other))
            assert [path.name for path in paths.kubelet_registry.iterdir()] == [other.name]
            assert list(paths.plugin_dir.iterdir()) == []

    asyncio.run(run())


@pytest.mark.parametrize("taken", ["registration_socket", "dra_socket"])
def test_a_socket_that_another_process_took_over_is_left_to_it(short_tmp: Path, taken: str) -> None:
    paths = Paths(root=short_tmp)
    path: Path = getattr(paths, taken)

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler()) as plugin, kubelet_ends(short_tmp) as ends:
            await ends.registration.NotifyRegistrationStatus(
                registration.RegistrationStatus(plugin_registered=True), timeout=5
            )
            stack.enter_context(foreign_socket(path, in_place_of_another=True))
            if taken == "registration_socket":
                assert not plugin.registered
                assert "removed or replaced by another process" in plugin.registration_error

    with ExitStack() as stack:
        asyncio.run(run())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_second_plugin_on_the_same_paths_survives_the_firsts_end(short_tmp: Path) -> None:
    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler()) as first:
            second = plugin_at(short_tmp, ScriptedHandler())
            await second.__aenter__()
            assert not first.registered
        try:
            async with kubelet_ends(short_tmp) as ends:
                await ends.registration.GetInfo(registration.InfoRequest(), timeout=1)
                await ends.v1.NodePrepareResources(v1.NodePrepareResourcesRequest(), timeout=1)
        finally:
            await second.__aexit__(None, None, None)

    asyncio.run(run())


def test_sockets_and_the_drivers_folder_are_for_root_only(short_tmp: Path) -> None:
    paths = Paths(root=short_tmp)
    paths.plugin_dir.mkdir(parents=True, mode=0o755)
    before = os.umask(0o022)
    os.umask(before)

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler()):
            for path in (paths.dra_socket, paths.registration_socket):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(paths.plugin_dir.stat().st_mode) == 0o750
            assert stat.S_IMODE(paths.kubelet_registry.stat().st_mode) == 0o755

    asyncio.run(run())
    assert os.umask(before) == before


def test_a_path_too_long_for_a_socket_is_refused_in_one_sentence(short_tmp: Path) -> None:
    root = short_tmp / ("r" * (SUN_PATH_MAX - len(str(short_tmp))))

    async def run() -> None:
        async with plugin_at(root, ScriptedHandler()):
            pass

    with pytest.raises(DriverError) as refused:
        asyncio.run(run())
    text = str(refused.value)
    assert f"a socket path may have {SUN_PATH_MAX}" in text
    assert "use a shorter driver name" in text
    assert "\n" not in text
    assert not root.exists()


def test_a_path_of_just_the_limit_works(short_tmp: Path) -> None:
    bare = len(str(Paths(root=short_tmp).registration_socket))
    root = short_tmp / ("r" * (SUN_PATH_MAX - bare - 1))
    assert len(str(Paths(root=root).registration_socket)) == SUN_PATH_MAX

    async def run() -> None:
        async with plugin_at(root, ScriptedHandler()), kubelet_ends(root) as ends:
            await ends.registration.GetInfo(registration.InfoRequest(), timeout=1)

    asyncio.run(run())


def test_a_file_in_the_way_is_refused_and_nothing_is_left_behind(short_tmp: Path) -> None:
    paths = Paths(root=short_tmp)
    paths.kubelet_registry.mkdir(parents=True)
    paths.registration_socket.write_text("not a socket")

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler()):
            pass

    with pytest.raises(DriverError, match="is not a socket: remove it"):
        asyncio.run(run())
    assert paths.registration_socket.read_text() == "not a socket"
    assert list(paths.plugin_dir.iterdir()) == []


def test_a_start_that_fails_half_way_leaves_no_socket_behind(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Paths(root=short_tmp)
    make_server = grpc.aio.server

    def broken_server() -> grpc.aio.Server:
        server = make_server()

        async def start() -> None:
            assert len(list(paths.plugin_dir.iterdir())) == 1
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(server, "start", start)
        return server

    monkeypatch.setattr(grpc.aio, "server", broken_server)

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler()):
            pass

    with pytest.raises(DriverError, match=r"cannot be put in place \(No space left on device\)"):
        asyncio.run(run())
    assert list(paths.plugin_dir.iterdir()) == []


def test_a_registry_that_cannot_be_made_is_refused_with_its_path(short_tmp: Path) -> None:
    paths = Paths(root=short_tmp)
    paths.kubelet_registry.parent.mkdir(parents=True)
    paths.kubelet_registry.write_text("")

    async def run() -> None:
        async with plugin_at(short_tmp, ScriptedHandler()):
            pass

    with pytest.raises(DriverError, match=f"{paths.kubelet_registry} cannot be made"):
        asyncio.run(run())


def test_the_plugin_can_be_started_again_after_it_failed(short_tmp: Path) -> None:
    paths = Paths(root=short_tmp)
    paths.kubelet_registry.mkdir(parents=True)
    paths.registration_socket.mkdir()

    async def run() -> None:
        plugin = plugin_at(short_tmp, ScriptedHandler())
        with pytest.raises(DriverError):
            await plugin.__aenter__()
        paths.registration_socket.rmdir()
        async with plugin, kubelet_ends(short_tmp) as ends:
            await ends.registration.GetInfo(registration.InfoRequest(), timeout=1)

    asyncio.run(run())
