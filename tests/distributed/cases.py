"""What two processes are compared with one on: one case for every code path that several processes take."""

from __future__ import annotations

from dataclasses import dataclass

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
QUIET = ("trainer.progress=off", "trainer.log_every=1", "compare=null", "export=false", "trainer.checkpoint_every=0")
# 161 validation examples in global batches of 80: the last holds one, and one process has none of it.
DIGITS = (*QUIET, "data.val_size=161", "scheduler=constant", "trainer.max_epochs=null")
MLP = ("data=digits", "model=mlp", "model.hidden=[16,16]", *DIGITS, "trainer.max_steps=8", "trainer.val_every=4")
TASKS = ("model.hidden=[24,24]", "scenario.tasks=2", *DIGITS, "trainer.max_steps=6")
LLAMA = (
    "data=text",
    "data.files=[FOLDER/corpus.jsonl]",
    "paths.cache_dir=FOLDER/cache",
    "data.block_size=16",
    "data.val_fraction=0.2",
    "data.val_tokens=520",  # 33 rows
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_heads=2",
    "model.num_layers=1",
    "optimizer.lr=0.01",
    "scheduler=constant",
    "trainer.max_steps=8",
    "trainer.val_every=4",
    *QUIET,
)
GALORE = (*LLAMA, "method.rank=4", "method.refresh_every=3")


@dataclass(frozen=True)
class Case:
    """Overrides, with FOLDER where the text lies, and how near two processes come to one.

    Attributes:
        name: of the test.
        words: for both.
        batch: examples per process of the pair; the one process takes twice as many.
        one, two: overrides of only one of them.
        figures: largest relative difference of a figure of any row or of the end; float32 sums in another order give
            some 1e-7 in a few steps, and what is larger says why.
        weights: length of the difference of all weights, of their own.
        fast: part of `make test`.
    """

    name: str
    words: tuple[str, ...]
    batch: int = 10
    one: tuple[str, ...] = ()
    two: tuple[str, ...] = ()
    figures: float = 1e-5
    weights: float = 1e-6
    fast: bool = False


def _optimizers() -> list[Case]:
    names = ("adafactor", "adam", "adamw", "lamb", "lion", "muon", "sgd")
    # Muon's orthogonalisation runs in bfloat16 and doubles what differs.
    more: dict[str, dict[str, float]] = {"muon": {"figures": 1e-3, "weights": 1e-3}}
    plain = [Case(f"none_{n}", ("method=none", f"optimizer={n}", *LLAMA), 2, **more.get(n, {})) for n in names]
    inside = [Case(f"galore_{n}", (f"optimizer={n}", *GALORE), 2, **more.get(n, {})) for n in names if n != "adamw"]
    return plain + inside


def _galore() -> list[Case]:
    matrices = ("method=galore", *MLP, "method.targets=all-linear", "method.rank=4", "method.refresh_every=3")
    cases = [Case("galore_digits", matrices, fast=True), Case("galore", GALORE, 2)]
    cases += [Case(f"galore_{name}", (f"subspace={name}", *GALORE), 2) for name in ("identity", "random", "randomized")]
    cases += [Case(f"galore_{word}", (*GALORE, f"method.moments={word}"), 2) for word in ("rotate", "reset")]
    cases += [
        Case("galore_stagger", (*GALORE, "method.stagger=true"), 2),
        Case("galore_release", (*GALORE, "method.variant=release"), 2),
        Case("galore_gram", (*GALORE, "subspace.solver=gram"), 2),
        Case("galore_clipped", (*GALORE, "trainer.gradient_clip_val=0.1"), 2),
        Case("galore_accumulating", (*GALORE, "data.global_batch_size=8"), 2),
        # Rows have different numbers of targets, and each process takes the mean over its own.
        Case("galore_padded", (*GALORE, "data.packing=pad", "data.block_size=80"), 2, figures=5e-2, weights=5e-2),
    ]
    return cases


def _sharded() -> list[Case]:
    """FSDP2. Where rows are split an iteration stands for LAPACK; on tiny matrices it finds the same directions."""
    kinds = {"": (), "_randomized": ("subspace=randomized",), "_random": ("subspace=random",)}
    kinds |= {"_identity": ("subspace=identity",), "_accumulating": ("data.global_batch_size=8",)}
    kinds |= {"_clipped": ("trainer.gradient_clip_val=0.1",)}
    fsdp = ("trainer.strategy=fsdp",)
    return [
        Case("fsdp_none", ("method=none", *LLAMA), 2, two=fsdp),
        *(Case(f"fsdp_galore{kind}", (*GALORE, *words), 2, two=fsdp) for kind, words in kinds.items()),
        Case("fsdp_gcr", ("method=gcr", *MLP, "protocol=fit", "method.k=3"), weights=1e-5, two=fsdp),
    ]


def _intrinsic() -> list[Case]:
    words = ("method=intrinsic_dimension", "protocol=fit", *MLP, "method.d=20")
    kinds = ("dense", "gaussian", "fastfood", "fastfood_blocked", "sparse", "one_hot", "kronecker")
    return [
        Case("intrinsic", words, fast=True),
        *(Case(f"intrinsic_{kind}", (*words, f"method.projection={kind}")) for kind in kinds),
        Case("intrinsic_per_layer", (*words, "method.scope=per_layer")),
        Case("intrinsic_said", (*words, "method.variant=said")),
        Case("intrinsic_said_fastfood", (*words, "method.variant=said", "method.projection=fastfood")),
    ]


