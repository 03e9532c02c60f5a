"""Pairs of factors that an optimiser knows as such, and not by their names or places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, nearest
from polyrank.frame import ORDER, Adapter, Core, Group, Identity, Rule, Step, Workshop
from polyrank.parts.gates import StaticGate

if TYPE_CHECKING:
    from torch.optim import Optimizer

UPDATE = "altlora"
SIDES = ("A", "B")
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3, "weight_decay": 0.0, "plus": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
    "damping": 1e-6, "relative": False, "first": "B", "switch_every": 1, "joint": False,
    "released": False, "bias_correction": False, "clip": 0.0, "balance_every": 0,
    "snapshots": False, "step": 0,
}  # fmt: skip

# What a user may say, in the words of the methods.
OPTIONS = tuple(
    name for name in DEFAULTS if name not in ("lr", "weight_decay", "snapshots", "step")
)


class Pair(NamedTuple):
    """Two factors as one of them moves."""

    moving: nn.Parameter
    standing: nn.Parameter
    scale: float
    name: str
    gate: Tensor | None


def active(group: dict[str, Any]) -> tuple[str, ...]:
    """Return which factors of a group move at its next step, "A", "B" or both in that order."""
    if group["joint"]:
        return SIDES
    odd = group["step"] // group["switch_every"] % 2
    return (SIDES[SIDES.index(group["first"]) ^ odd],)


def idle(group: dict[str, Any]) -> list[nn.Parameter]:
    """Return the factors of a group that stand still at its next step."""
    names = set(SIDES) - set(active(group))
    return [group["params"][pair[name]] for pair in group["pairs"] for name in sorted(names)]


def moves(group: dict[str, Any], side: str) -> int:
    """Return how often a factor has moved in the steps that a group has made."""
    if group["joint"]:
        return int(group["step"])
    span = group["switch_every"]
    whole, rest = divmod(group["step"], 2 * span)
    own = min(rest, span) if side == group["first"] else max(rest - span, 0)
    return int(whole * span + own)


def option_problems(options: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the options of a group, or of a method that makes one."""
    for name in ("beta1", "beta2"):
        if not 0 <= options[name] < 1:
            yield f"{name}: got {options[name]}, expected 0 <= {name} < 1; 0.9 and 0.999 are common"
    if not options["eps"] > 0:
        yield f"eps: got {options['eps']}, expected > 0; 1e-8 is common"
    for name, hint in (
        ("damping", "0 inverts exactly, and fails where a factor lacks rank"),
        ("clip", "0 clips nothing"),
        ("balance_every", "0 never balances"),
    ):
        if not 0 <= options[name] < float("inf"):
            yield f"{name}: got {options[name]}, expected a finite number >= 0; {hint}"
    if options["switch_every"] < 1:
        yield f"switch_every: got {options['switch_every']}, expected >= 1; 1 alternates strictly"
    if options["first"] not in SIDES:
        yield f'first: got {options["first"]!r}, expected "A" or "B"; "B" where B begins at zero'
    if options["released"] and not options["joint"]:
        yield "released: got true without joint, expected joint=True: that code moves both factors"
    if options["joint"] and options["switch_every"] != 1:
        yield "switch_every: with joint both factors move in every step; leave it at 1"


