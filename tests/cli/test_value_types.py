"""The rules by which a configuration value fits an annotation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from omegaconf import OmegaConf

from subspace_lab.annotations import check_value, describe, fits
from subspace_lab.errors import UserError
from subspace_lab.schema import config_hash, to_plain
from subspace_lab.signatures import locate, schema_of

if TYPE_CHECKING:
    from nowhere import Unknown


@pytest.mark.parametrize(
    ("value", "annotation", "ok"),
    [
        (3, int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (True, float, False),
        ("3", float, False),
        (3, str, False),
        (None, int, False),
        (None, int | None, True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (1, Literal[True], False),
        (8, int | Literal["auto"], True),
        ("auto", int | Literal["auto"], True),
        ([1, 2], Sequence[int], True),
        ([1, "x"], list[int], False),
        ("ab", Sequence[str], False),
        ([0.9, 0.95], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ([1, 2, 3], tuple[int, ...], True),
        ("some/where", Path, True),
        (3, Path, False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "x"}, dict[str, int], False),
        ({"_target_": "x.Y"}, Path, False),
        ({"_target_": "x.Y"}, OutOfPlace := type("OutOfPlace", (), {}), True),
        ({"_target_": "x.Y"}, int, False),
        ("text", OutOfPlace, False),
        ("anything", Any, True),
    ],
)
def test_fits(value: object, annotation: Any, ok: bool) -> None:
    made = OmegaConf.create({"value": value}).value  # lists and mappings as Hydra hands them over
    assert fits(made, annotation) is ok


def test_the_message_has_key_value_expectation_and_hint() -> None:
    with pytest.raises(UserError, match=r"trainer.max_steps=1000.0: expected an integer") as caught:
        check_value(1e3, int, "trainer.max_steps")
    assert caught.value.hint == "write trainer.max_steps=1000"
    with pytest.raises(UserError) as caught:
        check_value("relese", Literal["paper", "release"], "method.variant")
    assert caught.value.hint == "did you mean 'release'?"
    assert "paper, release" in caught.value.message


def test_descriptions_use_the_command_lines_words() -> None:
    assert describe(int | None) == "an integer or null"
    assert describe(float | Literal["auto"] | None) == "a number, auto or null"
    assert describe(tuple[float, float]) == "a list of 2 (a number, a number)"


def target(rank: int, scale: float = 0.25, note: str = None, other: Unknown | None = None, *rest: int) -> None:  # noqa: RUF013
    """A signature with an annotation that only type checkers can resolve."""


def test_a_signature_is_read_even_with_names_for_type_checkers_only() -> None:
    parameters, open_ended = schema_of(target)
    assert not open_ended
    assert parameters["rank"] is int and parameters["scale"] is float
    assert parameters["note"] == str | None, "a default of None allows null"
    assert parameters["other"] is Any
    assert "rest" not in parameters


def test_locate_names_what_is_missing() -> None:
    assert locate("pathlib.Path", "x") is Path
    with pytest.raises(UserError, match="did you mean 'Path'"):
        locate("pathlib.Pathh", "x")
    with pytest.raises(UserError, match="needs the package 'no_such_package'"):
        locate("no_such_package.Thing", "optimizer")


def test_an_unresolvable_leaf_is_named_in_full() -> None:
    cfg = OmegaConf.create({"a": {"b": [1, "${c.d}"]}})
    with pytest.raises(UserError, match=r"a\.b\.1=\$\{c\.d\} cannot be resolved"):
        to_plain(cfg)
    with pytest.raises(UserError, match=r"a\.b has no value"):
        to_plain(OmegaConf.create({"a": {"b": "???"}}))


def test_the_hash_ignores_where_and_how_but_not_what() -> None:
    base = {"name": "x", "seed": 0, "resume": None, "paths": {"output_dir": "a"}, "log": "${paths.output_dir}/log"}

    def digest(**changed: object) -> str:
        return config_hash(OmegaConf.create(base | changed))

    assert digest() == digest(resume="auto") == digest(paths={"output_dir": "b"})
    assert digest() != digest(seed=1)
    assert digest() != digest(name="y")
