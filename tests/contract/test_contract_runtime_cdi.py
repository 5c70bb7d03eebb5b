"""What a runtime makes of CDI ids and of the createRuntime hooks in their specs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract.conftest import Opened
from tests.contract.nri_probe import Probe
from tests.contract.runtime_forms import Refused, RuntimePeer, new_name
from tests.contract.test_contract_runtime_nri import gone, play, synchronized

KIND = "contract.example/net"
REFUSING = "#!/bin/sh\necho this netns is not the claim\\'s >&2\nexit 1\n"
WILLING = "#!/bin/sh\ncat >/dev/null\nexit 0\n"


def write_spec(peer: RuntimePeer, device: str, hook: str = "") -> Path:
    """As the driver writes it: beside, then renamed."""
    edits: dict[str, object] = {"env": [f"CONTRACT={device}"]}
    if hook:
        edits["hooks"] = [{"hookName": "createRuntime", "path": hook, "args": [hook]}]
    spec = {
        "cdiVersion": "0.5.0",
        "kind": KIND,
        "devices": [{"name": device, "containerEdits": edits}],
    }
    path = peer.cdi / f"contract-{device}.json"
    staged = peer.cdi / f".contract-{device}"
    staged.write_text(json.dumps(spec))
    staged.rename(path)
    return path


def script(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_container_waits_for_its_spec_and_starts_when_it_is_there(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        pod = await peer.run(new_name())
        device = pod.name
        for _ in range(2):
            with pytest.raises(Refused, match=f"unresolvable CDI devices {KIND}={device}"):
                await peer.container(pod, "main", [f"{KIND}={device}"])
        spec = write_spec(peer, device)
        await peer.container(pod, "main", [f"{KIND}={device}"])
        spec.unlink()
        with pytest.raises(Refused, match="unresolvable CDI devices"):
            await peer.container(pod, "second", [f"{KIND}={device}"])
        await peer.container(pod, "third")
        await gone(peer, pod)

    play(runtime, case)


def test_a_hook_that_fails_refuses_the_container_with_its_words_until_the_spec_is_another(
    runtime: Opened, tmp_path: Path
) -> None:
    async def case(peer: RuntimePeer) -> None:
        refusing = peer.hook_path(script(tmp_path, "refusing", REFUSING))
        willing = peer.hook_path(script(tmp_path, "willing", WILLING))
        pod = await peer.run(new_name())
        device = pod.name
        spec = write_spec(peer, device, refusing)
        with pytest.raises(
            Refused, match=r"error running createRuntime hook #0.*this netns is not the claim's"
        ):
            await peer.container(pod, "main", [f"{KIND}={device}"])
        write_spec(peer, device, willing)
        await peer.container(pod, "main", [f"{KIND}={device}"])
        spec.unlink()
        await gone(peer, pod)

    play(runtime, case)


def test_two_specs_for_one_name_are_none(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        pod = await peer.run(new_name())
        spec = write_spec(peer, pod.name)
        twin = spec.with_name(f"twin-{spec.name}")
        twin.write_bytes(spec.read_bytes())
        with pytest.raises(Refused, match="unresolvable CDI devices"):
            await peer.container(pod, "main", [f"{KIND}={pod.name}"])
        twin.unlink()
        await peer.container(pod, "main", [f"{KIND}={pod.name}"])
        spec.unlink()
        await gone(peer, pod)

    play(runtime, case)


def test_plugins_are_shown_a_container_with_what_its_spec_added_and_none_that_has_no_spec(
    runtime: Opened,
) -> None:
    """By that a plugin knows which containers name a claim."""

    async def case(peer: RuntimePeer) -> None:
        async with Probe().connected(peer.socket) as probe:
            await synchronized(probe)
            pod = await peer.run(new_name())
            device = pod.name
            with pytest.raises(Refused, match="unresolvable CDI devices"):
                await peer.container(pod, "main", [f"{KIND}={device}"])
            spec = write_spec(peer, device)
            await peer.container(pod, "main", [f"{KIND}={device}"])
            await peer.container(pod, "plain")
            shown = [each for each in probe.told if each.kind == "create"]
            assert [each.container for each in shown] == ["main", "plain"]
            assert [f"CONTRACT={device}" in each.env for each in shown] == [True, False]
            spec.unlink()
            await gone(peer, pod)

    play(runtime, case)
