"""Variants change one switch of a method, and the ablation has all of them."""

from pathlib import Path

import pytest

from pipeline.settings.compose import composed, sweep
from pipeline.settings.config import check
from pipeline.settings.folders import conf_dir

VARIANTS = sorted(path.stem for path in (Path(conf_dir()) / "variant").glob("*.yaml"))


def changed(variant: str) -> tuple[str, dict]:
    """The method of a variant, and its settings that differ from the method's own."""
    ours = composed([f"variant={variant}"])
    check(ours)
    plain = composed([f"method={ours.method.name}"])
    rest = {k: v for k, v in ours.items() if k != "method"}
    assert rest == {k: v for k, v in plain.items() if k != "method"}
    return ours.method.name, {k: v for k, v in ours.method.items() if plain.method[k] != v}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_one_switch(variant):
    method, settings = changed(variant)
    assert variant.startswith(f"{method}_")
    expected = {"default": 0, "v2": {"fourier": 3, "wavelet": 2, "wavelet_fourier": 5}[method]}
    assert len(settings) == expected.get(variant.removeprefix(f"{method}_"), 1)


def test_v2_is_all_switches_back_together():
    _, together = changed("wavelet_fourier_v2")
    apart = [changed(f"wavelet_fourier_{name}")[1] for name in (
        "box_window", "no_cascade", "fixed_alpha", "no_recency", "no_norm",
    )]  # fmt: skip
    assert together == {k: v for one in apart for k, v in one.items()}


def test_the_ablation_has_every_variant():
    assert sorted(job[1].removeprefix("variant=") for job in sweep("ablation", [])) == VARIANTS


def test_the_recent_window_is_swept_beside_its_default():
    jobs = [dict(o.split("=", 1) for o in job) for job in sweep("recent", [])]
    assert {job["budget.recent"] for job in jobs} == {"64", "128", "256"}
    methods = [job["method"] for job in jobs]
    assert all(methods.count(m) == 3 for m in methods) and len(set(methods)) == 12
