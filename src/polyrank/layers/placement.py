"""Where an adapter fits into a model, and whether a saved one does."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from polyrank.errors import CheckpointError, ConfigError, nearest
from polyrank.frame import Block, Method, Site, keyed
from polyrank.layers.compat import in_out_features
from polyrank.layers.config import PolyrankConfig
from polyrank.layers.hosts import NAME as HOST
from polyrank.layers.hosts import BlockHost, HeadHost
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.walks import outer

PREFIX = "polyrank_"


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Compare the tensors of a saved adapter with those its config asks for.

    Raises:
        CheckpointError: listing missing, unknown and misshapen tensors.
    """
    problems = [
        f"{key} is missing" for key in sorted(expected.keys() - found.keys()) if PREFIX in key
    ]
    problems += [
        f"{key} is not in the config"
        for key in sorted(found.keys() - expected.keys())
        if PREFIX in key
    ]
    problems += [
        f"{key}: got {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(found.keys() & expected.keys())
        if found[key].shape != expected[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (
            f" … and {len(problems) - 6} more" if len(problems) > 6 else ""
        )
        raise CheckpointError(
            f"adapter: config and tensors disagree: {shown}; load the adapter_config.json that "
            f"was saved with "
            "these tensors, on the base model it was trained on"
        )


def tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter by their names in the model."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (AdaptedLinear, BlockHost, HeadHost)):
            for held in (*module.adapter_layer_names, *module.other_param_names):
                if name in (container := getattr(module, held)):
                    prefix = ".".join(filter(None, (path, held, name)))
                    values = container[name].state_dict()
                    found.update({f"{prefix}.{key}": value for key, value in values.items()})
    return found


def _called(model: nn.Module) -> set[str]:
    """Return the last parts of the names of linear layers."""
    return {
        path.rsplit(".", 1)[-1]
        for path, module in outer(model)
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and PREFIX not in path
    } - {"base_layer"}


def no_match(model: nn.Module, config: PolyrankConfig, said: str) -> str:
    """Say what targets could have been meant."""
    linear, wanted = _called(model), config.target_modules
    words = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    guesses = "".join(dict.fromkeys(nearest(word, linear) for word in words))
    if isinstance(wanted, str) and wanted in linear:
        # PEFT takes a string for a pattern of whole paths.
        guesses = f" a string is a regular expression of the whole path; write [{wanted!r}];"
    return (
        f"target_modules: got {(wanted if isinstance(wanted, str) else words)!r}, which matches no "
        f"layer;{guesses} this model's linear layers are called "
        f"{', '.join(sorted(linear)[:12])}; "
        f'name some of them, or use "all-linear" ({said})'
    )


def target_problems(model: nn.Module, config: PolyrankConfig) -> Iterator[str]:
    """Say which entries of a list of targets name no module, where others do."""
    wanted = config.target_modules
    if wanted is None or isinstance(wanted, str):
        return
    paths = [path for path, _ in outer(model)]
    lost = {t for t in wanted if not any(p == t or p.endswith(f".{t}") for p in paths)}
    if lost == set(wanted):
        # PEFT's own check says so, with what it knows about blocks and exclusions.
        return
    for target in sorted(lost):
        yield (
            f"target_modules: {target!r} matches no layer;{nearest(target, _called(model))} leave "
            f"it out, or name one of {', '.join(sorted(_called(model))[:12])}"
        )


def name_problems(model: nn.Module, name: str) -> Iterator[str]:
    """Say why an adapter must not have a name."""
    parts = {part for path, _ in model.named_modules() for part in path.split(".")}
    own = {part for part in parts if part.startswith(PREFIX)}
    adapters = {n for _, m in outer(model) if isinstance(m, AdaptedLinear) for n in m.views}
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        yield (
            f"adapter name: got {name!r}, expected letters, digits, '_' and '-'; rename the adapter"
        )
    elif (
        name
        in (parts | set(dir(nn.ModuleDict)) | set(dir(dict)) | {"weight", "bias"}) - own - adapters
    ):
        yield (
            f"adapter name: {name!r} is also the name of a module or attribute, and saving would "
            f"drop tensors; rename the adapter"
        )
    elif name in PREFIX or name.startswith(PREFIX):
        yield f"adapter name: {name!r} is part of the prefix {PREFIX!r}; rename the adapter"


def clashes(model: nn.Module, names: Iterable[str], blocks: Iterable[nn.Module]) -> Iterator[str]:
    """Say which adapter names are also names inside of adapters: saving would drop tensors."""
    inside = [*blocks]
    for _, module in outer(model):
        if isinstance(module, AdaptedLinear):
            for held in (*module.adapter_layer_names, *module.other_param_names):
                inside += getattr(module, held).values()
    parts = {part for held in inside for key in held.state_dict() for part in key.split(".")}
    for name in names:
        if name in parts | {"base_layer", HOST}:
            yield (
                f"adapter name: {name!r} is also the name of a part of an adapter, and saving "
                "would drop tensors; rename the adapter"
            )


def width_of(module: nn.Module) -> int | None:
    """Return the width of a classifier's input, or None if it does not say."""
    with warnings.catch_warnings():
        # PEFT warns about layers that it does not know.
        warnings.simplefilter("ignore")
        found: int | None = in_out_features(module)[0]
    return found


def head_problems(model: nn.Module, config: PolyrankConfig) -> Iterator[str]:
    """Say why a head does not fit the model."""
    if config.head is not None:
        path = config.head["module"]
        try:
            module = model.get_submodule(path)
        except AttributeError:
            yield (
                f"head: the model has no module {path!r}; name its classifier, for example "
                f"'classifier' or 'score'"
            )
            return
        base = module.base_layer if isinstance(module, HeadHost) else module
        if width_of(base) is None and "d" not in config.head:
            yield (
                f"head: {path!r} is a {type(base).__name__} without in_features; add 'd', the "
                f"width of its input"
            )


def _several(module: nn.Module) -> bool:
    """Say whether a module holds several, itself or in the one list that it holds, as T5's do."""
    inner = list(module.children())
    if len(inner) == 1 and isinstance(inner[0], nn.ModuleList):
        inner = list(inner[0])
    return len(inner) > 1


def blocks_of(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return (path, number, count) of every transformer block, outermost only."""
    found = []
    for path, module in outer(model):
        if isinstance(module, nn.ModuleList) and PREFIX not in path:
            children = [name for name, child in module.named_children() if _several(child)]
            if children and re.search(r"(^|\.)(layers?|blocks?|h)$", path):
                found += [(f"{path}.{name}", int(name), len(module)) for name in children]
    nested = {a for a, _, _ in found for b, _, _ in found if a != b and a.startswith(b + ".")}
    return [entry for entry in found if entry[0] not in nested]


def depths_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (number, count) of the block around every module inside of one."""
    places = {}
    blocks = blocks_of(model)
    for path, _ in outer(model):
        for block, depth, depths in blocks:
            if path.startswith(block + "."):
                places[path] = (depth, depths)
    return places


def mask_of(model: nn.Module, path: str) -> str:
    """Return which mask speaks about the tokens of a module: "mask", "decoder" or ""."""
    config = getattr(model, "config", None)
    if any(part in path for part in ("vision_model", "vision_tower", "visual")):
        return ""
    if getattr(config, "is_encoder_decoder", False) and "decoder" in path.split("."):
        cross = re.search(
            r"(EncDecAttention|encoder_attn|cross_attn|crossattention)\.(k|v|k_proj|v_proj|key|value)$",
            path,
        )
        return "mask" if cross else "decoder"
    return "mask"


def make_blocks(
    model: nn.Module, config: PolyrankConfig, seed: int, name: str
) -> list[tuple[nn.Module, Site, Block]]:
    """Return what a method puts around modules, with the shapes that the config tells of.

    The layers are adapted already; nothing else has changed.

    Raises:
        ConfigError: for places that a transformer block does not have, a block that does not fit
            there, or a model without blocks.
    """
    made: list[tuple[nn.Module, Site, Block]] = []
    problems: list[str] = []
    method = config.build()
    for path, depth, depths in blocks_of(model):
        inside = model.get_submodule(path)
        site = _block_site(model, method, path, (depth, depths), name)
        # A block draws its own starting values, and must not draw them from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(keyed(seed, name, path, "block").get_state())
            found = method.sub_block(site)
        blocks = [found] if isinstance(found, Block) else list(found or ())
        for block in blocks:
            block.configure(config.sites.get(f"{path}:{block.add}", {}).get("block", {}))
            lost = list(_places(site, block))
            problems += lost or [f"block at {path}: {why}" for why in block.unfit(inside, name)]
        if len({block.add for block in blocks}) < len(blocks):
            problems.append(
                f"block: {method.name!r} puts several blocks at one add point of {path!r}; make "
                "one of them"
            )
        made += [(inside, site, block) for block in blocks]
    if not made and type(method).sub_block is not Method.sub_block:
        problems.append(
            f"block: {method.name!r} found no transformer block in {type(model).__name__} "
            "that it acts in, expected a ModuleList named layers, blocks or h, and what the method "
            "reads of it among target_modules; use a model that has one, or name more targets"
        )
    if problems:
        raise ConfigError(problems)
    for _, _, block in made:
        block.peers = len({site.path for _, site, _ in made})
    return made


def _block_site(
    model: nn.Module, method: Method, path: str, place: tuple[int, int], name: str
) -> Site:
    """Return the site of a transformer block."""
    inside = model.get_submodule(path)
    paths = {p: m for p, m in inside.named_modules() if p and PREFIX not in p and HOST not in p}
    d = _width(model, paths)
    return Site(
        path=path,
        d_in=d,
        d_out=d,
        r=method.r,
        alpha=method.alpha,
        depth=place[0],
        depths=place[1],
        masks=mask_of(model, path),
        modules=tuple(p for p in paths if "base_layer" not in p.split(".")),
        adapted=tuple(
            p for p, m in paths.items() if isinstance(m, AdaptedLinear) and name in m.views
        ),
    )


def _width(model: nn.Module, modules: dict[str, nn.Module]) -> int:
    """Return the width of the hidden states between transformer blocks, or 0 if nothing says it.

    It is that of a block's outermost norms: inner ones may be as wide as a head of its attention.
    """
    norms = [(p.count("."), m) for p, m in modules.items() if "norm" in type(m).__name__.lower()]
    weights = [(at, w) for at, m in norms if isinstance(w := getattr(m, "weight", None), Tensor)]
    if weights:
        return min(weights, key=lambda entry: entry[0])[1].numel()
    return int(getattr(getattr(model, "config", None), "hidden_size", 0))


def _places(site: Site, block: Block) -> Iterator[str]:
    """Say which places of a block are not there."""
    for what, at in (("tap", block.tap), ("add", block.add)):
        if at and at not in site.modules:
            yield (
                f"block: {site.path!r} has no module {at!r} to {what};{nearest(at, site.modules)} "
                f"expected one of {', '.join(sorted(site.modules)[:8])} …; change {what} of "
                f"{type(block).__name__}"
            )