def group_problems(group: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the pairs and options of a group."""
    yield from option_problems(group)
    params, pairs = group["params"], group.get("pairs")
    if pairs is None or sorted(n for p in pairs for n in (p["A"], p["B"])) != [*range(len(params))]:
        yield (
            f"pairs: got {len(pairs or ())} for {len(params)} parameters, expected every parameter "
            "to be the A or the B of one pair; train the others in a group of their own"
        )
        return
    for pair in pairs:
        A, B = params[pair["A"]], params[pair["B"]]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            yield (
                f"pair {pair['name']}: got A {tuple(A.shape)} and B {tuple(B.shape)}, expected "
                "(r, d_in) and (d_out, r)"
            )
        if strange := {p.dtype for p in (A, B)} - {torch.float32, torch.float64}:
            yield (
                f"pair {pair['name']}: got {', '.join(map(str, strange))}, expected factors in "
                "float32 or float64, whose small steps are not lost; autocast does the rest"
            )
        if not 0 < pair["scale"] < float("inf"):
            yield f"pair {pair['name']}: got scale {pair['scale']}, expected a finite number > 0"


def pairable(core: Core) -> bool:
    """Say whether W = W0 + s B diag(g) A holds with a core, with the same g for every token."""
    return type(core) is Identity or isinstance(core, StaticGate)


def pair_group(adapter: Adapter, options: Mapping[str, Any]) -> Group:
    """Return the group of all factors of an adapter.

    Raises:
        ConfigError: if a core depends on the token, or one of two factors trains alone.
    """
    params: list[nn.Parameter] = []
    pairs: list[dict[str, Any]] = []
    problems = []
    for layer in adapter.layers:
        trained = [p.requires_grad for p in (layer.A, layer.B)]
        path = layer.site.path
        if not any(trained):
            continue
        if not pairable(layer.core):
            problems.append(
                f"altlora at {path}: the core {type(layer.core).__name__} may weigh ranks anew for "
                "every token, so that no projection of the gradient belongs to its factors; use a "
                "method whose core is the identity or a constant gate"
            )
        if not all(trained):
            problems.append(
                f"altlora at {path}: {'A' if trained[0] else 'B'} trains alone, and the two move "
                "in turn; train both roles, or use another optimiser"
            )
        gated = isinstance(layer.core, StaticGate)
        place = len(params)
        params += [layer.A, layer.B]
        entry = {"A": place, "B": place + 1, "scale": float(layer.scale), "name": path}
        pairs.append({**entry, "gated": gated})
    if problems:
        raise ConfigError(problems)
    method: Any = getattr(adapter, "method", None)
    # Who writes into factors after a step moves them without the optimiser's knowledge.
    written = method is not None and any("param" in rule.touches for rule in method.acting())
    return Group(params=params, update=UPDATE, options=_options(pairs, options, written))


def _options(
    pairs: list[dict[str, Any]], options: Mapping[str, Any], written: bool = False
) -> dict[str, Any]:
    full = {k: v for k, v in {**DEFAULTS, **options}.items() if k not in ("lr", "weight_decay")}
    # A chain of projections is not one projection, and gates move at other times than factors.
    lazy = written or full["switch_every"] > 1 or any(pair["gated"] for pair in pairs)
    return {**full, "pairs": pairs, "snapshots": bool(full["snapshots"] or lazy)}


def lora_groups(
    model: nn.Module, lr: float, weight_decay: float, adapter: str | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return groups over PEFT's own LoRA: its pairs, other matrices, vectors.

    Raises:
        ConfigError: if the model has no such adapter, or there is no such option.
    """
    known = sorted(OPTIONS)
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(
            f"altlora: unknown option {unknown[0]!r}, expected one of {', '.join(known)};"
            f"{nearest(unknown[0], known) or ' choose one'}"
        )
    params: list[nn.Parameter] = []
    pairs: list[dict[str, Any]] = []
    for path, A, B, scale in _lora_pairs(model, adapter):
        pairs.append(
            {"A": len(params), "B": len(params) + 1, "scale": scale, "name": path, "gated": False}
        )
        params += [A, B]
    if not pairs:
        raise ConfigError(
            f"altlora: the model holds no trained LoRA of PEFT named {adapter or 'as the active'}; "
            "make one with peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    made: dict[str, Any] = {"params": params, "lr": lr, "weight_decay": weight_decay}
    groups = [{**made, "update": UPDATE, **_options(pairs, options)}]
    held = {id(p) for p in params}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    for matrix, decay in ((True, weight_decay), (False, 0.0)):
        if rest := [p for p in others if (p.dim() >= 2) is matrix]:
            groups.append({"params": rest, "lr": lr, "weight_decay": decay})
    return groups


def _lora_pairs(
    model: nn.Module, adapter: str | None
) -> Iterable[tuple[str, nn.Parameter, nn.Parameter, float]]:
    for path, module in model.named_modules():
        held = getattr(module, "lora_A", None)
        if not isinstance(held, nn.ModuleDict):
            continue
        names = module.active_adapters if adapter is None else [adapter]
        for name in (n for n in cast("list[str]", names) if n in held):
            A, B = (
                cast("nn.Parameter", cast("nn.ModuleDict", part)[name].weight)
                for part in (held, module.lora_B)
            )
            if A.dim() == 2 and A.requires_grad and B.requires_grad:
                yield path, A, B, float(cast("dict[str, float]", module.scaling)[name])


class Balanced(Rule):
    """Says that the optimiser rescales A and B against each other, which it does by itself.

    B A stays; but means of factors, distances of factors to earlier ones and steps that others
    write into factors would mix two scales.
    """

    order = 0
    touches = frozenset({"factoring"})

    @property
    def name(self) -> str:
        """Return the option that asks for it."""
        return "balance_every"


class Idle(Rule):
    """Drops the gradient of the factor that stands still, before gradients are measured or clipped.

    It also tells the optimiser the gates between factors. Under DDP both gradients are reduced, so
    that every process does the same. A loss scaler looks at gradients before any rule, so that an
    infinity in a factor that stands still skips a step as one in the other does.
    """

    order = ORDER["project"]
    touches = frozenset({"grad"})
    expects = frozenset({"true_grad"})

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Find the optimiser that alternates.

        Raises:
            ConfigError: if there is none.
        """
        self.optimizer = optimizer
        part = getattr(optimizer, "parts", {}).get(UPDATE, optimizer)
        if not hasattr(part, "weigh"):
            raise ConfigError(
                f"optimizer: {type(optimizer).__name__} does not serve the update {UPDATE!r}; "
                "build it with polyrank.optimizer(model, lr=...)"
            )
        for layer in adapter.layers:
            if isinstance(layer.core, StaticGate):
                part.weigh(layer.A, layer.core.gate)

    def grads(self, step: Step) -> None:
        """Drop them."""
        for group in self.optimizer.param_groups:
            if group.get("update") == UPDATE:
                for param in idle(group):
                    param.grad = None
