"""LLaVA: picture features stand in the language model's input where `<image>` stood in the text.

Papers: LLaVA v1, "Visual Instruction Tuning" (arXiv 2304.08485, section 4.1) and LLaVA-1.5,
"Improved Baselines with Visual Instruction Tuning" (arXiv 2310.03744). Nothing else happens here:

    text      USER :  <image>  What is this ?
    ids        5   9   -200      7   3   8  2
    spliced   [5] [9] [v1][v2]...[vN] [7] [3] [8] [2]      vi = projector(vit(picture))[i]
    labels     .   .   .   .      .    .   .   .   .       no answer word comes from a picture

From there on the decoder cannot tell picture features from word embeddings.

Letters for shapes, in every file: B batch, T sequence (T' after splicing), S keys in the cache (in
vit.py and image.py: pixels per side), N patches, P patch side, D width, H heads, K key-value heads,
Dh head width, F MLP width, V vocabulary, I images.

Read next: image.py and data.py make the inputs; train.py and generate.py use the model.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as checkpointed

import checkpoint
import quantize as quantized
import tokenizer
from data import IGNORE, IMAGE_TOKEN
from image import ImageConfig, choose_grid
from llama import LLaMA, LLaMAConfig
from projector import build_projector
from vit import ViT, ViTConfig

LOSS_CHUNK = 4096  # supervised tokens whose logits are in memory at a time


@dataclass(frozen=True)
class LLaVAConfig:
    """The three parts and how they are joined; the defaults are LLaVA-1.5-7B."""

    vision: ViTConfig = field(default_factory=ViTConfig)
    text: LLaMAConfig = field(default_factory=LLaMAConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    projector: str = "mlp2x_gelu"  # "linear" in v1
    vision_layer: int = -2  # which hidden state of the ViT feeds the projector
    keep_class: bool = False  # does the ViT's class token go along with the patches?
    template: str = "v1"  # conversation template, see templates.py
    image_start_end: bool = False  # are pictures between <im_start> and <im_end>? (first models)
    weight_bits: int | None = None  # 8 or 4: the decoder's matrices are rounded, see quantize.py

    def __post_init__(self):
        if not -self.vision.n_layers - 1 <= self.vision_layer <= self.vision.n_layers:
            raise ValueError(
                f"vision_layer {self.vision_layer} does not exist: "
                f"the tower has {self.vision.n_layers} blocks"
            )
        if self.image.image_size != self.vision.image_size:
            raise ValueError(
                f"pictures are prepared at {self.image.image_size} pixels, "
                f"but the vision tower takes {self.vision.image_size}"
            )

    def n_visual(self, image_size: tuple[int, int]) -> int:
        """How many visual words a picture of (width, height) pixels becomes."""
        side = self.vision.image_size // self.vision.patch_size
        if self.image.aspect != "anyres":
            return side**2 + self.keep_class
        grid = choose_grid(image_size, self.image.grid_pinpoints)
        columns, rows = (pixels // self.image.image_size * side for pixels in grid)
        sideways, upright = margins((columns, rows), image_size)
        return side**2 + (rows - 2 * upright) * (columns - 2 * sideways + 1)


class LLaVA(nn.Module):
    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.vision)
        self.projector = build_projector(config.projector, config.vision.dim, config.text.dim)
        self.language_model = LLaMA(config.text)
        if config.weight_bits:
            quantized.make_room(self, config.weight_bits)
        if config.image.aspect == "anyres":
            self.add_newline()
        self.tokenizer = None  # set by from_pretrained when the folder has one
        self.template = config.template

    def add_newline(self):
        """AnyRes: what ends each row of tiles in the sequence, as a line break ends a line."""
        dim = self.config.text.dim
        self.image_newline = nn.Parameter(torch.randn(dim) * dim**-0.5)

    @classmethod
    def from_pretrained(
        cls,
        path,
        vision_tower=None,
        dtype=None,
        device=None,
        base=None,
        quantize=None,
        mapped=False,
    ):
        """Load any official LLaVA, from a folder or by the Hugging Face id of a downloaded one.

        `vision_tower`: a CLIP checkpoint that replaces the tower of this one.
        `dtype`, `device`: default to the stored type and the CPU.
        `base`: what a delta, a LoRA or a lone projector belongs to.
        `quantize`: 8 or 4, the bits to which the decoder's matrices are rounded as they are read,
        if they are not stored in so many.
        `mapped`: leave large matrices in the file, for fast.prepare to copy.
        Raises ValueError naming all tensors that are missing, unexpected or misshapen.
        """
        source = checkpoint.Checkpoint(path, base, vision_tower)
        config = cls.read_config(source)
        if quantize and config.weight_bits not in (None, quantize):
            raise ValueError(
                f"{path} holds weights of {config.weight_bits} bits, and not of {quantize}: "
                "take the original"
            )
        take = quantized.taker(quantize) if quantize and not config.weight_bits else None
        model = checkpoint.build(lambda: cls(config), source, "llava", dtype, device, take, mapped)
        model.read_tokenizer(source)
        return model

    def read_tokenizer(self, source: "checkpoint.Checkpoint"):
        """Set `tokenizer` from the files of a checkpoint or its base; None if there is none."""
        paths = (source.path, source.base.path) if source.base else (source.path,)
        file = next(filter(None, map(tokenizer.find, paths)), None)
        self.tokenizer = tokenizer.load(file) if file else None
        if self.tokenizer and self.config.image_start_end:
            self.tokenizer.image_frame = ("<im_start>", "<im_end>")

    @staticmethod
    def read_config(source: "checkpoint.Checkpoint") -> LLaVAConfig:
        parts = source.llava_config()  # plain dictionaries
        return LLaVAConfig(
            vision=ViTConfig(**parts.pop("vision")),
            text=LLaMAConfig(**parts.pop("text")),
            image=ImageConfig(**parts.pop("image")),
            **parts,
        )

    def encode_images(self, pixels, image_sizes=None):
        """Pictures -> visual words: a list of float[n_tiles, 3, S, S] -> a list of float[n, D].

        All tiles go through the tower in one batch. While the tower is frozen it runs without
        autograd; the projector always takes part. Raises ValueError for a number of tiles that
        does not fit the aspect, or the size of the picture.
        """
        anyres = self.config.image.aspect == "anyres"
        sizes = image_sizes or [None] * len(pixels)
        if anyres and (image_sizes is None or len(image_sizes) != len(pixels)):
            raise ValueError("AnyRes needs image_sizes: the (width, height) of each picture")
        for i, tiles in enumerate(pixels):
            if not anyres and len(tiles) != 1:
                raise ValueError(
                    f"picture {i} has {len(tiles)} tiles; aspect {self.config.image.aspect!r} has 1"
                )
        # Packed conversations about one picture hold the same tensor: it goes through once.
        once = {id(tiles): (tiles, size) for tiles, size in zip(pixels, sizes, strict=True)}
        numbers = {key: i for i, key in enumerate(once)}
        different, sizes = zip(*once.values(), strict=True)
        weight = self.projector[0].weight
        tiles = torch.cat(different).to(weight.device, weight.dtype)  # (tiles, 3, S, S)
        frozen = not any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.no_grad() if frozen else torch.enable_grad():
            features = self.vision_tower(tiles, self.config.vision_layer, self.config.keep_class)
        views = self.projector(features).split([len(tiles) for tiles in different])  # (n, N, D)
        if anyres:
            words = [self.merge_tiles(*view) for view in zip(views, sizes, strict=True)]
        else:
            words = [features for (features,) in views]
        return [words[numbers[id(tiles)]] for tiles in pixels]  # I x (N, D)

    def merge_tiles(self, views, image_size):
        """AnyRes: views float[1 + tiles, N, D] of a picture of (width, height) -> float[n, D].

        LLaVA-1.6 (the blog post of January 2024; there is no paper): first the features of the
        whole picture, then those of its tiles laid side by side, read line by line across all
        tiles. Lines that lie wholly in the black margin are left out, each other line ends in
        `image_newline`:

            a b | c d          the tiles of a 1 x 2 grid, 2 x 2 patches each
            e f | g h    ->    whole picture, a b c d newline, e f g h newline
        """
        config = self.config.image
        columns, rows = (
            side // config.image_size for side in choose_grid(image_size, config.grid_pinpoints)
        )
        whole, *tiles = views
        side = math.isqrt(len(whole))  # patches per side of a tile
        if len(tiles) != rows * columns or side**2 != len(whole):
            raise ValueError(
                f"a picture of {image_size} has a grid of {columns}x{rows} tiles of squares of "
                f"patches, got {len(tiles)} tiles of {len(whole)} features"
            )
        grid = torch.stack(tiles).view(rows, columns, side, side, -1)  # (rows, columns, P, P, D)
        grid = grid.transpose(1, 2).reshape(rows * side, columns * side, -1)  # (height, width, D)
        sideways, upright = margins((columns * side, rows * side), image_size)
        grid = grid[upright : len(grid) - upright, sideways : columns * side - sideways]
        newline = self.image_newline.to(grid.dtype).expand(len(grid), 1, -1)
        return torch.cat([whole, torch.cat([grid, newline], dim=1).flatten(0, 1)])  # (n, D)

    def forward(self, input_ids, pixels=(), image_sizes=None, labels=None, attention_mask=None):
        """Logits float[B, T', V] over the spliced sequence, rows padded on the right.

        input_ids:      int[B, T], IMAGE_TOKEN (-200) where a picture goes
        pixels:         a list with one float[n_tiles, 3, S, S] per picture, in reading order
        image_sizes:    [(width, height)] of the original pictures (AnyRes needs them)
        labels:         int[B, T] with IGNORE (-100) where nothing is learned; only `loss` uses them
        attention_mask: int[B, T], 0 for padding, else the document number (1, or 1, 2, ... packed)

        Raises ValueError when the number of pictures differs from the number of IMAGE_TOKENs.
        """
        embeds, _, mask = self.embed(input_ids, pixels, labels, attention_mask, image_sizes)
        return self.language_model(embeds=embeds, mask=needed(mask))

    def loss(
        self,
        input_ids,
        pixels=(),
        image_sizes=None,
        labels=None,
        attention_mask=None,
        reduction="mean",
    ):
        """Cross-entropy of each supervised token given all before it -> scalar.

        The mean runs over the supervised tokens of the batch, or with reduction="sum" their sum is
        returned. Logits are computed at supervised places only: a picture's 576 features and the
        question never meet the vocabulary.
        """
        embeds, labels, mask = self.embed(input_ids, pixels, labels, attention_mask, image_sizes)
        if not len(pixels):
            # Under FSDP every process has to touch every part, or the others wait for it.
            embeds = embeds + 0 * self.no_picture().to(embeds.dtype)
        hidden = self.language_model.hidden(embeds=embeds, mask=needed(mask))  # (B, T', D)
        #     tokens  <s>  USER  What  ASSISTANT  A    cat  </s>
        #     labels   .    .     .        .      A    cat  </s>
        #     target   .    .     .        A      cat  </s>  .     the token at t is told at t - 1
        target = labels[:, 1:]  # (B, T'-1)
        supervised = target != IGNORE
        if not supervised.any() and reduction == "mean":
            raise ValueError("no token of the batch is supervised, so there is no mean loss")
        hidden, target = hidden[:, :-1][supervised], target[supervised]  # (supervised, D)
        chunks = list(zip(hidden.split(LOSS_CHUNK), target.split(LOSS_CHUNK), strict=True))
        if len(chunks) == 1:
            total = self.cross_entropy(hidden, target)
        else:  # the logits of one chunk at a time; backward computes them again
            total = sum(checkpointed(self.cross_entropy, *c, use_reentrant=False) for c in chunks)
        return total / len(target) if reduction == "mean" else total

    def no_picture(self):
        """A number in which all that pictures go through takes part."""
        weight = self.projector[0].weight
        features = weight.new_zeros(1, 1, self.config.vision.dim)
        if any(p.requires_grad for p in self.vision_tower.parameters()):
            pixels = weight.new_zeros(1, 3, *2 * [self.config.vision.image_size])
            features = self.vision_tower(pixels, self.config.vision_layer)
        total = self.projector(features).sum()
        return total + self.image_newline.sum() if hasattr(self, "image_newline") else total

    def cross_entropy(self, hidden, target):
        """Summed over float[n, D] and int[n] -> scalar."""
        logits = self.language_model.head(hidden)  # (n, V)
        return F.cross_entropy(logits.float(), target, reduction="sum")

    def embed(
        self,
        input_ids,
        pixels=(),
        labels=None,
        attention_mask=None,
        image_sizes=None,
        pad_left=False,
    ):
        """Everything before the decoder: embeds float[B, T', D], labels and mask int[B, T'].

        Rows are re-padded after splicing, on the right or (for generation) on the left.
        """
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_image = (input_ids == IMAGE_TOKEN) & (attention_mask != 0)
        if is_image.sum() != len(pixels):
            raise ValueError(
                f"the text has {is_image.sum()} <image> and {len(pixels)} pictures were given: "
                "there must be one for each"
            )
        features = self.encode_images(pixels, image_sizes) if len(pixels) else []
        # How often each token stands in the sequence: padding not at all, a picture as many times
        # as it has visual words. Ids, labels and mask grow alike; then the features are laid in.
        repeats = (attention_mask != 0).long()  # (B, T)
        repeats[is_image] = torch.tensor([len(f) for f in features]).to(repeats)

        def grown(rows, fill):
            rows = [row.repeat_interleave(n) for row, n in zip(rows, repeats, strict=True)]
            return pad_sequence(rows, True, fill, "left" if pad_left else "right")  # (B, T')

        ids, labels = grown(input_ids, 0), grown(labels, IGNORE)
        mask = grown(attention_mask, 0)
        is_image = ids == IMAGE_TOKEN
        embeds = self.language_model.embed_tokens(ids.masked_fill(is_image, 0))  # (B, T', D)
        if features:
            words = torch.cat(features).to(embeds.dtype)
            embeds = embeds.masked_scatter(is_image[..., None], words)
        return embeds, labels.masked_fill(is_image, IGNORE), mask


def margins(grid_size, image_size) -> tuple[int, int]:
    """Patches that `image.fit_into` added on either side: left and right, above and below.

    Sizes are (width, height). The sums are the original's, roundings included, so a line of margin
    may stay.
    """
    (grid_width, grid_height), (width, height) = grid_size, image_size
    if width / height > grid_width / grid_height:
        return 0, (grid_height - int(height * (grid_width / width))) // 2
    return (grid_width - int(width * (grid_height / height))) // 2, 0


def needed(mask):
    """The mask, or None if it only holds padding on the right: no causal query ever sees that."""
    return mask if mask.max() > 1 else None


def main():
    """Print the shapes of a small LLaVA at work."""
    config = LLaVAConfig(
        vision=ViTConfig(image_size=56, dim=64, mlp_dim=128, n_layers=3, n_heads=4),
        text=LLaMAConfig(vocab_size=100, dim=32, mlp_dim=64, n_layers=2, n_heads=4, n_kv_heads=4),
        image=ImageConfig(image_size=56),
    )
    model = LLaVA(config).eval()
    ids = torch.tensor([[1, 5, 9, IMAGE_TOKEN, 7, 3, 8, 2]])
    pixels = [torch.randn(1, 3, 56, 56)]
    print(f"input ids        {ids.tolist()[0]}")
    print(f"pixels           {list(pixels[0].shape)}  (n_tiles, 3, S, S)")
    with torch.no_grad():
        print(f"visual words     {list(model.encode_images(pixels)[0].shape)}  (N, D)")
        embeds, labels, mask = model.embed(ids, pixels)
        print(f"spliced          {list(embeds.shape)}  (B, T', D), T' = 7 words + 16 patches")
        print(f"logits           {list(model(ids, pixels).shape)}  (B, T', V)")
        print(f"loss             {model.loss(ids, pixels, labels=ids.clamp(min=IGNORE)):.3f}")
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in LLaVA(LLaVAConfig()).parameters())
    print(f"LLaVA-1.5-7B has {n_parameters:,} parameters")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
