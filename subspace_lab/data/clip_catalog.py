"""The twenty image sets of CLIP merging experiments: where they are on the hub, and their zero-shot prompts.

Task lists: TA8 of Ilharco et al., ICLR 2023 (arXiv 2212.04089); TALL14 and TALL20 of Wang et al., ICML 2024 (arXiv
2405.07813). Sets, labels and prompts are those that FusionBench uses with its checkpoints; the prompts are CLIP's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from subspace_lab.data.clip_classes import CLASSES


@dataclass(frozen=True)
class ClipSet:
    """One set.

    Attributes:
        hub: its name on the Hugging Face hub.
        prompts: with {} for the name of a class.
        config: of the set on the hub, where it has several.
        train: name of the training split.
        test: name of the split that is reported.
        image: column of the images.
        label: column of the labels.
    """

    hub: str
    prompts: tuple[str, ...]
    config: str | None = None
    train: str = "train"
    test: str = "test"
    image: str = "image"
    label: str = "label"

    def classes(self, task: str) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return CLASSES[task]


def _prompts(pattern: str, *choices: str) -> tuple[str, ...]:
    """All that a pattern gives whose < > take each of the choices, separated by |, in turn."""
    found = []
    for words in product(*(choice.split("|") for choice in choices)):
        text = pattern
        for word in words:
            text = text.replace("<>", word, 1)
        found.append(text)
    return tuple(found)


_PHOTO = _prompts("a photo of <> {}.", "a|the")
_NUMBER = ('a photo of the number: "{}".',)
_CIFAR = (
    *_prompts("a <>photo of <> {}.", "|blurry |black and white |low contrast |high contrast |bad |good ", "a|the"),
    *_prompts("a photo of <> <> {}.", "a|the", "small|big"),
)

SETS: dict[str, ClipSet] = {
    "sun397": ClipSet("tanganke/sun397", _PHOTO),
    "stanford-cars": ClipSet(
        "tanganke/stanford_cars",
        (*_prompts("a photo of <> {}.", "a|the|my|my dirty|my clean|my new|my old"), "i love my {}!"),
    ),
    "resisc45": ClipSet(
        "tanganke/resisc45", _prompts("<> <> of <>{}.", "satellite|aerial", "imagery|photo|view", "|a |the ")
    ),
    "eurosat": ClipSet("tanganke/eurosat", _prompts("a centered satellite photo of <>{}.", "|a |the ")),
    "svhn": ClipSet("ufldl-stanford/svhn", _NUMBER, config="cropped_digits"),
    "gtsrb": ClipSet("tanganke/gtsrb", _prompts('a <> photo of a "{}" traffic sign.', "zoomed in|centered|close up")),
    "mnist": ClipSet("ylecun/mnist", _NUMBER),
    "dtd": ClipSet("tanganke/dtd", _prompts("a photo of <> {} <>.", "a|the", "texture|pattern|thing|object")),
    "oxford_flowers102": ClipSet("dpdl-benchmark/oxford_flowers102", ("a photo of a {}, a type of flower.",)),
    "pcam": ClipSet("1aurent/PatchCamelyon", ("this is a photo of {}",)),
    "fer2013": ClipSet(
        "clip-benchmark/wds_fer2013",
        (
            "a photo of a {} looking face.",
            *_prompts("a photo of a face <> {}.", "showing the emotion:|looking"),
            "a face that looks {}.",
            "they look {}.",
            "look at how {} they are.",
        ),
        image="jpg",
        label="cls",
    ),
    "oxford-iiit-pet": ClipSet("timm/oxford-iiit-pet", ("a photo of a {}, a type of pet.",)),
    "stl10": ClipSet("tanganke/stl10", _PHOTO),
    "cifar100": ClipSet("tanganke/cifar100", _CIFAR),
    "cifar10": ClipSet("tanganke/cifar10", _CIFAR),
    "food101": ClipSet("ethz/food101", ("a photo of {}, a type of food.",), test="validation"),
    "fashion_mnist": ClipSet("zalando-datasets/fashion_mnist", _PHOTO),
    "emnist_letters": ClipSet("tanganke/emnist_letters", ('a photo of the digit character: "{}".',)),
    "kmnist": ClipSet("tanganke/kmnist", ("a photo of the character {}.",)),
    "rendered-sst2": ClipSet("nateraw/rendered-sst2", ("a {} review of a movie.",)),
}
"""Task -> set, in the order of the twenty tasks."""
