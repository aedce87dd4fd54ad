"""What the trainer group refuses, in one line, before anything is built."""

from __future__ import annotations

import pytest
import torch

from subspace_lab.errors import UserError
from subspace_lab.methods.base import Method
from subspace_lab.training.trainer import TrainerPlan


def refuses(pattern: str, action: object) -> None:
    with pytest.raises(UserError, match=pattern) as told:
        action()  # type: ignore[operator]
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "key", ["max_steps", "val_every", "keep_checkpoints", "log_every", "devices", "num_nodes", "val_batches"]
)
def test_counts_are_at_least_one(key: str) -> None:
    refuses(f"trainer.{key} is 0", lambda: TrainerPlan(**{key: 0}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu() -> None:
    assert TrainerPlan().resolve().accelerator == "cpu"
    refuses("no CUDA GPU", lambda: TrainerPlan(accelerator="gpu").resolve())
    assert TrainerPlan(strategy="fsdp", devices=2, accelerator="cpu").resolve().world_size == 2
    refuses("16-mixed needs a GPU", lambda: TrainerPlan(precision="16-mixed").resolve())
    plan = TrainerPlan(strategy="ddp", devices=2, accelerator="cpu").resolve()
    assert plan.world_size == 2


def test_several_devices_mean_ddp() -> None:
    assert TrainerPlan(accelerator="cpu", devices=2).resolve().strategy == "ddp"


def test_accumulation_comes_from_the_global_batch() -> None:
    plan = TrainerPlan(accelerator="cpu", devices=2)
    assert plan.accumulation(4, None) == 1
    assert plan.accumulation(4, 32) == 4
    assert TrainerPlan(accumulate_grad_batches=3).accumulation(4, 32) == 3
    refuses(r"global_batch_size=36 is not a multiple.*data.batch_size=3 fits", lambda: plan.accumulation(4, 36))
    refuses("multiple of 2", lambda: plan.accumulation(4, 7))


class Layerwise(Method):
    name = "layerwise"
    per_layer = True


class ThreePasses(Method):
    name = "three"
    passes_per_step = 3


def test_methods_and_settings_that_do_not_go_together() -> None:
    plan = TrainerPlan(accelerator="cpu")
    plan.check_method(Layerwise(), 1)
    plan.check_method(ThreePasses(), 1)
    refuses("2 micro-batches", lambda: plan.check_method(Layerwise(), 2))
    refuses("clipping", lambda: TrainerPlan(gradient_clip_val=1.0).check_method(Layerwise(), 1))
    refuses("16-mixed", lambda: TrainerPlan(precision="16-mixed").check_method(Layerwise(), 1))
    refuses("several processes", lambda: TrainerPlan(devices=2).check_method(Layerwise(), 1))
    refuses("3 passes.*accumulate", lambda: plan.check_method(ThreePasses(), 2))
    refuses("3 passes.*16-mixed", lambda: TrainerPlan(precision="16-mixed").check_method(ThreePasses(), 1))
    refuses("FSDP", lambda: TrainerPlan(strategy="fsdp").check_method(Layerwise(), 1))
    TrainerPlan(strategy="fsdp").check_method(Method(), 4)
