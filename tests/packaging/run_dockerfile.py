"""Runs the steps of a Dockerfile, as written, in directories as roots; for machines without a container engine.

    python tests/packaging/run_dockerfile.py build WORK [--build-arg NAME=VALUE] [--env NAME=VALUE] [--bind DIRECTORY]
    python tests/packaging/run_dockerfile.py start WORK

Needs root and debootstrap. `build` knows the instructions that softbatch's Dockerfile has; the last stage becomes
WORK/image. `start` runs it as its user, with a read-only root, an empty volume and a temporary /tmp, waits until its
health check is content, asks it something, ends it, and says how long each took.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

PROJECT = Path(__file__).resolve().parents[2]
KEY = "try"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SUITES = {"debian:bookworm-slim": "bookworm", "debian:trixie-slim": "trixie"}


@dataclass
class Stage:
    """A root that steps change, and what later steps find set."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    directory: str = "/"
    user: str = "root"
    settings: dict[str, object] = field(default_factory=dict)

    def expand(self, text: str) -> str:
        known = self.variables | self.environment
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), text)


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and rest of each, with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name.upper(), rest) for line in joined.splitlines() if line for name, _, rest in [line.partition(" ")]]


def make_root(work: Path, base: str) -> Path:
    """As the image `base` would be, near enough: Debian's required packages."""
    root = work / f"base-{SUITES[base]}"
    if not root.exists():
        part = root.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", SUITES[base], part], check=True)
        part.rename(root)
    return root


def run(stage: Stage, script: str, options: argparse.Namespace) -> None:
    """A RUN step: in the root, with the network; what --bind names can be read at the same place as outside."""
    mounts = ["mount -t proc proc proc", "mount --bind /dev dev", "cp /etc/resolv.conf etc/resolv.conf"]
    for bound in options.bind:
        mounts.append(f"mkdir -p .{bound} && mount --bind {bound} .{bound} && mount -o remount,bind,ro .{bound}")
    variables = stage.variables | stage.environment | options.env
    command = ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), "/bin/sh", "-c"]
    inside = f"cd {shlex.quote(stage.directory)} && {script}"
    outside = f"cd {stage.root} && {' && '.join(mounts)} && exec chroot . {shlex.join([*command, inside])}"
    subprocess.run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", outside], check=True)


def copy(stage: Stage, stages: dict[str, Stage], rest: str) -> None:
    origin, words = PROJECT, rest.split()
    if words[0].startswith("--from="):
        origin = stages[words.pop(0).removeprefix("--from=")].root
    *names, target = words
    for name in names:
        source = origin / name.lstrip("/")
        place = stage.root / os.path.join(stage.directory, target).lstrip("/")
        if target.endswith("/"):
            place /= source.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so") if origin == PROJECT else None
            shutil.copytree(source, place, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(source, place)


def step(stage: Stage, stages: dict[str, Stage], name: str, rest: str, options: argparse.Namespace) -> None:
    match name:
        case "ARG":
            variable, _, default = rest.partition("=")
            stage.variables[variable] = options.build_arg.get(variable, default)
        case "ENV":
            variable, _, value = rest.partition("=")
            stage.environment[variable] = stage.expand(value)
        case "WORKDIR":
            stage.directory = stage.expand(rest)
            (stage.root / stage.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = rest
        case "RUN":
            run(stage, rest, options)
        case "COPY":
            copy(stage, stages, rest)
        case "ENTRYPOINT" | "CMD":
            stage.settings[name] = json.loads(rest)
        case "VOLUME" | "EXPOSE" | "HEALTHCHECK" | "STOPSIGNAL":
            stage.settings[name] = rest
        case _:
            sys.exit(f"run_dockerfile.py: {name} is not known")


def build(options: argparse.Namespace) -> None:
    globals_: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, rest in instructions((PROJECT / "Dockerfile").read_text()):
        print(f"{name} {rest}", flush=True)
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            base = re.sub(r"\$\{(\w+)\}", lambda found: globals_[found[1]], base)
            root = options.work / (alias or "image")
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(["cp", "-a", make_root(options.work, base), root], check=True)
            stage = stages[alias or "image"] = Stage(root)
        elif stage is None:
            variable, _, default = rest.partition("=")
            globals_[variable] = options.build_arg.get(variable, default)
        else:
            step(stage, stages, name, rest, options)
    assert stage is not None
    (options.work / "image.json").write_text(json.dumps(asdict(stage), default=str, indent=2))


def start(options: argparse.Namespace) -> None:
    image = json.loads((options.work / "image.json").read_text())
    volume = options.work / "volume"
    shutil.rmtree(volume, ignore_errors=True)
    subprocess.run(["cp", "-a", options.work / "image" / image["settings"]["VOLUME"].lstrip("/"), volume], check=True)
    started = time.monotonic()
    server = inside(options.work, image, [*image["settings"]["ENTRYPOINT"], *image["settings"]["CMD"]])
    check = json.loads(image["settings"]["HEALTHCHECK"].partition("CMD ")[2])
    try:
        while inside(options.work, image, check, stderr=subprocess.DEVNULL).wait() != 0:
            if server.poll() is not None:
                sys.exit(f"run_dockerfile.py: the server has ended with status {server.returncode}")
            time.sleep(0.5)
        print(f"healthy after {time.monotonic() - started:.0f} s", flush=True)
        question = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        url = "http://127.0.0.1:8000/v1/completions"
        with urlopen(Request(url, json.dumps(question).encode(), headers)) as answer:
            print(f"answer: {json.load(answer)['choices'][0]['text']!r}", flush=True)
    finally:
        server.terminate()
        print(f"ended with status {server.wait(timeout=60)}", flush=True)
    written = sorted(str(path.relative_to(volume)) for path in volume.glob("*/*"))
    print(f"written: {', '.join(written)}")


def inside(work: Path, image: dict[str, Any], command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Runs a command in the image as its user. All but its volume and /tmp is read-only."""
    root, volume = work / "image", image["settings"]["VOLUME"]
    mounts = [f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}", f"cd {root}"]
    mounts += ["mount -t tmpfs tmpfs tmp", f"mount --bind {work / 'volume'} .{volume}"]
    mounts += ["mount --bind /proc proc", "mount --rbind /dev dev"]
    variables = [f"{name}={value}" for name, value in (image["environment"] | {"SOFTBATCH_API_KEY": KEY}).items()]
    there = f"cd {image['directory']} && exec {shlex.join(command)}"
    run = ["chroot", f"--userspec={image['user']}", ".", "env", "-i", *variables, "/bin/sh", "-c", there]
    script = f"{' && '.join(mounts)} && exec {shlex.join(run)}"
    return subprocess.Popen(["unshare", "--mount", "sh", "-c", script], **options)


def main() -> None:
    def pair(text: str) -> tuple[str, str]:
        name, _, value = text.partition("=")
        return name, value

    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["build", "start"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--build-arg", type=pair, action="append", default=[])
    parser.add_argument("--env", type=pair, action="append", default=[], help="only here, such as where pip finds what")
    parser.add_argument("--bind", action="append", default=[], help="a directory that steps can read, too")
    options = parser.parse_args()
    options.work, options.build_arg, options.env = options.work.resolve(), dict(options.build_arg), dict(options.env)
    options.work.mkdir(parents=True, exist_ok=True)
    build(options) if options.what == "build" else start(options)


if __name__ == "__main__":
    main()
