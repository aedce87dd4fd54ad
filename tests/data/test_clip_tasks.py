"""CLIP's tasks: images as CLIP wants them, zero-shot heads, towers by task, and a whole merge of small ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import Command, command  # noqa: F401
from omegaconf import OmegaConf
from PIL import Image
from torch.nn import functional

from subspace_lab.data.clip_catalog import SETS
from subspace_lab.data.clip_tasks import MEAN, STD, ClipTasks, presented
from subspace_lab.errors import UserError
from subspace_lab.merging.settings import MergeSettings
from subspace_lab.models.clip import ClipImageEncoder, ZeroShot, build_clip_encoder, read_tower

SIDE = 8
TASKS = ("mnist", "pcam", "fer2013")


def small_clip(folder: Path, seed: int) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(seed)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared["projection_dim"] = 12
    text = {**shared, "vocab_size": 300, "max_position_embeddings": 77, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**shared, "image_size": SIDE, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    letters = [chr(c) for c in range(33, 127)]
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in letters:
        vocab[letter] = len(vocab)
        vocab[f"{letter}</w>"] = len(vocab)
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)


def small_tower(clip: Path, folder: Path, seed: int) -> None:
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(clip)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in tower.parameters():
            p.add_(0.02 * torch.randn_like(p))
    tower.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, towers/<task>/ and data/clip_tasks/<task>/<split>/, with random weights and pixels."""
    import datasets

    root = tmp_path_factory.mktemp("clip")
    datasets.disable_progress_bars()
    small_clip(root / "clip", 0)
    random = np.random.default_rng(0)
    for number, task in enumerate(TASKS):
        small_tower(root / "clip", root / "towers" / task, number + 1)
        known = SETS[task]
        for split, count in ((known.train, 24), (known.test, 13)):
            classes = len(known.classes(task))
            pixels = random.integers(0, 256, (count, 12, 10 + number, 3), dtype=np.uint8)
            labels = [k % classes for k in range(count)]
            columns: dict[str, Any] = {
                known.image: [Image.fromarray(each) for each in pixels],
                known.label: [bool(label) for label in labels] if task == "pcam" else labels,
            }
            rows = datasets.Dataset.from_dict(columns).cast_column(known.image, datasets.Image())
            rows.save_to_disk(str(root / "data" / "clip_tasks" / task / split))
    return root


def suite(place: Path, **options: Any) -> ClipTasks:
    given: dict[str, Any] = {"side": SIDE, "validation": 6, "workers": 0, "data_dir": str(place / "data")}
    return ClipTasks(list(TASKS), **(given | options))


def words(place: Path, *more: str) -> list[str]:
    towers = ",".join(f"{task}:{place / 'towers' / task}" for task in TASKS)
    return [
        "model=clip_vit_b32",
        f"model.path={place / 'clip'}",
        "data=clip_8_tasks",
        f"data.tasks=[{','.join(TASKS)}]",
        f"data.side={SIDE}",
        "data.validation=6",
        "data.workers=0",
        f"data.data_dir={place / 'data'}",
        f"merge.models={{{towers}}}",
        "merge.family=small",
        *more,
    ]


