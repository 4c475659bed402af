"""Defines the adapter of several tasks, of which each row of a batch uses one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..._kinds import TEXTS
from ...decomp import Network
from .._adapter import Adapter
from .._bank import Chosen, Names, attach_rows, check_rows, read_names, row_pairs
from .._config import AdapterConfig
from .._forward import Handle
from .._gradient_flags import set_flags
from .._group import Group
from .._shared_parameters import find_aliases
from .._task_lines import check_task_names
from .._trained_modules import TrainedModules
from .batch import CurrentTasks, why_none
from .network import TaskLine, divide, key_of, mean_of
from .tensors import TaskTensors


class TaskAdapter(TaskTensors):
    """An adapter of several tasks: one tensor T[task, layer, ...], of which every forward uses slices.

    ``lortalib.nn.apply(model, line, tasks=["sst2", "mrpc"])`` makes it for any line of legs with the mode
    ``task``. Parameters without that leg are common to all tasks; of those with it, each task has its own,
    which are ordinary parameters of the module: ``networks`` has one network for each group and task.

    What needs one update (merging, `delta`, `norms`, `low_rank_pair`, `network`, export as a LoRA) uses the
    task that is chosen: that of the context, if it names one for all rows, else the default.

    Attributes:
        tasks: the names of the tasks, in the order of the mode ``task``.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "metatt_41d", rank=2, tasks=["films", "news"])
        >>> type(adapter).__name__, adapter.tasks, adapter.task("news").name
        ('TaskAdapter', ('films', 'news'), 'news')
    """

    def __init__(
        self,
        name: str,
        config: AdapterConfig,
        groups: tuple[Group, ...],
        networks: Mapping[str, Network],
        trained_modules: TrainedModules,
        tasks: Sequence[str],
    ) -> None:
        ordered = {group.name: networks[group.name] for group in groups}
        lines = {name: TaskLine(net.legs, net.modes, net.names) for name, net in ordered.items()}
        divided = divide(networks, tasks)
        ones = {group.name: divided[key_of(group.name, tasks[0])] for group in groups}
        sources = [
            row_pairs(group, ones[group.name], config.scaling, lines[group.name].common)
            for group in groups
        ]
        super().__init__(name, config, groups, divided, trained_modules, sources)
        self.tasks = tuple(tasks)
        self._lines = lines
        self._default: str | None = None
        self._current = CurrentTasks(sources, self)

    # Choosing

    @property
    def default(self) -> str | None:
        """The task of forwards outside of `using`; the only one, if there is no other.

        Setting it to a name that is no task raises KeyError; None is allowed.
        """
        return self.tasks[0] if len(self.tasks) == 1 else self._default

    @default.setter
    def default(self, name: str | None) -> None:
        if name is not None:
            self._check_known([name])
        self._default = name

    @contextmanager
    def using(self, names: str | Names) -> Iterator[TaskAdapter]:
        """Choose the tasks of a batch within this context.

        Optimiser steps within the context take effect in its next forward. generate(), whose copies of a row
        use the row's task, and gradient checkpointing work, also if the context is closed before the
        backward. The choice is local to the thread or asynchronous task that enters the context.

        Args:
            names: one task for all rows; or a list with the task of each row, None for a row that is not
                updated; or, for each row, a list with the task of each token.

        Raises:
            KeyError: a name that is no task.
            ValueError: the adapter is merged, or lists of different lengths; in the model's forward, a batch
                that is not a multiple of the number of names, or that has not a token for each.
            RuntimeError: the adapter is on no model.

        Example:
            >>> import lortalib, torch
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, vocab_size=50,
            ...                              num_attention_heads=4, intermediate_size=64)).eval()
            >>> adapter = lortalib.nn.apply(model, "metatt_41d", rank=2, tasks=["sst2", "mrpc"],
            ...                             init="normal")
            >>> ids = torch.tensor([[3, 14], [15, 9]])
            >>> with adapter.using("mrpc"):
            ...     one = model(ids)[0]
            >>> with adapter.using(["sst2", "mrpc"]):
            ...     both = model(ids)[0]
            >>> torch.allclose(one[1], both[1], atol=1e-5), torch.allclose(one[0], both[0], atol=1e-5)
            (True, False)
        """
        chosen = Chosen.one(names) if isinstance(names, str) else read_names(names)
        self._check_known(chosen.names)
        self.require_host()
        if self.merged:
            raise ValueError(
                f"adapter {self.name!r} is merged: the weights hold the update of one task, so none can be "
                "chosen for a batch; call unmerge() first"
            )
        with self._current.use(self._current.rows(chosen)):
            yield self

    # Networks

    def network(self, group: Group) -> Network:
        """Return the network of ``group`` for the chosen task.

        Raises:
            ValueError: not one task is chosen.
        """
        found = self._current.chosen()
        if len(found) != 1 or None in found:
            raise ValueError(why_none(self))
        return self.network_of(group.name, str(found.pop()))

    def snapshot(self) -> Adapter:
        """Copy the chosen task, as an adapter of one task with the name of this one; see `Adapter.snapshot`.

        Raises:
            ValueError: not one task is chosen.
        """
        networks = {group.name: self._copy(self.network(group)) for group in self.groups}
        config = self._config_of_one(networks)
        return Adapter(self.name, config, self.groups, networks, TrainedModules())

    # Tasks

    def add_task(self, name: str, start: str = "mean") -> None:
        """Add a task, and freeze all else: from here on only the parameters of the new task train.

        The outputs of the other tasks stay the same bit for bit, in every optimiser: what trains are
        parameters of their own, not parts of others. Make the optimiser anew, over the parameters that
        require gradients. `train_tasks` chooses again what trains.

        Args:
            name: the name of the new task.
            start: the name of the task whose values the new one starts with; or ``"mean"``, the mean of the
                parameters of all tasks.

        Raises:
            ValueError: a name that is impossible or in use.
            KeyError: ``start`` is no task.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> adapter = lortalib.nn.apply(model, "metatt_41d", rank=2, tasks=["sst2", "mrpc"])
            >>> adapter.add_task("rte", start="mrpc")
            >>> [tuple(p.shape) for p in adapter.parameters() if p.requires_grad]
            [(2, 2)]
        """
        check_task_names([name])
        if name in self.tasks:
            raise ValueError(
                f"adapter {self.name!r} has the task {name!r} already; choose another name"
            )
        if start != "mean":
            self._check_known([start])
        starts = self.tasks if start == "mean" else (start,)
        made = {
            key_of(group.name, name): mean_of(
                self._lines[group.name], [self.network_of(group.name, task) for task in starts]
            )
            for group in self.groups
        }
        before = self.tasks
        try:
            self.networks.update(made)
            self._aliases = find_aliases(self.networks)
            self.tasks = (*before, name)
            self.train_tasks([name])
        except BaseException:
            self.tasks = before
            for key in made:
                if key in self.networks:
                    del self.networks[key]
            self._aliases = find_aliases(self.networks)
            raise

    def train_tasks(self, names: Iterable[str] | None = None) -> None:
        """Choose what trains: the own parameters of some tasks alone, or everything.

        Args:
            names: the tasks; what all tasks have in common, and modules that train as a whole, are then
                frozen. None lets all tasks train, and what they have in common. Parameters marked
                ``(frozen)`` never train.

        Raises:
            KeyError: a name that is no task.
            TypeError: one text in place of several names.
        """
        if isinstance(names, str):
            raise TypeError(
                f"train_tasks() takes a list of names; found {names!r}: give [{names!r}]"
            )
        listed = names if isinstance(names, Iterable) else (names,)
        chosen = self.tasks if names is None else tuple(listed)
        TEXTS.check("names", chosen)
        self._check_known(chosen)
        wanted: list[tuple[Any, bool]] = []
        for task in self.tasks:
            for group in self.groups:
                network = self.network_of(group.name, task)
                common = self._lines[group.name].common
                for term, is_common, parameter in zip(network.legs.terms, common, network.stored):
                    on = names is None if is_common else task in chosen
                    wanted.append((parameter, on and not term.frozen))
        if self.is_on_model:
            beside = self.trained_modules.parameters(self.model)
            wanted += [(parameter, names is None) for parameter in beside]
        set_flags(wanted)

    # On the model

    def attach(self, model: nn.Module, handles: list[Handle]) -> None:
        """Put hooks on a model that add to every row the update of its task.

        Args:
            model: the model.
            handles: a list that gets the handle of each hook. If this call fails, no hook stays on the model.

        Raises:
            ValueError: projections whose rows cannot differ: packed experts, weights that are read directly,
                attention that puts time before batch.
        """
        for site in self.sites:
            check_rows(self.model, site)
        attach_rows(self.model, self._current, handles)
