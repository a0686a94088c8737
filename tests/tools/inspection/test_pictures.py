"""The report's pictures: each is drawn for every shape of model, holds something, and is fit for a page."""

import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from hybrid_runtime.profiling.profile import LayerCounts, Profile, TextDigest
from hybrid_tools.inspection.facts import (
    PlacementLayer,
    PopularityFacts,
    PredictorLayer,
    Report,
    TensorFacts,
    profile_facts,
)

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra plots)")

from hybrid_tools.inspection.figures import PNG_DPI, clean, save_png, to_svg  # noqa: E402
from hybrid_tools.inspection.pictures import draw_histograms, pictures_of  # noqa: E402


def profile(num_layers=3, experts=4, neurons=32, name="a model", window=64):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for layer_idx in range(num_layers):
        tokens = torch.randint(100, 1000, (experts,), generator=generator)
        fired = (torch.rand(experts, neurons, generator=generator) ** (layer_idx + 2) * tokens.unsqueeze(1)).long()
        has_next = experts > 1 and layer_idx < num_layers - 1
        follows = torch.randint(0, 500, (experts, experts), generator=generator)
        layers.append(
            LayerCounts(
                fired=fired,
                tokens=tokens,
                active_squares=(fired.sum(1).double().square() / tokens + 3 * fired.sum(1)).long(),
                co_fired=torch.minimum(fired[:, :6, None], fired[:, None, :6]) // 2,
                follows=follows if has_next else torch.zeros(0, 0, dtype=torch.int64),
            )
        )
    num_tokens = int(layers[0].tokens.sum()) // (2 if experts > 1 else 1)
    texts = (TextDigest("0" * 64, num_tokens),)
    held_out = torch.zeros(0, window, dtype=torch.int32)
    return Profile(name, "1" * 64, texts, window, torch.arange(6), tuple(layers), held_out)


def report(num_layers=3, experts=4, name="a model"):
    predictors = tuple(PredictorLayer(idx, "trained", 8, 0.97, None, 0.1, 0.06, 999) for idx in range(num_layers))
    placement = tuple(PlacementLayer(idx, 32, 64, 32, "output") for idx in range(num_layers))
    places = tuple(tuple(range(4 * idx, 4 * idx + 4)) for idx in range(num_layers))
    order = tuple((0, 1, 2, 3) for _ in range(num_layers))
    magnitudes = tuple((0.1, 0.2, 0.5, 1.0 + idx) for idx in range(num_layers))
    return Report(
        name,
        profile=profile_facts(profile(num_layers, experts, name=name)),
        predictors=predictors,
        placement=placement,
        popularity=PopularityFacts(num_layers, 4, places, order),
        histograms=(TensorFacts("mlp.h1", 100, magnitudes), TensorFacts("mlp.h2", 100, magnitudes)),
    )


def pixels(path):
    from matplotlib.image import imread  # noqa: PLC0415

    return imread(path)


def names(shown):
    return [picture.name for picture in pictures_of(shown)]


COMMON = ["zeros", "shares", "dead"]
REST = ["spread", "correlation", "predictors", "placement", "popularity", "histograms"]


def test_a_mixture_has_all_pictures_and_a_dense_model_those_without_experts():
    assert names(report()) == [*COMMON, "experts", "transitions", *REST]
    assert names(report(experts=1)) == [*COMMON, *REST]
    assert names(Report("nothing")) == []


@pytest.mark.parametrize("picture", pictures_of(report()), ids=lambda picture: picture.name)
def test_a_picture_is_of_its_size_and_not_empty(picture, tmp_path):
    figure = picture.draw()
    save_png(figure, tmp_path / "picture.png")
    image = pixels(tmp_path / "picture.png")
    width, height = figure.get_size_inches() * PNG_DPI
    assert abs(image.shape[0] - height) <= 1
    assert abs(image.shape[1] - width) <= 1
    assert image.shape[1] == 990
    assert 0.005 < (image[..., :3] < 0.9).any(axis=2).mean() < 0.95  # neither blank nor black
    assert list(tmp_path.iterdir()) == [tmp_path / "picture.png"]
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert labels or picture.name == "transitions"


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1)], ids=["L1-E1", "L1-E4", "L2-E1"])
def test_a_model_of_any_shape_is_drawn(shape):
    for picture in pictures_of(Report("x", profile_facts(profile(*shape)))):
        picture.draw().savefig(io.BytesIO(), format="png", dpi=20)


