"""One look a method, the same everywhere."""

from pathlib import Path

from pipeline.paper.palette import look, palette
from pipeline.settings.folders import conf_dir


def test_every_method_has_a_look_of_its_own():
    methods = {path.stem for path in (Path(conf_dir()) / "method").glob("*.yaml")}
    assert set(palette()) == methods
    looks = [tuple(sorted(look(method).items())) for method in methods]
    assert len(set(looks)) == len(looks)


def test_the_published_six_differ_in_lightness_or_hue_for_every_kind_of_colour_vision():
    """Distances after the usual matrices for missing red, green and blue cones (Viénot and others 1999)."""
    import numpy as np
    from matplotlib.colors import to_rgb

    six = ["fourier", "wavelet", "wavelet_fourier", "wavelet_tri", "tri", "turboquant"]
    lacking = {
        "none": np.eye(3),
        "red": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "green": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    colours = np.array([to_rgb(look(method)["color"]) for method in six]) ** 2.2
    for matrix in lacking.values():
        seen = np.clip(colours @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(6, 1)]
        assert distances.min() > 0.1


def test_on_the_page_the_ground_is_the_pages_own_and_white_letters_stay():
    """They stand on the dark cells of a map."""
    from pipeline.paper.hover import inline

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"><path style="fill: #ffffff" d="M 0 0"/>'
        '<text style="font-size: 8px; fill: #ffffff">0.33</text></svg>'
    )
    drawn = inline(svg, "name", "caption")
    assert 'style="fill: none"' in drawn and 'style="font-size: 8px; fill: #ffffff">0.33' in drawn
