"""The page: well-formed, alone, and harmless whatever a model is called."""

from html.parser import HTMLParser

import pytest

from hybrid_tools.inspection.facts import (
    CURVE,
    Correlation,
    Curve,
    LayerFacts,
    PlacementLayer,
    PopularityFacts,
    PredictorLayer,
    ProfileFacts,
    Report,
    TensorFacts,
)
from hybrid_tools.inspection.page import MOST_OPEN_ROWS, UNKNOWN, render_page

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"
SVG = '<svg viewBox="0 0 1 1"><path d="M0 0"/></svg>'


class Page(HTMLParser):
    """What is in a page: tags that were opened, attributes, text by the element it stands in; nesting is checked."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.texts = [], [], [], {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open:
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def layer_of(layer_idx, num_experts):
    curve = Curve(tuple(CURVE), (0.125, 0.25, 0.75), 0.0625)
    experts = (1 / num_experts,) * num_experts if num_experts > 1 else ()
    return LayerFacts(
        layer_idx,
        zero_share=0.9,
        expert_zero_shares=(0.875,) * (num_experts - 1) + (None,),
        firing=curve,
        spread=3.5,
        expert_shares=experts,
        expert_entropy=2.0 if experts else None,
        transition_bits=None,
    )


def report_of(num_layers=3, num_experts=4, title="t", model="m", **rest):
    profile = ProfileFacts(
        model=model,
        num_tokens=12345,
        num_texts=2,
        intermediate_size=96,
        num_experts=num_experts,
        num_experts_per_tok=2.0 if num_experts > 1 else 1.0,
        zero_share=0.9,
        firing=Curve(tuple(CURVE), (0.1, 0.2, 0.7), 0.05),
        layers=tuple(layer_of(idx, num_experts) for idx in range(num_layers)),
        transitions=(),
        correlation=Correlation(1, 2, (0, 5), ((1.0, 0.5), (0.5, 1.0))),
    )
    return Report(title, profile, **rest)


FULL = {
    "predictors": (PredictorLayer(0, "mlp", 64, 0.972, None, 0.1, 0.05, 4096),),
    "placement": (PlacementLayer(0, 30, 50, 20, "output"), PlacementLayer(1, 100, 0, 0, "none")),
    "popularity": PopularityFacts(2, 2, ((2, 1), (0, 3)), ((1, 0), (0, 1))),
    "histograms": (TensorFacts("mlp.h2", 100, ((0.1, 0.25, 0.5, 0.75), (0.1, 0.3, 0.5, 0.75))),),
}


def test_everything_that_is_known_is_on_the_page():
    page = Page(render_page(report_of(**FULL, remarks=("no plan; run hybrid-place",)), {"zeros": SVG}))
    headings = page.texts["h2"]
    assert headings == [
        "Sparsity",
        "Concentration",
        "Experts",
        "Neurons that fire together",
        "Predictors",
        "Placement",
        "Published popularity of experts",
        "Published activations",
    ]
    assert "no plan; run hybrid-place" in page.texts["p"]
    assert "12,345 tokens of 2 texts" in page.texts["dd"]
    assert "20.0 % of the model's neurons make 80 % of all firings; 5.0 % never fired" in page.texts["dd"]
    cells = page.texts["td"]
    for expected in ("90.0 %", "25.0 %", "6.2 %", "2.000", "3.50", "97.2 %", "4.00 KiB", "0.25", "1 0", UNKNOWN):
        assert expected in cells, expected
    assert "130 (65.0 %)" in cells  # of the model's neurons on the GPU
    assert page.tags.count("svg") == page.tags.count("figure") == 1


def test_sections_are_left_out_where_nothing_is_known():
    page = Page(render_page(report_of(num_experts=1), {}))
    assert page.texts["h2"] == ["Sparsity", "Concentration", "Neurons that fire together"]
    loose = Page(render_page(Report("t", popularity=FULL["popularity"]), {}))
    assert loose.texts["h2"] == ["Published popularity of experts"]
    assert "dl" not in loose.tags
    assert "nav" not in loose.tags


def test_names_from_files_are_text_and_nothing_else():
    predictors = (PredictorLayer(0, HOSTILE, 64, 0.9, 0.5, 0.1, 0.05, 4096),)
    placement = (PlacementLayer(0, 1, 1, 1, HOSTILE),)
    histograms = (TensorFacts(HOSTILE, 100, ((0.1, 0.25, 0.5, 0.75),)),)
    html = render_page(
        report_of(
            title=HOSTILE,
            model=HOSTILE,
            remarks=(HOSTILE,),
            predictors=predictors,
            placement=placement,
            histograms=histograms,
        ),
        {HOSTILE: SVG},
    )
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "49" not in page.texts["h1"][0]  # a template in a name is text, too
    for tag in ("h1", "title", "p", "dd"):
        assert HOSTILE in page.texts[tag]
    assert page.texts["td"].count(HOSTILE) == 2


def test_page_needs_nothing_else_and_runs_nothing():
    html = render_page(report_of(**FULL), {"zeros": SVG})
    page = Page(html)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert links
    assert all(link.startswith("#section-") for link in links)
    policies = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "@import" not in html
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html


def test_links_lead_to_sections():
    page = Page(render_page(report_of(**FULL), {}))
    targets = [value for name, value in page.attributes if name == "href"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert [target.removeprefix("#") for target in targets] == ids


@pytest.mark.parametrize(("num_layers", "is_folded"), [(MOST_OPEN_ROWS - 1, False), (MOST_OPEN_ROWS + 1, True)])
def test_long_tables_are_folded(num_layers, is_folded):
    page = Page(render_page(report_of(num_layers=num_layers), {}))
    assert ("details" in page.tags) == is_folded


def test_page_without_pictures_says_how_to_get_them():
    with_pictures = Page(render_page(report_of(), {"zeros": SVG}))
    without = Page(render_page(report_of(), {}))
    (line,) = [text for text in without.texts["p"] if "no pictures" in text]
    assert "pip install 'hybrid-runtime[plots]'" in line
    assert not [text for text in with_pictures.texts["p"] if "no pictures" in text]
    assert "table" in without.tags


def test_pictures_that_no_section_knows_are_shown_at_the_end():
    page = Page(render_page(report_of(), {"zeros": SVG, "new": SVG}))
    assert page.texts["h2"][-1] == "More pictures"
    assert page.tags.count("svg") == 2