def test_a_large_mixture_keeps_one_small_map_for_each_pair_of_layers():
    facts = profile_facts(profile(32, 8, 16))
    (transitions,) = [picture for picture in pictures_of(Report("x", facts)) if picture.name == "transitions"]
    figure = transitions.draw()
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == 31
    assert [axes.get_title(loc="left").split("\n")[0] for axes in maps][-1] == "30 → 31"


def test_a_model_that_never_fires_is_drawn():
    silent = profile(2, 1)
    layers = tuple(
        LayerCounts(torch.zeros_like(each.fired), each.tokens, each.tokens * 0, each.co_fired * 0, each.follows)
        for each in silent.layers
    )
    facts = profile_facts(Profile("silent", "1" * 64, silent.texts, 64, silent.watched, layers, silent.held_out))
    assert facts.firing is None
    pictures = pictures_of(Report("silent", facts))
    assert [picture.name for picture in pictures] == ["zeros"]
    pictures[0].draw()


def test_an_svg_stands_alone_in_a_page():
    picture = pictures_of(report())[0]
    svg = to_svg(picture.draw(), "zeros")
    assert svg == to_svg(picture.draw(), "zeros")  # the same facts, the same bytes
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("width") is None
    assert root.get("viewBox").split()[:2] == ["0", "0"]
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) > 5
    assert all(each.startswith("zeros-") for each in ids)
    assert set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
    assert "currentColor" in svg
    assert "<script" not in svg
    assert not [each for each in re.findall(r'href="([^"]+)"', svg) if each[0] != "#" and not each.startswith("data:")]


def test_a_picture_of_cells_carries_its_own_pixels():
    (experts,) = [picture for picture in pictures_of(report()) if picture.name == "experts"]
    svg = to_svg(experts.draw(), "experts")
    links = re.findall(r'href="([^"]{1,30})', svg)
    assert any(each.startswith("data:image/png") for each in links)
    assert all(each.startswith(("#", "data:image/png")) for each in links)


@pytest.mark.parametrize("name", ["$\\frac{a}$", "<script>alert(1)</script>", "a\x00b\nc", "x" * 400, "{}%s", "モデル"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_models_name_is_text_and_nothing_else(name):
    picture = pictures_of(report(name=name))[0]
    svg = to_svg(picture.draw(), "zeros")
    ET.fromstring(svg)
    assert "<script" not in svg


def test_names_become_short_and_printable():
    assert clean("a\nb") == "a?b"
    assert len(clean("x" * 400)) < 60
    assert clean("$x$") == r"\$x\$"


def test_numbers_in_a_map_are_readable_on_their_cell():
    (experts,) = [picture for picture in pictures_of(report()) if picture.name == "experts"]
    figure = experts.draw()
    texts = figure.axes[0].texts
    assert len(texts) == 12
    assert {text.get_color() for text in texts} == {"black", "white"}
    totals = [sum(float(text.get_text()) for text in texts[start : start + 4]) for start in (0, 4, 8)]
    # a share is of the tokens that layer 0 saw, whose experts are chosen two at a time
    np.testing.assert_allclose(totals, 200, atol=2)


def test_published_tensors_share_one_legend():
    magnitudes = ((0.1, 0.2, 0.3, 0.4), (0.2, 0.3, 0.4, 0.5))
    figure = draw_histograms([TensorFacts("mlp.h1", 1, magnitudes)] * 3)
    assert len([axes for axes in figure.axes if axes.lines]) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["25 %", "50 %", "75 %", "90 %"]
