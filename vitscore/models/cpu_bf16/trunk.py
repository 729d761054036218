"""A vision transformer's encoder on a CPU in bfloat16: bytes of pixels to the class token's features.

The encoder runs with fused operations: it computes the same function as transformers' ViT and CLIP vision tower, from
their weights, with fewer passes over memory. One pass turns pixels into normalised patches. Queries, keys and values
are one matrix product. Activations and residuals are applied inside the products (oneDNN's post-operations, in fp32,
before the single rounding), whose weights are laid out once in oneDNN's order. Normalisations and softmax are numba
kernels. The last layer is computed for the class token only, as in `class_token_layer.py`. `heads.py` adds a head.

ViT-Tiny at 224 pixels on two cores: 290 images/s instead of 243; small models gain more (`bench forward`, `bench
small`). `take_over` in `__init__.py` decides which models use it; a model with an unexpected layout is `Unsuitable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from vitscore.kernels.cpu_bf16 import attend_bfloat16, layer_norm_bfloat16, patches_bfloat16
from vitscore.models.class_token_layer import num_first_tokens
from vitscore.models.cpu_bf16 import attention

# Axes: B images, H W pixels, C channels, P patches of an image, N tokens of an image, T tokens of all images, F first
# tokens of an image, D width of the encoder, O outputs of a product, I inputs of attention (queries, keys, values, or
# some of them), S slices (heads of images), E width of a head.

_BFLOAT = torch.bfloat16
_USUAL_ROWS = 4096
"""Typical number of rows of a product's input, for which oneDNN lays the weights out."""
_MOST_TOKENS = 4_500
"""Maximum tokens per step, sized to fit the cache: 22 images of 224 pixels in patches of 16. A batch of 512 takes
demo-vit 58 us an image in one step and 44 in two."""
_FEW_TOKENS = 32
"""Maximum tokens of an image for which attention is one kernel. 17 tokens take 2.4 us an image and layer instead of
3.7; 50 tokens in heads of 64 would take 84 us instead of 80."""
_QUICK_GELU = 1.702
"""x * sigmoid(1.702 x), after Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016)."""
_ACTIVATIONS = {
    "gelu": ("gelu", "none", 1.0),
    "gelu_new": ("gelu", "tanh", 1.0),
    "gelu_pytorch_tanh": ("gelu", "tanh", 1.0),
    "relu": ("relu", "", 1.0),
    "silu": ("swish", "", 1.0),
    # y = 1.702 x gives swish(y) = 1.702 * x * sigmoid(1.702 x), so the next weights are divided by 1.702.
    "quick_gelu": ("swish", "", _QUICK_GELU),
}
"""By transformers' name: oneDNN's name, its algorithm, and the factor for its input."""


class Unsuitable(ValueError):
    """A model that this module cannot compute; the text gives the reason."""


