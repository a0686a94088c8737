"""Statistics that others measured on real models, from ../shared/data/profiling: they load, say what is known, draw."""

import numpy as np
import pytest
from real.data import shared_data

from hybrid_tools.foreign_statistics import read_expert_popularity, read_histograms
from hybrid_tools.inspection.facts import Report, histogram_facts, popularity_facts

POPULARITY = "profiling/mixtral-8x7b_expert_popularity_fiddler.json"
HISTOGRAMS = "profiling/mistral-7b_activation_histograms.npz"
HIDDEN_VALUES, FFN_VALUES = 220_200_960, 770_703_360  # 53,760 tokens of 4,096 and of 14,336 values


def draw(report, name, tmp_path):
    """The only picture of the report, as pixels from 0 to 1."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra plots)")
    from matplotlib.image import imread  # noqa: PLC0415

    from hybrid_tools.inspection.figures import save_png  # noqa: PLC0415
    from hybrid_tools.inspection.pictures import pictures_of  # noqa: PLC0415

    (picture,) = pictures_of(report)
    assert picture.name == name
    save_png(picture.draw(), tmp_path / "picture.png")
    image = imread(tmp_path / "picture.png")
    assert image.shape[1] == 990
    assert image.shape[0] > 700
    return image[..., :3]


def test_mixtrals_experts_are_32_layers_of_8(tmp_path):
    popularity = read_expert_popularity(shared_data(POPULARITY))
    assert (popularity.num_layers, popularity.num_experts) == (32, 8)
    places = popularity.places()
    assert sorted(places.flatten()) == list(range(256))
    # the file begins with [9, 5], [11, 2], [10, 4]: numbers of layers, not places in a sorted list of names
    assert [places[9, 5], places[11, 2], places[10, 4]] == [0, 1, 2]
    facts = popularity_facts(popularity)
    assert facts.order[9][0] == 5
    image = draw(Report("Mixtral-8x7B", popularity=facts), "popularity", tmp_path)
    assert len(np.unique((image * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 200  # a colour for each place
    assert (image.min(axis=2) < 0.8).mean() > 0.4


def test_mistrals_histograms_are_32_layers_of_five_tensors(tmp_path):
    histograms = read_histograms(shared_data(HISTOGRAMS))
    assert histograms.num_layers == 32
    assert set(histograms.by_tensor) == {"self_attn.h1", "self_attn.h2", "mlp.h1", "mlp.h1.5", "mlp.h2"}
    for tensor, layers in histograms.by_tensor.items():
        expected = FFN_VALUES if tensor in ("mlp.h1.5", "mlp.h2") else HIDDEN_VALUES
        for histogram in layers:
            assert histogram.counts.shape == histogram.centers.shape == (10_000,)
            assert histogram.num_values == pytest.approx(expected, rel=1e-6)
    lowest = min(layer.centers[0] for layer in histograms.by_tensor["mlp.h1.5"])
    assert lowest == pytest.approx(-0.27846, abs=2**-12)  # SiLU's minimum, to half precision
    facts = histogram_facts(histograms)
    halves = [layer[1] for layer in next(each for each in facts if each.tensor == "mlp.h2").magnitudes]
    assert len(halves) == 32
    assert halves[0] < 0.001 < 0.01 < halves[31]  # the last layers speak up
    image = draw(Report("Mistral-7B", histograms=facts), "histograms", tmp_path)
    assert 0.01 < (image.min(axis=2) < 0.8).mean() < 0.3


def test_layers_stand_in_the_order_of_their_numbers():
    """Magnitudes grow from layer to layer; in the order 0, 1, 10, 11, ..., they would jump."""
    histograms = read_histograms(shared_data(HISTOGRAMS))
    sizes = np.log([layer.magnitude_of(0.5) for layer in histograms.by_tensor["mlp.h1"]])
    as_words = sorted(range(32), key=str)
    assert np.abs(np.diff(sizes)).sum() < 0.7 * np.abs(np.diff(sizes[as_words])).sum()
