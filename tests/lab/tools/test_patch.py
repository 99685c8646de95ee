"""`alflb patch` on small trees: made from the patches themselves, so no text of Megatron-LM is needed here."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.tools import patch as module
from alflb_megatron.lab.tools.patch import PATCHES, SCRIPT, VERSION_FILE, identify_checkout, patches
from alflb_megatron.settings import SettingError

CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")


def _script(patch: str, first: str = "") -> str:
    """A file on which `patch` applies: the lines that each of its hunks expects, with others between them."""
    lines, start = [first], True
    for line in (patches() / patch).read_text(encoding="utf-8").splitlines():
        if line.startswith(("---", "+++", "+")):
            continue
        if line.startswith("@@"):
            lines += [f"# {start}"] * 3
            start = False
        else:
            lines.append(line[1:])
    return "\n".join([*lines, "# the end", ""])


def _tree(folder: Path, version: tuple[int, int] = (0, 16), text: str | None = None) -> Path:
    (folder / VERSION_FILE).parent.mkdir(parents=True)
    (folder / VERSION_FILE).write_text(f'MAJOR = {version[0]}\nMINOR = {version[1]}\nPATCH = 1\nPRE_RELEASE = ""\n')
    (folder / SCRIPT).write_text(_script(PATCHES[version]) if text is None else text)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", PATCHES)
def test_it_goes_in_once_and_comes_out_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: tuple[int, int]
) -> None:
    tree = _tree(tmp_path / "tree", version)
    (tree / SCRIPT).chmod(0o755)
    before = _files(tree)
    assert main(["patch", str(tree), "--check"]) == 1
    assert _files(tree) == before
    assert main(["patch", str(tree)]) == 0
    patched = _files(tree)
    assert main(["patch", str(tree)]) == 0
    assert main(["patch", str(tree), "--check"]) == 0
    assert _files(tree) == patched
    assert patched.keys() == before.keys()  # nothing beside it: no .orig, no .rej
    changed = patched[SCRIPT].decode()
    assert changed.count("from alflb_megatron.hosts import megatron_lm as alflb\n") == 1
    assert changed.count("alflb.") == 2
    assert stat.S_IMODE((tree / SCRIPT).stat().st_mode) == 0o755
    assert main(["patch", str(tree), "--revert"]) == 0
    assert main(["patch", str(tree), "--revert"]) == 0
    assert _files(tree) == before
    said = capsys.readouterr().out
    title = f"{tree}: Megatron-LM with Megatron-Core {version[0]}.{version[1]}.1"
    assert f"{title}: patched already\n" in said and f"{title}: not patched already\n" in said


def test_edits_elsewhere_in_the_script_do_not_matter(tmp_path: Path) -> None:
    text = _script(PATCHES[0, 18], first="import their_own_things\n" * 40)
    tree = _tree(tmp_path / "tree", (0, 18), text)
    assert main(["patch", str(tree)]) == 0
    assert (tree / SCRIPT).read_text().startswith("import their_own_things\n" * 40)
    assert main(["patch", str(tree), "--revert"]) == 0
    assert (tree / SCRIPT).read_text() == text


@pytest.mark.parametrize("flags", [[], ["--check"], ["--revert"]])
def test_an_unknown_tree_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    _tree(tmp_path / "other", text="print('not the script')\n")
    old = _tree(tmp_path / "old")
    (old / VERSION_FILE).write_text("MAJOR = 0\nMINOR = 15\nPATCH = 2\n")
    half = _tree(tmp_path / "half")
    main(["patch", str(half)])
    (half / SCRIPT).write_text((half / SCRIPT).read_text().replace("import megatron_lm as alflb", "import mine"))
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    before = _files(tmp_path)
    for name, found in {
        "other": "holds Megatron-Core 0.16.1, but core_v0.16-0.17.patch neither applies",
        "half": "holds Megatron-Core 0.16.1, but core_v0.16-0.17.patch neither applies",
        "old": "holds Megatron-Core 0.15.2, for which there is no patch; known are 0.16, 0.17, 0.18, 0.19, 0.20",
        "empty": "must be a checkout of Megatron-LM; cannot read",
        "nowhere": "must be a checkout of Megatron-LM; cannot read",
    }.items():
        assert main(["patch", str(tmp_path / name), *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"alflb: DIR={tmp_path / name}: {found}") and said.count("\n") == 1
    assert _files(tmp_path) == before


def test_a_write_that_fails_leaves_the_tree_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = _tree(tmp_path / "tree")
    before = _files(tree)

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module.os, "replace", full)
    assert main(["patch", str(tree)]) == 2
    assert "cannot be written (no space left)" in capsys.readouterr().err
    assert _files(tree) == before


def test_a_repository_around_it_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    tree = _tree(tmp_path / "third_party" / "Megatron-LM")
    assert main(["patch", str(tree)]) == 0
    assert main(["patch", str(tree), "--check"]) == 0
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_linked_script_is_changed_where_it_lies(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    (tree / SCRIPT).rename(tmp_path / "elsewhere.py")
    (tree / SCRIPT).symlink_to(tmp_path / "elsewhere.py")
    assert main(["patch", str(tree)]) == 0
    assert (tree / SCRIPT).is_symlink()
    assert "alflb" in (tmp_path / "elsewhere.py").read_text()


def test_git_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="git must be found"):
        identify_checkout(_tree(tmp_path / "tree"))


def test_check_and_revert_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["patch", str(tmp_path), "--check", "--revert"])
    assert "not allowed with" in capsys.readouterr().err


def test_every_patch_belongs_to_a_version() -> None:
    assert {path.name for path in patches().iterdir()} == set(PATCHES.values())


@pytest.mark.skipif(
    not Path(CHECKOUT, SCRIPT).is_file() or not CHECKOUT, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)
def test_a_real_checkout(tmp_path: Path) -> None:
    for name in (SCRIPT, VERSION_FILE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(CHECKOUT, name), tmp_path / name)
    before = _files(tmp_path)
    assert main(["patch", str(tmp_path)]) == 0
    assert main(["patch", str(tmp_path), "--check"]) == 0
    compile((tmp_path / SCRIPT).read_text(), SCRIPT, "exec")
    assert main(["patch", str(tmp_path), "--revert"]) == 0
    assert _files(tmp_path) == before