class Norm:
    """A layer normalisation.

    Args:
        norm: torch's module, in fp32.
    """

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
            raise Unsuitable("a normalisation without weights")
        self._weight_D, self._bias_D = (
            parameter.detach().float().contiguous() for parameter in (norm.weight, norm.bias)
        )
        self._arrays = self._weight_D.numpy(), self._bias_D.numpy()
        self._epsilon = norm.eps

    def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
        normed_TD = torch.empty_like(rows_TD)
        weight_D, bias_D = self._arrays
        layer_norm_bfloat16(_bits(rows_TD), weight_D, bias_D, epsilon=self._epsilon, out_RD=_bits(normed_TD))
        return normed_TD

    def in_fp32(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Normalise a few rows without rounding to bfloat16."""
        return functional.layer_norm(rows_BD.float(), self._weight_D.shape, self._weight_D, self._bias_D, self._epsilon)


class Product:
    """A linear layer with weights in oneDNN's order; an activation or residual is applied to its fp32 sums.

    Args:
        weight_OD: in fp32.
        bias_O: in fp32, or None.
        activation: transformers' name of the activation that follows, or "".
        scale: factor for the weights.
    """

    def __init__(
        self, weight_OD: torch.Tensor, bias_O: torch.Tensor | None, *, activation: str = "", scale: float = 1.0
    ) -> None:
        self._name, self._algorithm, before = _ACTIVATIONS[activation] if activation else ("none", "", 1.0)
        weight_OD = (weight_OD.detach().float() * (scale * before)).to(_BFLOAT)
        self._bias_O = None if bias_O is None else (bias_O.detach().float() * before).to(_BFLOAT)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OD, _USUAL_ROWS)

    def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
        rows_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows_TD, self._packed, self._bias_O, self._name, [], self._algorithm
        )
        return rows_TO

    def plus(self, rows_TD: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """Return the product plus a residual."""
        rows_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows_TD, residual_TO, self._packed, self._bias_O, "add"
        )
        return rows_TO


class Layer:
    """A layer of the encoder: attention and MLP, both with a normalisation before and a residual after.

    Args:
        parts: transformers' modules, in fp32.
        is_last: only the first token is read from the output.
    """

    def __init__(self, parts: LayerParts, *, is_last: bool) -> None:
        heads = parts.attention
        self._num_heads, self._width = parts.num_heads, heads.q_proj.out_features // parts.num_heads
        self._scale = float(self._width**-0.5)
        self._norm_before, self._norm_after = Norm(parts.norm_before), Norm(parts.norm_after)
        projections = heads.q_proj, heads.k_proj, heads.v_proj
        self._query = _joined(projections[:1]) if is_last else None
        self._inputs = _joined(projections[1:] if is_last else projections)
        self._projection = Product(parts.projection.weight, parts.projection.bias)
        scale = 1 / _ACTIVATIONS[parts.activation][2]
        self._up = Product(parts.mlp.fc1.weight, parts.mlp.fc1.bias, activation=parts.activation)
        self._down = Product(parts.mlp.fc2.weight, parts.mlp.fc2.bias, scale=scale)

    def __call__(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """Map (B, N, D) to (B, N, D), or in the last layer to (B, F, D), of which the first token is read."""
        num_images, num_tokens, width = tokens_BND.shape
        normed_TD = self._norm_before(tokens_BND.view(-1, width))
        inputs_TI = self._inputs(normed_TD)
        queries_TI, tokens_TD = inputs_TI, tokens_BND.view(-1, width)
        if self._query is not None:
            num_tokens = num_first_tokens(num_images, num_tokens)
            inputs_BND = normed_TD.view(num_images, -1, width), tokens_BND
            first_TD, tokens_TD = (rows_BND[:, :num_tokens].reshape(-1, width) for rows_BND in inputs_BND)
            queries_TI = self._query(first_TD)
        mixed_TD = self._attend(queries_TI, inputs_TI, num_images)
        tokens_TD = self._projection.plus(mixed_TD, tokens_TD)
        tokens_TD = self._down.plus(self._up(self._norm_after(tokens_TD)), tokens_TD)
        return tokens_TD.view(num_images, num_tokens, width)

    def _attend(self, queries_TI: torch.Tensor, inputs_TI: torch.Tensor, num_images: int) -> torch.Tensor:
        """Return (images * queries, D); queries are the first columns of their tensor, keys and values the last."""
        depth = self._num_heads * self._width
        if inputs_TI.shape[0] // num_images <= _FEW_TOKENS:
            mixed_TD = queries_TI.new_empty((queries_TI.shape[0], depth))
            attend_bfloat16(
                _bits(queries_TI),
                _bits(inputs_TI),
                num_images=num_images,
                num_heads=self._num_heads,
                scale=self._scale,
                out_FD=_bits(mixed_TD),
            )
            return mixed_TD
        inputs_SNE = self._split(inputs_TI, num_images)
        if queries_TI is not inputs_TI:
            inputs_SNE = (*self._split(queries_TI, num_images), *inputs_SNE)
        mixed_SFE = attention.mix(*inputs_SNE, scale=self._scale)
        mixed_BHFE = mixed_SFE.view(num_images, self._num_heads, -1, self._width)
        return mixed_BHFE.transpose(1, 2).reshape(-1, depth)

    def _split(self, joined: torch.Tensor, num_images: int) -> tuple[torch.Tensor, ...]:
        """Split adjacent queries, keys and values, (T, parts * S/B * E), into tensors (S, N, E)."""
        separate = joined.view(num_images, joined.shape[0] // num_images, -1, self._num_heads, self._width)
        return separate.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2).unbind()


@dataclass(frozen=True)
class LayerParts:
    """The modules and sizes of a transformers layer."""

    norm_before: Any
    attention: Any
    projection: Any
    norm_after: Any
    mlp: Any
    num_heads: int
    activation: str


@dataclass(frozen=True)
class TrunkParts:
    """The modules and parameters of a transformers encoder, in fp32.

    Args:
        patches: the convolution from patches to tokens.
        first_D: the class token.
        positions_ND: position embeddings of the class token and the patches.
        norm_tokens: the normalisation before the layers, or None.
        layers: in order.
        norm_features: the normalisation of the class token after the layers.
    """

    patches: Any
    first_D: torch.Tensor
    positions_ND: torch.Tensor
    norm_tokens: Any
    layers: Sequence[LayerParts]
    norm_features: Any


class Trunk:
    """An encoder from pixels to features; it has no state while it computes, so threads may share it.

    Args:
        model: transformers' ViTForImageClassification or CLIPVisionModel, in fp32; not kept.
        factor_C: factor for the bytes of a channel.
        offset_C: summand of a channel, after the factor.
        image_size: height and width of the input.

    Raises:
        Unsuitable: the model is of another class or layout.
    """

    def __init__(
        self, model: Any, *, factor_C: torch.Tensor, offset_C: torch.Tensor, image_size: tuple[int, int]
    ) -> None:
        parts = parts_of(model)
        convolution = parts.patches
        (self._edge, across), (down, _) = convolution.kernel_size, convolution.stride
        is_plain = (convolution.padding, convolution.dilation, convolution.groups) == ((0, 0), (1, 1), 1)
        is_square = self._edge == across == down and convolution.stride[0] == convolution.stride[1]
        num_patches = (image_size[0] // self._edge) * (image_size[1] // self._edge)
        if not is_plain or not is_square or len(parts.positions_ND) != num_patches + 1:
            raise Unsuitable("unsupported patches")
        self._num_tokens = num_patches + 1
        self._num_channels = int(convolution.in_channels)
        if len(factor_C) != self._num_channels:
            raise Unsuitable("another number of channels")
        self._factor_R, self._offset_R = (row_C.float().repeat(self._edge) for row_C in (factor_C, offset_C))
        self._patches = Product(convolution.weight.detach().permute(0, 2, 3, 1).flatten(1), convolution.bias)
        self._first_D = (parts.first_D + parts.positions_ND[0]).detach().to(_BFLOAT)
        self._positions_PD = parts.positions_ND[1:].detach().to(_BFLOAT)
        self._norm_tokens = None if parts.norm_tokens is None else Norm(parts.norm_tokens)
        self._layers = [Layer(layer, is_last=layer is parts.layers[-1]) for layer in parts.layers]
        self._norm_features = Norm(parts.norm_features)
        self.gflop_per_image = gflop_of(parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Trunk:
        return self

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features (B, D) in fp32 of uint8 (B, H, W, C), or of normalised fp32 (B, C, H, W)."""
        num_steps = -(-len(pixels) * self._num_tokens // _MOST_TOKENS)
        features_BD = [self._features(step) for step in torch.split(pixels, -(-len(pixels) // num_steps))]
        return features_BD[0] if num_steps == 1 else torch.cat(features_BD)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens_BND = self._tokens(self._cut(pixels), len(pixels))
        if self._norm_tokens is not None:
            tokens_BND = self._norm_tokens(tokens_BND.flatten(0, 1)).view(tokens_BND.shape)
        for layer in self._layers:
            tokens_BND = layer(tokens_BND)
        return self._norm_features.in_fp32(tokens_BND[:, 0])

    def _cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the normalised patches of all images, with values by row, column and channel."""
        edge, length = self._edge, self._edge**2 * self._num_channels
        if pixels.dtype == torch.uint8:
            num_images, height, width = pixels.shape[:3]
            patches = torch.empty((num_images * (height // edge) * (width // edge), length), dtype=_BFLOAT)
            factor_R, offset_R = self._factor_R.numpy(), self._offset_R.numpy()
            patches_bfloat16(pixels.contiguous().numpy(), factor_R, offset_R, edge=edge, out_PF=_bits(patches))
            return patches
        unfolded = pixels.to(_BFLOAT).unfold(2, edge, edge).unfold(3, edge, edge)
        return unfolded.permute(0, 2, 3, 4, 5, 1).reshape(-1, length)

    def _tokens(self, patches: torch.Tensor, num_images: int) -> torch.Tensor:
        """Return class token and patches with their position embeddings, (B, N, D)."""
        patches_BPD = self._patches(patches).view(num_images, -1, len(self._first_D))
        tokens_BND = patches_BPD.new_empty((num_images, patches_BPD.shape[1] + 1, patches_BPD.shape[2]))
        tokens_BND[:, 0] = self._first_D
        torch.add(patches_BPD, self._positions_PD, out=tokens_BND[:, 1:])
        return tokens_BND


def parts_of(model: Any) -> TrunkParts:
    """Return the parts of a transformers model.

    Raises:
        Unsuitable: it is not a ViT or CLIP in transformers' layout.
    """
    readers = {"ViTForImageClassification": _vit_parts, "CLIPVisionModel": _clip_parts}
    reader = readers.get(type(model).__name__)
    if reader is None:
        raise Unsuitable(f"a {type(model).__name__}")
    try:
        parts = reader(model)
    except AttributeError as error:
        raise Unsuitable(str(error)) from error
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise Unsuitable("torch without oneDNN")
    if not parts.layers or any(layer.activation not in _ACTIVATIONS for layer in parts.layers):
        raise Unsuitable("unsupported layers")
    return parts


def _vit_parts(model: Any) -> TrunkParts:
    encoder = model.vit
    if encoder.pooler is not None:
        raise Unsuitable("a pooler")
    layers = [
        LayerParts(
            layer.layernorm_before,
            layer.attention,
            layer.attention.o_proj,
            layer.layernorm_after,
            layer.mlp,
            encoder.config.num_attention_heads,
            encoder.config.hidden_act,
        )
        for layer in encoder.layers
    ]
    first, positions = encoder.embeddings.cls_token, encoder.embeddings.position_embeddings
    convolution = encoder.embeddings.patch_embeddings.projection
    return TrunkParts(convolution, first[0, 0], positions[0], None, layers, encoder.layernorm)


def _clip_parts(model: Any) -> TrunkParts:
    layers = [
        LayerParts(
            layer.layer_norm1,
            layer.self_attn,
            layer.self_attn.out_proj,
            layer.layer_norm2,
            layer.mlp,
            model.config.num_attention_heads,
            model.config.hidden_act,
        )
        for layer in model.encoder.layers
    ]
    first, positions = model.embeddings.class_embedding, model.embeddings.position_embedding.weight
    convolution = model.embeddings.patch_embedding
    return TrunkParts(convolution, first, positions, model.pre_layrnorm, layers, model.post_layernorm)


def gflop_of(parts: TrunkParts) -> float:
    """Return the GFLOP of an encoder's matrix products for an image, with all tokens of the last layer.

    A multiply-add counts as two operations.
    """
    num_tokens = len(parts.positions_ND)
    products: int = (num_tokens - 1) * parts.patches.weight.numel()
    for layer in parts.layers:
        heads = layer.attention
        linears = heads.q_proj, heads.k_proj, heads.v_proj, layer.projection, layer.mlp.fc1, layer.mlp.fc2
        products += num_tokens * sum(linear.weight.numel() for linear in linears)
        products += 2 * num_tokens**2 * heads.q_proj.out_features
    return 2 * products / 1e9


def _joined(linears: Sequence[Any]) -> Product:
    """Join linear layers with the same input into one product."""
    biases = [linear.bias for linear in linears]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        raise Unsuitable("only some projections have a bias")
    bias_O = None if biases[0] is None else torch.cat(biases)
    return Product(torch.cat([linear.weight for linear in linears]), bias_O)


def _bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.int16).numpy()
