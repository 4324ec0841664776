"""From a recipe to the model that trains: what is read, what is new, what learns, who holds what.

The model is made on the meta device first, where tensors have shapes and no numbers. So it can be
frozen, given LoRAs and cut into shards before a single weight is read; then each process reads the
files tensor by tensor (they are memory-mapped) and keeps its own piece of each. Nowhere does a
process hold more than its share and one tensor.

FSDP2: torch.distributed.fsdp.fully_shard. Read next: train.py.
"""

import argparse
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

import checkpoint
import lora
from image import ImageConfig
from llama import LLaMA, LLaMAConfig
from llava import LLaVA, LLaVAConfig
from recipes import Recipe
from vit import ViT, ViTConfig


def describe(recipe: Recipe) -> tuple[LLaVA, dict]:
    """The model without its weights, and where they are stored, by name.

    A LLaVA as it is, or a LLaMA and a CLIP with a new projector between them; with LoRAs and an
    AnyRes newline if the recipe wants them. What is new is in the model only.
    """
    tower = recipe.vision_tower or None
    source = checkpoint.Checkpoint(recipe.model)
    if source.part != "language_model":
        source = checkpoint.Checkpoint(recipe.model, vision_tower=tower)
        config = LLaVA.read_config(source)
        if config.weight_bits:
            raise ValueError(f"{recipe.model} holds rounded weights: train from the original")
        model, stored = checkpoint.match(lambda: LLaVA(config), source, "llava")
    else:
        if not tower:
            raise ValueError(f"{recipe.model} is a language model only: add --vision-tower DIR")
        eye = checkpoint.Checkpoint(tower)
        vision, text = ViTConfig(**eye.vision_config()), LLaMAConfig(**source.text_config())
        parts = {
            "vision_tower": checkpoint.match(lambda: ViT(vision), eye, "vision_tower")[1],
            "language_model": checkpoint.match(lambda: LLaMA(text), source, "language_model")[1],
        }
        stored = {f"{part}.{n}": s for part, names in parts.items() for n, s in names.items()}
        pictures = ImageConfig(vision.image_size, recipe.aspect)
        with torch.device("meta"), checkpoint.NoInit():
            model = LLaVA(LLaVAConfig(vision, text, pictures, recipe.projector))
    with torch.device("meta"), checkpoint.NoInit():
        if recipe.aspect == "anyres" != model.config.image.aspect:
            tiled = replace(model.config.image, aspect="anyres", grid_pinpoints=None)
            model.config = replace(model.config, image=tiled)
            if "image_newline" not in stored:
                model.add_newline()
        if recipe.lora_rank:
            sizes = recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout
            lora.add_lora(model.language_model, *sizes)
    if model.config.image.aspect == "anyres" != recipe.aspect:
        raise ValueError(f"{recipe.model} reads AnyRes pictures: add --aspect anyres")
    model.read_tokenizer(source)
    return model, stored


def freeze(model: LLaVA, recipe: Recipe, dtype: torch.dtype):
    """Decide what learns: that is float32, all else is kept in the compute type."""
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if hasattr(model, "image_newline"):
        model.image_newline.requires_grad_(True)
    model.vision_tower.requires_grad_(recipe.tower_lr > 0)
    model.language_model.requires_grad_(recipe.train_llm and not recipe.lora_rank)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def shard_model(model: LLaVA, recipe: Recipe, device: torch.device, dtype: torch.dtype):
    """FSDP2: every block is cut into pieces, gathered where it is needed and let go again.

    A frozen tower stays whole on every process. With --shard N each group of N processes holds a
    copy of the model (HSDP): between nodes only gradients travel.
    """
    world, shard = dist.get_world_size(), recipe.shard or dist.get_world_size()
    if world % shard:
        raise ValueError(f"--shard {shard} does not divide the {world} processes")
    shape, names = (world // shard, shard), ("replicate", "shard")
    if shard == world:
        shape, names = (world,), ("shard",)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    how = {"mesh": mesh} | ({} if dtype == torch.float32 else {"mp_policy": policy})
    whole = set()
    if recipe.tower_lr:
        for block in model.vision_tower.layers:
            fully_shard(block, **how)
    else:
        whole = set(model.vision_tower.parameters())
    for block in model.language_model.layers:
        fully_shard(block, **how)
    fully_shard(model, ignored_params=whole, **how)
    register_fsdp_forward_method(model, "loss")


def fill(model: LLaVA, stored: dict, device: torch.device):
    """Give a model on the meta device its weights: those stored, else new ones.

    New ones are drawn from torch's random state, whole, so they do not depend on the shards.
    """
    parameters = dict(model.named_parameters())
    shown = not dist.is_initialized() or dist.get_rank() == 0
    files = checkpoint.watched(stored.items()) if shown else stored.items()
    state = {name: piece(file.read(), parameters[name], device) for name, file in files}
    for name, parameter in parameters.items():
        if name not in state:
            state[name] = piece(new_weight(model, name), parameter, device)
    model.load_state_dict(state, assign=True)


def piece(whole: torch.Tensor, parameter: torch.nn.Parameter, device) -> torch.Tensor:
    """What this process holds of a tensor: a copy, of the type and in the shards of `parameter`."""
    if not isinstance(parameter, DTensor):
        return whole.to(device, parameter.dtype, copy=True)
    mesh, placements = parameter.device_mesh, parameter.placements
    # src_data_rank None: every process has read the tensor, nothing need be sent.
    part = distribute_tensor(whole.to(device), mesh, placements, src_data_rank=None)
    part = part.to_local().to(parameter.dtype, copy=True)
    return DTensor.from_local(
        part, mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )


def new_weight(model: LLaVA, name: str) -> torch.Tensor:
    """A projector, LoRA or newline as it begins: layers as torch.nn.Linear does, B of a LoRA 0."""
    shape = model.get_parameter(name).shape
    if name == "image_newline":
        return torch.randn(shape) * shape[0] ** -0.5
    if ".lora_B." in name:
        return torch.zeros(shape)
    bound = model.get_submodule(name.rpartition(".")[0]).in_features ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


def parameter_groups(model: LLaVA, recipe: Recipe) -> list[dict]:
    """What learns, by part: its peak rate, and weight decay for matrices only."""
    rates = {
        "projector": recipe.projector_lr or recipe.lr,
        "language_model": recipe.lr,
        "vision_tower": recipe.tower_lr,
    }
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0].replace("image_newline", "projector")  # learn together
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            group = {"params": [], "name": part, "peak": rates[part], "weight_decay": decay}
            groups.setdefault((part, decay), group)["params"].append(parameter)
    return list(groups.values())


def main():
    """Print what learns in the tiny model's two stages."""
    from recipes import RECIPES

    stages = RECIPES["tiny"]()
    parts = {"model": stages[1].model, "vision_tower": stages[1].vision_tower}
    for stage, recipe in stages.items():
        model, stored = describe(replace(recipe, **parts))
        freeze(model, recipe, torch.bfloat16)
        print(f"stage {stage}: {len(stored)} tensors are read")
        for group in parameter_groups(model, recipe):
            n = sum(p.numel() for p in group["params"])
            print(f"    {group['name']:16} {n:12,} parameters learn at {group['peak']}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
