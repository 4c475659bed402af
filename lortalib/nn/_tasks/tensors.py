"""Defines the tensors of an adapter of several tasks: each over all tasks, and its slices, one for a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...decomp import Network, TensorNetwork
from .._adapter import Adapter
from .._config import AdapterConfig
from .._group import Group
from .._plan import share_input_factor
from .._trained_modules import TrainedModules
from .network import TaskLine, TaskNetwork, key_of


class TaskTensors(Adapter):
    """An adapter that has a network for each group and task.

    Attributes:
        tasks: the names of the tasks, in the order of the mode ``task``.
    """

    tasks: tuple[str, ...]
    _lines: dict[str, TaskLine]  # by the name of the group

    def network_of(self, group: str, task: str) -> Network:
        """Return the network of a group for a task.

        Args:
            group: the name of the group.
            task: the name of the task.

        Raises:
            KeyError: no such group or task.
        """
        found = self.all_networks().get(key_of(group, task))
        if found is None:
            raise KeyError(
                f"there is no network of {group!r} for {task!r}; the tasks are {self.tasks}"
            )
        return found

    def line_of(self, group: str) -> TaskLine:
        """Return the line of the tensor of a group over tasks.

        Args:
            group: the name of the group.
        """
        return self._lines[group]

    def tensor(self, group: Group) -> TensorNetwork:
        """Return the network of ``group`` over all tasks, T[task, layer, ...]; gradients reach parameters.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> adapter = lortalib.nn.apply(model, "metatt_41d", rank=2, tasks=["sst2", "mrpc"])
            >>> adapter.tensor(adapter.groups[0]).shape
            Shape({'task': 2, 'layer': 2, 'head': 4, 'matrix': 4, 'in': 32, 'out': 8})
        """
        return TaskNetwork(self._lines[group.name], self.networks_of(group))

    def networks_of(self, group: Group) -> list[Network]:
        """Return the networks of ``group``, one for each task."""
        return [self.network_of(group.name, task) for task in self.tasks]

    def task(self, name: str) -> Adapter:
        """Copy the task ``name`` out, as an ordinary adapter that is on no model, with the same updates.

        It can be saved, merged, stored in a bank and exported as a LoRA, as `Adapter.snapshot` can. Modules
        that train with all tasks have their present values in it.

        Args:
            name: the name of the task, which becomes that of the adapter.

        Raises:
            KeyError: no such task.

        Example:
            >>> import lortalib, tempfile
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> adapter = lortalib.nn.apply(model, "metatt_41d", rank=2, tasks=["sst2", "mrpc"])
            >>> one = adapter.task("sst2")
            >>> one.name, one.count(), adapter.count()
            ('sst2', 156, 160)
            >>> folder = lortalib.nn.export_lora(one, tempfile.mkdtemp(), model)
        """
        self._check_known([name])
        ones = {group.name: self.network_of(group.name, name) for group in self.groups}
        networks = {group: self._copy(network) for group, network in ones.items()}
        config = self._config_of_one(networks)
        if config.share_residual:
            share_input_factor(self.groups, networks)
        model = self.model if self.is_on_model else None
        paths = self.trained_modules.paths
        modules = TrainedModules(paths, self.trained_modules.values(model) if paths else None)
        return Adapter(name, config, self.groups, networks, modules)

    def _config_of_one(self, networks: Mapping[str, Network]) -> AdapterConfig:
        """Return the settings of one task alone, whose decomposition is the line that is left."""
        # Where a task owns the parameter for `in`, no network had it in common with another.
        owned = any(line.owns_input for line in self._lines.values())
        shares = self.config.share_residual and not owned
        line = str(next(iter(networks.values())).legs)
        return replace(self.config, decomposition=line, share_residual=shares)

    def _check_known(self, names: Iterable[object]) -> None:
        unknown = [name for name in names if name is not None and name not in self.tasks]
        if unknown:
            raise KeyError(
                f"adapter {self.name!r} has no task {unknown[0]!r}; its tasks are "
                f"{', '.join(map(repr, self.tasks))}"
            )
