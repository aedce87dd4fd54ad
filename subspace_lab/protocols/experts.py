"""The models that are merged: an encoder, pretrained once, and an expert of each task that starts from it.

Each is an ordinary training run in `<output_root>/experts/<key>/`, where the key is a hash of everything that its
weights depend on: merges by other methods find them there, and an interrupted run goes on with the next one.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict, read_write
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab import build, interrupt, rundir, schema
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.models.heads import CosineHead, find_head, replace_head
from subspace_lab.protocols.fit import EXPORT_FOLDER, Fit
from subspace_lab.reporting.results import write_text
from subspace_lab.training import rng

if TYPE_CHECKING:
    from subspace_lab.data.task_suite import TaskData, TaskSuite

# Part of every key: raised when the same configuration would train differently than before.
EXPERT_VERSION = 1
RESULT_FILE = "result.json"
WEIGHTS_FILE = "model.safetensors"

State = dict[str, Tensor]

_FULL = {"_target_": "subspace_lab.methods.full.Full", "name": "none"}
_CSV = {"_target_": "subspace_lab.training.loggers.Loggers", "csv": True, "wandb": False}
# What weights depend on, less what of it they do not.
_COUNTED = ("model", "data", "optimizer", "scheduler", "trainer", "callbacks", "seed")
_UNCOUNTED = {
    "trainer": ("progress", "log_every", "checkpoint_every", "keep_checkpoints"),
    "data": ("data_dir", "cache_dir", "recipe"),
    "model": ("recipe",),
}


class ExpertFit(Fit):
    """Trains one of them.

    Args:
        data: the task.
        start: weights to start from, all but the head's; None: those of the seed.
        head: a frozen head in place of the model's own; None keeps that, to be trained.
    """

    def __init__(self, data: TaskData, start: State | None, head: nn.Module | None) -> None:
        super().__init__()
        self._data, self._start, self._head = data, start, head

    @override
    def _build_data(self, cfg: DictConfig) -> Any:
        return self._data

    @override
    def _build_model(self, cfg: DictConfig, data: Any) -> nn.Module:
        model = build.build_model(cfg, data)
        path, _ = find_head(model)
        if self._start is not None:
            own = {name: t for name, t in model.state_dict().items() if name.startswith(f"{path}.")}
            model.load_state_dict(self._start | own)
        return model if self._head is None else replace_head(model, path, copy.deepcopy(self._head))


class Experts:
    """The trained models of one configuration.

    Args:
        cfg: the merge's configuration.
        suite: the tasks.
        pretrain_epochs: passes of the encoder over what it is pretrained on.
        pretrain_lr: its learning rate.
        gamma: of the frozen heads.
        run_dir: the folder that `subspace-lab resume` would be given.
    """

    def __init__(
        self, cfg: DictConfig, suite: TaskSuite, pretrain_epochs: int, pretrain_lr: float, gamma: float, run_dir: Path
    ) -> None:
        self._cfg, self._suite, self._run_dir, self.gamma = cfg, suite, run_dir, gamma
        self._pretrain_epochs, self._pretrain_lr = pretrain_epochs, pretrain_lr
        plain = schema.to_plain(cfg)
        counted = {group: _without(plain[group], _UNCOUNTED.get(group, ())) for group in _COUNTED if group in plain}
        more = [pretrain_epochs, pretrain_lr, gamma]
        text = json.dumps([EXPERT_VERSION, more, counted], sort_keys=True, default=str, ensure_ascii=False)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = Path(str(cfg.paths.output_root)).absolute() / "experts" / self.key
        self.reused = 0
        self.trained = 0

    def train(
        self, name: str, data: TaskData, start: State | None = None, head: nn.Module | None = None, number: int = 0
    ) -> State:
        """Return one model's weights (its head's too, if that is trained), trained now or read.

        Args:
            name: of the model, and its folder's.
            data: what it learns.
            start: see `ExpertFit`.
            head: likewise.
            number: of models that start from their seed: each draws weights of its own.

        Raises:
            UserError, Interrupted: as `Fit.run`.
        """
        from safetensors.torch import load_file

        folder = self.folder / name.replace(" ", "_").replace("/", "_")
        if interrupt.requested() is not None:
            raise Interrupted(f"interrupted between two experts; continue with: subspace-lab resume {self._run_dir}")
        folder.mkdir(parents=True, exist_ok=True)
        weights, result = folder / EXPORT_FOLDER / WEIGHTS_FILE, folder / RESULT_FILE
        with open(folder / rundir.LOCK_FILE, "a+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # another merge may be training the very same model
            if result.is_file() and weights.is_file():
                self.reused += 1
            else:
                cfg = self._config(folder, pretraining=start is None and head is None, number=number)
                outcome = ExpertFit(data, start, head).run(cfg, folder, label=name, resume_dir=self._run_dir)
                found = {k: v for k, v in outcome.metrics.items() if k.startswith(("train/", "val/", "test/"))}
                write_text(result, json.dumps({"metrics": found, "timing": outcome.timing}, indent=2) + "\n")
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                self.trained += 1
            state: State = load_file(weights)
        return state

    def _config(self, folder: Path, *, pretraining: bool, number: int) -> DictConfig:
        cfg = copy.deepcopy(self._cfg)
        with read_write(cfg), open_dict(cfg):
            cfg.method, cfg.subspace, cfg.merge = dict(_FULL), None, None
            cfg.protocol = {"_target_": "subspace_lab.protocols.fit.Fit"}
            cfg.logger, cfg.tags = dict(_CSV), []
            cfg.export, cfg.estimate, cfg.compare, cfg.published = True, False, None, None
            cfg.paths.output_dir = str(folder)
            cfg.resume = "auto" if any(folder.glob("checkpoints/*.ckpt")) else None
            cfg.seed = int(cfg.seed) + 1000 * number
            if pretraining and self._suite.made[0] is not None:
                cfg.optimizer.lr = self._pretrain_lr
                cfg.trainer.max_epochs = self._pretrain_epochs
        return cfg


def encoder(cfg: DictConfig, arguments: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The model without its head, in evaluation mode, without gradients; and the head's path."""
    rng.seed(cfg.seed)
    model = build.build_model_for(cfg, arguments)
    path, _ = find_head(model)
    return replace_head(model, path, nn.Identity()).eval().requires_grad_(False), path


