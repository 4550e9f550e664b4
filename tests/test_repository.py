"""What the repository promises about itself: generated tables, layout, examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_files_are_short():
    sources = [*(ROOT / "attnvariants").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert [str(p) for p in sources if len(p.read_text().splitlines()) > 400] == []
