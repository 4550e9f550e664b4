"""What the repository promises about itself: generated tables, layout, examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*command, **kwargs):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def test_readme_tables_are_fresh():
    result = run(sys.executable, "-m", "bench.readme", "--check")
    assert result.returncode == 0, result.stderr


def test_readme_names_the_test_command():
    makefile = (ROOT / "Makefile").read_text()
    assert "\nmake test " in (ROOT / "README.md").read_text()
    assert "\ntest: " in makefile


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example(example):
    result = run(sys.executable, str(example))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_kernels_does_not_shadow_the_package_transformers_imports():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    code = "import attnvariants_kernels; from transformers import LlamaForCausalLM"
    # -P would leave the root out of sys.path: with it in is the hard case
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    if (5, 0) <= (major, minor) < (5, 10):
        pytest.skip("transformers 5.0 to 5.9 mistake any folder named kernels for a package")
    result = run(sys.executable, "-c", code, env=environment)
    assert result.returncode == 0, result.stderr


def test_nothing_loads_code_or_pickles():
    unsafe = re.compile(
        r"\bimport pickle|\btorch\.load\(|(?<![.\w])(eval|exec)\(|trust_remote_code=True"
    )
    for path in (ROOT / "attnvariants").rglob("*.py"):
        assert not unsafe.search(path.read_text()), path


LOCK = (ROOT / "requirements.lock").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def locked():
    """`name -> [(version, marker or None)]` of the lock."""
    found = {}
    entry = r"^([a-z0-9.-]+)==(\S+)(?: ; (.+?))? \\$"
    for name, version, marker in re.findall(entry, LOCK, re.M):
        found.setdefault(name, []).append((version, Marker(marker) if marker else None))
    return found


def test_the_lock_holds_what_is_asked_for():
    """After a change of pyproject.toml: `make lock`."""
    extras = re.search(r"^\[project\.optional-dependencies\]\n(.*?)\n\n", PYPROJECT, re.M | re.S)[1]
    asked = [Requirement(text) for text in re.findall(r'"([^"]+)"', extras)]
    found = locked()
    for requirement in asked:
        if requirement.name == "attnvariants":
            continue
        versions = found.get(requirement.name.replace("_", "-"), [])
        assert versions, f"{requirement.name} is not in requirements.lock: run `make lock`"
        for version, _ in versions:
            assert requirement.specifier.contains(version), (str(requirement), version)


def test_every_locked_version_has_hashes_and_one_applies_here():
    for name, versions in locked().items():
        applying = [version for version, marker in versions if marker is None or marker.evaluate()]
        assert len(applying) <= 1, name
    blocks = re.split(r"^(?=[a-z0-9.-]+==)", LOCK, flags=re.M)[1:]
    assert len(blocks) > 100
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_build_of_torch_is_the_machines_and_its_version_is_pinned_once():
    makefile = (ROOT / "Makefile").read_text()
    pinned = re.search(r"^TORCH \?= torch==(\S+)$", makefile, re.M)[1]
    assert f'constraint-dependencies = ["torch=={pinned}"]' in PYPROJECT
    assert f'name = "torch"\nversion = "{pinned}"' in PYPROJECT
    assert f"torch=={pinned}" in (ROOT / "README.md").read_text()
    assert not [name for name in locked() if name == "torch" or name.startswith("nvidia")]
    assert "--require-hashes -r requirements.lock" in makefile


def test_files_are_short():
    sources = [*(ROOT / "attnvariants").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert [str(p) for p in sources if len(p.read_text().splitlines()) > 400] == []
