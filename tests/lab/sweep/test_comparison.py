"""The picture of several runs, drawn from run folders that a small simulation of a router fills."""

import json

import numpy as np
import pytest
from PIL import Image

from alflb_megatron.lab.display.plot_style import COLOURS, trailing_mean
from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.lab.records.summary import summarise
from alflb_megatron.lab.sweep.comparison import comparison_figure, plot_comparison
from alflb_megatron.metrics import sampling_floor


class Router:
    """Loads of `layers` simulated routers: tokens of clusters, scores that drift, and a bias that may respond.

    It stands in for nothing but the *files* of a run: figures drawn from it are not results.
    """

    def __init__(self, rate, layers=3, experts=16, topk=2, tokens=512, seed=0):
        self.rate, self.topk, self.tokens = rate, topk, tokens
        self.generator = np.random.default_rng(seed)
        self.weights_LCE = self.generator.normal(size=(layers, 40, experts)) + self.generator.normal(size=experts)
        self.bias_LE = np.zeros((layers, experts))

    def step(self):
        self.weights_LCE += 0.02 * self.generator.normal(size=self.weights_LCE.shape)
        loads_LE = self.loads(self.tokens)
        self.bias_LE += self.rate * np.sign(loads_LE.mean(1, keepdims=True) - loads_LE)
        return loads_LE

    def loads(self, tokens):
        rows = []
        for weights_CE, bias_E in zip(self.weights_LCE, self.bias_LE, strict=True):
            clusters_T = self.generator.integers(0, len(weights_CE), size=tokens)
            logits_TE = weights_CE[clusters_T] + 0.7 * self.generator.normal(size=(tokens, len(bias_E)))
            biased_TE = 1 / (1 + np.exp(-logits_TE)) + bias_E
            chosen_TK = np.argpartition(-biased_TE, self.topk, axis=1)[:, : self.topk]
            rows.append(np.bincount(chosen_TK.ravel(), minlength=len(bias_E)))
        return np.array(rows)


def maxvio(loads_LE):
    return loads_LE.max(1) / loads_LE.mean(1) - 1


def simulate_run(path, rule, rate, steps=40, **sizes):
    """Fills the run folder `path` from a simulated router whose bias moves by `rate`."""
    router = Router(rate, **sizes)
    layers = list(range(2, 2 + len(router.bias_LE)))
    with RunFolder(path) as folder:
        settings = {"job": {"preset": "tiny", "data": "stdlib", "steps": steps}, "model": {"topk": router.topk}}
        folder.write_config(settings, {"rule": rule}, {}, {"total": 1_930_000, "active": 920_000})
        for step in range(1, steps + 1):
            loads_LE = router.step()
            record = {
                "step": step, "loss": 5.5 * step**-0.15, "lr": 1e-3, "grad_norm": None, "seconds": 0.2,
                "tokens": router.tokens, "tokens_per_second": router.tokens / 0.2,
                "maxvio_mean": maxvio(loads_LE).mean(), "maxvio_max": maxvio(loads_LE).max(),
                "bias_spread": float(np.ptp(router.bias_LE, axis=1).max()), "layers": layers,
                "loads": loads_LE.tolist(), "bias": router.bias_LE.tolist(),
            }  # fmt: skip
            folder.append(record)
        loads_LE = router.loads(20 * router.tokens)
        folder.write_summary({
            **summarise(folder.records()), "rule": rule, "validation_loss": 2.5, "validation_loads": loads_LE.tolist(),
            "maxvio_global_mean": maxvio(loads_LE).mean(), "maxvio_global_max": maxvio(loads_LE).max(),
            "sequence_floor": None, "checkpoint": None, "run": str(path),
        })  # fmt: skip
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {rule: simulate_run(root / rule, rule, rate) for rule, rate in (("none", 0), ("slow", 3e-3), ("fast", 3e-2))}


@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "expected"),
    [
        (1, 1, 8, 7.0),  # one expert holds everything: 1 / (1/8) - 1
        (1, 3, 6, 1.0),
        (1000, 4, 4, 0.0),  # every expert gets every token
        (2, 1, 2, 0.5),  # two tokens meet with probability 1/2: MaxVio 1, else 0
        (2, 2, 4, 5 / 6),  # two pairs of four are disjoint with probability 1/6: MaxVio 0, else 1
    ],
)
def test_sampling_floor_of_cases_worked_by_hand(tokens, topk, experts, expected):
    assert sampling_floor(tokens, topk, experts, draws=4000 if tokens < 10 else 200) == pytest.approx(
        expected, abs=0.03
    )