def _heads() -> list[Case]:
    words = (*MLP, "protocol=fit")
    on_manifold = {"weights": 1e-5}
    return [
        Case("gcr", ("method=gcr", *words, "method.k=3"), **on_manifold, fast=True),
        Case("gcr_release", ("method=gcr", *words, "method.k=3", "method.variant=release"), **on_manifold),
        Case("gcr_adamw", ("method=gcr", *words, "method.k=3", "optimizer=adamw"), **on_manifold),
        Case("softmax", ("method=softmax", *words)),
        Case("cosine_softmax", ("method=cosine_softmax", *words)),
        Case("manifold_sphere", ("method=manifold", *words)),
        Case("manifold_stiefel", ("method=manifold", *words, "method.stiefel=[weight]", "method.sphere=[]")),
        Case("manifold_grassmann", ("method=manifold", *words, "method.grassmann=[weight]", "method.sphere=[]")),
        Case("bce", ("method=softmax", *words, "data.loss=bce", "data.label_smoothing=0.1")),
    ]


def _callbacks() -> list[Case]:
    words = ("method=none", *MLP)
    return [
        Case("early_stopping", (*words, "callbacks=early_stopping", "trainer.val_every=1",
             "callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=5")),
        Case("plateau", (*words, "callbacks=plateau", "trainer.val_every=1", "callbacks.plateau.patience=1",
             "optimizer=sgd", "optimizer.lr=0.5")),
        Case("ema", (*words, "callbacks=ema", "callbacks.averaging.decay=0.9")),
        Case("swa", (*words, "callbacks=swa", "callbacks.averaging.start=0.5")),
        Case("gcr_ema", ("method=gcr", "protocol=fit", *MLP, "method.k=3", "callbacks=ema",
             "callbacks.averaging.decay=0.9"), weights=1e-5),
        Case("bf16_mixed", (*words, "trainer.precision=bf16-mixed"), figures=1e-2, weights=1e-3),
        Case("bf16_true", (*words, "trainer.precision=bf16-true"), figures=5e-2, weights=2e-2),
        Case("augmented", (*words, "data.augment=crop_flip")),
        # Each batch is mixed by numbers of its own: one process needs as many batches.
        Case("mixed", (*words, "data.mixup=0.2", "data.cutmix=1.0"),
             one=("data.batch_size=10", "trainer.accumulate_grad_batches=2")),
        Case("accumulating", (*words, "trainer.accumulate_grad_batches=2"), 5),
        Case("train_accuracy", (*words, "protocol.train_accuracy=true")),
        Case("transfer", ("method=gcr", *MLP, "method.k=3", "protocol=transfer", "protocol.probe_examples=200"),
             weights=1e-5),
    ]  # fmt: skip


def _continual() -> list[Case]:
    def case(method: str, *words: str, **more: object) -> Case:
        return Case(method.split("@")[-1], (f"method={method.split('@')[0]}", *TASKS, *words), **more)  # type: ignore[arg-type]

    # What one process draws of the reservoir the pair divides.
    replay = ("method.buffer_size=50", "optimizer.lr=0.03")
    draws = {"one": ("method.minibatch_size=16",), "two": ("method.minibatch_size=8",)}
    return [
        case("naive"),
        case("joint"),
        case("gpm", fast=True),
        case("gpm@gpm_adamw", "optimizer=adamw", "optimizer.lr=0.003"),
        case("sgp"),
        case("trgp"),
        case("rogo", "scenario.tasks=3", "method.gradient_steps=2", "method.gamma=0.1"),
        # Directions beyond the gradient's rank are rounding errors, which Adam makes as long as all others.
        case("coso", "method.r1=3"),
        case("coso@coso_paper", "method.r1=3", "method.variant=paper", "method.side=input"),
        case("adaptive_svd"),
        case("adaptive_svd@adaptive_svd_release", "method.variant=release"),
        case("hlop"),
        case("dgp"),
        # Where PGD starts in its ball is drawn by each process: a ball so small that it does not matter.
        case("dgp@dgp_adversarial", "method.defense=adversarial", "method.epsilon=1e-6"),
        case("er", *replay, **draws),
        case("der", *replay, **draws),
        case("derpp", *replay, **draws, fast=True),
        case("bfp", *replay, **draws),
        case("inflora"),
        case("o_lora", "method.dropout=0"),
        case("nmc"),
        case("if2net", "method.width=50"),
        case("gpm@gpm_plateau", "callbacks=plateau", "callbacks.plateau.patience=1", "trainer.val_every=1"),
        case("gpm@gpm_split", "data=split_digits", "data.batch_size=4", batch=5),
        case("gpm@gpm_rotated_attacked", "data=rotated_digits", "protocol.attack=fgsm"),
    ]


def _texts() -> list[Case]:
    tasks = ("data=text_5_tasks", "data.root=FOLDER/tasks", "data.order=[first,second]", "data.train_per_class=null",
             "data.source_length=24", "data.val_size=3", "model=t5_tiny", "model.dropout=0", "model.hidden_size=16",
             "model.intermediate_size=24", "model.num_heads=2", "model.num_layers=1")  # fmt: skip
    more = ("scheduler=constant", "trainer.max_epochs=null", "trainer.max_steps=4", *QUIET)
    pairs = ("data=mrpc", "paths.data_dir=FOLDER", "data.tokenizer=FOLDER/tokenizer.json", "data.val_size=21",
             "model=bert_tiny", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2",
             "model.intermediate_size=24")  # fmt: skip
    return [
        Case("text_tasks", ("method=adaptive_svd", *tasks, *more), 3),
        # BERT drops units, and each process its own: what is compared are evaluations.
        Case("sentences", ("method=none", *pairs, *more), 4, figures=1e-2, weights=5e-2),
    ]


CASES = [*_texts(), *_galore(), *_sharded(), *_optimizers(), *_intrinsic(), *_heads(), *_callbacks(), *_continual()]
