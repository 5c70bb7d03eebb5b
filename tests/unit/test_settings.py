"""Settings: what is wrong with a command line is one sentence at start, not a failure later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from driver.paths import SUN_PATH_MAX
from driver.settings import HookChoice, Settings, parse


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--node-name", "Node_A"], "--node-name 'Node_A' is not a node's name: it is a DNS subdomain"),
        (["--node-name", "-a"], "--node-name '-a' is not a node's name"),
        (["--node-name", "a\n"], "is not a node's name"),
        (["--node-name", "a" * 254], "is not a node's name"),
        (["--driver", "Knd.internal"], "--driver 'Knd.internal' is not a DNS subdomain of at most 63"),
        (["--driver", "../knd"], "is not a DNS subdomain"),
        (["--driver", "knd..internal"], "is not a DNS subdomain"),
        (["--driver", "a" * 64], "is not a DNS subdomain"),
        (["--slots", "0"], "--slots 0 is not between 1 and 65536"),
        (["--slots", "65537"], "--slots 65537 is not between 1 and 65536"),
        (["--metrics-port", "65536"], "--metrics-port 65536 is not a port"),
        (["--metrics-port", "-1"], "--metrics-port -1 is not a port"),
        (["--root", "/" + "r" * 70], f"a socket path may have {SUN_PATH_MAX}"),
    ],
)
def test_each_refusal_names_the_flag_and_what_it_takes(flags: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        parse([*([] if "--node-name" in flags else ["--node-name", "node-a"]), *_joined(flags)])
    assert sentence in str(raised.value)


def _joined(flags: list[str]) -> list[str]:
    """`--flag=value`, as a value may begin with a dash."""
    return [f"{flags[0]}={flags[1]}"]


def test_an_unknown_hook_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(["--node-name", "node-a", "--hook", "xdp"])
    assert raised.value.code == 2
    assert "--hook" in capsys.readouterr().err


def test_the_node_is_named_by_flag_then_environment_then_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_NAME", "from-environment")
    monkeypatch.setattr(socket, "gethostname", lambda: "From-Machine.example")
    assert parse(["--node-name", "from-flag"]).node == "from-flag"
    assert parse([]).node == "from-environment"
    monkeypatch.delenv("NODE_NAME")
    assert parse([]).node == "from-machine.example"


def test_a_relative_root_is_taken_from_here_once(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(short_tmp)
    settings = parse(["--node-name", "node-a", "--root", "r"])
    monkeypatch.chdir("/")
    assert settings.paths.root == short_tmp / "r"


def test_what_is_not_said_has_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Settings = parse(["--node-name", "node-a"])
    assert settings.hook is HookChoice.AUTO
    assert settings.policy is None
    assert settings.kubeconfig is None
    assert settings.paths.root == Path("/")
    assert settings.paths.driver == "knd.internal"