def test_sampling_floor_agrees_with_shuffled_experts_and_falls_with_the_root_of_the_tokens():
    generator = np.random.default_rng(1)
    other = []
    for _ in range(300):
        chosen = generator.random((1024, 16)).argsort(axis=1)[:, :2]
        other.append(np.bincount(chosen.ravel(), minlength=16).max() / 128 - 1)
    assert sampling_floor(1024, 2, 16) == pytest.approx(np.mean(other), rel=0.1)
    assert sampling_floor(4096, 2, 16) == pytest.approx(sampling_floor(1024, 2, 16) / 2, rel=0.1)
    assert sampling_floor(1024, 2, 16) == sampling_floor.__wrapped__(1024, 2, 16)  # the seed is fixed


@pytest.mark.parametrize("sizes", [(0, 1, 4), (8, 0, 4), (8, 5, 4)])
def test_sampling_floor_refuses_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="distinct experts"):
        sampling_floor(*sizes)


def test_smoothing_is_a_trailing_mean_over_fewer_steps_at_the_start():
    np.testing.assert_allclose(trailing_mean(np.array([4.0, 2.0, 0.0, 6.0]), 3), [4.0, 3.0, 2.0, 8 / 3])


def test_the_picture_has_its_axes_lines_and_labels(runs):
    figure = comparison_figure(runs)
    lines, *maps, bar = figure.axes
    assert len(maps) == 3
    assert lines.get_yscale() == "log" and "MaxVio" in lines.get_ylabel()
    assert lines.get_xlabel() == "training step   (thin: every global batch; thick: mean of the last 10 steps)"
    legend = [text.get_text() for text in lines.get_legend().get_texts()]
    assert legend[:3] == ["none", "slow", "fast"] and legend[3].startswith("sampling floor")
    assert len(lines.lines) == 3 * 2 + 1
    floor = lines.lines[-1]
    assert floor.get_linestyle() != "-" and set(floor.get_ydata()) == {sampling_floor(512, 2, 16)}
    for axes in maps:
        image = axes.images[0]
        assert image.get_array().shape == (3, 16)
        assert image.norm(1.0) == pytest.approx(0.5), "the colour scale is centred on the mean load"
        assert image.norm.vmax == maps[0].images[0].norm.vmax
        assert axes.get_xlabel() == "expert"
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["2", "3", "4"]
    assert maps[0].get_ylabel() == "MoE layer" and "mean" in bar.get_ylabel()
    title = figure.get_suptitle()
    for part in ("tiny", "3 MoE layers", "16 routed experts", "top-2", "1.9M", "standard library", "512 tokens"):
        assert part in title


def test_the_heat_map_shows_each_layers_loads_over_their_mean(runs):
    axes = comparison_figure({"none": runs["none"]}).axes[1]
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown.mean(axis=1), 1.0)
    assert shown.max() > 1.5, "the simulated router is uneven without a bias"


def test_the_png_is_written_and_is_not_blank(runs, tmp_path):
    out = plot_comparison(runs, tmp_path / "new" / "comparison.png")
    assert out == tmp_path / "new" / "comparison.png" and out.stat().st_size < 200_000
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 1100 and 780 <= image.height <= 830
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert pixels[:400].var() > 100 and pixels[500:].var() > 100
    for colour in COLOURS[:3]:  # every run's line is there
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels[60:480] - rgb).max(axis=-1) < 12).sum() > 300


def test_layers_with_unequal_numbers_of_experts_and_runs_of_other_sizes_are_drawn(runs, tmp_path):
    path = simulate_run(tmp_path / "run", "sign", 1e-2, steps=5)
    summary = json.loads((path / "summary.json").read_text())
    summary["validation_loads"][1] = [5, 0, 7, 8]
    (path / "summary.json").write_text(json.dumps(summary))
    other = simulate_run(tmp_path / "other", "sign", 1e-2, steps=5, experts=8, layers=1)
    figure = comparison_figure({"unequal": path, "other": other})
    shown = np.asarray(figure.axes[1].images[0].get_array())
    np.testing.assert_allclose(shown[1, :4], [1.0, 0.0, 1.4, 1.6], atol=1e-6)
    assert np.ma.getmaskarray(figure.axes[1].images[0].get_array())[1, 4:].all() or np.isnan(shown[1, 4:]).all()
    assert len(figure.axes[0].lines) == 2 * 2 + 2, "runs of different sizes have different floors"
    assert plot_comparison({"unequal": path}, tmp_path / "p.png").exists()


def test_a_run_that_has_not_ended_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json is missing"):
        comparison_figure({"none": tmp_path})


def test_too_many_runs_are_refused(runs):
    with pytest.raises(ValueError, match="1 to 7 runs"):
        comparison_figure({str(i): runs["none"] for i in range(8)})
