"""One token a sequence through a model, with attention left to rows: by transformers' modules, or by joined blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.nn.functional import embedding, linear, silu
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from spectral_kv.engine.rows import Rows

ATTENTION = "spectral_kv_step"

_rows: ContextVar[list[Rows]] = ContextVar("rows")


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _rows.get()[module.layer_idx].attend(query, key, value, scale).transpose(1, 2), None


# No mask is registered under that name, so that transformers makes none: while a graph is captured it would make one
# of the whole length, and attention with a mask copies the cache once for every query head.
AttentionInterface.register(ATTENTION, _attention)


class _Passing(CacheLayerMixin):
    """A cache layer that hands new keys and values on to attention, which writes them down itself."""

    is_sliding = False

    def lazy_initialization(self, key_states, value_states): ...

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return -1


@contextmanager
def attending_by(model: torch.nn.Module, name: str) -> Iterator[None]:
    """While it lasts, the model's attention is the one registered under `name`."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name  # what modules read at every call; the method would look through them all
    try:
        yield
    finally:
        model.config._attn_implementation = before


class Modules:
    """Transformers' own modules as they are: every model that attends to all tokens."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._cache = Cache(layers=[_Passing() for _ in range(model.config.num_hidden_layers)])

    def __call__(self, ids: torch.Tensor, position: torch.Tensor, rows: list[Rows]) -> torch.Tensor:
        """Logits `[batch, vocabulary]` of `ids` `[batch, 1]` at `position` `[1]`, a tensor on the device."""
        token = _rows.set(rows)
        try:
            with attending_by(self.model, ATTENTION):
                out = self.model(
                    input_ids=ids, position_ids=position[None], past_key_values=self._cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
        finally:
            _rows.reset(token)
        return out.logits[:, -1]


def _joined(*modules: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of layers with one input as those of one layer.

    The layers' own become views of them, so that weights are held once; they are tensors of inference mode only if they
    were before, so that a gradient can still be asked of them.
    """
    with torch.inference_mode(modules[0].weight.is_inference()), torch.no_grad():
        weight = torch.cat([m.weight.detach() for m in modules])
        bias = None if modules[0].bias is None else torch.cat([m.bias.detach() for m in modules])
        start = 0
        for m in modules:
            stop = start + m.out_features
            m.weight.data = weight[start:stop]
            if bias is not None:
                m.bias.data = bias[start:stop]
            start = stop
    return weight, bias


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + epsilon)
    return weight * h.to(x.dtype)


KNOWN = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2"))
CHILDREN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


