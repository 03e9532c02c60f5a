"""Which tensors of an adapter require gradients: what its method declares, however PEFT acts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from polyrank.layers.compat import BaseTunerLayer


class DeclaredTrainability(BaseTunerLayer):
    """PEFT's switches of one tuner layer, held to the parameters that methods declare as trained.

    Modules by adapter are those in the containers of `adapter_layer_names`.
    """

    def parameters_of(self, name: str) -> dict[str, list[nn.Parameter]]:
        """Return one adapter's trained parameters by role."""
        raise NotImplementedError(f"{type(self).__name__} must define parameters_of(name)")

    def _here(self) -> Iterable[str]:
        return list(getattr(self, self.adapter_layer_names[0]))

    def _train_only(self, names: set[str], on: bool, others: bool) -> None:
        for name in self._here():
            if name in names or others:
                for held in self.adapter_layer_names:
                    getattr(self, held)[name].requires_grad_(False)
                for params in self.parameters_of(name).values() if (on and name in names) else ():
                    for param in params:
                        param.requires_grad_(True)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; only what their methods declare becomes trainable."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._train_only(set(names), not inference_mode, others=True)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self._train_only(set(self.active_adapters), enabled, others=True)
        self._disable_adapters = not enabled

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Freeze adapters, or make trainable what their methods declare."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._train_only(names, requires_grad, others=False)

    def _freeze_non_trainable_peft_weights(
        self, adapter_names: str | Sequence[str] | None = None
    ) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self._here():
            if names is not None and name not in names:
                continue
            allowed = {id(p) for params in self.parameters_of(name).values() for p in params}
            for held in self.adapter_layer_names:
                for param in getattr(self, held)[name].parameters():
                    if id(param) not in allowed:
                        param.requires_grad_(False)
