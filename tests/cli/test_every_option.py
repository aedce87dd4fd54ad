"""Every option of every group composes, and its keys and values fit the target's signature."""

from __future__ import annotations

import pytest

from subspace_lab import catalog
from subspace_lab.app import compose_config
from subspace_lab.schema import config_hash, validate

CHOICES = [(group, option) for group in catalog.groups() for option in catalog.options(group)]


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=[f"{group}={option}" for group, option in CHOICES])
def test_option(group: str, option: str) -> None:
    validate(compose_config([f"{group}={option}"]))


def test_the_default_is_galore_on_a_tiny_llama() -> None:
    cfg = compose_config([])
    assert cfg.name == "galore_llama_tiny_stdlib_text"
    assert cfg.method.name == "galore"


def test_the_command_line_wins_over_what_a_method_chooses() -> None:
    assert compose_config(["subspace=random"]).subspace._target_ != compose_config([]).subspace._target_


def test_the_hash_is_the_same_twice_and_tells_seeds_apart() -> None:
    assert config_hash(compose_config([])) == config_hash(compose_config(["resume=auto"]))
    assert config_hash(compose_config([])) != config_hash(compose_config(["seed=1"]))
