import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pipeline.settings.folders import PACKAGE
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.backends.torch_statistics import read_pt
from spectral_kv.calibration import Accumulator, QueryStatistics, observe

SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.2,
)


@pytest.fixture
def statistics(rng) -> QueryStatistics:
    """Of 2 layers, 3 query heads and 4 bands; modulus above |mu| as queries have it."""
    mu = rng.normal(size=(2, 3, 4)) + 1j * rng.normal(size=(2, 3, 4))
    return QueryStatistics(mu, np.abs(mu) + rng.random((2, 3, 4)), {"model": "x"})


def authors_format(statistics: QueryStatistics, **metadata) -> dict:
    """What the authors' calibration script saves."""
    heads = list(np.ndindex(statistics.mu.shape[:2]))
    tensors = {
        "q_mean_real": torch.from_numpy(statistics.mu.real.astype(np.float32)),
        "q_mean_imag": torch.from_numpy(statistics.mu.imag.astype(np.float32)),
        "q_abs_mean": torch.from_numpy(statistics.modulus.astype(np.float32)),
    }
    described = {"rope_style": "half", "head_dim": 2 * statistics.mu.shape[2], "model_name": "a/b"}
    return {
        "metadata": described | {"sampled_heads": [list(x) for x in heads]} | metadata,
        "stats": {f"layer{x:02d}_head{y:02d}": {k: v[x, y].clone() for k, v in tensors.items()} for x, y in heads},
    }


def test_statistics_over_chunks_are_those_of_the_whole(rng):
    queries = rng.normal(size=(2, 4, 100, 16)) + 1.0  # layers, heads, tokens, dim
    sums = Accumulator(2, 4, 8)
    for layer in range(2):
        for part in np.split(queries[layer], [7, 40], axis=1):
            sums.add(layer, part)
    statistics = sums.statistics(text="noise")
    z = queries[..., :8] + 1j * queries[..., 8:]
    np.testing.assert_allclose(statistics.mu, z.mean(axis=2))
    np.testing.assert_allclose(statistics.modulus, np.abs(z).mean(axis=2))
    assert (statistics.modulus >= np.abs(statistics.mu)).all()
    assert statistics.metadata == {"text": "noise", "tokens": "100"}


@pytest.mark.parametrize(
    "family, config, module",
    [(Qwen2ForCausalLM, Qwen2Config, "q_proj"), (Qwen3ForCausalLM, Qwen3Config, "q_norm")],
    ids=["bias", "query norm"],
)
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_observed_queries_turn_back_to_what_the_model_had_before_rotation(family, config, module, kind, tmp_path, rng):
    """Statistics from the queries of attention, rotated back, are those of a hook in front of the rotation."""
    torch.manual_seed(0)
    rotation = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "yarn":
        rotation |= {"factor": 4.0, "original_max_position_embeddings": 128}
    model = family(config(**SIZES, rope_parameters=rotation))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "q_norm.weight")):
            torch.nn.init.normal_(parameter, std=3.0)
    model.save_pretrained(tmp_path)
    backend = TorchBackend(str(tmp_path), device="cpu", dtype="float32", cache_dtype="float32")
    hooked, projected = {}, {}
    for index, block in enumerate(backend.model.model.layers):
        for watched, into in ((module, hooked), ("q_proj", projected)):
            getattr(block.self_attn, watched).register_forward_hook(
                lambda module, inputs, output, index=index, into=into: into.update({index: output.reshape(-1, 4, 16)})
            )
    tokens = rng.integers(300, size=200)
    expected = Accumulator(2, 4, 8)
    for layer, queries in enumerate(backend.prefill(tokens, observe=len(tokens)).queries):
        plain = hooked[layer].transpose(0, 1)
        unrotated = backend.rope.unrotate(queries, np.arange(len(tokens)))
        torch.testing.assert_close(unrotated, plain, atol=1e-3, rtol=1e-3)
        expected.add(layer, plain.numpy())
        assert (queries - plain).abs().max() > 1  # the rotation is not the identity
        if module == "q_norm":  # a hook on the projection would miss the norm
            assert (unrotated - projected[layer].transpose(0, 1)).abs().max() > 1
        else:  # and one on its product would miss the bias
            assert backend.model.model.layers[layer].self_attn.q_proj.bias.abs().max() > 1
    measured = observe(backend, [tokens]).statistics()
    assert measured.metadata == {"tokens": "200"}
    np.testing.assert_allclose(measured.mu, expected.statistics().mu, atol=1e-3)
    np.testing.assert_allclose(measured.modulus, expected.statistics().modulus, atol=1e-3)