def whole_model(cfg: DictConfig, arguments: Mapping[str, Any]) -> nn.Module:
    """The model with its head, in evaluation mode, without gradients."""
    rng.seed(cfg.seed)
    return build.build_model_for(cfg, arguments).eval().requires_grad_(False)


def read(where: str, option: str, model: nn.Module, head: str | None = None) -> State:
    """Weights of `model` from a checkpoint.

    Args:
        where: a safetensors file, a folder or a name on the hub.
        option: it was given to, for messages.
        model: what they must fit.
        head: path of a head, whose tensors are left out.

    Raises:
        UserError: no such checkpoint, or its tensors are not the model's.
    """
    from subspace_lab.merging.checkpoints import Checkpoint

    found = Checkpoint(where, option)
    state = {name: found.read(name).view(info.shape).clone() for name, info in found.infos.items()}
    state = state if head is None else without_head(state, head)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != given:
        wrong = next(name for name in [*wanted, *given] if wanted.get(name) != given.get(name))
        raise UserError(
            f"{option}={where}: tensor {wrong} is {given.get(wrong, 'not there')}, and this run's model has "
            f"{wanted.get(wrong, 'no such tensor')}",
            hint="model=… as the checkpoint was trained with",
        )
    return state


def prototype_head(features: Tensor, labels: Tensor, classes: int, gamma: float) -> CosineHead:
    """A frozen head: logits are gamma times the cosine between a feature and the mean direction of a class's features.

    Args:
        features: (n, f) of the pretrained encoder.
        labels: int64 (n,).
        classes: how many; one without examples gets a zero vector.
        gamma: largest logit.
    """
    head = CosineHead(features.shape[1], classes, gamma)
    unit = nn.functional.normalize(features.double(), dim=1)
    sums = unit.new_zeros(classes, unit.shape[1]).index_add_(0, labels, unit)
    head.weight.data.copy_(nn.functional.normalize(sums, dim=1))
    return head.eval().requires_grad_(False)


def without_head(state: Mapping[str, Tensor], path: str) -> State:
    """The encoder's tensors of a whole model."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{path}.")}


def tell(line: str) -> None:
    """Show a line of progress."""
    print(line, file=sys.stderr, flush=True)


def _without(node: Any, names: tuple[str, ...]) -> Any:
    return {k: v for k, v in node.items() if k not in names} if isinstance(node, Mapping) else node
