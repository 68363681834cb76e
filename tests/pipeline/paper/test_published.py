"""The card's numbers, typed in once more: an altered number fails."""

from pipeline.paper import published

CARD = {
    "perturbation": """
        WaveletKV 0.484 3.278
        WaveletTriAttn 0.515 3.346
        WaveletFourierKV 0.556 3.711
        FourierKV 0.563 3.814
        TriAttentionKV 0.579 3.698
        TurboQuant-4bit 0.592 3.581""",
    "perplexity": """
        TurboQuant-4bit 1.09 +0.079
        WaveletTriAttn 3.37 +2.353
        TriAttentionKV 4.45 +3.421
        WaveletKV 4.99 +3.960
        WaveletFourierKV 5.20 +4.172
        FourierKV 5.65 +4.613""",
    "drift": """
        WaveletKV 3.10 3.24 +0.14 Stable
        WaveletTriAttn 3.60 3.65 +0.05 Stable
        TriAttentionKV 3.35 3.41 +0.06 Stable
        FourierKV 3.54 3.91 +0.37 Increasing
        WaveletFourierKV 4.50 4.06 -0.44 Self-correcting""",
    "throughput": """
        FourierKV 33.2 1.07 3.1
        WaveletKV 33.2 1.00 6.2
        WaveletFourierKV 32.4 0.98 3.1
        WaveletTriAttn 33.1 0.99 1.5
        TriAttentionKV 33.0 1.03 3.1
        TurboQuant-4bit 26.3 0.80 1.5""",
    "compression": """
        FourierKV 7.1 7.1
        WaveletKV 7.1 7.1
        WaveletFourierKV 7.1 7.1
        WaveletTriAttn 7.1 7.1
        TriAttentionKV 7.1 7.1
        TurboQuant-4bit 1.0""",
}
COLUMNS = {
    "perturbation": ("mean", "max"),
    "perplexity": ("comp", "nd"),
    "drift": ("first", "last", "change", "profile"),
    "throughput": ("tok_s", "speedup", "match"),
    "compression": ("ratio", "mb"),
}
METHODS = {
    "WaveletKV": "wavelet",
    "WaveletTriAttn": "wavelet_tri",
    "WaveletFourierKV": "wavelet_fourier",
    "FourierKV": "fourier",
    "TriAttentionKV": "tri",
    "TurboQuant-4bit": "turboquant",
}


def parsed(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def test_published_numbers_are_those_of_the_card():
    expected = {}
    for name, text in CARD.items():
        lines = [line.split() for line in text.strip().splitlines()]
        expected[name] = {
            METHODS[method]: dict(zip(COLUMNS[name], map(parsed, numbers), strict=False)) for method, *numbers in lines
        }
    assert published.card()["tables"] == expected


def test_the_key_findings_are_those_of_the_card():
    found = published.card()["findings"]
    assert [text.split()[0] for text in found] == ["WaveletKV", "WaveletTriAttention", "All", "WaveletFourierKV", "No"]
    assert "18% lower than TurboQuant" in found[0] and "86% memory savings" in found[2]
    assert published.card()["source"]["address"].endswith("chriskz/spectral-kv-benchmark")


def test_works_that_are_cited_are_linked():
    from pipeline.paper.report import words

    cited = published.references({"tri"})
    assert "[arXiv:2604.04921](https://arxiv.org/abs/2604.04921), equations" in cited[1] and len(cited) > 2
    assert 'href="https://huggingface.co/chriskz/spectral-kv-benchmark"' in words(cited[0])
