"""polyrank as a PEFT tuner: one class for every method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Head, Method, Site, keyed
from polyrank.layers.archive import judge
from polyrank.layers.compat import (
    TARGETS,
    BaseTuner,
    NoMatch,
    get_pattern_key,
    in_out_features,
)
from polyrank.layers.config import PolyrankConfig
from polyrank.layers.heads import LinearHead
from polyrank.layers.hosts import BlockHost, HeadHost, attach_block, detach_blocks
from polyrank.layers.lanes import mixed
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.placement import (
    PREFIX,
    check_tensors,
    clashes,
    depths_of,
    head_problems,
    make_blocks,
    mask_of,
    name_problems,
    no_match,
    target_problems,
    tensors_of,
    width_of,
)
from polyrank.layers.root import Side, ensure_flow, hook_of, remove_flow
from polyrank.layers.walks import outer


class PolyrankModel(BaseTuner):
    """Puts adapters of any polyrank method into a model."""

    prefix = PREFIX
    # PEFT hands this to isinstance only, so that verbs reach the hosts of heads and blocks as well.
    tuner_layer_cls = (AdaptedLinear, BlockHost, HeadHost)  # type: ignore[assignment]
    target_module_mapping = TARGETS

    # --- injection -------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add one adapter: linear layers first, then blocks, then the head.

        Raises:
            ConfigError: for an adapter name that PEFT cannot save, or targets that cannot be
                adapted.
        """
        config = cast("PolyrankConfig", self.peft_config[adapter_name])
        problems = [*name_problems(model, adapter_name), *head_problems(model, config)]
        problems += _word_problems(model, config.build())
        if state_dict is None:
            problems += target_problems(model, config)
        if problems:
            self.peft_config.pop(adapter_name, None)
            raise ConfigError(problems)
        self.flow = ensure_flow(model)
        self._method = config.build()
        self._seed = config.seed if config.seed is not None else torch.initial_seed()
        self._depths = depths_of(model)
        before = {id(m) for _, m in outer(model) if isinstance(m, AdaptedLinear)}
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            blocks = make_blocks(model, config, self._seed, adapter_name)
            made = [block for _, _, block in blocks]
            if problems := [*clashes(model, self.peft_config, made)]:
                raise ConfigError(problems)
            hosts = [m for _, m in outer(model) if isinstance(m, AdaptedLinear)]
            judge([m.views[adapter_name] for m in hosts if adapter_name in m.views])
        except Exception as error:
            self._undo(model, adapter_name, before)
            if isinstance(error, NoMatch):
                raise ConfigError(no_match(model, config, str(error))) from error
            raise
        for inside, site, block in blocks:
            attach_block(inside, site, adapter_name, block, self.flow, self._method)
        self._inject_head(model, adapter_name, config)
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self._activate_hosts(model, adapter_name, config)
        self._probe(model, adapter_name)
        if (tag := getattr(cast("Any", model), "add_model_tags", None)) is not None:
            # PEFT tags the cards of its own LoRA only; this reaches README.md at the next save.
            tag(["polyrank"])

    def _undo(self, model: nn.Module, name: str, before: set[int]) -> None:
        """Take out what a failed injection put in, so that the model is as it was."""
        for path, module in list(model.named_modules()):
            if isinstance(module, AdaptedLinear) and id(module) not in before:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module.base_layer)
            elif isinstance(module, AdaptedLinear) and name in module.views:
                module.drop(name)
        self.peft_config.pop(name, None)
        if not before:
            remove_flow(model)

    def _activate_hosts(self, model: nn.Module, name: str, config: PolyrankConfig) -> None:
        # Hosts that were there keep the trainability that their adapters had.
        for _, host in outer(model):
            if isinstance(host, (BlockHost, HeadHost)) and name in host.owned:
                if name in self.active_adapters:
                    host.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
                else:
                    host.set_requires_grad(name, False)

    def _probe(self, model: nn.Module, name: str) -> None:
        hook = hook_of(model)
        first = next(
            (m for m in model.modules() if isinstance(m, AdaptedLinear) and name in m.views), None
        )
        hosts = (m for m in model.modules() if isinstance(m, BlockHost) and name in m.owned)
        if hook is not None and self._method.steered():
            if first is not None:
                hook.probes[name] = first.views[name]
            elif (side := next(hosts, None)) is not None:
                hook.probes[name] = Side(side, name)
        if hook is not None and first is not None and self._method.starting().wants:
            hook.starts[name] = first.views[name]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # The classifier that the head replaces is not adapted as well.
        head = peft_config.head["module"] if peft_config.head else None
        if head is not None and (key == head or key.startswith(f"{head}.")):
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.base_layer if isinstance(target, AdaptedLinear) else target
        site = self._site(peft_config, current_key, base, parent)
        saved = peft_config.sites.get(current_key, {})
        # Fresh values are drawn even for an adapter that is about to be loaded: a key missing
        # there must not show.
        if isinstance(target, AdaptedLinear):
            layer = target
            layer.update_layer(adapter_name, self._method, site, saved, self._seed)
        else:
            layer = AdaptedLinear(base, self.flow)
            layer.update_layer(adapter_name, self._method, site, saved, self._seed)
            self._replace_module(parent, target_name, layer, target)
        # PEFT's word for weights stored as (d_in, d_out); a plain LoRA made from this asks for it.
        peft_config.fan_in_fan_out |= layer.transposed
        view = layer.views[adapter_name]
        if view.shadow is not None or (view.method.starting().wants and not view.waiting):
            peft_config.sites[current_key] = layer.shapes(adapter_name)
        if not peft_config.init_weights and layer.views[adapter_name].B.device.type != "meta":
            with torch.no_grad():
                B = layer.views[adapter_name].B
                B.copy_(
                    torch.empty(B.shape).normal_(
                        0, 0.02, generator=keyed(self._seed, adapter_name, current_key, "B")
                    )
                )
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _site(self, config: PolyrankConfig, key: str, base: nn.Module, parent: nn.Module) -> Site:
        name = type(base).__name__
        d_in, d_out = in_out_features(base)
        linear = isinstance(base, nn.Linear) or name == "Conv1D" or "Linear" in name
        if not linear or d_in is None or d_out is None:
            raise ConfigError(
                f"target_modules: {key!r} is a {name}, and polyrank adapts linear layers; "
                'name linear layers, or use target_modules="all-linear"'
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ConfigError(
                f"target_modules: {key!r} belongs to nn.MultiheadAttention, which reads its "
                f"weight without calling it; "
                "leave it out with exclude_modules"
            )
        pattern = get_pattern_key(list(config.rank_pattern), key)
        alpha = get_pattern_key(list(config.alpha_pattern), key)
        noted = config.sites.get(key, {}).get("r", config.rank_pattern.get(pattern))
        depth, depths = self._depths.get(key, (-1, -1))
        site = Site(
            path=key,
            d_in=d_in,
            d_out=d_out,
            r=self._method.r if noted is None else noted,
            alpha=float(config.alpha_pattern.get(alpha, self._method.alpha)),
            depth=depth,
            depths=depths,
            masks=mask_of(self.model, key),
        )
        return site if noted is not None else replace(site, r=self._method.ranks(site))

    def _inject_head(self, model: nn.Module, name: str, config: PolyrankConfig) -> None:
        if config.head is None:
            return
        path = config.head["module"]
        module = model.get_submodule(path)
        if not isinstance(module, HeadHost):
            parent, _, leaf = path.rpartition(".")
            host = HeadHost(module, self.flow)
            setattr(model.get_submodule(parent), leaf, host)
            module.requires_grad_(False)
            module = host
        d = int(width_of(module.base_layer) or config.head["d"])
        names = list(config.head.get("names", []))
        head = self._method.head(names, d) or LinearHead(d)
        head.grow(names, keyed(self._seed, name, "head"))
        reference = next(module.base_layer.parameters(), torch.empty(0))
        module.update_head(name, head.to(reference.device), self._method)
        for replica, known in (config.head.get("replicas") or {}).items():
            kept = self._method.head(known, d) or LinearHead(d)
            kept.grow(known, keyed(self._seed, name, "head"))
            module.hold(name, replica, kept.to(reference.device))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Without autocast the factors take the base's dtype; gates and statistics stay fp32.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            self._match_base_dtype(adapter_name)

    def _match_base_dtype(self, name: str) -> None:
        for _, layer in outer(self.model):
            if isinstance(layer, AdaptedLinear) and name in layer.views:
                dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
                if dtype is not None and dtype.is_floating_point:
                    # A core keeps its gates and statistics in fp32 by itself.
                    for held in layer.adapter_layer_names:
                        getattr(layer, held)[name].to(dtype)

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; its own hook fills the flow."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with mixed(self, self.flow, names, args, kwargs):
            yield

    # --- merging, unloading ----------------------------------------------------------------------

    def _check_merge(self, names: list[str] | None, safe: bool) -> None:
        """Raise before anything changes; raised inside a layer, earlier layers would be merged."""
        wanted = self.active_adapters if names is None else names
        for module in self.model.modules():
            if isinstance(module, AdaptedLinear):
                for name in wanted:
                    if name in module.views and name not in module.merged_adapters:
                        module.check_merge(name, safe)
            elif isinstance(module, BlockHost) and any(name in module.owned for name in wanted):
                raise MergeError(
                    f"merge: the block at {module.site.path} is not linear, so no base weight "
                    "equals it; keep the adapter unmerged"
                )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base weights, by default the active ones.

        Raises:
            MergeError: if one of them has no exact dense form, before anything changes.
            ValueError: with `safe_merge`, if a merged weight is not finite, before anything
                changes.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        detach_blocks(self.model)
        for module in self.model.modules():
            if isinstance(module, HeadHost):
                module.enable_adapters(True)
        unloaded = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        remove_flow(cast("nn.Module", unloaded))
        return unloaded

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, Head):
            # PEFT's own hands the old classifier's weights to what takes its place.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter from layers, blocks and head."""
        super().delete_adapter(adapter_name)
        if (hook := hook_of(self.model)) is not None:
            hook.probes.pop(adapter_name, None)
            hook.starts.pop(adapter_name, None)
        for module in self.model.modules():
            if isinstance(module, (BlockHost, HeadHost)):
                module.drop(adapter_name)
                # Left alone, a host would pick a new active adapter out of those that it owns.
                if module.active_adapters != self.active_adapters:
                    module.set_adapter(self.active_adapters)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether every layer's update is one matrix."""
        layers = [
            m for m in self.modules() if isinstance(m, AdaptedLinear) and adapter_name in m.views
        ]
        blocks = [m for m in self.modules() if isinstance(m, BlockHost) and adapter_name in m.owned]
        return (
            bool(layers)
            and not blocks
            and all(m.supports_lora_conversion(adapter_name) for m in layers)
        )

    # --- state dicts -----------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own looks at the second-last part only; cores have deeper names:
        # polyrank_core.<adapter>.router.weight
        return re.sub(
            rf"(\.{PREFIX}[A-Za-z]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(tensors_of(model, adapter_name), found)
        for module in model.modules():
            if isinstance(module, AdaptedLinear) and adapter_name in module.views:
                module.views[adapter_name].hollow = False
        return found


def _word_problems(model: nn.Module, method: Method) -> Iterator[str]:
    """Say why a method cannot act in a model that answers word by word."""
    if not method.words and getattr(cast("Any", model), "can_generate", lambda: False)():
        yield (
            f"{method.name}: got {type(model).__name__}, which answers word by word, expected a "
            "model that reads a whole input: early words would be told of those to come; use a "
            "classifier, such as one for sequences"
        )