def _hooked(module: torch.nn.Module) -> bool:
    """Whether something else runs when a module is called; hooks of transformers record what they are asked for."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    foreign = any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
    return foreign or "forward" in vars(module)


def _misfit(model: torch.nn.Module) -> str | None:
    """What keeps a model from being run as joined blocks, or None."""
    base = model.base_model
    if any(_hooked(module) for module in model.modules()):
        return "it has hooks, which only its modules call"
    if any(type(part).__module__ not in KNOWN for part in (model, base)):
        return f"it is none of Llama, Mistral and Qwen2 ({type(model).__name__})"
    if {name for name, _ in base.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return "it has parts around its layers that are not known"
    if type(getattr(model, "lm_head", None)) is not torch.nn.Linear:
        return "its head is not a plain linear layer"
    if getattr(model.config, "hidden_act", None) not in ("silu", "swish"):
        return f"its activation is {getattr(model.config, 'hidden_act', None)}, not SiLU"
    for layer in base.layers:
        for path, children in CHILDREN.items():
            part = layer.get_submodule(path)
            # others of the same parts scale some of them, or don't rotate everywhere
            if type(part).__module__ not in KNOWN or {name for name, _ in part.named_children()} != children:
                return f"its layers are not those of Llama or Qwen2 ({type(layer).__name__})"
            linears = [m for name, m in part.named_children() if name.endswith("_proj")]
            if any(type(m) is not torch.nn.Linear for m in linears):
                return "its projections are not plain linear layers"
        if not all(hasattr(n, "variance_epsilon") for n in (layer.input_layernorm, layer.post_attention_layernorm)):
            return "its norms are not RMSNorm"
    return None


class Blocks:
    """Blocks of RMSNorm, rotary attention and SwiGLU with joined projections, two compiled functions a layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its projections become views of the joined ones: nothing captured before may read them.
    compiled : bool
        Whether the functions go through torch.compile.

    Raises
    ------
    ValueError
        If the model is built otherwise; the message says how.
    """

    def __init__(self, model: torch.nn.Module, compiled: bool = True):
        if misfit := _misfit(model):
            raise ValueError(misfit)
        base = model.base_model
        attention = base.layers[0].self_attn
        self.dim, self.scale = attention.head_dim, float(attention.scaling)
        self.query_heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.layers = []
        for layer in base.layers:
            a, m = layer.self_attn, layer.mlp
            self.layers.append(
                (
                    (layer.input_layernorm.weight, *_joined(a.q_proj, a.k_proj, a.v_proj)),
                    (a.o_proj.weight, a.o_proj.bias, layer.post_attention_layernorm.weight),
                    (*_joined(m.gate_proj, m.up_proj), m.down_proj.weight, m.down_proj.bias),
                )
            )
        self.embedding, self.norm, self.head = base.embed_tokens.weight, base.norm.weight, model.lm_head
        self.rotary, self.epsilon = base.rotary_emb, base.norm.variance_epsilon
        self._functions = [self._waves, self._before, self._after, self._logits]
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # one a batch size
            self._functions = [torch.compile(f, fullgraph=True, dynamic=False) for f in self._functions]

    def _waves(self, position: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        phases = position.float() * frequencies.float()
        both = torch.cat([phases, phases], -1)
        scaling, dtype = self.rotary.attention_scaling, self.embedding.dtype
        return (both.cos() * scaling).to(dtype), (both.sin() * scaling).to(dtype)

    def _before(self, x, norm, weight, bias, cos, sin):
        """Rotated queries and keys, and values, `[batch, heads, 1, dim]`."""
        heads, kv, half = self.query_heads, self.kv_heads, self.dim // 2
        y = linear(_norm(x, norm, self.epsilon), weight, bias).view(-1, heads + 2 * kv, 1, self.dim)
        r = y[:, : heads + kv]
        r = r * cos + torch.cat([-r[..., half:], r[..., :half]], -1) * sin
        return r[:, :heads].contiguous(), r[:, heads:].contiguous(), y[:, heads + kv :].contiguous()

    def _after(self, x, attended, out, out_bias, norm, gate_up, gate_up_bias, down, down_bias):
        x = x + linear(attended.reshape(x.shape[0], -1), out, out_bias)
        gate, up = linear(_norm(x, norm, self.epsilon), gate_up, gate_up_bias).chunk(2, -1)
        return x + linear(silu(gate) * up, down, down_bias)

    def _logits(self, x, norm, head, bias):
        return linear(_norm(x, norm, self.epsilon), head, bias)

    def __call__(self, ids: torch.Tensor, position: torch.Tensor, rows: list[Rows]) -> torch.Tensor:
        """Logits `[batch, vocabulary]` of `ids` `[batch, 1]` at `position` `[1]`, a tensor on the device."""
        waves, before, after, logits = self._functions
        x = embedding(ids[:, 0], self.embedding)
        cos, sin = waves(position, self.rotary.inv_freq)
        for layer, (attention, out, mlp) in zip(rows, self.layers, strict=True):
            q, k, v = before(x, *attention, cos, sin)
            x = after(x, layer.attend(q, k, v, self.scale), *out, *mlp)
        return logits(x, self.norm, self.head.weight, self.head.bias)
