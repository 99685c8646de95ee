"""Score files and run folders: what is read, how much memory it takes, and what is refused in one line."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from alflb_megatron.lab.replay.recording import Gating
from alflb_megatron.lab.replay.score_folder import FILE, remove_recorded_scores
from alflb_megatron.lab.replay.score_recorder import ScoreRecorder
from alflb_megatron.lab.replay.scores import open_scores
from alflb_megatron.settings import SettingError

STEPS, LAYERS, TOKENS, EXPERTS = 3, 2, 5, 4


def scores(*shape: int) -> Tensor:
    return torch.rand(shape or (STEPS, LAYERS, TOKENS, EXPERTS), generator=torch.Generator().manual_seed(7))


def refusal(path: Path, read: bool = False) -> str:
    """The text of the error that opening (or reading) `path` ends with."""
    with pytest.raises(SettingError) as caught:
        for _ in open_scores(path) if read else [open_scores(path)]:
            pass
    text = str(caught.value)
    assert "\n" not in text and text.startswith("SCORES=") and str(path.name) in text
    return text


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(STEPS, LAYERS, TOKENS, EXPERTS), (STEPS, TOKENS, EXPERTS)])
def test_a_safetensors_file_step_by_step(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    written = scores(*shape).to(dtype)
    save_file({"scores": written, "topk": torch.tensor(2)}, tmp_path / "a.safetensors")
    recording = open_scores(tmp_path / "a.safetensors")
    assert (recording.experts, recording.topk, recording.steps) == (EXPERTS, 2, STEPS)
    assert recording.layers == ((0, 1) if len(shape) == 4 else (0,))
    for _ in range(2):  # it can be read again
        read = torch.stack(list(recording))
        assert read.dtype == torch.float32 and torch.equal(read, written.float().view(read.shape))


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f4"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_step_by_step(tmp_path: Path, dtype: str, save: Any) -> None:
    written = scores().numpy().astype(dtype)
    save(tmp_path / "a.npz", scores=written, topk=2, other=np.zeros(3))
    recording = open_scores(tmp_path / "a.npz")
    assert (recording.layers, recording.experts, recording.topk, recording.steps) == ((0, 1), EXPERTS, 2, STEPS)
    for _ in range(2):
        assert np.array_equal(torch.stack(list(recording)).numpy(), written.astype(np.float32))


def test_topk_may_be_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", scores=scores().numpy())
    save_file({"scores": scores()}, tmp_path / "a.safetensors")
    assert open_scores(tmp_path / "a.npz").topk is None
    assert open_scores(tmp_path / "a.safetensors").topk is None


def test_memory_is_that_of_a_step_however_many_there_are(tmp_path: Path) -> None:
    step_bytes = 4 * 1000 * 16
    peaks = []
    for steps in (4, 64):
        np.savez(tmp_path / "a.npz", scores=np.ones((steps, 1000, 16), np.float32))
        tracemalloc.start()  # numpy and zipfile report to it
        assert sum(1 for _ in open_scores(tmp_path / "a.npz")) == steps
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + step_bytes and peaks[1] < 6 * step_bytes


def test_a_safetensors_file_is_read_slice_by_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"scores": scores()}, tmp_path / "a.safetensors")
    asked: list[Any] = []

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __getitem__(self, key: Any) -> Tensor:
            asked.append(key)
            return self.inner[key]

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = safe_open(*args, **kwargs)

        def __enter__(self) -> Any:
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self.file.get_slice(name))  # and no get_tensor, which would read all

    monkeypatch.setattr("alflb_megatron.lab.replay.score_files.safe_open", File)
    assert len(list(open_scores(tmp_path / "a.safetensors"))) == STEPS
    assert asked == [slice(step, step + 1) for step in range(STEPS)]


# -- files that are refused ----------------------------------------------------------------------------------------


def test_what_is_no_recording(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "gone.npz")
    (tmp_path / "a.pt").write_bytes(b"")
    assert "must be a .safetensors or .npz file, or a run folder" in refusal(tmp_path / "a.pt")
    (tmp_path / "run").mkdir()
    assert "--record-scores N" in refusal(tmp_path / "run")
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not what it says")
        assert "cannot be read" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    np.savez(tmp_path / "a.npz", scores=scores().numpy())
    save_file({"scores": scores()}, tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refusal(path)


def test_an_npz_whose_array_is_cut_off_or_damaged(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", scores=scores().numpy())
    with zipfile.ZipFile(tmp_path / "a.npz") as whole, zipfile.ZipFile(tmp_path / "b.npz", "w") as cut:
        cut.writestr("scores.npy", whole.read("scores.npy")[:-8])
    assert "is truncated: 8 bytes of scores are missing" in refusal(tmp_path / "b.npz")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[400] ^= 1  # a score; the directory of the file stays whole
    (tmp_path / "a.npz").write_bytes(data)
    assert "CRC" in refusal(tmp_path / "a.npz", read=True)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"score": scores()}, "named scores; there are score"),
        ({"scores": scores(3, 4)}, "scores must have the shape [steps, tokens, experts] or [steps, layers, tokens"),
        ({"scores": scores().double()}, "scores must be float32"),
        ({"scores": scores().long()}, "scores must be float32"),
        ({"scores": scores()[:0]}, "is empty"),
        ({"scores": scores()[:, :, :0]}, "is empty"),
        ({"scores": scores(), "topk": torch.tensor(5)}, "holds topk 5, which must be from 1 to the 4 experts"),
        ({"scores": scores(), "topk": torch.tensor(0)}, "holds topk 0, which must be from 1 to the 4 experts"),
        ({"scores": scores(), "topk": torch.tensor(2.0)}, "topk must be one integer"),
        ({"scores": scores(), "topk": torch.tensor([1, 2])}, "topk must be one integer"),
    ],
)
def test_arrays_that_cannot_be_replayed(tmp_path: Path, name: str, arrays: dict[str, Tensor], message: str) -> None:
    if name == "a.npz":
        np.savez(tmp_path / name, **{key: value.numpy() for key, value in arrays.items()})
    else:
        save_file(arrays, tmp_path / name)
    assert message in refusal(tmp_path / name)


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    np.savez(tmp_path / "a.npz", scores=np.array([Trap()], dtype=object))
    assert "Python objects, which are never unpickled" in refusal(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", scores=scores().numpy(), topk=np.array(Trap(), dtype=object))
    assert "Python objects" in refusal(tmp_path / "b.npz")
    assert not (tmp_path / "sprung").exists()


def test_an_array_in_fortran_order_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", scores=np.asfortranarray(scores().numpy()))
    assert "ascontiguousarray" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_named_by_step_and_layer(tmp_path: Path, value: float) -> None:
    bad = scores()
    bad[2, 1, 3, 0] = value
    save_file({"scores": bad}, tmp_path / "a.safetensors")
    assert "step 2, layer 1 holds a score that is NaN or infinite" in refusal(tmp_path / "a.safetensors", read=True)


# -- run folders ---------------------------------------------------------------------------------------------------


class Router:
    """What a `ScoreRecorder` needs of a router."""

    score_hooks: Any = ()


def record(folder: Path, rank: int, ranks: int, steps: list[dict[int, Tensor]], first: int = 1, topk: int = 2) -> None:
    """Writes the files of one rank: for each step the scores of its layers."""
    routers = {layer: Router() for layer in steps[0]}
    recorder = ScoreRecorder(folder, routers, Gating(topk, "sigmoid"), rank, ranks, len(steps))
    for step, layers in enumerate(steps, first):
        for layer, rows in layers.items():
            for part in rows.split(2):  # micro-batches
                routers[layer].score_hooks[0](part)
        recorder.write(step)
    recorder.write(first + len(steps))  # one more than was asked for: nothing happens
    assert all(router.score_hooks == () for router in routers.values())


def test_ranks_are_joined_in_their_order(tmp_path: Path) -> None:
    """Two data-parallel ranks on each of two pipeline stages; the number of tokens changes from step to step."""
    first, second = [scores(2, 3, EXPERTS), scores(2, 6, EXPERTS)], [scores(2, 4, EXPERTS), scores(2, 1, EXPERTS)]
    for stage, layer in enumerate((3, 12)):
        for rank, steps in ((2 * stage + 1, second), (2 * stage, first)):
            record(tmp_path, rank, 4, [{layer: step[stage]} for step in steps], first=9)
    names = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert names == [FILE.format(step=step, rank=rank) for step in (9, 10) for rank in range(4)]
    recording = open_scores(tmp_path)
    assert (recording.layers, recording.experts, recording.steps, recording.first_step) == ((3, 12), EXPERTS, 2, 9)
    assert recording.gating == Gating(2, "sigmoid")
    for read, left, right in zip(recording, first, second, strict=True):
        assert torch.equal(read, torch.cat([left, right], dim=1))


def test_a_rank_without_an_moe_layer_is_one_of_the_ranks(tmp_path: Path) -> None:
    ScoreRecorder(tmp_path, {}, Gating(2, "sigmoid"), 0, 2).write(1)
    record(tmp_path, 1, 2, [{5: scores(3, EXPERTS)}])
    assert open_scores(tmp_path).layers == (5,)


def layers(*shapes: tuple[int, int]) -> dict[int, Tensor]:
    return {number: scores(*shape) for number, shape in enumerate(shapes, 2)}


def test_run_folders_that_cannot_be_replayed(tmp_path: Path) -> None:
    whole = [layers((3, 4), (3, 4))] * 3
    record(tmp_path / "gap", 0, 1, whole)
    (tmp_path / "gap" / "scores" / FILE.format(step=2, rank=0)).unlink()
    assert "step 2 is missing between step 1 and step 3" in refusal(tmp_path / "gap")
    for rank in (0, 1):
        record(tmp_path / "ranks", rank, 2, whole)
    (tmp_path / "ranks" / "scores" / FILE.format(step=3, rank=1)).unlink()
    assert "step 3 is incomplete: rank 1 of 2 wrote no file" in refusal(tmp_path / "ranks")
    record(tmp_path / "widths", 0, 1, [layers((3, 4), (3, 8))])
    assert "different numbers of experts (layer 2: 4, layer 3: 8)" in refusal(tmp_path / "widths")
    record(tmp_path / "tokens", 0, 1, [layers((3, 4), (2, 4))])
    assert "different numbers of tokens (layer 2: 3, layer 3: 2)" in refusal(tmp_path / "tokens")
    record(tmp_path / "mixed", 0, 1, whole[:1])
    record(tmp_path / "mixed", 0, 1, [layers((3, 4))], first=2)
    assert "step 2 has other layers, experts, gating or sequences than step 1" in refusal(tmp_path / "mixed")
    record(tmp_path / "topk", 0, 1, whole, topk=9)
    assert "holds topk 9" in refusal(tmp_path / "topk")
    ScoreRecorder(tmp_path / "none", {}, Gating(2, "sigmoid"), 0, 1).write(1)
    assert "step 1 is empty" in refusal(tmp_path / "none")


def test_files_that_are_damaged_or_from_elsewhere(tmp_path: Path) -> None:
    record(tmp_path, 0, 1, [layers((3, 4))] * 2)
    path = tmp_path / "scores" / FILE.format(step=2, rank=0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(SettingError, match="truncated"):
        open_scores(tmp_path)
    for tensors, about, message in (
        ({}, {"format": "2"}, "is of format 2, this version reads 1"),
        ({"layer_2": scores(3, 4).half()}, {"format": "1"}, "layer_2 is no float32"),
        ({"weight": scores(3, 4)}, {"format": "1"}, "weight is no float32"),
        ({}, {"format": "1"}, "metadata that cannot be read"),
        ({}, {"format": "1", "ranks": "two"}, "metadata that cannot be read"),
    ):
        save_file(tensors, path, metadata=about)
        with pytest.raises(SettingError, match=message):
            open_scores(tmp_path)
    path.write_bytes(whole)
    assert open_scores(tmp_path).steps == 2


def test_a_write_that_fails_leaves_no_file_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        record(tmp_path, 0, 1, [layers((3, 4))])
    assert not list((tmp_path / "scores").glob("step_*"))


def test_clear_takes_away_recorded_steps_and_nothing_else(tmp_path: Path) -> None:
    record(tmp_path, 0, 1, [layers((3, 4))] * 3)
    (tmp_path / "scores" / "thesis.txt").write_text("years of work")
    remove_recorded_scores(tmp_path, after=2)
    assert open_scores(tmp_path).steps == 2
    remove_recorded_scores(tmp_path)
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["thesis.txt"]
