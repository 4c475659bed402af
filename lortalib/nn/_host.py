"""Holds the adapters of one model: installs, switches, merges, unmerges and removes them.

Every change of state is a transaction: the steps that can fail come first and the flag (``active``,
``merged``) is set last, so an error or interrupt before that leaves everything unchanged. Flags are set
through ``vars``, because nn.Module's ``__setattr__`` is Python code that can be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

from torch import Tensor, nn

from ._adapter import Adapter
from ._adapter_dict import home_of
from ._anatomy import ATTRIBUTE, Site
from ._base_weights import BaseWeights, weight_name
from ._finite import check_finite
from ._forward import Places, detach
from ._found_modules import FoundModules
from ._gradient_flags import GradientFlags, set_flags
from ._recompute_guard import guard, never
from ._sharded import divide_again
from ._stream import check_kept, check_order
from ._trained_modules import TrainedModules
from ._weight_changes import WeightChanges


class AdapterHost(WeightChanges):
    """The adapters of one model by name. The host is a submodule of the model (see `home_of`), so the
    adapters move with the model.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._modules_found = FoundModules(model)
        self._weights = BaseWeights(model, self._modules_found)
        self._flags = GradientFlags(model)

    def _others(self, adapter: Adapter) -> list[Adapter]:
        return [other for other in self.adapters() if other is not adapter]

    def _trained_by_others(self, adapter: Adapter, active: bool) -> list[TrainedModules]:
        others = self._others(adapter)
        return [other.trained_modules for other in others if other.active or not active]

    def _updated(self, adapter: Adapter) -> Iterator[nn.Module]:
        for site in adapter.sites:
            yield from map(self._modules_found.get_submodule, (site.path, *site.tied_paths))

    def base_weight(self, site: Site) -> Tensor:
        """Return the base's weight of a site, without any merged update."""
        return self._weights.base(site)

    def bring_back(self, adapter: Adapter) -> None:
        """Bring the modules that train with an adapter back from accelerate's offloading."""
        adapter.trained_modules.bring_back(self.model)

    def places(self, adapter: Adapter) -> Places | None:
        """Return the places of the modules that an adapter updates, which have its hooks."""
        handles = self._handles.get(adapter.name, [])
        return next((each for each in handles if isinstance(each, Places)), None)

    def prepare_files(self, adapter: Adapter) -> None:
        """Let FSDP2 divide the gathered parameters again, because it may gather them in a rounded dtype."""
        divide_again(self.model)

    # On and off

    def enable(self, adapter: Adapter) -> None:
        """Switch an adapter on, as `Adapter.enable` describes."""
        self._check_order(adapter)
        self._enable(adapter)

    def _enable(self, adapter: Adapter) -> None:
        if not adapter.active:
            others = self._trained_by_others(adapter, active=True)
            with self._changing(adapter.trained_modules.modules(self.model)):
                adapter.trained_modules.swap_in(self.model, others)
            vars(adapter)["active"] = True

    def disable(self, adapter: Adapter) -> None:
        """Switch an adapter off, as `Adapter.disable` describes."""
        if not adapter.active:
            return
        merged = adapter.merged
        with self._changing(adapter.trained_modules.modules(self.model)):
            try:
                adapter.trained_modules.swap_out(self.model)
                self._unmerge(adapter)
            except BaseException:
                # If the base is restored, only the flag is left to be set, which cannot fail.
                if merged and not adapter.merged:
                    vars(adapter)["active"] = False
                else:
                    adapter.trained_modules.swap_in(self.model, [])
                raise
            vars(adapter)["active"] = False

    @contextmanager
    def disabled(self, adapter: Adapter) -> Iterator[None]:
        """Switch an adapter off within a context, as `Adapter.disabled` describes."""
        again = self._again(adapter) if adapter.active else None
        self.disable(adapter)
        try:
            yield
        finally:
            adapter.require_host()  # it may have been removed meanwhile
            if again is not None:
                again()

    def _again(self, adapter: Adapter) -> Callable[[], None]:
        """Return the call that switches an active adapter on again: merged with the update that the weights
        have now, or beside them."""
        copy = self._merged_copies.get(adapter.name)
        if copy is None:
            return partial(self.enable, adapter)
        return partial(self._merge, adapter, copy)

    def set_active(self, wanted: list[Adapter]) -> None:
        """Switch exactly these adapters on in the forward."""
        with ExitStack() as undo:
            for adapter in self.adapters():
                if adapter.active and adapter not in wanted:
                    undo.callback(self._again(adapter))
                    self.disable(adapter)
            for adapter in wanted:
                if not adapter.active:
                    undo.callback(self.disable, adapter)
                    self.enable(adapter)
            undo.pop_all()

    # In the weights

    def merge(self, adapter: Adapter) -> None:
        """Merge an adapter into the weights, as `Adapter.merge` describes."""
        if not adapter.merged:
            check_finite(adapter)
            self._merge(adapter, adapter.snapshot())

    def _merge(self, adapter: Adapter, copy: Adapter) -> None:
        """Merge an adapter with the update of a snapshot of it."""
        if adapter.merged:
            return
        self._check_order(merging=adapter)
        kept = self._merged_copies
        copies = {**kept, adapter.name: copy}
        active = adapter.active
        with self._changing(self._updated(adapter)):
            try:
                self._enable(adapter)
                self._weights.write(adapter.sites, self._in_order(copies))
                vars(self)["_merged_copies"] = copies
                vars(adapter)["merged"] = True  # from here on its hooks add nothing
                self._detach(adapter)
            except BaseException:
                if adapter.merged:
                    self._detach(adapter)
                else:
                    vars(self)["_merged_copies"] = kept
                    if not active:
                        self.disable(adapter)
                raise

    def unmerge(self, adapter: Adapter) -> None:
        """Take an adapter out of the weights, as `Adapter.unmerge` describes."""
        if adapter.merged:
            self._check_order(unmerging=adapter)
        self._unmerge(adapter)

    def _unmerge(self, adapter: Adapter) -> None:
        if not adapter.merged:
            return
        copies = self._copies_without(adapter)
        rest = self._in_order(copies)
        with self._changing(self._updated(adapter)):
            try:
                self._attach(adapter)  # its hooks add nothing while it is merged
                self._restore(adapter, rest)
                vars(self)["_merged_copies"] = copies
                self._weights.keep_only(rest)
            except BaseException:
                if adapter.merged:
                    self._detach(adapter)
                else:
                    vars(self)["_merged_copies"] = copies
                    self._weights.keep_only(rest)
                raise

    def _copies_without(self, adapter: Adapter) -> dict[str, Adapter]:
        """Return the snapshots of all merged adapters but one."""
        return {name: each for name, each in self._merged_copies.items() if name != adapter.name}

    def _restore(self, adapter: Adapter, rest: list[Adapter]) -> None:
        """Take an adapter's update out of the weights and set the flag; ``rest`` stays merged."""
        names = {weight_name(site) for other in rest for site in other.sites}
        if any(weight_name(site) in names for site in adapter.sites):
            self._weights.write(adapter.sites, rest)
        else:  # only copies, so an interrupted restore can be repeated to its end
            try:
                self._weights.restore(adapter.sites)
            except BaseException:
                self._weights.restore(adapter.sites)
                vars(adapter)["merged"] = False
                raise
        vars(adapter)["merged"] = False

    def _check_order(
        self,
        enabling: Adapter | None = None,
        *,
        merging: Adapter | None = None,
        unmerging: Adapter | None = None,
    ) -> None:
        """Refuse a change after which an active adapter on the stream would act on a merged weight."""
        adapters = self.adapters()
        merged = [a for a in adapters if (a.merged or a is merging) and a is not unmerging]
        beside = [a for a in adapters if (a.active or a is enabling) and a not in merged]
        check_order(merged, beside)

    # Off the model

    def remove(self, adapter: Adapter, merged: bool) -> None:
        """Remove an adapter from the model, as `Adapter.remove` describes."""
        if merged:
            check_kept(adapter, [a for a in self._others(adapter) if a.merged])
        kept_merged = False
        try:
            if merged:
                self._keep_merged(adapter)
                kept_merged = True
                adapter.trained_modules.leave_in()
            else:
                self.disable(adapter)
            self._take_off(adapter)
        except BaseException:
            if kept_merged or not (merged or adapter.active):
                self._take_off(adapter)
            raise

    def _keep_merged(self, adapter: Adapter) -> None:
        """Make an adapter's update part of the base."""
        with ExitStack() as undo:
            if not adapter.active:
                undo.callback(self.disable, adapter)
            if not adapter.merged:
                undo.callback(self._unmerge, adapter)
                self.merge(adapter)
            self._leave_in([*self._updated(adapter), *adapter.trained_modules.modules(self.model)])
            rest = self._in_order(self._copies_without(adapter))
            self._weights.keep_merged(self._merged_copies[adapter.name], rest)
            undo.pop_all()

    def _take_off(self, adapter: Adapter) -> None:
        """Forget an adapter that is switched off or part of the base; may be called again."""
        guard(self.model, self._updated(adapter), adapter.remembered.added(), never)
        self._detach(adapter)
        vars(adapter).update(active=False, merged=False)
        if adapter.name in self:
            self._flags.forget(adapter.name)
            if not adapter.trained_modules.conflict(self._trained_by_others(adapter, active=False)):
                self._flags.reset(adapter.trained_modules.paths)
            self._flags.thaw()
            del self[adapter.name]
        adapter.belong_to(None)
        self._merged_copies.pop(adapter.name, None)
        self._weights.keep_only(self._in_order(self._merged_copies))
        if not len(self):
            self.release()

    def _attach(self, adapter: Adapter) -> None:
        if not self._handles.get(adapter.name):
            found = cast(nn.Module, self._modules_found)
            adapter.attach(found, self._handles.setdefault(adapter.name, []))

    def _detach(self, adapter: Adapter) -> None:
        """Remove the hooks of an adapter; may be called again."""
        detach(self._handles.get(adapter.name, []))
        self._handles.pop(adapter.name, None)
        adapter.scope.forget()

    def release(self) -> None:
        """Remove the host from the model and restore the ``requires_grad`` flags of the base."""
        home = home_of(self.model)
        if home._modules.get(ATTRIBUTE) is self:
            self._flags.restore()
            delattr(home, ATTRIBUTE)
            vars(self.model).pop("save_pretrained", None)  # see SavePretrained

    # Onto the model

    def install(self, adapter: Adapter, active: bool, freeze: bool, undo: ExitStack) -> None:
        """Put a finished adapter on the model; ``undo`` gets a callback that reverses each step."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        undo.callback(set_flags, flags)
        undo.callback(self._take_off, adapter)
        if freeze:
            self._flags.freeze(adapter.name, {id(p) for p in self.parameters()})
            for other in self.adapters():
                other.trained_modules.set_trainable(self.model, True)
        self[adapter.name] = adapter
        adapter.belong_to(self)
        adapter.train(self.model.training)
        adapter.trained_modules.set_trainable(self.model, True)
        self._attach(adapter)
        if active:
            undo.callback(self.disable, adapter)
            self.enable(adapter)
