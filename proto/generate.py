"""Generate driver/pb from proto/: run `python proto/generate.py [--into DIR]` at the root.

The virtual path `driver/pb=proto` makes generated imports absolute and keeps descriptor names unique:
upstream calls every file `api.proto`, which would collide in one process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto"


def generate(into: Path) -> list[Path]:
    """Write the generated modules and their packages below into/driver/pb; return what was written."""
    protos = sorted(SOURCES.rglob("*.proto"))
    names = [f"driver/pb/{proto.relative_to(SOURCES)}" for proto in protos]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Idriver/pb={SOURCES}"]
    command += [f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}", *names]
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True, cwd=ROOT)
    written = []
    for proto in protos:
        folder = into / "driver/pb" / proto.relative_to(SOURCES).parent
        package = folder
        while package != into / "driver":
            (package / "__init__.py").touch()
            package = package.parent
        if "service " not in proto.read_text():
            # protoc writes an empty module for a file without services.
            (folder / f"{proto.stem}_pb2_grpc.py").unlink()
        written += sorted(folder.glob(f"{proto.stem}_pb2*"))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT)
    for path in generate(parser.parse_args().into):
        print(path)


if __name__ == "__main__":
    main()