def test_a_file_comes_back_as_it_was(tmp_path, statistics):
    statistics.save(tmp_path / "s.safetensors")
    loaded = QueryStatistics.load(tmp_path / "s.safetensors", (2, 3, 4))
    np.testing.assert_allclose(loaded.mu, statistics.mu, rtol=1e-6)
    np.testing.assert_allclose(loaded.modulus, statistics.modulus, rtol=1e-6)
    assert loaded.metadata == {"model": "x"}
    with pytest.raises(ValueError, match=r"\[2, 3, 4\], this model has \[3, 4, 8\]"):
        QueryStatistics.load(tmp_path / "s.safetensors", (3, 4, 8))


def test_the_embedded_statistics_have_a_norm_term():
    folder = PACKAGE / "reference_model"
    config = AutoConfig.from_pretrained(folder / "checkpoint")
    dim = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_attention_heads, dim // 2)
    statistics = QueryStatistics.load(folder / "query_statistics.safetensors", shape)
    assert (statistics.modulus > np.abs(statistics.mu)).all()
    assert 0.1 < (np.abs(statistics.mu) / statistics.modulus).mean() < 0.99


def test_refuses_other_files(tmp_path):
    (tmp_path / "text").write_text("not tensors")
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors"):
        with pytest.raises(ValueError, match="does not hold query statistics"):
            QueryStatistics.load(tmp_path / name, (1, 1, 1))


