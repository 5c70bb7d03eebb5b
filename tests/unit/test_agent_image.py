"""What the agent's image is made from, and that the making leaves this machine alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tarfile
from pathlib import Path

import pytest

from kndsim import debian_root, oci
from kndsim.agent_image import PRODUCT

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def packages(name: str) -> set[str]:
    lines = (DEPLOY / name).read_text().splitlines()
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def pins(name: str) -> dict[str, str]:
    """The whole entry, hashes included, by `name==version`."""
    entries = re.split(r"^(?=[a-z0-9])", (ROOT / "requirements" / name).read_text(), flags=re.MULTILINE)
    bare = [re.sub(r"^\s*#.*\n?", "", entry, flags=re.MULTILINE).strip() for entry in entries[1:]]
    return {entry.split(" ", 1)[0]: entry for entry in bare}


def test_the_image_has_what_the_agent_needs_or_was_made_with_it() -> None:
    made_from = packages("debian-packages-image.txt") | packages("debian-packages-image-build.txt")
    assert packages("debian-packages.txt") - made_from == set()


def test_no_package_is_both_in_the_image_and_only_for_its_making() -> None:
    assert not packages("debian-packages-image.txt") & packages("debian-packages-image-build.txt")


def test_the_image_holds_the_very_python_packages_that_are_tested() -> None:
    runtime, lock = pins("runtime.txt"), pins("lock.txt")
    assert runtime
    assert {pin for pin in runtime if lock.get(pin) != runtime[pin]} == set(), "run `make lock`"


def test_the_image_holds_every_python_package_the_product_asks_for() -> None:
    wanted = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert wanted
    asked = {name.lower() for name in re.findall(r'^ *"([A-Za-z0-9-]+)', wanted[1], re.MULTILINE)}
    assert asked - {pin.partition("==")[0] for pin in pins("runtime.txt")} == set()


def test_both_front_ends_run_the_same_scripts() -> None:
    """A script that only one of them ran would make two different images."""
    scripts = {path.name for path in (DEPLOY / "image").glob("*.sh")} - {"put-netns-check.sh"}
    ours = (ROOT / "ci/kind-sriov-sim/kndsim/agent_image.py").read_text()
    theirs = (DEPLOY / "image/Dockerfile").read_text()
    assert {name for name in scripts if f"/src/deploy/image/{name}" in ours} == scripts
    assert {name for name in scripts if f"/src/deploy/image/{name}" in theirs} == scripts


def test_an_engine_is_given_all_that_the_recipe_reads() -> None:
    given = (DEPLOY / "image/Dockerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in PRODUCT} - set(given) == set()
    assert "!requirements/runtime.txt" in given


def test_both_front_ends_give_the_same_environment() -> None:
    from kndsim.agent_image import _ENVIRONMENT

    dockerfile = (DEPLOY / "image/Dockerfile").read_text()
    assert {f"{key}={value}" for key, value in _ENVIRONMENT.items() if f"{key}={value}" in dockerfile} == {
        f"{key}={value}" for key, value in _ENVIRONMENT.items()
    }


# --- the root it is made in ---------------------------------------------------------------------------


def test_what_reaches_packages_is_copied_so_that_no_package_can_write_to_the_machine(tmp_path: Path) -> None:
    if not list(Path("/etc/apt").glob("sources.list*")):
        pytest.skip("this is not a Debian with apt sources")
    shown = debian_root.ways_to_packages(tmp_path, "trixie")
    assert shown
    assert [source for source, _ in shown if not source.is_relative_to(tmp_path)] == []
    assert [source for source, _ in shown if source.is_symlink()] == []


# --- the tar ------------------------------------------------------------------------------------------


def test_an_image_of_layers_lists_them_lowest_first_with_their_digests(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "opt/knd").mkdir(parents=True)
    (tree / "opt/knd/file").write_text("upper")
    (tree / "etc").mkdir()
    (tree / "etc/file").write_text("lower")
    lower = oci.pack(tmp_path / "lower", tree / "etc")
    upper = oci.pack(tmp_path / "upper", tree, "opt/knd")
    oci.write_layers(tmp_path / "image.tar", oci.Image(name="localhost/x:1"), [lower, upper])
    with tarfile.open(tmp_path / "image.tar") as image:
        files = {member.name: image.extractfile(member).read() for member in image}  # type: ignore[union-attr]
    index = json.loads(files["index.json"])
    manifest = json.loads(files["blobs/sha256/" + index["manifests"][0]["digest"].partition(":")[2]])
    blobs = [files["blobs/sha256/" + layer["digest"].partition(":")[2]] for layer in manifest["layers"]]
    assert [len(blob) for blob in blobs] == [layer["size"] for layer in manifest["layers"]]
    config = json.loads(files["blobs/sha256/" + manifest["config"]["digest"].partition(":")[2]])
    unpacked = [gzip.decompress(blob) for blob in blobs]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in unpacked]
    (tmp_path / "one.tar").write_bytes(unpacked[1])
    with tarfile.open(tmp_path / "one.tar") as layer:
        assert layer.getnames() == ["opt", "opt/knd", "opt/knd/file"]


def test_a_kept_layer_is_the_layer_that_was_packed(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("x")
    packed = oci.pack(tmp_path / "layer", tmp_path / "tree")
    assert oci.Layer.kept(tmp_path / "layer") == packed
    assert packed.digest == hashlib.sha256((tmp_path / "layer").read_bytes()).hexdigest()


def test_the_same_tree_packs_to_the_same_bytes_whatever_its_times(tmp_path: Path) -> None:
    import os

    for name, when in (("a", 1), ("b", 1_000_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("same")
        os.utime(tmp_path / name / "file", (when, when))
    first, second = (oci.pack(tmp_path / f"{name}.gz", tmp_path / name) for name in "ab")
    assert first.digest == second.digest