@pytest.mark.parametrize("size", [(10, 8), (8, 10), (8, 8), (37, 23), (3, 5)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_as_clip_sees_them(size: tuple[int, int], mode: str) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    steps = [Resize(8, InterpolationMode.BICUBIC), CenterCrop(8), ToTensor(), Normalize(MEAN, STD)]
    expected = Compose(steps)(image.convert("RGB"))
    found = presented(image, 8)
    assert found.shape == (3, 8, 8)
    # Where an odd number of pixels is cut off, one rounds up and the other down.
    if (max(size) * 8 // min(size)) % 2 == 0:
        torch.testing.assert_close(found, expected)


def test_a_suite_holds_out_validation_images_and_reads_labels_of_any_kind(place: Path) -> None:
    made = suite(place).made
    assert made[0] is None
    for task, known in zip(made[1], TASKS, strict=True):
        assert (task.name, task.classes) == (known, len(SETS[known].classes(known)))
        assert [len(part) for part in (task.parts.train, task.parts.validation, task.parts.test)] == [18, 6, 13]
        batch = task.parts.test.batch(np.arange(5))
        assert batch["inputs"].shape == (5, 3, SIDE, SIDE)
        assert batch["labels"].tolist() == [k % task.classes for k in range(5)]
        assert batch["labels"].dtype == torch.int64
    assert len(suite(place, test=4).made[1][0].parts.test) == 4
    again = suite(place)
    assert again.made[1][0].parts.test.identity() == made[1][0].parts.test.identity()


def test_heads_are_mean_directions_of_the_prompts(place: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    clip, tokenizer = (kind.from_pretrained(place / "clip") for kind in (CLIPModel, CLIPTokenizer))
    classes, prompts = ("cat", "a long dog"), ("a photo of a {}.", "the {}!", "{}")
    head = ZeroShot(str(place / "clip")).head(classes, prompts)
    features = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    means = []
    with torch.no_grad():
        for name in classes:
            each = []
            for prompt in prompts:
                tokens = tokenizer([prompt.replace("{}", name)], return_tensors="pt")
                pooled = clip.text_model(input_ids=tokens["input_ids"]).pooler_output
                each.append(functional.normalize(clip.text_projection(pooled), dim=1))
            means.append(functional.normalize(torch.cat(each).mean(0), dim=0))
        expected = clip.logit_scale.exp() * functional.normalize(features, dim=1) @ torch.stack(means).T
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in head.parameters())


def test_an_encoder_gives_what_transformers_gives_and_takes_towers(place: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    encoder = build_clip_encoder(path=str(place / "clip"))
    assert isinstance(encoder, ClipImageEncoder)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    theirs = CLIPVisionModelWithProjection.from_pretrained(place / "clip")
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), theirs(pixel_values=x).image_embeds)
        tower = read_tower(str(place / "towers" / "mnist"), "merge.models.mnist", encoder)
        moved = torch.func.functional_call(encoder, tower, (x,), strict=False)
        theirs.load_state_dict(tower, strict=False)
        torch.testing.assert_close(moved, theirs(pixel_values=x).image_embeds)
    assert tower.keys() == {name for name in theirs.state_dict() if name.startswith("vision_model.")}
    assert not torch.equal(moved, encoder(x))


def test_towers_of_another_architecture_and_folders_that_are_not_there(place: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    encoder = build_clip_encoder(path=str(place / "clip"))
    assert isinstance(encoder, ClipImageEncoder)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=SIDE, patch_size=4)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"mlp.fc1.weight is \(24, 16\) there and \(32, 16\)"):
        read_tower(str(tmp_path / "other"), "merge.models.mnist", encoder)
    with pytest.raises(UserError, match="no such folder"):
        build_clip_encoder(path=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot read model\.path"):
        build_clip_encoder(path=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["mnits"]}, "no task 'mnits'"),
        ({"tasks": ["mnist", "mnist"]}, "each once"),
        ({"tasks": []}, "expected some tasks"),
        ({"tasks": ["mnist"], "validation": 0}, "validation"),
        ({"tasks": ["mnist"], "workers": -1}, "workers"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClipTasks(**options)


@pytest.mark.slow
def test_a_whole_merge(place: Path, tmp_path: Path, command: Command) -> None:  # noqa: F811
    found = command(
        *words(place, "method=task_arithmetic", "protocol.scales=[0.1,0.4]", f"paths.output_dir={tmp_path}/run")
    )
    assert found.code == 0, found.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    section = results["merge"]
    assert section["tasks"] == list(TASKS)
    assert section["family"] == "small"
    assert section["scale"]["value"] in (0.1, 0.4)
    assert set(section["merged"]) == set(section["experts"]) == set(TASKS)
    assert len(section["merged"]["fer2013"]["marginals"]) == 7


@pytest.mark.parametrize(
    ("changed", "side", "message"),
    [
        ({}, SIDE, "needs a fine-tuned vision tower for each task"),
        ({}, 16, "wants images of 8×8 pixels"),
        ({"_target_": "subspace_lab.models.small_vit.build_small_vit", "path": None}, SIDE, "are for CLIP models"),
    ],
    ids=["no_towers", "side", "model"],
)
def test_what_does_not_fit_is_one_line(place: Path, changed: dict[str, Any], side: int, message: str) -> None:
    node = {"_target_": "subspace_lab.models.clip.build_clip_encoder", "path": str(place / "clip")} | changed
    cfg = OmegaConf.create({"model": {key: value for key, value in node.items() if value is not None}})
    with pytest.raises(UserError, match=message):
        suite(place, side=side).load(cfg, MergeSettings(), torch.device("cpu"))


def test_a_base_of_its_own(place: Path) -> None:
    towers = {task: str(place / "towers" / task) for task in TASKS}
    cfg = OmegaConf.create({"model": {"_target_": "subspace_lab.models.clip.build_clip_encoder"}})
    cfg.model.path = str(place / "clip")
    settings = MergeSettings(models=towers, base=towers["pcam"])
    model, base, models, heads = suite(place).load(cfg, settings, torch.device("cpu"))
    assert all(torch.equal(base[name], models[1][name]) for name in base)
    assert all(torch.equal(model.state_dict()[name], W) for name, W in base.items())
    assert [head.weight.shape for head in heads] == [(10, 12), (2, 12), (7, 12)]