@pytest.mark.parametrize("wrong, found", [(0.9, "0.9"), (np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1")])
def test_refuses_statistics_that_no_queries_have(wrong, found, tmp_path):
    """A mean longer than the mean modulus, or no number; in either format, and the sentence says where."""
    statistics = QueryStatistics(np.ones((2, 3, 4), complex), np.ones((2, 3, 4)))
    statistics.modulus[1, 2, 3] = wrong
    statistics.save(tmp_path / "s.safetensors")
    torch.save(authors_format(statistics), tmp_path / "s.pt")
    where = rf"in 1 bands, first in band 3 of layer 1, query head 2, the mean modulus \({found}\)"
    with pytest.raises(ValueError, match=where):
        QueryStatistics.load(tmp_path / "s.safetensors", (2, 3, 4))
    with pytest.raises(ValueError, match=where):
        read_pt(tmp_path / "s.pt")


def test_equal_queries_are_possible_whatever_rounding_does(tmp_path, statistics):
    QueryStatistics(statistics.mu, np.abs(statistics.mu) * (1 - 1e-6)).save(tmp_path / "s.safetensors")
    QueryStatistics.load(tmp_path / "s.safetensors", (2, 3, 4))


def test_refuses_a_mean_that_is_not_a_number(tmp_path, statistics):
    statistics.mu[0, 0, 0] = np.nan
    statistics.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="band 0 of layer 0, query head 0"):
        QueryStatistics.load(tmp_path / "s.safetensors", (2, 3, 4))


def test_reads_the_files_of_the_authors_in_any_order_of_heads(tmp_path, statistics):
    content = authors_format(statistics)
    content["stats"] = dict(reversed(content["stats"].items()))
    torch.save(content, tmp_path / "s.pt")
    loaded = read_pt(tmp_path / "s.pt")
    assert loaded.mu.shape == (2, 3, 4)
    np.testing.assert_allclose(loaded.mu, statistics.mu, rtol=1e-6)
    np.testing.assert_allclose(loaded.modulus, statistics.modulus, rtol=1e-6)
    assert loaded.metadata == {"rope_style": "half", "head_dim": "8", "model_name": "a/b"}
    loaded.save(tmp_path / "s.safetensors")
    again = QueryStatistics.load(tmp_path / "s.safetensors", (2, 3, 4))
    np.testing.assert_array_equal(again.mu, loaded.mu)
    np.testing.assert_array_equal(again.modulus, loaded.modulus)
    assert again.metadata == loaded.metadata


def test_reads_16_bit_tensors_and_metadata_that_name_neither_rotation_nor_size(tmp_path, statistics):
    content = authors_format(statistics)
    content["metadata"] = {}
    for head in content["stats"].values():
        head.update({part: tensor.bfloat16() for part, tensor in head.items()})
    torch.save(content, tmp_path / "s.pt")
    np.testing.assert_allclose(read_pt(tmp_path / "s.pt").modulus, statistics.modulus, rtol=1e-2)


class Hostile:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save, trusting_load",
    [
        (torch.save, lambda path: torch.load(path, weights_only=False)),
        (lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)), lambda path: pickle.loads(path.read_bytes())),
    ],
    ids=["archive", "pickle"],
)
def test_executes_nothing_of_a_file(save, trusting_load, tmp_path, statistics):
    save(authors_format(statistics) | {"more": Hostile(tmp_path / "made")}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        read_pt(tmp_path / "s.pt")
    assert not (tmp_path / "made").exists()
    trusting_load(tmp_path / "s.pt")
    assert (tmp_path / "made").exists()  # the object does what it says where a file is trusted


def drop_head(content):
    del content["stats"]["layer01_head00"]


def drop_part(content):
    del content["stats"]["layer01_head00"]["q_abs_mean"]


def drop_stats(content):
    del content["stats"]


def drop_first_layer(content):
    for head in range(3):
        del content["stats"][f"layer00_head{head:02d}"]


def drop_everything(content):
    content["stats"].clear()


def other_name(content):
    content["stats"]["layer1.head0"] = content["stats"].pop("layer01_head00")


def other_tensor(content):
    content["stats"]["layer01_head00"]["q_abs_mean"] = [1.0, 2.0, 3.0, 4.0]


def other_size(content):
    content["stats"]["layer01_head00"]["q_abs_mean"] = torch.ones(5)


def other_dimension(content):
    content["metadata"]["head_dim"] = 16


def interleaved(content):
    content["metadata"]["rope_style"] = "interleaved"


@pytest.mark.parametrize(
    "spoil, why",
    [
        (drop_head, "lacks 1 of 6 heads, layer01_head00 first"),
        (drop_first_layer, "lacks 3 of 6 heads, layer00_head00 first"),
        (drop_part, "does not hold.*q_abs_mean"),
        (drop_stats, "does not hold"),
        (drop_everything, "does not hold"),
        (other_name, "does not hold"),
        (other_tensor, "does not hold"),
        (other_size, r"sizes \[4\], \[5\]"),
        (other_dimension, r"sizes \[4\] for heads of dimension 16"),
        (interleaved, "rope_style=interleaved"),
    ],
)
def test_refuses_files_of_the_authors_that_would_give_wrong_scores(spoil, why, tmp_path, statistics):
    content = authors_format(statistics)
    spoil(content)
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=why) as refusal:
        read_pt(tmp_path / "s.pt")
    assert str(tmp_path / "s.pt") in str(refusal.value)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("content", [[1, 2], {"x": torch.ones(2)}, torch.ones(3)], ids=["list", "other keys", "tensor"])
def test_refuses_tensors_that_are_no_statistics(content, tmp_path):
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="does not hold `metadata`"):
        read_pt(tmp_path / "s.pt")


@pytest.mark.parametrize("written", [b"", b"not tensors", pickle.dumps([1, 2]), b"PK\x03\x04broken"], ids=str)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_refuses_damaged_files_of_the_authors(written, tmp_path):
    (tmp_path / "s.pt").write_bytes(written)
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        read_pt(tmp_path / "s.pt")


def test_says_when_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        read_pt(tmp_path / "nowhere.pt")
