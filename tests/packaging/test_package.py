"""The wheel and the sdist: what they hold, what an index says, and what works with the base alone."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from alflb_megatron import __version__
from alflb_megatron.lab.cli import COMMANDS
from alflb_megatron.lab.cli import missing as missing_packages

ROOT = Path(__file__).parents[2]
BESIDE = {"patches": "alflb_megatron/patches", "plans": "alflb_megatron/plans", "recipes": "alflb_megatron/recipes"}


def _run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist, built from a copy of what git tracks or would."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in _tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    done = _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def _tracked() -> list[str]:
    listed = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    assert listed.returncode == 0, listed.stderr
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def _expected() -> set[str]:
    """The files of the package and of what lies beside it, under the names they are installed with."""
    ending = (".py", ".patch", ".yaml", "py.typed")
    found = set()
    for name in _tracked():
        top, _, rest = name.partition("/")
        if name.endswith(ending) and (top == "alflb_megatron" or top in BESIDE):
            found.add(f"{BESIDE.get(top, top)}/{rest}")
    return found


def test_the_wheel_holds_the_package_patches_plans_and_recipes_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[0]).namelist())
    about = {name for name in names if name.startswith(f"alflb_megatron-{__version__}.dist-info/")}
    assert names - about == _expected()
    assert {"alflb_megatron/py.typed", "alflb_megatron/plans/wang2024.yaml", "alflb_megatron/recipes/nemo.py"} <= names


def test_the_sdist_holds_what_the_wheel_is_built_from_and_nothing_else(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    tops = {name.partition("/")[0] for name in names}
    folders = {"alflb_megatron", "alflb_megatron.egg-info", *BESIDE}
    files = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert tops == folders | files
    installed = {
        next((k + name[len(v) :] for k, v in BESIDE.items() if name.startswith(v)), name) for name in _expected()
    }
    assert {name for name in names if name.partition("/")[0] in {"alflb_megatron", *BESIDE}} == installed


def test_an_index_would_take_both(built: tuple[Path, Path]) -> None:
    done = _run(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


# -- with the base alone -----------------------------------------------------------------------------------------------


def _needed(name: str, found: set[str]) -> set[str]:
    """The distributions that `name` needs, itself among them, without extras and for this machine."""
    from packaging.requirements import Requirement

    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return found
    found.add(key)
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _needed(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def base(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment: the wheel, installed by pip, and links to the distributions its base needs.

    Links, for torch alone takes a minute to install; `pip check` says whether anything that is asked for is missing.
    """
    folder = tmp_path_factory.mktemp("base") / "venv"
    assert _run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    python = folder / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    ours = Path(sysconfig.get_path("purelib"))
    for name in sorted(_needed("alflb_megatron", set()) - {"alflb-megatron"}):
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(ours / top)
    done = _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[0])
    assert done.returncode == 0, done.stderr
    return python


def test_nothing_that_the_base_asks_for_is_missing(base: Path) -> None:
    done = _run(sys.executable, "-m", "pip", "--python", base, "check")
    assert done.returncode == 0, done.stdout
    assert _run(base, "-c", "import scipy").returncode == 1, "the environment is not the base alone"


def test_a_training_job_needs_the_base_alone(base: Path, tmp_path: Path) -> None:
    program, example = Path(__file__).parent / "with_the_base.py", ROOT / "examples" / "train_loop.py"
    done = _run(base, "-W", "ignore", program, example, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(f"the base is enough; {len(COMMANDS)} commands")


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.needs])
def test_a_command_without_its_extra_says_what_to_install(base: Path, name: str, tmp_path: Path) -> None:
    done = _run(base.parent / "alflb", name, "--help", cwd=tmp_path)
    command = COMMANDS[name]
    packages = ", ".join(package for package in command.needs if package != "jinja2")  # which torch brings
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"alflb: {name} needs {packages}: pip install 'alflb_megatron[{command.extra}]'\n"
    assert missing_packages(command) == [], "all of them are here"


def test_what_needs_no_extra_runs_from_the_wheel(base: Path, tmp_path: Path) -> None:
    doctor = _run(base.parent / "alflb", "doctor", cwd=tmp_path)
    assert doctor.returncode == 0 and "Megatron-Core" in doctor.stdout, doctor.stderr
    (tmp_path / "pretrain_gpt.py").write_text("from gpt_builders import gpt_builder\n", encoding="utf-8")
    words = ["deepseek_moe_1b_alflb", "--megatron-lm", tmp_path, "--dryrun"]
    recipe = _run(base, "-m", "alflb_megatron.recipes.megatron_lm", *words, cwd=tmp_path)
    assert recipe.returncode == 0, recipe.stderr
    assert "ALFLB_RULE=adaptive" in recipe.stdout and "--num-experts 64" in recipe.stdout, recipe.stdout
